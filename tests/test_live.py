"""Training straight from two models, through the real command line, on real tiny models and with real kills."""

from __future__ import annotations

import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from helpers import ROOT, failure, launch, metrics, run_script
from processes import Started, several
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


BESIDE = """
import runpy, sys
sys.path.insert(0, {root!r})
import sources.live
sources.live.have_own_devices = lambda *_: True
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.parametrize("beside", [False, True], ids=["in turn", "as if the models had devices of their own"])
def test_killed_and_stopped_in_the_middle_of_a_buffer_then_resumed(beside, straight, flags, budget, tmp_path):
    """Once by SIGKILL in the first epoch, once by SIGTERM in the second: the same weights and the same kept files."""
    run, steps, script = tmp_path / "a", metrics(straight)[-1]["step"], ROOT / "train.py"
    if beside:
        script = tmp_path / "train.py"
        script.write_text(BESIDE.format(root=str(ROOT)))
    command = [*flags, *budget, *RUN, "--save-every", 15, "--keep-activations", tmp_path / "kept"]
    for extra, step, kill, code in (
        (["--output-dir", tmp_path, "--run-name", "a", *command], 75, signal.SIGKILL, -9),
        (["--resume", run], steps * 5 // 6, signal.SIGTERM, 143),
    ):
        process = Started(script, *extra)
        wait_for(process, run, step)
        process.send_signal(kill)
        errors = process.communicate()[1]
        assert process.returncode == code and "Traceback" not in errors, errors
        assert ("read ahead" in process.output()[0]) == beside
        state = checkpoint.read(checkpoint.find(run))[1]["stream"]
        assert state["served"] % FILL > 0 and state["window"] > 0 or kill == signal.SIGTERM
        assert state["epoch"] == (0 if kill == signal.SIGKILL else 1)
    run_script(script, "--resume", run, check=True)
    first, second = (load_file(r / "crosscoder" / "model.safetensors") for r in (straight, run))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_same_dataset(tmp_path / "kept", straight.parent / "kept")


# --- several processes


def ended(processes) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each process."""
    return [(process.wait(timeout=200), *process.output()) for process in processes]


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
def test_fifty_steps_of_two_processes_are_those_of_one(variant, flags, tmp_path):
    """Two refills on the way, held-out rows and rows to normalise by included."""
    given = [*flags, *RUN, "--num-tokens", 50 * 256, "--compute-dtype", "float32", "--log-every", 1, "--val-every", 20]
    given += ["--variant", variant, *(["--k", 8] if variant == "batch_topk" else []), "--output-dir", tmp_path]
    for n, start in ((1, run_script), (2, partial(launch, 2))):
        done = start("train.py", *given, "--run-name", n, check=True)
        assert done.stdout.count("memory   base model") == done.stdout.count("data     ") == 1
    one, two = (metrics(tmp_path / str(n)) for n in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two] and one[-2]["step"] == 50
    for mine, other in zip(one, two, strict=True):
        for name in mine.keys() - {"time", "tokens_per_second", "data_wait_fraction", "model_fraction"}:
            assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=2e-3), (mine["step"], name)
    assert all(0 <= line["model_fraction"] <= 1 for line in two if "loss" in line)
    first, second = (json.loads((tmp_path / str(n) / "config.json").read_text())["data"] for n in (1, 2))
    assert first == second  # held-out rows, scales, medians


def test_killed_with_two_processes_resumed_with_three_and_with_one(straight, flags, budget, tmp_path):
    """One of two is killed in the first epoch, three are stopped in the second, one ends: no row is lost or read twice."""
    run, steps = tmp_path / "a", metrics(straight)[-1]["step"]
    command = [*flags, *budget, *RUN, "--save-every", 15, "--keep-activations", tmp_path / "kept"]
    for n, extra, step, kill, code in (
        (2, ["--output-dir", tmp_path, "--run-name", "a", *command], 75, signal.SIGKILL, -9),
        (3, ["--resume", run], steps * 5 // 6, signal.SIGTERM, 143),
    ):
        processes = several(n, ROOT / "train.py", *extra)
        wait_for(processes[0], run, step)
        processes[-1].send_signal(kill)
        outcomes = ended(processes)
        assert not any("Traceback" in errors for _, _, errors in outcomes), outcomes
        assert [status for status, *_ in outcomes] == ([1, -9] if code == -9 else [code] * n), outcomes
        state = checkpoint.read(checkpoint.find(run))[1]["stream"]
        assert state["window"] > 0 and state["epoch"] == (0 if kill == signal.SIGKILL else 1)
    run_script("train.py", "--resume", run, check=True)
    assert_same_dataset(tmp_path / "kept", straight.parent / "kept")
    first, second = (json.loads((r / "summary.json").read_text()) for r in (straight, run))
    assert second["explained_variance"] == pytest.approx(first["explained_variance"], abs=2e-3)
    assert second["tokens"] == first["tokens"]


COUNTED = """
import os, runpy, sys
sys.path.insert(0, {root!r})
from collecting.paired_rows import PairedModels
rows = PairedModels.rows

def counted(self, draw, hooks):
    print(*[s.index for batch in draw.batches for s in batch], file=open({folder!r} + "/read-by-" + os.environ["RANK"], "a"))
    return rows(self, draw, hooks)

PairedModels.rows = counted
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_two_processes_share_the_texts_and_killed_and_resumed_end_with_the_same_bits(flags, tmp_path):
    (tmp_path / "train.py").write_text(COUNTED.format(folder=str(tmp_path), root=str(ROOT)))
    command = [*flags, *RUN, "--num-tokens", 120 * 256, "--save-every", 15, "--output-dir", tmp_path]
    assert not any(status for status, *_ in ended(several(2, tmp_path / "train.py", *command, "--run-name", "whole")))
    read = [set(map(int, (tmp_path / f"read-by-{rank}").read_text().split())) for rank in (0, 1)]
    assert not read[0] & read[1] and abs(len(read[0]) - len(read[1])) <= 2 * MODEL_BATCH  # held-out and training sequences
    assert len(read[0] | read[1]) == max(read[0] | read[1]) + 1  # none is left out
    processes = several(2, ROOT / "train.py", *command, "--run-name", "killed")
    wait_for(processes[1], tmp_path / "killed", 75)
    processes[0].send_signal(signal.SIGKILL)
    ended(processes)
    assert not any(status for status, *_ in ended(several(2, ROOT / "train.py", "--resume", tmp_path / "killed")))
    first, second = (load_file(tmp_path / name / "crosscoder" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


AT_HOME = """
import os, runpy
os.environ["HOME"] = {folder!r} + "/" + os.environ["RANK"]
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_what_several_processes_cannot_have_is_refused(flags, tmp_path):
    """A model on a device of its own; other texts on another machine."""
    (tmp_path / "train.py").write_text(AT_HOME.format(folder=str(tmp_path), root=str(ROOT)))
    for rank, words in enumerate(("a few words " * 2000, "other words " * 2000)):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "words.txt").write_text(words)
    given = [*flags, "--num-tokens", 50_000, "--output-dir", tmp_path / "runs", "--d-hidden", 64]
    for more, want in (
        (["--ft-device", "cpu"], "--base-device, --ft-device: each of several processes has one device"),
        (["--text", "~/words.txt"], "--text: not all processes read the same files; give each machine the same"),
        (["--keep-activations", tmp_path], "is not empty and holds no collection"),
    ):
        (status, _, errors), (other, _, more_errors) = ended(several(2, tmp_path / "train.py", *given, *more))
        (line,) = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
        assert status == other == 1 and want in line and "Traceback" not in errors + more_errors
    assert not (tmp_path / "runs").exists()


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
