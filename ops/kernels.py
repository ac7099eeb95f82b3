"""The sparse operations on CUDA, in Triton: what `sparse.py` does with PyTorch's own operators on a CPU.

Nothing here waits for the device: sizes are those that would be needed at most, and what is not needed is skipped on the
device. Sums are float32 and in a fixed order, so the same batch gives the same bits. With TRITON_INTERPRET=1 the kernels run
on CPU tensors, which is how the tests check them where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.selection import find_bin
from ops.shard import ALONE, Shard

SCAN = 4096  # scores of one token that a program looks at together
TILE = 512  # columns of a wide row that a program adds up
ENTRIES = 8  # rows that it loads together


@triton.jit
def _bits(pre, b_enc, weight, place, latent, inside):
    """Bit patterns of the scores relu(pre + b_enc) * weight, ordered like the numbers; 0 where not positive."""
    code = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32) + tl.load(b_enc + latent, mask=inside, other=0.0)
    score = code * tl.load(weight + latent, mask=inside, other=0.0)
    return code, tl.where(inside & (code > 0) & (score > 0), score, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _histogram(pre, b_enc, weight, upper, bins, d_hidden, FIRST: tl.constexpr, SCAN: tl.constexpr):
    """Count the upper 16 bits of the positive scores or, of those with the upper bits `upper`, the lower 16 bits."""
    token, latent = tl.program_id(0).to(tl.int64), tl.program_id(1) * SCAN + tl.arange(0, SCAN)
    _, bits = _bits(pre, b_enc, weight, token * d_hidden + latent, latent, latent < d_hidden)
    if FIRST:
        tl.atomic_add(bins + (bits >> 16), 1, mask=bits > 0)
    else:
        tl.atomic_add(bins + (bits & 0xFFFF), 1, mask=(bits > 0) & ((bits >> 16) == tl.load(upper)))


@triton.jit
def _count(pre, b_enc, weight, cut, above, equal, d_hidden, SCAN: tl.constexpr):
    """How many of a token's scores lie above the cut, and how many on it."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.load(cut)
    n_above, n_equal = 0, 0
    for first in range(0, d_hidden, SCAN):
        latent = first + tl.arange(0, SCAN)
        _, bits = _bits(pre, b_enc, weight, token * d_hidden + latent, latent, latent < d_hidden)
        n_above += tl.sum((bits > at).to(tl.int32), 0)
        n_equal += tl.sum(((bits == at) & (bits > 0)).to(tl.int32), 0)
    tl.store(above + token, n_above)
    tl.store(equal + token, n_equal)


@triton.jit
def _write(pre, b_enc, weight, cut, ties, starts, latents, values, d_hidden, SCAN: tl.constexpr):  # noqa: PLR0913 - pointers
    """Write the latents and codes a token keeps: all above the cut and the first `ties` on it."""
    token = tl.program_id(0).to(tl.int64)
    at, left, place = tl.load(cut), tl.load(ties + token), tl.load(starts + token)
    for first in range(0, d_hidden, SCAN):
        latent = first + tl.arange(0, SCAN)
        code, bits = _bits(pre, b_enc, weight, token * d_hidden + latent, latent, latent < d_hidden)
        tied = ((bits == at) & (bits > 0)).to(tl.int32)
        kept = (bits > at) | ((tied > 0) & (tl.cumsum(tied, 0) <= left))
        to = place + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(latents + to, latent.to(tl.int64), mask=kept)
        tl.store(values + to, code, mask=kept)
        place += tl.sum(kept.to(tl.int64), 0)
        left -= tl.sum(tied, 0)


@triton.jit
def _weighted_sums(rows, index, weights, starts, out, width, TILE: tl.constexpr, ENTRIES: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    first, end = tl.load(starts + group), tl.load(starts + group + 1)
    while first < end:
        entry = first + tl.arange(0, ENTRIES)
        row = tl.load(index + entry, mask=entry < end, other=0)
        weight = tl.load(weights + entry, mask=entry < end, other=0.0)
        inside = (entry < end)[:, None] & (column < width)[None, :]
        block = tl.load(rows + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        total += tl.sum(block.to(tl.float32) * weight[:, None], 0)
        first += ENTRIES
    tl.store(out + group * width + column, total, mask=column < width)


@triton.jit
def _dots(a, b, i, j, n, out, width, TILE: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    if entry < tl.load(n):
        row_a, row_b = a + tl.load(i + entry) * width, b + tl.load(j + entry) * width
        total = tl.zeros([TILE], tl.float32)
        for first in range(0, width, TILE):
            column = first + tl.arange(0, TILE)
            x = tl.load(row_a + column, mask=column < width, other=0.0)
            y = tl.load(row_b + column, mask=column < width, other=0.0)
            total += x.to(tl.float32) * y.to(tl.float32)
        tl.store(out + entry, tl.sum(total, 0))


def launch(kernel, grid: tuple[int, ...], first: Tensor, *args, **constants) -> None:
    """Run a kernel on the device of its first argument: Triton takes CUDA's current device, whatever the tensors' is."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *args, **constants)


def largest(pre: Tensor, b_enc: Tensor, weight: Tensor, count: int, shard: Shard = ALONE) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest positive scores relu(pre + b_enc) * weight of the whole batch, over all processes.

    The cut is exact: a histogram of the scores' upper 16 bits finds its bucket, one of the lower 16 bits within that bucket the
    cut itself. Of equal scores there the first ones are kept, by process, token and latent.

    Args:
        pre: [batch, d_hidden]; b_enc, weight: [d_hidden] float32, weight not negative; count: at least 1.

    Returns:
        latents [count] int64 and codes [count] float32, ordered by token, then latent, and token_starts [batch + 1] int64.
        Where fewer scores are positive, entries from token_starts[-1] on are filled up with latent 0 and code 0.
    """
    batch, d_hidden = pre.shape
    args = (pre.contiguous(), b_enc.contiguous(), weight.contiguous())
    cut = torch.zeros((), dtype=torch.int32, device=pre.device)
    left: int | Tensor = count
    for level in range(2):
        bins = torch.zeros(1 << 16, dtype=torch.int32, device=pre.device)
        grid = (batch, triton.cdiv(d_hidden, SCAN))
        launch(_histogram, grid, *args, cut, bins, d_hidden, FIRST=level == 0, SCAN=SCAN)
        chosen, left = find_bin(shard.all_sum(bins), left)
        cut = chosen.int() if level == 0 else (cut << 16) | chosen.int()
    above, equal = (torch.empty(batch, dtype=torch.int64, device=pre.device) for _ in range(2))
    launch(_count, (batch,), *args, cut, above, equal, d_hidden, SCAN=SCAN)
    before = shard.gather(equal.sum(0, keepdim=True))[: shard.rank].sum()  # on the cut in the processes before
    ties = (left - before - equal.cumsum(0) + equal).clamp_min(0).minimum(equal)  # [batch] how many each token may keep there
    starts = torch.zeros(batch + 1, dtype=torch.int64, device=pre.device)
    torch.cumsum(above + ties, 0, out=starts[1:])
    latents = torch.zeros(count, dtype=torch.int64, device=pre.device)
    codes = torch.zeros(count, device=pre.device)
    launch(_write, (batch,), *args, cut, ties, starts, latents, codes, d_hidden, SCAN=SCAN)
    return latents, codes, starts


def weighted_sums(rows: Tensor, index: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """[groups, width] float32 sums of weights[e] * rows[index[e]] over each group's entries e, starts[g] to starts[g + 1]."""
    rows, width, groups = rows.contiguous(), rows.shape[1], len(starts) - 1
    out = torch.empty(groups, width, device=rows.device)
    tile = min(TILE, triton.next_power_of_2(width))
    args = (rows, index.contiguous(), weights.contiguous(), starts.contiguous(), out, width)
    launch(_weighted_sums, (groups, triton.cdiv(width, tile)), *args, TILE=tile, ENTRIES=ENTRIES)
    return out


def dots(a: Tensor, b: Tensor, i: Tensor, j: Tensor, n: Tensor) -> Tensor:
    """[entries] float32: <a[i[e]], b[j[e]]> for the first n entries (a tensor on the device), 0 for the others."""
    out = torch.zeros(len(i), device=a.device)
    width = a.shape[1]
    args = (a.contiguous(), b.contiguous(), i.contiguous(), j.contiguous(), n, out, width)
    launch(_dots, (len(i),), *args, TILE=min(TILE, triton.next_power_of_2(width)))
    return out
