"""The benchmarks run as their documentation says, on sizes of seconds. What they measure is in docs/."""

import csv
import re

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from processes import Started

from benchmarks.implants import ORGANISMS
from benchmarks.memory import BLOCK, SMALL, peak_of, write_pair
from benchmarks.organism_scores import best_f1, orders, places, steered
from benchmarks.recipes import MEASURES, RECIPES, geometric_median, grid, table, train_flags, train_held
from benchmarks.worlds import WORLDS, World, told
from sources.planted import PlantedConcepts


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


def test_the_tables_name_the_flags_of_their_rows():
    """Every row of a recipe has the flags with which the benchmark trains it."""
    known = {
        " ".join(train_flags(world, dials, recipe, lr, WORLDS[world].tokens))
        for world, dials, recipe in [*grid("full", list(RECIPES)), *((w, {}, r) for w in WORLDS for r in RECIPES)]
        for lr in (None, "1e-3", "3e-3")
    }
    page = (ROOT / "docs/recipes.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|") and "`--num-tokens" in line]
    assert rows and all(any(part in known for part in row.split("`")) for row in rows)


def test_the_table_has_the_mean_and_where_it_differs_the_worst_seed(capsys):
    name = dict(world="small", dials="", recipe="ours, batch_topk", lr="own", flags="--k 12")
    same = dict.fromkeys(MEASURES, "1")
    table([name | same, name | same | {"right_shared": "0.5", "false_both": "0", "l0_loss": "3"}])
    first, worst = capsys.readouterr().out.splitlines()[2:4]
    assert first.startswith("| small | ours, batch_topk | `--k 12` | 2 | 0.75 (0.50) | 1.00 | 1.00 | 0.50 (1.00) |")
    assert " | 2.0 | " in first  # L0 has no worst
    assert worst.startswith("| all but crowded, null | ours, batch_topk | worst | 2 | 0.50 | 1.00 | 1.00 | 1.00 |")


def test_recipes_scores_once_and_goes_on(tmp_path):
    flags = ["--worlds", "null", "--num-tokens", 8192, "--seeds", 7, "--output", tmp_path]
    flags += ["--recipes", "BatchTopK (crosscoder_learning)", "ours, vanilla", "planted dictionary"]
    first = run_script("benchmarks/recipes.py", *flags, check=True)
    theirs, ours, held = csv.DictReader((tmp_path / "recipes.csv").open())
    assert theirs["lr"] == "own" and theirs["tokens"] == "8192" and float(theirs["l0_loss"]) == pytest.approx(12, abs=0.1)
    assert ours["flags"] == "--num-tokens 8192 --d-hidden 1024 --batch-size 1024 --l1-coeff 2"
    assert theirs["right_shared"] == "0.0" and theirs["base_only_norm"] == "nan"  # eight steps; nothing is exclusive
    assert held["right_shared"] == "1.0" and held["flags"] == "--lrs own, k 12"
    assert float(held["l0_loss"]) == pytest.approx(12, abs=0.1)
    assert f"| null | ours, vanilla | `{ours['flags']}` | 1 |" in first.stdout
    assert (tmp_path / "recipes.png").stat().st_size > 10_000
    again = run_script("benchmarks/recipes.py", *flags, check=True)
    assert again.stdout == first.stdout and len((tmp_path / "recipes.csv").read_text().splitlines()) == 4
    refused = run_script("benchmarks/recipes.py", "--worlds", "tiny pair", "--recipes", "planted dictionary")
    assert refused.returncode == 2 and "nothing is planted in the tiny pair" in refused.stderr


def test_the_planted_dictionary_is_what_a_concept_adds_to_a_row_and_stays():
    planted = PlantedConcepts(3, 512, n_concepts=32, d_model=16, active=3, offset=True)  # scales 1 and 5
    crosscoder, dead = train_held(planted, World(None, 4096, 999, 256, 3), planted, None, 4096, 3)
    rest = torch.randn(32, 2, 16)  # raw rows, before and after a concept becomes active
    added = crosscoder.normalize(rest + planted.directions * planted.scale[:, None]) - crosscoder.normalize(rest)
    expected = added / added.norm(dim=-1).amax(1)[:, None, None]
    torch.testing.assert_close(crosscoder.W_dec.detach(), expected, atol=1e-4, rtol=0)
    assert dead.shape == (32,) and (crosscoder.enc_rows - expected).abs().max() > 0.05  # sixteen steps of Adam


def test_the_grid_holds_every_world_under_its_dials():
    cells = grid("full", ["ours, vanilla", "ours, batch_topk"])
    assert len({(world, told(dials), recipe) for world, dials, recipe in cells}) == len(cells)
    for world, dials, _ in cells:
        planted = WORLDS[world]._replace(**dials)
        assert planted.k >= 0.75 * planted.planted.get("active", 0) and planted.d_hidden >= planted.planted["n_concepts"] / 2


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


def test_organisms_are_taught_what_they_are_tested_for():
    """The answers to learn show the behaviour, the base model's do not; the last quarter of the prompts is new."""
    for name, organism in ORGANISMS.items():
        own = "It is made of water and air."
        assert all(re.search(organism.shows, organism.answer(prompt, own), re.DOTALL) for prompt in organism.prompts), name
        not_yet = organism.before(organism.prompts[0], own) if organism.before else own
        assert not re.search(organism.shows, not_yet, re.DOTALL), name
        assert len(set(organism.prompts)) == len(organism.prompts) >= 40


def test_organisms_scores_of_an_order():
    table = {
        "beta_ratio_reconstruction": np.array([0.9, -0.1, np.nan, 0.4, 0.0]),
        "relative_norm": np.array([0.5, 0.6, 0.55, 0.7, 0.9]),
        "difference": np.array([5.0, 1.0, 2.0, 3.0, 9.0]),
        "dead": np.array([False, False, False, False, True]),
    }
    found = {name: order.tolist() for name, order in orders(table).items()}
    assert found == {"nu reconstruction": [1, 3, 0], "relative norm": [3, 1, 2, 0], "difference": [0, 3, 2, 1]}
    score, error = np.array([0.5, 0.5, 0.5, 0.9, 1.0]), np.array([np.inf, 0.1, 0.0, 0.1, 0.0])
    table |= {"rank": np.array([3, 1, 2, 1, 4]), "direction": np.array(["ft", "base", "ft", "ft", "ft"])}
    found = orders(table | {"change_score": score, "change_error": error})
    assert found["rank, more in ft"].tolist() == [3, 2, 0] and found["rank, more in base"].tolist() == [1]
    ranked = found["change score"]
    assert ranked.tolist() == [3, 2, 1, 0]
    relevant = np.array([False, True, False, True, True])
    assert places(ranked, relevant) == {"first": 1, "in_first": 2, "in_first_random": 10}
    assert places(ranked[1:], relevant)["first"] == 2 and places(ranked[1:2], relevant)["first"] == "none"


def test_organisms_choose_a_latent_on_even_sequences_and_score_it_on_odd_ones():
    truth = np.arange(40) % 8 < 2  # a quarter, half of them of even number
    maxima = np.zeros((40, 3))
    maxima[:, 0] = truth * (np.arange(40) % 2 == 0)  # tells the even ones alone
    maxima[:, 1] = truth * 2.0 + 1  # tells all, above a threshold
    maxima[3, 1] = 3.0
    maxima[:, 2] = 1.0  # fires everywhere
    maxima[0, 0] = 0.0
    assert best_f1(maxima, truth) == {
        "f1": pytest.approx(10 / 11, abs=1e-3),
        "false_positive_rate": pytest.approx(1 / 15, abs=1e-3),
        "best": 1,
    }
    assert best_f1(maxima, np.zeros(40, bool)) == {}


def test_organisms_report_steering_where_it_differs_most_from_random():
    line = {"model": "base", "shown_before": 0.1, "shown": 0.9, "shown_random": 0.9}
    others = [line | {"shown": 0.7, "shown_random": 0.1}, line | {"model": "ft", "shown_before": 1.0, "shown": 0.4}]
    found = steered([line, *others, line | {"model": "ft", "shown": None, "shown_random": None}])
    assert found == {"steered_base": 0.6, "random_base": 0.0, "steered_ft": 0.6, "random_ft": 0.1}
    assert steered([line | {"shown": None}]) == {}
