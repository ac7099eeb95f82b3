"""Train a crosscoder: `python train.py --help`. The whole run, top to bottom."""

from __future__ import annotations

from config import LR_FACTOR, PLANTED, REAL, WARM, TrainConfig, resolve_sizes
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

from crosscoder import CrossCoder, Losses, explained, explained_variance
from formats import active_latents, read_warm_start, with_normalization
from ops import latents
from ops.shard import Shard
from ops.sparse import fast_dtype
from run import checkpoint, hub
from run import resume as prepare
from run.monitor import count_exclusive, finish_wandb, log, print_plan, print_summary, say, show, start_wandb, warn, watch
from sources.batches import batches, estimate_normalization, raw_sample, validation_batches
from sources.planted import PlantedConcepts

ONE_SIGNAL = 3.0  # seconds: a terminal or a scheduler that signals torchrun and its processes alike means it once
DEAD_AFTER_AT_MOST = 10_000_000  # tokens without firing (Gao et al., arXiv 2406.04093)


def main(given: TrainConfig, shard: Shard) -> int:
    """Train, evaluate, save. Returns the exit status: 0, or 128 + signal after Ctrl-C or SIGTERM."""
    prepare.check(given, shard)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device)
    device = shard.join(device)
    if shard.rank > 0:  # process 0 alone prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
    start_from = prepare.resume_point(given, shard)  # a checkpoint, or None
    run = start_from.parents[1] if start_from else Path(given.output_dir) / shard.from_first(prepare.run_name(given))
    if start_from is None and given.resume is None and shard.any_process(run.exists()):  # before the first makes it
        raise ValueError(prepare.name_is_taken(run))
    saved, saved_data = prepare.read_record(run) if start_from else (None, None)

    # --- data, and what follows from it
    live = given.base_model is not None  # straight from the two models
    streams = live or given.streaming  # through a buffer, each row once an epoch
    usual = REAL if live or given.dataset or given.base_dataset or given.model_dataset else PLANTED
    warm = read_warm_start(given.init_from, given.variant, given.d_hidden) if given.init_from and not saved else None
    if warm:
        usual = usual | WARM | {"d_hidden": warm.d_hidden, "k": warm.k or min(usual["k"], warm.d_hidden)}
    config = resolve_sizes(given, saved or usual)
    if config.compute_dtype == "auto":
        config.compute_dtype = saved["compute_dtype"] if saved else fast_dtype(device)
    if saved:
        prepare.refuse_changes(config, saved)
    if shard.size > config.d_hidden:
        raise ValueError(f"--d-hidden {config.d_hidden}: must be at least the number of processes, {shard.size}")
    if config.variant == "batch_topk" and config.k > config.d_hidden:
        raise ValueError(f"--k {config.k}: must be at most --d-hidden {config.d_hidden}")
    if live:
        source = prepare.open_live(given, config, device, saved_data)
    elif given.streaming:
        source = prepare.open_streamed(given, config, saved_data)
    else:
        source = prepare.open_source(given, config, saved_data)
    stop = given.epochs * source.train_rows if given.epochs else config.num_tokens or source.train_rows  # tokens
    config.num_tokens = stop
    config.k_aux = config.k_aux or max(1, source.d_model // 2)
    config.lr = config.lr or LR_FACTOR / math.sqrt(source.d_model * config.d_hidden)
    if config.variant == "batch_topk" and given.l1_coeff is None:
        config.l1_coeff = 0.0
    if warm and (warm.n_models, warm.d_model) != (source.n_models, source.d_model):
        raise ValueError(
            f"--init-from {given.init_from}: is for {warm.n_models} models of width {warm.d_model}, the activations are of "
            f"{source.n_models} of width {source.d_model}; give one that was trained at this hook"
        )
    steps, at_once = math.ceil(stop / config.batch_size), config.micro_batch_size or config.batch_size
    dead_after = min(DEAD_AFTER_AT_MOST, max(config.batch_size, int(config.dead_window * stop)))  # tokens
    if not any(len(x) for x in validation_batches(source, config.batch_size, torch.device("cpu"))):
        raise ValueError("every held-out row holds NaN or inf, or lies above --max-norm-ratio: give another --val-tokens")
    with shard.together():
        prepare.require_memory(config, source, device, at_once, shard)
        prepare.require_room(config, source, run)
    sample = None  # raw activations for a source that has thresholds and no k (JumpReLU): it begins with as many active latents
    if warm and warm.k is None and config.variant == "batch_topk":
        sample = raw_sample(source)  # [rows, n_models, d_model]
        config.k = given.k or active_latents(warm, sample)
    if config.push_to_hub and shard.rank == 0:
        hub.open_repository(config.push_to_hub, "model")
    data = {name: getattr(source, name) for name in ("train_rows", "val_rows", "n_models", "d_model")}
    data["stored_scale"] = source.stored_scale.tolist()
    data |= {} if isinstance(source, PlantedConcepts) else source.record
    if saved:
        prepare.refuse_other_data(data, saved_data)
    locked = None
    if shard.rank == 0:
        run = run if saved else prepare.make_folder(run, given)
        locked = checkpoint.lock(run)
        if not saved:
            prepare.require_beginning(run)  # another process may have begun and ended there meanwhile
        if cut_off := checkpoint.remove_leftovers(run):
            say(f"cut off  {', '.join(cut_off)} in {run}: the run was killed while writing it; removed")
        if not saved:
            record = {"given": dataclasses.asdict(given), "resolved": dataclasses.asdict(config), "data": data}
            record["given"] |= {"run_name": None, "resume": None, "config": None}  # these name the run, not its recipe
            checkpoint.write_text(run / "config.json", checkpoint.as_json(record, indent=2))
    run = Path(shard.from_first(str(run)))

    # --- model, optimizer, schedule
    torch.manual_seed(config.seed)
    crosscoder = CrossCoder(
        source.d_model, config.d_hidden, source.n_models, config.variant, config.k, config.k_aux,
        config.dec_init_norm, config.seed, getattr(torch, config.compute_dtype), shard,
    )  # fmt: skip
    unscale = (1 / source.stored_scale.double())[:, None]  # [n_models, 1] stored values -> raw activations
    if start_from is None:
        mean, scale = estimate_normalization(source, config.center)
        crosscoder.mean.copy_(mean * unscale)
        crosscoder.scale.copy_(scale / unscale[:, 0])
    if warm:  # its codes and reconstructions, for this normalisation
        warm = with_normalization(warm, crosscoder.mean, crosscoder.scale, config.k if config.variant == "batch_topk" else None)
        state = warm.state_dict()
        crosscoder.load_state_dict({n: t[crosscoder.latents] if n in checkpoint.BY_LATENT else t for n, t in state.items()})
    crosscoder.to(device)
    if sample is not None:
        crosscoder.fit_threshold(lambda: (crosscoder.normalize(part.to(device)) for part in sample.split(at_once)))
    unscale = unscale.float().to(device)
    parameters = dict(crosscoder.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    schedule = partial(lr_factor, steps=steps, warmup=config.lr_warmup, decay=config.lr_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    tokens_since_fired = torch.zeros(len(crosscoder.b_enc), dtype=torch.int64, device=device)
    bad_step = torch.zeros((), dtype=torch.int64, device=device)  # first step whose loss was not finite; 0: none
    step = tokens = position = 0
    dropped = (0, 0)  # rows left out: with NaN or inf, and with a norm above --max-norm-ratio
    seconds, wandb_id, standing = source.model_seconds if live else 0.0, None, None

    if start_from:
        tensors, state = checkpoint.load(start_from, crosscoder.latents)
        try:
            crosscoder.load_state_dict({name: tensors[name] for name in crosscoder.state_dict()})
            checkpoint.restore_optimizer(optimizer, list(parameters), tensors)
            checkpoint.restore_random_states(tensors)
            tokens_since_fired.copy_(tensors["tokens_since_fired"])
            del tensors  # as large as the crosscoder and Adam's moments
            scheduler.load_state_dict(state["scheduler"])
            step, tokens, position = (state[name] for name in ("step", "tokens", "position"))
            dropped = (state["dropped"], 0) if isinstance(state["dropped"], int) else tuple(state["dropped"])  # int: older
            seconds, wandb_id = state["seconds"], state["wandb_id"]
            standing = state["stream"] if streams else None
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the checkpoint {start_from} is incomplete ({error!r}): delete it") from None
        for group in optimizer.param_groups:  # as the schedule has it now: the run may be longer than it was
            group["lr"] = config.lr * schedule(step)
    if shard.rank == 0:
        checkpoint.cut_metrics(run, step)
    print_plan(config, source, run, start_from, device, steps)
    if sample is not None and given.k is None:
        say(f"k        {config.k}, the active latents a token of {given.init_from} on these rows: it has thresholds and no k")
    if position >= stop:
        say("finished all its steps are done: the result is measured and saved again; --num-tokens makes the run longer")
    tracker = None
    with shard.together():  # the last wait that may be long: in the loop all answer within a minute
        if shard.rank == 0:
            tracker, wandb_id = start_wandb(config, run, wandb_id)

    # --- the loop
    signals = catch_signals()
    recent: deque = deque(maxlen=1000)  # (step, first row, last row) of the latest batches, to name the rows of a bad one
    watched = watch(steps, step, quiet=shard.rank > 0)
    started = logged_at = waiting_since = time.perf_counter()
    waited, logged_tokens, logged_model_seconds = 0.0, tokens, source.model_seconds if live else 0.0
    last_save = "a first save"
    if streams:
        stream = source.batches(config.batch_size, stop, device, position, dropped, standing, shard)
    else:
        stream = batches(source, config.batch_size, stop, device, position, dropped, shard)
    with closing(stream), prepare.memory_explained(run):
        for batch in stream:
            waited += time.perf_counter() - waiting_since
            step, position, dropped = step + 1, batch.position, batch.dropped
            recent.append((step, batch.first_row, batch.last_row))

            x = crosscoder.normalize(batch.x.float() * unscale)  # [batch, n_models, d_model]
            l1_coeff = config.l1_coeff * min(1.0, step / max(1.0, config.l1_warmup * steps))
            k = annealed_k(step, steps, config) if config.variant == "batch_topk" else None
            dead = tokens_since_fired >= dead_after if tokens >= dead_after else None  # none can be before
            if device.type == "cpu" and dead is not None and not shard.any_process(bool(dead.any())):
                dead = None  # a free question here; on CUDA it would wait for the device
            out = losses_and_gradients(crosscoder, x, at_once, l1_coeff, config.aux_coeff, dead, k)
            grad_norm = norm_of_gradient(crosscoder)
            optimizer.grad_scale = (grad_norm / config.grad_clip).clamp_min(1)  # fused Adam divides by it as it reads
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()

            tokens += len(x)
            tokens_since_fired.add_(len(x)).masked_fill_(out.fired, 0)
            bad_step = torch.where((bad_step == 0) & ~out.loss.isfinite(), step, bad_step)
            stopping = shard.any_process(bool(signals))
            last = position >= stop or stopping
            validate = step % config.val_every == 0 and not last
            if step == 1 or step % config.log_every == 0 or validate or last:
                require_finite(bad_step, recent, run)
                elapsed = time.perf_counter() - logged_at
                metrics = training_metrics(out, x, tokens_since_fired >= dead_after, crosscoder, grad_norm)
                metrics |= {"l1_coeff": l1_coeff, "lr": lr, "tokens": tokens}
                metrics |= {"tokens_per_second": (tokens - logged_tokens) / elapsed, "data_wait_fraction": waited / elapsed}
                if live:
                    metrics["model_fraction"] = (source.model_seconds - logged_model_seconds) / elapsed
                    logged_model_seconds = source.model_seconds
                if validate:
                    metrics |= evaluate(crosscoder, source, at_once, unscale, l1_coeff)
                if shard.rank == 0:
                    tracker = log(run, tracker, step, metrics)
                    show(watched, step, metrics)
                    warn(watched, config, step, metrics)
                logged_at, logged_tokens, waited = time.perf_counter(), tokens, 0.0
            if step % config.save_every == 0 or last:
                require_finite(bad_step, recent, run)
                if stopping:  # at once: whoever sent the signal may not wait for the save
                    say(f"{name_of(signals)}: saving step {step} ({last_save}), then leaving; killed before that, the run "
                        f"goes on from {kept[-1].name if (kept := checkpoint.complete(run)) else 'its beginning'}")  # fmt: skip
                saving_since = time.perf_counter()
                state = {"tokens": tokens, "position": position, "dropped": dropped, "wandb_id": wandb_id}
                state |= {"seconds": seconds + time.perf_counter() - started, "scheduler": scheduler.state_dict()}
                state |= {"stream": source.standing(position)} if streams else {}
                tensors = crosscoder.state_dict() | checkpoint.optimizer_tensors(optimizer, list(parameters))
                tensors |= checkpoint.random_states() | {"tokens_since_fired": tokens_since_fired}
                require_finite_weights(tensors, step, run, shard)
                checkpoint.save(run, step, tensors, state, config.keep_checkpoints, config.d_hidden, shard)
                last_save = f"the last save took {time.perf_counter() - saving_since:.1f} s"
            watched.bar.update()
            if last or (step % config.save_every == 0 and shard.any_process(bool(signals))):
                break  # a signal that came in after a save is saved by the next step
            waiting_since = time.perf_counter()
    watched.bar.close()
    seconds += time.perf_counter() - started
    if shard.any_process(bool(signals)):
        say(f"stopped by {name_of(signals)}, saved at step {step}. Go on with:")
        say(f"python train.py --resume {shlex.quote(str(run))}")
        finish_wandb(tracker, {})
        return 128 + signal.Signals[name_of(signals)]

    if live:
        source.finish()

    # --- the result: an inference threshold and metrics from rows that were never trained on, in float32 as it will be used
    crosscoder.compute_dtype = torch.float32
    with prepare.memory_explained(run):
        if config.variant == "batch_topk":
            crosscoder.fit_threshold(lambda: held_out(crosscoder, source, at_once, unscale))
        final = evaluate(crosscoder, source, at_once, unscale, config.l1_coeff)
    require_finite_weights(crosscoder.state_dict(), step, run, shard)
    with checkpoint.explained("the crosscoder", run, shard):
        crosscoder.save_pretrained(run / "crosscoder")
    dead, norms = (shard.gather_rows(x) for x in (tokens_since_fired >= dead_after, crosscoder.decoder_norms().detach()))
    W_dec = shard.gather_rows(crosscoder.W_dec.detach()) if isinstance(source, PlantedConcepts) else None
    if shard.rank > 0:
        return 0
    log(run, tracker, step, final)
    summary = {name.removeprefix("val_"): value for name, value in final.items()}
    summary |= {"l1_coeff": config.l1_coeff, "lr": config.lr * schedule(max(0, step - 1))}  # of the last step
    summary |= {"dead_fraction": dead.float().mean().item(), "threshold": crosscoder.threshold.item()}
    summary |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}
    summary |= {"rows_dropped": sum(dropped), "rows_dropped_by_norm": dropped[1]}
    count = latents.count_classes if source.n_models == 2 else count_exclusive
    summary["latents"] = count(norms, dead)
    if isinstance(source, PlantedConcepts):
        summary["planted"] = source.score(W_dec, dead)
    checkpoint.write_text(run / "summary.json", checkpoint.as_json(summary, indent=2))
    finish_wandb(tracker, {name: value for name, value in summary.items() if name not in ("latents", "planted")})
    print_summary(summary, config, source.val_rows, run)
    if config.push_to_hub:
        hub.push_crosscoder(config.push_to_hub, run, norms)
    os.close(locked)
    return 0


# --- during the run


def lr_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the peak learning rate after `step` steps: linear rise, constant, linear fall to 0 at the end."""
    rise = (step + 1) / max(1.0, warmup * steps)  # the first step already learns
    fall = (steps - step) / max(1.0, decay * steps)
    return max(0.0, min(1.0, rise, fall))


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
        "loss": out.loss,
        "l2_loss": out.l2_loss,
        "l1_loss": out.l1_loss,
        "l0_loss": out.l0_loss,
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
    for stored in validation_batches(source, batch_size, unscale.device):
        yield crosscoder.normalize(stored.float() * unscale)


@torch.no_grad()
def evaluate(crosscoder: CrossCoder, source, batch_size: int, unscale: Tensor, l1_coeff: float) -> dict[str, float]:
    """val_ metrics over all held-out rows, with inference codes. Totals in float64; nothing of the run's state moves."""
    rows, active, l1, error, total, squared = 0, 0, 0, 0, 0, 0
    norm_sum = crosscoder.decoder_norms().sum(-1)
    for x in held_out(crosscoder, source, batch_size, unscale):
        f = crosscoder.encode(x, normalized=True)
        x_hat = crosscoder.decode(f, normalized=True)
        rows += len(x)
        active = active + (f > 0).sum()
        l1 = l1 + (f.sum(0) * norm_sum).sum().double()
        error = error + (x - x_hat).double().pow(2).sum((0, 2))  # [n_models]
        total = total + x.double().sum(0)  # [n_models, d_model]
        squared = squared + x.double().pow(2).sum((0, 2))  # [n_models]
    active, l1 = crosscoder.shard.all_sum(active), crosscoder.shard.all_sum(l1)
    variance = explained(error, squared - total.pow(2).sum(-1) / rows).tolist()
    l2_loss, l1_loss = error.sum().item() / rows, l1.item() / rows
    return {
        "val_loss": l2_loss + l1_coeff * l1_loss,
        "val_l2_loss": l2_loss,
        "val_l1_loss": l1_loss,
        "val_l0_loss": active.item() / rows,
        **by_model("val_explained_variance", variance),
    }


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


def norm_of_gradient(crosscoder: CrossCoder) -> Tensor:
    """L2 norm of the gradient of all parameters. b_dec is the same in every process and counts once."""
    sliced = [p.grad for name, p in crosscoder.named_parameters() if name != "b_dec"]
    squared = crosscoder.shard.all_sum(torch.nn.utils.get_total_norm(sliced).square())
    return (squared + crosscoder.b_dec.grad.square().sum()).sqrt()


def require_finite(bad_step: Tensor, recent: deque, run: Path) -> None:
    """ValueError if the loss was not finite at some step since the last look."""
    if step := int(bad_step):
        where = next((f"rows {low} to {high} of the training rows" for at, low, high in recent if at == step), "unknown rows")
        raise ValueError(
            f"the loss of step {step} is not finite (its batch lies in {where}): lower --lr, or look at those rows. "
            f"Last good checkpoint: {checkpoint.newest(run, step)}"
        )


def require_finite_weights(tensors: dict[str, Tensor], step: int, run: Path, shard: Shard) -> None:
    """ValueError if what is to be saved holds NaN, inf, or values whose squares overflow. Waits for the device."""
    norm = torch.nn.utils.get_total_norm([t for t in tensors.values() if t.is_floating_point()])
    if shard.any_process(not norm.isfinite()):
        raise ValueError(
            f"the weights after step {step} are not finite, or too large for finite norms: lower --lr. They were not saved. "
            f"Last good checkpoint: {checkpoint.newest(run, step)}"
        )


if __name__ == "__main__":
    shard = Shard.of_torchrun()
    try:
        with prepare.memory_explained():
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
