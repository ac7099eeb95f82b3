"""The kernels against plain PyTorch; `test_losses.py` compares whole training steps. Interpreted where there is no GPU."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")
from ops import kernels
from ops.selection import find_bin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch, d_hidden, count", [(1, 1, 1), (5, 7, 9), (6, 300, 100), (3, 5000, 64), (4, 10, 1000)])
def test_largest_keeps_what_topk_keeps_and_of_equal_scores_the_first(batch, d_hidden, count, ties):
    pre, b_enc, weight = draw(batch, d_hidden), draw(d_hidden, seed=1), draw(d_hidden, seed=2).abs()
    if ties:
        pre, b_enc, weight = pre.round(), b_enc.round(), torch.ones_like(weight)
    else:  # as the encoder's product comes, with rows at multiples of 16 and anything between them
        wide = torch.full((batch, -(-d_hidden // 16) * 16), torch.nan, device=DEVICE)
        wide[:, :d_hidden] = pre
        pre = wide[:, :d_hidden]
    latents, codes, starts = kernels.largest(pre, b_enc, weight, count)
    f = (pre + b_enc).relu()
    order = (f * weight).flatten().sort(descending=True, stable=True).indices[:count]
    order = order[(f * weight).flatten()[order] > 0].sort().values
    used = int(starts[-1])
    tokens = torch.arange(batch, device=DEVICE).repeat_interleave(starts.diff())
    assert torch.equal(tokens * d_hidden + latents[:used], order)
    assert torch.equal(codes[:used], f.flatten()[order])
    assert len(codes) == count and not codes[used:].any() and not latents[used:].any()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch, d_hidden, count", [(1, 1, 1), (6, 300, 100), (3, 5000, 64), (4, 10, 1000)])
def test_what_is_kept_in_place_is_what_largest_lists(batch, d_hidden, count, ties):
    pre, b_enc, weight = draw(batch, d_hidden), draw(d_hidden, seed=1), draw(d_hidden, seed=2).abs()
    if ties:
        pre, b_enc, weight = pre.round(), b_enc.round(), torch.ones_like(weight)
    codes = kernels.rows_of_16(batch, d_hidden, pre.dtype, DEVICE).copy_(pre)
    least = kernels.keep_largest(codes, b_enc, weight, count)
    latents, values, starts = kernels.largest(pre, b_enc, weight, count)
    tokens, used = torch.arange(batch, device=DEVICE).repeat_interleave(starts.diff()), int(starts[-1])
    expected = torch.zeros_like(pre).index_put_((tokens, latents[:used]), values[:used])
    assert torch.equal(codes, expected) and least == (values * weight[latents])[:used].min()


def test_where_nothing_is_positive_nothing_is_kept():
    codes = -draw(4, 32).abs()
    assert kernels.keep_largest(codes, *(torch.zeros(32, device=DEVICE) for _ in range(2)), 5) == torch.inf
    assert not codes.any()


@pytest.mark.parametrize("needed", [1, 2, 50, 700, 10**6])
def test_a_bin_is_found_as_on_a_cpu(needed):
    bins = torch.zeros(1 << 16, dtype=torch.int32)
    where = torch.randint(1 << 16, (40,), generator=torch.Generator().manual_seed(needed))
    bins[where] = torch.randint(1, 40, (40,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    found = [torch.empty((), dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.int64)]
    kernels.launch(kernels._find, (1,), bins.to(DEVICE), torch.tensor(needed, device=DEVICE), *found)
    assert [int(n) for n in found] == [int(n) for n in find_bin(bins, needed)]


@pytest.mark.parametrize("unlike", [1.0, 30.0, 0.1])
def test_a_sample_of_unlike_scores_does_not_change_what_is_kept(unlike, monkeypatch):
    """The floor comes from the first of 61 blocks; here their scores are like all others, far above or far below."""
    batch, d_hidden, count = 64, 2000, 300  # 32 blocks
    pre, zero, one = draw(batch, d_hidden), torch.zeros(d_hidden, device=DEVICE), torch.ones(d_hidden, device=DEVICE)
    pre[:8, :512] *= unlike
    found, launch = [], kernels.launch

    def watched(kernel, grid, *args, **constants):
        launch(kernel, grid, *args, **constants)
        found.extend([int(args[2])] if kernel is kernels._find else [])

    monkeypatch.setattr(kernels, "launch", watched)
    latents, codes, starts = kernels.largest(pre, zero, one, count)
    tokens = torch.arange(batch, device=DEVICE).repeat_interleave(starts.diff())
    expected = pre.flatten().topk(count).indices.sort().values
    assert torch.equal(tokens * d_hidden + latents, expected) and torch.equal(codes, pre.flatten()[expected])
    floor, cut, _ = found
    assert (floor > cut) == (unlike == 30.0) and floor > 0


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on CUDA's current device, which is another one where a tensor lies on the second GPU."""
    current, launched = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    class Watched:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            assert current == [torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")], self.name
            launched.append(self.name)
            return self.kernel[grid]

        def __call__(self, *args):
            return self.kernel(*args)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernels, "PIECE", 2)
    monkeypatch.setattr(kernels, "FURTHER", 3)
    ours = [name for name, value in vars(kernels).items() if isinstance(value, type(kernels._count))]
    for name in ours:
        monkeypatch.setattr(kernels, name, Watched(name))
    latents, codes, starts = kernels.largest(draw(4, 9), draw(9, seed=1), draw(9, seed=2).abs(), 6)
    kernels.weighted_sums(draw(9, 5), latents, codes, kernels.in_pieces(starts, 6))
    kernels.gate(draw(4, 16), draw(16))
    kernels.keep_largest(draw(4, 16), draw(16, seed=1), draw(16, seed=2).abs(), 6)
    kernels.adam(*(draw(9).abs() for _ in range(4)), None, draw(3), 0.9, 0.1, 0.99, 0.01, 1e-8)
    assert {*ours} - {*launched} == {"_scores", "_piece"}  # which the others call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 100, 1100])  # wider rows than one program adds up
@pytest.mark.parametrize("piece", [3, 100])  # entries after which a group is split
def test_weighted_sums_and_dots(width, piece, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PIECE", piece)
    monkeypatch.setattr(kernels, "FURTHER", 100)
    groups, entries, used = 7, 60, 53
    rows, others, extra = draw(9, width).to(dtype), draw(groups, width, seed=1), draw(groups, seed=4)
    weights, index = draw(entries, seed=2), torch.randint(9, (entries,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    starts = torch.tensor([0, 0, 5, 22, 22, 23, 50, used], device=DEVICE)  # also groups without an entry
    group = torch.repeat_interleave(torch.arange(groups, device=DEVICE), starts.diff())
    taken = rows[index[:used]].float()
    expected = torch.zeros(groups, width, device=DEVICE).index_add_(0, group, taken * weights[:used, None])
    pieces = kernels.in_pieces(starts, entries)
    torch.testing.assert_close(kernels.weighted_sums(rows, index, weights, pieces), expected)
    sums, dots = kernels.sums_and_dots(rows, index, weights, pieces, others, extra)
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(dots[:used], (taken * others[group]).sum(-1) + extra[group])


def test_the_same_batch_gives_the_same_bits():
    pre, b_enc, weight = draw(8, 500), draw(500, seed=1), draw(500, seed=2).abs()
    first, second = (kernels.largest(pre, b_enc, weight, 70) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, d_hidden", [(1, 1), (130, 600), (257, 33)])  # strips that end within a block
def test_gate_opens_where_a_code_is_positive_and_adds_up(batch, d_hidden, dtype):
    """The codes relu(product + bias), sums of codes as they are, and the gradient that passes relu.

    Of eighths, which bfloat16 holds: the interpreter cuts off what CUDA rounds.
    """
    product, bias, d_codes = (
        (draw(*shape, seed=sum(shape)) * 8).round() / 8 for shape in ((batch, d_hidden), (d_hidden,), (batch, d_hidden))
    )
    product, d_codes = product.to(dtype), d_codes.flip(0).to(dtype)
    codes = kernels.rows_of_16(batch, d_hidden, dtype, DEVICE).copy_(product)
    expected = (product.float() + bias).relu()
    total, times = kernels.gate(codes, bias)
    assert torch.equal(codes, expected.to(dtype)) and torch.equal(times, (expected > 0).float().sum(0))
    torch.testing.assert_close(total, expected.sum(0))
    total, times = kernels.gate(codes, None)
    assert torch.equal(codes, expected.to(dtype)) and torch.equal(times, (expected > 0).float().sum(0))
    torch.testing.assert_close(total, codes.float().sum(0))
    d_pre = (d_codes.float() + bias) * (codes > 0)
    passed = kernels.rows_of_16(batch, d_hidden, dtype, DEVICE).copy_(d_codes)
    total, _ = kernels.gate(passed, bias, codes)
    assert torch.equal(passed, d_pre.to(dtype))
    torch.testing.assert_close(total, d_pre.sum(0))
