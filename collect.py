"""Run a base model and its fine-tuned version over the same text and write their activations at one hook, for train.py.

    python collect.py --base-model A --ft-model B --hook model.layers.16.mlp --text web=1 --text chat=1 --output OUT

OUT/base, OUT/ft and OUT/tokens are Hugging Face datasets (load_from_disk reads them), OUT/pair.json says what they are.
A row is one token; row i of both models is the same token. Rows are shuffled within shards, held-out ones are whole
sequences. Stopped or killed, the same command goes on after the last complete shard and ends with the same rows.
"""

from __future__ import annotations

from config import CollectConfig, parse

if __name__ == "__main__":
    CONFIG = parse(CollectConfig)  # before torch is imported, so that --help and a wrong flag answer at once

import dataclasses
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

import language_model as lm
import text
from checkpoint import write_text

CALIBRATION_ROWS = 32_768  # rows that fix the outlier limit and the stored scale, before the first row is written
RECORD_BATCH_ROWS = 8192  # rows that a reader gets in one piece of memory
UNSAVED = ("output", "device", "base_device", "ft_device")  # fields that may change between start and restart


def main(config: CollectConfig) -> None:
    signal.signal(signal.SIGTERM, stop_on_sigterm)
    check_numbers(config)
    out = Path(config.output).expanduser()
    recipe = {k: v for k, v in json.loads(json.dumps(dataclasses.asdict(config))).items() if k not in UNSAVED}
    progress = read_progress(out, recipe)
    if "pair" in progress:
        print(f"{out} is complete ({progress['rows']['train']:,} training rows); train on it: python train.py --dataset {out}")
        return

    # --- models, hook, texts
    tokenizer = lm.load_paired_tokenizer(config.base_model, config.ft_model)
    sources = text.open_sources(
        config.text, tokenizer, config.seq_len, config.skip_first, config.pack, config.text_column, config.chat_template
    )
    base = lm.load_model(config.base_model, config.model_dtype, device(config, "base_device"), "--base-model")
    ft = lm.load_model(config.ft_model, config.model_dtype, device(config, "ft_device"), "--ft-model")
    base_hook = lm.parse_hook(base, config.hook, "--hook")
    ft_hook = lm.parse_hook(ft, config.ft_hook or config.hook, "--ft-hook" if config.ft_hook else "--hook")
    d_model, d_ft = lm.probe_hook(base, base_hook, "--hook"), lm.probe_hook(ft, ft_hook, "--hook")
    if d_model != d_ft:
        raise ValueError(f"--hook: base activations have {d_model} values and fine-tuned ones {d_ft}; they cannot be paired")
    for model, flag in ((base, "--base-model"), (ft, "--ft-model")):
        if config.seq_len > (lm.max_positions(model) or config.seq_len):
            raise ValueError(
                f"--seq-len {config.seq_len}: {flag} was made for {lm.max_positions(model)} positions at most; lower it"
            )
    revisions = [getattr(model._module.config, "_commit_hash", None) for model in (base, ft)]
    if progress["revisions"] not in (None, revisions):
        raise ValueError(f"--output {out}: was begun with other revisions of the models; choose another folder or delete it")

    # --- room on the disk
    row_bytes = 2 * (d_model * np.dtype(config.dtype).itemsize + 12) + 4  # 12: sequence, position, token; 4: OUT/tokens
    rows_left = config.num_tokens - sum(progress["rows"].values())
    free = shutil.disk_usage(next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())).free
    print(
        f"{rows_left:,} rows of 2 x {d_model} {config.dtype} values to write: "
        f"about {size(rows_left * row_bytes)}, {size(free)} of disk are free"
    )
    if rows_left * row_bytes > free:
        raise ValueError(
            f"--output {out}: about {size(rows_left * row_bytes)} do not fit into {size(free)} of free disk; "
            "lower --num-tokens, choose another --output" + (" or --dtype float16" if config.dtype == "float32" else "")
        )

    # --- the sequences, without those that complete shards hold
    stream = text.mix(sources)
    for _ in itertools.islice(stream, progress["sequences"]):
        pass
    batches = batched(stream, config.batch_size, start=progress["sequences"])

    def activations(batch):
        start, pairs = batch
        return lm.paired_activations(base, ft, base_hook, ft_hook, start, [tokens for tokens, _ in pairs], config.skip_first)

    # --- outlier limit and scale, from the first rows; these batches are run again below, so that none are held in memory
    if progress["stored_scale"] is None:
        head, norms, n_calibration = [], [], min(CALIBRATION_ROWS, config.num_tokens)
        while sum(map(len, norms)) < n_calibration and (batch := next(batches, None)):
            head.append(batch)
            norms.append(lm.row_norms(activations(batch)))  # [rows, 2]
        if not head:
            raise ValueError("--text: gives no text; check it and --text-column")
        norms = np.concatenate(norms)[:n_calibration]
        median, scale = lm.calibrate(norms, d_model, config.max_norm_ratio)
        batches = itertools.chain(head, batches)
        progress |= {"revisions": revisions, "median_norm": median.tolist(), "stored_scale": scale.tolist()}
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "progress.json", json.dumps(progress, indent=2) + "\n")
    median, scale = np.array(progress["median_norm"]), np.array(progress["stored_scale"])
    print(f"median norm: base {median[0]:.4g}, ft {median[1]:.4g}; rows above {config.max_norm_ratio:g} times are left out")

    # --- collect
    capacity = min(config.shard_rows + config.batch_size * config.seq_len, rows_left)
    buffer = {model: np.empty((capacity, d_model), config.dtype) for model in ("base", "ft")}  # [capacity, d_model] each
    buffer |= {column: np.empty(capacity, np.int32) for column in ("sequence", "position", "token")}  # [capacity] each
    filled, sequences = 0, []  # of the shard being made: rows, and (tokens, source) of each sequence
    left_out = progress["left_out"].copy()
    bar = tqdm(
        total=config.num_tokens,
        initial=config.num_tokens - rows_left,
        unit=" rows",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # without a terminal (a cluster's log) a line every half minute
    )
    with bar:
        while rows_left > 0 and (batch := next(batches, None)):
            rows = activations(batch)
            norms = lm.row_norms(rows)  # [rows, 2]
            good, finite = lm.survivors(norms, median, config.max_norm_ratio)
            keep = np.flatnonzero(good)[:rows_left]
            left_out["padding"] += rows.n_padding
            left_out["first_positions"] += rows.n_first
            left_out["norm"] += int((finite & ~good).sum())
            left_out["non_finite"] += int((~finite).sum())
            left_out["beyond_num_tokens"] += int(good.sum()) - len(keep)
            place = slice(filled, filled + len(keep))
            buffer["base"][place] = stored_values(rows.base, keep, scale[0], config.dtype)
            buffer["ft"][place] = stored_values(rows.ft, keep, scale[1], config.dtype)
            for column in ("sequence", "position", "token"):
                buffer[column][place] = getattr(rows, column)[keep]
            filled, rows_left = filled + len(keep), rows_left - len(keep)
            sequences += batch[1]
            bar.set_postfix_str(size((config.num_tokens - rows_left) * row_bytes), refresh=False)
            bar.update(len(keep))
            if filled >= config.shard_rows or rows_left == 0:
                write_shard(out, config, progress, {k: v[:filled] for k, v in buffer.items()}, sequences, left_out)
                filled, sequences = 0, []
        if sequences:  # the texts ran out
            write_shard(out, config, progress, {k: v[:filled] for k, v in buffer.items()}, sequences, left_out)

    # --- what was made
    if not sum(progress["rows"].values()):
        raise ValueError("--text: not one row was left to store; give more text, or lower --skip-first")
    finish_datasets(out, d_model, config.dtype, progress["shards"])
    given = [
        {"source": source.name, "weight": source.weight, "tokens": tokens, "refused": source.refused}
        for source, tokens in zip(sources, progress["source_tokens"], strict=True)
    ]
    pair = {
        **{name: recipe[name] for name in ("base_model", "ft_model", "hook", "chat_template", "pack", "seq_len")},
        **{name: recipe[name] for name in ("seed", "dtype", "skip_first", "max_norm_ratio")},
        **{name: progress[name] for name in ("revisions", "rows", "sequences", "stored_scale", "median_norm", "left_out")},
        "text": given,
        "tokenizer": tokenizer.name_or_path,
        "ft_hook": config.ft_hook or config.hook,
        "d_model": d_model,
        "shuffled": True,
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "nnsight")},
        "recipe": recipe,
    }
    write_text(out / "pair.json", json.dumps(pair, indent=2) + "\n")
    (out / "progress.json").unlink()
    print_summary(out, config, pair)


def check_numbers(config: CollectConfig) -> None:
    """ValueError, naming the flag, for a number that no run can have."""
    for name, least in (
        ("num_tokens", 1),
        ("seq_len", 2),
        ("batch_size", 1),
        ("skip_first", 0),
        ("shard_rows", 1),
        ("seed", 0),
    ):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}")
    if config.skip_first >= config.seq_len:
        raise ValueError(
            f"--skip-first {config.skip_first}: leaves nothing of sequences of --seq-len {config.seq_len}; lower it"
        )
    if config.val_tokens is not None and not 0 <= config.val_tokens < config.num_tokens:
        raise ValueError(f"--val-tokens {config.val_tokens}: must lie between 0 and --num-tokens ({config.num_tokens})")
    if not config.max_norm_ratio > 1:
        raise ValueError(f"--max-norm-ratio {config.max_norm_ratio:g}: must be above 1; inf stores rows of every norm")


def device(config: CollectConfig, field: str) -> str:
    """The device of --base-device or --ft-device, which fall back to --device. ValueError if it cannot be used."""
    flag = field if getattr(config, field) else "device"
    name = getattr(config, flag)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):  # each for its own kind of missing device
        raise ValueError(f"--{flag.replace('_', '-')} {name}: is not a device of this machine; auto chooses one") from None
    return name


def batched(stream: Iterator[tuple[int, np.ndarray]], batch_size: int, start: int) -> Iterator[tuple[int, list]]:
    """(index of the first sequence, [(tokens, source), ...]); a restart begins at a multiple, so batches stay the same."""
    while batch := [(tokens, source) for source, tokens in itertools.islice(stream, batch_size)]:
        yield start, batch
        start += len(batch)


def stored_values(x, keep: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    """Rows `keep` of the activations x [rows, d_model] (float32 tensor), scaled, as [kept, d_model] float16 or float32."""
    values = x[keep] * float(scale)
    if dtype == "float16":
        values = values.half()
        if values.isinf().any():
            raise ValueError(
                "--dtype float16: an activation is too large for it; give --dtype float32, or lower --max-norm-ratio"
            )
    return values.cpu().numpy()


# --- files


def row_features(d_model: int, dtype: str):
    """Columns of OUT/base and OUT/ft."""
    number = datasets.Value("int32")
    activation = datasets.List(datasets.Value(dtype), length=d_model)
    return datasets.Features({"activation": activation, "sequence": number, "position": number, "token": number})


def token_features():
    """Columns of OUT/tokens, whose row i is sequence i; source is an index into `text` of pair.json."""
    return datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "source": datasets.Value("int32")})


def is_held_out(sequence: int, share: float, seed: int) -> bool:
    """Whether a sequence is for validation: one of every 1/share in a row, at a random place among them."""
    # floor(i * share) numbers the stretches; a sequence on a border belongs to two
    for stretch in {int(sequence * share), int((sequence + 1) * share)}:
        if share and int((stretch + np.random.default_rng([seed, stretch]).random()) / share) == sequence:
            return True
    return False


def write_shard(out: Path, config: CollectConfig, progress: dict, rows: dict, sequences: list, left_out: dict) -> None:
    """Write the buffered rows, shuffled, and their sequences as the next shard; then count it in progress.json.

    rows: base, ft [n, d_model] and sequence, position, token [n] int32. sequences: (tokens, source) of each new one.
    A shard is not there until progress.json counts it. ValueError if the disk does not take it.
    """
    shard, first = progress["shards"], progress["sequences"]
    n_val = min(config.num_tokens // 20, 2_000_000) if config.val_tokens is None else config.val_tokens
    held_out = [is_held_out(first + i, n_val / config.num_tokens, config.seed) for i in range(len(sequences))]
    order = np.random.default_rng([config.seed, shard]).permutation(len(rows["token"]))  # the same for both models
    in_val = np.array(held_out)[rows["sequence"][order] - first]  # [n]
    splits = {"train": order[~in_val], "validation": order[in_val]}
    schema = row_features(rows["base"].shape[1], config.dtype).arrow_schema

    def record_batches(model: str, places: np.ndarray) -> Iterator:
        for start in range(0, len(places), RECORD_BATCH_ROWS):
            part = places[start : start + RECORD_BATCH_ROWS]
            values = rows[model][part]  # [<= RECORD_BATCH_ROWS, d_model]
            activation = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
            columns = [pa.array(rows[name][part]) for name in ("sequence", "position", "token")]
            yield pa.record_batch([activation, *columns], schema=schema)

    tokens_schema = token_features().arrow_schema
    ids = pa.array([tokens for tokens, _ in sequences], pa.list_(pa.int32()))
    tokens = pa.record_batch([ids, pa.array([source for _, source in sequences], pa.int32())], schema=tokens_schema)
    try:
        for split, places in splits.items():
            for model in ("base", "ft"):
                write_arrow(shard_file(out / model / split, shard), schema, record_batches(model, places))
        write_arrow(shard_file(out / "tokens", shard), tokens_schema, [tokens])
        progress["shards"] += 1
        progress["sequences"] += len(sequences)
        progress["left_out"] = left_out.copy()
        for split, places in splits.items():
            progress["rows"][split] += len(places)
        for tokens, source in sequences:
            progress["source_tokens"][source] += len(tokens)
        write_text(out / "progress.json", json.dumps(progress, indent=2) + "\n")
    except OSError as error:
        raise ValueError(
            f"--output {out}: cannot be written ({error.strerror or error}); the complete shards stay, "
            "and after mending that the same command goes on"
        ) from None


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"data-{shard:05d}.arrow"


def write_arrow(path: Path, schema, record_batches: Iterable) -> None:
    """An Arrow stream file, complete or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            for batch in record_batches:
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def finish_datasets(out: Path, d_model: int, dtype: str, n_shards: int) -> None:
    """Write the small JSON files that make the folders of shards readable by load_from_disk."""
    folders = {
        out / model / split: row_features(d_model, dtype) for model in ("base", "ft") for split in ("train", "validation")
    }
    for folder, features in {**folders, out / "tokens": token_features()}.items():
        with tempfile.TemporaryDirectory() as empty:  # the library writes them; only the list of files is ours
            datasets.Dataset.from_dict({name: [] for name in features}, features=features).save_to_disk(empty)
            state = json.loads((Path(empty) / "state.json").read_text())
            shutil.copy(Path(empty) / "dataset_info.json", folder)
        state["_data_files"] = [{"filename": shard_file(folder, shard).name} for shard in range(n_shards)]
        # it names cached results of map() and the like, so each folder needs its own
        state["_fingerprint"] = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        state["_split"] = None if folder.name == "tokens" else folder.name
        write_text(folder / "state.json", json.dumps(state, indent=2) + "\n")
    for model in ("base", "ft"):
        write_text(out / model / "dataset_dict.json", json.dumps({"splits": ["train", "validation"]}, indent=2) + "\n")


def read_progress(out: Path, recipe: dict) -> dict:
    """What is in the folder: pair.json as {"pair": ..., "rows": ...} if it is complete, else the state to go on from.

    Removes the files of an incomplete shard. ValueError if the folder holds anything else, or was made by another recipe.
    """
    fresh = {
        "recipe": recipe, "revisions": None, "median_norm": None, "stored_scale": None, "shards": 0, "sequences": 0,
        "rows": {"train": 0, "validation": 0}, "source_tokens": [0] * len(recipe["text"]),
        "left_out": {"padding": 0, "first_positions": 0, "norm": 0, "non_finite": 0, "beyond_num_tokens": 0},
    }  # fmt: skip
    if not out.exists():
        return fresh
    if not out.is_dir():
        raise ValueError(f"--output {out}: is a file; choose a folder")
    saved = next((out / name for name in ("pair.json", "progress.json") if (out / name).is_file()), None)
    if saved is None:
        if any(path.suffix != ".partial" for path in out.iterdir()):
            raise ValueError(f"--output {out}: is not empty and holds no collection; choose another folder")
        return fresh
    try:
        found = json.loads(saved.read_text())
        differs = [name for name in recipe if recipe[name] != found["recipe"].get(name)]
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"--output {out}: {saved.name} cannot be understood; choose another folder or delete it") from None
    if differs:
        was, now = (json.dumps(r.get(differs[0])) for r in (found["recipe"], recipe))
        raise ValueError(
            f"--output {out}: was begun with --{differs[0].replace('_', '-')} {was} and not {now}; "
            "repeat the command as it was, choose another folder or delete this one"
        )
    if saved.name == "pair.json":
        (out / "progress.json").unlink(missing_ok=True)
        return {"pair": found, "rows": found["rows"]}
    for path in [*out.rglob("*.partial"), *out.rglob("data-*.arrow")]:
        if path.suffix == ".partial" or int(path.stem.removeprefix("data-")) >= found["shards"]:
            path.unlink()
    return found


# --- words


def size(n_bytes: float) -> str:
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:,.1f} TB"


def print_summary(out: Path, config: CollectConfig, pair: dict) -> None:
    """What was stored, what was left out and why, and the command that comes next."""
    rows, left_out = pair["rows"], pair["left_out"]
    n_rows = sum(rows.values())
    print(f"{out}: {rows['train']:,} training and {rows['validation']:,} held-out rows of {pair['sequences']:,} sequences")
    if n_rows < config.num_tokens:
        print(f"the texts gave only {n_rows:,} of {config.num_tokens:,} rows (--num-tokens); give more with another --text")
    for source in pair["text"]:
        refused = f", the chat template refused {source['refused']:,} conversations" if source["refused"] else ""
        print(f"  {source['source']}: {source['tokens']:,} tokens{refused}")
    reasons = {
        "first_positions": f"among the first {config.skip_first} of a sequence (--skip-first)",
        "norm": f"with a norm above {config.max_norm_ratio:g} times the median (--max-norm-ratio)",
        "non_finite": "with inf or nan",
        "beyond_num_tokens": "in the last batch after --num-tokens was reached",
    }
    print("left out: " + (", ".join(f"{left_out[k]:,} {why}" for k, why in reasons.items() if left_out[k]) or "nothing"))
    if left_out["norm"] + left_out["non_finite"] > 0.01 * n_rows:
        print("more than one row in a hundred was an outlier: look at --skip-first, --max-norm-ratio and --model-dtype")
    print(f"train on it: python train.py --dataset {shlex.quote(str(out))}")


def stop_on_sigterm(*_) -> None:
    raise KeyboardInterrupt("SIGTERM")


if __name__ == "__main__":
    try:
        main(CONFIG)
    except (ValueError, OSError) as error:
        sys.exit(f"collect.py: error: {error}")
    except KeyboardInterrupt as stop:
        print("\ncollect.py: stopped; complete shards stay, and the same command goes on from there", file=sys.stderr)
        sys.exit(143 if stop.args else 130)
