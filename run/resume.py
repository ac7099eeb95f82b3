"""The folder of a run: made for a fresh one, or continued from a checkpoint with the same settings on the same data."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

import torch

from ops.shard import Shard
from run import checkpoint
from run.machine import as_json, library_errors, say, write_text

if TYPE_CHECKING:
    from sources.source import Source

MAY_CHANGE = {  # length, logging, devices, and where the same data lies now
    "dataset", "base_dataset", "ft_dataset", "model_dataset", "keep_activations", "device", "base_device", "ft_device",
    "num_tokens", "epochs", "log_every", "val_every", "save_every", "keep_checkpoints",
    "wandb", "wandb_project", "wandb_entity", "run_name", "output_dir", "push_to_hub", "resume", "config",
}  # fmt: skip


@dataclass(frozen=True)
class Begun:
    """What is known of a run before its data is opened. A fresh run has its folder's name alone."""

    run: Path
    checkpoint: Path | None = None  # to go on from
    resolved: dict | None = None  # the settings that it began with
    data: dict | None = None  # the facts of the data that it began with


def begin(given, shard: Shard) -> Begun:
    """The run that the flags of train.py ask for. ValueError where its name is taken, or where it cannot go on."""
    named = Path(given.output_dir) / str(given.run_name)
    if given.resume == "auto" and not checkpoint.complete(named):
        require_beginning(named)
        say(f"--resume auto: {named} holds no checkpoint, starting fresh")
    elif given.resume is not None:
        found = checkpoint.find(named if given.resume == "auto" else Path(given.resume), shard)
        return Begun(found.parents[1], found, *read_record(found.parents[1]))
    name = given.run_name or f"{given.variant}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = Path(given.output_dir) / shard.from_first(name)
    if shard.any_process(given.resume is None and run.exists()):  # all at once: process 0 will make it
        raise ValueError(name_is_taken(run))
    return Begun(run)


def require_beginning(run: Path) -> None:
    """ValueError unless a run may begin here: the folder is new, empty, or its run ended before it had saved anything."""
    if not run.is_dir() or all(path.name.startswith(".") for path in run.iterdir()):
        return
    saved, _ = read_record(run)
    lines = (run / "metrics.jsonl").read_text(errors="replace") if (run / "metrics.jsonl").exists() else ""
    step = max(map(int, re.findall(r'^{"step": (\d+),', lines, re.MULTILINE)), default=0)
    finished = (run / "summary.json").exists() or (run / "crosscoder").exists()
    if finished or step > saved["save_every"] or checkpoint.complete(run):
        why = "is finished" if finished else f"was at step {step}"
        remedy = "choose another --run-name, or put its checkpoints/ back if they were moved"
        raise ValueError(f"--resume auto: {run} {why} and is not begun again: {remedy}")


def name_is_taken(run: Path) -> str:
    return f"--run-name: {run} exists; choose another name, or go on with --resume {shlex.quote(str(run))}"


def read_record(run: Path) -> tuple[dict, dict]:
    """The resolved flags and the facts of the data that a run began with."""
    remedy = f"{run} is no run that can go on, choose another --run-name or --output-dir"
    kinds = (OSError, ValueError, KeyError, TypeError)
    with library_errors(f"--resume: {run / 'config.json'} is missing or broken", remedy, kinds):
        record = json.loads((run / "config.json").read_text())
        return record["resolved"], record["data"]


def refuse_changes(settings: dict, saved: dict) -> None:
    """ValueError if a resumed run would go on under another recipe than it began with."""
    for name, value in settings.items():
        if name not in MAY_CHANGE and name in saved and value != saved[name]:
            change = f"--{name.replace('_', '-')} is {value} and was {saved[name]} when the run began"
            raise ValueError(f"{change}: leave the flag out, or start a new run with --config and this flag")


def facts(source: Source) -> dict:
    """What a run writes down of its data, to know it again."""
    data = {name: getattr(source, name) for name in ("train_rows", "val_rows", "n_models", "d_model")}
    return data | {"stored_scale": source.stored_scale.tolist()} | source.record


def refuse_other_data(data: dict, saved_data: dict) -> None:
    """ValueError if a resumed run would go on with other rows than it began with. What its record lacks is not compared."""
    now, before = (record.get("fingerprint", []) for record in (data, saved_data))
    if before and now != before and sorted(now) == sorted(before):
        raise ValueError("the models' activations have changed places since the run began: give their datasets as they were")
    remedy = "resume on the same data, or start a new run with --config"
    for name, value in data.items():
        if name == "fingerprint" and before and value != before:
            models = " and ".join(f"model {name}" for name, a, b in zip(ascii_uppercase, now, before, strict=False) if a != b)
            what = f"the activations of {models} (A: base, B: fine-tuned) are not those that the run began with"
            raise ValueError(f"{what}: {remedy}")
        if value != (was := saved_data.get(name, value)):
            what = f"the data has {name} {value} and had {was} when the run began: the rows would come in another order"
            raise ValueError(f"{what}; {remedy}")


def claim(begun: Begun, given, config, source: Source) -> tuple[Path, int]:
    """Make the folder of a fresh run, lock it, and write its config.json, in process 0. Returns the folder and the lock."""
    run = begun.run if begun.checkpoint else make_folder(begun.run, given.run_name is not None, given.resume == "auto")
    handle = lock(run)
    if not begun.checkpoint:
        require_beginning(run)  # another process may have begun and ended there meanwhile
    if cut_off := checkpoint.remove_leftovers(run):
        say(f"cut off  {', '.join(cut_off)} in {run}: the run was killed while writing it; removed")
    if not begun.checkpoint:
        names = {"run_name": None, "resume": None, "config": None}  # these name the run, not its recipe
        record = {"given": asdict(given) | names, "resolved": asdict(config), "data": facts(source), "code": code_version()}
        with checkpoint.write_errors("config.json", run):
            write_text(run / "config.json", as_json(record, indent=2))
    return run, handle


def lock(run: Path) -> int:
    """Claim a run's folder for this process, until it closes the returned handle. ValueError if that cannot be."""
    handle = os.open(run, os.O_RDONLY)  # of the folder: another process that starts now may replace a file in it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"--run-name: another process is writing {run}; wait for it or choose another name") from None
    except OSError:
        pass  # a file system without locks
    for folder in (run, run / "checkpoints", run / "crosscoder"):
        if folder.exists() and not os.access(folder, os.W_OK):
            raise ValueError(f"--output-dir: {folder} cannot be written to; make it writable, or copy {run} to where it is")
    return handle


def make_folder(run: Path, named: bool, may_exist: bool) -> Path:
    """The new folder of a fresh run. One named by the time gets a longer name if another run has just taken that one."""
    try:
        run.mkdir(parents=True, exist_ok=may_exist)
        return run
    except FileExistsError:
        if named:
            raise ValueError(name_is_taken(run)) from None
        return make_folder(run.with_name(f"{run.name}-2"), named, may_exist)
    except OSError as error:
        raise ValueError(f"--output-dir: cannot create {run} ({error.strerror}); choose one you can write to") from None


def code_version() -> dict[str, str | None]:
    """The commit of this code, with -dirty where files differ from it, None outside a git checkout; the version of torch."""
    root, commit = Path(__file__).parents[1], None
    with suppress(OSError, subprocess.TimeoutExpired):
        # --git-dir: without it a copy inside another project's checkout would get that project's commit
        command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "describe", "--always", "--dirty"]
        command += ["--abbrev=12", "--exclude=*"]  # a hash, never a tag
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    return {"commit": commit, "torch": torch.__version__}
