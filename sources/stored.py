"""Stored activations: two or more datasets of the same tokens, opened together and read where they lie on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from run import held_out
from sources.batches import read_ahead
from sources.columns import Column, aligned_columns
from sources.dataset_files import ActivationDatasets
from sources.source import Batch, Source, evenly_spaced

CHUNK = 1024  # rows that are read together: a few megabytes from one place of the disk
BLOCK = 64 * CHUNK  # rows within which data that is not yet shuffled is mixed


class Split(NamedTuple):
    """The training or the held-out rows."""

    columns: list[Column]  # of each model, base first
    first: int
    rows: int


class PairedActivations(Source):
    """A source of the same tokens' activations in several models.

    Args:
        opened: the datasets that hold them. With a pair.json that says so their rows are already in random order, so that
            contiguous runs of them may go into a batch.
        val_tokens: held-out rows; None for `default_val`, or a tenth of the rows if that is less.
        seed: decides the order of the rows together with the epoch.
    """

    def __init__(self, opened: ActivationDatasets, val_tokens: int | None, default_val: int, seed: int):
        self.name, self.pair, self.stored_scale = opened.name, opened.pair, opened.stored_scale
        self.shuffled, self.seed, self.record = bool((opened.pair or {}).get("shuffled")), seed, {}
        whole = {}
        for split in opened.splits[0]:
            datasets = [splits[split] for splits in opened.splits]
            tables = [(d if d._indices is None else d.flatten_indices()).data.table for d in datasets]
            whole[split] = aligned_columns(tables, opened.columns, opened.flags, split)
        self.splits = set_apart(whole, val_tokens, default_val)
        self.train_rows, self.val_rows = self.splits["train"].rows, self.splits["validation"].rows
        self.n_models, self.d_model = len(whole["train"]), whole["train"][0].d_model
        # Values of different types are read as the wider one, float16 and bfloat16 as float32.
        self.dtype = reduce(torch.promote_types, [column.dtype for columns in whole.values() for column in columns])

    def hold_out_first(self) -> None:
        """Let the held-out rows be the first of the training rows, as when they are streamed, not the last ones."""
        last = self.splits["validation"]
        if last.first:
            self.splits["validation"] = last._replace(first=0)
            self.splits["train"] = self.splits["train"]._replace(first=last.rows)

    def describe(self) -> str:
        return f"{self.name}: {self.train_rows:,} rows"

    def batches(self, *args, **options) -> Iterator[Batch]:
        return read_ahead(self, *args, **options)

    def order(self, position: int, count: int) -> np.ndarray:
        """Rows, ascending, at `count` places of the endless stream, fewer at the end of an epoch or block.

        A function of (seed, epoch, block): chunks of contiguous rows come in another order each epoch, the last, shorter
        chunk at its end; data not yet shuffled is permuted within blocks of chunks that lie far apart.
        """
        epoch, start = divmod(position, self.train_rows)
        end = min(start + count, self.train_rows)
        block = start // BLOCK
        if self.shuffled:
            numbers = np.arange(start, end)  # of rows, counted chunk after chunk in the order of the epoch
        else:
            first, after = block * BLOCK, min((block + 1) * BLOCK, self.train_rows)
            numbers = first + permutation(after - first, self.seed, epoch, block)[start - first : end - first]
        full_chunks = self.train_rows // CHUNK
        chunk_at = np.append(permutation(full_chunks, self.seed, epoch), full_chunks)
        return np.sort(chunk_at[numbers // CHUNK] * CHUNK + numbers % CHUNK)

    def sample_rows(self, count: int) -> np.ndarray:
        return evenly_spaced(count, self.train_rows)

    def gather(self, split: str, rows: np.ndarray, out: Tensor) -> None:
        columns, first, _ = self.splits[split]
        for column, values in zip(columns, out, strict=True):
            column.gather(rows + first, values)


def set_apart(columns: dict[str, list[Column]], val_tokens: int | None, default_val: int) -> dict[str, Split]:
    """The training and the held-out rows: of a validation split the first ones, without one the last rows of "train"."""
    train, validation = columns["train"], columns.get("validation")
    rows, held = held_out.split(len(train[0]), len(validation[0]) if validation else None, val_tokens, default_val)
    return {"train": Split(train, 0, rows), "validation": Split(validation or train, 0 if validation else rows, held)}


@lru_cache(maxsize=4)
def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. n-1 that depends on the non-negative integers of `key` alone."""
    return np.random.default_rng(key).permutation(n)
