"""The few collectives. With one process they do nothing, so that the training loop reads as if there were one.

    torchrun --nproc-per-node N train.py ...

Each process owns a slice of the latents; rows, the reconstruction and b_dec are the same in all of them. What they exchange
in a step does not grow with the dictionary. NCCL between CUDA devices, gloo between CPUs; gloo groups for what the host must
know (did someone get a signal, did someone read a NaN), so that asking does not wait for the device. A process that is killed
or no longer answers ends the others within a minute, with a ConnectionError.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(seconds=60)  # after which a process that hears nothing from the others gives up
WHILE_ONE_WORKS = timedelta(hours=1)  # the same outside of a step, where the others wait for one that writes or hashes
sent = 0  # bytes this process has put into collectives
_host = _patient = None  # gloo groups


def start(device: torch.device) -> torch.device:
    """Join the other processes that torchrun started, if any. Returns this process's own device; only process 0 prints."""
    global _host, _patient
    if size() == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    _host, _patient = (dist.new_group(backend="gloo", timeout=timeout) for timeout in (TIMEOUT, WHILE_ONE_WORKS))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    return device


def stop() -> None:
    """Leave the other processes in order: threads of theirs would else be cut off."""
    global _host, _patient
    if dist.is_initialized():
        _host = _patient = None  # groups that outlive the interpreter abort the process now and then
        dist.destroy_process_group()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def part(n: int, of: int | None = None) -> slice:
    """The share of n things in a row that this process (or process `of`) owns."""
    of = rank() if of is None else of
    return slice(of * n // size(), (of + 1) * n // size())


@contextmanager
def heard():
    """ConnectionError with one sentence where a collective fails because another process is gone or silent."""
    try:
        yield
    except RuntimeError:  # gloo has no kind of its own
        raise ConnectionError(
            "another process of this run has ended, or has not answered for a minute; what it said is above, if it could say "
            "something. What was saved is whole: start all processes again with --resume"
        ) from None


# --- on the device


def all_sum(x: Tensor) -> Tensor:
    """The sum over all processes. Its gradient passes unchanged: what follows is computed alike in every process."""
    return x if size() == 1 else _AllSum.apply(x)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        _reduce(total, dist.ReduceOp.SUM)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad


def all_min(x: Tensor) -> Tensor:
    """The least over all processes, elementwise."""
    if size() > 1:
        x = x.clone()
        _reduce(x, dist.ReduceOp.MIN)
    return x


def _reduce(x: Tensor, how) -> None:
    global sent
    sent += x.nbytes
    with heard():
        dist.all_reduce(x, how)


def gather(x: Tensor) -> Tensor:
    """The parts of all processes, equally long, one after the other: [n, ...] -> [size * n, ...]."""
    global sent
    if size() == 1:
        return x
    x = x.contiguous()
    sent += x.nbytes
    parts = [torch.empty_like(x) for _ in range(size())]
    with heard():
        dist.all_gather(parts, x)
    return torch.cat(parts)


def gather_rows(x: Tensor) -> Tensor:
    """Every process's rows, however many, one after the other: [its rows, ...] -> [all rows, ...]."""
    if size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    with heard():
        dist.all_gather(counts, torch.tensor([len(x)]), group=_host)
    longest = int(max(counts))
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    return torch.cat([rows[:n] for rows, n in zip(gather(padded).split(longest), map(int, counts), strict=True)])


# --- on the host


def any_process(happened: bool, patient: bool = False) -> bool:
    """Whether it happened in any process. patient: one of them may first work on files for up to an hour."""
    if size() == 1:
        return happened
    flag = torch.tensor([happened], dtype=torch.int32)
    with heard():
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=_patient if patient else _host)
    return bool(flag)


def from_first(value: str) -> str:
    """The value that process 0 has, in all of them."""
    values = [value]
    if size() > 1:
        with heard():
            dist.broadcast_object_list(values, group=_patient)
    return values[0]


@contextmanager
def together():
    """Work that all must finish before any goes on, within an hour. An error in one process is an OSError in the others."""
    failed = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again when the others know
        failed = error
    elsewhere = any_process(failed is not None, patient=True)
    if failed:
        raise failed
    if elsewhere:
        raise OSError("another process could not do its part; it says why")
