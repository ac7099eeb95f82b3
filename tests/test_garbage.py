"""Crosscoders and SAEs that formats.py and `read_crosscoder` must not take or cannot write: each is refused in one line."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from foreign_files import CL, D, F, K, crosscoder_learning, draw, make, saelens
from helpers import ROOT, one_line_error, run_script
from safetensors.torch import load_file, save_file

from crosscoder import CrossCoder
from formats import write_crosscoder
from run.foreign import read_crosscoder


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


def test_a_threshold_does_not_fit_into_ckkissane(tmp_path):
    with pytest.raises(ValueError, match="--to ckkissane: it has two models and plain ReLU codes"):
        write_crosscoder(make(), tmp_path / "out", "ckkissane")
    assert not (tmp_path / "out").exists()
