"""What the models lose when the activation at the hook is replaced, and what latents carry from one model to the other.

The crosscoder's part of the two models' forward passes: reconstruction and zero in place of each model's activation
(loss recovered), and the base model's activation with the fine-tuned model's side of some latents (the diffing experiment of
Minder et al., arXiv 2504.02922). All in raw activation space.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from collecting import language_model as lm
from crosscoder import CrossCoder

FIRST_TOKENS = 10  # of an answer, or of a sequence: where fine-tuning shows most (arXiv 2504.02922)
POSITIONS_TOGETHER = 512  # of one batch, whose log-probabilities over the vocabulary are in memory at once
ROWS_TOGETHER = 1024  # tokens whose codes are in memory at once


class Rule(NamedTuple):
    """Which positions are replaced: those whose activations the training data holds."""

    skip_first: int  # the first positions of a sequence keep the activation that the model computes
    max_norm: tuple[float, float]  # so do those with a larger norm than this in one of the models


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


@torch.no_grad()
def measure(
    models: list, hooks: list[str], crosscoder: CrossCoder, sequences: list[np.ndarray], first: list[np.ndarray], rule: Rule,
    latent_sets: dict[str, Tensor], batch_size: int, progress: Iterable | None = None,
) -> dict:  # fmt: skip
    """Losses and divergences over all predictions made at or after position `skip_first`, and over the first tokens.

    Args:
        models, hooks: base and fine-tuned, on one device, as `language_model` gives them.
        sequences: int32 token ids each; first: their masks from `first_tokens`.
        latent_sets: name -> [n] int64 latents whose difference of the two models is added to the base model's activation.
        progress: something with update(tokens).
    """
    W_raw = crosscoder.W_dec / crosscoder.scale[:, None]  # [d_hidden, n_models, d_model] rows as raw activations
    sets = {name: (latents, W_raw[latents, 1] - W_raw[latents, 0]) for name, latents in latent_sets.items() if len(latents)}
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))  # over all, over first tokens
    device = models[0]._module.device
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        ids, lengths = lm.pad_batch(batch)
        for model, flag in zip(models, ("--base-model", "--ft-model"), strict=True):
            if int(ids.max()) >= lm.embedding_rows(model):
                raise ValueError(f"{flag}: the dataset holds the token id {int(ids.max())}, which this model does not know")
        position = torch.arange(ids.shape[1])  # [seq]
        mask = position < lengths[:, None]  # [batch, seq]
        is_first = torch.zeros_like(mask)
        for row, part in zip(is_first, first[start : start + batch_size], strict=True):
            row[: len(part)] = torch.from_numpy(part)
        ids, mask, is_first, position = (t.to(device) for t in (ids, mask, is_first, position))

        intact = [lm.read_logits(m, h, ids, mask.long()) for m, h in zip(models, hooks, strict=True)]
        kept = mask & (position >= rule.skip_first)
        for (activation, _), most in zip(intact, rule.max_norm, strict=True):
            kept &= activation.float().norm(dim=-1) <= most
        x = torch.stack([activation[kept].float() for activation, _ in intact], dim=1)  # [rows, n_models, d_model]
        x_hat, carried = torch.empty_like(x), {name: torch.empty_like(x[:, 0]) for name in sets}
        for i in range(0, len(x), ROWS_TOGETHER):
            f = crosscoder.encode(x[i : i + ROWS_TOGETHER])
            x_hat[i : i + ROWS_TOGETHER] = crosscoder.decode(f)
            for name, (latents, difference) in sets.items():
                carried[name][i : i + ROWS_TOGETHER] = f[:, latents] @ difference

        predicts = mask[:, 1:] & (position[:-1] >= rule.skip_first)  # [batch, seq - 1]
        targets, weight = ids[:, 1:][predicts], torch.stack([torch.ones_like(predicts), is_first[:, :-1]])[:, predicts].double()
        totals["tokens"] += weight.sum(1).cpu()

        def add(name: str, logits: Tensor, reference: Tensor) -> None:
            loss, divergence = position_losses(logits[:, :-1][predicts], reference[:, :-1][predicts], targets)  # noqa: B023
            totals[f"{name} loss"] += (weight @ loss).cpu()  # noqa: B023
            totals[f"{name} kl"] += (weight @ divergence).cpu()  # noqa: B023

        for m, (name, model, hook) in enumerate(zip(("base", "ft"), models, hooks, strict=True)):
            activation, logits = intact[m]
            add(f"{name} intact", logits, logits)
            for what, rows in (("reconstruction", x_hat[:, m]), ("zero", torch.zeros_like(x_hat[:, m]))):
                spliced = write_at(activation, kept, rows)
                add(f"{name} {what}", lm.read_logits(model, hook, ids, mask.long(), spliced)[1], logits)
        base, ft_logits = intact[0][0], intact[1][1]
        add("base model, nothing", intact[0][1], ft_logits)
        for half, model, hook, (own, _) in zip(("base model", "ft model"), models, hooks, intact, strict=True):
            for what, rows in [("nothing", torch.zeros_like(x[:, 0])), *carried.items()]:
                if half == "ft model" or what != "nothing":
                    spliced = write_at(own, kept, base[kept].float() + rows)
                    add(f"{half}, {what}", lm.read_logits(model, hook, ids, mask.long(), spliced)[1], ft_logits)
        if progress is not None:
            progress.update(int(lengths.sum()))
    return summarise(totals, {name: len(latents) for name, (latents, _) in sets.items()})


def summarise(totals: dict[str, Tensor], sizes: dict[str, int]) -> dict:
    """Means from the totals of `measure`, {"all": ..., "first": ...} for each number; null where there is no such token."""
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


def take_sequences(text, rows: dict[str, tuple[np.ndarray, np.ndarray]], tokens: int) -> Iterator[np.ndarray]:
    """Held-out sequences, then training ones, until they hold that many tokens."""
    for split in ("validation", "train"):
        for sequence in np.unique(rows[split][0]):
            ids = text.tokens(sequence)
            if tokens <= 0:
                return
            yield ids[:tokens]
            tokens -= len(ids)
