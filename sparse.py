"""Using few of many latents: which codes of a batch are kept, and what is decoded from them.

Each operation has a dense form, matrices [batch, d_hidden] in plain autograd, and a sparse one that only touches active
entries. Both give the same numbers up to rounding; the sparse one is several times faster where few latents are active.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # only sampled_addmm is used

SAMPLED = 61  # one score in so many; a prime, so that no multiple of d_hidden hits the same latents again and again
CHUNK = 128  # tokens whose scores are looked at together: a chunk of a large dictionary stays in the processor's cache
DENSE_ABOVE = 1 / 8  # share of active entries above which the dense form is faster


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
    if flat.device.type == "cpu" and len(flat):
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


# --- dense


def encoder_rows(W_enc: Tensor) -> Tensor:
    """W_enc [n_models, d_model, d_hidden] as [d_hidden, n_models * d_model]; no copy for a CrossCoder's, stored that way."""
    return W_enc.permute(2, 0, 1).flatten(1)


def encode(x: Tensor, W_enc: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense product x [batch, n_models, d_model] with W_enc [n_models, d_model, d_hidden] -> float32 [batch, d_hidden].

    One flat product over (model, d_model): twice as fast as an einsum that multiplies per model and adds.
    """
    return (x.flatten(1).to(dtype) @ encoder_rows(W_enc).to(dtype).T).float()


def decode(f: Tensor, W_dec: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes f [batch, d_hidden] times W_dec [d_hidden, n_models, d_model] -> float32 [batch, n_models, d_model]. No bias."""
    flat = W_dec.flatten(1)  # [d_hidden, n_models * d_model]
    return (f.to(dtype) @ flat.to(dtype)).float().unflatten(1, W_dec.shape[1:])


# --- sparse


class Active(NamedTuple):
    """Which latents are active at which tokens: the same entries token by token and, for gradients, latent by latent."""

    latents: Tensor  # [active] latent of each entry, entries ordered by token, then latent
    token_starts: Tensor  # [batch] where each token's entries begin
    by_latent: Tensor  # [active] the entries ordered by latent, then token
    tokens_by_latent: Tensor  # [active] token of each of those
    latent_starts: Tensor  # [d_hidden] where each latent's entries begin in that order


def active_codes(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, dtype: torch.dtype, weight: Tensor | None = None, count: int | None = None
) -> tuple[Tensor, Active] | None:
    """Codes relu(x @ W_enc + b_enc) of the active entries alone, without a [batch, d_hidden] matrix. CPU only.

    Args:
        x: [batch, n_models, d_model]; W_enc: [n_models, d_model, d_hidden]; b_enc: [d_hidden]. Gradients reach the weights,
            not x.
        weight: [d_hidden] detached positive factors of the scores, with `count`.
        count: keep only the `count` largest scores code * weight of the batch; of equal ones at the cut the first by token,
            then latent. None keeps every positive code.

    Returns:
        (codes [active], Active), or None where so many are active that the dense form is faster.
    """
    rows, d_hidden = encoder_rows(W_enc), len(b_enc)
    limit = int(DENSE_ABOVE * len(x) * d_hidden)
    if count is not None and count > limit:
        return None
    with torch.no_grad():
        found = _above(x, rows, b_enc, dtype, weight, count, limit)
        if found is None:
            return None
        entries, values, score = found
        if count is not None and len(score) > count:
            cut = torch.topk(score, count, sorted=False).values.amin()
            keep = score > cut
            keep[(score == cut).nonzero()[: count - int(keep.sum()), 0]] = True
            entries, values = entries[keep], values[keep]
        tokens, latents = entries // d_hidden, entries % d_hidden
        by_latent = latents.argsort(stable=True)
        per_token, per_latent = (torch.bincount(i, minlength=n) for i, n in ((tokens, len(x)), (latents, d_hidden)))
        starts = [per.cumsum(0) - per for per in (per_token, per_latent)]
        active = Active(latents, starts[0], by_latent, tokens[by_latent], starts[1])
    return _Encode.apply(rows, b_enc, values, x.flatten(1), active), active


def _above(x, rows, b_enc, dtype, weight, count, limit) -> tuple[Tensor, Tensor, Tensor] | None:
    """Flat entries, codes and scores of at least the `count` largest scores, or of all positive ones; None above `limit`."""
    flat, casted = x.flatten(1).to(dtype), rows.to(dtype)
    floor = None if count is None else torch.inf
    for _ in range(2):
        found, total = [], 0
        for first in range(0, len(x), CHUNK):
            pre = (flat[first : first + CHUNK] @ casted.T).float().add_(b_enc)  # [CHUNK, d_hidden]
            score = pre if count is None else pre * weight
            if floor == torch.inf:  # from a sample of the first tokens: about twice `count` scores exceed it
                sample = score.flatten()[::SAMPLED]
                expected = 2 * count * len(sample) // (len(x) * score.shape[1]) + 32
                floor = torch.topk(sample, min(len(sample), expected), sorted=False).values.amin().clamp_min(0)
            entries = (score > (floor if floor is not None else 0)).flatten().nonzero()[:, 0]
            found.append((entries + first * score.shape[1], pre.flatten()[entries], score.flatten()[entries]))
            total += len(entries)
            if total > limit and floor is None:
                return None
        if count is None or total >= count or floor == 0:
            break
        floor = None  # the sample misjudged: look at every positive score
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


class _Encode(torch.autograd.Function):
    """The codes of active entries; their gradient reaches only the rows of latents that are active."""

    @staticmethod
    def forward(ctx, rows, b_enc, values, x, active):
        ctx.x, ctx.active = x, active
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad[ctx.active.by_latent]
        d_rows = embedding_bag(
            ctx.active.tokens_by_latent, ctx.x, ctx.active.latent_starts, mode="sum", per_sample_weights=grad
        )
        latents = ctx.active.latents[ctx.active.by_latent]
        d_bias = torch.zeros(len(ctx.active.latent_starts)).index_add_(0, latents, grad)
        return d_rows, d_bias, None, None, None


class _Decode(torch.autograd.Function):
    """x_hat = sum over a token's active latents of code * decoder row; with g = dL/dx_hat, dL/dcode = <g, row>."""

    @staticmethod
    def forward(ctx, values, rows, active):
        ctx.save_for_backward(values, rows)
        ctx.active = active
        return embedding_bag(active.latents, rows, active.token_starts, mode="sum", per_sample_weights=values)

    @staticmethod
    def backward(ctx, grad):
        values, rows = ctx.saved_tensors
        active = ctx.active
        bounds = torch.cat([active.token_starts, torch.tensor([len(values)])])
        places = torch.sparse_csr_tensor(
            bounds, active.latents, torch.zeros_like(values), (len(grad), len(rows)), check_invariants=False
        )
        d_values = torch.sparse.sampled_addmm(places, grad, rows.T, beta=0).values()
        d_rows = embedding_bag(
            active.tokens_by_latent, grad, active.latent_starts, mode="sum", per_sample_weights=values[active.by_latent]
        )
        return d_values, d_rows, None


def decode_active(codes: Tensor, active: Active, W_dec: Tensor) -> Tensor:
    """Codes of active entries times W_dec [d_hidden, n_models, d_model] -> float32 [batch, n_models, d_model]. No bias."""
    return _Decode.apply(codes, W_dec.flatten(1), active).unflatten(1, W_dec.shape[1:])


# --- an inference threshold


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
