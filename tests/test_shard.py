"""Real processes over gloo: training with several gives what training with one gives."""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, launch, metrics, numbered, one_line_error, open_single, run_script, torchrun, write
from processes import Started, several
from safetensors.torch import load_file

from crosscoder import CrossCoder
from ops.shard import Shard
from run import checkpoint
from sources.batches import STATISTICS_ROWS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What 1, 2 and 4 processes made of the same fifty steps, and 1 and 4 of the last thirty from the checkpoint of 2."""
    made = tmp_path_factory.mktemp("steps")
    launch(2, "tests/sharded_steps.py", made / "2")
    for n in (1, 4):
        launch(n, "tests/sharded_steps.py", made / str(n), made / "2")
    return made


def metrics_and_weights(folder):
    weights, _ = checkpoint.read(checkpoint.find(folder))
    return load_file(folder / "steps.safetensors")["metrics"], weights


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
@pytest.mark.parametrize("n", [2, 4])
def test_fifty_steps_of_several_processes_are_those_of_one(folders, n, variant):
    expected, weights = metrics_and_weights(folders / "1" / variant)
    assert (expected[:, 3] > 0).any() and (expected[:, -1] > 0).any()  # the auxiliary loss was at work
    assert expected[9, -2] > expected[20, -2] + 2 and expected[20, -2] > expected[30, -2]  # and idle latents were resampled
    assert expected[9, -3] >= 4 and expected[30, -3] < expected[9, -3]  # and copies, each of a latent in another process
    found, found_weights = metrics_and_weights(folders / str(n) / variant)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found_weights.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found_weights[name], value, rtol=1e-9, atol=1e-9)
    saved = load_file(folders / str(n) / variant / "crosscoder" / "model.safetensors")  # whole, as one process writes it
    torch.testing.assert_close(saved["W_enc"].double(), weights["enc_rows"].permute(1, 2, 0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(saved["W_dec"].double(), weights["W_dec"], rtol=1e-6, atol=1e-6)
    assert len(list((folders / str(n) / variant / "checkpoints" / "step_00000050").glob("latents_*"))) == n


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
@pytest.mark.parametrize("n", [1, 4])
def test_saved_by_two_resumed_by_others(folders, n, variant):
    expected, weights = metrics_and_weights(folders / "1" / variant)
    found, found_weights = metrics_and_weights(folders / str(n) / f"{variant}-resumed")
    torch.testing.assert_close(found, expected[20:], rtol=1e-9, atol=1e-9)
    for name, value in weights.items():
        torch.testing.assert_close(found_weights[name], value, rtol=1e-9, atol=1e-9)


PLANTED = ["--wandb", "disabled", "--num-tokens", 16_000, "--d-hidden", 256, "--batch-size", 160, "--log-every", 10]
PLANTED += ["--val-tokens", 2000, "--compute-dtype", "float32", "--dead-window", 0.2]


def test_train_under_torchrun(tmp_path):
    """The command line: metrics as with one process, one whole crosscoder, one line a logged step, one summary."""
    flags = [*PLANTED, "--output-dir", tmp_path]  # vanilla: in float32 a selection flips a code now and then
    launch(1, "train.py", *flags, "--run-name", "one")
    process = torchrun(2, "train.py", *flags, "--run-name", "two")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, other in zip(one, two, strict=True):
        if mine["step"] > 50:  # further on rounding drives them apart
            break
        for name in ("loss", "l2_loss", "l1_loss", "l0_loss", "grad_norm", "explained_variance", "threshold", "dead_fraction"):
            assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=2e-3), (mine["step"], name)
    assert one[-1]["val_loss"] == pytest.approx(two[-1]["val_loss"], rel=1e-2)
    assert len(list((tmp_path / "two" / "checkpoints").glob("*/latents_*.safetensors"))) == 2


def test_a_run_of_two_processes_goes_on_with_one(tmp_path):
    flags = [*PLANTED, "--variant", "batch_topk", "--k", 8, "--output-dir", tmp_path, "--run-name", "a", "--save-every", 40]
    launch(2, "train.py", *flags, "--num-tokens", 8_000)
    result = launch(1, "train.py", "--resume", tmp_path / "a", "--num-tokens", 16_000)
    assert "resumed" in result.stdout and metrics(tmp_path / "a")[-1]["step"] == 100


def test_bytes_sent_do_not_depend_on_the_dictionary(tmp_path):
    script = """
import sys, torch
sys.path.insert(0, {root!r})
from crosscoder import CrossCoder
from ops.shard import Shard
shard = Shard.of_torchrun()
shard.join(torch.device("cpu"))
for d_hidden in (4096, 32768):
    crosscoder = CrossCoder(16, d_hidden, 2, "batch_topk", 8, shard=shard)
    before = shard.sent
    x = shard.gather_rows(torch.randn(64, 2, 16)[shard.part(64)])
    crosscoder.losses(x, 0.1, 0.5, torch.ones(len(crosscoder.b_enc), dtype=torch.bool)).loss.backward()
    if shard.rank == 0:
        print("sent", shard.sent - before)
"""
    (tmp_path / "sent.py").write_text(script.format(root=str(ROOT)))
    result = launch(2, tmp_path / "sent.py")
    sent = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("sent")]
    assert len(sent) == 2 and sent[0] == sent[1] > 0


USE = """
import os, sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
sys.path.insert(0, {root!r})
from crosscoder import CrossCoder

def use(seed):
    x = torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(seed))
    crosscoder = CrossCoder(16, 40, 2, "batch_topk", 4)
    out = crosscoder.losses(x, 0.1, 0.5, torch.ones(40, dtype=torch.bool))
    out.loss.backward()
    crosscoder.fit_threshold(lambda: [x])
    folder = {folder!r} + str(seed) + "-of-" + os.environ.get("RANK", "0")  # both processes save this seed
    crosscoder.save_pretrained(folder)
    crosscoder = CrossCoder.from_pretrained(folder).fold_normalization()
    return dict(loss=out.loss.detach(), x_hat=crosscoder(x).detach(), threshold=crosscoder.threshold)

if __name__ == "__main__":
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for seed in range(rank, 3):  # each its own rows, and not equally often
        save_file(use(seed), {folder!r} + "{{}}.{{}}".format(seed, rank))
    if dist.is_initialized():
        dist.destroy_process_group()
"""


@pytest.mark.parametrize("group", [True, False], ids=["in a process group", "WORLD_SIZE alone"])
def test_a_crosscoder_without_a_shard_is_whole_in_any_distributed_program(tmp_path, group, monkeypatch):
    script = tmp_path / "use.py"
    script.write_text(USE.format(root=str(ROOT), folder=f"{tmp_path}/"))
    if not group:
        monkeypatch.setenv("WORLD_SIZE", "2")
    processes = several(2, script) if group else [Started(script)]
    outcomes = ends(processes)
    assert not any(status for status, _, _ in outcomes), outcomes
    for seed in range(3):
        expected = runpy.run_path(str(script))["use"](seed)
        for rank in range(min(seed + 1, len(processes))):
            found = load_file(f"{tmp_path}/{seed}.{rank}")
            assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("size, flag, index", [(1, "cuda", 0), (1, "cuda:1", 1), (2, "cuda", 1)])
def test_the_device_of_a_process_is_the_current_one(size, flag, index, monkeypatch):
    """Calls of CUDA that name no device, as Triton's, then go to it. A GPU is not needed: what would be set is looked at."""
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda *args, **options: None)
    assert [Shard(0, size).join(torch.device(flag))] == chosen == [torch.device("cuda", index)]
    if size > 1:
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ValueError, match="no CUDA device, there are 2: torchrun --nproc-per-node 2"):
            Shard(0, size).join(torch.device(flag))


# --- faults; without torchrun nothing ends a process but what it finds out itself


def ends(processes) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each process."""
    return [(process.wait(timeout=120), *process.output()) for process in processes]


def wait_for(file, processes) -> None:
    """Waits for something in a file that one of the processes writes."""
    while not file.exists() or not file.stat().st_size:
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.02)


def logged(run, processes) -> None:
    """Waits for the first line of metrics."""
    wait_for(run / "metrics.jsonl", processes)


DISTURBED = """
import os, runpy, sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
import crosscoder
from ops import shard
from run import checkpoint
from sources import opening
assert shard.TIMEOUT <= timedelta(seconds=60)
shard.TIMEOUT = shard.WHILE_ONE_WORKS = timedelta(seconds=5)
rank = int(os.environ["RANK"])

def delay(place, name, seconds, call=1):
    calls, function = [], getattr(place, name)
    def delayed(*args, **options):
        calls.append(name)
        if len(calls) == call:
            print("here", file=open({folder!r} + "/here", "w"), flush=True)
            time.sleep(seconds)
        return function(*args, **options)
    setattr(place, name, delayed)

{disturbance}
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def disturbed(n: int, tmp_path, disturbance: str, *flags):
    """n processes of train.py, called "a", in which the given code has run before. A minute and an hour are 5 seconds."""
    (tmp_path / "train.py").write_text(DISTURBED.format(root=str(ROOT), folder=str(tmp_path), disturbance=disturbance))
    return several(n, tmp_path / "train.py", *PLANTED, "--output-dir", tmp_path, "--run-name", "a", *flags)


@pytest.mark.parametrize(
    "where, call, how, lost, resumed",
    [
        ("shard.Shard, 'join'", 1, signal.SIGKILL, 1, None),
        ("opening, 'open_source'", 1, signal.SIGKILL, 0, None),
        ("crosscoder.CrossCoder, 'losses'", 2, signal.SIGKILL, 1, None),
        ("crosscoder.CrossCoder, 'losses'", 2, signal.SIGSTOP, 1, None),
        ("checkpoint, 'save_file'", 2, signal.SIGKILL, 1, 40),  # in the second save
        ("checkpoint, 'save_file'", 4, signal.SIGSTOP, 0, 40),
        ("crosscoder.CrossCoder, 'save_pretrained'", 1, signal.SIGKILL, 0, 100),
    ],
)
def test_a_lost_process_ends_the_others_with_a_sentence(tmp_path, where, call, how, lost, resumed):
    """One that is killed, and one that falls silent, in each phase; the others then go on from what was saved before."""
    processes = disturbed(2, tmp_path, f"if rank == {lost}: delay({where}, 30, {call})", "--save-every", 40)
    try:
        wait_for(tmp_path / "here", processes)
        processes[lost].send_signal(how)
        ((status, _, errors),) = ends([processes[1 - lost]])
    finally:
        processes[lost].process.kill()
    (message,) = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
    assert status == 1 and "Traceback" not in errors
    if "join" in where:
        assert "the 2 processes of this run did not find each other" in message and "--standalone" in message
    else:
        assert "another process of this run has ended, or has not answered" in message and "--resume" in message
    if resumed:
        processes[lost].wait(timeout=30)
        outcomes = ends(several(2, ROOT / "train.py", "--resume", tmp_path / "a"))
        assert [status for status, _, _ in outcomes] == [0, 0], outcomes
        assert f"resumed  {tmp_path / 'a' / 'checkpoints'}/step_{resumed:08d}" in outcomes[0][1]
        assert CrossCoder.from_pretrained(tmp_path / "a" / "crosscoder").d_hidden == 256
        assert not list((tmp_path / "a").rglob("*.partial"))


def test_a_save_that_outlasts_the_others_patience_is_whole(tmp_path):
    """They give up while the first still writes, and leave its half-written folder alone."""
    disturbance = "if rank == 0: delay(checkpoint, 'save_file', 8, call=2)"  # its latents are written, the other waits
    for _, _, errors in ends(disturbed(2, tmp_path, disturbance, "--save-every", 40)):
        (message,) = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
        assert "another process of this run has ended, or has not answered" in message
    (folder,) = checkpoint.complete(tmp_path / "a")
    assert folder.name == "step_00000040" and checkpoint.damage(folder) is None


def test_a_slow_process_does_not_take_the_new_folder_for_another_run(tmp_path):
    disturbance = """
if rank == 1:
    from_first = shard.Shard.from_first
    shard.Shard.from_first = lambda *args: [from_first(*args), time.sleep(1)][0]
"""
    outcomes = ends(disturbed(2, tmp_path, disturbance, "--num-tokens", 1600))
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes


def test_what_one_process_alone_finds_it_says(tmp_path):
    """A folder that only the first machine has."""
    for model in ("base", "ft"):
        write(tmp_path / model, numbered(2000))
    flags = ["--base-dataset", "./base", "--ft-dataset", "./ft", "--val-tokens", 100, "--num-tokens", 1000]
    _, (status, _, errors) = ends(disturbed(2, tmp_path, f"os.chdir([{str(tmp_path)!r}, '/'][rank])", *flags))
    (message,) = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
    assert status == 1 and "./base" in message


def test_a_busy_port_is_named(tmp_path, monkeypatch):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        message = one_line_error(run_script("train.py", *PLANTED, "--output-dir", tmp_path), "train.py")
    assert port in message and "address already in use" in message and "torchrun --standalone" in message


def pair_with_nan(folder, bad: int):
    """140,000 rows of which `bad` hold NaN in one of the models, none of them among the rows behind mean and scale, and
    40 are outliers."""
    for model in ("base", "ft"):
        write(folder / model, numbered(140_000))
    files = [str(folder / model) for model in ("base", "ft")]
    source = open_single(*files, (None, None), 1000, 0, seed=0)
    rows = np.setdiff1d(np.arange(139_000), source.sample_rows(STATISTICS_ROWS))[:: 139_000 // 2 // bad][:bad]
    for model, mine in zip(("base", "ft"), (rows[::2], rows[1::2]), strict=True):
        x = numbered(140_000)
        x[mine, 2] = np.nan
        x[mine[:20] + 1] *= 1e4
        shutil.rmtree(folder / model)
        write(folder / model, x)
    return ["--base-dataset", files[0], "--ft-dataset", files[1], "--val-tokens", 1000, "--wandb", "disabled"]


def test_rows_left_out_are_counted_once_by_several_processes(tmp_path):
    flags = [*pair_with_nan(tmp_path, 100), "--d-hidden", 8, "--batch-size", 4096, "--output-dir", tmp_path]
    (status, _, errors), (other, _, _) = ends(several(2, ROOT / "train.py", *flags, "--run-name", "a"))
    assert (status, other) == (0, 0), errors
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["rows_dropped"] == 140 and summary["rows_dropped_by_norm"] == 40 and summary["tokens"] == 138_860


def test_too_many_rows_with_nan_end_all_processes_with_one_sentence(tmp_path):
    flags = [*pair_with_nan(tmp_path, 200), "--d-hidden", 8, "--batch-size", 4096, "--output-dir", tmp_path]
    processes = several(2, ROOT / "train.py", *flags, "--run-name", "a")
    (status, _, errors), (other, _, _) = ends(processes)
    (message,) = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
    assert status == other == 1 and "Traceback" not in errors
    dropped, read = map(
        int, re.search(r"error: (\d+) of the (\d+) rows read hold NaN or inf in one of the models", message).groups()
    )
    assert 140 <= dropped <= 150 and dropped / read == pytest.approx(200 / 139_000, rel=0.1)  # twice as many if both counted
    assert "collect them again with --dtype float32" in message


def test_a_truncated_slice_of_two_processes_is_passed_over_by_both(tmp_path):
    flags = [*PLANTED, "--num-tokens", 6400, "--output-dir", tmp_path, "--run-name", "a", "--save-every", 20]
    assert [status for status, _, _ in ends(several(2, ROOT / "train.py", *flags))] == [0, 0]
    older, newer = checkpoint.complete(tmp_path / "a")
    slice_ = newer / "latents_128_256.safetensors"
    os.truncate(slice_, slice_.stat().st_size - 1)
    shutil.rmtree(tmp_path / "a" / "crosscoder")
    (status, printed, errors), (other, _, more) = ends(several(2, ROOT / "train.py", "--resume", tmp_path / "a"))
    assert (status, other) == (0, 0), errors
    (line,) = [line for line in (errors + more).splitlines() if line.startswith("damaged")]
    assert f"{newer} (latents_128_256.safetensors is not what was written): passed over for the one before it" in line
    assert f"resumed  {older}" in printed and checkpoint.damage(newer) is None
    assert CrossCoder.from_pretrained(tmp_path / "a" / "crosscoder").d_hidden == 256


def test_a_signal_to_one_process_saves_and_ends_all(tmp_path):
    flags = [*PLANTED, "--num-tokens", 100_000_000, "--output-dir", tmp_path, "--run-name", "a"]
    processes = several(2, ROOT / "train.py", *flags)
    logged(tmp_path / "a", processes)
    processes[1].send_signal(signal.SIGTERM)
    (status, printed, errors), (other, _, _) = ends(processes)
    assert status == other == 128 + signal.SIGTERM and "Traceback" not in errors
    (folder,) = checkpoint.complete(tmp_path / "a")
    assert checkpoint.damage(folder) is None and "stopped by SIGTERM, saved at step" in printed


def test_sigterm_to_torchrun_saves_and_ends(tmp_path):
    """It passes the signal on and waits 30 seconds."""
    process = torchrun(2, "train.py", *PLANTED, "--num-tokens", 100_000_000, "--output-dir", tmp_path, "--run-name", "a")
    logged(tmp_path / "a", [])
    sent = time.time()
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - sent < 30
    (folder,) = checkpoint.complete(tmp_path / "a")
    assert checkpoint.damage(folder) is None and len(list(folder.glob("latents_*"))) == 2
    step = int(folder.name.removeprefix("step_"))
    assert f"SIGTERM: saving step {step} (a first save), then leaving" in printed, errors
    assert f"stopped by SIGTERM, saved at step {step}. Go on with:" in printed
    assert not list((tmp_path / "a").rglob("*.partial"))
    assert not [line for line in errors.splitlines() if line.startswith("train.py: error: ")]


def test_torchrun_ends_with_a_lost_process(tmp_path):
    process = torchrun(2, "train.py", *PLANTED, "--num-tokens", 100_000_000, "--output-dir", tmp_path, "--run-name", "a")
    logged(tmp_path / "a", [])
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    started = time.time()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - started < 60
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
