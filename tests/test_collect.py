"""collect.py through its real command line, on real tiny models, against plain Hugging Face forward hooks and numpy."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from helpers import CHATML, collect_command, failure, read_pair, read_rows
from processes import Started, finished
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from collecting import language_model
from collecting.paired_rows import PairedModels
from collecting.rows import Sequence
from run.held_out import is_candidate


def collect(tiny, out, *flags, **options) -> str:
    """Run to the end; returns what was printed."""
    done = finished(*collect_command(tiny, out, *flags, **options))
    assert done.returncode == 0, done.stderr
    return done.stdout


RECIPE = dict(num_tokens=50_000)
SHARDS = 16  # of training rows: a twentieth of the collection each, and what its last forward batch has more


@pytest.fixture(scope="session")
def packed(tiny, tmp_path_factory) -> Path:
    """50,000 rows of two text files, 3 to 1, in several shards."""
    out = tmp_path_factory.mktemp("packed") / "pair"
    collect(tiny, out, **RECIPE)
    return out


@pytest.fixture(scope="session")
def padded(tiny, tmp_path_factory) -> Path:
    """Documents and chats, one a sequence, a hook at an input, float32, and texts that end before the budget."""
    folder = tmp_path_factory.mktemp("padded")
    docs = [p for p in Path(tiny["prose"]).read_text().split("\n\n") if len(p) > 40][:300]
    (folder / "docs.jsonl").write_text("\n".join(json.dumps({"id": i, "text": p}) for i, p in enumerate(docs)))
    chats = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": docs[i]}] for i in range(50)]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in chats))
    out = folder / "pair"
    printed = collect(
        tiny, out, "--text", folder / "docs.jsonl", "--text", folder / "chats.jsonl", "--chat-template", "--no-pack",
        hook="model.layers.2.input", dtype="float32", num_tokens=90_000, skip_first=3,
    )  # fmt: skip
    assert "chats.jsonl: ran out after" in printed
    assert "of 90,000 rows (--num-tokens); give more with another --text" in printed
    return out


@pytest.fixture(scope="session")
def filtered(tiny, tmp_path_factory) -> Path:
    """A limit so low that many rows are outliers, and another hook in the fine-tuned model."""
    out = tmp_path_factory.mktemp("filtered") / "pair"
    collect(tiny, out, num_tokens=12_000, max_norm_ratio=1.2, ft_hook="model.layers.2.mlp")
    return out


@torch.no_grad()
def plain_activations(model_path: str, hook: str, sequences: list[list[int]]) -> list[np.ndarray]:
    """Activations [len, d_model] of each sequence, run alone and without padding, by a hook of torch."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    seen = []
    if hook.endswith(".input"):
        model.get_submodule(hook.removesuffix(".input")).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        model.get_submodule(hook).register_forward_hook(lambda m, args, output: seen.append(output))
    for tokens in sequences:
        model(input_ids=torch.tensor([tokens]))
    return [x[0].numpy() for x in seen]


@cache
def plain_rows(out: Path, model: str) -> list[np.ndarray]:
    """`plain_activations` of all sequences of a collection."""
    pair, hook = read_pair(out), "hook" if model == "base" else "ft_hook"
    return plain_activations(
        pair[f"{model}_model"], pair[hook], [row["input_ids"] for row in load_from_disk(str(out / "tokens"))]
    )


@pytest.mark.parametrize("which", ["packed", "padded", "filtered"])
def test_rows_are_the_models_activations(which, request):
    out = request.getfixturevalue(which)
    pair = read_pair(out)
    sequences = [row["input_ids"] for row in load_from_disk(str(out / "tokens"))]
    assert len(sequences) == pair["sequences"]
    rows = {model: read_rows(out, model) for model in ("base", "ft")}
    for column in ("sequence", "position", "token"):
        assert np.array_equal(rows["base"][column], rows["ft"][column])
    places = list(zip(rows["base"]["sequence"].tolist(), rows["base"]["position"].tolist(), strict=True))
    assert len(set(places)) == len(places) == sum(pair["rows"].values())
    assert rows["base"]["token"].tolist() == [sequences[s][p] for s, p in places]
    assert min(p for _, p in places) == pair["skip_first"]
    for model, scale in zip(("base", "ft"), pair["stored_scale"], strict=True):
        raw = plain_rows(out, model)
        want = np.stack([raw[s][p] for s, p in places]) * scale
        got = rows[model]["activation"].astype(np.float32)
        assert load_from_disk(str(out / model))["train"].features["activation"].feature.dtype == pair["dtype"]
        assert np.allclose(
            got, want, **({"rtol": 1e-3, "atol": 1e-3} if pair["dtype"] == "float16" else {"rtol": 1e-4, "atol": 1e-4})
        )
    # not in reading order: shuffled, the same way for both
    assert places != sorted(places)


@pytest.mark.parametrize("which", ["packed", "padded", "filtered"])
def test_statistics_and_counts_equal_numpy(which, request):
    out = request.getfixturevalue(which)
    pair = read_pair(out)
    sequences = [row["input_ids"] for row in load_from_disk(str(out / "tokens"))]
    norms = np.stack([
        np.concatenate([np.linalg.norm(x[pair["skip_first"] :].astype(np.float64), axis=1) for x in plain_rows(out, model)])
        for model in ("base", "ft")
    ], axis=1)  # fmt: skip
    first = norms[: min(32_768, pair["recipe"]["num_tokens"])]
    median = np.median(first, axis=0)
    survivors = (first <= pair["max_norm_ratio"] * median).all(1)
    scale = np.sqrt(pair["d_model"]) / first[survivors].mean(0)
    assert np.allclose(pair["median_norm"], median, rtol=1e-3)
    assert np.allclose(pair["stored_scale"], scale, rtol=1e-3)
    n_outliers = (norms > pair["max_norm_ratio"] * median).any(1).sum()
    assert abs(pair["left_out"]["norm"] - n_outliers) <= 2  # a norm may lie on the limit to the last bit
    assert pair["left_out"]["norm"] > 500 if which == "filtered" else pair["left_out"]["norm"] == 0
    lengths = [len(tokens) for tokens in sequences]
    left_out = dict(pair["left_out"])
    padding = left_out.pop("padding")
    assert sum(pair["rows"].values()) + sum(left_out.values()) == sum(lengths)
    assert left_out["first_positions"] == pair["skip_first"] * len(lengths)
    held_out = sorted(set(read_rows(out, "base", ("validation",))["sequence"].tolist()))
    rest = [lengths[i] for i in range(len(lengths)) if i not in held_out]
    assert held_out == [i for i in range(len(lengths)) if is_candidate(i, 0)][: len(held_out)]
    together = 64 if which == "padded" else 8  # unpacked sequences are sorted by length, 64 at a time
    rest = [n for i in range(0, len(rest), together) for n in sorted(rest[i : i + together], reverse=True)]
    batches = [rest[i : i + 8] for i in range(0, len(rest), 8)]
    batches += [[lengths[j] for j in held_out[i : i + 8]] for i in range(0, len(held_out), 8)]
    assert padding == sum(max(batch) - length for batch in batches for length in batch)
    assert (padding > 0) == (which == "padded")
    for model in ("base", "ft"):
        rows = read_rows(out, model)
        order = np.lexsort((rows["position"], rows["sequence"]))[: survivors.sum()]
        mean_norm = np.linalg.norm(rows["activation"][order].astype(np.float64), axis=1).mean()
        assert mean_norm == pytest.approx(np.sqrt(pair["d_model"]), rel=2e-3)


def test_budget_and_held_out_sequences(packed):
    pair = read_pair(packed)
    assert sum(pair["rows"].values()) == RECIPE["num_tokens"]
    train, held_out = (set(read_rows(packed, "base", (split,))["sequence"].tolist()) for split in ("train", "validation"))
    assert not train & held_out
    assert abs(pair["rows"]["validation"] - RECIPE["num_tokens"] // 20) <= 127 // 2  # as close as whole sequences allow
    assert sorted(held_out) == [i for i in range(max(held_out) + 1) if is_candidate(i, 0)]
    assert len({i // 4 for i in held_out}) == len(held_out) and len({i % 4 for i in held_out}) == 4  # one of every four
    shards = sorted(packed.glob("base/train/data-*.arrow"))
    assert len(shards) == SHARDS
    assert not list(packed.rglob("*.partial"))
    assert not (packed / "progress.json").exists()


def test_chats_are_formatted_beside_plain_text(padded, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny["ft"])
    rows = list(load_from_disk(str(padded / "tokens")))
    chats = [tokenizer.decode(row["input_ids"]) for row in rows if row["source"] == 1]
    assert len(chats) == 50
    assert all(chat.startswith(f"<bos>user: What is {i}?<eos>\nassistant: ") for i, chat in enumerate(chats))
    plain = [tokenizer.decode(row["input_ids"]) for row in rows if row["source"] == 0]
    assert len(plain) == 300 and not any("user:" in p for p in plain)
    assert len({len(row["input_ids"]) for row in rows}) > 20  # each document its own length


def test_weights_share_the_tokens(packed, tiny):
    code, prose = read_pair(packed)["text"]
    assert (code["source"], prose["source"]) == (tiny["code"], tiny["prose"])
    assert code["tokens"] / (code["tokens"] + prose["tokens"]) == pytest.approx(0.75, abs=0.01)
    tokens = load_from_disk(str(packed / "tokens")).with_format("numpy")[:]
    lengths = np.array([len(ids) for ids in tokens["input_ids"]])
    assert lengths[tokens["source"] == 0].sum() == code["tokens"]


def test_same_command_on_a_complete_folder_says_so(tiny, packed):
    before = {file: file.read_bytes() for file in packed.rglob("*") if file.is_file()}
    assert "is complete" in collect(tiny, packed, **RECIPE)
    assert before == {file: file.read_bytes() for file in packed.rglob("*") if file.is_file()}


def start_and_wait_for_a_shard(tiny, out) -> Started:
    process = Started(*collect_command(tiny, out, **RECIPE))
    while not (out / "progress.json").exists() or not json.loads((out / "progress.json").read_text())["shards"]["train"]:
        assert process.poll() is None, process.output()
        time.sleep(0.002)
    return process


def test_killed_and_stopped_then_restarted_gives_the_same_files(tiny, packed, tmp_path):
    out = tmp_path / "pair"
    for kill, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start_and_wait_for_a_shard(tiny, out)
        if kill != signal.SIGKILL:  # past the imports, which a restart has to do again
            done = json.loads((out / "progress.json").read_text())["shards"]["train"]
            while json.loads((out / "progress.json").read_text())["shards"]["train"] == done:
                assert process.poll() is None, process.output()
                time.sleep(0.002)
        process.send_signal(kill)
        errors = process.communicate()[1]
        assert process.returncode == code, errors
        if kill != signal.SIGKILL:
            assert "Traceback" not in errors
            kept = sum(json.loads((out / "progress.json").read_text())["rows"].values())
            assert errors.splitlines()[-1].startswith(
                f"collect.py: stopped; {kept:,} of 50,000 rows are kept in complete shards"
            )
        shards = json.loads((out / "progress.json").read_text())["shards"]["train"]
        assert 1 <= shards < SHARDS
    (out / "base/train/data-00015.partial").write_bytes(b"half a shard")
    (out / "ft/train/data-00015.arrow").write_bytes(b"a shard that was never counted")
    # a restart by another recipe is refused, and leaves everything as it is
    line = failure(collect_command(tiny, out, **RECIPE | {"seq_len": 64}))
    assert "seq-len 128 and not 64" in line
    # a disk that takes no whole shard, as a full one does; what was complete stays, nothing else
    process = Started(*collect_command(tiny, out, **RECIPE))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    errors, progress = process.communicate()[1], json.loads((out / "progress.json").read_text())
    assert process.returncode == 1 and "Traceback" not in errors and progress["shards"]["train"] == shards
    kept = f"{sum(progress['rows'].values()):,} rows stay in complete shards: make room"
    assert f"--output {out}: cannot be written (File too large); {kept}" in errors.splitlines()[-1]
    assert not list(out.rglob("*.partial"))
    # killed while it makes the folders readable
    process = Started(*collect_command(tiny, out, **RECIPE))
    while not (out / "base" / "train" / "state.json").exists():
        assert process.poll() is None, process.output()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    collect(tiny, out, **RECIPE)
    files = sorted(file.relative_to(packed) for file in packed.rglob("*.arrow"))
    assert files == sorted(file.relative_to(out) for file in out.rglob("*.arrow"))
    for file in files:
        assert (out / file).read_bytes() == (packed / file).read_bytes(), file
    assert read_pair(out) == read_pair(packed)


def test_stopped_before_the_first_shard_says_that_nothing_is_kept(tiny, tmp_path):
    """And without a terminal too, the first look at the norms shows that it goes on."""
    process = Started(*collect_command(tiny, tmp_path / "pair", **RECIPE))
    while "norms of the first rows" not in process.output()[1]:
        assert process.poll() is None, process.output()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("collect.py: stopped; no shard was complete yet, so nothing is kept")


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("val_rows", [0, 2_000, 20_000])
def test_calibration_runs_no_sequence_a_second_time(tiny, monkeypatch, pack, val_rows):
    """Few held-out rows end among the rows of the calibration, many behind them."""
    models = PairedModels(
        base_model=tiny["base"], ft_model=tiny["ft"], hook=["model.layers.0.mlp"], ft_hook=None, text=[tiny["prose"]],
        text_column=[], chat_template=False, seq_len=128, pack=pack, model_dtype="float32", skip_first=1, max_norm_ratio=10.0,
        batch_size=8, dtype="float16", devices=["cpu", "cpu"], seed=0,
    )  # fmt: skip
    sequences, run = [Sequence(i, 0, np.arange(100 - i % 7)) for i in range(1000)], []
    forward = language_model.paired_activations

    def counted(models, hooks, widths, indices, *args, **settings):
        run.extend(indices)
        return forward(models, hooks, widths, indices, *args, **settings)

    def all_rows(models) -> list:
        (hook,), rows = models.hooks, []
        for draw in models.held_out_draws(val_rows):
            models.held_out_until = draw.batches[-1][-1].index + 1
            rows += models.rows(draw, [hook])
        return rows + [of for draw in models.training_draws(models.stream) for of in models.rows(draw, [hook])]

    monkeypatch.setattr(language_model, "paired_activations", counted)
    models.stream = iter(sequences)
    models.calibrate(32_768, val_rows, [{}])
    calibrated = len(run)
    assert 32_768 / 99 < calibrated < 32_768 / 93 + 8 + 64
    rows = all_rows(models)
    assert sum(r.columns.shape[1] for r in rows) == sum(len(s.tokens) - 1 for s in sequences)
    assert sorted(run) == list(range(len(sequences))) and not models.kept
    monkeypatch.undo()
    # and the rows are those of a restart, which does not calibrate
    again = PairedModels.__new__(PairedModels)
    again.__dict__ |= models.__dict__ | {"stream": iter(sequences), "held_out_until": 0}
    for a, b in zip(rows, all_rows(again), strict=True):
        assert all(map(torch.equal, a.acts, b.acts)) and np.array_equal(a.columns, b.columns)


def test_unpacked_texts_are_sorted_by_length_and_a_kill_changes_nothing(tiny, tmp_path):
    """Eight forward batches at a time, so that a batch pads little; a restart sorts the same sequences together."""
    lengths = np.random.default_rng(0).integers(1, 120, 2000)
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": "a " * n + f"{i}."}) for i, n in enumerate(lengths)))
    flags = ["--text", tmp_path / "docs.jsonl", "--no-pack", "--shard-rows", 8192, "--num-tokens", 80_000, "--val-tokens", 0]
    process = Started(*collect_command(tiny, tmp_path / "killed", *flags))
    while not (tmp_path / "killed" / "base" / "train" / "data-00001.arrow").exists():
        assert process.poll() is None, process.output()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for out in (tmp_path / "straight", tmp_path / "killed"):
        collect(tiny, out, *flags)
    straight, killed = (sorted((tmp_path / name).rglob("*.arrow")) for name in ("straight", "killed"))
    assert len(straight) >= 24 and [f.read_bytes() for f in straight] == [f.read_bytes() for f in killed]
    pair = read_pair(tmp_path / "straight")
    tokens = load_from_disk(str(tmp_path / "straight" / "tokens"))["input_ids"]
    assert pair["left_out"]["padding"] < 0.1 * sum(map(len, tokens))  # in the order of the texts about .7 of it


def swapped_tokens(model: str, folder: Path, a: str, b: str) -> Path:
    """A copy of a model whose tokenizer gives two tokens each other's ids."""
    shutil.copytree(model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_bad_input_gives_one_line(tiny, packed, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": ')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("keep me")
    swapped = swapped_tokens(tiny["ft"], tmp_path / "swapped", "a", "b")
    wide = shutil.copytree(tiny["ft"], tmp_path / "wide")
    config = AutoConfig.from_pretrained(tiny["ft"])
    config.hidden_size = config.intermediate_size = 96
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    few = shutil.copytree(tiny["ft"], tmp_path / "few")  # its embedding ends before its tokenizer
    model = AutoModelForCausalLM.from_pretrained(few)
    model.resize_token_embeddings(300)
    model.save_pretrained(few)

    out = tmp_path / "never"
    cases = [
        ((), dict(hook="model.layers.9.mlp"), "model.layers has 4 entries, 0 to 3"),
        ((), dict(hook="model.layer.1.mlp"), "did you mean model.layers.1.mlp"),
        ((), dict(hook="model.layers"), "--hook model.layers.output: a forward pass does not reach it"),
        ((), dict(hook="model.embed_tokens.input"), "not activations [batch, sequence, d_model]"),
        (("--text", "./none.txt"), dict(), "--text ./none.txt: there is no such file or folder"),
        (("--text", "data/none.txt"), dict(), "--text data/none.txt: there is no such file or folder"),
        (("--text", tiny["code"] + "t"), dict(), f"there is no such file or folder (is it {tiny['code']}?)"),
        (("--text", tmp_path / "broken.jsonl"), dict(), "broken.jsonl, line 2, cannot be read"),
        ((), dict(hook="model.rotary_emb"), "not activations [batch, sequence, d_model]"),
        ((), dict(ft_model="./none"), "--ft-model ./none: there is no such folder"),
        ((), dict(ft_model="nobody/nothing"), "--ft-model nobody/nothing: its tokenizer cannot be loaded"),
        ((), dict(ft_model=swapped), "cannot be paired"),
        ((), dict(ft_model=wide), "base activations have 64 values and fine-tuned ones 96"),
        ((), dict(ft_model=few), "--ft-model: the text holds the token id"),
        ((), dict(seq_len=2048), "--base-model was made for 1024 positions"),
        ((), dict(num_tokens=10**13), "of free disk; lower --num-tokens"),
        ((), dict(device="cuda:77"), "--device cuda:77: not usable here"),
        ((), dict(output=tmp_path / "full"), "is not empty and holds no collection"),
        ((), dict(output=packed, seed=5), "num-tokens 50000 and not 1000000"),
        ((), dict(val_tokens=10**7), "--val-tokens 10000000: must lie between"),
    ]  # fmt: skip
    for flags, options, want in cases:
        assert want in failure(collect_command(tiny, out, *flags, **options))
    assert not out.exists()
    assert (tmp_path / "full" / "thesis.tex").read_text() == "keep me"


def test_what_was_done_with_the_bos_is_in_pair_json(padded, tiny, tmp_path):
    chatml = shutil.copytree(tiny["ft"], tmp_path / "chatml")
    (chatml / "chat_template.jinja").write_text(CHATML)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 100))
    collect(tiny, tmp_path / "pair", "--text", tmp_path / "chat.jsonl", "--chat-template", ft_model=chatml, num_tokens=1000)
    ids = np.concatenate(load_from_disk(str(tmp_path / "pair" / "tokens"))["input_ids"])
    assert AutoTokenizer.from_pretrained(chatml).decode(ids[:30]).count("<bos>user\nWhat?<eos>\n<bos>assistant") >= 1
    assert ((ids[:-1] == 1) & (ids[1:] == 1)).sum() == 0  # nowhere two of them
    done = [[source["template_bos"] for source in read_pair(out)["text"]] for out in (padded, tmp_path / "pair")]
    assert done == [[None, "left out"], ["kept"]]
