"""A small crosscoder and rows for it."""

import torch

from crosscoder import CrossCoder

B, D, F, K = 32, 12, 40, 4


def make(variant="vanilla", seed=0, **options):
    """A small crosscoder with a normalisation that differs between the models and no symmetry between the weights."""
    crosscoder = CrossCoder(D, F, variant=variant, k=K, seed=seed, **{"dec_init_norm": 0.5} | options)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in crosscoder.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draw)
        crosscoder.mean.copy_(torch.randn(2, D, generator=draw))
        crosscoder.scale.copy_(torch.tensor([0.5, 3.0]))
    return crosscoder


def rows(n=B, seed=7):
    return torch.randn(n, 2, D, generator=torch.Generator().manual_seed(seed))
