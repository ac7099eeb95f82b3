"""Which rows are held out: never trained on, behind every `val_` metric.

Collections and live runs hold out whole sequences, one of every four from the beginning of the texts until there are enough
rows. Stored datasets: those of a validation split, else the last rows; streamed ones, whose end is not known, the first
(`hold_out` in sources/streamed.py). Planted concepts have a stream of their own for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

STRETCH = 4  # sequences in a row, of which one may be held out: then held-out rows come from all over the first texts
Item = TypeVar("Item")


def is_candidate(sequence: int, seed: int) -> bool:
    """Whether the sequence of this index may be held out: one of every STRETCH in a row, at a random place among them."""
    stretch, place = divmod(sequence, STRETCH)
    return place == np.random.default_rng([seed, stretch]).integers(STRETCH)


def choose(candidates: Iterator[Item], wanted: int, rows_of: Callable[[Item], int]) -> list[Item]:
    """The first candidates whose rows are together `wanted`, as closely as whole candidates allow; at least one of them."""
    chosen: list[Item] = []
    rows = 0
    while rows < wanted and (candidate := next(candidates, None)) is not None:
        before, rows = rows, rows + rows_of(candidate)
        if before == 0 or rows - wanted <= wanted - before:  # with it, or without it
            chosen.append(candidate)
    return chosen


def split(rows: int, validation_rows: int | None, asked: int | None, default: int) -> tuple[int, int]:
    """How many rows of a stored dataset are for training, and how many are held out.

    rows: of its split "train"; validation_rows: of its validation split, None: the last rows of "train" are held out.
    ValueError if either would be fewer than two.
    """
    if validation_rows is None:
        held_out = min(default, rows // 10) if asked is None else asked
        training = rows - held_out
    else:
        training, held_out = rows, min(validation_rows, asked or default)
    if min(training, held_out) < 2:
        raise ValueError(
            f"--val-tokens: {rows} rows cannot give {held_out} held-out rows and rows to train on, at least two of each"
        )
    return training, held_out
