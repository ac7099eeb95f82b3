"""What an analysis reads: stored activations, of the run or named by the user, their texts, and the two models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crosscoder import CrossCoder
from sources.batches import gather_kept, limit_norms
from sources.dataset_files import open_dataset, open_datasets
from sources.planted import PlantedConcepts
from sources.source import Source
from sources.stored import PairedActivations, open_pair, open_single

VAL_ROWS = 2_000_000  # held-out rows at most, for data other than that of the run


class Text(NamedTuple):
    """The texts behind the rows of a paired dataset."""

    sequences: object  # Hugging Face dataset, row i holds the input_ids of sequence i
    text_of: np.ndarray  # [sequences] int32, which of `names` a sequence comes from
    names: list[str]
    rows: dict[str, tuple[np.ndarray, np.ndarray]]  # split -> sequence and position of each of its rows, int32

    def tokens(self, sequence: int) -> np.ndarray:
        """[seq] int32 token ids of a sequence."""
        return np.array(self.sequences[int(sequence)]["input_ids"], dtype=np.int32)


class Data(NamedTuple):
    """The activations to measure on, and what is known of them."""

    source: Source  # stored activations or planted concepts
    unscale: Tensor  # [n_models, 1] stored values -> raw activations
    name: str
    text: Text | None
    val_rows: int
    train_rows: int  # measured, not all that there are

    @property
    def pair(self) -> dict:
        """What the pair.json of a paired dataset says; empty for other data."""
        return self.source.pair or {}


class HookedModel(NamedTuple):
    """A language model of `collecting.language_model` and the place in it where activations are read and replaced."""

    model: object
    hook: str


def open_data(flags: dict, record: dict | None, crosscoder: CrossCoder, num_tokens: int, notes: list[str]) -> Data:
    """The activations that the flags name, the run's planted concepts where they name none. ValueError if they do not fit.

    Args:
        flags: dataset, base_dataset, ft_dataset, ... as given to analyze.py or, for the run's own data, to train.py.
        record: the run's config.json if the data is its own: then the same rows are held out.
        num_tokens: rows to measure at most, held-out ones first.
        notes: gets a sentence for what the data does not allow.
    """
    val_tokens, default_val = None, VAL_ROWS
    if record:
        # the rows of a stream were not counted beforehand, so its run held out the resolved number
        val_tokens = (record["resolved"] if flags.get("streaming") else flags).get("val_tokens")
        default_val = record["resolved"]["val_tokens"]
    rest = ((flags.get("base_column"), flags.get("ft_column")), val_tokens, default_val, 0)
    text, flag = None, "--dataset"
    if name := flags.get("dataset"):
        source = open_pair(name, *rest)
        try:
            text = open_text(name, source)
        except ValueError as error:
            notes.append(f"no examples and no patching: {error}")
    elif flags.get("base_dataset") or flags.get("model_dataset"):
        source, flag = open_unpaired(flags, record, rest), "--base-dataset"
        name = " and ".join(flags.get("model_dataset") or [flags["base_dataset"], flags["ft_dataset"]])
        notes.append("no examples and no patching: two single datasets have no texts; give a paired one with --dataset")
    else:
        source, name = PlantedConcepts(record["resolved"]["seed"], default_val), "planted concepts"
    if source.d_model != crosscoder.d_model:
        raise ValueError(
            f"{flag}: its activations have {source.d_model} values and the crosscoder takes {crosscoder.d_model}; "
            "give one that was collected at the same hook"
        )
    unscale = (1 / source.stored_scale.double()).float()[:, None].to(crosscoder.W_dec.device)
    val_rows = min(source.val_rows, num_tokens)
    train_rows = min(num_tokens - val_rows, source.train_rows or num_tokens)
    return Data(source, unscale, name, text, val_rows, train_rows)


def open_unpaired(flags: dict, record: dict | None, rest: tuple) -> PairedActivations:
    """One dataset for each model. Left out are outliers and, for the run's own data, held out are rows as in training."""
    if flags.get("model_dataset"):
        named = [("--model-dataset", name) for name in flags["model_dataset"]]
        columns, val_tokens, default_val, seed = rest
        source = PairedActivations(open_datasets(named, columns), val_tokens, default_val, seed)
    else:
        source = open_single(flags["base_dataset"], flags["ft_dataset"], *rest)
    limit_norms(source, flags["max_norm_ratio"], record and record.get("data", {}).get("median_norm"))
    if record and flags.get("streaming"):
        source.hold_out_first()
    return source


def open_text(dataset: str, source: PairedActivations) -> Text:
    """The texts of a paired dataset, a folder or a Hub id. ValueError, a sentence without a flag, where it has none."""
    folder = Path(dataset).expanduser()
    part = (lambda name: str(folder / name)) if folder.is_dir() else (lambda name: f"{dataset}:{name}")
    if folder.is_dir() and not (folder / "tokens").is_dir():
        raise ValueError(f"{dataset} has no folder tokens/")
    base, sequences = open_dataset(part("base"), "--dataset"), open_dataset(part("tokens"), "--dataset")["train"]
    rows = {}
    for split, (_, first, count) in source.splits.items():
        table = base[split if split in base else "train"].data.table
        if missing := {"sequence", "position"} - set(table.column_names):
            raise ValueError(f"{dataset} has no column {missing.pop()} beside its activations")
        # a run may have measured only the first of the held-out rows; the windows need them all
        part_of = slice(None) if "validation" in base else slice(first, first + count)
        rows[split] = tuple(table.column(name).to_numpy()[part_of] for name in ("sequence", "position"))
    if "input_ids" not in sequences.column_names or any(len(s) and s.max() >= len(sequences) for s, _ in rows.values()):
        raise ValueError(f"the tokens of {dataset} do not belong to its activations")
    text_of, names = np.zeros(len(sequences), np.int32), ["text"]
    listed = [text["source"] for text in source.pair.get("text", [])]
    if listed and "source" in sequences.column_names:
        text_of, names = sequences.data.table.column("source").to_numpy(), [Path(name).name for name in listed]
    return Text(sequences, text_of, names, rows)


# --- models: nnsight and transformers take seconds to import, and only these functions need them


def open_models(
    data: Data, *, base_model: str, ft_model: str, ft_adapter: str | None, hook: str | None, ft_hook: str | None, dtype: str,
    device: str,
) -> list[HookedModel]:  # fmt: skip
    """The base and the fine-tuned model. Arguments are the flags of these names; None: as pair.json says.

    ValueError where their activations are not as wide as those of the data.
    """
    from collecting import language_model as lm

    pair = data.pair
    hooks = {"base": hook or pair.get("hook"), "ft": ft_hook or hook or pair.get("ft_hook") or pair.get("hook")}
    if hooks["base"] is None:
        raise ValueError("--hook is missing: the dataset has no pair.json that says where it was collected")
    opened = []
    for role, name, adapter in (("base", base_model, None), ("ft", ft_model, ft_adapter)):
        flag, hook_flag = f"--{role}-model", "--ft-hook" if role == "ft" and ft_hook else "--hook"
        revision = pair.get(f"{role}_revision") if pair.get(f"{role}_model") == name else None
        model = lm.load_model(name, dtype, device, flag, revision, adapter)
        opened.append(HookedModel(model, lm.parse_hook(model, hooks[role], hook_flag)))
        if (width := lm.probe_hook(*opened[-1], hook_flag)) != data.source.d_model:
            raise ValueError(
                f"{flag}: activations at {hooks[role]} have {width} values, the crosscoder takes {data.source.d_model}; "
                "give the models and the hook that it was trained on"
            )
    return opened


def open_tokenizer(named: list[str | None], data: Data, notes: list[str]):
    """The tokenizer of one of the named models or of the dataset's. None, with a note, if none is found."""
    from collecting import language_model as lm

    for name in (*named, *(data.pair.get(key) for key in ("tokenizer", "ft_model", "base_model"))):
        if name:
            with contextlib.suppress(ValueError):
                if (tokenizer := lm.load_tokenizer(name, "--ft-model")) is not None:
                    return tokenizer
    notes.append("examples show token ids: no tokenizer of the dataset was found; name one with --base-model and --ft-model")
    return None


def texts_of_tokens(tokenizer, ids: np.ndarray) -> dict[int, str]:
    """The text of each token id, the number itself without a tokenizer."""
    if tokenizer is None:
        return {int(i): f" {i}" for i in ids}
    from collecting import language_model as lm

    return lm.token_texts(tokenizer, ids)


# --- rows


def read_normalized(crosscoder: CrossCoder, data: Data, split: str, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Those of the given rows (ascending) that training keeps, and their normalised activations [rows, n_models, d_model]."""
    source = data.source
    out = torch.empty(source.n_models, len(rows), source.d_model, dtype=source.dtype)
    kept, _ = gather_kept(source, split, rows, out)
    out = out[:, : len(kept)]
    return kept, crosscoder.normalize(out.transpose(0, 1).to(data.unscale.device).float() * data.unscale)


def normalized_rows(crosscoder: CrossCoder, data: Data, batch_size: int) -> Iterator[tuple[str, np.ndarray, Tensor]]:
    """(split, row numbers, normalised activations) of all rows to measure, held-out ones first."""
    for split, count in (("validation", data.val_rows), ("train", data.train_rows)):
        for start in range(0, count, batch_size):
            rows, x = read_normalized(crosscoder, data, split, np.arange(start, min(start + batch_size, count)))
            if len(rows):
                yield split, rows, x
