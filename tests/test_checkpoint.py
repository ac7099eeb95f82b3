import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from run import checkpoint
from run.machine import as_json


def tensors(value=1.0, d_hidden=6):
    return {
        "enc_rows": torch.full((d_hidden, 2, 3), value),
        "W_dec": torch.full((d_hidden, 2, 3), value),
        "b_enc": torch.zeros(d_hidden),
        "b_dec": torch.zeros(2, 3),
        "tokens_since_fired": torch.arange(d_hidden),
        "enc_rows.adam_exp_avg": torch.rand(d_hidden, 2, 3),
    }


def test_round_trip(tmp_path):
    written, state = tensors(), {"position": 12, "seconds": 0.1 + 0.2, "wandb_id": None}
    folder = checkpoint.write(tmp_path, 7, written, state, keep=2, d_hidden=6)
    assert folder == tmp_path / "checkpoints" / "step_00000007" and checkpoint.find(tmp_path) == folder
    read, read_state = checkpoint.read(folder)
    assert read_state == {"step": 7} | state
    assert read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in written)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}  # nothing that could run code


def test_tensors_with_a_latent_axis_are_joined_from_slices(tmp_path):
    """As several processes would write them: one file for each range of latents."""
    from safetensors.torch import load_file, save_file

    written = tensors()
    folder = checkpoint.write(tmp_path, 1, written, {}, keep=1, d_hidden=6)
    index = json.loads((folder / "index.json").read_text())
    whole = load_file(folder / index["slices"][0]["file"])
    assert set(whole) == set(written) - {"b_dec"}
    for start, stop in ((4, 6), (0, 4)):
        part = {n: t[start:stop].contiguous() for n, t in whole.items()}
        save_file(part, folder / f"part{start}.safetensors")
    index["slices"] = [{"file": f"part{start}.safetensors", "start": start, "stop": stop} for start, stop in ((4, 6), (0, 4))]
    checkpoint.write_index(folder, {name: part for name, part in index.items() if "checksum" not in name})
    read, _ = checkpoint.read(folder)
    assert all(torch.equal(read[name], written[name]) for name in written)
    some, _ = checkpoint.read(folder, slice(2, 5))
    assert all(torch.equal(some[name], t if name == "b_dec" else t[2:5]) for name, t in written.items())


def test_only_the_newest_are_kept_and_later_steps_of_another_past_go(tmp_path):
    for step in (10, 20, 30):
        checkpoint.write(tmp_path, step, tensors(), {}, keep=2, d_hidden=6)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000020", "step_00000030"]
    checkpoint.write(tmp_path, 25, tensors(), {}, keep=2, d_hidden=6)  # the run was resumed from step 20
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000020", "step_00000025"]
    checkpoint.write(tmp_path, 25, tensors(2.0), {}, keep=1, d_hidden=6)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000025"]
    assert checkpoint.read(checkpoint.find(tmp_path))[0]["enc_rows"][0, 0, 0] == 2.0


def test_a_users_own_copies_are_left_alone(tmp_path):
    folder = checkpoint.write(tmp_path, 1, tensors(), {}, keep=1, d_hidden=6)
    copy, archive = folder.with_name("step_00000001_mine"), folder.with_name("step_00000001.tar")
    copy.mkdir()
    archive.write_bytes(b"")
    assert checkpoint.complete(tmp_path) == [folder]
    checkpoint.write(tmp_path, 2, tensors(), {}, keep=1, d_hidden=6)
    assert copy.exists() and archive.exists() and not folder.exists()


def test_a_checkpoint_can_be_named_from_inside_its_folder(tmp_path, monkeypatch):
    folder = checkpoint.write(tmp_path, 1, tensors(), {}, keep=1, d_hidden=6)
    monkeypatch.chdir(folder)
    assert checkpoint.find(Path(".")) == folder and checkpoint.find(Path("../..")) == folder


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    checkpoint.write(tmp_path, 1, tensors(), {}, keep=2, d_hidden=6)
    (tmp_path / "checkpoints" / ".step_00000002.partial").mkdir()
    assert checkpoint.find(tmp_path).name == "step_00000001"
    checkpoint.write(tmp_path, 3, tensors(), {}, keep=2, d_hidden=6)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("broken", ["index.json", "state.json", "shared.safetensors", "latents_0_6.safetensors"])
def test_broken_checkpoints_are_named(tmp_path, broken):
    folder = checkpoint.write(tmp_path, 1, tensors(), {}, keep=1, d_hidden=6)
    content = (folder / broken).read_bytes()
    (folder / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"step_00000001 is broken .*--resume the run's folder") as error:
        checkpoint.read(folder)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_format_is_refused_by_its_number(tmp_path):
    """Not passed over as damaged: an older checkpoint of the same run would silently take its place."""
    checkpoint.write(tmp_path, 1, tensors(), {}, keep=2, d_hidden=6)
    folder = checkpoint.write(tmp_path, 2, tensors(), {}, keep=2, d_hidden=6)
    (folder / "index.json").write_text('{"format": 3, "another layout": 1}')
    for refused in (lambda: checkpoint.find(tmp_path), lambda: checkpoint.read(folder)):
        with pytest.raises(ValueError, match="step_00000002 has the format 3 and this code reads 2"):
            refused()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="no such run"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.find(tmp_path)


def test_a_full_disk_raises_at_once_and_leaves_the_last_checkpoint(tmp_path):
    """A real limit: the process may not write files above 64 KB."""
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from run import checkpoint
from pathlib import Path
small = dict(enc_rows=torch.ones(6, 2, 3), b_enc=torch.ones(6))
large = dict(enc_rows=torch.ones(600, 2, 300), b_enc=torch.ones(600))
checkpoint.write(Path({str(tmp_path)!r}), 1, small, {{}}, keep=1, d_hidden=6)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    checkpoint.write(Path({str(tmp_path)!r}), 2, large, {{}}, keep=1, d_hidden=600)
except OSError as error:
    print("refused:", error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "refused: the checkpoint of step 2 could not be written" in result.stdout, result.stderr
    assert "GB free" in result.stdout and "earlier checkpoints are untouched" in result.stdout
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]
    checkpoint.read(checkpoint.find(tmp_path))


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    lines = [json.dumps({"step": s, "loss": 0.1}) for s in (1, 5, 10)]
    end_of_a_shorter_run = '\n{"step": 5, "val_loss": 0.2}\n{}\n[]\n'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + end_of_a_shorter_run + '{"step": 11, "lo')
    checkpoint.cut_metrics(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:2]) + "\n"
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_numbers_that_json_lacks_become_null():
    values = {"a": float("nan"), "b": {"c": -float("inf"), "d": 1.5, "e": "x"}}
    assert json.loads(as_json(values)) == {"a": None, "b": {"c": None, "d": 1.5, "e": "x"}}


def test_optimizer_and_random_states_round_trip(tmp_path):
    def model():
        torch.manual_seed(0)
        net = torch.nn.ParameterDict({"enc_rows": torch.randn(6, 2, 3), "b_enc": torch.randn(6), "b_dec": torch.randn(2, 3)})
        return net, torch.optim.Adam(net.parameters(), lr=0.1, fused=True)

    def steps(net, optimizer, n):
        for _ in range(n):
            noise = torch.randn(())
            sum((p * noise).pow(2).sum() for p in net.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, optimizer = model()
    steps(straight, optimizer, 5)
    first, optimizer = model()
    steps(first, optimizer, 3)
    saved = dict(first.state_dict()) | checkpoint.step_tensors(optimizer, first)
    folder = checkpoint.write(tmp_path, 3, saved, {}, keep=1, d_hidden=6)
    torch.manual_seed(99)
    second, optimizer = model()
    loaded, _ = checkpoint.read(folder)
    second.load_state_dict({n: loaded[n] for n, _ in second.named_parameters()})
    checkpoint.restore_step_tensors(optimizer, second, loaded)
    assert not [name for name in loaded if "exp_avg" in name]  # memory does not hold them twice
    steps(second, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
