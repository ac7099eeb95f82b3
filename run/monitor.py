"""What a person sees of a run: its plan, its progress, warnings, metrics.jsonl and wandb, the summary at its end."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ops import latents
from run import checkpoint
from run.checkpoint import Progress
from run.machine import as_json, first_line, library_errors, say

if TYPE_CHECKING:
    from sources.source import Source

RECENT = 5  # logged steps from which the speed is taken that the rest of the run is expected to have
SPARSE_COST = 0.45  # of the work of a step with many active codes, what one with few has, on a CPU
FIXED_COST = 0.005  # seconds of a step that the number of codes does not change
LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal: a log file wants few
IN_A_ROW = 3  # logged steps that must agree before a warning: one bad batch is no trend
DEAD_SHARE = 0.5  # of the latents
FALLEN_TO = 0.6  # of the best explained variance so far; an L1 weight that rises as planned does not lower it this far
SOME = 0.1  # explained variance from which on a fall is reported
NOTHING = 0.02  # explained variance below which nothing has been learned
WORSE_THAN_NOTHING = -0.1  # explained variance below which --lr is too high; too strong a penalty leaves it near 0
EARLY = 0.1  # share of the run after which something should have been learned
WAITING_SHARE = 0.5  # of the time


def print_plan(config, source: Source, run: Path, start_from: Path | None, device: torch.device, steps: int) -> None:
    """What will be trained on what, for how long, and where it goes."""
    count = 2 * source.n_models * source.d_model * config.d_hidden
    state = f"weights, gradient and Adam's moments {16 * count / 1e6:,.0f} MB"
    detail = f"k {config.k}" if config.variant == "batch_topk" else f"l1_coeff {config.l1_coeff:g}"
    if config.variant == "batch_topk" and config.k_start > 1:
        start, share = min(config.d_hidden, round(config.k * config.k_start)), config.k_anneal
        detail = f"k from {start} to {config.k} over {share:.0%} of the run (explained variance falls with it, as it should)"
    if config.variant == "batch_topk" and config.l1_coeff:
        detail += f" and an L1 loss of weight {config.l1_coeff:g} that ends at 0"
    say(f"data     {source.describe()} of {source.n_models} x {source.d_model}, {source.val_rows:,} held out")
    say(f"model    {config.variant}, {config.d_hidden:,} latents, {detail}; {state}")
    say(f"run      {steps:,} steps of {config.batch_size:,} tokens on {device} in {config.compute_dtype}, saved in {run}")
    if start_from:
        say(f"resumed  {start_from}")


def log(run: Path, tracker, step: int, metrics: dict[str, float]):
    """Append a line to metrics.jsonl and tell wandb. Returns the tracker, None once it has failed."""
    with checkpoint.write_errors("metrics.jsonl", run), open(run / "metrics.jsonl", "a") as lines:
        lines.write(as_json({"step": step, "time": round(time.time(), 3)} | metrics))
    if tracker is not None:
        try:
            tracker.log(metrics, step=step)
        except Exception as error:  # noqa: BLE001 - logging must never stop a run
            say(f"wandb failed ({error}); metrics.jsonl goes on", sys.stderr)
            return None
    return tracker


class Watched:
    """What is remembered of a run to show how far and how fast it is, and to warn once of each trouble."""

    def __init__(self, steps: int, progress: Progress, few: float = 1.0, quiet: bool = False):
        """few: active codes a token up to which a step is of the faster form."""
        layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"
        self.bar = tqdm(
            total=steps, initial=progress.step, dynamic_ncols=True, mininterval=0.5, bar_format=layout,
            disable=quiet or not sys.stderr.isatty(),
        )  # fmt: skip
        self.steps, self.began, self.shown = steps, time.perf_counter(), -math.inf
        self.recent = deque([(progress.step, self.began)], RECENT)  # (step, when)
        self.few, self.dense_until = few, math.inf
        self.first: tuple[int, float] | None = None  # (step, codes)
        self.steps_before, self.seconds_before = progress.step, progress.seconds  # done before this process began
        self.begin_interval(progress)
        self.last_save = "a first save"
        self.best, self.best_step = SOME, 0  # explained variance; while k is annealed, that of the last logged step
        self.in_a_row = [0, 0, 0]  # logged steps with each trouble
        self.told: set[int] = set()

    def timed(self, stream: Iterator) -> Iterator:
        """The stream's batches; the time until each comes counts as waiting."""
        since = time.perf_counter()
        for batch in stream:
            self.waited += time.perf_counter() - since
            yield batch
            since = time.perf_counter()

    def seconds(self) -> float:
        """Of training, in all processes that went on with the run."""
        return self.seconds_before + time.perf_counter() - self.began

    def seconds_left(self, step: int, codes: float) -> float:
        """Of the run, after this logged step with so many active codes a token, at the speed of the last ones.

        Steps with few codes are faster. How many there are is taken to fall on by equal factors, as it does under a rising
        penalty or a falling k.
        """
        begin, most = self.first = self.first or (step, codes)
        if codes <= self.few:
            self.dense_until = min(self.dense_until, step)
        elif codes < most:
            self.dense_until = step + (step - begin) * math.log(codes / self.few) / math.log(most / codes)

        (before, since), now = self.recent[0], time.perf_counter()
        pace = (now - since) / (step - before)  # seconds a step
        sparse = SPARSE_COST + (1 - SPARSE_COST) * min(1.0, FIXED_COST / pace)

        def work(done: int) -> float:
            return sparse * done + (1 - sparse) * min(done, self.dense_until)

        if before == self.steps_before:
            self.recent.clear()  # the first step takes longer than the others
        self.recent.append((step, now))
        return (now - since) * (work(self.steps) - work(step)) / (work(step) - work(before))

    def rates(self, progress: Progress, source: Source) -> dict[str, float]:
        """Speed and waiting since the last logged step, with the source's own metrics."""
        elapsed = time.perf_counter() - self.interval_began
        speed = (progress.tokens - self.interval_tokens) / elapsed
        return {"tokens_per_second": speed, "data_wait_fraction": self.waited / elapsed} | source.metrics(elapsed)

    def begin_interval(self, progress: Progress) -> None:
        """A step was logged: what comes next counts for the next line. waited: seconds in which the loop waited for a batch."""
        self.interval_began, self.interval_tokens, self.waited = time.perf_counter(), progress.tokens, 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Remember how long a save takes."""
        since = time.perf_counter()
        yield
        self.last_save = f"the last save took {time.perf_counter() - since:.1f} s"


def show(watched: Watched, step: int, metrics: dict[str, float]) -> None:
    """Show the metrics of a logged step."""
    text = f"EV {metrics['explained_variance']:.3f}, L0 {metrics['l0_loss']:.1f}, dead {metrics['dead_fraction']:.1%}"
    text += f", {metrics['tokens_per_second']:,.0f} tokens/s"
    if "model_fraction" in metrics:
        text += f", models {metrics['model_fraction']:.0%} of the time"
    now, left = time.perf_counter(), f"{timedelta(seconds=round(watched.seconds_left(step, metrics['l0_loss'])))} left"
    if step == watched.steps_before + 1 < watched.steps:
        left = "time left not known yet"  # the first step takes longer than the others
    if not watched.bar.disable:
        watched.bar.set_postfix_str(f"{left}, {text}", refresh=False)
    elif now - watched.shown >= LINE_EVERY or step == watched.steps:
        done = f"step {step:,} of {watched.steps:,}, loss {metrics['loss']:.4g}"
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {done}, {text}, {left}", sys.stderr)
        watched.shown = now


def warn(watched: Watched, config, step: int, metrics: dict[str, float]) -> None:
    """Say, once each, what goes wrong at a logged step, and what to try if tests/test_monitor.py shows that it helps."""
    variance, dead, waited = (metrics[name] for name in ("explained_variance", "dead_fraction", "data_wait_fraction"))
    topk = config.variant == "batch_topk"
    annealing = topk and config.k_start > 1 and step < config.k_anneal * watched.steps  # explained variance falls with k
    fell = watched.best_step and not annealing and variance < FALLEN_TO * watched.best
    change = f"fell from {watched.best:.2f} at step {watched.best_step:,} to" if fell else "is"
    if variance > watched.best or annealing:
        watched.best, watched.best_step = max(SOME, variance), step
    explain = f"--k {4 * config.k}" if topk else f"--l1-coeff {config.l1_coeff / 4:g}"
    if variance < WORSE_THAN_NOTHING:
        explain = f"--lr {config.lr / 10:.2g}"
    revive = "see docs/recipes.md" if config.aux_coeff else "try --aux-coeff 1"
    live = "the models fill the buffer meanwhile; try collect.py once, then --dataset"
    sooner = live if config.base_model else "see docs/speed.md"
    # Planted concepts are computed during the run, so waiting for them is expected.
    real = config.base_model or config.dataset or config.base_dataset or config.model_dataset
    nothing = variance < NOTHING and step > EARLY * watched.steps
    troubles = (
        (dead > DEAD_SHARE, f"{dead:.0%} of the latents are dead: {revive}"),
        (fell or nothing, f"explained variance {change} {variance:.2f}: try {explain}"),
        (real and waited > WAITING_SHARE, f"{waited:.0%} of the time goes into waiting for data: {sooner}"),
    )
    for place, (now, text) in enumerate(troubles):
        watched.in_a_row[place] = watched.in_a_row[place] + 1 if now else 0
        if watched.in_a_row[place] >= IN_A_ROW and place not in watched.told:
            watched.told.add(place)
            watched.bar.clear()
            say(f"warning  step {step:,}: {text}", sys.stderr)


def start_wandb(config, run: Path, progress: Progress):
    """The wandb run, None when disabled. A resumed run keeps its id, which is kept in `progress`."""
    mode = os.environ.get("WANDB_MODE", "auto") if config.wandb == "auto" else config.wandb  # wandb's own switch
    if mode == "disabled":
        return None
    # Seconds that the start and the end of a run wait for a network that is gone; wandb's files stay on the disk.
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
    import wandb

    def init(mode):
        return wandb.init(
            project=config.wandb_project, entity=config.wandb_entity, name=run.name, dir=str(run), config=vars(config),
            mode=mode, id=progress.wandb_id, resume="allow" if mode == "online" else None, settings=wandb.Settings(silent=True),
        )  # fmt: skip

    why = "as asked"
    try:
        if mode == "auto":
            mode, why = ("online", "") if wandb.login(prompt=False) else ("offline", "no key found")
        tracker = init(mode)
    except wandb.errors.Error as error:
        mode, why = "offline", first_line(error)
        with library_errors("wandb refuses to start", "check --wandb-project and --wandb-entity", wandb.errors.Error):
            tracker = init(mode)
    say("wandb    online" if mode == "online" else f"wandb    offline ({why}); `wandb sync` uploads it later")
    progress.wandb_id = tracker.id
    return tracker


def finish_wandb(tracker, summary: dict[str, float]) -> None:
    if tracker is not None:
        tracker.summary.update(summary)
        tracker.finish()


def print_summary(summary: dict, config, val_rows: int, run: Path, following: str) -> None:
    """The end of a run: held-out metrics, what was found, where it lies, the command that follows."""
    names = {"explained_variance_A": "base", "explained_variance_B": "ft"}  # and C, D, ... of more models
    each = [f"{names.get(k, k[-1])} {v:.3f}" for k, v in summary.items() if k.startswith("explained_variance_")]
    variance = f"explained variance {summary['explained_variance']:.3f}" + f" ({', '.join(each)})" * (len(each) > 1)
    say(f"\nheld out   {variance}, L0 {summary['l0_loss']:.1f}, {val_rows:,} rows")
    if dropped := summary["rows_dropped"]:
        outliers = summary["rows_dropped_by_norm"]
        say(f"left out   {outliers:,} rows by their norm (--max-norm-ratio), {dropped - outliers:,} with NaN or inf")
    counts = ", ".join(f"{n} {name.replace('_', '-')}" for name, n in summary["latents"].items())
    if "latents_by_norm" not in summary:
        say(f"latents    {counts} of {config.d_hidden}" + ", by decoder norm" * ("shared" in summary["latents"]))
    else:
        say(f"latents    {counts} of {config.d_hidden}; exclusive are those on which both ways agree:")
        for way in ("norm", "scaling"):
            of = summary[f"latents_by_{way}"]
            name = "decoder norm" if way == "norm" else "latent scaling"
            say(f"           {of['base_only']} base-only, {of['ft_only']} ft-only by {name} alone")
    if planted := summary.get("planted"):
        say("\nplanted concepts    recall   right class")
        for name in latents.CLASSES:
            say(f"  {name.replace('_', '-'):<18}{planted['recall_' + name]:>6.2f}{planted['class_ok_' + name]:>14.2f}")
        say(f"  exclusive latents that are no exclusive concept: {planted['false_exclusive']:.2f}\n")
    say(f"time       {summary['seconds']:.0f} s, {summary['tokens_per_second']:,.0f} tokens/s")
    say(f"saved      {run / 'crosscoder'}, {run / 'summary.json'}")
    if following:
        say(f"next       {following}")
