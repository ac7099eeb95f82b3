"""An analysis in the files of other tools: delphi's cache of latents, and what neuronpedia imports.

delphi (github.com/EleutherAI/delphi, `LatentCache.save_splits`, read by `LatentDataset`) gets the codes of all latents at every
token of whole sequences; neuronpedia (github.com/hijohnnylin/neuronpedia, its importer in apps/webapp/lib/db) the latents that
have a section.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from analysis.data import Data, Text, normalized_rows
from crosscoder import CrossCoder
from run.machine import as_json, say

NAMES = ("delphi", "neuronpedia")
WINDOW = 32  # tokens of delphi's examples, which its contexts must be a multiple of
LEAST = 1e-5  # smaller codes are left out, as in delphi
SPLITS = 5  # files of a module, each with some of the latents, as in delphi
BATCH = 1024  # latents in a file of neuronpedia's
CREATOR = "clkht01d40000jv08hvalcvly"  # the user that a new neuronpedia has, whom its own converters name


def check(names: list[str], data: Data) -> None:
    """ValueError where there is nothing to export, before the measuring."""
    if names and data.text is None:
        raise ValueError(f"--export {names[0]}: writes codes beside their tokens, and {data.name} has no texts")


def write(
    names: list[str], out: Path, crosscoder: CrossCoder, data: Data, sections: list[dict], table: dict, run: str,
    num_tokens: int,
) -> None:  # fmt: skip
    """Write OUT/export/NAME for each name, whole or not at all, in place of an earlier one, and say so."""
    for name in dict.fromkeys(names):
        with whole_folder(out / "export" / name) as folder:
            if name == "delphi":
                written = write_delphi(folder, crosscoder, data, num_tokens)
            else:
                written = write_neuronpedia(folder, sections, table, data, Path(run).resolve().name)
        say(f"exported   {written} in {out / 'export' / name}")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that gets its name when the block ends without an error. ValueError if it cannot be written."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise ValueError(f"--export: {folder} cannot be written ({error.strerror or error}); make room") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- delphi


@torch.no_grad()
def write_delphi(folder: Path, crosscoder: CrossCoder, data: Data, num_tokens: int) -> str:
    """FOLDER/latents/HOOK/START_END.safetensors, for each split of the latents, and config.json.

    locations [n, 3]: context, position, latent less START; activations [n] float16; tokens [contexts, length], in each file.
    """
    contexts, first, count, length = cut(data.text, num_tokens)
    piece = data.text.position // length
    rows = np.flatnonzero(count[data.text.sequence] > piece)
    found = []
    for numbers, x in normalized_rows(crosscoder, data, rows, what="delphi"):
        f = crosscoder.encode(x, normalized=True)
        row, latent = (f > LEAST).nonzero(as_tuple=True)
        place = numbers[row.cpu().numpy()]
        context = first[data.text.sequence[place]] + piece[place]
        where = np.stack([context, data.text.position[place] % length, latent.cpu().numpy()], 1)
        found.append((where.astype(np.uint32), f[row, latent].clamp(max=65504).half().cpu().numpy()))  # the largest float16
    locations, activations = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort(locations.T[::-1])  # by context, then position, then latent
    locations, activations = locations[order], activations[order]
    module = folder / "latents" / data.pair["hook"]
    module.mkdir(parents=True)
    borders = torch.linspace(0, crosscoder.d_hidden, SPLITS + 1).long().tolist()
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        mine = (locations[:, 2] >= start) & (locations[:, 2] < end)
        where = locations[mine] - np.array([0, 0, start], np.uint32)
        where = where.astype(np.uint16) if where.max(initial=0) < 2**16 else where
        tensors = {"locations": where, "activations": activations[mine], "tokens": contexts}
        save_file(tensors, module / f"{start}_{end - 1}.safetensors")
    config = {
        "dataset_repo": data.name, "dataset_split": "", "dataset_name": "", "dataset_column": "text", "batch_size": 1,
        "cache_ctx_len": length, "n_tokens": contexts.size, "n_splits": SPLITS,
        "model_name": data.pair.get("tokenizer") or data.pair.get("ft_model"),
    }  # fmt: skip
    (module / "config.json").write_text(as_json(config, indent=4))
    return f"{len(activations):,} codes at {contexts.size:,} tokens for delphi"


def cut(text: Text, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Whole sequences, held-out ones first, cut into contexts of one length.

    Returns their token ids [contexts, length] int64, of each sequence its first context and how many it has, and the length:
    that of nearly all sequences, else WINDOW. What is left at a sequence's end is left out.
    """
    _, seen = np.unique(text.sequence, return_index=True)
    chosen, total = [], 0
    for row in np.sort(seen):
        if total >= num_tokens:
            break
        chosen.append((int(text.sequence[row]), text.tokens(text.sequence[row])))
        total += len(chosen[-1][1])
    lengths = np.array([len(ids) for _, ids in chosen])
    usual = int(np.bincount(lengths).argmax())
    length = usual // WINDOW * WINDOW if usual >= WINDOW and (lengths >= usual).mean() > 0.9 else WINDOW
    count, first = np.zeros(len(text.sequences), np.int64), np.zeros(len(text.sequences), np.int64)
    numbers = [sequence for sequence, _ in chosen]
    count[numbers] = lengths // length
    first[numbers] = np.cumsum(count[numbers]) - count[numbers]
    contexts = [ids[: len(ids) // length * length].reshape(-1, length) for _, ids in chosen]
    return np.concatenate(contexts).astype(np.int64), first, count, length


# --- neuronpedia


def write_neuronpedia(folder: Path, sections: list[dict], table: dict, data: Data, run: str) -> str:
    """FOLDER/MODEL/SOURCE: model, release, sourceset and source.jsonl, and features, activations and explanations in batches.

    Fields are columns of neuronpedia's tables (apps/webapp/prisma/schema.prisma). What is not known is left out: its defaults.
    """
    model = Path(data.pair.get("ft_adapter") or data.pair["ft_model"]).name
    layer = re.search(r"\.(\d+)(\.|$)", data.pair["hook"])
    set_name = re.sub(r"[^A-Za-z0-9]+", "-", f"crosscoder-{run}").strip("-").lower()
    source = f"{layer[1] if layer else 0}-{set_name}"
    place, by = folder / model / source, {"creatorId": CREATOR}
    place.mkdir(parents=True)
    about = f"Crosscoder of {Path(data.pair['base_model']).name} and {model}, {data.pair['hook']}"
    instruct, unknown = bool(data.pair.get("chat_template")), {"layers": 0, "neuronsPerLayer": 0, "owner": ""}
    tables = {
        "model": {"id": model, "displayName": model, "displayNameShort": model, "instruct": instruct} | unknown,
        "release": {"name": set_name, "description": about, "creatorName": run},
        "sourceset": {"modelId": model, "name": set_name, "description": about, "creatorName": run, "releaseName": set_name},
        "source": {"id": source, "modelId": model, "setName": set_name, "dataset": Path(data.name).name},
    }
    for name, row in tables.items():
        (place / f"{name}.jsonl").write_text(as_json(row | by))
    shown = sorted((one for one in sections if one["examples"]), key=lambda one: one["latent"])
    for number, start in enumerate(range(0, len(shown), BATCH)):
        batch = shown[start : start + BATCH]
        kinds: dict[str, list[dict]] = {"features": [], "activations": [], "explanations": []}
        for section in batch:
            of = {"modelId": model, "layer": source, "index": str(section["latent"])}
            kinds["features"].append(feature(section, table, set_name) | of | by)
            kinds["activations"] += [activation(e, [*of.values(), i]) | of | by for i, e in enumerate(section["examples"])]
            if label := section.get("label"):
                text = {"id": identity([*of.values(), "label"]), "description": label["description"], "authorId": CREATOR}
                kinds["explanations"].append(text | of)
        for kind, lines in kinds.items():
            if lines:
                (place / kind).mkdir(exist_ok=True)
                file = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
                (place / kind / f"batch-{number}.jsonl.gz").write_bytes(gzip.compress(file, compresslevel=5, mtime=0))
    return f"{len(shown)} latents with their examples for neuronpedia"


def feature(section: dict, table: dict, set_name: str) -> dict:
    latent = section["latent"]
    made = {
        "sourceSetName": set_name,
        "maxActApprox": float(np.fmax(table["max_act_train"], table["max_act_val"])[latent]),
        "frac_nonzero": float(table["frequency"][latent]),
    }
    if lens := section.get("lens"):  # of the fine-tuned model's decoder row
        for end, name in (("more", "pos"), ("less", "neg")):
            made[f"{name}_str"], made[f"{name}_values"] = ([pair[i] for pair in lens["ft"][end]] for i in (0, 1))
    return made


def activation(e: dict, parts: list) -> dict:
    """An example. A token of which nothing was stored counts as 0."""
    values = [value or 0.0 for value in e["values"]]
    return {
        "id": identity(parts), "tokens": [token.replace("\0", " ") for token in e["tokens"]], "values": values,
        "maxValue": max(values), "maxValueTokenIndex": values.index(max(values)), "minValue": min(values),
        "dataSource": e["text"], "dataIndex": str(e["sequence"]),
    }  # fmt: skip


def identity(parts: list) -> str:
    """The same key each time for the same thing, in the form of neuronpedia's."""
    return "c" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
