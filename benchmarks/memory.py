"""How much memory of its own a run takes while its dataset is far larger: training, and the analysis of all latents.

    python benchmarks/memory.py                     training: 8 GB of rows, one epoch; needs the disk for them
    python benchmarks/memory.py --gigabytes 100
    python benchmarks/memory.py --analysis          analyze.py's pass over all latents, with its speed

Sampled is RssAnon of /proc/PID/status: memory that belongs to no file. Pages of a mapped dataset do not count, as the kernel
drops them when it needs room.

Training: writes a paired dataset as collect.py does (2 x d_model float16 values a row and the columns of tokens, shuffled),
the same block of random rows again and again, and trains on it through the command line; then as many steps on 12,288 rows.
Exit status 1 unless the files are ten times larger than what the run takes above its imports.

Analysis: a crosscoder of random weights with a threshold that keeps about --active latents a token, on random activations.
Prints the memory that the pass takes above the weights, which must not grow with --num-tokens, and the tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.table import InMemoryTable

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
COLUMNS = ("sequence", "position", "token")
BLOCK = 4096  # rows that are written again and again, and held out
SMALL = 3 * BLOCK  # rows: enough for every buffer to reach its full size
BATCH = 1000  # rows of a record batch, as the datasets library writes them


def write_pair(folder: Path, rows: int, d_model: int) -> int:
    """A paired dataset of at least that many rows in `folder`, a whole number of blocks. Returns its bytes."""
    for seed, model in enumerate(("base", "ft")):
        values = np.random.default_rng(seed).standard_normal(BLOCK * d_model, dtype=np.float32).astype(np.float16)
        features = Features({"activation": List(Value("float16"), length=d_model)} | {name: Value("int32") for name in COLUMNS})
        arrays = [pa.FixedSizeListArray.from_arrays(pa.array(values), d_model)]
        arrays += [pa.array(np.arange(BLOCK, dtype=np.int32))] * len(COLUMNS)
        table = pa.table(dict(zip(features, arrays, strict=True))).replace_schema_metadata(features.arrow_schema.metadata)
        Dataset(InMemoryTable(table)).save_to_disk(str(folder / model))
        (file,) = (folder / model).glob("*.arrow")
        with pa.ipc.new_stream(file, table.schema) as out:
            for _ in range(-(-rows // BLOCK)):
                out.write_table(table, max_chunksize=BATCH)
    (folder / "pair.json").write_text(json.dumps({"stored_scale": [1, 1], "shuffled": True}))
    return sum(file.stat().st_size for file in folder.rglob("*.arrow"))


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that belong to no file; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/status") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def peak_of(process) -> int:
    """The peak of RssAnon until the process ends."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.02)
    return peak


class RandomRows:
    """A source of random activations; rows are made when they are asked for."""

    def __init__(self, d_model: int, rows: int):
        import torch

        self.n_models, self.dtype, self.d_model, self.stored_scale = 2, torch.float16, d_model, torch.ones(2)
        self.val_rows, self.train_rows = rows // 20, rows
        self.norm_limit = torch.inf

    def gather(self, split: str, rows: np.ndarray, out) -> None:
        import torch

        out.copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(int(rows[0]))))


def analysis(args) -> int:
    """Memory and speed of the pass over all latents, in this process."""
    import torch

    from analysis.data import Data
    from analysis.measure import latent_table, measure_latents
    from analysis.ranking import rank_latents
    from crosscoder import CrossCoder

    torch.set_grad_enabled(False)
    crosscoder = CrossCoder(args.d_model, args.d_hidden)
    source = RandomRows(args.d_model, args.num_tokens)
    sample = torch.empty(2, 256, args.d_model)
    source.gather("train", np.arange(256), sample)
    scores = crosscoder.score(crosscoder.encode(sample.transpose(0, 1))).flatten()
    crosscoder.threshold.fill_(scores.topk(256 * args.active).values.min())
    del sample, scores
    data = Data(source, "random", None, source.val_rows, args.num_tokens - source.val_rows)
    before, peak, done = anonymous(os.getpid()), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous(os.getpid()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    sums, metrics, blocks = measure_latents(crosscoder, data)
    latent_table(crosscoder, sums, rank_latents(blocks, crosscoder.W_dec.detach()), data)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    weights = sum(p.numel() for p in crosscoder.parameters()) * 4
    print(
        f"{args.num_tokens:,} tokens, {args.d_hidden:,} latents of 2 x {args.d_model}, L0 {metrics['l0_loss']:.1f}: weights "
        f"{weights / 1e9:.3f} GB, above them {(peak[0] - before) / 1e9:.3f} GB, {args.num_tokens / seconds:,.0f} tokens/s"
    )
    return 0


def training(args) -> int:
    """Peaks of a training on many rows and of one on few."""
    disable_progress_bars()
    peaks, sizes = [], []
    large = int(args.gigabytes * 1e9 / (4 * args.d_model))
    for rows in (large, SMALL):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            sizes.append(write_pair(Path(folder) / "data", rows, args.d_model))
            flags = ["--dataset", f"{folder}/data", "--output-dir", f"{folder}/runs", "--wandb", "disabled", "--device", "cpu"]
            flags += ["--d-hidden", args.d_hidden, "--batch-size", args.batch_size, "--val-tokens", BLOCK]
            flags += ["--num-tokens", large - BLOCK, "--l1-coeff", 0]  # nothing to find: a penalty would kill every latent
            began = time.perf_counter()
            process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, flags)], stdout=subprocess.DEVNULL)
            peaks.append(peak_of(process))
            if process.returncode:
                return 1
            seconds = time.perf_counter() - began
            print(f"{sizes[-1] / 1e9:.3f} GB of rows: peak RssAnon {peaks[-1] / 1e9:.3f} GB, {seconds:.0f} s", flush=True)
    imports = peak_of(subprocess.Popen([sys.executable, "-c", "import time, train; time.sleep(2)"], cwd=ROOT))
    whole, above = sizes[0] / peaks[0], sizes[0] / (peaks[0] - imports)
    print(f"the files are {whole:.1f} times that, and {above:.1f} times what it has above its imports ({imports / 1e9:.2f} GB)")
    return 0 if above >= 10 else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--analysis", action="store_true", help="measure the pass over all latents instead of a training")
    parser.add_argument("--d-model", type=int, help="width; 1152 for training, 256 for analysis")
    parser.add_argument("--d-hidden", type=int, help="latents; 64 for training, 16384 for analysis")
    parser.add_argument("--gigabytes", type=float, default=8, help="training: rows on disk")
    parser.add_argument("--batch-size", type=int, default=512, help="training: rows a step")
    parser.add_argument("--folder", type=Path, help="training: where the rows are written and removed again")
    parser.add_argument("--num-tokens", type=int, default=1_000_000, help="analysis: rows measured")
    parser.add_argument("--active", type=int, default=64, help="analysis: active latents a token")
    args = parser.parse_args()
    args.d_model = args.d_model or (256 if args.analysis else 1152)
    args.d_hidden = args.d_hidden or (16_384 if args.analysis else 64)
    return analysis(args) if args.analysis else training(args)


if __name__ == "__main__":
    sys.exit(main())
