"""Columns of activations in Arrow tables, read without copying, and the check that two tables hold the same tokens."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

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
