"""What passes from the texts to a shard: sequences, those drawn together, the rows they give, the rows gathered so far."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Sequence(NamedTuple):
    index: int  # number of the sequence in the texts
    source: int  # number of the --text it comes from
    tokens: np.ndarray  # [<= seq_len] int32
    refused: int = 0  # conversations of its source that the chat template could not format so far


class Draw(NamedTuple):
    """Sequences that give their rows together: a part of the texts that no shard divides."""

    batches: list[list[Sequence]]  # forward batches
    passed: list[Sequence]  # sequences read from the texts to get training rows, held-out ones included

    def most_rows(self, skip_first: int) -> int:
        """The rows that it gives if none is left out for its norm: known from the texts alone."""
        return sum(max(0, len(s.tokens) - skip_first) for batch in self.batches for s in batch)


class Rows(NamedTuple):
    """The rows that a draw gives at one hook: filtered, scaled and in the type they are stored in."""

    acts: list[Tensor]  # of each model [rows, d_model], on its device
    columns: np.ndarray  # [3, rows] int32: sequence, position, token
    passed: list[Sequence]  # of the draw
    left_out: Counter  # positions without a row, by reason


class GatheredRows:
    """Rows of whole draws, gathered until they fill a shard of a dataset or half of the live buffer.

    values: [capacity, n_models, d_model] memory for them, on any device.
    """

    def __init__(self, values: Tensor):
        self.values = values
        self.columns = np.empty((3, len(values)), np.int32)  # sequence, position, token
        self.clear()

    def clear(self) -> None:
        self.n, self.beyond = 0, 0  # rows; those that `cut` left out of the last draw
        self.draws: list[tuple[int, list[Sequence], Counter]] = []  # rows, passed and left_out of each draw

    def add(self, rows: Rows) -> int:
        """Take the rows in. Returns how many."""
        n = rows.columns.shape[1]
        place = slice(self.n, self.n + n)
        for m, x in enumerate(rows.acts):
            self.values[place, m] = x
        self.columns[:, place] = rows.columns
        self.n += n
        self.draws.append((n, rows.passed, rows.left_out))
        return n

    def cut(self, most: int) -> None:
        """Keep the first `most` rows, and nothing of draws behind the one that has the last of them."""
        while self.draws and self.n - self.draws[-1][0] >= most:
            self.n -= self.draws.pop()[0]
        self.beyond = max(0, self.n - most)
        self.n -= self.beyond

    @property
    def passed(self) -> list[Sequence]:
        """The sequences read from the texts to get these rows."""
        return [sequence for _, passed, _ in self.draws for sequence in passed]

    @property
    def left_out(self) -> Counter:
        """Positions without a row, by reason."""
        return sum((left_out for *_, left_out in self.draws), Counter(beyond_num_tokens=self.beyond))
