"""Memory and speed of analyze.py's pass over all latents: `python benchmarks/analysis_memory.py`.

A crosscoder with random weights and a threshold that keeps about --active latents a token, on random activations. Prints the
memory that the pass takes above the weights (peak of RssAnon) and the tokens it measures a second. It must not grow with
--num-tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from analysis.measure import Data, latent_table, measure
from crosscoder import CrossCoder
from sources.batches import ANY_NORM


class RandomRows:
    """A source of random activations; rows are made when they are asked for."""

    n_models, dtype, norm_limit = 2, torch.float16, ANY_NORM

    def __init__(self, d_model: int, rows: int):
        self.d_model, self.val_rows, self.train_rows, self.stored_scale = d_model, rows // 20, rows, torch.ones(2)

    def gather(self, split: str, rows: np.ndarray, out: torch.Tensor) -> None:
        out.copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(int(rows[0]))))


def anonymous_memory() -> int:
    """Bytes of this process's memory that belong to no file."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=1_000_000)
    parser.add_argument("--d-hidden", type=int, default=16_384)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--active", type=int, default=64, help="active latents a token")
    args = parser.parse_args()
    crosscoder = CrossCoder(args.d_model, args.d_hidden)
    source = RandomRows(args.d_model, args.num_tokens)
    sample = torch.empty(2, 256, args.d_model)
    source.gather("train", np.arange(256), sample)
    scores = crosscoder.score(crosscoder.encode(sample.transpose(0, 1))).flatten()
    crosscoder.threshold.fill_(scores.topk(256 * args.active).values.min())
    del sample, scores
    data = Data(source, torch.ones(2, 1), "random", None, None, source.val_rows, args.num_tokens - source.val_rows)
    before, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch, daemon=True)  # an error must not wait for it
    watcher.start()
    began = time.perf_counter()
    sums, metrics = measure(crosscoder, data)
    latent_table(crosscoder, sums, data)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    result = {
        "tokens": args.num_tokens, "d_hidden": args.d_hidden, "d_model": args.d_model, "l0": round(metrics["l0_loss"], 1),
        "weights_gb": round(sum(p.numel() for p in crosscoder.parameters()) * 4 / 1e9, 3),
        "above_weights_gb": round((peak[0] - before) / 1e9, 3), "tokens_per_second": round(args.num_tokens / seconds),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
