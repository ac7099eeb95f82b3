"""A world with a known answer: activations made of planted concepts, and the score of a dictionary against them.

The toy model of the Dedicated Feature Crosscoder paper (arXiv 2602.11729, appendix B.2), smaller and for a base model and
its fine-tune: unit concepts, more of them than dimensions, rarely active and correlated in groups, some known to only one
of the two models. Each model also has its own scale and mean, as real ones do.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import embedding_bag

from ops import latents
from sources.batches import read_ahead
from sources.source import Batch, Source

BLOCK = 4096  # rows made from one seed
RECOVERED = 0.83  # cosine above which a decoder row counts as a concept; a cut of ours, the paper's is 0.8
BASE_ONLY, SHARED, FT_ONLY = range(3)  # as in latents.CLASSES


class PlantedConcepts(Source):
    """An endless source of paired activations [rows, 2, d_model] with known shared, base-only and ft-only directions.

    A row is a function of (seed, split, its number).

    Args:
        active: concepts that a row holds on average. tail: their frequencies are rank ** -tail, in random order.
        scales: of the two models' activations, 1 and 5 with offset. rare: exclusive concepts are active on .05 % of the rows.
        hard: as real models are. Frequencies have a long tail, exclusive concepts are active on only .05 % to 1 % of the
            rows, concepts become active in groups of 8, amplitudes are lognormal, and two dimensions have a large mean.
        offset: means ten times the activations' norm, two outlier dimensions, and a factor of 5 between the models.
        null: both models are the same one, so that nothing is exclusive.
    """

    n_models = 2
    dtype = torch.float32
    train_rows = None  # endless: there are no epochs

    def __init__(  # noqa: PLR0913 - settings, given by name
        self, seed: int = 0, val_rows: int = 16_384, *, n_concepts: int = 1024, d_model: int = 128, active: float = 12.0,
        tail: float = 0.5, scales: tuple[float, float] = (1.0, 3.0), rare: bool = False, hard: bool = False,
        offset: bool = False, null: bool = False,
    ):  # fmt: skip
        self.seed, self.val_rows, self.d_model = seed, val_rows, d_model
        self.hard, self.stored_scale, self.record = hard, torch.ones(2), {}
        draw = torch.Generator().manual_seed(seed)
        exclusive = 0 if null else n_concepts // 20  # 5 % for each model
        self.kind = torch.full((n_concepts,), SHARED)
        self.kind[:exclusive] = BASE_ONLY
        self.kind[exclusive : 2 * exclusive] = FT_ONLY
        base = torch.randn(n_concepts, d_model, generator=draw)
        turn = 0.0 if null else 0.3  # fine-tuning turns each a little, cosine 0.96
        turned = base + turn * torch.randn(n_concepts, d_model, generator=draw)
        directions = torch.stack([base, turned], dim=1)
        directions /= directions.norm(dim=-1, keepdim=True)
        directions[self.kind == FT_ONLY, 0] = 0
        directions[self.kind == BASE_ONLY, 1] = 0
        self.directions = directions  # [n_concepts, 2, d_model] unit rows, zero in the model that lacks the concept

        rate = (1.0 + torch.randperm(n_concepts, generator=draw)) ** -tail
        self.rate = rate / rate.sum() * active  # [n_concepts] probability of being active
        if rare:
            self.rate[: 2 * exclusive] = 0.0005
        self.loading = 0.3 * torch.randn(10, n_concepts, generator=draw)  # ten hidden topics move the probabilities
        self.mean = torch.randn(2, d_model, generator=draw) / d_model**0.5  # norm about 1, like the activations'
        self.scale = torch.tensor(scales)
        if hard:
            shared = 1 / torch.arange(1.0, n_concepts - 2 * exclusive + 1)
            shared = (shared / shared.sum() * n_concepts / 100).clamp_max(0.25)
            rare = 0.0005 * 20 ** torch.rand(2 * exclusive, generator=draw)  # .05 % to 1 %, uniform in the logarithm
            self.rate = torch.cat([rare[:exclusive].sort().values, rare[exclusive:].sort().values, shared])
            self.group = torch.arange(n_concepts) // 8  # [n_concepts] neighbours (of similar rates) become active together
            most = torch.zeros(int(self.group[-1]) + 1).scatter_reduce(0, self.group, self.rate, "amax")
            self.awake_rate = (2 * most).clamp_max(1)  # [groups]
        if offset:
            self.mean *= 10
            self.scale = torch.tensor([1.0, 5.0])
        if hard or offset:
            self.mean[:, :2] += torch.tensor([20.0, -30.0])
        if null:
            self.mean[1], self.scale[1] = self.mean[0], self.scale[0]

    def describe(self) -> str:
        return "planted concepts: endless rows"

    def batches(self, *args, **options) -> Iterator[Batch]:
        return read_ahead(self, *args, **options)

    def order(self, position: int, count: int) -> np.ndarray:
        """[count] the rows at these positions of the stream: row i is at position i."""
        return np.arange(position, position + count)

    def sample_rows(self, count: int) -> np.ndarray:
        """The first `count` training rows, at most 16,384: rows are drawn independently, so any of them will do."""
        return np.arange(min(count, 16_384))

    def gather(self, split: str, rows: np.ndarray, out: Tensor) -> None:
        """Write the given rows (ascending) of "train" or "validation" into out [2, rows, d_model]."""
        for block in np.unique(rows // BLOCK):
            here = rows // BLOCK == block
            out[:, torch.from_numpy(here)] = self._block(split, int(block))[:, rows[here] % BLOCK]

    @lru_cache(maxsize=8)  # noqa: B019 - the source lives as long as the run; the default held-out rows and those being read
    def _block(self, split: str, block: int) -> Tensor:
        """[2, BLOCK, d_model] activations, a function of (seed, split, block) alone."""
        seeds = np.random.SeedSequence([self.seed, split == "train", block])
        draw = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
        row, concept, code = self._hard_codes(draw) if self.hard else self._codes(draw)
        starts = torch.searchsorted(row, torch.arange(BLOCK))
        x = embedding_bag(concept, self.directions.flatten(1), starts, mode="sum", per_sample_weights=code)
        x = x + 0.01 * torch.randn(x.shape, generator=draw)
        return ((x.unflatten(1, (2, -1)) + self.mean) * self.scale[:, None]).transpose(0, 1).contiguous()

    def _codes(self, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Row, concept and magnitude [active] of what is active in a block, row by row."""
        topics = torch.randn(BLOCK, 10, generator=draw)
        at_rest = self.rate.log() - self.loading.pow(2).sum(0) / 2
        probability = torch.addmm(at_rest, topics, self.loading).exp_()  # [BLOCK, n_concepts], on average the rate
        uniform = torch.rand(BLOCK, len(self.rate), generator=draw)
        row, concept = (uniform < probability).nonzero(as_tuple=True)
        # Given that it lies below the probability, uniform / probability is itself uniform on (0, 1): the magnitude.
        return row, concept, uniform[row, concept] / probability[row, concept]

    def _hard_codes(self, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        awake = torch.rand(BLOCK, len(self.awake_rate), generator=draw) < self.awake_rate  # [BLOCK, groups]
        given_awake = self.rate / self.awake_rate[self.group]  # [n_concepts]
        active = (torch.rand(BLOCK, len(self.rate), generator=draw) < given_awake) & awake[:, self.group]
        row, concept = active.nonzero(as_tuple=True)
        return row, concept, torch.exp(0.5 * torch.randn(len(row), generator=draw))

    def fit(self, W_dec: Tensor, dead: Tensor) -> Tensor:
        """[n_concepts, d_hidden] cosine of each concept and each latent's decoder row; -1 for dead latents.

        In the model that has the concept; for a shared concept the smaller of the two models' cosines.
        """
        W_dec, dead = W_dec.detach().float().cpu(), dead.cpu()
        rows = W_dec / W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        cosine = einsum(self.directions, rows, "concept model d, latent model d -> model concept latent")
        fit = cosine.amin(0)
        fit[self.kind == BASE_ONLY] = cosine[0, self.kind == BASE_ONLY]
        fit[self.kind == FT_ONLY] = cosine[1, self.kind == FT_ONLY]
        fit[:, dead] = -1
        return fit

    def score(self, W_dec: Tensor, dead: Tensor, kind_of: Tensor | None = None) -> dict[str, float]:
        """How much of the truth a dictionary found.

        Args:
            W_dec: [d_hidden, 2, d_model] decoder; dead: [d_hidden] bool, latents that do not count.
            kind_of: [d_hidden] class of each latent, index into latents.CLASSES; None: by decoder norm.

        Returns:
            recall_X: share of the concepts of kind X that some live latent points at (cosine above RECOVERED, for a shared
            concept in both models at once). class_ok_X: share of those recovered whose best latent's class is X.
            false_exclusive: share of the live base-only and ft-only latents that point at no concept of that kind.
            NaN where a world has no concept of a kind.
        """
        dead = dead.cpu()
        if kind_of is None:
            kind_of = latents.classify(W_dec.detach().float().cpu().norm(dim=-1))
        kind_of = kind_of.cpu()  # [d_hidden]
        fit = self.fit(W_dec, dead)  # [n_concepts, d_hidden]
        best, latent = fit.max(dim=1)
        found, class_ok = best > RECOVERED, kind_of[latent] == self.kind
        result = {}
        for kind, name in enumerate(latents.CLASSES):
            result[f"recall_{name}"] = found[self.kind == kind].float().mean().item()
        for kind, name in enumerate(latents.CLASSES):
            recovered = found & (self.kind == kind)
            result[f"class_ok_{name}"] = class_ok[recovered].float().mean().item() if recovered.any() else 0.0
        exclusive = ~dead & (kind_of != SHARED)
        none = torch.full_like(fit[:1], -1)  # where a world has no concept of a kind
        points_at = torch.stack([torch.cat([fit[self.kind == kind], none]).amax(0) for kind in range(3)])  # [3, d_hidden]
        right = points_at.gather(0, kind_of[None])[0] > RECOVERED
        result["false_exclusive"] = (~right[exclusive]).float().mean().item() if exclusive.any() else 0.0
        return result
