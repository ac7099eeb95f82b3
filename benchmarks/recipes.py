"""How much of a planted truth each recipe finds, on the same activations: ours against published ones.

    python benchmarks/recipes.py --worlds easy offset null --seeds 0 1 2
    python benchmarks/recipes.py --worlds hard --recipes "ours, vanilla" --seeds 0

Each world is written once as paired datasets under runs/worlds and trained on by `train.py`, as a user would; results are
appended to runs/recipes.csv, and a run that stands there is not repeated. Prints a table, mean and spread over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, pstdev

import pyarrow as pa
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import latents
from activations import open_single, validation_batches
from crosscoder import CrossCoder
from planted import BLOCK, PlantedConcepts
from train import DEAD_AFTER_AT_MOST

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
    "L1, ckkissane": [
        *["--no-center", "--l1-coeff", "2", "--lr", "5e-5", "--dec-init-norm", "0.08", "--l1-warmup", "0.05"],
        *["--lr-warmup", "0", "--lr-decay", "0.2", "--aux-coeff", "0"],
    ],
}
COLUMNS = [
    "world", "recipe", "lr", "seed", "right_shared", "right_base_only", "right_ft_only", "false_exclusive",
    "scaling_base_only", "scaling_ft_only", "scaling_false_exclusive",
    "recall_shared", "recall_base_only", "recall_ft_only",
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
    out = ROOT / "runs" / "recipes" / f"{name} {recipe} {lr} {seed} {tokens}".replace(", ", "-").replace(" ", "_")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train.py"), "--output-dir", str(out.parent), "--run-name", out.name]
    command += ["--base-dataset", str(data / "base.arrow"), "--ft-dataset", str(data / "ft.arrow"), "--seed", str(seed)]
    command += ["--d-hidden", str(d_hidden), "--val-tokens", str(HELD_OUT), "--num-tokens", str(tokens)]
    command += ["--batch-size", "2048", "--lr", "3e-3", "--log-every", "100", "--wandb", "disabled"]
    command += [part.format(**dials) for part in RECIPES[recipe]] + (["--lr", lr] if lr else [])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"world": name, "recipe": recipe, "lr": lr or "", "seed": seed} | score(out, world, data)


def score(out: Path, world: PlantedConcepts, data: Path) -> dict:
    """The planted truth against a finished run: classes by decoder norm, and by latent scaling on the held-out rows."""
    crosscoder = CrossCoder.from_pretrained(out / "crosscoder")
    summary = json.loads((out / "summary.json").read_text())
    resolved = json.loads((out / "config.json").read_text())["resolved"]
    tokens_since_fired = checkpoint.load(checkpoint.find(out))[0]["tokens_since_fired"]
    dead = tokens_since_fired >= min(DEAD_AFTER_AT_MOST, int(resolved["dead_window"] * resolved["num_tokens"]))
    source = open_single(str(data / "base.arrow"), str(data / "ft.arrow"), (None, None), HELD_OUT, 0, seed=0)
    W_dec, sums = crosscoder.W_dec.detach(), [None, None]
    with torch.no_grad():
        for stored in validation_batches(source, 2048, torch.device("cpu")):
            x = crosscoder.normalize(stored)  # [batch, 2, d_model]
            f = crosscoder.encode(x, normalized=True)
            x_hat = crosscoder.decode(f, normalized=True)
            for of in (0, 1):
                part = latents.scaling_sums(x, f, x_hat, W_dec, of)
                sums[of] = part if sums[of] is None else sums[of] + part
    by_scaling = latents.classify_by_scaling(*(latents.latent_scaling(sums[of], W_dec, of) for of in (0, 1)))
    by_norm, scaled = world.score(W_dec, dead), world.score(W_dec, dead, by_scaling)
    result = {f"right_{kind}": by_norm[f"recall_{kind}"] * by_norm[f"class_ok_{kind}"] for kind in latents.CLASSES}
    result |= {f"scaling_{kind}": scaled[f"recall_{kind}"] * scaled[f"class_ok_{kind}"] for kind in ("base_only", "ft_only")}
    result |= {f"recall_{kind}": by_norm[f"recall_{kind}"] for kind in latents.CLASSES}
    result |= {"false_exclusive": by_norm["false_exclusive"], "scaling_false_exclusive": scaled["false_exclusive"]}
    return result | {name: summary[name] for name in ("explained_variance", "l0_loss", "dead_fraction", "tokens", "seconds")}


def table(rows: list[dict]) -> None:
    """Mean and, over several seeds, spread (standard deviation) of each world and recipe."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["world"], row["recipe"], row["lr"]].append(row)
    names = ["right_shared", "right_base_only", "right_ft_only", "false_exclusive", "scaling_base_only", "scaling_ft_only"]
    names += ["scaling_false_exclusive", "explained_variance", "l0_loss", "dead_fraction"]
    head = "shared | base-only | ft-only | false exclusive | base-only (scaling) | ft-only (scaling) | false (scaling) | "
    head += "EV | L0 | dead"
    print(f"| world | recipe | lr | seeds | {head} |\n|---|---|---|---:|" + "---:|" * len(names))
    for (world, recipe, lr), group in groups.items():
        cells = []
        for name in names:
            values = [float(row[name]) for row in group]
            digits = 1 if name == "l0_loss" else 3
            cells.append(f"{mean(values):.{digits}f}" + (f" ± {pstdev(values):.{digits}f}" if len(values) > 1 else ""))
        print(f"| {world} | {recipe} | {lr or 'default'} | {len(group)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=["easy", "offset", "null"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--lrs", nargs="+", default=[None], help="learning rates in place of the recipe's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-tokens", type=int, help="training tokens in place of the world's own")
    parser.add_argument("--csv", type=Path, default=ROOT / "runs" / "recipes.csv")
    args = parser.parse_args()
    wanted = [
        (world, recipe, seed, lr, args.num_tokens or WORLDS[world][1])
        for world in args.worlds
        for seed in args.seeds
        for recipe in args.recipes
        for lr in args.lrs
    ]

    def key(row: dict) -> tuple:
        return row["world"], row["recipe"], int(row["seed"]), row["lr"] or None, int(row["tokens"])

    args.csv.parent.mkdir(parents=True, exist_ok=True)
    if not args.csv.exists():
        args.csv.write_text(",".join(COLUMNS) + "\n")
    done = {key(row) for row in csv.DictReader(args.csv.open())}
    for missing in tqdm([one for one in wanted if one not in done], unit="run"):
        result = run(*missing)
        with args.csv.open("a") as file:
            csv.DictWriter(file, COLUMNS).writerow(result)
    table([row for row in csv.DictReader(args.csv.open()) if key(row) in wanted])


if __name__ == "__main__":
    main()
