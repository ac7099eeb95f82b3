"""Rows per second from disk into training batches: the training reader against slicing the dataset into Python lists.

    python benchmarks/reader.py

Writes paired float16 rows of a Gemma-2-2b (d_model 2304) to a temporary folder and reads them, page cache warm: what is
measured is the reader, not the disk. A row is one token's activation in both models.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.table import InMemoryTable

sys.path.insert(0, str(Path(__file__).parent.parent))
from sources.batches import batches, limit_norms
from sources.stored import open_single


def write(path: Path, rows: int, d_model: int, seed: int) -> str:
    """A save_to_disk dataset of random float16 rows."""
    features = Features({"activation": List(Value("float16"), length=d_model)})
    values = np.random.default_rng(seed).standard_normal(rows * d_model, dtype=np.float32).astype(np.float16)
    table = pa.table({"activation": pa.FixedSizeListArray.from_arrays(pa.array(values), d_model)})
    table = InMemoryTable(table.replace_schema_metadata(features.arrow_schema.metadata))
    Dataset(table).save_to_disk(str(path))
    return str(path)


def python_lists(base: str, ft: str, batch_size: int):
    """What a plain training script does: slice both datasets, turn the lists into tensors, stack."""
    base, ft = Dataset.load_from_disk(base), Dataset.load_from_disk(ft)
    for start in range(0, len(base), batch_size):
        part = slice(start, start + batch_size)
        yield torch.stack([torch.tensor(base[part]["activation"]), torch.tensor(ft[part]["activation"])], dim=1)


def torch_format(base: str, ft: str, batch_size: int):
    """The same with the datasets library's torch format."""
    base, ft = (Dataset.load_from_disk(path).with_format("torch", dtype=torch.float16) for path in (base, ft))
    for start in range(0, len(base), batch_size):
        part = slice(start, start + batch_size)
        yield torch.stack([base[part]["activation"], ft[part]["activation"]], dim=1)


def training_reader(base: str, ft: str, batch_size: int, shuffled: bool):
    """The reader of train.py, background thread and check for outliers and non-finite values included."""
    source = open_single(base, ft, (None, None), 2, 0, seed=0)
    source.shuffled = shuffled
    limit_norms(source, 10.0)
    for batch in batches(source, batch_size, source.train_rows, torch.device("cpu")):
        yield batch.x


def rate(stream, at_most: float) -> float:
    """Rows a second over the stream, stopped after `at_most` seconds; the first batch pays for opening and is left out."""
    next(stream)
    started, rows = time.perf_counter(), 0
    for x in stream:
        rows += len(x)
        if time.perf_counter() - started > at_most:
            break
    return rows / (time.perf_counter() - started)


def cpu_name() -> str:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]  # noqa: SIM115
    return names[0] if names else platform.processor()


def main() -> None:
    disable_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="paired rows to write")
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--batch-size", type=int, default=4096)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, ft = (write(Path(folder) / name, args.rows, args.d_model, seed) for seed, name in enumerate(("base", "ft")))
        size = args.batch_size
        kinds = {
            "Python lists": lambda: python_lists(base, ft, size),
            "datasets' torch format": lambda: torch_format(base, ft, size),
            "train.py, shuffled on disk": lambda: training_reader(base, ft, size, shuffled=True),
            "train.py, shuffled while reading": lambda: training_reader(base, ft, size, shuffled=False),
        }
        rates = {
            name: max(rate(make(), at_most=20) for _ in range(1 if name == "Python lists" else 3))
            for name, make in kinds.items()
        }
    print(
        f"{args.rows:,} rows of 2 x {args.d_model} float16, batches of {size}, "
        f"{torch.get_num_threads()} threads of {cpu_name()}"
    )
    print("\n| reader | rows/s | GB/s | against lists |\n|---|---:|---:|---:|")
    for name, value in rates.items():
        print(f"| {name} | {value:,.0f} | {value * 4 * args.d_model / 1e9:.2f} | {value / rates['Python lists']:,.0f}x |")


if __name__ == "__main__":
    main()
