"""How much of a planted truth each recipe finds, on the same activations: ours against published ones.

    python benchmarks/recipes.py --worlds easy offset null --seeds 0 1 2
    python benchmarks/recipes.py --worlds hard --recipes "ours, vanilla" --seeds 0

Each world is written once as paired datasets under runs/worlds and trained on as a user would; results are appended to
runs/recipes.csv, and a run that stands there is not repeated, so several can work side by side on different seeds. Prints a
table, mean and spread over the seeds, and draws it as runs/recipes.png.
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
from statistics import mean, pstdev

import pyarrow as pa
import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import latents
from activations import batches, estimate_normalization, open_single, validation_batches
from crosscoder import CrossCoder
from planted import BLOCK, RECOVERED, PlantedConcepts
from train import DEAD_AFTER_AT_MOST, evaluate, lr_factor

BATCH = 2048  # rows a step
HELD_OUT = 32_768  # rows
EASY = dict(n_concepts=1024)
HARD = dict(n_concepts=2048, hard=True)
WORLDS = {  # what is planted, training tokens, latents, and the dials of sparsity
    "easy": (EASY, 3_000_000, 2048, {"l1": 1.0, "k": 28, "l1_topk": 0.5}),
    "offset": (EASY | {"offset": True}, 3_000_000, 2048, {"l1": 1.0, "k": 28, "l1_topk": 0.5}),
    "null": (EASY | {"null": True}, 3_000_000, 2048, {"l1": 1.0, "k": 28, "l1_topk": 0.5}),
    "hard": (HARD, 6_000_000, 4096, {"l1": 1.0, "k": 40, "l1_topk": 1.0}),
    "hard, none to spare": (HARD, 6_000_000, 2048, {"l1": 1.0, "k": 40, "l1_topk": 1.0}),
    "paper": (dict(n_concepts=2048, d_model=256), 800_000_000, 4096, {"l1": 1.0, "k": 48, "l1_topk": 0.5}),  # for a GPU
}
RECIPES = {
    "ours, vanilla": ["--l1-coeff", "{l1}"],
    # Alone, the selection settles on mixtures of concepts (easy: a third of the exclusive ones found); a penalty sorts them.
    "ours, batch_topk": ["--variant", "batch_topk", "--k", "{k}", "--l1-coeff", "{l1_topk}"],
    "ours, batch_topk without a penalty": ["--variant", "batch_topk", "--k", "{k}"],
    # ckkissane/crosscoder-model-diff-replication: scale without centring, L1 2 after 5 %, no warm-up, decay over the last 20 %
    "L1 (ckkissane)": [
        *["--no-center", "--l1-coeff", "2", "--lr", "5e-5", "--dec-init-norm", "0.08", "--l1-warmup", "0.05"],
        *["--lr-warmup", "0", "--lr-decay", "0.2", "--aux-coeff", "0"],
    ],
}
UNSQUARED = "BatchTopK (crosscoder_learning)"  # trained by train_unsquared
QUARTERS = [
    "recall_rarest",
    "recall_rare",
    "recall_common",
    "recall_commonest",
]  # of all concepts, by rate
COLUMNS = [
    "world", "recipe", "lr", "seed", "right_shared", "right_base_only", "right_ft_only", "false_exclusive",
    "scaling_base_only", "scaling_ft_only", "scaling_false_exclusive", *QUARTERS,
    "explained_variance", "l0_loss", "dead_fraction", "tokens", "seconds",
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


def run(name: str, recipe: str, seed: int, lr: str | None, tokens: int) -> dict:
    """Train one recipe on one world for so many tokens and score it."""
    planted, _, d_hidden, dials = WORLDS[name]
    world = PlantedConcepts(seed, **planted)
    data = ROOT / "runs" / "worlds" / f"{name}-{seed}-{tokens}"
    write_world(data, world, tokens)
    files = str(data / "base.arrow"), str(data / "ft.arrow")
    source = open_single(*files, (None, None), HELD_OUT, 0, seed)
    started = time.perf_counter()
    if recipe == UNSQUARED:
        crosscoder, dead = train_unsquared(source, d_hidden, int(dials["k"]), float(lr or 1e-4), tokens, seed)
    else:
        out = ROOT / "runs" / "recipes" / f"{name} {recipe} {lr} {seed} {tokens}".replace(", ", "-").replace(" ", "_")
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, str(ROOT / "train.py"), "--output-dir", str(out.parent), "--run-name", out.name]
        command += ["--base-dataset", files[0], "--ft-dataset", files[1], "--seed", str(seed), "--wandb", "disabled"]
        command += ["--d-hidden", str(d_hidden), "--val-tokens", str(HELD_OUT), "--num-tokens", str(tokens)]
        command += ["--batch-size", str(BATCH), "--log-every", "100"]
        command += [part.format(**dials) for part in RECIPES[recipe]] + (["--lr", lr] if lr else [])
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        crosscoder = CrossCoder.from_pretrained(out / "crosscoder")
        resolved = json.loads((out / "config.json").read_text())["resolved"]
        since_fired = checkpoint.load(checkpoint.find(out))[0]["tokens_since_fired"]
        dead = since_fired >= min(DEAD_AFTER_AT_MOST, int(resolved["dead_window"] * tokens))
    seconds = time.perf_counter() - started
    result = {"world": name, "recipe": recipe, "lr": lr or "own", "seed": seed, "tokens": tokens, "seconds": round(seconds, 1)}
    return result | score(crosscoder, dead, world, source)


def train_unsquared(source, d_hidden: int, k: int, lr: float, tokens: int, seed: int) -> tuple[CrossCoder, torch.Tensor]:
    """BatchTopK as crosscoder_learning trains it -> the crosscoder, and which latents are dead [d_hidden].

    The mean over rows and models of the un-squared error norm, an auxiliary loss of 1/32 for what has been silent for 10M
    tokens, decoder norm 1, b_dec from the geometric median of the first batch, Adam with a constant rate after its warm-up
    (1000 of about 100,000 steps there, so 1 % here), gradients clipped to 1. Our code does the selection.
    """
    crosscoder = CrossCoder(source.d_model, d_hidden, 2, "batch_topk", k, source.d_model // 2, 1.0, seed)
    mu, scale = estimate_normalization(source, center=True)
    crosscoder.mean.copy_(mu)
    crosscoder.scale.copy_(scale)
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=lr, fused=True)
    steps = -(-tokens // BATCH)
    silent = torch.zeros(d_hidden, dtype=torch.int64)  # tokens since each latent fired
    stream = batches(source, BATCH, tokens, torch.device("cpu"))
    for step, batch in enumerate(tqdm(stream, total=steps, desc=f"crosscoder_learning, lr {lr:g}", unit="step", mininterval=5)):
        x = crosscoder.normalize(batch.x.float())  # [batch, 2, d_model]
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
    held_out = lambda: (crosscoder.normalize(x.float()) for x in validation_batches(source, BATCH, torch.device("cpu")))  # noqa: E731
    crosscoder.fit_threshold(held_out)
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
    W_dec, sums = crosscoder.W_dec.detach(), [None, None]
    for stored in validation_batches(source, BATCH, torch.device("cpu")):
        x = crosscoder.normalize(stored.float())  # [batch, 2, d_model]
        f = crosscoder.encode(x, normalized=True)
        x_hat = crosscoder.decode(f, normalized=True)
        for of in (0, 1):
            part = latents.scaling_sums(x, f, x_hat, W_dec, of)
            sums[of] = part if sums[of] is None else sums[of] + part
    scaling = (latents.latent_scaling(sums[of], W_dec, of) for of in (0, 1))
    by_scaling = latents.classify_by_scaling(*scaling, W_dec.norm(dim=-1))
    by_norm, scaled = world.score(W_dec, dead), world.score(W_dec, dead, by_scaling)
    result = {f"right_{kind}": by_norm[f"recall_{kind}"] * by_norm[f"class_ok_{kind}"] for kind in latents.CLASSES}
    result |= {f"scaling_{kind}": scaled[f"recall_{kind}"] * scaled[f"class_ok_{kind}"] for kind in ("base_only", "ft_only")}
    result |= {"false_exclusive": by_norm["false_exclusive"], "scaling_false_exclusive": scaled["false_exclusive"]}
    found = (world.fit(W_dec, dead).amax(1) > RECOVERED).float()  # [n_concepts]
    by_rate = found[world.rate.argsort()].chunk(4)
    result |= {name: quarter.mean().item() for name, quarter in zip(QUARTERS, by_rate, strict=True)}
    measured = evaluate(crosscoder, source, BATCH, torch.ones(2, 1), 0.0)
    result |= {name: measured["val_" + name] for name in ("explained_variance", "l0_loss")}
    return result | {"dead_fraction": dead.float().mean().item()}


def by_run(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The rows of each world, recipe and learning rate: one a seed."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["world"], row["recipe"], row["lr"]].append(row)
    return groups


def table(rows: list[dict]) -> None:
    """Mean and, over several seeds, spread (standard deviation) of each world and recipe."""
    names = ["right_shared", "right_base_only", "right_ft_only", "false_exclusive", "scaling_base_only", "scaling_ft_only"]
    names += ["scaling_false_exclusive", *QUARTERS[:1], "explained_variance", "l0_loss", "dead_fraction"]
    head = "shared | base-only | ft-only | false exclusive | base-only (scaling) | ft-only (scaling) | false (scaling) | "
    head += "rarest quarter | EV | L0 | dead"
    print(f"| world | recipe | lr | seeds | {head} |\n|---|---|---|---:|" + "---:|" * len(names))
    for (world, recipe, lr), group in by_run(rows).items():
        cells = []
        for name in names:
            values = [float(row[name]) for row in group]
            digits = 1 if name == "l0_loss" else 2
            cells.append(f"{mean(values):.{digits}f}" + (f" ± {pstdev(values):.{digits}f}" if len(values) > 1 else ""))
        print(f"| {world} | {recipe} | {lr} | {len(group)} | {' | '.join(cells)} |")


def draw(rows: list[dict], path: Path) -> None:
    """One line of panels a world: right class of each kind, false-exclusive share, recall by frequency; bars are the spread."""
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    figure, axes = plt.subplots(len(worlds), 2, figsize=(12, 3.2 * len(worlds)), squeeze=False, layout="constrained")
    bars = {
        "right_shared": "shared",
        "right_base_only": "base-only",
        "right_ft_only": "ft-only",
        "false_exclusive": "false",
    }
    columns = [bars, dict(zip(QUARTERS, ["rarest\nquarter", "rare", "common", "commonest"], strict=True))]
    for world, line in zip(worlds, axes, strict=True):
        groups = {key: group for key, group in by_run(rows).items() if key[0] == world}
        for axis, column, title in zip(line, columns, ("found, with the right class", "recall by frequency"), strict=True):
            for i, ((_, recipe, lr), group) in enumerate(groups.items()):
                places = [j + 0.8 * (i + 0.5) / len(groups) - 0.4 for j in range(len(column))]
                values = [[float(row[name]) for row in group] for name in column]
                spread = [pstdev(v) if len(v) > 1 else 0 for v in values]
                label = f"{recipe}, lr {lr}, L0 {mean(float(row['l0_loss']) for row in group):.0f}"
                axis.bar(places, [mean(v) for v in values], 0.8 / len(groups), yerr=spread, label=label, color=f"C{i}")
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
    parser.add_argument("--csv", type=Path, default=ROOT / "runs" / "recipes.csv", help="the figure is written beside it")
    args = parser.parse_args()
    wanted = [
        (world, recipe, seed, lr, args.num_tokens or WORLDS[world][1])
        for world in args.worlds
        for seed in args.seeds
        for recipe in args.recipes
        for lr in args.lrs
    ]

    def done() -> dict[tuple, dict]:
        rows = csv.DictReader(args.csv.open())
        own = {"own": None}
        return {(r["world"], r["recipe"], int(r["seed"]), own.get(r["lr"], r["lr"]), int(r["tokens"])): r for r in rows}

    args.csv.parent.mkdir(parents=True, exist_ok=True)
    if not args.csv.exists():
        args.csv.write_text(",".join(COLUMNS) + "\n")
    for missing in tqdm([one for one in wanted if one not in done()], unit="run"):
        result = run(*missing)
        with args.csv.open("a") as file:
            csv.DictWriter(file, COLUMNS).writerow(result)
    rows = [row for key, row in done().items() if key in wanted]
    table(rows)
    draw(rows, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
