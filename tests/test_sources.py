"""The contract of `sources.source.Source`, held by every kind: what train.py relies on without knowing which one it has."""

import itertools
import json
import time

import datasets
import numpy as np
import pytest
import torch

from config import TrainConfig
from run import flags
from sources.opening import open_source

CPU = torch.device("cpu")
KINDS = ("planted", "stored", "streamed", "live", "live beside", "difference", "live difference")
SIZE = 96  # rows of a batch


@pytest.fixture(scope="module")
def opening(tiny, tmp_path_factory):
    """kind -> a function that opens a new source of that kind on the same data."""
    folder = tmp_path_factory.mktemp("rows")
    rows = np.random.default_rng(0).standard_normal((2, 3000, 8)).astype(np.float16)
    for name, values in zip(("base", "ft"), rows, strict=True):
        dataset = datasets.Dataset.from_dict({"activation": list(values)})
        dataset = dataset.cast_column("activation", datasets.List(datasets.Value("float16"), length=8))
        dataset.save_to_disk(str(folder / name))
        (folder / f"{name}_files").mkdir()
        dataset.to_parquet(str(folder / f"{name}_files" / "rows.parquet"))
    given = {
        "planted": {"num_tokens": 4000, "val_tokens": 200},
        "stored": {"base_dataset": str(folder / "base"), "ft_dataset": str(folder / "ft"), "val_tokens": 200},
        "streamed": {
            "base_dataset": str(folder / "base_files"), "ft_dataset": str(folder / "ft_files"), "streaming": True,
            "num_tokens": 4000, "val_tokens": 200, "buffer_tokens": 1000,
        },
        "live": {
            "base_model": tiny["base"], "ft_model": tiny["ft"], "hook": "model.layers.1.mlp", "text": [tiny["code"]],
            "seq_len": 32, "model_batch_size": 4, "num_tokens": 4000, "val_tokens": 100, "buffer_tokens": 1000,
            "model_dtype": "float32",
        },
    }  # fmt: skip
    given |= {"difference": given["stored"] | {"difference": True}, "live difference": given["live"] | {"difference": True}}
    given["live beside"] = given["live"]

    def make(kind):
        config = TrainConfig(**given[kind])
        source = open_source(config, flags.resolve_sizes(config, None, None, "float32"), CPU)[0]
        if kind == "live beside":
            source.beside = True  # as where the models have devices of their own
        return source

    return make


def taken(source, position: int = 0, stop: int = 4000) -> list:
    """Copies of all batches: their tensors are overwritten by later ones."""
    stream = source.batches(SIZE, stop, CPU, position)
    try:
        return [batch._replace(x=batch.x.clone()) for batch in stream]
    finally:
        stream.close()


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_says_what_it_has(kind, opening):
    source = opening(kind)
    assert source.n_models == (1 if "difference" in kind else 2)
    assert source.val_rows > 0 and source.stored_scale.shape == (source.n_models,)
    assert json.loads(json.dumps(source.record)) == source.record
    assert "rows" in source.describe()
    rows = source.sample_rows(50)
    assert len(rows) <= 50 and (np.diff(rows) > 0).all()
    for split, some in (("train", rows), ("validation", np.arange(source.val_rows))):
        out = torch.full((source.n_models, len(some), source.d_model), torch.nan, dtype=source.dtype)
        source.gather(split, some, out)
        assert out.isfinite().all() and (source.n_models == 1 or not torch.equal(out[0], out[1]))
    assert source.score(torch.zeros(4, 2, source.d_model), torch.zeros(4, dtype=torch.bool)) is None or kind == "planted"
    assert all(isinstance(value, float) for value in source.metrics(1.0).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_gets_the_same_batches(kind, opening):
    source = opening(kind)
    source.sample_rows(50)
    stream, states, whole = source.batches(SIZE, 4000, CPU), [], []
    for batch in stream:
        whole.append(batch._replace(x=batch.x.clone()))
        states.append(json.dumps(source.state_dict(batch.position)))
    stream.close()
    source.close()
    assert [batch.position for batch in whole] == [min(4000, (i + 1) * SIZE) for i in range(len(whole))]
    assert len(whole[-1].x) == 4000 % SIZE  # the last one is shorter, over the border of the epoch too
    for done in (3, 20, 30, 35):  # 30: in the first window of the second epoch of 2,800 rows
        again = opening(kind)
        again.load_state_dict(json.loads(states[done - 1]))
        rest = taken(again, whole[done - 1].position)
        assert len(rest) == len(whole) - done
        for one, other in zip(rest, whole[done:], strict=True):
            assert torch.equal(one.x, other.x) and one[1:] == other[1:]


def test_models_with_devices_of_their_own_read_while_the_crosscoder_trains(opening):
    """The same rows, and up to a fill of them is there when it is needed."""
    whole, read = [], []
    for kind in ("live", "live beside"):
        source, draws = opening(kind), []
        source.models.rows = lambda *args, draws=draws, rows=source.models.rows: draws.append(args) or rows(*args)
        stream = source.batches(SIZE, 4000, CPU)
        whole.append([next(stream).x.clone()])
        until = time.monotonic() + 60
        while kind == "live beside" and not source.stream.queue.full() and time.monotonic() < until:
            time.sleep(0.01)
        read.append(len(draws))  # while one batch was asked for
        whole[-1] += [batch.x.clone() for batch in stream]
    assert read[0] == -(-source.fill_rows // 124) and read[1] >= 2 * read[0] - 1  # a draw of four sequences gives 124 rows
    assert all(torch.equal(one, other) for one, other in zip(*whole, strict=True))


@pytest.mark.parametrize("kind", ["stored", "streamed"])
def test_an_epoch_holds_every_training_row_once_and_no_held_out_one(kind, opening):
    source = opening(kind)
    held_out = torch.empty(2, source.val_rows, source.d_model, dtype=source.dtype)
    source.gather("validation", np.arange(source.val_rows), held_out)
    rows = torch.cat([batch.x for batch in taken(source, stop=2 * 2800)])  # [2 epochs of 2800, 2, d_model]
    epochs = [{tuple(row) for row in part.flatten(1).tolist()} for part in rows.split(2800)]
    assert len(epochs[0]) == 2800 and epochs[0] == epochs[1]
    assert not epochs[0] & {tuple(row) for row in held_out.transpose(0, 1).flatten(1).tolist()}
    assert not torch.equal(rows[:2800], rows[2800:])  # in another order


@pytest.mark.parametrize("kind", KINDS)
def test_closing_the_stream_early_leaves_nothing_running(kind, opening):
    import threading

    source, before = opening(kind), threading.active_count()
    stream = source.batches(SIZE, 4000, CPU)
    assert len(list(itertools.islice(stream, 2))) == 2
    stream.close()
    assert threading.active_count() <= before
