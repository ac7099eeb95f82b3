"""Other people's crosscoders: files written here by hand from their documented layouts, against the formulas in float64."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers import ROOT, one_line_error, run_script
from safetensors.torch import load_file, save_file

from crosscoder import CrossCoder
from formats import write_crosscoder
from run.foreign import read_crosscoder
from run.warm_start import with_normalization

D, F, K = 16, 48, 5
close = dict(rtol=1e-5, atol=1e-5)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = draw(300, 2, D, seed=9) * torch.tensor([2.0, 0.5])[:, None] + draw(2, D, seed=8)  # raw activations


def make(variant="batch_topk", folded=False) -> CrossCoder:
    """A crosscoder with halves, means and scales that differ, its threshold fitted on X."""
    crosscoder = CrossCoder(D, F, 2, variant, K)
    with torch.no_grad():
        for seed, parameter in enumerate(crosscoder.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed, scale=0.3))
    crosscoder.mean.copy_(draw(2, D, seed=8))
    crosscoder.scale.copy_(torch.tensor([0.5, 2.5]))
    if variant == "batch_topk":
        crosscoder.fit_threshold(lambda: [crosscoder.normalize(X)])
    return crosscoder.fold_normalization() if folded else crosscoder


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


CL = {"encoder.weight": draw(2, D, F, seed=1, scale=0.3), "encoder.bias": draw(F, seed=2, scale=0.3)}
CL |= {"decoder.weight": draw(2, F, D, seed=3, scale=0.3), "decoder.bias": draw(2, D, seed=4)}
NONE = {"target_rms": torch.tensor(1.0), "activation_global_scale": torch.ones(2)}
NONE |= {name: torch.full((2, D), torch.nan) for name in ("activation_mean", "activation_std")}
CL_WEIGHTS = [CL["encoder.weight"], CL["encoder.bias"], CL["decoder.weight"], CL["decoder.bias"]]


def crosscoder_learning(folder, tensors, **config):
    save_file(tensors, folder / "model.safetensors")
    sizes = {"activation_dim": D, "dict_size": F, "num_layers": 2}
    (folder / "config.json").write_text(json.dumps(sizes | config))
    return folder


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


def saelens(folder, kind="standard", **config):
    tensors = {"W_enc": CL["encoder.weight"][0], "b_enc": CL["encoder.bias"], "b_dec": CL["decoder.bias"][0]}
    tensors["W_dec"] = CL["decoder.weight"][0]
    if kind == "jumprelu":
        tensors["threshold"] = draw(F, seed=6).abs()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    usual = {"d_in": D, "d_sae": F, "normalize_activations": "none", "reshape_activations": "none", "architecture": kind}
    (folder / "cfg.json").write_text(json.dumps(usual | config))
    return tensors


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


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pickle_was_run",))


def spoil(folder, how):
    """A source that must be refused, and what the refusal says."""
    if how == "nothing there":
        return folder / "nowhere", "there is no such file or folder"
    if how == "empty folder":
        return folder, "is no crosscoder; a folder needs config.json and model.safetensors"
    if how == "pickle":
        torch.save({"W_enc": Evil()}, folder / "cc_weights.pt")
        return folder, "is no file of plain tensors"
    if how == "torn":
        saelens(folder)
        content = (folder / "sae_weights.safetensors").read_bytes()
        (folder / "sae_weights.safetensors").write_bytes(content[: len(content) // 2])
        return folder, "is no file of plain tensors"
    if how == "torn config":
        saelens(folder)
        (folder / "cfg.json").write_text("{")
        return folder, "cfg.json: cannot be read"
    if how == "gated":
        saelens(folder, architecture="gated")
        return folder, "an SAE of the kind gated is not read"
    if how == "layer norm":
        saelens(folder, normalize_activations="layer_norm")
        return folder, "normalize_activations is layer_norm"
    if how == "two SAEs":
        for i, half in enumerate(("base", "ft")):
            (folder / half).mkdir()
            tensors = saelens(folder / half)
            save_file({name: (t + i).contiguous() for name, t in tensors.items()}, folder / half / "sae_weights.safetensors")
        return folder, "base/ and ft/ are two SAEs"
    if how == "half":
        write_crosscoder(make(), folder, "saelens")
        return folder / "base", "is one half of a crosscoder"
    topk = CL | {
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": torch.tensor(1.0),
        "code_normalization_id": torch.tensor(1),
    }
    if how == "never fitted":
        return crosscoder_learning(
            folder, topk | {"threshold": torch.tensor(-1.0)}
        ), "its threshold is -1, so it was never fitted"
    if how == "decoupled":
        return crosscoder_learning(folder, topk | {"code_normalization_id": torch.tensor(5)}), "DECOUPLED"
    if how == "missing tensor":
        del topk["decoder.bias"]
        return crosscoder_learning(folder, topk), "has no tensor decoder.bias"
    if how == "other shape":
        return crosscoder_learning(folder, topk | {"encoder.bias": torch.zeros(3)}), "encoder.bias has the shape (3,)"
    assert how == "some layers"
    return crosscoder_learning(folder, topk, encoder_layers=[0]), "its encoder_layers is [0]"


@pytest.mark.parametrize(
    "how", ["nothing there", "empty folder", "pickle", "torn", "torn config", "gated", "layer norm", "two SAEs", "half",
            "never fitted", "decoupled", "missing tensor", "other shape", "some layers"],
)  # fmt: skip
def test_sources_that_cannot_be_read_are_refused(tmp_path, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, message = spoil(tmp_path, how)
    with pytest.raises(ValueError) as refused:
        read_crosscoder(source)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)  # names the file or folder
    assert not (tmp_path / "pickle_was_run").exists()


# Each gives a source in the folder f, and the refusal says the words beside it.
TOPK = CL | {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(1.0), "code_normalization_id": torch.tensor(1)}
NORMALIZER = {"activation_mean": torch.zeros(2, D), "activation_std": torch.ones(2, D), "target_rms": torch.tensor(1.0)}
FULL = TOPK | NORMALIZER | {"activation_global_scale": torch.ones(2)}


def change(tensors: dict, **new) -> dict:
    """The tensors with others in place; None leaves one out. A name's dot is written as two underscores."""
    new = {name.replace("__", "."): t for name, t in new.items()}
    return {name: t for name, t in (tensors | new).items() if t is not None}


def ours(folder, tensors=None, **config):
    """A saved crosscoder of ours with other tensors and config."""
    make().save_pretrained(folder)
    save_file(change(load_file(folder / "model.safetensors"), **(tensors or {})), folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def sae(folder, kind="jumprelu", config=None, **new):
    """A SAELens folder with other tensors and config."""
    save_file(change(saelens(folder, kind, **(config or {})), **new), folder / "sae_weights.safetensors")
    return folder


def ckkissane(folder, config=None, **new):
    """A .pt of ckkissane with other tensors."""
    tensors = {"W_enc": CL["encoder.weight"], "b_enc": CL["encoder.bias"], "b_dec": CL["decoder.bias"]}
    tensors["W_dec"] = CL["decoder.weight"].transpose(0, 1).contiguous()
    torch.save(change(tensors, **new), folder / "cc_weights.pt")
    (folder / "cfg.json").write_text(json.dumps({"activation_scale": [1.0, 1.0]} | (config or {})))
    return folder


def topk(folder, config=None, **new):
    """A BatchTopK of crosscoder_learning with a normaliser, other tensors and config."""
    return crosscoder_learning(folder, change(FULL, **new), **(config or {}))


def text(folder, name, content):
    (folder / name).write_text(content)
    return folder


def torch_file(folder, content, compress=False):
    """model.pt that holds any object."""
    torch.save(content, folder / "plain.pt")
    with zipfile.ZipFile(folder / "plain.pt") as old, zipfile.ZipFile(folder / "model.pt", "w", 8 * compress) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename))
    return folder


def halves(folder, n_models=2, half="ft", config=None, **metadata):
    """The two SAEs of a crosscoder, one half's metadata or config changed."""
    crosscoder = CrossCoder(D, F, n_models, "batch_topk", K)
    crosscoder.threshold.fill_(0.1)
    write_crosscoder(crosscoder, folder, "saelens")
    content = json.loads((folder / half / "cfg.json").read_text())
    content["metadata"] |= metadata
    (folder / half / "cfg.json").write_text(json.dumps(content | (config or {})))
    return folder


def instead(folder, half, other):
    """The folder with one half replaced by another; None: it is gone."""
    shutil.rmtree(folder / half)
    if other:
        shutil.copytree(folder / other, folder / half)
    return folder


NAN, INF = torch.nan, torch.inf
GARBAGE = {
    "threshold NaN": (lambda f: crosscoder_learning(f, change(TOPK, threshold=torch.tensor(NAN))), "its threshold is nan"),
    "bias NaN": (lambda f: ckkissane(f, b_enc=CL["encoder.bias"] * torch.nan), "b_enc holds NaN, inf or"),
    "bias complex": (lambda f: ckkissane(f, b_dec=torch.zeros(2, D, dtype=torch.complex64)), "b_dec is no plain tensor"),
    "mean of another shape": (
        lambda f: crosscoder_learning(f, change(FULL, activation_mean=torch.zeros(D + 1))), "activation_mean has the shape"
    ),
    "no std": (
        lambda f: crosscoder_learning(f, TOPK | {"activation_mean": torch.zeros(2, D)}), "has no tensor activation_std"
    ),
    "expanded to terabytes": (
        lambda f: ckkissane(f, W_enc=torch.zeros(1).expand(2, 2**20, 2**20), W_dec=torch.zeros(1).expand(2**20, 2, 2**20),
                            b_enc=torch.zeros(1).expand(2**20), b_dec=torch.zeros(1).expand(2, 2**20)),
        "its tensors stand for",
    ),
    "ours, n_models -1": (lambda f: ours(f, n_models=-1), "n_models is -1 in one and 2 in the other"),
    "ours, d_hidden 10^12": (lambda f: ours(f, d_hidden=10**12), "d_hidden is 1000000000000 in one and 48 in the other"),
    "ours, k is a text": (lambda f: ours(f, k="5"), "k '5' and k_aux 8 must be whole numbers"),
    "ours, threshold NaN": (lambda f: ours(f, {"threshold": torch.tensor(torch.nan)}), "threshold holds NaN, inf or"),
    "ours, bias inf": (lambda f: ours(f, {"b_dec": torch.full((2, D), torch.inf)}), "b_dec holds NaN, inf or"),
    "ours, mean of whole numbers": (lambda f: ours(f, {"mean": torch.zeros(2, D, dtype=torch.int64)}), "mean is torch.int64"),
    "ours, scale 0": (lambda f: ours(f, {"scale": torch.zeros(2)}), "scale must be above"),
    # what a second round of tries found
    "ours, deep config": (lambda f: text(ours(f), "config.json", "[" * 100_000), "recursion"),
    "ours, k 5.0": (lambda f: ours(f, k=5.0), "k 5.0 and k_aux 8 must be whole numbers"),
    "ours, k_aux is a text": (lambda f: ours(f, k_aux="x"), "k 5 and k_aux 'x' must be whole numbers"),
    "ours, no width": (
        lambda f: ours(f, {"W_enc": torch.zeros(2, 0, F), "W_dec": torch.zeros(F, 2, 0)}, d_model=0),
        "it has no W_dec with three axes",
    ),
    "ours, axes in another order": (lambda f: ours(f, {"W_enc": torch.zeros(D, 2, F)}), "W_enc is torch.float32 of the"),
    "ours, float64 beyond float32": (lambda f: ours(f, {"b_enc": draw(F).double() * 1e300}), "b_enc holds NaN, inf or"),
    "ours, threshold -1": (lambda f: ours(f, {"threshold": torch.tensor(-1.0)}), "threshold 0 or more"),
    "ours, threshold [1]": (lambda f: ours(f, {"threshold": torch.zeros(1)}), "threshold is torch.float32 of the shape (1,)"),
    "ours, scale 1e-44": (lambda f: ours(f, {"scale": torch.full((2,), 1e-44)}), "scale must be above"),
    "mean half NaN": (lambda f: topk(f, activation_mean=torch.tensor([[NAN], [0]]).repeat(1, D)), "mean holds NaN"),
    "mean missing": (lambda f: topk(f, activation_mean=None), "has no tensor activation_mean"),
    "std inf": (lambda f: topk(f, activation_global_scale=None, activation_std=torch.full((2, D), INF)), "scale must be above"),
    "k 5.5": (lambda f: topk(f, k=torch.tensor(5.5)), "k is of the type torch.float32"),
    "k true": (lambda f: topk(f, k=torch.tensor(True)), "k is of the type torch.bool"),
    "k missing": (lambda f: topk(f, k=None), "has no tensor k, as a BatchTopKCrossCoder must"),
    "threshold inf": (lambda f: topk(f, threshold=torch.tensor(INF)), "its threshold is inf"),
    "unknown code normalization": (lambda f: topk(f, code_normalization_id=torch.tensor(7)), "normalization number 7"),
    "alpha is a text": (
        lambda f: topk(f, {"code_normalization_alpha_sae": "x"}, code_normalization_id=torch.tensor(3)), "alphas ['x', 0.1]"
    ),
    "alpha inf": (
        lambda f: topk(f, {"code_normalization_alpha_cc": INF}, code_normalization_id=torch.tensor(3)), "alphas [1.0, inf]"
    ),
    "one more tensor": (lambda f: topk(f, processor=torch.zeros(3)), "holds processor as well, which is not known here"),
    "another's config": (lambda f: topk(f, {"activation_dim": 999}), "its activation_dim is 999"),
    "a name twice": (lambda f: torch_file(f, CL | {"_orig_mod.encoder.bias": torch.zeros(F)}), "a name is there twice"),
    "compressed": (lambda f: torch_file(f, {"W_dec": torch.zeros(10_000)}, compress=True), "it is compressed"),
    "no state dict": (lambda f: torch_file(f, torch.zeros(3)), "it holds a Tensor and no state dict"),
    "without values": (lambda f: torch_file(f, {"W_dec": torch.zeros(10**6, 2, 10**6, device="meta")}), "no plain tensor"),
    "scales are a text": (lambda f: ckkissane(f, {"activation_scale": "12"}), "2 positive numbers are needed"),
    "scales are one number": (lambda f: ckkissane(f, {"activation_scale": 1.0}), "2 positive numbers are needed"),
    "scale 1e-60": (lambda f: ckkissane(f, {"activation_scale": [1e-60, 1.0]}), "scale must be above"),
    "weights of 3e38": (lambda f: ckkissane(f, W_dec=torch.full((F, 2, D), 3e38)), "W_dec holds NaN, inf or values beyond"),
    "JumpReLU in ckkissane's names": (lambda f: ckkissane(f, log_threshold=torch.zeros(F)), "holds log_threshold as well"),
    "a threshold in a ReLU SAE": (lambda f: sae(f, config={"architecture": "standard"}), "holds threshold as well"),
    "scaled codes in an SAE": (lambda f: sae(f, scaling_factor=torch.ones(F)), "holds scaling_factor as well"),
    "a text for a truth value": (lambda f: sae(f, config={"apply_b_dec_to_input": "false"}), "must be true or false"),
    "metadata null": (lambda f: sae(f, config={"metadata": None}), "metadata an object"),
    "one threshold NaN": (lambda f: sae(f, threshold=torch.tensor([NAN, *[0.0] * (F - 1)])), "threshold 0 or more"),
    "the base half twice": (lambda f: instead(halves(f), "ft", "base"), "not the halves of one crosscoder"),
    "the halves swapped": (lambda f: halves(f, crosscoder_half="base"), "not the halves of one crosscoder"),
    "a third half lost": (lambda f: instead(halves(f, 3), "model_2", None), "not the halves of one crosscoder"),
    "another k in each half": (lambda f: halves(f, k=7), "not the halves of one crosscoder"),
    "ours, folded but not so": (lambda f: ours(f, folded=True), "folded is True in one and False in the other"),
}  # fmt: skip


@pytest.mark.parametrize("how", GARBAGE)
def test_garbage_is_refused_before_anything_is_allocated(tmp_path, how):
    source, message = GARBAGE[how][0](tmp_path), GARBAGE[how][1]
    loads = [read_crosscoder, CrossCoder.from_pretrained] if how.startswith("ours") else [read_crosscoder]
    for load in loads:
        with pytest.raises(ValueError) as refused:
            load(source)
        assert message in str(refused.value) and "\n" not in str(refused.value)
        assert str(tmp_path) in str(refused.value)


def test_garbage_is_one_line_of_the_command_line(tmp_path):
    write_crosscoder(make("vanilla"), tmp_path / "ck", "ckkissane")
    (tmp_path / "own").mkdir()
    ours(tmp_path / "own", d_hidden=10**12)
    for source, words, *flags in (
        ("ck", "--activation-scale: 2 positive numbers are needed", "--activation-scale", "inf", "1"),
        ("own", "d_hidden is 1000000000000 in one and 48 in the other"),
    ):
        refused = run_script("formats.py", tmp_path / source, tmp_path / "out", "--to", "crosscoder", *flags)
        assert words in one_line_error(refused, "formats.py") and not (tmp_path / "out").exists()


def test_the_halves_of_three_models_come_back(tmp_path):
    crosscoder = read_crosscoder(halves(tmp_path, 3))
    assert (crosscoder.n_models, crosscoder.k) == (3, K)
    torch.testing.assert_close(crosscoder.W_dec.norm(dim=-1).sum(-1), torch.ones(F))


def test_a_crosscoder_that_cannot_be_written(tmp_path):
    crosscoder = make("vanilla")
    crosscoder.scale.fill_(1e-17)
    crosscoder.W_dec.data.mul_(1e17)
    crosscoder.b_dec.data.mul_(1e17).mul_(1e17)
    with pytest.raises(ValueError, match="--to ckkissane: b_dec would hold NaN or inf"):
        write_crosscoder(crosscoder, tmp_path / "out", "ckkissane")
    make("vanilla").save_pretrained(tmp_path / "ours")
    for to in ("ckkissane", "saelens"):
        command = ["bash", "-c", f"ulimit -f 4; exec {sys.executable} {ROOT}/formats.py ours {to} --to {to}"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert "cannot be written" in one_line_error(result, "formats.py")


def test_a_folder_of_another_project_points_to_formats(tmp_path):
    for name, make_one in (("cl", crosscoder_learning), ("sae", lambda f, _: sae(f)), ("ck", lambda f, _: ckkissane(f))):
        (tmp_path / name).mkdir()
        make_one(tmp_path / name, FULL)
        with pytest.raises(ValueError) as refused:
            CrossCoder.from_pretrained(tmp_path / name)
        command = f"python formats.py {tmp_path / name} NEW_FOLDER --to crosscoder"
        assert command in str(refused.value) and "\n" not in str(refused.value)
        converted = run_script("formats.py", tmp_path / name, tmp_path / f"{name}-ours", "--to", "crosscoder", check=True)
        assert "as crosscoder" in converted.stdout
        CrossCoder.from_pretrained(tmp_path / f"{name}-ours")


@pytest.mark.parametrize("scale", [(1.0,), (1.0, -1.0)])
def test_activation_scales_must_fit(tmp_path, scale):
    write_crosscoder(make("vanilla"), tmp_path, "ckkissane")
    with pytest.raises(ValueError, match="2 positive numbers"):
        read_crosscoder(tmp_path, scale)
    make().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="leave the flag out"):
        read_crosscoder(tmp_path / "ours", (1.0, 1.0))


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


def test_a_threshold_does_not_fit_into_ckkissane(tmp_path):
    with pytest.raises(ValueError, match="--to ckkissane: it has two models and plain ReLU codes"):
        write_crosscoder(make(), tmp_path / "out", "ckkissane")
    assert not (tmp_path / "out").exists()
