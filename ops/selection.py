"""Which codes are kept: the largest scores of a batch, over all processes that share the dictionary. Exact, without sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ops.shard import ALONE, Shard

SAMPLED = 61  # one score in so many; a prime, so that no multiple of d_hidden hits the same latents again and again


def some_more(expected: float) -> int:
    """How many of a sample's largest to take so that hardly ever fewer than the expected share exceeds the last of them."""
    return math.ceil(1.1 * expected + 6 * expected**0.5) + 32


def lowest_of_largest(sample: Tensor, count: int, shard: Shard) -> Tensor:
    """The `count`-th largest of a sample, at least 0; the least over all processes. inf for an empty one."""
    if not len(sample):
        return shard.all_min(torch.tensor(torch.inf))
    return shard.all_min(torch.topk(sample, min(len(sample), count), sorted=False).values.amin().clamp_min(0).float())


def mask_of_largest(score: Tensor, count: int, shard: Shard) -> Tensor:
    """Mask [n] of the `count` largest of the positive scores [n] of all processes; of those at the cut the first."""
    cut, ties = find_cut(lambda: [score], count, shard)
    kept = score.float() > cut
    equal = (score.float() == cut).nonzero()[:, 0]
    before = shard.gather(torch.tensor([len(equal)]))[: shard.rank].sum()
    return kept.index_fill_(0, equal[: max(0, int(ties - before))], True)


def find_cut(scores: Callable[[], Iterable[Tensor]], count: int, shard: Shard = ALONE) -> tuple[float, int]:
    """The `count`-th largest positive value in a stream, over all processes, and how many of its equals belong to the `count`.

    Non-negative floats are ordered like their bit patterns, so a histogram of the upper 16 bits finds the bucket of the
    value and a histogram of the lower 16 bits within that bucket finds the value itself. 0 if fewer are positive.

    Args:
        scores: called twice, each time gives the same tensors of any shape; they are looked at in float32.
    """
    upper, lower, left = 0, 0, torch.tensor(count)
    for level in range(2):
        bins = torch.zeros(1 << 16, dtype=torch.int32)
        for score in scores():
            bits = score[score > 0].float().view(torch.int32)
            part = bits >> 16 if level == 0 else bits[bits >> 16 == upper] & 0xFFFF
            bins += torch.bincount(part, minlength=1 << 16).cpu()
        bins = shard.all_sum(bins)
        if level == 0 and bins.sum() < count:
            return 0.0, 0
        chosen, left = find_bin(bins, left)
        upper, lower = (int(chosen), 0) if level == 0 else (upper, int(chosen))
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item(), int(left)


def find_bin(bins: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """The highest bin with `count` values in it or above it (bin 0 if there are fewer), and how many of its own are needed."""
    at_least = bins.long().flip(0).cumsum(0).flip(0)
    chosen = ((at_least >= count).sum() - 1).clamp_min(0)
    return chosen, count - (at_least.take(chosen) - bins.take(chosen))  # at_least[chosen] would wait for the device


def true_entries(mask: Tensor) -> Tensor:
    """Flat places where a mask is true, ascending. Looks at eight entries at a time: most are false."""
    flat = mask.flatten()
    if len(flat) % 8:
        return flat.nonzero()[:, 0]
    words = flat.view(torch.int64).nonzero()[:, 0]
    word, byte = flat.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte
