"""Read a trained crosscoder: `python analyze.py runs/NAME` writes RUN/analysis/report.html and the numbers behind it.

metrics.json       held-out metrics, class counts under several cuts, density, threshold curve, what patching gave
latents.parquet    every latent measured and ranked; the schema's metadata defines each column
examples.jsonl     a line for each latent with examples: tokens and activations
steering.jsonl     a line for each latent, model and factor that was steered with: effects and answers, beside random latents
difference.safetensors   the directions of metrics.json's `difference`: means and components, raw activations
figures/           PNG and SVG
findings.json      the ranked changes with scores, errors, examples, the null and this command; findings.md: one screen of it
report.html        all of it on one page that needs no network
label_cache.jsonl  with --label-url: the endpoint's answers, which are not asked for twice
export/            with --export: files for other tools

Of more than two models each is compared with the base: all of that in analysis/ft, analysis/C, ..., which report.html links.
"""

from __future__ import annotations

from config import AnalyzeConfig, DatasetFlags, TrainConfig
from run.flags import parse

if __name__ == "__main__":
    CONFIG = parse(AnalyzeConfig)  # before torch is imported, so that --help and a wrong flag answer at once

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from analysis import difference, endpoint, exports, findings, labels, measure, one_model, ranking, report
from analysis.data import Data, open_data, open_tokenizer, reordered
from analysis.examples import find_examples
from analysis.files import put_in_place, require_writable, write_parquet
from collecting.chat import read_prompts
from crosscoder import CrossCoder
from ops import latents
from ops.latents import model_names
from run.machine import as_json, run_entry, say, usable_device, working, write_text
from sources.planted import PlantedConcepts


def main(config: AnalyzeConfig) -> None:
    if config.base_model and config.ft_adapter and not config.ft_model:  # the adapter was trained on the base model
        config = dataclasses.replace(config, ft_model=config.base_model)
    check_numbers(config)
    endpoint.check(config.label_url, config.label_model)
    folder, record = find_run(Path(config.run).expanduser())
    device = torch.device(usable_device(config.device, "--device"))
    with working("opening the crosscoder and the activations"):
        crosscoder = CrossCoder.from_pretrained(folder, device)
    if crosscoder.n_models > 2 and config.base_model:
        raise ValueError(f"--base-model: models run for crosscoders of two, this one is of {crosscoder.n_models}; leave it out")
    asked = parse_latents("--latents", config.latents, crosscoder.d_hidden)
    wanted = check_steering(config, crosscoder.d_hidden)
    out = Path(config.output).expanduser() if config.output else Path(config.run).expanduser() / "analysis"
    require_writable(out)
    notes: list[str] = []
    data = open_data(*data_flags(config, record), crosscoder, config.num_tokens, notes)
    models = tokenizer = None
    if data.text:
        tokenizer = open_tokenizer([config.ft_model, config.base_model], data, notes)
    exports.check(config.export, data)
    labeller = labels.open_labeller(config.label_url, config.label_model, out, data, tokenizer)
    if data.text and config.base_model:
        with working("loading the models"):
            from analysis import patching  # loads nnsight and transformers

            models = patching.open_models(data, vars(config), str(device))

    if crosscoder.n_models == 1:
        return analyze_difference(config, crosscoder, data, models, tokenizer, labeller, asked, wanted, out, notes)
    if crosscoder.n_models == 2:
        analyze_pair(config, crosscoder, data, models, tokenizer, labeller, asked, wanted, out, notes)
        return
    notes.append(f"the crosscoder is of {crosscoder.n_models} models: its codes are those of all, no models were run")
    pages = {}
    for m, name in enumerate(model_names(crosscoder.n_models)[1:], start=1):
        order = [0, m, *(i for i in range(1, crosscoder.n_models) if i != m)]
        require_writable(out / name)
        one, rows = reordered(crosscoder, order), data._replace(order=order)
        pages[name] = analyze_pair(config, one, rows, None, tokenizer, labeller, asked, wanted, out / name, list(notes))
    write_text(out / "report.html", report.render_index(pages))
    print(f"\nsaved      {out / 'report.html'}: the pages of {', '.join(pages)}, each against the base model\n{open_page(out)}")


def analyze_pair(  # noqa: PLR0913 - what `main` has opened
    config: AnalyzeConfig, crosscoder: CrossCoder, data: Data, models, tokenizer, labeller, asked: list[int], wanted,
    out: Path, notes: list[str],
) -> dict:  # fmt: skip
    """Compare the first two models of a crosscoder. Returns what findings.json says."""
    # --- every latent, in one pass
    say(f"measuring {crosscoder.d_hidden:,} latents on {data.val_rows:,} held-out and {data.train_rows:,} training rows")
    without = difference.open_sums(data)
    sums, metrics, blocks = measure.measure_latents(crosscoder, data, without)
    ranked = ranking.rank_latents(blocks, crosscoder.W_dec.detach()[:, :2])
    table = measure.latent_table(crosscoder, sums, ranked, data)
    metrics = measure.overview(crosscoder, table, metrics) | {"threshold_curve": measure.threshold_curve(crosscoder, data)}
    truth = None
    if isinstance(data.source, PlantedConcepts):
        metrics["planted"], truth = measure.planted_truth(data.source, crosscoder, table)

    # --- what some of them are active on
    lens, vectors = difference.lens_models(models, data.source.d_model, notes), {}
    chosen = measure.choose(table, asked, config.sections_per_class, config.seed)
    sections = describe_latents(config, crosscoder, data, table, chosen, lens, tokenizer)

    # --- what is seen without a dictionary
    if without:
        device = crosscoder.scale.device
        metrics["difference"], vectors = difference.describe(without, data, device, lens, tokenizer, config.seed)
    metrics |= labels.add_labels(labeller, sections, crosscoder, data, tokenizer, config.context, config.seed, notes)
    table |= labels.columns(sections, crosscoder.d_hidden)

    # --- what replacing the activation does to the models
    if models:
        from analysis import patching  # loads nnsight and transformers

        sets = patching.choose_sets(table, config.seed)
        tokens = config.patch_tokens or patching.usual_tokens(models)
        metrics["patching"] = patching.patch_models(
            models, crosscoder, data, sets, tokenizer, tokens=tokens, batch_size=config.model_batch_size
        )
    metrics, steered = steer(config, wanted, metrics, models, crosscoder, data, table, tokenizer, notes)

    # --- the files
    curves = training_curves(Path(config.run).expanduser() / "metrics.jsonl")
    metrics |= {"run": str(config.run), "data": data.name, "rows_validation": data.val_rows, "rows_train": data.train_rows}
    metrics["notes"] = notes
    pair_name, text_names = data.compared, data.text.names if data.text else []
    drawn = table | {"random_cosine": measure.cosine_of_random_pairs(crosscoder.W_dec.detach(), config.seed)}
    definitions = measure.define(table, text_names)
    command = shlex.join(["python", *sys.argv])
    found = findings.find(table, ranked.null, metrics, sections, text_names, pair_name, command)
    with put_in_place(out) as partial:
        write_numbers(partial, data.name, metrics, table, definitions, vectors, sections, steered)
        (partial / "findings.json").write_text(as_json(found, indent=2))
        (partial / "findings.md").write_text(findings.as_markdown(found), encoding="utf-8")
        shown = {"pair": pair_name, "truth": truth}
        figures = report.draw_figures(partial / "figures", drawn, metrics, curves=curves, **shown)
        page = report.render(
            metrics, table, definitions, found, text_names, figures=figures, sections=sections, steered=steered, **shown
        )
        (partial / "report.html").write_text(page, encoding="utf-8")
    exports.write(config.export, out, crosscoder, data, sections, table, config.run, config.num_tokens)
    print_summary(metrics, notes, out)
    print(f"\n{findings.as_markdown(found)}\n{open_page(out)}")
    return found


def analyze_difference(  # noqa: PLR0913 - what `main` has opened
    config: AnalyzeConfig, crosscoder: CrossCoder, data: Data, models, tokenizer, labeller, asked: list[int], wanted, out: Path,
    notes: list[str],
) -> None:  # fmt: skip
    """The same for a dictionary that was trained with --difference, without what needs two decoder rows a latent."""
    notes.append("a dictionary of the difference has no classes, no latent scaling and no patching")
    say(f"measuring {crosscoder.d_hidden:,} latents on {data.val_rows:,} held-out and {data.train_rows:,} training rows")
    without = difference.open_sums(data)
    sums, metrics, _ = measure.measure_latents(crosscoder, data, without)
    table = one_model.latent_table(crosscoder, sums, without)
    metrics = one_model.overview(crosscoder, table, metrics)
    lens = difference.lens_models(models, data.source.d_model, notes)
    chosen = one_model.choose(table, asked, 3 * config.sections_per_class)
    sections = describe_latents(config, crosscoder, data, table, chosen, lens, tokenizer)
    metrics["difference"], vectors = difference.describe(without, data, crosscoder.scale.device, lens, tokenizer, config.seed)
    metrics |= labels.add_labels(labeller, sections, crosscoder, data, tokenizer, config.context, config.seed, notes)
    table |= labels.columns(sections, crosscoder.d_hidden)
    metrics, steered = steer(config, wanted, metrics, models, crosscoder, data, table, tokenizer, notes)
    metrics |= {"run": str(config.run), "data": data.name, "rows_validation": data.val_rows, "rows_train": data.train_rows}
    metrics["notes"] = notes
    with put_in_place(out) as partial:
        definitions = {name: (one_model.COLUMNS | labels.COLUMNS)[name] for name in table}
        write_numbers(partial, data.name, metrics, table, definitions, vectors, sections, steered)
        page = one_model.render(metrics, table, sections, data.compared, steered)
        (partial / "report.html").write_text(page, encoding="utf-8")
    exports.write(config.export, out, crosscoder, data, sections, table, config.run, config.num_tokens)
    print(f"held out   explained variance of the difference {metrics['explained_variance']:.3f}, L0 {metrics['l0_loss']:.1f}")
    best = np.argsort(table["rank"])[:5]
    print("latents    " + ", ".join(f"{i} explains {table['explained'][i]:.1%}" for i in best))
    print(labels.told(metrics), end="")
    print(f"saved      {out / 'report.html'}, metrics.json, latents.parquet, examples.jsonl, difference.safetensors")
    print(open_page(out))


def describe_latents(
    config: AnalyzeConfig, crosscoder: CrossCoder, data: Data, table: dict[str, np.ndarray], chosen: np.ndarray, lens, tokenizer
) -> list[dict]:
    """The sections of the chosen latents: examples, and what the logit lens says of their rows."""
    f_max = np.fmax(table["max_act_train"], table["max_act_val"])[chosen]
    sections = find_examples(
        crosscoder, data, chosen, f_max, tokenizer, wanted=config.examples, context=config.context, seed=config.seed
    )
    difference.add_lens(sections, crosscoder, lens, tokenizer)
    return sections


def steer(  # noqa: PLR0913 - what `main` has opened
    config: AnalyzeConfig, wanted: tuple[list[int], list[str]] | None, metrics: dict, models, crosscoder: CrossCoder,
    data: Data, table: dict[str, np.ndarray], tokenizer, notes: list[str],
) -> tuple[dict, list[dict]]:  # fmt: skip
    """The metrics with what steering gave, and the lines of steering.jsonl."""
    if wanted is None or not models or tokenizer is None:
        return metrics, []
    from analysis import steering

    asked, questions = wanted
    if never := [latent for latent in asked if table["dead"][latent]]:
        notes.append(f"no steering with {', '.join(map(str, never))}: never active on the rows measured")
    order = findings.in_order(table) if "change_score" in table else one_model.choose(table, [], steering.FIRST)
    chosen = [latent for latent in asked or order[: steering.FIRST].tolist() if latent not in never]
    chat = bool(data.pair.get("chat_template"))
    prompts = steering.as_prompts(questions, tokenizer, chat) if questions else steering.dataset_prompts(data, tokenizer)
    if not prompts:
        notes.append("no steering: the held-out texts are too short for prompts; give some with --prompts")
    if not chosen or not prompts:
        return metrics, []
    skip_first, alone = data.pair.get("skip_first", 1), config.steer_at == "answer"
    how = {"behaviour": config.behaviour, "answer_alone": alone, "skip_first": skip_first}
    together = [chosen] if len(chosen) > 1 or not asked else []
    groups = [[latent] for latent in chosen if asked] + together
    if crosscoder.n_models == 1:  # a difference has more of each latent in the fine-tuned model
        table = table | {"direction": np.full(len(table["dead"]), "ft")}
    lines = steering.steer(
        models, crosscoder, table, groups, prompts, tokenizer, rows=8 * config.model_batch_size, seed=config.seed, **how
    ).to_dict("records")
    return metrics | {"steering": how | {"prompts": len(prompts), "latents": steering.summarise(lines)}}, lines


# --- what is to be read


def check_steering(config: AnalyzeConfig, d_hidden: int) -> tuple[list[int], list[str]] | None:
    """The latents to steer with, none for the first by rank, and the prompts of --prompts. None: no steering. ValueError for
    what is no latent, no regular expression or no prompt."""
    if config.steer == "none":
        return None
    for name in ("steer", "prompts", "behaviour"):
        if getattr(config, name) is not None and not config.base_model:
            raise ValueError(f"--{name} is given without --base-model and --ft-model, which are steered")
    asked = parse_latents("--steer", config.steer or "", d_hidden)
    if config.steer is not None and not asked:
        raise ValueError("--steer: names no latent; give some (--steer 12,99) or none")
    try:
        re.compile(config.behaviour or "")
    except re.error as error:
        raise ValueError(f"--behaviour {config.behaviour}: is no regular expression ({error})") from None
    questions = read_prompts(config.prompts) if config.prompts is not None else []
    return (list(dict.fromkeys(asked)), questions) if config.base_model else None


def check_numbers(config: AnalyzeConfig) -> None:
    """ValueError, naming the flag, for what no analysis can have."""
    least = {"num_tokens": 1, "patch_tokens": 1, "model_batch_size": 1, "sections_per_class": 0, "examples": 1, "context": 0}
    for name, low in least.items():
        if (value := getattr(config, name)) is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {low}")
    if config.dataset and (config.base_dataset or config.ft_dataset):
        raise ValueError("--dataset names both models' activations: leave out --base-dataset and --ft-dataset")
    for one, other in (("base_dataset", "ft_dataset"), ("ft_dataset", "base_dataset"), ("base_model", "ft_model"),
                       ("ft_model", "base_model"), ("hook", "base_model"), ("ft_hook", "base_model"),
                       ("ft_adapter", "base_model")):  # fmt: skip
        if getattr(config, one) and not getattr(config, other):
            raise ValueError(f"--{one.replace('_', '-')} is given without --{other.replace('_', '-')}")


def parse_latents(flag: str, value: str, d_hidden: int) -> list[int]:
    """`12,99` -> [12, 99]. ValueError for what is no latent."""
    parts = value.replace(",", " ").split()
    for part in parts:
        if not part.isdecimal() or int(part) >= d_hidden:
            raise ValueError(f"{flag} {value}: {part!r} is no latent of this crosscoder, which has 0 to {d_hidden - 1}")
    return list(map(int, parts))


def find_run(path: Path) -> tuple[Path, dict | None]:
    """The folder of the crosscoder and what config.json says of its run, None for a crosscoder alone."""
    hint = "give a run (runs/NAME) or the folder of a saved crosscoder"
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; {hint}")
    if (path / "model.safetensors").is_file():
        return path, None
    if not (path / "crosscoder").is_dir():
        if (path / "checkpoints").is_dir():
            hint = f"its training has not ended, go on with: python train.py --resume {path}"
        raise ValueError(f"{path}: holds no crosscoder; {hint}")
    try:
        record = json.loads((path / "config.json").read_text())
        record["given"]["dataset"], record["resolved"]["val_tokens"]  # KeyError where they are missing
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its config.json is missing or broken ({error!r}); analyse {path}/crosscoder alone") from None
    return path / "crosscoder", record


def data_flags(config: AnalyzeConfig, record: dict | None) -> tuple[TrainConfig, dict | None]:
    """The flags that name the activations, those given here or those of the run, and the record if they are of the run."""
    given, resolved = (record["given"], record["resolved"]) if record else ({}, {})
    ratio = resolved.get("max_norm_ratio", TrainConfig.max_norm_ratio)
    if config.dataset or config.base_dataset:
        named = {field.name: getattr(config, field.name) for field in dataclasses.fields(DatasetFlags)}
        return TrainConfig(**named, max_norm_ratio=ratio), None
    if record is None:
        raise ValueError("--dataset is missing: a crosscoder without its run does not say what it was trained on")
    flags = {field.name: given[field.name] for field in dataclasses.fields(TrainConfig) if field.name in given}
    if given.get("base_model"):
        kept = given.get("keep_activations")
        if not kept or not (Path(kept) / "pair.json").is_file():
            raise ValueError(
                "--dataset is missing: this run was trained live and kept no activations; collect some with collect.py from "
                "the same models and hook, and name them"
            )
        flags["dataset"] = kept
    return TrainConfig(**flags | {"max_norm_ratio": ratio}), record


# --- what is written


def write_numbers(
    folder: Path, data_name: str, metrics: dict, table: dict[str, np.ndarray], definitions: dict[str, str],
    vectors: dict[str, torch.Tensor], sections: list[dict], steered: list[dict],
) -> None:  # fmt: skip
    """The files that every kind of dictionary has."""
    (folder / "metrics.json").write_text(as_json(metrics, indent=2))
    write_parquet(folder / "latents.parquet", table, definitions, data_name)
    if vectors:
        save_file(vectors, folder / "difference.safetensors")
    (folder / "examples.jsonl").write_text("".join(as_json(one) for one in sections if one["examples"]))
    (folder / "steering.jsonl").write_text("".join(map(as_json, steered)))


def training_curves(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []


def open_page(out: Path) -> str:
    return f"next       python -m webbrowser {(out.absolute() / 'report.html').as_uri()}"


def print_summary(metrics: dict, notes: list[str], out: Path) -> None:
    print(
        f"held out   explained variance {metrics['explained_variance']:.3f} (base {metrics['explained_variance_A']:.3f}, "
        f"ft {metrics['explained_variance_B']:.3f}), L0 {metrics['l0_loss']:.1f}, {metrics['rows_validation']:,} rows"
    )
    for way, how in (("latents", "latents"), ("latents_by_norm", "by norm"), ("latents_by_scaling", "scaling")):
        print(f"{how:<11}" + ", ".join(f"{count} {name.replace('_', '-')}" for name, count in metrics[way].items()))
    if patching := metrics.get("patching"):
        for name in ("base", "ft"):
            one = {key: value["all"] for key, value in patching[name].items()}
            print(
                f"{name:<11}loss intact {one['loss_intact']:.3f}, reconstruction {one['loss_reconstruction']:.3f}, "
                f"zero {one['loss_zero']:.3f}: recovered {one['loss_recovered']:.3f}"
            )
        diffing = dict(patching["diffing"]["base model"])
        before = diffing.pop("before")["all"]
        for name, one in diffing.items():
            print(f"diffing    base + {name} ({one['latents']}): KL to ft {before:.4f} -> {one['kl']['all']:.4f}")
    print_steering(metrics.get("steering"))
    for how, score in metrics.get("planted", {}).items():
        found = ", ".join(f"{kind} {score[f'recall_{kind}'] * score[f'class_ok_{kind}']:.2f}" for kind in latents.CLASSES)
        print(f"planted    found with the right class {how.replace('_', ' ')}: {found}; false {score['false_exclusive']:.2f}")
    print(labels.told(metrics), end="")
    for note in notes:
        print(f"note       {note}")
    print(f"saved      {out / 'report.html'}, findings.json, latents.parquet, metrics.json, figures")


def print_steering(steered: dict | None) -> None:
    for group in steered["latents"] if steered else []:
        told = []
        for name, other in (("base", "ft"), ("ft", "base")):
            one = group[name]
            told.append(f"{name}, KL to {other} {one['kl_before']:.3f} -> {one['kl']:.3f} (random {one['kl_random']:.3f})")
            if one["shown"] is not None:
                told[-1] += f", behaviour {one['shown_before']:.0%} -> {one['shown']:.0%} (random {one['shown_random']:.0%})"
        more = "" if group["beyond_random"] else "; no more than random"
        print(f"steering   {', '.join(map(str, group['latents']))}: {'; '.join(told)}{more}")


if __name__ == "__main__":
    run_entry("analyze.py", main, CONFIG, "run it again from the beginning")
