"""Real models, real datasets and real command lines, made once for all tests."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # ignored in a shell's background, and then by what is started here too
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}  # nothing here needs a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on CPU tensors; read when triton is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sizes here are so small that threads would only wait for each other
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch is here already
pytest.register_assert_rewrite("helpers")

# The files that take longest begin first, or one of them would be left alone at the end; those that wait for the same models
# lie apart. The others follow in the order of their names (pytest.ini: --no-loadscope-reorder).
FIRST = (
    "analyze faults shard compiled collect hub monitor resume live train disks sources analyze_stops collection labels "
    "steering benchmarks"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": i for i, name in enumerate(FIRST.split())}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], dict[str, str]]], dict[str, str]]:
    """once(name, make): what `make(folder)` gave the first process of the tests that asked. No test writes into that folder."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], dict[str, str]]) -> dict[str, str]:
        told = root / name / "made.json"
        with FileLock(root / f"{name}.lock"):
            if not told.exists():
                told.parent.mkdir()
                told.write_text(json.dumps(make(told.parent), default=str))
            return json.loads(told.read_text())

    return made


def shortened(paths: dict[str, str], *names: str) -> dict[str, str]:
    """The same, with a beginning of these texts: a command tokenizes a million characters of a file before its first row."""
    for name in names:
        short = Path(paths[name]).parent / "short" / Path(paths[name]).name
        short.parent.mkdir(exist_ok=True)
        short.write_text(Path(paths[name]).read_text(encoding="utf-8")[:400_000], encoding="utf-8")
        paths |= {name: str(short)}
    return paths


@pytest.fixture(scope="session")
def tiny(once) -> dict[str, str]:
    """A small Llama trained on Python source and its fine-tune on English prose: base, ft, and the texts code, prose."""
    import tiny_models

    return once("tiny", lambda folder: shortened(tiny_models.build(folder, steps=100), "code", "prose"))


@pytest.fixture(scope="session")
def caps(tiny, once) -> dict[str, str]:
    """The base model's fine-tune on capital letters, beside the others: caps, and its text capitals."""
    import tiny_models

    folder = Path(tiny["base"]).parent
    return once("caps", lambda _: shortened(tiny_models.fine_tune_on_capitals(folder, steps=150), "capitals"))


@pytest.fixture(scope="session")
def pair(tiny, once) -> Path:
    """105,000 rows of the two models' middle MLP outputs, collected by the command line."""
    from helpers import run_script  # after the environment above: its libraries read it

    def collect(folder: Path) -> dict:
        out = folder / "pair"
        flags = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", "model.layers.1.mlp", "--seq-len", "256"]
        flags += ["--text", f"{tiny['code']}=1", "--text", f"{tiny['prose']}=1", "--num-tokens", "105000", "--output", str(out)]
        run_script("collect.py", *flags, "--model-dtype", "float32", check=True)
        return {"pair": out}

    return Path(once("pair", collect)["pair"])


@pytest.fixture(scope="session")
def capitals(tiny, caps, once) -> dict:
    """The base model, its fine-tune on capital letters, their activations, and the analysed run of a crosscoder on them."""
    from helpers import HOOK, run_script

    def analyse(out: Path) -> dict:
        collected = run_script(
            "collect.py", "--base-model", tiny["base"], "--ft-model", caps["caps"], "--hook", HOOK, "--seq-len", 128,
            "--text", tiny["code"], "--text", caps["capitals"], "--num-tokens", 80_000, "--model-dtype", "float32",
            "--output", out / "data", check=True,
        ).stdout  # fmt: skip
        trained = run_script(
            "train.py", "--dataset", out / "data", "--d-hidden", 256, "--batch-size", 512, "--epochs", 4, "--l1-coeff", 2,
            "--run-name", "caps", "--output-dir", out, "--wandb", "disabled", check=True,
        ).stdout  # fmt: skip
        models = ["--base-model", tiny["base"], "--ft-model", caps["caps"], "--model-dtype", "float32"]
        flags = ["--patch-tokens", 4000, "--latents", "5", "--sections-per-class", 10]
        printed = run_script("analyze.py", out / "caps", *models, *flags, check=True).stdout
        return {
            "out": out,
            "ft": caps["caps"],
            "models": models,
            "printed": printed,
            "collected": collected,
            "trained": trained,
        }

    found = once("capitals", analyse)
    out = Path(found["out"])
    places = {"out": out, "run": out / "caps", "data": out / "data", "analysis": out / "caps" / "analysis"}
    return found | places | {"base": Path(tiny["base"]), "ft": Path(found["ft"])}
