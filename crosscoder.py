"""The crosscoder: one sparse dictionary for the activations of several models at the same tokens.

    x_n   = (x - mean) * scale                 per model, stored inside: raw activations go in, raw reconstructions come out
    pre   = sum_m x_n[m] @ W_enc[m] + b_enc    [batch, d_hidden]
    f     = relu(pre), then the variant's mask [batch, d_hidden]
    x_hat = f @ W_dec + b_dec                  [batch, n_models, d_model]

Sources: Lindsey et al., "Sparse Crosscoders" (Anthropic, October 2024) for the model and the vanilla loss; Minder et al.,
arXiv 2504.02922, for BatchTopK; Gao et al., arXiv 2406.04093, for the auxiliary loss. Model 0 is the base model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ops import sparse, threshold, weights
from ops.files import whole_file
from ops.shard import ALONE, Shard
from ops.variance import squared_error

INIT_BLOCK = 1024  # latents drawn from one seed: any process can draw any part of the dictionary
CONFIG = ("d_model", "d_hidden", "n_models", "variant", "k", "k_aux", "folded")  # what config.json of a saved one says
LARGEST = 1e18  # of saved weights: their squares and inverses are float32 numbers


class Losses(NamedTuple):
    """What one training batch gives. Losses are 0-d float32 tensors."""

    loss: Tensor
    l2_loss: Tensor
    l1_loss: Tensor
    aux_loss: Tensor
    l0_loss: Tensor  # active latents per token
    fired: Tensor  # [d_hidden] bool, active at some token
    x_hat: Tensor  # [batch, n_models, d_model] normalised reconstruction


class CrossCoder(nn.Module):
    """A crosscoder over `n_models` models of width `d_model`.

    Parameters are enc_rows and W_dec, both [d_hidden, n_models, d_model], b_enc [d_hidden] and b_dec [n_models, d_model].
    W_enc [n_models, d_model, d_hidden] is a view of enc_rows: a latent's weights lie together in memory. Buffers stay
    float32 whatever `.to()` says: mean [n_models, d_model], scale [n_models] and threshold, [] on the score
    f_j * sum_m |W_dec[j, m]|, or [d_hidden] on f itself once the normalisation is folded.

    Args:
        variant: "vanilla" (ReLU codes) or "batch_topk" (the k * batch largest scores of a training batch are kept).
        k: batch_topk only, mean number of active latents per token.
        k_aux: dead latents per token in the auxiliary loss; d_model // 2 when None.
        dec_init_norm: norm of each decoder row per model at the start. A latent starts with the same direction in every
            model, and the encoder as the decoder's transpose.
        compute_dtype: of the matrix products; parameters, codes and losses are float32.
        shard: this process's place among several that train one dictionary together (ops/shard.py); parameters and codes
            then hold its slice of the latents alone, and all processes must make the same calls. None: all latents.
    """

    mean: Tensor
    scale: Tensor
    threshold: Tensor

    def __init__(  # noqa: PLR0913 - settings, given by name
        self,
        d_model: int,
        d_hidden: int,
        n_models: int = 2,
        variant: str = "vanilla",
        k: int | None = None,
        k_aux: int | None = None,
        dec_init_norm: float = 0.08,
        seed: int = 0,
        compute_dtype: torch.dtype = torch.float32,
        shard: Shard | None = None,
    ):
        super().__init__()
        if variant not in ("vanilla", "batch_topk"):
            raise ValueError(f"variant {variant!r} is neither 'vanilla' nor 'batch_topk'")
        if variant == "batch_topk" and not (k and 1 <= k <= d_hidden):
            raise ValueError(f"k = {k} must lie between 1 and d_hidden = {d_hidden}")
        self.d_model, self.d_hidden, self.n_models = d_model, d_hidden, n_models
        self.variant, self.k = variant, k if variant == "batch_topk" else None
        self.k_aux = max(1, d_model // 2) if k_aux is None else k_aux
        self.compute_dtype, self.shard = compute_dtype, shard or ALONE
        self.latents = self.shard.part(d_hidden)

        blocks, first = [], self.latents.start // INIT_BLOCK * INIT_BLOCK
        for start in range(first, self.latents.stop, INIT_BLOCK):
            draw = torch.Generator().manual_seed(random.Random(f"{seed} {start}").getrandbits(32))
            blocks.append(torch.randn(min(INIT_BLOCK, d_hidden - start), d_model, generator=draw))
        directions = torch.cat(blocks)[self.latents.start - first : self.latents.stop - first]  # [latents, d_model]
        rows = dec_init_norm * directions / directions.norm(dim=-1, keepdim=True)
        W_dec = rows[:, None, :].repeat(1, n_models, 1)  # [latents, n_models, d_model]
        self.W_dec = nn.Parameter(W_dec)
        self.enc_rows = nn.Parameter(W_dec.clone())
        self.b_enc = nn.Parameter(torch.zeros(len(W_dec)))
        self.b_dec = nn.Parameter(torch.zeros(n_models, d_model))
        self.register_buffer("mean", torch.zeros(n_models, d_model))
        self.register_buffer("scale", torch.ones(n_models))
        self.register_buffer("threshold", torch.zeros(()))

    def _apply(self, fn, recurse=True):
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, rounded in list(self.named_buffers()):  # a threshold or mean rounded to bfloat16 would change every code
            self._buffers[name] = exact[name].to(rounded.device)
        return self

    # --- inference: raw activations in, raw reconstructions out

    def normalize(self, x: Tensor) -> Tensor:
        """Raw activations [batch, n_models, d_model] -> normalised ones, float32."""
        return (x.float() - self.mean) * self.scale[:, None]

    def denormalize(self, x_n: Tensor) -> Tensor:
        """Normalised activations [batch, n_models, d_model] -> raw ones."""
        return x_n / self.scale[:, None] + self.mean

    def encode(self, x: Tensor, normalized: bool = False) -> Tensor:
        """Codes f [batch, d_hidden] of activations [batch, n_models, d_model], raw unless `normalized`.

        Each token's codes depend on that token alone: batch_topk keeps what scores above the threshold.
        """
        f = self._pre(x if normalized else self.normalize(x)).relu()
        return f * (self.score(f) > self.threshold)

    def decode(self, f: Tensor, normalized: bool = False) -> Tensor:
        """Reconstruction [batch, n_models, d_model] from codes f [batch, d_hidden], raw unless `normalized`."""
        x_hat = self.shard.all_sum(sparse.decode(f, self.W_dec, self.compute_dtype)) + self.b_dec
        return x_hat if normalized else self.denormalize(x_hat)

    def forward(self, x: Tensor) -> Tensor:
        """Raw activations [batch, n_models, d_model] -> their raw reconstruction."""
        return self.decode(self.encode(x))

    def score(self, f: Tensor) -> Tensor:
        """What the threshold is compared with, [batch, d_hidden]: f * sum_m |W_dec[:, m]|, or f itself when folded."""
        return f if self.folded else f * self.decoder_norms().sum(-1)

    def decoder_norms(self) -> Tensor:
        """[d_hidden, n_models] norm of each latent's decoder row in each model, in normalised space."""
        return self.W_dec.norm(dim=-1)

    @property
    def W_enc(self) -> Tensor:
        """[n_models, d_model, d_hidden] the encoder, a view of its rows."""
        return self.enc_rows.permute(1, 2, 0)

    @property
    def folded(self) -> bool:
        return self.threshold.ndim == 1

    def _pre(self, x_n: Tensor) -> Tensor:
        return sparse.encode(x_n, self.enc_rows, self.compute_dtype).to(x_n.dtype) + self.b_enc

    # --- training: normalised activations in

    def losses(
        self, x_n: Tensor, l1_coeff: float, aux_coeff: float = 0.0, dead: Tensor | None = None, k: int | None = None,
        most_dead: int | None = None,
    ) -> Losses:  # fmt: skip
        """Losses of a training batch of normalised activations [batch, n_models, d_model].

        Squared errors and L1 are sums over models, latents and d_model, and means over the batch. The L1 weight of a code
        is the sum of its decoder norms, not the norm of the concatenated row, which would give no exclusive latents.
        Also moves the inference threshold of batch_topk.

        Args:
            l1_coeff: weight of the L1 loss at this step.
            aux_coeff: weight of the auxiliary loss.
            dead: [d_hidden] bool, the latents the auxiliary loss may use; None leaves the auxiliary loss out.
            k: batch_topk: active latents per token at this step; None: the final number.
            most_dead: CUDA: no process has more dead latents than that (ops/dead.py); None: all may be dead.
        """
        if self.folded:
            raise ValueError("a folded crosscoder is for inference: train the one it was folded from")
        W_dec, norms = weights.with_norms(self.W_dec)
        norm_sum = norms.sum(-1)  # [d_hidden]
        count = (k or self.k or 0) * len(x_n) if self.variant == "batch_topk" else None
        rows: Tensor = self.enc_rows
        b_enc: Tensor = self.b_enc
        x, copies, of_dead = x_n, None, None
        if sparse.on_cuda(x_n):  # once for all products of the step
            x = x_n.to(self.compute_dtype).flatten(1)
            copies = weights.narrow(self.enc_rows, self.compute_dtype), weights.narrow(self.W_dec, self.compute_dtype)
        if dead is not None and aux_coeff:
            some = sparse.places(dead, most_dead)
            (rows, dead_rows), (W_dec, dead_W_dec) = (weights.take(t, some, values=copies is None) for t in (rows, W_dec))
            b_enc, dead_bias = weights.take(b_enc, some)
            of_dead = dead_rows, dead_bias, dead_W_dec, (norm_sum.detach() * dead)[some]
            dead_copies = copies and (copies[0][some], copies[1][some])
        decoded, total, times, smallest = sparse.reconstruct(
            x, rows, b_enc, W_dec, self.compute_dtype, norm_sum.detach(), count, shard=self.shard, copies=copies
        )
        l1_loss = (total * norm_sum).sum() / len(x_n)
        l0_loss = times.sum() / len(x_n)
        x_hat = self.shard.all_sum(decoded) + self.b_dec
        l1_loss, l0_loss = self.shard.all_sum(l1_loss), self.shard.all_sum(l0_loss)
        if count is not None:
            self.threshold.copy_(threshold.follow(self.threshold, self.shard.all_min(smallest)))
        l2_loss, error = squared_error(x_n, x_hat)
        loss = l2_loss + l1_coeff * l1_loss if l1_coeff else l2_loss
        aux_loss = torch.zeros_like(l2_loss)
        if of_dead is not None:
            aux_loss = self._aux_loss(x, error, *of_dead, most_dead, dead_copies)
            loss = loss + aux_coeff * aux_loss
        return Losses(loss, l2_loss, l1_loss, aux_loss, l0_loss, times > 0, x_hat)

    def _aux_loss(self, x, residual, rows, bias, W_dec, weight, most_dead, copies) -> Tensor:
        """Squared error of predicting the detached residual from dead latents alone (Gao et al., arXiv 2406.04093).

        In the units of l2_loss, not over the residual's variance: Adam remembers the gradients of l2_loss that a latent had
        while it was alive, and against those a quotient of order 1 moves nothing (docs/recipes.md). The batch's k_aux * batch
        largest dead scores are used. No decoder bias and no live latent takes part, and winners are positive, so gradient
        reaches the dead latents only. 0 when no latent is dead.
        x: as `reconstruct` takes it. rows, bias, W_dec, copies: those of the dead latents. weight: of their scores; on CUDA 0
        for latents that only fill up places.
        """
        count: int | None = self.k_aux * len(x)
        if self.variant == "vanilla":
            # A dead vanilla latent is positive at no token, so no gradient would reach it: its codes here leave out the bias,
            # which still gets its gradient.
            bias = bias - bias.detach()
        if sparse.on_cuda(x):
            bias = bias.where(weight > 0, -LARGEST)  # a place that is filled up is positive at no token
            if most_dead is not None and most_dead * self.shard.size <= self.k_aux:
                count = None  # there is nothing to select
        settings = (self.compute_dtype, weight, count)
        predicted = sparse.reconstruct(x, rows, bias, W_dec, *settings, shard=self.shard, copies=copies).decoded
        predicted, some_dead = self.shard.all_sum(predicted), self.shard.all_sum((weight > 0).sum()) > 0
        squared, _ = squared_error(residual, predicted)
        return torch.where(some_dead, squared, 0.0)

    @torch.no_grad()
    def fit_threshold(self, batches: Callable[[], Iterable[Tensor]]) -> None:
        """Set the threshold so that k latents per token score above it on average over these rows.

        Args:
            batches: called several times, each time gives the same batches of normalised activations
                [batch, n_models, d_model].
        """
        if self.k is None:
            raise ValueError("vanilla has no threshold to fit")
        rows = sum(len(x_n) for x_n in batches())

        def scores() -> Iterator[Tensor]:
            return (self.score(self._pre(x_n).relu()) for x_n in batches())

        self.threshold.fill_(threshold.fit(scores, self.k * rows, self.shard))

    # --- saving

    def fold_normalization(self) -> CrossCoder:
        """A copy with mean 0 and scale 1 that gives the same codes and reconstructions on raw activations.

        Decoder norms are then in raw space: relative norms change when the models' scales differ. The threshold moves to f,
        one per latent (theta / sum_m |W_dec[j, m]|), since the norms it was measured with are gone.
        """
        folded = CrossCoder(self.d_model, self.d_hidden, self.n_models, self.variant, self.k, self.k_aux, shard=self.shard)
        folded.compute_dtype = self.compute_dtype
        folded.to(self.W_dec.device)
        with torch.no_grad():
            scaled = self.W_enc * self.scale[:, None, None]  # [n_models, d_model, d_hidden]
            folded.W_enc.copy_(scaled)
            folded.b_enc.copy_(self.b_enc - self.mean.flatten() @ scaled.flatten(0, 1))
            folded.W_dec.copy_(self.W_dec / self.scale[:, None])
            folded.b_dec.copy_(self.denormalize(self.b_dec))
            norm_sum = self.decoder_norms().sum(-1)
            per_latent = torch.where(norm_sum > 0, self.threshold / norm_sum, torch.inf)
            folded.threshold = self.threshold.clone() if self.folded else per_latent
        return folded

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, float32, each file complete or absent. Raises OSError.

        Of several processes the first writes the whole crosscoder.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder)
        tensors = {name: t.detach().float().cpu() for name, t in self.state_dict().items()}
        for name in ("enc_rows", "W_dec", "b_enc", *["threshold"] * self.folded):
            tensors[name] = self.shard.whole(tensors[name], self.d_hidden)
        with self.shard.together():
            if self.shard.rank > 0:
                return
            tensors["W_enc"] = tensors.pop("enc_rows").permute(1, 2, 0)
            try:
                with whole_file(folder / "model.safetensors") as partial:
                    save_file({name: t.contiguous() for name, t in tensors.items()}, partial)
            except SafetensorError as error:
                raise OSError(f"the crosscoder could not be written to {folder} ({error}): make room on the disk") from None
            with whole_file(folder / "config.json") as partial:
                partial.write_text(json.dumps({name: getattr(self, name) for name in CONFIG}, indent=2) + "\n")

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], variant: str, k: int | None = None, k_aux: int | None = None
    ) -> CrossCoder:
        """The crosscoder of the tensors in a saved one: W_enc, W_dec, b_enc, b_dec, mean, scale and threshold.

        ValueError where a name, shape, type or value is not that of a crosscoder. It takes the memory of the tensors.
        """
        W_dec = tensors.get("W_dec")
        if W_dec is None or W_dec.ndim != 3 or not W_dec.numel():
            raise ValueError("it has no W_dec with three axes")
        if any(count is not None and (type(count) is not int or count < 1) for count in (k, k_aux)):
            raise ValueError(f"k {k!r} and k_aux {k_aux!r} must be whole numbers above 0")
        d_hidden, n_models, d_model = W_dec.shape
        shapes = {"W_enc": (n_models, d_model, d_hidden), "W_dec": tuple(W_dec.shape), "b_enc": (d_hidden,)}
        shapes |= {"b_dec": (n_models, d_model), "mean": (n_models, d_model), "scale": (n_models,), "threshold": (d_hidden,)}
        if set(tensors) != set(shapes):
            raise ValueError(f"its tensors are {', '.join(sorted(tensors))} and not {', '.join(sorted(shapes))}")
        for name, shape in shapes.items():
            t = tensors[name]
            if not t.is_floating_point() or tuple(t.shape) != shape and (name, t.ndim) != ("threshold", 0):
                raise ValueError(f"{name} is {t.dtype} of the shape {tuple(t.shape)} and not floats of the shape {shape}")
        tensors = {name: t.float() for name, t in tensors.items()}
        for name, t in tensors.items():
            if not (t.abs() < LARGEST).all() and (name, t.ndim) != ("threshold", 1):  # there inf keeps a latent off for good
                raise ValueError(f"{name} holds NaN, inf or values beyond {LARGEST:g}")
        if not (tensors["scale"] > 1 / LARGEST).all() or not (tensors["threshold"] >= 0).all():
            raise ValueError(f"scale must be above {1 / LARGEST:g}, threshold 0 or more")
        crosscoder = cls(d_model, d_hidden, n_models, variant, k, k_aux)
        crosscoder.threshold = tensors["threshold"].clone()
        tensors["enc_rows"] = tensors.pop("W_enc").permute(2, 0, 1)
        crosscoder.load_state_dict(tensors)
        return crosscoder

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> CrossCoder:
        """Load what `save_pretrained` wrote, from a folder or from the Hub (`user/name`).

        Raises ValueError where a file is missing, broken or another project's, or does not fit the other.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        foreign = f"if another project wrote it, convert it: python formats.py {folder} NEW_FOLDER --to crosscoder"
        folder = hub_folder(str(folder), ["config.json", "model.safetensors"]) if not Path(folder).exists() else Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is no saved crosscoder: {name} is missing; {foreign}")
        try:
            config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
            if not isinstance(config, dict) or set(config) != set(CONFIG):
                raise ValueError(f"config.json must say {', '.join(CONFIG)}")
            crosscoder = cls.from_tensors(tensors, config["variant"], config["k"], config["k_aux"])
        except (ValueError, OSError, RecursionError, SafetensorError) as error:
            raise ValueError(f"{folder} holds a broken crosscoder ({error}); copy it again; {foreign}") from None
        for name in CONFIG:
            if config[name] != getattr(crosscoder, name):
                stored = f"{name} is {config[name]} in one and {getattr(crosscoder, name)} in the other"
                raise ValueError(f"{folder}: config.json and model.safetensors do not fit together ({stored}); copy both again")
        return crosscoder.to(device)


def hub_folder(name: str, files: list[str]) -> Path:
    """Local copy of those of the `files` that the Hub has in `user/name` or `user/name/folder`. ValueError if it has none.

    For what is not on the disk. They lie in the cache of huggingface_hub, so that a second time needs no network.
    """
    if name.startswith((".", "/", "~")) or "/" not in name.strip("/"):
        raise ValueError(f"{name}: there is no such file or folder; give one, or a Hub id (user/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    user, repository, *inner = name.strip("/").split("/")
    wanted = ["/".join([*inner, file]) for file in files]
    try:
        folder = Path(snapshot_download(f"{user}/{repository}", allow_patterns=wanted), *inner)
    except Exception as error:  # noqa: BLE001 - refusals, broken connections and its HTTP library's own, by many names
        reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, RepositoryNotFoundError):
            reason = "no such repository, or a private one: log in with `hf auth login`"
        here = f", the folder {user} here does not hold it" if Path(user).is_dir() else ""
        raise ValueError(f"{name}: is no folder here{here}, and the Hub does not give it ({reason})") from None
    if not any((folder / file).is_file() for file in files):
        raise ValueError(
            f"{name}: the Hub has none of its files: {', '.join(files)}; python formats.py --help names the layouts"
        )
    return folder
