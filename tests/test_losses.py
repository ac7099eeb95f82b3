"""Losses and gradients: of every form, of the auxiliary loss, of the parts of a batch; against float64 and each other."""

import pytest
import torch
from small_crosscoder import B, F, K, make, rows
from torch.utils._python_dispatch import TorchDispatchMode

from crosscoder import CrossCoder
from ops import sparse
from train import losses_and_gradients


def reference_losses(crosscoder, x, l1_coeff, aux_coeff, dead):
    """The formulas of the papers, one model, latent and token at a time, in float64."""
    W_enc, W_dec, b_enc, b_dec = (
        getattr(crosscoder, n).detach().double().requires_grad_() for n in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    x = x.double()
    pre = sum(x[:, m] @ W_enc[m] for m in range(2)) + b_enc
    f = pre.clamp_min(0)
    norm_sum = sum((W_dec[:, m] ** 2).sum(-1).sqrt() for m in range(2))

    def largest(score, count):
        cut = score.flatten().sort(descending=True).values[: count + 1]
        return (score > max(cut[count].item() if len(cut) > count else 0.0, 0.0)).double()

    if crosscoder.variant == "batch_topk":
        f = f * largest((f * norm_sum).detach(), K * len(x))
    x_hat = torch.stack([f @ W_dec[:, m] + b_dec[m] for m in range(2)], dim=1)
    l2 = sum(((x[:, m] - x_hat[:, m]) ** 2).sum(-1).mean() for m in range(2))
    l1 = (f * norm_sum).sum(-1).mean()
    aux = torch.zeros(())
    if dead is not None:
        a = (pre - b_enc.detach() if crosscoder.variant == "vanilla" else pre).clamp_min(0)[:, dead]
        a = a * largest((a * norm_sum[dead]).detach(), crosscoder.k_aux * len(x))
        r = (x - x_hat).detach().flatten(1)
        aux = ((r - a @ W_dec[dead].flatten(1)) ** 2).sum(-1).mean()
    loss = l2 + l1_coeff * l1 + aux_coeff * aux
    loss.backward()
    enc_rows = W_enc.grad.permute(2, 0, 1)
    return (loss, l2, l1, aux), {"enc_rows": enc_rows, "W_dec": W_dec.grad, "b_enc": b_enc.grad, "b_dec": b_dec.grad}


def choose_form(form: str, monkeypatch) -> str:
    """Compute as where most latents are active, as where few are, or with the kernels. Returns the device to compute on."""
    kernels = form.startswith("kernels")
    if kernels:
        pytest.importorskip("triton", reason="the kernels need triton")
        monkeypatch.setattr(sparse, "on_cuda", lambda x: True)
    share = -1.0 if form.endswith("dense") else 1.01
    monkeypatch.setattr(sparse, "DENSE_ABOVE", share)
    monkeypatch.setattr(sparse, "DENSE_ABOVE_BF16", share)
    monkeypatch.setattr(sparse, "PART", 7 * B)
    monkeypatch.setattr(sparse, "DENSE_ABOVE_CUDA", share)
    monkeypatch.setattr(sparse, "CHUNK", 3 * F)
    return "cuda" if kernels and torch.cuda.is_available() else "cpu"  # without a GPU the kernels are interpreted


FORMS = ["dense", "sparse", "kernels", "kernels, dense"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
@pytest.mark.parametrize("with_aux", [False, True])
@pytest.mark.parametrize("l1_coeff", [0.0, 0.7])
def test_losses_and_gradients_equal_float64_autograd(form, variant, with_aux, l1_coeff, monkeypatch):
    device = choose_form(form, monkeypatch)
    crosscoder, x = make(variant, k_aux=2), rows()
    if not form.startswith("kernels"):
        monkeypatch.setattr(sparse, "_Sparse" if form == "dense" else "_Dense", None)  # the other form must not be used
    dead = torch.arange(F) % 3 == 0 if with_aux else None
    losses, gradients = reference_losses(crosscoder, x, l1_coeff, 0.5, dead)
    crosscoder.to(device)
    out = crosscoder.losses(x.to(device), l1_coeff, aux_coeff=0.5, dead=dead if dead is None else dead.to(device))
    out.loss.backward()
    for mine, expected in zip(out[:4], losses, strict=True):
        torch.testing.assert_close(mine.double().cpu(), expected.double(), rtol=1e-5, atol=1e-6)
    for name, expected in gradients.items():
        torch.testing.assert_close(getattr(crosscoder, name).grad.double().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k_aux, most_dead", [(2, 14), (2, 33), (14, 14), (20, 17), (1, 0)])
@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
def test_auxiliary_loss_of_as_many_places_as_there_may_be_dead_latents(variant, k_aux, most_dead, monkeypatch):
    """On CUDA live latents fill the places up, and where every dead one may be used nothing is selected."""
    device = choose_form("kernels", monkeypatch)
    crosscoder, x, dead = make(variant, k_aux=k_aux), rows(), torch.arange(F) % 3 == 0
    dead &= most_dead > 0  # 14 latents or none
    losses, gradients = reference_losses(crosscoder, x, 0.7, 0.5, dead)
    out = crosscoder.to(device).losses(x.to(device), 0.7, 0.5, dead.to(device), most_dead=most_dead)
    out.loss.backward()
    expected = losses[3] if most_dead else torch.zeros(())
    torch.testing.assert_close(out.aux_loss.double().cpu(), expected.double(), rtol=1e-5, atol=1e-6)
    for name, expected in gradients.items():
        torch.testing.assert_close(getattr(crosscoder, name).grad.double().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize(
    "batch, d_model, d_hidden, k, bias, dead_share",
    [
        (1, 1, 1, 1, 0.0, 0.0),
        (7, 5, 33, 3, 0.0, 0.5),
        (16, 24, 64, 64, 0.0, 0.0),  # more are asked for than are positive
        (13, 9, 40, 2, -50.0, 0.3),  # nothing is active
        (9, 17, 50, 4, 0.0, 1.0),  # everything is dead
        (19, 24, 67, 5, 0.2, 0.1),
    ],
)
def test_every_form_equals_the_dense_one(form, dtype, batch, d_model, d_hidden, k, bias, dead_share, monkeypatch):
    x = torch.randn(batch, 2, d_model, generator=torch.Generator().manual_seed(batch))
    dead = torch.rand(d_hidden, generator=torch.Generator().manual_seed(3)) < dead_share

    def run(device):
        crosscoder = CrossCoder(d_model, d_hidden, 2, "batch_topk", k, k_aux=3, dec_init_norm=1.0, compute_dtype=dtype)
        crosscoder.b_enc.data.fill_(bias)
        crosscoder.to(device)
        out = crosscoder.losses(x.to(device), 0.3, 0.5, dead.to(device))
        out.loss.backward()
        values = [*out[:5], out.fired, out.x_hat, crosscoder.threshold]
        return [v.detach().cpu() for v in values], {n: p.grad.cpu() for n, p in crosscoder.named_parameters()}

    expected, gradients = run(choose_form("dense", monkeypatch))
    found, found_gradients = run(choose_form(form, monkeypatch))
    bounds = (1e-6, 1e-5) if dtype == torch.float32 else (1e-2, 1e-2)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=bounds[0], atol=bounds[0] * (1 + theirs.float().abs().max().item()))
    for name, theirs in gradients.items():
        torch.testing.assert_close(found_gradients[name], theirs, rtol=bounds[1], atol=bounds[1] * theirs.abs().max().item())


class NothingWaits(TorchDispatchMode):
    """Fails where a value or a size that the data decide goes to the host: on CUDA that waits for the device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), op
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["kernels", "kernels, dense"])
@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
def test_a_step_with_kernels_never_waits_for_the_device(form, variant, monkeypatch):
    device = choose_form(form, monkeypatch)
    crosscoder, x = make(variant, k_aux=2).to(device), rows().to(device)
    dead = torch.arange(F, device=device) % 3 == 0
    with NothingWaits():
        crosscoder.losses(x, 0.7, 0.5, dead).loss.backward()
    with pytest.raises(AssertionError), NothingWaits():
        x[dead[0].long()]


def aux_gradients(dead, variant="batch_topk", **options):
    crosscoder, x = make(variant, **options), rows()
    with torch.no_grad():
        crosscoder.b_enc[1] = -1e3  # latent 1 is below zero on every token
    out = crosscoder.losses(x, 0.0, aux_coeff=1.0, dead=dead)
    parameters = dict(crosscoder.named_parameters())
    grads = torch.autograd.grad(out.aux_loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads, strict=True)), out


def test_auxiliary_loss_reaches_dead_latents_only():
    dead = torch.arange(F) < 6
    grad, _ = aux_gradients(dead, k_aux=2)
    assert grad["b_dec"] is None  # the decoder bias takes no part
    assert (grad["enc_rows"][~dead] == 0).all() and (grad["W_dec"][~dead] == 0).all() and (grad["b_enc"][~dead] == 0).all()
    reached = dead.clone()
    reached[1] = False  # no gradient leaks through a winner that is not positive
    assert (grad["enc_rows"].abs().sum((1, 2))[reached] > 0).all() and (grad["W_dec"].abs().sum((1, 2))[reached] > 0).all()
    assert (grad["enc_rows"][1] == 0).all() and (grad["W_dec"][1] == 0).all()


def test_auxiliary_loss_reaches_vanilla_latents_that_are_active_nowhere():
    grad, out = aux_gradients(torch.arange(F) == 1, "vanilla", k_aux=2)
    assert not out.fired[1]
    assert grad["enc_rows"][1].any() and grad["W_dec"][1].any() and grad["b_enc"][1] != 0


def test_auxiliary_loss_is_zero_when_nothing_is_dead():
    grad, out = aux_gradients(torch.zeros(F, dtype=torch.bool))
    assert out.aux_loss == 0 and not any(g.any() for g in grad.values() if g is not None)


def test_auxiliary_loss_has_the_units_of_the_squared_error():
    dead, x, crosscoder = torch.arange(F) < 6, rows(), make("batch_topk")
    with torch.no_grad():
        crosscoder.b_enc.zero_(), crosscoder.b_dec.zero_()  # codes and reconstructions then grow with the activations
    small, large = (crosscoder.losses(size * x, 0.0, aux_coeff=1.0, dead=dead) for size in (1.0, 3.0))
    assert (large.aux_loss / small.aux_loss).item() == pytest.approx(9) == (large.l2_loss / small.l2_loss).item()


def test_auxiliary_loss_is_part_of_the_loss():
    crosscoder, dead = make("batch_topk"), torch.arange(F) < 6
    out = crosscoder.losses(rows(), 0.0, aux_coeff=0.25, dead=dead)
    torch.testing.assert_close(out.loss, out.l2_loss + 0.25 * out.aux_loss)
    assert out.aux_loss > 0


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
def test_bfloat16_products_stay_close_to_float32(variant):
    exact, fast, x = make(variant), make(variant, compute_dtype=torch.bfloat16), rows()
    a, b = exact.losses(x, 0.1), fast.losses(x, 0.1)
    assert b.loss.dtype == torch.float32
    torch.testing.assert_close(a.loss, b.loss, rtol=0.02, atol=0)


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    x, whole, parts = rows(), make(), make()
    expected = losses_and_gradients(whole, x, len(x), 0.7)
    found = losses_and_gradients(parts, x, 5, 0.7)  # six parts of 5 and one of 2
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    for name, p in whole.named_parameters():
        torch.testing.assert_close(getattr(parts, name).grad, p.grad, rtol=1e-5, atol=1e-6)


def test_each_part_of_a_batch_keeps_its_own_k():
    crosscoder, x = make("batch_topk"), rows() * torch.linspace(0.1, 3, B)[:, None, None]  # the last rows score highest
    active = [losses_and_gradients(crosscoder, x, size, 0.0).l0_loss for size in (B, 8)]
    assert active == [K, K]
    reconstruction = losses_and_gradients(crosscoder, x, 8, 0.0).x_hat
    each = torch.cat([crosscoder.losses(part, 0.0).x_hat for part in x.split(8)])
    assert torch.equal(reconstruction, each) and not torch.allclose(each, crosscoder.losses(x, 0.0).x_hat)
