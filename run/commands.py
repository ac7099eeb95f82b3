"""The four entries as commands of an installed package (pyproject.toml): `crosscoder-train` is `python train.py`."""

import runpy
from functools import partial

collect, train, analyze, formats = (
    partial(runpy.run_module, name, run_name="__main__", alter_sys=True) for name in ("collect", "train", "analyze", "formats")
)
