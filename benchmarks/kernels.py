"""What the compiler makes of every Triton kernel that a training step launches, for cards that need not be here.

    python benchmarks/kernels.py                       # a table; exit status 1 where a kernel breaks a limit
    python benchmarks/kernels.py --arch 90 --json OUT

A step runs on tensors that have shapes and no data. Every launch is caught, typed as Triton types it on CUDA, and compiled with
the ptxas that triton brings; registers, spills, fences and loads are read from the machine code. Nothing runs on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported: the kernels must compile here
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

sys.path.insert(0, str(Path(__file__).parent.parent))
from crosscoder import CrossCoder
from ops import sparse
from ops.weights import Adam

REGISTERS = 128  # of a thread at most, so that 16 of 64 warps of a multiprocessor can run at once
CASES = [  # what is looked at: models' width, latents, type of the products
    (2304, 32768, torch.bfloat16),
    (2304, 32768, torch.float32),
    (1150, 32753, torch.bfloat16),  # no multiples of 16
]


class Bare:
    """A tensor as Triton sees it at a launch: its type, and whether its address is a multiple of 16."""

    def __init__(self, x: torch.Tensor):
        self.dtype, self.address = x.dtype, x.storage_offset() * x.element_size()

    def data_ptr(self) -> int:
        return self.address


def launches(d_model: int, d_hidden: int, dtype: torch.dtype, batch: int = 4096, k: int = 100) -> list[tuple]:
    """(kernel, arguments, constants) of every launch of a step of each variant with the auxiliary loss, and of Adam."""
    found: list[tuple] = []

    def run(kernel, *args, grid, warmup, **constants):
        found.append((kernel, args, constants))

    with FakeTensorMode(), patch.object(JITFunction, "run", run), patch.object(sparse, "on_cuda", lambda x: True):
        for variant in ("batch_topk", "vanilla"):
            crosscoder = CrossCoder(d_model, d_hidden, 2, variant, k, compute_dtype=dtype)
            x, dead = torch.empty(batch, 2, d_model), torch.empty(d_hidden, dtype=torch.bool)
            crosscoder.losses(x, 0.0, 1 / 32, dead).loss.backward()
            optimizer = Adam(crosscoder.parameters())
            optimizer.grad_scale = torch.ones(())
            optimizer.step()
    return found


def compilers(arch: int, case: tuple) -> dict:
    """For every different kernel that the case launches on such a card: how it is typed -> (kernel, arguments, compile)."""
    found = {}
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    for kernel, args, constants in launches(*case):
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, types, options = binder(*(Bare(a) if isinstance(a, torch.Tensor) else a for a in args), **constants)
        options, signature, values, attributes = kernel._pack_args(backend, constants, bound, types, options)
        source = ASTSource(kernel, signature, values, attributes)
        compiled = partial(triton.compile, source, target=target, options=options.__dict__)
        found[kernel, str(types), str(options)] = (kernel, args, compiled)
    return found


def machine_code(cubin: bytes) -> str:
    """Resources and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(nvidia.__file__).parent / "bin" / "cuobjdump", "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inspect(arch: int, case: tuple, kernel: JITFunction, args: tuple, compiled) -> dict:
    """What the machine code of a compiled launch shows, and which limits it breaks."""
    text = machine_code(compiled.asm["cubin"])
    fences = re.findall(r"\bMEMBAR\b", text), re.findall(r"\bfence\.|\bmembar\b|\.acq_rel\b", compiled.asm["ptx"])
    loads = re.findall(r"\bLDG\.E(?:\.\w+)*", text)
    (registers,) = re.findall(r"\bREG:(\d+)", text)
    left_out = [name for name, given in zip(kernel.arg_names, args, strict=False) if given is None]
    row = {
        "kernel": kernel.__name__ + (f", without {', '.join(left_out)}" if left_out else ""),
        "case": "{:,} wide, {:,} latents, {}".format(2 * case[0], *case[1:]).replace("torch.", ""),
        "arch": arch,
        "warps": compiled.metadata.num_warps,
        "registers": int(registers),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
        "fences": max(map(len, fences)),
        "wide": sum(load.endswith(".128") or ".128." in load for load in loads),
        "loads": len(loads),
        "shared": compiled.metadata.shared,
    }
    matrix = args[0]  # what it reads
    aligned = matrix.stride(0) * matrix.element_size() % 16 == 0
    broken = [
        (row["fences"] > 0, f"{row['fences']} fences: an atomic that is not relaxed"),
        (row["spills"] > 0, f"{row['spills']} spills"),
        (row["registers"] > REGISTERS, f"{row['registers']} registers"),
        (aligned and not row["wide"], "no 128-bit load"),
    ]
    return row | {"broken": [reason for is_broken, reason in broken if is_broken]}


def line(rows: list[dict]) -> str:
    """A line of the table: one kernel on all cards, a number for each where they differ."""
    cells = []
    for name in ("warps", "registers", "spills", "fences", "wide", "loads", "shared"):
        values = [f"{row[name]:,}" for row in rows]
        cells.append(values[0] if len({*values}) == 1 else " / ".join(values))
    return f"| `{rows[0]['kernel']}` | {rows[0]['case']} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capability, 90 for 9.0")
    parser.add_argument("--first", action="store_true", help="only the first case")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    print(f"{' / '.join(f'sm_{arch}' for arch in args.arch)}: compiled, not run on a GPU\n")
    print("| kernel | case | warps | registers | spills | fences | 128-bit loads | loads | shared bytes |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    table, done = [], set()
    for case in CASES[: 1 if args.first else None]:
        on_cards = [compilers(arch, case) for arch in args.arch]
        for kernels in zip(*(found.items() for found in on_cards), strict=True):
            if kernels[0][0] not in done:
                done.add(kernels[0][0])
                compiled = zip(args.arch, kernels, strict=True)
                rows = [inspect(arch, case, kernel, launched, build()) for arch, (_, (kernel, launched, build)) in compiled]
                print(line(rows), flush=True)
                table += rows
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))
    broken = [f"{row['kernel']}, {row['case']}, sm_{row['arch']}: {', '.join(row['broken'])}" for row in table if row["broken"]]
    for text in broken:
        print(text, file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
