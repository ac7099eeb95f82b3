"""The worlds of recipes.py: made-up activations whose concepts are known, and the dials under which the grid trains in each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from tqdm import tqdm

from sources.planted import BLOCK, PlantedConcepts

ROOT = Path(__file__).parent.parent
HELD_OUT = 32_768  # rows


class World(NamedTuple):
    planted: dict | None  # arguments of PlantedConcepts; None: the tiny Llama pair of tests/, whose truth nobody knows
    tokens: int  # to train on
    d_hidden: int
    batch_size: int
    k: int
    l1: float = 2.0  # the default of a run on datasets


OFTEN = dict(tail=0.5, offset=True)  # frequencies 1 / sqrt(rank), large means and outlier dimensions
SMALL = World(dict(n_concepts=512, d_model=96, active=12, **OFTEN), 1_000_000, 1024, 1024, 12)
NARROW = World(dict(n_concepts=256, d_model=64, active=8, tail=0.5), 1_000_000, 512, 512, 8)
WIDE = World(dict(n_concepts=1024, d_model=256, active=16, tail=0.5, scales=(3.0, 5.0)), 2_000_000, 2048, 1024, 16)
LONG = World(dict(n_concepts=1024, active=12, **OFTEN), 3_000_000, 2048, 2048, 12)
EASY = World(dict(n_concepts=1024, active=10.24), 3_000_000, 2048, 2048, 16)  # concepts of similar frequency
RARE = World(dict(n_concepts=1024, active=12, tail=0.5, rare=True), 3_000_000, 2048, 1024, 12)  # exclusive ones on .05 %
CROWDED = World(dict(n_concepts=2048, active=16, tail=0.5), 2_000_000, 1024, 1024, 16)  # twice as many concepts as latents
NULL = SMALL._replace(planted=SMALL.planted | {"null": True})
HARD = World(dict(n_concepts=2048, hard=True), 6_000_000, 4096, 512, 40)
WORLDS = {
    "small": SMALL, "narrow": NARROW, "wide": WIDE, "long": LONG, "easy": EASY, "rare": RARE, "crowded": CROWDED, "null": NULL,
    "hard": HARD,
    "hard, none to spare": HARD._replace(d_hidden=2048),
    "paper": World(dict(n_concepts=2048, d_model=256, active=20.48), 800_000_000, 4096, 2048, 48),  # for a GPU
    "tiny pair": World(None, 800_000, 512, 512, 16),
}  # fmt: skip
# Each cell of the grid is a world under other dials. k is .75 to 4 times the number of concepts that a token holds, latents are
# 1 to 4 times the concepts, the L1 weight half to twice its default.
DIALS = {
    "small": [{"k": 9}, {}, {"k": 16}, {"k": 24}, {"k": 48}, {"d_hidden": 512}, {"d_hidden": 2048}, {"batch_size": 512}],
    "narrow": [{}, {"k": 16}, {"k": 32}],
    "null": [{}, {"k": 48}],
    "wide": [{}, {"k": 64}],
    "long": [{}, {"k": 16}, {"k": 28}, {"batch_size": 4096}],
    "easy": [{}],
    "rare": [{}, {"k": 24}],
    "crowded": [{}],
    "hard": [{}],
}
L1_DIALS = {
    "small": [{"l1": 1.0}, {}, {"l1": 4.0}, {"d_hidden": 512}, {"d_hidden": 2048}],
    "narrow": [{}],
    "null": [{}],
    "wide": [{}],
    "long": [{}, {"l1": 1.0}],
    "easy": [{}],
    "rare": [{}],
    "crowded": [{}],
    "hard": [{}],
}
UNFAIR = ("crowded", "null")  # where latents for all concepts, or exclusive ones, do not exist
QUICK = ("small", "narrow", "null", "wide")  # the half of the grid that takes an hour on two cores


def told(dials: dict) -> str:
    """The dials of a cell as flags, or what a world has by itself."""
    return " ".join(f"--{name.replace('_', '-').replace('l1', 'l1-coeff')} {value:g}" for name, value in dials.items())


def write_world(folder: Path, world: PlantedConcepts, tokens: int) -> None:
    """folder/base.arrow and ft.arrow: float16 rows [d_model] of each model, complete or absent."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    schema = pa.schema([("activation", pa.list_(pa.float16(), world.d_model))])
    files = [pa.ipc.new_stream(partial / f"{model}.arrow", schema) for model in ("base", "ft")]
    out = torch.empty(2, BLOCK, world.d_model)
    for start in tqdm(range(0, tokens + HELD_OUT, BLOCK), desc=f"writing {folder.name}", unit="block"):
        world.gather("train", world.order(start, BLOCK), out)
        for file, x in zip(files, out.half(), strict=True):
            rows = pa.FixedSizeListArray.from_arrays(pa.array(x.flatten().numpy()), world.d_model)
            file.write_batch(pa.record_batch([rows], schema=schema))
    for file in files:
        file.close()
    partial.rename(folder)


def collect_tiny_pair(folder: Path) -> None:
    """folder/data: paired activations of the two tiny models of tests/tiny_models.py, which are trained first."""
    if not (folder / "data" / "pair.json").exists():
        python, models = sys.executable, [str(folder / "base"), str(folder / "ft")]
        subprocess.run([python, str(ROOT / "tests" / "tiny_models.py"), str(folder)], check=True)
        command = [python, str(ROOT / "collect.py"), "--base-model", models[0], "--ft-model", models[1]]
        command += ["--text", str(folder / "text" / "code.txt"), "--text", str(folder / "text" / "prose.txt")]
        command += ["--hook", "model.layers.1.mlp", "--num-tokens", "400_000", "--seq-len", "256", "--model-dtype", "float32"]
        subprocess.run([*command, "--output", str(folder / "data")], check=True)
