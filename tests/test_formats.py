"""Other people's crosscoders: files written here by hand from their documented layouts, against the formulas in float64."""

import json
import subprocess
import sys

import pytest
import torch
from foreign_files import CL, D, F, K, X, crosscoder_learning, draw, make, saelens
from helpers import ROOT, one_line_error, run_script
from safetensors.torch import load_file

from crosscoder import CrossCoder
from formats import write_crosscoder
from run.foreign import read_crosscoder
from run.warm_start import with_normalization

close = dict(rtol=1e-5, atol=1e-5)


def expected(W_enc, b_enc, W_dec, b_dec, x, keep=lambda f: f > 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [batch, F] and reconstructions [batch, 2, D] of x, in float64. W_enc [2, D, F], W_dec [2, F, D]."""
    W_enc, b_enc, W_dec, b_dec, x = (t.double() for t in (W_enc, b_enc, W_dec, b_dec, x))
    f = (x[:, 0] @ W_enc[0] + x[:, 1] @ W_enc[1] + b_enc).clamp_min(0)
    f = f * keep(f)
    assert 0.02 < (f > 0).double().mean() < 0.98
    return f.float(), torch.stack([f @ W_dec[m] + b_dec[m] for m in range(2)], dim=1)


def assert_gives(crosscoder: CrossCoder, f, x_hat):
    codes = crosscoder.encode(X)
    assert torch.equal(codes > 0, f > 0)
    torch.testing.assert_close(codes, f, **close)
    torch.testing.assert_close(crosscoder.decode(codes), x_hat.float(), **close)


# --- reading what others wrote


NONE = {"target_rms": torch.tensor(1.0), "activation_global_scale": torch.ones(2)}
NONE |= {name: torch.full((2, D), torch.nan) for name in ("activation_mean", "activation_std")}
CL_WEIGHTS = [CL["encoder.weight"], CL["encoder.bias"], CL["decoder.weight"], CL["decoder.bias"]]


def code_weights(name: str) -> torch.Tensor:
    """[F] what crosscoder_learning multiplies a code with before it looks at the threshold."""
    base, ft = CL["decoder.weight"].double().norm(dim=-1)
    sae, cc = (base**2 + ft**2).sqrt(), base + ft
    return {"CROSSCODER": cc, "SAE": sae, "MIXED": sae + 0.1 * cc, "NONE": torch.ones(F)}[name]


@pytest.mark.parametrize(("number", "name"), [(1, "CROSSCODER"), (2, "SAE"), (3, "MIXED"), (4, "NONE")])
def test_batch_topk_of_crosscoder_learning(tmp_path, number, name):
    std = draw(2, D, seed=5).abs() + 0.5
    tensors = CL | {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(1.1), "target_rms": torch.tensor(3.0)}
    tensors |= {"code_normalization_id": torch.tensor(number), "activation_mean": draw(2, D, seed=8), "activation_std": std}
    scale = 3.0 / (std**2).sum(-1).add(1e-8).sqrt()
    x = (X - tensors["activation_mean"]) * scale[:, None]
    f, x_hat = expected(*CL_WEIGHTS, x, keep=lambda f: f * code_weights(name) > 1.1)
    x_hat = x_hat / scale[:, None] + tensors["activation_mean"]
    # config k is wrong in files of theirs; the tensor is right. The scale is stored, or follows from the spread
    for stored in ({"activation_global_scale": scale}, {}):
        crosscoder_learning(
            tmp_path, tensors | stored, k=100, code_normalization=name.lower(), dict_class="BatchTopKCrossCoder"
        )
        crosscoder = read_crosscoder(tmp_path)
        assert (crosscoder.variant, crosscoder.k) == ("batch_topk", K)
        assert_gives(crosscoder, f, x_hat)


@pytest.mark.parametrize("form", ["folder", "without normaliser", "pt", "training run", "scalar scale"])
def test_crosscoder_of_crosscoder_learning(tmp_path, form):
    tensors, x, mean, scale = CL | NONE | {"code_normalization_id": torch.tensor(1)}, X, 0.0, 1.0
    if form == "without normaliser":
        tensors = CL
    if form == "scalar scale":
        mean, scale = draw(2, D, seed=8), 0.7
        tensors = tensors | {"activation_mean": mean, "activation_global_scale": torch.tensor(scale)}
        x = (X - mean) * scale
    if form in ("pt", "training run"):
        name = "compiled.pt" if form == "pt" else "model_final.pt"
        torch.save({f"_orig_mod.{name}": t for name, t in tensors.items()}, tmp_path / name)
        (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}, "buffer": None}))
        source = tmp_path / name if form == "pt" else tmp_path
    else:
        source = crosscoder_learning(tmp_path, tensors, dict_class="CrossCoder")
    crosscoder = read_crosscoder(str(source))
    f, x_hat = expected(*CL_WEIGHTS, x)
    assert crosscoder.variant == "vanilla"
    assert_gives(crosscoder, f, x_hat / scale + mean)


@pytest.mark.parametrize("name", ["cc_weights.pt", "model.pt"])
def test_ckkissane(tmp_path, name):
    tensors = {"W_enc": CL["encoder.weight"], "b_enc": CL["encoder.bias"], "b_dec": CL["decoder.bias"]}
    tensors["W_dec"] = CL["decoder.weight"].transpose(0, 1).contiguous()
    torch.save(tensors if name == "cc_weights.pt" else {"model_state_dict": tensors, "step": 3}, tmp_path / name)
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "dict_size": F, "l1_coeff": 2, "enc_dtype": "fp32"}))
    with pytest.raises(ValueError, match="--activation-scale"):
        read_crosscoder(tmp_path)
    scale = torch.tensor([0.25, 1.5])
    f, x_hat = expected(*CL_WEIGHTS, X * scale[:, None])
    crosscoder = read_crosscoder(tmp_path, activation_scale=(0.25, 1.5))
    assert_gives(crosscoder, f, x_hat / scale[:, None])


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
@pytest.mark.parametrize("bias_first", [True, False])
def test_an_sae_becomes_both_halves(tmp_path, kind, bias_first):
    sae = {name: t.double() for name, t in saelens(tmp_path, kind, apply_b_dec_to_input=bias_first).items()}
    x = X[:, 0].double()
    pre = (x - sae["b_dec"] * bias_first) @ sae["W_enc"] + sae["b_enc"]
    f = pre.clamp_min(0) * (pre > sae.get("threshold", torch.zeros(F)))
    crosscoder = read_crosscoder(tmp_path)
    both = X[:, :1].repeat(1, 2, 1)
    torch.testing.assert_close(crosscoder.encode(both), f.float(), **close)
    torch.testing.assert_close(crosscoder(both), (f @ sae["W_dec"] + sae["b_dec"])[:, None].repeat(1, 2, 1).float(), **close)


# --- writing, and back


def round_trip(crosscoder, folder, to) -> CrossCoder:
    write_crosscoder(crosscoder, folder, to)
    return read_crosscoder(folder)


CASES = [(v, to, fold) for v in ("vanilla", "batch_topk") for to in ("crosscoder", "crosscoder_learning", "saelens")
         for fold in (False, True)] + [("vanilla", "ckkissane", False), ("vanilla", "ckkissane", True)]  # fmt: skip


@pytest.mark.parametrize(("variant", "to", "folded"), CASES)
def test_round_trip_keeps_codes_and_reconstructions_on_raw_activations(tmp_path, variant, to, folded):
    crosscoder = make(variant, folded)
    if (variant, to, folded) == ("batch_topk", "crosscoder_learning", True):
        with pytest.raises(ValueError, match="these thresholds differ by latent"):
            write_crosscoder(crosscoder, tmp_path, to)
        return
    back = round_trip(crosscoder, tmp_path, to)
    assert (back.variant, back.k) == (variant, crosscoder.k)
    f = crosscoder.encode(X)
    if to == "saelens":  # its codes are the scores
        f = f * crosscoder.decoder_norms().sum(-1)
    assert_gives(back, f, crosscoder(X))
    norms, before = (c.fold_normalization().decoder_norms() for c in (back, crosscoder))
    relative, before = (n[:, 1] / n.sum(-1) for n in (norms, before))
    torch.testing.assert_close(relative, before, **close)  # base and fine-tuned half in their places
    if to != "saelens":
        again = round_trip(back, tmp_path / "again", "crosscoder")
        assert_gives(again, f, crosscoder(X))


def test_thresholds_per_latent_that_are_one_number_fit_into_crosscoder_learning(tmp_path):
    halves = round_trip(make(), tmp_path / "saelens", "saelens")
    assert halves.folded
    assert_gives(round_trip(halves, tmp_path / "cl", "crosscoder_learning"), halves.encode(X), halves(X))
    assert json.loads((tmp_path / "cl" / "config.json").read_text())["code_normalization"] == "NONE"
    raw = make()
    raw.mean.zero_(), raw.scale.fill_(1.0)  # then folding changes no norm, and the score's threshold comes back
    raw.fit_threshold(lambda: [X])
    folded = raw.fold_normalization()
    assert_gives(round_trip(folded, tmp_path / "cl2", "crosscoder_learning"), raw.encode(X), raw(X))
    assert json.loads((tmp_path / "cl2" / "config.json").read_text())["code_normalization"] == "CROSSCODER"


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
def test_what_crosscoder_learning_computes_from_our_files(tmp_path, variant):
    """Its formulas on the written tensors, not our reader."""
    crosscoder = make(variant)
    write_crosscoder(crosscoder, tmp_path, "crosscoder_learning")
    t, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in t.items()}
    wanted = {
        "encoder.weight": (2, D, F), "encoder.bias": (F,), "decoder.weight": (2, F, D), "decoder.bias": (2, D),
        "target_rms": (), "activation_mean": (2, D), "activation_std": (2, D), "activation_global_scale": (2,),
    }  # fmt: skip
    wanted = {name: (shape, torch.float32) for name, shape in wanted.items()} | {"code_normalization_id": ((), torch.int64)}
    if variant == "batch_topk":
        wanted |= {"k": ((), torch.int32), "threshold": ((), torch.float32)}
    assert shapes == wanted
    assert (config["activation_dim"], config["dict_size"], config["num_layers"]) == (D, F, 2)
    assert config["dict_class"] == {"vanilla": "CrossCoder", "batch_topk": "BatchTopKCrossCoder"}[variant]
    scale = t["target_rms"] / (t["activation_std"] ** 2).sum(-1).add(1e-8).sqrt()
    torch.testing.assert_close(scale, t["activation_global_scale"], **close)
    size = t["decoder.weight"].double().norm(dim=-1).sum(0)  # [F]
    weights = [t[f"{part}.{kind}"] for part in ("encoder", "decoder") for kind in ("weight", "bias")]
    f, x_hat = expected(
        *weights, (X - t["activation_mean"]) * scale[:, None], keep=lambda f: f * size > t.get("threshold", torch.zeros(()))
    )
    assert_gives(crosscoder, f, x_hat / scale[:, None] + t["activation_mean"])


def test_what_ckkissane_computes_from_our_files(tmp_path):
    crosscoder = make("vanilla")
    write_crosscoder(crosscoder, tmp_path, "ckkissane")
    t = torch.load(tmp_path / "cc_weights.pt", weights_only=True)
    assert t["W_enc"].shape == (2, D, F) and t["W_dec"].shape == (F, 2, D)
    assert_gives(crosscoder, *expected(t["W_enc"], t["b_enc"], t["W_dec"].transpose(0, 1), t["b_dec"], X))
    assert json.loads((tmp_path / "cfg.json").read_text())["dict_size"] == F


def test_what_saelens_computes_from_our_halves(tmp_path):
    crosscoder = make()
    write_crosscoder(crosscoder, tmp_path, "saelens")
    halves = [load_file(tmp_path / half / "sae_weights.safetensors") for half in ("base", "ft")]
    pre = sum(X[:, m].double() @ half["W_enc"].double() for m, half in enumerate(halves)) + halves[0]["b_enc"]
    codes = (pre.clamp_min(0) * (pre > halves[0]["threshold"])).float()
    torch.testing.assert_close(codes, crosscoder.encode(X) * crosscoder.decoder_norms().sum(-1), **close)
    x_hat = torch.stack([codes @ half["W_dec"] + half["b_dec"] for half in halves], dim=1)
    torch.testing.assert_close(x_hat, crosscoder(X), **close)
    torch.testing.assert_close(halves[0]["threshold"], crosscoder.threshold.expand(F))  # one number, as SAELens exports it
    for half in ("base", "ft"):
        config = json.loads((tmp_path / half / "cfg.json").read_text())
        assert (config["architecture"], config["apply_b_dec_to_input"], config["d_sae"]) == ("jumprelu", False, F)


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
@pytest.mark.parametrize("folded", [False, True])
def test_another_normalisation_keeps_codes_and_reconstructions(variant, folded):
    crosscoder = make(variant, folded)
    mean, scale = draw(2, D, seed=20), torch.tensor([0.7, 3.5])  # the scales keep their ratio, so the threshold is exact
    other = with_normalization(crosscoder, mean, scale)
    assert torch.equal(other.mean, mean) and torch.equal(other.scale, scale) and not other.folded
    assert_gives(other, crosscoder.encode(X), crosscoder(X))
    other.losses(other.normalize(X), 1.0).loss.backward()
    ratio = with_normalization(crosscoder, mean, torch.tensor([0.7, 2.0]))
    torch.testing.assert_close(ratio.decode(crosscoder.encode(X)), crosscoder(X), **close)
    l0, was = ((c.encode(X) > 0).sum(-1).float().mean().item() for c in (ratio, crosscoder))
    assert l0 == pytest.approx(was, rel=0.1)


@pytest.mark.parametrize("to", ["ckkissane", "crosscoder_learning", "saelens"])
@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_latent_without_decoder_rows_stays_off(tmp_path, to, variant, folded):
    crosscoder = make(variant)
    with torch.no_grad():
        crosscoder.W_dec[3], crosscoder.b_enc[3] = 0, 100.0
    crosscoder = crosscoder.fold_normalization() if folded else crosscoder
    if variant == "batch_topk" and (to == "ckkissane" or folded):
        return
    back = round_trip(crosscoder, tmp_path, to)
    assert (crosscoder.encode(X)[:, 3] == 0).all() and (back.encode(X)[:, 3] == 0).all()
    torch.testing.assert_close(back(X), crosscoder(X), **close)


# --- the command line


def test_command_line_converts_there_and_back(tmp_path):
    crosscoder = make()
    crosscoder.save_pretrained(tmp_path / "ours" / "crosscoder")  # as in a run
    for source, to in (("ours", "crosscoder_learning"), ("crosscoder_learning", "crosscoder")):
        printed = run_script("formats.py", tmp_path / source, tmp_path / to, "--to", to, check=True).stdout
        following = f"next: python analyze.py {tmp_path / to} --dataset DATA\n" if to == "crosscoder" else ""
        assert printed == f"{tmp_path / to}: batch_topk, 2 models of width {D}, {F} latents, as {to}\n{following}"
    assert_gives(CrossCoder.from_pretrained(tmp_path / "crosscoder"), crosscoder.encode(X), crosscoder(X))
    refused = run_script("formats.py", tmp_path / "ours", tmp_path / "crosscoder", "--to", "saelens")
    assert "exists and is not an empty folder" in one_line_error(refused, "formats.py")


def test_the_installed_command_ends_as_the_entry_does(tmp_path):
    make().save_pretrained(tmp_path / "ours")
    script = "import sys; from run.commands import formats; sys.exit(formats())"  # what pip writes
    command = [sys.executable, "-c", script, tmp_path / "ours", tmp_path / "out", "--to", "saelens"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "loading torch ...\n") and (tmp_path / "out" / "ft").is_dir()
