"""End-to-end runs through the command line: every variant, what moves the weights, every input that is refused."""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers import (
    QUICK,
    ROOT,
    SMALL,
    assert_same_weights,
    metrics,
    one_line_error,
    run_script,
    train,
    train_with_a_limit,
    weights,
)

from config import TrainConfig
from crosscoder import CrossCoder
from ops.shard import ALONE
from run import checkpoint
from run.flags import parse
from train import main

NINE = {"loss", "l2_loss", "l1_loss", "l0_loss", "l1_coeff", "lr"}
NINE |= {"explained_variance", "explained_variance_A", "explained_variance_B"}
ALSO = {"aux_loss", "dead_fraction", "threshold", "grad_norm", "tokens", "tokens_per_second", "data_wait_fraction"}


def train_here(folder, name, *flags) -> Path:
    """The entry called with its command line, without starting Python again."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert main(parse(TrainConfig, list(map(str, ["--output-dir", folder, "--run-name", name, *flags]))), ALONE) == 0
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    return folder / name


# --- a run and its files


def test_planted_run_writes_what_design_promises(tmp_path):
    result = run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *SMALL, check=True)
    run = tmp_path / "a"
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "crosscoder", "summary.json"}
    lines = metrics(run)
    assert [m["step"] for m in lines] == [1, *range(10, 101, 10), 100]  # the last line is that of the held-out rows
    assert all(m.keys() >= NINE | ALSO for m in lines[:-1])
    assert {f"val_{name}" for name in NINE - {"lr", "l1_coeff"}} <= lines[-1].keys()
    assert [m["step"] for m in lines if "val_loss" in m] == [50, 100]
    assert [m["tokens"] for m in lines[:3]] == [64, 640, 1280]
    assert [p.name for p in checkpoint.complete(run)] == ["step_00000080", "step_00000100"]
    summary = json.loads((run / "summary.json").read_text())
    assert NINE | {"tokens", "seconds", "tokens_per_second", "planted"} <= summary.keys() and summary["tokens"] == 6400
    kinds = ("shared", "base_only", "ft_only")
    assert summary["planted"].keys() == {f"{a}_{b}" for a in ("recall", "class_ok") for b in kinds} | {"false_exclusive"}
    counts, by_norm, by_scaling = (summary[name] for name in ("latents", "latents_by_norm", "latents_by_scaling"))
    assert sum(counts.values()) == sum(by_norm.values()) == sum(by_scaling.values()) == 64
    assert all(counts[name] <= min(by_norm[name], by_scaling[name]) for name in ("base_only", "ft_only"))
    listed = json.loads((run / "crosscoder" / "classes.json").read_text())
    assert {name: len(latents) for name, latents in listed.items()} == {k: n for k, n in counts.items() if k != "shared"}
    printed = (
        f"{counts['base_only']} base-only, {counts['shared']} shared, {counts['ft_only']} ft-only, {counts['dead']} dead of 64"
    )
    assert printed in result.stdout
    config = json.loads((run / "config.json").read_text())
    head = subprocess.run(
        ["git", f"--git-dir={ROOT / '.git'}", "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert config["code"]["torch"] == torch.__version__
    commit = config["code"]["commit"]  # None in a copy without its history
    assert head.startswith(commit.removesuffix("-dirty")) if head else commit is None
    assert config["given"]["d_hidden"] == 64 and config["given"]["lr"] is None
    assert config["resolved"]["lr"] == 2 / (128 * 64) ** 0.5


def test_schedules(tmp_path):
    run = train(tmp_path, "a", *SMALL, "--log-every", 1, "--lr", 0.01, "--l1-coeff", 2, "--lr-warmup", 0.1, "--l1-warmup", 0.2)
    lines = {m["step"]: m for m in metrics(run) if "lr" in m}
    lr, l1 = [[lines[s][name] for s in range(1, 101)] for name in ("lr", "l1_coeff")]
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10 * 0.01)
    np.testing.assert_allclose(lr[10:20], 0.01)
    np.testing.assert_allclose(lr[20:], np.arange(80, 0, -1) / 80 * 0.01)
    np.testing.assert_allclose(l1[:20], np.arange(1, 21) / 20 * 2)
    np.testing.assert_allclose(l1[20:], 2)


def test_the_penalty_of_batch_topk_falls_at_the_end(tmp_path):
    flags = ["--variant", "batch_topk", "--k", 2, "--l1-coeff", 2, "--l1-warmup", 0.5, "--log-every", 1]
    run = train(tmp_path, "a", *SMALL, *flags)
    l1 = [m["l1_coeff"] for m in metrics(run) if "l1_coeff" in m]
    np.testing.assert_allclose(l1[:50], np.arange(1, 51) / 50 * 2)
    np.testing.assert_allclose(l1[50:80], 2)
    np.testing.assert_allclose(l1[80:], np.arange(19, -1, -1) / 20 * 2, atol=1e-12)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["l1_coeff"] == 0 and summary["loss"] == summary["l2_loss"]


def test_k_falls_by_equal_factors(tmp_path):
    flags = ["--variant", "batch_topk", "--k", 2, "--k-start", 8, "--k-anneal", 0.4, "--log-every", 1]
    lines = {m["step"]: m for m in metrics(train(tmp_path, "a", *SMALL, *flags)) if "lr" in m}
    active = [lines[s]["l0_loss"] for s in range(1, 101)]
    np.testing.assert_allclose(active[:40], np.round(2 * 8 ** (1 - np.arange(1, 41) / 40)))
    np.testing.assert_allclose(active[40:], 2)


SHORT = [*QUICK, "--num-tokens", 1280]
SHORT_SPARSE = [*QUICK, "--d-hidden", 256, "--num-tokens", 6400, "--dead-window", 0.1]
SHORT_SPARSE += ["--variant", "batch_topk", "--k", 2, "--k-start", 2]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("baseline"), "a", *SHORT)


@pytest.fixture(scope="module")
def sparse_baseline(tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("sparse"), "a", *SHORT_SPARSE)


@pytest.mark.parametrize(
    "flag",
    [
        *["--lr 0.001", "--beta1 0.5", "--beta2 0.9", "--grad-clip 0.1", "--l1-coeff 3", "--l1-warmup 0.9", "--lr-warmup 0.9"],
        *["--lr-decay 0.9", "--dec-init-norm 0.2", "--no-center"],
    ],
)
def test_each_knob_moves_the_weights(tmp_path, baseline, flag):
    run = train_here(tmp_path, "a", *SHORT, *flag.split())
    assert not torch.equal(weights(run)["W_dec"], weights(baseline)["W_dec"])


def test_compute_dtype_moves_the_weights(tmp_path):
    runs = [train_here(tmp_path, dtype, *SHORT, "--compute-dtype", dtype) for dtype in ("float32", "bfloat16")]
    assert not torch.equal(*(weights(run)["W_dec"] for run in runs))


@pytest.mark.parametrize("flag", ["--k 3", "--k-start 4", "--k-anneal 0.5", "--k-aux 1", "--aux-coeff 0", "--dead-window 0.5"])
def test_each_knob_of_batch_topk_moves_the_weights(tmp_path, sparse_baseline, flag):
    run = train_here(tmp_path, "a", *SHORT_SPARSE, *flag.split())
    assert not torch.equal(weights(run)["W_dec"], weights(sparse_baseline)["W_dec"])


def test_same_command_gives_the_same_numbers_and_another_seed_others(tmp_path):
    a, b, c = (train(tmp_path, n, *SMALL, "--seed", s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert_same_weights(a, b)
    assert not torch.equal(weights(a)["W_dec"], weights(c)["W_dec"])
    timing = {"time", "tokens_per_second", "data_wait_fraction"}
    strip = [[{k: v for k, v in m.items() if k not in timing} for m in metrics(r)] for r in (a, b)]
    assert strip[0] == strip[1]


def test_config_of_a_run_can_be_given_back(tmp_path):
    a = train(tmp_path, "a", *SMALL, "--lr", 1e-2)
    b = train(tmp_path, "b", "--config", a / "config.json")
    c = train(tmp_path, "c", "--config", a / "config.json", "--lr", 1e-3)
    assert_same_weights(a, b)
    resolved = [json.loads((run / "config.json").read_text())["resolved"] for run in (a, c)]
    assert {k for k in resolved[0] if resolved[0][k] != resolved[1][k]} == {"lr", "run_name", "config"}


# --- real activations of two real models


def test_a_batch_in_parts_takes_the_same_steps(tmp_path):
    """Parts of unequal size; with a rate that falls from the first step to the last."""
    flags = [*QUICK, "--num-tokens", 1280, "--log-every", 1, "--compute-dtype", "float32", "--lr-decay", 1, "--lr-warmup", 0]
    whole, parts = (metrics(train(tmp_path, str(n), *flags, "--micro-batch-size", n)) for n in (64, 24))
    for a, b in zip(whole[:-1], parts[:-1], strict=True):
        for name in ("loss", "grad_norm", "explained_variance", "l0_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)
    rates = [line["lr"] for line in whole[:-1]]
    assert rates == pytest.approx([rates[0] * (1 - step / 20) for step in range(20)])


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """The three recipes on the tiny Llama pair, one with wandb offline."""
    folder = tmp_path_factory.mktemp("trained")
    sizes = ["--dataset", pair, "--d-hidden", 512, "--batch-size", 256, "--lr", 2e-3, "--epochs", 1, "--val-every", 200]
    off, topk = ["--wandb", "disabled"], ["--variant", "batch_topk", "--k", 16]
    return {
        "vanilla": train(folder, "vanilla", *sizes, "--l1-coeff", 0.5, "--wandb", "offline"),
        "batch_topk": train(folder, "batch_topk", *sizes, *topk, "--aux-coeff", 0, *off),
        # A dictionary that starts small has dead latents, so that the auxiliary loss has something to do.
        "with_aux": train(folder, "aux", *sizes, *topk, "--k-start", 1, "--dec-init-norm", 0.08, *off),
    }


@pytest.mark.parametrize("recipe", ["vanilla", "batch_topk", "with_aux"])
def test_explained_variance_rises_on_real_activations(trained, recipe):
    lines = metrics(trained[recipe])
    for name in ("explained_variance", "explained_variance_A", "explained_variance_B"):
        assert lines[0][name] < 0.3 and lines[-2][name] > 0.8 and lines[-1][f"val_{name}"] > 0.8
    assert all(m.keys() >= NINE for m in lines[:-1])


def test_l0_falls_and_ends_at_k_for_batch_topk(trained):
    l0 = [m["l0_loss"] for m in metrics(trained["vanilla"]) if "l0_loss" in m]
    assert l0[-1] < 0.3 * l0[0]
    for recipe in ("batch_topk", "with_aux"):
        lines = metrics(trained[recipe])
        assert {m["l0_loss"] for m in lines[:-1] if m["step"] > 0.8 * lines[-1]["step"]} == {16.0}
        assert lines[-1]["val_l0_loss"] == pytest.approx(16, abs=0.01)


def test_auxiliary_loss_runs_when_latents_are_dead(trained):
    lines = metrics(trained["with_aux"])[:-1]
    assert max(m["aux_loss"] for m in lines) > 0 and max(m["dead_fraction"] for m in lines) > 0
    assert all(m["aux_loss"] == 0 for m in metrics(trained["batch_topk"])[:-1])


def test_wandb_gets_all_metrics(trained):
    record = next((trained["vanilla"] / "wandb").glob("offline-run-*/*.wandb")).read_bytes()
    for name in NINE | ALSO | {"val_explained_variance"}:
        assert name.encode() in record
    assert not (trained["batch_topk"] / "wandb").exists()


def test_saved_crosscoder_takes_raw_activations(trained, pair):
    """Reconstructions of what the models gave, not of what was stored; folded, the same."""
    crosscoder = CrossCoder.from_pretrained(trained["batch_topk"] / "crosscoder")
    scale = torch.tensor(json.loads((pair / "pair.json").read_text())["stored_scale"])
    assert abs(scale[0] / scale[1] - 1) > 0.05  # the two models differ in scale
    stored = [
        load_from_disk(str(pair / m))["validation"].with_format("torch")[:2000]["activation"].float() for m in ("base", "ft")
    ]
    raw = torch.stack([s / c for s, c in zip(stored, scale, strict=True)], dim=1)
    error = (crosscoder(raw) - raw).pow(2).sum() / (raw - raw.mean(0)).pow(2).sum()
    assert error < 0.2
    folded = crosscoder.fold_normalization()
    torch.testing.assert_close(folded.encode(raw), crosscoder.encode(raw), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded(raw), crosscoder(raw), rtol=1e-4, atol=1e-4)


def test_a_model_paired_with_itself_has_no_exclusive_latents_and_with_shuffled_rows_few_shared(pair, tmp_path):
    base = load_from_disk(str(pair / "base"))["train"].select(range(30_000)).select_columns("activation")
    base.save_to_disk(str(tmp_path / "base"))
    base.select(np.random.default_rng(0).permutation(30_000)).save_to_disk(str(tmp_path / "shuffled"))
    sizes = ["--wandb", "disabled", "--d-hidden", 256, "--batch-size", 256, "--lr", 2e-3, "--epochs", 4, "--l1-coeff", 1]
    counts = {}
    for ft in ("base", "shuffled"):
        run = train(tmp_path, f"run-{ft}", *sizes, "--base-dataset", tmp_path / "base", "--ft-dataset", tmp_path / ft)
        counts[ft] = json.loads((run / "summary.json").read_text())["latents"]
    assert counts["base"]["base_only"] == counts["base"]["ft_only"] == 0 and counts["base"]["shared"] > 200
    assert counts["shuffled"]["shared"] < 0.5 * counts["base"]["shared"]


# --- what must not move the state, and what must stop the run


def test_evaluation_moves_nothing(tmp_path):
    often = train(tmp_path, "often", *SMALL, "--variant", "batch_topk", "--val-every", 10)
    never = train(tmp_path, "never", *SMALL, "--variant", "batch_topk", "--val-every", 1000)
    (a, state_a), (b, state_b) = (checkpoint.read(checkpoint.find(run)) for run in (often, never))
    assert all(torch.equal(a[name], b[name]) for name in a) and state_a["scheduler"] == state_b["scheduler"]


def test_nan_loss_stops_with_the_step_the_rows_and_the_last_good_checkpoint(pair, tmp_path):
    flags = ["--dataset", pair, *QUICK, "--num-tokens", 12_800, "--save-every", 10, "--lr", "1e30", "--lr-warmup", "0"]
    message = one_line_error(run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *flags), "train.py")
    assert "the loss of step 2 is not finite" in message and "of the training rows" in message and "lower --lr" in message
    assert "Last good checkpoint: none yet" in message and not checkpoint.complete(tmp_path / "a")


def test_full_disk_ends_the_run_with_a_sentence(tmp_path):
    assert "could not be written" in one_line_error(train_with_a_limit(tmp_path, "a", 50_000, *SMALL), "train.py")


def test_held_out_rows_without_a_number_are_refused(tmp_path):
    x = np.random.default_rng(0).normal(size=(1000, 8)).astype("float32")
    x[900:] = np.nan
    for name in ("b", "f"):
        Dataset.from_dict({"x": x.tolist()}).save_to_disk(str(tmp_path / name))
    data = ["--base-dataset", tmp_path / "b", "--ft-dataset", tmp_path / "f"]
    result = run_script("train.py", "--output-dir", tmp_path / "runs", *data, *QUICK, "--val-tokens", 100)
    assert "every held-out row holds NaN" in one_line_error(result, "train.py")


def test_a_collection_without_held_out_sequences_holds_out_its_last_rows(tiny, tmp_path):
    flags = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", "model.layers.1.mlp", "--text", tiny["code"]]
    flags += ["--num-tokens", 1000, "--val-tokens", 0, "--seq-len", 128, "--output", tmp_path / "pair"]
    run_script("collect.py", *flags, check=True)
    run = train(tmp_path, "a", "--wandb", "disabled", "--dataset", tmp_path / "pair", "--d-hidden", 64, "--batch-size", 64)
    assert json.loads((run / "config.json").read_text())["data"]["train_rows"] == 900


def test_a_run_of_a_single_row(tmp_path):
    run = train(tmp_path, "a", *SMALL, "--num-tokens", 1, "--variant", "batch_topk")
    assert [m["step"] for m in metrics(run)] == [1, 1]
    assert metrics(run)[0]["explained_variance"] is None  # one row has no variance; null, which JSON knows


def test_too_little_room_is_refused_before_the_start(tmp_path):
    result = run_script("train.py", "--output-dir", tmp_path, *SMALL, "--keep-checkpoints", 10**9)
    message = one_line_error(result, "train.py")
    assert "GB free" in message and "--keep-checkpoints" in message


BAD = [
    (["--dataset", "nowhere/", "--base-dataset", "x"], "leave out --base-dataset"),
    (["--dataset", "./nowhere"], "no such file or folder"),
    (["--base-dataset", "x"], "--base-dataset is given without --ft-dataset"),
    (["--ft-dataset", "x"], "--ft-dataset is given without --base-dataset"),
    (["--epochs", "2", "--num-tokens", "5"], "--epochs and --num-tokens both"),
    (["--epochs", "2"], "planted concepts are endless"),
    (["--lr", "0"], "--lr 0.0: must be above 0"),
    (["--lr", "nan"], "--lr nan: must be a finite number"),
    (["--batch-size", "-3"], "--batch-size -3: must lie between 1 and"),
    (["--batch-size", "1000000000000"], "--batch-size 1000000000000: must lie between 1 and 16777216"),
    (["--num-tokens", "1" + "0" * 400], "--num-tokens 10000000000000000000: must be a finite number, a whole one below 2^53"),
    (["--l1-coeff", "-1"], "--l1-coeff -1.0: must lie between"),
    (["--l1-coeff", "1e38"], "--l1-coeff 1e+38: must lie between 0 and 1000000.0"),
    (["--k", "8"], "--k 8: belongs to --variant batch_topk; give that variant or leave it out"),
    (["--k-start", "4"], "--k-start 4: belongs to --variant batch_topk"),
    *[
        (["--run-name", name], f"--run-name {name}: must be a name alone")
        for name in ("../../x", "/tmp/x", "a/b", "a/", ".", "..")
    ],
    (["--seed", "-1"], "--seed -1: must lie between"),
    (["--beta2", "1.0"], "--beta2 1.0: must lie between"),
    (["--variant", "batch_topk", "--k", "5000"], "--k 5000: must be at most --d-hidden"),
    (["--device", "quantum"], "--device quantum: not usable here"),
    (["--device", "meta"], "--device meta: not usable here"),
    (["--resume", "auto"], "--resume auto needs --run-name"),
    (["--resume", "nowhere"], "nowhere: no such run or checkpoint"),
    (["--base-column", "x"], "--base-column and --ft-column need"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags)[:40] for flags, _ in BAD])
def test_bad_flags_are_refused(tmp_path, flags, message):
    assert message in one_line_error(run_script("train.py", "--output-dir", tmp_path / "runs", *flags), "train.py")
    assert not (tmp_path / "runs").exists()  # nothing is left behind


def test_a_run_name_that_exists_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    result = run_script("train.py", "--output-dir", tmp_path, "--run-name", "a", *SMALL)
    assert f"{tmp_path / 'a'} exists" in one_line_error(result, "train.py")


def test_an_unwritable_output_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script("train.py", "--output-dir", tmp_path / "file", *SMALL)
    assert "--output-dir: cannot create" in one_line_error(result, "train.py")


def test_published_datasets_of_python_lists_train(tmp_path):
    """Two single datasets with variable lists under other names, and no pair.json."""
    x = np.random.default_rng(0).normal(size=(800, 8)).astype("float32")
    Dataset.from_dict({"base_model_acts": x.tolist()}).save_to_disk(str(tmp_path / "b"))
    Dataset.from_dict({"ft_model_acts": (x + 1).tolist()}).save_to_disk(str(tmp_path / "f"))
    run = train(tmp_path, "a", *QUICK, "--base-dataset", tmp_path / "b", "--ft-dataset", tmp_path / "f", "--val-tokens", 100)
    assert json.loads((run / "summary.json").read_text())["tokens"] == 700
