"""What changed, first things first: one score, one rank and one rule for every latent, from the sums of blocks of tokens.

Score: the share of a latent that the model with the shorter decoder row lacks, 1 - max(nu_error, nu_reconstruction): latent
scaling (Minder et al., arXiv 2504.02922) asks the other model's error and its reconstruction for the latent's direction, and
the larger answer says how much of it is there. Fine-tuning that changes a little leaves relative norms near a half, where no
class finds anything, but lowers these shares.

Rule: most latents are the same concept in both models, so their scores show what no change looks like, an empirical null
(Efron, "Large-scale simultaneous hypothesis testing", 2004). Changed is what lies beyond a cut far outside of them by more than
the noise of its own score; where most of the model changed, so that they lie far apart, the cut is a half.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from einops import einsum
from torch import Tensor

from crosscoder import CrossCoder
from ops.latents import LatentSums, latent_sums

SPREADS, MARGIN, MOST = 4, 0.1, 0.5  # the cut is the typical score + 4 spreads + 0.1, at most 0.5
FALSE_DISCOVERIES = 0.05  # expected share of the latents called changed that are not
LEAST_BLOCKS = 4  # in which a latent must be active: fewer do not say how uncertain its score is
TOGETHER = 1024  # tokens whose codes are in memory at once


DIRECTIONS = ("base", "ft")


class Ranking(NamedTuple):
    """Of every latent, [d_hidden] each."""

    direction: np.ndarray  # 1: more in the fine-tuned model, 0: more in the base model
    score: np.ndarray  # NaN where a latent is never active
    error: np.ndarray  # standard error of the score, from the blocks
    p: np.ndarray  # chance of such a score where the true one is at the cut
    changed: np.ndarray
    rank: np.ndarray  # from 1, within the direction; latents that are never active come last
    null: dict  # center and spread of the unchanged latents, the cut, the false discovery rate, latents tested


@torch.no_grad()
def rank_activations(crosscoder: CrossCoder, x: Tensor, blocks: int = 16) -> pd.DataFrame:
    """The ranking from activations in memory, as a table of `columns` with a row for each latent; its `attrs` hold the null.

        >>> rank_activations(crosscoder, x).sort_values("rank").head()

    x: [tokens, 2, d_model] raw activations, the base model first, of which `blocks` stretches count as independent: leave the
    tokens of a text together.
    """
    parts = []
    for block in x.tensor_split(blocks):
        sums = None
        for some in block.split(TOGETHER):
            x_n = crosscoder.normalize(some.to(crosscoder.W_dec.device))
            part, _ = latent_sums(x_n, crosscoder.encode(x_n, normalized=True), crosscoder.W_dec, crosscoder.b_dec)
            sums = part if sums is None else sums + part
        parts += [] if sums is None else [sums]
    ranked = rank_latents(parts, crosscoder.W_dec)
    table = pd.DataFrame(columns(ranked))
    table.attrs |= ranked.null
    return table


def rank_latents(blocks: list[LatentSums], W_dec: Tensor) -> Ranking:
    """The ranking of all latents. blocks: sums over independent parts of the tokens; W_dec: [d_hidden, 2, d_model]."""
    direction, sums, own = own_sums(blocks, W_dec)
    score, error, df = jackknife(sums, own)
    live = score.isfinite()
    center, spread = bulk(score[live])
    cut = min(MOST, center + SPREADS * spread + MARGIN)
    p = p_values(score, error, df, cut)
    changed = benjamini_hochberg(p, FALSE_DISCOVERIES) & live
    null = {
        "center": center, "spread": spread, "cut": cut, "false_discovery_rate": FALSE_DISCOVERIES, "blocks": len(blocks),
        "tested": int(live.sum()),
    }  # fmt: skip
    rank = ranks(score - 2 * error, direction)  # so that no rare latent leads by chance
    return Ranking(*(t.cpu().numpy() for t in (direction, score, error, p, changed, rank)), null)


def columns(ranked: Ranking) -> dict[str, np.ndarray]:
    """The ranking as columns of the table of latents."""
    return {
        "direction": np.array(DIRECTIONS)[ranked.direction], "rank": ranked.rank, "changed": ranked.changed,
        "change_score": ranked.score, "change_error": ranked.error, "change_p": ranked.p,
    }  # fmt: skip


def own_sums(blocks: list[LatentSums], W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each latent's direction [d_hidden]; the sums along its longer row; what its shorter row has of the longer, a share.

    The sums: [blocks, 5, d_hidden] activation and error of the model with the longer row, the same of the other model, and the
    energy f^2 |row|^2 of the latent itself.
    """
    squared = W_dec.pow(2).sum(-1, dtype=torch.float64)  # [d_hidden, 2]
    direction = (squared[:, 1] >= squared[:, 0]).long()
    longest = squared.amax(-1)
    parts = []
    for block in blocks:
        longer = [torch.where(direction == 1, of[1, 1], of[0, 0]) for of in (block.x, block.error)]
        other = [torch.where(direction == 1, of[1, 0], of[0, 1]) for of in (block.x, block.error)]
        parts.append(torch.stack([*longer, *other, block.f_squared * longest]))
    own = einsum(W_dec[:, 0], W_dec[:, 1], "latent d, latent d -> latent").double() / longest
    return direction, torch.stack(parts), own


def missing(sums: Tensor, own: Tensor) -> Tensor:
    """[..., d_hidden] the score. sums: [..., 5, d_hidden]. The ratios are those of `LatentScaling.nu` of the longer row."""
    x, error, x_other, error_other, energy = sums.unbind(-2)
    nu_error = (error_other + own * energy) / (error + energy)
    nu_reconstruction = (x_other - error_other) / (x - error)
    return 1 - torch.maximum(nu_error, nu_reconstruction)


def jackknife(sums: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score, its standard error and the error's degrees of freedom, [d_hidden] each, leaving out one block at a time.

    The error is infinite for a latent that is active in fewer than LEAST_BLOCKS blocks.
    """
    n, total = len(sums), sums.sum(0)  # [5, d_hidden]
    without = missing(total - sums, own)  # [blocks, d_hidden]
    error = ((without - without.mean(0)).pow(2).sum(0) * (n - 1) / n).sqrt()
    active = (sums[:, 4] > 0).sum(0)
    return missing(total, own), torch.where(active < LEAST_BLOCKS, math.inf, error), active - 1


def bulk(score: Tensor) -> tuple[float, float]:
    """Center and spread of the scores of unchanged latents, which are most: the median, and 1.4826 * the median deviation."""
    if not len(score):
        return 0.0, 0.0
    center = score.median()
    return center.item(), 1.4826 * (score - center).abs().median().item()


def p_values(score: Tensor, error: Tensor, df: Tensor, cut: float) -> Tensor:
    """[d_hidden] the chance that a latent whose true score is `cut` is measured as high as this.

    Student's t with the degrees of freedom of the error, by the normal approximation of Wallace (1959). 1 where unknown.
    """
    t = torch.where(score > cut, (score - cut) / error, 0.0)  # infinite where nothing varies
    z = (8 * df + 1) / (8 * df + 3) * (df * (t.pow(2) / df).log1p()).sqrt()
    p = 0.5 * torch.erfc(z / math.sqrt(2))
    return torch.where(t > 0, p, 1.0).nan_to_num(nan=1.0)


def benjamini_hochberg(p: Tensor, rate: float) -> Tensor:
    """[n] bool: the discoveries whose expected share of false ones is `rate` at most (Benjamini and Hochberg, 1995)."""
    order = p.argsort()
    passing = p[order] <= rate * torch.arange(1, len(p) + 1, device=p.device) / len(p)
    count = int(passing.nonzero().max()) + 1 if passing.any() else 0
    found = torch.zeros(len(p), dtype=torch.bool, device=p.device)
    found[order[:count]] = True
    return found


def ranks(key: Tensor, direction: Tensor) -> Tensor:
    """[d_hidden] int64 place of each latent among those of its direction, 1 for the highest key; NaN comes last."""
    key, rank = key.nan_to_num(nan=-math.inf, neginf=-1e300), torch.zeros_like(direction)
    for of in (0, 1):
        mine = (direction == of).nonzero()[:, 0]
        rank[mine[key[mine].argsort(descending=True, stable=True)]] = torch.arange(1, len(mine) + 1, device=key.device)
    return rank
