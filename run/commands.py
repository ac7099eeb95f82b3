"""The four entries as commands of an installed package (pyproject.toml): `crosscoder-train` is `python train.py`."""

import runpy
from functools import partial


def run(entry: str) -> None:
    runpy.run_module(entry, run_name="__main__", alter_sys=True)  # what it returns would be printed as an error


collect, train, analyze, formats = (partial(run, entry) for entry in ("collect", "train", "analyze", "formats"))
