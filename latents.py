"""What each latent is: measurements on trained decoders as pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum
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


class ScalingSums(NamedTuple):
    """What one pass over tokens has to add up for latent scaling, float64. d_j is the decoder row of the model asked about."""

    x: Tensor  # [n_models, d_hidden] sum over tokens of f_j * <x^m, d_j>
    error: Tensor  # [n_models, d_hidden] the same with the reconstruction error in place of x^m
    f_squared: Tensor  # [d_hidden] sum over tokens of f_j^2

    def __add__(self, other: ScalingSums) -> ScalingSums:
        return ScalingSums(*(a + b for a, b in zip(self, other, strict=True)))


def scaling_sums(x: Tensor, f: Tensor, x_hat: Tensor, W_dec: Tensor, of: int) -> ScalingSums:
    """The sums of one batch; add those of all batches for `latent_scaling`.

    Args:
        x, x_hat: [batch, n_models, d_model] activations and reconstructions in the decoder's space.
        f: [batch, d_hidden] inference codes.
        W_dec: [d_hidden, n_models, d_model].
        of: the model whose directions are asked about: 1 for what only the fine-tuned model has.
    """
    directions = W_dec[:, of]  # [d_hidden, d_model]
    error = x - x_hat
    along_x, along_error = (
        torch.stack([(f * (y[:, m] @ directions.T)).sum(0).double() for m in range(x.shape[1])]) for y in (x, error)
    )
    return ScalingSums(along_x, along_error, f.double().pow(2).sum(0))


class LatentScaling(NamedTuple):
    """How strongly each model's target contains a latent's direction: the least-squares factors beta, [n_models, d_hidden].

    beta = argmin_b sum_tokens |b * f_j * d_j - y|^2 (Minder et al., arXiv 2504.02922), NaN where a latent never fires.
    """

    error: Tensor  # y = the error without latent j: x^m - x_hat^m + f_j * d_j^m
    reconstruction: Tensor  # y = the reconstruction x_hat^m

    def nu(self, of: int) -> tuple[Tensor, Tensor]:
        """[d_hidden] ratios other model / model `of` of the two betas, for two models.

        A high ratio of errors: the concept is in the other model, whose row was shrunk away (complete shrinkage). A high ratio
        of reconstructions: other latents reconstruct it there (latent decoupling). Both near 0: truly exclusive to `of`.
        """
        return self.error[1 - of] / self.error[of], self.reconstruction[1 - of] / self.reconstruction[of]


def latent_scaling(sums: ScalingSums, W_dec: Tensor, of: int) -> LatentScaling:
    """The betas of all latents from the sums of one pass, in closed form."""
    W_dec = W_dec.double()
    squared_norm = W_dec[:, of].pow(2).sum(-1)  # [d_hidden]
    along_x, along_error = (total / (sums.f_squared * squared_norm) for total in (sums.x, sums.error))
    # What latent j itself gives back to each model, 1 for `of`.
    own = einsum(W_dec, W_dec[:, of], "latent model d, latent d -> model latent") / squared_norm
    return LatentScaling(error=along_error + own, reconstruction=along_x - along_error)


# Minder et al. call a latent specific to the fine-tuned model below both of these.
NU_ERROR_BELOW, NU_RECONSTRUCTION_BELOW = 0.2, 0.5


def classify_by_scaling(base: LatentScaling, ft: LatentScaling, norms: Tensor) -> Tensor:
    """[d_hidden] index into CLASSES by latent scaling; `base` and `ft` were asked about (`of`) models 0 and 1.

    A latent can be exclusive only to the model with its larger row: the direction of a row near zero is arbitrary, and so
    are its ratios. Sees through decoder norms: a concept that only fires rarely keeps a base row for long, and an L1 penalty
    can shrink away a row whose concept the other model has. norms: [d_hidden, 2] decoder norms, base first.
    """
    exclusive = []
    for scaling, of in ((base, 0), (ft, 1)):
        nu_error, nu_reconstruction = scaling.nu(of)
        low = (nu_error.abs() < NU_ERROR_BELOW) & (nu_reconstruction.abs() < NU_RECONSTRUCTION_BELOW)
        exclusive.append(low & (norms[:, of] > norms[:, 1 - of]))
    return 1 - exclusive[0].long() + exclusive[1].long()
