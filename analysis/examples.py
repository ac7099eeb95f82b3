"""Where in the text latents are active: their strongest and weaker examples, with the activation of every token around them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.data import Data, Text, normalized_rows, read_normalized
from crosscoder import CrossCoder
from run.machine import progress_bar

RANGES = np.array([0.25, 0.5, 0.75])  # borders, as shares of a latent's maximum, of the ranges that weaker examples come from
RANGE_NAMES = ("top", "0 to 25 %", "25 to 50 %", "50 to 75 %", "75 to 100 %")
CANDIDATES = 4  # kept for each example wanted, since neighbouring tokens of one text make only one
ROWS_TOGETHER = 4096  # rows whose codes are in memory at once
SCAN_ROWS = 1 << 20  # rows whose sequence numbers are looked at together


class Window(NamedTuple):
    """An example: some tokens of a sequence around a strong one."""

    latent: int  # place of the latent among the chosen ones
    kind: int  # index into RANGE_NAMES
    sequence: int
    peak: int  # position of the strong token in the sequence
    start: int  # the window's first position


class Example(NamedTuple):
    window: Window
    tokens: np.ndarray  # [window] int32
    values: np.ndarray  # [window] float32 activations, NaN where the dataset left a token out


def find_examples(
    crosscoder: CrossCoder, data: Data, chosen: np.ndarray, f_max: np.ndarray, *, wanted: int, context: int, seed: int
) -> dict[int, list[Example]]:
    """The examples of each chosen latent that has some: the `wanted` strongest, and about as many weaker ones.

    chosen: [n] latents; f_max: [n] their largest activations. context: tokens shown on each side of the strong one.
    """
    part, n_val = select(crosscoder, torch.from_numpy(chosen)), len(data.text.rows["validation"][0])

    def read() -> Iterator[tuple[np.ndarray, Tensor]]:
        with progress_bar("examples", data.val_rows + data.train_rows) as bar:
            for split, rows, x in normalized_rows(part, data, ROWS_TOGETHER):
                yield rows + (n_val if split == "train" else 0), x
                bar.update(len(x))

    kept = candidates(part, read(), f_max, CANDIDATES * wanted, seed)
    found = read_windows(part, data, windows(kept, data.text, len(chosen), wanted, context), context)
    return {int(chosen[place]): list(group) for place, group in itertools.groupby(found, key=lambda e: e.window.latent)}


@torch.no_grad()
def select(crosscoder: CrossCoder, latents: Tensor) -> CrossCoder:
    """A crosscoder of these latents alone, which `encode` to what they are in the whole one. latents: [n] int64."""
    part = CrossCoder(crosscoder.d_model, len(latents), crosscoder.n_models)
    part.compute_dtype = crosscoder.compute_dtype
    part.to(crosscoder.W_dec.device)
    latents = latents.to(crosscoder.W_dec.device)
    part.W_dec.copy_(crosscoder.W_dec[latents])
    part.W_enc.copy_(crosscoder.W_enc[:, :, latents])
    part.b_enc.copy_(crosscoder.b_enc[latents])
    part.mean.copy_(crosscoder.mean)
    part.scale.copy_(crosscoder.scale)
    part.threshold = crosscoder.threshold[latents] if crosscoder.folded else crosscoder.threshold.clone()
    return part


def keep_smallest(entries: np.ndarray, per_group: int) -> np.ndarray:
    """The `per_group` entries with the smallest key of each group. entries: structured array with the fields group and key."""
    entries = entries[np.lexsort((entries["key"], entries["group"]))]
    first = np.searchsorted(entries["group"], entries["group"])  # where the entry's group begins
    return entries[np.arange(len(entries)) - first < per_group]


@torch.no_grad()
def candidates(part: CrossCoder, batches: Iterator, f_max: np.ndarray, per_group: int, seed: int) -> np.ndarray:
    """The strongest rows of each chosen latent, and random ones from each range of its activation, in one pass.

    Args:
        part: crosscoder of the chosen latents, from `select`.
        batches: (rows [batch], normalised activations [batch, n_models, d_model]); the row is that of the split "validation",
            or the number of those plus that of "train".
        f_max: [chosen] the latents' maxima.

    Returns:
        Structured array (group, key, row) ordered by group = latent * len(RANGE_NAMES) + index into RANGE_NAMES, then by key.
    """
    entry = np.dtype([("group", np.int64), ("key", np.float32), ("row", np.int64)])
    kept, random = np.empty(0, entry), np.random.default_rng(seed)
    n_groups = len(RANGE_NAMES) * part.d_hidden
    worst = np.full(n_groups, np.inf, np.float32)  # the largest key kept of each full group; larger ones are not candidates
    for rows, x in batches:
        f = part.encode(x, normalized=True).cpu().numpy()  # [batch, chosen]
        place, latent = np.nonzero(f)
        value = f[place, latent]
        share = np.searchsorted(RANGES, value / f_max[latent].clip(1e-30), side="left")
        drawn = random.random(len(value), dtype=np.float32)
        for group, key in ((0, -value), (1 + share, drawn)):
            group = latent * len(RANGE_NAMES) + group
            good = key < worst[group]
            new = np.empty(int(good.sum()), entry)
            new["group"], new["key"], new["row"] = group[good], key[good], rows[place[good]]
            kept = np.concatenate([kept, new])
        kept = keep_smallest(kept, per_group)
        last = np.flatnonzero(np.diff(kept["group"], append=n_groups))  # the end of each group
        full = np.bincount(kept["group"], minlength=n_groups) == per_group
        worst[kept["group"][last]] = kept["key"][last]
        worst[~full] = np.inf
    return kept


def windows(kept: np.ndarray, text: Text, chosen: int, wanted: int, context: int) -> list[Window]:
    """Of each latent the `wanted` strongest examples, and as many from its ranges, no two of them overlapping."""
    n_val, found = len(text.rows["validation"][0]), []

    def where(row: int) -> tuple[int, int]:
        split, row = ("validation", row) if row < n_val else ("train", row - n_val)
        return tuple(int(column[row]) for column in text.rows[split])

    borders = np.searchsorted(kept["group"], np.arange(chosen * len(RANGE_NAMES) + 1))
    for latent in range(chosen):
        taken: list[tuple[int, int]] = []  # sequence and position
        for kind in range(len(RANGE_NAMES)):
            group = latent * len(RANGE_NAMES) + kind
            most = len(taken) + (wanted if kind == 0 else -(-wanted // (len(RANGE_NAMES) - 1)))
            for row in kept["row"][borders[group] : borders[group + 1]].tolist():
                if len(taken) >= most:
                    break
                sequence, peak = where(row)
                if all(sequence != s or abs(peak - p) > context for s, p in taken):
                    taken.append((sequence, peak))
                    found.append(Window(latent, kind, sequence, peak, max(0, peak - context)))
    return found


@torch.no_grad()
def read_windows(part: CrossCoder, data: Data, found: list[Window], context: int) -> list[Example]:
    """The tokens of each window and the latent's activation at every one of them. part: as for `candidates`."""
    if not found:
        return []
    text = data.text
    needed = sorted({w.sequence for w in found})
    ids = {sequence: text.tokens(sequence) for sequence in needed}
    number = np.full(len(text.sequences), -1)
    number[needed] = np.arange(len(needed))
    # the row of each token of these sequences, wherever in the shuffled dataset it lies
    row_at = np.full((len(needed), max(map(len, ids.values()))), -1)
    offset = 0
    for split in ("validation", "train"):
        sequence, position = text.rows[split]
        for start in range(0, len(sequence), SCAN_ROWS):
            which = number[sequence[start : start + SCAN_ROWS]]
            hits = np.flatnonzero(which >= 0)
            row_at[which[hits], position[start + hits]] = offset + start + hits
        offset += len(sequence)
    n_val = len(text.rows["validation"][0])

    examples, rows_of = [], []
    for w in found:
        tokens = ids[w.sequence][w.start : w.peak + context + 1]
        rows_of.append(row_at[number[w.sequence], w.start : w.start + len(tokens)])
        examples.append(Example(w, tokens, np.full(len(tokens), np.nan, np.float32)))
    example = np.repeat(np.arange(len(found)), [len(r) for r in rows_of])
    token = np.concatenate([np.arange(len(r)) for r in rows_of])
    row, latent = np.concatenate(rows_of), np.array([w.latent for w in found])[example]
    order = np.argsort(row, kind="stable")
    order = order[row[order] >= 0]
    for batch in np.array_split(order, max(1, len(order) // ROWS_TOGETHER)):
        for split, first, ours in (("validation", 0, row[batch] < n_val), ("train", n_val, row[batch] >= n_val)):
            if not ours.any():
                continue
            unique, back = np.unique(row[batch[ours]] - first, return_inverse=True)
            f = part.encode(read_normalized(part, data, split, unique)[1], normalized=True).cpu().numpy()  # [rows, chosen]
            for i, value in zip(batch[ours], f[back, latent[batch[ours]]], strict=True):
                examples[example[i]].values[token[i]] = value
    return examples
