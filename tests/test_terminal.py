"""What a person at a terminal sees: a first line at once, how long it takes, a clean end, the command that comes next."""

import fcntl
import gc
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import pytest
from helpers import QUICK, ROOT
from tqdm import tqdm

from config import CollectConfig, TrainConfig
from run import flags, monitor
from run.checkpoint import Progress
from run.flags import parse
from run.machine import Bar, progress_bar


def screen(shown: bytes) -> list[str]:
    """The lines of a terminal that was sent this; what \r returns to is written over."""
    lines, column = [""], 0
    for part in re.findall(r"\r|\n|\x1b\[[\d;?]*[A-Za-z]|[^\r\n\x1b]+", shown.decode()):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines, column = [*lines, ""], 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif not part.startswith("\x1b"):
            lines[-1] = lines[-1].ljust(column)[:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_ctrl_c_over_the_bar_leaves_a_clean_line(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, QUICK), "--num-tokens", "640000"]
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    run = [*command, "--output-dir", str(tmp_path), "--run-name", "a"]
    process = subprocess.Popen(run, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    shown, interrupted = b"", False
    while True:
        try:
            shown += os.read(control, 4096)
        except OSError:  # nobody writes any more
            break
        if not interrupted and b"left, EV" in shown:
            interrupted = True
            process.send_signal(signal.SIGINT)
    os.close(control)
    assert process.wait(60) == 130
    lines = screen(shown)
    assert lines[0] == "loading torch ..." and lines[1].startswith("data ")
    (saving,) = [line for line in lines if "SIGINT: saving step" in line]
    assert saving.startswith("SIGINT: ")  # at the beginning of a line
    assert lines[-3].startswith("stopped by SIGINT") and lines[-2:] == [f"python train.py --resume {tmp_path / 'a'}", ""]


def test_ctrl_c_while_a_bar_is_made_leaves_no_traceback(monkeypatch):
    """tqdm closes every bar when it is deleted, and fails at one that was not finished."""
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: ignored.append(error.exc_value))

    def interrupted(*_):
        raise KeyboardInterrupt

    for made in (tqdm, Bar):
        monkeypatch.setattr(made, "_get_free_pos", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(total=1, disable=False) if made is tqdm else progress_bar("rows", 1)
        gc.collect()
        assert [type(error) for error in ignored] == [AttributeError], made


@pytest.mark.parametrize("script", ["train.py", "collect.py", "analyze.py", "formats.py"])
def test_every_entry_says_that_it_loads_torch_before_it_does(script, tmp_path):
    needed = {"train.py": [], "collect.py": ["--base-model", "a", "--hook", "b", "--output", tmp_path / "c"]}
    needed |= {"analyze.py": [tmp_path / "none"], "formats.py": [tmp_path / "none", tmp_path / "d", "--to", "saelens"]}
    program = (
        "import runpy, sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': sys.exit('torch is imported')\n"
        f"sys.meta_path.insert(0, Stop()); sys.argv = {[script, *map(str, needed[script])]}\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "loading torch ...\ntorch is imported\n" and done.stdout == ""


def clock(monkeypatch) -> types.SimpleNamespace:
    """A clock for the progress of a run, set by hand."""
    hand = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(monitor, "time", types.SimpleNamespace(perf_counter=lambda: hand.now))
    return hand


def estimates(hand, seconds, codes=None, begin=0, every=10, start_up=5.0) -> dict[int, float]:
    """{logged step: estimated seconds left / those that were} of a run whose step i takes seconds[i] with codes[i] codes."""
    watched = monitor.Watched(len(seconds), Progress(step=begin), 36, quiet=True)
    hand.now += start_up
    ratios = {}
    for step in range(begin + 1, len(seconds)):
        hand.now += seconds[step - 1]
        if step == begin + 1 or step % every == 0:
            ratios[step] = watched.seconds_left(step, codes[step] if codes else 10) / sum(seconds[step:])
    return ratios


def test_the_time_left_is_that_of_recent_steps(monkeypatch):
    hand = clock(monkeypatch)
    steady = estimates(hand, [0.1] * 1000)
    assert all(abs(ratio - 1) < 0.01 for step, ratio in steady.items() if step > 1)  # not the slow start
    resumed = estimates(hand, [0.1] * 1000, begin=500)
    assert all(abs(ratio - 1) < 0.01 for step, ratio in resumed.items() if step > 501)
    slower = estimates(hand, [0.1] * 500 + [0.3] * 500)
    assert slower[500] < 0.5 and abs(slower[800] - 1) < 0.1


@pytest.mark.parametrize("sparse", [0.25, 0.35, 0.6])  # of the time of a step with many codes
def test_the_time_left_knows_that_steps_with_few_active_codes_are_faster(monkeypatch, sparse):
    hand = clock(monkeypatch)
    codes = [256 * 64 ** (-step / 1000) for step in range(1000)]  # 36 are reached at step 472
    ratios = estimates(hand, [0.1] * 472 + [0.1 * sparse] * 528, codes)
    assert all(0.75 < ratio < 1.25 for step, ratio in ratios.items() if step == 100 or step > 700), ratios
    assert ratios[10] < 1.4


def test_the_next_command_of_a_run():
    def said(pair=None, n_models=2, **given):
        return flags.analyze_command(TrainConfig(**given), pair, n_models, Path("runs/a b"))

    pair = {"base_model": "x/base", "ft_model": "x/ft", "model_dtype": "float32", "ft_adapter": None, "hook": "h"}
    assert said() == "python analyze.py 'runs/a b'"
    assert said(pair, dataset="d") == "python analyze.py 'runs/a b' --base-model x/base --ft-model x/ft --model-dtype float32"
    assert said(pair, n_models=3) == ""
    live = dict(
        base_model="b", ft_model="f", hook="h", text=["web=1", "my chats"], num_tokens=1000, chat_template=True, pack=False
    )
    assert said(**live, keep_activations="k") == "python analyze.py 'runs/a b' --base-model b --ft-model f"
    collect, _, analyze = said(**live).partition(" && ")
    words = shlex.split(collect)
    assert words[:2] == ["python", "collect.py"]
    config = parse(CollectConfig, words[2:])
    assert (config.text, config.chat_template, config.pack, config.hook) == (["web=1", "my chats"], True, False, ["h"])
    assert analyze == f"python analyze.py 'runs/a b' --base-model b --ft-model f --dataset {shlex.quote(config.output)}"
