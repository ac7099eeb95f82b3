"""Several hooks and several processes of collect.py, through its real command line: the files are those of one of each."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import ROOT, failure, read_pair, torchrun
from processes import Started, finished, several

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


def killed_behind(argv, progress: Path, shards: int, n: int = 1) -> int:
    """Run in n processes, and kill them once so many training shards are counted there. Returns how many were then."""
    processes = several(n, *argv) if n > 1 else [Started(*argv)]
    while not progress.exists() or json.loads(progress.read_text())["shards"]["train"] < shards:
        assert [p.poll() for p in processes] == [None] * n, [p.output() for p in processes]
        time.sleep(0.002)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()
    return json.loads(progress.read_text())["shards"]["train"]


def completed_by(n: int, argv) -> list[str]:
    """What each of n processes printed."""
    processes = several(n, *argv)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * n, outputs
    return [out for out, _ in outputs]


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


# --- several processes


def test_killed_and_completed_by_other_numbers_of_processes(tiny, alone, tmp_path):
    out = tmp_path / "both"
    argv, progress = command(tiny, out), out / HOOKS[0] / "progress.json"
    two = killed_behind(argv, progress, 2, n=2)
    three = killed_behind(argv, progress, two + 3, n=3)
    assert 2 <= two < three < len(list((alone[HOOKS[0]] / "base" / "train").glob("*.arrow"))) - 3
    said = completed_by(2, argv)
    assert f"python train.py --dataset {out / HOOKS[0]}" in said[0] and not said[1]
    for hook in HOOKS:
        assert files(out / hook) == files(alone[hook])


def test_three_processes_of_torchrun_write_the_files_of_one(tiny, alone, tmp_path):
    process = torchrun(3, *command(tiny, tmp_path / "both"))
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert printed.count("median norm at") == 2 and errors.count("100%") == 2  # the bars of one process
    for hook in HOOKS:
        assert files(tmp_path / "both" / hook) == files(alone[hook])


def test_texts_that_end_and_refused_chats_are_counted_alike(tiny, tmp_path):
    """One document a sequence, sorted by length in draws; the template refuses a chat now and then."""
    docs = [p for p in Path(tiny["prose"]).read_text().split("\n\n") if len(p) > 40][:400]
    asked = [[{"role": "system" if i % 7 == 3 else "user", "content": f"What? {p}"}] for i, p in enumerate(docs)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in asked))
    model = shutil.copytree(tiny["ft"], tmp_path / "ft")
    (model / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0]['content'] }}"
    )
    flags = ["--base-model", tiny["base"], "--ft-model", model, "--hook", HOOKS[0], "--model-dtype", "float32", "--seq-len", 96]
    flags += ["--text", tmp_path / "chats.jsonl", "--chat-template", "--no-pack", "--batch-size", 4, "--shard-rows", 1500]
    for tokens in (100_000, 9_000):  # more than there is; less
        outs = [tmp_path / f"{tokens}-{n}" for n in (1, 2, 3)]
        for n, out in enumerate(outs, start=1):
            argv = [str(ROOT / "collect.py"), *map(str, flags), "--num-tokens", str(tokens), "--output", str(out)]
            completed(argv) if n == 1 else completed_by(n, argv)
        pair = read_pair(outs[0])
        assert (sum(pair["rows"].values()) == tokens) == (tokens == 9_000)
        assert pair["text"][0]["refused"] == 57 if tokens > 9_000 else 0 < pair["text"][0]["refused"] <= 57
        assert len(list(outs[0].glob("base/train/*.arrow"))) > 4
        assert files(outs[1]) == files(outs[0]) and files(outs[2]) == files(outs[0])


def test_a_lost_process_ends_the_others_and_nothing_is_lost(tiny, alone, tmp_path):
    argv = command(tiny, tmp_path / "one", hooks=HOOKS[:1])
    processes = several(2, *argv)
    progress = tmp_path / "one" / "progress.json"
    while not progress.exists() or not json.loads(progress.read_text())["shards"]["train"]:
        assert [p.poll() for p in processes] == [None] * 2, [p.output() for p in processes]
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGKILL)
    _, errors = processes[0].communicate(timeout=100)
    assert processes[0].returncode == 1 and "Traceback" not in errors
    assert "collect.py: error: another process of this run has ended" in errors.splitlines()[-1]
    completed(argv)
    assert files(tmp_path / "one") == files(alone[HOOKS[0]])


def test_what_several_processes_cannot_have_is_refused(tiny, tmp_path):
    for flags, want in (
        (["--ft-device", "cpu"], "each of several processes takes one device"),
        (["--hook", "no"], "--hook no:"),
    ):
        processes = several(2, *command(tiny, tmp_path / "never", *flags))
        errors = processes[0].communicate(timeout=100)[1]
        processes[1].send_signal(signal.SIGTERM)  # as torchrun does
        assert want in errors.splitlines()[-1] and "Traceback" not in errors and processes[0].returncode == 1
        assert "error" not in processes[1].communicate(timeout=100)[1]
