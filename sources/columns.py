"""Columns of activations in Arrow tables, read without copying, and the check that two tables hold the same tokens."""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyarrow import types
from torch import Tensor

TOKENS = ("token", "token_ids", "input_ids")  # names of a column of token ids


class Column:
    """A column of float lists as zero-copy tensors, one [rows, d_model] for each Arrow chunk.

    A row is one token, or one sequence of them (lists of lists, Array2D), and then `lengths` [sequences] says of how many.
    Arrow has no bfloat16: int16 lists in a column whose name ends in `bfloat16` hold its bits. flag: that named the table;
    first_row: number of its first row; both for errors.
    """

    def __init__(self, table: pa.Table, name: str | None, flag: str, first_row: int):
        self.table, self.flag, self.first_row = table, flag, first_row
        name = pick_column(table.schema, name, flag)
        chunks, starts, sequences, self.d_model = [], [0], [], None
        for array in table.column(name).chunks:
            if len(array) == 0:
                continue
            row = first_row + starts[-1]
            try:
                array.validate()  # offsets must not point outside the buffer
            except ValueError as error:
                raise ValueError(f"{flag}: column {name!r} is damaged after row {row} ({error}); copy it again") from None
            nulls, array = array.null_count, array.storage if isinstance(array, pa.ExtensionArray) else array
            if is_list(array.type.value_type):  # sequences
                sequences.append(pc.list_value_length(array).to_numpy())
                array = array.flatten()
            values = array.flatten()
            if nulls or array.null_count or values.null_count:
                raise ValueError(
                    f"{flag}: column {name!r} has empty entries between rows {row} and {row + len(array)}; fill or drop them"
                )
            lengths = np.full(len(array), array.type.list_size) if hasattr(array.type, "list_size") else np.diff(array.offsets)
            if self.d_model is None:
                self.d_model = int(lengths[0])
            if self.d_model == 0:
                raise ValueError(f"{flag}: column {name!r} holds empty lists; every row must be one token's activation")
            if (lengths != self.d_model).any():
                at = int(np.argmax(lengths != self.d_model))
                raise ValueError(
                    f"{flag}: column {name!r} has rows of unequal width: row {row + at} has {lengths[at]} values, the first "
                    f"row {self.d_model}; every row must be one token's activation"
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the memory map is read-only, and nothing here writes to it
                x = torch.from_numpy(values.to_numpy(zero_copy_only=True).reshape(-1, self.d_model))
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

    def one_value_a_token(self, name: str) -> pa.ChunkedArray:
        """Another column of the table: one value a token, or lists of them (one a sequence)."""
        values = self.table.column(name)
        if is_list(values.type):
            lengths = pc.list_value_length(values).fill_null(0).to_numpy()
            if self.lengths is not None and not np.array_equal(self.lengths, lengths):
                raise ValueError(f"{self.flag}: {unequal(self.lengths, lengths, self.first_row, f'{name} beside it')}")
            values = pa.chunked_array([chunk.flatten() for chunk in values.chunks], type=values.type.value_type)
        if values.null_count:
            row = self.first_row + int(np.argmax(values.is_null().to_numpy()))
            raise ValueError(f"{self.flag}: column {name!r} is empty in row {row}; fill it in or drop the column")
        return values


def is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def holds_activations(field: pa.Field) -> bool:
    """Whether the rows of a column are lists of floats (tokens), or lists of such lists (sequences of tokens)."""
    kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
    if is_list(kind) and is_list(kind.value_type):
        kind = kind.value_type
    if not is_list(kind):
        return False
    bits = types.is_int16(kind.value_type) and field.name.endswith("bfloat16")
    return bits or types.is_floating(kind.value_type)


def pick_column(schema: pa.Schema, name: str | None, flag: str) -> str:
    """The column of activations: the one named, or the only one whose rows are lists of floats."""
    if flag == "--dataset":
        column_flag = "--base-column or --ft-column"
    else:
        column_flag = "--ft-column" if flag == "--ft-dataset" else "--base-column"
    lists = [field.name for field in schema if holds_activations(field)]
    if name is not None and name not in schema.names:
        raise ValueError(f"{column_flag} {name}: {flag} has no such column, it has {', '.join(schema.names)}")
    if name is not None and name not in lists:
        raise ValueError(f"{column_flag} {name}: rows are {schema.field(name).type}, not lists of floats")
    if name is None and not lists:
        kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"{flag}: no column holds lists of floats, one row a token; the columns are {kinds}")
    if name is None and len(lists) > 1:
        raise ValueError(f"{flag}: several columns hold float lists ({', '.join(lists)}); choose one with {column_flag}")
    return name or lists[0]


def aligned_columns(tables: list, names: list[str | None], flags: list[str], split: str, first_row: int = 0) -> list[Column]:
    """The activations of each model in tables of the same rows. ValueError unless all hold the same tokens in the same order.

    names: of the columns of activations, None to find them. first_row: number of the tables' first row, for errors.
    """
    columns = [Column(table, name, flag, first_row) for table, name, flag in zip(tables, names, flags, strict=True)]
    for other in columns[1:]:
        check_alignment(columns[0], other, split)
    for column in columns:
        column.table = None  # its other columns are not read again, and may lie in memory
    return columns


def check_alignment(base: Column, other: Column, split: str) -> None:
    """ValueError that names the first difference unless both hold the same tokens in the same order."""
    both = f"{base.flag} and {other.flag}"
    if base.d_model != other.d_model:
        raise ValueError(
            f"{base.flag} has activations of width {base.d_model} and {other.flag} of width {other.d_model}: "
            "a crosscoder here needs two models of one width, read at the same hook"
        )
    ours, theirs = base.lengths, other.lengths
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        raise ValueError(f"{both} are not aligned (split {split}): {unequal(ours, theirs, base.first_row)}")
    if len(base) != len(other):
        raise ValueError(
            f"{base.flag} has {len(base)} rows and {other.flag} has {len(other)} (split {split}): "
            "row i of both must be the same token; collect both over the same text"
        )
    here, there = base.table.column_names, other.table.column_names
    named = [(name, name) for name in ("sequence", "position", *TOKENS) if name in here and name in there]
    if not any(name in TOKENS for name, _ in named):  # token ids under different names
        named += [*zip([n for n in TOKENS if n in here], [n for n in TOKENS if n in there], strict=False)][:1]
    for name, other_name in named:
        a, b = base.one_value_a_token(name), other.one_value_a_token(other_name)
        if name != other_name and not len(a) == len(b) == len(base):
            continue  # one of them holds something else, such as a context for each row
        if a.type != b.type:  # a cast is a copy that grows with the dataset
            try:
                a, b = a.cast("int64"), b.cast("int64")
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise ValueError(
                    f"{base.flag} has {name} of type {a.type} and {other.flag} has {other_name} of type {b.type}, which "
                    "cannot be compared: give both whole numbers, or drop that column"
                ) from None
        if not a.equals(b):
            whose = "other" if other.flag.startswith("--model-dataset") else "fine-tuned"
            n = min(len(a), len(b))
            row = int(np.append(a[:n].to_numpy() != b[:n].to_numpy(), True).argmax())
            a, b = (values[row] if row < len(values) else "missing" for values in (a, b))
            raise ValueError(
                f"{both} are not aligned: {name} of row {base.first_row + row} (split {split}) is "
                f"{a} in the base model's and {b} in the {whose} model's dataset; write both in the same order"
            )


def unequal(lengths: np.ndarray, others: np.ndarray, first_row: int, where: str = "the other dataset") -> str:
    """The first sequence whose length differs in two lists of lengths, in words. first_row: number of its first token."""
    n = min(len(lengths), len(others))
    at = int(np.append(lengths[:n] != others[:n], True).argmax())
    a, b = (int(x[at]) if at < len(x) else "no" for x in (lengths, others))
    start = first_row + int(lengths[:at].sum())
    return f"the sequence that begins at token {start} has {a} activations and {b} in {where}; cut both alike"
