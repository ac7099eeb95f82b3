"""Idle latents that start anew: which, where, and with what; that a run finds rare exclusive concepts so, and nothing else."""

import pytest
import torch
from helpers import train
from torch.nn.functional import normalize

from benchmarks import worlds
from crosscoder import CrossCoder
from ops import resample
from sources.planted import RECOVERED, SHARED, PlantedConcepts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, F, BATCH = 64, 48, 256  # four latents can be resampled at once
TURNS = 3  # looks until all have had their turn: 16 latents at each
IDLE = [3, 11, 20, 21, 30, 47]
ONE_SIDED = {5: 0, 77: 1}  # row -> the model that alone leaves it unexplained, widest first


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(resample, "TURNS", TURNS)
    monkeypatch.setattr(resample, "AT_ONCE", 5)  # latents that are compared with all others, tokens that tell a mean


@pytest.fixture
def begun():
    """A crosscoder with idle latents; rows, and a reconstruction that leaves two of them one-sided."""
    torch.manual_seed(0)
    crosscoder = CrossCoder(D, F, 2, dec_init_norm=1.0).to(DEVICE)
    x = torch.randn(BATCH, 2, D, device=DEVICE)
    with torch.no_grad():
        crosscoder.W_dec *= torch.linspace(0.9, 1.1, F, device=DEVICE)[:, None, None]
        crosscoder.enc_rows *= torch.linspace(1.4, 1.6, F, device=DEVICE)[:, None, None]
        crosscoder.b_enc += torch.linspace(-0.1, -0.2, F, device=DEVICE)
        crosscoder.W_dec[IDLE] *= 0.1
    missed = torch.randn(BATCH, 1, D, device=DEVICE).repeat(1, 2, 1)  # the same in both models
    missed[:, 0] *= 1.01
    for i, (row, model) in enumerate(ONE_SIDED.items()):
        missed[row, model] += (6 - i) * torch.randn(D, device=DEVICE)
    return crosscoder, x, x - missed


def all_weights(crosscoder) -> dict[str, torch.Tensor]:
    """[latents, ...] weights, copied."""
    return {name: getattr(crosscoder, name).detach().clone() for name in ("W_dec", "enc_rows", "b_enc")}


def usual_norm(W_dec) -> torch.Tensor:
    """Mean of the decoder norms [latents], each in the model where it is largest, weighted by themselves."""
    norms = W_dec.norm(dim=2).amax(1)
    return (norms * norms).sum() / norms.sum()


def resampled(crosscoder, x, x_hat, look) -> list[int]:
    """The latents whose decoder row this look changes."""
    before = crosscoder.W_dec.detach().clone()
    resample.resample_idle(crosscoder, x, x_hat, look)
    return (crosscoder.W_dec != before).flatten(1).any(1).nonzero().flatten().tolist()


def test_idle_latents_take_the_most_one_sided_residuals(begun):
    crosscoder, x, x_hat = begun
    before = all_weights(crosscoder)
    resample.resample_idle(*begun, look=F)
    after = all_weights(crosscoder)
    taken = [3, 21]
    others = torch.tensor([j for j in range(F) if j not in taken])
    in_use = torch.tensor([j for j in range(F) if j not in IDLE])
    for name, t in after.items():
        assert torch.equal(t[others], before[name][others]), name
    for j, (row, model) in zip(taken, ONE_SIDED.items(), strict=True):
        residual = (x - x_hat)[row]
        assert residual[model].norm() > 3 * residual[1 - model].norm()
        for name in ("W_dec", "enc_rows"):
            torch.testing.assert_close(normalize(after[name][j].flatten(), dim=0), normalize(residual.flatten(), dim=0))
        torch.testing.assert_close(after["enc_rows"][j].norm(), before["enc_rows"][in_use].flatten(1).norm(dim=1).mean())
        largest = after["W_dec"][j].norm(dim=1).amax()
        torch.testing.assert_close(largest, resample.SMALL * usual_norm(before["W_dec"]))
        assert after["b_enc"][j] == 0
    assert resample.SMALL < resample.IDLE  # it must grow to stay


@pytest.mark.parametrize("look, turn", [(0, [3, 21]), (1, []), (2, [11, 20]), (3, [3, 21]), (8, [11, 20])])
def test_latents_take_turns(look, turn, begun):
    """A third of them at each look; of six idle ones four get a residual within three looks."""
    crosscoder, x, x_hat = begun
    assert resampled(*begun, look) == turn
    for j, row in zip(turn, ONE_SIDED, strict=False):
        rows = [normalize(t.flatten(), dim=0) for t in (crosscoder.W_dec[j], (x - x_hat)[row])]
        torch.testing.assert_close(*rows)


@pytest.mark.parametrize(
    "cosine, smaller, norm, want",
    [(0.83, 0.7, 1, [12]), (0.83, 0.7, 0.5, [12]), (0.83, 1.4, 1, [16]), (0.77, 0.7, 1, []), (0.77, 0.7, 3, [])],
)
def test_the_smaller_of_two_latents_that_point_the_same_way_is_a_copy(cosine, smaller, norm, want, begun):
    crosscoder, x, x_hat = begun
    crosscoder.W_dec.data[IDLE] *= 8  # they are in use
    crosscoder.W_dec.data[16] *= norm  # 12 has its turn at look 0, 16 at look 1
    kept, other = (normalize(t.flatten(), dim=0) for t in (crosscoder.W_dec.data[16], torch.randn(2, D, device=DEVICE)))
    other = normalize(other - (other @ kept) * kept, dim=0)
    row = cosine * kept + (1 - cosine**2) ** 0.5 * other
    crosscoder.W_dec.data[12] = smaller * crosscoder.W_dec.data[16].norm() * row.view(2, D)
    assert [j for look in range(TURNS) for j in resampled(*begun, look)] == want


@pytest.mark.parametrize("n_models", [2, 3, 4])
def test_a_latent_that_one_model_lacks_is_no_copy_of_one_that_all_have(n_models):
    torch.manual_seed(0)
    crosscoder = CrossCoder(D, F, n_models, dec_init_norm=1.0)
    crosscoder.W_dec.data[7] = 1.1 * crosscoder.W_dec.data[12]
    crosscoder.W_dec.data[12, 0] = 0
    x = torch.randn(BATCH, n_models, D)
    missed = torch.zeros_like(x)
    missed[3, 1] = torch.randn(D)
    assert resampled(crosscoder, x, x - missed, 0) == []
    crosscoder.W_dec.data[12] = crosscoder.W_dec.data[7] / 1.1
    assert resampled(crosscoder, x, x - missed, 0) == [12]


def test_copies_that_nothing_one_sided_needs_take_large_residuals(begun):
    """The first such copy of a look is tried on the first token, and so on. Idle latents and tight copies wait."""
    crosscoder, x, _ = begun
    crosscoder.mean += 0.1
    crosscoder.scale *= 3  # what is given here is normalised already
    copies, cosine = [0, 6, 12, 15, 21], torch.tensor([0.85, 0.9, 0.94, 0.96, 0.9], device=DEVICE)[:, None, None]
    one = crosscoder.W_dec.data[[1, 2, 4, 5, 7]]  # [copies, n_models, D]
    other = torch.cat([-one[..., D // 2 :], one[..., : D // 2]], dim=-1)  # at right angles to them
    crosscoder.W_dec.data[copies] = 0.7 * (cosine * one + (1 - cosine * cosine).sqrt() * other)
    crosscoder.W_dec.data[21] *= 0.2  # idle, as 3 is
    tokens = [0, 158, 60, 218, 120]
    f = crosscoder.encode(x[tokens], normalized=True)
    given = (f * crosscoder.W_dec.flatten(1).norm(dim=1)).detach() ** 2
    concept = (given * given).sum() / given.sum()
    missed = torch.randn(BATCH, 1, D, device=DEVICE).repeat(1, 2, 1)
    size = torch.full((BATCH,), 9.0, device=DEVICE)
    size[tokens[:3]] = torch.tensor([1.2, 1.3, 3], device=DEVICE)
    missed *= (size * concept).sqrt()[:, None, None] / missed.flatten(1).norm(dim=1)[:, None, None]
    before = crosscoder.W_dec.detach().clone()
    assert resampled(crosscoder, x, x - missed, 0) == []  # vanilla
    crosscoder.variant = "batch_topk"
    assert resampled(crosscoder, x, x - missed, 0) == copies[1:3]
    for j, row in zip(copies[1:3], tokens[1:3], strict=True):
        torch.testing.assert_close(*(normalize(t.flatten(), dim=0) for t in (crosscoder.W_dec[j], missed[row])))
        torch.testing.assert_close(crosscoder.W_dec[j].norm(dim=1).amax(), resample.SMALL * usual_norm(before))
    assert resampled(crosscoder, x, x - missed, 0) == []  # 6 and 12 are idle now; 0 is tried in vain again
    crosscoder.W_dec.data.copy_(before)
    assert resampled(crosscoder, x[3:6], (x - missed)[3:6], 0) == [0]  # one token of three rows, for the first copy


def nothing_idle(crosscoder, x, x_hat):
    crosscoder.W_dec.data[IDLE] *= 8
    return x_hat


def both_models_miss_it(crosscoder, x, x_hat):
    x_hat = x_hat.clone()
    for row, model in ONE_SIDED.items():
        x_hat[row, 1 - model] = x[row, 1 - model] - (x - x_hat)[row, model]
    return x_hat


def the_same_models(crosscoder, x, x_hat):
    return x - (x - x_hat)[:, :1].repeat(1, 2, 1)


def a_latent_points_there(crosscoder, x, x_hat):
    for row, j in zip(ONE_SIDED, (1, 2), strict=True):
        crosscoder.W_dec.data[j] = 0.3 * normalize((x - x_hat)[row].flatten(), dim=0).view(2, D)
    return x_hat


def every_token_is_one_sided(crosscoder, x, x_hat):
    missed = torch.randn(BATCH, 2, D, device=DEVICE)
    missed[:, 1] = 0
    return x - missed


def not_a_number(crosscoder, x, x_hat):
    return x_hat.where(torch.arange(BATCH, device=DEVICE)[:, None, None] != 9, torch.nan)


@pytest.mark.parametrize(
    "change",
    [nothing_idle, both_models_miss_it, the_same_models, every_token_is_one_sided, a_latent_points_there, not_a_number],
)
def test_nothing_changes_where(change, begun):
    crosscoder, x, x_hat = begun
    x_hat = change(crosscoder, x, x_hat)
    before = all_weights(crosscoder)
    for look in range(TURNS):
        resample.resample_idle(crosscoder, x, x_hat, look)
    after = all_weights(crosscoder)
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_latents_of_norm_0_are_idle_and_two_tokens_of_one_concept_get_one_latent(begun):
    crosscoder, x, x_hat = begun
    first, second = ONE_SIDED
    crosscoder.W_dec.data[[1, 4]] = 0
    x_hat = x_hat.clone()
    x_hat[second] = x[second] - 0.9 * (x - x_hat)[first]
    assert resampled(crosscoder, x, x_hat, 1) == [1]


def test_a_free_latent_gets_what_is_missing_and_not_what_is_wider(begun):
    crosscoder, x, x_hat = begun
    found, missed = ONE_SIDED
    crosscoder.W_dec.data[1] = 0.5 * crosscoder.W_dec.data[1].norm() * normalize((x - x_hat)[found].flatten(), dim=0).view(2, D)
    assert resampled(*begun, look=2) == [11]
    torch.testing.assert_close(*(normalize(t.flatten(), dim=0) for t in (crosscoder.W_dec[11], (x - x_hat)[missed])))


@pytest.mark.parametrize("rows, count", [(BATCH, 4), (63, 1)])
def test_a_residual_goes_to_one_latent(rows, count, begun):
    """A batch of `rows` has residuals for `count` latents, all of them missing; more latents are free at this look."""
    crosscoder, x, _ = begun
    crosscoder.W_dec.data[range(0, F, 2)] *= 0.01
    missed = torch.zeros_like(x)
    missed[:7, 1] = 3 * torch.eye(7, D, device=DEVICE)
    assert resampled(crosscoder, x[:rows], (x - missed)[:rows], 0) == [0, 3, 6, 12, 18, 21, 24, 30][:count]


@pytest.mark.parametrize("cosine, want", [(0.37, [3, 21]), (0.43, [3])])
def test_near_is_a_cosine_of_two_fifths(cosine, want, begun):
    crosscoder, x, _ = begun
    missed = torch.zeros_like(x)
    missed[5, 1, 0] = 3
    missed[77, 1, :2] = 2.9 * torch.tensor([cosine, (1 - cosine**2) ** 0.5], device=DEVICE)
    assert resampled(crosscoder, x, x - missed, 0) == want


@pytest.mark.parametrize("multiple, want", [(7, []), (9, [3])])
def test_unusual_is_eight_times_the_mean_difference(multiple, want, begun):
    crosscoder, x, _ = begun
    missed = torch.zeros_like(x)
    missed[:, 1, 0] = 1
    missed[5, 1, 1] = ((multiple * (BATCH - 1) / (BATCH - multiple)) - 1) ** 0.5
    assert resampled(crosscoder, x, x - missed, 0) == want


def test_a_dictionary_smaller_than_a_turn(monkeypatch, begun):
    monkeypatch.setattr(resample, "TURNS", 100)
    assert [resampled(*begun, look) for look in (3, 99)] == [[3], []]


def test_an_exclusive_latent_of_four_models_is_in_use():
    torch.manual_seed(0)
    crosscoder = CrossCoder(D, F, 4, dec_init_norm=1.0)
    crosscoder.W_dec.data[:5, 1:] = 0
    x = torch.randn(BATCH, 4, D)
    missed = torch.zeros(BATCH, 4, D)
    missed[3, 2] = torch.randn(D)
    assert resampled(crosscoder, x, x - missed, 1) == []
    idle = 0.3 * crosscoder.W_dec.detach()[7]  # in all of them
    three = missed.clone()
    three[3, :2] = torch.randn(2, D)
    for missing in (missed, three):  # what one of them has, and three
        crosscoder.W_dec.data[7] = idle
        assert resampled(crosscoder, x, x - missing, 1) == [7]


@pytest.mark.parametrize("ratio, want", [(1.5, []), (2.5, [3])])
def test_one_sided_is_nearly_twice_as_much(ratio, want, begun):
    crosscoder, x, _ = begun
    missed = torch.zeros_like(x)
    missed[5] = normalize(torch.randn_like(x[5]), dim=-1)
    missed[5, 1] *= ratio**0.5
    assert resampled(crosscoder, x, x - missed, F) == want


def test_of_one_model_nothing_is_one_sided():
    crosscoder = CrossCoder(D, F, 1, dec_init_norm=1.0)
    crosscoder.W_dec.data[:9] *= 0.01
    x = torch.randn(BATCH, 1, D)
    assert resampled(crosscoder, x, 0 * x, F) == []


@pytest.mark.parametrize(
    "steps, until, after, first", [(3000, 0.6, range(600, 1801, 10), 60), (10, 0.6, range(2, 7), 2), (10, 0.0, [], 0)]
)
def test_when_it_looks(steps, until, after, first):
    looks = {step: look for step in range(1, steps + 1) if (look := resample.look_after(step, steps, until))}
    assert looks == {step: first + i for i, step in enumerate(after)}


def test_a_run_finds_rare_exclusive_concepts_so(tmp_path):
    """By the command line: 24 of 240 concepts are exclusive, each on one token in a thousand. All others are always found."""
    world = PlantedConcepts(5, n_concepts=240, d_model=48, active=8)
    rare = world.kind != SHARED
    world.rate[rare] = 0.001
    worlds.write_world(tmp_path / "world", world, 500_000)
    flags = ["--base-dataset", tmp_path / "world" / "base.arrow", "--ft-dataset", tmp_path / "world" / "ft.arrow"]
    flags += ["--d-hidden", 512, "--batch-size", 256, "--num-tokens", 500_000, "--val-tokens", 16_384, "--wandb", "disabled"]
    found = {}
    for until in (0, 0.6):
        run = train(tmp_path, f"until-{until}", *flags, "--resample-until", until)
        W_dec = CrossCoder.from_pretrained(run / "crosscoder").W_dec.detach()
        recovered = world.fit(W_dec, torch.zeros(512, dtype=torch.bool)).amax(1) > RECOVERED
        assert recovered[~rare].all()
        found[until] = int(recovered[rare].sum())
    assert found[0] <= 4 and found[0.6] >= 15, found
