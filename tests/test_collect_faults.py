"""collect.py where models or texts changed, cannot be found, or give numbers that cannot be stored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import nnsight
import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import collect_command, failure, one_line_error, read_pair, read_rows, run_script
from processes import Started, finished
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from collecting import language_model


def test_a_restart_over_another_model_or_text_is_refused_by_name(tiny, tmp_path):
    """Weights and tokenizer changed in place, the first lines of a text gone: each is named; brought back, it goes on."""
    given = {name: shutil.copytree(tiny[name], tmp_path / name) for name in ("base", "ft")}
    rows = [{"text": "a line of text, and some more of it. " * (i % 20)} for i in range(1500)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "table").mkdir()
    Dataset.from_list(rows).save_to_disk(tmp_path / "table")
    texts = ["--text", tmp_path / "docs.jsonl", "--text", tmp_path / "table"]
    models = {"base_model": given["base"], "ft_model": given["ft"]}
    argv = collect_command(tiny, tmp_path / "out", *texts, **models, num_tokens=100_000, shard_rows=4000)
    process = Started(*argv)
    while not (tmp_path / "out" / "base" / "train" / "data-00001.arrow").exists():
        assert process.poll() is None, process.output()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    progress = (tmp_path / "out" / "progress.json").read_bytes()
    (shard,) = (tmp_path / "table").glob("*.arrow")
    changes = [
        ("--ft-model", given["ft"] / "model.safetensors", lambda b: b[:-4000] + bytes(4000)),
        ("--base-model", given["base"] / "tokenizer_config.json", lambda b: b + b" "),
        (f"--text {tmp_path / 'docs.jsonl'}", tmp_path / "docs.jsonl", lambda b: b.split(b"\n", 3)[-1]),
        (f"--text {tmp_path / 'table'}", shard, lambda b: b.replace(b"a line of text", b"a line of tent", 1)),
    ]
    for flag, file, change in changes:
        content = file.read_bytes()
        assert change(content) != content
        file.write_bytes(change(content))
        assert f"error: {flag}: has other content than when this collection began" in failure(argv)
        file.write_bytes(content)
    assert progress == (tmp_path / "out" / "progress.json").read_bytes()
    assert finished(*argv).returncode == 0


@pytest.mark.parametrize("everywhere", [True, False])
def test_nan_in_one_head_or_after_one_token(tiny, tmp_path, everywhere):
    with_nan = shutil.copytree(tiny["ft"], tmp_path / "with_nan")
    weights = load_file(with_nan / "model.safetensors")
    if everywhere:
        weights["model.layers.1.self_attn.q_proj.weight"][16:32] = torch.nan  # one head of four
    else:
        weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(with_nan)("@").input_ids] = torch.nan
    save_file(weights, with_nan / "model.safetensors", {"format": "pt"})
    done = finished(*collect_command(tiny, tmp_path / "pair", ft_model=with_nan, num_tokens=20_000))
    if everywhere:
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "activations of the fine-tuned model all hold inf or nan" in done.stderr.splitlines()[-1]
        return
    assert done.returncode == 0 and "with inf or nan" in done.stdout and "more than one row in a hundred" in done.stdout
    assert read_pair(tmp_path / "pair")["left_out"]["non_finite"] > 200
    assert all(np.isfinite(read_rows(tmp_path / "pair", model)["activation"]).all() for model in ("base", "ft"))


def test_activation_beyond_float16_is_refused(tiny, tmp_path):
    """A token that the rows behind the scale did not hold, with an activation far above all others."""
    huge = shutil.copytree(tiny["base"], tmp_path / "huge")
    weights = load_file(huge / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(huge)("\x01").input_ids] *= 1e8
    save_file(weights, huge / "model.safetensors", {"format": "pt"})
    (tmp_path / "rare.txt").write_text("x = 1\n" * 40_000 + "\x01")
    argv = collect_command(tiny, tmp_path / "pair", "--text", tmp_path / "rare.txt", base_model=huge, hook="model.embed_tokens",
                           max_norm_ratio="1e9", num_tokens=200_000, seq_len=1024)  # fmt: skip
    done = finished(*argv)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("collect.py: error: --dtype float16: an activation is too large")
    shutil.rmtree(tmp_path / "pair")
    assert finished(*argv, "--dtype", "float32").returncode == 0
    assert np.isfinite(read_rows(tmp_path / "pair", "base")["activation"]).all()


def test_names_that_the_hub_does_not_know_are_asked_for_once(tiny, tmp_path):
    """The libraries would try six times, for half a minute, and say so each time."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for options, flag in (({}, "--text tiny/text"), ({"base_model": "tiny/bas"}, "--base-model tiny/bas")):
        argv = collect_command(tiny, tmp_path / "never", "--text", "tiny/text", **options)
        done = run_script("collect.py", *argv[1:], env=env)
        message = one_line_error(done, "collect.py")
        assert done.stderr.count("\n") == 2 and message.startswith(f"collect.py: error: {flag}: is no ")
        assert "the Hub does not give it as a" in message and "Connection refused" in message


def test_an_activation_of_another_width_is_refused(tiny):
    """A module whose output depends on what it gets: probed with three tokens, it is as wide as ever."""
    model = AutoModelForCausalLM.from_pretrained(tiny["base"]).eval()
    module = model.get_submodule("model.layers.1.mlp")
    forward = module.forward
    module.forward = lambda x: forward(x)[..., : 64 if x.shape[1] < 100 else 32]
    model = nnsight.NNsight(model)
    hook = language_model.parse_hook(model, "model.layers.1.mlp")
    assert language_model.probe_hook(model, hook) == 64
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.output: gives a tensor of shape \[1, 128, 32\] for this batch"):
        language_model.paired_activations([model] * 2, [[hook]] * 2, [64], [0], [np.arange(128)])
