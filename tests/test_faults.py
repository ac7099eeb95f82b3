"""What a machine does to a run: kills, too little memory, no answer from wandb, a closed pipe.

Real processes and real limits. More of it where it belongs: kills and signals in test_resume.py, full disks and damaged files
in test_disks.py.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import QUICK, ROOT, SMALL, metrics, needs_mount, one_line_error, run_script, start, wait_for_step, wait_until
from processes import several

from crosscoder import CrossCoder
from run import checkpoint
from run.machine import free_memory
from train import ONE_SIGNAL

# --- preemption


def test_sigterm_in_the_middle_of_a_save_leaves_in_time(tmp_path):
    """Preemption gives 30 seconds. This run saves 12 MB at each step, so the signal comes inside a save, which is the last."""
    process = start(tmp_path, "a", *QUICK, "--d-hidden", 2048, "--num-tokens", 64_000, "--save-every", 1)
    run = tmp_path / "a"
    wait_until(lambda: checkpoint.complete(run) and list(run.glob("checkpoints/.*.partial")), process)
    sent = time.time()
    for _ in range(2):  # a scheduler that signals torchrun and its processes alike means it once
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and time.time() - sent < 30, errors
    newest = checkpoint.find(run)
    assert not (run / "crosscoder").exists()
    assert f"saved at step {int(newest.name.removeprefix('step_'))}" in printed and "damaged" not in errors


def test_sigterm_on_a_machine_that_does_not_wait_for_the_save(tmp_path):
    """Killed in the middle of its last save of 100 MB, a run goes on from the checkpoint before and says what happened."""
    flags = [*QUICK, "--d-hidden", 16_384, "--num-tokens", 64_000, "--save-every", 8, "--log-every", 1]
    process, run = start(tmp_path, "a", *flags), tmp_path / "a"
    wait_for_step(process, run, 9)  # after the save of step 8, long before that of step 16
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM: saving" in process.output()[0], process)
    before = checkpoint.complete(run)[-1]
    wait_until(lambda: list(run.glob("checkpoints/.*.partial")), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    (partial,) = run.glob("checkpoints/.*.partial")
    cut_off = partial.name.split(".")[1]
    printed = process.output()[0]
    assert f"SIGTERM: saving step {int(cut_off.removeprefix('step_'))} (the last save took " in printed
    assert f" s), then leaving; killed before that, the run goes on from {before.name}" in printed
    assert checkpoint.complete(run)[-1] == before and checkpoint.damage(before) is None
    shorter = ["--num-tokens", 64 * (int(before.name.removeprefix("step_")) + 1)]
    result = run_script("train.py", "--resume", run, *shorter, check=True)
    assert f"cut off  {cut_off} in {run}: the run was killed while writing it; removed" in result.stdout
    assert f"resumed  {before}" in result.stdout and "damaged" not in result.stderr
    assert not list(run.rglob("*.partial")) and (run / "summary.json").exists()


def test_killed_in_the_middle_of_writing_the_final_model(tmp_path):
    """32 MB; the next start finishes it with the weights of the last checkpoint."""
    process, run = start(tmp_path, "a", *QUICK, "--d-hidden", 16_384, "--num-tokens", 128), tmp_path / "a"
    wait_until(lambda: list(run.glob("crosscoder/*.partial")), process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL and list(run.glob("crosscoder/*.partial"))
    assert not (run / "crosscoder" / "model.safetensors").exists() and not (run / "summary.json").exists()
    result = run_script("train.py", "--resume", run, check=True)
    assert f"cut off  crosscoder in {run}: " in result.stdout
    tensors, _ = checkpoint.read(checkpoint.find(run))
    assert torch.equal(CrossCoder.from_pretrained(run / "crosscoder").W_dec, tensors["W_dec"])
    assert not list(run.rglob("*.partial")) and (run / "summary.json").exists()


def test_a_second_ctrl_c_leaves_at_once_and_says_so(tmp_path):
    """The first one waits for a validation that takes half a minute."""
    flags = [*QUICK, "--num-tokens", 640_000, "--val-every", 30]
    flags += ["--val-tokens", 3_000_000, "--log-every", 29, "--save-every", 20]
    process = start(tmp_path, "a", *flags)
    wait_for_step(process, tmp_path / "a", 29)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(ONE_SIGNAL + 0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and errors.splitlines()[-1].startswith("interrupted: "), errors
    assert "Traceback" not in errors and [path.name for path in checkpoint.complete(tmp_path / "a")] == ["step_00000020"]


# --- too little memory


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (lambda free: ["--d-hidden", int(1.3 * free / (20 * 2 * 256)), "--batch-size", 4], "--d-hidden"),
        (lambda free: ["--d-hidden", 1 << 16, "--batch-size", int(1.3 * free / (20 << 16))], "--micro-batch-size"),
        (lambda free: ["--batch-size", int(1.3 * free / (48 * 256)), "--micro-batch-size", 64], "--batch-size"),
    ],
    ids=["dictionary", "codes", "rows"],
)
def test_a_run_that_needs_more_memory_than_is_free_is_refused(tmp_path, flags, named):
    """1.3 times what is free: about 30 GB on a machine of 23."""
    result = run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *QUICK, *flags(free_memory()))
    message = one_line_error(result, "train.py")
    assert "GB of memory on the host and" in message and f"lower {named} (for " in message and not (tmp_path / "a").exists()


@needs_mount
@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_limit_of_a_container_counts(version):
    """Files as the kernel writes them: a limit of 3 GB, of which 2 are used and 0.5 of these are files that can be dropped."""
    where = "/sys/fs/cgroup" + ("/memory" if version == 1 else "")
    limit, used, total = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_") if version == 1 else ("memory.max", "memory.current", "")
    )
    script = f"""
        mount -t tmpfs none /sys/fs/cgroup && mkdir -p {where} && cd {where}
        echo 3000000000 > {limit}; echo 2000000000 > {used}
        printf 'anon 5\n{total}inactive_file 400000000\n{total}active_file 100000000\n' > memory.stat
        PYTHONPATH={ROOT} exec {sys.executable} -c 'from run import machine; print(machine.free_memory())'
    """
    result = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout == "1500000000\n", result.stderr


@pytest.mark.parametrize("when", ["loop", "end"])
def test_memory_that_runs_out_in_the_middle_of_a_run(tmp_path, when):
    """A real limit on the address space, below what the process has: the next larger allocation fails."""
    flags = ["--d-hidden", 2048, "--save-every", 20, "--log-every", 1, "--batch-size", 512, "--micro-batch-size", 256]
    flags += ["--num-tokens", 640_000] if when == "loop" else ["--num-tokens", 512, "--val-tokens", 100_000]
    process, run = start(tmp_path, "a", *QUICK, *flags), tmp_path / "a"
    wait_until(lambda: checkpoint.complete(run), process)
    size = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("VmSize"))
    limit = int(size.split()[1]) * 1024 - (1 << 26)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    _, errors = process.communicate(timeout=120)
    (message,) = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
    assert process.returncode == 1 and "out of memory (" in message and "lower --micro-batch-size" in message
    assert f"Last checkpoint: {checkpoint.complete(run)[-1]}" in message and "Traceback" not in errors


# --- numbers that are none


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, processes):
    """One step: its loss is finite, the weights after it are not."""
    flags = ["--output-dir", tmp_path, "--run-name", "a", *QUICK, "--num-tokens", 2048, "--batch-size", 2048, "--lr", 1e38]
    first, *_ = started = several(processes, ROOT / "train.py", *flags) if processes > 1 else [start(tmp_path, "a", *flags)]
    outcomes = [process.communicate(timeout=120) for process in started]
    (message,) = [line for line in outcomes[0][1].splitlines() if line.startswith("train.py: error: ")]
    assert first.returncode == 1 and "the weights after step 1 are not finite" in message and "lower --lr" in message
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", "metrics.jsonl"}
    assert not any("Traceback" in errors for _, errors in outcomes) and all(process.returncode for process in started)


# --- others on the machine, the network, and who reads the output


def test_two_requeued_jobs_of_one_name_at_once(tmp_path):
    """`--resume auto` may begin a folder that is there; one of them must still give way."""
    processes = [start(tmp_path, "same", *SMALL, "--num-tokens", 64_000, "--resume", "auto") for _ in range(2)]
    outcomes = [(p.communicate(timeout=120)[1], p.returncode) for p in processes]
    assert sorted(code for _, code in outcomes) == [0, 1], outcomes
    (refused,) = (errors for errors, code in outcomes if code)
    assert "another process is writing" in refused and "Traceback" not in refused
    assert [m["step"] for m in metrics(tmp_path / "same")] == sorted(m["step"] for m in metrics(tmp_path / "same"))


def test_wandb_online_without_a_network_goes_offline_and_the_run_goes_on(tmp_path, monkeypatch):
    """A key, and a server that refuses connections. No secret of the environment is written or printed."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    for name, value in (
        *[("HOME", str(tmp_path)), ("WANDB_API_KEY", "0123456789" * 4), ("WANDB_BASE_URL", "http://127.0.0.1:9")],
        *[("WANDB_INIT_TIMEOUT", "3"), ("HF_TOKEN", "hf_secret")],
    ):
        monkeypatch.setenv(name, value)
    flags = ["--num-tokens", 640, "--d-hidden", 64, "--batch-size", 64, "--val-tokens", 256, "--wandb", "online"]
    result = run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *flags, check=True)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("wandb")]
    assert line.startswith("wandb    offline (") and "`wandb sync` uploads it later" in line
    assert (tmp_path / "a" / "summary.json").exists() and list((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"))
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (b"0123456789" * 4, b"hf_secret"):
        assert not any(secret in part for part in [*written, result.stdout.encode(), result.stderr.encode()])


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path):
    command = f"{sys.executable} {ROOT}/train.py --output-dir {tmp_path} --run-name a {' '.join(map(str, SMALL))}"
    result = subprocess.run(
        ["bash", "-c", f"({command}; echo $? > {tmp_path}/status) 2>&1 | head -n 1"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.stdout.startswith("loading torch") and result.stdout.count("\n") == 1 and result.stderr == ""
    assert (tmp_path / "status").read_text() == "0\n" and (tmp_path / "a" / "summary.json").exists()


@pytest.mark.parametrize("closed", ["2>&-", "0>&- >&-"])
def test_closed_standard_streams(tmp_path, closed):
    """What the run opens next must not get the number of the closed one, and the run must not miss it."""
    flags = " ".join(map(str, [*QUICK, "--num-tokens", 640, "--output-dir", tmp_path, "--run-name", "a"]))
    command = f"{sys.executable} {ROOT}/train.py {flags} {closed}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and ("held out" in result.stdout) == (closed == "2>&-"), result
    assert (tmp_path / "a" / "summary.json").exists()


# --- watching


def test_a_log_file_gets_lines_with_time(tmp_path):
    began = time.time()
    result = run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *SMALL, "--num-tokens", 19_200, check=True)
    shown = [line for line in result.stderr.splitlines() if "tokens/s" in line]
    for line in (shown[0], shown[-1]):
        stamp = time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))
        assert began - 1 <= stamp <= time.time()
    assert " step 1 of 300, loss " in shown[0] and " step 300 of 300, loss " in shown[-1] and "0:00:00 left" in shown[-1]
    assert shown[0].endswith("time left not known yet")  # of a first step, which takes longer than all others
    beats = [m["time"] for m in metrics(tmp_path / "a")]
    assert began < beats[0] <= beats[-1] < time.time() and beats == sorted(beats)


# --- all at once


def test_soak_with_two_kills():
    flags = ["--kills", 2, "--inside-saves", 1, "--inside-final-save", 1]
    shown = run_script("benchmarks/soak.py", *flags, check=True).stdout
    assert (
        shown.startswith("2 kills (")
        and ", 1 inside the final save, " in shown
        and "the same bits, 0 temporary files left" in shown
    )
