"""Training straight from two models, through the real command line, on real tiny models and with real kills."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from helpers import ROOT, failure, metrics, run_script
from processes import Started
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from run import checkpoint

SEQ_LEN, MODEL_BATCH, BUFFER = 64, 8, 10_000
FILL = BUFFER // 2 - MODEL_BATCH * SEQ_LEN  # rows that end a fill
RUN = ["--buffer-tokens", BUFFER, "--d-hidden", 256, "--batch-size", 256, "--lr", 2e-3, "--l1-coeff", 0.5]
RUN += ["--wandb", "disabled", "--log-every", 10]


@pytest.fixture(scope="module")
def flags(tiny, tmp_path_factory) -> list:
    """Models and texts, mixed two to one; the shorter text runs out before the other."""
    folder = tmp_path_factory.mktemp("texts")
    for name, chars in (("code", 80_000), ("prose", 30_000)):
        (folder / f"{name}.txt").write_text(Path(tiny[name]).read_text()[:chars])
    given = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", "model.layers.1.mlp", "--seq-len", SEQ_LEN]
    given += ["--text", f"{folder / 'code.txt'}=2", "--text", f"{folder / 'prose.txt'}=1"]
    return [*given, "--model-dtype", "float32", "--val-tokens", 2000]


@pytest.fixture(scope="module")
def collected(flags, tmp_path_factory) -> Path:
    """All rows of the texts, as collect.py stores them."""
    out = tmp_path_factory.mktemp("collected") / "pair"
    rows = ["--num-tokens", 100_000, "--batch-size", MODEL_BATCH, "--shard-rows", FILL]
    run_script("collect.py", *flags, *rows, "--output", out, check=True)
    return out


@pytest.fixture(scope="module")
def budget(collected) -> list:
    """A run of an epoch and a quarter."""
    rows = json.loads((collected / "pair.json").read_text())["rows"]["train"]
    assert rows > 8 * FILL
    return ["--num-tokens", rows * 5 // 4]


@pytest.fixture(scope="module")
def straight(flags, budget, tmp_path_factory) -> Path:
    """A live run that nothing disturbs; beside it, what it kept."""
    folder = tmp_path_factory.mktemp("straight")
    keep = ["--keep-activations", folder / "kept"]
    done = run_script("train.py", *flags, *budget, *RUN, *keep, "--output-dir", folder, "--run-name", "a", check=True)
    assert "memory   base model" in done.stdout and "the texts ran out after" in done.stdout + done.stderr
    assert "epoch 2 goes through them again" in done.stdout + done.stderr and "models " in done.stderr
    return folder / "a"


DUMP = """
import sys
import numpy as np, torch
from run.flags import parse
from config import TrainConfig
from run.flags import resolve_sizes
given = parse(TrainConfig, sys.argv[2:])
from sources.opening import open_source
source, _ = open_source(given, resolve_sizes(given, None, None, "float32"), torch.device("cpu"))
stop, size, rows, states = given.num_tokens, 300, [], [{"epoch": 0, "window": 0, "served": 0, "start": None}]
for batch in source.batches(size, stop, torch.device("cpu")):
    rows.append(batch.x.numpy().copy())
    states.append(source.state_dict(batch.position))
for i in list(range(0, len(rows), 61)) + [len(rows) - 1]:  # from any place of the stream, both epochs
    source.load_state_dict(states[i])
    again = [b.x.numpy().copy() for b, _ in zip(source.batches(size, stop, torch.device("cpu"), i * size), range(3))]
    assert all(np.array_equal(a, b) for a, b in zip(again, rows[i:])), i
np.save(sys.argv[1], np.concatenate(rows))
"""


def test_every_row_is_consumed_once_an_epoch_mixed_and_from_any_place_again(flags, collected, tmp_path):
    """The rows that the loop gets, with the classic bug in mind: refills that read the first fill again, or nothing."""
    columns = [load_from_disk(str(collected / model))["train"].with_format("numpy")[:] for model in ("base", "ft")]
    stored = np.stack([c["activation"].astype(np.float16) for c in columns], axis=1)  # [rows, 2, d_model], float32 for numpy
    n = len(stored)
    given = [*flags, "--buffer-tokens", BUFFER, "--num-tokens", 2 * n]
    (tmp_path / "dump.py").write_text(DUMP)
    run_script(tmp_path / "dump.py", tmp_path / "rows.npy", *given, check=True)
    consumed = np.load(tmp_path / "rows.npy")
    assert len(consumed) == 2 * n

    def keys(rows):
        return [row.tobytes() for row in rows]

    first, second = keys(consumed[:n]), keys(consumed[n:])
    assert sorted(first) == sorted(second) == sorted(keys(stored))
    assert first != second
    # mixed: any thousand rows of window 3 come from fills 2 and 3 alone, about half from each
    order = np.lexsort((columns[0]["position"], columns[0]["sequence"]))
    size = -(-FILL // (MODEL_BATCH * (SEQ_LEN - 1))) * MODEL_BATCH * (SEQ_LEN - 1)  # rows of a fill: whole forward batches
    fill_of = {key: i // size for i, key in enumerate(keys(stored[order]))}  # a few rows are equal to another
    served = [fill_of[key] for key in first[size // 2 + 2 * size : size // 2 + 3 * size]]
    for start in range(0, size - 1000, 1000):
        counts = np.bincount(served[start : start + 1000], minlength=10)
        assert min(counts[2], counts[3]) > 400 and counts[2] + counts[3] > 980


def test_live_and_collected_training_reach_the_same(straight, flags, collected, budget, tmp_path):
    data = ["--dataset", straight.parent / "kept", "--val-tokens", 2000]
    run_script("train.py", *data, *budget, *RUN[2:], "--output-dir", tmp_path, "--run-name", "a", check=True)
    live, stored = (json.loads((run / "summary.json").read_text()) for run in (straight, tmp_path / "a"))
    assert live["explained_variance"] > 0.9
    assert live["explained_variance"] == pytest.approx(stored["explained_variance"], abs=0.01)
    shares = [m["model_fraction"] for m in metrics(straight) if "loss" in m]
    assert all(0 <= share <= 1 for share in shares) and max(shares) > 0


def test_kept_activations_are_what_collect_writes(straight, collected):
    assert_same_dataset(straight.parent / "kept", collected)


def assert_same_dataset(a: Path, b: Path) -> None:
    files = sorted(file.relative_to(a) for file in a.rglob("*.arrow"))
    assert files == sorted(file.relative_to(b) for file in b.rglob("*.arrow")) and len(files) > 20
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    first, second = (json.loads((folder / "pair.json").read_text()) for folder in (a, b))
    assert first | {"recipe": None} == second | {"recipe": None}
    assert all(second["recipe"][name] == value for name, value in first["recipe"].items())


def wait_for(process, run: Path, step: int) -> None:
    while not (saved := checkpoint.complete(run)) or int(saved[-1].name.removeprefix("step_")) < step:
        assert process.poll() is None, process.output()
        time.sleep(0.002)


def test_killed_and_stopped_in_the_middle_of_a_buffer_then_resumed(straight, flags, budget, tmp_path):
    """Once by SIGKILL in the first epoch, once by SIGTERM in the second: the same weights and the same kept files."""
    run, steps = tmp_path / "a", metrics(straight)[-1]["step"]
    command = [*flags, *budget, *RUN, "--save-every", 15, "--keep-activations", tmp_path / "kept"]
    for extra, step, kill, code in (
        (["--output-dir", tmp_path, "--run-name", "a", *command], 75, signal.SIGKILL, -9),
        (["--resume", run], steps * 5 // 6, signal.SIGTERM, 143),
    ):
        process = Started(ROOT / "train.py", *extra)
        wait_for(process, run, step)
        process.send_signal(kill)
        errors = process.communicate()[1]
        assert process.returncode == code and "Traceback" not in errors, errors
        state = checkpoint.read(checkpoint.find(run))[1]["stream"]
        assert state["served"] % FILL > 0 and state["window"] > 0 or kill == signal.SIGTERM
        assert state["epoch"] == (0 if kill == signal.SIGKILL else 1)
    run_script("train.py", "--resume", run, check=True)
    first, second = (load_file(r / "crosscoder" / "model.safetensors") for r in (straight, run))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same_dataset(tmp_path / "kept", straight.parent / "kept")


def with_wide_models(run: Path, tiny, folder: Path) -> Path:
    """A copy of a run whose models have become wider since it began."""
    shutil.copytree(run, folder / "run")
    record = (run / "config.json").read_text()
    for name in ("base", "ft"):
        wide = shutil.copytree(tiny[name], folder / name)
        config = AutoConfig.from_pretrained(wide)
        config.hidden_size = 96
        AutoModelForCausalLM.from_config(config).save_pretrained(wide)
        record = record.replace(f'"{tiny[name]}"', f'"{wide}"')
    (folder / "run" / "config.json").write_text(record)
    return folder / "run"


def test_bad_input_gives_one_line(flags, collected, straight, tiny, tmp_path):
    wider = with_wide_models(straight, tiny, tmp_path / "wide")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "blank.jsonl").write_text(json.dumps({"text": "  \n "}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("keep me")
    base, ft, hook, text = flags[:2], flags[2:4], flags[4:6], flags[8:10]
    run = [*flags, "--num-tokens", 50_000]
    two = [*base, *ft, *hook, "--num-tokens", 50_000, "--seq-len", 64]
    cases = [
        ([*base], "--base-model is given without --ft-model"),
        ([*base, *ft, *text], "--base-model is given without --hook"),
        ([*base, *ft, *hook], "--base-model is given without --text"),
        (flags, "--base-model is given without --num-tokens"),
        (["--keep-activations", tmp_path / "kept"], "--keep-activations is given without --base-model"),
        ([*run, "--dataset", collected], "--base-model trains straight from two models and --dataset from stored"),
        ([*flags, "--epochs", 2], "--epochs: the length of streamed texts is not known"),
        ([*run, "--buffer-tokens", 2047], "--buffer-tokens 2047: must be at least 2048, four times the 8 sequences"),
        ([*run, "--buffer-tokens", 10**13], "lower --buffer-tokens, --d-hidden or --batch-size"),
        ([*run, "--hook", "model.layers.9.mlp"], "model.layers has 4 entries, 0 to 3"),
        ([*run, "--skip-first", 64], "--skip-first 64: must be at least 0 and below --seq-len 64"),
        ([*run, "--model-batch-size", 0], "--model-batch-size 0: must be above 0"),
        ([*run, "--max-norm-ratio", 1], "--max-norm-ratio 1: must be above 1"),
        ([*run, "--max-norm-ratio", "inf"], "--max-norm-ratio inf: must be a finite number"),  # its resume could not read it
        ([*run, "--grad-clip", "nan"], "--grad-clip nan: must be a finite number"),
        ([*run, "--ft-device", "quantum"], "--ft-device quantum: not usable here"),
        ([*run, "--keep-activations", tmp_path / "full"], "is not empty and holds no collection"),
        ([*run, "--keep-activations", collected], "was begun with"),
        ([*two, "--text", tmp_path / "blank.jsonl"], "blank.jsonl: gives no text"),
        ([*two, "--text", tmp_path / "short.txt"], "--text: gives too few sequences to hold one out"),
    ]
    fresh = ["--output-dir", tmp_path / "runs", "--d-hidden", 64, "--wandb", "disabled"]
    cases = [([*given, *fresh], want) for given, want in cases] + [
        (["--resume", straight, "--hook", "model.layers.2.mlp"], "--hook is model.layers.2.mlp and was model.layers.1.mlp"),
        (["--resume", wider, "--keep-activations", "None"], "--base-model: has other content than when this run began"),
    ]
    (tmp_path / "code.txt").write_text(Path(text[1].rpartition("=")[0]).read_text().split("\n", 3)[-1])
    other_text = shutil.copytree(straight, tmp_path / "other_text")  # as if the file's first lines were gone
    record = (other_text / "config.json").read_text()
    (other_text / "config.json").write_text(record.replace(text[1].rpartition("=")[0], str(tmp_path / "code.txt")))
    resumed = ["--resume", other_text, "--keep-activations", "None"]
    cases.append((resumed, f"--text {tmp_path / 'code.txt'}: has other content than when this run began"))
    for given, want in cases:
        assert want in failure([ROOT / "train.py", *given])
    assert not (tmp_path / "runs").exists() and not (tmp_path / "kept").exists()
    assert (tmp_path / "full" / "thesis.tex").read_text() == "keep me"
