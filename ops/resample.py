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

# Found on planted worlds, seeds 101 and 102 (docs/recipes.md). More often fills the dictionary with copies of the same concept.
BEGIN = 0.2  # share of the run after which the frequent concepts have their latents and what is idle stays idle
TIMES = 300  # looks that a whole run would have, up to twice as many where it has under 600 steps
TOKENS = 64  # of a batch for each latent that may be resampled
IDLE = 0.4  # decoder norms, each in the model where it is largest, below this multiple of the usual one
UNUSUAL = 8  # the squared residuals differ by more than this multiple of the batch's mean difference
ONE_SIDED = 0.1  # and by more than this share of their sum: what both models miss, and rounding, is not that
NEAR = 0.4  # cosine of a latent that already points there, or of a token that was chosen before
SLOWED = 1.5  # Adam's squared gradient of a resampled latent, in units of the mean of the latents in use


def is_due(step: int, steps: int, until: float) -> bool:
    """Whether idle latents are resampled after this step. until: the share of the run at which that ends."""
    return BEGIN * steps <= step <= until * steps and step % max(1, steps // TIMES) == 0


@torch.no_grad()
def resample_idle(crosscoder: CrossCoder, optimizer: torch.optim.Adam, x: Tensor, x_hat: Tensor) -> None:
    """Point idle latents at the residuals of tokens that one model alone leaves unexplained.

    Decoder row and encoder get the residual's direction over all models and the mean norm of the latents in use, the bias 0.
    Adam forgets their gradient and takes SLOWED times the mean squared gradient of the latents in use, a compromise between
    worlds that want more and less (docs/recipes.md).
    With one model, or several that are the same, nothing happens. Needs no look at the device by the host.

    x, x_hat: [batch, n_models, d_model] normalised activations and their reconstruction, the same in every process.
    """
    shard, W_dec = crosscoder.shard, crosscoder.W_dec.flatten(1)  # [latents, n_models * d_model]
    residual = x - x_hat
    squared = residual.square().sum(-1)  # [batch, n_models]
    gap = squared.amax(1) - squared.amin(1)  # [batch]
    count = min(max(1, len(x) // TOKENS), crosscoder.d_hidden)
    widest, token = gap.topk(count)
    directions = torch.nn.functional.normalize(residual[token].flatten(1), dim=1)  # [count, n_models * d_model]
    nearest = (directions @ W_dec.T / W_dec.norm(dim=1).clamp_min(1e-12)).amax(1)  # [count] cosine
    missing = (widest > UNUSUAL * gap.mean()) & (widest > ONE_SIDED * squared[token].sum(-1))  # [count]
    missing &= (-shard.all_min(-nearest) < NEAR) & ((directions @ directions.T).tril(-1).amax(1) < NEAR)

    norms = crosscoder.decoder_norms().amax(-1)  # [latents]; a sum over models would call exclusive latents half idle
    usual = shard.all_sum(norms.square().sum()) / shard.all_sum(norms.sum())  # their mean, where a large one counts for more
    in_use = (norms >= IDLE * usual).to(norms.dtype)
    norm, latent = (t[:count] for t in norms.sort(stable=True))  # of this process, the most idle first
    number = latent + crosscoder.latents.start
    idlest = shard.gather_rows(number)[shard.gather_rows(norm).argsort(stable=True)[:count]]  # [count] of all processes
    takes = number[:, None] == idlest  # the most idle of all takes the first token, and so on
    place = takes.int().argmax(1)
    chosen = takes.any(1) & (norm < IDLE * usual) & missing[place]

    def mean_in_use(values: Tensor) -> Tensor:
        """[latents, ...] -> [...] mean over the latents in use of all processes."""
        return shard.all_sum(in_use @ values) / shard.all_sum(in_use.sum())

    for weight in (crosscoder.W_dec, crosscoder.enc_rows, crosscoder.b_enc):
        of_adam = optimizer.state[weight]
        rows, means, squares = (t.view(len(t), -1) for t in (weight, of_adam["exp_avg"], of_adam["exp_avg_sq"]))
        size = mean_in_use(rows.norm(dim=1)) if weight is not crosscoder.b_enc else 0.0
        square = SLOWED * mean_in_use(squares)
        for t, new in ((rows, directions[place, : rows.shape[1]] * size), (means, 0.0), (squares, square)):
            t[latent] = torch.where(chosen[:, None], new, t[latent])
