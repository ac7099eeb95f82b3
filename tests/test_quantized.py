"""Models whose weights are quantised, through the real command lines. bitsandbytes runs on a CPU too."""

import importlib.util

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from helpers import one_line_error, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def flags(tiny) -> list:
    given = ["--ft-model", tiny["ft"], "--hook", "model.layers.1.mlp", "--text", tiny["prose"], "--num-tokens", 1500]
    return [*given, "--seq-len", 64]


def collected(out, *flags) -> torch.Tensor:
    """[rows, d_model] float32 activations of the base model, in their order."""
    run_script("collect.py", *flags, "--output", out, check=True)
    rows = load_from_disk(str(out / "base"))["train"].with_format("numpy")[:]
    order = np.lexsort((rows["position"], rows["sequence"]))
    return torch.from_numpy(rows["activation"][order]).float()


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
@pytest.mark.parametrize("entry", ["collect.py", "train.py"])
def test_the_package_that_is_missing_is_named(entry, flags, tiny, tmp_path):
    out = ["--output", tmp_path / "out"] if entry == "collect.py" else ["--output-dir", tmp_path, "--run-name", "out"]
    failed = run_script(entry, *flags, *out, "--base-model", tiny["base"], "--model-dtype", "int8")
    error = one_line_error(failed, entry)
    assert f"--base-model {tiny['base']}: Using `bitsandbytes`" in error and "pip install" in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not INSTALLED, reason="needs bitsandbytes")
def test_quantised_models_give_nearly_the_same_activations(flags, tiny, tmp_path):
    whole = collected(tmp_path / "whole", *flags, "--base-model", tiny["base"])
    eight = collected(tmp_path / "eight", *flags, "--base-model", tiny["base"], "--model-dtype", "int8")
    four = collected(tmp_path / "four", *flags, "--base-model", tiny["base"], "--model-dtype", "nf4")
    error = [((x - whole).norm() / whole.norm()).item() for x in (eight, four)]
    assert 0 < error[0] < 0.1 and error[0] < error[1] < 0.5, error
    # saved quantised, it loads as it is
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        tiny["base"], dtype=torch.bfloat16, quantization_config=settings, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tiny["base"]).save_pretrained(tmp_path / "saved")
    saved = collected(tmp_path / "again", *flags, "--base-model", tmp_path / "saved")
    assert ((saved - whole).norm() / whole.norm()).item() < 0.1
    live = ["--model-dtype", "int8", "--d-hidden", 64, "--batch-size", 64, "--wandb", "disabled", "--buffer-tokens", 2048]
    run = ["--output-dir", tmp_path, "--run-name", "live"]
    run_script("train.py", *flags, "--base-model", tiny["base"], *live, *run, check=True)
