"""What train.py checks, opens and claims before its first step, so that a run that starts does not fail on its flags."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import time
from contextlib import contextmanager
from pathlib import Path
from string import ascii_uppercase

import torch

from config import TrainConfig, model_flags
from ops.shard import Shard
from run import checkpoint
from run.monitor import say
from sources.batches import PREFETCH, fingerprints, limit_norms
from sources.planted import PlantedConcepts
from sources.stored import open_pair, open_several, open_single
from sources.windows import host_memory

OUTLIERS_SHARE = 0.01  # of the rows; more than that may be what the model is about
MAY_CHANGE_ON_RESUME = {  # length, logging, devices, and where the same data lies now
    "dataset", "base_dataset", "ft_dataset", "model_dataset", "keep_activations", "device", "base_device", "ft_device",
    "num_tokens", "epochs", "log_every", "val_every", "save_every", "keep_checkpoints",
    "wandb", "wandb_project", "wandb_entity", "run_name", "output_dir", "push_to_hub", "resume", "config",
}  # fmt: skip


def check(config: TrainConfig, shard: Shard) -> None:
    """ValueError, naming the flag, for values that cannot be trained with."""
    if config.dataset and (config.base_dataset or config.ft_dataset):
        raise ValueError("--dataset names both models' activations: leave out --base-dataset and --ft-dataset")
    if bool(config.base_dataset) != bool(config.ft_dataset):
        there, missing = ("--base-dataset", "--ft-dataset") if config.base_dataset else ("--ft-dataset", "--base-dataset")
        raise ValueError(f"{there} is given without {missing}: a crosscoder needs the same tokens' activations of both models")
    if config.model_dataset and (config.dataset or config.base_dataset):
        raise ValueError("--model-dataset names each model's activations: leave out --dataset, --base-dataset and --ft-dataset")
    if len(config.model_dataset) == 1:
        raise ValueError("--model-dataset is given once: give it for each model, the base model first")
    if (config.base_column or config.ft_column) and not (config.dataset or config.base_dataset or config.model_dataset):
        raise ValueError("--base-column and --ft-column need --base-dataset and --ft-dataset")
    if config.epochs is not None and config.num_tokens is not None:
        raise ValueError("--epochs and --num-tokens both set the length of the run: give one (the other as None)")
    check_live(config, shard)
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, (int, float)) and not abs(value) < (2**53 if isinstance(value, int) else math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {str(value):.20}: must be a finite number, a whole one below 2^53")
    if config.run_name in (".", "..") or (config.run_name and Path(config.run_name).name != config.run_name):
        raise ValueError(f"--run-name {config.run_name}: must be a name alone; --output-dir is the folder that it lies in")
    for name in ("k", "k_start"):
        if config.variant == "vanilla" and config.resume is None and (value := getattr(config, name)) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} {value:g}: belongs to --variant batch_topk; give that variant or leave it out"
            )
    if config.streaming and not (config.dataset or config.base_dataset or config.model_dataset):
        raise ValueError("--streaming reads datasets over the network: give --dataset, or --base-dataset and --ft-dataset")
    if config.epochs is not None and not (config.dataset or config.base_dataset or config.model_dataset):
        raise ValueError("--epochs: planted concepts are endless, give --num-tokens")
    if not config.max_norm_ratio > 1:
        raise ValueError(f"--max-norm-ratio {config.max_norm_ratio:g}: must be above 1; 1e9 keeps rows of every norm")
    for name in (
        "d_hidden", "k", "k_aux", "micro_batch_size", "num_tokens", "epochs", "val_tokens", "log_every",
        "val_every", "save_every", "keep_checkpoints", "lr", "grad_clip", "dec_init_norm", "buffer_tokens", "model_batch_size",
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name, low, high in (
        ("seed", 0, 2**31), ("batch_size", 1, 2**24), ("l1_coeff", 0, 1e6), ("aux_coeff", 0, 1e6), ("l1_warmup", 0, 1),
        ("lr_warmup", 0, 1), ("lr_decay", 0, 1), ("k_start", 1, 1e6), ("k_anneal", 0, 1), ("dead_window", 1e-9, 1),
        ("beta1", 0, 0.999999), ("beta2", 0, 0.999999),
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must lie between {low} and {high}")
    try:
        device = torch.device("cpu" if config.device == "auto" else config.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {config.device}: not usable here ({reason}); try --device auto") from None
    if device.index is not None and shard.size > 1:
        raise ValueError(f"--device {config.device}: several processes take a device each; give --device {device.type}")


def check_live(config: TrainConfig, shard: Shard) -> None:
    """ValueError, naming the flag, if training straight from the models is asked for by halves."""
    wanted = ("base_model", "ft_model", "hook", "text", "num_tokens")
    alone = ("ft_hook", "text_column", "chat_template", "keep_activations", "base_device", "ft_device")
    alone += ("base_revision", "ft_revision", "ft_adapter", *(() if config.streaming else ("buffer_tokens",)))
    asked = [name for name in (*wanted[:-1], *alone) if getattr(config, name)]
    if not asked:
        return
    flag = f"--{asked[0].replace('_', '-')}"
    if shard.size > 1:
        raise ValueError(f"{flag}: several processes train from stored activations; collect them first with collect.py")
    if config.dataset or config.base_dataset or config.model_dataset:
        other = "--dataset" if config.dataset else "--base-dataset" if config.base_dataset else "--model-dataset"
        raise ValueError(f"{flag} trains straight from two models and {other} from stored activations: give one of them")
    if config.epochs is not None:
        raise ValueError("--epochs: the length of streamed texts is not known before their end, give --num-tokens")
    for name in wanted:
        if not getattr(config, name) and not (name == "ft_model" and config.ft_adapter):
            why = "the length of streamed texts is not known" if name == "num_tokens" else "both models read the same text"
            raise ValueError(f"{flag} is given without --{name.replace('_', '-')}: {why}")


def open_live(given: TrainConfig, config: TrainConfig, device: torch.device, known: dict | None):
    """The two models as a source of rows; `known` is what a resumed run began with. Fills in the sizes left open."""
    from collecting.paired_dataset import PairedDataset
    from collecting.paired_rows import PairedModels, drawn_together, usable_device
    from sources.live import LiveActivations, place_buffer, rows_of_a_fill

    drawn = drawn_together(config.model_batch_size, config.pack)
    if known is None:
        for name, least in (("val_tokens", 1), ("buffer_tokens", 4 * drawn * config.seq_len)):
            if getattr(given, name) is None:
                setattr(config, name, max(least, min(getattr(config, name), config.num_tokens // 10)))
    fill_rows = rows_of_a_fill(config.buffer_tokens, drawn, config.seq_len)
    keep = None
    if given.keep_activations:  # under collect.py's names for the same things
        recipe = model_flags(config) | {"val_tokens": config.val_tokens, "batch_size": config.model_batch_size}
        recipe |= {"shard_rows": fill_rows, "dtype": "float16", "seed": config.seed}
        keep = PairedDataset(Path(given.keep_activations), recipe, "--keep-activations")
        if keep.pair and known is None:
            raise ValueError(
                f"--keep-activations {keep.out}: is complete; train on it with --dataset, or choose another folder"
            )
        if keep.pair:
            say(f"kept     {keep.out} is complete and stays as it is")
    names = ((given.base_device, "--base-device"), (given.ft_device, "--ft-device"))
    models = PairedModels(
        **model_flags(config), batch_size=config.model_batch_size, dtype="float16", seed=config.seed, live=True,
        devices=[usable_device(name or str(device), flag) for name, flag in names],
        known=known and known.get("fingerprints", {}),
    )  # fmt: skip
    if keep and not keep.pair:
        keep.require_room(config.num_tokens + config.val_tokens - sum(keep.progress["rows"].values()), models.d_model)
    place = place_buffer(models, config.buffer_tokens, config.val_tokens, config.d_hidden, config.batch_size, device)
    return LiveActivations(models, config.buffer_tokens, config.val_tokens, config.num_tokens, place, known, keep)


def open_streamed(given: TrainConfig, config: TrainConfig, known: dict | None):
    """Datasets read over the network as a source of rows; arguments as for `open_live`. Fills in the sizes left open."""
    from sources.streamed import StreamedActivations, open_streams

    named = (given.dataset, given.base_dataset, given.ft_dataset, given.model_dataset)
    *streams, rows, revisions = open_streams(*named, (given.base_column, given.ft_column), known and known["revisions"])
    length = config.num_tokens or rows.get("train", 0) * (config.epochs or 1)
    if not length or (given.epochs and "train" not in rows):
        raise ValueError("--streaming: the length of the streams is not known before their end, give --num-tokens")
    if known is None:
        for name, least in (("val_tokens", 2), ("buffer_tokens", 4)):
            if getattr(given, name) is None:
                setattr(config, name, max(least, min(getattr(config, name), length // 10)))
    if config.buffer_tokens < 4 or config.val_tokens < 2:
        name, least = ("buffer", 4) if config.buffer_tokens < 4 else ("val", 2)
        raise ValueError(f"--{name}-tokens {getattr(config, name + '_tokens')}: must be at least {least}")
    source = StreamedActivations(*streams, rows, config.val_tokens, config.buffer_tokens, config.seed)
    source.record = {"revisions": revisions, "fingerprint": fingerprints(source, ("validation",))}
    if not given.dataset:
        leave_out_outliers(source, config.max_norm_ratio, known)
    return source


def open_source(given: TrainConfig, config: TrainConfig, known: dict | None):
    """Where the activations come from: a paired dataset, two single ones, several, or planted concepts."""
    rest = ((given.base_column, given.ft_column), given.val_tokens, config.val_tokens, config.seed)
    if given.dataset:
        source = open_pair(given.dataset, *rest)
    elif given.base_dataset:
        source = open_single(given.base_dataset, given.ft_dataset, *rest)
    elif given.model_dataset:
        source = open_several(given.model_dataset, *rest)
    else:
        return PlantedConcepts(config.seed, config.val_tokens)
    source.record = {"fingerprint": fingerprints(source)}
    if not given.dataset:
        leave_out_outliers(source, config.max_norm_ratio, known)
    return source


def leave_out_outliers(source, max_norm_ratio: float, known: dict | None) -> None:
    """The rule of collect.py for a dataset without pair.json, with the medians that a resumed run began with."""
    if known is not None and "median_norm" not in known:
        return  # the run began before there was this rule
    share = limit_norms(source, max_norm_ratio, known and known["median_norm"])
    medians = ", ".join(f"{median:.4g}" for median in source.record["median_norm"])
    say(f"norms    medians {medians}; rows above {max_norm_ratio:g} times that are left out of all models (--max-norm-ratio)")
    if share > OUTLIERS_SHARE:
        say(f"warning  that leaves out {share:.1%} of the rows: look at them, or raise --max-norm-ratio")


def resume_point(given: TrainConfig, shard: Shard) -> Path | None:
    """The checkpoint that --resume asks for; None for a fresh run."""
    if given.resume is None:
        return None
    if given.resume != "auto":
        return checkpoint.find(Path(given.resume), shard)
    run = Path(given.output_dir) / given.run_name
    if checkpoint.complete(run):
        return checkpoint.find(run, shard)
    require_beginning(run)
    say(f"--resume auto: {run} holds no checkpoint, starting fresh")
    return None


def require_beginning(run: Path) -> None:
    """ValueError unless a run may begin here: the folder is new, empty, or its run ended before it had saved anything."""
    if not run.is_dir() or all(path.name.startswith(".") for path in run.iterdir()):
        return
    saved, _ = read_record(run)
    lines = (run / "metrics.jsonl").read_text(errors="replace") if (run / "metrics.jsonl").exists() else ""
    step = max(map(int, re.findall(r'^{"step": (\d+),', lines, re.MULTILINE)), default=0)
    finished = (run / "summary.json").exists() or (run / "crosscoder").exists()
    if finished or step > saved["save_every"] or checkpoint.complete(run):
        raise ValueError(
            f"--resume auto: {run} {'is finished' if finished else f'was at step {step}'} and is not begun again: choose "
            "another --run-name, or put its checkpoints/ back if they were moved"
        )


def run_name(given: TrainConfig) -> str:
    return given.run_name or f"{given.variant}-{time.strftime('%Y%m%d-%H%M%S')}"


def name_is_taken(run: Path) -> str:
    return f"--run-name: {run} exists; choose another name, or go on with --resume {shlex.quote(str(run))}"


def make_folder(run: Path, given: TrainConfig) -> Path:
    """The new folder of a fresh run. A name made from the time gets a number if another run has just taken it."""
    for number in itertools.count(2):
        try:
            run.mkdir(parents=True, exist_ok=given.resume == "auto")
            return run
        except FileExistsError:
            if given.run_name is not None:
                raise ValueError(name_is_taken(run)) from None
            run = run.with_name(f"{run_name(given)}-{number}")
        except OSError as error:
            raise ValueError(f"--output-dir: cannot create {run} ({error.strerror}); choose one you can write to") from None


def read_record(run: Path) -> tuple[dict, dict]:
    """The resolved flags and the facts of the data that a run began with."""
    try:
        record = json.loads((run / "config.json").read_text())
        return record["resolved"], record["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume: {run / 'config.json'} is missing or broken ({error!r}): {run} is no run that can go on; choose another "
            "--run-name or --output-dir"
        ) from None


def refuse_changes(config: TrainConfig, saved: dict) -> None:
    """ValueError if a resumed run would go on under another recipe than it began with."""
    for name, value in dataclasses.asdict(config).items():
        if name not in MAY_CHANGE_ON_RESUME and name in saved and value != saved[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value} and was {saved[name]} when the run began: a resumed run keeps its "
                "recipe; leave the flag out, or start a new run with --config and this flag"
            )


def refuse_other_data(data: dict, saved_data: dict) -> None:
    """ValueError if a resumed run would go on with other rows than it began with. What its record lacks is not compared."""
    now, before = (record.get("fingerprint", []) for record in (data, saved_data))
    if before and now != before and sorted(now) == sorted(before):
        raise ValueError(
            "the models' activations have changed places since the run began: give --base-dataset and --ft-dataset (or "
            "the folders base and ft of --dataset, or each --model-dataset) as they were"
        )
    for name, value in data.items():
        if name == "fingerprint" and before and value != before:
            models = [f"model {letter}" for letter, a, b in zip(ascii_uppercase, now, before, strict=False) if a != b]
            raise ValueError(
                f"the activations of {' and '.join(models)} (A: base, B: fine-tuned) are not those that the run began with: "
                "resume on the same data, or start a new run with --config"
            )
        if value != saved_data.get(name, value):
            raise ValueError(
                f"the data has {name} {value} and had {saved_data.get(name)} when the run began: the rows would come in "
                "another order; resume on the same data, or start a new run with --config"
            )


def require_memory(config: TrainConfig, source, device: torch.device, at_once: int, shard: Shard) -> None:
    """ValueError if the device or the host cannot hold the run, by the formula of docs/speed.md. at_once: rows."""
    values = 2 * source.n_models * source.d_model * config.d_hidden / shard.size  # in this process's weights
    scores, batch = at_once * config.d_hidden / shard.size, config.batch_size * source.n_models * source.d_model
    on_cpu = device.type == "cpu"
    # A step holds weights, gradient, both moments and a copy of one of the weights; the end no gradient, but scores in float32.
    state, codes = max((20 * values, (4 if on_cpu else 12) * scores), (12 * values, 20 * scores), key=sum)
    on_device = {"d_hidden": state, "micro_batch_size": codes, "batch_size": 24 * batch}
    on_host = {"batch_size": (PREFETCH + 3) * source.dtype.itemsize * batch}
    on_host["buffer_tokens"] = source.buffer.nbytes if config.streaming else 0  # takes its memory when it is filled
    if on_cpu:
        on_host |= on_device | {"batch_size": on_host["batch_size"] + on_device["batch_size"]}
    else:
        on_host["d_hidden"] = 12 * values  # what a checkpoint holds, on its way to the disk
    on_host = {name: size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) for name, size in on_host.items()}
    places = [("the host", host_memory(), on_host)]
    if not on_cpu:
        places.append((device, torch.cuda.mem_get_info(device)[0], on_device))
    for place, free, needed in places:
        if sum(needed.values()) > free:
            flags = [
                f"--{name.replace('_', '-')} (for {size / 1e9:.1f} GB)" for name, size in needed.items() if size > free / 10
            ]
            raise ValueError(
                f"the run needs {sum(needed.values()) / 1e9:.1f} GB of memory on {place} and {free / 1e9:.1f} GB are free: "
                f"lower {' or '.join(flags)}"
            )


@contextmanager
def memory_explained(run: Path | None = None):
    """ValueError with one sentence where the memory of a device or of the host runs out. run: where checkpoints lie."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory|bad_alloc", str(error)):
            raise
        raise ValueError(
            f"out of memory ({(str(error) or 'MemoryError').splitlines()[0][:200]}): lower --micro-batch-size, --batch-size or "
            f"--d-hidden, or end what else uses the memory. Last checkpoint: {checkpoint.newest(run) if run else 'none yet'}"
        ) from None


def require_room(config: TrainConfig, source, run: Path) -> None:
    """ValueError if the disk cannot hold the run's checkpoints: weights and two Adam moments each, float32."""
    size = 3 * 4 * 2 * source.n_models * source.d_model * config.d_hidden
    needed = size * max(1, config.keep_checkpoints + 1 - len(checkpoint.complete(run)))
    if needed > (room := checkpoint.room(run)):
        raise ValueError(
            f"--output-dir: the checkpoints of this run need {needed / 1e9:.2f} GB and {run} has {room / 1e9:.2f} GB free; "
            "make room, choose another folder, or lower --keep-checkpoints or --d-hidden"
        )
