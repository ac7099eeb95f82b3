"""Batches of a source's rows, filled ahead of the training loop, and what is estimated over them."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ops.shard import ALONE, Shard
from sources.source import ANY_NORM, BUFFERS, NONE_DROPPED, Batch, Dropped, Source

MAX_NON_FINITE = 0.001  # share of rows that may hold NaN or inf before the run stops
STATISTICS_ROWS = 65_536  # rows behind the mean and the scale
MEDIAN_ROWS = 4096  # rows behind the median norm, which only has to be right within a few percent
FINGERPRINT_ROWS = 64  # rows of each split behind the fingerprint of the data
CONVERTED_TOGETHER = 1 << 18  # values: 1 MB of float32, which stays in the processor's cache


def read_ahead(
    source: Source, batch_size: int, stop: int, device: torch.device, position: int = 0, dropped: Dropped = NONE_DROPPED,
    shard: Shard = ALONE,
) -> Iterator[Batch]:  # fmt: skip
    """`Source.batches` of a source that can tell which rows come at a place of its stream: `order(position, count)`.

    A background thread reads ahead; closing the generator ends it. Outliers and rows with a non-finite value are left out of
    their batch; ValueError when the latter are more than 0.1 %.
    """
    ready: queue.Queue = queue.Queue()
    free: queue.Queue = queue.Queue()
    closed = threading.Event()
    on_cuda = device.type == "cuda"
    uploads = torch.cuda.Stream(device) if on_cuda else None  # copies run beside the training step
    shape = (source.n_models, -(-batch_size // shard.size), source.d_model)
    for _ in range(BUFFERS):
        free.put((torch.empty(shape, dtype=source.dtype, pin_memory=on_cuda), None))

    def fill_buffers(position):
        try:
            while position < stop:
                buffer, copied = free.get()  # [n_models, rows of this process, d_model]
                if closed.is_set():
                    return
                if copied is not None:
                    copied.synchronize()  # the copy to the device still reads from this buffer
                end, lowest, highest = min(position + batch_size, stop), [], []
                passed = filled = outliers = 0
                own = shard.part(end - position)
                while position < end:
                    rows = source.order(position, end - position)
                    mine = rows[max(0, own.start - passed) : max(0, own.stop - passed)]
                    position, passed = position + len(rows), passed + len(rows)
                    lowest.append(rows[0])
                    highest.append(rows[-1])
                    if len(mine):
                        kept, out_of_range = gather_kept(source, "train", mine, buffer[:, filled : filled + len(mine)])
                        filled, outliers = filled + len(kept), outliers + out_of_range
                x, copied = buffer[:, :filled], None
                if on_cuda:
                    with torch.cuda.stream(uploads):
                        x, copied = x.to(device, non_blocking=True), torch.cuda.Event()
                        copied.record()
                ready.put((x, (buffer, copied), (passed, outliers), position, int(min(lowest)), int(max(highest))))
            ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the batches are consumed
            ready.put(error)

    thread = threading.Thread(target=fill_buffers, args=(position,), name="read-ahead", daemon=True)
    thread.start()
    # A batch is yielded only when the next one is there: where all rows of the next are dropped, it takes over their position.
    held = None
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            x, used, (places, outliers), position, first_row, last_row = item
            if on_cuda:
                torch.cuda.current_stream(device).wait_event(used[1])
                x.record_stream(torch.cuda.current_stream(device))  # its memory is not given away before the step is done
            x = shard.gather_rows(x.transpose(0, 1))  # [rows, n_models, d_model]
            if places > len(x):  # in every process, so that all of them add up
                outliers = int(shard.all_sum(torch.tensor(outliers)))
                dropped = Dropped(dropped.non_finite + places - len(x) - outliers, dropped.outliers + outliers)
            if dropped.non_finite > max(1, MAX_NON_FINITE * max(position, source.train_rows or stop)):
                raise ValueError(too_many_non_finite(dropped.non_finite, position))
            if len(x):
                if held:
                    yield held[0]
                    free.put(held[1])
                held = (Batch(x, position, dropped, first_row, last_row), used)
            else:
                free.put(used)
                held = held and (held[0]._replace(position=position, dropped=dropped), held[1])
        if held:
            yield held[0]
    finally:
        closed.set()
        free.put((None, None))  # wakes the thread if it waits
        thread.join()  # a thread still inside torch while Python shuts down aborts the process


def gather_kept(source, split: str, rows: np.ndarray, out: Tensor) -> tuple[np.ndarray, int]:
    """Fill out [n_models, rows, d_model] with those of the given rows that are finite and within the norm limit in every model.

    Returns the numbers of these rows, and how many of the others are outliers, not NaN or inf.
    """
    source.gather(split, rows, out)
    kept = (row_norms(out) <= source.norm_limit).all(0)  # [rows]; false for NaN
    if kept.all():
        return rows, 0
    outliers = int(out[:, ~kept].isfinite().all(-1).all(0).sum())
    out[:, : int(kept.sum())] = out[:, kept]
    return rows[kept.numpy()], outliers


def row_norms(x: Tensor) -> Tensor:
    """L2 norms [n_models, rows] of the rows of x [n_models, rows, d_model], on the host, in float32; inf beyond its range.

    Each piece is converted in the processor's cache, which is as fast as looking at every value once.
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
        rows = source.sample_rows(MEDIAN_ROWS)
        x = torch.empty(source.n_models, len(rows), source.d_model, dtype=source.dtype)
        source.gather("train", rows, x)
        norms = row_norms(x)
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
        rows = np.unique(np.linspace(0, n - 1, min(n, FINGERPRINT_ROWS)).astype(np.int64))
        x = torch.empty(source.n_models, len(rows), source.d_model, dtype=source.dtype)
        source.gather(split, rows, x)
        for model, values in zip(hashes, x, strict=True):
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
        out = torch.empty(source.n_models, len(rows), source.d_model, dtype=source.dtype)
        kept, _ = gather_kept(source, "validation", rows, out)
        yield out[:, : len(kept)].transpose(0, 1).to(device)


def raw_sample(source, count: int = 4096) -> Tensor:
    """[rows, n_models, d_model] raw activations of at most `count` evenly spaced training rows, non-finite pairs left out."""
    rows = source.sample_rows(count)
    out = torch.empty(source.n_models, len(rows), source.d_model, dtype=source.dtype)
    kept, _ = gather_kept(source, "train", rows, out)
    return out[:, : len(kept)].transpose(0, 1).float() / source.stored_scale.float()[:, None]


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
        raise ValueError("the activations of a model are the same in every row: nothing to learn, check the dataset's columns")
    return mean, source.d_model**0.5 / norm
