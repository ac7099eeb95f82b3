"""Where in the text latents are active: their strongest and weaker examples, with the activation of every token around them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.data import Data, Text, normalized_rows
from crosscoder import CrossCoder

RANGES = (0.25, 0.5, 0.75)  # borders, as shares of a latent's maximum, of the ranges that weaker examples come from
RANGE_NAMES = ("top", "0 to 25 %", "25 to 50 %", "50 to 75 %", "75 to 100 %")
DRAWN = 5  # random texts for each silent one wanted
CANDIDATES = 4  # kept for each example wanted, since neighbouring tokens of one text make only one


class Window(NamedTuple):
    """An example: some tokens of a sequence around a strong one."""

    latent: int  # place of the latent among the chosen ones
    kind: int  # index into RANGE_NAMES
    sequence: int
    peak: int  # position of the strong token in the sequence
    start: int  # the window's first position


@torch.no_grad()
def find_examples(
    crosscoder: CrossCoder, data: Data, chosen: np.ndarray, f_max: np.ndarray, tokenizer, *, wanted: int, context: int,
    seed: int,
) -> list[dict]:  # fmt: skip
    """The lines of examples.jsonl: of each chosen latent the `wanted` strongest examples, and about as many weaker ones.

    Of an example: token texts, and activations with three digits, None where none was stored. There are none without texts.

    chosen: [n] latents; f_max: [n] their largest activations. context: tokens shown on each side of the strong one.
    """
    sections: list[dict] = [{"latent": latent, "examples": []} for latent in chosen.tolist()]
    if data.text is None or not sections:
        return sections
    part = select(crosscoder, torch.from_numpy(chosen))
    rows = candidates(part, data, torch.from_numpy(f_max), CANDIDATES * wanted, seed)
    found = windows(rows, data.text, wanted, context)
    if not found:
        return sections
    texts = window_texts(data.text, found, tokenizer, context)
    for w, tokens, values in zip(found, texts, window_values(part, data, found, context), strict=True):
        sections[w.latent]["examples"].append({
            "range": RANGE_NAMES[w.kind],
            "text": data.text.names[data.text.text_of[w.sequence]],
            "sequence": w.sequence,
            "position": w.peak,
            "peak": w.peak - w.start,
            "tokens": tokens,
            "values": [None if np.isnan(v) else float(f"{v:.3g}") for v in values[: len(tokens)]],
        })  # fmt: skip
    return sections


@torch.no_grad()
def silent_windows(
    crosscoder: CrossCoder, data: Data, chosen: np.ndarray, tokenizer, *, wanted: int, context: int, seed: int
) -> list[list[str]]:
    """Of each chosen latent up to `wanted` texts as long as examples, drawn at random, on which it is active nowhere.

    The same texts for all latents, as far as they are silent there. chosen: [n] latents.
    """
    rows = np.concatenate([np.arange(data.val_rows), data.first_train + np.arange(data.train_rows)])
    rows = np.random.default_rng(seed).choice(rows, min(len(rows), DRAWN * wanted), replace=False)
    places = [(int(data.text.sequence[row]), int(data.text.position[row])) for row in rows]
    drawn = [Window(0, 0, sequence, peak, max(0, peak - context)) for sequence, peak in places]
    texts = ["".join(tokens) for tokens in window_texts(data.text, drawn, tokenizer, context)]
    every = [w._replace(latent=latent) for latent in range(len(chosen)) for w in drawn]
    values = window_values(select(crosscoder, torch.from_numpy(chosen)), data, every, context)
    silent = (np.nan_to_num(values) == 0).all(axis=1).reshape(len(chosen), len(drawn))  # the row drawn was measured
    return [[texts[i] for i in np.flatnonzero(one)[:wanted]] for one in silent]


def window_texts(text: Text, found: list[Window], tokenizer, context: int) -> list[list[str]]:
    """The text of each token of each window; the token's number without a tokenizer."""
    ids = [text.tokens(w.sequence)[w.start : w.peak + context + 1] for w in found]
    texts = {int(token): f" {token}" for token in np.unique(np.concatenate(ids))}
    if tokenizer is not None:
        from collecting import language_model as lm  # loaded already, with the tokenizer

        texts = lm.token_texts(tokenizer, np.array(list(texts)))
    return [[texts[int(token)] for token in tokens] for tokens in ids]


def select(crosscoder: CrossCoder, latents: Tensor) -> CrossCoder:
    """A crosscoder of these latents alone, which `encode` to what they are in the whole one. latents: [n] int64."""
    device, tensors = crosscoder.W_dec.device, crosscoder.state_dict()
    for name in ("enc_rows", "W_dec", "b_enc", *["threshold"] * crosscoder.folded):
        tensors[name] = tensors[name][latents.to(device)]
    tensors["W_enc"] = tensors.pop("enc_rows").permute(1, 2, 0)
    return CrossCoder.from_tensors(tensors, "vanilla").to(device)


def candidates(part: CrossCoder, data: Data, f_max: Tensor, count: int, seed: int) -> np.ndarray:
    """[chosen, len(RANGE_NAMES), count] rows: a latent's strongest, then random ones of each range; -1 where there are fewer.

    part: crosscoder of the chosen latents, from `select`. f_max: [chosen] their maxima.
    """
    device = part.W_dec.device
    f_max, borders = f_max.to(device, torch.float32)[:, None], torch.tensor(RANGES, device=device)
    random = torch.Generator(device).manual_seed(seed)
    least = torch.full((len(RANGE_NAMES), part.d_hidden, count), torch.inf, device=device)  # keys; the smallest are kept
    kept = torch.full(least.shape, -1, device=device)
    for rows, x in normalized_rows(part, data, what="examples"):
        f = part.encode(x, normalized=True).T.contiguous()  # [chosen, batch]
        share, drawn = torch.bucketize(f / f_max, borders), torch.rand(f.shape, generator=random, device=device)
        keys = torch.stack([-f, *(drawn.where(share == i, torch.inf) for i in range(len(RANGES) + 1))])
        least = torch.cat([least, keys.where(f > 0, torch.inf)], dim=-1)
        kept = torch.cat([kept, torch.from_numpy(rows).to(device).expand(keys.shape)], dim=-1)
        least, index = least.topk(count, largest=False)
        kept = kept.gather(-1, index)
    return kept.where(least.isfinite(), -1).transpose(0, 1).cpu().numpy()


def windows(candidates: np.ndarray, text: Text, wanted: int, context: int) -> list[Window]:
    """Of each latent the `wanted` strongest examples, and as many from its ranges, no two of them overlapping."""
    found = []
    for latent, ranges in enumerate(candidates):
        taken: list[tuple[int, int]] = []  # sequence and position
        for kind, rows in enumerate(ranges):
            most = len(taken) + (wanted if kind == 0 else -(-wanted // (len(RANGE_NAMES) - 1)))
            for row in rows[rows >= 0]:
                if len(taken) >= most:
                    break
                sequence, peak = int(text.sequence[row]), int(text.position[row])
                if all(sequence != s or abs(peak - p) > context for s, p in taken):
                    taken.append((sequence, peak))
                    found.append(Window(latent, kind, sequence, peak, max(0, peak - context)))
    return found


def window_values(part: CrossCoder, data: Data, found: list[Window], context: int) -> np.ndarray:
    """[windows, 2 * context + 1] the latent's activation at each token from a window's start on, NaN where none was stored."""
    text, needed = data.text, np.zeros(len(data.text.sequences), dtype=bool)
    needed[[w.sequence for w in found]] = True
    rows = np.flatnonzero(needed[text.sequence])  # of these sequences, wherever in the shuffled dataset they lie
    place = text.sequence[rows].astype(np.int64) << 32 | text.position[rows]  # sequence and position as one number
    order = place.argsort()
    rows, place = rows[order], place[order]
    token = np.array([w.sequence << 32 | w.start for w in found])[:, None] + np.arange(2 * context + 1)
    nearest = place.searchsorted(token).clip(max=len(place) - 1)
    row = np.where(place[nearest] == token, rows[nearest], -1)  # [windows, 2 * context + 1]
    values, latent = np.full(row.shape, np.nan, np.float32), np.array([w.latent for w in found])
    for numbers, x in normalized_rows(part, data, np.unique(row[row >= 0])):
        f = part.encode(x, normalized=True).cpu().numpy()  # [rows, chosen]
        window, place_in = np.nonzero(np.isin(row, numbers))
        values[window, place_in] = f[numbers.searchsorted(row[window, place_in]), latent[window]]
    return values
