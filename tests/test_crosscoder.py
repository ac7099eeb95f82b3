import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosscoder import CrossCoder
from ops import sparse
from ops.variance import explained_variance
from train import losses_and_gradients

B, D, F, K = 32, 12, 40, 4


def make(variant="vanilla", seed=0, **options):
    """A small crosscoder with a normalisation that differs between the models and no symmetry between the weights."""
    crosscoder = CrossCoder(D, F, variant=variant, k=K, seed=seed, **{"dec_init_norm": 0.5} | options)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in crosscoder.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draw)
        crosscoder.mean.copy_(torch.randn(2, D, generator=draw))
        crosscoder.scale.copy_(torch.tensor([0.5, 3.0]))
    return crosscoder


def rows(n=B, seed=7):
    return torch.randn(n, 2, D, generator=torch.Generator().manual_seed(seed))


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


def test_batch_topk_keeps_k_latents_a_token_from_the_first_step_on():
    crosscoder = make("batch_topk")
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=1e-3)
    for step in range(3):
        out = crosscoder.losses(rows(seed=step), 0.0)
        assert out.l0_loss == K
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_inference_is_sparse_after_a_single_training_batch():
    crosscoder = make("batch_topk")
    crosscoder.losses(rows(512), 0.0)
    l0 = (crosscoder.encode(rows(512, seed=8), normalized=True) > 0).sum(-1).float().mean()
    assert K / 2 < l0 < K * 2


def test_threshold_follows_later_batches_in_float32():
    crosscoder = make("batch_topk")
    crosscoder.losses(rows(seed=0), 0.0)
    first = crosscoder.threshold.item()
    x = 2 * rows(seed=1)
    crosscoder.losses(x, 0.0)
    smallest = crosscoder.score(crosscoder._pre(x).relu()).flatten().topk(K * B).values.min().item()
    assert crosscoder.threshold.item() == pytest.approx(first + 0.01 * (smallest - first), rel=1e-5)


def test_fit_threshold_gives_k_latents_a_token_on_the_rows_it_saw():
    crosscoder, held_out = make("batch_topk"), [rows(100, seed=s) for s in range(5)]
    crosscoder.fit_threshold(lambda: iter(held_out))
    active = sum((crosscoder.encode(x, normalized=True) > 0).sum().item() for x in held_out)
    assert active == K * 500


@pytest.mark.parametrize("seed", range(5))
def test_no_score_lies_on_the_fitted_threshold(seed):
    """Rounding differs with the batch size and after folding; it must not decide whether a latent is active."""
    crosscoder = CrossCoder(256, 512, variant="batch_topk", k=20, seed=seed)
    x = torch.randn(256, 2, 256, generator=torch.Generator().manual_seed(seed))
    crosscoder.scale.copy_(torch.tensor([0.5, 3.0]))
    crosscoder.fit_threshold(lambda: [x])
    raw = crosscoder.denormalize(x)
    together = crosscoder.encode(raw) > 0
    assert together.sum() == 20 * 256
    assert torch.equal(together, torch.cat([crosscoder.encode(row[None]) > 0 for row in raw]))
    assert torch.equal(together, crosscoder.fold_normalization().encode(raw) > 0)


def test_folding_a_latent_without_decoder_rows_keeps_it_off():
    crosscoder = make("batch_topk")
    crosscoder.losses(rows(), 0.0)
    with torch.no_grad():
        crosscoder.W_dec[3] = 0
        crosscoder.b_enc[3] = 100.0
    folded = crosscoder.fold_normalization()
    raw = crosscoder.denormalize(rows())
    assert (crosscoder.encode(raw)[:, 3] == 0).all() and (folded.encode(raw)[:, 3] == 0).all()
    assert not folded.threshold.isnan().any()


def test_batch_without_any_active_latent_trains_without_nan():
    crosscoder = make("batch_topk")
    before = crosscoder.threshold.item()
    with torch.no_grad():
        crosscoder.b_enc.fill_(-1e3)
    out = crosscoder.losses(rows(), 1.0, aux_coeff=1.0, dead=torch.ones(F, dtype=torch.bool))
    out.loss.backward()
    assert out.loss.isfinite() and crosscoder.threshold.item() == before
    assert all(p.grad.isfinite().all() for p in crosscoder.parameters() if p.grad is not None)
    assert crosscoder(torch.zeros(3, 2, D)).isfinite().all()


def test_codes_of_a_token_do_not_depend_on_its_batch():
    crosscoder, x = make("batch_topk"), rows(64)
    crosscoder.losses(x, 0.0)
    together, alone = crosscoder.encode(x), torch.cat([crosscoder.encode(row[None]) for row in x])
    assert torch.equal(together > 0, alone > 0) and (together > 0).any()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_encode_and_decode_apply_the_normalisation_once():
    crosscoder, x = make(), rows()
    f = crosscoder.encode(x)
    torch.testing.assert_close(f, crosscoder.encode(crosscoder.normalize(x), normalized=True))
    torch.testing.assert_close(crosscoder(x), crosscoder.denormalize(crosscoder.decode(f, normalized=True)))
    torch.testing.assert_close(crosscoder.denormalize(crosscoder.normalize(x)), x)


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
def test_folded_crosscoder_gives_the_same_codes_and_reconstructions_on_raw_activations(variant):
    crosscoder = make(variant)
    raw = crosscoder.denormalize(rows(256))
    if variant == "batch_topk":
        crosscoder.fit_threshold(lambda: [crosscoder.normalize(raw)])
    folded = crosscoder.fold_normalization()
    assert torch.equal(folded.scale, torch.ones(2)) and torch.equal(folded.mean, torch.zeros(2, D))
    f, g = crosscoder.encode(raw), folded.encode(raw)
    assert torch.equal(f > 0, g > 0) and 0 < (f > 0).float().mean() < 0.9
    torch.testing.assert_close(f, g, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(crosscoder(raw), folded(raw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.fold_normalization()(raw), folded(raw))
    with pytest.raises(ValueError, match="folded"):
        folded.losses(raw, 0.0)


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
@pytest.mark.parametrize("as_type", [str, lambda p: p])
@pytest.mark.parametrize("fold", [False, True])
def test_saved_and_loaded_crosscoder_is_the_same(tmp_path, variant, as_type, fold):
    crosscoder = make(variant)
    crosscoder.losses(rows(), 0.0)
    if fold:
        crosscoder = crosscoder.fold_normalization()
    crosscoder.save_pretrained(as_type(tmp_path / "c"))
    loaded = CrossCoder.from_pretrained(as_type(tmp_path / "c"))
    assert (loaded.variant, loaded.k, loaded.d_hidden, loaded.folded) == (variant, crosscoder.k, F, fold)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in crosscoder.state_dict().items())
    assert torch.equal(loaded(rows()), crosscoder(rows()))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors"]


def test_saved_tensors_have_the_documented_names_and_shapes(tmp_path):
    from safetensors.torch import load_file

    make("batch_topk").save_pretrained(tmp_path)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {
        "W_enc": (2, D, F), "W_dec": (F, 2, D), "b_enc": (F,), "b_dec": (2, D), "scale": (2,), "mean": (2, D), "threshold": (),
    }  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text())["k"] == K


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_loading_a_broken_folder_says_which(tmp_path, broken):
    make().save_pretrained(tmp_path)
    content = (tmp_path / broken).read_bytes()
    (tmp_path / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="broken"):
        CrossCoder.from_pretrained(tmp_path)
    (tmp_path / broken).unlink()
    with pytest.raises(ValueError, match=f"{broken} is missing"):
        CrossCoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", '{"folded": false, "d_model": "x"}', '{"folded": false, "surprise": 1}'])
def test_loading_a_foreign_config_is_refused(tmp_path, content):
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="broken"):
        CrossCoder.from_pretrained(tmp_path)


def test_buffers_stay_float32_and_follow_the_device():
    crosscoder = make("batch_topk")
    crosscoder.losses(rows(), 0.0)
    before = {name: b.clone() for name, b in crosscoder.named_buffers()}
    crosscoder.to(torch.bfloat16)
    assert crosscoder.W_enc.dtype == torch.bfloat16
    assert all(torch.equal(b, before[name]) for name, b in crosscoder.named_buffers())
    assert {t.device.type for t in crosscoder.to("meta").state_dict().values()} == {"meta"}


def test_initial_weights():
    crosscoder = CrossCoder(64, 1500, dec_init_norm=0.3, seed=5)
    torch.testing.assert_close(crosscoder.decoder_norms(), torch.full((1500, 2), 0.3))
    assert torch.equal(crosscoder.W_enc, crosscoder.W_dec.permute(1, 2, 0))
    assert torch.equal(crosscoder.W_dec[:, 0], crosscoder.W_dec[:, 1])
    assert crosscoder.W_dec.std().item() == pytest.approx(0.3 / 64**0.5, rel=0.02)
    larger, other = CrossCoder(64, 3000, dec_init_norm=0.3, seed=5), CrossCoder(64, 1500, dec_init_norm=0.3, seed=6)
    assert torch.equal(larger.W_dec[:1024], crosscoder.W_dec[:1024])  # drawn in blocks, whatever the size
    assert not torch.equal(larger.W_dec[1024:2048], crosscoder.W_dec[:1024])
    assert not torch.equal(other.W_dec, crosscoder.W_dec)


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


def test_explained_variance_sees_a_constant_error_and_each_model():
    x = rows(1000)
    assert explained_variance(x, x).tolist() == [1, 1, 1]
    mean = x.mean(0, keepdim=True).expand_as(x)
    torch.testing.assert_close(explained_variance(x, mean), torch.zeros(3), atol=1e-5, rtol=0)
    shifted = x.clone()
    shifted[:, 1] += 0.5  # 0.25 of squared error per value of variance 1
    together, base, ft = explained_variance(x, shifted).tolist()
    assert base == 1 and ft == pytest.approx(0.75, abs=0.02) and together == pytest.approx(0.875, abs=0.02)


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
def test_bfloat16_products_stay_close_to_float32(variant):
    exact, fast, x = make(variant), make(variant, compute_dtype=torch.bfloat16), rows()
    a, b = exact.losses(x, 0.1), fast.losses(x, 0.1)
    assert b.loss.dtype == torch.float32
    torch.testing.assert_close(a.loss, b.loss, rtol=0.02, atol=0)


def test_three_models():
    crosscoder = CrossCoder(D, F, n_models=3, variant="batch_topk", k=K)
    x = torch.randn(B, 3, D)
    crosscoder.losses(x, 0.0).loss.backward()
    assert crosscoder(x).shape == (B, 3, D) and crosscoder.decoder_norms().shape == (F, 3)
    assert explained_variance(x, crosscoder(x)).shape == (4,)


@pytest.mark.parametrize(
    "options", [{"variant": "topk"}, {"variant": "batch_topk", "k": None}, {"variant": "batch_topk", "k": 41}]
)
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="variant|k ="):
        CrossCoder(D, F, **options)


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
