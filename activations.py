"""Where batches come from: paired activation datasets, read zero-copy from their Arrow buffers.

A *source* (`PairedActivations` here, `planted.PlantedConcepts`) says how many rows it has and writes chosen rows into a
given tensor; `batches` turns any source into a stream of batches filled by a background thread.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 1024  # rows that are read together: a few megabytes from one place of the disk
BLOCK = 64 * CHUNK  # rows within which data that is not yet shuffled is mixed
PREFETCH = 3  # batches filled ahead of the training loop
MAX_NON_FINITE = 0.001  # share of rows that may hold NaN or inf before the run stops
STATISTICS_ROWS = 65_536  # rows behind the mean and the scale


class Batch(NamedTuple):
    """One batch of the training stream, and where the stream stands after it."""

    x: Tensor  # [rows, n_models, d_model] stored values, on the device
    position: int  # rows of the stream used up so far, over all epochs
    dropped: int  # of those, pairs left out because of a non-finite value
    first_row: int  # lowest and highest row of the dataset in this batch
    last_row: int


def batches(source, batch_size: int, stop: int, device: torch.device, position: int = 0, dropped: int = 0) -> Iterator[Batch]:
    """Batches of the rows at the places `position` to `stop` of the source's stream; the last one may be shorter.

    A background thread reads ahead; closing the generator ends it. A batch's tensor is overwritten after the next one has
    been asked for. Raises ValueError when more than 0.1 % of the rows hold a non-finite value.
    """
    ready: queue.Queue = queue.Queue()
    free: queue.Queue = queue.Queue()
    closed = threading.Event()
    on_cuda = device.type == "cuda"
    uploads = torch.cuda.Stream(device) if on_cuda else None  # copies run beside the training step
    for _ in range(PREFETCH + 3):  # one more is in the loop's hands, two in the thread's
        shape = (source.n_models, batch_size, source.d_model)
        free.put((torch.empty(shape, dtype=source.dtype, pin_memory=on_cuda), None))

    def hand_over(buffer, filled, standing):
        x, copied = buffer[:, :filled], None  # [n_models, rows, d_model]
        if on_cuda:
            with torch.cuda.stream(uploads):
                x, copied = x.to(device, non_blocking=True), torch.cuda.Event()
                copied.record()
        ready.put((x.transpose(0, 1), buffer, copied, standing))

    def read_ahead():
        nonlocal position, dropped
        held = None  # the batch before: the last one is known by its position, also when only dropped rows come after it
        try:
            while position < stop:
                buffer, copied = free.get()  # [n_models, batch_size, d_model]
                if closed.is_set():
                    return
                if copied is not None:
                    copied.synchronize()  # the copy to the device still reads from this buffer
                filled, first_row, last_row = 0, None, None
                while filled < batch_size and position < stop:
                    rows = source.order(position, min(batch_size - filled, stop - position))
                    position += len(rows)
                    kept = gather_finite(source, "train", rows, buffer[:, filled : filled + len(rows)])
                    filled, dropped = filled + kept, dropped + len(rows) - kept
                    first_row = min(rows[0], first_row if first_row is not None else rows[0])
                    last_row = max(rows[-1], last_row or 0)
                if dropped > max(1, MAX_NON_FINITE * max(position, source.train_rows or stop)):
                    raise ValueError(too_many_non_finite(dropped, position))
                if filled:
                    if held:
                        hand_over(*held)
                    held = (buffer, filled, (position, dropped, int(first_row), int(last_row)))
                elif held:
                    held = (*held[:2], (position, dropped, *held[2][2:]))
            if held:
                hand_over(*held)
            ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the batches are consumed
            ready.put(error)

    thread = threading.Thread(target=read_ahead, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            x, buffer, copied, standing = item
            if on_cuda:
                torch.cuda.current_stream(device).wait_event(copied)
                x.record_stream(torch.cuda.current_stream(device))  # its memory is not given away before the step is done
            yield Batch(x, *standing)
            free.put((buffer, copied))
    finally:
        closed.set()
        free.put((None, None))  # wakes the thread if it waits
        thread.join()  # a thread still inside torch while Python shuts down aborts the process


def gather_finite(source, split: str, rows: np.ndarray, out: Tensor) -> int:
    """Fill out [n_models, rows, d_model] with the given rows, those with a non-finite value left out. Returns how many stay."""
    source.gather(split, rows, out)
    low, high = out.aminmax()  # NaN passes through both; ten times as fast as asking every value
    if low.isfinite() and high.isfinite():
        return len(rows)
    finite = torch.isfinite(out).all(-1).all(0)  # [rows]
    kept = int(finite.sum())
    out[:, :kept] = out[:, finite]
    return kept


def too_many_non_finite(dropped: int, seen: int) -> str:
    return (
        f"{dropped} of the {seen} rows read hold NaN or inf in one of the models, more than {MAX_NON_FINITE:.1%} of the data: "
        "the activations are damaged or overflowed when stored; collect them again with --dtype float32"
    )


def validation_batches(source, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """The held-out rows once, in order: [rows, n_models, d_model] stored values, non-finite pairs left out."""
    for start in range(0, source.val_rows, batch_size):
        rows = np.arange(start, min(start + batch_size, source.val_rows))
        out = torch.empty(source.n_models, len(rows), source.d_model, dtype=source.dtype)
        kept = gather_finite(source, "validation", rows, out)
        yield out[:, :kept].transpose(0, 1).to(device)


def estimate_normalization(source, center: bool) -> tuple[Tensor, Tensor]:
    """Mean [n_models, d_model] and scale [n_models] of the stored rows, float64, from evenly spaced training rows.

    scale = sqrt(d_model) / mean norm of (row - mean); the mean is 0 without `center`. Accumulated in float64: a running
    mean in the storage type is wrong by a factor after a few thousand updates.
    """
    rows = source.sample_rows(STATISTICS_ROWS)
    parts = np.array_split(rows, -(-len(rows) // 4096))
    buffer = torch.empty(source.n_models, 4096, source.d_model, dtype=source.dtype)

    def average(measure):
        total, count = 0, 0
        for part in parts:
            kept = gather_finite(source, "train", part, buffer[:, : len(part)])
            total, count = total + measure(buffer[:, :kept].double()).sum(1), count + kept
        if len(rows) - count > max(1, MAX_NON_FINITE * len(rows)):
            raise ValueError(too_many_non_finite(len(rows) - count, len(rows)))
        return total / count

    mean = torch.zeros(source.n_models, source.d_model, dtype=torch.float64)
    if center:
        mean = average(lambda x: x)
    norm = average(lambda x: (x - mean[:, None]).norm(dim=-1))  # [n_models]
    if not (norm > 0).all():
        raise ValueError("the activations of a model are the same in every row: nothing to learn, check the dataset's columns")
    return mean, source.d_model**0.5 / norm


class Column:
    """A column of float lists as zero-copy tensors, one [rows, d_model] for each Arrow chunk."""

    def __init__(self, dataset, name: str | None, flag: str):
        if dataset._indices is not None:
            dataset = dataset.flatten_indices()
        table = dataset.data.table
        name = pick_column(table.schema, name, flag)
        chunks, starts, self.d_model = [], [0], None
        for array in table.column(name).chunks:
            if len(array) == 0:
                continue
            try:
                array.validate()  # hostile offsets must not point outside the buffer
            except ValueError as error:
                raise ValueError(
                    f"{flag}: column {name!r} is damaged after row {starts[-1]} ({error}); copy it again"
                ) from None
            values = array.flatten()
            if array.null_count or values.null_count:
                low, high = starts[-1], starts[-1] + len(array)
                raise ValueError(f"{flag}: column {name!r} has empty entries between rows {low} and {high}; fill or drop them")
            lengths = np.full(len(array), array.type.list_size) if hasattr(array.type, "list_size") else np.diff(array.offsets)
            if self.d_model is None:
                self.d_model = int(lengths[0])
            if self.d_model == 0:
                raise ValueError(f"{flag}: column {name!r} holds empty lists; every row must be one token's activation")
            if (lengths != self.d_model).any():
                row = int(np.argmax(lengths != self.d_model))
                raise ValueError(
                    f"{flag}: column {name!r} has rows of unequal width: row {starts[-1] + row} has {lengths[row]} values, "
                    f"the first row {self.d_model}; every row must be one token's activation"
                )
            numbers = values.to_numpy(zero_copy_only=True).reshape(-1, self.d_model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the memory map is read-only, and nothing here writes to it
                chunks.append(torch.from_numpy(numbers))
            starts.append(starts[-1] + len(array))
        if not chunks:
            raise ValueError(f"{flag}: the dataset is empty")
        self.chunks, self.starts, self.dtype = chunks, np.array(starts), chunks[0].dtype

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, rows: np.ndarray, out: Tensor) -> None:
        """Write the given rows (ascending) into out [rows, d_model]."""
        borders = np.searchsorted(rows, self.starts)  # rows[borders[i]:borders[i + 1]] lie in chunk i
        for i in np.flatnonzero(np.diff(borders)):
            low, high = borders[i], borders[i + 1]
            local = rows[low:high] - self.starts[i]
            if local[-1] - local[0] == high - low - 1:
                out[low:high] = self.chunks[i][local[0] : local[-1] + 1]
            else:
                torch.index_select(self.chunks[i], 0, torch.from_numpy(local), out=out[low:high])


def pick_column(schema, name: str | None, flag: str) -> str:
    """The column of activations: the one named, or the only one whose rows are lists of floats."""
    from pyarrow import types

    def is_float_list(kind) -> bool:
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return lists and types.is_floating(kind.value_type)

    column_flag = flag.replace("dataset", "column") if flag != "--dataset" else "--base-column or --ft-column"
    lists = [f.name for f in schema if is_float_list(f.type)]
    if name is not None and name not in schema.names:
        raise ValueError(f"{column_flag} {name}: {flag} has no such column, it has {', '.join(schema.names)}")
    if name is not None and name not in lists:
        raise ValueError(f"{column_flag} {name}: rows are {schema.field(name).type}, not lists of floats")
    if name is None and not lists:
        kinds = ", ".join(f"{f.name} ({f.type})" for f in schema)
        raise ValueError(f"{flag}: no column holds lists of floats, one row a token; the columns are {kinds}")
    if name is None and len(lists) > 1:
        raise ValueError(f"{flag}: several columns hold float lists ({', '.join(lists)}); choose one with {column_flag}")
    return name or lists[0]


class PairedActivations:
    """A source of the same tokens' activations in several models.

    Args:
        splits: for "train" and "validation" the columns of each model (base first), the first row and the number of rows.
        stored_scale: [n_models] factor the stored values carry: stored = activation * stored_scale.
        shuffled: rows are already in random order, so contiguous runs of them may go into a batch.
        seed: decides the order of the rows together with the epoch.
    """

    def __init__(self, splits: dict[str, tuple[list[Column], int, int]], stored_scale: Tensor, shuffled: bool, seed: int):
        columns, _, self.train_rows = splits["train"]
        self.splits, self.stored_scale, self.shuffled, self.seed = splits, stored_scale, shuffled, seed
        self.val_rows = splits["validation"][2]
        self.n_models, self.d_model = len(columns), columns[0].d_model
        # Values of different types meet in the wider one.
        self.dtype = max((c.dtype for columns, _, _ in splits.values() for c in columns), key=lambda t: t.itemsize)

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
    try:
        pair = json.loads(Path(pair_file).read_text())
        stored_scale, shuffled = torch.tensor(pair["stored_scale"], dtype=torch.float64), bool(pair.get("shuffled"))
        if stored_scale.shape != (2,) or not ((stored_scale > 0) & stored_scale.isfinite()).all():
            raise ValueError(f"stored_scale is {pair['stored_scale']}, not two positive numbers")
        written = dict(pair.get("rows", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--dataset {dataset}: pair.json is missing or broken ({error!r}); collect again") from None
    for split, part in base.items():
        if len(part) != written.get(split, len(part)):
            raise ValueError(
                f"--dataset {dataset}: has {len(part)} rows in {split} and pair.json says {written[split]}: a shard is "
                "truncated or missing; copy it again or collect again"
            )
    splits = pair_up(base, ft, ("--dataset", "--dataset"), columns, val_tokens, default_val)
    return PairedActivations(splits, stored_scale, shuffled, seed)


def open_single(base_dataset: str, ft_dataset: str, columns, val_tokens: int | None, default_val: int, seed: int):
    """Two datasets with one column of float lists each -> PairedActivations. Arguments as for `open_pair`."""
    flags = ("--base-dataset", "--ft-dataset")
    base, ft = open_dataset(base_dataset, flags[0]), open_dataset(ft_dataset, flags[1])
    splits = pair_up(base, ft, flags, columns, val_tokens, default_val)
    return PairedActivations(splits, torch.ones(2), False, seed)


def pair_up(base: dict, ft: dict, flags, names, val_tokens: int | None, default_val: int) -> dict:
    """The splits of a PairedActivations: checked to hold the same tokens, the held-out rows set apart."""
    splits = {}
    if missing := set(base) ^ set(ft):
        raise ValueError(f"{flags[1]}: the split {missing.pop()!r} is in only one of the two datasets")
    for split in base:
        columns = [Column(part[split], name, flag) for part, name, flag in zip((base, ft), names, flags, strict=True)]
        check_alignment(base[split], ft[split], columns, flags, split)
        splits[split] = (columns, 0, len(columns[0]))
    rows = splits["train"][2]
    if "validation" in splits:
        columns, first, held_out = splits["validation"]
        splits["validation"] = (columns, first, min(held_out, val_tokens or default_val))
    else:
        held_out = min(default_val, rows // 10) if val_tokens is None else val_tokens
        splits["train"], splits["validation"] = (columns, 0, rows - held_out), (columns, rows - held_out, held_out)
    if splits["validation"][2] < 1 or splits["train"][2] < 1:
        raise ValueError(f"--val-tokens: {rows} rows cannot give {held_out} held-out rows and rows to train on")
    return splits


def check_alignment(base, ft, columns: list[Column], flags, split: str) -> None:
    """ValueError that names the first difference unless both datasets hold the same tokens in the same order."""
    if columns[0].d_model != columns[1].d_model:
        raise ValueError(
            f"{flags[0]} has activations of width {columns[0].d_model} and {flags[1]} of width {columns[1].d_model}: "
            "a crosscoder here needs two models of one width, read at the same hook"
        )
    if len(columns[0]) != len(columns[1]):
        raise ValueError(
            f"{flags[0]} has {len(columns[0])} rows and {flags[1]} has {len(columns[1])} (split {split}): "
            "row i of both must be the same token; collect both over the same text"
        )
    for name in ("sequence", "position", "token"):
        if name in base.column_names and name in ft.column_names:
            mine, other = (part.data.table.column(name).cast("int64") for part in (base, ft))
            if not mine.equals(other):
                row = int(np.argmax(mine.to_numpy() != other.to_numpy()))
                raise ValueError(
                    f"{flags[0]} and {flags[1]} are not aligned: {name} of row {row} (split {split}) is {mine[row]} in the "
                    f"base model's and {other[row]} in the fine-tuned model's dataset; write both in the same order"
                )


def open_dataset(name: str, flag: str) -> dict:
    """A folder, file or Hub id (`id`, `id:config`, `id:config:split`) -> {"train": Dataset, perhaps "validation": Dataset}."""
    import datasets

    path = Path(name).expanduser()
    for folder in (path, path.absolute().parent):
        if flag != "--dataset" and (folder / "pair.json").is_file():
            raise ValueError(f"{flag} {name}: belongs to the paired dataset {folder}, which has its own scales; use --dataset")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError(f"{flag} {name}: no such file or folder")
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path))
        elif path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path))
        elif path.suffix == ".arrow":
            loaded = datasets.Dataset.from_file(str(path))
        elif path.exists():
            raise ValueError(f"a file of kind {path.suffix or 'without suffix'} is not read; give a folder, .parquet or .arrow")
        else:
            identifier, config, split = (name.split(":") + [None, None])[:3]
            loaded = datasets.load_dataset(identifier, config or None, split=split)
    except IndexError:  # how the library meets a folder without a single row
        raise ValueError(f"{flag} {name}: the dataset is empty") from None
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; all mean that this argument cannot be read
        reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        if file := damaged_file(path):
            raise ValueError(f"{flag}: {file} is truncated or damaged ({reason}); copy or collect it again") from None
        hub = "" if path.exists() else " (no such folder here, so it was taken for a Hub id, which needs network)"
        raise ValueError(f"{flag} {name}: cannot be opened: {reason}{hub}") from None
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    if "train" not in loaded and len(loaded) > 1:
        raise ValueError(f"{flag} {name}: has the splits {', '.join(loaded)}; choose one with {name}:CONFIG:SPLIT")
    if "train" not in loaded:
        return {"train": next(iter(loaded.values()))}
    empty = len(loaded.get("validation", ())) == 0  # a small collection may have held no sequence out
    return {"train": loaded["train"]} | ({} if empty else {"validation": loaded["validation"]})


def damaged_file(path: Path) -> Path | None:
    """The first Arrow file of a dataset's folder that cannot be read to its end."""
    import pyarrow

    for file in sorted(path.rglob("*.arrow")):
        try:
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as batches_of_rows:
                for _ in batches_of_rows:  # maps them, which reads little more than their headers
                    pass
        except (pyarrow.ArrowException, OSError):
            return file
    return None


def hub_pair_file(dataset: str) -> str | os.PathLike:
    """Local copy of the pair.json of a paired dataset on the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return hf_hub_download(dataset, "pair.json", repo_type="dataset")
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"--dataset {dataset}: its pair.json cannot be fetched ({type(error).__name__})") from None
