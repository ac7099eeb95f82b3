"""Live activations: the two models compute rows while the crosscoder trains, in the order of `mixing.py`.

A fill is as many forward batches as half of the buffer holds. A resumed run lets the models read two of them again. Of several
processes each lets its models read every n-th draw of sequences, and all get all rows: the buffer is that of one process.
Models that have devices of their own read up to a fill ahead, in a thread, while the crosscoder trains.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from collecting.paired_dataset import PairedDataset
from collecting.paired_rows import PairedModels
from collecting.rows import Draw, GatheredRows, Rows
from ops.shard import ALONE, Shard
from run.machine import free_memory, progress_bar, size_text
from sources.batches import Ahead, upload
from sources.mixing import MixingBuffer, Refill
from sources.source import NONE_DROPPED, Batch, Dropped, Source

FORWARD_ROOM = 0.15  # share of the free device memory that is left to the models' forward passes


class LiveActivations(Source):
    """A source of paired activations that the two models compute while the crosscoder trains.

    Args:
        models: calibrated, at the beginning of the texts.
        buffer_tokens: most rows in the buffer, both fills together.
        val_tokens: held-out rows, set apart and read by the models here, kept in host memory.
        keep: unfinished paired dataset that the first epoch is written to, in the first process.
        beside: whether the models have devices of their own and read while the crosscoder trains.
        shard: the processes that share the texts.
    """

    n_models = 2
    dtype = torch.float16
    train_rows = None  # not known before the texts have run out

    def __init__(
        self, name: str, models: PairedModels, *, buffer_tokens: int, val_tokens: int, buffer_device: torch.device,
        keep: PairedDataset | None = None, beside: bool = False, shard: Shard = ALONE,
    ):  # fmt: skip
        self.name, self.models, self.keep, self.beside, self.shard = name, models, keep, beside, shard
        self.closed: threading.Event | None = None  # of the thread in which the models read, while batches are taken
        (self.hook,) = models.hooks
        self.d_model = self.hook.d_model
        self.fill_rows = rows_of_a_fill(buffer_tokens, models.drawn, models.seq_len)
        self.model_seconds = self.reported_seconds = 0.0  # of filling the buffer; until the last `metrics`
        with shard.together():
            if keep:
                keep.begin(models, self.hook)
        self.mixing = MixingBuffer(self, seed=models.seed, buffer_rows=buffer_tokens, flag="--text", contents="the texts")
        self.resumed, half = None, self.mixing.capacity
        shape = (2 * half, 2, self.d_model)
        pinned = buffer_device.type == "cpu" and any(m._module.device.type == "cuda" for m in models.models)  # refilled faster
        self.buffer = torch.empty(shape, dtype=self.dtype, device=buffer_device, pin_memory=pinned)
        self.fills = [GatheredRows(self.buffer[:half]), GatheredRows(self.buffer[half:])]
        self.validation = self.hold_out(val_tokens)  # [val_rows, 2, d_model], on the host
        self.val_rows = len(self.validation)
        self.stored_scale = torch.from_numpy(self.hook.scale)
        self.record = {"median_norm": self.hook.median.tolist(), "fingerprints": models.fingerprints}
        self.record |= {"held_out_until": models.held_out_until}
        self.stream = self.turns(models.training_draws(models.stream))  # as seek(None), without starting the texts again
        self.ahead = self.training_rows()

    def hold_out(self, wanted: int) -> Tensor:
        """The held-out rows [val_rows, 2, d_model], on the host. They pass through the first half of the buffer."""
        rows, kept, fill = self.held_out_rows(wanted), [], self.fills[0]
        with progress_bar("held-out rows", wanted, disable=self.models.quiet) as bar:
            while self.fill(fill, rows, bar):
                self.store("validation", len(kept), fill)
                kept.append(fill.values[: fill.n].cpu().clone())
        if not kept:
            raise ValueError("--text: gives too few sequences to hold one out; give more text, or lower --seq-len")
        return torch.cat(kept)

    def held_out_rows(self, wanted: int) -> Iterator[Rows]:
        """The rows of the held-out sequences, behind each of which `held_out_until` then lies."""
        draws = self.models.held_out_draws(wanted)
        rows = (one for turn, mine in self.turns(iter(draws)) for one in self.rows(turn, mine))
        for draw, one in zip(draws, rows, strict=True):
            self.models.held_out_until = draw.batches[-1][-1].index + 1
            yield one

    def training_rows(self) -> Iterator[Rows]:
        """The rows of all other sequences from where the stream is, in reading order."""
        while one := next(self.stream, None):
            yield from self.rows(*one)

    def turns(self, draws: Iterator[Draw]) -> Iterator[tuple[list[Draw], Rows | None]]:
        """The draws in turns, one for each process, and the rows that this one's models make of its own."""
        while turn := list(itertools.islice(draws, self.shard.size)):
            mine = self.models.rows(turn[self.shard.rank], [self.hook])[0] if self.shard.rank < len(turn) else None
            self.models.forget(turn)
            if self.beside and mine and self.buffer.device.type == "cpu":  # here nobody waits for the models' devices
                mine = mine._replace(acts=[x.cpu() for x in mine.acts])
            yield turn, mine

    def rows(self, turn: list[Draw], mine: Rows | None) -> Iterator[Rows]:
        """The rows of all draws of a turn, in their order, in all processes."""
        device = self.models.models[0]._module.device
        found = self.shard.gather_objects(mine and (mine.columns, mine.left_out))
        for process, (draw, (columns, left_out)) in enumerate(zip(turn, found, strict=False)):
            shape = columns.shape[1], self.d_model
            acts = mine.acts if mine and process == self.shard.rank else [
                torch.empty(shape, dtype=self.dtype, device=device) for _ in self.models.models
            ]  # fmt: skip
            yield Rows([self.shard.broadcast(x, process) for x in acts], columns, draw.passed, left_out)

    @contextmanager
    def reading_beside(self) -> Iterator[None]:
        """Inside, models that have devices of their own read ahead."""
        if self.beside:
            self.closed = threading.Event()
            self.read_ahead()
        try:
            yield
        finally:
            if self.closed:
                self.stream.close()
                self.closed = None

    def read_ahead(self) -> None:
        draws = -(-self.fill_rows // (self.models.drawn * self.models.seq_len))  # of a fill
        self.stream = Ahead(self.stream, draws, "models", self.closed)

    def fill(self, fill: GatheredRows, rows: Iterator[Rows], bar: tqdm) -> int:
        """Replace what a half of the buffer holds by the next rows. Returns how many."""
        fill.clear()
        while fill.n < self.fill_rows and (part := next(rows, None)):
            bar.update(fill.add(part))
        return fill.n

    # --- the stream

    def describe(self) -> str:
        return f"{self.name}: fills of {self.fill_rows:,} live rows"

    def state_dict(self, position: int) -> dict:
        return self.mixing.state_dict(position)

    def load_state_dict(self, state: dict) -> None:
        self.resumed = state

    def metrics(self, seconds: float) -> dict[str, float]:
        """The share of the time in which the models filled the buffer."""
        filling, self.reported_seconds = self.model_seconds - self.reported_seconds, self.model_seconds
        return {"model_fraction": filling / seconds}

    def batches(
        self, batch_size: int, stop: int, device: torch.device, position: int = 0, dropped: Dropped = NONE_DROPPED,
        shard: Shard = ALONE,
    ) -> Iterator[Batch]:  # fmt: skip
        """As `Source.batches`. Outliers are left out before rows come into the buffer, so none is dropped here."""
        self.reported_seconds = self.model_seconds
        if self.resumed and position < stop:
            self.mixing.load_state_dict(self.resumed, position)
        uploads = torch.cuda.Stream(device) if device.type != "cpu" else None
        with self.reading_beside():
            while position < stop:
                wanted, parts = min(batch_size, stop - position), []
                while wanted:
                    slots = torch.from_numpy(self.mixing.take(position, wanted))
                    parts.append(self.copied(slots, device, uploads))
                    position += len(slots)
                    wanted -= len(slots)
                x = torch.cat(parts) if len(parts) > 1 else parts[0]
                yield Batch(x, position, dropped, position - len(x), position - 1)

    def copied(self, slots: Tensor, device: torch.device, uploads: torch.cuda.Stream | None) -> Tensor:
        """The rows in these slots, [rows, 2, d_model] on the device, copied before a refill overwrites them."""
        if self.buffer.device.type != "cpu":
            return self.buffer[upload(slots, self.buffer.device)].to(device)
        rows = torch.empty(len(slots), 2, self.d_model, dtype=self.dtype, pin_memory=device.type != "cpu")
        return upload(torch.index_select(self.buffer, 0, slots, out=rows), device, uploads)

    def seek(self, start: int | None) -> None:
        """Go to the given sequence of the texts."""
        self.models.start(start or 0)
        self.stream = self.turns(self.models.training_draws(self.models.stream))
        if self.closed:
            self.read_ahead()
        self.ahead = self.training_rows()

    def read(self, number: int) -> Refill:
        """Let the models read fill `number` of the epoch into its half. It ends with the number of the sequence after it."""
        began, fill = time.perf_counter(), self.fills[number % 2]
        with progress_bar("both models", self.fill_rows, disable=self.models.quiet) as bar:
            self.fill(fill, self.ahead, bar)
        if number == 0 and fill.n == 0:
            raise ValueError("--text: not one row was left to train on; give more text, or lower --val-tokens or --skip-first")
        if self.buffer.device.type == "cuda":
            torch.cuda.synchronize(self.buffer.device)
        self.model_seconds += time.perf_counter() - began
        if self.mixing.epoch == 0 and fill.passed:
            self.store("train", number, fill)
        return Refill(fill.n, fill.passed[-1].index + 1 if fill.passed else None)

    # --- single rows, for the normalisation and the held-out metrics

    def sample_rows(self, count: int) -> np.ndarray:
        return self.mixing.first_rows(count)

    def gather(self, split: str, rows: np.ndarray, out: Tensor) -> None:
        """Write rows of "validation", or of the first fill while it is there, into out [n_models, rows, d_model]."""
        values = self.validation if split == "validation" else self.fills[0].values
        out.copy_(values[torch.from_numpy(rows).to(values.device)].transpose(0, 1))

    # --- the paired dataset on the way

    def store(self, split: str, shard: int, fill: GatheredRows) -> None:
        """Write a fill as the given shard, unless it is there already."""
        with self.shard.together():
            if self.keep is None or shard < (there := self.keep.progress["shards"][split]):
                return
            if shard > there:
                raise ValueError(
                    f"--keep-activations {self.keep.out}: holds {there} {split} shards and the run stands at {shard}; "
                    "give the folder that it began with, or --keep-activations None"
                )
            self.keep.write_shard(split, fill, self.models.held_out_until)

    def close(self) -> None:
        """Make what was kept a complete dataset."""
        with self.shard.together():
            if self.keep:
                rows = self.keep.finish(self.models, self.hook)["rows"]
                tqdm.write(f"kept     {self.keep.out}: {rows['train']:,} training and {rows['validation']:,} held-out rows")
                self.keep = None


def rows_of_a_fill(buffer_tokens: int, drawn: int, seq_len: int) -> int:
    """Rows that end a fill, so that two fills, each with the last sequences drawn together, stay within --buffer-tokens."""
    if buffer_tokens < 4 * drawn * seq_len:
        raise ValueError(
            f"--buffer-tokens {buffer_tokens}: must be at least {4 * drawn * seq_len}, four times the {drawn} sequences that "
            "are drawn together; raise it, or lower --model-batch-size or --seq-len"
        )
    return buffer_tokens // 2 - drawn * seq_len


def have_own_devices(models: PairedModels, device: torch.device) -> bool:
    """Whether no model is on the training's device."""
    return all(model._module.device != device for model in models.models)


def place_buffer(
    models: PairedModels, device: torch.device, *, buffer_tokens: int, val_tokens: int, d_hidden: int, batch_size: int,
    processes: int = 1,
) -> torch.device:  # fmt: skip
    """Print what the run takes and return where the buffer fits: the training's device, or the host. ValueError if neither."""
    d_model = models.hooks[0].d_model
    buffer, held_out = (4 * d_model * rows for rows in (buffer_tokens, val_tokens))  # bytes: two models, float16
    ahead = buffer // 2 if have_own_devices(models, device) else 0  # here, or on the models' devices
    # crosscoder, gradient and two moments, then the codes; float32
    training = 4 * (16 * d_model * d_hidden + 6 * batch_size * d_hidden) // processes
    cpu, host, on_cpu = torch.device("cpu"), free_memory(), device.type == "cpu"
    free = host if on_cpu else torch.cuda.mem_get_info(device)[0]
    place = device if training + buffer <= (1 - FORWARD_ROOM) * free else cpu
    where = [f"{size_text(m._module.get_memory_footprint())} on {m._module.device}" for m in models.models]
    print(
        f"memory   base model {where[0]}, fine-tuned {where[1]}; buffer {size_text(buffer)} on {place}, "
        + (f"{size_text(ahead)} read ahead, " if ahead else "")
        + f"held-out rows {size_text(held_out)} on cpu; "
        f"crosscoder, Adam's moments and codes about {size_text(training)} on {device}"
    )
    on_host = held_out + ahead + (buffer if place.type == "cpu" else 0) + (training if on_cpu else 0)
    on_host *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine
    for on, needed, there, remedy in (
        (cpu, on_host, host, "--val-tokens"),
        (device, training, free, "move a model with --ft-device"),
    ):
        if needed > there:
            raise ValueError(
                f"--device {device}: {size_text(needed)} are needed on {on} beside the models and {size_text(there)} are free; "
                f"lower --buffer-tokens, --d-hidden or --batch-size, or {remedy}"
            )
    return place
