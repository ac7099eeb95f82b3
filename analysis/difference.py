"""What a researcher tries first, without a dictionary: the mean and the principal components of d = x_ft - x_base, what tokens
they are strongest on, and their logit lens.

In raw activations. Mean differences at the first positions of a text: Minder et al., arXiv 2510.13900, who found that they name
what a narrow fine-tune was about. Logit lens: a direction times the final norm's weight and the unembedding, as if nothing
came after the hook (nostalgebraist, "interpreting GPT: the logit lens", 2020).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from analysis.data import Data
from analysis.examples import find_examples
from crosscoder import CrossCoder
from sources.planted import PlantedConcepts

FIRST = 5  # positions, each with a mean of its own: as in arXiv 2510.13900
COMPONENTS = 10
LENS_TOKENS = 10  # shown of each direction, at either end
EXAMPLES, CONTEXT = 5, 12  # of each side of a component, and tokens on each side of the strongest
SAME = 1e-10  # of the squared length of the activations: a smaller squared difference is the rounding of float32
VOCABULARY_TOGETHER = 1 << 14  # tokens whose unembedding is in memory as float32 at once


class DifferenceSums:
    """What a pass over tokens adds up of d = x_ft - x_base, float64: memory does not grow with the tokens.

        >>> sums = DifferenceSums()
        >>> sums.add(x)  # [batch, 2, d_model] raw activations, the base model first; any number of times
        >>> shares, components = sums.components()  # [10] of the variance, [10, d_model] directions

    texts: how many texts the tokens come from. first: the first position of a sequence that is among them.
    """

    def __init__(self, texts: int = 1, first: int = 0):
        self.texts, self.first, self.tokens = texts, first, 0
        self.count = self.total = self.products = self.squared = torch.zeros(())  # the first rows give them their shapes

    def add(self, x: Tensor, text: Tensor | None = None, position: Tensor | None = None) -> None:
        """Add tokens.

        x: [batch, 2, d_model] raw activations, or [batch, 1, d_model] differences. text: [batch] int64 which text each is of.
        position: [batch] int64 in its sequence.
        """
        d, bins = (x[:, -1].double() - x[:, 0].double() if x.shape[1] > 1 else x[:, 0].double()), self.texts + FIRST + 1
        text = torch.zeros(len(x), dtype=torch.int64) if text is None else text
        place = torch.full((len(x),), FIRST) if position is None else (position - self.first).clamp(max=FIRST)
        total = torch.zeros(bins, d.shape[1], dtype=torch.float64, device=d.device)
        for index in (text, self.texts + place):
            total.index_add_(0, index.to(d.device), d)
        self.tokens += len(x)
        self.count = self.count + torch.bincount(torch.cat([text, self.texts + place]).cpu(), minlength=bins)  # [bins]
        self.total, self.products = self.total + total.cpu(), self.products + d.T @ d  # [bins, d_model], [d_model, d_model]
        self.squared = self.squared + x.double().pow(2).sum((0, 2)).cpu()  # [n_models]

    def means(self) -> tuple[Tensor, Tensor]:
        """Of all tokens, of each text and of each of the first positions: [n] tokens and [n, d_model] means."""
        count = torch.cat([self.count[: self.texts].sum()[None], self.count[:-1]])
        total = torch.cat([self.total[: self.texts].sum(0)[None], self.total[:-1]])
        return count, total / count.clamp_min(1)[:, None]

    def components(self, most: int = COMPONENTS) -> tuple[Tensor, Tensor]:
        """[most] shares of the variance about the mean, and [most, d_model] unit directions, on whose + side the mean lies."""
        mean = self.means()[1][0].to(self.products.device)
        variance, directions = torch.linalg.eigh(self.products / self.tokens - mean[:, None] * mean)  # ascending
        shares = (variance / variance.clamp_min(0).sum()).flip(0)[:most].clamp_min(0)
        directions = directions.T.flip(0)[:most]
        return shares.cpu(), (directions * torch.where(directions @ mean < 0, -1, 1)[:, None]).cpu()


# --- the logit lens


@torch.no_grad()
def logit_lens(directions: Tensor, model, tokenizer=None, most: int = LENS_TOKENS) -> list[dict]:
    """For each direction [n, d_model] in raw activations the tokens that it makes most and least likely.

    Of a direction {"more": [[token, z], ...], "less": [...]}: z is the token's logit in standard deviations from the mean over
    the vocabulary. Of 50,000 random logits the largest has a z of about 4. Without a tokenizer a token is its number.

        >>> logit_lens(components.float(), model, tokenizer)[0]["more"]

    model: a causal language model of transformers, or one wrapped by nnsight. ValueError where its width is another.
    """
    model = getattr(model, "_module", model)
    W_U = model.get_output_embeddings().weight  # [vocabulary, width]
    if W_U.shape[1] != directions.shape[1]:
        raise ValueError(
            f"no logit lens: the unembedding takes {W_U.shape[1]} values, the activations have {directions.shape[1]}"
        )
    gain, centred = final_norm(model, W_U.shape[1])
    folded = directions.to(W_U.device, torch.float32)
    folded = (folded - folded.mean(1, keepdim=True) if centred else folded) * gain
    logits = torch.cat([folded @ part.float().T for part in W_U.split(VOCABULARY_TOGETHER)], dim=1)  # [n, vocabulary]
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp_min(1e-30)
    ends = [z.topk(most), (-z).topk(most)]
    ids = torch.stack([found.indices for found in ends], dim=1).cpu().numpy()  # [n, 2, most]
    values = torch.stack([ends[0].values, -ends[1].values], dim=1).cpu().numpy()
    texts = {int(token): f" {token}" for token in np.unique(ids)}
    if tokenizer is not None:
        from collecting import language_model as lm  # loaded already, with the tokenizer

        texts = lm.token_texts(tokenizer, np.array(list(texts)))
    named = [[[[texts[int(t)], round(float(v), 2)] for t, v in zip(*end, strict=True)] for end in zip(*one, strict=True)]
             for one in zip(ids, values, strict=True)]  # fmt: skip
    return [{"more": more, "less": less} for more, less in named]


def final_norm(model, width: int) -> tuple[Tensor, bool]:
    """What the norm before the unembedding multiplies each value with, [width] float32, and whether it subtracts their mean.

    Asked of the norm itself, since some store a weight of 1 + gain: +-1 has mean 0 and norm 1, so its output is +-gain + bias.
    """
    norms = [
        module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(part.isdecimal() for part in name.split("."))
        and getattr(module, "weight", None) is not None
        and module.weight.shape == (width,)
    ]  # fmt: skip - those outside of the blocks, of which the last one is the final
    if not norms:
        return torch.ones((), device=model.get_output_embeddings().weight.device), False
    one = torch.ones_like(norms[-1].weight)
    signs = one.clone()
    signs[1::2] = -1
    both = norms[-1](torch.stack([signs, -signs, one, -one])).float()  # [4, width]
    gain = (both[0] - both[1]) / 2 * signs.float()
    return gain, bool((both[2] - both[3]).abs().max() < 0.01 * gain.abs().max())


def lens_of_models(directions: Tensor, models: list[tuple], tokenizer) -> list[dict]:
    """The lens of directions [n, 2, d_model], the first of each pair in the base model and the second in the fine-tuned one."""
    names = ("base", "ft")
    found = [logit_lens(directions[:, m], model, tokenizer) for m, (model, _) in enumerate(models)]
    return [dict(zip(names, pair, strict=True)) for pair in zip(*found, strict=True)]


def add_lens(sections: list[dict], crosscoder: CrossCoder, models: list[tuple] | None, tokenizer) -> None:
    """Give each section of a latent the lens of its decoder rows; of a difference both models read the one row."""
    if models and sections:
        latents = torch.tensor([section["latent"] for section in sections], device=crosscoder.scale.device)
        rows = (crosscoder.W_dec.detach() / crosscoder.scale[:, None])[latents]  # [n, n_models, d_model] raw
        for section, lens in zip(sections, lens_of_models(rows.expand(-1, 2, -1), models, tokenizer), strict=True):
            section["lens"] = lens


# --- what is said of all that


def probe(directions: Tensor, mean: Tensor, n_models: int) -> CrossCoder:
    """A crosscoder whose latents are the + sides of directions [n, d_model], then their - sides: relu(+-v . (d - mean))."""
    v = torch.cat([directions, -directions]).float()  # [2 n, d_model]
    read = [v] if n_models == 1 else [-v, v, *[torch.zeros_like(v)] * (n_models - 2)]  # of more models the first two
    W = torch.stack(read, dim=1)  # [2 n, n_models, d_model]
    zeros = torch.zeros(W.shape[1:])
    tensors = {"W_enc": W.permute(1, 2, 0), "W_dec": W, "b_enc": -(v @ mean.float()), "b_dec": zeros, "mean": zeros}
    return CrossCoder.from_tensors(tensors | {"scale": torch.ones(n_models), "threshold": torch.zeros(())}, "vanilla")


def describe(
    sums: DifferenceSums, data: Data, device: torch.device, models: list[tuple] | None, tokenizer, seed: int = 0
) -> tuple[dict, dict[str, Tensor]]:
    """What metrics.json says under `difference`, and the directions behind it: means [n, d_model], components [n, d_model].

    models: (model, hook) of the base and of the fine-tuned one, for the lens.
    """
    count, means = sums.means()
    names = ["all tokens", *(data.text.names if data.text else ["text"])]
    names += [f"position {sums.first + i}" for i in range(FIRST)]
    told = [i for i in range(len(names)) if count[i] and (i != 1 or sums.texts > 1)]  # a single text is all tokens
    count, means, square = count[told], means[told].float(), (sums.products.diagonal().sum() / sums.tokens).item()
    length, towards = means.norm(dim=1), torch.nn.functional.cosine_similarity(means, means[:1])
    found = {
        "space": "raw activations", "tokens": sums.tokens, "rms": square**0.5,
        "rms_of_models": (sums.squared / sums.tokens).sqrt().tolist() if len(sums.squared) > 1 else None,
        "means": [{"of": names[i], "tokens": int(n), "length": size, "cosine": c} for i, n, size, c
                  in zip(told, count, length.tolist(), towards.tolist(), strict=True)],
        "components": [],
    }  # fmt: skip
    if square <= SAME * (sums.squared / sums.tokens).max():  # the same model twice, up to rounding
        return found, {"means": means}
    shares, components = sums.components()
    found["components"] = [{"share": share, "examples": {"plus": [], "minus": []}} for share in shares.tolist()]
    told_of = found["means"] + found["components"]
    if models:
        directions = torch.cat([means, components.float()])[:, None].expand(-1, 2, -1)
        for one, lens in zip(told_of, lens_of_models(directions, models, tokenizer), strict=True):
            one["lens"] = lens
    sides = probe(components, means[0], data.source.n_models).to(device)
    examples = find_examples(
        sides, data, np.arange(2 * len(components)), np.full(2 * len(components), np.inf), tokenizer, wanted=EXAMPLES,
        context=CONTEXT, seed=seed,
    )  # fmt: skip
    for i, one in enumerate(found["components"]):
        for side, place in (("plus", i), ("minus", i + len(components))):
            one["examples"][side] = [e for e in examples[place]["examples"] if e["range"] == "top"]
    return found, {"means": means, "components": components.float()}


def open_sums(data: Data) -> DifferenceSums | None:
    """For the rows of the data. None for planted concepts, whose two models differ in scale by construction."""
    if isinstance(data.source, PlantedConcepts):
        return None
    return DifferenceSums(len(data.text.names), int(data.text.position.min())) if data.text else DifferenceSums()


def add_rows(sums: DifferenceSums, data: Data, rows: np.ndarray, x: Tensor) -> None:
    """Add rows, numbered as by `normalized_rows`, with their raw activations x [batch, n_models, d_model]."""
    if data.text is None:
        return sums.add(x)
    text = torch.from_numpy(data.text.text_of[data.text.sequence[rows]]).long()
    sums.add(x, text, torch.from_numpy(data.text.position[rows]).long())


def lens_models(models: list[tuple] | None, width: int, notes: list[str]) -> list[tuple] | None:
    """The models, if their unembeddings take activations of this width. None, with a note, if not."""
    for model, _ in models or []:
        if (takes := model._module.get_output_embeddings().weight.shape[1]) != width:
            notes.append(f"no logit lens: the unembedding takes {takes} values, the activations have {width}")
            return None
    return models
