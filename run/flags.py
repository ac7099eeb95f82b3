"""From a command line, and the config.json of a run that it names, to one of the configs of `config.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import tyro

from config import LR_FACTOR, PLANTED, REAL, WARM, TrainConfig

QUOTES = str.maketrans("", "", "[]',")  # around values in the messages of tyro


def parse(cls: type, argv: list[str] | None = None):
    """Command line -> config. For a TrainConfig, `--config FILE` and the config.json of a resumed run supply the defaults.

    Returns the config with None where nothing was given; `resolve_sizes` fills the sizes in later.
    """
    for name in ("stdin", "stdout", "stderr"):  # closed by the caller (`2>&-`): the next opened file would get its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 - open to the end
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = read_flags(cls, argv)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left as it ends
        sys.exit(0)
    if cls is TrainConfig:
        lists = {name: getattr(config, name) for name in ("text", "model_dataset")}  # tyro would append them to those of a file
        try:
            if config.config is not None:
                config = read_flags(cls, argv, read_given(Path(config.config).expanduser(), flag="--config"))
            if saved := resumed_config_file(config):
                config = read_flags(cls, argv, read_given(saved, flag="--resume"))
            config = with_full_paths(dataclasses.replace(config, **{name: given for name, given in lists.items() if given}))
        except ValueError as error:
            sys.exit(f"train.py: error: {error}")
    return config


def read_flags(cls: type, argv: list[str], default=tyro.MISSING_NONPROP):
    """`tyro.cli`, but what it prints in a box about a wrong flag becomes one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(cls, args=argv, default=default)
    except SystemExit as stop:
        if stop.code:  # not --help
            print(f"{Path(sys.argv[0]).name}: error: {one_line(box.getvalue())} (--help explains all flags)", file=sys.stderr)
        raise


def one_line(box: str) -> str:
    """The message in a box of tyro's: a title, what is wrong, a rule, and flags with their help, indented by four."""
    rows = [row[2:-2].rstrip() for row in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:-1]]  # without colours
    flags = [row.split()[0] for row in rows if re.match(r" {4}(--\S|[A-Z]+$)", row)]
    said = " ".join(" ".join(itertools.takewhile(lambda row: "───" not in row, rows)).split())
    if said.startswith("Missing from"):
        return f"missing: {', '.join(flags)}"
    if found := re.match(r"Error parsing (\S+): .*?(int|float)\b.*?(\[.*?\]|'.*?')", said, re.IGNORECASE):
        flag, kind, value = found.groups()
        return f"{flag} {value.translate(QUOTES)}: must be a {'whole ' * (kind.lower() == 'int')}number"
    near = f"; did you mean {' or '.join(flags)}?" if said.startswith("Unrecognized") and flags else ""
    return said.removeprefix("Error parsing ").rstrip(".") + near


def with_full_paths(config: TrainConfig) -> TrainConfig:
    """Local paths without `~`, and those of data absolute, so that a run can be resumed from any folder."""

    def full(value: str) -> str:
        return str(path.absolute()) if (path := Path(value).expanduser()).exists() else value

    def full_text(spec: str) -> str:
        name, equals, weight = spec.rpartition("=")
        return f"{full(name)}={weight}" if equals and full(spec) == spec else full(spec)

    data = ("dataset", "base_dataset", "ft_dataset", "base_model", "ft_model", "ft_adapter", "init_from")
    paths: dict[str, Any] = {name: full(value) for name in data if (value := getattr(config, name))}
    for name in ("output_dir", "resume", "config"):
        if (value := getattr(config, name)) is not None:
            paths[name] = str(Path(value).expanduser())
    if config.keep_activations:
        paths["keep_activations"] = str(Path(config.keep_activations).expanduser().absolute())
    paths |= {"text": list(map(full_text, config.text)), "model_dataset": list(map(full, config.model_dataset))}
    return dataclasses.replace(config, **paths)


def resumed_config_file(config: TrainConfig) -> Path | None:
    """The config.json of the run that `config.resume` continues, or None where there is none."""
    if config.resume is None:
        return None
    if config.resume == "auto":
        if config.run_name is None:
            raise ValueError("--resume auto needs --run-name NAME, or give the run itself: --resume runs/NAME")
        folders = [Path(config.output_dir).expanduser() / config.run_name]
    else:
        resume = Path(config.resume).expanduser().resolve()
        folders = [resume, *resume.parents[:2]]  # a run, or a checkpoint inside it
    return next((f / "config.json" for f in folders if (f / "config.json").is_file() and (f / "checkpoints").is_dir()), None)


def read_given(path: Path, flag: str) -> TrainConfig:
    """The part `given` of a run's config.json (or a plain object of fields) as a TrainConfig, types checked."""
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {path}: is not JSON ({error})") from None
    raw = raw.get("given", raw) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict):
        raise ValueError(f"{flag} {path}: expected a JSON object of config fields")
    hints, kinds = typing.get_type_hints(TrainConfig), {f.name: f.type for f in dataclasses.fields(TrainConfig)}
    for name, value in raw.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            raise ValueError(f"{flag} {path}: unknown field {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        if not _fits(value, hints[name]):
            raise ValueError(f"{flag} {path}: {name} = {value!r:.40} is not of type {kinds[name]}")
    return TrainConfig(**raw)


def _fits(value, hint) -> bool:
    """Whether a JSON value may stand in a field of this type; an int may stand for a float."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(part, *typing.get_args(hint)) for part in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


# --- checks before anything is opened


def check(config: TrainConfig, processes: int) -> None:
    """ValueError, naming the flag, for values that cannot be trained with."""
    if config.dataset and (config.base_dataset or config.ft_dataset):
        raise ValueError("--dataset names both models' activations: leave out --base-dataset and --ft-dataset")
    if bool(config.base_dataset) != bool(config.ft_dataset):
        there, missing = ("--base-dataset", "--ft-dataset") if config.base_dataset else ("--ft-dataset", "--base-dataset")
        raise ValueError(f"{there} is given without {missing}: a crosscoder needs the same tokens' activations of both models")
    if config.model_dataset and (config.dataset or config.base_dataset):
        raise ValueError("--model-dataset names each model's activations: leave out --dataset, --base-dataset and --ft-dataset")
    if len(config.model_dataset) == 1:
        raise ValueError("--model-dataset is given once: give it for each model, the base model first")
    if (config.base_column or config.ft_column) and not (config.dataset or config.base_dataset or config.model_dataset):
        raise ValueError("--base-column and --ft-column need --base-dataset and --ft-dataset")
    if config.epochs is not None and config.num_tokens is not None:
        raise ValueError("--epochs and --num-tokens both set the length of the run: give one (the other as None)")
    check_live(config, processes)
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, (int, float)) and not abs(value) < (2**53 if isinstance(value, int) else math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {str(value):.20}: must be a finite number, a whole one below 2^53")
    if config.run_name in (".", "..") or (config.run_name and Path(config.run_name).name != config.run_name):
        raise ValueError(f"--run-name {config.run_name}: must be a name alone; --output-dir is the folder that it lies in")
    for name in ("k", "k_start"):
        if config.variant == "vanilla" and config.resume is None and (value := getattr(config, name)) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} {value:g}: belongs to --variant batch_topk; give that variant or leave it out"
            )
    if config.streaming and not (config.dataset or config.base_dataset or config.model_dataset):
        raise ValueError("--streaming reads datasets over the network: give --dataset, or --base-dataset and --ft-dataset")
    if config.epochs is not None and not (config.dataset or config.base_dataset or config.model_dataset):
        raise ValueError("--epochs: planted concepts are endless, give --num-tokens")
    check_ranges(config)
    if ":" in config.device and processes > 1:
        kind = config.device.split(":")[0]
        raise ValueError(f"--device {config.device}: several processes take a device each; give --device {kind}")


def check_ranges(config: TrainConfig) -> None:
    """ValueError, naming the flag, for a number outside the range in which it means something."""
    if not config.max_norm_ratio > 1:
        raise ValueError(f"--max-norm-ratio {config.max_norm_ratio:g}: must be above 1; 1e9 keeps rows of every norm")
    for name in (
        "d_hidden", "k", "k_aux", "micro_batch_size", "num_tokens", "epochs", "val_tokens", "log_every",
        "val_every", "save_every", "keep_checkpoints", "lr", "grad_clip", "dec_init_norm", "buffer_tokens", "model_batch_size",
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name, low, high in (
        ("seed", 0, 2**31), ("batch_size", 1, 2**24), ("l1_coeff", 0, 1e6), ("aux_coeff", 0, 1e6), ("l1_warmup", 0, 1),
        ("lr_warmup", 0, 1), ("lr_decay", 0, 1), ("k_start", 1, 1e6), ("k_anneal", 0, 1), ("dead_window", 1e-9, 1),
        ("beta1", 0, 0.999999), ("beta2", 0, 0.999999),
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")


def check_live(config: TrainConfig, processes: int) -> None:
    """ValueError, naming the flag, if training straight from the models is asked for by halves."""
    wanted = ("base_model", "ft_model", "hook", "text", "num_tokens")
    alone = ("ft_hook", "text_column", "chat_template", "keep_activations", "base_device", "ft_device")
    alone += ("base_revision", "ft_revision", "ft_adapter", *(() if config.streaming else ("buffer_tokens",)))
    asked = [name for name in (*wanted[:-1], *alone) if getattr(config, name)]
    if not asked:
        return
    flag = f"--{asked[0].replace('_', '-')}"
    if processes > 1:
        raise ValueError(f"{flag}: several processes train from stored activations; collect them first with collect.py")
    if config.dataset or config.base_dataset or config.model_dataset:
        other = "--dataset" if config.dataset else "--base-dataset" if config.base_dataset else "--model-dataset"
        raise ValueError(f"{flag} trains straight from two models and {other} from stored activations: give one of them")
    if config.epochs is not None:
        raise ValueError("--epochs: the length of streamed texts is not known before their end, give --num-tokens")
    for name in wanted:
        if not getattr(config, name) and not (name == "ft_model" and config.ft_adapter):
            why = "the length of streamed texts is not known" if name == "num_tokens" else "both models read the same text"
            raise ValueError(f"{flag} is given without --{name.replace('_', '-')}: {why}")


# --- what is left open on the command line


def resolve_sizes(given: TrainConfig, saved: dict | None, warm, fast_dtype: str, processes: int = 1) -> TrainConfig:
    """The settings of a run, as far as its data need not be known: usual sizes filled in, or those that it began with.

    Args:
        saved: the settings that a resumed run began with. warm: the crosscoder that a fresh one begins with.
        fast_dtype: the compute dtype for "auto".
    """
    usual = REAL if given.base_model or given.dataset or given.base_dataset or given.model_dataset else PLANTED
    if warm:
        usual = usual | WARM | {"d_hidden": warm.d_hidden, "k": warm.k or min(usual["k"], warm.d_hidden)}
    known: dict[str, Any] = {name: value for name, value in (saved or usual).items() if getattr(given, name, value) is None}
    if given.compute_dtype == "auto":
        known["compute_dtype"] = saved["compute_dtype"] if saved else fast_dtype
    config = dataclasses.replace(given, **known)
    assert config.d_hidden is not None  # the usual sizes have it
    if processes > config.d_hidden:
        raise ValueError(f"--d-hidden {config.d_hidden}: must be at least the number of processes, {processes}")
    if config.variant == "batch_topk" and config.k is not None and config.k > config.d_hidden:
        raise ValueError(f"--k {config.k}: must be at most --d-hidden {config.d_hidden}")
    return config


def resolve_lengths(given: TrainConfig, config: TrainConfig, train_rows: int | None, d_model: int) -> TrainConfig:
    """The settings that follow from the data: the run's length, the learning rate, the auxiliary loss, the part of a step."""
    assert config.d_hidden is not None  # by resolve_sizes
    l1_coeff = 0.0 if config.variant == "batch_topk" and given.l1_coeff is None else config.l1_coeff
    return dataclasses.replace(
        config,
        num_tokens=given.epochs * train_rows if given.epochs and train_rows else config.num_tokens or train_rows,
        k_aux=config.k_aux or max(1, d_model // 2),
        lr=config.lr or LR_FACTOR / math.sqrt(d_model * config.d_hidden),
        l1_coeff=l1_coeff,
        micro_batch_size=config.micro_batch_size or config.batch_size,
    )
