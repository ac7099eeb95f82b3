"""A crosscoder beside its losses: codes, threshold, normalisation, saving and loading, first weights."""

import json

import pytest
import torch
from small_crosscoder import B, D, F, K, make, rows

from crosscoder import CrossCoder
from ops.variance import explained_variance


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


def test_explained_variance_sees_a_constant_error_and_each_model():
    x = rows(1000)
    assert explained_variance(x, x).tolist() == [1, 1, 1]
    mean = x.mean(0, keepdim=True).expand_as(x)
    torch.testing.assert_close(explained_variance(x, mean), torch.zeros(3), atol=1e-5, rtol=0)
    shifted = x.clone()
    shifted[:, 1] += 0.5  # 0.25 of squared error per value of variance 1
    together, base, ft = explained_variance(x, shifted).tolist()
    assert base == 1 and ft == pytest.approx(0.75, abs=0.02) and together == pytest.approx(0.875, abs=0.02)


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
