"""Stored activations: two or more datasets of the same tokens, opened together and read where they lie on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sources.batches import read_ahead
from sources.columns import Column, check_alignment
from sources.dataset_files import open_dataset
from sources.source import Batch, Source

CHUNK = 1024  # rows that are read together: a few megabytes from one place of the disk
BLOCK = 64 * CHUNK  # rows within which data that is not yet shuffled is mixed


class PairedActivations(Source):
    """A source of the same tokens' activations in several models.

    Args:
        name: what the plan of a run calls it.
        splits: for "train" and "validation" the columns of each model (base first), the first row and the number of rows.
        stored_scale: [n_models] factor the stored values carry: stored = activation * stored_scale.
        shuffled: rows are already in random order, so contiguous runs of them may go into a batch.
        seed: decides the order of the rows together with the epoch.
    """

    def __init__(
        self, name: str, splits: dict[str, tuple[list[Column], int, int]], stored_scale: Tensor, shuffled: bool, seed: int
    ):
        columns, _, self.train_rows = splits["train"]
        self.name = name
        self.splits, self.stored_scale, self.shuffled, self.seed = splits, stored_scale, shuffled, seed
        self.record: dict = {}
        self.val_rows = splits["validation"][2]
        self.n_models, self.d_model = len(columns), columns[0].d_model
        # Values of different types meet in the wider one, float16 and bfloat16 in float32.
        dtypes = [c.dtype for columns, _, _ in splits.values() for c in columns]
        self.dtype = reduce(torch.promote_types, dtypes)

    def describe(self) -> str:
        return f"{self.name}: {self.train_rows:,} rows"

    def batches(self, *args, **options) -> Iterator[Batch]:
        return read_ahead(self, *args, **options)

    def order(self, position: int, count: int) -> np.ndarray:
        """Rows, ascending, at `count` places of the endless stream, fewer at the end of an epoch or block.

        A function of (seed, epoch, block): chunks of contiguous rows come in another order each epoch, the last, shorter
        chunk at its end; data not yet shuffled is permuted within blocks of chunks that lie far apart.
        """
        epoch, place = divmod(position, self.train_rows)
        end = min(place + count, self.train_rows)
        block = place // BLOCK
        if self.shuffled:
            places = np.arange(place, end)
        else:
            first, after = block * BLOCK, min((block + 1) * BLOCK, self.train_rows)
            places = first + permutation(after - first, self.seed, epoch, block)[place - first : end - first]
        full_chunks = self.train_rows // CHUNK
        chunk_at = np.append(permutation(full_chunks, self.seed, epoch), full_chunks)
        return np.sort(chunk_at[places // CHUNK] * CHUNK + places % CHUNK)

    def sample_rows(self, count: int) -> np.ndarray:
        """At most `count` evenly spaced training rows."""
        return np.unique(np.linspace(0, self.train_rows - 1, min(count, self.train_rows)).astype(np.int64))

    def gather(self, split: str, rows: np.ndarray, out: Tensor) -> None:
        """Write the given rows (ascending) of "train" or "validation" into out [n_models, rows, d_model]."""
        columns, first, _ = self.splits[split]
        for column, part in zip(columns, out, strict=True):
            column.gather(rows + first, part)


@lru_cache(maxsize=4)
def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. n-1 that depends on the non-negative integers of `key` alone."""
    return np.random.default_rng(key).permutation(n)


def open_pair(dataset: str, columns: tuple[str | None, str | None], val_tokens: int | None, default_val: int, seed: int):
    """The paired dataset that collect.py wrote, a folder or a Hub id -> PairedActivations.

    Args:
        columns: names of the activation columns (base, ft), None to find them.
        val_tokens: held-out rows; None for `default_val`, or a tenth of the rows if that is less.
    """
    folder = Path(dataset).expanduser()
    if not folder.exists() and (folder.is_absolute() or dataset.startswith(".")):
        raise ValueError(f"--dataset {dataset}: no such file or folder")
    if folder.is_dir():
        if (folder / "progress.json").exists() and not (folder / "pair.json").exists():
            raise ValueError(f"--dataset {dataset}: the collection is unfinished; run the same collect.py command again")
        for part in ("base", "ft"):
            if not (folder / part).is_dir():
                raise ValueError(
                    f"--dataset {dataset}: has no folder {part}/, so it is no paired dataset of collect.py; "
                    "give two single datasets with --base-dataset and --ft-dataset"
                )
        base, ft = (open_dataset(str(folder / part), "--dataset") for part in ("base", "ft"))
        pair_file = folder / "pair.json"
    else:
        base, ft = (open_dataset(f"{dataset}:{part}", "--dataset") for part in ("base", "ft"))
        pair_file = hub_pair_file(dataset)
    pair = read_pair(dataset, pair_file)
    written = pair.get("rows", {})
    for split, part in base.items():
        if len(part) != written.get(split, len(part)):
            raise ValueError(
                f"--dataset {dataset}: has {len(part)} rows in {split} and pair.json says {written[split]}: a shard is "
                "truncated or missing; copy it again or collect again"
            )
    splits = pair_up([base, ft], ("--dataset", "--dataset"), columns, val_tokens, default_val)
    stored_scale = torch.tensor(pair["stored_scale"], dtype=torch.float64)
    source = PairedActivations(dataset, splits, stored_scale, bool(pair.get("shuffled")), seed)
    source.pair = pair
    return source


def read_pair(dataset: str, pair_file) -> dict:
    """What a pair.json says. ValueError unless its `stored_scale` (and `rows`, where it is there) can be used."""
    try:
        pair = json.loads(Path(pair_file).read_text())
        stored_scale = torch.tensor(pair["stored_scale"], dtype=torch.float64)
        if stored_scale.shape != (2,) or not ((stored_scale > 0) & stored_scale.isfinite()).all():
            raise ValueError(f"stored_scale is {pair['stored_scale']}, not two positive numbers")
        dict(pair.get("rows", {}))
        return pair
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--dataset {dataset}: pair.json is missing or broken ({error!r}); collect again") from None


def open_single(base_dataset: str, ft_dataset: str, columns, val_tokens: int | None, default_val: int, seed: int):
    """Two datasets with one column of float lists each -> PairedActivations. Arguments as for `open_pair`."""
    flags = ("--base-dataset", "--ft-dataset")
    base, ft = open_dataset(base_dataset, flags[0]), open_dataset(ft_dataset, flags[1])
    splits = pair_up([base, ft], flags, columns, val_tokens, default_val)
    return PairedActivations(f"{base_dataset} + {ft_dataset}", splits, torch.ones(2), False, seed)


def open_several(datasets: list[str], columns, val_tokens: int | None, default_val: int, seed: int):
    """One dataset for each of several models, base first. Arguments as for `open_pair`; columns[0] is that of all."""
    parts, flags = [open_dataset(name, "--model-dataset") for name in datasets], [f"--model-dataset {d}" for d in datasets]
    splits = pair_up(parts, flags, [columns[0]] * len(parts), val_tokens, default_val)
    return PairedActivations(" + ".join(datasets), splits, torch.ones(len(parts)), False, seed)


def pair_up(parts: list[dict], flags, names, val_tokens: int | None, default_val: int) -> dict:
    """The splits of a PairedActivations: checked to hold the same tokens, the held-out rows set apart. One part a model."""
    splits, base = {}, parts[0]
    for part, flag in zip(parts, flags, strict=True):
        if missing := set(base) ^ set(part):
            raise ValueError(f"{flag}: the split {missing.pop()!r} is in only one of the two datasets")
    for split in base:
        whole = [d if d._indices is None else d.flatten_indices() for d in (part[split] for part in parts)]
        tables = [dataset.data.table for dataset in whole]
        columns = [Column(table, name, flag) for table, name, flag in zip(tables, names, flags, strict=True)]
        for table, column, flag in list(zip(tables, columns, flags, strict=True))[1:]:
            check_alignment(tables[0], table, [columns[0], column], (flags[0], flag), split)
        splits[split] = (columns, 0, len(columns[0]))
    rows = splits["train"][2]
    if "validation" in splits:
        columns, first, held_out = splits["validation"]
        splits["validation"] = (columns, first, min(held_out, val_tokens or default_val))
    else:
        held_out = min(default_val, rows // 10) if val_tokens is None else val_tokens
        splits["train"], splits["validation"] = (columns, 0, rows - held_out), (columns, rows - held_out, held_out)
    if splits["validation"][2] < 2 or splits["train"][2] < 2:
        raise ValueError(
            f"--val-tokens: {rows} rows cannot give {held_out} held-out rows and rows to train on, at least two of each"
        )
    return splits


def hold_out_first(source: PairedActivations) -> None:
    """Let the held-out rows be the first ones, as when they were streamed, unless there is a validation split of its own."""
    columns, first, held_out = source.splits["validation"]
    if first:
        source.splits["validation"] = (columns, 0, held_out)
        source.splits["train"] = (columns, held_out, source.train_rows)


def hub_pair_file(dataset: str, revision: str | None = None) -> str | os.PathLike:
    """Local copy of the pair.json of a paired dataset on the Hub."""
    import datasets
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        offline = datasets.config.HF_HUB_OFFLINE
        return hf_hub_download(dataset, "pair.json", repo_type="dataset", revision=revision, local_files_only=offline)
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"--dataset {dataset}: its pair.json cannot be fetched ({type(error).__name__})") from None
