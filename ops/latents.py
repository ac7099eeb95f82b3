"""What each latent is: measurements on trained decoders as pure functions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import cosine_similarity, embedding_bag

# Cuts on the relative norm (arXiv 2602.11729, appendix B.2). Minder et al. (arXiv 2504.02922) cut at 1/6 and 5/6.
BASE_ONLY_BELOW, FT_ONLY_ABOVE = 0.2, 0.8
CLASSES = ("base_only", "shared", "ft_only")
DENSE_ABOVE = 1 / 8  # share of active entries above which matrices beat lists of entries on a CPU
LATENTS_TOGETHER = 2048  # latents whose sums over a batch, [4 * d_model] each, are in memory at once


def relative_norm(norms: Tensor) -> Tensor:
    """[d_hidden] |W_dec[ft]| / (|W_dec[base]| + |W_dec[ft]|): 0 only the base model has it, 1 only the fine-tuned one.

    Args:
        norms: [d_hidden, 2] decoder norms, base first. A latent without any norm gets 0.5.
    """
    total = norms.sum(-1)
    return torch.where(total > 0, norms[:, 1] / total.clamp_min(torch.finfo(norms.dtype).tiny), 0.5)


def delta_norm(norms: Tensor) -> Tensor:
    """[d_hidden] (1 + (|ft| - |base|) / max(|ft|, |base|)) / 2, the scale of Minder et al. (arXiv 2504.02922): 1 ft-only.

    norms: [d_hidden, 2] decoder norms, base first. A latent without any norm gets 0.5.
    """
    most = norms.amax(-1)
    return 0.5 * (1 + torch.where(most > 0, (norms[:, 1] - norms[:, 0]) / most.clamp_min(torch.finfo(norms.dtype).tiny), 0))


def cosine(W: Tensor) -> Tensor:
    """[d_hidden] cosine between each latent's rows in models 0 and 1. W: [d_hidden, n_models, d_model]; a zero row gives 0."""
    return cosine_similarity(W[:, 0].double(), W[:, 1].double(), dim=-1)


def classify(norms: Tensor) -> Tensor:
    """[d_hidden] index into CLASSES by relative norm. norms: [d_hidden, 2], base first."""
    relative = relative_norm(norms)
    return (relative >= BASE_ONLY_BELOW).long() + (relative > FT_ONLY_ABOVE).long()


def count_classes(kind_of: Tensor, dead: Tensor) -> dict[str, int]:
    """How many live latents belong to each class, and how many latents are dead.

    kind_of: [d_hidden] index into CLASSES; dead: [d_hidden] bool.
    """
    counts = torch.bincount(kind_of[~dead], minlength=3).tolist()
    return dict(zip(CLASSES, counts, strict=True), dead=int(dead.sum()))


def list_classes(kind_of: Tensor, dead: Tensor) -> dict[str, list[int]]:
    """The latents of each exclusive class, and the dead ones; all others are shared. Arguments of `count_classes`."""
    masks = {name: (kind_of == CLASSES.index(name)) & ~dead for name in ("base_only", "ft_only")} | {"dead": dead}
    return {name: mask.nonzero()[:, 0].tolist() for name, mask in masks.items()}


def model_names(n_models: int) -> list[str]:
    """What the models are called in files and in what is printed: base, ft, C, D, ..."""
    return ["base", "ft", *map(chr, range(ord("C"), ord("A") + n_models))][:n_models]


def count_owners(norms: Tensor, dead: Tensor) -> dict[str, int]:
    """Of more than two models: how many live latents have over 0.8 of their decoder norm in one (A: the base model).

    norms: [d_hidden, n_models]; dead: [d_hidden] bool. Of one model, a difference, there is nothing to own.
    """
    if norms.shape[1] == 1:
        return {"live": int((~dead).sum()), "dead": int(dead.sum())}
    share = (norms / norms.sum(-1, keepdim=True).clamp_min(1e-12))[~dead]  # [live, n_models]
    only = (share > FT_ONLY_ABOVE).sum(0).tolist()
    owners = {f"{chr(65 + model)}_only": n for model, n in enumerate(only)}
    return {"shared": len(share) - sum(only), **owners, "dead": int(dead.sum())}


def published_counts(norms: Tensor, live: Tensor) -> dict[str, dict[str, int]]:
    """How many live latents are in each class under the cuts of several papers and repositories. live: [d_hidden] bool."""
    relative, delta = relative_norm(norms)[live], delta_norm(norms)[live]
    cuts = {
        f"relative norm {BASE_ONLY_BELOW}, {FT_ONLY_ABOVE} (arXiv 2602.11729)": (
            relative, BASE_ONLY_BELOW, BASE_ONLY_BELOW, FT_ONLY_ABOVE, FT_ONLY_ABOVE,
        ),
        "relative norm 0.1, 0.9, shared 0.3 to 0.7 (ckkissane)": (relative, 0.1, 0.3, 0.7, 0.9),
        "delta norm 0.1, 0.9, shared 0.4 to 0.6 (arXiv 2504.02922)": (delta, 0.1, 0.4, 0.6, 0.9),
    }  # fmt: skip
    counts = {}
    for name, (value, base_only, low, high, ft_only) in cuts.items():
        found = [int((value < base_only).sum()), int(((value >= low) & (value <= high)).sum()), int((value > ft_only).sum())]
        counts[name] = dict(zip(CLASSES, found, strict=True), other=len(value) - sum(found))
    return counts


# --- one pass over tokens


@dataclass(frozen=True)
class LatentSums:
    """What one pass over tokens adds up for every latent, float64: memory does not grow with the tokens."""

    tokens: int
    group_tokens: Tensor  # [groups] int64, tokens of each group: of each text, say
    count: Tensor  # [groups, d_hidden] int64, tokens at which the latent is active
    f: Tensor  # [groups, d_hidden] sum of its codes
    f_squared: Tensor  # [d_hidden] sum of their squares
    f_max: Tensor  # [d_hidden] largest code
    x: Tensor  # [n_models, n_models, d_hidden] sum of f_j * <x^m, d_j^of>: first axis of, second m
    error: Tensor  # the same with the reconstruction error in place of x^m

    def __add__(self, other: LatentSums) -> LatentSums:
        added = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return LatentSums(**added | {"f_max": torch.maximum(self.f_max, other.f_max)})

    def scaling(self, of: int) -> ScalingSums:
        """The part that `latent_scaling` needs to ask about the directions of model `of`."""
        return ScalingSums(self.x[of], self.error[of], self.f_squared)


@torch.no_grad()
def latent_sums(
    x: Tensor, f: Tensor, W_dec: Tensor, b_dec: Tensor, group: Tensor | None = None, n_groups: int = 1,
    x_hat: Tensor | None = None,
) -> tuple[LatentSums, Tensor]:  # fmt: skip
    """The sums of one batch (add those of all batches), and its reconstruction [batch, n_models, d_model].

    f_j * (x, error) is first summed over the batch and then multiplied with the directions: one product for each latent instead
    of one for each token and latent. On a CPU where few latents are active, the sums are taken over active entries alone.

    Args:
        x: [batch, n_models, d_model] activations in the decoder's space.
        f: [batch, d_hidden] inference codes.
        W_dec: [d_hidden, n_models, d_model]; b_dec: [n_models, d_model].
        group: [batch] int64 below n_groups: codes are counted and summed for each group of tokens; None: all are of group 0.
        x_hat: the reconstruction, where these latents are only a part of the dictionary.
    """
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device) if group is None else group
    d_hidden, rows = len(W_dec), W_dec.flatten(1)  # [d_hidden, n_models * d_model]
    on_cpu = f.device.type == "cpu"
    none = torch.empty(0, dtype=torch.int64)  # on CUDA: counting the entries would wait for the device
    tokens, active = f.nonzero(as_tuple=True) if on_cpu else (none, none)  # [entries] each, ordered by token
    few = on_cpu and len(tokens) <= DENSE_ABOVE * f.numel()
    if few:
        values = f[tokens, active]  # [entries]
        cell = group[tokens] * d_hidden + active  # [entries] place in a matrix [groups, d_hidden]
        count, total = (torch.bincount(cell, w, n_groups * d_hidden).view(n_groups, -1) for w in (None, values.double()))
        total = total.double()  # without any entry it is of whole numbers
        per_token = torch.bincount(tokens, minlength=len(x))
        if x_hat is None:
            starts = per_token.cumsum(0) - per_token
            x_hat = embedding_bag(active, rows, starts, mode="sum", per_sample_weights=values).view(x.shape).to(x.dtype) + b_dec
        by_latent = active.argsort(stable=True)
        tokens, values, borders = tokens[by_latent], values[by_latent], torch.cat([count.new_zeros(1), count.sum(0).cumsum(0)])
        wide, latent = values.double(), active[by_latent]
        squared = torch.bincount(latent, wide * wide, d_hidden).double()
        most = torch.zeros_like(squared).scatter_reduce_(0, latent, wide, "amax")
    else:
        parts = [f[group == i] for i in range(n_groups)] if n_groups > 1 else [f]
        count, total = (torch.stack(sums) for sums in zip(*(((p > 0).sum(0), p.sum(0).double()) for p in parts), strict=True))
        squared, most = f.pow(2).sum(0).double(), f.amax(0).double()
        x_hat = (f @ rows).view(x.shape).to(x.dtype) + b_dec if x_hat is None else x_hat
    targets = torch.stack([x, x - x_hat], dim=1).flatten(1)  # [batch, 2 * n_models * d_model]
    parts = []
    for first in range(0, d_hidden, LATENTS_TOGETHER):
        after = min(first + LATENTS_TOGETHER, d_hidden)
        if few:
            low, high = int(borders[first]), int(borders[after])
            weighted = embedding_bag(
                tokens[low:high], targets, borders[first:after] - low, mode="sum", per_sample_weights=values[low:high]
            )
        else:
            weighted = f[:, first:after].T @ targets
        weighted = weighted.view(after - first, 2, *x.shape[1:])  # [latents, x or error, n_models, d_model]
        parts.append(einsum(weighted, W_dec[first:after], "latent y m d, latent of d -> y of m latent").double())
    along_x, along_error = torch.cat(parts, dim=-1)  # [n_models, n_models, d_hidden] each
    return LatentSums(
        len(x), torch.bincount(group, minlength=n_groups), count, total, squared, most, along_x, along_error
    ), x_hat


class ScalingSums(NamedTuple):
    """What one pass over tokens has to add up for latent scaling, float64. d_j is the decoder row of the model asked about."""

    x: Tensor  # [n_models, d_hidden] sum over tokens of f_j * <x^m, d_j>
    error: Tensor  # [n_models, d_hidden] the same with the reconstruction error in place of x^m
    f_squared: Tensor  # [d_hidden] sum over tokens of f_j^2


class LatentScaling(NamedTuple):
    """How strongly each model's target contains a latent's direction: the least-squares factors beta, [n_models, d_hidden].

    beta = argmin_b sum_tokens |b * f_j * d_j - y|^2 (Minder et al., arXiv 2504.02922), NaN where a latent never fires.
    """

    error: Tensor  # y = the error without latent j: x^m - x_hat^m + f_j * d_j^m
    reconstruction: Tensor  # y = the reconstruction x_hat^m
    activation: Tensor  # y = the activation x^m

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
    return LatentScaling(error=along_error + own, reconstruction=along_x - along_error, activation=along_x)


# Minder et al. call a latent specific to the fine-tuned model below both of these. A ratio may be negative: what other latents
# leave there points away from the concept. The bound of -1 is ours: below it the other model holds more of the opposite.
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
        low = (nu_error < NU_ERROR_BELOW) & (nu_reconstruction < NU_RECONSTRUCTION_BELOW)
        low &= torch.minimum(nu_error, nu_reconstruction) > -1
        # Only the other model may have less than nothing: where this one has, a negative ratio means the opposite.
        low &= torch.minimum(scaling.error[of], scaling.reconstruction[of]) > 0
        exclusive.append(low & (norms[:, of] > norms[:, 1 - of]))
    return 1 - exclusive[0].long() + exclusive[1].long()


class Classes(NamedTuple):
    """The class of each latent as an index into CLASSES, [d_hidden] each."""

    norm: Tensor  # by relative norm
    scaling: Tensor  # by latent scaling
    agreed: Tensor  # exclusive where both ways say so, else shared


def classes(sums: LatentSums, W_dec: Tensor) -> Classes:
    """Classes from the sums of a pass over rows. W_dec: [d_hidden, 2, d_model].

    Each way alone calls shared latents exclusive: an L1 penalty shrinks away rows whose concept the model has, and latent
    scaling looks at one direction at a time. Where they agree few are false (docs/recipes.md).
    """
    norms = W_dec.norm(dim=-1)
    by_norm = classify(norms)
    base, ft = (latent_scaling(sums.scaling(of), W_dec, of) for of in (0, 1))
    by_scaling = classify_by_scaling(base, ft, norms)
    return Classes(by_norm, by_scaling, torch.where(by_norm == by_scaling, by_norm, CLASSES.index("shared")))
