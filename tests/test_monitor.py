"""Each warning of a run with an advice: a run that triggers it, and the same run with what it says to try, which is better."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from helpers import metrics, run_script

from config import TrainConfig
from run.checkpoint import Progress
from run.monitor import FALLEN_TO, Watched, warn

TOPK = ["--variant", "batch_topk", "--k", 12]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> list:
    """The flags of data in which twelve of 256 concepts are active at a token, at frequencies of 1 / sqrt(rank)."""
    folder, draw, rows = tmp_path_factory.mktemp("crowded"), np.random.default_rng(1), 60_000
    base = draw.normal(size=(256, 48)).astype(np.float32)
    ft = base + 0.3 * draw.normal(size=base.shape).astype(np.float32)
    alone = draw.permutation(256)
    ft[alone[:12]] = base[alone[12:24]] = 0
    rate = 1 / np.sqrt(np.arange(1, 257))
    codes = (draw.random((rows, 256), np.float32) < 12 * rate / rate.sum()) * draw.random((rows, 256), np.float32)
    for name, directions in (("base", base), ("ft", ft)):
        x = codes @ (directions / 7) + draw.normal(size=48)  # a row of `directions` is about 7 long
        values = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float16).ravel()), 48)
        Dataset(pa.table({"activation": values})).save_to_disk(str(folder / name))
    return ["--base-dataset", folder / "base", "--ft-dataset", folder / "ft", "--num-tokens", 58_000, "--val-tokens", 2000]


def outcome(folder, name, flags) -> tuple[dict, list[str]]:
    """The summary of a run and its warnings."""
    often = ["--wandb", "disabled", "--log-every", 10, "--output-dir", folder, "--run-name", name]
    result = run_script("train.py", *flags, *often, check=True)
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    return json.loads((folder / name / "summary.json").read_text()), warnings


CASES = {  # name: flags, the warning, the metric that the advice betters, by how much at least
    "dead": (
        [*TOPK, "--aux-coeff", 0, "--l1-coeff", 0, "--lr-decay", 0.2],
        *["% of the latents are dead: try --aux-coeff 1", "dead_fraction", -0.3],
    ),
    "penalty too strong": (
        ["--l1-coeff", 8], r"variance fell from 0\.\d\d at step \d+ to 0\.\d\d: try --l1-coeff 2", "explained_variance", 0.5,
    ),
    "steps too long": (["--lr", 0.3], r"explained variance is -\d+.\d\d: try --lr 0.03", "explained_variance", 0.4),
    "steps too long, batch_topk": (
        [*TOPK, "--lr", 0.3], r"explained variance is -\d+.\d\d: try --lr 0.03", "explained_variance", 0.4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_advice_helps(crowded, tmp_path, name):
    flags, message, metric, better = CASES[name]
    flags = [*crowded, "--d-hidden", 512, "--batch-size", 200, *flags]
    before, warnings = outcome(tmp_path, "before", flags)
    (warning,) = [line for line in warnings if re.search(message, line)]
    after, _ = outcome(tmp_path, "after", [*flags, *re.search(r"try (--\S+ \S+)$", warning)[1].split()])
    assert (after[metric] - before[metric]) / better > 1, (before[metric], after[metric])
    assert after["explained_variance"] > before["explained_variance"] - 0.03


def test_more_active_latents_explain_what_too_few_do_not(tmp_path):
    flags = ["--variant", "batch_topk", "--k", 1, "--k-start", 1, "--d-hidden", 1024, "--num-tokens", 64_000]
    flags += ["--batch-size", 256, "--val-tokens", 2048]
    before, warnings = outcome(tmp_path, "before", flags)
    (warning,) = [line for line in warnings if "explained variance" in line]
    assert warning.endswith(": try --k 4") and "is 0.0" in warning
    after, _ = outcome(tmp_path, "after", [*flags, "--k", 4])
    assert after["explained_variance"] > before["explained_variance"] + 0.15


def test_explained_variance_that_falls_with_k_is_announced_once_and_no_damage(crowded, tmp_path):
    """From .5 with 32 active latents to .25 with one."""
    flags = ["--variant", "batch_topk", "--k", 1, "--k-start", 32, "--d-hidden", 512, "--batch-size", 200]
    often = ["--wandb", "disabled", "--log-every", 10, "--output-dir", tmp_path, "--run-name", "a"]
    result = run_script("train.py", *crowded, *flags, *often, check=True)
    reached = [line["explained_variance"] for line in metrics(tmp_path / "a") if "explained_variance" in line]
    assert reached[-1] < FALLEN_TO * max(reached)
    assert "explained variance" not in result.stderr
    assert result.stdout.count("k from 32 to 1 over 80% of the run (explained variance falls with it, as it should)") == 1


def share_of_waiting(run) -> float:
    lines = [line for line in metrics(run) if "data_wait_fraction" in line]
    return sum(line["data_wait_fraction"] for line in lines[1:]) / len(lines[1:])


def test_rows_made_by_the_models_keep_waiting_and_stored_ones_do_not(tiny, tmp_path):
    models = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", "model.layers.1.mlp", "--seq-len", 64]
    models += ["--text", tiny["code"], "--model-dtype", "float32", "--val-tokens", 1000]
    flags = ["--batch-size", 256, "--d-hidden", 256, "--log-every", 40, "--wandb", "disabled", "--output-dir", tmp_path]
    # The models take most of the time on any machine, from the 32,768 rows on whose norms were measured before.
    slow = ["--buffer-tokens", 10_000, "--model-batch-size", 1, "--num-tokens", 60_000]
    live = run_script("train.py", *models, *slow, *flags, "--run-name", "live", check=True)
    assert "of the time goes into waiting for data: the models fill the buffer meanwhile; try collect.py" in live.stderr
    run_script("collect.py", *models, "--num-tokens", 40_000, "--output", tmp_path / "pair", check=True)
    stored = run_script("train.py", "--dataset", tmp_path / "pair", *flags, "--run-name", "stored", check=True)
    assert "waiting" not in stored.stderr
    assert share_of_waiting(tmp_path / "live") > 0.5 > share_of_waiting(tmp_path / "stored")


def test_waiting_is_warned_of_once_and_only_where_something_can_be_done(capfd):
    def shown(waiting, **where):
        config, watched = TrainConfig(l1_coeff=1.0, k=8, k_start=16, d_hidden=64, lr=0.01, **where), Watched(100, Progress())
        for step, waited in enumerate(waiting, 1):
            line = {"explained_variance": 0.9, "dead_fraction": 0.0, "data_wait_fraction": waited}
            warn(watched, config, step, line)
        return capfd.readouterr().err

    assert shown([0.9, 0.9, 0.1, 0.9, 0.9], dataset="x") == ""  # never three in a row
    warning = shown([0.1, 0.9, 0.9, 0.8] + [0.9] * 10, dataset="x")
    assert warning == "warning  step 4: 80% of the time goes into waiting for data: see docs/speed.md\n"
    assert shown([0.9] * 10, model_dataset=["x", "y"]).count("waiting") == 1
    assert shown([0.9] * 10) == ""  # planted concepts
