"""One training step: ours against the plain way of writing it, and against the best that this machine could do.

    python benchmarks/step.py                  # tokens a second, milliseconds by part, peak memory, share of the floor
    python benchmarks/step.py --end-to-end     # rows from disk: the reader alone, then with the step (needs requirements.txt)

Needs torch alone (on CUDA also triton, which comes with it). Every measurement is a process of its own, so that its peak of
memory is its own. `benchmarks/README.md` says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from crosscoder import CrossCoder
from ops import sparse
from ops.weights import Adam

CPU_CASES = [  # variant, d_model, d_hidden, batch, active latents per token; the first is the one to compare by
    ("batch_topk", 512, 16384, 2048, 64),
    ("vanilla", 512, 16384, 2048, None),
    ("vanilla", 512, 16384, 2048, 64),
    ("batch_topk", 512, 16384, 2048, 16),
    ("batch_topk", 512, 16384, 2048, 256),
    ("batch_topk", 512, 16384, 2048, 1024),  # where a run of k 64 begins (--k-start)
    ("batch_topk", 512, 8192, 2048, 64),
    ("batch_topk", 512, 32768, 2048, 64),
]
CUDA_CASES = [(v, 2304, f, 4096, k) for f in (32768, 131072) for v, k in (("batch_topk", 100), ("vanilla", None))]
PARTS = ("forward", "backward", "clip and Adam")


class Plain(nn.Module):
    """A crosscoder as one writes it first: an einsum over models, topk over the flattened batch, dense matrices throughout."""

    def __init__(self, d_model: int, d_hidden: int, k: int | None):
        super().__init__()
        W_dec = torch.randn(d_hidden, 2, d_model)
        self.W_dec = nn.Parameter(W_dec / W_dec.norm(dim=-1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().permute(1, 2, 0).contiguous())
        self.b_enc, self.b_dec, self.k = nn.Parameter(torch.zeros(d_hidden)), nn.Parameter(torch.zeros(2, d_model)), k

    def loss(self, x: Tensor) -> Tensor:
        f = torch.relu(torch.einsum("bmd,mdh->bh", x, self.W_enc) + self.b_enc)  # [batch, d_hidden]
        weighted = f * self.W_dec.norm(dim=-1).sum(-1)
        if self.k:
            kept = weighted.flatten().topk(self.k * len(x)).indices
            f = f * torch.zeros_like(f).flatten().scatter_(0, kept, 1.0).view_as(f)
        x_hat = torch.einsum("bh,hmd->bmd", f, self.W_dec) + self.b_dec
        l2 = (x - x_hat).float().pow(2).sum((1, 2)).mean()
        return l2 if self.k else l2 + weighted.sum(-1).mean()


def make_step(way: str, variant: str, d_model: int, d_hidden: int, batch: int, active: int | None, device: torch.device):
    """A function that runs one step on a batch [batch, 2, d_model] and gives the seconds of its PARTS, and such batches.

    way: "plain" (float32, Adam as it comes), "plain, bf16" (the same under autocast) or "ours".
    """
    torch.manual_seed(0)
    batches = torch.randn(4, batch, 2, d_model, device=device)
    k = active if variant == "batch_topk" else None
    if way == "ours":
        dtype = getattr(torch, sparse.fast_dtype(device))
        model = CrossCoder(d_model, d_hidden, 2, variant, k, dec_init_norm=1.0, compute_dtype=dtype).to(device)
        optimizer = Adam(model.parameters(), lr=1e-4)
    else:
        model = Plain(d_model, d_hidden, k).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    if k is None and active is not None:  # as late in a training: about so many latents are active
        pre = batches[0, :256].flatten(1) @ model.W_enc.detach().flatten(0, 1)  # [256, d_hidden]
        model.b_enc.data.fill_(-pre.flatten().kthvalue(int((1 - active / d_hidden) * pre.numel())).values)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(x: Tensor) -> list[float]:
        times = [now()]
        if way == "ours":
            loss = model.losses(x, l1_coeff=0.0 if k else 1.0).loss
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=way == "plain, bf16"):
                loss = model.loss(x)
        times.append(now())
        loss.backward()
        times.append(now())
        if way == "ours":  # as train.py does it
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            optimizer.grad_scale = norm.clamp_min(1)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(now())
        return [after - before for before, after in zip(times, times[1:], strict=False)]

    return step, batches


def peak() -> int:
    """Most bytes of memory that this process has ever held."""
    status = Path("/proc/self/status").read_text()  # not getrusage, which begins with the parent's peak
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(way: str, case: tuple, device: torch.device) -> dict:
    """Seconds of each part of the median step, and the peak of memory in bytes that the steps added to this process."""
    at_start = peak()
    step, batches = make_step(way, *case, device)
    steps, started = [], time.perf_counter()
    while len(steps) < 5 or (len(steps) < 50 and time.perf_counter() - started < 10):
        if device.type == "cuda" and way == "ours" and len(steps) == 2:
            torch.cuda.set_sync_debug_mode("error")  # from here on an operation that waits for the device raises
        steps.append(step(batches[len(steps) % len(batches)]))
    memory = peak() - at_start
    steps = sorted(steps[2:], key=sum)
    return {
        "parts": steps[len(steps) // 2],
        "memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else memory,
    }


# --- rows from disk


def write_rows(path: Path, rows: int, d_model: int, seed: int) -> None:
    """A save_to_disk dataset of random float16 rows."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, Features, List, Value, disable_progress_bars
    from datasets.table import InMemoryTable

    disable_progress_bars()
    features = Features({"activation": List(Value("float16"), length=d_model)})
    values = np.random.default_rng(seed).standard_normal(rows * d_model, dtype=np.float32).astype(np.float16)
    table = pa.table({"activation": pa.FixedSizeListArray.from_arrays(pa.array(values), d_model)})
    Dataset(InMemoryTable(table.replace_schema_metadata(features.arrow_schema.metadata))).save_to_disk(str(path))


def python_lists(base: str, ft: str, batch: int):
    """What a plain training script does: slice both datasets, turn the lists into tensors, stack: [batch, 2, d_model]."""
    from datasets import Dataset

    base, ft = Dataset.load_from_disk(base), Dataset.load_from_disk(ft)
    for start in range(0, len(base), batch):
        part = slice(start, start + batch)
        yield torch.stack([torch.tensor(base[part]["activation"]), torch.tensor(ft[part]["activation"])], dim=1)


def torch_format(base: str, ft: str, batch: int):
    """The same with the datasets library's torch format."""
    from datasets import Dataset

    base, ft = (Dataset.load_from_disk(path).with_format("torch", dtype=torch.float16) for path in (base, ft))
    for start in range(0, len(base), batch):
        part = slice(start, start + batch)
        yield torch.stack([base[part]["activation"], ft[part]["activation"]], dim=1)


def training_reader(base: str, ft: str, batch: int, device: torch.device, shuffled: bool = False):
    """The reader of train.py, background thread and check for outliers and non-finite values included."""
    from sources.batches import limit_norms
    from sources.dataset_files import open_datasets
    from sources.stored import PairedActivations

    named = [("--base-dataset", base), ("--ft-dataset", ft)]
    source = PairedActivations(open_datasets(named, (None, None)), 2, 0, seed=0)
    source.shuffled = shuffled
    limit_norms(source, 10.0)
    for item in source.batches(batch, source.train_rows, device):
        yield item.x


def reading_rate(stream, at_most: float) -> float:
    """Rows a second over the stream, stopped after `at_most` seconds; the first batch pays for opening and is left out."""
    next(stream)
    started, rows = time.perf_counter(), 0
    for x in stream:
        rows += len(x)
        if time.perf_counter() - started > at_most:
            break
    return rows / (time.perf_counter() - started)


def compare_readers(rows: int = 100_000, d_model: int = 2304, batch: int = 4096) -> None:
    """Rows a second into batches, page cache warm: what is measured is the reader, not the disk."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}" for name in ("base", "ft")]
        for seed, path in enumerate(paths):
            write_rows(Path(path), rows, d_model, seed)
        cpu = torch.device("cpu")
        ways = {
            "Python lists": lambda: python_lists(*paths, batch),
            "datasets' torch format": lambda: torch_format(*paths, batch),
            "train.py, shuffled on disk": lambda: training_reader(*paths, batch, cpu, shuffled=True),
            "train.py, shuffled while reading": lambda: training_reader(*paths, batch, cpu),
        }
        found = {
            name: max(reading_rate(make(), at_most=20) for _ in range(1 if name == "Python lists" else 3))
            for name, make in ways.items()
        }
    print(f"{rows:,} rows of 2 x {d_model} float16, batches of {batch}, read alone\n")
    print("| reader | rows/s | GB/s | against lists |\n|---|---:|---:|---:|")
    for name, value in found.items():
        print(f"| {name} | {value:,.0f} | {value * 4 * d_model / 1e9:.2f} | {value / found['Python lists']:,.0f}x |")


def end_to_end(way: str, case: tuple, device: torch.device, folder: str) -> dict:
    """Tokens a second from float16 rows on disk to updated weights, and the share of the time spent waiting for rows."""
    batch, paths = case[3], [f"{folder}/{name}" for name in ("base", "ft")]
    step, _ = make_step(way, *case, device)
    rows = training_reader(*paths, batch, device) if way == "ours" else python_lists(*paths, batch)
    stream = (x.float().to(device) for x in rows)
    step(next(stream))
    tokens, waited, started = 0, 0.0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < 20:
        before = time.perf_counter()
        x = next(stream, None)
        if x is None:
            break
        waited += time.perf_counter() - before
        step(x)
        tokens += len(x)
    rows.close()
    return {"tokens_per_second": tokens / elapsed, "waited": waited / elapsed}


# --- what the machine could do


def rates(device: torch.device) -> dict:
    """This machine's own rates: products in float32 and bfloat16 (flop/s), and copying (bytes read and written a second)."""

    def seconds(work) -> float:
        work()
        times = []
        for _ in range(5):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    n = 8192 if device.type == "cuda" else 2048
    found = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(n, n, device=device).to(getattr(torch, name))
        found[name] = 2 * n**3 / seconds(lambda a=a: a @ a)
    source = torch.ones(1 << 26, device=device)  # 256 MB
    target = torch.empty_like(source)
    return found | {"copy": 2 * source.nbytes / seconds(lambda: target.copy_(source))}


def floor(case: tuple, rate: dict, dtype: str) -> float:
    """Seconds of a step that does no avoidable work, at the machine's rates and with nothing overlapping."""
    variant, d_model, d_hidden, batch, active = case
    width = 2 * d_model
    weights = 2 * width * d_hidden  # encoder and decoder
    product = 2 * batch * width * d_hidden / rate[dtype]
    size = 2 if dtype == "bfloat16" else 4
    moved = 28 * weights + 4 * weights + 4 * weights  # Adam reads 4 values of 4 bytes and writes 3; gradients; their norm
    if active is None:
        products = 5  # encode, decode, and the gradients of W_enc, W_dec and the codes
        moved += (4 + size) * weights * (size == 2) + 6 * size * batch * d_hidden  # bf16 copies; codes there and back
    else:
        products = 1  # encode
        moved += (4 + size) * weights / 2 * (size == 2) + 2 * size * batch * d_hidden  # bf16 encoder; scores written and read
        moved += 4 * batch * active * width  # the decoder rows of active latents
    return products * product + moved / rate["copy"]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]  # noqa: SIM115
    return f"{torch.get_num_threads()} threads of {names[0] if names else platform.processor()}"


def alone(what: str, way: str, *words) -> dict:
    """What this script measures in a process of its own. The plain ways get pages of the usual size (see sparse.py)."""
    command = [sys.executable, __file__, "--alone", json.dumps([what, way, *words])]
    environment = os.environ | ({} if way == "ours" else {"THP_MEM_ALLOC_ENABLE": "0"})
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--first", action="store_true", help="only the first case, the one to compare by")
    parser.add_argument("--end-to-end", action="store_true", help="the first case with rows from disk, instead of the table")
    parser.add_argument("--alone", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.alone:
        what, *rest, name = args.alone
        found = {"measure": measure, "end_to_end": end_to_end}[what](*rest[:2], torch.device(name), *rest[2:])
        print(json.dumps(found))
        return
    cases = CUDA_CASES if device.type == "cuda" else CPU_CASES
    ways = ["plain", "plain, bf16", "ours"] if device.type == "cuda" else ["plain", "ours"]
    if args.end_to_end:
        compare_readers()
        compare_end_to_end(cases[0], device)
        return
    dtype = sparse.fast_dtype(device)
    rate = rates(device)
    print(
        f"{machine(device)}: products {rate['float32'] / 1e9:,.0f} Gflop/s in float32, "
        f"{rate['bfloat16'] / 1e9:,.0f} in bfloat16, copying {rate['copy'] / 1e9:,.0f} GB/s; ours computes in {dtype}\n"
    )
    print(f"| variant | latents | active | way | tokens/s | against plain | {', '.join(PARTS)} (ms) | peak GB | of the floor |")
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|")
    for case in cases[:1] if args.first else cases:
        variant, d_model, d_hidden, batch, active = case
        plain = None
        for way in ways:
            found = alone("measure", way, case, args.device)
            seconds = sum(found["parts"])
            plain = plain or seconds
            share = f"{floor(case, rate, dtype) / seconds:.0%}" if way == "ours" else ""
            parts = ", ".join(f"{1000 * part:,.0f}" for part in found["parts"])
            print(
                f"| {variant} | {d_hidden:,} | {active or 'half'} | {way} | {batch / seconds:,.0f} | {plain / seconds:.1f}x "
                f"| {parts} | {found['memory'] / 1e9:.2f} | {share} |",
                flush=True,
            )


def compare_end_to_end(case: tuple, device: torch.device) -> None:
    """Tokens a second of the plain way and of ours, rows from disk included."""
    variant, d_model, d_hidden, batch, active = case
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(("base", "ft")):
            write_rows(Path(folder) / name, 100_000, d_model, seed)
        found = {way: alone("end_to_end", way, case, folder, str(device)) for way in ("plain", "ours")}
    print(f"\n{machine(device)}: {variant}, 2 x {d_model}, {d_hidden:,} latents, batches of {batch}, k {active}, from disk\n")
    print("| way | tokens/s | against plain | of the time waiting for rows |\n|---|---:|---:|---:|")
    for way, value in found.items():
        ratio = value["tokens_per_second"] / found["plain"]["tokens_per_second"]
        print(f"| {way} | {value['tokens_per_second']:,.0f} | {ratio:.1f}x | {value['waited']:.1%} |")


if __name__ == "__main__":
    main()
