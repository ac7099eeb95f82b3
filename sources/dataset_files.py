"""From what a dataset flag names (a folder, a file, a Hub id) to Hugging Face datasets, one for each split."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ops.latents import model_names
from run.machine import HUB_SECONDS, close_name, first_line


class ActivationDatasets(NamedTuple):
    """The same tokens' activations in several models, base first; the lists have an entry for each model."""

    name: str  # what the plan of a run calls them
    splits: list[dict]  # {"train": Dataset, perhaps "validation": Dataset}, IterableDatasets when streamed
    flags: list[str]  # that named them, for errors
    columns: list[str | None]  # of activations; None to find it
    pair: dict | None = None  # what the pair.json of a paired dataset says
    revisions: list[str | None] | None = None  # of each name: commit on the Hub that is streamed

    @property
    def stored_scale(self) -> Tensor:
        """[n_models] factor the stored values carry: stored = activation * stored_scale."""
        return torch.tensor(self.pair["stored_scale"], dtype=torch.float64) if self.pair else torch.ones(len(self.splits))


def open_datasets(
    named: list[tuple[str, str]], columns: tuple[str | None, str | None], streaming: bool = False, revisions: list | None = None
) -> ActivationDatasets:
    """The datasets that the flags name. ValueError, naming the flag, for what cannot be opened.

    Args:
        named: (flag, name): of a paired dataset of collect.py ("--dataset") or of one dataset for each model, base first.
        columns: of activations in the base and the fine-tuned model's dataset, None to find them. The first is that of every
            --model-dataset.
        streaming: read them over the network.
        revisions: commits on the Hub of the named datasets, for streaming; None for their newest.
    """
    if streaming:
        revisions = revisions or [newest_revision(name, flag) for flag, name in named]
    commits = revisions or [None] * len(named)
    if named[0][0] == "--dataset":
        opened = open_paired(named[0][1], columns, streaming, commits[0])
    else:
        splits = [open_dataset(name, flag, streaming, commit) for (flag, name), commit in zip(named, commits, strict=True)]
        flags, columns_of = [flag for flag, _ in named], list(columns)
        if flags[0] == "--model-dataset":
            flags, columns_of = [f"{flag} {name}" for flag, name in named], [columns[0]] * len(named)
        opened = ActivationDatasets(" + ".join(name for _, name in named), splits, flags, columns_of)
    for splits, flag in zip(opened.splits, opened.flags, strict=True):
        if missing := set(opened.splits[0]) ^ set(splits):
            raise ValueError(f"{flag}: the split {missing.pop()!r} is in only one of the two datasets")
    return opened._replace(revisions=revisions)


def on_disk(name: str, flag: str) -> bool:
    """Whether a file or folder is named that is there, not a Hub id. ValueError if it cannot be an id and is not there."""
    path = Path(name).expanduser()
    no_id = path.is_absolute() or name.startswith((".", "~")) or name.split(":")[0].count("/") > 1
    if not path.exists() and (no_id or path.suffix in (".parquet", ".arrow")):
        raise ValueError(f"{flag} {name}: no such file or folder{close_name(path)}")
    return path.exists()


def open_paired(dataset: str, columns, streaming: bool, revision: str | None) -> ActivationDatasets:
    """A paired dataset of collect.py, a folder or a Hub id. Arguments as for `open_datasets`."""
    folder = Path(dataset).expanduser()
    if on_disk(dataset, "--dataset") and streaming:
        raise ValueError(f"--dataset {dataset}: lies on this disk, where it is read in place; leave out --streaming")
    if folder.is_dir():
        if (folder / "progress.json").exists() and not (folder / "pair.json").exists():
            raise ValueError(f"--dataset {dataset}: the collection is unfinished; run the same collect.py command again")
        for part in ("base", "ft"):
            if not (folder / part).is_dir():
                raise ValueError(
                    f"--dataset {dataset}: has no folder {part}/, so it is no paired dataset of collect.py; "
                    "give two single datasets with --base-dataset and --ft-dataset"
                )
    pair = read_pair(dataset, folder / "pair.json" if folder.is_dir() else hub_pair_file(dataset, revision))
    parts = model_names(len(pair["stored_scale"]))
    names = [str(folder / part) if folder.is_dir() else f"{dataset}:{part}" for part in parts]
    splits = [open_dataset(name, "--dataset", streaming, revision) for name in names]
    written = pair.get("rows", {})
    for split, part in splits[0].items():
        if not streaming and len(part) != written.get(split, len(part)):
            raise ValueError(
                f"--dataset {dataset}: has {len(part)} rows in {split} and pair.json says {written[split]}: a shard is "
                "truncated or missing; copy it again or collect again"
            )
    of_each = [*columns, *[columns[0]] * (len(parts) - 2)]
    return ActivationDatasets(dataset, splits, ["--dataset"] * len(parts), of_each, pair)


def read_pair(dataset: str, pair_file) -> dict:
    """What a pair.json says. ValueError unless its `stored_scale` (and `rows`, where it is there) can be used."""
    try:
        pair = json.loads(Path(pair_file).read_text())
        stored_scale = torch.tensor(pair["stored_scale"], dtype=torch.float64)
        if stored_scale.ndim != 1 or len(stored_scale) < 2 or not ((stored_scale > 0) & stored_scale.isfinite()).all():
            raise ValueError(f"stored_scale is {pair['stored_scale']}, not two positive numbers or more")
        dict(pair.get("rows", {}))
        return pair
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--dataset {dataset}: pair.json is missing or broken ({error!r}); collect again") from None


def hub_pair_file(dataset: str, revision: str | None) -> str:
    """Local copy of the pair.json of a paired dataset on the Hub."""
    import datasets
    from huggingface_hub import hf_hub_download

    if revision is None and not datasets.config.HF_HUB_OFFLINE:
        newest_revision(dataset, "--dataset")  # asks once, where a download without network tries for half a minute
    missing, offline = f"--dataset {dataset}: no folder here{close_name(Path(dataset))}, and ", datasets.config.HF_HUB_OFFLINE
    try:
        return hf_hub_download(dataset, "pair.json", repo_type="dataset", revision=revision, local_files_only=offline)
    except Exception as error:  # noqa: BLE001 - a broken connection has the names of the Hub's HTTP library
        why = "the Hub does not answer or must not be asked (HF_HUB_OFFLINE)"
        why = why if offline else f"as a Hub id its pair.json cannot be fetched ({first_line(error)})"
        raise ValueError(missing + why) from None


def open_dataset(name: str, flag: str, streaming: bool = False, revision: str | None = None) -> dict:
    """A folder, file or Hub id (`id`, `id:config`, `id:config:split`) -> {"train": Dataset, perhaps "validation": Dataset}.

    A folder may also be a memmap cache of crosscoder_learning. With `streaming` the values are IterableDatasets, and a folder
    must hold .parquet files. revision: commit of a dataset on the Hub, None: its newest.
    """
    import datasets

    path = Path(name).expanduser()
    for folder in (path, path.absolute().parent):
        if flag != "--dataset" and (folder / "pair.json").is_file():
            raise ValueError(f"{flag} {name}: belongs to the paired dataset {folder}, which has its own scales; use --dataset")
    if on_disk(name, flag) and streaming and path.suffix != ".parquet" and not any(path.glob("**/*.parquet")):
        raise ValueError(f"{flag} {name}: lies on this disk, where it is read in place; leave out --streaming")
    if (path / "shard_0.memmap").is_file():
        return {"train": open_memmaps(path, f"{flag} {name}")}
    if hooks := sorted(file.parent.name for file in path.glob("*/shard_0.memmap")):
        raise ValueError(f"{flag} {name}: holds the activation caches {', '.join(hooks)}; give the folder of one")
    if revision is None and not datasets.config.HF_HUB_OFFLINE:
        newest_revision(name, flag)  # one line of error for an id that the Hub does not know
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path), streaming=streaming)
        elif path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path), streaming=streaming)
        elif path.suffix == ".arrow":
            loaded = datasets.Dataset.from_file(str(path))
        elif path.exists():
            raise ValueError(f"a file of kind {path.suffix or 'without suffix'} is not read; give a folder, .parquet or .arrow")
        else:
            identifier, config, split = (name.split(":") + [None, None])[:3]
            loaded = datasets.load_dataset(identifier, config or None, split=split, streaming=streaming, revision=revision)
    except IndexError:  # the library raises this for a folder without any row
        whole = (path / "state.json").is_file()
        what = "the dataset is empty" if whole else "a split of it is empty; leave that one out when you save it"
        raise ValueError(f"{flag} {name}: {what}") from None
    except Exception as error:  # noqa: BLE001 - the library raises many kinds; all mean that this argument cannot be read
        reason = first_line(error.__cause__ or error)
        if file := damaged_file(path):
            raise ValueError(f"{flag}: {file} is truncated or damaged ({reason}); copy or collect it again") from None
        hub = f" (no such folder here{close_name(path)}, so it was taken for a Hub id, which needs network)"
        hub = "" if path.exists() else hub
        raise ValueError(f"{flag} {name}: cannot be opened: {reason}{hub}") from None
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in splits and len(splits) > 1:
        raise ValueError(f"{flag} {name}: has the splits {', '.join(splits)}; choose one with {name}:CONFIG:SPLIT")
    train = splits.get("train", next(iter(splits.values())))
    empty = next(iter(splits.get("validation", ())), None) is None  # a small collection may have held no sequence out
    return {"train": train} | ({} if empty else {"validation": splits["validation"]})


def open_memmaps(folder: Path, source: str):
    """The activation cache of one hook that crosscoder_learning wrote, as a Dataset that maps its files.

    folder: config.json, shard_i.memmap (rows of d_model values, C order) and shard_i.meta; tokens.pt, where it was stored,
    lies one folder up.
    """
    import datasets

    kinds = {"torch.float32": pa.float32(), "torch.float16": pa.float16(), "torch.bfloat16": pa.int16()}
    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("shuffle_shards"):
            raise ValueError("its rows were shuffled in an order that is not stored; collect with shuffle_shards=False")
        chunks = []
        for shard in range(config["shard_count"]):
            meta = json.loads((folder / f"shard_{shard}.meta").read_text())
            (rows, d_model), dtype = meta["shape"], meta.get("dtype", "torch.float32")
            if dtype not in kinds:
                raise ValueError(f"shard_{shard} is of {dtype}; read are {', '.join(kinds)}")
            file = np.memmap(folder / f"shard_{shard}.memmap", dtype=np.uint8, mode="r")
            if len(file) != rows * d_model * kinds[dtype].bit_width // 8:
                raise ValueError(f"shard_{shard}.memmap has {len(file)} bytes, not {rows} x {d_model} values; copy it again")
            values = pa.Array.from_buffers(kinds[dtype], rows * d_model, [None, pa.py_buffer(file)])
            chunks.append(pa.FixedSizeListArray.from_arrays(values, d_model))
        columns = {"activation_bfloat16" if dtype == "torch.bfloat16" else "activation": pa.chunked_array(chunks)}
        if config.get("store_tokens"):
            file = next(f / "tokens.pt" for f in (folder.parent, folder) if (f / "tokens.pt").is_file())
            columns["token"] = pa.array(torch.load(file, map_location="cpu", weights_only=True).numpy())
        table = datasets.table.InMemoryTable(pa.table(columns))
    except StopIteration:
        raise ValueError(f"{source}: its tokens.pt is missing beside the folder; copy it too") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source}: the activation cache cannot be read: {error}") from None
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return datasets.Dataset(table, fingerprint=name)  # without a fingerprint the library would hash every row


def damaged_file(path: Path) -> Path | None:
    """The first Arrow file of a dataset's folder that cannot be read to its end."""
    for file in sorted(path.rglob("*.arrow")):
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as batches_of_rows:
                for _ in batches_of_rows:  # memory-maps each one, which reads little more than its header
                    pass
        except (pa.ArrowException, OSError):
            return file
    return None


def newest_revision(name: str, flag: str) -> str | None:
    """The newest commit of a dataset on the Hub; None for local files and when the Hub does not answer.

    After a failed request the datasets library is set to use its local cache alone, so that it does not try five times more.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if on_disk(name, flag):
        return None
    try:
        return HfApi().dataset_info(name.split(":")[0], timeout=HUB_SECONDS).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        missing = f"{flag} {name}: is no file or folder here{close_name(Path(name))}"
        raise ValueError(f"{missing}, and the Hub does not give it ({first_line(error)})") from None
    except Exception:  # noqa: BLE001 - a broken connection has the names of the Hub's HTTP library
        datasets.config.HF_HUB_OFFLINE = True
        return None
