"""train.py --difference, and what analyze.py says of the difference without a dictionary, against plain NumPy and PyTorch."""

import json
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from helpers import (
    CPU,
    assert_same_weights,
    metrics,
    one_line_error,
    open_single,
    read_rows,
    run_script,
    start,
    train,
    wait_for_step,
    weights,
    write,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel

from analysis.difference import DifferenceSums, logit_lens
from crosscoder import CrossCoder
from sources.batches import read_kept
from sources.difference import Difference

ROWS, HELD_OUT = 4000, 400
SIZES = ["--d-hidden", 24, "--batch-size", 64, "--val-tokens", HELD_OUT, "--wandb", "disabled", "--log-every", 10]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[list, np.ndarray]:
    """Flags of two datasets, and their rows [2, rows, 12]: the fine-tuned model has 4 concepts and an offset of its own.

    Row 7 holds a NaN in the base model, row 9 is 100 times too long in the fine-tuned one.
    """
    folder, random = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    codes = random.exponential(size=(ROWS, 16)) * (random.random((ROWS, 16)) < 0.15)
    directions = random.normal(size=(16, 12))
    base = (codes[:, :12] @ directions[:12] + random.normal(size=(ROWS, 12))).astype(np.float32)
    ft = (base + codes[:, 12:] @ directions[12:] + 0.3).astype(np.float32)
    ft[9] *= 100
    base[7, 3] = np.nan
    flags = ["--base-dataset", write(folder / "base", base), "--ft-dataset", write(folder / "ft", ft)]
    return flags, np.stack([base, ft])


# --- train.py --difference


def test_a_source_of_differences_leaves_out_what_its_pair_leaves_out(two):
    flags, rows = two
    pair = open_single(flags[1], flags[3], (None, None), HELD_OUT, HELD_OUT, 0)
    norms = np.linalg.norm(rows, axis=-1)
    pair.norm_limit = torch.from_numpy(10 * np.nanmedian(norms, axis=1))[:, None]
    source = Difference(pair)
    kept, x = read_kept(source, "train", np.arange(50))
    assert set(range(50)) - set(kept.tolist()) == {7, 9}
    assert torch.equal(x[:, 0], torch.from_numpy(rows[1] - rows[0])[kept])
    streams = [[batch._replace(x=batch.x.clone()) for batch in of.batches(64, 7200, CPU)] for of in (pair, source)]
    for of_two, of_one in zip(*streams, strict=True):
        assert of_one[1:] == of_two[1:] and torch.equal(of_one.x, of_two.x[:, 1:] - of_two.x[:, :1])
    assert streams[1][-1].dropped == (2, 2)  # over two epochs


@pytest.mark.parametrize("recipe", [["--l1-coeff", 1], ["--variant", "batch_topk", "--k", 3]])
def test_a_run_on_the_difference_finds_what_was_added_and_measures_it(tmp_path, two, recipe):
    flags, rows = two
    run = train(tmp_path, "a", "--difference", *flags, *SIZES, *recipe, "--epochs", 15, "--compute-dtype", "float32")
    crosscoder = CrossCoder.from_pretrained(run / "crosscoder")
    assert crosscoder.n_models == 1
    d = torch.from_numpy(rows[1] - rows[0])[:, None]
    with torch.no_grad():
        x_hat = crosscoder(d[-HELD_OUT:])
    error, deviation = d[-HELD_OUT:] - x_hat, d[-HELD_OUT:] - d[-HELD_OUT:].mean(0)
    variance = 1 - float(error.double().square().sum() / deviation.double().square().sum())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["explained_variance_A"] == summary["explained_variance"] == pytest.approx(variance, abs=1e-4)
    assert summary["explained_variance"] > 0.8 and "explained_variance_B" not in summary
    assert sum(summary["latents"].values()) == 24 and set(summary["latents"]) == {"live", "dead"}
    assert summary["rows_dropped"] == 30 and summary["rows_dropped_by_norm"] == 15
    usable = np.delete(rows[:, :-HELD_OUT], (7, 9), axis=1)
    assert np.allclose(crosscoder.mean[0], (usable[1] - usable[0]).mean(0), atol=1e-4)
    random = np.random.default_rng(0)  # as in `two`
    random.exponential(size=(ROWS, 16)), random.random((ROWS, 16))
    added = torch.from_numpy(random.normal(size=(16, 12))[12:]).float()
    cosine = torch.nn.functional.cosine_similarity(added[:, None], crosscoder.W_dec[None, :, 0], dim=-1)  # [4, d_hidden]
    assert cosine.amax(1).min() > 0.9


def test_a_killed_run_on_the_difference_ends_with_the_same_bits(tmp_path, two):
    recipe = ["--difference", *two[0], *SIZES, "--variant", "batch_topk", "--k", 3, "--num-tokens", 12_800, "--save-every", 20]
    straight = train(tmp_path, "straight", *recipe)
    process, run = start(tmp_path, "killed", *recipe), tmp_path / "killed"
    wait_for_step(process, run, 70)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "crosscoder").exists()
    assert "resumed" in run_script("train.py", "--resume", run, check=True).stdout
    assert_same_weights(straight, run)
    assert [m.get("loss") for m in metrics(straight)] == [m.get("loss") for m in metrics(run)]
    changed = run_script("train.py", "--resume", run, "--no-difference", "--num-tokens", 20_000)
    assert "--difference is False and was True" in one_line_error(changed, "train.py")


def test_live_differences_go_on_with_the_scale_of_their_models(tmp_path, tiny):
    flags = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", "model.layers.1", "--text", tiny["prose"]]
    flags += ["--seq-len", 32, "--model-dtype", "float32", "--buffer-tokens", 2048, *SIZES, "--val-tokens", 200]
    straight = train(tmp_path, "straight", "--difference", *flags, "--num-tokens", 4096)
    data = json.loads((straight / "config.json").read_text())["data"]
    assert data["n_models"] == 1 and len(data["stored_scale"]) == 2
    run = tmp_path / "killed"
    process = start(tmp_path, "killed", "--difference", *flags, "--num-tokens", 4096, "--save-every", 20)
    wait_for_step(process, run, 40)
    process.send_signal(signal.SIGTERM)
    process.wait()
    run_script("train.py", "--resume", run, check=True)
    assert_same_weights(straight, run)


def test_a_run_may_begin_with_a_dictionary_of_the_difference(tmp_path, two):
    recipe = ["--difference", *two[0], *SIZES, "--epochs", 2]
    first = train(tmp_path, "first", *recipe)
    again = train(tmp_path, "again", *recipe, "--init-from", first / "crosscoder")
    assert metrics(again)[0]["explained_variance"] > metrics(first)[0]["explained_variance"] + 0.3
    refused = run_script("train.py", *two[0], *SIZES, "--init-from", first / "crosscoder", "--output-dir", tmp_path)
    assert "is for 1 models of width 12, the activations are of 2 of width 12" in one_line_error(refused, "train.py")


def test_differences_that_mean_nothing_are_refused(tmp_path, two):
    flags, to = two[0], ["--output-dir", tmp_path]
    assert "--difference is of the data of two models" in one_line_error(
        run_script("train.py", "--difference", *to), "train.py"
    )
    three = [part for name in (flags[1], flags[3], flags[3]) for part in ("--model-dataset", name)]
    refused = one_line_error(run_script("train.py", "--difference", *three, *to), "train.py")
    assert "--difference is of two models, --model-dataset names 3" in refused
    same = ["--base-dataset", flags[1], "--ft-dataset", flags[1]]
    refused = one_line_error(run_script("train.py", "--difference", *same, *SIZES, *to), "train.py")
    assert "--difference: the differences of the two models are the same in every row" in refused


# --- the logit lens


def lens_by_derivative(model, final_norm, direction: torch.Tensor) -> torch.Tensor:
    """[vocabulary] how the logits move along a direction, from a point that the norm leaves at its length."""
    signs = torch.ones(len(direction))
    signs[1::2] = -1
    far = 1e3 * direction / direction.norm()  # so long that the norm only sets the length
    return model.get_output_embeddings().weight @ (final_norm(far) - final_norm(-far)) / 2


@torch.no_grad()
def test_the_lens_folds_the_final_norm_of_any_model(tiny):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    gemma = GemmaForCausalLM(GemmaConfig(**sizes, num_key_value_heads=1, head_dim=16, pad_token_id=0))  # weight is 1 + gain
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=1, n_head=2))  # subtracts the mean
    gemma.model.norm.weight.normal_()
    gpt.transformer.ln_f.weight.normal_()
    gpt.transformer.ln_f.bias.normal_()
    llama = AutoModelForCausalLM.from_pretrained(tiny["ft"], dtype=torch.float32)
    for model, norm in ((gemma, gemma.model.norm), (gpt, gpt.transformer.ln_f), (llama, llama.model.norm)):
        directions = torch.randn(3, model.get_output_embeddings().weight.shape[1])
        for direction, lens in zip(directions, logit_lens(directions, model), strict=True):
            logits = lens_by_derivative(model, norm, direction)
            z = (logits - logits.mean()) / logits.std()
            for end, order in (("more", z.argsort(descending=True)), ("less", z.argsort())):
                assert [int(token) for token, _ in lens[end]] == order[:10].tolist()
                assert np.allclose([value for _, value in lens[end]], z[order[:10]], atol=0.02)
    with pytest.raises(ValueError, match="takes 32 values"):
        logit_lens(torch.randn(1, 5), gpt)


# --- analyze.py


@pytest.fixture(scope="module")
def analysed(tiny, tmp_path_factory) -> dict[str, Path]:
    """A collection of two texts, a crosscoder on it, a dictionary of its difference, and the analyses of both."""
    out = tmp_path_factory.mktemp("analysed")
    run_script(
        "collect.py", "--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", "model.layers.2", "--seq-len", 64,
        "--text", tiny["code"], "--text", tiny["prose"], "--num-tokens", 8000, "--model-dtype", "float32", "--output",
        out / "data", check=True,
    )  # fmt: skip
    flags = ["--dataset", out / "data", "--epochs", 4, "--batch-size", 256, "--d-hidden", 48, "--wandb", "disabled"]
    models = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--model-dtype", "float32"]
    for name, more in (("both", []), ("difference", ["--difference", "--l1-coeff", 0.5])):
        run = train(out, name, *flags, *more)
        options = ["--patch-tokens", 200, "--sections-per-class", 2, "--latents", 5]
        run_script("analyze.py", run, *models, *options, check=True)
    return {"data": out / "data", "both": out / "both" / "analysis", "difference": out / "difference" / "analysis"}


def differences(data: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """[rows, d_model] float64 raw differences, training rows first, and the columns of these rows."""
    scale = json.loads((data / "pair.json").read_text())["stored_scale"]
    base, ft = (read_rows(data, model) for model in ("base", "ft"))
    raw = [x["activation"].astype(np.float64) / s for x, s in zip((base, ft), scale, strict=True)]
    return raw[1] - raw[0], base


@pytest.mark.parametrize("name", ["both", "difference"])
def test_latents_of_either_kind_of_dictionary_are_steered_with(analysed, name):
    lines = [json.loads(line) for line in (analysed[name] / "steering.jsonl").read_text().splitlines()]
    table = pq.read_table(analysed[name] / "latents.parquet").to_pandas()
    groups = list(dict.fromkeys(tuple(line["latents"]) for line in lines))
    (three,) = groups
    assert len(lines) == 8 and len(three) == 3 and not table["dead"][list(three)].any()
    if name == "difference":
        assert table["rank"][list(three)].tolist() == [1, 2, 3]
    assert all(line["kl"] > 0 and line["kl"] != line["kl_before"] and line["norm"] > 0 for line in lines)
    page = (analysed[name] / "report.html").read_text()
    assert '<h2 id="steering">' in page and page.count('class="pairs"') == 2 * len(lines[0]["answers"])


@pytest.mark.parametrize("name", ["both", "difference"])
def test_means_and_components_equal_those_of_numpy(analysed, name):
    found = json.loads((analysed[name] / "metrics.json").read_text())["difference"]
    vectors = load_file(analysed[name] / "difference.safetensors")
    d, rows = differences(analysed["data"])
    source = np.array(load_from_disk(str(analysed["data"] / "tokens"))["source"])[rows["sequence"]]
    wanted = {"all tokens": np.ones(len(d), bool), "code.txt": source == 0, "prose.txt": source == 1}
    wanted |= {f"position {p}": rows["position"] == p for p in range(1, 6)}
    assert [one["of"] for one in found["means"]] == list(wanted) and found["tokens"] == len(d) == 8000
    for one, vector, some in zip(found["means"], vectors["means"], wanted.values(), strict=True):
        mean = d[some].mean(0)
        assert one["tokens"] == some.sum() and np.allclose(vector, mean, atol=1e-5)
        assert one["length"] == pytest.approx(np.linalg.norm(mean), rel=1e-4)
    assert found["rms"] == pytest.approx(np.sqrt((d**2).sum(1).mean()), rel=1e-5)

    variance, axes = np.linalg.eigh(np.cov(d.T, bias=True))
    share, axes = variance[::-1] / variance.sum(), axes.T[::-1]
    assert np.allclose([one["share"] for one in found["components"]], share[:10], rtol=1e-3)
    assert np.allclose(np.abs((vectors["components"].numpy() * axes[:10]).sum(1)), 1, atol=1e-3)
    assert (vectors["components"] @ vectors["means"][0] >= 0).all()
    along = (d - d.mean(0)) @ vectors["components"].numpy().T  # [rows, 10]
    for i, one in enumerate(found["components"]):
        for side, best in (("plus", along[:, i].argmax()), ("minus", along[:, i].argmin())):
            first, *rest = one["examples"][side]
            assert (first["sequence"], first["position"]) == (rows["sequence"][best], rows["position"][best])
            assert first["values"][first["peak"]] == pytest.approx(abs(along[best, i]), rel=6e-3)
            assert len(rest) == 4 and all(e["values"][e["peak"]] <= first["values"][first["peak"]] for e in rest)


def test_sections_and_the_page_have_the_lens_of_each_models_row(analysed, tiny):
    models = [AutoModelForCausalLM.from_pretrained(tiny[name], dtype=torch.float32) for name in ("base", "ft")]
    for name in ("both", "difference"):
        crosscoder = CrossCoder.from_pretrained(analysed[name].parent / "crosscoder")
        rows = (crosscoder.W_dec / crosscoder.scale[:, None]).detach().expand(-1, 2, -1)
        sections = [json.loads(line) for line in (analysed[name] / "examples.jsonl").read_text().splitlines()]
        assert sections[0]["latent"] == 5 and len(sections) >= 3
        for section in sections:
            for m, of in enumerate(("base", "ft")):
                (own,) = logit_lens(rows[section["latent"], m][None], models[m])
                assert [z for _, z in section["lens"][of]["more"]] == pytest.approx([z for _, z in own["more"]], abs=0.011)
        if name == "both":
            found = json.loads((analysed[name] / "findings.json").read_text())
            one = next(one for one in found["changes"] + found["nearest"] if one["lens"])
            lens = next(section["lens"] for section in sections if section["latent"] == one["latent"])
            assert one["lens"] == {of: [token for token, _ in lens[of]["more"]] for of in ("base", "ft")}
            first = json.loads((analysed[name] / "metrics.json").read_text())["difference"]["components"][0]
            peak = first["examples"]["plus"][0]
            assert found["components"][0]["plus"]["examples"][0]["token"] == peak["tokens"][peak["peak"]]
            assert "first principal component" in (analysed[name] / "findings.md").read_text(encoding="utf-8")
        page = (analysed[name] / "report.html").read_text(encoding="utf-8")
        assert "Without a dictionary" in page and "principal component" in page and "http" not in page


def test_a_dictionary_of_the_difference_is_ranked_by_what_each_latent_explains(analysed):
    crosscoder = CrossCoder.from_pretrained(analysed["difference"].parent / "crosscoder")
    read = pq.read_table(analysed["difference"] / "latents.parquet")
    table = {name: column.to_numpy() for name, column in zip(read.column_names, read.columns, strict=True)}
    assert all(len(field.metadata[b"definition"]) > 10 for field in read.schema)
    d, _ = differences(analysed["data"])
    x = crosscoder.normalize(torch.from_numpy(d).float()[:, None])
    with torch.no_grad():
        f = crosscoder.encode(x, normalized=True)
        total = (x - x.mean(0)).double().square().sum()
        error = lambda f: (x - crosscoder.decode(f, normalized=True)).double().square().sum()  # noqa: E731 - of these rows
        for latent in [0, 5, *np.argsort(table["rank"])[:3]]:
            without = f.clone()
            without[:, latent] = 0
            assert table["explained"][latent] == pytest.approx(float((error(without) - error(f)) / total), abs=1e-5)
    live = np.argsort(table["rank"])
    assert (np.diff(table["explained"][live]) <= 0).all() and sorted(table["rank"]) == list(range(1, 49))
    assert np.allclose(table["frequency"], (f > 0).float().mean(0), atol=1e-3)
    found = json.loads((analysed["difference"] / "metrics.json").read_text())
    summary = json.loads((analysed["difference"].parent / "summary.json").read_text())
    assert found["explained_variance"] == pytest.approx(summary["explained_variance"], rel=1e-4)
    assert "no classes" in found["notes"][0] and "explained_variance_B" not in found


def test_sums_of_the_same_model_twice_are_nothing():
    sums = DifferenceSums(2)
    x = torch.randn(50, 1, 6).expand(-1, 2, -1)
    for part in x.split(20):
        sums.add(part, torch.arange(len(part)) % 2, torch.arange(len(part)))
    count, means = sums.means()
    assert count.tolist() == [50, 25, 25, 3, 3, 3, 3, 3] and not means.any() and not sums.products.any()


def test_weights_of_one_model_convert_and_fold(tmp_path, two):
    run = train(tmp_path, "a", "--difference", *two[0], *SIZES, "--epochs", 1)
    run_script("formats.py", run / "crosscoder", tmp_path / "dl", "--to", "crosscoder_learning", check=True)
    run_script("formats.py", tmp_path / "dl", tmp_path / "back", "--to", "crosscoder", check=True)
    x = torch.from_numpy(two[1][1] - two[1][0])[-50:, None]
    ours, back = (CrossCoder.from_pretrained(folder) for folder in (run / "crosscoder", tmp_path / "back"))
    with torch.no_grad():
        assert torch.allclose(ours(x), back(x), atol=1e-4) and torch.allclose(ours(x), ours.fold_normalization()(x), atol=1e-4)
    assert weights(run)["W_dec"].shape == (24, 1, 12)
