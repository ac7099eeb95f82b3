"""Pushing to and loading from the Hub, against a stand-in server on this machine and a cache of its own."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from helpers import ROOT, one_line_error, open_pair, run_script
from hub_server import Hub, serve
from processes import Started
from safetensors.torch import load_file

from crosscoder import CrossCoder
from run.checkpoint import complete
from run.foreign import read_crosscoder
from run.hub import dataset_card, model_card, open_repository
from sources.batches import estimate_normalization

LOAD = """
import sys, torch
from crosscoder import CrossCoder
torch.save(CrossCoder.from_pretrained(sys.argv[1]).state_dict(), sys.argv[2])
"""


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    with serve() as (address, repositories, off), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_test")
        home = str(tmp_path_factory.mktemp("home"))
        changed = {"HF_ENDPOINT": address, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        changed |= {"HF_HUB_OFFLINE": None, "HF_DATASETS_OFFLINE": None}
        yield Online(repositories, off, tuple(changed.items()))


class Online(NamedTuple):
    """A Hub for the tests."""

    repositories: dict
    off: Callable  # a context in which it does not answer
    changed: tuple  # the variables with which programs take it for the Hub

    @property
    def home(self) -> str:
        return dict(self.changed)["HF_HOME"]


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_crosscoder_goes_to_the_hub_and_comes_back(tmp_path, online):
    repositories, changed = online.repositories, online.changed
    flags = ["--d-hidden", 64, "--batch-size", 64, "--val-tokens", 256, "--num-tokens", 640, "--wandb", "disabled"]
    flags += ["--output-dir", tmp_path, "--run-name", "a", "--push-to-hub", "me/planted"]
    printed = run_script("train.py", *flags, check=True, changed=changed).stdout
    assert 'pushed     me/planted: CrossCoder.from_pretrained("me/planted")' in printed
    files = repositories["models/me/planted"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "summary.json"}
    assert files["model.safetensors"] == (tmp_path / "a" / "crosscoder" / "model.safetensors").read_bytes()
    card, summary = files["README.md"].decode(), json.loads((tmp_path / "a" / "summary.json").read_text())
    assert "crosscoder" in front_matter(card)["tags"] and str(tmp_path) not in card
    assert f"| explained variance | {summary['explained_variance']:.4f} |" in card
    assert "- vanilla, 64 latents, 2 models of width 128, l1_coeff 2" in card
    assert "640 tokens of planted concepts" in card and 'CrossCoder.from_pretrained("me/planted")' in card
    bars = [line.split() for line in card.split("```")[1].strip().splitlines()]
    assert len(bars) == 10 and sum(int(bar[-1]) for bar in bars) == 64
    (tmp_path / "load.py").write_text(LOAD)
    run_script(tmp_path / "load.py", "me/planted", tmp_path / "loaded.pt", check=True, changed=changed)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    mine = CrossCoder.from_pretrained(tmp_path / "a" / "crosscoder").state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in mine.items())
    # a finished run goes there by --resume
    run_script("train.py", "--resume", tmp_path / "a", "--push-to-hub", "me/again", check=True, changed=changed)
    assert repositories["models/me/again"]["model.safetensors"] == files["model.safetensors"]
    # what was loaded once lies in the cache
    offline = os.environ | {name: value for name, value in changed if value} | {"HF_HUB_OFFLINE": "1"}
    run_script("formats.py", "me/planted", tmp_path / "cl", "--to", "crosscoder_learning", check=True, env=offline)
    assert torch.equal(read_crosscoder(tmp_path / "cl").W_dec, mine["W_dec"])


def test_a_collection_goes_on_with_the_commits_that_it_began_with(tiny, tmp_path, online):
    """The text and one model are on the Hub; both change there between the kill and the restart."""
    repositories, changed = online.repositories, online.changed
    texts = [json.dumps({"text": f"line {i} of a text that somebody wrote"}) for i in range(3000)]
    repositories["datasets/me/text"] = {"text.jsonl": "\n".join(texts).encode()}
    repositories["models/me/ft"] = {file.name: file.read_bytes() for file in Path(tiny["ft"]).iterdir()}
    flags = ["--base-model", tiny["base"], "--ft-model", "me/ft", "--hook", "model.layers.0.mlp", "--text", "me/text"]
    flags += ["--model-dtype", "float32", "--seq-len", 64, "--num-tokens", 60_000, "--output"]
    run_script("collect.py", *flags, tmp_path / "straight", check=True, changed=changed)
    process = Started(ROOT / "collect.py", *flags, tmp_path / "killed", changed=changed)
    while not (tmp_path / "killed" / "base" / "train" / "data-00001.arrow").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    repositories["datasets/me/text"] = {"text.jsonl": "\n".join(texts[1:]).encode()}
    repositories["models/me/ft"] = {file.name: file.read_bytes() for file in Path(tiny["base"]).iterdir()}
    run_script("collect.py", *flags, tmp_path / "killed", check=True, changed=changed)
    straight, killed = (sorted((tmp_path / name).rglob("*.arrow")) for name in ("straight", "killed"))
    assert len(straight) > 30 and [f.read_bytes() for f in straight] == [f.read_bytes() for f in killed]
    first, second = (json.loads((tmp_path / name / "pair.json").read_text()) for name in ("straight", "killed"))
    assert first["fingerprints"] == second["fingerprints"] and len(first["fingerprints"]["--text me/text"]) == 40
    assert first["revisions"] == [None, first["fingerprints"]["--ft-model"]]


def test_collection_goes_to_the_hub_and_is_trained_on_from_there(tiny, tmp_path, online):
    repositories, changed = online.repositories, online.changed
    flags = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", "model.layers.1.mlp", "--text", tiny["prose"]]
    flags += ["--model-dtype", "float32", "--seq-len", 64, "--num-tokens", 6000, "--output", tmp_path / "pair"]
    flags += ["--skip-first", 3, "--max-norm-ratio", 3]
    run_script("collect.py", *flags, check=True, changed=changed)
    printed = run_script("collect.py", *flags, "--push-to-hub", "me/acts", check=True, changed=changed).stdout
    assert "is complete" in printed and "pushed to me/acts" in printed
    files = repositories["datasets/me/acts"]
    card = files["README.md"].decode()
    assert [c["config_name"] for c in front_matter(card)["configs"]] == ["base", "ft", "tokens"]
    assert "- Hook: `model.layers.1.mlp`, width 64, float16" in card and str(tmp_path) not in card and tiny["base"] not in card
    small = ["--d-hidden", 64, "--batch-size", 256, "--wandb", "disabled", "--output-dir", tmp_path]
    run_script("train.py", "--dataset", "me/acts", *small, "--run-name", "hub", check=True, changed=changed)
    data = json.loads((tmp_path / "hub" / "config.json").read_text())["data"]
    here = open_pair(str(tmp_path / "pair"), (None, None), None, 131_072, 0)
    assert data["stored_scale"] == here.stored_scale.tolist() and data["train_rows"] == here.train_rows
    mean, _ = estimate_normalization(here, center=True)
    crosscoder = CrossCoder.from_pretrained(tmp_path / "hub" / "crosscoder")
    torch.testing.assert_close(crosscoder.mean, (mean / here.stored_scale[:, None]).float())  # the same rows

    # what its pair.json says is known to the analysis and to the card, as that of the folder is
    quick = ["--base-model", tiny["base"], "--ft-model", tiny["ft"], "--model-dtype", "float32", "--patch-tokens", 500]
    quick += ["--steer", "none", "--num-tokens", 1500, "--sections-per-class", 1, "--output"]
    run_script("analyze.py", tmp_path / "hub", *quick, tmp_path / "from_hub", check=True, changed=changed)
    run_script("analyze.py", tmp_path / "hub", *quick, tmp_path / "from_disk", "--dataset", tmp_path / "pair", check=True)
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("from_hub", "from_disk"))
    assert one["patching"] == other["patching"] and "first 3 positions" in one["patching"]["rule"]
    assert "above 3 times the median norm" in one["patching"]["rule"]
    one, other = ((tmp_path / name / "examples.jsonl").read_text() for name in ("from_hub", "from_disk"))
    assert one == other and '"prose.txt"' in one
    run_script("train.py", "--resume", tmp_path / "hub", "--push-to-hub", "me/crosscoder", check=True, changed=changed)
    assert "- Hook: `model.layers.1.mlp`\n" in repositories["models/me/crosscoder"]["README.md"].decode()

    # a Hub that does not answer is asked once: what is in the cache is trained on, the rest is refused
    with online.off():
        again = run_script("train.py", "--dataset", "me/acts", *small, "--run-name", "cache", check=True, changed=changed)
        flags = ["--base-dataset", "data/mine", "--ft-dataset", "data/mine", *small]
        refused = run_script("train.py", *flags, changed=changed)
    first, second = (load_file(tmp_path / run / "crosscoder" / "model.safetensors") for run in ("hub", "cache"))
    assert all(torch.equal(first[name], second[name]) for name in first) and "Retry" not in again.stderr
    assert "--base-dataset data/mine: cannot be opened" in (line := one_line_error(refused, "train.py"))
    assert "no such folder here, so it was taken for a Hub id" in line and "Retry" not in refused.stderr
    line = one_line_error(run_script("train.py", *flags, "--streaming", "--num-tokens", 640, changed=changed), "train.py")
    assert "--base-dataset data/mine: is no file or folder here, and the Hub does not give it" in line

    # --streaming: nothing but pair.json lands in the cache; killed and resumed it ends with the same weights
    shutil.rmtree(online.home)
    flags = ["--dataset", "me/acts", "--streaming", "--buffer-tokens", 1000, "--epochs", 2, "--save-every", 5, *small]
    out = run_script("train.py", *flags, "--run-name", "straight", check=True, changed=changed).stdout
    assert f"me/acts: {here.train_rows:,} rows streamed in fills of 500 rows" in out
    big = [path for path in Path(online.home).rglob("*") if path.is_file() and path.stat().st_size > 50_000]
    assert not big, big
    record = json.loads((tmp_path / "straight" / "config.json").read_text())
    assert record["data"]["stored_scale"] == data["stored_scale"] and record["data"]["train_rows"] == here.train_rows
    assert len(record["data"]["revisions"]) == 1 and record["resolved"]["num_tokens"] == 2 * here.train_rows
    process = Started(ROOT / "train.py", *flags, "--run-name", "killed", changed=changed)
    while len(complete(tmp_path / "killed")) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_script("train.py", "--resume", tmp_path / "killed", check=True, changed=changed)
    first, second = (load_file(tmp_path / run / "crosscoder" / "model.safetensors") for run in ("straight", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_names_of_the_data_are_escaped_in_cards(tmp_path):
    """Neither links, HTML or lines of their own, nor a base model that is no Hub id, for which the Hub refuses the card."""
    flags = ["--d-hidden", 64, "--num-tokens", 640, "--batch-size", 64, "--val-tokens", 256, "--wandb", "disabled"]
    run_script("train.py", *flags, "--output-dir", tmp_path, "--run-name", "a", check=True)
    record, summary = (json.loads((tmp_path / "a" / name).read_text()) for name in ("config.json", "summary.json"))
    hostile = "b/[x](http://y)\n# <img src=x>|`$e_1$`*"
    shown = r"b/\[x\](http://y) \# \<img src=x\>\|\`\$e\_1\$\`\*"
    record["resolved"] |= {"base_model": hostile, "ft_model": "/gone/secret folder/ft", "hook": "model`.\n# x"}
    card = model_card("me/x", record, summary, torch.ones(64, 2))
    assert f"- Base model: {shown}\n- Fine-tuned model: ft\n- Hook: `model'. # x`\n" in card
    assert "base_model" not in front_matter(card) and "secret" not in card
    record["resolved"] |= {"base_model": "google/gemma-2-2b", "ft_model": "me/x.y_z"}
    assert front_matter(model_card("me/x", record, summary, torch.ones(64, 2)))["base_model"] == [
        "google/gemma-2-2b",
        "me/x.y_z",
    ]
    pair = {"rows": {"train": 5}, "text": [{"source": hostile, "tokens": 1}], "d_model": 4, "dtype": "float16", "hook": "m"}
    card = dataset_card("me/x", pair | {"base_model": hostile, "ft_model": "me/x.y", "stored_scale": [1, 1]})
    assert card.count(shown) == 2 and len(front_matter(card)["configs"]) == 3


def test_what_the_hub_refuses_is_said_before_the_work_starts(tmp_path, online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    flags = ["--output-dir", tmp_path, "--run-name", "a", "--wandb", "disabled", "--push-to-hub"]
    refused = one_line_error(run_script("train.py", *flags, "me/x", changed=online.changed), "train.py")
    assert "--push-to-hub me/x: " in refused and "hf auth login" in refused
    with pytest.raises(ValueError, match="--push-to-hub x: .* give one as user/name"):
        open_repository("x", "model")
    assert not (tmp_path / "a").exists()


def test_a_path_that_looks_like_a_hub_id_is_asked_for_once(tmp_path, online, monkeypatch):
    (tmp_path / "runs").mkdir()
    for flags in (["formats.py", "runs/nothing", "out", "--to", "saelens"], ["train.py", "--init-from", "runs/nothing"]):
        asked = []
        monkeypatch.setattr(Hub, "log_message", lambda self, *_, asked=asked: asked.append(self.path))
        refused = one_line_error(run_script(*flags, cwd=tmp_path, changed=online.changed), flags[0])
        assert "runs/nothing: is no folder here, the folder runs here does not hold it, and the Hub does not give it" in refused
        assert "no such repository" in refused and len([path for path in asked if "runs/nothing" in path]) == 1


@pytest.mark.parametrize("flag", ["--dataset", "--base-dataset"])
def test_a_name_that_is_not_here_and_a_hub_that_hangs_up_end_in_one_line_soon(flag, tmp_path, online, monkeypatch):
    (tmp_path / "data" / "gemma").mkdir(parents=True)
    asked = []
    monkeypatch.setattr(Hub, "handle", lambda self: asked.append(self))
    flags = [flag, "data/gema", *(["--ft-dataset", "data/gema"] if flag == "--base-dataset" else [])]
    line = one_line_error(run_script("train.py", *flags, cwd=tmp_path, changed=online.changed), "train.py")
    assert f"{flag} data/gema: " in line and "folder here (is it data/gemma?)" in line
    assert 0 < len(asked) <= 2  # a connection that is closed at once is tried once more
