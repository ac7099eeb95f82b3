"""What the models lose when the activation at the hook is replaced, and what latents carry from one model to the other.

The crosscoder's part of the two models' forward passes: reconstruction and zero in place of each model's activation
(loss recovered), and the base model's activation with the fine-tuned model's side of some latents (the diffing experiment of
Minder et al., arXiv 2504.02922). All in raw activation space.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.data import Data, HookedModel, Text
from collecting import language_model as lm
from collecting.chat import answer_marker
from crosscoder import CrossCoder
from run.machine import progress_bar

FIRST_TOKENS = 10  # of an answer, or of a sequence: where fine-tuning shows most (arXiv 2504.02922)
POSITIONS_TOGETHER = 512  # of one batch, whose log-probabilities over the vocabulary are in memory at once
ROWS_TOGETHER = 1024  # tokens whose codes are in memory at once
HIGHEST_SHARE = 0.05  # of the live latents, those with the highest relative norm: Minder et al.'s "effective" fine-tuned-only


def answer_starts(ids: np.ndarray, marker: tuple[list[int], list[int]]) -> list[int]:
    """Where in a sequence of token ids each answer of a chat begins. marker: as `chat.answer_marker` gives it."""
    before, space = (np.array(part, dtype=ids.dtype) for part in marker)
    if len(ids) < len(before):
        return []
    matches = np.lib.stride_tricks.sliding_window_view(ids, len(before)) == before  # [places, marker]
    ends = np.flatnonzero(matches.all(1)) + len(before)
    return [int(end) + (len(space) if len(space) and np.array_equal(ids[end : end + len(space)], space) else 0) for end in ends]


def first_tokens(sequences: list[np.ndarray], marker, skip_first: int) -> tuple[list[np.ndarray], str]:
    """For each sequence which predictions (position p predicts token p + 1) are of first tokens, and what that means here."""
    masks = [np.zeros(len(s), dtype=bool) for s in sequences]
    answers = [answer_starts(s, marker) if marker else [] for s in sequences]
    if any(answers):
        for mask, starts in zip(masks, answers, strict=True):
            for start in starts:
                mask[max(0, start - 1) : start - 1 + FIRST_TOKENS] = True
        return masks, f"the first {FIRST_TOKENS} tokens of each answer, after the chat template's prompt"
    for mask in masks:
        mask[skip_first : skip_first + FIRST_TOKENS] = True
    return masks, f"the first {FIRST_TOKENS} tokens of each sequence after the {skip_first} left out (the texts hold no chat)"


def position_losses(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the targets and KL(reference || logits), in nats, at each position: float64 [positions] each.

    logits, reference: [positions, vocabulary]; targets: [positions] int64. The vocabulary that both know counts.
    """
    known = min(logits.shape[-1], reference.shape[-1])
    losses, divergences = [], []
    for i in range(0, len(targets), POSITIONS_TOGETHER):
        part = slice(i, i + POSITIONS_TOGETHER)
        log_q, log_p = (x[part].float().log_softmax(-1) for x in (logits, reference))
        losses.append(-log_q.gather(-1, targets[part, None])[:, 0].double())
        if log_p.shape != log_q.shape:
            log_q, log_p = (x[:, :known].log_softmax(-1) for x in (log_q, log_p))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).double())
    return torch.cat(losses), torch.cat(divergences)


def write_at(activation: Tensor, kept: Tensor, rows: Tensor) -> Tensor:
    """A copy of activation [batch, seq, d_model] with rows [kept, d_model] at the places kept [batch, seq]."""
    spliced = activation.clone()
    spliced[kept] = rows.to(spliced.dtype)
    return spliced


class TokenBatch(NamedTuple):
    """Some sequences, and the predictions of theirs that count (position p predicts token p + 1)."""

    ids: Tensor  # [batch, seq] int64, padded on the right
    mask: Tensor  # [batch, seq] bool, False at padding
    allowed: Tensor  # [batch, seq] bool, positions at which the activation may be replaced
    predicts: Tensor  # [batch, seq - 1] bool
    weight: Tensor  # [2, predictions] float64: 1 for all, and 1 for those of first tokens


def make_batch(sequences: list[np.ndarray], first: list[np.ndarray], skip_first: int, device: torch.device) -> TokenBatch:
    ids, mask = lm.pad_batch(sequences)
    position = torch.arange(ids.shape[1])  # [seq]
    is_first = torch.zeros_like(mask)
    for row, part in zip(is_first, first, strict=True):
        row[: len(part)] = torch.from_numpy(part)
    allowed = mask & (position >= skip_first)
    predicts = mask[:, 1:] & (position[:-1] >= skip_first)
    weight = torch.stack([torch.ones_like(predicts), is_first[:, :-1]])[:, predicts].double()
    return TokenBatch(*(t.to(device) for t in (ids, mask, allowed, predicts, weight)))


def patched_batch(
    models: list[HookedModel], crosscoder: CrossCoder, batch: TokenBatch, sets: dict[str, tuple[Tensor, Tensor]], max_norm: list
) -> Iterator[tuple[str, Tensor]]:
    """The sums over a batch of each loss and divergence: (name, float64 [2] over all predictions and those of first tokens).

    sets: name -> [n] int64 latents, and [n, d_model] the fine-tuned minus the base model's decoder row of each.
    max_norm: [n_models] a position whose activation in one of the models is longer keeps what the model computes.
    """
    attention = batch.mask.long()
    intact = [lm.read_logits(*one, batch.ids, attention) for one in models]  # (activation, logits) of each model
    kept = batch.allowed.clone()  # [batch, seq] where activations are replaced
    for (activation, _), most in zip(intact, max_norm, strict=True):
        kept &= activation.float().norm(dim=-1) <= most
    x = torch.stack([activation[kept].float() for activation, _ in intact], dim=1)  # [rows, n_models, d_model]
    x_hat, carried = torch.empty_like(x), {name: torch.empty_like(x[:, 0]) for name in sets}
    for i in range(0, len(x), ROWS_TOGETHER):
        f = crosscoder.encode(x[i : i + ROWS_TOGETHER])
        x_hat[i : i + ROWS_TOGETHER] = crosscoder.decode(f)
        for name, (latents, difference) in sets.items():
            carried[name][i : i + ROWS_TOGETHER] = f[:, latents] @ difference

    def scored(name: str, logits: Tensor, reference: Tensor) -> Iterator[tuple[str, Tensor]]:
        targets = batch.ids[:, 1:][batch.predicts]
        found = position_losses(logits[:, :-1][batch.predicts], reference[:, :-1][batch.predicts], targets)
        for what, values in zip(("loss", "kl"), found, strict=True):
            yield f"{name} {what}", (batch.weight @ values).cpu()

    def spliced_logits(m: int, rows: Tensor) -> Tensor:
        spliced = write_at(intact[m][0], kept, rows)
        return lm.read_logits(*models[m], batch.ids, attention, spliced)[1]

    # each model with its own reconstruction, and with nothing
    for m, name in enumerate(("base", "ft")):
        logits = intact[m][1]
        yield from scored(f"{name} intact", logits, logits)
        yield from scored(f"{name} reconstruction", spliced_logits(m, x_hat[:, m]), logits)
        yield from scored(f"{name} zero", spliced_logits(m, torch.zeros_like(x_hat[:, m])), logits)
    # either model's later layers on the base model's activation with what some latents add to it
    base, ft_logits = x[:, 0], intact[1][1]
    yield from scored("base model, nothing", intact[0][1], ft_logits)
    yield from scored("ft model, nothing", spliced_logits(1, base), ft_logits)
    for m, half in enumerate(("base model", "ft model")):
        for name, rows in carried.items():
            yield from scored(f"{half}, {name}", spliced_logits(m, base + rows), ft_logits)


def summarise(totals: dict[str, Tensor], sizes: dict[str, int]) -> dict:
    """Means from the totals of `patch_models`: {"all": ..., "first": ...} of each number, None without such a token."""
    tokens = totals["tokens"]

    def pair(values: Tensor) -> dict:
        return {where: float(v) if n else None for where, v, n in zip(("all", "first"), values, tokens, strict=True)}

    def mean(name: str) -> dict:
        return pair(totals[name] / tokens)

    result = {"tokens": {"all": int(tokens[0]), "first": int(tokens[1])}}
    for name in ("base", "ft"):
        intact, spliced, zero = (totals[f"{name} {what} loss"] for what in ("intact", "reconstruction", "zero"))
        result[name] = {
            "loss_intact": mean(f"{name} intact loss"),
            "loss_reconstruction": mean(f"{name} reconstruction loss"),
            "loss_zero": mean(f"{name} zero loss"),
            "loss_recovered": pair((zero - spliced) / (zero - intact)),
            "kl_reconstruction": mean(f"{name} reconstruction kl"),
            "kl_zero": mean(f"{name} zero kl"),
        }
    result["diffing"] = {
        half: {"before": mean(f"{half}, nothing kl")}
        | {name: {"latents": n, "kl": mean(f"{half}, {name} kl")} for name, n in sizes.items()}
        for half in ("base model", "ft model")
    }
    return result


def take_sequences(text: Text, tokens: int) -> Iterator[np.ndarray]:
    """Held-out sequences, then training ones, until they hold that many tokens."""
    for split in ("validation", "train"):
        for sequence in np.unique(text.rows[split][0]):
            ids = text.tokens(sequence)
            if tokens <= 0:
                return
            yield ids[:tokens]
            tokens -= len(ids)


def choose_sets(table: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The sets of latents that are added to the base model's activation, by name; `report.set_name` describes them."""
    live, tags = ~table["dead"], table["tag"]
    ft_only = np.flatnonzero(live & (tags == "ft_only"))
    shared = np.flatnonzero(live & (tags == "shared"))
    by_norm = np.flatnonzero(live)[np.argsort(-table["relative_norm"][live])]
    sets = {
        "ft_only": ft_only,
        "ft_only_by_both": np.flatnonzero(live & (tags == "ft_only") & (table["tag_scaling"] == "ft_only")),
        "highest_relative_norm": by_norm[: max(1, round(HIGHEST_SHARE * len(by_norm)))],
        "as_many_shared": np.random.default_rng(seed).permutation(shared)[: len(ft_only)],
        "all": table["latent"],
    }
    return {name: np.sort(latents) for name, latents in sets.items()}


@torch.no_grad()
def patch_models(
    models: list[HookedModel], crosscoder: CrossCoder, data: Data, sets: dict[str, np.ndarray], tokenizer, *, tokens: int,
    batch_size: int,
) -> dict:  # fmt: skip
    """Losses and divergences over the predictions in the first `tokens` tokens of the texts, and over those of first tokens.

    Predictions count from position `skip_first` of the dataset on. models: base and fine-tuned, on one device. sets: as
    `choose_sets` gives them.
    """
    pair = data.pair
    skip_first, ratio = pair.get("skip_first", 1), pair.get("max_norm_ratio", math.inf)
    max_norm = [ratio * median for median in pair.get("median_norm", [math.inf, math.inf])]
    sequences = list(take_sequences(data.text, tokens))
    marker = answer_marker(tokenizer) if tokenizer is not None and pair.get("chat_template") else None
    first, first_rule = first_tokens(sequences, marker, skip_first)
    W_raw = crosscoder.W_dec / crosscoder.scale[:, None]  # [d_hidden, n_models, d_model] rows as raw activations
    carried = {}
    for name, latents in sets.items():
        if len(latents):
            latents = torch.from_numpy(latents).to(W_raw.device)
            carried[name] = (latents, W_raw[latents, 1] - W_raw[latents, 0])
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))  # over all, over first tokens
    with progress_bar("patching", sum(map(len, sequences))) as bar:
        for start in range(0, len(sequences), batch_size):
            part = slice(start, start + batch_size)
            batch = make_batch(sequences[part], first[part], skip_first, models[0].model._module.device)
            lm.refuse_unknown_tokens([one.model for one in models], batch.ids)
            totals["tokens"] += batch.weight.sum(1).cpu()
            for name, found in patched_batch(models, crosscoder, batch, carried, max_norm):
                totals[name] += found
            bar.update(sum(map(len, sequences[part])))
    result = summarise(totals, {name: len(latents) for name, (latents, _) in carried.items()})
    result["rule"] = (
        f"Replaced are the activations that the dataset holds: the first {skip_first} positions of a sequence and activations "
        f"above {ratio:g} times the median norm stay as the model computes them. Losses are means over the predictions made "
        f"from position {skip_first} on, in nats. 'first' are {first_rule}."
    )
    return result
