"""The sparse operations on CUDA, in Triton: what `sparse.py` does with PyTorch's own operators on a CPU.

Nothing here waits for the device: sizes are those that would be needed at most, and what is not needed is skipped on the
device. Sums are float32 and in a fixed order, so the same batch gives the same bits. With TRITON_INTERPRET=1 the kernels run
on CPU tensors, which is how the tests check them where there is no GPU. What the compiler makes of them, for cards that are
not here, prints `python benchmarks/kernels.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ops.selection import SAMPLED, some_more
from ops.shard import ALONE, Shard

# Scores that a program looks at together, a latent's bias and weight serving several tokens, and its warps: 16 scores a thread,
# with which no kernel needs more than 128 registers. A program does so many blocks one after the other.
TOKENS, SCAN, WARPS, BLOCKS = 8, 512, 8, 8
HARDLY = 1024  # programs of a pass that is hardly ever needed
TILE = 512  # columns of a wide row that a program adds up, 16 bytes of a row a thread: a sum over rows stays in the thread
ENTRIES = 8  # rows that it loads together; half as many with inner products, which in bfloat16 else need over 128 registers
PIECE, FURTHER = 256, 1024  # entries at which groups are cut, at least; cuts at most. A latent may be active at every token
ADAM = 1024  # values that a program of `_adam` changes, 8 a thread: two loads of 16 bytes of each tensor
INFINITY = 0x7F800000  # bits of float32's
STRIP = 128  # tokens that a program of `_gate` goes down, TOKENS / 2 at a time: sums over them stay in its registers


@triton.jit
def _scores(pre, b_enc, weight, block, batch, width, blocks, TOKENS: tl.constexpr, SCAN: tl.constexpr):  # noqa: PLR0913
    """Tokens and latents of a block of scores relu(pre + b_enc) * weight, their codes, and their bit patterns.

    Bit patterns are ordered like the numbers; 0 where not positive.
    """
    token = block // blocks * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    latent = block % blocks * SCAN + tl.arange(0, SCAN)
    inside = (token < batch)[:, None] & (latent < width)[None, :]
    code = tl.load(pre + token[:, None] * width + latent[None, :], mask=inside, other=0.0).to(tl.float32)
    code += tl.load(b_enc + latent, mask=latent < width, other=0.0)[None, :]
    score = code * tl.load(weight + latent, mask=latent < width, other=0.0)[None, :]
    return token, latent, code, tl.where(inside & (code > 0) & (score > 0), score, 0.0).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["n", "every"])
def _histogram(  # noqa: PLR0913 - pointers
    pre, b_enc, weight, low, high, bins, shift, n, every, batch, width, blocks, TOKENS: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """Count the scores with bits from `low` on and below `high` by their upper 16 bits (shift 16) or lower ones (shift 0).

    Only one block in `every` is looked at, n in all.
    """
    least, most = tl.load(low), tl.load(high)
    if least < most:
        for number in range(tl.program_id(0), n, tl.num_programs(0)):
            _, _, _, bits = _scores(pre, b_enc, weight, number * every, batch, width, blocks, TOKENS, SCAN)
            wanted = (bits > 0) & (bits >= least) & (bits < most)
            tl.atomic_add(bins + ((bits >> shift) & 0xFFFF), 1, mask=wanted, sem="relaxed")  # else each waits for all memory


@triton.jit(do_not_specialize=["n"])
def _count(  # noqa: PLR0913 - pointers
    pre, b_enc, weight, cut, above, equal, n, batch, width, blocks, TOKENS: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """How many of a block's scores of each token lie above the cut, and how many on it."""
    at = tl.load(cut)
    for block in range(tl.program_id(0), n, tl.num_programs(0)):
        token, _, _, bits = _scores(pre, b_enc, weight, block, batch, width, blocks, TOKENS, SCAN)
        both = (bits > at).to(tl.int32) + (((bits == at) & (bits > 0)).to(tl.int32) << 16)  # one sum for two numbers
        both = tl.sum(both, 1)
        place = token * blocks + block % blocks
        tl.store(above + place, both & 0xFFFF, mask=token < batch)
        tl.store(equal + place, both >> 16, mask=token < batch)


@triton.jit(do_not_specialize=["n"])
def _write(  # noqa: PLR0913 - pointers
    pre, b_enc, weight, cut, ties, starts, latents, values, n, batch, width, blocks,
    SCAN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the latents and codes that are kept: all above the cut and of each token and block the first `ties` on it.

    A block here is of one token, and passed over if nothing of it is kept.
    """
    at, first = tl.load(cut), tl.program_id(0) * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, n)):
        start = tl.load(starts + block)
        if start < tl.load(starts + block + 1):
            left = tl.load(ties + block).to(tl.int32)
            _, latent, code, bits = _scores(pre, b_enc, weight, block, batch, width, blocks, 1, SCAN)
            above, tied = bits > at, (bits == at) & (bits > 0)
            both = tl.cumsum(above.to(tl.int32) + (tied.to(tl.int32) << 16), 1)  # one sum for two numbers
            kept = above | (tied & (both >> 16 <= left))
            place = (both & 0xFFFF) + tl.minimum(both >> 16, left) - 1
            tl.store(latents + start + place, (latent[None, :] + tl.zeros_like(bits)).to(tl.int64), mask=kept)
            tl.store(values + start + place, code, mask=kept)


@triton.jit(do_not_specialize=["n"])
def _keep(pre, b_enc, weight, cut, ties, least, n, batch, width, blocks, SCAN: tl.constexpr, BLOCKS: tl.constexpr):  # noqa: PLR0913
    """As `_write`, but codes are left where they lie in `pre`, with zeros between them. Also each block's least score kept."""
    at, first = tl.load(cut), tl.program_id(0) * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, n)):
        left = tl.load(ties + block).to(tl.int32)
        token, latent, code, bits = _scores(pre, b_enc, weight, block, batch, width, blocks, 1, SCAN)
        tied = (bits == at) & (bits > 0)
        kept = (bits > at) | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= left))
        tl.store(pre + token[:, None] * width + latent[None, :], tl.where(kept, code, 0.0), mask=(latent < width)[None, :])
        tl.store(least + block, tl.min(tl.min(tl.where(kept, bits, 0x7F800000), 1), 0))  # none: infinity


@triton.jit
def _find(bins, needed, chosen, left):
    """`find_bin` of selection.py for 256 x 256 bins: first the row, then the bin."""
    at, need = tl.arange(0, 256), tl.load(needed)
    rows = tl.zeros([256], tl.int64)
    for first in range(0, 256, 64):
        rows += tl.sum(tl.load(bins + at[:, None] * 256 + first + tl.arange(0, 64)[None, :]), 1).to(tl.int64)
    at_least = tl.sum(rows, 0) - tl.cumsum(rows, 0) + rows  # in a row or above it
    row = tl.maximum(tl.sum((at_least >= need).to(tl.int32), 0) - 1, 0)
    need -= tl.sum(tl.where(at > row, rows, 0), 0)
    own = tl.load(bins + row * 256 + at).to(tl.int64)
    at_least = tl.sum(own, 0) - tl.cumsum(own, 0) + own
    column = tl.maximum(tl.sum((at_least >= need).to(tl.int32), 0) - 1, 0)
    tl.store(chosen, row * 256 + column)
    tl.store(left, need - tl.sum(tl.where(at > column, own, 0), 0))


@triton.jit
def _piece(starts, owner, piece, n_groups, size):
    """Group, begin and end of a piece. Groups are cut at multiples of `size`, where further pieces begin."""
    if piece < n_groups:
        group = piece
        begin = tl.load(starts + group)
        end = tl.minimum(tl.load(starts + group + 1), (begin // size + 1) * size)
    else:
        group = tl.minimum(tl.load(owner + piece - n_groups), n_groups - 1)
        begin = (piece - n_groups + 1) * size
        end = tl.minimum(tl.load(starts + group + 1), begin + size)
        end = tl.where(tl.load(starts + group) < begin, end, begin)
    return group, begin, end


@triton.jit(do_not_specialize=["n_groups", "size", "entries"])
def _weighted_sums(  # noqa: PLR0913 - pointers
    rows, index, weights, starts, owner, out, others, extra, dots, n_groups, size, entries, units,
    UNIT: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Sum of weights[e] * rows[index[e]] over a piece's entries e, in one tile of columns.

    With `others` also the inner products <rows[index[e]], others[group]> over this tile, and `extra` added in the first tile.
    """
    piece, width = tl.program_id(0).to(tl.int64), units * UNIT
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    group, first, end = _piece(starts, owner, piece, n_groups, size)
    if others is not None:
        other = tl.load(others + group * width + column, mask=(column < width) & (first < end), other=0.0).to(tl.float32)
        more = tl.load(extra + group, mask=(first < end) & (tl.program_id(1) == 0), other=0.0)
        dots += tl.program_id(1).to(tl.int64) * entries
    while first < end:
        entry = first + tl.arange(0, ENTRIES)
        row = tl.load(index + entry, mask=entry < end, other=0)
        weight = tl.load(weights + entry, mask=entry < end, other=0.0)
        inside = (entry < end)[:, None] & (column < width)[None, :]
        block = tl.load(rows + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(block * weight[:, None], 0)
        if others is not None:
            tl.store(dots + entry, tl.sum(block * other[None, :], 1) + more, mask=entry < end)
        first += ENTRIES
    tl.store(out + piece * width + column, total, mask=column < width)


@triton.jit(do_not_specialize=["n_groups", "size"])
def _join(out, starts, owner, n_groups, size, units, UNIT: tl.constexpr, TILE: tl.constexpr):
    """Add the sums of a group's further pieces to that of its first, in their order."""
    piece, width = n_groups + tl.program_id(0).to(tl.int64), units * UNIT
    group, begin, end = _piece(starts, owner, piece, n_groups, size)
    if (begin < end) & (begin - size <= tl.load(starts + group)):  # the first of the further ones
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        total = tl.load(out + group * width + column, mask=column < width, other=0.0)
        while begin < tl.load(starts + group + 1):
            total += tl.load(out + piece * width + column, mask=column < width, other=0.0)
            piece, begin = piece + 1, begin + size
        tl.store(out + group * width + column, total, mask=column < width)


@triton.jit(do_not_specialize=["batch"])
def _gate(  # noqa: PLR0913 - pointers
    values, bias, open_at, sums, times, batch, width, STRIP: tl.constexpr, TOKENS: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """values + bias where that, or `open_at`, is positive, else 0: written back, and added up over a strip of tokens.

    Without a bias nothing changes and nothing is written. With `times` also how many are positive.
    """
    strip, latent = tl.program_id(0), tl.program_id(1) * SCAN + tl.arange(0, SCAN)
    more = tl.zeros([SCAN], tl.float32)
    if bias is not None:
        more = tl.load(bias + latent, mask=latent < width, other=0.0)
    total, many = tl.zeros([TOKENS, SCAN], tl.float32), tl.zeros([TOKENS, SCAN], tl.float32)
    for first in range(0, STRIP, TOKENS):
        token = strip * STRIP + first + tl.arange(0, TOKENS).to(tl.int64)
        place, inside = token[:, None] * width + latent[None, :], (token < batch)[:, None] & (latent < width)[None, :]
        value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            value += more[None, :]
            opener = value
            if open_at is not None:
                opener = tl.load(open_at + place, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside & (opener > 0), value, 0.0)
            tl.store(values + place, value, mask=inside)
        total += value
        many += (value > 0).to(tl.float32)
    place = strip.to(tl.int64) * width + latent
    tl.store(sums + place, tl.sum(total, 0), mask=latent < width)
    if times is not None:
        tl.store(times + place, tl.sum(many, 0), mask=latent < width)


@triton.jit(do_not_specialize=["units"])
def _adam(  # noqa: PLR0913 - pointers
    weight, gradient, mean, square, narrow, factors, beta1, rest1, beta2, rest2, eps, units,
    UNIT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A step of Adam (arXiv 1412.6980) on the gradient / factors[0]. factors: also the step size and 1 / sqrt(1 - beta2^t)."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < units.to(tl.int64) * UNIT
    slope = tl.load(gradient + at, mask=inside, other=0.0) / tl.load(factors)
    first = beta1 * tl.load(mean + at, mask=inside, other=0.0) + rest1 * slope
    second = beta2 * tl.load(square + at, mask=inside, other=0.0) + rest2 * slope * slope
    moved = tl.load(factors + 1) * first / (tl.sqrt(second) * tl.load(factors + 2) + eps)
    value = tl.load(weight + at, mask=inside, other=0.0) - moved
    tl.store(mean + at, first, mask=inside)
    tl.store(square + at, second, mask=inside)
    tl.store(weight + at, value, mask=inside)
    if narrow is not None:
        tl.store(narrow + at, value, mask=inside)


def launch(kernel, grid: tuple[int, ...], first: Tensor, /, *args, **constants) -> None:
    """Run a kernel on the device of its first argument: Triton takes CUDA's current device, whatever the tensors' is."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *args, **constants)


def rows_of_16(batch: int, d_hidden: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [batch, d_hidden] whose rows begin at multiples of 16 values, as wide loads need."""
    return torch.empty(batch, triton.cdiv(d_hidden, 16) * 16, dtype=dtype, device=device)[:, :d_hidden]


class Cut(NamedTuple):
    """Which scores of a batch are kept, and what the kernels that look at them again are given."""

    scores: tuple[Tensor, Tensor, Tensor]  # pre as `rows_of_16` makes it, bias and weight as wide
    sizes: tuple[int, int, int]  # batch, width, blocks of a token
    at: Tensor  # [] int32 bits of the least score
    above: Tensor  # [batch * blocks] int32 how many lie above it
    ties: Tensor  # [batch * blocks] int32 how many on it are kept, the first ones


def find_cut(pre: Tensor, b_enc: Tensor, weight: Tensor, count: int, shard: Shard = ALONE) -> Cut:
    """Where to cut to keep the `count` largest positive scores relu(pre + b_enc) * weight of a batch, over all processes.

    The cut is exact: a histogram of the scores' upper 16 bits finds its bucket, one of the lower 16 bits within that bucket the
    cut itself. Of equal scores there the first ones are kept, by process, token and latent. Most scores lie below a floor that
    a sample gives, and are not counted unless it proves too high.

    Args:
        pre: [batch, d_hidden]; b_enc, weight: [d_hidden] float32, weight not negative; count: at least 1.
    """
    batch, d_hidden = pre.shape
    width = triton.cdiv(d_hidden, 16) * 16
    if pre.stride() != (width, 1):
        pre = rows_of_16(batch, d_hidden, pre.dtype, pre.device).copy_(pre)
    b_enc, weight = (pad(t, (0, width - d_hidden)) for t in (b_enc, weight))  # a weight of 0 leaves a latent out
    blocks = max(1, triton.cdiv(width, SCAN))
    n, sizes = triton.cdiv(batch, TOKENS) * blocks, (batch, width, blocks)
    constants = {"TOKENS": TOKENS, "SCAN": SCAN, "num_warps": WARPS}

    def histogram(low, high, shift=16, every=1, programs=None):
        bins = torch.zeros(1 << 16, dtype=torch.int32, device=pre.device)
        some = triton.cdiv(n, every)
        args = (pre, b_enc, weight, low, high, bins, shift, some, every, *sizes)
        launch(_histogram, (programs or triton.cdiv(some, BLOCKS),), *args, **constants)
        return bins

    def find(bins, needed):
        chosen, left = (torch.empty((), dtype=dtype, device=pre.device) for dtype in (torch.int32, torch.int64))
        launch(_find, (1,), bins, needed, chosen, left, num_warps=16)
        return chosen, left

    def number(n, dtype):
        return torch.full((), n, dtype=dtype, device=pre.device)

    zero, most = number(0, torch.int32), number((1 << 31) - 1, torch.int32)
    expected, needed = number(some_more(count / SAMPLED / shard.size), torch.int64), number(count, torch.int64)
    floor = shard.all_min(find(histogram(zero, most, every=SAMPLED), expected)[0] << 16)
    bins = shard.all_sum(histogram(floor, most))
    below = torch.where(bins.sum() < count, floor, 0)  # 0: nothing is looked at again
    bins += shard.all_sum(histogram(zero, below, programs=HARDLY))
    chosen, left = find(bins, needed)
    upper = chosen << 16
    chosen, left = find(shard.all_sum(histogram(upper, upper + (1 << 16), shift=0)), left)
    cut = upper | chosen
    above, equal = (torch.empty(batch * blocks, dtype=torch.int32, device=pre.device) for _ in range(2))
    launch(_count, (triton.cdiv(n, BLOCKS),), pre, b_enc, weight, cut, above, equal, n, *sizes, **constants)
    before = shard.gather(equal.sum(0, keepdim=True))[: shard.rank].sum()  # on the cut in the processes before
    ties = (left - before - equal.cumsum(0) + equal).clamp_min(0).minimum(equal)  # how many each token and block may keep there
    return Cut((pre, b_enc, weight), sizes, cut, above, ties)


def largest(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The scores that `find_cut` of these arguments keeps.

    Returns:
        latents [count] int64 and codes [count] float32, ordered by token, then latent, and token_starts [batch + 1] int64.
        Where fewer scores are positive, entries from token_starts[-1] on are filled up with latent 0 and code 0.
    """
    scores, sizes, cut, above, ties = find_cut(*args)
    n, count, device = len(ties), args[3], cut.device
    starts = torch.zeros(n + 1, dtype=torch.int64, device=device)
    torch.cumsum(above + ties, 0, out=starts[1:])
    latents, codes = torch.zeros(count, dtype=torch.int64, device=device), torch.zeros(count, device=device)
    grid = (triton.cdiv(n, BLOCKS),)
    launch(_write, grid, *scores, cut, ties, starts, latents, codes, n, *sizes, SCAN=SCAN, BLOCKS=BLOCKS, num_warps=2)
    return latents, codes, starts[:: sizes[2]].contiguous()


def keep_largest(*args) -> Tensor:
    """Overwrite `pre`, which lies as `rows_of_16` makes it, with the codes that `find_cut` of these arguments keeps, and zeros.

    Returns [] float32 the least score kept in this process, inf where none is.
    """
    scores, sizes, cut, _, ties = find_cut(*args)
    n, least = len(ties), torch.empty_like(ties, dtype=torch.int32)
    launch(_keep, (triton.cdiv(n, BLOCKS),), *scores, cut, ties, least, n, *sizes, SCAN=SCAN, BLOCKS=BLOCKS, num_warps=2)
    return pad(least, (0, 1), value=INFINITY).amin().view(torch.float32)


def gate(values: Tensor, bias: Tensor | None, open_at: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Overwrite values [batch, d_hidden] with values + bias where that, or `open_at`, is positive, and with 0 elsewhere.

    Without a bias they stay as they are. Matrices lie as `rows_of_16` makes them. Returns [d_hidden] float32 sums over a batch,
    before they are rounded to the type of values, and at how many tokens they are positive (not where `open_at` is given).
    """
    (batch, d_hidden), width = values.shape, values.stride(0)
    sums = torch.empty(1 if open_at is not None else 2, triton.cdiv(batch, STRIP), width, device=values.device)
    bias = bias if bias is None else pad(bias, (0, width - d_hidden))
    times, grid = None if open_at is not None else sums[1], (sums.shape[1], triton.cdiv(width, SCAN))
    constants = {"STRIP": STRIP, "TOKENS": TOKENS // 2, "SCAN": SCAN, "num_warps": WARPS}
    if d_hidden:
        launch(_gate, grid, values, bias, open_at, sums[0], times, batch, width, **constants)
    total = sums.sum(1)[:, :d_hidden]
    return total[0], total[-1]


def adam(weight, gradient, mean, square, narrow, factors, *settings: float) -> None:
    """One step of `weights.Adam` on a weight; narrow: its copy, if any; settings: beta1, 1 - beta1, the same of beta2, eps."""
    unit = math.gcd(weight.numel(), 16)  # so that the compiler knows how wide it may load
    if n := weight.numel():
        args = (weight, gradient.contiguous(), mean, square, narrow, factors, *settings, n // unit)
        launch(_adam, (triton.cdiv(n, ADAM),), *args, UNIT=unit, SIZE=ADAM, num_warps=4)


class Pieces(NamedTuple):
    """Groups of consecutive entries, cut at multiples of `size`: every group's first piece, then those that begin at a cut."""

    starts: Tensor  # [groups + 1] where each group's entries begin
    owner: Tensor  # [cuts] group in which a cut lies
    size: int


def in_pieces(starts: Tensor, entries: int) -> Pieces:
    """Pieces of the groups that begin and end at starts [groups + 1], of which together at most so many entries are used."""
    size = max(PIECE, triton.cdiv(entries, FURTHER))
    cuts = torch.arange(size, max(size, entries) if len(starts) > 1 else size, size, device=starts.device)
    return Pieces(starts, torch.searchsorted(starts, cuts, right=True) - 1, size)


def weighted_sums(rows: Tensor, index: Tensor, weights: Tensor, pieces: Pieces) -> Tensor:
    """[groups, width] float32 sums of weights[e] * rows[index[e]] over each group's entries e."""
    return _sums(rows, index, weights, pieces)


def sums_and_dots(
    rows: Tensor, index: Tensor, weights: Tensor, pieces: Pieces, others: Tensor, extra: Tensor
) -> tuple[Tensor, Tensor]:
    """The same sums, and of every entry of a group g <rows[index[e]], others[g]> + extra[g]: [entries] float32.

    Each row is read once for both. Where no group has an entry, what is returned of it means nothing.
    """
    tiles = triton.cdiv(rows.shape[1], _tile(rows))
    dots = torch.empty(tiles, len(index), device=rows.device)
    return _sums(rows, index, weights, pieces, others.contiguous(), extra.contiguous(), dots), dots.sum(0)


def _tile(rows: Tensor) -> int:
    return min(TILE, triton.next_power_of_2(rows.shape[1]))


def _sums(rows, index, weights, pieces, *dots) -> Tensor:
    rows, width, tile = rows.contiguous(), rows.shape[1], _tile(rows)
    n_groups, n_pieces = len(pieces.starts) - 1, len(pieces.starts) - 1 + len(pieces.owner)
    unit = math.gcd(width, 16)  # so that the compiler knows how rows are aligned
    out = torch.empty(n_pieces, width, device=rows.device)
    tiles, sizes = triton.cdiv(width, tile), {"UNIT": unit, "TILE": tile}
    sizes["num_warps"] = max(1, tile * rows.element_size() // 512)
    where, entries = (pieces.starts, pieces.owner), (n_groups, pieces.size, len(index), width // unit)
    args = (rows, index.contiguous(), weights.contiguous(), *where, out, *(dots or [None] * 3), *entries)
    launch(_weighted_sums, (n_pieces, tiles), *args, **sizes, ENTRIES=ENTRIES // 2 if dots else ENTRIES)
    if n_pieces > n_groups > 0:
        launch(_join, (n_pieces - n_groups, tiles), out, *where, n_groups, pieces.size, width // unit, **sizes)
    return out[:n_groups]
