"""The interface between train.py and its data, which is the same for stored, streamed, live and planted activations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ops.shard import ALONE, Shard

BUFFERS = 6  # batches in host memory: three filled ahead, two that the training loop holds, one being filled
ANY_NORM = torch.finfo(torch.float32).max  # norm_limit of a source that leaves out no outliers; inf and NaN exceed it


class Dropped(NamedTuple):
    """Rows that were left out, of all models."""

    non_finite: int = 0  # because of a NaN or inf in one of the models
    outliers: int = 0  # because of a norm above the source's norm_limit in one of the models


NONE_DROPPED = Dropped()


class Batch(NamedTuple):
    """One batch of the training stream, and the position of the stream after it."""

    x: Tensor  # [rows, n_models, d_model] stored values, on the device
    position: int  # rows of the stream used up so far, over all epochs
    dropped: Dropped  # of those, rows left out of their batch
    first_row: int  # lowest and highest row of the dataset in this batch
    last_row: int


class Source(Protocol):
    """Rows of activations of several models at the same tokens: a training stream, and held-out rows that are not in it.

    The stream is a function of the seed and what was read, so that a position and `state_dict` are enough to go on in another
    process. Values are stored values: activation * stored_scale. Sources subclass this protocol for the defaults of its last
    methods, which are those of a source whose stream is a function of the position alone.
    """

    n_models: int
    d_model: int
    dtype: torch.dtype  # of the stored values
    train_rows: int | None  # rows of one epoch; None where they are endless, or not known before the first epoch ends
    val_rows: int
    stored_scale: Tensor  # [n_models]
    norm_limit: Tensor | float = ANY_NORM  # [n_models, 1] norm of stored rows above which they are left out of all models
    pair: dict | None = None  # what the pair.json of a paired dataset says
    record: dict  # facts in JSON's types by which a resumed run knows the data again, beside the sizes above

    def describe(self) -> str:
        """What it is and how many rows it has, for the plan that a run prints."""

    def batches(
        self, batch_size: int, stop: int, device: torch.device, position: int = 0, dropped: Dropped = NONE_DROPPED,
        shard: Shard = ALONE,
    ) -> Iterator[Batch]:  # fmt: skip
        """Batches of the rows from `position` to `stop` of the stream; the last one may be shorter.

        Of several processes each reads a part, and all get the whole batch. A batch's tensor is overwritten after the next one
        was asked for. dropped: rows left out before `position`. The generator must be closed.
        """

    def gather(self, split: str, rows: np.ndarray, out: Tensor) -> None:
        """Write the given rows (ascending) of "train" or "validation" into out [n_models, rows, d_model].

        Held-out rows are 0 to val_rows - 1; training rows are those that `sample_rows` or `order` gave.
        """

    def sample_rows(self, count: int) -> np.ndarray:
        """At most `count` training rows to estimate the mean and the scale on, ascending."""

    def state_dict(self, position: int) -> dict:
        """What `load_state_dict` needs beside the position, in JSON's types. Not for one before that of an earlier call."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Before `batches` is asked to go on at the position of which `state_dict` gave `state`."""

    def host_bytes(self, batch_size: int) -> dict[str, int]:
        """Bytes of host memory that `batches` will take, by the flag that lowers them."""
        return {"batch_size": BUFFERS * batch_size * self.n_models * self.d_model * self.dtype.itemsize}

    def metrics(self, seconds: float) -> dict[str, float]:
        """Metrics of its own over the `seconds` since the last call."""
        return {}

    def score(self, W_dec: Tensor, dead: Tensor, kind_of: Tensor | None = None) -> dict[str, float] | None:
        """How much of the truth a dictionary found, as `planted.PlantedConcepts.score`; None where the truth is not known."""
        return None

    def close(self) -> None:
        """The run had all its rows: finish what is kept of them."""


def evenly_spaced(count: int, n: int) -> np.ndarray:
    """At most `count` evenly spaced numbers from 0 to n - 1, ascending."""
    return np.unique(np.linspace(0, n - 1, min(count, n)).astype(np.int64))
