"""analyze.py through its real command line, on a fine-tune whose text is known, against plain forward hooks and definitions."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from helpers import HOOK, read_metrics, run_script, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis import patching
from analysis.measure import COLUMNS
from collecting import language_model as lm
from collecting.chat import answer_marker
from crosscoder import CrossCoder
from sources.planted import PlantedConcepts


def read_table(folder: Path) -> dict[str, np.ndarray]:
    return {name: column.to_numpy() for name, column in zip(*columns(folder), strict=True)}


def columns(folder: Path):
    table = pq.read_table(folder / "latents.parquet")
    return table.column_names, table.columns


def read_examples(folder: Path) -> dict[int, list[dict]]:
    lines = (json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines())
    return {line["latent"]: line["examples"] for line in lines}


# --- a fine-tune whose text is known


def test_each_command_ends_with_the_next_one(capitals):
    words = [shlex.split(capitals[name].splitlines()[-1])[1:] for name in ("collected", "trained", "printed")]
    assert words[0] == ["python", "train.py", "--dataset", str(capitals["data"])]
    assert words[1] == ["python", "analyze.py", str(capitals["run"]), *capitals["models"]]
    assert words[2][:-1] == ["python", "-m", "webbrowser"]
    assert Path(words[2][-1].removeprefix("file://")) == capitals["analysis"] / "report.html"


def test_fine_tuned_only_latents_fire_on_the_fine_tuning_text(capitals):
    table, examples = read_table(capitals["analysis"]), read_examples(capitals["analysis"])
    assert list(examples)[0] == 5  # asked for
    exclusive = table["tag_scaling"] == "ft_only"
    top = [latent for latent in examples if exclusive[latent] and latent != 5][:5]
    shared = (table["tag"] == "shared") & (table["tag_scaling"] == "shared")
    assert len(top) == 5

    def contrast(latents) -> float:
        return table["mean_text_1"][latents].sum() / table["mean_text_0"][latents].sum()

    # 2.6 to 4.4 and 0.50 to 0.59 with three seeds and two orders of the rows; the strongest few alone 2 to 14
    assert contrast(exclusive) > 2 and contrast(shared) < 0.8
    texts = [e["text"] for latent in top for e in examples[latent] if e["range"] == "top"]
    assert np.mean([text == "caps.txt" for text in texts]) > 0.7  # mostly all; with another seed one of the five fires on code


def test_adding_fine_tuned_only_latents_brings_the_base_model_closer(capitals):
    diffing = read_metrics(capitals["analysis"])["patching"]["diffing"]
    for half in ("base model", "ft model"):
        found = diffing[half]
        before = found["before"]
        assert found["ft_only"]["latents"] > 0
        assert found["all"]["kl"]["all"] < found["ft_only"]["kl"]["all"] < before["all"]
        assert found["all"]["kl"]["first"] < before["first"]
        assert found["ft_only"]["kl"]["all"] < found["as_many_shared"]["kl"]["all"]  # as many others carry less


def test_everything_is_written_and_explained(capitals):
    out, metrics = capitals["analysis"], read_metrics(capitals["analysis"])
    summary = json.loads((capitals["run"] / "summary.json").read_text())
    for name in ("explained_variance", "explained_variance_A", "explained_variance_B", "l0_loss"):
        assert metrics[name] == pytest.approx(summary[name], rel=1e-4)
    assert metrics["rows_validation"] + metrics["rows_train"] == 80_000 and metrics["notes"] == []
    assert sum(metrics["density"]["latents"]) == 256 * (1 - metrics["dead_fraction"])
    own = [point for point in metrics["threshold_curve"] if point["own"]]
    assert len(own) == 1 and 0.2 < own[0]["explained_variance"] <= 1
    schema = pq.read_schema(out / "latents.parquet")
    definitions = json.loads(schema.metadata[b"definitions"])
    assert list(definitions) == schema.names and all(len(text) > 10 for text in definitions.values())
    assert schema.field("relative_norm").metadata[b"definition"].decode() == COLUMNS["relative_norm"]
    names = {path.stem for path in (out / "figures").glob("*.svg")}
    assert names == {"relative_norm", "decoder_cosine", "nu", "frequency", "training", "threshold", "diffing"}
    assert names == {path.stem for path in (out / "figures").glob("*.png")}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page) and str(capitals["out"]) not in page
    assert "ft-only" in capitals["printed"] and "KL to ft" in capitals["printed"]


def test_the_findings_are_those_of_the_table(capitals):
    found, table = json.loads((capitals["analysis"] / "findings.json").read_text()), read_table(capitals["analysis"])
    changes, nearest = found["changes"], found["nearest"]
    assert {one["latent"] for one in changes} == set(np.flatnonzero(table["changed"])) and len(changes) > 0
    assert not {one["latent"] for one in nearest} & set(np.flatnonzero(table["changed"]))
    for one in changes + nearest:
        assert one["rank"] == table["rank"][one["latent"]] and one["direction"] == table["direction"][one["latent"]]
        assert one["change_score"] == pytest.approx(table["change_score"][one["latent"]], rel=1e-3)
    for name in ("ft", "base"):
        mine = [one["rank"] for one in changes if one["direction"] == name]
        assert len(mine) == found["changed"][name] and mine == sorted(mine)
    first = changes[0]
    assert first["examples"] and first["tokens"] and first["examples"][0]["token"].strip() == first["tokens"][0]
    assert found["command"].startswith("python ") and str(capitals["run"]) in found["command"]
    assert found["kl"]["first_ranked"]["share_closed"] > 0 and found["null"]["false_discovery_rate"] == 0.05
    screen = (capitals["analysis"] / "findings.md").read_text()
    assert screen in capitals["printed"] and found["summary"][0] in screen and len(screen.splitlines()) < 40


def test_table_equals_a_direct_computation(capitals):
    """Frequencies, means and maxima, recomputed from the stored rows with plain matrices."""
    crosscoder = CrossCoder.from_pretrained(capitals["run"] / "crosscoder")
    pair, table = json.loads((capitals["data"] / "pair.json").read_text()), read_table(capitals["analysis"])
    source = load_from_disk(str(capitals["data"] / "tokens"))["source"]
    codes, sequences = [], []
    for split in ("train", "validation"):
        parts = [load_from_disk(str(capitals["data"] / m))[split].with_format("numpy") for m in ("base", "ft")]
        x = (
            np.stack([np.stack(p[:]["activation"]).astype(np.float32) for p in parts], 1)
            / np.array(pair["stored_scale"])[:, None]
        )
        with torch.no_grad():
            codes.append(crosscoder.encode(torch.from_numpy(x.astype(np.float32))).numpy())
        sequences.append(parts[0][:]["sequence"])
    f, text = np.concatenate(codes), np.array(source)[np.concatenate(sequences)]
    assert np.allclose(table["frequency"], (f > 0).mean(0), atol=5e-5)  # 4 of 80,000 codes are 0 or not by rounding
    assert np.allclose(table["freq_val"], (codes[1] > 0).mean(0), atol=1e-4)
    assert np.allclose(table["max_act_train"], codes[0].max(0), rtol=1e-4, atol=1e-5)
    assert np.allclose(table["mean_text_1"], f[text == 1].mean(0), rtol=1e-3, atol=1e-6)
    difference = (f**2).mean(0) * ((crosscoder.W_dec[:, 1] - crosscoder.W_dec[:, 0]) ** 2).sum(-1).detach().numpy()
    assert np.allclose(table["difference"], difference, rtol=1e-3)
    examples = read_examples(capitals["analysis"])
    for latent, found in examples.items():
        top = [e["values"][e["peak"]] for e in found if e["range"] == "top"]
        assert top == sorted(top, reverse=True) and top[0] == pytest.approx(f[:, latent].max(), rel=5e-3)


@torch.no_grad()
def test_example_values_are_the_latents_activations(capitals):
    """Each token's value, against the models run alone with plain forward hooks."""
    crosscoder = CrossCoder.from_pretrained(capitals["run"] / "crosscoder")
    tokenizer = AutoTokenizer.from_pretrained(capitals["ft"])
    tokens = load_from_disk(str(capitals["data"] / "tokens"))
    latent, found = list(read_examples(capitals["analysis"]).items())[1]
    for example in found[:3] + found[-3:]:
        ids = tokens[example["sequence"]]["input_ids"]
        x = torch.stack([hidden(capitals[name], ids) for name in ("base", "ft")], 1)  # [seq, 2, d_model]
        f = crosscoder.encode(x)[:, latent]
        start = example["position"] - example["peak"]
        values = np.array([np.nan if v is None else v for v in example["values"]])
        expected = f[start : start + len(values)].numpy()
        if start == 0:
            assert np.isnan(values[0])  # --skip-first 1
            values, expected = values[1:], expected[1:]
        assert np.allclose(values, expected, atol=0.03 * expected.max())  # stored in float16
        text = tokenizer.decode(ids[start : start + len(example["tokens"])], clean_up_tokenization_spaces=False)
        assert "".join(example["tokens"]) == text or "\ufffd" in "".join(example["tokens"])


def hidden(model: Path, ids: list[int]) -> torch.Tensor:
    """[seq, d_model] the model's activation at HOOK, by a hook of torch."""
    model, seen = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), []
    model.get_submodule(HOOK).register_forward_hook(lambda m, args, output: seen.append(output))
    model(input_ids=torch.tensor([ids]))
    return seen[0][0]


# --- splices


def identity(d_model: int) -> CrossCoder:
    """A crosscoder that gives back what it takes, exactly: latents for the positive and negative part of each dimension."""
    crosscoder, eye = CrossCoder(d_model, 4 * d_model), torch.eye(d_model)
    with torch.no_grad():
        crosscoder.W_enc.zero_()
        crosscoder.W_dec.zero_()
        for m in (0, 1):
            for sign, start in ((1, 2 * m * d_model), (-1, (2 * m + 1) * d_model)):
                crosscoder.W_enc[m, :, start : start + d_model] = sign * eye
                crosscoder.W_dec[start : start + d_model, m] = sign * eye
    return crosscoder


def analyse(*flags, **options) -> dict:
    """The metrics of a run of analyze.py."""
    run_script("analyze.py", *flags, *(part for item in options.items() for part in item), check=True)
    return read_metrics(Path(flags[flags.index("--output") + 1]))


def test_identity_gives_back_the_intact_loss_and_nothing_the_ablated_one(capitals, tmp_path):
    """Crosscoders without a run; the intact and ablated losses against plain torch."""
    whole, nothing = identity(64), CrossCoder(64, 8)
    with torch.no_grad():
        nothing.W_enc.zero_()  # never active: the reconstruction is zero
    found = {}
    for name, crosscoder in (("identity", whole), ("nothing", nothing)):
        crosscoder.save_pretrained(tmp_path / name)
        flags = [tmp_path / name, "--dataset", capitals["data"], "--output", tmp_path / f"{name}-analysis", *capitals["models"]]
        found[name] = analyse(*flags, "--num-tokens", 5000, "--patch-tokens", 1000, "--sections-per-class", 1)["patching"]
    for model in ("base", "ft"):
        one, none = found["identity"][model], found["nothing"][model]
        assert one["loss_reconstruction"] == one["loss_intact"] and one["kl_reconstruction"] == {"all": 0.0, "first": 0.0}
        assert one["loss_recovered"] == {"all": 1.0, "first": 1.0}
        assert none["loss_reconstruction"] == none["loss_zero"] and none["kl_reconstruction"] == none["kl_zero"]
        assert none["loss_recovered"] == {"all": 0.0, "first": 0.0} and none["loss_zero"]["all"] > none["loss_intact"]["all"]
    # base activation + (what the fine-tuned one has - what the base one has) is the fine-tuned activation
    assert found["identity"]["diffing"]["ft model"]["all"]["kl"]["all"] < 1e-6
    assert found["nothing"]["diffing"]["ft model"]["all"]["kl"] == found["nothing"]["diffing"]["ft model"]["before"]
    assert found["identity"]["diffing"]["base model"]["before"]["all"] > 0.05
    sequences = held_out_sequences(capitals["data"], 1000)
    for model in ("base", "ft"):
        for zero, key in ((False, "loss_intact"), (True, "loss_zero")):
            losses = plain_losses(capitals[model], sequences, zero)
            assert found["identity"][model][key]["all"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
            first = np.concatenate([part[:10] for part in losses]).mean()
            assert found["identity"][model][key]["first"] == pytest.approx(first, rel=1e-5)


def held_out_sequences(data: Path, tokens: int) -> list[list[int]]:
    ids, taken = load_from_disk(str(data / "tokens"))["input_ids"], []
    for sequence in sorted(set(load_from_disk(str(data / "base"))["validation"]["sequence"])):
        taken.append(ids[sequence][: tokens - sum(map(len, taken))])
    return [s for s in taken if s]


@torch.no_grad()
def plain_losses(path: Path, sequences: list[list[int]], zero: bool) -> list[np.ndarray]:
    """Loss of each prediction from position 1 on, one sequence at a time; zero: activations from position 1 on replaced."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if zero:
        keep_first = torch.zeros(1, 4096, 1)
        keep_first[:, 0] = 1
        model.get_submodule(HOOK).register_forward_hook(lambda m, args, output: output * keep_first[:, : output.shape[1]])
    losses = []
    for ids in sequences:
        ids = torch.tensor([ids])
        logits = model(input_ids=ids).logits[0, 1:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 2:], reduction="none").numpy())
    return losses


@pytest.mark.parametrize("hook", ["model.layers.1.mlp.output", "model.layers.2.mlp.input", "model.layers.1.self_attn.output"])
@torch.no_grad()
def test_a_splice_replaces_the_activation_and_nothing_else(tiny, hook):
    model = lm.load_model(tiny["base"], "float32", "cpu")
    ids, mask = torch.randint(3, 900, (2, 12), generator=torch.Generator().manual_seed(0)), torch.ones(2, 12, dtype=torch.long)
    activation, logits = lm.read_logits(model, hook, ids, mask)
    assert torch.equal(logits, model._module(input_ids=ids).logits)
    assert torch.equal(activation, lm.capture(model, [hook], ids, mask)[0])
    assert torch.equal(lm.read_logits(model, hook, ids, mask, activation.clone())[1], logits)
    other = activation.clone()
    other[:, 6:] *= 2
    seen, spliced = lm.read_logits(model, hook, ids, mask, other)
    assert torch.equal(seen, activation)
    assert torch.allclose(spliced[:, :6], logits[:, :6]) and not torch.allclose(spliced[:, 6:], logits[:, 6:], atol=1e-3)


def test_large_models_on_a_cpu_are_patched_at_fewer_tokens():
    def model(parameters: int, device: str):
        found = torch.nn.Module()
        found.weight = torch.nn.Parameter(torch.zeros(1).expand(parameters), requires_grad=False)
        found.device = torch.device(device)
        return found, "model.layers.1"

    small, medium, large = (model(n, "cpu") for n in (10**6, 135 * 10**6, 8 * 10**9))
    assert patching.usual_tokens([small, small]) == patching.usual_tokens([model(8 * 10**9, "cuda")] * 2) == 65_536
    assert patching.usual_tokens([medium, small]) == patching.usual_tokens([small, medium]) == 1481
    assert patching.usual_tokens([small, large]) == 512


def test_the_first_tokens_of_answers_are_found(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny["base"])
    marker = answer_marker(tokenizer)
    turns = [{"role": "user", "content": "Why so?"}, {"role": "assistant", "content": "Because the sky is blue and wide."}]
    ids = np.array(tokenizer(tokenizer.apply_chat_template(turns * 2, tokenize=False), add_special_tokens=False).input_ids)
    masks, rule = patching.first_tokens([ids, ids[:3]], marker, 1)
    starts = np.flatnonzero(np.diff(masks[0].astype(int)) == 1) + 2
    assert len(starts) == 2 and "answer" in rule and not masks[1].any()
    assert all(tokenizer.decode(ids[s : s + 10]).strip().startswith("Because the") for s in starts)
    assert masks[0].sum() == 20
    masks, rule = patching.first_tokens([ids], None, 1)
    assert np.flatnonzero(masks[0]).tolist() == list(range(1, 11)) and "no chat" in rule


def test_a_batch_may_hold_no_prediction():
    """The last sequence may be cut to the one token that the dataset leaves out."""
    none = torch.zeros(0, 5)
    assert patching.position_losses(none, none, torch.zeros(0, dtype=torch.long)).shape == (0, 2)


# --- other kinds of runs


def test_two_copies_of_one_model_have_no_exclusive_latent(tiny, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(tiny["base"], tmp_path / name)
    run_script(
        "collect.py", "--base-model", tmp_path / "a", "--ft-model", tmp_path / "b", "--hook", HOOK, "--seq-len", 128, "--text",
        tiny["code"], "--num-tokens", 20_000, "--model-dtype", "float32", "--output", tmp_path / "data", check=True,
    )  # fmt: skip
    run_script(
        "train.py", "--dataset", tmp_path / "data", "--d-hidden", 128, "--batch-size", 512, "--epochs", 3, "--l1-coeff", 1,
        "--run-name", "null", "--output-dir", tmp_path, "--wandb", "disabled", check=True,
    )  # fmt: skip
    metrics = analyse(tmp_path / "null", "--output", tmp_path / "out", "--sections-per-class", 2)
    counts = [metrics["latents"], metrics["latents_by_scaling"], metrics["latents_by_norm"]]
    counts += metrics["latents_by_published_cuts"].values()
    assert all(count["base_only"] == count["ft_only"] == 0 < count["shared"] for count in counts)
    table = read_table(tmp_path / "out")
    live = ~table["dead"] & (table["frequency"] > 1e-3)
    assert live.sum() > 20 and np.allclose(table["relative_norm"][live], 0.5, atol=0.01)
    assert np.allclose(table["beta_ratio_reconstruction"][live], 1, atol=0.05)


def test_a_run_on_planted_concepts_shows_the_truth(tmp_path):
    run_script(
        "train.py", "--num-tokens", 200_000, "--d-hidden", 512, "--variant", "batch_topk", "--run-name", "planted",
        "--output-dir", tmp_path, "--wandb", "disabled", check=True,
    )  # fmt: skip
    run_script("analyze.py", tmp_path / "planted", "--num-tokens", 40_000, check=True)
    out = tmp_path / "planted" / "analysis"
    metrics, table = read_metrics(out), read_table(out)
    summary = json.loads((tmp_path / "planted" / "summary.json").read_text())
    assert metrics["explained_variance"] == pytest.approx(summary["explained_variance"], rel=1e-4)
    assert metrics["planted"]["by_norm"]["recall_shared"] == pytest.approx(summary["planted"]["recall_shared"], abs=0.05)
    W_dec = CrossCoder.from_pretrained(tmp_path / "planted" / "crosscoder").W_dec
    fit = PlantedConcepts(0).fit(W_dec, torch.from_numpy(table["dead"]))  # [n_concepts, d_hidden]
    assert np.allclose(table["planted_cosine"], fit.amax(0), atol=1e-5)
    sharp = table["planted_cosine"] > 0.9
    assert np.mean(table["planted_kind"][sharp] == table["tag"][sharp]) > 0.9
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="truth"' in page and (out / "figures" / "planted.svg").is_file()
    exclusive = sharp & (table["planted_kind"] != "shared")
    assert exclusive.any() and table["changed"][exclusive].mean() > 0.9 and table["changed"][sharp & ~exclusive].mean() < 0.05
    for name in ("ft", "base"):  # ahead of the shared concepts
        mine = table["direction"] == name
        assert np.median(table["rank"][mine & sharp & ~exclusive]) > table["rank"][mine & exclusive].max(initial=0)
    points = metrics["threshold_curve"]
    assert [p["l0"] for p in points] == sorted(p["l0"] for p in points) and points[-1]["l0"] > 1.4 * metrics["k"]


@pytest.mark.parametrize("flags", [("--base-dataset", "--ft-dataset"), ("--model-dataset", "--model-dataset")])
def test_a_run_on_a_dataset_for_each_model_is_measured_on_those(tmp_path, flags):
    """As wide as the planted concepts, which must not be taken instead; a held-out outlier is left out as in training."""
    x = np.random.default_rng(0).standard_normal((2, 1000, 128)).astype("float32")
    x[1, 950] *= 1000
    data = [f for flag, name, rows in zip(flags, ("one", "two"), x, strict=True) for f in (flag, write(tmp_path / name, rows))]
    small = ["--d-hidden", 32, "--batch-size", 64, "--val-tokens", 100, "--wandb", "disabled", "--output-dir", tmp_path]
    run_script("train.py", *data, *small, "--run-name", "run", check=True)
    found = analyse(tmp_path / "run", "--output", tmp_path / "out")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["data"] == f"{data[1]} and {data[3]}" and "two single datasets have no texts" in found["notes"][0]
    assert found["explained_variance"] == pytest.approx(summary["explained_variance"], rel=1e-4) and "planted" not in found
