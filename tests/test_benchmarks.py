"""The benchmarks run as their documentation says, on sizes of seconds. What they measure is in the README."""

import csv

import pytest
import torch
from helpers import ROOT, run_script
from processes import Started

from benchmarks.memory import BLOCK, SMALL, peak_of, write_pair
from benchmarks.recipes import RECIPES, WORLDS, geometric_median


def test_frontier_reads_finished_runs(tmp_path):
    small = ["--num-tokens", 6400, "--d-hidden", 64, "--batch-size", 64, "--val-tokens", 256, "--wandb", "disabled"]
    runs = tmp_path / "runs"
    run_script("train.py", "--output-dir", runs, "--run-name", "l1", "--l1-coeff", 2, *small, check=True)
    run_script("train.py", "--output-dir", runs, "--run-name", "k", "--variant", "batch_topk", "--k", 4, *small, check=True)
    (runs / "unfinished").mkdir()
    shown = run_script("benchmarks/frontier.py", runs, check=True).stdout
    table = [line.split(" | ") for line in shown.splitlines() if line.startswith("|")][2:]
    assert [line[:3] for line in table] == [["| batch_topk", "64", "k 4"], ["| vanilla", "64", "l1 2"]]
    assert 3.5 < float(table[0][3]) < 4.5
    assert "do not compare" not in shown and (runs / "frontier.png").stat().st_size > 10_000
    run_script("train.py", "--output-dir", runs, "--run-name", "other", "--seed", 1, *small[:-4], *small[-2:], check=True)
    assert "do not compare" in run_script("benchmarks/frontier.py", runs, check=True).stdout
    nothing = run_script("benchmarks/frontier.py", tmp_path)
    assert nothing.returncode == 1 and "no finished run" in nothing.stderr


@pytest.mark.parametrize(("page", "count"), [("README.md", 3), ("docs/recipes.md", 10)])
def test_the_tables_name_the_flags_of_their_rows(page, count):
    text = (ROOT / page).read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and ("ours, " in line or "L1 (ckkissane)" in line)]
    assert len(rows) == count
    for row in rows:
        world = next((name for name in WORLDS if row.startswith(f"| {name} |")), "easy")
        ours = "ours, vanilla" if "vanilla" in row else "ours, batch_topk"
        flags = RECIPES["L1 (ckkissane)" if "L1 (ckkissane)" in row else ours]
        assert f"`{' '.join(flags).format(**WORLDS[world].dials)}`" in row
    words = " ".join(text.split())
    for name in ["easy", "hard"] if page != "README.md" else ["easy"]:
        world = WORLDS[name]
        common = [f"--num-tokens {world.tokens}", f"--d-hidden {world.d_hidden}", f"--batch-size {world.batch_size}"]
        assert all(flag in words for flag in [*common, " ".join(world.flags), "--val-tokens 32768", "--compute-dtype bfloat16"])


def test_recipes_scores_once_and_goes_on(tmp_path):
    flags = ["--worlds", "null", "--num-tokens", 8192, "--seeds", 7, "--output", tmp_path]
    first = run_script("benchmarks/recipes.py", *flags, "--recipes", "BatchTopK (crosscoder_learning)", check=True)
    (row,) = csv.DictReader((tmp_path / "recipes.csv").open())
    assert row["lr"] == "own" and row["tokens"] == "8192" and float(row["l0_loss"]) == pytest.approx(80, abs=0.1)
    assert row["right_shared"] == "0.0" and row["base_only_norm"] == "nan"  # four steps find nothing, and nothing is exclusive
    assert (tmp_path / "recipes.png").stat().st_size > 10_000
    again = run_script("benchmarks/recipes.py", *flags, "--recipes", "BatchTopK (crosscoder_learning)", check=True)
    assert again.stdout == first.stdout and len((tmp_path / "recipes.csv").read_text().splitlines()) == 2


def test_geometric_median_is_not_moved_by_outliers():
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    x[:100] += 1000
    assert geometric_median(x).norm() < 0.5 < 90 < x.mean(0).norm()
    line = torch.tensor([[0.0], [1.0], [10.0]])
    assert geometric_median(line).item() == pytest.approx(1, abs=0.01)


def test_a_dataset_larger_than_the_memory_of_a_run_adds_nothing_to_it(tmp_path):
    """300 MB of rows against 57 MB: memory that belongs to no file differs by less than a third of that, not by all of it.

    With pages of 2 MB the peaks of equal runs differ by some 40 MB, whatever the rows: by as much with 8 GB (docs/speed.md).
    """
    peaks, sizes = [], []
    for rows in (16 * BLOCK, SMALL):
        data = tmp_path / str(rows)
        sizes.append(write_pair(data, rows, 1152))
        flags = ["--dataset", data, "--output-dir", tmp_path / "runs", "--run-name", rows, "--wandb", "disabled"]
        flags += ["--d-hidden", 8, "--batch-size", 512, "--val-tokens", BLOCK]
        process = Started(ROOT / "train.py", *flags)
        peaks.append(peak_of(process))
        assert process.returncode == 0, process.output()
    assert sizes[0] > 300e6 > 5 * sizes[1] and peaks[1] > 50e6
    assert peaks[0] - peaks[1] < (sizes[0] - sizes[1]) / 3, peaks
