import pytest
import torch

from ops import latents


def test_relative_norm_runs_from_base_to_fine_tuned():
    norms = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [3.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(latents.relative_norm(norms), torch.tensor([0.0, 0.5, 1.0, 0.25, 0.5]))


def test_classes_cut_at_a_fifth_and_four_fifths():
    share = torch.tensor([0.0, 0.19, 0.21, 0.5, 0.79, 0.81, 1.0])
    norms = torch.stack([1 - share, share], dim=-1)
    assert [latents.CLASSES[i] for i in latents.classify(norms)] == ["base_only"] * 2 + ["shared"] * 3 + ["ft_only"] * 2


def test_counts_leave_dead_latents_out_of_the_classes():
    norms = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    dead = torch.tensor([False, False, False, True])
    assert latents.count_classes(latents.classify(norms), dead) == {"base_only": 1, "shared": 1, "ft_only": 1, "dead": 1}


def scaling_sums(x, f, x_hat, W_dec, of):
    """What `latents.latent_scaling` needs, by its definition: inner products of every token with every direction."""
    along = [torch.stack([(f * (y[:, m] @ W_dec[:, of].T)).sum(0).double() for m in range(x.shape[1])]) for y in (x, x - x_hat)]
    return latents.ScalingSums(*along, f.double().pow(2).sum(0))


def naive_beta(f, d, y):
    """argmin_b sum |b f d - y|^2 by least squares on the stacked equations."""
    design = (f[:, None] * d).flatten()[:, None]
    return torch.linalg.lstsq(design, y.flatten()[:, None]).solution.item()


@pytest.mark.parametrize("of", [0, 1])
def test_latent_scaling_equals_its_definition(of):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, 6, generator=draw, dtype=torch.float64)
    f = torch.randn(300, 5, generator=draw, dtype=torch.float64).relu()
    W_dec = torch.randn(5, 2, 6, generator=draw, dtype=torch.float64)
    x_hat = torch.einsum("bj,jmd->bmd", f, W_dec) + torch.randn(2, 6, generator=draw, dtype=torch.float64)
    whole = scaling_sums(x, f, x_hat, W_dec, of)
    parts = [scaling_sums(x[i : i + 100], f[i : i + 100], x_hat[i : i + 100], W_dec, of) for i in (0, 100, 200)]
    got = latents.latent_scaling(latents.ScalingSums(*map(sum, zip(*parts, strict=True))), W_dec, of)
    torch.testing.assert_close(got, latents.latent_scaling(whole, W_dec, of))
    for j in range(5):
        for m in range(2):
            without = x[:, m] - x_hat[:, m] + f[:, j, None] * W_dec[j, m]
            assert got.error[m, j].item() == pytest.approx(naive_beta(f[:, j], W_dec[j, of], without), rel=1e-9)
            expected = naive_beta(f[:, j], W_dec[j, of], x_hat[:, m])
            assert got.reconstruction[m, j].item() == pytest.approx(expected, rel=1e-9)


def test_latent_scaling_sees_what_norms_do_not():
    """Three latents that all look ft-only by norm: truly so; shrunk away in base; reconstructed in base by another latent."""
    draw = torch.Generator().manual_seed(0)
    d = torch.eye(4, dtype=torch.float64)
    f = torch.rand(2000, 4, generator=draw, dtype=torch.float64) * (torch.rand(2000, 4, generator=draw) < 0.3)
    f[:, 3] = f[:, 2]  # latent 3 writes, in base, the direction of latent 2
    W_dec = torch.zeros(4, 2, 4, dtype=torch.float64)
    W_dec[range(4), 1] = d
    W_dec[:3, 0] = 0.01 * d[:3]
    W_dec[3, 0], W_dec[3, 1] = d[2], d[3]
    x_hat = torch.einsum("bj,jmd->bmd", f, W_dec)
    x = x_hat.clone()
    x[:, 0, 1] += f[:, 1]  # the base model has concept 1, and nothing reconstructs it there
    x += 0.01 * torch.randn(x.shape, generator=draw, dtype=torch.float64)
    base, ft = (latents.latent_scaling(scaling_sums(x, f, x_hat, W_dec, of), W_dec, of) for of in (0, 1))
    assert latents.classify(W_dec.norm(dim=-1))[:3].tolist() == [2, 2, 2]
    assert latents.classify_by_scaling(base, ft, W_dec.norm(dim=-1))[:3].tolist() == [2, 1, 1]
    nu_error, nu_reconstruction = ft.nu(1)
    assert nu_error[0] < 0.1 < 0.9 < nu_error[1] and nu_reconstruction[0] < 0.1 < 0.9 < nu_reconstruction[2]


@pytest.mark.parametrize(("share", "expected"), [(-2, 1), (-0.5, 2), (0.1, 2), (0.4, 1)])
def test_what_points_away_from_the_concept_is_not_the_concept(share, expected):
    """The other model's activations hold `share` times the concept that this model has."""
    f = torch.rand(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W_dec = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    x_hat = torch.einsum("bj,jmd->bmd", f, W_dec)
    x = x_hat.clone()
    x[:, 0, 0] += share * f[:, 0]
    base, ft = (latents.latent_scaling(scaling_sums(x, f, x_hat, W_dec, of), W_dec, of) for of in (0, 1))
    assert ft.nu(1)[0].item() == pytest.approx(share)
    assert latents.classify_by_scaling(base, ft, W_dec.norm(dim=-1)).tolist() == [expected]


@pytest.mark.parametrize("own", [1.0, -1.0])
@pytest.mark.parametrize("negative", ["error", "reconstruction"])
def test_a_ratio_that_is_negative_by_this_models_own_part_is_not_low(negative, own):
    """The other model has -0.4 times what this one has, in its error or in its reconstruction, and nothing in the other."""
    part, none = torch.tensor([[-0.4 * own], [own]]), torch.tensor([[0.0], [1.0]])
    values = {"error": none, "reconstruction": none, "activation": none} | {negative: part}
    ft, base = latents.LatentScaling(**values), latents.LatentScaling(none, none, none)
    assert latents.classify_by_scaling(base, ft, torch.tensor([[0.0, 1.0]])).tolist() == [2 if own > 0 else 1]


def test_a_latent_that_never_fires_is_not_exclusive():
    x, f, W_dec = torch.randn(10, 2, 3), torch.zeros(10, 1), torch.randn(1, 2, 3)
    base, ft = (latents.latent_scaling(scaling_sums(x, f, x, W_dec, of), W_dec, of) for of in (0, 1))
    assert ft.error.isnan().all() and latents.classify_by_scaling(base, ft, W_dec.norm(dim=-1)).tolist() == [1]


def test_the_direction_of_a_vanished_row_does_not_decide():
    """Base rows near zero point anywhere: asked about base, these two latents of the fine-tuned model look base-only."""
    draw = torch.Generator().manual_seed(0)
    f = torch.rand(2000, 2, generator=draw) * (torch.rand(2000, 2, generator=draw) < 0.2)
    W_dec = torch.zeros(2, 2, 4)
    W_dec[:, 1, :2] = torch.eye(2)
    W_dec[0, 0, 2] = 1e-6
    W_dec[1, 0, 3] = 1e-6
    x_hat = torch.einsum("bj,jmd->bmd", f, W_dec)
    x = x_hat.clone()
    x[:, 0, 2:] += 0.1 * f  # a little error in base, by chance along those rows
    base, ft = (latents.latent_scaling(scaling_sums(x, f, x_hat, W_dec, of), W_dec, of) for of in (0, 1))
    nu_error, nu_reconstruction = base.nu(0)
    assert (nu_error.abs() < 0.2).all() and (nu_reconstruction.abs() < 0.5).all()
    assert latents.classify_by_scaling(base, ft, W_dec.norm(dim=-1)).tolist() == [2, 2]


@pytest.mark.parametrize("density", [0.05, 0.6])  # as a list of active entries, and as matrices
def test_all_latents_at_once_equal_the_definition(density):
    """One float32 pass in batches and groups, against the definition in float64, for both models' directions and targets."""
    draw = torch.Generator().manual_seed(1)
    x, W_dec, b_dec = (torch.randn(shape, generator=draw) for shape in ((600, 2, 12), (40, 2, 12), (2, 12)))
    f = torch.rand(600, 40, generator=draw) * (torch.rand(600, 40, generator=draw) < density)
    f[:, 39] = 0
    group = torch.randint(3, (600,), generator=draw)
    sums, x_hat = latents.latent_sums(x[:250], f[:250], W_dec, b_dec, group[:250], 3)
    more, rest = latents.latent_sums(x[250:], f[250:], W_dec, b_dec, group[250:], 3)
    sums, x_hat = sums + more, torch.cat([x_hat, rest])
    x, f, W_dec = x.double(), f.double(), W_dec.double()
    expected = torch.einsum("bj,jmd->bmd", f, W_dec) + b_dec.double()
    torch.testing.assert_close(x_hat.double(), expected, atol=1e-5, rtol=1e-5)
    assert sums.tokens == 600 and torch.equal(sums.count, torch.stack([(f[group == i] > 0).sum(0) for i in range(3)]))
    torch.testing.assert_close(sums.f, torch.stack([f[group == i].sum(0) for i in range(3)]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.f_max, f.amax(0))
    for of in (0, 1):
        got = latents.latent_scaling(sums.scaling(of), W_dec, of)
        assert got.error[:, 39].isnan().all()
        for j in range(39):
            for m in range(2):
                without = x[:, m] - expected[:, m] + f[:, j, None] * W_dec[j, m]
                for beta, y in ((got.error, without), (got.reconstruction, expected[:, m]), (got.activation, x[:, m])):
                    assert beta[m, j].item() == pytest.approx(naive_beta(f[:, j], W_dec[j, of], y), rel=1e-5, abs=1e-5)


def test_published_cuts_and_scales():
    norms = torch.tensor([[1.0, 0.0], [1.0, 0.15], [1.0, 1.0], [0.5, 1.0], [0.22, 1.0], [0.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(latents.delta_norm(norms), torch.tensor([0, 0.075, 0.5, 0.75, 0.89, 1, 1]))
    counts = latents.published_counts(norms, torch.tensor([True] * 6 + [False]))
    ours, strict, delta = counts.values()
    assert ours == {"base_only": 2, "shared": 2, "ft_only": 2, "other": 0}
    assert strict == {"base_only": 1, "shared": 2, "ft_only": 1, "other": 2}
    assert delta == {"base_only": 2, "shared": 1, "ft_only": 1, "other": 2}
