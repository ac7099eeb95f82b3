"""Explained variance of a reconstruction: of one batch, or of all rows of many batches together."""

from __future__ import annotations

import torch
from torch import Tensor


def explained_variance(x: Tensor, x_hat: Tensor) -> Tensor:
    """[1 + n_models] explained variance of all models together, then of each: 1 - squared error / squared deviation.

    Totals over the batch, deviations from the batch mean; a constant error lowers it. x, x_hat: [batch, n_models, d_model].
    """
    return variance_share((x - x_hat).pow(2).sum((0, 2)), (x - x.mean(0)).pow(2).sum((0, 2)))


def squared_error(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over models and d_model of the squared error, mean over the batch; and the error x - x_hat, without gradient.

    x, which gets no gradient, and x_hat: [batch, n_models, d_model]. Keeps the error alone for the backward pass.
    """
    return _SquaredError.apply(x, x_hat)


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_hat):
        error = x - x_hat
        ctx.set_materialize_grads(False)  # else zeros for the error
        ctx.save_for_backward(error)
        ctx.mark_non_differentiable(error)
        return error.pow(2).sum((1, 2)).mean(), error

    @staticmethod
    def backward(ctx, d_mean, _):
        (error,) = ctx.saved_tensors
        d_x_hat = error.new_empty(error.shape)  # row by row, as x_hat lies, whatever x does
        return None, torch.mul(error, -2 * (d_mean / len(error)), out=d_x_hat)


class VarianceTotals:
    """What explained variance over many batches needs, in float64: totals over rows of the same models and width."""

    def __init__(self):
        self.rows = 0
        self.error = self.total = self.squared = torch.zeros(())  # the first rows give them their shapes

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """x, x_hat: [batch, n_models, d_model]."""
        self.rows += len(x)
        self.error = self.error + (x - x_hat).double().pow(2).sum((0, 2))  # [n_models]
        self.total = self.total + x.double().sum(0)  # [n_models, d_model]
        self.squared = self.squared + x.double().pow(2).sum((0, 2))  # [n_models]

    def explained(self) -> Tensor:
        """[1 + n_models] as `explained_variance` of all rows together."""
        return variance_share(self.error, self.squared - self.total.pow(2).sum(-1) / self.rows)


def variance_share(error: Tensor, deviation: Tensor) -> Tensor:
    """[1 + n_models] explained variance from the totals [n_models] of squared error and squared deviation."""
    return 1 - torch.cat([error.sum()[None], error]) / torch.cat([deviation.sum()[None], deviation])
