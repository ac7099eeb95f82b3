"""Several processes: tokens a second, memory, and bytes that a process sends in a step, measured and as the formula has it.

    python benchmarks/scaling.py                # 1, 2 and 4 processes of one thread each, gloo
    python benchmarks/scaling.py --processes 1 8    # on a machine with 8 CUDA devices, NCCL

Every line is a launch of torchrun. On a machine with fewer cores than processes they share them: then the bytes and the memory
say something, the speed does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from step import machine, peak

from crosscoder import CrossCoder
from ops import sparse
from ops.shard import Shard
from ops.weights import Adam
from train import losses_and_gradients, norm_of_gradient

D_MODEL, BATCH, K = 256, 1024, 32


def formula(processes: int, itemsize: int) -> int:
    """Bytes that one process puts into the collectives of a batch_topk step, without those of a few scalars.

    Its share of the rows as they are stored; the reconstruction in float32; two histograms of 65,536 int32 bins.
    The auxiliary loss, once a latent is dead, adds a reconstruction and two histograms.
    """
    width = 2 * D_MODEL
    return BATCH * width * itemsize // processes + 4 * BATCH * width + 2 * 4 * 65_536


def measure(d_hidden: int, steps: int, shard: Shard) -> None:
    """One process's part; process 0 prints what it found."""
    device = shard.join(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    crosscoder = CrossCoder(
        D_MODEL, d_hidden, 2, "batch_topk", K, None, 1.0, compute_dtype=getattr(torch, sparse.fast_dtype(device)),
        shard=shard,
    ).to(device)  # fmt: skip
    optimizer = Adam(crosscoder.parameters(), lr=1e-4)
    rows = torch.randn(BATCH, 2, D_MODEL).half()
    for step in range(steps + 2):
        if step == 2:
            started, sent = time.perf_counter(), shard.sent
        x = shard.gather_rows(rows[shard.part(BATCH)].to(device)).float()
        losses_and_gradients(crosscoder, x, BATCH, 0.0)
        optimizer.grad_scale = norm_of_gradient(crosscoder).clamp_min(1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / steps
    if shard.rank == 0:
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak()
        print(json.dumps({"seconds": seconds, "sent": (shard.sent - sent) / steps, "memory": memory}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--latents", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        shard = Shard.of_torchrun()
        measure(args.measure, args.steps, shard)
        return shard.leave()
    print(
        f"{machine(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}; 2 x {D_MODEL}, batches of {BATCH}, k {K}\n"
    )
    print("| latents | processes | tokens/s | peak GB a process | MB sent a step | by the formula |")
    print("|---:|---:|---:|---:|---:|---:|")
    for d_hidden in args.latents:
        for n in args.processes:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", __file__]
            command += ["--measure", str(d_hidden), "--steps", str(args.steps)]
            environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found = json.loads(output)
            sent = formula(n, 2) / 1e6 if n > 1 else 0
            print(
                f"| {d_hidden:,} | {n} | {BATCH / found['seconds']:,.0f} | {found['memory'] / 1e9:.2f} "
                f"| {found['sent'] / 1e6:.3f} | {sent:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
