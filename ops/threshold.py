"""The inference threshold of batch_topk: a token's codes must not depend on the batch that it comes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ops.selection import find_cut
from ops.shard import Shard

RATE = 0.01  # of the moving average that the threshold follows during training


@torch.no_grad()
def follow(threshold: Tensor, smallest: Tensor) -> Tensor:
    """[] The threshold after a training batch with this smallest kept score; inf, where none was kept, leaves it.

    The first batch sets it, later ones move it by a moving average.
    """
    moved = torch.where(threshold == 0, smallest, threshold.lerp(smallest, RATE))
    return torch.where(smallest.isfinite(), moved, threshold)


def fit(scores: Callable[[], Iterable[Tensor]], count: int, shard: Shard) -> float:
    """The threshold that `count` of the scores exceed; `scores` is called several times, each time gives the same tensors.

    It lies midway between the `count`-th and the next largest score: on a score itself, rounding (another batch size, folded
    weights) would decide whether that latent is active.
    """
    kept, next_one = (find_cut(scores, n, shard)[0] for n in (count, count + 1))
    return (kept + next_one) / 2
