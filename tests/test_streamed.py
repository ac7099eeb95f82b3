"""Training on datasets that are read while it trains, through the real command line, with real files and real kills."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, launch, metrics, one_line_error, open_single, run_script
from processes import Started
from safetensors.torch import load_file

from run import checkpoint
from sources.dataset_files import open_datasets
from sources.streamed import StreamedActivations

SIZES = [(1700, 300), (50, 50), (2300, 1111), (999, 64)]  # rows of each file and of its row groups
MODELS = ("base", "ft")
ROWS, D_MODEL, HELD_OUT, BUFFER = sum(rows for rows, _ in SIZES), 16, 500, 1300


def activations(seed: int = 0) -> np.ndarray:
    """[2, ROWS, D_MODEL] float32 with something to learn: sparse sums of directions that the models nearly share."""
    draw = np.random.default_rng(seed)
    codes = draw.random((ROWS, 24)) * (draw.random((ROWS, 24)) < 0.1)
    basis = draw.normal(size=(24, D_MODEL))
    bases = [basis, basis + 0.3 * draw.normal(size=basis.shape)]
    return np.stack([codes @ b + 0.01 * draw.normal(size=(ROWS, D_MODEL)) for b in bases]).astype(np.float32)


def write(folder: Path, x: np.ndarray, token: np.ndarray | None = None, split: str = "train", groups: int | None = None) -> str:
    """Rows x [rows, D_MODEL] as .parquet files of odd sizes, the last one as long as the rows are."""
    token, start = np.arange(len(x), dtype=np.int32) if token is None else token, 0
    folder.mkdir(parents=True, exist_ok=True)
    for i, (rows, group) in enumerate(SIZES):
        part = slice(start, start + rows)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(x[part].ravel()), D_MODEL)
        table = pa.table({"activation": lists, "token": token[part]})
        if len(table):
            pq.write_table(table, folder / f"{split}-{i:05d}.parquet", row_group_size=groups or group)
        start += rows
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    """The same rows in both models' datasets, in row groups of other sizes."""
    folder, x = tmp_path_factory.mktemp("data"), activations()
    return write(folder / "base", x[0]), write(folder / "ft", x[1], groups=500)


def open_(base: str, ft: str, buffer: int = BUFFER) -> StreamedActivations:
    named = [("--base-dataset", base), ("--ft-dataset", ft)]
    opened = open_datasets(named, (None, None), streaming=True)
    return StreamedActivations(opened, val_tokens=HELD_OUT, buffer_tokens=buffer, seed=0)


def keys(rows: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in rows]


def test_every_row_comes_once_an_epoch_mixed_and_from_any_place_again(data):
    x, n, size, cpu = activations(), ROWS - HELD_OUT, 96, torch.device("cpu")
    source = open_(*data)
    assert np.array_equal(source.validation.numpy(), x[:, :HELD_OUT])
    batches, states = [], [None]
    for batch in source.batches(size, 2 * n, cpu):
        batches.append(batch.x.numpy().copy())
        states.append(json.loads(json.dumps(source.state_dict(batch.position))))
    consumed = np.concatenate(batches)
    first, second, stored = keys(consumed[:n]), keys(consumed[n:]), keys(x[:, HELD_OUT:].swapaxes(0, 1))
    assert sorted(first) == sorted(second) == sorted(stored) and first != second
    row = {key: i for i, key in enumerate(stored)}
    fill_of = np.array([row[key] for key in first]) // (BUFFER // 2)
    in_window_3 = fill_of[BUFFER // 4 + 2 * BUFFER // 2 :][: BUFFER // 2]
    assert set(in_window_3) == {2, 3} and 0.4 < (in_window_3[:300] == 3).mean() < 0.6
    for i in [*range(1, len(batches), 7), len(batches) - 1]:
        state = states[i]
        for first in (i, i + 1):  # the second time from where the resumed stream says that it stands
            again = open_(*data)
            again.load_state_dict(state)
            stream = again.batches(size, 2 * n, cpu, first * size)
            got = [batch.x.numpy().copy() for batch in itertools.islice(stream, 3)]
            assert np.array_equal(np.concatenate(got), consumed[first * size : (first + 3) * size]), first
            state = again.state_dict((i + 1) * size)
            stream.close()
            if i == len(batches) - 1:
                break


RUN = ["--streaming", "--val-tokens", HELD_OUT, "--buffer-tokens", BUFFER, "--batch-size", 64, "--d-hidden", 64]
RUN += ["--compute-dtype", "float32", "--wandb", "disabled", "--l1-coeff", 0.1]


def test_killed_twice_then_resumed_to_the_same_weights(data, tmp_path):
    """SIGKILL in the first epoch and SIGTERM in the second, each in the middle of a window."""
    command = ["--base-dataset", data[0], "--ft-dataset", data[1], *RUN, "--num-tokens", 3 * (ROWS - HELD_OUT) // 2]
    command += ["--output-dir", tmp_path, "--save-every", 10]
    out = run_script("train.py", *command, "--run-name", "straight", check=True)
    assert "ran out after 4,549 rows: epoch 2" in out.stderr + out.stdout and f"in fills of {BUFFER // 2}" in out.stdout
    summary = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert summary["explained_variance"] > 0.5
    run = tmp_path / "killed"
    for extra, step, kill, code in (
        ([*command, "--run-name", "killed"], 35, signal.SIGKILL, -9),
        (["--resume", run], 80, signal.SIGTERM, 143),
    ):
        process = Started(ROOT / "train.py", *extra)
        while not (saved := checkpoint.complete(run)) or int(saved[-1].name.removeprefix("step_")) < step:
            assert process.poll() is None, process.output()
            time.sleep(0.002)
        process.send_signal(kill)
        errors = process.communicate()[1]
        assert process.returncode == code and "Traceback" not in errors, errors
        state = checkpoint.read(checkpoint.find(run))[1]["stream"]
        assert state["epoch"] == (kill == signal.SIGTERM) and state["window"] > 0 and state["served"] > 0
    run_script("train.py", "--resume", run, check=True)
    first, second = (load_file(tmp_path / name / "crosscoder" / "model.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("straight", "killed")]
    straight, killed = ([(line["step"], line.get("loss")) for line in map(json.loads, of_run)] for of_run in lines)
    steps = {step for step, _ in straight}
    assert [line for line in killed if line[0] in steps] == straight  # the step it was stopped at may have a line of its own


def test_two_processes_train_on_the_same_rows_as_one(data, tmp_path):
    flags = ["--base-dataset", data[0], "--ft-dataset", data[1], *RUN, "--num-tokens", 6000, "--log-every", 1, "--lr", 1e-3]
    for n in (1, 2):
        launch(n, "train.py", *flags, "--output-dir", tmp_path, "--run-name", n)
    one, two = (metrics(tmp_path / n) for n in "12")
    assert [line["tokens"] for line in one[:-1]] == [line["tokens"] for line in two[:-1]]
    assert [line["loss"] for line in one[:60]] == pytest.approx([line["loss"] for line in two[:60]], rel=1e-3)


def test_held_out_rows_come_from_the_validation_split_and_analysis_finds_them(data, tmp_path):
    x = activations(1)
    names = [write(tmp_path / m, part) for m, part in zip(MODELS, activations(), strict=True)]
    for name, part in zip(names, x, strict=True):
        write(Path(name), part[:800], split="validation")
    source = open_(*names)
    assert np.array_equal(source.validation.numpy(), x[:, :HELD_OUT])
    # without one, the analysis of a streamed run holds out the rows that the run did
    stored = open_single(*data, (None, None), HELD_OUT, 0, 0)
    stored.hold_out_first()
    out = torch.empty(2, HELD_OUT, D_MODEL)
    stored.gather("validation", np.arange(HELD_OUT), out)
    assert torch.equal(out, open_(*data).validation)
    stored.gather("train", np.arange(3), out := torch.empty(2, 3, D_MODEL))
    assert np.array_equal(out.numpy(), activations()[:, HELD_OUT : HELD_OUT + 3])


def test_pairs_with_nan_are_dropped_and_counted(tmp_path):
    x = activations()
    x[1, [1000, 2500, 4000], 3] = np.nan
    names = [write(tmp_path / m, part) for m, part in zip(MODELS, x, strict=True)]
    command = ["--base-dataset", names[0], "--ft-dataset", names[1], *RUN, "--num-tokens", ROWS - HELD_OUT]
    run_script("train.py", *command, "--output-dir", tmp_path, "--run-name", "a", check=True)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert (summary["rows_dropped"], summary["tokens"]) == (3, ROWS - HELD_OUT - 3)
    x[0, 3000:3010, 1] = np.inf
    write(tmp_path / "base", x[0])
    failed = run_script("train.py", *command, "--output-dir", tmp_path, "--run-name", "b")
    assert "rows read hold NaN or inf in one of the models, more than 0.1%" in one_line_error(failed, "train.py")


def test_bad_input_gives_one_line(data, tmp_path):
    x = activations()
    short = write(tmp_path / "short", x[1][:-700])
    token = np.arange(ROWS, dtype=np.int32)
    token[3333] = 7
    other = write(tmp_path / "other", x[1], token)
    broken = Path(write(tmp_path / "broken", x[1]))
    (broken / "train-00002.parquet").write_bytes(os.urandom(1000))
    wide = tmp_path / "wide.parquet"
    pq.write_table(pa.table({"activation": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8 * ROWS)), 8)}), wide)
    (tmp_path / "saved").mkdir()
    base, budget = ["--base-dataset", data[0]], ["--num-tokens", 9000]
    cases = [
        ([], "--streaming reads datasets over the network: give --dataset"),
        ([*base, "--ft-dataset", data[1]], "--streaming: the length of the streams is not known before their end, give --num-"),
        ([*base, "--ft-dataset", data[1], "--epochs", 2], "give --num-tokens"),
        ([*base, "--ft-dataset", short, *budget], f"--ft-dataset ends after {ROWS - 700} rows and --base-dataset goes on"),
        ([*base, "--ft-dataset", other, *budget], "are not aligned: token of row 3333 (split train) is 3333 in the base"),
        ([*base, "--ft-dataset", broken, *budget], "--ft-dataset: cannot be read on (split train, after row "),
        ([*base, "--ft-dataset", wide, *budget], "has activations of width 16 and --ft-dataset of width 8"),
        ([*base, "--ft-dataset", tmp_path / "none", *budget], "none: no such file or folder"),
        (
            [*base, "--ft-dataset", tmp_path / "saved", *budget],
            "saved: lies on this disk, where it is read in place; leave out",
        ),
        (["--dataset", tmp_path / "saved", *budget], "saved: lies on this disk, where it is read in place; leave out"),
        ([*base, "--ft-dataset", data[1], *budget, "--buffer-tokens", 1], "--buffer-tokens 1: must be at least 4"),
        ([*base, "--ft-dataset", data[1], *budget, "--buffer-tokens", 10**12], "lower it or --val-tokens"),
        ([*base, "--ft-dataset", data[1], *budget, "--val-tokens", ROWS], "gives no two rows to train on"),
        ([*base, "--ft-dataset", data[1], *budget, "--val-tokens", ROWS - 1], "gives no two rows to train on"),
        ([*base, "--ft-dataset", data[1], *budget, "--val-tokens", 1], "--val-tokens 1: must be at least 2"),
    ]
    for i, (flags, want) in enumerate(cases):
        failed = run_script("train.py", *RUN, *flags, "--output-dir", tmp_path / "runs", "--run-name", i)
        assert want in one_line_error(failed, "train.py")


@pytest.mark.parametrize(
    ("other", "want"),
    [
        ("swapped", "the models' activations have changed places since the run began"),
        ("held-out", "the activations of model B (A: base, B: fine-tuned) are not those that the run began with"),
        ("trained on", "--base-dataset: gives other rows than when the run began"),
    ],
)
def test_a_run_does_not_go_on_with_other_rows(tmp_path, other, want):
    x = activations()
    names = [write(tmp_path / m, part) for m, part in zip(MODELS, x, strict=True)]
    flags = ["--base-dataset", names[0], "--ft-dataset", names[1], *RUN, "--num-tokens", 2000, "--output-dir", tmp_path]
    run_script("train.py", *flags, "--run-name", "a", check=True)
    new = x[::-1] if other == "swapped" else x.copy()
    new[1][:HELD_OUT] *= 2 if other == "held-out" else 1
    new[1][HELD_OUT:] *= 2 if other == "trained on" else 1
    for m, part in zip(MODELS, new, strict=True):
        write(tmp_path / m, part)
    failed = run_script("train.py", "--resume", tmp_path / "a", "--num-tokens", 4000)
    assert want in one_line_error(failed, "train.py")
