"""What a training step on CUDA launches, computes, moves and keeps, and how long a card needs for that. Counted, not measured.

    python benchmarks/roofline.py                            # the table, for an H100
    python benchmarks/roofline.py --card A100 --d-hidden 16384 --k 64
    python benchmarks/roofline.py --memory                   # what fits on 24, 48 and 80 GB, and hours for 100M tokens
    python benchmarks/roofline.py --operations               # every operation of the first case, longest first

Needs no card: the step of train.py runs on PyTorch's meta device, whose tensors have a shape and no values. Every operation
and every Triton kernel is noted as it is launched. `benchmarks/README.md` says what the columns mean and what is not in them.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train
from benchmarks.step import floor
from config import REAL
from crosscoder import CrossCoder
from ops import dead, kernels, sparse
from ops.weights import Adam
from run.limits import training_bytes

META = torch.device("meta")
SHORTEST = 2e-6  # seconds that a launch takes at least; an assumption
BATCH, K, N_MODELS = 4096, 100, 2
AUX = ("off", "none dead", "all used")
DEAD = 4096  # latents, where all are used: of each token the d_model / 2 largest


class Card(NamedTuple):
    """A card's peaks by its maker's data sheet, dense products in flop/s, memory in bytes/s. The rate of its L2 is assumed."""

    bfloat16: float
    tf32: float
    float32: float
    memory: float
    l2: float
    l2_size: float  # bytes


CARDS = {
    "H100": Card(989e12, 495e12, 67e12, 3.35e12, 5.5e12, 50e6),  # SXM
    "H200": Card(989e12, 495e12, 67e12, 4.8e12, 5.5e12, 50e6),
    "A100": Card(312e12, 156e12, 19.5e12, 2.04e12, 4.0e12, 40e6),  # SXM, 80 GB
    "L40S": Card(362e12, 183e12, 91.6e12, 0.864e12, 4.0e12, 96e6),
    "4090": Card(165e12, 82.6e12, 82.6e12, 1.01e12, 4.0e12, 72e6),
}


SIZES = {"4090": 24, "L40S": 48, "H100": 80}  # GB
RESERVED = 1.5  # GB for CUDA's context and what lies between allocations; an assumption
MODELS = {"Gemma-2-2b": 2304, "an 8B model": 4096}  # width


class Gather(NamedTuple):
    """Rows that a kernel reads again and again, so many columns at a time."""

    bytes: float  # read in all
    table: float  # bytes of all different rows
    slice: float  # bytes of the columns that are read at the same time

    def from_memory(self, l2_size: float) -> float:
        """Bytes that come from memory: each once if the slice stays in the cache, else what the cache does not hold."""
        cache = 0.8 * l2_size
        return min(self.bytes, self.table) if self.slice < cache else self.bytes * (1 - cache / self.slice)


class Operation(NamedTuple):
    """One operation of PyTorch, or one launch of a kernel of ops/kernels.py."""

    name: str
    where: str  # the line that calls it
    launches: int
    flops: float = 0
    dtype: str = ""  # of the product
    bytes: float = 0  # read and written, each tensor once
    through_l2: float = 0  # atomics, and what is read more often
    gathers: tuple[Gather, ...] = ()

    def moved(self, card: Card) -> float:
        return self.bytes + sum(gather.from_memory(card.l2_size) for gather in self.gathers)

    def seconds(self, card: Card) -> float:
        """The longest of products, memory, cache and launches: as if each were as fast as the card allows."""
        product = self.flops / (getattr(card, self.dtype) if self.flops else 1)
        cached = (self.through_l2 + sum(gather.bytes for gather in self.gathers)) / card.l2
        return max(product, self.moved(card) / card.memory, cached, self.launches * SHORTEST)


# --- what an operation moves


def nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


VIEWS = """view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias as_strided split unbind
split_with_sizes _reshape_alias lift_fresh unflatten diagonal empty empty_like new_empty empty_strided"""  # and allocations
FILLS = "zeros zeros_like new_zeros ones_like full new_full full_like fill_ zero_ arange scalar_tensor"
FREE, WRITE_ONLY = set(VIEWS.split()), set(FILLS.split())
LAUNCHES = {"cumsum": 3, "_foreach_norm": 2, "index_put_": 2, "_index_put_impl_": 2}  # where not one
SORT_PASSES = 2  # over keys and values, of a radix sort with 8 bits a pass; per byte of a key


def tensors_of(values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def traffic(name: str, args: tuple, options: dict, out) -> float:
    """Bytes that an operation of PyTorch reads and writes."""
    if name in ("index", "index_select", "gather"):
        return 2 * nbytes(out) + sum(nbytes(t) for t in tensors_of(args[1:]))
    if name == "copy_":
        return nbytes(args[0]) + nbytes(args[1])
    options = {key: value for key, value in options.items() if key != "out"}  # written, not read
    inputs = {(t.untyped_storage()._cdata, t.storage_offset()): nbytes(t) for t in tensors_of((args, options))}
    in_place = name.endswith("_") and not name.startswith("_")
    written = nbytes(args[0]) if in_place else sum(nbytes(t) for t in tensors_of(out))
    if name in ("index_add_", "index_copy_"):
        rows = tensors_of(args[1:])
        return sum(nbytes(t) for t in rows) + 2 * nbytes(rows[-1])
    if name == "sort":
        key = args[0].element_size()
        return SORT_PASSES * key * args[0].numel() * (key + 8)
    return (0 if name in WRITE_ONLY else sum(inputs.values())) + written


def bytes_of(a: dict, *names: str) -> dict:
    """What these arguments hold, of those that are given; a name twice is read and written."""
    return {"bytes": sum(nbytes(a[name]) for name in names if a[name] is not None)}


def histogram(a: dict) -> dict:
    """Scores of which few are counted; of all positive ones where they are a sample, by atomics in the cache.

    The sample's bound is 0. A second look from 0 on ends at once: it is for a sample that led astray.
    """
    if a["every"] > 1:
        a["low"].is_zero = True
        return {"bytes": nbytes(a["pre"]) / a["every"], "through_l2": 8 * a["pre"].numel() / a["every"]}
    return {"bytes": 0 if hasattr(a["low"], "is_zero") else nbytes(a["pre"])}


def weighted_sums(a: dict) -> dict:
    rows, width = a["rows"], a["units"] * a["UNIT"]
    gather = Gather(a["entries"] * width * rows.element_size(), nbytes(rows), nbytes(rows) * min(1, a["TILE"] / width))
    once = [a[name] for name in ("index", "weights", "out", "others", "dots") if a[name] is not None]
    return {"bytes": sum(nbytes(t) for t in once), "gathers": (gather,)}


# What a kernel of ops/kernels.py moves, from its arguments by name.
KERNELS: dict[str, Callable[[dict], dict]] = {
    "_histogram": histogram,
    "_count": lambda a: bytes_of(a, "pre", "above", "equal"),
    "_write": lambda a: bytes_of(a, "pre", "latents", "values"),
    "_keep": lambda a: bytes_of(a, "pre", "pre", "ties", "least"),
    "_find": lambda a: bytes_of(a, "bins"),
    "_weighted_sums": weighted_sums,
    "_gate": lambda a: bytes_of(a, "values", *["values"] * (a["bias"] is not None), "open_at", "sums", "times"),
    "_adam": lambda a: bytes_of(a, *["weight", "mean", "square"] * 2, "gradient", "narrow"),
    "_join": lambda a: {},  # where no latent is active at many times as many tokens as others
}


# --- counting


class Counted(TorchDispatchMode):
    """Notes every operation on tensors of the meta device, and the most bytes that such tensors held at the same time."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.held: dict[int, int] = {}  # bytes of each storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        options = kwargs or {}
        out = op(*args, **options)
        self.hold(out)
        name, packet = op.overloadpacket.__name__, op.overloadpacket
        if name not in FREE and any(t.device == META for t in tensors_of((args, options, out))):
            counted = flop_registry[packet](*args, **options, out_val=out) if packet in flop_registry else 0
            dtype = str(tensors_of(args)[0].dtype).removeprefix("torch.") if counted else ""
            if dtype == "float32" and torch.backends.cuda.matmul.allow_tf32:
                dtype = "tf32"
            launches = SORT_PASSES * args[0].element_size() + 2 if name == "sort" else LAUNCHES.get(name, 1)
            self.operations.append(Operation(name, caller(), launches, counted, dtype, traffic(name, args, options, out)))
        return out

    def launch(self, kernel, grid, *args, **constants) -> None:
        """In the place of kernels.launch."""
        known = inspect.signature(kernel.fn)
        named = known.bind(*args, **{name: n for name, n in constants.items() if name in known.parameters}).arguments
        name = kernel.fn.__name__
        if name not in KERNELS:
            raise ValueError(f"benchmarks/roofline.py: say in KERNELS what the kernel {name} moves")
        self.operations.append(Operation(name, caller(), 1, **KERNELS[name](named)))

    def hold(self, values) -> None:
        for t in tensors_of(values):
            storage = t.untyped_storage()
            if t.device == META and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.let_go, storage._cdata)

    def let_go(self, storage: int) -> None:
        self.now -= self.held.pop(storage)


def caller() -> str:
    """The line of the project that is running; "backward" inside autograd."""
    frame = sys._getframe(2)
    while frame:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file.name != Path(__file__).name and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


@contextmanager
def as_on_cuda(launch: Callable) -> Iterator[None]:
    """Tensors of the meta device take the ways of those on CUDA, and kernels are given to `launch`."""
    supported = ["cuda", "meta", "cpu"]
    with ExitStack() as patches:
        patches.enter_context(patch.object(sparse, "on_cuda", lambda x: x.device == META))
        patches.enter_context(patch.object(kernels, "launch", launch))
        for name in (
            "optim.optimizer._get_fused",
            "utils._foreach_utils._get_foreach",
        ):  # Adam's one kernel, norms of all at once
            patches.enter_context(patch(f"torch.{name}_kernels_supported_devices", lambda: supported))
        yield


class KnownDead(dead.DeadLatents):
    """So many latents are dead. The question how many is in every step."""

    def __init__(self, since: Tensor, many: int):
        super().__init__(since, 10**6, BATCH)
        self.many, self.every = many, 1

    def ask(self):
        return (self.since >= self.soon).sum(), None

    def answer(self, asked) -> int:
        return self.many


class Case(NamedTuple):
    """What a step is counted for."""

    variant: str
    d_hidden: int
    aux: str = "off"
    d_model: int = 2304
    k: int = K
    batch: int = BATCH
    dtype: str = "bfloat16"


class Step(NamedTuple):
    """What was counted."""

    operations: list[Operation]
    peak: int  # bytes

    def seconds(self, card: Card) -> float:
        return sum(operation.seconds(card) for operation in self.operations)


def on_meta(case: Case) -> CrossCoder:
    """A crosscoder of that size on the meta device."""
    k = case.k if case.variant == "batch_topk" else None
    model = CrossCoder(case.d_model, k or 1, N_MODELS, case.variant, k, compute_dtype=getattr(torch, case.dtype)).to(META)
    model.d_hidden, model.latents = case.d_hidden, slice(0, case.d_hidden)
    for name in ("W_dec", "enc_rows", "b_enc"):
        shape = (case.d_hidden, *getattr(model, name).shape[1:])
        setattr(model, name, nn.Parameter(torch.empty(shape, device=META)))
    return model


def count(case: Case) -> Step:
    """The second step of a training, as `main` of train.py does it."""
    counted = Counted()
    with as_on_cuda(counted.launch):
        model = on_meta(case)
        optimizer = Adam(model.parameters(), lr=1e-4)
        since, bad = (torch.zeros(n, dtype=torch.int64, device=META) for n in ((case.d_hidden,), ()))
        unscale = torch.ones(N_MODELS, 1, device=META)
        dead_latents = KnownDead(since, DEAD if case.aux == "all used" else 0)
        counted.hold([*model.parameters(), *model.buffers(), since, bad])
        with counted:
            for _ in range(2):
                counted.operations, counted.peak = [], counted.now
                rows = torch.empty(N_MODELS, case.batch, case.d_model, dtype=torch.float16, device=META).transpose(0, 1)
                x = model.normalize(rows.float() * unscale)
                are_dead = dead_latents.now(10**6) if case.aux != "off" else (None, None)
                l1_coeff = 1.0 if case.variant == "vanilla" else 0.0
                out = train.losses_and_gradients(model, x, case.batch, l1_coeff, 1 / 32, are_dead[0], None, are_dead[1])
                train.update(model, optimizer, 1.0)
                since.add_(len(x)).masked_fill_(out.fired, 0)
                bad = torch.where((bad == 0) & ~out.loss.isfinite(), 1, bad)
    return Step(counted.operations, counted.peak)


# --- printing

HEADER = """| variant | latents | auxiliary loss | launches | TFLOP | GB moved | peak GB | ms | tokens/s | of the floor |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"""


def line(case: Case, step: Step, card: Card) -> str:
    """A line of the table."""
    seconds = step.seconds(card)
    active = case.k if case.variant == "batch_topk" else None
    rate = {"bfloat16": card.bfloat16, "float32": card.float32, "copy": card.memory}
    least = floor((case.variant, case.d_model, case.d_hidden, case.batch, active), rate, case.dtype)
    return (
        f"| {case.variant} | {case.d_hidden:,} | {case.aux} | {sum(o.launches for o in step.operations)} "
        f"| {sum(o.flops for o in step.operations) / 1e12:.2f} | {sum(o.moved(card) for o in step.operations) / 1e9:.1f} "
        f"| {step.peak / 1e9:.2f} | {1e3 * seconds:.2f} | {case.batch / seconds:,.0f} | {least / seconds:.0%} |"
    )


def print_operations(case: Case, card: Card) -> None:
    """The operations of one case, those of one line of the code together, longest first."""
    seconds, moved, times = Counter(), Counter(), Counter()
    for operation in count(case).operations:
        key = operation.where, operation.name
        seconds[key] += operation.seconds(card)
        moved[key] += operation.moved(card)
        times[key] += operation.launches
    for (where, name), value in seconds.most_common():
        print(f"{1e3 * value:8.3f} ms  {moved[where, name] / 1e9:7.3f} GB  {times[where, name]:3d} launches  {name:24} {where}")


def memory(case: Case, k_start: float = 1) -> float:
    """Bytes that train.py asks for before such a run, which begins with k_start times k active latents."""
    config = SimpleNamespace(
        **case._asdict(), k_start=k_start, batch_size=case.batch, micro_batch_size=case.batch, compute_dtype=case.dtype
    )
    return sum(training_bytes(config, N_MODELS, case.d_model, 1, on_cpu=False).values())


def fits(batch: int, k: int) -> Iterator[str]:
    """The lines of a table: what runs need, which cards hold them, and hours for 100M tokens there."""
    yield (
        "| model | variant | latents | GB | " + " | ".join(f"hours on {name}, {size} GB" for name, size in SIZES.items()) + " |"
    )
    yield "|---|---|---:|---:|" + "---:|" * len(SIZES)
    for model, d_model in MODELS.items():
        for variant in ("batch_topk", "vanilla"):
            for d_hidden in (16_384, 32_768, 65_536, 131_072, 262_144):
                case = Case(variant, d_hidden, d_model=d_model, batch=batch, k=k)
                needed, step = memory(case, REAL["k_start"]), count(case)
                hours = {name: 1e8 / batch * step.seconds(CARDS[name]) / 3600 for name in SIZES}
                cells = [f"{hours[name]:.2f}" if needed < (size - RESERVED) * 1e9 else "" for name, size in SIZES.items()]
                yield f"| {model} | {variant} | {d_hidden:,} | {needed / 1e9:.1f} | " + " | ".join(cells) + " |"


def tables(card: Card, cases: list[Case]) -> Iterator[str]:
    """The lines of the table, one after the other as they are counted."""
    yield from HEADER.splitlines()
    yield from (line(case, count(case), card) for case in cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--d-hidden", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--compute-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--variant", choices=["batch_topk", "vanilla"], nargs="+", default=["batch_topk", "vanilla"])
    parser.add_argument("--memory", action="store_true", help="what fits on cards of 24, 48 and 80 GB, and hours, instead")
    parser.add_argument("--operations", action="store_true", help="every operation of the first case, instead of the table")
    args = parser.parse_args()
    card = CARDS[args.card]
    if args.memory:
        for text in fits(args.batch_size, args.k):
            print(text, flush=True)
        return
    size = (args.d_model, args.k, args.batch_size, args.compute_dtype)
    cases = [Case(variant, d_hidden, aux, *size) for d_hidden in args.d_hidden for variant in args.variant for aux in AUX]
    how = f"2 x {args.d_model}, batches of {args.batch_size:,}, k {args.k}, {args.compute_dtype}"
    print(f"{args.card}, {how}: counted, not measured\n")
    if args.operations:
        print_operations(cases[0], card)
        return
    for text in tables(card, cases):
        print(text, flush=True)


if __name__ == "__main__":
    main()
