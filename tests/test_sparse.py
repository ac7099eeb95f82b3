import pytest
import torch

from ops import sparse
from ops.dead import DeadLatents
from ops.selection import find_cut


@pytest.mark.parametrize("count", [1, 2, 17, 999])
def test_find_cut_equals_topk(count):
    torch.manual_seed(count)
    scores = [torch.randn(20, 100).relu() * 10 ** torch.randn(1), torch.rand(3, 5) * 1e-30, torch.full((50,), 0.5)]
    values = torch.cat([s.flatten() for s in scores]).sort(descending=True).values
    assert find_cut(lambda: scores, count)[0] == values[count - 1].item()


def test_find_cut_is_zero_when_fewer_are_positive():
    assert find_cut(lambda: [torch.tensor([0.0, 1.0, 2.0])], 3) == (0.0, 0)
    assert find_cut(lambda: [torch.tensor([0.0, 1.0, 2.0, 1.0])], 2) == (1.0, 1)


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
def test_find_finds_the_largest_scores_of_the_whole_batch(batch, d_hidden, count, ties):
    x, rows, b_enc, weight = draw_layer(count, batch, d_hidden, ties)
    f = (sparse.encode(x, rows, torch.float32) + b_enc).relu()
    score = (f * weight).flatten()
    found = sparse.find(x, rows, b_enc, torch.float32, weight, count)
    tokens = torch.arange(batch).repeat_interleave(found.token_starts.diff())
    places = tokens * d_hidden + found.latents
    assert (places.diff() > 0).all()  # by token, then latent, none twice
    torch.testing.assert_close(found.codes, f.flatten()[places])
    if ties:  # whole numbers, without rounding
        first = score.sort(descending=True, stable=True).indices[:count]
        assert torch.equal(places, first[score[first] > 0].sort().values)
    else:
        top = score.sort(descending=True).values[:count]
        torch.testing.assert_close(score[places].sort(descending=True).values, top[top > 0])


def test_find_without_a_count_finds_all_positive_codes_unless_they_are_many(monkeypatch):
    x, rows, b_enc, weight = draw_layer(0, 200, 30, ties=False)
    weight[3] = 0.0  # is active all the same
    f = (sparse.encode(x, rows, torch.float32) + b_enc).relu()
    share = (f > 0).double().mean().item()
    for most, several in ((share - 0.02, False), (share + 0.02, True)):  # a sieve lets a few more through
        monkeypatch.setattr(sparse, "DENSE_ABOVE", most)
        found = sparse.find(x, rows, b_enc, torch.float32, weight, None)
        assert (found is not None) == several
    torch.testing.assert_close(found.codes, f[f > 0])


def test_the_form_follows_the_number_of_active_codes(monkeypatch):
    """Also where fewer are positive than were asked for."""
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 0.1)
    x, rows, b_enc, weight = draw_layer(0, 200, 30, ties=False)
    used = []
    for form in (sparse._Dense, sparse._Sparse):
        apply = form.apply
        monkeypatch.setattr(form, "apply", lambda *args, form=form, apply=apply: used.append(form) or apply(*args))
    for bias, count in ((0.0, 500), (0.0, 700), (0.0, None), (-9.0, None), (-9.0, 700)):
        sparse.reconstruct(x, rows, b_enc + bias, rows, torch.float32, weight, count)
    assert used == [sparse._Sparse, sparse._Dense, sparse._Dense, sparse._Sparse, sparse._Sparse]


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("d_hidden", [0, 4])
def test_nothing_active_gives_zeros_and_zero_gradients(d_hidden, few):
    x, rows, W_dec = torch.ones(6, 2, 3), *(torch.ones(d_hidden, 2, 3, requires_grad=True) for _ in range(2))
    bias, weight = torch.full((d_hidden,), -9.0), torch.ones(d_hidden)
    out = sparse.reconstruct(x, rows, bias, W_dec, torch.float32, weight, 1, few=few)
    (out.decoded + 1).pow(2).sum().backward()
    assert out.decoded.shape == x.shape and out.smallest == torch.inf
    assert out.times.dtype == out.total.dtype  # several processes add them up, whichever form each has
    assert not any(t.any() for t in (out.decoded, out.total, out.times, rows.grad, W_dec.grad))


def test_a_sample_of_unlike_tokens_does_not_change_what_is_kept(monkeypatch):
    """The cut is guessed from the first tokens; here their scores are far above, then far below all others."""
    x, rows, b_enc, weight = draw_layer(3, 1000, 64, ties=False)
    monkeypatch.setattr(sparse, "CHUNK", 128 * 64)
    for factor in (100.0, 0.01):
        unlike = x.clone()
        unlike[:128] *= factor
        score = (sparse.encode(unlike, rows, torch.float32) + b_enc).relu() * weight
        found = sparse.find(unlike, rows, b_enc, torch.float32, weight, 5_000)
        expected = score.flatten().sort(descending=True).values[:5_000]
        torch.testing.assert_close((found.codes * weight[found.latents]).sort(descending=True).values, expected)


def test_the_number_of_dead_latents_is_never_above_what_the_host_knows():
    """As on CUDA, where the host knows an old number: latents die and live again, and a run goes on from a checkpoint."""
    batch, after, draw = 10, 1000, torch.Generator().manual_seed(0)
    since = torch.randint(0, 300, (700,), generator=draw)
    latents, now = DeadLatents(since, after, batch), DeadLatents(since, after, batch)
    latents.asks = True
    latents.ask = lambda: (int((since >= latents.soon).sum()), None)
    latents.answer = lambda asked: asked[0]
    seen = set()
    for step in range(400):
        (dead, most), (expected, _) = latents.now(10**6), now.now(10**6)
        assert (dead is None and expected is None) or (torch.equal(dead, since >= after) and dead.sum() <= most)
        seen.add((dead is not None, bool((since >= after).any())))
        since += batch
        since[torch.rand(700, generator=draw) < (0.05 if 100 < step < 200 else 0.004)] = 0
        if step == 137:
            latents.forget()
    assert seen == {(False, False), (True, False), (True, True)}


def test_places_hold_the_dead_latents_first(monkeypatch):
    dead = torch.tensor([False, True, False, True, False])
    assert sparse.places(dead, None).tolist() == [1, 3]
    monkeypatch.setattr(sparse, "on_cuda", lambda x: True)
    assert sparse.places(dead, 3).tolist() == [1, 3, 0] and sorted(sparse.places(dead, None).tolist()) == list(range(5))
