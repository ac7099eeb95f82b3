"""Using few of many latents: which codes of a batch are kept, and what is decoded from them.

Each operation has a dense form, matrices [batch, d_hidden] in plain autograd, and a sparse one that only touches active
entries. Both give the same numbers up to rounding; the sparse one is several times faster where few latents are active.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

import parallel

# Large tensors in pages of 2 MB instead of 4 kB: a step on a CPU takes a quarter less time. torch looks when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # only sampled_addmm is used

SAMPLED = 61  # one score in so many; a prime, so that no multiple of d_hidden hits the same latents again and again
CHUNK = 1 << 23  # scores that are computed together: more saves no time
PART = 1 << 21  # entries of a matrix that are computed together on a CPU, so that they stay in its cache
DENSE_ABOVE = 1 / 14  # share of active entries above which the dense form is faster
DENSE_ABOVE_BF16 = 1 / 80  # the same in bfloat16, where products are several times as fast (AMX)
DENSE_ABOVE_CHOSEN = 90  # the same for the largest codes alone, which take longer to find there; over n_models * d_model
PICKED_ABOVE = 1 / 100  # share above which, in bfloat16, it is faster to compute all inner products than to leave any out
DENSE_ABOVE_CUDA = 1 / 184  # the same on an H200, by arithmetic: rows gathered at 4.3 TB/s, products at 790 Tflop/s


# --- selection


def keep_largest(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest positive entries of the whole matrix, over all processes; fewer if fewer are positive.

    Args:
        score: [batch, latents], non-negative.
        count: how many to keep over the whole batch (BatchTopK, arXiv 2412.06410: k * batch).

    Returns:
        [batch, latents] bool. Of equal scores at the cut only as many are kept as `count` allows.
    """
    if on_cuda(score):
        import kernels

        zeros, ones = torch.zeros_like(score[0]), torch.ones_like(score[0])
        latents, codes, starts = kernels.largest(score, zeros, ones, count)
        tokens = torch.searchsorted(starts, torch.arange(len(latents), device=score.device), right=True) - 1
        mask = torch.zeros(len(score) + 1, score.shape[1], dtype=torch.bool, device=score.device)  # unused go to the last row
        return mask.index_put_((tokens, latents), torch.ones((), dtype=torch.bool, device=score.device))[:-1]
    flat = score.flatten()
    # Most scores are far below the cut. A sample tells a value that about twice `count` of them exceed; only those are counted.
    floor = lowest_of_largest(flat[::SAMPLED], some_more(count / (SAMPLED * parallel.size())))
    candidates = true_entries(flat > floor)
    if parallel.all_sum(torch.tensor(len(candidates))) < count:  # the sample misjudged, or fewer are positive
        candidates = true_entries(flat > 0)
    kept = candidates[largest(flat[candidates], count)]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, kept, True).view_as(score)


def some_more(expected: float) -> int:
    """How many of a sample's largest to take where so many are expected, so that hardly ever too few exceed the last of them."""
    return math.ceil(1.1 * expected + 6 * expected**0.5) + 32


def lowest_of_largest(sample: Tensor, count: int) -> Tensor:
    """The `count`-th largest of a sample, at least 0; the least over all processes. inf for an empty one."""
    if not len(sample):
        return parallel.all_min(torch.tensor(torch.inf))
    return parallel.all_min(torch.topk(sample, min(len(sample), count), sorted=False).values.amin().clamp_min(0).float())


def largest(score: Tensor, count: int) -> Tensor:
    """Mask [n] of the `count` largest of the positive scores [n] of all processes; of those at the cut the first."""
    cut, ties = find_cut(lambda: [score], count)
    kept = score.float() > cut
    equal = (score.float() == cut).nonzero()[:, 0]
    before = parallel.gather(torch.tensor([len(equal)]))[: parallel.rank()].sum()
    return kept.index_fill_(0, equal[: max(0, int(ties - before))], True)


def find_cut(scores: Callable[[], Iterable[Tensor]], count: int) -> tuple[float, int]:
    """The `count`-th largest positive value in a stream, over all processes, and how many of its equals belong to the `count`.

    Non-negative floats are ordered like their bit patterns, so a histogram of the upper 16 bits finds the bucket of the
    value and a histogram of the lower 16 bits within that bucket finds the value itself. 0 if fewer are positive.

    Args:
        scores: called twice, each time gives the same tensors of any shape; they are looked at in float32.
    """
    upper, left = None, torch.tensor(count)
    for _ in range(2):
        bins = torch.zeros(1 << 16, dtype=torch.int32)
        for score in scores():
            bits = score[score > 0].float().view(torch.int32)
            part = bits >> 16 if upper is None else bits[bits >> 16 == upper] & 0xFFFF
            bins += torch.bincount(part, minlength=1 << 16).cpu()
        bins = parallel.all_sum(bins)
        if upper is None and bins.sum() < count:
            return 0.0, 0
        chosen, left = find_bin(bins, left)
        upper, lower = (int(chosen), 0) if upper is None else (upper, int(chosen))
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item(), int(left)


def find_bin(bins: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor]:
    """The highest bin with `count` values in it or above it (bin 0 if there are fewer), and how many of its own are needed."""
    at_least = bins.long().flip(0).cumsum(0).flip(0)
    chosen = ((at_least >= count).sum() - 1).clamp_min(0)
    return chosen, count - (at_least[chosen] - bins[chosen])


def true_entries(mask: Tensor) -> Tensor:
    """Flat places where a mask is true, ascending. Looks at eight entries at a time: most are false."""
    flat = mask.flatten()
    if len(flat) % 8:
        return flat.nonzero()[:, 0]
    words = flat.view(torch.int64).nonzero()[:, 0]
    word, byte = flat.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte


# --- dense


def encode(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of x [batch, n_models, d_model] with every row [d_hidden, n_models, d_model] -> [batch, d_hidden] in `dtype`.

    One flat product over (model, d_model): twice as fast as an einsum that multiplies per model and adds.
    """
    return x.flatten(1).to(dtype) @ rows.flatten(1).to(dtype).T


def decode(f: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes f [batch, d_hidden] times rows [d_hidden, n_models, d_model] -> [batch, n_models, d_model] in f's. No bias."""
    return (f.to(dtype) @ rows.flatten(1).to(dtype)).to(f.dtype).unflatten(1, rows.shape[1:])


class _Dense(torch.autograd.Function):
    """Encode, keep, decode, on a CPU so many latents at a time that what is computed of them stays in its cache.

    Kept for the backward pass are the codes in `dtype`.
    """

    @staticmethod
    def forward(ctx, x, rows, b_enc, W_dec, dtype, weight, count):
        ctx.shape = rows.shape
        x, rows, W_dec = (t.flatten(1).to(dtype) for t in (x, rows, W_dec))
        product, kept, smallest = None, None, b_enc.new_full((), torch.inf)
        if count is not None or on_cuda(x):
            product = x @ rows.T  # [batch, d_hidden]
        if count is not None:
            score = torch.add(product, b_enc).relu_().mul_(weight)
            kept = keep_largest(score, count)
            smallest = score.masked_fill_(~kept, torch.inf).amin().float()
        decoded = b_enc.new_zeros(len(x), W_dec.shape[1])
        total, times, codes = torch.empty_like(b_enc), torch.empty_like(b_enc), []
        size = len(rows) if on_cuda(x) else max(1, PART // len(x))
        ctx.parts = [slice(first, first + size) for first in range(0, len(rows), size)]
        for part in ctx.parts:
            here = x @ rows[part].T if product is None else product[:, part]
            f = torch.add(here, b_enc[part]).relu_()  # [batch, part], in the type of b_enc
            if kept is not None:
                f.mul_(kept[:, part])
            total[part] = f.sum(0)
            codes.append(f.to(dtype, copy=True))
            decoded += codes[-1] @ W_dec[part]
            times[part] = f.sign_().sum(0)  # tokens at which each latent is active
        ctx.save_for_backward(x, W_dec, *codes)
        product = product if on_cuda(x) else None
        ctx.mark_non_differentiable(times, smallest, *([] if product is None else [product]))
        return decoded, total, times, smallest, product

    @staticmethod
    def backward(ctx, d_decoded, d_total, *_):
        x, W_dec, *all_codes = ctx.saved_tensors
        d_decoded = d_decoded.to(x.dtype)
        d_rows, d_W_dec = (d_total.new_empty(W_dec.shape) for _ in range(2))
        d_bias = torch.empty_like(d_total)
        for part, codes in zip(ctx.parts, all_codes, strict=True):
            d_codes = (d_decoded @ W_dec[part].T).add_(d_total[part])  # [batch, part]
            d_pre = torch.ops.aten.threshold_backward(d_codes, codes, 0)  # relu's: several times as fast as masked_fill
            d_rows[part], d_W_dec[part], d_bias[part] = d_pre.T @ x, codes.T @ d_decoded, d_pre.sum(0, dtype=d_bias.dtype)
        return None, d_rows.view(ctx.shape), d_bias, d_W_dec.view(ctx.shape), None, None, None


def dense_codes(
    x: Tensor, rows: Tensor, b_enc: Tensor, W_dec: Tensor, dtype: torch.dtype, weight: Tensor, count: int | None
) -> tuple[Tensor, ...]:
    """Everything that `losses` needs of the codes relu(<x, row> + b_enc), of all or of the `count` of largest code * weight.

    Args: as for `active_codes`; W_dec: [d_hidden, n_models, d_model].

    Returns:
        decoded [batch, n_models, d_model] without bias, the sum of each latent's codes [d_hidden], both with gradients; the
        number of tokens at which it is active [d_hidden], the smallest kept score []; on CUDA `encode`'s product, else None.
    """
    decoded, *rest = _Dense.apply(x, rows, b_enc, W_dec, dtype, weight, count)
    return decoded.unflatten(1, W_dec.shape[1:]), *rest


# --- sparse


class Active(NamedTuple):
    """Which latents are active at which tokens: the same entries token by token and, for gradients, latent by latent.

    On CUDA, where counting would wait for the device, there may be unused entries at the end of both orders.
    """

    latents: Tensor  # [active] latent of each entry, entries ordered by token, then latent
    tokens: Tensor  # [active] its token
    token_starts: Tensor  # [batch + 1] where each token's entries begin; the last one: how many entries are used
    by_latent: Tensor  # [active] the entries ordered by latent, then token
    tokens_by_latent: Tensor  # [active] token of each of those
    latent_starts: Tensor  # [d_hidden + 1] where each latent's entries begin in that order


def on_cuda(x: Tensor) -> bool:
    """Whether the operations on x run as the kernels of kernels.py."""
    return x.is_cuda


def fast_dtype(device: torch.device) -> str:
    """The type in which this device multiplies fastest: bfloat16 on CUDA and on processors with units for it (AMX)."""
    return "bfloat16" if device.type == "cuda" or torch.cpu._is_amx_tile_supported() else "float32"


def worth_it(x: Tensor, d_hidden: int, count: int | None, dtype: torch.dtype) -> bool:
    """Whether the sparse form could be the faster one for `count` active entries (None: not known before)."""
    if on_cuda(x):
        return count is not None and count < DENSE_ABOVE_CUDA * len(x) * d_hidden
    return count is None or count <= most_sparse(x, d_hidden, dtype, chosen=True)


def most_sparse(x: Tensor, d_hidden: int, dtype: torch.dtype, chosen: bool) -> int:
    """Active entries up to which the sparse form is the faster one on a CPU, for x [batch, n_models, d_model].

    chosen: whether they are the largest, not all positive ones.
    """
    share = DENSE_ABOVE
    if dtype == torch.bfloat16:
        share = min(share, DENSE_ABOVE_CHOSEN / x[0].numel() if chosen else DENSE_ABOVE_BF16)
    return int(share * len(x) * d_hidden)


def active_codes(
    x: Tensor,
    rows: Tensor,
    b_enc: Tensor,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    count: int | None = None,
    product: Tensor | None = None,
) -> tuple[Tensor, Active] | None:
    """Codes relu(<x, row> + b_enc) of the active entries alone; for gradients no [batch, d_hidden] matrix is kept.

    Args:
        x: [batch, n_models, d_model]; rows: [d_hidden, n_models, d_model] of the encoder; b_enc: [d_hidden]. Gradients
            reach rows and b_enc, not x.
        weight: [d_hidden] detached factors of the scores, not negative, with `count`.
        count: keep only the `count` largest positive scores code * weight of the batch; of equal ones at the cut the first by
            token, then latent. None (not on CUDA) keeps every positive code.
        product: CUDA only: [batch, d_hidden] what `encode` gives, from which several selections can be made.

    Returns:
        (codes [active], Active), or None where so many are active that the dense form is faster (CPU only).
    """
    rows = rows.flatten(1)
    with torch.no_grad():
        if on_cuda(x):
            import kernels

            latents, values, token_starts = kernels.largest(product, b_enc, weight, count)
        else:
            found = _largest(x, rows, b_enc, dtype, weight, count, most_sparse(x, len(rows), dtype, count is not None))
            if found is None:
                return None
            latents, values, token_starts = found
        active = _both_orders(latents, token_starts, len(rows))
    return _Encode.apply(rows, b_enc, values, x.flatten(1), active), active


def _both_orders(latents: Tensor, token_starts: Tensor, d_hidden: int) -> Active:
    entries = torch.arange(len(latents), device=latents.device)
    tokens = torch.searchsorted(token_starts, entries, right=True) - 1
    used = tokens < len(token_starts) - 1
    key, by_latent = torch.where(used, latents, d_hidden).sort(stable=True)
    latent_starts = torch.searchsorted(key, torch.arange(d_hidden + 1, device=latents.device))
    tokens = torch.where(used, tokens, 0)
    return Active(latents, tokens, token_starts, by_latent, tokens[by_latent], latent_starts)


def _largest(x, rows, b_enc, dtype, weight, count, limit) -> tuple[Tensor, Tensor, Tensor] | None:
    """Latents, codes and token_starts of the `count` largest scores, or of all positive ones; None above `limit`."""
    found = _above(x, rows, b_enc, dtype, weight, count, limit)
    if found is None:
        return None
    entries, values, score = found
    kept = (largest(score, count) if count is not None else score > 0).nonzero()[:, 0]
    entries, values = entries[kept], values[kept]
    return entries % len(rows), values, torch.searchsorted(entries, torch.arange(len(x) + 1) * len(rows))


def _above(x, rows, b_enc, dtype, weight, count, limit) -> tuple[Tensor, Tensor, Tensor] | None:
    """Flat entries, codes and scores of at least the `count` largest scores, or of all positive ones; None above `limit`."""
    flat, casted, d_hidden = x.flatten(1).to(dtype), rows.to(dtype), len(rows)

    def measure(product, entries):
        latents = entries % d_hidden
        pre = product.flatten()[entries].to(x.dtype).add_(b_enc[latents])
        return pre, pre if weight is None else pre * weight[latents]

    floor = 0.0 if count is None else None
    size = max(1, CHUNK // d_hidden)
    for _ in range(2):
        found, total = [], 0
        for first in range(0, len(x), size):
            product = flat[first : first + size] @ casted.T  # [size, d_hidden]
            if floor is None:  # from a sample of the first tokens: about twice `count` scores exceed it
                sample = measure(product, torch.arange(0, product.numel(), SAMPLED))[1]
                floor = lowest_of_largest(sample, some_more(count * len(sample) / (len(x) * d_hidden * parallel.size())))
            # One comparison with what each latent's product must exceed, a little too low for its rounding, sieves most out.
            least = (floor if weight is None else floor / weight) - b_enc  # [d_hidden]
            mask = product > (least - least.abs() / 64).to(dtype)
            if count is None and total + int(mask.sum()) > limit:
                return None
            entries = true_entries(mask)
            pre, score = measure(product, entries)
            found.append((entries + first * d_hidden, pre, score))
            total += int((score > floor).sum())
        if count is None or floor == 0 or parallel.all_sum(torch.tensor(total)) >= count:
            break
        floor = torch.zeros(())  # the sample misjudged: look at every positive score
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


class _Encode(torch.autograd.Function):
    """The codes of active entries; their gradient reaches only the rows of latents that are active."""

    @staticmethod
    def forward(ctx, rows, b_enc, values, x, active):
        ctx.save_for_backward(x)
        ctx.active = active
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,), active = ctx.saved_tensors, ctx.active
        grad = grad[active.by_latent]
        d_rows = weighted_sums(x, active.tokens_by_latent, grad, active.latent_starts)
        d_bias = torch.segment_reduce(grad, "sum", offsets=active.latent_starts, unsafe=True)
        return d_rows, d_bias, None, None, None


class _Decode(torch.autograd.Function):
    """x_hat = sum over a token's active latents of code * decoder row; with g = dL/dx_hat, dL/dcode = <g, row>."""

    @staticmethod
    def forward(ctx, values, rows, active, dtype):
        ctx.active = active
        many = dtype == torch.bfloat16 and len(values) > PICKED_ABOVE * (len(active.token_starts) - 1) * len(rows)
        if on_cuda(rows) or not many:
            ctx.save_for_backward(values, rows)
            return weighted_sums(rows, active.latents, values, active.token_starts)
        halved, rows = values.to(dtype), rows.to(dtype)
        ctx.save_for_backward(values, rows)
        return weighted_sums(rows, active.latents, halved, active.token_starts).float()

    @staticmethod
    def backward(ctx, grad):
        (values, rows), active = ctx.saved_tensors, ctx.active
        d_values = dots(grad, rows, active)
        d_rows = weighted_sums(grad, active.tokens_by_latent, values[active.by_latent], active.latent_starts)
        return d_values, d_rows, None, None


def decode_active(codes: Tensor, active: Active, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of active entries times rows [d_hidden, n_models, d_model] -> float32 [batch, n_models, d_model]. No bias.

    dtype: of the products, where all of them are computed for the few that are asked for.
    """
    return _Decode.apply(codes, rows.flatten(1), active, dtype).unflatten(1, rows.shape[1:])


def weighted_sums(rows: Tensor, index: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """[groups, width]: group g is the sum over entries e from starts[g] to starts[g + 1] of weights[e] * rows[index[e]]."""
    if on_cuda(rows):
        import kernels

        return kernels.weighted_sums(rows, index, weights, starts)
    return embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def dots(a: Tensor, b: Tensor, active: Active) -> Tensor:
    """[active] inner product of each entry's token row of a [batch, width] and latent row of b [d_hidden, width]."""
    if on_cuda(a):
        import kernels

        return kernels.dots(a, b, active.tokens, active.latents, active.token_starts[-1])
    if b.dtype != a.dtype:
        a, found, size = a.to(b.dtype), [], max(1, CHUNK // len(b))
        for first in range(0, len(a), size):
            product = (a[first : first + size] @ b.T).flatten()  # [size * d_hidden]
            entries = slice(*active.token_starts[[first, min(first + size, len(a))]].tolist())
            found.append(product[(active.tokens[entries] - first) * len(b) + active.latents[entries]])
        return torch.cat(found).float()
    places = torch.sparse_csr_tensor(
        active.token_starts, active.latents, a.new_zeros(len(active.latents)), (len(a), len(b)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(places, a, b.T, beta=0).values()
