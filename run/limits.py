"""Whether this machine's memory and disk hold a run, asked before it starts, and what is said where they did not."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ops.sparse import DENSE_ABOVE_CUDA
from run import checkpoint
from run.machine import first_line, free_disk, free_memory

if TYPE_CHECKING:
    from sources.source import Source

HELD_OUT_AT_ONCE = 1024  # held-out rows that are measured together on CUDA, whose scores are float32


def training_bytes(config, n_models: int, d_model: int, processes: int, on_cpu: bool) -> dict[str, float]:
    """Bytes of the device's memory that a run takes, by the flag that lowers them: the formulas of docs/speed.md.

    The larger of a step, with weights, gradient and Adam's two moments, and of the end of the run, without gradient.
    """
    values = 2 * n_models * d_model * config.d_hidden / processes  # in this process's weights
    latents, rows = config.d_hidden / processes, config.batch_size * n_models * d_model
    scores = config.micro_batch_size * latents
    if on_cpu:  # in a step also a temporary copy of the decoder
        state, codes = max((20 * values, 4 * scores), (12 * values, 20 * scores), key=sum)
        return {"d_hidden": state, "micro_batch_size": codes, "batch_size": 24 * rows}
    narrow = config.compute_dtype == "bfloat16"
    state = (14 if narrow else 12) * values  # weights, copies of them in bfloat16, Adam's two moments
    end = (state, 20 * HELD_OUT_AT_ONCE * latents, 24 * rows)
    wide = (2 if narrow else 4) * scores
    phases, active = (
        [end, (state, 0, 44 * rows)],
        (config.k or 0) * (config.k_start or 1),
    )  # the most at once, when the run begins
    dense = config.variant == "vanilla" or active >= DENSE_ABOVE_CUDA * config.d_hidden  # products of all codes, and gradients
    phases += [(state + 4 * values, 2 * wide if dense else 0, 24 * rows), (state, wide, 24 * rows)]
    return dict(zip(("d_hidden", "micro_batch_size", "batch_size"), max(phases, key=sum), strict=True))


def require_memory(config, source: Source, device: torch.device, processes: int) -> None:
    """ValueError if the device or the host cannot hold the run, by the formulas of docs/speed.md."""
    on_cpu = device.type == "cpu"
    on_device = training_bytes(config, source.n_models, source.d_model, processes, on_cpu)
    on_host: dict[str, float] = {**source.host_bytes(config.batch_size)}
    if on_cpu:
        on_host |= on_device | {"batch_size": on_host["batch_size"] + on_device["batch_size"]}
    else:
        weights = 2 * source.n_models * source.d_model * config.d_hidden / processes
        on_host["d_hidden"] = 12 * weights  # what a checkpoint holds, on its way to the disk
    on_host = {name: size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) for name, size in on_host.items()}
    places: list[tuple[object, int, dict]] = [("the host", free_memory(), on_host)]
    if not on_cpu:
        places.append((device, torch.cuda.mem_get_info(device)[0], on_device))
    for place, free, needed in places:
        total, large = sum(needed.values()), {name: size for name, size in needed.items() if size > free / 10}
        if total > free:
            flags = " or ".join(f"--{name.replace('_', '-')} (for {size / 1e9:.1f} GB)" for name, size in large.items())
            what = f"the run needs {total / 1e9:.1f} GB of memory on {place} and {free / 1e9:.1f} GB are free"
            raise ValueError(f"{what}: lower {flags}")


@contextmanager
def memory_errors(run: Path | None = None):
    """ValueError with one sentence where the memory of a device or of the host runs out. run: where checkpoints lie."""
    if run:
        checkpoint.hashers()  # begin while there is memory
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory|bad_alloc", str(error)):
            raise
        remedy = "lower --micro-batch-size, --batch-size or --d-hidden, or end what else uses the memory"
        saved = checkpoint.newest(run) if run else "none yet"
        raise ValueError(f"out of memory ({first_line(error)}): {remedy}. Last checkpoint: {saved}") from None


def require_room(config, source: Source, run: Path) -> None:
    """ValueError if the disk cannot hold the run's checkpoints: weights and two Adam moments each, float32."""
    size = 3 * 4 * 2 * source.n_models * source.d_model * config.d_hidden
    needed = size * max(1, config.keep_checkpoints + 1 - len(checkpoint.complete(run)))
    if needed > (room := free_disk(run / "checkpoints")):
        what = f"the checkpoints of this run need {needed / 1e9:.2f} GB and {run} has {room / 1e9:.2f} GB free"
        raise ValueError(f"--output-dir: {what}; choose another folder, or lower --keep-checkpoints or --d-hidden")
