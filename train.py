"""Train a crosscoder: `python train.py --help`. The whole run, top to bottom."""

from __future__ import annotations

from config import TrainConfig
from run.flags import parse

if __name__ == "__main__":
    CONFIG = parse(TrainConfig)  # before torch is imported, so that --help and a wrong flag answer at once

import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from contextlib import closing
from functools import partial
from pathlib import Path
from string import ascii_uppercase

import torch
from torch import Tensor

from crosscoder import CrossCoder, Losses
from ops import latents
from ops.dead import DeadLatents
from ops.resample import look_after, resample_idle
from ops.shard import Shard
from ops.sparse import fast_dtype, sparse_share
from ops.variance import VarianceTotals, explained_variance
from ops.weights import Adam
from run import checkpoint, flags, hub, limits, machine, monitor, resume
from run.checkpoint import Progress, TrainingState
from run.machine import say
from run.warm_start import WarmStart
from sources.batches import estimate_normalization, raw_sample, validation_batches
from sources.opening import open_source
from sources.source import Dropped, Source

ONE_SIGNAL = 3.0  # seconds within which signals count as one: a scheduler may send its own to torchrun and to its processes
L1_RELEASE = 0.2  # share of a batch_topk run, at its end, over which the L1 weight falls to 0
DEAD_AFTER_AT_MOST = 10_000_000  # tokens without firing (Gao et al., arXiv 2406.04093)


def main(given: TrainConfig, shard: Shard) -> int:  # noqa: C901 - the training loop, written out from top to bottom
    """Train, evaluate, save. Returns the exit status: 0, or 128 + signal after Ctrl-C or SIGTERM."""
    flags.check(given, shard.size)
    device = shard.join(torch.device(machine.usable_device(given.device)))
    machine.choose_precision()
    if shard.rank > 0:  # process 0 alone prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    begun = resume.begin(given, shard)

    # --- the data, and the settings that follow from it
    warm = WarmStart(given.init_from, given.variant, given.d_hidden) if given.init_from and not begun.checkpoint else None
    config = flags.resolve_sizes(given, begun.resolved, warm, fast_dtype(device), shard.size)
    if begun.checkpoint:
        resume.refuse_changes(dataclasses.asdict(config), begun.resolved)
    with machine.working("opening the activations"):
        source, config = open_source(given, config, device, begun.data, shard)
    config = flags.resolve_lengths(given, config, source.train_rows, source.d_model)
    if warm:
        config = dataclasses.replace(config, k=warm.settle_k(raw_sample(source), given.k))
    stop, steps = config.num_tokens, steps_of(config)  # tokens, optimizer steps
    dead_after = min(DEAD_AFTER_AT_MOST, max(config.batch_size, int(config.dead_window * stop)))  # tokens
    if not any(len(x) for x in validation_batches(source, config.batch_size, torch.device("cpu"))):
        raise ValueError("every held-out row holds NaN or inf, or lies above --max-norm-ratio: give another --val-tokens")
    with shard.together():
        limits.require_memory(config, source, device, shard.size)
        limits.require_room(config, source, begun.run)
        if config.push_to_hub and shard.rank == 0:
            hub.open_repository(config.push_to_hub, "model")
    if begun.checkpoint:
        resume.refuse_other_data(resume.facts(source), begun.data)
    run, locked = begun.run, None
    with shard.together():
        if shard.rank == 0:
            run, locked = resume.claim(begun, given, config, source)
    run = Path(shard.from_first(str(run)))

    # --- model, optimizer, schedule
    torch.manual_seed(config.seed)
    crosscoder = CrossCoder(
        source.d_model, config.d_hidden, source.n_models, config.variant, config.k, config.k_aux,
        config.dec_init_norm, config.seed, getattr(torch, config.compute_dtype), shard,
    )  # fmt: skip
    progress = Progress()
    if not begun.checkpoint:
        since = time.perf_counter()  # live models fill their buffer for this, so it counts as training
        mean, scale = estimate_normalization(source, config.center)
        crosscoder.mean.copy_(mean / source.stored_scale.double()[:, None])
        crosscoder.scale.copy_(scale * source.stored_scale.double())
        progress.seconds = time.perf_counter() - since
    crosscoder.to(device)
    if warm:
        warm.copy_to(crosscoder)
    unscale = raw_factor(source).to(device)  # [n_models, 1] stored values -> raw activations
    optimizer = Adam(crosscoder.parameters(), lr=config.lr, betas=(config.beta1, config.beta2))
    schedule = partial(lr_factor, steps=steps, warmup=config.lr_warmup, decay=config.lr_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    tokens_since_fired = torch.zeros(len(crosscoder.b_enc), dtype=torch.int64, device=device)
    bad_step = torch.zeros((), dtype=torch.int64, device=device)  # first step whose loss was not finite; 0: none
    state = TrainingState(crosscoder, optimizer, scheduler, tokens_since_fired, source, progress)
    if begun.checkpoint:
        checkpoint.load(begun.checkpoint, state)
        for group in optimizer.param_groups:  # as the schedule has it now: the run may be longer than it was
            group["lr"] = config.lr * schedule(progress.step)
    dead_latents = DeadLatents(tokens_since_fired, dead_after, config.batch_size, shard)
    if shard.rank == 0:
        checkpoint.cut_metrics(run, progress.step)
    monitor.print_plan(config, source, run, begun.checkpoint, device, steps)
    if progress.position >= stop:
        say("finished all its steps are done: the result is measured and saved again; --num-tokens makes the run longer")
    with shard.together():  # the last wait that may be long: in the loop all answer within a minute
        tracker = monitor.start_wandb(config, run, progress) if shard.rank == 0 else None

    # --- the loop
    signals = catch_signals()
    recent: deque = deque(maxlen=1000)  # (step, first row, last row) of the latest batches, to name the rows of a bad one
    few = sparse_share(device, crosscoder.compute_dtype) * config.d_hidden
    watched = monitor.Watched(steps, progress, few, quiet=shard.rank > 0)
    stream = source.batches(config.batch_size, stop, device, progress.position, Dropped(*progress.dropped), shard)
    with closing(stream), limits.memory_errors(run):
        for batch in watched.timed(stream):
            step = progress.step = progress.step + 1
            progress.position, progress.dropped = batch.position, batch.dropped
            recent.append((step, batch.first_row, batch.last_row))

            x = crosscoder.normalize(batch.x.float() * unscale)  # [batch, n_models, d_model]
            l1_coeff = l1_weight(step, steps, config)
            k = annealed_k(step, steps, config) if config.variant == "batch_topk" else None
            dead, most_dead = dead_latents.now(progress.tokens) if config.aux_coeff else (None, None)
            out = losses_and_gradients(crosscoder, x, config.micro_batch_size, l1_coeff, config.aux_coeff, dead, k, most_dead)

            lr = optimizer.param_groups[0]["lr"]
            grad_norm = update(crosscoder, optimizer, config.grad_clip)
            scheduler.step()
            if look := look_after(step, steps, config.resample_until):
                resample_idle(crosscoder, x, out.x_hat, look)

            progress.tokens += len(x)
            tokens_since_fired.add_(len(x)).masked_fill_(out.fired, 0)
            bad_step = torch.where((bad_step == 0) & ~out.loss.isfinite(), step, bad_step)
            stopping = shard.any_process(bool(signals))
            last = progress.position >= stop or stopping
            validate, save = step % config.val_every == 0 and not last, step % config.save_every == 0 or last
            if step == 1 or step % config.log_every == 0 or validate or last:
                require_finite_loss(bad_step, recent, run)
                metrics = training_metrics(out, x, tokens_since_fired >= dead_after, crosscoder, grad_norm)
                metrics |= {"l1_coeff": l1_coeff, "lr": lr, "tokens": progress.tokens} | watched.rates(progress, source)
                if validate:
                    metrics |= evaluate(crosscoder, source, config.micro_batch_size, unscale, l1_coeff)
                if shard.rank == 0:
                    tracker = monitor.log(run, tracker, step, metrics)
                    monitor.show(watched, step, metrics)
                    monitor.warn(watched, config, step, metrics)
                watched.begin_interval(progress)
            if save:
                require_finite_loss(bad_step, recent, run)
                if stopping:  # said at once: whoever sent the signal may not wait for the save
                    kept = checkpoint.newest(run)
                    watched.bar.clear()
                    say(f"{name_of(signals)}: saving step {step} ({watched.last_save}), then leaving; killed before that, the "
                        f"run goes on from {kept.name if isinstance(kept, Path) else 'its beginning'}")  # fmt: skip
                progress.seconds = watched.seconds()
                with watched.saving():
                    checkpoint.save(run, state, config.keep_checkpoints)
                dead_latents.forget()
            watched.bar.update()
            if last or (save and shard.any_process(bool(signals))):
                break  # a signal that came in after a save is saved by the next step
    watched.bar.close()
    progress.seconds = watched.seconds()
    if shard.any_process(bool(signals)):
        say(f"stopped by {name_of(signals)}, saved at step {progress.step}. Go on with:")
        say(f"python train.py --resume {shlex.quote(str(run))}")
        monitor.finish_wandb(tracker, {})
        return 128 + signal.Signals[name_of(signals)]
    finish(config, state, run, tracker, dead_after)
    if locked is not None:
        os.close(locked)
    return 0


def finish(config: TrainConfig, state: TrainingState, run: Path, tracker, dead_after: int) -> None:
    """What follows the last step: the inference threshold, the held-out metrics, the saved crosscoder and summary.json.

    In float32, as the crosscoder will be used, on rows that were never trained on.
    """
    crosscoder, source, progress, shard = state.crosscoder, state.source, state.progress, state.crosscoder.shard
    source.close()
    unscale = raw_factor(source).to(crosscoder.W_dec.device)
    crosscoder.compute_dtype = torch.float32
    with limits.memory_errors(run):
        if config.variant == "batch_topk":
            crosscoder.fit_threshold(lambda: held_out(crosscoder, source, config.micro_batch_size, unscale))
        l1_coeff = l1_weight(progress.step, steps_of(config), config)
        final = evaluate(crosscoder, source, config.micro_batch_size, unscale, l1_coeff)
        kinds = None
        if source.n_models == 2:
            kinds = latent_classes(crosscoder, held_out(crosscoder, source, config.micro_batch_size, unscale))
    checkpoint.require_finite(crosscoder.state_dict(), progress.step, run, shard)
    with checkpoint.write_errors("the crosscoder", run, shard):
        crosscoder.save_pretrained(run / "crosscoder")
    dead = shard.gather_rows(state.tokens_since_fired >= dead_after)  # [d_hidden]
    W_dec = shard.whole(crosscoder.W_dec.detach(), config.d_hidden)  # [d_hidden, n_models, d_model], in process 0
    if W_dec is None:
        return
    monitor.log(run, tracker, progress.step, final)
    last_step = max(0, progress.step - 1)
    lr = config.lr * lr_factor(last_step, steps_of(config), config.lr_warmup, config.lr_decay)
    summary = {name.removeprefix("val_"): value for name, value in final.items()} | {"l1_coeff": l1_coeff, "lr": lr}
    summary |= {"dead_fraction": dead.float().mean().item(), "threshold": crosscoder.threshold.item()}
    summary |= {"tokens": progress.tokens, "seconds": progress.seconds}
    summary |= {"tokens_per_second": progress.tokens / max(progress.seconds, 1e-9)}
    summary |= {"rows_dropped": sum(progress.dropped), "rows_dropped_by_norm": progress.dropped[1]}
    if kinds is None:
        summary["latents"] = latents.count_owners(W_dec.norm(dim=-1), dead)
    else:
        names = ("latents_by_norm", "latents_by_scaling", "latents")
        summary |= {name: latents.count_classes(kind_of, dead) for name, kind_of in zip(names, kinds, strict=True)}
        if truth := source.score(W_dec, dead, kinds.agreed):
            summary["planted"] = truth
        with checkpoint.write_errors("classes.json", run):
            machine.write_text(run / "crosscoder" / "classes.json", machine.as_json(latents.list_classes(kinds.agreed, dead)))
    with checkpoint.write_errors("summary.json", run):
        machine.write_text(run / "summary.json", machine.as_json(summary, indent=2))
    monitor.finish_wandb(tracker, {name: value for name, value in summary.items() if not isinstance(value, dict)})
    following = flags.analyze_command(config, source.pair, source.n_models, run)
    monitor.print_summary(summary, config, source.val_rows, run, following)
    if config.push_to_hub:
        hub.push_crosscoder(config.push_to_hub, run, W_dec.norm(dim=-1), source.pair)


# --- during the run


def steps_of(config: TrainConfig) -> int:
    """Optimizer steps of the run."""
    return math.ceil(config.num_tokens / config.batch_size)


def raw_factor(source: Source) -> Tensor:
    """[n_models, 1] float32 factors from stored values to raw activations."""
    return (1 / source.stored_scale.double()).float()[:, None]


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the peak learning rate after `step` steps: linear rise, constant, linear fall to 0 at the end."""
    rise = (step + 1) / max(1.0, warmup * steps)  # the first step already learns
    fall = (steps - step) / max(1.0, decay * steps)
    return max(0.0, min(1.0, rise, fall))


def l1_weight(step: int, steps: int, config: TrainConfig) -> float:
    """Weight of the L1 loss at this step: a linear rise, and for batch_topk a linear fall to 0 at the end.

    There the penalty only has to separate concepts: k makes the codes sparse, and without a penalty nothing stays shrunk.
    Vanilla's codes are sparse by the penalty alone, so there it stays.
    """
    rise = min(1.0, step / max(1.0, config.l1_warmup * steps))
    fall = min(1.0, (steps - step) / max(1.0, L1_RELEASE * steps)) if config.variant == "batch_topk" else 1.0
    return config.l1_coeff * rise * fall


def annealed_k(step: int, steps: int, config: TrainConfig) -> int:
    """Active latents per token at this step: k_start * k at the beginning, falling by equal factors to k."""
    left = max(0.0, 1 - step / max(1.0, config.k_anneal * steps))
    return min(config.d_hidden, round(config.k * config.k_start**left))


def catch_signals() -> list[int]:
    """A list that Ctrl-C and SIGTERM append to; the loop saves and leaves at the next step. A later one interrupts at once."""
    caught: list[int] = []
    since = time.monotonic()

    def note(number, frame):
        nonlocal since
        if caught and time.monotonic() - since > ONE_SIGNAL:
            raise KeyboardInterrupt
        since = since if caught else time.monotonic()
        caught.append(number)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return caught


def name_of(signals: list[int]) -> str:
    """The signal that stops the run; SIGTERM where another process got it."""
    return signal.Signals(signals[0]).name if signals else "SIGTERM"


# --- measuring


@torch.no_grad()
def training_metrics(out: Losses, x: Tensor, dead: Tensor, crosscoder: CrossCoder, grad_norm: Tensor) -> dict[str, float]:
    """Metrics of one training batch of normalised activations [batch, n_models, d_model], in one copy to the host."""
    values = {
        **{name: getattr(out, name) for name in ("loss", "l2_loss", "l1_loss", "l0_loss")},
        **by_model("explained_variance", explained_variance(x, out.x_hat)),
        "aux_loss": out.aux_loss,
        "dead_fraction": crosscoder.shard.all_sum(dead.sum()) / crosscoder.d_hidden,
        "threshold": crosscoder.threshold,
        "grad_norm": grad_norm,
    }
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))


def by_model(name: str, values) -> dict:
    """`name` for all models together, `name_A` for the base model, `name_B` for the next, ... values: [1 + n_models]."""
    return dict(zip([name, *(f"{name}_{letter}" for letter in ascii_uppercase)], values))  # noqa: B905 - letters are left over


def held_out(crosscoder: CrossCoder, source, batch_size: int, unscale: Tensor):
    """The held-out rows, normalised: batches of [batch, n_models, d_model]."""
    if unscale.device.type != "cpu":
        batch_size = min(batch_size, limits.HELD_OUT_AT_ONCE)
    for stored in validation_batches(source, batch_size, unscale.device):
        yield crosscoder.normalize(stored.float() * unscale)


@torch.no_grad()
def evaluate(crosscoder: CrossCoder, source: Source, batch_size: int, unscale: Tensor, l1_coeff: float) -> dict[str, float]:
    """val_ metrics over all held-out rows, with inference codes. Totals in float64; nothing of the run's state moves."""
    totals, active, l1 = VarianceTotals(), 0, 0
    norm_sum = crosscoder.decoder_norms().sum(-1)
    for x in held_out(crosscoder, source, batch_size, unscale):
        f = crosscoder.encode(x, normalized=True)
        totals.add(x, crosscoder.decode(f, normalized=True))
        active = active + (f > 0).sum()
        l1 = l1 + (f.sum(0) * norm_sum).sum().double()
    active, l1 = crosscoder.shard.all_sum(active), crosscoder.shard.all_sum(l1)
    l2_loss, l1_loss = totals.error.sum().item() / totals.rows, l1.item() / totals.rows
    return {
        "val_loss": l2_loss + l1_coeff * l1_loss,
        "val_l2_loss": l2_loss,
        "val_l1_loss": l1_loss,
        "val_l0_loss": active.item() / totals.rows,
        **by_model("val_explained_variance", totals.explained().tolist()),
    }


@torch.no_grad()
def latent_classes(crosscoder: CrossCoder, batches) -> latents.Classes:
    """Class of every latent of a crosscoder of two models, measured on normalised held-out batches [batch, 2, d_model].

    Of several processes each measures its own latents, and all get the classes of all.
    """
    sums, W_dec = None, crosscoder.W_dec.detach()
    for x in batches:
        f = crosscoder.encode(x, normalized=True)
        x_hat = crosscoder.decode(f, normalized=True)
        part, _ = latents.latent_sums(x, f, W_dec, crosscoder.b_dec, x_hat=x_hat)
        sums = part if sums is None else sums + part
    return latents.Classes(*(crosscoder.shard.gather_rows(kind_of) for kind_of in latents.classes(sums, W_dec)))


def losses_and_gradients(crosscoder: CrossCoder, x: Tensor, at_once: int, *args) -> Losses:
    """Losses of the rows x, `at_once` of them at a time; their gradients add up in the parameters.

    Losses are means over the rows. What is chosen over a batch (codes of batch_topk and of the auxiliary loss) is chosen
    over each part. args: of CrossCoder.losses.
    """
    parts = []
    for part in x.split(at_once):
        out = crosscoder.losses(part, *args)
        (out.loss * (len(part) / len(x))).backward()
        parts.append(Losses(*(value.detach() for value in out)))
    if len(parts) == 1:
        return parts[0]
    means = [sum(out[i] * (len(out.x_hat) / len(x)) for out in parts) for i in range(5)]
    return Losses(*means, torch.stack([out.fired for out in parts]).any(0), torch.cat([out.x_hat for out in parts]))


def update(crosscoder: CrossCoder, optimizer: torch.optim.Optimizer, grad_clip: float) -> Tensor:
    """One step of the optimizer on the gradient, clipped to this norm. Returns the norm that it had, and frees it."""
    grad_norm = norm_of_gradient(crosscoder)
    optimizer.grad_scale = (grad_norm / grad_clip).clamp_min(1)  # Adam divides the gradient by it
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def norm_of_gradient(crosscoder: CrossCoder) -> Tensor:
    """L2 norm of the gradient of all parameters. b_dec is the same in every process and counts once."""
    sliced = [p.grad for name, p in crosscoder.named_parameters() if name != "b_dec"]
    squared = crosscoder.shard.all_sum(torch.nn.utils.get_total_norm(sliced).square())
    return (squared + crosscoder.b_dec.grad.square().sum()).sqrt()


def require_finite_loss(bad_step: Tensor, recent: deque, run: Path) -> None:
    """ValueError if the loss was not finite at some step since the last look."""
    if step := int(bad_step):
        where = next((f"rows {low} to {high} of the training rows" for at, low, high in recent if at == step), "unknown rows")
        raise ValueError(
            f"the loss of step {step} is not finite (its batch lies in {where}): lower --lr, or look at those rows. "
            f"Last good checkpoint: {checkpoint.newest(run, step)}"
        )


if __name__ == "__main__":
    shard = Shard.of_torchrun()
    try:
        with limits.memory_errors():
            status = main(CONFIG, shard)
        shard.leave()
        sys.exit(status)
    except (ValueError, OSError) as error:
        if shard.rank > 0:  # what all processes find, the first one says, and torchrun ends the others as it leaves
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:  # before the loop, or a second time
        say("interrupted: what was not yet saved is left out, what was saved before is whole", sys.stderr)
        sys.exit(130)
