"""What a machine does to a run: kills, full and read-only disks, damaged or hostile files, no answer from wandb, a closed pipe.

Real processes and real limits. More of it where it belongs: kills and signals in test_resume.py, broken input in
test_stored.py.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import (
    QUICK,
    ROOT,
    SMALL,
    assert_same_weights,
    metrics,
    needs_mount,
    numbered,
    one_line_error,
    open_pair,
    open_single,
    run_script,
    start,
    train,
    train_with_a_limit,
    wait_for_step,
    write,
)
from processes import several
from safetensors.torch import load_file, save_file

from crosscoder import CrossCoder
from run import checkpoint
from run.machine import free_memory
from train import ONE_SIGNAL


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 100 steps with the checkpoints of steps 80 and 100."""
    return train(tmp_path_factory.mktemp("finished"), "a", *SMALL)


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def wait_until(true, process=None, seconds=120) -> None:
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline and (process is None or process.poll() is None), process and process.communicate()
        time.sleep(0.002)


# --- checkpoints that are not what was written


def test_a_damaged_checkpoint_is_passed_over_and_leftovers_go(tmp_path, finished):
    run = tmp_path / "a"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "crosscoder")
    flip(run / "checkpoints" / "step_00000100" / "latents_0_64.safetensors")
    for folder in (".step_00000100.partial", ".step_00000060.old"):
        shutil.copytree(run / "checkpoints" / "step_00000080", run / "checkpoints" / folder)
    (run / ".config.json.partial").write_text("{")
    (run / "crosscoder").mkdir()
    (run / "crosscoder" / "model.safetensors.partial").write_bytes(b"1")
    result = run_script("train.py", "--resume", run, check=True)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("damaged")]
    assert "step_00000100 (latents_0_64.safetensors is not what was written): passed over for the one before it" in line
    assert f"resumed  {run / 'checkpoints' / 'step_00000080'}" in result.stdout
    assert_same_weights(finished, run)
    assert [path for path in run.rglob("*") if "partial" in path.name or ".old" in path.name] == []
    assert checkpoint.damage(run / "checkpoints" / "step_00000100") is None  # written again


@pytest.mark.parametrize("name", ["index.json", "state.json", "shared.safetensors", "latents_0_64.safetensors"])
@pytest.mark.parametrize("how", ["one bit", "truncated", "empty", "missing", "another's"])
def test_every_damage_to_every_file_is_found(tmp_path, finished, name, how, capsys):
    shutil.copytree(finished, tmp_path / "a")
    older, newer = checkpoint.complete(tmp_path / "a")
    path, size = newer / name, (newer / name).stat().st_size
    if how == "one bit":
        for at in (0, 1, size // 3, size // 2, size - 2):
            flip(path, at)
            assert name in checkpoint.damage(newer)
            flip(path, at)
        assert checkpoint.damage(newer) is None
        flip(path)
    elif how == "missing":
        path.unlink()
    elif how == "another's":
        shutil.copy(older / name, path)
    else:
        os.truncate(path, size - 1 if how == "truncated" else 0)
    if (how, name) == ("another's", "index.json"):
        assert checkpoint.damage(newer)  # its checksums are those of other files
    else:
        assert name in checkpoint.damage(newer)
    assert checkpoint.find(tmp_path / "a") == older
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="step_00000100 is broken"):
        checkpoint.read(newer)
    flip(older / "state.json")
    with pytest.raises(ValueError, match=r"all its checkpoints are damaged .*--config .*config\.json"):
        checkpoint.find(tmp_path / "a")


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_loaded(tmp_path, finished):
    """Neither in place of a checkpoint's file, even with checksums to match, nor of a model, nor of a dataset."""
    bomb, exploded = pickle.dumps(Bomb(tmp_path / "exploded")), tmp_path / "exploded"
    pickle.loads(bomb).close()
    assert exploded.exists()  # it would
    exploded.unlink()
    torch.save(Bomb(exploded), tmp_path / "torch.pt")
    for name in ("shared.safetensors", "latents_0_64.safetensors", "state.json", "index.json"):
        for content in (bomb, (tmp_path / "torch.pt").read_bytes()):
            run = tmp_path / "run"
            shutil.copytree(finished, run)
            _, folder = checkpoint.complete(run)
            index = json.loads((folder / "index.json").read_text())
            (folder / name).write_bytes(content)
            if name != "index.json":
                checkpoint.write_index(folder, {key: value for key, value in index.items() if "checksum" not in key})
            with pytest.raises(ValueError, match="broken"):
                checkpoint.read(folder)
            shutil.rmtree(run)
    for name in ("model.safetensors", "config.json"):
        shutil.copytree(finished / "crosscoder", tmp_path / "model")
        (tmp_path / "model" / name).write_bytes(bomb)
        with pytest.raises(ValueError, match="broken"):
            CrossCoder.from_pretrained(tmp_path / "model")
        shutil.rmtree(tmp_path / "model")
    good = write(tmp_path / "good", numbered(100))
    for name in (
        "x.arrow",
        "x.parquet",
        "x.pkl",
        "folder/x.pkl",
        "folder/x.pt",
        "folder/x.tar",
        "folder/x.npy",
        "saved/x.arrow",
    ):
        hostile = tmp_path / "hostile" / name
        hostile.parent.mkdir(parents=True)
        hostile.write_bytes(bomb)
        if hostile.suffix == ".tar":  # read as a web dataset, whose parts were once unpickled
            for part in ("1.pyd", "1.pickle", "1.pth"):
                (tmp_path / part).write_bytes(bomb)
                with tarfile.open(hostile, "w" if part == "1.pyd" else "a") as tar:
                    tar.add(tmp_path / part, part)
        if name.startswith("saved"):
            state = json.loads((Path(good) / "state.json").read_text()) | {"_data_files": [{"filename": "x.arrow"}]}
            (hostile.parent / "state.json").write_text(json.dumps(state))
            shutil.copy(Path(good) / "dataset_info.json", hostile.parent)
        named = hostile if "/" not in name else hostile.parent
        with pytest.raises(ValueError, match="--base-dataset"):
            open_single(str(named), good, (None, None), 10, 0, seed=0)
        shutil.rmtree(tmp_path / "hostile")
    assert not exploded.exists()


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


# --- full and read-only disks


def test_a_full_disk_at_a_line_of_metrics(tmp_path):
    """No file may exceed 60 KB; checkpoints of 8 latents are smaller, and 200 lines of metrics larger."""
    flags = [*QUICK, "--d-hidden", 8, "--num-tokens", 12_800, "--log-every", 1, "--save-every", 50]
    message = one_line_error(train_with_a_limit(tmp_path, "a", 60_000, *flags), "train.py")
    assert "metrics.jsonl could not be written" in message and "make room" in message and "checkpoints are untouched" in message
    assert checkpoint.damage(checkpoint.find(tmp_path / "a")) is None


def test_a_full_disk_at_the_final_model_and_what_follows(tmp_path):
    """The limit comes while the held-out rows are read, after the last checkpoint. Then there is room again."""
    flags = [*QUICK, "--num-tokens", 640, "--val-tokens", 50_000]
    process, run = start(tmp_path, "a", *flags), tmp_path / "a"
    wait_until(lambda: checkpoint.complete(run), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    _, errors = process.communicate(timeout=120)
    (message,) = [line for line in errors.splitlines() if line.startswith("train.py: error: ")]
    assert process.returncode == 1 and "the crosscoder could not be written" in message and "make room" in message
    assert "Traceback" not in errors and not list(run.rglob("*.partial"))
    train(tmp_path, "a", "--resume", run)
    assert CrossCoder.from_pretrained(run / "crosscoder").d_hidden == 64 and (run / "summary.json").exists()


LONG, SHORT = ["--num-tokens", 640_000], ["--num-tokens", 640, "--val-tokens", 50_000]


FILLS = """
import errno, multiprocessing, os, runpy, subprocess, sys, time
from pathlib import Path
import mounted
from run import checkpoint
out, train, *flags = sys.argv[1:]
mounted.mount(f"mount -t tmpfs -o size=16m none {out}")
run, sys.argv = Path(out) / "a", [train, "--output-dir", out, "--run-name", "a", *flags]
training = multiprocessing.get_context("fork").Process(target=runpy.run_path, args=(train,), kwargs={"run_name": "__main__"})
training.start()
while not checkpoint.complete(run):
    assert training.is_alive()
    time.sleep(0.01)
with open(f"{out}/ballast", "wb", buffering=0) as ballast:
    try:
        while True:
            ballast.write(bytes(2**16))
    except OSError as error:
        assert error.errno == errno.ENOSPC
training.join()
print("status", training.exitcode, sorted(map(str, run.rglob("*"))), flush=True)
os.remove(f"{out}/ballast")
sys.argv = [train, "--resume", str(run), "--num-tokens", "12800"]
runpy.run_path(train, run_name="__main__")
"""


@needs_mount
@pytest.mark.parametrize(("length", "what"), [(LONG, "the checkpoint of step"), (SHORT, "the crosscoder could not be written")])
def test_a_file_system_that_fills_up(tmp_path, length, what):
    """A tmpfs of 16 MB that something else fills after the first checkpoint, which may be the last before the final model."""
    (tmp_path / "fills.py").write_text(FILLS)
    (tmp_path / "out").mkdir()
    flags = [*SMALL, "--d-hidden", 512, *length, "--log-every", 100_000, "--val-every", 100_000]
    result = run_script(tmp_path / "fills.py", tmp_path / "out", ROOT / "train.py", *flags)
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert what in message and "No space left on device" in message and "make room" in message
    assert (
        "status 1" in result.stdout and "Traceback" not in result.stderr and ".partial" not in result.stdout.split("status")[1]
    )
    assert result.returncode == 0 and "resumed" in result.stdout and "damaged" not in result.stderr, result.stderr


@needs_mount
@pytest.mark.parametrize("part", [".", "checkpoints", "crosscoder"])
def test_a_run_on_a_read_only_disk_is_refused(finished, part):
    """Root may write anywhere but there. Before any training: a read-only checkpoints/ would lose all until the first save."""
    folder = finished / part
    read_only = f"mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}"
    result = run_script("tests/mounted.py", read_only, ROOT / "train.py", "--resume", finished, "--num-tokens", 9600)
    message = one_line_error(result, "train.py")
    assert f"{folder} cannot be written to" in message and f"copy {finished} to where it is" in message
    assert "step" not in result.stderr.replace(message, "")


@needs_mount
@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_run_in_a_read_only_output_dir_is_refused(tmp_path, resume):
    read_only = f"mount --bind {tmp_path} {tmp_path}; mount -o remount,ro,bind {tmp_path}"
    flags = ["--output-dir", tmp_path / "runs", "--run-name", "a", *SMALL, *resume]
    result = run_script("tests/mounted.py", read_only, ROOT / "train.py", *flags)
    assert f"--output-dir: cannot create {tmp_path}/runs/a (Read-only file system)" in one_line_error(result, "train.py")


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


def test_a_finished_run_whose_checkpoint_holds_inf_is_not_saved_as_a_result(tmp_path, finished):
    """As runs of earlier versions may have left it: whole by its checksums."""
    run = tmp_path / "a"
    shutil.copytree(finished, run)
    folder = checkpoint.complete(run)[-1]
    tensors = load_file(folder / "latents_0_64.safetensors")
    tensors["W_dec"][3, 1, 5] = torch.inf
    save_file(tensors, folder / "latents_0_64.safetensors")
    index = json.loads((folder / "index.json").read_text())
    checkpoint.write_index(folder, {name: part for name, part in index.items() if "checksum" not in name})
    before = (run / "crosscoder" / "model.safetensors").read_bytes()
    message = one_line_error(run_script("train.py", "--resume", run), "train.py")
    assert "the weights after step 100 are not finite" in message and f"Last good checkpoint: {folder}" not in message
    assert (run / "crosscoder" / "model.safetensors").read_bytes() == before


# --- damaged data


def test_a_damaged_shard_is_named(tmp_path):
    for name in ("base", "ft"):
        write(tmp_path / name, numbered(2000), batch=500)
    (shard,) = (tmp_path / "ft").glob("*.arrow")
    os.truncate(shard, shard.stat().st_size - 1000)
    data = ["--base-dataset", tmp_path / "base", "--ft-dataset", tmp_path / "ft"]
    message = one_line_error(run_script("train.py", "--output-dir", tmp_path / "runs", *data), "train.py")
    assert f"--ft-dataset: {shard} is truncated or damaged" in message and "copy or collect it again" in message
    assert not (tmp_path / "runs").exists()


def test_a_flipped_bit_in_the_header_of_a_shard(tmp_path):
    base, ft = (write(tmp_path / name, numbered(2000), batch=500) for name in ("base", "ft"))
    (shard,) = (tmp_path / "base").glob("*.arrow")
    flip(shard, 9)  # in the header of the schema
    with pytest.raises(ValueError, match=f"--base-dataset: {shard} is truncated or damaged"):
        open_single(base, ft, (None, None), 100, 0, seed=0)


def test_shards_that_lost_whole_batches_in_both_models(tmp_path):
    """They can still be read to their end and agree with each other; pair.json knows better."""
    for name in ("base", "ft"):
        write(tmp_path / name, numbered(2000), batch=500)
    (tmp_path / "pair.json").write_text(json.dumps({"stored_scale": [1, 1], "rows": {"train": 2000, "validation": 0}}))
    assert open_pair(str(tmp_path), (None, None), 100, 0, seed=0).train_rows == 1900
    for shard in tmp_path.glob("*/*.arrow"):
        table = pa.ipc.open_stream(shard.read_bytes()).read_all()
        with pa.ipc.new_stream(shard, table.schema) as out:
            out.write_table(table.slice(0, 1500), max_chunksize=500)
    with pytest.raises(ValueError, match="has 1500 rows in train and pair.json says 2000: a shard is truncated or missing"):
        open_pair(str(tmp_path), (None, None), 100, 0, seed=0)


def test_offsets_that_point_outside_the_file(tmp_path):
    """Equal widths, but all rows lie far behind the values: reading them would read foreign memory."""
    base, ft = (write(tmp_path / name, numbered(2000), fixed=False, batch=2000) for name in ("base", "ft"))
    (shard,) = (tmp_path / "ft").glob("*.arrow")
    offsets = np.arange(0, 8001, 4, dtype=np.int32)
    content = shard.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    shard.write_bytes(content.replace(offsets.tobytes(), (offsets + 10**9).tobytes()))
    with pytest.raises(ValueError, match="--ft-dataset: column 'activation' is damaged"):
        open_single(base, ft, (None, None), 100, 0, seed=0)


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


def test_soak_with_three_kills():
    flags = ["--kills", 3, "--inside-saves", 1, "--inside-final-save", 1]
    shown = run_script("benchmarks/soak.py", *flags, check=True).stdout
    assert (
        shown.startswith("3 kills (")
        and ", 1 inside the final save, " in shown
        and "the same bits, 0 temporary files left" in shown
    )
