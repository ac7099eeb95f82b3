"""Activation caches of other projects as training data, made here by hand from their documented layouts."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, List, Value, load_from_disk
from helpers import BASE, FT, ROOT, collect, metrics, numbered, open_single, run_script
from transformers import AutoModelForCausalLM

from sources.batches import estimate_normalization, validation_batches


def write_cache(store, x, dtype="torch.float32", shards=(300, 512, 188), tokens=True, **config):
    """<store>/tokens.pt, <store>/layer_1_out/{config.json, shard_i.memmap, shard_i.meta}: one hook of crosscoder_learning."""
    folder = store / "layer_1_out"
    folder.mkdir(parents=True)
    start = 0
    for i, rows in enumerate(shards):
        part = torch.from_numpy(x[start : start + rows]).to(getattr(torch, dtype.removeprefix("torch.")))
        start += rows
        part = part.view(torch.int16) if dtype == "torch.bfloat16" else part
        (folder / f"shard_{i}.memmap").write_bytes(part.numpy().tobytes())
        meta = {"shape": list(part.shape)} | ({"dtype": dtype} if dtype != "torch.float32" else {})  # old caches name none
        (folder / f"shard_{i}.meta").write_text(json.dumps(meta))
    assert start == len(x)
    known = {
        "batch_size": 4,
        "context_len": 128,
        "shard_size": 256,
        "d_model": x.shape[1],
        "shuffle_shards": False,
        "io": "out",
    }
    known |= {"total_size": len(x), "shard_count": len(shards), "store_tokens": tokens, "store_sequence_ranges": False}
    (folder / "config.json").write_text(json.dumps(known | config))
    if tokens:
        torch.save(torch.arange(len(x)) % 50, store / "tokens.pt")
    return str(folder)


def open_both(base, ft):
    return open_single(str(base), str(ft), (None, None), 100, 0, 0)


def assert_all_rows_come_in_both_models(source):
    seen = torch.cat([rows for rows, _ in collect(source, 128, 900)])
    assert torch.equal(seen.sort().values, torch.arange(900))
    held_out = torch.cat(list(validation_batches(source, 64, torch.device("cpu"))))
    assert held_out[:, 0, 1].tolist() == [float(i) for i in range(900, 1000)]


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize(("dtype", "ft_dtype"), [("float32", "float32"), ("float16", "float16"), ("float32", "float16")])
def test_memmaps_of_crosscoder_learning(tmp_path, dtype, ft_dtype, tokens):
    base = write_cache(tmp_path / "base", numbered(1000, sign=BASE), f"torch.{dtype}", tokens=tokens)
    ft = write_cache(tmp_path / "ft", numbered(1000, sign=FT), f"torch.{ft_dtype}", shards=(1000,), tokens=tokens)
    source = open_both(base, ft)
    assert source.dtype == getattr(torch, dtype) and source.d_model == 4
    assert_all_rows_come_in_both_models(source)


def test_bfloat16_bits_are_exact_and_meet_float16_in_float32(tmp_path):
    x = np.random.default_rng(1).normal(size=(1000, 4)).astype("float32") * 1e6  # beyond float16
    base = write_cache(tmp_path / "base", x, "torch.bfloat16")
    source = open_both(base, write_cache(tmp_path / "ft", -x, "torch.bfloat16"))
    assert source.dtype == torch.bfloat16
    want = torch.from_numpy(x).bfloat16()
    out = torch.empty(2, 3, 4, dtype=torch.bfloat16)
    source.gather("train", np.array([0, 299, 811]), out)
    assert torch.equal(out, torch.stack([want[[0, 299, 811]], -want[[0, 299, 811]]]))
    mean, scale = estimate_normalization(source, center=True)
    torch.testing.assert_close(mean[0], want[:900].double().mean(0))
    mixed = open_both(base, write_cache(tmp_path / "half", numbered(1000), "torch.float16"))
    assert mixed.dtype == torch.float32
    out = torch.empty(2, 2, 4)
    mixed.gather("train", np.array([5, 700]), out)
    assert torch.equal(out[0], want[[5, 700]].float()) and torch.equal(out[1, :, 1], torch.tensor([5.0, 700.0]))


@pytest.mark.parametrize("form", ["Array2D", "lists of lists"])
def test_rows_that_are_sequences(tmp_path, form):
    """SAELens' cache: Array2D [positions, d_model] and token_ids; or plain lists of sequences of any length."""
    folders = []
    for name, sign in (("base", BASE), ("ft", FT)):
        x = numbered(1000, sign=sign)
        if form == "Array2D":
            kind, rows = Array2D((25, 4), "float32"), x.reshape(40, 25, 4)
            tokens = {"token_ids": np.arange(1000).reshape(40, 25)}
        else:
            kind, rows = List(List(Value("float32"))), [part.tolist() for part in np.split(x, [7, 100, 101, 640])]
            tokens = {"token_ids": [part.tolist() for part in np.split(np.arange(1000), [7, 100, 101, 640])]}
        features = Features({"blocks.1.hook_mlp_out": kind, "token_ids": List(Value("int32"))})
        data = Dataset.from_dict({"blocks.1.hook_mlp_out": rows} | tokens, features=features)
        data.save_to_disk(str(tmp_path / name))
        folders.append(tmp_path / name)
    source = open_both(*folders)
    assert_all_rows_come_in_both_models(source)
    shifted = Dataset.from_dict({"a": rows, "token_ids": [[t + (t == 500) for t in row] for row in tokens["token_ids"]]})
    shifted.save_to_disk(str(tmp_path / "shifted"))
    with pytest.raises(ValueError, match="token_ids of row 500 .* is 500 in the base model's and 501"):
        open_both(folders[0], tmp_path / "shifted")


def test_caches_that_cannot_be_read_are_refused(tmp_path):
    x = numbered(1000)
    good = write_cache(tmp_path / "good", x)

    def refusal(path):
        with pytest.raises(ValueError) as refused:
            open_both(good, path)
        assert str(refused.value).startswith("--ft-dataset") and "\n" not in str(refused.value)
        return str(refused.value)

    assert "shuffled in an order that is not stored" in refusal(write_cache(tmp_path / "mixed", x, shuffle_shards=True))
    assert "holds the activation caches layer_1_out; give the folder of one" in refusal(tmp_path / "good")
    torn = write_cache(tmp_path / "torn", x)
    (tmp_path / "torn" / "layer_1_out" / "shard_1.memmap").write_bytes(b"1234")
    assert "shard_1.memmap has 4 bytes, not 512 x 4 values" in refusal(torn)
    gone = write_cache(tmp_path / "gone", x)
    (tmp_path / "gone" / "tokens.pt").unlink()
    assert "tokens.pt is missing" in refusal(gone)
    few = write_cache(tmp_path / "few", x, shard_count=4)
    assert "shard_3.meta" in refusal(few)


def test_training_on_bfloat16_caches(tmp_path):
    x = np.random.default_rng(2).normal(size=(4000, 16)).astype("float32")
    base, ft = (write_cache(tmp_path / n, x * s, "torch.bfloat16", (4000,)) for n, s in (("base", 1), ("ft", 3)))
    flags = ["--d-hidden", 64, "--batch-size", 128, "--val-tokens", 400, "--wandb", "disabled", "--output-dir", tmp_path]
    run_script("train.py", "--base-dataset", base, "--ft-dataset", ft, *flags, "--run-name", "a", check=True)
    lines = metrics(tmp_path / "a")
    assert lines[-1]["val_explained_variance"] > 0.3 > lines[0]["explained_variance"]


def test_the_documented_dataset_of_ones_own_is_trained_on_and_analysed_with_its_text(capitals, tmp_path, monkeypatch):
    """The example of docs/data.md and the commands below it, on fewer sequences and without steering."""
    section = (ROOT / "docs" / "data.md").read_text().split("### A paired dataset of your own")[1].split("\n### ")[0]
    (tmp_path / "tiny").symlink_to(capitals["base"].parent)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert "100 * 127" in program
    exec(program.replace("100 * 127", "40 * 127"), {})
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    train, analyze = ([*shlex.split(line)[1:]] for line in commands.strip().splitlines())
    printed = run_script(*train, "--wandb", "disabled", cwd=tmp_path, check=True).stdout
    assert "next       python analyze.py runs/own --base-model tiny/base --ft-model tiny/caps" in printed
    run_script(*analyze, "--steer", "none", "--patch-tokens", 1000, "--sections-per-class", 3, cwd=tmp_path, check=True)
    found = [json.loads(line) for line in (tmp_path / "runs/own/analysis/examples.jsonl").read_text().splitlines()]
    assert {example["text"] for latent in found for example in latent["examples"]} <= {"code", "caps"} and found
    measured = json.loads((tmp_path / "runs/own/analysis/metrics.json").read_text())
    assert not measured["notes"]
    model, kept = AutoModelForCausalLM.from_pretrained("tiny/caps"), []
    hook = json.loads((tmp_path / "data/own/pair.json").read_text())["hook"]
    model.get_submodule(hook).register_forward_hook(lambda module, given, out: kept.append(out))
    model(torch.tensor(load_from_disk("data/own/tokens")[:1]["input_ids"]))
    rows = torch.tensor(load_from_disk("data/own/ft")[:127]["activation"])
    assert torch.equal(rows, kept[0][0, 1:].half().float())  # those of the hook that pair.json names
