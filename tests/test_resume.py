"""Runs that are killed, stopped, made longer or taken up from another folder: what is lost, and that nothing is."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers import QUICK, SMALL, assert_same_weights, metrics, one_line_error, run_script, start, train, wait_for_step

from run import checkpoint, resume


@pytest.mark.parametrize(
    "recipe",
    [
        ["--l1-coeff", 1],
        [
            *["--variant", "batch_topk", "--k", 4, "--k-start", 2, "--d-hidden", 512],
            *["--dec-init-norm", 0.01, "--dead-window", 0.05],
        ],
    ],
    ids=["vanilla", "batch_topk with aux"],
)
def test_killed_three_times_and_resumed_ends_with_the_same_bits(pair, tmp_path, recipe, monkeypatch):
    recipe = [
        *["--dataset", pair, *QUICK, "--batch-size", 128, "--num-tokens", 25_600, "--val-tokens", 512],
        *["--save-every", 40, "--log-every", 5, "--val-every", 50, *recipe],
    ]
    if "batch_topk" not in recipe:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # several threads must not cost exactness
    straight = train(tmp_path, "straight", *recipe)
    run = tmp_path / "killed"
    process = start(tmp_path, "killed", *recipe)
    for step in (45, 90, 145):
        wait_for_step(process, run, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (run / "crosscoder").exists()
        process = start(tmp_path, "killed", "--resume", "auto")
    assert process.communicate()[0].count("resumed") == 1 and process.returncode == 0
    assert_same_weights(straight, run)
    if "batch_topk" in recipe:
        assert any(m.get("aux_loss", 0) > 0 for m in metrics(straight))
    kept = [
        [(m["step"], m.get("loss"), m.get("val_loss"), m.get("dead_fraction")) for m in metrics(r)] for r in (straight, run)
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_leave(tmp_path, number):
    straight = train(tmp_path, "straight", *SMALL, "--num-tokens", 32_000)
    process = start(tmp_path, "stopped", *SMALL, "--num-tokens", 32_000, "--save-every", 10_000)
    run = tmp_path / "stopped"
    wait_for_step(process, run, 20)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert f"python train.py --resume {run}" in printed and len(checkpoint.complete(run)) == 1
    train(tmp_path, "stopped", "--resume", run)
    assert_same_weights(straight, run)


def test_a_signal_during_validation_is_saved_too(tmp_path):
    flags = [*QUICK, "--num-tokens", 32_000, "--save-every", 10_000]
    flags += ["--val-every", 30, "--val-tokens", 100_000, "--log-every", 29]
    process = start(tmp_path, "a", *flags)
    wait_for_step(process, tmp_path / "a", 29)
    time.sleep(0.3)  # the next step validates on 1,563 batches
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(checkpoint.complete(tmp_path / "a")) == 1 and "saved at step" in printed


def test_two_runs_of_one_name_at_once(tmp_path):
    processes = [start(tmp_path, "same", *SMALL, "--seed", seed) for seed in (0, 1)]
    outcomes = [(p.communicate(timeout=120)[1], p.returncode) for p in processes]
    assert sorted(code for _, code in outcomes) == [0, 1]
    (refused,) = (errors for errors, code in outcomes if code)
    assert "same exists; choose another name" in refused and "Traceback" not in refused


def test_a_run_that_another_process_writes_is_refused(tmp_path):
    run = train(tmp_path, "a", *SMALL)
    handle = resume.lock(run)
    result = run_script("train.py", "--resume", run, "--num-tokens", 9600)
    os.close(handle)
    assert "another process is writing" in one_line_error(result, "train.py")


def test_resume_refuses_another_dataset_and_finds_a_moved_one(tmp_path):
    def write(folder, rows):
        for name in ("b", "f"):
            x = np.random.default_rng(0).normal(size=(rows, 8)).astype("float32")
            Dataset.from_dict({"x": x.tolist()}).save_to_disk(str(folder / name))
        return ["--base-dataset", folder / "b", "--ft-dataset", folder / "f"]

    run = train(tmp_path, "a", *QUICK, "--val-tokens", 100, "--epochs", 2, *write(tmp_path / "data", 1000))
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = ["--base-dataset", tmp_path / "moved" / "b", "--ft-dataset", tmp_path / "moved" / "f"]
    train(tmp_path, "a", "--resume", run, *moved, "--epochs", 3)
    assert len([m for m in metrics(run) if "loss" not in m]) == 1  # one end, although the run ended twice
    (tmp_path / "moved").rename(tmp_path / "again")  # under other flags, too
    again = ["--model-dataset", tmp_path / "again" / "b", "--model-dataset", tmp_path / "again" / "f"]
    train(tmp_path, "a", "--resume", run, *again, "--base-dataset", "None", "--ft-dataset", "None", "--epochs", 4)
    result = run_script("train.py", "--resume", run, *write(tmp_path / "data", 900))
    assert "the data has train_rows 800 and had 900 when the run began" in one_line_error(result, "train.py")


def paired_rows(folder: Path, rows: int = 1000, seed: int = 0) -> list[Path]:
    """Two datasets of random rows of 8 values, saved in folder/b and folder/f."""
    draw = np.random.default_rng(seed)
    for name in "bf":
        x = draw.normal(size=(rows, 8)).astype("float32")
        Dataset.from_dict({"x": x.tolist()}).save_to_disk(str(folder / name))
    return [folder / "b", folder / "f"]


@pytest.mark.parametrize("kind", ["singles", "several", "paired"])
def test_resume_refuses_other_rows_of_the_same_shape(tmp_path, kind):
    def flags(base, ft):
        if kind == "several":
            return ["--model-dataset", base, "--model-dataset", ft, "--model-dataset", b]
        if kind == "singles":
            return ["--base-dataset", base, "--ft-dataset", ft]
        folder = tmp_path / f"{base.parent.name}-{base.name}{ft.name}"
        folder.mkdir()
        (folder / "base").symlink_to(base)
        (folder / "ft").symlink_to(ft)
        (folder / "pair.json").write_text('{"stored_scale": [1.0, 1.0]}')
        return ["--dataset", folder]

    (b, f), (_, f2) = paired_rows(tmp_path / "one"), paired_rows(tmp_path / "two", seed=1)
    run = train(tmp_path, "a", *QUICK, "--val-tokens", 100, "--epochs", 2, *flags(b, f))

    def refused(base, ft):
        result = run_script("train.py", "--resume", run, "--epochs", 3, *flags(base, ft))
        return one_line_error(result, "train.py")

    assert "the models' activations have changed places since the run began" in refused(f, b)
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "unused")
    (tmp_path / "two" / "b").symlink_to(b)
    assert "the activations of model B (A: base, B: fine-tuned) are not those that" in refused(tmp_path / "two" / "b", f2)


def test_a_run_from_before_data_had_a_fingerprint_goes_on_as_it_began(tmp_path):
    base, ft = paired_rows(tmp_path)
    flags = [*QUICK, "--val-tokens", 100, "--base-dataset", base, "--ft-dataset", ft, "--save-every", 10]
    run = train(tmp_path, "a", *flags, "--epochs", 2)
    record = json.loads((run / "config.json").read_text())
    for name in ("fingerprint", "median_norm"):
        del record["data"][name]
    (run / "config.json").write_text(json.dumps(record))
    newest = checkpoint.complete(run)[-1]
    state, index = (json.loads((newest / f"{name}.json").read_text()) for name in ("state", "index"))
    (newest / "state.json").write_text(json.dumps(state | {"dropped": 0}))  # which then was a number
    checkpoint.write_index(newest, {name: index[name] for name in ("format", "d_hidden", "by_latent", "slices")})
    result = run_script("train.py", "--resume", run, "--epochs", 3, check=True)
    assert "norms " not in result.stdout and json.loads((run / "summary.json").read_text())["tokens"] == 2700


def test_resume_from_another_folder_with_relative_paths(pair, tmp_path):
    (tmp_path / "pair").symlink_to(pair)
    flags = ["--dataset", "pair", *QUICK, "--num-tokens", 1000, "--output-dir", "runs", "--run-name", "a"]
    run_script("train.py", *flags, cwd=tmp_path, check=True)
    (tmp_path / "elsewhere").mkdir()
    run_script("train.py", "--resume", "../runs/a", "--num-tokens", "2000", cwd=tmp_path / "elsewhere", check=True)
    assert metrics(tmp_path / "runs" / "a")[-1]["step"] == 32


def test_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run_script("train.py", "--output-dir=~/runs", "--run-name", "a", *SMALL, cwd=tmp_path, check=True)
    run_script("train.py", "--resume=~/runs/a", cwd=tmp_path, check=True)
    assert (tmp_path / "runs" / "a" / "summary.json").exists() and not (tmp_path / "~").exists()


def test_a_run_without_its_config_is_refused(tmp_path):
    run = train(tmp_path, "a", *SMALL)
    (run / "config.json").write_text("{}")
    assert "config.json is missing or broken" in one_line_error(run_script("train.py", "--resume", run), "train.py")


def test_a_run_ends_with_a_checkpoint_of_its_last_step_even_in_the_middle_of_a_batch(pair, tmp_path):
    run = train(tmp_path, "a", "--dataset", pair, *QUICK, "--num-tokens", 1000, "--save-every", 7)
    assert metrics(run)[-1]["step"] == 16 and checkpoint.complete(run)[-1].name == "step_00000016"
    assert json.loads((run / "summary.json").read_text())["tokens"] == 1000


def test_a_finished_run_can_be_made_longer(tmp_path):
    run = train(tmp_path, "a", *SMALL)
    train(tmp_path, "a", "--resume", run, "--num-tokens", 9600)
    assert metrics(run)[-1]["step"] == 150 and [p.name for p in checkpoint.complete(run)][-1] == "step_00000150"


def test_resume_from_an_older_checkpoint(tmp_path):
    straight = train(tmp_path, "straight", *SMALL)
    run = train(tmp_path, "a", *SMALL, "--keep-checkpoints", 10)
    train(tmp_path, "a", "--resume", run / "checkpoints" / "step_00000040")
    assert_same_weights(straight, run)
    assert [m["step"] for m in metrics(run)] == [m["step"] for m in metrics(straight)]


def test_resume_auto_starts_fresh_when_there_is_nothing(tmp_path):
    result = run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *SMALL, "--resume", "auto", check=True)
    assert "holds no checkpoint, starting fresh" in result.stdout and (tmp_path / "a" / "summary.json").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["finished", "half-saved", "stopped", "another project's", "notes"])
def test_resume_auto_overwrites_nothing(tmp_path, what):
    """A finished run and a stopped one whose checkpoints were deleted to save space, and folders that are no run."""
    run, said = tmp_path / "a", "is finished"
    if what in ("another project's", "notes"):
        run.mkdir()
        name, said = ("config.json", "no run that can go on") if what != "notes" else ("notes.txt", "config.json is missing")
        (run / name).write_text('{"model_type": "llama"}')
    else:
        train(tmp_path, "a", *SMALL)
        shutil.rmtree(run / "checkpoints")
        if what != "finished":
            (run / "summary.json").unlink()
        if what == "stopped":
            shutil.rmtree(run / "crosscoder")
            (run / "checkpoints").symlink_to(tmp_path / "not mounted")
            said = "was at step 100"
    before = contents(run)
    result = run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *SMALL, "--seed", 1, "--resume", "auto")
    message = one_line_error(result, "train.py")
    assert said in message and "choose another --run-name" in message and contents(run) == before
    assert "holds no complete checkpoint" in one_line_error(run_script("train.py", "--resume", run), "train.py")
    assert contents(run) == before


def test_resume_auto_begins_again_what_was_killed_before_its_first_checkpoint(tmp_path):
    straight = train(tmp_path, "straight", *SMALL)
    process, run = start(tmp_path, "a", *SMALL, "--save-every", 80, "--val-tokens", 100_000), tmp_path / "a"
    wait_for_step(process, run, 20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "checkpoints").exists() and len(metrics(run)) > 1
    train(tmp_path, "a", *SMALL, "--resume", "auto")
    assert_same_weights(straight, run)
    assert [m["step"] for m in metrics(run)] == [m["step"] for m in metrics(straight)]


def test_a_requeued_job_that_comes_late_does_not_begin_again_what_another_has_finished(tmp_path):
    late = start(tmp_path, "a", *SMALL, "--val-tokens", 300_000, "--seed", 1, "--resume", "auto")
    while "starting fresh" not in late.output()[0]:
        assert late.poll() is None
        time.sleep(0.001)
    late.send_signal(signal.SIGSTOP)
    run = tmp_path / "a"
    assert not run.exists()
    train(tmp_path, "a", *SMALL)
    before = contents(run)
    late.send_signal(signal.SIGCONT)
    _, errors = late.communicate(timeout=60)
    assert late.returncode == 1 and "a is finished and is not begun again" in errors and contents(run) == before


@pytest.mark.parametrize("how", [["--resume", "auto"], ["--resume", "a"]])
def test_a_finished_run_says_that_it_is_finished(tmp_path, how):
    run = train(tmp_path, "a", *SMALL)
    before = contents(run / "crosscoder")
    result = run_script("train.py", "--output-dir", ".", "--run-name", "a", *how, cwd=tmp_path, check=True)
    assert "finished all its steps are done" in result.stdout and contents(run / "crosscoder") == before


def test_a_run_renamed_while_stopped(tmp_path):
    """A process that sleeps meanwhile does not make the folder of the old name again; another goes on under the new name."""
    process, run = start(tmp_path, "a", *SMALL, "--num-tokens", 64_000, "--log-every", 1000), tmp_path / "a"
    while not checkpoint.complete(run):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    run.rename(tmp_path / "b")
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "could not be written" in errors and not run.exists()
    train(tmp_path, "b", "--resume", tmp_path / "b", "--num-tokens", 9600)
    assert metrics(tmp_path / "b")[-1]["step"] == 150


def test_checkpoints_on_another_disk(tmp_path):
    """checkpoints/ is a link, then each step in it; named directly, the run is still the one whose name was given."""
    run, disk = train(tmp_path, "a", *SMALL), tmp_path / "disk" / "runs"
    (tmp_path / "latest").symlink_to(checkpoint.complete(run)[-1])
    train(tmp_path, "a", "--resume", tmp_path / "latest")
    disk.mkdir(parents=True)
    (run / "checkpoints").rename(disk / "checkpoints")
    (run / "checkpoints").symlink_to(disk / "checkpoints")
    train(tmp_path, "a", "--resume", run / "checkpoints" / "step_00000080")
    assert not (disk / "metrics.jsonl").exists() and metrics(run)[-1]["step"] == 100
    for folder in (steps := checkpoint.complete(run)):
        (folder.resolve().rename(tmp_path / "disk" / folder.name), folder.symlink_to(tmp_path / "disk" / folder.name))
    train(tmp_path, "a", "--resume", "auto", "--num-tokens", 16_000)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000240", "step_00000250"}
    assert all((tmp_path / "disk" / folder.name / "index.json").exists() for folder in steps)  # what a link leads to stays


def test_resumed_run_refuses_another_recipe(tmp_path):
    run = train(tmp_path, "a", *SMALL, "--lr", 0.005)
    other = str(run / "crosscoder")  # a setting that the run began without is another recipe too
    for flag, value, was in (("--lr", "0.5", "0.005"), ("--init-from", other, "None")):
        result = run_script("train.py", "--resume", run, flag, value)
        assert f"{flag} is {value} and was {was} when the run began" in one_line_error(result, "train.py")


def test_wandb_run_keeps_its_id(tmp_path):
    flags = ["--num-tokens", 3200, "--d-hidden", 64, "--batch-size", 64, "--val-tokens", 256, "--wandb", "offline"]
    run = train(tmp_path, "a", *flags)
    train(tmp_path, "a", "--resume", run, "--num-tokens", 6400)
    ids = {p.stem for p in (run / "wandb").glob("offline-run-*/*.wandb")}
    assert len(ids) == 1


def test_wandb_auto_without_a_key_is_offline_and_says_so(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--num-tokens", 640, "--d-hidden", 64, "--batch-size", 64, "--val-tokens", 256]
    result = run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *flags, check=True)
    assert "wandb    offline (no key found)" in result.stdout
    assert list((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"))
