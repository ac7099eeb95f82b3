"""Run a base model and its fine-tuned version over the same text and write their activations at one hook, for train.py.

    python collect.py --base-model A --ft-model B --hook model.layers.16.mlp --text web=1 --text chat=1 --output OUT

A row is one token; row i of both models is the same token. Rows are shuffled within shards, held-out ones are whole
sequences from the beginning of the texts. Stopped or killed, the same command goes on after the last complete shard and
ends with the same rows. So does any number of processes: torchrun --standalone --nproc-per-node N collect.py ...
"""

from __future__ import annotations

from config import CollectConfig, model_flags
from run.flags import parse

if __name__ == "__main__":
    CONFIG = parse(CollectConfig)  # before torch is imported, so that --help and a wrong flag answer at once

import dataclasses
import itertools
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from collecting.collection import Collection
from collecting.paired_dataset import PairedDataset
from collecting.paired_rows import PairedModels, split_revision
from ops.latents import model_names
from ops.shard import ALONE, Shard
from run import held_out, hub
from run.machine import progress_bar, run_entry, usable_device

MIN_SHARD_ROWS = 1024  # a small collection is not cut into twenty shards
UNSAVED = ("output", "device", "base_device", "ft_device", "push_to_hub")  # fields that may change between start and restart


def main(config: CollectConfig, shard: Shard = ALONE) -> None:
    config = with_two_models(config)
    check_numbers(config, shard.size)
    device = shard.join(torch.device(usable_device(config.device)))
    if shard.rank > 0:  # process 0 alone prints, and reads and writes what is not a shard
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    out, datasets = Path(config.output).expanduser(), {}
    with shard.together():
        if shard.rank == 0:
            datasets = open_datasets(config, out)
            if config.push_to_hub:
                hub.open_repository(config.push_to_hub, "dataset")
    states = shard.gather_objects([(dataset.progress, dataset.pair) for dataset in datasets.values()])[0]
    if shard.rank > 0:
        datasets = open_datasets(config, out, states)
    for dataset in datasets.values():
        if dataset.pair:
            n_rows = dataset.pair["rows"]["train"]
            print(f"{dataset.out} is complete: {n_rows:,} training rows\n{train_command(dataset.out)}")
    if unfinished := {hook: dataset for hook, dataset in datasets.items() if not dataset.pair}:
        collect(config, unfinished, shard, str(device))
    if config.push_to_hub and shard.rank == 0:
        hub.push_dataset(config.push_to_hub, out, datasets[config.hook[0]].pair)


def with_two_models(config: CollectConfig) -> CollectConfig:
    """The config with the first two of --model as base and fine-tuned model; --model stays only if there are more."""
    if not config.model:
        if not config.base_model:
            raise ValueError("--base-model is missing: give the base model, or each model with --model")
        return config
    others = ("base_model", "base_revision", "ft_model", "ft_revision", "ft_adapter", "ft_hook")
    if given := next((name for name in others if getattr(config, name)), None):
        raise ValueError(f"--{given.replace('_', '-')}: --model names all models, leave one or the other out")
    if len(config.model) < 2:
        raise ValueError("--model is given once: give it for each model, the base model first")
    (base, base_revision), (ft, ft_revision) = map(split_revision, config.model[:2])
    two = {"base_model": base, "base_revision": base_revision, "ft_model": ft, "ft_revision": ft_revision}
    return dataclasses.replace(config, **two, model=config.model if len(config.model) > 2 else [])


def open_datasets(config: CollectConfig, out: Path, states: list[tuple] | None = None) -> dict[str, PairedDataset]:
    """The dataset of each hook: the folder itself for one, OUT/HOOK for several. Each has the recipe of its hook alone.

    states: of the datasets as process 0 has opened them.
    """
    recipe = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNSAVED}
    if not config.model:
        del recipe["model"]
    folders = {hook: out / hook if len(config.hook) > 1 else out for hook in config.hook}
    if len(folders) > 1 and out.is_dir() and (others := [path.name for path in out.iterdir() if path.name not in folders]):
        raise ValueError(f"--output {out}: holds {others[0]}, no folder of these hooks; choose another folder")
    of_each = states or [None] * len(folders)
    return {
        hook: PairedDataset(folder, recipe | {"hook": hook}, "--output", state)
        for (hook, folder), state in zip(folders.items(), of_each, strict=True)
    }


def collect(config: CollectConfig, datasets: dict[str, PairedDataset], shard: Shard, device: str) -> None:
    """Run the models over the texts from where the datasets end, and complete them."""
    devices = [
        usable_device(name, flag) if name else device
        for name, flag in ((config.base_device, "--base-device"), (config.ft_device, "--ft-device"))
    ]
    devices += [device] * len(config.model[2:])
    models = PairedModels(
        **model_flags(config) | {"hook": list(datasets)}, model=config.model, batch_size=config.batch_size, devices=devices,
        dtype=config.dtype, seed=config.seed, quiet=shard.rank > 0,
        known=next(filter(None, (d.progress["fingerprints"] for d in datasets.values())), None),
    )  # fmt: skip
    if any(found != models.fingerprints for found in shard.gather_objects(models.fingerprints)):
        raise ValueError("--base-model, --ft-model, --text: not all processes read the same files; give each machine the same")
    opened = [datasets[hook.name] for hook in models.hooks]
    progress = [dataset.progress for dataset in opened]
    left, widths = config.num_tokens - min(sum(p["rows"].values()) for p in progress), [h.d_model for h in models.hooks]
    row_bytes = opened[0].require_room(left, widths, len(models.models))

    # --- outlier limit and scale, from the first rows
    models.start(min(p["sequences"] for p in progress))
    models.calibrate(config.num_tokens, val_tokens(config), progress)
    for hook, found in zip(models.hooks, shard.gather_objects([(h.median, h.scale) for h in models.hooks])[0], strict=True):
        hook.median, hook.scale = found  # of process 0, where other devices round differently
    for dataset, hook in zip(opened, models.hooks, strict=True):
        dataset.begin(models, hook)
        at = f" at {hook.name}" if len(opened) > 1 else ""
        medians = ", ".join(f"{name} {x:.4g}" for name, x in zip(model_names(len(hook.paths)), hook.median, strict=True))
        print(f"median norm{at}: {medians}; rows above {config.max_norm_ratio:g} times are left out")

    write_rows(config, models, opened, row_bytes, shard)
    for dataset, hook in zip(opened, models.hooks, strict=True):
        if not sum(dataset.progress["rows"].values()):
            raise ValueError("--text: not one row was left to store; give more text, or lower --skip-first")
        with shard.together():
            if shard.rank == 0:
                print_summary(dataset.out, config, dataset.finish(models, hook))


def write_rows(
    config: CollectConfig, models: PairedModels, datasets: list[PairedDataset], row_bytes: int, shard: Shard
) -> None:
    """Write the held-out rows, then those to train on. row_bytes: of all models and hooks."""
    progress = [dataset.progress for dataset in datasets]
    shard_rows = min(config.shard_rows, max(MIN_SHARD_ROWS, config.num_tokens // 20))  # lost when the process is killed
    stored = min(sum(p["rows"].values()) for p in progress)
    with progress_bar(None, config.num_tokens, initial=stored, leave=True, delay=0, disable=models.quiet) as bar:
        collection = Collection(
            models, datasets, num_tokens=config.num_tokens, shard_rows=shard_rows, row_bytes=row_bytes, shard=shard, bar=bar
        )
        models.held_out_until = min(p["held_out_until"] for p in progress)
        if not min(p["sequences"] for p in progress):  # of some hook no training row is written yet
            collection.write("validation", models.held_out_draws(val_tokens(config)), [])
        models.held_out_until = max(p["held_out_until"] for p in progress)
        front = list(itertools.takewhile(lambda s: s.index < models.held_out_until, models.ahead()))
        collection.write("train", models.training_draws(models.stream), front)
    for p in progress:
        if sum(p["rows"].values()) < config.num_tokens:  # the texts are read to their end
            p["refused"] = {str(i): source.refused for i, source in enumerate(models.sources)}


def val_tokens(config: CollectConfig) -> int:
    return min(config.num_tokens // 20, 2_000_000) if config.val_tokens is None else config.val_tokens


def check_numbers(config: CollectConfig, processes: int) -> None:
    """ValueError, naming the flag, for what no collection can have."""
    if processes > 1 and (config.base_device or config.ft_device or ":" in config.device):
        raise ValueError("--device, --base-device, --ft-device: each of several processes takes one device; give --device cuda")
    if not config.hook:
        raise ValueError("--hook is missing: name a module to read, e.g. --hook model.layers.13")
    if config.push_to_hub and len(config.hook) > 1:
        raise ValueError("--push-to-hub: takes the dataset of one --hook; push each with a command of its own")
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
    print(train_command(out))


def train_command(out: Path) -> str:
    return f"next: python train.py --dataset {shlex.quote(str(out))}"


def what_is_kept(config: CollectConfig) -> str:
    """What a collection that was stopped leaves, and what to do."""
    out = Path(config.output).expanduser()
    progress, pairs = ([*out.glob(name), *out.glob(f"*/{name}")] for name in ("progress.json", "pair.json"))
    if pairs and not progress:
        return f"{out} is complete, and the same command goes on from there"
    rows = min((sum(json.loads(path.read_text())["rows"].values()) for path in progress), default=0)
    if not rows:
        return "no shard was complete yet, so nothing is kept; the same command begins again"
    return f"{rows:,} of {config.num_tokens:,} rows are kept in complete shards, and the same command goes on from there"


if __name__ == "__main__":
    SHARD = Shard.of_torchrun()
    run_entry("collect.py", partial(main, shard=SHARD), CONFIG, stopped=what_is_kept, first=SHARD.rank == 0)
    SHARD.leave()
