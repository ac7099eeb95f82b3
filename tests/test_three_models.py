"""More than two models: collect.py --model and train.py --model-dataset, given once for each."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers import ROOT, failure, metrics, one_line_error, read_pair, run_script

from crosscoder import CrossCoder
from ops.variance import explained_variance

SCALES = (1.0, 10.0, 100.0)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[list, torch.Tensor]:
    """Flags, and the raw rows [rows, 3, 16]: concepts of all models, and a fifth of them of the third model alone."""
    folder, random = tmp_path_factory.mktemp("three"), np.random.default_rng(0)
    codes = random.exponential(size=(12_000, 20)) * (random.random((12_000, 20)) < 0.1)
    directions, rows, flags = random.normal(size=(20, 16)), [], []
    for i, scale in enumerate(SCALES):
        here = directions * (np.arange(20) < (20 if i == 2 else 16))[:, None]
        rows.append((scale * codes @ here).astype("float32"))
        Dataset.from_dict({"acts": rows[-1], "token": np.arange(12_000)}).save_to_disk(str(folder / str(i)))
        flags += ["--model-dataset", folder / str(i)]
    return flags, torch.from_numpy(np.stack(rows, axis=1))


def test_three_models_train_and_report(tmp_path, three):
    flags, x = three
    sizes = [
        "--d-hidden",
        48,
        "--batch-size",
        256,
        "--val-tokens",
        1000,
        "--epochs",
        10,
        "--l1-coeff",
        0.5,
        "--dead-window",
        0.1,
    ]
    sizes += ["--wandb", "disabled", "--compute-dtype", "float32", "--output-dir", tmp_path, "--run-name", "a"]
    printed = run_script("train.py", *flags, *sizes, check=True).stdout
    crosscoder = CrossCoder.from_pretrained(tmp_path / "a" / "crosscoder")
    ratio = crosscoder.scale[:2] / crosscoder.scale[1:]  # models in the order of the flags
    assert ratio[0] == pytest.approx(10, rel=1e-3) and 10 < ratio[1] < 20
    held_out = crosscoder.normalize(x[-1000:])
    x_hat = crosscoder.decode(crosscoder.encode(held_out, normalized=True), normalized=True)
    want = dict(zip(("", "_A", "_B", "_C"), explained_variance(held_out, x_hat).tolist(), strict=True))
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    for suffix, value in want.items():
        assert value > 0.7 and summary[f"explained_variance{suffix}"] == pytest.approx(value, abs=1e-4)
        assert all(f"explained_variance{suffix}" in line for line in metrics(tmp_path / "a")[:-1])
    assert f"(base {want['_A']:.3f}, ft {want['_B']:.3f}, C {want['_C']:.3f})" in printed
    counts = summary["latents"]
    assert list(counts) == ["shared", "A_only", "B_only", "C_only", "dead"] and sum(counts.values()) == 48
    assert counts["C_only"] >= 4 and counts["C_only"] > counts["A_only"] + counts["B_only"]


def test_each_model_is_analysed_against_the_base(tmp_path, three):
    """Only the third model has more than the base, and its page says so."""
    flags, x = three
    sizes = ["--d-hidden", 48, "--batch-size", 256, "--val-tokens", 1000, "--epochs", 20, "--wandb", "disabled"]
    run = tmp_path / "a"
    run_script("train.py", *flags, *sizes, "--l1-coeff", 0.5, "--output-dir", tmp_path, "--run-name", "a", check=True)
    said = run_script("analyze.py", run, check=True).stdout
    summary = json.loads((run / "summary.json").read_text())
    found = {name: json.loads((run / "analysis" / name / "findings.json").read_text()) for name in ("ft", "C")}
    assert found["ft"]["changed"] == {"ft": 0, "base": 0}
    assert found["C"]["changed"]["base"] == 0 and 4 <= found["C"]["changed"]["ft"] <= 12
    crosscoder = CrossCoder.from_pretrained(run / "crosscoder")
    norms, f = crosscoder.decoder_norms().detach(), crosscoder.encode(x)
    for name, letter, m in (("ft", "B", 1), ("C", "C", 2)):
        metrics = json.loads((run / "analysis" / name / "metrics.json").read_text())
        assert metrics["explained_variance_A"] == pytest.approx(summary["explained_variance_A"], abs=1e-4)
        assert metrics["explained_variance_B"] == pytest.approx(summary[f"explained_variance_{letter}"], abs=1e-4)
        assert metrics["l0_loss"] == pytest.approx(summary["l0_loss"], rel=1e-4)
        table = pq.read_table(run / "analysis" / name / "latents.parquet").to_pydict()
        relative = norms[:, m] / norms[:, [0, m]].sum(-1)
        assert np.allclose(table["relative_norm"], relative, atol=1e-5)
        assert np.allclose(table["frequency"], (f > 0).float().mean(0), atol=1e-3)
        index = (run / "analysis" / "report.html").read_text()
        assert f'href="{name}/report.html">0 and {m}</a>' in index and (run / "analysis" / name / "report.html").is_file()
    concepts = [one["latent"] for one in found["C"]["changes"]]
    own = np.random.default_rng(0)  # the directions of `three`
    own.exponential(size=(12_000, 20)), own.random((12_000, 20))
    directions = torch.from_numpy(own.normal(size=(20, 16)))[16:]
    rows = crosscoder.W_dec.detach().double()[concepts, 2]
    assert (torch.nn.functional.cosine_similarity(directions[:, None], rows, dim=-1).amax(1) > 0.9).all()
    assert "the pages of ft, C, each against the base model" in said
    refused = one_line_error(run_script("analyze.py", run, "--base-model", "a", "--ft-model", "b"), "analyze.py")
    assert "--base-model: models run for crosscoders of two, this one is of 3" in refused


def test_models_that_cannot_be_joined_are_refused(tmp_path, three):
    flags, x = three
    other = Dataset.from_dict({"acts": x[:, 0].numpy(), "token": np.arange(12_000) + (np.arange(12_000) == 77)})
    other.save_to_disk(str(tmp_path / "other"))
    refused = one_line_error(run_script("train.py", *flags, "--model-dataset", tmp_path / "other"), "train.py")
    assert f"--model-dataset {tmp_path / 'other'} are not aligned: token of row 77 (split train) is 77 in the base" in refused
    assert "--model-dataset is given once" in one_line_error(run_script("train.py", *flags[:2]), "train.py")


# --- collect.py


@pytest.fixture(scope="module")
def collected(tiny, tmp_path_factory) -> dict:
    """Flags and datasets: of base and fine-tuned model, and of these with a copy of the base model as the third."""
    folder = tmp_path_factory.mktemp("collected")
    copy = shutil.copytree(tiny["base"], folder / "copy")
    flags = ["--hook", "model.layers.1.mlp", "--text", tiny["code"], "--text", tiny["prose"], "--seq-len", 128]
    flags += ["--model-dtype", "float32", "--num-tokens", 12_000]
    two = ["--base-model", tiny["base"], "--ft-model", tiny["ft"]]
    three = [part for name in (tiny["base"], tiny["ft"], copy) for part in ("--model", name)]
    for name, models in (("two", two), ("three", three)):
        run_script("collect.py", *models, *flags, "--output", folder / name, check=True)
    assert "is complete" in run_script("collect.py", *three[:4], *flags, "--output", folder / "two", check=True).stdout
    return {"flags": flags, "copy": copy, "two": folder / "two", "three": folder / "three"}


def test_three_models_are_collected_at_the_same_tokens(collected):
    two, three = collected["two"], collected["three"]
    names = sorted(path.relative_to(two) for path in two.rglob("*.arrow"))
    assert len(names) > 10 and all((two / name).read_bytes() == (three / name).read_bytes() for name in names)
    for split in ("train", "validation"):
        for shard in (three / "C" / split).glob("*.arrow"):  # the copy computes what the base model does
            assert shard.read_bytes() == (three / "base" / split / shard.name).read_bytes()
    pair = read_pair(three)
    assert pair["models"] == [pair["base_model"], pair["ft_model"], str(collected["copy"])]
    assert pair["stored_scale"][:2] == read_pair(two)["stored_scale"] and pair["stored_scale"][2] == pair["stored_scale"][0]
    assert len(pair["revisions"]) == 3 and "models" not in read_pair(two)


def test_three_collected_models_train(tmp_path, collected):
    sizes = ["--d-hidden", 64, "--batch-size", 256, "--epochs", 1, "--wandb", "disabled", "--log-every", 5]
    flags = ["--dataset", collected["three"], "--output-dir", tmp_path, "--run-name", "a"]
    assert "C 0." in run_script("train.py", *flags, *sizes, check=True).stdout
    crosscoder = CrossCoder.from_pretrained(tmp_path / "a" / "crosscoder")
    assert crosscoder.n_models == 3 and torch.allclose(crosscoder.mean[0], crosscoder.mean[2])
    said = run_script("analyze.py", tmp_path / "a", "--sections-per-class", 2, "--examples", 2, check=True).stdout
    for name, model in (("ft", "ft"), ("C", "copy")):
        found = json.loads((tmp_path / "a" / "analysis" / name / "findings.json").read_text())
        assert found["pair"] == f"base and {model}" and (found["changes"] or found["nearest"])[0]["examples"]
        if name == "C":  # what the copy has of each latent the base model has too
            assert found["changed"] == {"ft": 0, "base": 0}
    assert "base and copy: what changed" in said
    refused = one_line_error(run_script("train.py", *flags[:2], "--difference", "--num-tokens", 1000), "train.py")
    assert "--difference: is that of two models, the data is of 3" in refused


def test_models_that_cannot_be_collected_together_are_refused(tiny, collected, tmp_path):
    swapped = shutil.copytree(collected["copy"], tmp_path / "swapped")
    content = json.loads((swapped / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(content))
    two = ["--model", tiny["base"], "--model", tiny["ft"]]
    for given, want in (
        (["--model", tiny["base"]], "--model is given once"),
        ([], "--base-model is missing: give the base model, or each model with --model"),
        ([*two, "--base-model", tiny["base"]], "--base-model: --model names all models"),
        ([*two, "--model", swapped], f"--model {swapped}: the tokenizers differ (the token"),
        ([*two, "--model", f"{tiny['base']}@main"], f"--model {tiny['base']}@main: --model {tiny['base']} is a folder"),
        ([*two, "--model", "./none"], "--model ./none: there is no such folder"),
    ):
        argv = [ROOT / "collect.py", *given, *collected["flags"], "--output", tmp_path / "never"]
        assert want in failure(list(map(str, argv)))
    assert not (tmp_path / "never").exists()
