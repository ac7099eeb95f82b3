"""Stored activations: paired datasets opened, checked to hold the same tokens, and read zero-copy from their Arrow buffers."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sources.batches import read_ahead
from sources.source import Batch, Source

CHUNK = 1024  # rows that are read together: a few megabytes from one place of the disk
BLOCK = 64 * CHUNK  # rows within which data that is not yet shuffled is mixed
TOKENS = ("token", "token_ids", "input_ids")  # names of a column of token ids


class Column:
    """A column of float lists as zero-copy tensors, one [rows, d_model] for each Arrow chunk.

    A row is one token, or one sequence of them (lists of lists, Array2D), and then `lengths` [sequences] says of how many.
    Arrow has no bfloat16: int16 lists in a column whose name ends in `bfloat16` hold its bits. first_row: number of the
    table's first row, for errors.
    """

    def __init__(self, table, name: str | None, flag: str, first_row: int = 0):
        import pyarrow as pa
        import pyarrow.compute as pc

        name = pick_column(table.schema, name, flag)
        chunks, starts, sequences, self.d_model = [], [0], [], None
        for array in table.column(name).chunks:
            if len(array) == 0:
                continue
            try:
                array.validate()  # hostile offsets must not point outside the buffer
            except ValueError as error:
                raise ValueError(
                    f"{flag}: column {name!r} is damaged after row {first_row + starts[-1]} ({error}); copy it again"
                ) from None
            nulls, array = array.null_count, array.storage if isinstance(array, pa.ExtensionArray) else array
            if is_list(array.type.value_type):  # sequences
                sequences.append(pc.list_value_length(array).to_numpy())
                array = array.flatten()
            values = array.flatten()
            if nulls or array.null_count or values.null_count:
                low, high = first_row + starts[-1], first_row + starts[-1] + len(array)
                raise ValueError(f"{flag}: column {name!r} has empty entries between rows {low} and {high}; fill or drop them")
            lengths = np.full(len(array), array.type.list_size) if hasattr(array.type, "list_size") else np.diff(array.offsets)
            if self.d_model is None:
                self.d_model = int(lengths[0])
            if self.d_model == 0:
                raise ValueError(f"{flag}: column {name!r} holds empty lists; every row must be one token's activation")
            if (lengths != self.d_model).any():
                row = int(np.argmax(lengths != self.d_model))
                raise ValueError(
                    f"{flag}: column {name!r} has rows of unequal width: row {first_row + starts[-1] + row} has {lengths[row]} "
                    f"values, the first row {self.d_model}; every row must be one token's activation"
                )
            numbers = values.to_numpy(zero_copy_only=True).reshape(-1, self.d_model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the memory map is read-only, and nothing here writes to it
                x = torch.from_numpy(numbers)
                chunks.append(x.view(torch.bfloat16) if x.dtype == torch.int16 else x)
            starts.append(starts[-1] + len(array))
        if not chunks:
            raise ValueError(f"{flag}: the dataset is empty")
        self.chunks, self.starts, self.dtype = chunks, np.array(starts), chunks[0].dtype
        self.lengths = np.concatenate(sequences) if sequences else None

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
            elif out.dtype == self.dtype:
                torch.index_select(self.chunks[i], 0, torch.from_numpy(local), out=out[low:high])
            else:
                out[low:high] = self.chunks[i][torch.from_numpy(local)]


def is_list(kind) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def pick_column(schema, name: str | None, flag: str) -> str:
    """The column of activations: the one named, or the only one whose rows are lists of floats."""
    import pyarrow as pa
    from pyarrow import types

    def holds_activations(field) -> bool:
        kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
        for _ in range(2):  # tokens, or sequences of tokens
            if is_list(kind) and not (is_list(kind.value_type)):
                bits = types.is_int16(kind.value_type) and field.name.endswith("bfloat16")
                return bits or types.is_floating(kind.value_type)
            kind = kind.value_type if is_list(kind) else kind
        return False

    column_flag = flag.replace("dataset", "column") if flag != "--dataset" else "--base-column or --ft-column"
    column_flag = "--base-column" if flag.startswith("--model-dataset") else column_flag
    lists = [f.name for f in schema if holds_activations(f)]
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


def check_alignment(base, ft, columns: list[Column], flags, split: str, first_row: int = 0) -> None:
    """ValueError that names the first difference unless two tables hold the same tokens in the same order.

    first_row: number of their first row, for errors.
    """
    import pyarrow as pa

    if columns[0].d_model != columns[1].d_model:
        raise ValueError(
            f"{flags[0]} has activations of width {columns[0].d_model} and {flags[1]} of width {columns[1].d_model}: "
            "a crosscoder here needs two models of one width, read at the same hook"
        )
    ours, theirs = columns[0].lengths, columns[1].lengths
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        raise ValueError(f"{flags[0]} and {flags[1]} are not aligned (split {split}): {unequal(ours, theirs, first_row)}")
    if len(columns[0]) != len(columns[1]):
        raise ValueError(
            f"{flags[0]} has {len(columns[0])} rows and {flags[1]} has {len(columns[1])} (split {split}): "
            "row i of both must be the same token; collect both over the same text"
        )
    named = [[name for name in TOKENS if name in table.column_names] for table in (base, ft)]
    same = [name for name in ("sequence", "position", *TOKENS) if name in base.column_names and name in ft.column_names]
    pairs = [(name, name) for name in same] + ([] if set(same) & set(TOKENS) else list(zip(*named, strict=False))[:1])
    for names in pairs:
        four = zip((base, ft), names, columns, flags, strict=True)
        mine, other = (flat(table, name, column, flag, first_row) for table, name, column, flag in four)
        if names[0] != names[1] and not len(mine) == len(other) == len(columns[0]):
            continue  # one of them holds something else, such as a context for each row
        if mine.type != other.type:  # a cast is a copy that grows with the dataset
            try:
                mine, other = mine.cast("int64"), other.cast("int64")
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise ValueError(
                    f"{flags[0]} has {names[0]} of type {mine.type} and {flags[1]} has {names[1]} of type {other.type}, which "
                    "cannot be compared: give both whole numbers, or drop that column"
                ) from None
        if not mine.equals(other):
            whose = "other" if flags[1].startswith("--model-dataset") else "fine-tuned"
            n = min(len(mine), len(other))
            differs = np.flatnonzero(mine[:n].to_numpy() != other[:n].to_numpy())
            row = int(differs[0]) if len(differs) else n
            a, b = (values[row] if row < len(values) else "missing" for values in (mine, other))
            raise ValueError(
                f"{flags[0]} and {flags[1]} are not aligned: {names[0]} of row {first_row + row} (split {split}) is "
                f"{a} in the base model's and {b} in the {whose} model's dataset; write both in the same order"
            )


def flat(table, name: str, column: Column, flag: str, first_row: int):
    """A column of one value a token, or of lists of them (one a sequence), as one value a token without gaps."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = table.column(name)
    if is_list(values.type):
        lengths = pc.list_value_length(values).fill_null(0).to_numpy()
        if column.lengths is not None and not np.array_equal(column.lengths, lengths):
            raise ValueError(f"{flag}: {unequal(column.lengths, lengths, first_row, f'{name} beside it')}")
        values = pa.chunked_array([chunk.flatten() for chunk in values.chunks], type=values.type.value_type)
    if values.null_count:
        row = first_row + int(np.argmax(values.is_null().to_numpy()))
        raise ValueError(f"{flag}: column {name!r} is empty in row {row}; fill it in or drop the column")
    return values


def unequal(lengths: np.ndarray, others: np.ndarray, first_row: int, where: str = "the other dataset") -> str:
    """The first sequence whose length differs in two lists of lengths, in words. first_row: number of its first token."""
    n = min(len(lengths), len(others))
    at = int(np.append(lengths[:n] != others[:n], True).argmax())
    a, b = (int(x[at]) if at < len(x) else "no" for x in (lengths, others))
    start = first_row + int(lengths[:at].sum())
    return f"the sequence that begins at token {start} has {a} activations and {b} in {where}; cut both alike"


def open_dataset(name: str, flag: str, streaming: bool = False, revision: str | None = None) -> dict:
    """A folder, file or Hub id (`id`, `id:config`, `id:config:split`) -> {"train": Dataset, perhaps "validation": Dataset}.

    A folder may also be a memmap cache of crosscoder_learning. With `streaming` an IterableDataset each; a folder then holds
    .parquet files. revision: commit of a dataset on the Hub, None: its newest.
    """
    import datasets

    path = Path(name).expanduser()
    for folder in (path, path.absolute().parent):
        if flag != "--dataset" and (folder / "pair.json").is_file():
            raise ValueError(f"{flag} {name}: belongs to the paired dataset {folder}, which has its own scales; use --dataset")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError(f"{flag} {name}: no such file or folder")
    if streaming and path.exists() and path.suffix != ".parquet" and not any(path.glob("**/*.parquet")):
        raise ValueError(f"{flag} {name}: lies on this disk, where it is read in place; leave out --streaming")
    if (path / "shard_0.memmap").is_file():
        return {"train": open_memmaps(path, f"{flag} {name}")}
    if hooks := sorted(file.parent.name for file in path.glob("*/shard_0.memmap")):
        raise ValueError(f"{flag} {name}: holds the activation caches {', '.join(hooks)}; give the folder of one")
    if not datasets.config.HF_HUB_OFFLINE:
        hub_commit(name, flag)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path), streaming=streaming)
        elif path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path), streaming=streaming)
        elif path.suffix == ".arrow":
            loaded = datasets.Dataset.from_file(str(path))
        elif path.exists():
            raise ValueError(f"a file of kind {path.suffix or 'without suffix'} is not read; give a folder, .parquet or .arrow")
        else:
            identifier, config, split = (name.split(":") + [None, None])[:3]
            loaded = datasets.load_dataset(identifier, config or None, split=split, streaming=streaming, revision=revision)
    except IndexError:  # how the library meets a folder without a single row
        whole = (path / "state.json").is_file()
        what = "the dataset is empty" if whole else "a split of it is empty; leave that one out when you save it"
        raise ValueError(f"{flag} {name}: {what}") from None
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; all mean that this argument cannot be read
        reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        if file := damaged_file(path):
            raise ValueError(f"{flag}: {file} is truncated or damaged ({reason}); copy or collect it again") from None
        hub = "" if path.exists() else " (no such folder here, so it was taken for a Hub id, which needs network)"
        raise ValueError(f"{flag} {name}: cannot be opened: {reason}{hub}") from None
    if not isinstance(loaded, dict):  # of splits
        return {"train": loaded}
    if "train" not in loaded and len(loaded) > 1:
        raise ValueError(f"{flag} {name}: has the splits {', '.join(loaded)}; choose one with {name}:CONFIG:SPLIT")
    if "train" not in loaded:
        return {"train": next(iter(loaded.values()))}
    empty = next(iter(loaded.get("validation", ())), None) is None  # a small collection may have held no sequence out
    return {"train": loaded["train"]} | ({} if empty else {"validation": loaded["validation"]})


def open_memmaps(folder: Path, source: str):
    """The activation cache of one hook that crosscoder_learning wrote, as a Dataset that maps its files.

    folder: config.json, shard_i.memmap (rows of d_model values, C order) and shard_i.meta; tokens.pt, where it was stored,
    lies one folder up.
    """
    import datasets
    import pyarrow as pa

    kinds = {"torch.float32": pa.float32(), "torch.float16": pa.float16(), "torch.bfloat16": pa.int16()}
    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("shuffle_shards"):
            raise ValueError("its rows were shuffled in an order that is not stored; collect with shuffle_shards=False")
        chunks = []
        for shard in range(config["shard_count"]):
            meta = json.loads((folder / f"shard_{shard}.meta").read_text())
            (rows, d_model), dtype = meta["shape"], meta.get("dtype", "torch.float32")
            if dtype not in kinds:
                raise ValueError(f"shard_{shard} is of {dtype}; read are {', '.join(kinds)}")
            file = np.memmap(folder / f"shard_{shard}.memmap", dtype=np.uint8, mode="r")
            if len(file) != rows * d_model * kinds[dtype].bit_width // 8:
                raise ValueError(f"shard_{shard}.memmap has {len(file)} bytes, not {rows} x {d_model} values; copy it again")
            values = pa.Array.from_buffers(kinds[dtype], rows * d_model, [None, pa.py_buffer(file)])
            chunks.append(pa.FixedSizeListArray.from_arrays(values, d_model))
        columns = {"activation_bfloat16" if dtype == "torch.bfloat16" else "activation": pa.chunked_array(chunks)}
        if config.get("store_tokens"):
            file = next(f / "tokens.pt" for f in (folder.parent, folder) if (f / "tokens.pt").is_file())
            columns["token"] = pa.array(torch.load(file, map_location="cpu", weights_only=True).numpy())
        table = datasets.table.InMemoryTable(pa.table(columns))
    except StopIteration:
        raise ValueError(f"{source}: its tokens.pt is missing beside the folder; copy it too") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source}: the activation cache cannot be read: {error}") from None
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return datasets.Dataset(table, fingerprint=name)  # without one it would hash every row


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


def hub_commit(name: str, flag: str) -> str | None:
    """The newest commit of a dataset on the Hub, which is asked once. None for files here and where it does not answer.

    In the latter case the datasets library looks into its cache alone from then on, instead of asking five times more.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if Path(name).expanduser().exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        return None
    try:
        return HfApi().dataset_info(name.split(":")[0], timeout=10).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{flag} {name}: is no file or folder here, and the Hub does not give it ({reason})") from None
    except Exception:  # noqa: BLE001 - a broken connection has the names of the Hub's HTTP library
        datasets.config.HF_HUB_OFFLINE = True
        return None
