"""Several hooks in one pass of collect.py, through its real command line: each dataset is the one of a pass of its own."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import ROOT, failure, read_pair
from processes import Started, finished

HOOKS = ("model.layers.2.input", "model.layers.1.mlp")  # a model runs through them the other way round


def command(tiny, out, *flags, hooks=HOOKS, tokens=24_000) -> list[str]:
    """Rows of so many tokens; a limit so low that each hook leaves out other rows."""
    models = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--model-dtype", "float32"]
    text = ["--text", f"{tiny['code']}=3", "--text", f"{tiny['prose']}=1", "--seq-len", 128, "--max-norm-ratio", 1.2]
    given = [*models, *text, "--num-tokens", tokens, "--output", out, *(x for hook in hooks for x in ("--hook", hook)), *flags]
    return [str(ROOT / "collect.py"), *map(str, given)]


def completed(argv) -> str:
    done = finished(*argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(out: Path) -> dict[str, bytes]:
    """What decides a dataset: its shards and pair.json; state.json names the folder."""
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.suffix == ".arrow"} | {
        "pair.json": (out / "pair.json").read_bytes()
    }


def killed_behind(argv, progress: Path, shards: int) -> None:
    """Run, and kill it once so many training shards are counted there."""
    process = Started(*argv)
    while not progress.exists() or json.loads(progress.read_text())["shards"]["train"] < shards:
        assert process.poll() is None, process.output()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def alone(tiny, tmp_path_factory) -> dict[str, Path]:
    """The dataset of each hook, collected in a pass of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for hook in HOOKS:
        completed(command(tiny, folder / hook, hooks=[hook]))
    return {hook: folder / hook for hook in HOOKS}


def test_two_hooks_in_one_pass_give_the_files_of_two_passes(tiny, alone, tmp_path):
    """Killed on the way, and the files of one hook lost, so that it begins again while the other goes on."""
    out = tmp_path / "both"
    killed_behind(command(tiny, out), out / HOOKS[1] / "progress.json", 3)
    assert not (out / HOOKS[1] / "pair.json").exists()
    shutil.rmtree(out / HOOKS[0])
    said = completed(command(tiny, out))
    left_out = [read_pair(alone[hook])["left_out"]["norm"] for hook in HOOKS]
    assert min(left_out) > 300 and left_out[0] != left_out[1]
    for hook in HOOKS:
        assert f"median norm at {hook}: base " in said and f"python train.py --dataset {out / hook}" in said
        assert files(out / hook) == files(alone[hook])
    assert all(f"{out / hook} is complete" in completed(command(tiny, out)) for hook in HOOKS)


def test_hooks_that_cannot_be_read_together_are_refused(tiny, alone, tmp_path):
    for hooks, flags, want in (
        ((HOOKS[1], f"{HOOKS[1]}.output"), (), "--hook: the same module is given twice"),
        (HOOKS, ("--ft-hook", HOOKS[1]), "--ft-hook: goes with one --hook"),
        (HOOKS, ("--push-to-hub", "me/data"), "--push-to-hub: takes the dataset of one --hook"),
        (HOOKS, ("--num-tokens", 10**13), "of free disk; lower --num-tokens"),
    ):
        assert want in failure(command(tiny, tmp_path / "never", *flags, hooks=hooks))
    assert not (tmp_path / "never").exists()
    assert "no folder of these hooks; choose another folder" in failure(command(tiny, alone[HOOKS[0]]))
