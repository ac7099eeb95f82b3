"""The difference of two models' activations as the activations of one model: what train.py --difference trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from sources.batches import row_norms, surely_within
from sources.source import Batch, Source

LEFT_OUT = 1e18  # norm_limit: a difference this long is no activation's, so a row with it marks one that the pair leaves out


class Difference(Source):
    """x_ft - x_base of the rows of another source, in raw activations: a source of one model.

    Order, held-out rows and what a resumed run needs are the pair's. A row that the pair leaves out, because one of its two
    activations is not finite or too long, is left out here too.
    """

    n_models = 1
    dtype = torch.float32
    norm_limit = LEFT_OUT

    def __init__(self, two: Source):
        if two.n_models != 2:
            raise ValueError(f"--difference: is that of two models, the data is of {two.n_models}")
        self.two, self.pair, self.stored_scale = two, two.pair, torch.ones(1)
        self.d_model, self.train_rows, self.val_rows = two.d_model, two.train_rows, two.val_rows
        self.record = two.record | {"stored_scale": two.stored_scale.tolist()}  # a run that goes on gives it to the models

    def subtract(self, x: Tensor) -> Tensor:
        """[rows, 1, d_model] raw differences of stored values [rows, 2, d_model]."""
        base, ft = (x.float() / self.two.stored_scale.to(x.device, torch.float32)[:, None]).unbind(1)
        return (ft - base)[:, None]

    def describe(self) -> str:
        return f"ft - base of {self.two.describe()}"

    def batches(self, *args, **options) -> Iterator[Batch]:
        with closing(self.two.batches(*args, **options)) as stream:
            for batch in stream:
                yield batch._replace(x=self.subtract(batch.x))

    def gather(self, split: str, rows: np.ndarray, out: Tensor) -> None:
        x = torch.empty(2, len(rows), self.d_model, dtype=self.two.dtype)
        self.two.gather(split, rows, x)
        out[0] = self.subtract(x.transpose(0, 1))[:, 0]
        if not surely_within(x, self.two.norm_limit):
            too_long = (row_norms(x) > self.two.norm_limit).any(0) & x.isfinite().all(-1).all(0)
            out[0, too_long] = 2 * LEFT_OUT

    def sample_rows(self, count: int) -> np.ndarray:
        return self.two.sample_rows(count)

    def state_dict(self, position: int) -> dict:
        return self.two.state_dict(position)

    def load_state_dict(self, state: dict) -> None:
        self.two.load_state_dict(state)

    def host_bytes(self, batch_size: int) -> dict[str, int]:
        return self.two.host_bytes(batch_size)

    def metrics(self, seconds: float) -> dict[str, float]:
        return self.two.metrics(seconds)

    def close(self) -> None:
        self.two.close()
