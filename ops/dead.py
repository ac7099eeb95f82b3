"""Which latents are dead, for the auxiliary loss: no latent is looked at on the host, which would wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.shard import ALONE, Shard

EVERY = 16  # steps between questions: more than a host is ahead of its device, so that an answer is there when it is read
ROUNDED = 512  # places for dead latents are a multiple of this


class DeadLatents:
    """The latents that have not been active for so many tokens.

    On a CPU they are counted at every step. On CUDA the host only knows how many there are at most: every EVERY steps it asks
    how many have been silent for so long that they could be dead within 2 * EVERY steps; EVERY steps later it reads the answer.

    Args:
        since: [latents of this process] tokens since each was active, kept up to date by the caller.
        after: tokens after which a latent is dead. batch_size: most tokens of a step.
    """

    def __init__(self, since: Tensor, after: int, batch_size: int, shard: Shard = ALONE):
        self.since, self.after, self.shard, self.every = since, after, shard, EVERY
        self.soon = after - 2 * EVERY * batch_size
        self.asks = since.device.type != "cpu"
        self.forget()

    def forget(self) -> None:
        """Ask anew at the next step: a run that goes on from a checkpoint knows no more."""
        self.step, self.most = 0, 0
        self.asked: tuple[Tensor, torch.cuda.Event] | None = None

    def now(self, tokens: int) -> tuple[Tensor | None, int | None]:
        """[latents] which are dead, before a step; None where none is in any process. Then how many are at most in any one.

        On CUDA it may be that none is. None for the number: they can be counted. tokens: of the run so far.
        """
        if not self.asks:
            dead = self.since >= self.after if tokens >= self.after else None  # none can be before
            return (dead if dead is not None and self.shard.any_process(bool(dead.any())) else None), None
        if self.step % self.every == 0:
            asked = self.ask()
            self.most = self.answer(self.asked or asked)
            self.asked = asked
        self.step += 1
        return (self.since >= self.after, self.most) if self.most else (None, None)

    def ask(self) -> tuple[Tensor, torch.cuda.Event]:
        """How many could be dead soon, on its way to the host."""
        answer, copied = torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
        answer.copy_((self.since >= self.soon).sum(), non_blocking=True)
        copied.record()
        return answer, copied

    def answer(self, asked: tuple[Tensor, torch.cuda.Event]) -> int:
        """The most in any process, rounded up."""
        most, copied = asked
        copied.synchronize()
        return -(int(self.shard.all_min(-most)) // ROUNDED) * ROUNDED
