"""The files of a run: atomic checkpoints, the newest complete one, and the lines of metrics that belong to it.

    RUN/checkpoints/step_00001000/
        index.json                 format, d_hidden, which tensors go by latent, which file holds which latents, checksums
        latents_0_16384.safetensors    those tensors for latents 0 to 16383 (one file a process)
        shared.safetensors         all other tensors, random states among them
        state.json                 plain numbers: step, data position, scheduler, ...

A checkpoint is written beside its place and renamed, so a folder that has its name was complete once; checksums say whether
it still is what was written. Nothing is pickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from crosscoder import CrossCoder
from ops.files import sync
from ops.shard import ALONE, Shard
from run.machine import first_line, free_disk, library_errors, write_text

if TYPE_CHECKING:
    from sources.source import Source

# Tensors whose first axis is the latents, and with them Adam's moments of those parameters.
BY_LATENT = ("enc_rows", "W_dec", "b_enc", "tokens_since_fired")
HASHED_TOGETHER = 1 << 24  # bytes of a file that one thread hashes at a time
FORMAT = 2  # number of the layout above


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0  # rows trained on
    position: int = 0  # rows of the source's stream used up, dropped ones included
    dropped: tuple[int, int] = (0, 0)  # of those, left out: with NaN or inf, and as outliers
    seconds: float = 0.0  # of training, in all processes that went on with the run
    wandb_id: str | None = None


@dataclass
class TrainingState:
    """All that a training step changes."""

    crosscoder: CrossCoder
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    tokens_since_fired: Tensor  # [latents of this process] int64
    source: Source
    progress: Progress


def save(run: Path, state: TrainingState, keep: int) -> None:
    """`write` the checkpoint of the step that `state` stands at. ValueError where the weights are not finite."""
    crosscoder, progress = state.crosscoder, state.progress
    tensors = crosscoder.state_dict() | step_tensors(state.optimizer, crosscoder)
    tensors["tokens_since_fired"] = state.tokens_since_fired
    require_finite(tensors, progress.step, run, crosscoder.shard)
    numbers = asdict(progress) | {"scheduler": state.scheduler.state_dict()}
    numbers["stream"] = state.source.state_dict(progress.position)
    write(run, progress.step, tensors, numbers, keep=keep, d_hidden=crosscoder.d_hidden, shard=crosscoder.shard)


def load(folder: Path, state: TrainingState) -> None:
    """Bring `state` to where the checkpoint stands. ValueError where it is broken or incomplete."""
    crosscoder = state.crosscoder
    tensors, numbers = read(folder, crosscoder.latents)
    with library_errors(f"the checkpoint {folder} is incomplete", "delete it", (KeyError, TypeError, RuntimeError)):
        crosscoder.load_state_dict({name: tensors[name] for name in crosscoder.state_dict()})
        restore_step_tensors(state.optimizer, crosscoder, tensors)
        state.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        state.scheduler.load_state_dict(numbers["scheduler"])
        for field in fields(Progress):
            setattr(state.progress, field.name, numbers[field.name])
        if isinstance(numbers["dropped"], int):  # of a run that began before outliers were counted
            state.progress.dropped = (numbers["dropped"], 0)
        state.source.load_state_dict(numbers.get("stream", {}))


def require_finite(tensors: dict[str, Tensor], step: int, run: Path, shard: Shard) -> None:
    """ValueError if what is to be saved holds NaN, inf, or values whose squares overflow. Waits for the device."""
    norm = torch.nn.utils.get_total_norm([t for t in tensors.values() if t.is_floating_point()])
    if shard.any_process(not norm.isfinite()):
        what = f"the weights after step {step} are not finite, or too large for finite norms: lower --lr. They were not saved"
        raise ValueError(f"{what}. Last good checkpoint: {newest(run, step)}")


# --- files


def write(
    run: Path, step: int, tensors: dict[str, Tensor], numbers: dict, *, keep: int, d_hidden: int, shard: Shard = ALONE
) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`. Returns its folder. Errors as `write_errors`.

    Of several processes each writes the slice of the d_hidden latents that it owns, process 0 everything else.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    by_latent = [name for name in tensors if name.split(".")[0] in BY_LATENT]
    owned = [shard.part(d_hidden, process) for process in range(shard.size)]
    slices = [{"file": f"latents_{s.start}_{s.stop}.safetensors", "start": s.start, "stop": s.stop} for s in owned]
    host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with write_errors(f"the checkpoint of step {step}", run, shard):
        with shard.together():
            if shard.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.parent.mkdir(exist_ok=True)  # without parents: a run's folder that was renamed is not made again
                partial.mkdir()
        with shard.together():
            own = partial / slices[shard.rank]["file"]
            save_file({name: t for name, t in host.items() if name in by_latent}, own)
            sync(own)
        with shard.together():
            if shard.rank == 0:
                save_file({name: t for name, t in host.items() if name not in by_latent}, partial / "shared.safetensors")
                (partial / "state.json").write_text(json.dumps({"step": step} | numbers, indent=1))
                write_index(partial, {"format": FORMAT, "d_hidden": d_hidden, "by_latent": by_latent, "slices": slices})
                for path in [*partial.iterdir(), partial]:
                    sync(path)
                if os.path.lexists(folder):  # an abandoned attempt at this step
                    os.rename(folder, folder.with_name(f".{folder.name}.old"))
                os.rename(partial, folder)
                sync(folder.parent)
                # Checkpoints of later steps were left by a run that was then resumed from an earlier one: they go as well.
                kept = [path for path in complete(run) if path <= folder][-keep:]
                for old in set(complete(run)) - set(kept):
                    os.rename(old, old.with_name(f".{old.name}.old"))  # so that a half-deleted one is not taken for complete
                remove_leftovers(run)
    return folder


def write_index(folder: Path, index: dict) -> None:
    """Write a checkpoint's index.json, last of its files: `index`, the checksums of the other files, and one of its own."""
    index = index | {"checksums": {path.name: checksum(path) for path in sorted(folder.iterdir()) if path.name != "index.json"}}
    (folder / "index.json").write_text(json.dumps(index | {"own_checksum": checksum_of_index(index)}, indent=1))


def checksum(path: Path) -> str:
    """SHA-256 over the SHA-256 of each block of a file: blocks are hashed in parallel, as one core is slower than the disk."""
    with open(path, "rb") as file:
        starts = range(0, path.stat().st_size, HASHED_TOGETHER)
        blocks = hashers().map(lambda start: hashlib.sha256(os.pread(file.fileno(), HASHED_TOGETHER, start)).digest(), starts)
        return hashlib.sha256(b"".join(blocks)).hexdigest()


@functools.cache
def hashers() -> ThreadPoolExecutor:
    """Threads, all of them started: CPython waits for ever for one that begins where there is no memory for it."""
    threads = min(8, os.cpu_count() or 1)
    pool, all_here = ThreadPoolExecutor(threads), threading.Barrier(threads)
    list(pool.map(lambda _: all_here.wait(), range(threads)))
    return pool


def checksum_of_index(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if nothing is. ValueError if they are of another format."""
    try:
        index = json.loads((folder / "index.json").read_text())
        number = index.get("format")
        if number == FORMAT and index.pop("own_checksum") != checksum_of_index(index):
            return "index.json is not what was written"
        for name, written in index["checksums"].items() if number == FORMAT else ():
            if checksum(folder / name) != written:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"index.json: {error!r}".splitlines()[0]
    if number != FORMAT:
        raise ValueError(f"the checkpoint {folder} has the format {number} and this code reads {FORMAT}: use the code it is of")
    return None


def remove_leftovers(run: Path) -> list[str]:
    """Delete what a killed process had half written, and say which step or model that was. Only the lock's holder may do so."""
    cut_off = [path.name.split(".")[1] for path in sorted((run / "checkpoints").glob(".step_*.partial"))]
    cut_off += ["crosscoder"] * any((run / "crosscoder").glob("*.partial"))
    for leftover in (run / "checkpoints").glob(".step_*"):
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover, ignore_errors=True)
    for leftover in [*run.glob(".*.partial"), *(run / "crosscoder").glob("*.partial")]:
        leftover.unlink(missing_ok=True)
    return cut_off


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A user's own copies and archives beside them are left alone."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(path for path in found if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())


def newest(run: Path, before: float = math.inf) -> Path | str:
    """For messages: the newest complete checkpoint of a step before the given one, or "none yet"."""
    earlier = [path for path in complete(run) if int(path.name.removeprefix("step_")) < before]
    return earlier[-1] if earlier else "none yet"


def find(resume: Path, shard: Shard = ALONE) -> Path:
    """The checkpoint meant by a path: itself, or the newest undamaged one of that run. ValueError if there is none."""
    named, resume = Path(os.path.abspath(resume)), resume.resolve()
    if (resume / "state.json").is_file():  # the run is found by the name given: checkpoints/ may be a link to another disk
        return named if (named.parents[1] / "config.json").is_file() else resume
    if not resume.exists():
        raise ValueError(f"--resume {resume}: no such run or checkpoint")
    why = None
    for folder in reversed(complete(resume)):
        if not (why := damage(folder)):
            return folder
        if shard.rank == 0:
            print(f"damaged  {folder} ({why}): passed over for the one before it", file=sys.stderr)
    if why:
        again = f"put a copy of one back, or begin again with --config {resume / 'config.json'}"
        raise ValueError(f"--resume {resume}: all its checkpoints are damaged ({why}); {again}")
    finished = ", though the run is finished: it cannot go on" if (resume / "summary.json").exists() else ""
    raise ValueError(f"--resume {resume}: holds no complete checkpoint{finished}")


def read(folder: Path, latents: slice | None = None) -> tuple[dict[str, Tensor], dict]:
    """Tensors, of some latents where they have such an axis, and numbers. ValueError where a file is not what was written."""
    why = damage(folder)
    kinds = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
    remedy = "give --resume the run's folder, and it takes the newest whole one"
    with library_errors(f"the checkpoint {folder} is broken", remedy, kinds):
        if why:
            raise ValueError(why)
        index, numbers = (json.loads((folder / name).read_text()) for name in ("index.json", "state.json"))
        tensors = load_file(folder / "shared.safetensors")
        latents = latents or slice(0, index["d_hidden"])
        parts: dict[str, list[Tensor]] = {name: [] for name in index["by_latent"]}
        for part in sorted(index["slices"], key=lambda part: part["start"]):
            low, high = max(latents.start, part["start"]), min(latents.stop, part["stop"])
            if low < high:
                with safe_open(folder / part["file"], framework="pt") as file:
                    for name, found in parts.items():
                        found.append(file.get_slice(name)[low - part["start"] : high - part["start"]])
        tensors |= {name: torch.cat(parts.pop(name)) for name in list(parts)}  # pop frees each part once it is copied
    return tensors, numbers


def step_tensors(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> dict[str, Tensor]:
    """torch's random states, and Adam's for the module's parameters as PARAMETER.adam_KEY and adam_step.PARAMETER."""
    tensors = {f"rng.cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    tensors["rng.cpu"] = torch.get_rng_state()
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"adam_step.{name}" if key == "step" else f"{name}.adam_{key}"] = value
    return tensors


def restore_step_tensors(optimizer: torch.optim.Optimizer, module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `step_tensors` gave; Adam's moments leave `tensors`, so that memory need not hold them twice."""
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda{i}" in tensors:  # else the run was on fewer devices
            torch.cuda.set_rng_state(tensors[f"rng.cuda{i}"], i)
    for name, parameter in module.named_parameters():
        state = {"step": tensors[f"adam_step.{name}"].to(parameter.device)}
        for key in ("exp_avg", "exp_avg_sq"):  # empty_like keeps the parameter's memory layout, which fused Adam expects
            state[key] = torch.empty_like(parameter).copy_(tensors.pop(f"{name}.adam_{key}"))
        optimizer.state[parameter] = state


def cut_metrics(run: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, a half-written one, and the final one of a run that is now made longer."""
    path = run / "metrics.jsonl"
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            metrics = json.loads(line)
            if metrics["step"] <= step and "loss" in metrics:  # the final line has held-out metrics alone
                kept.append(line + "\n")
    with write_errors(path.name, run):
        write_text(path, "".join(kept))


@contextmanager
def write_errors(what: str, run: Path, shard: Shard = ALONE):
    """OSError with one sentence when `what` cannot be written to a run's folder; nothing half-written stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if shard.rank == 0:  # it holds the lock; in another process the error may come while process 0 still writes
            remove_leftovers(run)
        if isinstance(error, OSError) and error.errno is None:  # already one sentence
            raise
        why = f"{getattr(error, 'strerror', None) or first_line(error)}; {free_disk(run / 'checkpoints') / 1e9:.2f} GB free"
        remedy = "make room or choose a folder you can write to; earlier checkpoints are untouched"
        raise OSError(f"{what} could not be written to {run} ({why}): {remedy}") from None
