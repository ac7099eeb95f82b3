"""--init-from: begin a run with the codes and reconstructions of a trained crosscoder, or of an SAE for all models."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder import CrossCoder
from run.checkpoint import BY_LATENT
from run.foreign import assemble, has_threshold, read_crosscoder
from run.machine import say


class WarmStart:
    """The crosscoder that --init-from names. ValueError if it cannot be what a run of these flags begins with."""

    def __init__(self, name: str, variant: str, d_hidden: int | None):
        try:
            self.trained = read_crosscoder(name)
        except ValueError as error:
            raise ValueError(f"--init-from {error}") from None
        self.name, self.variant = name, variant
        self.sample: Tensor | None = None  # rows that the threshold is fitted on
        self.d_hidden, self.k = self.trained.d_hidden, self.trained.k
        if d_hidden not in (None, self.d_hidden):
            raise ValueError(f"--d-hidden {d_hidden}: --init-from {name} has {self.d_hidden} latents; leave the flag out")
        wanted = "batch_topk" if has_threshold(self.trained) else "vanilla"  # the other one would begin with other codes
        if variant != wanted:
            codes = "codes above a threshold" if wanted == "batch_topk" else "plain ReLU codes"
            raise ValueError(f"--variant {variant}: --init-from {name} has {codes}; give --variant {wanted}")

    @torch.no_grad()
    def settle_k(self, x: Tensor, k: int | None) -> int | None:
        """The run's k, by default the crosscoder's; one with thresholds and no k (JumpReLU) has its L0 on these rows.

        x: [rows, n_models, d_model] raw activations of the run's data. k: what the user asked for.
        """
        if (self.trained.n_models, self.trained.d_model) != tuple(x.shape[1:]):
            theirs = f"{self.trained.n_models} models of width {self.trained.d_model}"
            ours = f"the activations are of {x.shape[1]} of width {x.shape[2]}; give one that was trained at this hook"
            raise ValueError(f"--init-from {self.name}: is for {theirs}, {ours}")
        if self.variant == "vanilla" or self.k is not None:
            return k or self.k
        self.sample = x
        if k is None:
            active = sum(int((self.trained.encode(part) > 0).sum()) for part in x.split(256))
            k = max(1, round(active / max(1, len(x))))
            say(f"k        {k}, the active latents a token of {self.name} on these rows: it has thresholds and no k")
        return k

    def copy_to(self, crosscoder: CrossCoder) -> None:
        """Give the run's crosscoder, whose mean and scale are set, the same codes and reconstructions on raw activations."""
        state = with_normalization(self.trained, crosscoder.mean, crosscoder.scale, crosscoder.k).state_dict()
        crosscoder.load_state_dict({n: t[crosscoder.latents] if n in BY_LATENT else t for n, t in state.items()})
        if self.sample is not None:
            parts = self.sample.to(crosscoder.W_dec.device).split(256)
            crosscoder.fit_threshold(lambda: (crosscoder.normalize(part) for part in parts))


@torch.no_grad()
def with_normalization(crosscoder: CrossCoder, mean: Tensor, scale: Tensor, k: int | None = None) -> CrossCoder:
    """The same codes and reconstructions on raw activations, with another mean [n_models, d_model] and scale [n_models].

    Training has one threshold, on the score. Thresholds per latent become the median of their values on the score: they are all
    equal there if the ratio of the models' scales stays the same; if not, codes near a threshold can change. k: None keeps it.
    """
    raw, k = crosscoder.fold_normalization(), crosscoder.k if k is None else k
    mean, scale = mean.double().cpu(), scale.double().cpu()
    W_enc, W_dec = raw.W_enc.double() / scale[:, None, None], raw.W_dec.double() * scale[:, None]
    b_enc = raw.b_enc.double() + torch.einsum("md,mdh->h", mean, raw.W_enc.double())
    b_dec = (raw.b_dec.double() - mean) * scale[:, None]
    scores = (raw.threshold * W_dec.norm(dim=-1).sum(-1))[raw.threshold.isfinite()]  # [latents that can be on]
    threshold = scores.median().float() if k is not None and len(scores) else 0.0
    return assemble("the crosscoder", W_enc, b_enc, W_dec, b_dec, mean, scale, threshold, k)
