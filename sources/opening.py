"""From the flags of train.py to one `Source`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from config import TrainConfig, model_flags
from ops.shard import ALONE, Shard
from run.machine import say, usable_device
from sources.batches import fingerprints, limit_norms
from sources.dataset_files import open_datasets
from sources.difference import Difference
from sources.planted import PlantedConcepts
from sources.source import Source
from sources.stored import PairedActivations
from sources.streamed import StreamedActivations

OUTLIERS_SHARE = 0.01  # of the rows; more than that may be what the model is about


def open_source(
    given: TrainConfig, config: TrainConfig, device: torch.device, known: dict | None = None, shard: Shard = ALONE
) -> tuple[Source, TrainConfig]:
    """The activations that the flags name, and the config with the sizes that were still open.

    Args:
        given: what the user asked for; a size that is None there may follow from the data.
        config: the same with the usual sizes filled in.
        known: what the run's record says of the data, for a run that goes on.
        shard: the processes of the run, which share the work of live models.
    """
    if config.difference:
        source, config = open_source(given, dataclasses.replace(config, difference=False), device, known, shard)
        return Difference(source), dataclasses.replace(config, difference=True)
    if config.base_model:
        return open_live(given, config, device, known, shard)
    if config.streaming:
        return open_streamed(given, config, known)
    if not (named := named_datasets(given)):
        return PlantedConcepts(config.seed, config.val_tokens), config
    opened = open_datasets(named, (config.base_column, config.ft_column))
    source = PairedActivations(opened, given.val_tokens, config.val_tokens, config.seed)
    source.record["fingerprint"] = fingerprints(source)
    leave_out_outliers(source, config, known)
    return source, config


def named_datasets(given: TrainConfig) -> list[tuple[str, str]]:
    """(flag, name) of the datasets of activations that the user names: a resumed run may find them under other flags."""
    if given.dataset:
        return [("--dataset", given.dataset)]
    if given.base_dataset:
        return [("--base-dataset", given.base_dataset), ("--ft-dataset", given.ft_dataset)]
    return [("--model-dataset", name) for name in given.model_dataset]


def leave_out_outliers(source: Source, config: TrainConfig, known: dict | None) -> None:
    """The rule of collect.py for datasets without pair.json, with the medians that a resumed run began with."""
    if source.pair or (known is not None and "median_norm" not in known):
        return  # collect.py left them out, or the run began before there was this rule
    share = limit_norms(source, config.max_norm_ratio, known and known["median_norm"])
    medians, limit = ", ".join(f"{median:.4g}" for median in source.record["median_norm"]), f"{config.max_norm_ratio:g}"
    say(f"norms    medians {medians}; rows above {limit} times that are left out of all models (--max-norm-ratio)")
    if share > OUTLIERS_SHARE:
        say(f"warning  that leaves out {share:.1%} of the rows: look at them, or raise --max-norm-ratio")


def within_a_tenth(given: TrainConfig, config: TrainConfig, length: int, **least: int) -> TrainConfig:
    """The config with the sizes named in `least` at most a tenth of the run's `length`, unless the user gave them."""
    sizes = {name: max(low, min(getattr(config, name), length // 10)) for name, low in least.items()}
    return dataclasses.replace(config, **{name: n for name, n in sizes.items() if getattr(given, name) is None})


def open_live(
    given: TrainConfig, config: TrainConfig, device: torch.device, known: dict | None, shard: Shard
) -> tuple[Source, TrainConfig]:
    """The two models as a source of rows. Arguments as for `open_source`."""
    from collecting.paired_dataset import PairedDataset
    from collecting.paired_rows import PairedModels, drawn_together
    from sources.live import LiveActivations, have_own_devices, place_buffer, rows_of_a_fill

    drawn = drawn_together(config.model_batch_size, config.pack)
    if known is None:
        config = within_a_tenth(given, config, config.num_tokens, val_tokens=1, buffer_tokens=4 * drawn * config.seq_len)
    fill_rows = rows_of_a_fill(config.buffer_tokens, drawn, config.seq_len)
    keep = None
    with shard.together():
        if given.keep_activations and shard.rank == 0:  # under collect.py's names for the same things
            recipe = model_flags(config) | {"val_tokens": config.val_tokens, "batch_size": config.model_batch_size}
            recipe |= {"shard_rows": fill_rows, "dtype": "float16", "seed": config.seed}
            keep = PairedDataset(Path(given.keep_activations), recipe, "--keep-activations")
            if keep.pair and known is None:
                raise ValueError(
                    f"--keep-activations {keep.out}: is complete; train on it with --dataset, or choose another folder"
                )
            if keep.pair:
                say(f"kept     {keep.out} is complete and stays as it is")
                keep = None
    names = ((given.base_device, "--base-device"), (given.ft_device, "--ft-device"))
    models = PairedModels(
        **model_flags(config) | {"hook": [config.hook]}, batch_size=config.model_batch_size, dtype="float16", live=True,
        seed=config.seed, quiet=shard.rank > 0,
        devices=[usable_device(name or str(device), flag) for name, flag in names],
        known=known and known.get("fingerprints", {}),
    )  # fmt: skip
    if any(found != models.fingerprints for found in shard.gather_objects(models.fingerprints)):
        raise ValueError("--base-model, --ft-model, --text: not all processes read the same files; give each machine the same")
    lengths = {"buffer_tokens": config.buffer_tokens, "val_tokens": config.val_tokens}
    with shard.together():
        if keep:
            left = config.num_tokens + config.val_tokens - sum(keep.progress["rows"].values())
            keep.require_room(left, [models.hooks[0].d_model])
        sizes = lengths | {"d_hidden": config.d_hidden, "batch_size": config.batch_size}
        where = place_buffer(models, device, **sizes, processes=shard.size)
    models.start()
    models.calibrate(config.num_tokens, config.val_tokens, [known or {}])
    (hook,) = models.hooks
    hook.median, hook.scale = shard.gather_objects((hook.median, hook.scale))[0]  # where other devices round differently
    name = f"{config.base_model} + {config.ft_adapter or config.ft_model} at {config.hook}"
    places = {"buffer_device": where, "beside": have_own_devices(models, device)}
    return LiveActivations(name, models, **lengths, **places, keep=keep, shard=shard), config


def open_streamed(given: TrainConfig, config: TrainConfig, known: dict | None) -> tuple[Source, TrainConfig]:
    """Datasets read over the network as a source of rows. Arguments as for `open_source`."""
    columns = (config.base_column, config.ft_column)
    opened = open_datasets(named_datasets(given), columns, streaming=True, revisions=known and known["revisions"])
    rows = (opened.pair or {}).get("rows", {})
    length = config.num_tokens or rows.get("train", 0) * (config.epochs or 1)
    if not length or (given.epochs and "train" not in rows):
        raise ValueError("--streaming: the length of the streams is not known before their end, give --num-tokens")
    if known is None:
        config = within_a_tenth(given, config, length, val_tokens=2, buffer_tokens=4)
    for name, least in (("val_tokens", 2), ("buffer_tokens", 4)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}")
    source = StreamedActivations(opened, val_tokens=config.val_tokens, buffer_tokens=config.buffer_tokens, seed=config.seed)
    source.record["fingerprint"] = fingerprints(source, ("validation",))
    leave_out_outliers(source, config, known)
    return source, config
