"""What every entry needs from the machine: free disk and memory, devices, progress bars, one-line errors."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from ops.files import whole_file

HUB_SECONDS = 10  # that one question to the Hub may take


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one, whole."""
    with whole_file(path) as partial:
        partial.write_text(text)


def free_disk(path: Path) -> int:
    """Free bytes where `path` is or will be."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free


def free_memory() -> int:
    """Bytes of host memory that are free or can be freed, within the limits of a container."""
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *left_in_containers()])


def left_in_containers() -> list[int]:
    """Bytes left under each memory limit of this process's control groups, version 1 or 2. Their file caches count as free."""
    left = []
    for line in Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []:
        _, kind, path = line.split(":", 2)
        if kind not in ("", "memory"):
            continue
        names, total = ("memory.max", "memory.current"), ""
        if kind:
            names, total = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        own = Path("/sys/fs/cgroup", kind, path.lstrip("/"))
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError, KeyError):  # no such folder here, or "max": no limit
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(limit - used + int(stat[f"{total}active_file"]) + int(stat[f"{total}inactive_file"]))
    return left


def usable_device(name: str, flag: str = "--device") -> str:
    """The device, CUDA or the CPU for auto. ValueError, naming the flag, if it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    with library_errors(f"{flag} {name}: not usable here", "auto chooses one", (RuntimeError, AssertionError)):
        torch.zeros(1, device=name).item()
    return name


def choose_precision() -> None:
    """Products on CUDA add up in float32, and those of float32 are not rounded to TF32: who wants that takes bfloat16."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def close_name(path: Path) -> str:
    """` (is it PATH?)` with what lies beside a path that is not there and has nearly its name, else nothing."""
    there = os.listdir(path.parent) if path.parent.is_dir() else []
    return "".join(f" (is it {path.parent / other}?)" for other in difflib.get_close_matches(path.name, there, n=1))


def first_line(error: BaseException) -> str:
    """The first line of a library's error, for messages of one line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(" .") if lines else type(error).__name__


def as_json(values: dict, **options) -> str:
    """A line of JSON, with null for what JSON has no number for (an infinite or undefined metric)."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda _: None), **options) + "\n"


@contextmanager
def library_errors(fault: str, remedy: str = "", kinds=Exception) -> Iterator[None]:
    """An error of these kinds inside the block becomes a ValueError of one line: `fault (first line of the error); remedy`."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{fault} ({first_line(error)})" + (f"; {remedy}" if remedy else "")) from None


def size_text(n_bytes: float) -> str:
    return tqdm.format_sizeof(n_bytes, "B")


class Bar(tqdm):
    def __del__(self):
        """Nothing: tqdm's own fails, with a traceback, where Ctrl-C came while a bar was being made. All are closed."""


def progress_bar(what: str | None, total: int, **options) -> Bar:
    """On a terminal, and gone when it is done. Without one (a cluster's log) a line every half minute, from `delay` on."""
    terminal = sys.stderr.isatty()
    usual = {"leave": not terminal, "mininterval": 0.5 if terminal else 30, "delay": 0 if terminal else 30}
    return Bar(total=total, desc=what, unit=" rows", unit_scale=True, dynamic_ncols=True, **usual | options)


@contextmanager
def working(what: str) -> Iterator[None]:
    """On a terminal the line `what ...`, until the block has done it."""
    shown = sys.stderr.isatty()
    if shown:
        say(f"{what} ...", sys.stderr, end="\r")
    try:
        yield
    finally:
        if shown:
            say(f"{' ' * len(what)}    ", sys.stderr, end="\r")


def say(text: str, file=None, end: str = "\n") -> None:
    """Print at once. When nobody reads any more (`| head`, a full disk under a log file) the run goes on in silence."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True, end=end)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # what is still buffered goes there too


def run_entry(name: str, main: Callable, config, stopped: str | Callable, first: bool = True) -> None:
    """Run an entry's `main(config)`, bad input an error of one line. stopped: said at Ctrl-C and SIGTERM, or gives what is.

    first: whether this process is the first of those that torchrun started, which speaks for all.
    """

    def interrupt(*_) -> None:
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        main(config)
    except (ValueError, OSError) as error:
        if not first:  # what all processes find, the first one says, and torchrun ends the others as it leaves
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        sys.exit(f"{name}: error: {error}")
    except KeyboardInterrupt as stop:
        if first:
            print(f"\n{name}: stopped; {stopped(config) if callable(stopped) else stopped}", file=sys.stderr)
        sys.exit(143 if stop.args else 130)
