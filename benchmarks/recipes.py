"""How much of a planted truth each recipe finds, on the same activations: ours against published ones.

    python benchmarks/recipes.py --worlds easy offset null --seeds 0 1 2
    python benchmarks/recipes.py --worlds hard --recipes "ours, vanilla" --seeds 0

Each world is written once as paired datasets under runs/recipes/worlds and trained on as a user would; results are appended
to runs/recipes/recipes.csv, and a run that stands there is not repeated, so several can work side by side on different seeds.
Prints a table, mean and spread over the seeds, and draws it as runs/recipes/recipes.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pyarrow as pa
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from crosscoder import CrossCoder
from ops import latents
from run import checkpoint
from sources.batches import estimate_normalization
from sources.dataset_files import open_datasets
from sources.planted import BLOCK, RECOVERED, SHARED, PlantedConcepts
from sources.stored import PairedActivations
from train import DEAD_AFTER_AT_MOST, evaluate, held_out, lr_factor

HELD_OUT = 32_768  # rows


class World(NamedTuple):
    planted: dict | None  # arguments of PlantedConcepts; None: the tiny Llama pair of tests/, whose truth nobody knows
    tokens: int  # to train on
    d_hidden: int
    batch_size: int
    dials: dict  # of sparsity, for our recipes; k for the published one as well
    flags: list[str] = []  # of our recipes here, in place of defaults


EASY, EASY_DIALS = dict(n_concepts=1024), {"l1": 1.0, "k": 28, "l1_topk": 0.5}
HARD, HARD_DIALS = dict(n_concepts=2048, hard=True), {"l1": 1.5, "k": 40, "l1_topk": 1.5}
# Many rare concepts that occur together come apart slowly: sparsity grows to the end, and k starts where it cuts nothing off.
HARD_FLAGS = ["--l1-warmup", "0.95", "--k-anneal", "0.95", "--dead-window", "0.01"]
HARD_K_FLAGS = ["--k-start", "32"]  # where a recipe selects by k
WORLDS = {
    "easy": World(EASY, 3_000_000, 2048, 2048, EASY_DIALS),
    "offset": World(EASY | {"offset": True}, 3_000_000, 2048, 2048, EASY_DIALS),
    # Two equal models span half as many dimensions: the same concepts overlap more, and vanilla uses 78 latents a token.
    "null": World(EASY | {"null": True}, 3_000_000, 2048, 2048, EASY_DIALS | {"k": 80}),
    "hard": World(HARD, 6_000_000, 4096, 512, HARD_DIALS, [*HARD_FLAGS, "--lr", "2e-3"]),
    "hard, none to spare": World(HARD, 6_000_000, 2048, 512, HARD_DIALS, [*HARD_FLAGS, "--lr", "2.8e-3"]),
    "paper": World(dict(n_concepts=2048, d_model=256), 800_000_000, 4096, 2048, EASY_DIALS | {"k": 48}),  # for a GPU
    "tiny pair": World(None, 800_000, 512, 512, {"l1": 2.0, "k": 16, "l1_topk": 0.0}),
}
RECIPES = {
    "ours, vanilla": ["--l1-coeff", "{l1}"],
    # The selection alone settles on mixtures of concepts that a penalty sorts.
    "ours, batch_topk": ["--variant", "batch_topk", "--k", "{k}", "--l1-coeff", "{l1_topk}"],
    "ours, batch_topk without a penalty": ["--variant", "batch_topk", "--k", "{k}"],
    # ckkissane/crosscoder-model-diff-replication: scale without centring, L1 2 after 5 %, no warm-up, decay over the last 20 %
    "L1 (ckkissane)": [
        *["--no-center", "--l1-coeff", "2", "--lr", "5e-5", "--dec-init-norm", "0.08", "--l1-warmup", "0.05"],
        *["--lr-warmup", "0", "--lr-decay", "0.2", "--aux-coeff", "0"],
    ],
}
UNSQUARED = "BatchTopK (crosscoder_learning)"  # trained by train_unsquared
QUARTERS = ["recall_rarest", "recall_rare", "recall_common", "recall_commonest"]  # of all concepts, by rate
WAYS = ("norm", "scaling", "both")  # to call a latent exclusive: decoder norms, latent scaling, or only where both agree
COLUMNS = [
    "world", "recipe", "lr", "seed", "right_shared",
    *(f"{what}_{way}" for way in WAYS for what in ("base_only", "ft_only", "false")),
    *QUARTERS, "explained_variance", "l0_loss", "dead_fraction", "tokens", "seconds",
]  # fmt: skip


def write_world(folder: Path, world: PlantedConcepts, tokens: int) -> None:
    """folder/base.arrow and ft.arrow: float16 rows [d_model] of each model, complete or absent."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    schema = pa.schema([("activation", pa.list_(pa.float16(), world.d_model))])
    files = [pa.ipc.new_stream(partial / f"{model}.arrow", schema) for model in ("base", "ft")]
    out = torch.empty(2, BLOCK, world.d_model)
    for start in tqdm(range(0, tokens + HELD_OUT, BLOCK), desc=f"writing {folder.name}", unit="block"):
        world.gather("train", world.order(start, BLOCK), out)
        for file, x in zip(files, out.half(), strict=True):
            rows = pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), world.d_model)
            file.write_batch(pa.record_batch([rows], schema=schema))
    for file in files:
        file.close()
    partial.rename(folder)


def collect_tiny_pair(folder: Path) -> None:
    """folder/data: paired activations of the two tiny models of tests/tiny_models.py, which are trained first."""
    if not (folder / "data" / "pair.json").exists():
        python, models = sys.executable, [str(folder / "base"), str(folder / "ft")]
        subprocess.run([python, str(ROOT / "tests" / "tiny_models.py"), str(folder)], check=True)
        command = [python, str(ROOT / "collect.py"), "--base-model", models[0], "--ft-model", models[1]]
        command += ["--text", str(folder / "text" / "code.txt"), "--text", str(folder / "text" / "prose.txt")]
        command += ["--hook", "model.layers.1.mlp", "--num-tokens", "400_000", "--seq-len", "256", "--model-dtype", "float32"]
        subprocess.run([*command, "--output", str(folder / "data")], check=True)


def run(folder: Path, name: str, recipe: str, seed: int, lr: str | None, tokens: int) -> dict:
    """Train one recipe on one world for so many tokens, in folder/worlds and folder/runs, and score it."""
    world = WORLDS[name]
    if world.planted is None:
        planted, data = None, folder / "worlds" / "tiny-pair"
        collect_tiny_pair(data)
        named = [("--dataset", str(data / "data"))]
    else:
        planted, data = PlantedConcepts(seed, **world.planted), folder / "worlds" / f"{name}-{seed}-{tokens}"
        write_world(data, planted, tokens)
        named = [("--base-dataset", str(data / "base.arrow")), ("--ft-dataset", str(data / "ft.arrow"))]
    source = PairedActivations(open_datasets(named, (None, None)), HELD_OUT, 0, seed)
    started = time.perf_counter()
    if recipe == UNSQUARED:
        crosscoder, dead = train_unsquared(source, world, float(lr or 1e-4), tokens, seed)
    else:
        out = folder / "runs" / f"{name} {recipe} {lr} {seed} {tokens}".replace(", ", "-").replace(" ", "_")
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, str(ROOT / "train.py"), "--output-dir", str(out.parent), "--run-name", out.name]
        command += [word for flag_and_name in named for word in flag_and_name]
        command += ["--seed", str(seed), "--num-tokens", str(tokens), "--val-tokens", str(HELD_OUT), "--wandb", "disabled"]
        command += ["--d-hidden", str(world.d_hidden), "--batch-size", str(world.batch_size), "--log-every", "100"]
        command += ["--compute-dtype", "bfloat16"]
        command += [part.format(**world.dials) for part in RECIPES[recipe]]
        command += (world.flags if recipe.startswith("ours") else []) + (["--lr", lr] if lr else [])
        command += HARD_K_FLAGS if name.startswith("hard") and "--k" in command else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        crosscoder = CrossCoder.from_pretrained(out / "crosscoder")
        resolved = json.loads((out / "config.json").read_text())["resolved"]
        since_fired = checkpoint.read(checkpoint.find(out))[0]["tokens_since_fired"]
        dead = since_fired >= min(DEAD_AFTER_AT_MOST, int(resolved["dead_window"] * tokens))
    seconds = time.perf_counter() - started
    result = {"world": name, "recipe": recipe, "lr": lr or "own", "seed": seed, "tokens": tokens, "seconds": round(seconds, 1)}
    measured = evaluate(crosscoder, source, world.batch_size, (1 / source.stored_scale.float())[:, None], 0.0)
    result |= {name: measured["val_" + name] for name in ("explained_variance", "l0_loss")}
    result |= {"dead_fraction": dead.float().mean().item()}
    return result | (score(crosscoder, dead, planted, source) if planted else {})


def train_unsquared(source, world: World, lr: float, tokens: int, seed: int) -> tuple[CrossCoder, torch.Tensor]:
    """BatchTopK as crosscoder_learning trains it -> the crosscoder, and which latents are dead [d_hidden].

    The mean over rows and models of the un-squared error norm, an auxiliary loss of 1/32 for what has been silent for 10M
    tokens, decoder norm 1, b_dec from the geometric median of the first batch, Adam with a constant rate after its warm-up
    (1000 of about 100,000 steps there, so 1 % here), gradients clipped to 1. Our code does the selection.
    """
    k, k_aux = world.dials["k"], source.d_model // 2
    crosscoder = CrossCoder(source.d_model, world.d_hidden, 2, "batch_topk", k, k_aux, 1.0, seed, torch.bfloat16)
    unscale = (1 / source.stored_scale)[:, None]  # [2, 1] stored values -> raw activations
    mu, scale = estimate_normalization(source, center=True)
    crosscoder.mean.copy_(mu * unscale)
    crosscoder.scale.copy_(scale / unscale[:, 0])
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=lr, fused=True)
    steps = -(-tokens // world.batch_size)
    silent = torch.zeros(world.d_hidden, dtype=torch.int64)  # tokens since each latent fired
    stream = source.batches(world.batch_size, tokens, torch.device("cpu"))
    for step, batch in enumerate(tqdm(stream, total=steps, desc=f"crosscoder_learning, lr {lr:g}", unit="step", mininterval=5)):
        x = crosscoder.normalize(batch.x.float() * unscale.float())  # [batch, 2, d_model]
        if step == 0:
            crosscoder.b_dec.data.copy_(geometric_median(x.flatten(1)).view(2, -1))
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, steps, warmup=0.01, decay=0)
        dead = silent >= DEAD_AFTER_AT_MOST
        out = crosscoder.losses(x, 0, 1 / 32, dead if dead.any() else None)
        loss = (x - out.x_hat).norm(dim=-1).mean() + out.aux_loss / 32
        loss.backward()
        torch.nn.utils.clip_grad_norm_(crosscoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x)).masked_fill_(out.fired, 0)
    crosscoder.fit_threshold(lambda: held_out(crosscoder, source, world.batch_size, unscale.float()))
    return crosscoder, silent >= tokens // 10


def geometric_median(x: torch.Tensor) -> torch.Tensor:
    """[d] the point with the smallest mean distance to the rows of x [n, d], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(50):
        weight = 1 / (x - median).norm(dim=1, keepdim=True).clamp_min(1e-6)
        median = (x * weight).sum(0) / weight.sum()
    return median


@torch.no_grad()
def score(crosscoder: CrossCoder, dead: torch.Tensor, world: PlantedConcepts, source) -> dict:
    """The planted truth against a crosscoder: classes by decoder norm, and by latent scaling on the held-out rows."""
    W_dec, sums = crosscoder.W_dec.detach(), None
    for x in held_out(crosscoder, source, 2048, torch.ones(2, 1)):  # [batch, 2, d_model]
        f = crosscoder.encode(x, normalized=True)
        part, _ = latents.latent_sums(x, f, W_dec, crosscoder.b_dec)
        sums = part if sums is None else sums + part
    scaling = (latents.latent_scaling(sums.scaling(of), W_dec, of) for of in (0, 1))
    by_scaling = latents.classify_by_scaling(*scaling, W_dec.norm(dim=-1))
    by_norm = latents.classify(W_dec.norm(dim=-1))
    classes = {"norm": by_norm, "scaling": by_scaling, "both": torch.where(by_norm == by_scaling, by_norm, SHARED)}
    result = {}
    for way, kind_of in classes.items():
        scored = world.score(W_dec, dead, kind_of)
        right = {kind: scored[f"recall_{kind}"] * scored[f"class_ok_{kind}"] for kind in latents.CLASSES}
        result |= {f"base_only_{way}": right["base_only"], f"ft_only_{way}": right["ft_only"]}
        result |= {f"false_{way}": scored["false_exclusive"]} | ({"right_shared": right["shared"]} if way == "norm" else {})
    found = (world.fit(W_dec, dead).amax(1) > RECOVERED).float()  # [n_concepts]
    by_rate = found[world.rate.argsort()].chunk(4)
    result |= {name: quarter.mean().item() for name, quarter in zip(QUARTERS, by_rate, strict=True)}
    return result


def by_run(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The rows of each world, recipe and learning rate: one a seed."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["world"], row["recipe"], row["lr"]].append(row)
    return groups


def spread(values: list[float]) -> float:
    """Standard deviation; NaN where a value is missing."""
    return torch.tensor(values).std(correction=0).item()


def table(rows: list[dict]) -> None:
    """Mean and, over several seeds, spread (standard deviation) of each world and recipe."""
    names = ["right_shared", "base_only_norm", "ft_only_norm", "false_norm", "base_only_both", "ft_only_both", "false_both"]
    names += ["recall_rarest", "explained_variance", "l0_loss", "dead_fraction"]
    head = "shared | base-only | ft-only | false | base-only, both ways | ft-only, both ways | false, both ways | "
    head += "rarest quarter | EV | L0 | dead"
    print(f"| world | recipe | lr | seeds | {head} |\n|---|---|---|---:|" + "---:|" * len(names))
    for (world, recipe, lr), group in by_run(rows).items():
        cells = []
        for name in names:
            values = [float(row[name] or "nan") for row in group]  # nothing is planted in the tiny pair
            digits = 1 if name == "l0_loss" else 2
            cells.append(f"{mean(values):.{digits}f}" + (f" ± {spread(values):.{digits}f}" if len(values) > 1 else ""))
        print(f"| {world} | {recipe} | {lr} | {len(group)} | {' | '.join(cells)} |")


def draw(rows: list[dict], path: Path) -> None:
    """One line of panels a world: right class of each kind, false-exclusive share, recall by frequency; bars are the spread."""
    worlds = list(dict.fromkeys(row["world"] for row in rows if row["right_shared"]))
    if not worlds:
        return
    figure, axes = plt.subplots(len(worlds), 2, figsize=(12, 3.2 * len(worlds)), squeeze=False, layout="constrained")
    bars = {"right_shared": "shared", "base_only_norm": "base-only", "ft_only_norm": "ft-only", "false_norm": "false"}
    columns = [bars, dict(zip(QUARTERS, ["rarest\nquarter", "rare", "common", "commonest"], strict=True))]
    for world, line in zip(worlds, axes, strict=True):
        groups = {key: group for key, group in by_run(rows).items() if key[0] == world}
        for axis, column, title in zip(line, columns, ("found, with the right class", "recall by frequency"), strict=True):
            for i, ((_, recipe, lr), group) in enumerate(groups.items()):
                places = [j + 0.8 * (i + 0.5) / len(groups) - 0.4 for j in range(len(column))]
                values = [[float(row[name]) for row in group] for name in column]
                errors = [spread(v) for v in values]
                label = f"{recipe}, lr {lr}, L0 {mean(float(row['l0_loss']) for row in group):.0f}"
                axis.bar(places, [mean(v) for v in values], 0.8 / len(groups), yerr=errors, label=label, color=f"C{i}")
            axis.set(title=f"{world}: {title}", xticks=range(len(column)), ylim=(0, 1.02))
            axis.set_xticklabels(column.values())
            axis.spines[["top", "right"]].set_visible(False)
        line[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


def main() -> None:
    recipes = [*RECIPES, UNSQUARED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=["easy", "offset", "null"])
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes)
    parser.add_argument("--lrs", nargs="+", default=[None], help="learning rates in place of the recipe's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-tokens", type=int, help="training tokens in place of the world's own")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "recipes", help="folder of worlds, runs and results")
    args = parser.parse_args()
    results = args.output / "recipes.csv"
    wanted = [
        (world, recipe, seed, lr, args.num_tokens or WORLDS[world].tokens)
        for world in args.worlds
        for seed in args.seeds
        for recipe in args.recipes
        for lr in args.lrs
    ]

    def done() -> dict[tuple, dict]:
        rows = csv.DictReader(results.open())
        finished = {}
        for row in rows:
            lr = None if row["lr"] == "own" else row["lr"]
            finished[row["world"], row["recipe"], int(row["seed"]), lr, int(row["tokens"])] = row
        return finished

    args.output.mkdir(parents=True, exist_ok=True)
    if not results.exists():
        results.write_text(",".join(COLUMNS) + "\n")
    for missing in tqdm([one for one in wanted if one not in done()], unit="run"):
        result = run(args.output, *missing)
        with results.open("a") as file:
            csv.DictWriter(file, COLUMNS).writerow(result)
    rows = [row for key, row in done().items() if key in wanted]
    table(rows)
    draw(rows, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
