"""Idle latents start anew at what one of the models holds and no latent explains yet.

A token at which the models' residuals differ in size most likely holds a concept that only one of them has and that the
dictionary misses. The rarest of these have too few tokens to win a latent by gradient alone. So a latent that shared concepts
have left idle is given the token's residual as its direction, as Bricken et al. ("Towards Monosemanticity", Anthropic 2023)
resample dead neurons from inputs of high loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from crosscoder import CrossCoder

# Found on planted worlds, seeds 101 and 102 (docs/recipes.md).
BEGIN = 0.2  # share of the run after which the frequent concepts have their latents and what is idle stays idle
LOOKS = 300  # that a whole run of many steps would have; of some hundred, up to one a step
TOKENS = 64  # of a batch for each latent that may be resampled
IDLE = 0.4  # decoder norms, each in the model where it is largest, below this multiple of the usual one
SMALL = 0.2  # norm of a resampled row over all models, of the usual row: harms tokens without its concept little, and grows
UNUSUAL = 8  # the squared residuals differ by more than this multiple of the batch's mean difference
ONE_SIDED = 0.3  # and by more than this share of their sum: not what both models miss, nor small errors of a found concept
NEAR = 0.4  # cosine of a latent that already points there, or of a token that was chosen before


def look_after(step: int, steps: int, until: float) -> int:
    """The number of the look for idle latents that follows this step, 0 for none. until: the share of the run with looks."""
    look, rest = divmod(step, max(1, steps // LOOKS))
    return look if rest == 0 and BEGIN * steps <= step <= until * steps else 0


@torch.no_grad()
def resample_idle(crosscoder: CrossCoder, x: Tensor, x_hat: Tensor, look: int) -> None:
    """Point idle latents at the residuals of tokens that one model alone leaves unexplained.

    Decoder row and encoder get the residual's direction over all models, the encoder with the mean norm of the latents in use,
    the decoder row with a share of theirs, and the bias becomes 0. Idle latents take turns, as what was resampled needs time
    to grow until it is no longer idle; where they are few, the same ones have several looks in a row. With one model, or
    several that are the same, nothing happens. Needs no look at the device by the host.

    x, x_hat: [batch, n_models, d_model] normalised activations and their reconstruction, the same in every process.
    look: its number. With `count` latents that could be resampled, it takes the idle ones from latent look * count on.
    """
    shard, W_dec = crosscoder.shard, crosscoder.W_dec.flatten(1)  # [latents, n_models * d_model]
    residual = x - x_hat
    squared = residual.square().sum(-1)  # [batch, n_models]
    most, least = squared.amax(1), squared.amin(1)  # [batch]
    gap = most - least
    count = min(-(-len(x) // TOKENS), crosscoder.d_hidden)  # rounded up: the same where a few rows were left out
    widest, token = gap.topk(count)
    directions = torch.nn.functional.normalize(residual[token].flatten(1), dim=1)  # [count, n_models * d_model]
    nearest = (directions @ W_dec.T / W_dec.norm(dim=1).clamp_min(1e-12)).amax(1)  # [count] cosine
    missing = (widest > UNUSUAL * gap.mean()) & (widest > ONE_SIDED * (most + least)[token])  # [count]
    missing &= (-shard.all_min(-nearest) < NEAR) & ((directions @ directions.T).tril(-1).amax(1) < NEAR)

    norms = crosscoder.decoder_norms().amax(-1)  # [latents]; a sum over models would call exclusive latents half idle
    usual = shard.all_sum(norms.square().sum()) / shard.all_sum(norms.sum())  # their mean, where a large one counts for more
    idle = norms < IDLE * usual
    number = torch.arange(len(norms), device=norms.device) + crosscoder.latents.start
    turn = ((number - look * count) % crosscoder.d_hidden).where(idle, crosscoder.d_hidden)  # [latents]
    turn, latent = (t[:count] for t in turn.sort(stable=True))  # of this process
    first = shard.gather_rows(turn).sort().values[:count]  # of all processes
    takes = turn[:, None] == first  # the first takes the first token, and so on
    place = takes.int().argmax(1)
    chosen = takes.any(1) & idle[latent] & missing[place]

    for weight, share in ((crosscoder.W_dec, SMALL), (crosscoder.enc_rows, 1.0), (crosscoder.b_enc, 0.0)):
        rows = weight.view(len(weight), -1)  # [latents, n_models * d_model], or [latents, 1] for the bias
        size = shard.all_sum(rows.norm(dim=1).masked_fill(idle, 0).sum()) / shard.all_sum((~idle).sum())
        rows[latent] = torch.where(chosen[:, None], share * size * directions[place, : rows.shape[1]], rows[latent])
