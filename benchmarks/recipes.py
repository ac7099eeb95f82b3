"""How much of a planted truth each recipe finds and explains, on the same activations: ours, published ones, the truth itself.

    python benchmarks/recipes.py --worlds easy long --seeds 201 202
    python benchmarks/recipes.py --grid quick --seeds 201 202
    python benchmarks/recipes.py --grid full --seeds 201 --recipes "ours, batch_topk"

--grid trains our two variants with default flags in many worlds, each under several dials (k or the L1 weight, latents, batch),
and prints the worst cell and the median beside the table. The recipe was chosen on seeds 101 to 103.

Each world is written once as paired datasets under runs/recipes/worlds and trained on as a user would; results are appended
to runs/recipes/recipes.csv, and a run that stands there is not repeated, so several can work side by side on different seeds.
Prints a table, mean and (where it differs) worst seed, and draws it as runs/recipes/recipes.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.worlds import DIALS, HELD_OUT, L1_DIALS, QUICK, UNFAIR, WORLDS, World, collect_tiny_pair, told, write_world
from config import LR_FACTOR, TrainConfig
from crosscoder import CrossCoder
from ops import latents
from ops.weights import Adam
from run import checkpoint
from sources.batches import estimate_normalization
from sources.dataset_files import open_datasets
from sources.planted import RECOVERED, PlantedConcepts
from sources.stored import PairedActivations
from train import DEAD_AFTER_AT_MOST, evaluate, held_out, latent_classes, lr_factor, update

OURS = ["ours, vanilla", "ours, batch_topk"]
RECIPES = {
    "ours, vanilla": ["--l1-coeff", "{l1}"],
    "ours, batch_topk": ["--variant", "batch_topk", "--k", "{k}"],
    # ckkissane/crosscoder-model-diff-replication: scale without centring, L1 2 after 5 %, no warm-up, decay over the last 20 %
    "L1 (ckkissane)": [
        *["--no-center", "--l1-coeff", "2", "--lr", "5e-5", "--dec-init-norm", "0.08", "--l1-warmup", "0.05"],
        *["--lr-warmup", "0", "--lr-decay", "0.2", "--aux-coeff", "0", "--resample-until", "0"],
    ],
}
UNSQUARED = "BatchTopK (crosscoder_learning)"  # trained by train_unsquared
HELD = "planted dictionary"  # by train_held: no recipe, but what the truth itself explains
QUARTERS = ["recall_rarest", "recall_rare", "recall_common", "recall_commonest"]  # of all concepts, by rate
WAYS = ("norm", "scaling", "both")  # to call a latent exclusive: decoder norms, latent scaling, or only where both agree
COLUMNS = [
    "world", "dials", "recipe", "lr", "seed", "flags", "right_shared",
    *(f"{what}_{way}" for way in WAYS for what in ("base_only", "ft_only", "false")),
    *QUARTERS, "explained_variance", "l0_loss", "dead_fraction", "tokens", "seconds",
]  # fmt: skip


def run(folder: Path, name: str, dials: dict, recipe: str, seed: int, lr: str | None, tokens: int | None) -> dict:
    """Train one recipe on one world under these dials for so many tokens, in folder/worlds and folder/runs, and score it."""
    world = WORLDS[name]._replace(**dials)
    tokens = tokens or world.tokens
    if world.planted is None:
        planted, data = None, folder / "worlds" / "tiny-pair"
        collect_tiny_pair(data)
        named = [("--dataset", str(data / "data"))]
    else:
        planted = PlantedConcepts(seed, **world.planted)
        data = folder / "worlds" / f"{'-'.join(f'{key}={value}' for key, value in world.planted.items())}-{seed}-{tokens}"
        write_world(data, planted, tokens)
        named = [("--base-dataset", str(data / "base.arrow")), ("--ft-dataset", str(data / "ft.arrow"))]
    source = PairedActivations(open_datasets(named, (None, None)), HELD_OUT, 0, seed)
    started = time.perf_counter()
    unscale = (1 / source.stored_scale.float())[:, None]  # [2, 1] stored values -> raw activations
    if recipe in (UNSQUARED, HELD):
        if recipe == UNSQUARED:
            crosscoder, dead = train_unsquared(source, world, float(lr or 1e-4), tokens, seed)
        else:
            crosscoder, dead = train_held(source, world, planted, lr, tokens, seed)
        crosscoder.compute_dtype = torch.float32  # as train.py measures
        crosscoder.fit_threshold(lambda: held_out(crosscoder, source, world.batch_size, unscale))
    else:
        out = folder / "runs" / f"{name} {told(dials)} {recipe} {lr} {seed} {tokens}".replace(", ", "-").replace(" ", "_")
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, str(ROOT / "train.py"), "--output-dir", str(out.parent), "--run-name", out.name]
        command += [word for flag_and_name in named for word in flag_and_name]
        command += ["--seed", str(seed), "--val-tokens", str(HELD_OUT), "--compute-dtype", "bfloat16", "--wandb", "disabled"]
        command += ["--log-every", "100", *train_flags(name, dials, recipe, lr, tokens)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        crosscoder = CrossCoder.from_pretrained(out / "crosscoder")
        resolved = json.loads((out / "config.json").read_text())["resolved"]
        since_fired = checkpoint.read(checkpoint.find(out))[0]["tokens_since_fired"]
        dead = since_fired >= min(DEAD_AFTER_AT_MOST, int(resolved["dead_window"] * tokens))
    seconds = time.perf_counter() - started
    result = {"world": name, "dials": told(dials), "recipe": recipe, "lr": lr or "own", "seed": seed, "tokens": tokens}
    others = told({name: value for name, value in dials.items() if name != "k"})
    here = f"--lrs {lr or 'own'}, k {world.k}" + (f", {others}" if others else "")  # of what this script trains itself
    result["flags"] = here if recipe in (UNSQUARED, HELD) else " ".join(train_flags(name, dials, recipe, lr, tokens))
    result["seconds"] = round(seconds, 1)
    measured = evaluate(crosscoder, source, world.batch_size, unscale, 0.0)
    result |= {name: measured["val_" + name] for name in ("explained_variance", "l0_loss")}
    result |= {"dead_fraction": dead.float().mean().item()}
    return result | (score(crosscoder, dead, planted, source) if planted else {})


def train_flags(name: str, dials: dict, recipe: str, lr: str | None, tokens: int) -> list[str]:
    """The flags of train.py that set a cell's run apart from the others."""
    world = WORLDS[name]._replace(**dials)
    flags = ["--num-tokens", str(tokens), "--d-hidden", str(world.d_hidden), "--batch-size", str(world.batch_size)]
    return flags + [part.format(k=world.k, l1=f"{world.l1:g}") for part in RECIPES[recipe]] + (["--lr", lr] if lr else [])


def untrained(source, world: World, seed: int) -> CrossCoder:
    """A BatchTopK crosscoder that normalises these rows."""
    crosscoder = CrossCoder(source.d_model, world.d_hidden, 2, "batch_topk", world.k, None, 1.0, seed, torch.bfloat16)
    mean, scale = estimate_normalization(source, center=True)
    crosscoder.mean.copy_(mean / source.stored_scale[:, None])
    crosscoder.scale.copy_(scale * source.stored_scale)
    return crosscoder


def training_batches(crosscoder: CrossCoder, source, batch_size: int, tokens: int, name: str) -> Iterator[tuple[int, Tensor]]:
    """The number of each step, from 0, and its normalised rows [batch, 2, d_model]."""
    unscale = 1 / source.stored_scale.float()[:, None]  # [2, 1] stored values -> raw activations
    stream, steps = source.batches(batch_size, tokens, torch.device("cpu")), math.ceil(tokens / batch_size)
    for step, batch in enumerate(tqdm(stream, total=steps, desc=name, unit="step", mininterval=5)):
        yield step, crosscoder.normalize(batch.x.float() * unscale)


def train_unsquared(source, world: World, lr: float, tokens: int, seed: int) -> tuple[CrossCoder, Tensor]:
    """BatchTopK as crosscoder_learning trains it -> the crosscoder, and which latents are dead [d_hidden].

    The mean over rows and models of the un-squared error norm, an auxiliary loss of 1/32 for what has been silent for 10M
    tokens, decoder norm 1, b_dec from the geometric median of the first batch, Adam with a constant rate after its warm-up
    (1000 of about 100,000 steps there, so 1 % here), gradients clipped to 1. Our code does the selection.
    """
    crosscoder, steps = untrained(source, world, seed), math.ceil(tokens / world.batch_size)
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=lr, fused=True)
    silent = torch.zeros(world.d_hidden, dtype=torch.int64)  # tokens since each latent fired
    for step, x in training_batches(crosscoder, source, world.batch_size, tokens, f"crosscoder_learning, lr {lr:g}"):
        if step == 0:
            crosscoder.b_dec.data.copy_(geometric_median(x.flatten(1)).view(2, -1))
        optimizer.param_groups[0]["lr"] = lr * lr_factor(step, steps, warmup=0.01, decay=0)
        dead = silent >= DEAD_AFTER_AT_MOST
        out = crosscoder.losses(x, 0, 1 / 32, dead if dead.any() else None)
        residual = (x - out.x_hat).detach()
        variance = (residual - residual.mean(0)).pow(2).sum((1, 2)).mean()
        ((x - out.x_hat).norm(dim=-1).mean() + out.aux_loss / variance / 32).backward()
        torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x)).masked_fill_(out.fired, 0)
    return crosscoder, silent >= tokens // 10


def train_held(
    source, world: World, planted: PlantedConcepts, lr: str | None, tokens: int, seed: int
) -> tuple[CrossCoder, Tensor]:
    """An encoder for the planted dictionary -> the crosscoder, and which latents are dead [n_concepts].

    The latents are the concepts, and their decoder rows stay. The encoder, which starts as their transpose, and the biases are
    learned without a penalty, at our rate and on our schedule.
    """
    crosscoder = untrained(source, world._replace(d_hidden=len(planted.rate)), seed)
    concepts = planted.directions * (planted.scale * crosscoder.scale)[:, None]  # [n_concepts, 2, d_model], normalised
    concepts /= concepts.norm(dim=-1).amax(1)[:, None, None]
    crosscoder.W_dec.data[:] = crosscoder.enc_rows.data[:] = concepts
    peak = float(lr or LR_FACTOR / math.sqrt(source.d_model * len(concepts)))
    optimizer, steps = Adam(crosscoder.parameters(), lr=peak), math.ceil(tokens / world.batch_size)
    silent = torch.zeros(len(concepts), dtype=torch.int64)  # tokens since each latent fired
    for step, x in training_batches(crosscoder, source, world.batch_size, tokens, f"{HELD}, lr {peak:g}"):
        optimizer.param_groups[0]["lr"] = peak * lr_factor(step, steps, TrainConfig.lr_warmup, TrainConfig.lr_decay)
        out = crosscoder.losses(x, 0)
        out.loss.backward()
        crosscoder.W_dec.grad.zero_()  # not None: `update` takes the norm of all gradients
        update(crosscoder, optimizer, 1.0)
        silent.add_(len(x)).masked_fill_(out.fired, 0)
    return crosscoder, silent >= tokens // 10


def geometric_median(x: Tensor) -> Tensor:
    """[d] the point with the smallest mean distance to the rows of x [n, d], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(50):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-6)
        median = (x * weight).sum(0) / weight.sum()
    return median


@torch.no_grad()
def score(crosscoder: CrossCoder, dead: Tensor, world: PlantedConcepts, source) -> dict:
    """The planted truth against a crosscoder: classes by decoder norm, by latent scaling on the held-out rows, and by both."""
    W_dec = crosscoder.W_dec.detach()
    classes = latent_classes(crosscoder, held_out(crosscoder, source, 2048, torch.ones(2, 1)))
    result = {}
    for way, kind_of in zip(WAYS, classes, strict=True):
        scored = world.score(W_dec, dead, kind_of)
        right = {kind: scored[f"recall_{kind}"] * scored[f"class_ok_{kind}"] for kind in latents.CLASSES}
        result |= {f"base_only_{way}": right["base_only"], f"ft_only_{way}": right["ft_only"]}
        result |= {f"false_{way}": scored["false_exclusive"]} | ({"right_shared": right["shared"]} if way == "both" else {})
    found = (world.fit(W_dec, dead).amax(1) > RECOVERED).float()  # [n_concepts]
    by_rate = found[world.rate.argsort()].chunk(4)
    result |= {name: quarter.mean().item() for name, quarter in zip(QUARTERS, by_rate, strict=True)}
    return result


MEASURES = {  # columns of the CSV and what the table calls them; the classes are those on which both ways agree
    "right_shared": "shared", "base_only_both": "base-only", "ft_only_both": "ft-only", "false_both": "false",
    "false_norm": "false, by norm", "recall_rarest": "rarest quarter", "explained_variance": "EV", "l0_loss": "L0",
    "dead_fraction": "dead",
}  # fmt: skip
SHARES = [name for name in MEASURES if name not in ("l0_loss", "explained_variance")]  # the same goal in every cell
BAD_IF_HIGH = ("false_both", "false_norm", "dead_fraction")


def cells(rows: list[dict]) -> dict[tuple, dict[str, list[float]]]:
    """The measures of each world, dials, recipe, learning rate and flags, one value a seed."""
    groups: dict = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name in MEASURES:  # nothing is planted in the tiny pair
            key = tuple(row[part] for part in ("world", "dials", "recipe", "lr", "flags"))
            groups[key][name].append(float(row[name] or "nan"))
    return groups


def table(rows: list[dict]) -> None:
    """Mean and, where it differs, worst seed of each cell; then each recipe's worst and median over all its runs."""
    print(f"| world | recipe | flags | seeds | {' | '.join(MEASURES.values())} |")
    print("|---|---|---|---:|" + "---:|" * len(MEASURES))

    def shown(name: str, value: float) -> str:
        return f"{value:.1f}" if name == "l0_loss" else f"{value:.3f}" if name == "explained_variance" else f"{value:.2f}"

    def worst(name: str, values: list[float]) -> float:
        return (max if name in BAD_IF_HIGH else min)((value for value in values if not math.isnan(value)), default=math.nan)

    for (world, _, recipe, _, flags), measures in cells(rows).items():
        line = []
        for name, values in measures.items():
            average, worst_seed = shown(name, mean(values)), shown(name, worst(name, values))
            line.append(average if worst_seed == average or name == "l0_loss" else f"{average} ({worst_seed})")
        print(f"| {world} | {recipe} | `{flags}` | {len(measures['l0_loss'])} | {' | '.join(line)} |")
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        runs = [row for row in rows if row["recipe"] == recipe and row["right_shared"] and row["world"] not in UNFAIR]
        if len(runs) > 1:
            values = {name: [float(row[name]) for row in runs] for name in MEASURES}
            for what, of in (("worst", worst), ("median", lambda _, v: median(x for x in v if not math.isnan(x)))):
                line = [shown(name, of(name, v)) if name in SHARES else "" for name, v in values.items()]
                print(f"| all but {', '.join(UNFAIR)} | {recipe} | {what} | {len(runs)} | {' | '.join(line)} |")


def draw(rows: list[dict], path: Path) -> None:
    """A heat map: a line for each cell, a column for each measure, the worst seed's value; green is good."""
    lines = {key: measures for key, measures in cells(rows).items() if not math.isnan(measures["right_shared"][0])}
    if not lines:
        return
    worst = [[(max if name in BAD_IF_HIGH else min)(measures[name]) for name in SHARES] for measures in lines.values()]
    good = [[1 - v if name in BAD_IF_HIGH else v for name, v in zip(SHARES, line, strict=True)] for line in worst]
    figure, axis = plt.subplots(figsize=(10, 1.5 + 0.28 * len(lines)), layout="constrained")
    axis.imshow(good, cmap="RdYlGn", vmin=0.5, vmax=1, aspect="auto")
    for i, line in enumerate(worst):
        for j, value in enumerate(line):
            axis.text(j, i, "-" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(SHARES)), [MEASURES[name] for name in SHARES])
    names = [" ".join(part for part in key[:4] if part not in ("", "own")) for key in lines]
    axis.set_yticks(range(len(lines)), names, fontsize=8)
    axis.set_title("worst seed of each cell")
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


def grid(which: str, recipes: list[str]) -> list[tuple[str, dict, str]]:
    """(world, dials, recipe) of every cell. The dials of a recipe that selects by k are those of k."""
    return [
        (world, dials, recipe)
        for recipe in recipes
        for world, cells in (L1_DIALS if "--l1-coeff" in RECIPES.get(recipe, []) else DIALS).items()
        if which == "full" or world in QUICK
        for dials in cells
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=["easy", "long", "null"])
    parser.add_argument("--grid", choices=("quick", "full"), help="many worlds under many dials, instead of --worlds")
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES, UNSQUARED, HELD], default=OURS)
    parser.add_argument("--lrs", nargs="+", default=[None], help="learning rates in place of the recipe's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[201])
    parser.add_argument("--num-tokens", type=int, help="training tokens in place of the world's own")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "recipes", help="folder of worlds, runs and results")
    args = parser.parse_args()
    results = args.output / "recipes.csv"
    if HELD in args.recipes and "tiny pair" in args.worlds:
        parser.error(f"--recipes {HELD!r}: nothing is planted in the tiny pair")
    asked = grid(args.grid, args.recipes) if args.grid else [(w, {}, r) for w in args.worlds for r in args.recipes]
    wanted = {
        (world, told(dials), recipe, lr or "own", str(seed), str(args.num_tokens or WORLDS[world].tokens)): (
            world, dials, recipe, seed, lr, args.num_tokens,
        )
        for seed in args.seeds
        for world, dials, recipe in asked
        for lr in args.lrs
    }  # fmt: skip

    def done() -> dict[tuple, dict]:
        with results.open() as file:
            key = ("world", "dials", "recipe", "lr", "seed", "tokens")
            return {tuple(row[name] for name in key): row for row in csv.DictReader(file)}

    args.output.mkdir(parents=True, exist_ok=True)
    if not results.exists():
        results.write_text(",".join(COLUMNS) + "\n")
    for key in tqdm(wanted, unit="run"):
        if key not in done():  # another process may have run it meanwhile
            result = run(args.output, *wanted[key])
            with results.open("a") as file:
                csv.DictWriter(file, COLUMNS).writerow(result)
    finished = done()
    rows = [finished[key] for key in wanted]
    table(rows)
    draw(rows, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
