"""analyze.py --export: the files of other tools, by their documented layout, against the codes of the stored rows."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from helpers import one_line_error, open_pair, read_pair, run_script, train
from safetensors.numpy import load_file

from analysis.data import Data, Text, open_text
from analysis.exports import cut, write_delphi
from crosscoder import CrossCoder

FEW = ["--num-tokens", 20_000, "--sections-per-class", 4, "--examples", 8, "--context", 8]
# Columns of neuronpedia's tables Neuron, Activation and Explanation (apps/webapp/prisma/schema.prisma) that are written.
FIELDS = {
    "features": {"modelId", "layer", "index", "creatorId", "sourceSetName", "maxActApprox", "frac_nonzero"},
    "activations": {
        "id", "modelId", "layer", "index", "creatorId", "tokens", "values", "maxValue", "maxValueTokenIndex", "minValue",
        "dataSource", "dataIndex",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory) -> Path:
    """A small crosscoder on the tiny models' activations."""
    sizes = ["--d-hidden", 64, "--batch-size", 512, "--num-tokens", 60_000, "--variant", "batch_topk", "--k", 4]
    return train(tmp_path_factory.mktemp("runs"), "a", "--dataset", pair, *sizes, "--wandb", "disabled")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    (out / "export" / "delphi" / "old").mkdir(parents=True)
    printed = run_script(
        "analyze.py", run, *FEW, "--export", "delphi", "--export", "neuronpedia", "--output", out, check=True
    ).stdout  # fmt: skip
    assert printed.count("exported   ") == 2 and not (out / "export" / "delphi" / "old").exists()
    assert sorted(path.name for path in (out / "export").iterdir()) == ["delphi", "neuronpedia"]
    return out


def codes_of(pair: Path, run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and position [rows, 2] and codes [rows, 64] of all stored rows."""
    crosscoder, scale = CrossCoder.from_pretrained(run / "crosscoder"), np.array(read_pair(pair)["stored_scale"])
    place, codes = [], []
    for split in ("validation", "train"):
        parts = [load_from_disk(str(pair / model))[split].with_format("numpy")[:] for model in ("base", "ft")]
        x = np.stack([np.stack(part["activation"]).astype(np.float32) for part in parts], 1) / scale[:, None]
        with torch.no_grad():
            codes.append(crosscoder.encode(torch.from_numpy(x.astype(np.float32))).numpy())
        place.append(np.stack([parts[0]["sequence"], parts[0]["position"]], 1))
    return np.concatenate(place), np.concatenate(codes)


def test_delphi_gets_the_codes_of_whole_sequences(exported, pair, run):
    module = exported / "export" / "delphi" / "latents" / "model.layers.1.mlp"
    names = sorted((path.stem for path in module.glob("*.safetensors")), key=lambda name: int(name.split("_")[0]))
    assert names == ["0_11", "12_24", "25_37", "38_50", "51_63"]
    config = json.loads((module / "config.json").read_text())
    assert config["cache_ctx_len"] % 32 == 0 and Path(config["model_name"]).is_dir()
    files = [load_file(module / f"{name}.safetensors") for name in names]
    tokens = files[0]["tokens"]
    assert tokens.shape == (config["n_tokens"] // config["cache_ctx_len"], config["cache_ctx_len"])
    assert tokens.size + 256 >= 20_000 and all((file["tokens"] == tokens).all() for file in files)

    place, codes = codes_of(pair, run)
    stored = [np.array(ids) for ids in load_from_disk(str(pair / "tokens"))["input_ids"]]
    row = {(int(s), int(p)): i for i, (s, p) in enumerate(place)}
    held_out = set(load_from_disk(str(pair / "base"))["validation"]["sequence"])
    expected, where = np.zeros((*tokens.shape, 64), np.float32), {}
    for sequence, ids in enumerate(stored):
        where.setdefault(ids[: tokens.shape[1]].tobytes() if len(ids) >= tokens.shape[1] else b"", []).append(sequence)
    sources = []
    for context, ids in enumerate(tokens):
        (sequence,) = where[ids.astype(stored[0].dtype).tobytes()]  # no two begin alike, and each is one context here
        sources.append(sequence)
        for position in range(tokens.shape[1]):
            if (sequence, position) in row:
                expected[context, position] = codes[row[sequence, position]]
    assert set(sources[:3]) <= held_out
    found = np.zeros_like(expected)
    for name, file in zip(names, files, strict=True):
        context, position, latent = file["locations"].astype(int).T
        assert file["locations"].dtype == np.uint16 and file["activations"].dtype == np.float16
        assert (np.diff(context * tokens.shape[1] + position) >= 0).all()  # delphi joins what is consecutive
        start, end = map(int, name.split("_"))
        assert latent.max() <= end - start
        found[context, position, latent + start] = file["activations"]
    assert (found > 0).sum() > 10_000 and np.allclose(found, expected, rtol=1e-3, atol=2e-4)


def test_delphi_gets_the_codes_of_pieces_of_sequences(pair, run, tmp_path):
    source = open_pair(str(pair), (None, None), None, 10**9, 0)
    text = open_text(str(pair), source)
    ids = [np.array(text.sequences[i]["input_ids"][: 250 - 50 * (i % 3 == 0)]) for i in range(len(text.sequences))]
    text = text._replace(sequences=[{"input_ids": one} for one in ids])
    data = Data(source, str(pair), text, 2000, 2000)
    write_delphi(tmp_path, CrossCoder.from_pretrained(run / "crosscoder"), data, 4000)
    contexts, first, count, length = cut(text, 4000)
    assert length == 32 and set(count) == {0, 6, 7}
    expected = np.zeros((*contexts.shape, 64), np.float32)
    for (sequence, position), codes in zip(*codes_of(pair, run), strict=True):
        if position // 32 < count[sequence]:
            expected[first[sequence] + position // 32, position % 32] = codes
    found = np.zeros_like(expected)
    for path in (tmp_path / "latents" / "model.layers.1.mlp").glob("*.safetensors"):
        file, start = load_file(path), int(path.stem.split("_")[0])
        context, position, latent = file["locations"].astype(int).T
        found[context, position, latent + start] = file["activations"]
        assert (file["tokens"] == contexts).all()
    assert np.allclose(found, expected, rtol=1e-3, atol=2e-4) and (found > 0).any()


def test_neuronpedia_gets_the_latents_with_their_examples(exported):
    (place,) = (exported / "export" / "neuronpedia").glob("*/*")
    assert place.parent.name == "ft" and place.name == "1-crosscoder-a"
    rows = {path.stem: json.loads(path.read_text()) for path in place.glob("*.jsonl")}
    assert rows["source"]["id"] == place.name and rows["source"]["setName"] == rows["sourceset"]["name"] == "crosscoder-a"
    assert rows["model"]["id"] == rows["sourceset"]["modelId"] == "ft"
    assert rows["release"]["name"] == rows["sourceset"]["releaseName"] == "crosscoder-a"
    lines = {kind: read_batch(place / kind / "batch-0.jsonl.gz") for kind in FIELDS}
    assert all(set(line) == FIELDS[kind] for kind, of in lines.items() for line in of)
    sections = [json.loads(line) for line in (exported / "examples.jsonl").read_text().splitlines()]
    table = pq.read_table(exported / "latents.parquet").to_pydict()
    assert [int(line["index"]) for line in lines["features"]] == sorted(section["latent"] for section in sections)
    for line in lines["features"]:
        j = int(line["index"])
        assert line["maxActApprox"] == max(table["max_act_train"][j], table["max_act_val"][j])
        assert line["frac_nonzero"] == table["frequency"][j] and isinstance(line["index"], str)
    examples = {section["latent"]: section["examples"] for section in sections}
    for j, mine in examples.items():
        written = [line for line in lines["activations"] if line["index"] == str(j)]
        assert [line["tokens"] for line in written] == [e["tokens"] for e in mine]
        for line, e in zip(written, mine, strict=True):
            assert line["values"] == [value or 0 for value in e["values"]] and line["minValue"] == min(line["values"])
            assert (line["dataSource"], line["dataIndex"]) == (e["text"], str(e["sequence"]))
            assert line["values"][line["maxValueTokenIndex"]] == line["maxValue"] == max(line["values"]) > 0
    assert len({line["id"] for line in lines["activations"]}) == len(lines["activations"])


def read_batch(path: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_sequences_of_different_length_are_cut_into_windows():
    ids = [np.arange(70), np.arange(100, 110), np.arange(200, 300), np.arange(300, 340)]
    sequence = np.array([2, 2, 1, 0, 3, 0])
    text = Text([{"input_ids": one} for one in ids], np.zeros(4), ["text"], sequence, np.zeros(6), held_out=2)
    contexts, first, count, length = cut(text, 190)
    assert length == 32 and contexts.shape == (6, 32)  # 2, 1 and 0 make 180 tokens, so 3 comes too
    contexts, first, count, length = cut(text, 175)
    assert count.tolist() == [2, 0, 3, 0] and first[[2, 0]].tolist() == [0, 3]
    assert (contexts[3] == ids[0][:32]).all() and (contexts[2] == ids[2][64:96]).all()


def test_what_cannot_be_exported_is_one_line(tmp_path, run):
    wrong = run_script("analyze.py", run, "--export", "excel")
    assert wrong.returncode == 2 and "invalid choice 'excel' for argument '--export'" in wrong.stderr
    planted = train(tmp_path, "planted", "--d-hidden", 64, "--num-tokens", 2000, "--wandb", "disabled", "--val-tokens", 256)
    result = run_script("analyze.py", planted, "--export", "delphi")
    line = one_line_error(result, "analyze.py")
    assert "--export delphi: writes codes beside their tokens, and planted concepts has no texts" in line
    assert "measuring" not in result.stdout
