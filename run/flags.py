"""From a command line, and the config.json of a run that it names, to one of the configs of `config.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Literal

import tyro

from config import AnalyzeConfig, CollectConfig, FormatsConfig, TrainConfig

QUOTES = str.maketrans("", "", "[]',")  # around values in the messages of tyro
REQUIRED = {
    CollectConfig: ("base_model", "hook", "output"),
    FormatsConfig: ("src", "dst", "to"),
    AnalyzeConfig: ("run",),
}


def parse(cls: type, argv: list[str] | None = None):
    """Command line -> config. For a TrainConfig, `--config FILE` and the config.json of a resumed run supply the defaults.

    Returns the config with None where nothing was given; `resolve_sizes` fills the sizes in later.
    """
    for name in ("stdin", "stdout", "stderr"):  # closed by the caller (`2>&-`): the next opened file would get its number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 - open to the end
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = read_flags(cls, argv, cls(**{name: tyro.MISSING for name in REQUIRED.get(cls, ())}))
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


def read_flags(cls: type, argv: list[str], default):
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

    for name in ("output_dir", "resume", "config"):
        if (value := getattr(config, name)) is not None:
            setattr(config, name, str(Path(value).expanduser()))
    for name in ("dataset", "base_dataset", "ft_dataset", "base_model", "ft_model", "ft_adapter", "init_from"):
        if value := getattr(config, name):
            setattr(config, name, full(value))
    if config.keep_activations:
        config.keep_activations = str(Path(config.keep_activations).expanduser().absolute())
    config.text = [full_text(spec) for spec in config.text]
    config.model_dataset = [full(name) for name in config.model_dataset]
    return config


def resumed_config_file(config: TrainConfig) -> Path | None:
    """The config.json of the run that `config.resume` continues, or None where there is none."""
    if config.resume is None:
        return None
    if config.resume == "auto":
        if config.run_name is None:
            raise ValueError("--resume auto needs --run-name NAME, or give the run itself: --resume runs/NAME")
        folders = [Path(config.output_dir).expanduser() / config.run_name]
    else:
        resume = Path(config.resume).expanduser()
        paths = (Path(os.path.abspath(resume)), resume.resolve())  # checkpoints/ may lead to another disk
        folders = [folder for path in paths for folder in (path, *path.parents[:2])]  # a run, or a checkpoint inside it
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
