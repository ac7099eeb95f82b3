import numpy as np
import pytest
import torch

from ops import latents
from sources.planted import BLOCK, FT_ONLY, SHARED, PlantedConcepts


@pytest.fixture(scope="module")
def world():
    return PlantedConcepts(seed=3, val_rows=2000, n_concepts=512, active=5.12)


def take(world, split, rows):
    out = torch.empty(2, len(rows), world.d_model)
    world.gather(split, np.asarray(rows), out)
    return out


def test_a_row_is_a_function_of_seed_split_and_number(world):
    rows = [0, 5, 4095, 4096, 9000]
    x = take(world, "train", rows)
    assert torch.equal(x, take(PlantedConcepts(seed=3, val_rows=5, n_concepts=512, active=5.12), "train", rows))
    assert torch.equal(x[:, [1, 3]], take(world, "train", [5, 4096]))
    assert not torch.equal(x, take(world, "validation", rows))
    assert not torch.equal(x, take(PlantedConcepts(seed=4), "train", rows))


def test_concepts_are_where_they_should_be(world):
    norms = world.directions.norm(dim=-1)
    counts = latents.count_classes(latents.classify(norms), torch.zeros(len(norms), dtype=torch.bool))
    assert counts == {"base_only": 25, "shared": 462, "ft_only": 25, "dead": 0}
    assert torch.equal(latents.classify(norms), world.kind)
    shared = world.directions[world.kind == SHARED]
    assert 0.9 < (shared[:, 0] * shared[:, 1]).sum(-1).mean() < 0.99


def test_rows_hold_as_many_concepts_as_asked_for(world):
    x = take(world, "train", np.arange(4096))
    centred = x / world.scale[:, None, None] - world.mean[:, None]  # [2, rows, d_model]
    codes = torch.linalg.lstsq(world.directions.flatten(1).T, centred.transpose(0, 1).flatten(1).T).solution
    assert codes.shape[0] == 512
    assert world.rate.sum().item() == pytest.approx(5.12) and world.rate.max() / world.rate.min() == pytest.approx(512**0.5)
    energy = centred.pow(2).sum(-1).mean(1)
    # Each of ~5.1 concepts active has magnitude U(0, 1), mean square 1/3; a model lacks 5 % of them; noise 0.01 a dimension.
    assert energy[0].item() == pytest.approx(512 / 100 * 0.95 / 3, rel=0.15)
    assert energy[1].item() == pytest.approx(512 / 100 * 0.95 / 3, rel=0.15)


def test_a_perfect_dictionary_scores_one(world):
    score = world.score(world.directions, torch.zeros(512, dtype=torch.bool))
    assert score == {n: 1.0 for n in score if n != "false_exclusive"} | {"false_exclusive": 0.0}


def test_scores_fall_for_what_is_missing_wrong_or_dead(world):
    alive = torch.zeros(512, dtype=torch.bool)
    without = world.directions.clone()
    without[world.kind == FT_ONLY] = 1.0
    assert world.score(without, alive)["recall_ft_only"] == 0
    assert world.score(world.directions, world.kind == FT_ONLY)["recall_ft_only"] == 0  # found by dead latents alone
    both = world.directions.clone()
    both[:, 0][world.kind == FT_ONLY] = both[:, 1][world.kind == FT_ONLY]  # right direction, but in both models
    score = world.score(both, alive)
    assert score["recall_ft_only"] == 1 and score["class_ok_ft_only"] == 0
    one_sided = world.directions.clone()
    one_sided[world.kind == SHARED, 1] *= 0.01  # shared concepts that look base-only
    score = world.score(one_sided, alive)
    assert score["class_ok_shared"] == 0 and score["false_exclusive"] == pytest.approx(462 / 512)


def test_worlds_of_every_kind():
    null = PlantedConcepts(seed=0, n_concepts=128, null=True)
    assert (null.kind == SHARED).all() and torch.equal(null.directions[:, 0], null.directions[:, 1])
    one_sided = torch.randn(4, 2, 128)
    one_sided[:, 0] = 0
    assert null.score(one_sided, torch.zeros(4, dtype=torch.bool))["false_exclusive"] == 1
    hard = PlantedConcepts(seed=0, n_concepts=1024, hard=True)
    active = torch.cat([hard._hard_codes(torch.Generator().manual_seed(s))[1] for s in range(20)])  # the concepts
    torch.testing.assert_close(active.bincount(minlength=1024) / (20 * BLOCK), hard.rate, atol=0.006, rtol=0.1)
    exclusive = hard.rate[hard.kind != SHARED]
    assert exclusive.min() >= 0.0005 and exclusive.max() <= 0.01
    rare = PlantedConcepts(seed=0, n_concepts=128, rare=True)
    assert (rare.rate[rare.kind != SHARED] == 0.0005).all() and (rare.rate[rare.kind == SHARED] > 0.01).all()
    offset = PlantedConcepts(seed=0, n_concepts=128, offset=True)
    x = take(offset, "train", np.arange(4096))
    assert (x.mean(1).norm(dim=-1) > 5 * (x - x.mean(1, keepdim=True)).norm(dim=-1).mean(1)).all()


def test_a_random_dictionary_finds_nothing(world):
    score = world.score(
        torch.randn(2048, 2, 128, generator=torch.Generator().manual_seed(0)), torch.zeros(2048, dtype=torch.bool)
    )
    assert all(value == 0 for value in score.values())
