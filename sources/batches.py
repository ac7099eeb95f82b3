"""Batches of a source's rows, filled ahead of the training loop, and what is estimated over them."""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ops.shard import ALONE, Shard
from sources.source import ANY_NORM, BUFFERS, NONE_DROPPED, Batch, Dropped, Source, evenly_spaced

MAX_NON_FINITE = 0.001  # share of rows that may hold NaN or inf before the run stops
STATISTICS_ROWS = 65_536  # rows on which the mean and the scale are estimated
MEDIAN_ROWS = 4096  # rows on which the median norm is estimated, which only has to be right within a few percent
FINGERPRINT_ROWS = 64  # rows of each split that are hashed
CONVERTED_TOGETHER = 1 << 18  # values: 1 MB of float32, which stays in the processor's cache


class Ahead:
    """The items of an iterator, taken by a thread that is at most `most` of them ahead. Its errors are raised here.

    closed: set when it was closed; shared by those that follow one another in the same loop.
    """

    def __init__(self, items: Iterator, most: int, name: str, closed: threading.Event | None = None):
        self.items, self.queue, self.closed, self.end = items, queue.Queue(most), closed or threading.Event(), None
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)
        self.thread.start()

    def run(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self.items:
                self.queue.put(item)
                if self.closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where the items are used
            end = error
        self.queue.put(end)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        if self.closed.is_set():
            raise RuntimeError("closed")
        if self.end is None:
            item = self.queue.get()
            if not isinstance(item, BaseException):
                return item
            self.end = item
        raise self.end

    def close(self, patience: float = math.inf) -> None:
        """End the thread, or leave it alone after `patience` seconds, and wake who waits for an item."""
        self.closed.set()
        until = time.monotonic() + patience
        running = True
        while running:
            running = self.thread.is_alive() and time.monotonic() < until
            while not self.queue.empty():
                self.queue.get_nowait()  # the thread may wait for room
            self.thread.join(0.1)  # a thread still inside torch while Python shuts down aborts the process
        with suppress(queue.Full):  # what the thread put in meanwhile wakes as well
            self.queue.put_nowait(RuntimeError("closed"))


class Filled(NamedTuple):
    """The part of a batch that this process read."""

    x: Tensor  # [n_models, rows, d_model] without the rows left out; on the CPU a view of the buffer
    outliers: int  # left out because of their norm
    position: int  # of the stream after the batch
    first_row: int  # lowest and highest row of the dataset in the whole batch
    last_row: int
    copied: torch.cuda.Event | None = None  # recorded after the copy from the buffer to x on a CUDA device


def fill(source, buffer: Tensor, begin: int, end: int, shard: Shard) -> Filled:
    """Write this process's part of the rows from `begin` to `end` of the stream into a buffer [n_models, rows, d_model]."""
    position, part = begin, shard.part(end - begin)
    kept = outliers = 0
    lowest, highest = [], []
    while position < end:
        rows = source.order(position, end - position)
        done = position - begin
        mine = rows[max(0, part.start - done) : max(0, part.stop - done)]
        position += len(rows)
        lowest.append(rows[0])
        highest.append(rows[-1])
        if len(mine):
            kept_rows, too_large = gather_kept(source, "train", mine, buffer[:, kept : kept + len(mine)])
            kept, outliers = kept + len(kept_rows), outliers + too_large
    return Filled(buffer[:, :kept], outliers, end, int(min(lowest)), int(max(highest)))


def fill_in_turn(source, buffers: list, starts: range, stop: int, device: torch.device, shard: Shard) -> Iterator[Filled]:
    """This process's part of each batch, on the device. Copies to a CUDA device run beside the training step."""
    uploads = torch.cuda.Stream(device) if device.type != "cpu" else None
    copied: list[torch.cuda.Event | None] = [None] * len(buffers)
    for number, begin in enumerate(starts):
        i = number % len(buffers)
        if copied[i] is not None:
            copied[i].synchronize()  # the copy to the device still reads from this buffer
        filled = fill(source, buffers[i], begin, min(begin + starts.step, stop), shard)
        if uploads:
            with torch.cuda.stream(uploads):
                x, copied[i] = filled.x.to(device, non_blocking=True), torch.cuda.Event()
                copied[i].record()
            filled = filled._replace(x=x, copied=copied[i])
        yield filled


def read_ahead(
    source: Source, batch_size: int, stop: int, device: torch.device, position: int = 0, dropped: Dropped = NONE_DROPPED,
    shard: Shard = ALONE,
) -> Iterator[Batch]:  # fmt: skip
    """`Source.batches` of a source with a method `order(position, count)`: the rows at a position of its stream.

    A background thread reads ahead; closing the generator ends it. Outliers and rows with a non-finite value are left out of
    their batch; ValueError when the latter are more than 0.1 %.
    """
    shape = source.n_models, -(-batch_size // shard.size), source.d_model
    buffers = [torch.empty(shape, dtype=source.dtype, pin_memory=device.type != "cpu") for _ in range(BUFFERS)]
    starts = range(position, stop, batch_size)
    # A batch is yielded when the next one has come: if all rows of the next are left out, it takes over their position.
    held = None
    with closing(Ahead(fill_in_turn(source, buffers, starts, stop, device, shard), BUFFERS - 3, "read-ahead")) as parts:
        for part in parts:
            if part.copied is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(part.copied)
                part.x.record_stream(current)  # the allocator does not reuse its memory before the training step is done
            x = shard.gather_rows(part.x.transpose(0, 1))  # [rows, n_models, d_model]
            left_out, position = part.position - position - len(x), part.position
            if left_out:
                outliers = int(shard.all_sum(torch.tensor(part.outliers)))
                dropped = Dropped(dropped.non_finite + left_out - outliers, dropped.outliers + outliers)
            if dropped.non_finite > max(1, MAX_NON_FINITE * max(position, source.train_rows or stop)):
                raise ValueError(too_many_non_finite(dropped.non_finite, position))
            if len(x):
                if held:
                    yield held
                held = Batch(x, position, dropped, part.first_row, part.last_row)
            elif held:  # a copy: its buffer's turn may come before that of the next batch with rows
                held = held._replace(x=held.x.clone(), position=position, dropped=dropped)
        if held:
            yield held


def upload(x: Tensor, device: torch.device, stream: torch.cuda.Stream | None = None) -> Tensor:
    """x, of the host, on the device. The host does not wait for the copy, which is from pinned memory.

    stream: one on which the copy runs beside what the device still has to do.
    """
    if device.type == "cpu":
        return x
    x, current = x if x.is_pinned() else x.pin_memory(), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream or current):
        moved = x.to(device, non_blocking=True)
    if stream:
        current.wait_stream(stream)
        moved.record_stream(current)  # the allocator does not reuse its memory before the training step is done
    return moved


def gather_kept(source, split: str, rows: np.ndarray, out: Tensor) -> tuple[np.ndarray, int]:
    """Fill out [n_models, rows, d_model] with those of the given rows that are finite and within the norm limit in every model.

    Returns the numbers of these rows, and how many of the others are outliers, not NaN or inf.
    """
    source.gather(split, rows, out)
    if surely_within(out, source.norm_limit):
        return rows, 0
    kept = (row_norms(out) <= source.norm_limit).all(0)  # [rows]; false for NaN
    if kept.all():
        return rows, 0
    outliers = int(out[:, ~kept].isfinite().all(-1).all(0).sum())
    out[:, : int(kept.sum())] = out[:, kept]
    return rows[kept.numpy()], outliers


def surely_within(x: Tensor, limit: Tensor | float) -> bool:
    """Whether no row of x [n_models, rows, d_model] can be above the limit on its norm, nor hold NaN or inf.

    A norm is at most sqrt(d_model) times the largest value. Looking for that is several times as fast as all norms.
    """
    limits = torch.as_tensor(limit).expand(len(x), 1).flatten().tolist()
    for values, most in zip(x, limits, strict=True):
        low, high = (extreme.item() for extreme in values.aminmax())  # NaN passes through both
        if not x.shape[2] ** 0.5 * max(-low, high) < most:
            return False
    return True


def read_rows(source, split: str, rows: np.ndarray) -> Tensor:
    """The given rows (ascending) of "train" or "validation": [n_models, rows, d_model] stored values, on the host."""
    x = torch.empty(source.n_models, len(rows), source.d_model, dtype=source.dtype)
    source.gather(split, rows, x)
    return x


def read_kept(source, split: str, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """As `read_rows`, without outliers and non-finite rows: the numbers of the rows kept, and [rows, n_models, d_model]."""
    x = torch.empty(source.n_models, len(rows), source.d_model, dtype=source.dtype)
    kept, _ = gather_kept(source, split, rows, x)
    return kept, x[:, : len(kept)].transpose(0, 1)


def row_norms(x: Tensor) -> Tensor:
    """L2 norms [n_models, rows] of the rows of x [n_models, rows, d_model], on the host, in float32; inf beyond its range.

    Converted to float32 in pieces that fit the processor's cache, so that memory is read only once.
    """
    norms = torch.empty(x.shape[:2])
    piece = torch.empty(max(1, CONVERTED_TOGETHER // x.shape[2]), x.shape[2])
    for values, out in zip(x, norms, strict=True):
        for part, norm in zip(values.split(len(piece)), out.split(len(piece)), strict=True):
            torch.linalg.vector_norm(piece[: len(part)].copy_(part), dim=-1, out=norm)
    return norms


def limit_norms(source, max_norm_ratio: float, median: list[float] | None = None) -> float:
    """Let a source leave out rows whose norm in any model is above `max_norm_ratio` times that model's median norm.

    median: [n_models], of the stored values; None to measure it on evenly spaced training rows, of which rows of zeros
    (padding) do not count. It is kept in the source's record.

    Returns the share of these rows that is left out, 0 where the median was given.
    """
    norms = torch.empty(source.n_models, 0)
    if median is None:
        norms = row_norms(read_rows(source, "train", source.sample_rows(MEDIAN_ROWS)))
        counted = [n[n.isfinite() & (n > 0)].numpy() for n in norms]
        median = [float(np.median(n)) if len(n) else 0.0 for n in counted]
    source.norm_limit = (max_norm_ratio * torch.tensor(median, dtype=torch.float64)[:, None]).clamp_max(ANY_NORM)
    source.record["median_norm"] = median
    return (norms > source.norm_limit).any(0).sum().item() / max(1, norms.shape[1])


def fingerprints(source, splits: tuple[str, ...] = ("train", "validation")) -> list[str]:
    """A hash over evenly spaced rows for each model, by which a resumed run knows the data that it began with."""
    hashes = [hashlib.sha256() for _ in range(source.n_models)]
    for split in splits:
        n = source.val_rows if split == "validation" else source.train_rows
        for model, values in zip(hashes, read_rows(source, split, evenly_spaced(FINGERPRINT_ROWS, n)), strict=True):
            model.update(values.view(torch.uint8).numpy())
    return [model.hexdigest() for model in hashes]


def too_many_non_finite(dropped: int, seen: int) -> str:
    return (
        f"{dropped} of the {seen} rows read hold NaN or inf in one of the models, more than {MAX_NON_FINITE:.1%} of the data: "
        "the activations are damaged or overflowed when stored; collect them again with --dtype float32"
    )


def validation_batches(source, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """The held-out rows once, in order: [rows, n_models, d_model] stored values, without outliers and non-finite pairs."""
    for start in range(0, source.val_rows, batch_size):
        rows = np.arange(start, min(start + batch_size, source.val_rows))
        yield read_kept(source, "validation", rows)[1].to(device)


def raw_sample(source, count: int = 4096) -> Tensor:
    """[rows, n_models, d_model] raw activations of at most `count` evenly spaced training rows, non-finite pairs left out."""
    return read_kept(source, "train", source.sample_rows(count))[1].float() / source.stored_scale.float()[:, None]


def estimate_normalization(source, center: bool) -> tuple[Tensor, Tensor]:
    """Mean [n_models, d_model] and scale [n_models] of the stored rows, float64, from evenly spaced training rows, as kept.

    scale = sqrt(d_model) / mean norm of (row - mean); the mean is 0 without `center`. Accumulated in float64: a running
    mean in the storage type is wrong by a factor after a few thousand updates.
    """
    rows = source.sample_rows(STATISTICS_ROWS)
    parts = np.array_split(rows, -(-len(rows) // 4096))
    buffer = torch.empty(source.n_models, 4096, source.d_model, dtype=source.dtype)

    def average(measure):
        total = count = non_finite = 0
        for part in parts:
            kept, outliers = gather_kept(source, "train", part, buffer[:, : len(part)])
            total, count = total + measure(buffer[:, : len(kept)].double()).sum(1), count + len(kept)
            non_finite += len(part) - len(kept) - outliers
        if non_finite > max(1, MAX_NON_FINITE * len(rows)):
            raise ValueError(too_many_non_finite(non_finite, len(rows)))
        return total / count

    mean = torch.zeros(source.n_models, source.d_model, dtype=torch.float64)
    if center:
        mean = average(lambda x: x)
    norm = average(lambda x: (x - mean[:, None]).norm(dim=-1))  # [n_models]
    if not (norm > 0).all():
        whose = "the activations of a model" if source.n_models > 1 else "--difference: the differences of the two models"
        raise ValueError(f"{whose} are the same in every row: nothing to learn, check the dataset's columns")
    return mean, source.d_model**0.5 / norm
