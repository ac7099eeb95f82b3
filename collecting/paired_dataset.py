"""The files of a paired activation dataset: shards that are complete or absent, and where an unfinished collection goes on.

OUT/base, OUT/ft and OUT/tokens are Hugging Face datasets (load_from_disk reads them), OUT/pair.json says what they are.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from collecting.paired_rows import REASONS, Hook, PairedModels
from collecting.rows import GatheredRows, Sequence
from ops.latents import model_names
from run.machine import first_line, free_disk, size_text, whole_file, write_text

RECORD_BATCH_ROWS = 8192  # rows that a reader gets in one piece of memory
SHUFFLED_ROWS = 65_536  # rows of a shard from which on its neighbours may make a training batch
SPLITS = ("train", "validation")
SHARD_FILE = "data-{:05d}.arrow"
# Columns of OUT/tokens, whose row i is sequence i; source is an index into `text` of pair.json.
TOKEN_FEATURES = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "source": datasets.Value("int32")})
FACTS = (  # of the recipe and the progress, that pair.json holds under the same names
    "base_model", "base_revision", "ft_revision", "ft_adapter", "hook", "ft_model", "chat_template", "pack", "seq_len", "seed",
    "dtype", "skip_first", "max_norm_ratio", "fingerprints", "rows", "sequences", "stored_scale", "median_norm",
    "left_out",
)  # fmt: skip


class PairedDataset:
    """A paired dataset that is being written: `begin`, then `write_shard` of held-out and of training rows, then `finish`.

    recipe: every flag that decides the rows; a collection goes on only under the recipe that it began with. flag: that named
    the folder `out`, for errors. ValueError if the folder holds anything else, or was begun by another recipe. Files of an
    incomplete shard are removed. state: `progress` and `pair` as the process has them that saves both; this one writes shards.
    """

    def __init__(self, out: Path, recipe: dict, flag: str, state: tuple[dict, dict | None] | None = None):
        self.out, self.recipe, self.where = out, json.loads(json.dumps(recipe)), f"{flag} {out}"
        self.pair = None  # what pair.json says, once the dataset is complete
        self.saves = state is None
        if state is None:
            self.progress = self.read_progress()
        else:
            self.progress, self.pair = state

    def read_progress(self) -> dict:
        """What progress.json says, or the state of a collection that has not begun."""
        out, recipe = self.out, self.recipe
        fresh = {
            "recipe": recipe, "fingerprints": None, "median_norm": None, "stored_scale": None, "sequences": 0,
            "shards": dict.fromkeys(SPLITS, 0), "rows": dict.fromkeys(SPLITS, 0), "left_out": dict.fromkeys(REASONS, 0),
            "held_out_until": 0, "source_tokens": [0] * len(recipe["text"]), "refused": {},
        }  # fmt: skip
        if out.is_file():
            raise ValueError(f"{self.where}: is a file; choose a folder")
        saved = next((out / name for name in ("pair.json", "progress.json") if (out / name).is_file()), None)
        if saved is None:
            if out.exists() and any(path.suffix != ".partial" for path in out.iterdir()):
                raise ValueError(f"{self.where}: is not empty and holds no collection; choose another folder")
            return fresh
        try:
            found = json.loads(saved.read_text())
            differs = [name for name in recipe if recipe[name] != found["recipe"].get(name)]
            if not isinstance(found["rows"], dict) or (saved.name == "progress.json" and "fingerprints" not in found):
                raise TypeError("of an older version")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{self.where}: {saved.name} cannot be understood; choose another folder or delete it") from None
        if differs:
            was, now = (json.dumps(r.get(differs[0])) for r in (found["recipe"], recipe))
            raise ValueError(
                f"{self.where}: was begun with {differs[0].replace('_', '-')} {was} and not {now}; "
                "repeat the command as it was, choose another folder or delete this one"
            )
        if saved.name == "pair.json":
            (out / "progress.json").unlink(missing_ok=True)
            self.pair = found
            return fresh
        for path in [*out.rglob("*.partial"), *out.rglob("data-*.arrow")]:
            split = "validation" if path.parent.name == "validation" else "train"  # tokens/ grows with the training rows
            if path.suffix == ".partial" or int(path.stem.removeprefix("data-")) >= found["shards"][split]:
                path.unlink()
        return fresh | found

    def require_room(self, rows: int, widths: list[int], n_models: int = 2) -> int:
        """Bytes that a row takes at hooks of these widths together. ValueError if so many rows do not fit on the disk."""
        itemsize, d_models = np.dtype(self.recipe["dtype"]).itemsize, " + ".join(map(str, widths))
        row_bytes = sum(n_models * (d_model * itemsize + 12) + 4 for d_model in widths)  # 12: three columns; 4: tokens/
        needed, free = rows * row_bytes, free_disk(self.out)
        print(
            f"{rows:,} rows of {n_models} x {d_models if len(widths) == 1 else f'({d_models})'} {self.recipe['dtype']} values "
            f"to write: about {size_text(needed)}, {size_text(free)} of disk are free"
        )
        if needed > free:
            raise ValueError(
                f"{self.where}: about {size_text(needed)} do not fit into {size_text(free)} of free disk; lower --num-tokens, "
                "choose another folder" + (" or --dtype float16" if self.recipe["dtype"] == "float32" else "")
            )
        return row_bytes

    def begin(self, models: PairedModels, hook: Hook) -> None:
        """Write down the calibration, or compare with it where the collection has begun before."""
        found = {"median_norm": hook.median.tolist(), "stored_scale": hook.scale.tolist()}
        found["fingerprints"] = models.fingerprints
        if self.progress["stored_scale"] is None:
            self.progress |= found
            self.save_progress()
        elif any(self.progress[name] != value for name, value in found.items()):
            raise ValueError(f"{self.where}: was begun with other models or texts; choose another folder or delete it")

    def save_progress(self) -> None:
        if not self.saves:
            return
        with self.writing():
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(self.out / "progress.json", json.dumps(self.progress, indent=2) + "\n")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """ValueError, with what stays, if the disk does not take what is written inside."""
        rows = sum(self.progress["rows"].values())
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.where}: cannot be written ({error.strerror or first_line(error)}); {rows:,} rows stay in "
                "complete shards: make room, and the same command goes on"
            ) from None

    def write_shard(self, split: str, rows: GatheredRows, held_out_until: int) -> None:
        """Write the gathered rows, shuffled, as the next shard of a split, and count it in progress.json.

        With training rows go the sequences that the texts gave meanwhile. held_out_until: how far the texts were read for
        held-out rows.
        """
        self.write_files(split, self.progress["shards"][split], rows, rows.passed)
        self.count(split, [facts_of(rows, rows.passed, held_out_until)])
        self.save_progress()

    def write_files(self, split: str, shard: int, rows: GatheredRows, passed: list[Sequence]) -> None:
        """The files of a shard: rows, shuffled, and with training rows the sequences that the texts gave to get them."""
        order = np.random.default_rng([self.recipe["seed"], SPLITS.index(split), shard]).permutation(rows.n)
        values = rows.values[: rows.n].cpu().numpy()  # [rows, n_models, d_model]
        n_models, d_model = values.shape[1:]
        schema = row_features(d_model, self.recipe["dtype"]).arrow_schema

        def record_batches(model: int) -> Iterator:
            for start in range(0, rows.n, RECORD_BATCH_ROWS):
                part = order[start : start + RECORD_BATCH_ROWS]  # the same for all models
                activation = pa.FixedSizeListArray.from_arrays(pa.array(values[part, model].reshape(-1)), d_model)
                yield pa.record_batch([activation, *(pa.array(column[part]) for column in rows.columns)], schema=schema)

        with self.writing():
            for i, model in enumerate(model_names(n_models)):
                write_arrow(self.out / model / split, shard, schema, record_batches(i))
            if split == "train":
                ids = pa.array([s.tokens for s in passed], pa.list_(pa.int32()))
                sources = pa.array([s.source for s in passed], pa.int32())
                batch = pa.record_batch([ids, sources], schema=TOKEN_FEATURES.arrow_schema)
                write_arrow(self.out / "tokens", shard, batch.schema, [batch])

    def count(self, split: str, shards: list[dict]) -> None:
        """Add shards of a split, whose files are there, to the progress. shards: `facts_of` each."""
        progress = self.progress
        for facts in shards:
            progress["shards"][split] += 1
            progress["rows"][split] += facts["rows"]
            progress["sequences"] += facts["sequences"]
            for reason in REASONS:
                progress["left_out"][reason] += facts["left_out"][reason]
            for source, tokens in facts["source_tokens"].items():
                progress["source_tokens"][int(source)] += tokens
            progress["refused"] |= facts["refused"]
            progress["held_out_until"] = facts["held_out_until"]

    def finish(self, models: PairedModels, hook: Hook) -> dict:
        """Make the folders of shards readable by load_from_disk and write pair.json. Returns what it says."""
        with self.writing():
            self.write_folders(model_names(len(models.models)), hook.d_model)
            self.pair = self.summary(models, hook)
            write_text(self.out / "pair.json", json.dumps(self.pair, indent=2) + "\n")
            (self.out / "progress.json").unlink()
        return self.pair

    def write_folders(self, models: list[str], d_model: int) -> None:
        """What load_from_disk needs beside the shards."""
        shards, rows = self.progress["shards"], row_features(d_model, self.recipe["dtype"])
        folders = {self.out / model / split: (rows, shards[split]) for model in models for split in SPLITS}
        folders[self.out / "tokens"] = (TOKEN_FEATURES, shards["train"])
        for folder, (features, n_shards) in folders.items():
            if not n_shards:  # nothing was held out
                write_arrow(folder, 0, features.arrow_schema, [])
            datasets.DatasetInfo(features=features).write_to_directory(str(folder))
            state = {
                "_data_files": [{"filename": SHARD_FILE.format(shard)} for shard in range(max(1, n_shards))],
                # it names cached results of map() and the like, so each folder needs its own
                "_fingerprint": hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16],
                "_split": None if folder.name == "tokens" else folder.name,
                "_format_type": None, "_format_kwargs": {}, "_format_columns": None, "_output_all_columns": False,
            }  # fmt: skip
            write_text(folder / "state.json", json.dumps(state, indent=2) + "\n")
        for model in models:
            write_text(self.out / model / "dataset_dict.json", json.dumps({"splits": SPLITS}, indent=2) + "\n")

    def summary(self, models: PairedModels, hook: Hook) -> dict:
        """What pair.json says."""
        recipe, progress = self.recipe, self.progress
        facts = recipe | progress | {"ft_model": recipe["ft_model"] or recipe["base_model"]}
        refused = [progress["refused"].get(str(i), 0) for i in range(len(models.sources))]
        texts = zip(models.sources, progress["source_tokens"], refused, strict=True)
        return {
            **{name: facts[name] for name in FACTS},
            "text": [
                {"source": s.name, "weight": s.weight, "tokens": tokens, "refused": refused, "template_bos": s.template_bos}
                for s, tokens, refused in texts
            ],
            **({"models": recipe["model"]} if "model" in recipe else {}),
            "revisions": models.revisions,
            "tokenizer": models.tokenizer.name_or_path,
            "ft_hook": models.ft_hook or hook.name,
            "d_model": hook.d_model,
            # small shards hold few sequences each, so that reading mixes them as it does unshuffled rows
            "shuffled": progress["rows"]["train"] >= SHUFFLED_ROWS * (progress["shards"]["train"] - 1),
            "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "nnsight")},
            "recipe": recipe,
        }


def facts_of(rows: GatheredRows, passed: list[Sequence], held_out_until: int) -> dict:
    """What `PairedDataset.count` adds up of a shard, in JSON's types."""
    tokens = Counter()
    for sequence in passed:
        tokens[sequence.source] += len(sequence.tokens)
    return {
        "rows": rows.n, "sequences": len(passed), "left_out": {name: rows.left_out[name] for name in REASONS},
        "source_tokens": {str(source): n for source, n in tokens.items()},
        "refused": {str(s.source): s.refused for s in passed}, "held_out_until": held_out_until,
    }  # fmt: skip


def row_features(d_model: int, dtype: str):
    """Columns of OUT/base and OUT/ft."""
    number = datasets.Value("int32")
    activation = datasets.List(datasets.Value(dtype), length=d_model)
    return datasets.Features({"activation": activation, "sequence": number, "position": number, "token": number})


def write_arrow(folder: Path, shard: int, schema, record_batches: Iterable) -> None:
    """A shard of a dataset, as an Arrow stream: complete or not there at all."""
    path = folder / SHARD_FILE.format(shard)
    with whole_file(path) as partial, open(partial, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in record_batches:
            writer.write_batch(batch)
