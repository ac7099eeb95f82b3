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
def test_kth_largest_equals_topk(count):
    torch.manual_seed(count)
    scores = [torch.randn(20, 100).relu() * 10 ** torch.randn(1), torch.rand(3, 5) * 1e-30, torch.full((50,), 0.5)]
    values = torch.cat([s.flatten() for s in scores]).sort(descending=True).values
    assert sparse.kth_largest(lambda: scores, count) == values[count - 1].item()


def test_kth_largest_is_zero_when_fewer_are_positive():
    assert sparse.kth_largest(lambda: [torch.tensor([0.0, 1.0, 2.0])], 3) == 0.0
    assert sparse.kth_largest(lambda: [torch.tensor([0.0, 1.0, 2.0])], 2) == 1.0


def test_encode_and_decode_equal_the_sum_over_models():
    torch.manual_seed(0)
    x, W_enc, W_dec = torch.randn(5, 3, 4), torch.randn(3, 4, 6), torch.randn(6, 3, 4)
    torch.testing.assert_close(sparse.encode(x, W_enc, torch.float32), sum(x[:, m] @ W_enc[m] for m in range(3)))
    f = torch.rand(5, 6)
    expected = torch.stack([f @ W_dec[:, m] for m in range(3)], dim=1)
    torch.testing.assert_close(sparse.decode(f, W_dec, torch.float32), expected)
