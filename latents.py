"""What each latent is: measurements on trained decoders as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

# Cuts on the relative norm (arXiv 2602.11729, appendix B.2). Minder et al. (arXiv 2504.02922) cut at 1/6 and 5/6.
BASE_ONLY_BELOW, FT_ONLY_ABOVE = 0.2, 0.8
CLASSES = ("base_only", "shared", "ft_only")


def relative_norm(norms: Tensor) -> Tensor:
    """[d_hidden] |W_dec[ft]| / (|W_dec[base]| + |W_dec[ft]|): 0 only the base model has it, 1 only the fine-tuned one.

    Args:
        norms: [d_hidden, 2] decoder norms, base first. A latent without any norm gets 0.5.
    """
    total = norms.sum(-1)
    return torch.where(total > 0, norms[:, 1] / total.clamp_min(torch.finfo(norms.dtype).tiny), 0.5)


def classify(norms: Tensor) -> Tensor:
    """[d_hidden] index into CLASSES by relative norm. norms: [d_hidden, 2], base first."""
    relative = relative_norm(norms)
    return (relative >= BASE_ONLY_BELOW).long() + (relative > FT_ONLY_ABOVE).long()


def count_classes(norms: Tensor, dead: Tensor) -> dict[str, int]:
    """How many live latents belong to each class, and how many latents are dead. dead: [d_hidden] bool."""
    counts = torch.bincount(classify(norms)[~dead], minlength=3).tolist()
    return dict(zip(CLASSES, counts, strict=True), dead=int(dead.sum()))
