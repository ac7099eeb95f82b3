"""Training steps on given rows, alone or under torchrun: what test_shard.py compares.

    python tests/sharded_steps.py OUT [OTHER]

For each variant fifty steps in float64 from the start, and where OTHER is the OUT of an earlier call also the last thirty of
them from OTHER's checkpoint. Idle latents and copies are resampled from step 10 to step 30.

OUT/VARIANT and OUT/VARIANT-resumed get checkpoints of steps 20 and 50, the saved crosscoder
and steps.safetensors, a line of metrics for each step.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from crosscoder import CrossCoder
from ops import resample
from ops.shard import Shard
from ops.weights import Adam
from run import checkpoint
from train import norm_of_gradient

resample.TOKENS = 16  # four latents at once
resample.SMALL = 1.0  # what was resampled is at once no longer idle, so that the metrics show it
resample.ONE_SIDED = 0.1  # more tokens count, so that latents are resampled at many looks
resample.NEAR = 0.75  # in ten dimensions any direction is nearer than 0.6 to one of 150 others, only some than this
D_MODEL, D_HIDDEN, BATCH, K = 10, 150, 64, 5
DEAD_AFTER = 3 * BATCH


def train(out: Path, variant: str, start_from: Path | None, shard: Shard) -> None:
    torch.manual_seed(0)  # torch's random state is a part of the checkpoints that are compared
    crosscoder = CrossCoder(D_MODEL, D_HIDDEN, 2, variant, K, 3, 1.0, compute_dtype=torch.float64, shard=shard)
    crosscoder.double()
    number = torch.arange(D_HIDDEN)[crosscoder.latents]
    rare = number % 3 == 0
    crosscoder.b_enc.data[rare] = -4.0  # fires on one token in some hundreds: dead now and then, and revived
    crosscoder.W_dec.data *= torch.where(number % 7 == 1, 0.1 + 0.0005 * number, 1.0)[:, None, None]  # some are idle
    direction = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction /= direction.norm()
    same = number % 40 == 7  # four, in four processes each in another one
    crosscoder.W_dec.data[same] = (1 + 0.001 * number[same])[:, None, None] * direction
    optimizer = Adam(crosscoder.parameters(), lr=3e-3)
    since_fired = torch.zeros(len(crosscoder.b_enc), dtype=torch.int64)
    done, lines = 0, []
    if start_from:
        tensors, state = checkpoint.read(start_from, crosscoder.latents)
        crosscoder.load_state_dict({name: tensors[name] for name in crosscoder.state_dict()})
        checkpoint.restore_step_tensors(optimizer, crosscoder, tensors)
        since_fired.copy_(tensors["tokens_since_fired"])
        done = state["step"]
    for step in range(done + 1, 51):
        x = torch.randn(BATCH, 2, D_MODEL, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x[(step + torch.tensor([0, 20, 40])) % BATCH, step % 2] *= 5  # what one model alone has
        x = shard.gather_rows(x[shard.part(BATCH)])  # as the reader does it
        losses = crosscoder.losses(x, 0.1, 0.5, since_fired >= DEAD_AFTER)
        losses.loss.backward()
        norm = norm_of_gradient(crosscoder)
        for p in crosscoder.parameters():
            p.grad /= norm.clamp_min(1.0)  # train.py leaves it to Adam, whose factor is float32
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if look := resample.look_after(step, 50, 0.6):
            resample.resample_idle(crosscoder, x, losses.x_hat, look)
        if step == 31:
            with patch.object(resample, "TURNS", 2 * D_HIDDEN):  # there are looks at which no latent has its turn
                resample.resample_idle(crosscoder, x, losses.x_hat, 2 * D_HIDDEN - 1)
        since_fired.add_(BATCH).masked_fill_(losses.fired, 0)
        norms = crosscoder.decoder_norms().sum(-1)
        W_dec = torch.nn.functional.normalize(crosscoder.W_dec.flatten(1), dim=1)
        copies = shard.all_sum((W_dec @ direction.flatten() > 0.8).sum())
        idle_now = shard.all_sum((norms < 0.4).sum())
        dead = shard.all_sum((since_fired >= DEAD_AFTER).sum())
        lines.append(
            torch.stack([v.detach().double() for v in [*losses[:5], crosscoder.threshold, norm, copies, idle_now, dead]])
        )
        if step in (20, 50):
            tensors = crosscoder.state_dict() | checkpoint.step_tensors(optimizer, crosscoder)
            out.mkdir(parents=True, exist_ok=True)
            checkpoint.write(
                out, step, tensors | {"tokens_since_fired": since_fired}, {}, keep=2, d_hidden=D_HIDDEN, shard=shard
            )
    crosscoder.save_pretrained(out / "crosscoder")
    if shard.rank == 0:
        save_file({"metrics": torch.stack(lines)}, out / "steps.safetensors")


if __name__ == "__main__":
    shard = Shard.of_torchrun()
    shard.join(torch.device("cpu"))
    folder, *other = map(Path, sys.argv[1:])
    for variant in ("vanilla", "batch_topk"):
        train(folder / variant, variant, None, shard)
        if other:
            train(folder / f"{variant}-resumed", variant, other[0] / variant / "checkpoints" / "step_00000020", shard)
    shard.leave()
