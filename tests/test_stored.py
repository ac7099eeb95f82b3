"""Stored activations as a source: every row once an epoch, held-out rows, kinds of datasets, statistics, outliers."""

import json
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, Value
from helpers import BASE, CPU, FT, collect, numbered, numbers, one_line_error, open_pair, open_single, run_script, write
from safetensors.torch import load_file

from sources.batches import estimate_normalization, row_norms, validation_batches


def singles(tmp_path, rows=5000, seed=0, val_tokens=None, default_val=500, **options):
    base = write(tmp_path / "base", numbered(rows, sign=BASE), batch=700, **options)
    ft = write(tmp_path / "ft", numbered(rows, sign=FT), batch=999, **options)
    return open_single(base, ft, (None, None), val_tokens, default_val, seed)


@pytest.mark.parametrize("rows", [2, 1000, 1024, 5000, 140_000])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_row_comes_once_an_epoch_in_both_models(tmp_path, rows, shuffled):
    source = singles(tmp_path, rows + 10, val_tokens=10)
    source.shuffled = shuffled
    got = collect(source, 256, 2 * rows)
    seen = torch.cat([b for b, _ in got])
    assert torch.equal(seen[:rows].sort().values, torch.arange(rows))
    assert torch.equal(seen[rows:].sort().values, torch.arange(rows))
    if rows > 1024:
        assert not torch.equal(seen[:rows], seen[rows:])  # another order
    assert [len(b) for b, _ in got] == [256] * (2 * rows // 256) + ([2 * rows % 256] if 2 * rows % 256 else [])
    assert got[-1][1] == 2 * rows


@pytest.mark.parametrize("shuffled", [False, True])
def test_each_epoch_has_an_order_of_its_own(tmp_path, shuffled):
    source = singles(tmp_path, 20_010, val_tokens=10)
    source.shuffled = shuffled
    assert not np.array_equal(source.order(0, 1024), source.order(20_000, 1024))


def test_unshuffled_rows_are_mixed_over_the_whole_dataset(tmp_path):
    batch = collect(singles(tmp_path, 60_000, val_tokens=10), 1000, 1000)[0][0].double()
    assert abs(batch.mean() - 30_000) < 3000 and batch.std() > 15_000  # a uniform draw has 17,320


def test_order_depends_on_the_seed_alone(tmp_path):
    first = collect(singles(tmp_path / "a"), 100, 2000)
    again, other = collect(singles(tmp_path / "b"), 100, 2000), collect(singles(tmp_path / "c", seed=1), 100, 2000)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


@pytest.mark.parametrize("steps", [1, 17, 44, 45, 60])
def test_stream_goes_on_from_a_position(tmp_path, steps):
    source = singles(tmp_path)  # 4500 training rows, 100 a batch: an epoch ends after 45
    whole = collect(source, 100, 9000)
    rest = collect(source, 100, 9000, position=whole[steps - 1][1])
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[steps:], rest, strict=True))


def test_closing_the_stream_ends_its_thread(tmp_path):
    stream = singles(tmp_path).batches(100, 9000, CPU)
    next(stream)
    assert any(thread.name == "read-ahead" for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


def test_held_out_rows_are_the_last_and_never_trained_on(tmp_path):
    source = singles(tmp_path)
    held_out = torch.cat([numbers(x[:, 0]) for x in validation_batches(source, 128, CPU)])
    assert torch.equal(held_out, torch.arange(4500, 5000))
    assert max(b.max() for b, _ in collect(source, 128, 9000)) == 4499


@pytest.mark.parametrize("kind", ["save_to_disk", "parquet", "arrow", "folder of parquet", "dataset dict"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("fixed", [True, False])
def test_kinds_of_datasets(tmp_path, kind, dtype, fixed, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    paths = []
    for model, sign in (("base", BASE), ("ft", FT)):
        x = numbered(3000, sign=sign, dtype=dtype)
        folder = write(tmp_path / model, x, fixed=fixed, name="base_model_acts", batch=500)
        if "parquet" in kind:
            (tmp_path / f"{model}-files").mkdir()
            folder = tmp_path / f"{model}-files" / "part.parquet"
            pq.write_table(datasets.load_from_disk(str(tmp_path / model)).data.table, folder)
            folder = folder.parent if kind.startswith("folder") else folder
        elif kind == "arrow":
            folder = next((tmp_path / model).glob("*.arrow"))
        elif kind == "dataset dict":
            parts = {"train": Dataset.load_from_disk(folder), "validation": Dataset.load_from_disk(folder).select(range(64))}
            folder = tmp_path / f"{model}-dict"
            DatasetDict(parts).save_to_disk(str(folder))
        paths.append(str(folder))
    source = open_single(*paths, (None, None), None, 100, seed=0)
    assert source.dtype == getattr(torch, dtype) and source.d_model == 4
    assert source.val_rows == (64 if kind == "dataset dict" else 100)
    assert source.train_rows == (3000 if kind == "dataset dict" else 2900)
    seen = torch.cat([b for b, _ in collect(source, 256, source.train_rows)])
    assert torch.equal(seen.sort().values, torch.arange(source.train_rows))


def test_from_dict_of_python_lists(tmp_path):
    x = numbered(300)
    for name in ("base", "ft"):
        Dataset.from_dict({f"{name}_acts": x.tolist(), "text": ["a"] * 300}).save_to_disk(str(tmp_path / name))
    source = open_single(str(tmp_path / "base"), str(tmp_path / "ft"), (None, None), 30, 0, seed=0)
    assert len(torch.cat([b.x[:, 0] for b in source.batches(64, 270, CPU)])) == 270


def test_paired_folder_carries_its_scale(tmp_path):
    for model, sign in (("base", BASE), ("ft", FT)):
        write(tmp_path / model, numbered(200, sign=sign))
    (tmp_path / "pair.json").write_text(json.dumps({"stored_scale": [0.5, 2.0], "shuffled": True}))
    source = open_pair(str(tmp_path), (None, None), 20, 0, seed=0)
    assert source.stored_scale.tolist() == [0.5, 2.0] and source.shuffled and source.train_rows == 180


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pairs_with_a_non_finite_value_are_left_out_of_both_models_and_counted(tmp_path, bad):
    x, y = numbered(5000, sign=BASE, dtype="float16"), numbered(5000, sign=FT, dtype="float16")
    x[10, 3] = bad
    y[2000, 2] = bad
    source = open_single(write(tmp_path / "b", x), write(tmp_path / "f", y), (None, None), 500, 0, seed=0)
    got = list(collect(source, 100, 4500))
    seen = torch.cat([b for b, _ in got]).sort().values
    assert torch.equal(seen, torch.tensor([i for i in range(4500) if i not in (10, 2000)]))
    assert sorted(len(b) for b, _ in got) == [99, 99] + [100] * 43 and got[-1][1] == 4500
    assert list(source.batches(100, 4500, CPU))[-1].dropped == (2, 0)


def test_the_last_batch_is_known_although_only_dropped_rows_follow(tmp_path):
    x = numbered(1100)
    clean = open_single(*[write(tmp_path / name, x) for name in "bf"], (None, None), 100, 0, seed=0)
    x[clean.order(999, 1)] = np.nan  # the row that comes last
    source = open_single(*[write(tmp_path / (name + "nan"), x) for name in "bf"], (None, None), 100, 0, seed=0)
    got = [(len(b.x), b.position, b.dropped) for b in source.batches(111, 1000, CPU)]
    assert [size for size, _, _ in got] == [111] * 9 and got[-1] == (111, 1000, (1, 0))


def test_too_many_non_finite_pairs_stop_the_run(tmp_path):
    x = numbered(5000)
    x[::500] = np.nan
    source = open_single(write(tmp_path / "b", x), write(tmp_path / "f", x), (None, None), 500, 0, seed=0)
    with pytest.raises(ValueError, match="NaN or inf.*--dtype float32"):
        list(source.batches(100, 4500, CPU))
    with pytest.raises(ValueError, match="NaN or inf"):
        estimate_normalization(source, center=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("center", [True, False])
def test_statistics_equal_float64(tmp_path, dtype, center):
    draw = np.random.default_rng(1)
    models = [(draw.normal(size=(9000, 8)) * s + 5).astype(dtype) for s in (0.1, 7)]
    paths = [write(tmp_path / str(i), x) for i, x in enumerate(models)]
    mean, scale = estimate_normalization(open_single(*paths, (None, None), 1000, 0, seed=0), center)
    for m, x in enumerate(models):
        x = x[:8000].astype(np.float64)
        mu = x.mean(0) * center
        np.testing.assert_allclose(mean[m], mu, rtol=1e-9)
        np.testing.assert_allclose(scale[m], 8**0.5 / np.linalg.norm(x - mu, axis=1).mean(), rtol=1e-9)


def test_statistics_sample_all_of_a_long_dataset(tmp_path):
    x = np.zeros((200_000, 2), "float16")
    x[:100_000] = 1
    x[100_000:] = 3
    path = write(tmp_path / "a", x)
    mean, _ = estimate_normalization(open_single(path, path, (None, None), 1000, 0, seed=0), center=True)
    torch.testing.assert_close(mean, torch.full((2, 2), 2.0, dtype=torch.float64), atol=0.02, rtol=0)


def test_token_columns_of_another_integer_type_still_agree(tmp_path):
    paths = [write(tmp_path / name, numbered(100), token=np.arange(100)) for name in ("b", "f")]
    Dataset.load_from_disk(paths[1]).cast_column("token", Value("int64")).save_to_disk(str(tmp_path / "wide"))
    assert open_single(paths[0], str(tmp_path / "wide"), (None, None), 10, 0, seed=0).train_rows == 90


# --- outliers


def with_something_to_learn(rows=6000, d_model=16):
    """[2, rows, d_model] float32: sparse sums of directions that two models nearly share."""
    draw = np.random.default_rng(0)
    codes = draw.random((rows, 24)) * (draw.random((rows, 24)) < 0.1)
    basis = draw.normal(size=(24, d_model))
    bases = [basis, basis + 0.3 * draw.normal(size=basis.shape)]
    return np.stack([codes @ b + 0.01 * draw.normal(size=(rows, d_model)) for b in bases]).astype("float32")


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_outliers_are_left_out_and_change_nothing(tmp_path, streaming):
    """One row of 1e30 in one model, in the training and in the held-out rows, or 1 % of both models' rows times 1000."""
    clean = with_something_to_learn()
    worlds = {"clean": clean, "one": clean.copy(), "nan": clean.copy(), "many": clean.copy()}
    for rows, value in (("one", 1e30), ("nan", np.nan)):
        worlds[rows][0, [2, 3000, 5998]] = value  # a streamed run holds its first rows out
    worlds["many"][:, 50::100] *= 1000
    flags = ["--d-hidden", 64, "--batch-size", 64, "--val-tokens", 500, "--l1-coeff", 0.1, "--wandb", "disabled"]
    flags += ["--output-dir", tmp_path, "--num-tokens", 22_000, "--compute-dtype", "float32"]
    flags += ["--streaming", "--buffer-tokens", 4000] if streaming else []
    summaries, printed = {}, {}
    for name, world in worlds.items():
        data = []
        for flag, x in zip(("--base-dataset", "--ft-dataset"), world, strict=True):
            folder = write(tmp_path / f"{name}{flag}", x)
            if streaming:
                folder = f"{folder}.parquet"
                pq.write_table(pa.table({"activation": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 16)}), folder)
            data += [flag, folder]
        printed[name] = run_script("train.py", *data, *flags, "--run-name", name, check=True).stdout
        summaries[name] = json.loads((tmp_path / name / "summary.json").read_text())
    one, nan, many, without = (summaries[name] for name in ("one", "nan", "many", "clean"))
    weights = [load_file(tmp_path / name / "crosscoder" / "model.safetensors") for name in ("one", "nan")]
    assert all(torch.equal(weights[0][name], t) for name, t in weights[1].items())
    assert one["explained_variance"] == nan["explained_variance"] and one["latents"] == nan["latents"]
    assert (one["rows_dropped"], nan["rows_dropped"]) == (one["rows_dropped_by_norm"], nan["rows_dropped"])
    assert 4 <= one["rows_dropped"] == nan["rows_dropped"] <= 12 and nan["rows_dropped_by_norm"] == 0
    for outliers in (one, many):
        for name in ("explained_variance", "explained_variance_A", "explained_variance_B"):
            assert outliers[name] == pytest.approx(without[name], abs=0.02) and without[name] > 0.9
        assert all(outliers["latents"][name] == without["latents"][name] for name in ("base_only", "ft_only"))
    assert many["rows_dropped"] == many["rows_dropped_by_norm"] == pytest.approx(220, abs=8)
    assert f"left out   {many['rows_dropped']:,} rows by their norm (--max-norm-ratio), 0 with NaN" in printed["many"]
    assert "rows above 10 times that are left out" in printed["many"] and "left out   " not in printed["clean"]
    keeps = [*data, *flags, "--run-name", "keeps", "--max-norm-ratio", 1e9]
    run_script("train.py", *keeps, check=True)
    assert json.loads((tmp_path / "keeps" / "summary.json").read_text())["explained_variance"] < 0.5
    changed = run_script("train.py", "--resume", tmp_path / "one", "--max-norm-ratio", 20)
    assert "--max-norm-ratio is 20.0 and was 10.0 when the run began" in one_line_error(changed, "train.py")
    if not streaming:
        run_script("analyze.py", tmp_path / "one", check=True)
        measured = json.loads((tmp_path / "one" / "analysis" / "metrics.json").read_text())
        assert measured["explained_variance_A"] == pytest.approx(one["explained_variance_A"], abs=1e-3)
        assert all(measured["latents"][name] == one["latents"][name] for name in ("base_only", "ft_only"))


def test_a_large_share_of_outliers_is_warned_of(tmp_path):
    x = with_something_to_learn(600)
    x[1, ::20] *= 1000
    data = [f for flag, y in zip(("--base-dataset", "--ft-dataset"), x, strict=True) for f in (flag, write(tmp_path / flag, y))]
    flags = ["--d-hidden", 8, "--batch-size", 64, "--val-tokens", 60, "--wandb", "disabled", "--output-dir", tmp_path]
    printed = run_script("train.py", *data, *flags, "--run-name", "a", check=True).stdout
    assert "warning  that leaves out 5.0% of the rows: look at them, or raise --max-norm-ratio" in printed
    failed = run_script("train.py", *data, *flags, "--run-name", "b", "--max-norm-ratio", 1)
    assert "--max-norm-ratio 1: must be above 1" in one_line_error(failed, "train.py")


def test_rows_of_a_paired_dataset_keep_any_norm(tmp_path):
    for name in ("base", "ft"):
        write(tmp_path / name, numbered(200) * np.where(np.arange(200) == 5, 1e4, 1).astype("float32")[:, None])
    (tmp_path / "pair.json").write_text('{"stored_scale": [1.0, 1.0]}')
    source = open_pair(str(tmp_path), (None, None), 20, 0, seed=0)
    assert sum(len(batch.x) for batch in source.batches(64, 180, CPU)) == 180


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_row_norms(dtype):
    x = torch.randn(2, 300, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x[0, 7, 3], x[1, 8, 4], x[0, 9] = np.nan, np.inf, torch.finfo(dtype).max  # its norm is beyond float16
    norms = row_norms(x)
    assert norms[0, 7].isnan() and norms[1, 8].isinf() and (norms[0, 9].isinf() or dtype == torch.float16)
    torch.testing.assert_close(norms[:, 10:].double(), x[:, 10:].double().norm(dim=-1), rtol=1e-5, atol=0)
