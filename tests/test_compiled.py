"""What ptxas makes of every kernel that a step launches, for cards that are not here: `benchmarks/kernels.py`."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

pytest.importorskip("triton", reason="the kernels need triton")
from ops import kernels


def compile_kernels(root, out, *flags) -> subprocess.CompletedProcess:
    """`benchmarks/kernels.py` of a copy of the repository; its table goes to `out`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, root / "benchmarks" / "kernels.py", "--json", out, *flags]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900, env=environment)


def test_every_kernel_of_a_step_compiles_without_fences_spills_or_narrow_loads(tmp_path):
    """All cases for one architecture and the first case for the others; the benchmark itself does all for all."""
    table = []
    for flags in (["--arch", 90], ["--first", "--arch", 80, 100]):
        done = compile_kernels(ROOT, tmp_path / "table.json", *flags)
        assert done.returncode == 0 and done.stderr.strip() == "", done.stderr
        table += json.loads((tmp_path / "table.json").read_text())
    assert {row["arch"] for row in table} == {80, 90, 100}
    ours = {name for name, value in vars(kernels).items() if isinstance(value, type(kernels._count))}
    assert ours - {row["kernel"].split(",")[0] for row in table} == {"_scores", "_piece"}  # which the others call


FAULTS = {  # what is put into the kernels, and what must be found then
    'sem="relaxed"': ('sem="acq_rel"', r"_histogram, .*: \d+ fences: an atomic that is not relaxed"),
    "codes, n, *sizes, SCAN=SCAN, BLOCKS=BLOCKS, num_warps=2": (
        "codes, n, *sizes, SCAN=4 * SCAN, BLOCKS=BLOCKS, num_warps=1",
        r"_write, .*: \d+ spills, 255 registers",
    ),
    "rows + row[:, None] * width": ("rows + row[:, None] * (width + 1)", r"_weighted_sums, .*: no 128-bit load"),
}


def test_fences_spills_and_narrow_loads_are_found(tmp_path):
    shutil.copy(ROOT / "crosscoder.py", tmp_path)
    for folder in ("ops", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    text = (ROOT / "ops" / "kernels.py").read_text()
    for good, (bad, _) in FAULTS.items():
        assert text.count(good) == 1
        text = text.replace(good, bad)
    (tmp_path / "ops" / "kernels.py").write_text(text)
    done = compile_kernels(tmp_path, tmp_path / "table.json", "--first", "--arch", 90)
    assert done.returncode == 1
    for _, message in FAULTS.values():
        assert re.search(message, done.stderr), done.stderr
