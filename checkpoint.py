"""The files of a run: atomic checkpoints, the newest complete one, and the lines of metrics that belong to it.

    RUN/checkpoints/step_00001000/
        index.json                 format, d_hidden, which tensors have a latent axis, which file holds which latents
        latents_0_16384.safetensors    those tensors for latents 0 to 16383 (one file a process)
        shared.safetensors         all other tensors, random states among them
        state.json                 plain numbers: step, data position, scheduler, ...

A checkpoint is written beside its place and renamed, so a folder that has its name is complete. Nothing is pickled.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# Where each parameter has its latent axis; Adam's moments have the axis of their parameter.
LATENT_AXIS = {"enc_rows": 0, "W_dec": 0, "b_enc": 0, "tokens_since_fired": 0}


def save(run: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`. Returns its folder.

    Raises OSError with one sentence when the disk is full or read-only; what was there before stays as it was.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    axes = {name: axis for name in tensors if (axis := LATENT_AXIS.get(name.split(".")[0])) is not None}
    d_hidden = tensors["b_enc"].shape[0]
    slice_name = f"latents_0_{d_hidden}.safetensors"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file({name: t for name, t in host.items() if name in axes}, partial / slice_name)
        save_file({name: t for name, t in host.items() if name not in axes}, partial / "shared.safetensors")
        slices = [{"file": slice_name, "start": 0, "stop": d_hidden}]
        index = {"format": 1, "d_hidden": d_hidden, "latent_axis": axes, "slices": slices}
        (partial / "index.json").write_text(json.dumps(index, indent=1))
        (partial / "state.json").write_text(json.dumps({"step": step} | state, indent=1))
        for path in [*partial.iterdir(), partial]:
            sync(path)
        if folder.exists():  # an abandoned attempt at this step
            os.rename(folder, folder.with_name(f".{folder.name}.old"))
        os.rename(partial, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(run).free / 1e9
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder.parent} ({error}; {free:.2f} GB free): "
            "make room or give another --output-dir; earlier checkpoints are untouched"
        ) from None
    kept = complete(run)
    kept = kept[: kept.index(folder) + 1][-keep:]  # later steps are left over from before the run was resumed here
    for old in set(complete(run)) - set(kept):
        os.rename(old, old.with_name(f".{old.name}.old"))  # a half-deleted checkpoint must not carry a complete one's name
    for leftover in folder.parent.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return folder


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A user's own copies and archives beside them are left alone."""
    found = (run / "checkpoints").glob("step_*")
    return sorted(path for path in found if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())


def find(resume: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest of the run in that folder. ValueError if there is none."""
    resume = resume.resolve()
    if (resume / "state.json").is_file():
        return resume
    if not resume.exists():
        raise ValueError(f"--resume {resume}: no such run or checkpoint")
    if not (found := complete(resume)):
        raise ValueError(f"--resume {resume}: holds no complete checkpoint")
    return found[-1]


def load(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors, latent slices joined, and the state of a checkpoint. ValueError where a file is missing or broken."""
    try:
        index, state = (json.loads((folder / name).read_text()) for name in ("index.json", "state.json"))
        tensors = load_file(folder / "shared.safetensors")
        slices = [load_file(folder / part["file"]) for part in sorted(index["slices"], key=lambda part: part["start"])]
        for name, axis in index["latent_axis"].items():
            tensors[name] = torch.cat([part[name] for part in slices], dim=axis)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"the checkpoint {folder} is broken ({error}): delete it, and --resume takes the one before it"
        ) from None
    return tensors, state


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Adam's state as tensors named PARAMETER.adam_KEY; `names` are those of the parameters, in the optimizer's order."""
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}.adam_{key}": value for i, entry in state.items() for key, value in entry.items() if value.ndim} | {
        f"adam_step.{names[i]}": entry["step"] for i, entry in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        # In the parameter's memory layout, as fused Adam walks through both in parallel.
        moments = {key: torch.empty_like(parameter).copy_(tensors[f"{name}.adam_{key}"]) for key in ("exp_avg", "exp_avg_sq")}
        state[i] = moments | {"step": tensors[f"adam_step.{name}"]}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states() -> dict[str, Tensor]:
    """torch's random states as byte tensors."""
    cuda = {f"rng.cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())} if torch.cuda.is_available() else {}
    return {"rng.cpu": torch.get_rng_state()} | cuda


def restore_random_states(tensors: dict[str, Tensor]) -> None:
    """Put back what `random_states` gave, for the devices that are here."""
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda{i}"], i)


def cut_metrics(run: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that come after `step`, a half-written one, and that of an end that was not the end."""
    path = run / "metrics.jsonl"
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            metrics = json.loads(line)
            if metrics["step"] <= step and "loss" in metrics:  # the final line has held-out metrics alone
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def as_json(values: dict, **options) -> str:
    """JSON of nested dicts of numbers, with null for what JSON has no number for (an infinite or undefined metric)."""

    def clean(value):
        if isinstance(value, dict):
            return {name: clean(part) for name, part in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(values), **options) + "\n"


def lock(run: Path):
    """Claim a run's folder for this process, until the returned file is closed. ValueError if another process has it."""
    file = open(run / "config.json")  # noqa: SIM115 - held for the whole run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--run-name: another process is writing {run}; wait for it or choose another name") from None
    except OSError:
        pass  # a file system without locks
    return file


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Push a file or folder through to the disk: a rename must not survive a power cut that its content does not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
