"""Read a trained crosscoder: `python analyze.py runs/NAME` writes RUN/analysis/report.html and the numbers behind it.

metrics.json       held-out metrics, class counts under several cuts, density, threshold curve, what patching gave
latents.parquet    every latent measured; the schema's metadata defines each column
examples.jsonl     a line for each latent with examples: tokens and activations
figures/           PNG and SVG
report.html        all of it on one page that needs no network
"""

from __future__ import annotations

from config import AnalyzeConfig, TrainConfig
from run.flags import parse

if __name__ == "__main__":
    CONFIG = parse(AnalyzeConfig)  # before torch is imported, so that --help and a wrong flag answer at once

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from analysis import examples as ex
from analysis import report
from analysis.measure import (
    COLUMNS,
    Data,
    choose,
    cosine_of_random_pairs,
    gather,
    latent_table,
    measure,
    normalized_rows,
    overview,
    planted_truth,
    threshold_curve,
)  # fmt: skip
from crosscoder import CrossCoder
from ops import latents
from run.machine import as_json, progress_bar, usable_device
from sources.batches import limit_norms
from sources.planted import PlantedConcepts
from sources.stored import open_pair, open_single

VAL_ROWS = 2_000_000  # held-out rows used at most, where the run does not say
HIGHEST_SHARE = 0.05  # of the live latents, those with the highest relative norm: Minder et al.'s "effective" fine-tuned-only


def main(config: AnalyzeConfig) -> None:
    check_numbers(config)
    folder, record = find_run(Path(config.run).expanduser())
    device = torch.device(usable_device(config.device, "--device"))
    crosscoder = CrossCoder.from_pretrained(folder, device)
    if crosscoder.n_models != 2:
        raise ValueError(f"{folder}: is a crosscoder of {crosscoder.n_models} models; two can be compared")
    asked = parse_latents(config.latents, crosscoder.d_hidden)
    out = Path(config.output).expanduser() if config.output else Path(config.run).expanduser() / "analysis"
    make_folder(out)
    notes: list[str] = []
    data = open_data(config, record, crosscoder, notes)
    models = open_models(config, data, device, notes) if config.base_model else None
    tokenizer = open_tokenizer(config, data, notes) if data.text else None

    # --- every latent, in one pass
    size = f"{crosscoder.d_hidden:,} latents on {data.val_rows:,} held-out and {data.train_rows:,} training rows"
    print(f"measuring {size}", flush=True)
    sums, metrics = measure(crosscoder, data)
    table = latent_table(crosscoder, sums, data)
    metrics = overview(crosscoder, table, metrics) | {"threshold_curve": threshold_curve(crosscoder, data)}
    truth = None
    if isinstance(data.source, PlantedConcepts):
        metrics["planted"], truth = planted_truth(data.source, crosscoder, table)

    # --- what some of them are active on
    chosen = choose(table, asked, config.sections_per_class, config.seed)
    found = []
    if data.text and len(chosen):
        part = ex.select(crosscoder, torch.from_numpy(chosen))
        most = np.fmax(table["max_act_train"], table["max_act_val"])[chosen]

        def read() -> Iterator:
            bar = progress_bar("examples", data.val_rows + data.train_rows)
            with bar:
                for split, rows, x in normalized_rows(crosscoder, data, 4096):
                    yield split, rows + (len(data.text.rows["validation"][0]) if split == "train" else 0), x
                    bar.update(len(x))

        kept = ex.candidates(part, read, most, ex.CANDIDATES * config.examples, config.seed)
        windows = ex.windows(kept, data.text, len(chosen), config.examples, config.context)
        found = ex.read_windows(part, lambda s, rows: gather(crosscoder, data, s, rows)[1], windows, data.text, config.context)

    # --- the models without it
    if models:
        metrics["patching"] = patch_models(config, models, crosscoder, data, table, tokenizer)

    # --- the page
    curves = training_curves(folder.parent / "metrics.jsonl") if record else []
    metrics |= {"run": str(config.run), "data": data.name, "rows_validation": data.val_rows, "rows_train": data.train_rows}
    metrics["notes"] = notes
    texts = token_texts(tokenizer, found, data)
    shown = [section(latent, part, data, texts) for latent, part in with_examples(chosen, found)]
    names = [Path(name).name for role in ("base_model", "ft_model") if (name := (data.pair or {}).get(role))]
    pair_name, text_names = " and ".join(names) or data.name, data.text.names if data.text else []
    drawn = table | {"random_cosine": cosine_of_random_pairs(crosscoder.W_dec.detach(), config.seed)}
    definitions = {name: definition(name, data) for name in table}
    with put_in_place(out) as partial:
        (partial / "metrics.json").write_text(as_json(metrics, indent=2))
        write_parquet(partial / "latents.parquet", table, data)
        (partial / "examples.jsonl").write_text("".join(as_json(one) for one in shown if one["examples"]))
        figures = report.draw_figures(partial / "figures", drawn, metrics, curves, pair_name, truth)
        page = report.render(metrics, table, definitions, text_names, figures, shown, truth, pair_name)
        (partial / "report.html").write_text(page, encoding="utf-8")
    print_summary(metrics, notes, out)


# --- what is to be read


def check_numbers(config: AnalyzeConfig) -> None:
    """ValueError, naming the flag, for what no analysis can have."""
    least = {"num_tokens": 1, "patch_tokens": 1, "model_batch_size": 1, "sections_per_class": 0, "examples": 1, "context": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {low}")
    if config.dataset and (config.base_dataset or config.ft_dataset):
        raise ValueError("--dataset names both models' activations: leave out --base-dataset and --ft-dataset")
    if config.base_model and config.ft_adapter:
        config.ft_model = config.ft_model or config.base_model
    for one, other in (("base_dataset", "ft_dataset"), ("ft_dataset", "base_dataset"), ("base_model", "ft_model"),
                       ("ft_model", "base_model"), ("hook", "base_model"), ("ft_hook", "base_model"),
                       ("ft_adapter", "base_model")):  # fmt: skip
        if getattr(config, one) and not getattr(config, other):
            raise ValueError(f"--{one.replace('_', '-')} is given without --{other.replace('_', '-')}")


def parse_latents(value: str, d_hidden: int) -> list[int]:
    """`12,99` -> [12, 99]. ValueError for what is no latent."""
    asked = []
    for part in value.replace(",", " ").split():
        if not part.isdecimal() or int(part) >= d_hidden:
            raise ValueError(f"--latents {value}: {part!r} is no latent of this crosscoder, which has 0 to {d_hidden - 1}")
        asked.append(int(part))
    return asked


def find_run(path: Path) -> tuple[Path, dict | None]:
    """The folder of the crosscoder and what config.json says of its run, None for a crosscoder alone."""
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; give a run (runs/NAME) or the folder of a saved crosscoder")
    if (path / "model.safetensors").is_file():
        return path, None
    if not (path / "crosscoder").is_dir():
        hint = "give a run (runs/NAME) or the folder of a saved crosscoder"
        if (path / "checkpoints").is_dir():
            hint = f"its training has not ended, go on with: python train.py --resume {path}"
        raise ValueError(f"{path}: holds no crosscoder; {hint}")
    try:
        record = json.loads((path / "config.json").read_text())
        record["given"]["dataset"], record["resolved"]["val_tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its config.json is missing or broken ({error!r}); analyse {path / 'crosscoder'} alone"
        ) from None
    return path / "crosscoder", record


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / ".partial", ignore_errors=True)  # of an analysis that was killed
        (out / ".partial").mkdir()  # a read-only disk lets root pass every other question
        (out / ".partial").rmdir()
    except OSError as error:
        raise ValueError(f"--output {out}: cannot be written to ({error.strerror}); choose another folder") from None


def open_data(config: AnalyzeConfig, record: dict | None, crosscoder: CrossCoder, notes: list[str]) -> Data:
    """The named activations, or those of the run. ValueError where there are none or they do not fit."""
    given, resolved = (record["given"], record["resolved"]) if record else ({}, {})
    named = config.dataset or config.base_dataset
    wanted = vars(config) if named else given
    dataset, singles = wanted.get("dataset"), (wanted.get("base_dataset"), wanted.get("ft_dataset"))
    if not named and given.get("base_model"):
        dataset = given.get("keep_activations")
        if not dataset or not (Path(dataset) / "pair.json").is_file():
            raise ValueError(
                "--dataset is missing: this run was trained live and kept no activations; collect some with collect.py from "
                "the same models and hook, and name them"
            )
    columns = (wanted.get("base_column"), wanted.get("ft_column"))
    asked = resolved if given.get("streaming") else given  # of rows that were not counted before they had passed
    rest = (columns, None, VAL_ROWS, 0) if named else (columns, asked.get("val_tokens"), resolved.get("val_tokens"), 0)
    pair = text = None
    if dataset:
        source, name = open_pair(dataset, *rest), dataset
        pair = source.pair
        try:
            text = ex.open_text(dataset, source)
        except ValueError as error:
            notes.append(f"no examples and no patching: {error}")
    elif singles[0]:
        source, name = open_single(*singles, *rest), f"{singles[0]} and {singles[1]}"
        median = None if named else record.get("data", {}).get("median_norm")  # as in training
        limit_norms(source, resolved.get("max_norm_ratio", TrainConfig.max_norm_ratio), median)
        if given.get("streaming") and not named:
            source.hold_out_first()
        notes.append("no examples and no patching: two single datasets have no texts; give a paired one with --dataset")
    elif record:
        source, name = PlantedConcepts(resolved["seed"], resolved["val_tokens"]), "planted concepts"
    else:
        raise ValueError("--dataset is missing: a crosscoder without its run does not say what it was trained on")
    if source.d_model != crosscoder.d_model:
        flag = "--base-dataset" if singles[0] else "--dataset"
        raise ValueError(
            f"{flag}: its activations have {source.d_model} values and the crosscoder takes {crosscoder.d_model}; "
            "give one that was collected at the same hook"
        )
    unscale = (1 / source.stored_scale.double()).float()[:, None].to(crosscoder.W_dec.device)
    val_rows = min(source.val_rows, config.num_tokens)
    train_rows = min(config.num_tokens - val_rows, source.train_rows or config.num_tokens)
    return Data(source, unscale, name, pair, text, val_rows, train_rows)


def open_models(config: AnalyzeConfig, data: Data, device: torch.device, notes: list[str]):
    """Both models and their hooks, or None, noted, where there is no text to run them on."""
    if data.text is None:
        return None
    from collecting import language_model as lm

    hook = config.hook or (data.pair or {}).get("hook")
    if hook is None:
        raise ValueError("--hook is missing: the dataset has no pair.json that says where it was collected")
    hooks = (hook, config.ft_hook or config.hook or data.pair.get("ft_hook", hook))
    flags = (("--base-model", config.base_model, "--hook"), ("--ft-model", config.ft_model, "--ft-hook"))
    models, found = [], []
    for (flag, name, hook_flag), one in zip(flags, hooks, strict=True):
        role = flag[2:].removesuffix("-model")  # base or ft
        revision = data.pair.get(f"{role}_revision") if data.pair and data.pair.get(f"{role}_model") == name else None
        adapter = config.ft_adapter if role == "ft" else None
        models.append(lm.load_model(name, config.model_dtype, str(device), flag, revision=revision, adapter=adapter))
        found.append(lm.parse_hook(models[-1], one, hook_flag if config.ft_hook else "--hook"))
        if (width := lm.probe_hook(models[-1], found[-1], hook_flag)) != data.source.d_model:
            raise ValueError(
                f"{flag}: activations at {one} have {width} values, the crosscoder takes {data.source.d_model}; "
                "give the models and the hook that it was trained on"
            )
    return models, found


def open_tokenizer(config: AnalyzeConfig, data: Data, notes: list[str]):
    """The tokenizer of the texts, or None, noted: then examples show token ids."""
    from collecting import language_model as lm

    pair = data.pair or {}
    for name in (config.ft_model, config.base_model, pair.get("tokenizer"), pair.get("ft_model"), pair.get("base_model")):
        if name:
            with contextlib.suppress(ValueError):
                if (tokenizer := lm.load_tokenizer(name, "--ft-model")) is not None:
                    return tokenizer
    notes.append("examples show token ids: no tokenizer of the dataset was found; name one with --base-model and --ft-model")
    return None


# --- the models without their activation


def patch_models(config: AnalyzeConfig, models, crosscoder: CrossCoder, data: Data, table: dict, tokenizer) -> dict:
    """What the models lose by the reconstruction, and what sets of latents carry over; see patching.py."""
    from analysis import patching
    from collecting.chat import answer_marker

    pair = data.pair or {}
    live, tags = ~table["dead"], table["tag"]
    ft_only = np.flatnonzero(live & (tags == "ft_only"))
    shared = np.flatnonzero(live & (tags == "shared"))
    by_norm = np.flatnonzero(live)[np.argsort(-table["relative_norm"][live])]
    sets = {
        "ft_only": ft_only,
        "ft_only_by_both": np.flatnonzero(live & (tags == "ft_only") & (table["tag_scaling"] == "ft_only")),
        "highest_relative_norm": by_norm[: max(1, round(HIGHEST_SHARE * len(by_norm)))],
        "as_many_shared": np.random.default_rng(config.seed).permutation(shared)[: len(ft_only)],
        "all": np.arange(crosscoder.d_hidden),
    }
    sets = {name: torch.from_numpy(np.sort(found)).to(crosscoder.W_dec.device) for name, found in sets.items()}
    skip_first, ratio = pair.get("skip_first", 1), pair.get("max_norm_ratio", float("inf"))
    rule = patching.Rule(skip_first, tuple(ratio * m for m in pair.get("median_norm", (float("inf"),) * 2)))
    sequences = list(patching.take_sequences(data.text, data.text.rows, config.patch_tokens))
    marker = answer_marker(tokenizer) if tokenizer is not None and pair.get("chat_template") else None
    first, first_rule = patching.first_tokens(sequences, marker, skip_first)
    total = sum(map(len, sequences))
    with progress_bar("patching", total) as bar:
        result = patching.measure(*models, crosscoder, sequences, first, rule, sets, config.model_batch_size, bar)
    result["rule"] = (
        f"Replaced are the activations that the dataset holds: the first {skip_first} positions of a sequence and activations "
        f"above {ratio:g} times the median norm stay as the model computes them. Losses are means over the predictions made "
        f"from position {skip_first} on, in nats. 'first' are {first_rule}."
    )
    return result


# --- what is written


def with_examples(chosen: np.ndarray, found: list[ex.Example]) -> Iterator[tuple[int, list[ex.Example]]]:
    grouped = ex.by_latent(found)
    for place, latent in enumerate(chosen.tolist()):
        yield latent, grouped.get(place, [])


def token_texts(tokenizer, found: list[ex.Example], data: Data) -> dict[int, str]:
    ids = np.unique(np.concatenate([e.tokens for e in found])) if found else np.empty(0, np.int32)
    if tokenizer is None:
        return {int(i): f" {i}" for i in ids}
    from collecting import language_model as lm

    return lm.token_texts(tokenizer, ids)


def section(latent: int, found: list[ex.Example], data: Data, texts: dict[int, str]) -> dict:
    """One latent's examples as they are written: token texts, and activations with three digits, null where not stored."""
    return {
        "latent": latent,
        "examples": [
            {
                "range": ex.RANGE_NAMES[e.window.kind],
                "text": data.text.names[data.text.text_of[e.window.sequence]],
                "sequence": e.window.sequence,
                "position": e.window.peak,
                "peak": e.window.peak - e.window.start,
                "tokens": [texts[int(t)] for t in e.tokens],
                "values": [None if np.isnan(v) else float(f"{v:.3g}") for v in e.values],
            }
            for e in found
        ],
    }


def definition(column: str, data: Data) -> str:
    if column.startswith("freq_text_"):
        return f"share of the tokens of {data.text.names[int(column.rpartition('_')[2])]} at which the latent is active"
    if column.startswith("mean_text_"):
        return f"mean activation over all tokens of {data.text.names[int(column.rpartition('_')[2])]}, zeros included"
    return COLUMNS[column]


@contextlib.contextmanager
def put_in_place(out: Path) -> Iterator[Path]:
    """A folder inside `out` for the files of an analysis, which take their places when all are there: the page goes first
    and comes last, so that where there is one, all is of one analysis. ValueError where they cannot be written."""
    partial = out / ".partial"
    try:
        (partial / "figures").mkdir(parents=True)
        yield partial
        (out / "report.html").unlink(missing_ok=True)
        for name in report.FIGURES:  # an earlier analysis may have had more of them
            for suffix in (".png", ".svg"):
                (out / "figures" / f"{name}{suffix}").unlink(missing_ok=True)
        (out / "figures").mkdir(exist_ok=True)
        for path in sorted(partial.glob("*.*")) + sorted(partial.glob("figures/*")):
            if path.name != "report.html":
                os.replace(path, out / path.relative_to(partial))
        os.replace(partial / "report.html", out / "report.html")
    except OSError as error:
        raise ValueError(
            f"--output {out}: the analysis cannot be written there ({error.strerror or error}); make room, or choose another"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_parquet(path: Path, table: dict[str, np.ndarray], data: Data) -> None:
    """One row a latent; each field, and the key `definitions` of the schema, say what the columns are."""
    arrays = [pa.array(column) for column in table.values()]
    definitions = {name: definition(name, data) for name in table}
    fields = [
        pa.field(name, array.type, metadata={"definition": definitions[name]})
        for name, array in zip(table, arrays, strict=True)
    ]
    schema = pa.schema(fields, metadata={"definitions": json.dumps(definitions), "data": data.name})
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)


def training_curves(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []


def print_summary(metrics: dict, notes: list[str], out: Path) -> None:
    print(
        f"held out   explained variance {metrics['explained_variance']:.3f} (base {metrics['explained_variance_A']:.3f}, "
        f"ft {metrics['explained_variance_B']:.3f}), L0 {metrics['l0_loss']:.1f}, {metrics['rows_validation']:,} rows"
    )
    for name, how in (("latents", "by norm"), ("latents_by_scaling", "scaling"), ("latents_by_both", "both")):
        counts = metrics[name]
        dead = f", {counts['dead']} dead" if "dead" in counts else ""
        print(f"{how:<11}{counts['base_only']} base-only, {counts['shared']} shared, {counts['ft_only']} ft-only{dead}")
    if patching := metrics.get("patching"):
        for name in ("base", "ft"):
            one = {key: value["all"] for key, value in patching[name].items()}
            print(
                f"{name:<11}loss intact {one['loss_intact']:.3f}, reconstruction {one['loss_reconstruction']:.3f}, "
                f"zero {one['loss_zero']:.3f}: recovered {one['loss_recovered']:.3f}"
            )
        for name, one in patching["diffing"]["base model"].items():
            if name != "before":
                before = patching["diffing"]["base model"]["before"]["all"]
                print(f"diffing    base + {name} ({one['latents']}): KL to ft {before:.4f} -> {one['kl']['all']:.4f}")
    if planted := metrics.get("planted"):
        for how, score in planted.items():
            found = ", ".join(f"{kind} {score[f'recall_{kind}'] * score[f'class_ok_{kind}']:.2f}" for kind in latents.CLASSES)
            print(
                f"planted    found with the right class {how.replace('_', ' ')}: {found}; false {score['false_exclusive']:.2f}"
            )
    for note in notes:
        print(f"note       {note}")
    print(f"saved      {out / 'report.html'}, metrics.json, latents.parquet, figures")


def stop_on_sigterm(*_) -> None:
    raise KeyboardInterrupt("SIGTERM")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_on_sigterm)
    try:
        main(CONFIG)
    except (ValueError, OSError) as error:
        sys.exit(f"analyze.py: error: {error}")
    except KeyboardInterrupt as stop:
        print("\nanalyze.py: stopped; run it again from the beginning", file=sys.stderr)
        sys.exit(143 if stop.args else 130)
