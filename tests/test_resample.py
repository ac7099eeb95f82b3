"""Idle latents that start anew: which, where, and with what; that a run finds rare exclusive concepts so, and nothing else."""

import pytest
import torch
from helpers import train
from torch.nn.functional import normalize

from benchmarks import recipes
from crosscoder import CrossCoder
from ops import resample
from ops.weights import Adam
from sources.planted import RECOVERED, SHARED, PlantedConcepts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, F, BATCH = 64, 48, 256  # four latents can be resampled at once
IDLE = [3, 20, 21, 30, 47, 11]  # from the least norm up
ONE_SIDED = {5: 0, 77: 1}  # row -> the model that alone leaves it unexplained, widest first


@pytest.fixture
def begun():
    """A crosscoder after one step of Adam with idle latents; rows, and a reconstruction that leaves two of them one-sided."""
    torch.manual_seed(0)
    crosscoder = CrossCoder(D, F, 2, dec_init_norm=1.0).to(DEVICE)
    optimizer = Adam(crosscoder.parameters(), lr=1e-3)
    optimizer.grad_scale = torch.ones((), device=DEVICE)
    x = torch.randn(BATCH, 2, D, device=DEVICE)
    crosscoder.losses(x, 1.0).loss.backward()
    optimizer.step()
    with torch.no_grad():
        crosscoder.W_dec *= torch.linspace(0.9, 1.1, F, device=DEVICE)[:, None, None]
        crosscoder.enc_rows *= torch.linspace(1.4, 1.6, F, device=DEVICE)[:, None, None]
        for i, j in enumerate(IDLE):
            crosscoder.W_dec[j] *= 0.1 + 0.01 * i
    missed = torch.randn(BATCH, 1, D, device=DEVICE).repeat(1, 2, 1)  # the same in both models
    missed[:, 0] *= 1.01
    for i, (row, model) in enumerate(ONE_SIDED.items()):
        missed[row, model] += (6 - i) * torch.randn(D, device=DEVICE)
    return crosscoder, optimizer, x, x - missed


def all_tensors(crosscoder, optimizer) -> dict[str, torch.Tensor]:
    """[latents, ...] weights and Adam's moments, copied."""
    tensors = {}
    for name in ("W_dec", "enc_rows", "b_enc"):
        weight = getattr(crosscoder, name)
        tensors |= {name: weight, **{f"{name} {key}": optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}}
    return {name: t.detach().clone() for name, t in tensors.items()}


def test_the_most_idle_latents_take_the_most_one_sided_residuals(begun):
    crosscoder, optimizer, x, x_hat = begun
    before = all_tensors(crosscoder, optimizer)
    resample.resample_idle(*begun)
    after = all_tensors(crosscoder, optimizer)
    others = torch.tensor([j for j in range(F) if j not in IDLE[:2]])
    in_use = torch.tensor([j for j in range(F) if j not in IDLE])
    for name, t in after.items():
        assert torch.equal(t[others], before[name][others]), name
    for j, (row, model) in zip(IDLE, ONE_SIDED.items(), strict=False):
        residual = (x - x_hat)[row]
        assert residual[model].norm() > 3 * residual[1 - model].norm()
        for name in ("W_dec", "enc_rows"):
            torch.testing.assert_close(normalize(after[name][j].flatten(), dim=0), normalize(residual.flatten(), dim=0))
            norm = before[name][in_use].flatten(1).norm(dim=1).mean()
            torch.testing.assert_close(after[name][j].norm(), norm)
        assert after["b_enc"][j] == 0
        for name in ("W_dec", "enc_rows", "b_enc"):
            assert (after[f"{name} exp_avg"][j] == 0).all()
            torch.testing.assert_close(
                after[f"{name} exp_avg_sq"][j], resample.SLOWED * before[f"{name} exp_avg_sq"][in_use].mean(0)
            )


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
    crosscoder, optimizer, x, x_hat = begun
    x_hat = change(crosscoder, x, x_hat)
    before = all_tensors(crosscoder, optimizer)
    resample.resample_idle(crosscoder, optimizer, x, x_hat)
    after = all_tensors(crosscoder, optimizer)
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_latents_of_norm_0_are_the_most_idle_and_two_tokens_of_one_concept_get_one_latent(begun):
    crosscoder, optimizer, x, x_hat = begun
    first, second = ONE_SIDED
    crosscoder.W_dec.data[[9, 17]] = 0
    x_hat = x_hat.clone()
    x_hat[second] = x[second] - 0.9 * (x - x_hat)[first]
    before = crosscoder.W_dec.detach().clone()
    resample.resample_idle(crosscoder, optimizer, x, x_hat)
    changed = (crosscoder.W_dec != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [9]


def test_an_exclusive_latent_of_four_models_is_in_use():
    torch.manual_seed(0)
    crosscoder = CrossCoder(D, F, 4, dec_init_norm=1.0)
    crosscoder.W_dec.data[:5, 1:] = 0
    optimizer = Adam(crosscoder.parameters(), lr=1e-3)
    x = torch.randn(BATCH, 4, D)
    crosscoder.losses(x, 1.0).loss.backward()
    optimizer.step()
    missed = torch.zeros(BATCH, 4, D)
    missed[3, 2] = torch.randn(D)
    before = crosscoder.W_dec.detach().clone()
    resample.resample_idle(crosscoder, optimizer, x, x - missed)
    assert torch.equal(crosscoder.W_dec, before)
    crosscoder.W_dec.data[7] *= 0.3  # idle in all of them
    resample.resample_idle(crosscoder, optimizer, x, x - missed)
    assert not torch.equal(crosscoder.W_dec[7], before[7]) and torch.equal(crosscoder.W_dec[:7], before[:7])


def test_of_one_model_nothing_is_one_sided():
    crosscoder = CrossCoder(D, F, 1, dec_init_norm=1.0)
    crosscoder.W_dec.data[:9] *= 0.01
    optimizer = Adam(crosscoder.parameters(), lr=1e-3)
    x = torch.randn(BATCH, 1, D)
    crosscoder.losses(x, 1.0).loss.backward()
    optimizer.step()
    before = crosscoder.W_dec.detach().clone()
    resample.resample_idle(crosscoder, optimizer, x, 0 * x)
    assert torch.equal(crosscoder.W_dec, before)


@pytest.mark.parametrize("steps, until, want", [(3000, 0.6, range(600, 1801, 10)), (10, 0.6, range(2, 7)), (10, 0.0, [])])
def test_when_it_is_due(steps, until, want):
    assert [step for step in range(1, steps + 1) if resample.is_due(step, steps, until)] == list(want)


def test_a_run_finds_rare_exclusive_concepts_so(tmp_path):
    """By the command line: 24 of 240 concepts are exclusive, each on one token in a thousand. All others are always found."""
    world = PlantedConcepts(5, n_concepts=240, d_model=48, active=8)
    rare = world.kind != SHARED
    world.rate[rare] = 0.001
    recipes.write_world(tmp_path / "world", world, 500_000)
    flags = ["--base-dataset", tmp_path / "world" / "base.arrow", "--ft-dataset", tmp_path / "world" / "ft.arrow"]
    flags += ["--d-hidden", 512, "--batch-size", 256, "--num-tokens", 500_000, "--val-tokens", 16_384, "--wandb", "disabled"]
    found = {}
    for until in (0, 0.6):
        run = train(tmp_path, f"until-{until}", *flags, "--resample-until", until)
        W_dec = CrossCoder.from_pretrained(run / "crosscoder").W_dec.detach()
        recovered = world.fit(W_dec, torch.zeros(512, dtype=torch.bool)).amax(1) > RECOVERED
        assert recovered[~rare].all()
        found[until] = int(recovered[rare].sum())
    assert found[0] <= 4 and found[0.6] >= found[0] + 5, found
