"""Activations streamed from the Hub while training, without a copy on the disk, in the order of `mixing.py`.

All models' datasets are read in lockstep, and widths, token columns and lengths of their rows are compared while reading. A
fill has as many rows as half of the buffer. An IterableDataset gives its position by shard and row; a resumed run goes there
and reads two fills again. While the training loop uses one window, a thread reads up to another fill ahead. Of several
processes each reads the whole stream.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from ops.shard import ALONE, Shard
from run.machine import first_line, free_memory
from sources.batches import Ahead, read_ahead
from sources.columns import aligned_columns
from sources.dataset_files import ActivationDatasets
from sources.mixing import MixingBuffer, Refill
from sources.source import NONE_DROPPED, Batch, Dropped, Source

PIECE = 1024  # tokens that are taken from the stream together, or one sequence where rows are sequences


class StreamedActivations(Source):
    """Activations of several models at the same tokens, read over the network.

    Args:
        opened: the streamed datasets.
        val_tokens: held-out rows: the first of the validation split or, without one, of the training rows.
        buffer_tokens: rows of the buffer, two fills.

    The mean and the scale are estimated on the first fill. ValueError, naming the flag, for what cannot be read or paired.
    """

    def __init__(self, opened: ActivationDatasets, *, val_tokens: int, buffer_tokens: int, seed: int):
        self.opened, self.flags, self.stored_scale = opened, opened.flags, opened.stored_scale
        self.name, self.n_models, self.pair = opened.name, len(opened.flags), opened.pair
        self.rows = (opened.pair or {}).get("rows", {})  # of each split, as far as they are known
        self.record = {"revisions": opened.revisions}
        first = next(self.tables("train", [None] * self.n_models, 1, 0), None)
        if first is None:
            raise ValueError(f"{self.flags[0]}: the dataset is empty")
        columns = aligned_columns(first[0], opened.columns, opened.flags, "train")
        self.dtype = reduce(torch.promote_types, [c.dtype for c in columns])
        self.d_model, sequence = columns[0].d_model, len(columns[0])  # tokens in a row of the datasets, nearly always 1
        self.rows_at_once = PIECE if sequence == 1 else 1
        self.mixing = MixingBuffer(self, seed=seed, buffer_rows=buffer_tokens, flag=self.flags[0], contents="the rows")
        self.capacity, self.resumed = self.mixing.capacity, None
        self.pieces_ahead = max(1, self.capacity // max(PIECE, sequence))
        row = self.n_models * self.d_model * self.dtype.itemsize  # bytes
        if (needed := row * (buffer_tokens * 3 // 2 + val_tokens)) > (free := free_memory()):
            raise ValueError(
                f"--buffer-tokens {buffer_tokens}: the buffer, what is read ahead and the held-out rows need "
                f"{needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; lower it or --val-tokens"
            )
        self.buffer = torch.empty(self.n_models, 2 * self.capacity, self.d_model, dtype=self.dtype)

        self.closed: threading.Event | None = None  # of the threads that read ahead, while batches are taken
        self.beginning = {"states": [None] * self.n_models, "row": 0, "skip": 0}
        split = "validation" if "validation" in opened.splits[0] else "train"
        self.validation = self.hold_out(split, val_tokens)  # [n_models, val_rows, d_model]
        self.val_rows = self.validation.shape[1]
        set_apart = self.val_rows if split == "train" else 0
        self.train_rows = self.rows["train"] - set_apart if "train" in self.rows else None  # None: not known
        self.seek(None)

    # --- from the streams

    def tables(self, split: str, states: list, at_once: int, row: int) -> Iterator[tuple[list, list]]:
        """Arrow tables of the same rows of all models, and the states of the streams after them. row: number of the first."""
        streams = [splits[split].with_format("arrow") for splits in self.opened.splits]
        for stream, state in zip(streams, states, strict=True):
            if state:
                stream.load_state_dict(state)
        iterators = [stream.iter(at_once) for stream in streams]
        while True:
            tables = []
            for iterator, flag in zip(iterators, self.flags, strict=True):
                try:
                    tables.append(next(iterator, None))
                except Exception as error:  # noqa: BLE001 - network, file system and Arrow raise many kinds
                    reason = first_line(error.__cause__ or error)
                    raise ValueError(f"{flag}: cannot be read on (split {split}, after row {row}): {reason}") from None
            lengths = [0 if table is None else len(table) for table in tables]
            if len(set(lengths)) > 1:
                short, long = self.flags[int(np.argmin(lengths))], self.flags[int(np.argmax(lengths))]
                raise ValueError(
                    f"{short} ends after {row + min(lengths)} rows and {long} goes on (split {split}): row i of both must be "
                    "the same token; collect both over the same text"
                )
            if not lengths[0]:
                return
            row += lengths[0]
            yield tables, [stream.state_dict() for stream in streams]

    def pieces(self, split: str, start: dict) -> Iterator[tuple[Tensor, dict]]:
        """The rows from `start` on: [n_models, rows, d_model] and the position before them. `start["skip"]` is not applied."""
        states, row = start["states"], start["row"]
        for tables, after in self.tables(split, states, self.rows_at_once, row):
            columns = aligned_columns(tables, self.opened.columns, self.flags, split, row)
            if columns[0].d_model != self.d_model:
                raise ValueError(f"{self.flags[0]}: row {row} has {columns[0].d_model} values, the first row {self.d_model}")
            x = torch.empty(self.n_models, len(columns[0]), self.d_model, dtype=self.dtype)
            for column, out in zip(columns, x, strict=True):
                torch.cat([chunk.to(self.dtype) for chunk in column.chunks], out=out)
            yield x, {"states": states, "row": row}
            states, row = after, row + len(columns[0])
        if row != self.rows.get(split, row):
            raise ValueError(
                f"{self.flags[0]}: the split {split} has {row} rows and pair.json says {self.rows[split]}: a shard is "
                "truncated or missing; push or collect it again"
            )

    def hold_out(self, split: str, wanted: int) -> Tensor:
        """The first rows of a split, [n_models, <= wanted, d_model]. Those of "train" are passed over in every epoch."""
        kept, n = [], 0
        for x, where in self.pieces(split, self.beginning):
            kept.append(x[:, : wanted - n])
            n += kept[-1].shape[1]
            end = where | {"skip": kept[-1].shape[1]}
            if n == wanted:
                break
        if split == "train":
            self.beginning = end
        return torch.cat(kept, dim=1)

    # --- into the buffer

    def seek(self, start: dict | None) -> None:
        start = start or self.beginning
        pieces = self.pieces("train", start)
        self.stream = self.read_ahead_of(pieces) if self.closed else pieces  # at once: it may be closed from another thread
        self.x, self.where, self.used = self.buffer[:, :0], start, 0  # the last piece read, and its rows that are in the buffer
        self.skip = start["skip"]  # rows of the first piece that are passed over

    def read_ahead_of(self, pieces: Iterator) -> Ahead:
        return Ahead(pieces, self.pieces_ahead, "stream", self.closed)

    def read(self, number: int) -> Refill:
        """Put the next rows into half `number % 2`."""
        half, n = number % 2 * self.capacity, 0
        while n < self.capacity:
            if self.used == self.x.shape[1]:
                if (piece := next(self.stream, None)) is None:
                    break
                (self.x, self.where), self.used, self.skip = piece, self.skip, 0
            part = self.x[:, self.used : self.used + self.capacity - n]
            self.buffer[:, half + n : half + n + part.shape[1]] = part
            n, self.used = n + part.shape[1], self.used + part.shape[1]
        if number == 0 and n < 2:
            raise ValueError(f"{self.flags[0]}: gives no two rows to train on; give more, or lower --val-tokens")
        some = self.buffer[:, half : half + n, :8].contiguous()  # enough values to tell two rows apart
        return Refill(n, self.where | {"skip": self.used + self.skip}, zlib.crc32(some.view(torch.uint8).numpy()))

    # --- what batches and the held-out metrics read

    def describe(self) -> str:
        rows = "" if self.train_rows is None else f"{self.train_rows:,} rows "
        return f"{self.name}: {rows}streamed in fills of {self.capacity:,} rows"

    def host_bytes(self, batch_size: int) -> dict[str, int]:
        # the operating system gives the buffer's memory only when it is written
        return super().host_bytes(batch_size) | {"buffer_tokens": self.buffer.nbytes}

    def state_dict(self, position: int) -> dict:
        return self.mixing.state_dict(position)

    def load_state_dict(self, state: dict) -> None:
        self.resumed = state

    def batches(
        self, batch_size: int, stop: int, device: torch.device, position: int = 0, dropped: Dropped = NONE_DROPPED,
        shard: Shard = ALONE,
    ) -> Iterator[Batch]:  # fmt: skip
        if self.resumed and position < stop:
            self.mixing.load_state_dict(self.resumed, position)
        self.closed = threading.Event()
        self.stream = self.read_ahead_of(self.stream)
        batches = read_ahead(self, batch_size, stop, device, position, dropped, shard)
        try:
            for batch in batches:  # noqa: UP028 - `yield from` would close `batches` first, whose thread may wait for the stream
                yield batch
        finally:
            self.stream.close(patience=5)  # the run must be able to end while the network hangs
            batches.close()
            self.closed = None

    def order(self, position: int, count: int) -> np.ndarray:
        """[<= count] training rows, ascending, at these positions of the stream. Goes on from the last call."""
        half, row = divmod(self.mixing.take(position, count), self.capacity)
        fill = self.mixing.window - (half != self.mixing.window % 2)  # of each row
        return np.sort(fill * self.capacity + row)

    def sample_rows(self, count: int) -> np.ndarray:
        return self.mixing.first_rows(count)

    def gather(self, split: str, rows: np.ndarray, out: Tensor) -> None:
        """Write rows of "validation", or training rows while the buffer holds them, into out [n_models, rows, d_model]."""
        values = self.validation if split == "validation" else self.buffer
        slots = torch.from_numpy(rows if split == "validation" else rows % (2 * self.capacity))
        for of_model, x in zip(values, out, strict=True):
            torch.index_select(of_model, 0, slots, out=x)
