"""LoRA adapters made by peft, revisions of one model, and chat templates, through the real command lines."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from datasets import load_from_disk
from helpers import metrics, one_line_error, read_rows, run_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from collecting import language_model as lm

HOOK = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory) -> Path:
    """A LoRA fine-tune of the base model on the prose, as peft saves it, with a tokenizer of its own beside it."""
    out = tmp_path_factory.mktemp("lora") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny["base"])
    tokenizer = AutoTokenizer.from_pretrained(tiny["base"])
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"]))
    ids = torch.tensor(tokenizer(Path(tiny["prose"]).read_text()[:20_000]).input_ids)[: 64 * 64].view(64, 64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in ids.split(8):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return out


def flags(tiny, out, *more) -> list:
    given = ["--base-model", tiny["base"], "--hook", HOOK, "--text", tiny["prose"], "--model-dtype", "float32", "--seq-len", 64]
    return [*given, "--num-tokens", 6000, "--output", out, *more]


@torch.no_grad()
def activations(model, module, sequences) -> list[np.ndarray]:
    """Activations [len, d_model] of each sequence at a module's output, by a hook of torch."""
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(output[0].numpy()))
    for tokens in sequences:
        model(input_ids=torch.tensor([tokens]))
    return seen


def test_lora_fine_tune_goes_through_collect_and_train(tiny, lora, tmp_path):
    out = tmp_path / "pair"
    run_script("collect.py", *flags(tiny, out, "--ft-adapter", lora, "--dtype", "float32"), check=True)
    pair = json.loads((out / "pair.json").read_text())
    assert (pair["base_model"], pair["ft_model"], pair["ft_adapter"]) == (tiny["base"], tiny["base"], str(lora))
    base, ft = (read_rows(out, model, ("train",)) for model in ("base", "ft"))
    # not merged here, but applied beside the weights by peft
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny["base"]), lora).eval()
    sequences = load_from_disk(str(out / "tokens"))["input_ids"]
    some = sorted(set(ft["sequence"].tolist()))[:5]
    acts = dict(
        zip(
            some, activations(model, model.get_submodule(f"base_model.model.{HOOK}"), [sequences[i] for i in some]), strict=True
        )
    )
    rows = np.flatnonzero(np.isin(ft["sequence"], some))
    want = np.stack([acts[s][p] for s, p in zip(ft["sequence"][rows], ft["position"][rows], strict=True)])
    np.testing.assert_allclose(ft["activation"][rows] / pair["stored_scale"][1], want, rtol=1e-3, atol=1e-4)
    assert not np.allclose(base["activation"] / pair["stored_scale"][0], ft["activation"] / pair["stored_scale"][1], atol=1e-2)
    small = ["--d-hidden", 64, "--batch-size", 256, "--wandb", "disabled", "--output-dir", tmp_path]
    run_script("train.py", "--dataset", out, *small, "--run-name", "stored", check=True)
    models = ["--base-model", tiny["base"], "--ft-adapter", lora, "--model-dtype", "float32"]
    few = ["--patch-tokens", 500, "--num-tokens", 2000, "--sections-per-class", 0, "--steer", "none"]
    shown = run_script("analyze.py", tmp_path / "stored", *models, *few, check=True).stdout
    assert f"# {Path(tiny['base']).name} and adapter: what changed" in shown
    measured = json.loads((tmp_path / "stored" / "analysis" / "metrics.json").read_text())
    assert measured["patching"]["diffing"]["base model"]["before"]["all"] > 0  # two models, not one twice
    live = [*flags(tiny, out)[:-2], "--ft-adapter", lora, "--val-tokens", 500]  # without --output
    printed = run_script("train.py", *live, *small, "--run-name", "live", check=True).stdout
    assert f"{tiny['base']} + {lora} at {HOOK}" in printed
    for run in ("stored", "live"):
        assert metrics(tmp_path / run)[-1]["val_explained_variance_B"] > 0


def test_two_revisions_of_one_model(tiny, tmp_path):
    """Training checkpoints against each other, from a Hub cache on the disk."""
    repository = tmp_path / "hub" / "models--me--model"
    for revision, commit, folder in (("main", "a" * 40, tiny["ft"]), ("step1", "b" * 40, tiny["base"])):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    out = tmp_path / "pair"
    given = ["--base-model", "me/model", "--base-revision", "step1", "--ft-model", "me/model", "--ft-revision", "main"]
    given += flags(tiny, out)[2:]
    run_script("collect.py", *given, check=True, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")})
    pair = json.loads((out / "pair.json").read_text())
    assert (pair["base_revision"], pair["ft_revision"]) == ("step1", "main")
    assert pair["revisions"] == ["b" * 40, "a" * 40]
    sequences = load_from_disk(str(out / "tokens"))["input_ids"][:1]
    for i, model in enumerate(("base", "ft")):
        rows, plain = read_rows(out, model), AutoModelForCausalLM.from_pretrained(tiny[model])
        (want,) = activations(plain, plain.get_submodule(HOOK), sequences)
        first = rows["sequence"] == 0
        got = rows["activation"][first] / pair["stored_scale"][i]
        np.testing.assert_allclose(got, want[rows["position"][first]], rtol=1e-2, atol=1e-2)


def test_what_cannot_be_loaded_is_refused(tiny, lora, tmp_path, monkeypatch):
    refused = run_script("collect.py", *flags(tiny, tmp_path / "a"))
    assert "--ft-model is missing: give the fine-tuned model" in one_line_error(refused, "collect.py")
    with pytest.raises(ValueError, match=r"--base-revision v1: --base-model .* is a folder, which has no revisions"):
        lm.load_model(tiny["base"], "float32", "cpu", "--base-model", revision="v1")
    with pytest.raises(ValueError, match=r"--ft-model .*: is an adapter \(LoRA\) and no model; give it with --ft-adapter"):
        lm.load_model(str(lora), "float32", "cpu", "--ft-model")
    with pytest.raises(ValueError, match="--ft-adapter ./nowhere: there is no such folder"):
        lm.load_model(tiny["base"], "float32", "cpu", "--ft-model", adapter="./nowhere")
    # of another model, and with part of its weights lost
    other, torn = tmp_path / "other", tmp_path / "torn"
    for copy in (other, torn):
        shutil.copytree(lora, copy)
    config = json.loads((other / "adapter_config.json").read_text()) | {"target_modules": ["c_attn"]}
    (other / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(torn / "adapter_model.safetensors")
    save_file({name: t for name, t in weights.items() if "layers.0" not in name}, torn / "adapter_model.safetensors")
    for folder in (other, torn):
        with pytest.raises(
            ValueError, match="cannot be merged into its model .*; give an adapter that was trained on"
        ) as error:
            lm.load_model(tiny["base"], "float32", "cpu", "--ft-model", adapter=str(folder))
        assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match="--ft-adapter .*: adapters need peft; `pip install peft`"):
        lm.load_model(tiny["base"], "float32", "cpu", "--ft-model", adapter=str(lora))


def test_base_model_without_a_chat_template_and_an_adapter_with_one(tiny, lora, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny["base"], base)
    shutil.copytree(lora, adapter)
    for folder, template in ((base, None), (adapter, "{% for m in messages %}<chat>{{ m['content'] }}{% endfor %}")):
        tokenizer = AutoTokenizer.from_pretrained(tiny["base"])
        tokenizer.chat_template = template
        for leftover in folder.glob("chat_template*"):
            leftover.unlink()
        tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    assert "<chat>" in lm.load_paired_tokenizer(str(base), str(base), ft_adapter=str(adapter)).chat_template
    assert lm.load_paired_tokenizer(str(base), str(base), ft_adapter=str(lora)).chat_template is None
