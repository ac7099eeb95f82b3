"""What a person sees of a run: its plan, the progress bar, metrics.jsonl and wandb, the summary at its end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from string import ascii_uppercase

import torch
from tqdm import tqdm

import checkpoint
import latents


def print_plan(config, source, run: Path, start_from: Path | None, device: torch.device, steps: int, usual_k: int) -> None:
    rows = "endless" if source.train_rows is None else f"{source.train_rows:,} rows"
    single = f"{config.base_dataset} + {config.ft_dataset}" if config.base_dataset else "planted concepts"
    what = config.dataset or " + ".join(config.model_dataset) or single
    if config.base_model:
        what, rows = (
            f"{config.base_model} + {config.ft_adapter or config.ft_model} at {config.hook}",
            f"fills of {source.fill_rows:,} live rows",
        )
    count = 2 * source.n_models * source.d_model * config.d_hidden
    state = f"weights, gradient and Adam's moments {16 * count / 1e6:,.0f} MB"
    detail = f"k {config.k}" if config.variant == "batch_topk" else f"l1_coeff {config.l1_coeff:g}"
    if config.variant == "batch_topk" and config.l1_coeff:
        detail += f" and an added L1 loss of weight {config.l1_coeff:g}"
    print(f"data     {what}: {rows} of {source.n_models} x {source.d_model}, {source.val_rows:,} held out")
    print(f"model    {config.variant}, {config.d_hidden:,} latents, {detail}; {state}")
    print(f"run      {steps:,} steps of {config.batch_size:,} tokens on {device} in {config.compute_dtype}, saved in {run}")
    if config.variant == "vanilla" and config.k != usual_k:
        print("note     --k belongs to --variant batch_topk and does nothing here")
    if start_from:
        print(f"resumed  {start_from}")


def log(run: Path, tracker, step: int, metrics: dict[str, float]):
    """Append a line to metrics.jsonl and tell wandb. Returns the tracker, None once it has failed."""
    with open(run / "metrics.jsonl", "a") as lines:
        lines.write(checkpoint.as_json({"step": step} | metrics))
    if tracker is not None:
        try:
            tracker.log(metrics, step=step)
        except Exception as error:  # noqa: BLE001 - logging must never stop a run
            tqdm.write(f"wandb failed ({error}); metrics.jsonl goes on", file=sys.stderr)
            return None
    return tracker


def show(bar: tqdm, metrics: dict[str, float]) -> None:
    bar.set_postfix_str(
        f"EV {metrics['explained_variance']:.3f}, L0 {metrics['l0_loss']:.1f}, dead {metrics['dead_fraction']:.1%}, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s"
        + (f", models {metrics['model_fraction']:.0%} of the time" if "model_fraction" in metrics else ""),
        refresh=False,
    )


def start_wandb(config, run: Path, run_id: str | None):
    """The wandb run (None when disabled or not to be had) and its id, which a resumed run keeps."""
    mode = config.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto")  # wandb's own switch
    if mode == "disabled":
        return None, run_id
    import wandb

    def init(mode):
        return wandb.init(
            project=config.wandb_project, entity=config.wandb_entity, name=run.name, dir=str(run), id=run_id, mode=mode,
            resume="allow" if mode == "online" else None, config=vars(config),
            settings=wandb.Settings(silent=True, init_timeout=30),
        )  # fmt: skip

    why = "as asked"
    try:
        if mode == "auto":
            mode, why = ("online", "") if wandb.login(prompt=False) else ("offline", "no key found")
        tracker = init(mode)
    except wandb.errors.Error as error:
        mode, why = "offline", str(error).splitlines()[0]
        try:
            tracker = init(mode)
        except wandb.errors.Error:
            raise ValueError(f"wandb refuses to start ({why}); check --wandb-project and --wandb-entity") from None
    print("wandb    online" if mode == "online" else f"wandb    offline ({why}); `wandb sync` uploads it later")
    return tracker, tracker.id


def finish_wandb(tracker, summary: dict[str, float]) -> None:
    if tracker is not None:
        tracker.summary.update(summary)
        tracker.finish()


def count_exclusive(norms: torch.Tensor, dead: torch.Tensor) -> dict[str, int]:
    """For more than two models: how many live latents have over 0.8 of their decoder norm in one (A: the base model).

    norms: [d_hidden, n_models]. dead: [d_hidden] bool.
    """
    share = (norms / norms.sum(-1, keepdim=True).clamp_min(1e-12))[~dead]  # [live, n_models]
    only = (share > latents.FT_ONLY_ABOVE).sum(0).tolist()
    counts = {f"{letter}_only": n for letter, n in zip(ascii_uppercase, only)}  # noqa: B905 - letters are left over
    return {"shared": len(share) - sum(only), **counts, "dead": int(dead.sum())}


def print_summary(summary: dict, config, val_rows: int, run: Path) -> None:
    """The end of a run: held-out metrics, what was found, where it lies."""
    names = {"explained_variance_A": "base", "explained_variance_B": "ft"}  # and C, D, ... of more models
    each = [(names.get(k, k[-1]), v) for k, v in summary.items() if k.startswith("explained_variance_")]
    print(
        f"\nheld out   explained variance {summary['explained_variance']:.3f} "
        f"({', '.join(f'{name} {v:.3f}' for name, v in each)}), L0 {summary['l0_loss']:.1f}, {val_rows:,} rows"
    )
    counts = ", ".join(f"{n} {name.replace('_', '-')}" for name, n in summary["latents"].items())
    print(f"latents    {counts} of {config.d_hidden}")
    if planted := summary.get("planted"):
        print("\nplanted concepts    recall   right class")
        for name in latents.CLASSES:
            print(f"  {name.replace('_', '-'):<18}{planted['recall_' + name]:>6.2f}{planted['class_ok_' + name]:>14.2f}")
        print(f"  exclusive latents that are no exclusive concept: {planted['false_exclusive']:.2f}\n")
    print(f"time       {summary['seconds']:.0f} s, {summary['tokens_per_second']:,.0f} tokens/s")
    print(f"saved      {run / 'crosscoder'}, {run / 'summary.json'}")
