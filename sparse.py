"""Using few of many latents: which codes of a batch are kept, and what is decoded from them.

Everything the model does with sparsity goes through these functions, in plain PyTorch and differentiable by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SAMPLED = 61  # one score in so many; a prime, so that no multiple of d_hidden hits the same latents again and again


def keep_largest(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest positive entries of the whole matrix, fewer if fewer are positive.

    Args:
        score: [batch, d_hidden], non-negative.
        count: how many to keep over the whole batch (BatchTopK, arXiv 2412.06410: k * batch).

    Returns:
        [batch, d_hidden] bool. Of equal scores at the cut only as many are kept as `count` allows.
    """
    flat = score.flatten()
    candidates = None
    if flat.device.type == "cpu":
        # Most scores are far below the cut. A sample tells a value that about twice `count` of them exceed; only those
        # need sorting. On CUDA their number would have to come to the host first.
        sample = flat[::SAMPLED]
        floor = torch.topk(sample, min(len(sample), 2 * count // SAMPLED + 32), sorted=False).values.amin()
        candidates = (flat > floor).nonzero()[:, 0]
        if len(candidates) < count:  # the sample misjudged, or fewer are positive: look at all
            candidates = None
    among = flat if candidates is None else flat[candidates]
    top = torch.topk(among, min(count, len(among)), sorted=False)
    indices = top.indices if candidates is None else candidates[top.indices]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, indices, top.values > 0)
    return mask.view_as(score)


def encode(x: Tensor, W_enc: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense product x [batch, n_models, d_model] with W_enc [n_models, d_model, d_hidden] -> float32 [batch, d_hidden].

    One flat product over (model, d_model): twice as fast as an einsum that multiplies per model and adds.
    """
    flat = W_enc.flatten(0, 1)  # [n_models * d_model, d_hidden]
    return (x.flatten(1).to(dtype) @ flat.to(dtype)).float()


def decode(f: Tensor, W_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes f [batch, d_hidden] times W_dec [d_hidden, n_models, d_model] -> float32 [batch, n_models, d_model]. No bias."""
    flat = W_dec.flatten(1)  # [d_hidden, n_models * d_model]
    return (f.to(dtype) @ flat.to(dtype)).float().unflatten(1, W_dec.shape[1:])


def kth_largest(scores: Callable[[], Iterable[Tensor]], count: int) -> float:
    """The `count`-th largest positive float32 value in a stream too large to hold; 0 if fewer are positive.

    Non-negative floats are ordered like their bit patterns, so a histogram of the upper 16 bits finds the bucket of the
    value and a histogram of the lower 16 bits within that bucket finds the value itself.

    Args:
        scores: called twice, each time gives the same float32 tensors of any shape.
    """
    upper, remaining = None, count
    for _ in range(2):
        bins = torch.zeros(1 << 16, dtype=torch.int64)
        for score in scores():
            bits = score[score > 0].view(torch.int32)
            part = bits >> 16 if upper is None else bits[bits >> 16 == upper] & 0xFFFF
            bins += torch.bincount(part, minlength=1 << 16).cpu()
        at_least = bins.flip(0).cumsum(0).flip(0)  # [65536] how many values lie in this bin or above
        if upper is None and at_least[0] < count:
            return 0.0
        chosen = int((at_least >= remaining).sum()) - 1  # the highest bin that still has `remaining` at or above it
        remaining -= int(at_least[chosen] - bins[chosen])
        if upper is None:
            upper = chosen
    return torch.tensor(upper << 16 | chosen, dtype=torch.int32).view(torch.float32).item()
