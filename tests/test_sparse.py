import pytest
import torch

import sparse


def test_keep_largest_keeps_the_largest_scores_of_the_whole_matrix():
    torch.manual_seed(0)
    for batch, latents, count in [(1, 1, 1), (3, 7, 5), (64, 96, 64 * 8), (5, 4, 100), (500, 300, 1), (500, 300, 7_000)]:
        score = torch.randn(batch, latents).relu() * torch.rand(latents) ** 4
        mask = sparse.keep_largest(score, count)
        expected = score.flatten().sort(descending=True).values[:count]
        expected = expected[expected > 0]
        assert torch.equal(score[mask].sort(descending=True).values, expected)


def test_keep_largest_never_keeps_more_than_count_when_scores_are_equal():
    assert sparse.keep_largest(torch.ones(8, 8), 10).sum() == 10


def test_keep_largest_ignores_zeros():
    score = torch.zeros(4, 5)
    score[2, 3] = 1.0
    assert torch.equal(sparse.keep_largest(score, 6), score > 0)


@pytest.mark.parametrize("count", [1, 2, 17, 999])
def test_find_cut_equals_topk(count):
    torch.manual_seed(count)
    scores = [torch.randn(20, 100).relu() * 10 ** torch.randn(1), torch.rand(3, 5) * 1e-30, torch.full((50,), 0.5)]
    values = torch.cat([s.flatten() for s in scores]).sort(descending=True).values
    assert sparse.find_cut(lambda: scores, count)[0] == values[count - 1].item()


def test_find_cut_is_zero_when_fewer_are_positive():
    assert sparse.find_cut(lambda: [torch.tensor([0.0, 1.0, 2.0])], 3) == (0.0, 0)
    assert sparse.find_cut(lambda: [torch.tensor([0.0, 1.0, 2.0, 1.0])], 2) == (1.0, 1)


def test_encode_and_decode_equal_the_sum_over_models():
    torch.manual_seed(0)
    x, rows, W_dec = torch.randn(5, 3, 4), torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    torch.testing.assert_close(sparse.encode(x, rows, torch.float32), sum(x[:, m] @ rows[:, m].T for m in range(3)))
    f = torch.rand(5, 6)
    expected = torch.stack([f @ W_dec[:, m] for m in range(3)], dim=1)
    torch.testing.assert_close(sparse.decode(f, W_dec, torch.float32), expected)


def draw_layer(seed, batch, d_hidden, ties):
    """x [batch, 2, 6], encoder rows, b_enc and score weights; with `ties`, scores are small integers."""
    draw = torch.Generator().manual_seed(seed)
    x, rows, b_enc = (torch.randn(*shape, generator=draw) for shape in ((batch, 2, 6), (d_hidden, 2, 6), (d_hidden,)))
    weight = torch.rand(d_hidden, generator=draw) + 0.1
    return (x.round(), rows.round(), b_enc.round(), torch.ones_like(weight)) if ties else (x, rows, b_enc, weight)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch, d_hidden, count", [(1, 1, 1), (7, 5, 3), (130, 96, 800), (500, 300, 7), (300, 40, 10**6)])
def test_active_codes_are_the_dense_codes_that_keep_largest_keeps(batch, d_hidden, count, ties, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 10**6)
    x, rows, b_enc, weight = draw_layer(count, batch, d_hidden, ties)
    f = (sparse.encode(x, rows, torch.float32) + b_enc).relu()
    score = f * weight
    top = score.flatten().sort(descending=True).values[:count]
    codes, active = sparse.active_codes(x, rows, b_enc, torch.float32, weight, count)
    assert len(codes) == (top > 0).sum()
    found = (codes * weight[active.latents]).sort(descending=True).values
    torch.testing.assert_close(found, top[top > 0])
    # Every entry is the dense code at its place, read token by token or latent by latent, and no place comes twice.
    tokens = torch.arange(batch).repeat_interleave(active.token_starts.diff())
    assert torch.equal(tokens, active.tokens)
    torch.testing.assert_close(codes, f[tokens, active.latents])
    assert len(set(zip(tokens.tolist(), active.latents.tolist(), strict=True))) == len(codes)
    assert torch.equal(tokens[active.by_latent], active.tokens_by_latent)
    by_latent = active.latents[active.by_latent]
    assert torch.equal(by_latent, by_latent.sort().values)
    assert torch.equal(active.latent_starts, torch.searchsorted(by_latent, torch.arange(d_hidden + 1)))


def test_active_codes_without_a_count_are_all_positive_ones(monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 1.0)
    x, rows, b_enc, _ = draw_layer(0, 200, 30, ties=False)
    codes, _ = sparse.active_codes(x, rows, b_enc, torch.float32)
    f = (sparse.encode(x, rows, torch.float32) + b_enc).relu()
    torch.testing.assert_close(codes, f[f > 0])


def test_equal_scores_at_the_cut_are_kept_in_order_of_tokens(monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 1.0)
    x, rows = torch.ones(6, 1, 2), torch.ones(4, 1, 2)
    _, active = sparse.active_codes(x, rows, torch.zeros(4), torch.float32, torch.ones(4), 10)
    assert active.latents.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_nothing_active_gives_no_codes_and_zero_gradients():
    x, rows, W_dec = torch.ones(6, 2, 3), torch.zeros(4, 2, 3, requires_grad=True), torch.ones(4, 2, 3, requires_grad=True)
    codes, active = sparse.active_codes(x, rows, -torch.ones(4), torch.float32, torch.ones(4), 1)
    x_hat = sparse.decode_active(codes, active, W_dec, torch.float32)
    (x_hat + 1).pow(2).sum().backward()
    assert len(codes) == 0 and not x_hat.any() and not rows.grad.any() and not W_dec.grad.any()


def test_a_sample_of_unlike_tokens_does_not_change_what_is_kept(monkeypatch):
    """The cut is guessed from the first tokens; here their scores are far above, then far below all others."""
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 1.0)
    x, rows, b_enc, weight = draw_layer(3, 1000, 64, ties=False)
    monkeypatch.setattr(sparse, "CHUNK", 128 * 64)
    for factor in (100.0, 0.01):
        unlike = x.clone()
        unlike[:128] *= factor
        score = (sparse.encode(unlike, rows, torch.float32) + b_enc).relu() * weight
        codes, active = sparse.active_codes(unlike, rows, b_enc, torch.float32, weight, 5_000)
        expected = score.flatten().sort(descending=True).values[:5_000]
        torch.testing.assert_close((codes * weight[active.latents]).sort(descending=True).values, expected)
