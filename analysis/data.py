"""What an analysis reads: stored activations, of the run or named by the user, their texts, and the two models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from crosscoder import CrossCoder
from ops.latents import model_names
from run.machine import progress_bar
from sources.batches import limit_norms, read_kept
from sources.dataset_files import open_dataset, open_datasets
from sources.difference import Difference
from sources.opening import named_datasets
from sources.planted import PlantedConcepts
from sources.source import Source
from sources.stored import PairedActivations

CODES_TOGETHER = 1 << 24  # entries of a matrix of codes [batch, d_hidden]; each takes 64 MB, and a few exist at once
VAL_ROWS = 2_000_000  # held-out rows at most, for data other than that of the run


class Text(NamedTuple):
    """The texts behind the rows of a paired dataset. Rows are numbered as by `normalized_rows`."""

    sequences: object  # Hugging Face dataset, row i holds the input_ids of sequence i
    text_of: np.ndarray  # [sequences] int32, which of `names` a sequence comes from
    names: list[str]
    sequence: np.ndarray  # [rows] int32, the sequence that a row comes from
    position: np.ndarray  # [rows] int32, the row's position in it
    held_out: int  # how many of these rows are held out; they come first

    def tokens(self, sequence: int) -> np.ndarray:
        """[seq] int32 token ids of a sequence."""
        return np.array(self.sequences[int(sequence)]["input_ids"], dtype=np.int32)


class Data(NamedTuple):
    """The activations to measure on, and what is known of them."""

    source: Source  # stored activations or planted concepts
    name: str
    text: Text | None
    val_rows: int  # measured, not all that there are
    train_rows: int
    order: list[int] | None = None  # of more than two models: the base model, the one that is compared with it, the others

    @property
    def pair(self) -> dict:
        """What the pair.json of a paired dataset says; empty for other data."""
        return self.source.pair or {}

    @property
    def compared(self) -> str:
        """The two models that are compared, in words; the data's name where it does not say what they are."""
        pair, name = self.pair, model_names(self.source.n_models)
        models = pair.get("models") or [pair.get("base_model"), pair.get("ft_adapter") or pair.get("ft_model")]
        if not any(models) and self.source.n_models > 2:
            models = name if len(listed := self.name.split(" and ")) != len(name) else listed
        two = [models[i] for i in (self.order or (0, 1))[:2]]
        return " and ".join(Path(one).name for one in two if one) or self.name

    @property
    def first_train(self) -> int:
        """The number of the first training row; a run may have measured only some of the held-out rows before it."""
        return self.text.held_out if self.text else self.source.val_rows


def open_data(flags, record: dict | None, crosscoder: CrossCoder, num_tokens: int, notes: list[str]) -> Data:
    """The activations that the flags name, the run's planted concepts where they name none. ValueError if they do not fit.

    Args:
        flags: TrainConfig of the run, or one that names other data.
        record: the run's config.json if the data is its own: then the same rows are held out.
        num_tokens: rows to measure at most, held-out ones first.
        notes: gets a sentence for what the data does not allow.
    """
    default_val = record["resolved"]["val_tokens"] if record else VAL_ROWS
    text, named = None, named_datasets(flags)
    if named:
        # the rows of a stream were not counted beforehand, so its run held out the resolved number
        val_tokens = default_val if flags.streaming else flags.val_tokens
        source = PairedActivations(open_datasets(named, (flags.base_column, flags.ft_column)), val_tokens, default_val, seed=0)
        if not source.pair:
            limit_norms(source, flags.max_norm_ratio, record and record.get("data", {}).get("median_norm"))
        if flags.streaming:
            source.hold_out_first()
        name = " and ".join(name for _, name in named)
        try:
            text = open_text(name, source)
        except ValueError as error:
            notes.append(f"no examples, no patching and no steering: {error}")
    else:
        source, name = PlantedConcepts(record["resolved"]["seed"], default_val), "planted concepts"
    if crosscoder.n_models == 1:
        source = Difference(source)
    if source.n_models != crosscoder.n_models:
        raise ValueError(
            f"{named[0][0] if named else '--dataset'}: its activations are of {source.n_models} models and the crosscoder of "
            f"{crosscoder.n_models} models; give one that was collected with the same"
        )
    if source.d_model != crosscoder.d_model:
        raise ValueError(
            f"{named[0][0] if named else '--dataset'}: its activations have {source.d_model} values and the crosscoder takes "
            f"{crosscoder.d_model}; give one that was collected at the same hook"
        )
    val_rows = min(source.val_rows, num_tokens)
    train_rows = min(num_tokens - val_rows, source.train_rows or num_tokens)
    return Data(source, name, text, val_rows, train_rows)


def open_text(dataset: str, source: PairedActivations) -> Text:
    """The texts of a paired dataset, a folder or a Hub id. ValueError, a sentence without a flag, where it has none."""
    if not source.pair:
        raise ValueError("two single datasets have no texts; give a paired one with --dataset")
    folder = Path(dataset).expanduser()
    if folder.is_dir() and not (folder / "tokens").is_dir():
        raise ValueError(f"{dataset} has no folder tokens/")
    prefix = f"{folder}/" if folder.is_dir() else f"{dataset}:"
    base, sequences = open_dataset(f"{prefix}base", "--dataset"), open_dataset(f"{prefix}tokens", "--dataset")["train"]
    places = []
    for split in ("validation", "train"):
        table = base[split if split in base else "train"].data.table
        if missing := {"sequence", "position"} - set(table.column_names):
            raise ValueError(f"{dataset} has no column {missing.pop()!r} beside its activations")
        # a run may have measured only the first rows of a validation split; the windows need them all
        _, first, count = source.splits[split]
        rows = slice(None) if "validation" in base else slice(first, first + count)
        places.append([table.column(name).to_numpy()[rows] for name in ("sequence", "position")])
    sequence, position = (np.concatenate(columns) for columns in zip(*places, strict=True))
    if "input_ids" not in sequences.column_names or sequence.max() >= len(sequences):
        raise ValueError(f"the tokens of {dataset} do not belong to its activations")
    text_of, names = np.zeros(len(sequences), np.int32), ["text"]
    listed = [text["source"] for text in source.pair.get("text", [])]
    if listed and "source" in sequences.column_names:
        text_of, names = sequences.data.table.column("source").to_numpy(), [Path(name).name for name in listed]
    return Text(sequences, text_of, names, sequence, position, held_out=len(places[0][0]))


def open_tokenizer(named: list[str | None], data: Data, notes: list[str]):
    """The tokenizer of one of the named models or of the dataset's. None, with a note, if none is found."""
    from collecting import language_model as lm  # takes seconds to load

    for name in (*named, *(data.pair.get(key) for key in ("tokenizer", "ft_model", "base_model"))):
        if name:
            with contextlib.suppress(ValueError):
                if (tokenizer := lm.load_tokenizer(name, "--ft-model")) is not None:
                    return tokenizer
    notes.append("examples show token ids: no tokenizer of the dataset was found; name one with --base-model and --ft-model")
    return None


def reordered(crosscoder: CrossCoder, order: list[int]) -> CrossCoder:
    """The crosscoder with its models in another order: those that an analysis compares come first."""
    tensors = {name: getattr(crosscoder, name).detach() for name in ("b_enc", "threshold")}
    tensors |= {name: getattr(crosscoder, name).detach()[order] for name in ("W_enc", "b_dec", "mean", "scale")}
    tensors["W_dec"] = crosscoder.W_dec.detach()[:, order]
    return CrossCoder.from_tensors(tensors, crosscoder.variant, crosscoder.k, crosscoder.k_aux).to(crosscoder.scale.device)


def normalized_rows(
    crosscoder: CrossCoder, data: Data, rows: np.ndarray | None = None, what: str | None = None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """(numbers of some rows, their normalised activations [batch, n_models, d_model]) of those rows that training keeps.

    A row's number counts the held-out rows first, then the training rows; a batch has rows of one kind alone. rows: numbers,
    ascending; None: all rows to measure. what: name of a progress bar.
    """
    if rows is None:
        rows = np.concatenate([np.arange(data.val_rows), data.first_train + np.arange(data.train_rows)])
    source, device = data.source, crosscoder.W_dec.device
    order = slice(None) if data.order is None else data.order
    stored_scale = source.stored_scale.float()[order, None].to(device)  # [n_models, 1]
    together = max(1, min(4096, CODES_TOGETHER // crosscoder.d_hidden))
    held_out = np.searchsorted(rows, data.first_train)
    with progress_bar(what, len(rows), disable=what is None) as bar:
        for split, first, numbers in (("validation", 0, rows[:held_out]), ("train", data.first_train, rows[held_out:])):
            for start in range(0, len(numbers), together):
                wanted = numbers[start : start + together] - first
                kept, x = read_kept(source, split, wanted)
                if len(kept):
                    yield kept + first, crosscoder.normalize(x[:, order].to(device).float() / stored_scale)
                bar.update(len(wanted))
