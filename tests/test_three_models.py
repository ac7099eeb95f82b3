"""More than two models: --model-dataset, given once for each."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import metrics, one_line_error, run_script

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


def test_models_that_cannot_be_joined_are_refused(tmp_path, three):
    flags, x = three
    other = Dataset.from_dict({"acts": x[:, 0].numpy(), "token": np.arange(12_000) + (np.arange(12_000) == 77)})
    other.save_to_disk(str(tmp_path / "other"))
    refused = one_line_error(run_script("train.py", *flags, "--model-dataset", tmp_path / "other"), "train.py")
    assert f"--model-dataset {tmp_path / 'other'} are not aligned: token of row 77 (split train) is 77 in the base" in refused
    assert "--model-dataset is given once" in one_line_error(run_script("train.py", *flags[:2]), "train.py")
