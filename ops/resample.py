"""Idle latents and copies start anew at what one of the models holds and no latent explains yet.

A token at which the models' residuals differ in size most likely holds a concept that only one of them has and that the
dictionary misses. The rarest of these have too few tokens to win a latent by gradient alone. So a latent that shared concepts
have left idle, or one that points where a larger one does, is given the token's residual as its direction, as Bricken et al.
("Towards Monosemanticity", Anthropic 2023) resample dead neurons from inputs of high loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from crosscoder import CrossCoder

# Found on planted worlds, seeds 101 to 103 (docs/recipes.md).
BEGIN = 0.2  # share of the run after which the frequent concepts have their latents and what is idle stays idle
LOOKS = 300  # that a whole run of many steps would have; of some hundred, up to one a step
TURNS = 20  # looks until it is a latent's turn again: time to grow until it is no longer idle
TOKENS = 64  # of a batch for each latent that may be resampled
IDLE = 0.4  # decoder norms, each in the model where it is largest, below this multiple of the usual one
COPY = 0.8  # cosine of its decoder row with that of a latent of larger norm
SMALL = 0.3  # largest norm of a resampled row, of the usual one: harms tokens without its concept little, and grows
UNUSUAL = 8  # the squared residuals differ by more than this multiple of the batch's mean difference
ONE_SIDED = 0.3  # and by more than this share of their sum: not what both models miss, nor small errors of a found concept
NEAR = 0.4  # cosine of a latent that already points there, or of a token that was chosen before
AT_ONCE = 256  # latents that are compared with all others at once, which bounds the memory


def look_after(step: int, steps: int, until: float) -> int:
    """The number of the look for idle latents that follows this step, 0 for none. until: the share of the run with looks."""
    look, rest = divmod(step, max(1, steps // LOOKS))
    return look if rest == 0 and BEGIN * steps <= step <= until * steps else 0


@torch.no_grad()
def resample_idle(crosscoder: CrossCoder, x: Tensor, x_hat: Tensor, look: int) -> None:
    """Point idle latents and copies at the residuals of tokens that one model alone leaves unexplained.

    Decoder row and encoder get the residual's direction over all models, the encoder with the mean norm of the latents in use,
    the decoder row with a share of what is usual, and the bias becomes 0. With one model, or several that are the same, nothing
    happens. Needs no look at the device by the host.

    x, x_hat: [batch, n_models, d_model] normalised activations and their reconstruction, the same in every process.
    look: its number. It sees the latents whose own number leaves the same rest by TURNS.
    """
    shard = crosscoder.shard
    norms = crosscoder.decoder_norms().amax(-1)  # [latents]; a sum over models would call exclusive latents half idle
    directions, missing = one_sided_residuals(crosscoder, x - x_hat)
    usual = shard.all_sum(norms.square().sum()) / shard.all_sum(norms.sum())  # their mean, where a large one counts for more
    in_use = norms >= IDLE * usual
    first = crosscoder.latents.start
    turn = slice((look - first) % TURNS, None, TURNS)  # of this process's latents
    rows, norm = (shard.gather_rows(of[turn]) for of in (crosscoder.W_dec.flatten(1), norms))  # [turn, ...] of all processes
    free = (norm < IDLE * usual) | (nearest(crosscoder, normalize(rows, dim=1), norms, norm) > COPY)  # [turn]
    place = free.cumsum(0) - 1  # the first of them takes the first residual, and so on
    chosen = free & (place < len(missing))
    place = place.clamp_max(len(missing) - 1)
    chosen &= missing[place]

    before = len(range(look % TURNS, first, TURNS))  # of the turn, those of the processes before this one
    mine = slice(before, before + len(norms[turn]))
    new = directions[place[mine]]  # [its turn, n_models * d_model]
    largest = new.view(len(new), *crosscoder.W_dec.shape[1:]).norm(dim=2).amax(1, keepdim=True)  # [its turn, 1]
    length = shard.all_sum(crosscoder.enc_rows.flatten(1).norm(dim=1).where(in_use, 0).sum()) / shard.all_sum(in_use.sum())
    values = SMALL * usual / largest * new, length * new, 0 * largest
    for weight, value in zip((crosscoder.W_dec, crosscoder.enc_rows, crosscoder.b_enc), values, strict=True):
        old = weight.view(len(weight), -1)[turn]  # [its turn, n_models * d_model], or [its turn, 1] of the bias
        old.copy_(torch.where(chosen[mine, None], value, old))


def one_sided_residuals(crosscoder: CrossCoder, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [count, n_models * d_model] of a batch's most one-sided residuals, and which of them no latent explains.

    The latter, [count], come first. residual: [batch, n_models, d_model].
    """
    squared = residual.square().sum(-1)  # [batch, n_models]
    most, least = squared.amax(1), squared.amin(1)  # [batch]
    gap = most - least
    count = min(-(-len(gap) // TOKENS), crosscoder.d_hidden)  # rounded up: the same where a few rows were left out
    widest, token = gap.topk(count)
    directions = normalize(residual[token].flatten(1), dim=1)  # [count, n_models * d_model]
    missing = (widest > UNUSUAL * gap.mean()) & (widest > ONE_SIDED * (most + least)[token])
    missing &= (nearest(crosscoder, directions) < NEAR) & ((directions @ directions.T).tril(-1).amax(1) < NEAR)
    order = missing.int().argsort(descending=True, stable=True)
    return directions[order], missing[order]


def nearest(crosscoder: CrossCoder, directions: Tensor, norms: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
    """[n] largest cosine of each unit vector [n, n_models * d_model] with a decoder row.

    norms, norm: of the decoder rows [latents] and of the vectors [n]; where given, with one of larger norm alone.
    """
    W_dec, best = crosscoder.W_dec.flatten(1), []  # [latents, n_models * d_model]
    lengths = W_dec.norm(dim=1).clamp_min(1e-12)  # [latents]
    for i in range(0, len(directions), AT_ONCE):
        cosine = directions[i : i + AT_ONCE] @ W_dec.T / lengths  # [at most AT_ONCE, latents]
        if norm is not None:
            cosine.masked_fill_(norms <= norm[i : i + AT_ONCE, None], -1)
        best.append(cosine.amax(1))
    return -crosscoder.shard.all_min(-torch.cat(best))
