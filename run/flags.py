"""From a command line, and the config.json of a run that it names, to one of the configs of `config.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from config import FIRST, LR_FACTOR, PLANTED, REAL, TOPK, WARM, WARM_TOPK, ModelFlags, TrainConfig

# A heading, or a comment and the field that it is of, in the source of a config.
FIELD = re.compile(r"    # --- (.+)\n|((?:    # .+\n)+)    (\w+): ")
MODELS = ("base_model", "ft_model", "ft_adapter", "model_dtype")  # flags of analyze.py too
QUOTES = str.maketrans("", "", "[]',")  # around values in the messages of tyro
ABOVE_0 = (
    "d_hidden", "k", "k_aux", "micro_batch_size", "num_tokens", "epochs", "val_tokens", "log_every", "val_every", "save_every",
    "keep_checkpoints", "lr", "grad_clip", "dec_init_norm", "buffer_tokens", "model_batch_size",
)  # fmt: skip
BETWEEN = {
    "seed": (0, 2**31), "batch_size": (1, 2**24), "l1_coeff": (0, 1e6), "aux_coeff": (0, 1e6), "l1_warmup": (0, 1),
    "resample_until": (0, 1), "lr_warmup": (0, 1), "lr_decay": (0, 1), "k_start": (1, 1e6),
    "k_anneal": (0, 1), "dead_window": (1e-9, 1), "beta1": (0, 0.999999), "beta2": (0, 0.999999),
}  # fmt: skip


def parse(cls: type, argv: list[str] | None = None):
    """Command line -> config. For a TrainConfig, `--config FILE` and the config.json of a resumed run supply the defaults.

    An entry calls this before it imports torch, which takes seconds, and that is said.
    """
    for name in ("stdin", "stdout", "stderr"):  # closed by the caller (`2>&-`): the next opened file would get its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 - open to the end
    try:
        config = read_flags(cls, argv)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left as it ends
        sys.exit(0)
    if cls is TrainConfig:
        config = with_files(config, argv)
    if argv is None and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":  # in torchrun's first process
        with contextlib.suppress(OSError):
            print("loading torch ...", file=sys.stderr, flush=True)
    return config


def with_files(config: TrainConfig, argv: list[str] | None) -> TrainConfig:
    """The config with what its --config FILE, or the run that it resumes, says beside the command line."""
    lists = {name: given for name in ("text", "model_dataset") if (given := getattr(config, name))}
    try:
        if config.config is not None:
            config = read_flags(TrainConfig, argv, read_given(Path(config.config).expanduser(), flag="--config"))
        if saved := resumed_config_file(config):
            config = read_flags(TrainConfig, argv, read_given(saved, flag="--resume"))
        return with_full_paths(dataclasses.replace(config, **lists))  # alone: tyro appends them to those of a file
    except ValueError as error:
        sys.exit(f"train.py: error: {error}")


def read_flags(cls: type, argv: list[str] | None, default=tyro.MISSING_NONPROP):
    """`tyro.cli`, but what it prints in a box about a wrong flag becomes one line."""
    box, shown = io.StringIO(), in_groups(cls)
    if dataclasses.is_dataclass(default):
        default = regrouped(default, shown)
    try:
        with contextlib.redirect_stderr(box):
            given = tyro.cli(shown, prog=Path(sys.argv[0]).name, args=argv, default=default, description=inspect.getdoc(cls))
    except SystemExit as stop:
        if stop.code:  # not --help
            print(f"{Path(sys.argv[0]).name}: error: {one_line(box.getvalue())} (--help explains all flags)", file=sys.stderr)
        raise
    groups = [given, *(part for part in vars(given).values() if dataclasses.is_dataclass(part))]
    return cls(
        **{f.name: next(getattr(part, f.name) for part in groups if hasattr(part, f.name)) for f in dataclasses.fields(cls)}
    )


@cache
def in_groups(cls: type) -> type:
    """The dataclass that tyro gets in place of a flat one: the fields of FIRST, then one dataclass for each other heading."""
    hints, titles = typing.get_type_hints(cls, include_extras=True), help_of(cls)
    groups: dict[str, list] = {"": []}
    first = FIRST[cls.__name__].split()
    for f in sorted(dataclasses.fields(cls), key=lambda f: first.index(f.name) if f.name in first else len(first)):
        title, text = titles[f.name]
        group = "" if f.name in first else title
        named = tyro.conf.arg(prefix_name=False, help=text.partition(" Default: ")[0], metavar=metavar_of(f, hints[f.name]),
                              help_behavior_hint=hint_of(f, text))  # fmt: skip
        default = dataclasses.field(default=f.default, default_factory=f.default_factory)
        # of the first ones no --no-FLAG is shown, which would take a line
        hint = hints[f.name] if group else tyro.conf.FlagCreatePairsOff[hints[f.name]]  # type: ignore
        groups.setdefault(group, []).append((f.name, Annotated[hint, named], default))
    fields = groups.pop("")
    for title, inside in groups.items():
        part = dataclasses.make_dataclass(title.title().replace(" ", ""), inside, kw_only=True)
        name = title.replace(" ", "_")
        fields.append((name, Annotated[part, tyro.conf.arg(name=title)], dataclasses.field(default_factory=part)))
    return dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)


def regrouped(config, shown: type):
    """A flat config as an instance of what `in_groups` made of its class."""
    parts = typing.get_type_hints(shown)  # a group's type is its dataclass
    named = vars(config)
    return shown(**{name: named[name] if name in named else regrouped(config, part) for name, part in parts.items()})


def help_of(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (the heading above it, its comment)}, from the source of the class and of those that it is made of."""
    found = {}
    for part in reversed(cls.__mro__[:-1]):
        title = ""
        for heading, comment, name in FIELD.findall(inspect.getsource(part)):
            title = heading or title
            if name:
                found[name] = title, " ".join(line.strip(" #") for line in comment.splitlines())
    return found


def hint_of(field: dataclasses.Field, text: str) -> str | None:
    """What --help says of the default: what the comment says of it, else the sizes of REAL and PLANTED. None: tyro's way."""
    real, planted = (f"{sizes[field.name]:_}" if field.name in sizes else "" for sizes in (REAL, PLANTED))
    said = text.partition(" Default: ")[2].rstrip(".")
    if not said and field.default is None and real:
        said = real if planted in (real, "") else f"{real} on your data, {planted} in the demonstration"
    if isinstance(field.default, int) and field.default >= 10_000:
        said = f"{field.default:_}"
    return f"(default: {said})" if said else "" if field.default in (None, "", False) else None


def metavar_of(field: dataclasses.Field, hint) -> str | None:
    """The word after a flag: its type without the None that stands for "not given"."""
    kinds = typing.get_args(hint)
    if tyro.conf.Positional in kinds:
        return field.name.upper()
    if type(None) not in kinds:
        return None  # as tyro has it
    return " ".join(kind.__name__.upper() for kind in typing.get_args(kinds[0]) or kinds[:1])


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
    for name in ("output_dir", "resume", "config", "keep_activations"):
        if value := getattr(config, name):
            path = Path(value).expanduser()
            paths[name] = str(path.absolute() if name == "keep_activations" else path)
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
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {path}: cannot be read as JSON ({error})") from None
    raw = raw.get("given", raw) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict):
        raise ValueError(f"{flag} {path}: expected a JSON object of config fields")
    hints = typing.get_type_hints(TrainConfig)
    for name, value in raw.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            raise ValueError(f"{flag} {path}: unknown field {name!r}" + (f", did you mean {close[0]!r}?" if close else ""))
        if not _fits(value, hints[name]):
            kind = TrainConfig.__dataclass_fields__[name].type
            raise ValueError(f"{flag} {path}: {name} = {value!r:.40} is not of type {kind}")
    return TrainConfig(**raw)


def _fits(value, hint) -> bool:
    """Whether a JSON value may stand in a field of this type; an int may stand for a float."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return value in options
    if kind is list:
        return isinstance(value, list) and all(_fits(part, *options) for part in value)
    if options:  # of a union
        return any(_fits(value, option) for option in options)
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


# --- commands to type next


def as_typed(config, names) -> list[str]:
    """These of a config's flags as one would type them, defaults left out."""
    words: list[str] = []
    for field in (f for f in dataclasses.fields(config) if f.name in names):
        value, flag = getattr(config, field.name), flag_of(field.name)
        if value in (field.default, None, []):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif field.name == "text":
            words += [word for text in value for word in (flag, text)]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def analyze_command(config: TrainConfig, pair: dict | None, n_models: int, run: Path) -> str:
    """The command that reads a finished run, with the models where they are known. pair: what a dataset says of itself."""
    named = pair.get("recipe", {}) | pair if pair else vars(config)
    if n_models > 2:
        return ""
    models = TrainConfig(**{name: named[name] for name in MODELS if named.get(name)})
    command = ["python", "analyze.py", str(run), *as_typed(models, MODELS)]
    if not config.base_model or config.keep_activations:
        return shlex.join(command)
    data = str(Path("data") / run.name)  # a live run keeps no activations to look at
    names = {f.name for f in dataclasses.fields(ModelFlags)}
    return (
        shlex.join(["python", "collect.py", *as_typed(config, names), "--output", data])
        + " && "
        + shlex.join([*command, "--dataset", data])
    )


# --- checks before anything is opened


def flag_of(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def check(config: TrainConfig, processes: int) -> None:
    """ValueError, naming the flag, for values that cannot be trained with."""
    base, ft, each, epochs = config.base_dataset, config.ft_dataset, config.model_dataset, config.epochs
    name, device = config.run_name, config.device
    stored = next((flag_of(field) for field in ("dataset", "base_dataset", "model_dataset") if getattr(config, field)), "")
    wanted = ("base_model", "ft_model", "hook", "text", "num_tokens")  # for training straight from two models
    others = ("ft_hook", "text_column", "chat_template", "keep_activations", "base_device", "ft_device")
    others += ("base_revision", "ft_revision", "ft_adapter", *(() if config.streaming else ("buffer_tokens",)))
    live = next((flag_of(field) for field in (*wanted[:-1], *others) if getattr(config, field)), "")
    missing = [flag_of(field) for field in wanted if not getattr(config, field)]
    if config.ft_adapter and "--ft-model" in missing:
        missing.remove("--ft-model")
    checks = (
        (processes > 1 and (config.base_device or config.ft_device),
         "--base-device, --ft-device: each of several processes has one device for the models and its part; leave them out"),
        (live and stored, f"{live} trains straight from two models and {stored} from stored activations: give one of them"),
        (live and epochs, "--epochs: the length of streamed texts is not known before their end, give --num-tokens"),
        (live and missing, f"{live} is given without {', '.join(missing)}: two models read the same text of unknown length"),
        (config.dataset and (base or ft), "--dataset names both models' rows: leave out --base-dataset and --ft-dataset"),
        (base and not ft, "--base-dataset is given without --ft-dataset: the activations of both models are needed"),
        (ft and not base, "--ft-dataset is given without --base-dataset: the activations of both models are needed"),
        (each and (config.dataset or base), "--model-dataset names each model's activations: leave out all other datasets"),
        (len(each) == 1, "--model-dataset is given once: give it for each model, the base model first"),
        ((config.base_column or config.ft_column) and not stored, "--base-column and --ft-column need a dataset"),
        (config.difference and not (stored or live), "--difference is of the data of two models: give --dataset, say"),
        (config.difference and len(each) > 2, f"--difference is of two models, --model-dataset names {len(each)}"),
        (config.streaming and not stored, "--streaming reads datasets over the network: give --dataset, or one for each model"),
        (epochs and config.num_tokens, "--epochs and --num-tokens both set the length: give one of them"),
        (epochs and not stored, "--epochs: planted concepts are endless, give --num-tokens"),
        (name and (name == ".." or Path(name).name != name), f"--run-name {name}: must be a name alone, in --output-dir"),
        (processes > 1 and ":" in device, f"--device {device}: each process takes one; give --device {device.split(':')[0]}"),
    )  # fmt: skip
    for wrong, message in checks:
        if wrong:
            raise ValueError(message)
    check_numbers(config)


def check_numbers(config: TrainConfig) -> None:
    """ValueError, naming the flag, for a number that means nothing there."""
    for name, value in vars(config).items():
        if not isinstance(value, (int, float)):
            continue
        flag, (low, high) = flag_of(name), BETWEEN.get(name, (-math.inf, math.inf))
        if not abs(value) < (2**53 if isinstance(value, int) else math.inf):
            raise ValueError(f"{flag} {str(value):.20}: must be a finite number, a whole one below 2^53")
        if name in ("k", "k_start") and config.variant == "vanilla" and config.resume is None:
            raise ValueError(f"{flag} {value:g}: belongs to --variant batch_topk; give that variant or leave it out")
        if name == "max_norm_ratio" and not value > 1:
            raise ValueError(f"{flag} {value:g}: must be above 1; 1e9 keeps rows of every norm")
        if name in ABOVE_0 and not value > 0:
            raise ValueError(f"{flag} {value}: must be above 0")
        if not low <= value <= high:
            raise ValueError(f"{flag} {value}: must lie between {low} and {high}")


# --- what is left open on the command line


def resolve_sizes(given: TrainConfig, saved: dict | None, warm, fast_dtype: str, processes: int = 1) -> TrainConfig:
    """The settings of a run, as far as its data need not be known: usual sizes filled in, or those that it began with.

    saved: what a resumed run began with. warm: the crosscoder that a fresh one begins with. fast_dtype: for "auto".
    """
    usual = REAL if given.base_model or given.dataset or given.base_dataset or given.model_dataset else PLANTED
    if given.variant == "batch_topk":
        usual = usual | (WARM_TOPK if warm else TOPK)
    if warm:
        usual = usual | WARM | {"d_hidden": warm.d_hidden, "k": warm.k or min(usual["k"], warm.d_hidden)}
    began = {"resample_until": 0.0} | saved if saved else usual  # runs of earlier versions resampled nothing
    known: dict[str, Any] = {name: value for name, value in began.items() if getattr(given, name, value) is None}
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
    return dataclasses.replace(
        config,
        num_tokens=given.epochs * train_rows if given.epochs and train_rows else config.num_tokens or train_rows,
        k_aux=config.k_aux or max(1, d_model // 2),
        lr=config.lr or LR_FACTOR / math.sqrt(d_model * config.d_hidden),
        micro_batch_size=config.micro_batch_size or config.batch_size,
    )
