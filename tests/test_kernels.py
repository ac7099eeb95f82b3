"""The kernels against plain PyTorch; `test_crosscoder.py` compares whole training steps. Interpreted where there is no GPU."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")
from ops import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch, d_hidden, count", [(1, 1, 1), (5, 7, 9), (6, 300, 100), (3, 5000, 64), (4, 10, 1000)])
def test_largest_keeps_what_topk_keeps_and_of_equal_scores_the_first(batch, d_hidden, count, ties):
    pre, b_enc, weight = draw(batch, d_hidden), draw(d_hidden, seed=1), draw(d_hidden, seed=2).abs()
    if ties:
        pre, b_enc, weight = pre.round(), b_enc.round(), torch.ones_like(weight)
    latents, codes, starts = kernels.largest(pre, b_enc, weight, count)
    f = (pre + b_enc).relu()
    order = (f * weight).flatten().sort(descending=True, stable=True).indices[:count]
    order = order[(f * weight).flatten()[order] > 0].sort().values
    used = int(starts[-1])
    tokens = torch.arange(batch, device=DEVICE).repeat_interleave(starts.diff())
    assert torch.equal(tokens * d_hidden + latents[:used], order)
    assert torch.equal(codes[:used], f.flatten()[order])
    assert len(codes) == count and not codes[used:].any() and not latents[used:].any()


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

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("_histogram", "_count", "_write", "_weighted_sums", "_dots"):
        monkeypatch.setattr(kernels, name, Watched(name))
    latents, codes, starts = kernels.largest(draw(4, 9), draw(9, seed=1), draw(9, seed=2).abs(), 6)
    rows = draw(9, 5)
    kernels.weighted_sums(rows, latents, codes, starts)
    kernels.dots(rows, rows, latents, latents, starts[-1])
    assert launched == ["_histogram", "_histogram", "_count", "_write", "_weighted_sums", "_dots"]


@pytest.mark.parametrize("width", [1, 100, 1100])  # wider rows than one program adds up
def test_weighted_sums_and_dots(width):
    groups, entries, used = 6, 40, 33
    rows, a, weights = draw(9, width), draw(groups, width, seed=1), draw(entries, seed=2)
    index = torch.randint(9, (entries,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    starts = torch.tensor([0, 0, 5, 22, 22, 30, used], device=DEVICE)  # also groups without an entry
    group = torch.repeat_interleave(torch.arange(groups, device=DEVICE), starts.diff())
    expected = torch.zeros(groups, width, device=DEVICE).index_add_(0, group, rows[index[:used]] * weights[:used, None])
    torch.testing.assert_close(kernels.weighted_sums(rows, index, weights, starts), expected)
    group = torch.cat([group, torch.zeros(entries - used, dtype=torch.int64, device=DEVICE)])
    dots = kernels.dots(a, rows, group, index, starts[-1])
    torch.testing.assert_close(dots[:used], (a[group] * rows[index]).sum(-1)[:used])
    assert not dots[used:].any()


def test_the_same_batch_gives_the_same_bits():
    pre, b_enc, weight = draw(8, 500), draw(500, seed=1), draw(500, seed=2).abs()
    first, second = (kernels.largest(pre, b_enc, weight, 70) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
