"""Run a base model and its fine-tuned version over the same text and write their activations at one hook, for train.py.

    python collect.py --base-model A --ft-model B --hook model.layers.16.mlp --text web=1 --text chat=1 --output OUT

A row is one token; row i of both models is the same token. Rows are shuffled within shards, held-out ones are whole
sequences from the beginning of the texts. Stopped or killed, the same command goes on after the last complete shard and
ends with the same rows.
"""

from __future__ import annotations

from config import CollectConfig, model_flags
from run.flags import parse

if __name__ == "__main__":
    CONFIG = parse(CollectConfig)  # before torch is imported, so that --help and a wrong flag answer at once

import dataclasses
import itertools
import json
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from collecting.paired_dataset import PairedDataset
from collecting.paired_rows import GatheredRows, PairedModels, Rows
from run import held_out, hub
from run.machine import progress_bar, run_entry, size_text, usable_device

MIN_SHARD_ROWS = 1024  # a small collection is not cut into twenty shards
UNSAVED = ("output", "device", "base_device", "ft_device", "push_to_hub")  # fields that may change between start and restart


def main(config: CollectConfig) -> None:
    check_numbers(config)
    out = Path(config.output).expanduser()
    recipe = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNSAVED}
    dataset = PairedDataset(out, recipe, "--output")
    if config.push_to_hub:
        hub.open_repository(config.push_to_hub, "dataset")
    if dataset.pair:
        n_rows = dataset.pair["rows"]["train"]
        print(f"{out} is complete ({n_rows:,} training rows); train on it: python train.py --dataset {out}")
    else:
        collect(config, dataset)
    if config.push_to_hub:
        hub.push_dataset(config.push_to_hub, out, dataset.pair)


def collect(config: CollectConfig, dataset: PairedDataset) -> None:
    """Run the models over the texts from where the dataset ends, and complete it."""
    progress = dataset.progress
    devices = [
        usable_device(name or config.device, flag if name else "--device")
        for name, flag in ((config.base_device, "--base-device"), (config.ft_device, "--ft-device"))
    ]
    models = PairedModels(
        **model_flags(config), batch_size=config.batch_size, dtype=config.dtype, devices=devices, seed=config.seed,
        known=progress["fingerprints"],
    )  # fmt: skip
    row_bytes = dataset.require_room(config.num_tokens - sum(progress["rows"].values()), models.d_model)

    # --- outlier limit and scale, from the first rows
    models.start(progress["sequences"])
    models.calibrate(config.num_tokens, val_tokens(config), progress if progress["stored_scale"] else None)
    dataset.begin(models)
    base, ft = models.median
    print(f"median norm: base {base:.4g}, ft {ft:.4g}; rows above {config.max_norm_ratio:g} times are left out")

    write_rows(config, models, dataset, row_bytes)
    if not sum(progress["rows"].values()):
        raise ValueError("--text: not one row was left to store; give more text, or lower --skip-first")
    print_summary(dataset.out, config, dataset.finish(models))


def write_rows(config: CollectConfig, models: PairedModels, dataset: PairedDataset, row_bytes: int) -> None:
    """Write the held-out rows, then those to train on, while the models compute the next shard. row_bytes: of both models."""
    progress, stored = dataset.progress, sum(dataset.progress["rows"].values())
    shard_rows = min(config.shard_rows, max(MIN_SHARD_ROWS, config.num_tokens // 20))  # lost when the process is killed
    capacity = min(shard_rows + models.drawn * config.seq_len, config.num_tokens - stored)
    shape, dtype = (capacity, 2, models.d_model), getattr(torch, config.dtype)
    shards = itertools.cycle([GatheredRows(torch.empty(shape, dtype=dtype)) for _ in range(2)])
    filling, writing = next(shards), None  # the shard that rows go into, and the Future of the one before

    def write(split: str) -> None:
        nonlocal filling, writing
        if writing:
            writing.result()  # raises what went wrong with it
        writing, filling = writer.submit(dataset.write_shard, split, filling, models.held_out_until), next(shards)
        filling.clear()

    def write_all(split: str, batches: Iterator[Rows]) -> None:
        nonlocal stored
        while stored < config.num_tokens and (rows := next(batches, None)):
            taken = filling.add(rows, most=config.num_tokens - stored)
            stored += taken
            bar.set_postfix_str(size_text(stored * row_bytes), refresh=False)
            bar.update(taken)
            if filling.n >= shard_rows:
                write(split)
        if split == "train":  # tokens/ holds every sequence that has rows, also held-out ones behind the last training row
            filling.passed += itertools.takewhile(lambda s: s.index < models.held_out_until, models.stream)
        if filling.n or filling.passed:
            write(split)
        if writing:
            writing.result()

    with progress_bar(None, config.num_tokens, initial=stored, leave=True, delay=0) as bar, ThreadPoolExecutor(1) as writer:
        models.held_out_until = progress["held_out_until"]
        if not progress["sequences"]:  # no training row is written yet
            write_all("validation", models.held_out(val_tokens(config)))
        write_all("train", models.training_rows())


def val_tokens(config: CollectConfig) -> int:
    return min(config.num_tokens // 20, 2_000_000) if config.val_tokens is None else config.val_tokens


def check_numbers(config: CollectConfig) -> None:
    """ValueError, naming the flag, for a number that no run can have."""
    for name, least in (("num_tokens", 1), ("shard_rows", 1), ("seed", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}")
    if not 0 <= val_tokens(config) <= config.num_tokens // held_out.STRETCH:
        raise ValueError(
            f"--val-tokens {config.val_tokens}: must lie between 0 and a quarter of --num-tokens ({config.num_tokens})"
        )


# --- words


def print_summary(out: Path, config: CollectConfig, pair: dict) -> None:
    """What was stored, what was left out and why, and the command that comes next."""
    rows, left_out = pair["rows"], pair["left_out"]
    n_rows = sum(rows.values())
    print(f"{out}: {rows['train']:,} training and {rows['validation']:,} held-out rows of {pair['sequences']:,} sequences")
    if n_rows < config.num_tokens:
        print(f"the texts gave only {n_rows:,} of {config.num_tokens:,} rows (--num-tokens); give more with another --text")
    for source in pair["text"]:
        refused = f", the chat template refused {source['refused']:,} conversations" if source["refused"] else ""
        print(f"  {source['source']}: {source['tokens']:,} tokens{refused}")
    reasons = {
        "first_positions": f"among the first {config.skip_first} of a sequence (--skip-first)",
        "norm": f"with a norm above {config.max_norm_ratio:g} times the median (--max-norm-ratio)",
        "non_finite": "with inf or nan",
        "beyond_num_tokens": "in the last batch after --num-tokens was reached",
    }
    print("left out: " + (", ".join(f"{left_out[k]:,} {why}" for k, why in reasons.items() if left_out[k]) or "nothing"))
    if left_out["norm"] + left_out["non_finite"] > 0.01 * n_rows:
        print("more than one row in a hundred was an outlier: look at --skip-first, --max-norm-ratio and --model-dtype")
    print(f"train on it: python train.py --dataset {shlex.quote(str(out))}")


def what_is_kept(config: CollectConfig) -> str:
    """What a collection that was stopped leaves, and what to do."""
    out = Path(config.output).expanduser()
    if (out / "pair.json").is_file():
        return f"{out} is complete, and the same command goes on from there"
    progress = out / "progress.json"
    rows = sum(json.loads(progress.read_text())["rows"].values()) if progress.is_file() else 0
    if not rows:
        return "no shard was complete yet, so nothing is kept; the same command begins again"
    return f"{rows:,} of {config.num_tokens:,} rows are kept in complete shards, and the same command goes on from there"


if __name__ == "__main__":
    run_entry("collect.py", main, CONFIG, stopped=what_is_kept)
