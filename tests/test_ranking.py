"""The ranking on latents whose truth is known: what is missing, what only varies, what is the same."""

import numpy as np
import pytest
import torch

from analysis import measure, ranking
from analysis.data import Data
from crosscoder import CrossCoder
from ops import latents
from sources.planted import PlantedConcepts

WIDTH = 32


def world(missing: torch.Tensor, *, tokens: int = 4096, noise: float = 0.3, seed: int = 0, turn: float = 0.0):
    """(blocks of sums, W_dec) of a dictionary that knows the truth: base has all but a share `missing` [n] of each concept.

    Every fourth concept is active on a token or two of a hundred. turn: how far fine-tuning turns each concept.
    """
    draw = torch.Generator().manual_seed(seed)
    ft = torch.nn.functional.normalize(torch.randn(len(missing), WIDTH, generator=draw), dim=-1)
    base = torch.nn.functional.normalize(ft + turn * torch.randn(ft.shape, generator=draw) / WIDTH**0.5, dim=-1)
    W_dec = torch.stack([base * (1 - missing[:, None]), ft], dim=1)  # [n, 2, WIDTH]
    rate = torch.full((len(missing),), 0.1)
    rate[::4] = 0.015
    blocks = []
    for _ in range(16):
        f = torch.rand(tokens // 16, len(missing), generator=draw) * (
            torch.rand(tokens // 16, len(missing), generator=draw) < rate
        )
        x = torch.einsum("tj,jmd->tmd", f, W_dec) + noise * torch.randn(tokens // 16, 2, WIDTH, generator=draw)
        blocks.append(latents.latent_sums(x, f, W_dec, torch.zeros(2, WIDTH))[0])
    return blocks, W_dec


def with_some(share: float, n: int = 200) -> torch.Tensor:
    missing = torch.zeros(n)
    missing[:10] = share
    return missing


def test_the_score_is_one_less_the_larger_nu_of_the_longer_row():
    blocks, W_dec = world(torch.rand(20))
    W_dec[10:] = W_dec[10:].flip(1)  # more in base
    direction, sums, own = ranking.own_sums(blocks, W_dec)
    total = sum(blocks[1:], blocks[0])
    score = ranking.missing(sums.sum(0), own)
    assert direction.tolist() == [1] * 10 + [0] * 10
    for of in (0, 1):
        expected = 1 - torch.maximum(*latents.latent_scaling(total.scaling(of), W_dec, of).nu(of))
        assert torch.allclose(score[direction == of], expected[direction == of], rtol=1e-5)


@pytest.mark.parametrize("share", [0.4, 0.7, 1.0])
def test_what_is_missing_comes_first_and_is_called_changed(share):
    """Also where three fifths of it are left, which no relative norm shows: it stays below .8."""
    ranked = ranking.rank_latents(*world(with_some(share)))
    assert ranked.direction[:10].tolist() == [1] * 10 and sorted(ranked.rank[:10]) == list(range(1, 11))
    assert ranked.changed[:10].mean() >= 0.7 and ranked.changed[10:].mean() <= 0.01  # three of the ten are rare
    assert ranked.score[:10].mean() == pytest.approx(share, abs=0.15)  # 200 concepts in 32 dimensions overlap


def test_where_most_of_the_model_changed_what_it_mostly_lacks_is_still_called_so():
    """The scores of most lie far apart, and the cut is a half."""
    missing = torch.rand(200, generator=torch.Generator().manual_seed(0))
    ranked = ranking.rank_latents(*world(missing))
    frequent = np.arange(200) % 4 > 0
    assert ranked.null["cut"] == 0.5
    assert (
        ranked.changed[frequent & (missing > 0.9).numpy()].mean() > 0.8
        and ranked.changed[(missing < 0.4).numpy()].mean() < 0.05
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("turn", [0.0, 0.3])
def test_noise_and_small_turns_are_no_change(seed, turn):
    ranked = ranking.rank_latents(*world(torch.zeros(200), tokens=2048, noise=0.5, seed=seed, turn=turn))
    assert not ranked.changed.any() and np.isfinite(ranked.score).all()


def test_the_same_model_twice_has_no_change_and_no_spread():
    blocks, W_dec = world(torch.zeros(50))
    W_dec[:, 0] = W_dec[:, 1]
    draw, blocks = torch.Generator().manual_seed(1), []
    for _ in range(16):
        f = torch.rand(64, 50, generator=draw) * (torch.rand(64, 50, generator=draw) < 0.2)
        x = (f @ W_dec[:, 1] + torch.randn(64, WIDTH, generator=draw))[:, None].expand(-1, 2, -1)
        blocks.append(latents.latent_sums(x, f, W_dec, torch.zeros(2, WIDTH))[0])
    ranked = ranking.rank_latents(blocks, W_dec)
    assert not ranked.changed.any() and np.abs(ranked.score).max() < 1e-5 and (ranked.p == 1).all()
    assert ranked.null["spread"] < 1e-5 and sorted(ranked.rank) == list(range(1, 51))


def test_a_latent_of_few_tokens_or_none_is_never_called_changed():
    blocks, W_dec = world(with_some(1.0, 40))
    x, f = torch.randn(64, 2, WIDTH), torch.zeros(64, 40)
    rare, _ = latents.latent_sums(x, f, W_dec, torch.zeros(2, WIDTH))
    for block in blocks[3:]:  # latent 0 is active in three blocks alone, latent 1 in none
        for name in ("f_squared", "x", "error"):
            getattr(block, name)[..., 0] = getattr(rare, name)[..., 0]
    for block in blocks:
        for name in ("f_squared", "x", "error"):
            getattr(block, name)[..., 1] = 0
    ranked = ranking.rank_latents(blocks, W_dec)
    assert not ranked.changed[:2].any() and ranked.changed[2:10].all() and not ranked.changed[10:].any()
    assert np.isnan(ranked.score[1]) and ranked.rank[1] == (ranked.direction == ranked.direction[1]).sum()
    assert ranked.null["tested"] == 39 and np.isinf(ranked.error[0])


def test_the_blocks_are_parts_of_all_rows_and_twins_have_no_change():
    """Planted concepts in one model twice, through a crosscoder whose two halves are the same."""
    source = PlantedConcepts(0, 2048, n_concepts=64, d_model=16, null=True)
    crosscoder = CrossCoder(16, 24)
    with torch.no_grad():
        crosscoder.W_dec[:, 1] = crosscoder.W_dec[:, 0]
        crosscoder.enc_rows[:] = crosscoder.W_dec
    sums, _, blocks = measure.measure_latents(crosscoder, Data(source, "planted", None, 2048, 6000))
    assert len(blocks) == measure.BLOCKS and {block.tokens for block in blocks} <= {502, 503, 504}
    whole, together = sums["validation"] + sums["train"], sum(blocks[1:], blocks[0])
    for name in ("tokens", "count", "f_squared", "x", "error"):
        assert torch.as_tensor(getattr(whole, name)).allclose(torch.as_tensor(getattr(together, name))), name
    ranked = ranking.rank_latents(blocks, crosscoder.W_dec.detach())
    assert ranked.null["tested"] > 10 and not ranked.changed.any()


def test_without_a_live_latent_there_is_a_ranking_of_none():
    blocks = [
        latents.latent_sums(torch.randn(8, 2, WIDTH), torch.zeros(8, 3), torch.randn(3, 2, WIDTH), torch.zeros(2, WIDTH))[0]
    ]
    ranked = ranking.rank_latents(blocks, torch.randn(3, 2, WIDTH))
    assert not ranked.changed.any() and ranked.null["tested"] == 0


def test_the_error_is_what_other_tokens_give():
    """The jackknife's standard error against the spread of the score over worlds drawn anew."""
    blocks, W_dec = world(with_some(0.5, 12))
    errors, scores = [], []
    for seed in range(25):
        draw, blocks = torch.Generator().manual_seed(seed), []
        for _ in range(16):
            f = torch.rand(128, 12, generator=draw) * (torch.rand(128, 12, generator=draw) < 0.1)
            x = torch.einsum("tj,jmd->tmd", f, W_dec) + 0.3 * torch.randn(128, 2, WIDTH, generator=draw)
            blocks.append(latents.latent_sums(x, f, W_dec, torch.zeros(2, WIDTH))[0])
        ranked = ranking.rank_latents(blocks, W_dec)
        errors.append(ranked.error)
        scores.append(ranked.score)
    ratio = np.mean(errors, 0) / np.std(scores, 0)
    assert 0.7 < ratio.mean() < 1.4, ratio


def test_p_values_are_those_of_students_t():
    """Upper tails from tables: 5 % and .05 % at 9 and 15 degrees of freedom."""
    t = torch.tensor([1.833, 4.781, 1.753, 4.073], dtype=torch.float64)
    p = ranking.p_values(t, torch.ones(4), torch.tensor([9, 9, 15, 15]), 0.0)
    assert p.numpy() == pytest.approx([0.05, 0.0005, 0.05, 0.0005], rel=0.06)


def test_discoveries_are_those_of_benjamini_and_hochberg():
    p = torch.tensor([0.01, 0.9, 0.013, 0.04, 0.014, 1.0])
    assert ranking.benjamini_hochberg(p, 0.05).tolist() == [True, False, True, False, True, False]
    draw, false = torch.Generator().manual_seed(0), []
    for _ in range(200):  # 20 of 200 are real
        p = torch.rand(200, generator=draw, dtype=torch.float64)
        p[:20] *= 1e-5
        found = ranking.benjamini_hochberg(p, 0.05)
        false.append(found[20:].sum().item() / max(1, found.sum().item()))
    assert np.mean(false) < 0.06
