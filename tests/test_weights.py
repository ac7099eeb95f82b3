"""ops/weights.py and the squared error, against PyTorch's own; Adam's kernel is interpreted where there is no GPU."""

import copy

import pytest
import torch
from torch import nn

from ops import sparse, weights
from ops.variance import squared_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("values", [True, False])
def test_rows_taken_get_their_gradient_in_that_of_the_whole(values):
    t = torch.randn(5, 2, requires_grad=True)
    whole, rows = weights.take(t, torch.tensor([3, 1]), values)
    (whole.sum() + (rows * torch.tensor([[2.0], [5.0]])).sum()).backward()
    assert torch.equal(rows, t[[3, 1]] * values) and torch.equal(t.grad, torch.tensor([1.0, 6, 1, 3, 1])[:, None].expand(5, 2))


def test_a_squared_error_has_the_bits_of_autograd():
    torch.manual_seed(0)
    x, x_hat = torch.randn(2, 7, 5).transpose(0, 1), torch.randn(7, 2, 5, requires_grad=True)
    squared, error = squared_error(x, x_hat)
    (0.3 * squared).backward()
    gradient, x_hat.grad = x_hat.grad, None
    plain = (x - x_hat).pow(2).sum((1, 2)).mean()
    (0.3 * plain).backward()
    assert torch.equal(squared, plain) and torch.equal(gradient, x_hat.grad) and torch.equal(error, x - x_hat)
    assert not error.requires_grad and squared.requires_grad
    exact = x_hat.detach().double().requires_grad_()
    (0.3 * (x.double() - exact).pow(2).sum((1, 2)).mean()).backward()
    torch.testing.assert_close(gradient.double(), exact.grad)


def test_a_narrow_copy_follows_what_is_written_into_the_weight():
    weight = nn.Parameter(torch.randn(3, 2, 5))
    copied = weights.narrow(weight, torch.bfloat16)
    assert torch.equal(copied, weight.flatten(1).bfloat16()) and not copied.requires_grad
    assert weights.narrow(weight, torch.bfloat16) is copied
    with torch.no_grad():
        weight.mul_(3)  # as a checkpoint is read, or another optimizer steps
    assert torch.equal(weights.narrow(weight, torch.bfloat16), weight.flatten(1).bfloat16())
    weight.data = torch.randn(3, 2, 5)  # as `.to` moves it
    assert torch.equal(weights.narrow(weight, torch.bfloat16), weight.flatten(1).bfloat16())
    assert weights.narrow(weight, torch.float32).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("on_cuda", [False, True])
def test_adam_steps_as_pytorchs_own_on_the_divided_gradient(on_cuda, monkeypatch):
    """Against the plain one in float64, from a state that the fused one left; its state goes back to that one too."""
    if on_cuda:
        pytest.importorskip("triton", reason="the kernels need triton")
        monkeypatch.setattr(sparse, "on_cuda", lambda x: True)
    settings = {"lr": 3e-3, "betas": (0.85, 0.9997), "eps": 1e-8}
    shapes = (1500, 2, 3), (4, 2, 3), (7,)
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in shapes]
    mine = [nn.Parameter(t.clone().to(DEVICE)) for t in start]
    plain = [nn.Parameter(t.double()) for t in start]
    optimizer, reference = weights.Adam(mine, **settings), torch.optim.Adam(plain, **settings)
    copied = weights.narrow(mine[0], torch.bfloat16)
    for step in range(6):
        divisor = 1 + step % 3
        for weight, other in zip(mine, plain, strict=True):
            gradient = torch.randn(weight.shape, generator=draw)
            weight.grad, other.grad = gradient.to(DEVICE), gradient.double() / divisor
        kept = [weight.grad.clone() for weight in mine]
        optimizer.grad_scale = torch.tensor(float(divisor), device=DEVICE)
        optimizer.step()
        reference.step()
        if on_cuda:
            assert all(torch.equal(weight.grad, was) for weight, was in zip(mine, kept, strict=True))  # not written back
            assert weights.narrow(mine[0], torch.bfloat16) is copied
            torch.testing.assert_close(copied.float(), mine[0].detach().flatten(1), rtol=2**-7, atol=0)
        if step == 2:  # a run goes on from a checkpoint
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weight, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(weight.double().cpu(), other, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            found, expected = optimizer.state[weight][name], reference.state[other][name]
            torch.testing.assert_close(found.double().cpu(), expected.double(), rtol=1e-5, atol=1e-7)


def test_several_steps_of_training_equal_those_without_kernels(monkeypatch):
    """Copies that Adam rewrites are those that the next step multiplies with."""
    pytest.importorskip("triton", reason="the kernels need triton")
    import train
    from crosscoder import CrossCoder

    def run(dtype):
        crosscoder = CrossCoder(12, 40, 2, "vanilla", dec_init_norm=0.5, compute_dtype=dtype).to(DEVICE)
        optimizer = weights.Adam(crosscoder.parameters(), lr=0.05)
        x = torch.randn(30, 2, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        dead = torch.arange(40, device=DEVICE) % 4 == 0
        losses = []
        for _ in range(5):
            losses.append(train.losses_and_gradients(crosscoder, x, 30, 0.1, 0.2, dead).loss)
            train.update(crosscoder, optimizer, 1.0)
        return torch.stack(losses).cpu()

    plain = run(torch.float32)
    monkeypatch.setattr(sparse, "on_cuda", lambda x: True)
    torch.testing.assert_close(run(torch.float32), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(torch.bfloat16), plain, rtol=2e-2, atol=1e-2)
    assert plain[-1] < 0.7 * plain[0]  # a copy of the first step's weights would not come close
