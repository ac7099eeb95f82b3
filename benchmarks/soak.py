"""Kill a run at random moments, some of them inside a save, resume it, and compare its end with a run that was left alone.

    python benchmarks/soak.py                            50 kills, 10 of them inside a save, 5 inside the final save
    python benchmarks/soak.py --kills 3 --inside-saves 1 --inside-final-save 1

Both runs train the same small dictionary on planted concepts on one CPU process in float32. After each kill the next start must
remove what was left half written, and the final weights and metrics must be equal bit for bit. Prints one line; the exit status
is 1 if anything differs. Kills fall into four kinds: while the run starts, at a random step, inside a save of a checkpoint (the
half-written folder is still there after the kill), and inside the final save: crosscoder/ has been begun and summary.json is
not yet written. A run that is faster than such a kill is finished; it measures and saves again when it is started again.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
STEPS_A_KILL = 40
AT_START = 0.2  # share of the kills that come before the first step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--inside-saves", type=int, default=10, help="how many of the kills must hit a save")
    parser.add_argument("--inside-final-save", type=int, default=5, help="how many must hit the final save")
    parser.add_argument("--seed", type=int, default=0, help="decides when the kills come")
    parser.add_argument(
        "--minutes", type=float, default=60, help="no further kill after this time; the run then ends undisturbed"
    )
    args = parser.parse_args()
    draw = random.Random(args.seed)
    steps = STEPS_A_KILL * (args.kills + 2)
    began, counts, left = time.time(), {"start": 0, "step": 0, "save": 0, "final": 0}, set()
    random_kills = args.kills - args.inside_final_save
    with tempfile.TemporaryDirectory() as folder:
        recipe = [
            *["--num-tokens", 64 * steps, "--batch-size", 64, "--d-hidden", 256, "--k", 4, "--variant", "batch_topk"],
            *["--save-every", 10, "--log-every", 5, "--val-every", 100, "--val-tokens", 256, "--dead-window", 0.02],
            *["--wandb", "disabled", "--device", "cpu", "--compute-dtype", "float32", "--output-dir", folder],
        ]
        straight, run = Path(folder) / "straight", Path(folder) / "killed"
        finish(start(straight, recipe), straight)
        for kill in range(random_kills):
            if time.time() - began > 60 * args.minutes:
                break
            target = int(
                steps * (kill + draw.random()) / (args.kills + 1)
            )  # later than the one before: the run cannot end early
            missing = args.inside_saves - counts["save"]
            kind = "save" if draw.random() < 1.5 * missing / (random_kills - kill) else "step"
            if kind == "step" and kill and draw.random() < AT_START:
                kind = "start"
            process = start(run, [*recipe, "--resume", "auto"])
            if kind == "start":
                time.sleep(draw.uniform(0, 5))
            else:
                wait_for_step(process, run, target)
                check_leftovers(run, left)
                while kind == "save" and process.poll() is None and not half_written(run):
                    time.sleep(0.0002)
                time.sleep(draw.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise SystemExit(f"soak: kill {kill + 1}: the run ended by itself, see\n{log_of(run).read_text()[-2000:]}")
            left = half_written(run)
            hit = kind if kind == "start" else "save" if left else "step"
            counts[hit] += 1
        while counts["final"] < args.inside_final_save and time.time() - began < 60 * args.minutes:
            process = start(run, [*recipe, "--resume", "auto"])
            while process.poll() is None and not saves_result(run, process.began):
                time.sleep(0.0002)
            check_leftovers(run, left)
            time.sleep(draw.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                finish(process, run)
            left = half_written(run)
            counts["final"] += saves_result(run, process.began)
        finish(start(run, [*recipe, "--resume", "auto"]), run)
        check_leftovers(run, left)
        same = same_weights(straight, run) and losses(straight) == losses(run)
        left = half_written(run)
    print(
        f"{sum(counts.values())} kills ({counts['save']} inside a save, {counts['final']} inside the final save, "
        f"{counts['start']} while starting) over {steps} steps in {time.time() - began:.0f} s: "
        "every resume started, final weights and metrics "
        f"{'are the same bits' if same else 'DIFFER'}, {len(left)} temporary files left"
    )
    return 0 if same and not left and counts["save"] >= args.inside_saves and counts["final"] >= args.inside_final_save else 1


def start(run: Path, flags: list) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "--run-name", run.name, *map(str, flags)]
    with open(log_of(run), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    process.began = time.time()
    return process


def log_of(run: Path) -> Path:
    return run.with_suffix(".log")


def finish(process: subprocess.Popen, run: Path) -> None:
    if process.wait():
        raise SystemExit(f"soak: {run.name} failed:\n{log_of(run).read_text()[-2000:]}")


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until the process itself, not one before it, has logged a step that far."""
    while process.poll() is None:
        lines = lines_of(run)
        if lines and lines[-1]["time"] > process.began and lines[-1]["step"] >= step:
            return
        time.sleep(0.002)
    raise SystemExit(f"soak: the run ended before step {step}:\n{log_of(run).read_text()[-2000:]}")


def lines_of(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def half_written(run: Path) -> set[tuple[Path, int]]:
    """Temporary files and folders of a run, with the time of their last change: a later save uses the same names."""
    found = set()
    for path in (*(run / "checkpoints").glob(".*"), *run.glob(".*"), *(run / "crosscoder").glob("*.partial")):
        try:
            found.add((path, path.stat().st_mtime_ns))
        except FileNotFoundError:  # renamed just now
            continue
    return found


def saves_result(run: Path, since: float) -> bool:
    """Whether a process that was started at `since` has begun to write crosscoder/ and not yet put summary.json in place."""

    def written(path: Path) -> bool:
        try:
            return path.stat().st_mtime > since
        except FileNotFoundError:  # renamed just now
            return False

    return any(map(written, (run / "crosscoder").glob("*"))) and not written(run / "summary.json")


def check_leftovers(run: Path, left: set) -> None:
    if stale := left & half_written(run):
        raise SystemExit(f"soak: the next start left {', '.join(str(path) for path, _ in stale)}")


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_file(run / "crosscoder" / "model.safetensors") for run in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(run: Path) -> list:
    """Every logged number that does not measure time."""
    timing = {"time", "tokens_per_second", "data_wait_fraction"}
    return [{name: value for name, value in line.items() if name not in timing} for line in lines_of(run)]


if __name__ == "__main__":
    sys.exit(main())
