"""Stored activations that are refused, with what is wrong, where, and what to do."""

import json

import numpy as np
import pytest
from datasets import Array3D, Dataset, DatasetDict, Features, List, Value
from helpers import numbered, one_line_error, open_pair, open_single, run_script, write

from sources.batches import estimate_normalization


def refusal(tmp_path, base, ft=None, columns=(None, None), val=10):
    with pytest.raises(ValueError) as error:
        open_single(str(base), str(ft or base), columns, val, 0, seed=0)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_bad_input_is_refused_with_what_where_and_how(tmp_path):
    good = write(tmp_path / "good", numbered(100), token=np.arange(100), sequence=np.zeros(100))
    message = refusal(tmp_path, good, write(tmp_path / "short", numbered(90)))
    assert "--base-dataset has 100 rows and --ft-dataset has 90" in message
    message = refusal(tmp_path, good, write(tmp_path / "wide", numbered(100, d_model=6)))
    assert "width 4" in message and "width 6" in message
    tokens = np.arange(100)
    tokens[37] = 5
    message = refusal(tmp_path, good, write(tmp_path / "other", numbered(100), token=tokens, sequence=np.zeros(100)))
    assert "token of row 37 (split train) is 37" in message and "5 in the fine-tuned" in message
    assert "no such file or folder" in refusal(tmp_path, tmp_path / "nowhere")
    assert "no such file or folder" in refusal(tmp_path, "./nowhere")
    assert "data/a/b: no such file or folder" in refusal(tmp_path, "data/a/b")  # no Hub id has two of them
    assert f"no such file or folder (is it {tmp_path / 'good'}?)" in refusal(tmp_path, tmp_path / "goood")
    assert "cannot hold" in refusal(tmp_path, good, val=100) or "cannot give" in refusal(tmp_path, good, val=100)
    assert "has no such column, it has activation, token, sequence" in refusal(tmp_path, good, columns=("acts", None))
    assert "--ft-column token: rows are int32" in refusal(tmp_path, good, columns=(None, "token"))


def saved(tmp_path, name, x=None, **columns):
    x = numbered(100) if x is None else x
    Dataset.from_dict({"acts": x if isinstance(x, list) else x.tolist()} | columns).save_to_disk(str(tmp_path / name))
    return tmp_path / name


def cut(x, *at):
    return [part.tolist() for part in np.split(x, at)]


def test_token_columns_of_other_names_are_compared(tmp_path):
    tokens = np.arange(100)
    base = saved(tmp_path, "base", token=tokens)
    assert "token of row 7 (split train) is 7 in the base model's and 8 in the" in refusal(
        tmp_path, base, saved(tmp_path, "ids", token_ids=tokens + (tokens >= 7))
    )
    nested = saved(tmp_path, "nested", cut(numbered(100), 40), input_ids=cut(tokens + (tokens == 60), 40))
    assert "token of row 60 (split train) is 60 in the base model's and 61 in the" in refusal(tmp_path, base, nested)
    context = saved(tmp_path, "context", input_ids=[[1, 2, 3]] * 100)  # of each row, not its token
    assert open_single(str(base), str(context), (None, None), 10, 0, 0).train_rows == 90


def test_sequences_of_other_lengths_are_refused(tmp_path):
    x, tokens = numbered(100), np.arange(100)
    base = saved(tmp_path, "base", cut(x, 7, 40))
    message = "aligned (split train): the sequence that begins at token 7 has 33 activations and 34 in the other dataset"
    assert message in refusal(tmp_path, base, saved(tmp_path, "late", cut(x, 7, 41)))
    assert "has no activations and 60 in the" in refusal(tmp_path, saved(tmp_path, "a", cut(x[:40], 7)), base)
    short = saved(tmp_path, "short", cut(x, 7, 40), token_ids=cut(tokens[:90], 7, 40))
    message = refusal(tmp_path, short)
    assert "--base-dataset: the sequence that begins at token 40 has 60 activations and 50 in token_ids beside it" in message


@pytest.mark.parametrize(
    ("tokens", "want"),
    [
        ([{"id": i} for i in range(100)], "--ft-dataset has token of type struct<id: int64>, which cannot be compared"),
        ([f"t{i}" for i in range(100)], "--ft-dataset has token of type string, which cannot be compared"),
        ([None if i == 33 else i for i in range(100)], "--ft-dataset: column 'token' is empty in row 33; fill it in or drop"),
        ([[i] for i in range(99)] + [[]], "token of row 99 (split train) is 99 in the base model's and missing in the"),
    ],
    ids=["struct", "string", "null", "short"],
)
def test_token_columns_that_cannot_be_compared_are_refused(tmp_path, tokens, want):
    ft = saved(tmp_path, "ft", token=tokens)
    flags = ["--base-dataset", saved(tmp_path, "base", token=range(100)), "--ft-dataset", ft, "--output-dir", tmp_path]
    assert want in one_line_error(run_script("train.py", *flags, "--run-name", "a", "--val-tokens", 10), "train.py")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("val_tokens", [1, 99, 100])
def test_rows_that_do_not_suffice_are_refused_by_their_flag(tmp_path, val_tokens):
    want = f"--val-tokens: 100 rows cannot give {val_tokens} held-out rows and rows to train on, at least two of each"
    assert want in refusal(tmp_path, saved(tmp_path, "a"), val=val_tokens)


def test_an_empty_split_is_named(tmp_path):
    data = Dataset.from_dict({"acts": numbered(100).tolist()})
    DatasetDict({"train": data, "validation": data.select([])}).save_to_disk(str(tmp_path / "a"))
    assert "a split of it is empty; leave that one out when you save it" in refusal(tmp_path, tmp_path / "a")


def test_bad_datasets_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).save_to_disk(str(tmp_path / "text"))
    assert "no column holds lists of floats" in refusal(tmp_path, tmp_path / "text")
    Dataset.from_dict({"a": [[1.0, 2.0]], "b": [[1.0, 2.0]]}).save_to_disk(str(tmp_path / "two"))
    shape = Features({"a": Array3D((2, 2, 2), "float32")})
    Dataset.from_dict({"a": [np.ones((2, 2, 2))]}, features=shape).save_to_disk(str(tmp_path / "array"))
    assert "no column holds lists of floats" in refusal(tmp_path, tmp_path / "array")
    Dataset.from_dict({"a": [[], []]}, features=Features({"a": List(Value("float32"))})).save_to_disk(str(tmp_path / "zero"))
    assert "holds empty lists" in refusal(tmp_path, tmp_path / "zero")
    assert "several columns hold float lists (a, b); choose one with --base-column" in refusal(tmp_path, tmp_path / "two")
    Dataset.from_dict({"a": [[1.0, 2.0], [1.0, 2.0], [1.0]]}).save_to_disk(str(tmp_path / "ragged"))
    assert "row 2 has 1 values, the first row 2" in refusal(tmp_path, tmp_path / "ragged")
    Dataset.from_dict({"a": [[1.0, 2.0], None]}).save_to_disk(str(tmp_path / "null"))
    assert "empty entries between rows 0 and 2" in refusal(tmp_path, tmp_path / "null")
    empty = Features({"a": List(Value("float32"), length=2)})
    Dataset.from_dict({"a": []}, features=empty).save_to_disk(str(tmp_path / "empty"))
    assert "the dataset is empty" in refusal(tmp_path, tmp_path / "empty")
    (tmp_path / "x.bin").write_bytes(b"123")
    assert "a file of kind .bin is not read" in refusal(tmp_path, tmp_path / "x.bin")
    (tmp_path / "x.parquet").write_bytes(b"123")
    assert "cannot be opened" in refusal(tmp_path, tmp_path / "x.parquet")
    assert "taken for a Hub id, which needs network" in refusal(tmp_path, "nobody/nothing")


def test_broken_pairs_are_refused(tmp_path):
    def message(folder):
        with pytest.raises(ValueError) as error:
            open_pair(str(folder), (None, None), 10, 0, seed=0)
        return str(error.value)

    assert "no such file or folder" in message(tmp_path / "nowhere")
    (tmp_path / "p").mkdir()
    assert "has no folder base/" in message(tmp_path / "p")
    for model in ("base", "ft"):
        write(tmp_path / "p" / model, numbered(100))
    assert "pair.json is missing or broken" in message(tmp_path / "p")
    (tmp_path / "p" / "progress.json").write_text("{}")
    assert "the collection is unfinished" in message(tmp_path / "p")
    (tmp_path / "p" / "pair.json").write_text("{")
    assert "pair.json is missing or broken" in message(tmp_path / "p")


def test_half_of_a_pair_is_not_a_single_dataset(tmp_path):
    for model in ("base", "ft"):
        write(tmp_path / "p" / model, numbered(100))
    (tmp_path / "p" / "pair.json").write_text(json.dumps({"stored_scale": [1.0, 2.0]}))
    assert "belongs to the paired dataset" in refusal(tmp_path, tmp_path / "p")
    assert "use --dataset" in refusal(tmp_path, tmp_path / "p" / "base", tmp_path / "p" / "ft")


@pytest.mark.parametrize("scale", ["[null, 1]", "[0, 1]", "[1]", "3"])
def test_impossible_scales_of_a_pair_are_refused(tmp_path, scale):
    for model in ("base", "ft"):
        write(tmp_path / model, numbered(100))
    (tmp_path / "pair.json").write_text(f'{{"stored_scale": {scale}}}')
    with pytest.raises(ValueError, match="pair.json is missing or broken"):
        open_pair(str(tmp_path), (None, None), 10, 0, seed=0)


def test_identical_rows_are_refused(tmp_path):
    path = write(tmp_path / "a", np.ones((100, 4), "float32"))
    with pytest.raises(ValueError, match="the same in every row"):
        estimate_normalization(open_single(path, path, (None, None), 10, 0, seed=0), center=True)
