"""What a disk does to a run: it is full or read-only, it gives back files that are damaged or hostile.

Real processes and real limits. Broken input is in test_stored_refusals.py.
"""

import json
import os
import pickle
import resource
import shutil
import tarfile
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
    needs_mount,
    numbered,
    one_line_error,
    open_pair,
    open_single,
    run_script,
    start,
    train,
    train_with_a_limit,
    wait_until,
    write,
)
from safetensors.torch import load_file, save_file

from crosscoder import CrossCoder
from run import checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 100 steps with the checkpoints of steps 80 and 100."""
    return train(tmp_path_factory.mktemp("finished"), "a", *SMALL)


def flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


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
