"""The collectives of processes that share one dictionary or one collection; with one process they return their argument.

    torchrun --standalone --nproc-per-node N train.py ...

Training, each process owns a slice of the latents; rows, the reconstruction and b_dec are the same in all of them. What they
exchange in a step does not grow with the dictionary, except at a look for idle latents; rows of live models go from the process
that made them to all. Collecting, they exchange counts alone. NCCL between CUDA devices; gloo between CPUs, and for what the
host must know (did someone get a signal, did someone read a NaN), so that asking does not wait for the device. A process that
is killed or no longer answers ends the others within a minute, with a ConnectionError.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(seconds=60)  # after which a process that hears nothing from the others gives up
WHILE_ONE_WORKS = timedelta(hours=1)  # the same outside of a step, where the others wait for one that writes or hashes


class Shard:
    """This process's place among the `size` processes that share a dictionary, and their collectives.

    Code that exchanges data with the other processes takes it as an argument; without one (`ALONE`, one process of one) nothing
    calls torch.distributed. Every collective must be called by all processes, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.sent = 0  # bytes this process has put into collectives on the device
        self._patient: dist.ProcessGroup | None = None  # a gloo group whose timeout is an hour

    @classmethod
    def of_torchrun(cls) -> Shard:
        """The place that torchrun's environment gives this process; one of one without torchrun. `join` comes next."""
        return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "RANK" in os.environ else cls()

    def join(self, device: torch.device) -> torch.device:
        """Connect to the other processes, if any. Returns this process's own device, which is then CUDA's current one.

        ValueError where a machine has fewer CUDA devices than processes.
        """
        if device.type == "cuda":
            index = int(os.environ["LOCAL_RANK"]) if self.size > 1 else device.index or 0
            if index >= (there := torch.cuda.device_count()):
                raise ValueError(
                    f"process {index} of this machine has no CUDA device, there are {there}: torchrun --nproc-per-node {there}"
                )
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        if self.size > 1:
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
                self._patient = dist.new_group(backend="gloo", timeout=WHILE_ONE_WORKS)
            except RuntimeError as error:
                raise ConnectionError(
                    f"the {self.size} processes of this run did not find each other ({str(error).splitlines()[0]}): start them "
                    "again, on one machine with torchrun --standalone, which takes a free port"
                ) from None
        return device

    def leave(self) -> None:
        """End the connection to the other processes, so that no thread of torch.distributed is cut off at exit."""
        if self._patient:
            self._patient = None  # groups that outlive the interpreter abort the process now and then
            dist.destroy_process_group()

    def part(self, n: int, of: int | None = None) -> slice:
        """The share of n things in a row that this process (or process `of`) owns."""
        of = self.rank if of is None else of
        return slice(of * n // self.size, (of + 1) * n // self.size)

    # --- on the device

    def all_sum(self, x: Tensor) -> Tensor:
        """The sum over all processes. Its gradient passes unchanged: what follows is computed alike in every process."""
        return x if self.size == 1 else _AllSum.apply(x, self)

    def all_min(self, x: Tensor) -> Tensor:
        """The least over all processes, elementwise."""
        return x if self.size == 1 else self._reduced(x, dist.ReduceOp.MIN)

    def _reduced(self, x: Tensor, how) -> Tensor:
        x = x.clone()
        self.sent += x.nbytes
        with lost_process_errors():
            dist.all_reduce(x, how)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The parts of all processes, equally long, one after the other: [n, ...] -> [size * n, ...]."""
        if self.size == 1:
            return x
        x = x.contiguous()
        self.sent += x.nbytes
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with lost_process_errors():
            dist.all_gather(parts, x)
        return torch.cat(parts)

    def gather_rows(self, x: Tensor) -> Tensor:
        """Every process's rows, however many, one after the other: [its rows, ...] -> [all rows, ...]."""
        if self.size == 1:
            return x
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with lost_process_errors():
            dist.all_gather(counts, torch.tensor([len(x)]))
        longest = int(max(counts))
        padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
        return torch.cat([rows[:n] for rows, n in zip(self.gather(padded).chunk(self.size), map(int, counts), strict=True)])

    def broadcast(self, x: Tensor, process: int) -> Tensor:
        """x as the given process has it; the others give memory of its shape, which is overwritten."""
        if self.size > 1 and len(x):
            self.sent += x.nbytes if process == self.rank else 0
            with lost_process_errors():
                dist.broadcast(x, process)
        return x

    # --- on the host

    def any_process(self, happened: bool, patient: bool = False) -> bool:
        """Whether it happened in any process. patient: one of them may first work on files for up to an hour."""
        if self.size == 1:
            return happened
        flag = torch.tensor([happened], dtype=torch.int32)
        with lost_process_errors():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._patient if patient else None)
        return bool(flag)

    def from_first(self, value: str) -> str:
        """The value that process 0 has, in all of them."""
        values = [value]
        if self.size > 1:
            with lost_process_errors():
                dist.broadcast_object_list(values, group=self._patient)
        return values[0]

    def gather_objects(self, value) -> list:
        """Every process's value, in the order of the processes. One of them may work for up to an hour first."""
        values = [value] * self.size
        if self.size > 1:
            with lost_process_errors():
                dist.all_gather_object(values, value, group=self._patient)
        return values

    def whole(self, x: Tensor, n: int) -> Tensor | None:
        """All n rows in process 0, of which each process has its `part`: [part, ...] -> [n, ...] on the host; None elsewhere.

        Process 0 holds them once, the others no more than their own.
        """
        if self.size == 1:
            return x
        x, rows = x.cpu().contiguous(), None
        with lost_process_errors():
            if self.rank > 0:
                dist.send(x, 0, group=self._patient)
            else:
                rows = x.new_empty(n, *x.shape[1:])
                rows[self.part(n)] = x
                for process in range(1, self.size):
                    dist.recv(rows[self.part(n, process)], process, group=self._patient)
        return rows

    @contextmanager
    def together(self):
        """Work that all must finish before any goes on, within an hour. An error in one process is an OSError in the others."""
        failed = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again when the others know
            failed = error
        elsewhere = self.any_process(failed is not None, patient=True)
        if failed:
            raise failed
        if elsewhere:
            raise OSError("another process could not do its part; it says why")


ALONE = Shard()


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shard):
        return shard._reduced(x, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@contextmanager
def lost_process_errors():
    """ConnectionError with one sentence where a collective fails because another process is gone or silent."""
    try:
        yield
    except RuntimeError as error:  # gloo has no kind of its own
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]  # without gloo's [file:line] and advice
        raise ConnectionError(
            "another process of this run has ended, or has not answered for a minute (an hour where files are written or "
            f"models read); it says why above, if it could ({reason}). What was saved is whole: start all again (train.py with "
            "--resume)"
        ) from None
