"""Activations streamed from the Hub while training, so that no disk need hold them: mixed as `windows.py` says.

All models' datasets are read in lockstep, and rows are checked as they pass: widths, token columns, lengths. A fill has as
many rows as half of the buffer. `datasets` tells where in a stream it stands, by shard and row; a resumed run goes there and
reads two fills again. While the loop uses one window, a thread reads ahead as much as another fill. Of several processes each
reads the whole stream.
"""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ops.shard import ALONE, Shard
from run.machine import first_line, free_memory
from sources.batches import read_ahead
from sources.columns import Column, check_alignment
from sources.dataset_files import newest_revision, open_dataset
from sources.source import NONE_DROPPED, Batch, Dropped, Source
from sources.stored import hub_pair_file, read_pair
from sources.windows import Refill, Windows

PIECE = 1024  # tokens that are taken from the stream together, or one sequence where rows are sequences


class StreamedActivations(Source):
    """A source of the same tokens' activations in several models, read over the network.

    Args:
        name: what the plan of a run calls it.
        parts: for each model (base first) its streamed splits, as `stored.open_dataset` gives them.
        flags, names: of each model, the flag it was given by and the column of activations (None to find it).
        stored_scale: [n_models] factor the stored values carry.
        rows: {"train": rows, "validation": rows} as far as they are known.
        val_tokens: held-out rows: the first of the validation split or, without one, of the training rows.
        buffer_tokens: rows of the buffer, two fills.

    The mean and the scale are estimated on the first fill. ValueError, naming the flag, for what cannot be read or paired.
    """

    def __init__(
        self, name: str, parts, flags, names, stored_scale: Tensor, rows: dict, val_tokens: int, buffer_tokens: int, seed: int
    ):
        self.parts, self.flags, self.names, self.stored_scale, self.rows = parts, flags, names, stored_scale, rows
        self.name, self.n_models, self.record = name, len(parts), {}
        for part, flag in zip(parts, flags, strict=True):
            if missing := set(parts[0]) ^ set(part):
                raise ValueError(f"{flag}: the split {missing.pop()!r} is in only one of the two datasets")
        first = next(self.tables("train", [None] * self.n_models, 1, 0), None)
        if first is None:
            raise ValueError(f"{flags[0]}: the dataset is empty")
        columns = self.columns(first[0], "train", 0)
        self.dtype = reduce(torch.promote_types, [c.dtype for c in columns])
        self.d_model, sequence = columns[0].d_model, len(columns[0])  # tokens in a row of the datasets, nearly always 1
        self.rows_at_once = PIECE if sequence == 1 else 1
        self.windows = Windows(self, seed, buffer_tokens, flags[0], "the rows")
        self.capacity, self.resumed = self.windows.capacity, None
        self.pieces_ahead = max(1, self.capacity // max(PIECE, sequence))
        row = self.n_models * self.d_model * self.dtype.itemsize  # bytes
        if (needed := row * (buffer_tokens * 3 // 2 + val_tokens)) > (free := free_memory()):
            raise ValueError(
                f"--buffer-tokens {buffer_tokens}: the buffer, what is read ahead and the held-out rows need "
                f"{needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; lower it or --val-tokens"
            )
        self.buffer = torch.empty(self.n_models, 2 * self.capacity, self.d_model, dtype=self.dtype)

        self.ready, self.closed, self.thread = None, threading.Event(), None  # of the thread that reads ahead
        self.beginning = {"states": [None] * self.n_models, "row": 0, "skip": 0}
        split = "validation" if "validation" in parts[0] else "train"
        self.validation = self.hold_out(split, val_tokens)  # [n_models, val_rows, d_model]
        self.val_rows = self.validation.shape[1]
        self.train_rows = rows.get("train") and rows["train"] - (self.val_rows if split == "train" else 0)  # None: not known
        self.seek(None)

    # --- from the streams

    def tables(self, split: str, states: list, at_once: int, row: int) -> Iterator[tuple[list, list]]:
        """Arrow tables of the same rows of all models, and the states of the streams after them. row: number of the first."""
        streams = [part[split].with_format("arrow") for part in self.parts]
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

    def columns(self, tables: list, split: str, row: int) -> list[Column]:
        """The activations in tables of the same rows, checked against each other."""
        columns = [Column(t, name, flag, row) for t, name, flag in zip(tables, self.names, self.flags, strict=True)]
        for table, column, flag in list(zip(tables, columns, self.flags, strict=True))[1:]:
            check_alignment(tables[0], table, [columns[0], column], (self.flags[0], flag), split, row)
        return columns

    def pieces(self, split: str, start: dict) -> Iterator[tuple[Tensor, dict]]:
        """What comes from `start` on: [n_models, rows, d_model] and where it begins. Of the first one `start` skips rows."""
        states, row = start["states"], start["row"]
        for tables, after in self.tables(split, states, self.rows_at_once, row):
            columns = self.columns(tables, split, row)
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
        self.stream, self.ended = self.pieces("train", start), False
        self.x, self.where, self.used = self.buffer[:, :0], start, 0  # the piece in hand, and how much of it is in the buffer
        self.skip = start["skip"]  # rows of the first piece
        if self.ready:
            self.start_reading()

    def read(self, number: int) -> Refill:
        """Put the next rows into half `number % 2`."""
        half, n = number % 2 * self.capacity, 0
        while n < self.capacity:
            if self.used == self.x.shape[1]:
                if (piece := self.next_piece()) is None:
                    break
                (self.x, self.where), self.used, self.skip = piece, self.skip, 0
            part = self.x[:, self.used : self.used + self.capacity - n]
            self.buffer[:, half + n : half + n + part.shape[1]] = part
            n, self.used = n + part.shape[1], self.used + part.shape[1]
        if number == 0 and n < 2:
            raise ValueError(f"{self.flags[0]}: gives no two rows to train on; give more, or lower --val-tokens")
        some = self.buffer[:, half : half + n, :8].contiguous()  # values that tell one row from another
        return Refill(n, self.where | {"skip": self.used + self.skip}, zlib.crc32(some.view(torch.uint8).numpy()))

    def end_epoch(self) -> None:
        pass

    # --- reading ahead

    def next_piece(self) -> tuple[Tensor, dict] | None:
        """The next piece, of the thread where it runs; None at the end of the stream."""
        item = None if self.ended else self.ready.get() if self.ready else next(self.stream, None)
        if self.closed.is_set():
            raise RuntimeError("the stream was closed")  # ends the thread of read_ahead; nothing waits for its batches any more
        if isinstance(item, BaseException):
            raise item
        self.ended = item is None
        return item

    def start_reading(self) -> None:
        """Read `self.stream` in a thread, as far ahead as there is room."""

        def run(stream, ready):
            try:
                while (piece := next(stream, None)) is not None and not self.closed.is_set():
                    ready.put(piece)
                ready.put(None)
            except BaseException as error:  # noqa: BLE001 - raised again where the pieces are used
                ready.put(error)

        self.ready = queue.Queue(self.pieces_ahead)
        self.thread = threading.Thread(target=run, args=(self.stream, self.ready), name="stream", daemon=True)
        self.thread.start()

    def stop_reading(self) -> None:
        """End the thread, and let nobody wait for it."""
        self.closed.set()
        for _ in range(50):  # a network that hangs must not keep the run from leaving
            running = self.thread.is_alive()
            while not self.ready.empty():
                self.ready.get_nowait()  # it may wait for room
            if not running:
                break
            self.thread.join(0.1)
        with suppress(queue.Full):  # then there is a piece
            self.ready.put_nowait(None)  # for whoever waits for one

    # --- what batches and the held-out metrics read

    def describe(self) -> str:
        rows = "" if self.train_rows is None else f"{self.train_rows:,} rows "
        return f"{self.name}: {rows}streamed in fills of {self.capacity:,} rows"

    def host_bytes(self, batch_size: int) -> dict[str, int]:
        return super().host_bytes(batch_size) | {"buffer_tokens": self.buffer.nbytes}  # taken when it is filled

    def state_dict(self, position: int) -> dict:
        return self.windows.state_dict(position)

    def load_state_dict(self, state: dict) -> None:
        self.resumed = state

    def batches(
        self, batch_size: int, stop: int, device: torch.device, position: int = 0, dropped: Dropped = NONE_DROPPED,
        shard: Shard = ALONE,
    ) -> Iterator[Batch]:  # fmt: skip
        if self.resumed and position < stop:
            self.windows.load_state_dict(self.resumed, position)
        self.start_reading()
        stream = read_ahead(self, batch_size, stop, device, position, dropped, shard)
        try:
            for batch in stream:  # noqa: UP028 - `yield from` would close the stream first, and that may wait for a piece
                yield batch
        finally:
            self.stop_reading()
            stream.close()

    def order(self, position: int, count: int) -> np.ndarray:
        """[<= count] training rows, ascending, at these places of the stream. Goes on from the last call."""
        places = self.windows.take(position, count)
        half, place = divmod(places, self.capacity)
        fill = self.windows.window - (half != self.windows.window % 2)  # of each row
        return np.sort(fill * self.capacity + place)

    def sample_rows(self, count: int) -> np.ndarray:
        return self.windows.first_rows(count)

    def gather(self, split: str, rows: np.ndarray, out: Tensor) -> None:
        """Write rows of "validation", or training rows while the buffer holds them, into out [n_models, rows, d_model]."""
        values = self.validation if split == "validation" else self.buffer
        places = torch.from_numpy(rows if split == "validation" else rows % (2 * self.capacity))
        for mine, x in zip(values, out, strict=True):
            torch.index_select(mine, 0, places, out=x)


def open_streams(dataset, base_dataset, ft_dataset, model_dataset, columns, revisions: list | None):
    """The datasets of the flags of these names, as StreamedActivations wants them.

    revisions: commits of the datasets on the Hub when the run began, None for their newest.

    Returns:
        parts, flags, names, stored_scale [n_models], what pair.json says or None, and the revisions
    """
    if dataset and Path(dataset).expanduser().exists():
        raise ValueError(f"--dataset {dataset}: lies on this disk, where it is read in place; leave out --streaming")
    if dataset:
        revisions = revisions or [newest_revision(dataset, "--dataset")]
        parts = [open_dataset(f"{dataset}:{part}", "--dataset", True, revisions[0]) for part in ("base", "ft")]
        pair = read_pair(dataset, hub_pair_file(dataset, revisions[0]))
        stored_scale = torch.tensor(pair["stored_scale"], dtype=torch.float64)
        return parts, ["--dataset"] * 2, list(columns), stored_scale, pair, revisions
    given, flags = [base_dataset, ft_dataset], ["--base-dataset", "--ft-dataset"]
    if model_dataset:
        given, flags, columns = model_dataset, [f"--model-dataset {d}" for d in model_dataset], columns[:1] * len(model_dataset)
    short = [flag.split()[0] for flag in flags]
    revisions = revisions or [newest_revision(name, flag) for name, flag in zip(given, short, strict=True)]
    parts = [open_dataset(name, flag, True, r) for name, flag, r in zip(given, short, revisions, strict=True)]
    return parts, flags, list(columns), torch.ones(len(given)), None, revisions
