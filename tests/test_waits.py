"""No operation of a training step waits for the device, found without one: on CUDA such a step would leave it idle.

The real loop of train.py runs on PyTorch's meta device, whose tensors have no values: whatever asks for one fails by itself
(`item`, `tolist`, `cpu`, masks as indices, `nonzero`, `unique`, `repeat_interleave` without a size, `bincount`). Copies that
are not from pinned memory are refused here. What a log line and a save wait for is left out.
"""

import re
import signal
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import numbered, write
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the kernels need triton")
import train
from benchmarks.roofline import FREE, META, Case, as_on_cuda, count, tensors_of
from config import TrainConfig
from ops import dead
from ops.shard import ALONE
from run import flags
from sources import batches
from sources.live import LiveActivations
from sources.mixing import MixingBuffer, Refill
from sources.source import Source

D_MODEL, LATENTS, ROWS, STEPS = 8, 64, 32, 6
DEAD = 5  # latents, as the device says


class Waits(Exception):
    pass


class NoWaits(TorchDispatchMode):
    """Refuses copies between host and device that are not from pinned memory or that the host waits for; names operations."""

    def __init__(self):
        super().__init__()
        self.pinned, self.names = {}, []

    def is_pinned(self, t) -> bool:
        return t.untyped_storage()._cdata in self.pinned

    def pin(self, t):
        self.pinned[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, options = op.overloadpacket.__name__, dict(kwargs or {})
        pinned = options.pop("pin_memory", False)
        if name == "is_pinned":
            return self.is_pinned(args[0])
        if name == "_pin_memory":
            return self.pin(args[0].clone())
        if name == "copy_" and args[1].device == META and args[0].device.type == "cpu":
            if not (self.is_pinned(args[0]) and (options.get("non_blocking") or args[2:] == (True,))):
                raise Waits(f"{op} to the host")
            return args[0].fill_(DEAD)
        out = op(*args, **options)
        given, found = tensors_of((args, options)), tensors_of(out)
        from_host = [t for t in given if t.device.type == "cpu"]
        on_device = any(t.device == META for t in given + found)
        if name in ("copy_", "_to_copy") and from_host and on_device:
            if not (self.is_pinned(from_host[0]) and (options.get("non_blocking") or True in args[2:])):
                raise Waits(f"{op} from memory that is not pinned, or waited for")
            self.names.append("upload")
        elif on_device:
            indices = tensors_of(args[1:2]) if name.startswith(("index", "_index_put")) else []
            if any(t.device.type == "cpu" for t in indices):
                raise Waits(f"{op} with an index of the host")
            if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
                raise Waits(f"{op} with a mask")
            self.names.append(name)
        return self.pin(out) if pinned else out


class NoValues(TorchFunctionMode):
    """Refuses tensors that are made on the device from values of the host; `full`, `zeros` and `arange` do not wait."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor) and torch.device((kwargs or {}).get("device") or "cpu") == META:
            raise Waits(f"{function.__name__} on the device from values of the host")
        return function(*args, **kwargs or {})


class AtOnce:
    """In the place of batches.Ahead: modes hold in one thread."""

    def __init__(self, items, *args):
        self.items = items

    def __iter__(self):
        return self.items

    def close(self, **_):
        self.items.close()


@pytest.fixture
def card(monkeypatch):
    """The meta device in the place of CUDA; what log lines and saves ask of it is left out."""
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    stream = SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: None)
    monkeypatch.setattr(batches, "Ahead", AtOnce)
    monkeypatch.setattr("sources.streamed.Ahead", AtOnce)
    monkeypatch.setattr(train.machine, "usable_device", lambda name: "meta")
    monkeypatch.setattr(train, "require_finite_loss", lambda *args: None)
    shown = dict.fromkeys(("loss", "explained_variance", "l0_loss", "dead_fraction"), 0.5)
    monkeypatch.setattr(train, "training_metrics", lambda *args: shown)
    monkeypatch.setattr(train.checkpoint, "save", lambda *args: None)
    monkeypatch.setattr(train, "finish", lambda *args: None)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with as_on_cuda(lambda kernel, grid, first, *args, **constants: None):
        yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)


def run(tmp_path, monkeypatch, *given) -> list[str]:
    """Train for STEPS steps. Returns the operations of the loop on the device."""
    watched = NoWaits()
    timed = train.monitor.Watched.timed

    def inside(self, stream):
        with watched, NoValues():
            yield from timed(self, stream)

    monkeypatch.setattr(train.monitor.Watched, "timed", inside)
    every = ["--num-tokens", STEPS * ROWS, "--batch-size", ROWS, "--d-hidden", LATENTS, "--compute-dtype", "bfloat16"]
    every += ["--val-tokens", 64, "--dead-window", 0.2, "--wandb", "disabled", "--output-dir", tmp_path]
    every += ["--k", 4] if "batch_topk" in given else []
    train.main(flags.parse(TrainConfig, list(map(str, [*every, *given]))), ALONE)
    return watched.names


def stored(tmp_path) -> list:
    rows = numbered(500, D_MODEL, dtype="float16")
    return ["--base-dataset", write(tmp_path / "a", rows), "--ft-dataset", write(tmp_path / "b", -rows)]


def streamed(tmp_path) -> list:
    given = []
    for flag in ("--base-dataset", "--ft-dataset"):
        (folder := tmp_path / flag.strip("-")).mkdir()
        values = pa.array(numbered(500, D_MODEL, dtype="float32").ravel())
        pq.write_table(pa.table({"activation": pa.FixedSizeListArray.from_arrays(values, D_MODEL)}), folder / "train.parquet")
        given += [flag, folder]
    return [*given, "--streaming", "--buffer-tokens", 100]


SOURCES = {"planted": lambda tmp_path: [], "stored": stored, "streamed": streamed}


def test_products_of_a_run_add_up_in_float32(card, tmp_path, monkeypatch):
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    for name in names:
        setattr(matmul, name, True)
    run(tmp_path, monkeypatch)
    assert not any(getattr(matmul, name) for name in names)


def test_a_device_with_too_little_memory_is_refused_before_the_start(card, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**5, 10**9))
    with pytest.raises(ValueError, match=r"needs 0.0 GB of memory on meta and 0.0 GB are free: lower --d-hidden \(for"):
        run(tmp_path, monkeypatch)


@pytest.mark.parametrize("variant", ["batch_topk", "vanilla"])
@pytest.mark.parametrize("kind", SOURCES)
def test_no_operation_of_a_step_waits(kind, variant, card, tmp_path, monkeypatch):
    names = run(tmp_path, monkeypatch, *SOURCES[kind](tmp_path), "--variant", variant, "--aux-coeff", 0.1)
    assert names.count("_foreach_add_") == STEPS


def live_source(device: torch.device) -> Source:
    """Live activations whose buffer holds numbered rows, without the models that compute them."""
    source = LiveActivations.__new__(LiveActivations)
    source.buffer = torch.arange(100.0).repeat_interleave(2 * D_MODEL).view(100, 2, D_MODEL).half().to(device)
    source.d_model, source.model_seconds, source.resumed, source.beside, source.closed = D_MODEL, 0.0, None, False, None
    reader = SimpleNamespace(read=lambda number: Refill(50, None), seek=lambda start: None, close=lambda: None)
    source.mixing = MixingBuffer(reader, seed=0, buffer_rows=100, flag="--text", contents="the texts")
    return source


@pytest.mark.parametrize("buffer", ["cpu", "meta"])
def test_live_batches_do_not_wait(buffer, card, monkeypatch):
    """Nor does the device for their copy from the host, which has a stream of its own."""
    source, streams, waits = live_source(torch.device(buffer)), [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "uploads")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=waits.append))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: streams.append(stream) or nullcontext())
    with NoWaits() as watched:
        for batch in source.batches(ROWS, 200, META):
            assert batch.x.device == META and batch.x.shape[1:] == (2, D_MODEL)
    assert "upload" in watched.names
    assert waits == [stream for stream in streams if stream == "uploads"] and bool(waits) == (buffer == "cpu")


@pytest.mark.parametrize("buffer", ["cpu", "meta"])
def test_no_operation_of_a_live_step_waits(buffer, card, tmp_path, monkeypatch):
    source = live_source(torch.device(buffer))
    rows = torch.from_numpy(numbered(100, D_MODEL)).half()[:, None].repeat(1, 2, 1)
    source.validation, source.val_rows, source.fills = rows, len(rows), [SimpleNamespace(values=rows)]
    source.name, source.fill_rows, source.stored_scale, source.record = "models", 50, torch.ones(2), {}
    monkeypatch.setattr(train, "open_source", lambda given, config, *_: (source, config))
    names = run(tmp_path, monkeypatch, "--variant", "batch_topk", "--aux-coeff", 0.1)
    assert names.count("_foreach_add_") == STEPS


def test_live_batches_are_those_of_the_mixing_order():
    cpu = torch.device("cpu")
    rows = [int(i) for batch in live_source(cpu).batches(ROWS, 200, cpu) for i in batch.x[:, 0, 0]]
    other = live_source(cpu).mixing
    expected = []
    while len(expected) < 200:
        expected += other.take(len(expected), 200 - len(expected)).tolist()
    assert rows == expected


FAULTS = {  # what a step could do that waits
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "bool": lambda x: bool((x > 0).any()),
    "mask": lambda x: x[x > 0],
    "put where a mask is": lambda x: x.__setitem__(x > 0, 0.0),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "bincount": lambda x: x.long().bincount(minlength=3),
    "split": lambda x: x.split(x.long().tolist()),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "upload": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "upload of a copy": lambda x: x[:3].copy_(torch.ones(3)),
    "pinned, but waited for": lambda x: torch.ones(3).pin_memory().to(x.device),
    "index of the host": lambda x: x[torch.zeros(3, dtype=torch.int64)],
    "download": lambda x: torch.empty(len(x)).copy_(x, non_blocking=True),
}
HARMLESS = {
    "masked_fill": lambda x: x.masked_fill_(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 1.0),
    "pinned": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "a known size": lambda x: x.repeat_interleave(x.long(), output_size=9),
    "zeros": lambda x: torch.zeros(3, device=x.device),
    "pinned download": lambda x: torch.empty(len(x)).pin_memory().copy_(x, non_blocking=True),
}


@pytest.mark.parametrize("fault", [*FAULTS, *HARMLESS])
def test_what_waits_is_found_in_a_step(fault, card, tmp_path, monkeypatch):
    normalize = train.CrossCoder.normalize

    def faulty(self, x):
        (FAULTS | HARMLESS)[fault](x.flatten())
        return normalize(self, x)

    monkeypatch.setattr(train.CrossCoder, "normalize", faulty)
    if fault in HARMLESS:
        run(tmp_path, monkeypatch)
        return
    with pytest.raises((Waits, RuntimeError, NotImplementedError)) as found:
        run(tmp_path, monkeypatch)
    assert re.search("meta|Waits|waited|pinned|host|mask|values", f"{found.type} {found.value}", re.IGNORECASE)


@pytest.mark.parametrize("variant", ["batch_topk", "vanilla"])
@pytest.mark.parametrize("aux", ["off", "all used"])
def test_the_counted_step_is_that_of_the_loop(variant, aux, card, tmp_path, monkeypatch):
    """benchmarks/roofline.py writes the few lines of a step down again."""
    monkeypatch.setattr(dead, "EVERY", 1)
    given = [
        *stored(tmp_path),
        "--variant",
        variant,
        "--aux-coeff",
        0 if aux == "off" else 0.1,
        "--l1-coeff",
        0 if variant == "batch_topk" else 1,
    ]
    names = run(tmp_path, monkeypatch, *given)
    ends = [i for i, name in enumerate(names) if name == "_foreach_add_"]
    counted = [op.name for op in count(Case(variant, LATENTS, aux, D_MODEL, 4, ROWS)).operations]
    step = names[ends[-3] : ends[-2]]
    only_in_one = Counter(name for name in step if name not in FREE)
    only_in_one.subtract(Counter(name for name in counted if name in set(step)))
    assert {name: n for name, n in only_in_one.items() if n} == {"upload": 1}
