"""Idle latents and copies start anew at what no latent explains yet.

A token at which the models' residuals differ in size most likely holds a concept that only one of them has and that the
dictionary misses. The rarest of these have too few tokens to win a latent by gradient alone. So a latent that shared concepts
have left idle, or one that points where a larger one does, is given the token's residual as its direction, as Bricken et al.
("Towards Monosemanticity", Anthropic 2023) resample dead neurons from inputs of high loss.

A rare concept that all models have may be missed too: a latent that fires only where two such concepts occur together leaves
each of them, alone, unexplained. Little marks those tokens, so only copies, which the dictionary can spare, are tried on them.
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
COPY = 0.4  # a row whose cosine with one of larger norm is above 1 - COPY / n_models; without one of the models it is below
SMALL = 0.3  # norm of a resampled row where it is largest, of the usual one: harms tokens without its concept little, and grows
UNUSUAL = 8  # the squared residuals differ by more than this multiple of the batch's mean difference
ONE_SIDED = 0.3  # and by more than this share of their sum: not what both models miss, nor small errors of a found concept
TIGHT = 0.1  # a copy whose cosine is above 1 - TIGHT / n_models is not tried: most are where nothing is missing, and would die
LARGE = 1.25  # squared residual, in what one latent gives: below it hardly any token holds a concept that is missing
GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, spread evenly however many are taken
NEAR = 0.4  # cosine of a latent that already points there, or of a token with a wider difference
AT_ONCE = 256  # vectors that meet all latents at once, which bounds the memory; enough tokens for a mean


def look_after(step: int, steps: int, until: float) -> int:
    """The number of the look for idle latents that follows this step, 0 for none. until: the share of the run with looks."""
    look, rest = divmod(step, max(1, steps // LOOKS))
    return look if rest == 0 and BEGIN * steps <= step <= until * steps else 0


@torch.no_grad()
def resample_idle(crosscoder: CrossCoder, x: Tensor, x_hat: Tensor, look: int) -> None:
    """Point idle latents and copies at the residuals of tokens that one model alone leaves unexplained.

    With batch_topk copies that got none, unless idle or tight, are tried on large residuals of any kind. Decoder row and
    encoder get the residual's direction over all models, the encoder with the mean norm of the latents in use, the decoder row
    with SMALL of the usual one, and the bias becomes 0. With one model nothing happens. The host does not wait for the device.

    x, x_hat: [batch, n_models, d_model] normalised activations and their reconstruction, the same in every process.
    look: its number. It sees one latent in TURNS: those whose number leaves the same rest by TURNS.
    """
    shard, n_models = crosscoder.shard, x.shape[1]
    if n_models == 1:
        return
    norms = largest_norms(crosscoder.W_dec)  # [latents]; a sum over models would call exclusive latents half idle
    usual = shard.all_sum(norms.square().sum()) / shard.all_sum(norms.sum())  # their mean, where a large one counts for more
    in_use = norms >= IDLE * usual
    begin = crosscoder.latents.start
    turn = slice((look - begin) % TURNS, None, TURNS)  # of this process's latents
    rows, norm = (shard.gather_rows(of[turn]) for of in (crosscoder.W_dec.flatten(1), norms))  # [turn, ...] of all processes
    idle = norm < IDLE * usual  # [turn]
    cosine = nearest(crosscoder, normalize(rows, dim=1), above=norm)
    copy = cosine > 1 - COPY / n_models

    one_sided, missing = one_sided_residuals(crosscoder, x - x_hat)
    count = min(len(norm), -(-len(x) // 3))  # so far no two multiples of GOLDEN fall on one token
    places = torch.arange(count, device=x.device, dtype=torch.float64).mul(GOLDEN).frac()
    tokens = (places * len(x)).long()  # [count] over the whole batch, for stored batches are sorted by their place in the data
    directions, large = large_residuals(crosscoder, x[tokens], x_hat[tokens])
    directions = torch.cat([one_sided, directions])
    free = idle | copy
    first = free & (free.cumsum(0) <= missing.sum())  # [turn]; the first free latent takes the first residual, and so on
    left = copy & (cosine < 1 - TIGHT / n_models) & ~idle & ~first
    left &= left.cumsum(0) <= len(large)
    place = torch.where(left, len(missing) + left.cumsum(0), free.cumsum(0)).sub(1).clamp(0, len(directions) - 1)
    chosen = (first | left) & torch.cat([missing, large])[place]

    before = len(range(look % TURNS, begin, TURNS))  # of the turn, those of the processes before this one
    mine = slice(before, before + len(norms[turn]))
    new = directions[place[mine]]  # [its turn, n_models * d_model]
    largest = largest_norms(new.unflatten(1, (n_models, -1)))[:, None]  # [its turn, 1]
    length = shard.all_sum(crosscoder.enc_rows.flatten(1).norm(dim=1).where(in_use, 0).sum()) / shard.all_sum(in_use.sum())
    values = SMALL * usual / largest * new, length * new, 0 * largest
    for weight, value in zip((crosscoder.W_dec, crosscoder.enc_rows, crosscoder.b_enc), values, strict=True):
        old = weight.view(len(weight), -1)[turn]  # [its turn, n_models * d_model], or [its turn, 1] of the bias
        old.copy_(torch.where(chosen[mine, None], value, old))


def largest_norms(rows: Tensor) -> Tensor:
    """[n] norms of rows [n, n_models, d_model], each in the model where it is largest."""
    return rows.norm(dim=2).amax(1)


def one_sided_residuals(crosscoder: CrossCoder, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [count, n_models * d_model] of a batch's most one-sided residuals, and which of them no latent explains.

    The latter, [count], come first. residual: [batch, n_models, d_model].
    """
    squared = residual.square().sum(-1)  # [batch, n_models]
    most, least = squared.amax(1), squared.amin(1)  # [batch]
    gap = most - least
    count = -(-len(gap) // TOKENS)  # rounded up: the same where a few rows were left out
    widest, token = gap.topk(count)
    directions = normalize(residual[token].flatten(1), dim=1)  # [count, n_models * d_model]
    missing = (widest > UNUSUAL * gap.mean()) & (widest > ONE_SIDED * (most + least)[token])
    missing &= nearest(crosscoder, directions, above=torch.zeros_like(widest)) < NEAR
    missing &= (directions @ directions.T).tril(-1).amax(1) < NEAR
    order = missing.int().argsort(descending=True, stable=True)
    return directions[order], missing[order]


def large_residuals(crosscoder: CrossCoder, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [rows, n_models * d_model] of the residuals, and which of them may hold a concept that no latent explains.

    Those are the ones of more than LARGE times the squared norm that one latent gives; none with vanilla, whose penalty shrinks
    all codes, so that most residuals are large. x, x_hat: [rows, n_models, d_model].
    """
    residual, shard = (x - x_hat).flatten(1), crosscoder.shard
    directions = normalize(residual, dim=1)
    if crosscoder.variant == "vanilla":
        return directions, torch.zeros_like(residual[:, 0], dtype=torch.bool)
    f = crosscoder.encode(x[:AT_ONCE], normalized=True)  # [at most AT_ONCE, latents]
    given = (f * crosscoder.W_dec.flatten(1).norm(dim=1)).square()
    usual = shard.all_sum(given.square().sum()) / shard.all_sum(given.sum())  # their mean, where a large one counts for more
    return directions, residual.square().sum(1) > LARGE * usual


def nearest(crosscoder: CrossCoder, directions: Tensor, above: Tensor) -> Tensor:
    """[n] largest cosine of each unit vector [n, n_models * d_model] with a decoder row of a norm `above` this [n]."""
    W_dec = crosscoder.W_dec.flatten(1)  # [latents, n_models * d_model]
    lengths, norms = W_dec.norm(dim=1).clamp_min(1e-12), largest_norms(crosscoder.W_dec)  # [latents]
    best = []
    for some, least in zip(directions.split(AT_ONCE), above.split(AT_ONCE), strict=True):
        cosine = (some @ W_dec.T).div_(lengths)  # [at most AT_ONCE, latents]
        best.append(cosine.masked_fill_(norms <= least[:, None], -1).amax(1))
    return -crosscoder.shard.all_min(-torch.cat(best))
