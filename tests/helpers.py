"""What several test files use: the commands as a user runs them, small runs, made-up activations, what a run left behind."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from datasets.table import InMemoryTable
from processes import Started
from safetensors.torch import load_file

from sources.dataset_files import open_datasets
from sources.stored import PairedActivations

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
BASE, FT = 1.0, -1.0  # sign of the row number, so that a swapped model shows
COLUMNS = ("activation", "sequence", "position", "token")  # of a collected dataset
QUICK = ["--wandb", "disabled", "--d-hidden", 64, "--batch-size", 64, "--val-tokens", 256, "--log-every", 10]
SMALL = [*QUICK, "--num-tokens", 6400, "--save-every", 20, "--val-every", 50]  # planted concepts, 100 steps
HOOK = "model.layers.2"  # of the fixture `capitals`: the residual stream after three of four blocks
CHATML = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
CAN_MOUNT = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
needs_mount = pytest.mark.skipif(not CAN_MOUNT, reason="mounting small or read-only file systems needs root (unshare -m)")


# --- commands


def run_script(script: str, *flags, check=False, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """Run an entry as a user does, and return its output; with an environment `env` Python starts anew."""
    if env:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, **options)
    else:
        result = processes.finished(ROOT / script, *flags, **options)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def one_line_error(result: subprocess.CompletedProcess, name: str) -> str:
    """The message of a command that refused its input: one line, no traceback, a non-zero status."""
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith(f"{name}: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def failure(argv: list) -> str:
    """The one line that a command with bad input ends with; the first look at the norms may have begun before."""
    done = processes.finished(*argv)
    assert done.returncode == 1, (argv, done.stdout, done.stderr)
    (line,) = [line for line in done.stderr.splitlines() if line and "norms of the first rows" not in line]
    assert line.startswith(f"{Path(argv[0]).name}: error: "), done.stderr
    return line


def launch(n, script, *args, check=True) -> subprocess.CompletedProcess:
    """The script in n processes, with the environment that torchrun would give them; what they print, together."""
    started = processes.several(n, ROOT / script, *args) if n > 1 else [Started(ROOT / script, *args)]
    printed = [process.communicate(timeout=200) for process in started]
    status = max(process.returncode for process in started)
    assert not check or not any(process.returncode for process in started), printed
    return subprocess.CompletedProcess([], status, *map("".join, zip(*printed, strict=True)))


def torchrun(n, script, *args) -> subprocess.Popen:
    """The script under the real one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", str(ROOT / script)]
    command += map(str, args)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def collect_command(tiny, out, *flags, **options) -> list[str]:
    """The command line of collect.py; a flag given in `options` replaces the usual one."""
    options = {"base_model": tiny["base"], "ft_model": tiny["ft"], "hook": "model.layers.1.mlp", "model_dtype": "float32",
               "seq_len": 128, "output": out} | options  # fmt: skip
    if "--text" not in flags:
        flags = ("--text", f"{tiny['code']}=3", "--text", f"{tiny['prose']}=1", *flags)
    given = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return [str(ROOT / "collect.py"), *given, *map(str, flags)]


# --- training runs


def train(tmp_path, name, *flags, check=True) -> Path:
    """The folder of a run that `train.py` has made."""
    run_script("train.py", "--output-dir", tmp_path, "--run-name", name, *flags, check=check)
    return tmp_path / name


def start(tmp_path, name, *flags) -> Started:
    return Started(ROOT / "train.py", "--output-dir", tmp_path, "--run-name", name, *flags)


def train_with_a_limit(tmp_path, name, most: int, *flags) -> subprocess.CompletedProcess:
    """A run whose files may have at most that many bytes: what is longer meets a full disk."""
    process = start(tmp_path, name, *flags)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_step(process, run: Path, step: int) -> None:
    """Waits until the run's metrics.jsonl has a complete line of that step or a later one."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        lines = run / "metrics.jsonl"
        complete = lines.read_text().rpartition("\n")[0].splitlines() if lines.exists() else []
        if complete and json.loads(complete[-1])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def wait_until(true, process=None, seconds=120) -> None:
    deadline = time.time() + seconds
    while not true():
        assert time.time() < deadline and (process is None or process.poll() is None), process and process.communicate()
        time.sleep(0.002)


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_metrics(folder: Path) -> dict:
    """The metrics.json of an analysis."""
    return json.loads((folder / "metrics.json").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "crosscoder" / "model.safetensors")


def assert_same_weights(a: Path, b: Path):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- activations


def numbered(rows, d_model=4, sign=BASE, dtype="float32"):
    """Activations whose first two values spell the row number, small enough for float16."""
    number = np.arange(rows)
    x = np.random.default_rng(0).normal(size=(rows, d_model))
    x[:, 0], x[:, 1] = sign * (number // 1000), number % 1000
    return x.astype(dtype)


def numbers(x):
    """[rows, d_model] -> the row numbers that `numbered` wrote."""
    return x[:, 0].abs().long() * 1000 + x[:, 1].long()


def write(path, x, fixed=True, batch=None, name="activation", **columns):
    """A save_to_disk folder of activations x [rows, d_model] with record batches of `batch` rows."""
    d = x.shape[1]
    value = Value(str(x.dtype))
    features = Features({name: List(value, length=d) if fixed else List(value)} | {c: Value("int32") for c in columns})
    offsets = np.arange(0, x.size + 1, d, dtype=np.int32)
    flat = pa.array(x.ravel())
    lists = pa.FixedSizeListArray.from_arrays(flat, d) if fixed else pa.ListArray.from_arrays(offsets, flat)
    table = pa.table({name: lists} | {c: pa.array(v, pa.int32()) for c, v in columns.items()})
    schema = features.arrow_schema.metadata  # says that a list has a fixed length
    Dataset(InMemoryTable(table.replace_schema_metadata(schema))).save_to_disk(str(path))
    if batch:  # the same rows again in record batches of another size
        file = next(path.glob("*.arrow"))
        whole = pa.ipc.open_stream(file.read_bytes()).read_all().combine_chunks()
        with pa.ipc.new_stream(file, whole.schema) as out:
            out.write_table(whole, max_chunksize=batch)
    return str(path)


def open_pair(dataset, columns, val_tokens, default_val, seed) -> PairedActivations:
    """A paired dataset of collect.py as a source."""
    return PairedActivations(open_datasets([("--dataset", dataset)], columns), val_tokens, default_val, seed)


def open_single(base, ft, columns, val_tokens, default_val, seed) -> PairedActivations:
    """One dataset for each model as a source."""
    named = [("--base-dataset", base), ("--ft-dataset", ft)]
    return PairedActivations(open_datasets(named, columns), val_tokens, default_val, seed)


def collect(source, batch_size, stop, **where):
    """Row numbers of each batch; checks on the way that both models are at the same token."""
    out = []
    for batch in source.batches(batch_size, stop, CPU, **where):
        base, ft = numbers(batch.x[:, 0]), numbers(batch.x[:, 1])
        assert torch.equal(base, ft)
        large = base >= 1000
        assert (batch.x[large, 0, 0] > 0).all() and (batch.x[large, 1, 0] < 0).all()
        assert batch.first_row <= base.min() and base.max() <= batch.last_row
        out.append((base.clone(), batch.position))
    return out


def read_rows(out: Path, model: str, splits=("train", "validation")) -> dict[str, np.ndarray]:
    data = load_from_disk(str(out / model))
    parts = [data[split].with_format("numpy")[:] for split in splits]
    return {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}


def read_pair(out: Path) -> dict:
    return json.loads((out / "pair.json").read_text())
