"""Real models, real datasets and real command lines, made once for all tests."""

import os
import signal
from pathlib import Path

import pytest
import torch

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # ignored in a shell's background, and then by what is started here too
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}  # nothing here needs a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on CPU tensors; read when triton is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sizes here are so small that threads would only wait for each other
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch is here already
pytest.register_assert_rewrite("helpers")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, str]:
    """A small Llama trained on Python source and its fine-tune on English prose: base, ft, and the texts code, prose."""
    import tiny_models

    return tiny_models.build(tmp_path_factory.mktemp("tiny"), steps=100)


@pytest.fixture(scope="session")
def pair(tiny, tmp_path_factory) -> Path:
    """210,000 rows of the two models' middle MLP outputs, collected by the command line."""
    from helpers import run_script  # after the environment above: its libraries read it

    out = tmp_path_factory.mktemp("pair") / "pair"
    flags = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", "model.layers.1.mlp", "--seq-len", "256"]
    flags += ["--text", f"{tiny['code']}=1", "--text", f"{tiny['prose']}=1", "--num-tokens", "210000", "--output", str(out)]
    run_script("collect.py", *flags, "--model-dtype", "float32", check=True)
    return out


@pytest.fixture(scope="session")
def capitals(tiny, tmp_path_factory) -> dict[str, Path]:
    """The base model, its fine-tune on capital letters, their activations, and the analysed run of a crosscoder on them."""
    import tiny_models
    from helpers import HOOK, run_script

    folder = Path(tiny["base"]).parent
    made = tiny_models.fine_tune_on_capitals(folder, steps=150)
    out = tmp_path_factory.mktemp("capitals")
    collected = run_script(
        "collect.py", "--base-model", tiny["base"], "--ft-model", made["caps"], "--hook", HOOK, "--seq-len", 128, "--output",
        out / "data", "--text", tiny["code"], "--text", made["capitals"], "--num-tokens", 80_000, "--model-dtype", "float32",
        check=True,
    ).stdout  # fmt: skip
    trained = run_script(
        "train.py", "--dataset", out / "data", "--d-hidden", 256, "--batch-size", 512, "--epochs", 4, "--l1-coeff", 2,
        "--run-name", "caps", "--output-dir", out, "--wandb", "disabled", check=True,
    ).stdout  # fmt: skip
    models = ["--base-model", tiny["base"], "--ft-model", made["caps"], "--model-dtype", "float32"]
    printed = run_script(
        "analyze.py", out / "caps", *models, "--patch-tokens", 4000, "--latents", "5", "--sections-per-class", 10, check=True
    ).stdout
    return {"out": out, "run": out / "caps", "data": out / "data", "models": models,
            "printed": printed, "collected": collected, "trained": trained,
            "analysis": out / "caps" / "analysis", "base": Path(tiny["base"]), "ft": Path(made["caps"])}  # fmt: skip
