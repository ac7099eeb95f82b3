"""analyze.py where it is refused its input, stopped, killed or short of room, through its real command line."""

import json
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import ROOT, needs_mount, one_line_error, read_metrics, run_script
from processes import Started

import analyze
from config import AnalyzeConfig
from crosscoder import CrossCoder

# --- what is refused, and what is done without


def config(run, **options) -> AnalyzeConfig:
    flags = {"num_tokens": 2000, "patch_tokens": 500, "sections_per_class": 1} | options
    return AnalyzeConfig(run=str(run), **{name: str(v) if isinstance(v, Path) else v for name, v in flags.items()})


def test_what_cannot_be_analysed_is_one_line(capitals, tmp_path):
    run, crosscoder, data = capitals["run"], capitals["run"] / "crosscoder", capitals["data"]
    models = {"base_model": capitals["base"], "ft_model": capitals["ft"]}
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    narrow = Dataset.from_dict({"activation": [[0.0] * 8] * 20})
    narrow.save_to_disk(str(tmp_path / "narrow"))
    singles = {"base_dataset": tmp_path / "narrow", "ft_dataset": tmp_path / "narrow"}
    three = CrossCoder(64, 8, n_models=3)
    three.save_pretrained(tmp_path / "three")
    for wrong, message in (
        (config(tmp_path / "nowhere"), "no such folder"),
        (config(tmp_path / "unfinished"), r"train.py --resume"),
        (config(tmp_path / "narrow"), "holds no crosscoder"),
        (config(tmp_path / "three", dataset=data), "3 models"),
        (config(crosscoder), "--dataset is missing"),
        (config(run, latents="1,256"), "--latents 1,256: '256' is no latent of this crosscoder, which has 0 to 255"),
        (config(run, latents="x"), "--latents x"),
        (config(run, **singles), "--base-dataset: its activations have 8 values and the crosscoder takes 64"),
        (config(run, dataset=data, **singles), "leave out --base-dataset"),
        (config(run, base_dataset=tmp_path), "--base-dataset is given without --ft-dataset"),
        (config(run, base_model=capitals["base"]), "--base-model is given without --ft-model"),
        (config(run, base_model=tmp_path / "none", ft_model=capitals["ft"]), "--base-model .*no such folder"),
        (config(run, **models, hook="model.layers.9"), "--hook model.layers.9: .*0 to 3"),
        (config(run, **models, hook="model.layers.1.mlp.gate_proj"), "have 256 values, the crosscoder takes 64"),
        (config(run, num_tokens=0), "--num-tokens 0"),
        (config(run, device="cuda:77"), "--device cuda:77"),
        (config(run, output=data / "pair.json"), "--output .*cannot be written to"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            analyze.main(wrong)
    result = run_script("analyze.py", run, "--latents", "7,300")
    assert "'300' is no latent" in one_line_error(result, "analyze.py") and result.returncode == 1


def test_a_live_run_without_activations_says_what_it_needs(capitals, tmp_path):
    shutil.copytree(capitals["run"] / "crosscoder", tmp_path / "live" / "crosscoder")
    record = json.loads((capitals["run"] / "config.json").read_text())
    record["given"] |= {"dataset": None, "base_model": "a", "ft_model": "b"}
    (tmp_path / "live" / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="--dataset is missing: this run was trained live"):
        analyze.main(config(tmp_path / "live"))


def test_a_dataset_without_texts_is_analysed_without_examples(capitals, tmp_path):
    shutil.copytree(capitals["data"], tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "tokens")
    flags = {"dataset": tmp_path / "data", "base_model": capitals["base"], "ft_model": capitals["ft"]}
    analyze.main(config(capitals["run"], output=tmp_path / "out", **flags))
    metrics = read_metrics(tmp_path / "out")
    assert "no folder tokens/" in metrics["notes"][0] and "patching" not in metrics
    assert (tmp_path / "out" / "examples.jsonl").read_text() == ""


# --- stopped, killed, no room


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def analysing(capitals, out: Path, *flags) -> Started:
    """An analysis over a complete one of other numbers, which it must replace as a whole or not at all."""
    shutil.copytree(capitals["analysis"], out)
    quick = ["--num-tokens", 5000, "--sections-per-class", 2, "--output", out]
    return Started(ROOT / "analyze.py", capitals["run"], *quick, *flags)


def until(process: Started, true) -> None:
    while not true():
        assert process.poll() is None, process.output()
        time.sleep(0.002)


@pytest.mark.parametrize("stage", ["measuring", "patching", "writing"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_at_any_stage_an_analysis_leaves_the_one_before(capitals, tmp_path, stage, number):
    out, models = tmp_path / "out", capitals["models"] if stage == "patching" else []
    process = analysing(capitals, out, *models, "--patch-tokens", 80_000)
    until(process, lambda: "measuring" in process.output()[0])
    if stage == "patching":
        time.sleep(2)  # it takes some ten seconds; the measuring before it half a second
    if stage == "writing":
        until(process, (out / ".partial" / "figures").is_dir)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert "Traceback" not in errors and ("stopped" in errors) == (number != signal.SIGKILL)
    if number == signal.SIGKILL:
        shutil.rmtree(out / ".partial", ignore_errors=True)
    assert files(out) == files(capitals["analysis"])


def test_after_a_kill_the_next_analysis_is_whole(capitals, tmp_path):
    """Without patching it has a figure less than the one that it replaces."""
    process = analysing(capitals, tmp_path / "out")
    until(process, (tmp_path / "out" / ".partial" / "figures").is_dir)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert (tmp_path / "out" / ".partial").is_dir()
    (tmp_path / "out" / "figures" / "mine.png").write_text("of the user")
    analyze.main(config(capitals["run"], output=tmp_path / "out"))
    written = set(files(tmp_path / "out"))
    assert written == set(files(capitals["analysis"])) - {"figures/diffing.png", "figures/diffing.svg"} | {"figures/mine.png"}
    assert read_metrics(tmp_path / "out")["rows_validation"] == 2000


@pytest.mark.parametrize("most", [1000, 60_000, 150_000])  # at the numbers, the table, what is larger
def test_a_full_disk_leaves_the_analysis_before(capitals, tmp_path, most):
    process = analysing(capitals, tmp_path / "out")
    until(process, lambda: "measuring" in process.output()[0])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
    _, errors = process.communicate(timeout=60)
    message = one_line_error(subprocess.CompletedProcess([], process.returncode, "", errors), "analyze.py")
    assert (
        f"--output {tmp_path / 'out'}: the analysis cannot be written there (" in message
        and "File too large); make room" in message
    )
    assert files(tmp_path / "out") == files(capitals["analysis"])


@needs_mount
def test_a_read_only_folder_is_refused_before_the_measuring(capitals, tmp_path):
    flags = [ROOT / "analyze.py", capitals["run"], "--output", tmp_path]
    result = run_script("tests/mounted.py", f"mount -t tmpfs -o ro none {tmp_path}", *flags)
    message = one_line_error(result, "analyze.py")
    assert f"--output {tmp_path}: cannot be written to (Read-only file system)" in message and result.stdout == ""


def test_names_that_mean_something_to_those_who_read_them(capitals, tmp_path):
    """Models called $ and \\, and worse, are shown as they are called; so is a text."""
    names = {"base_model": r"/models/a$b_{c}\frac$^<i>&amp;", "ft_model": "/models/{{ 7 * 7 }}$$\n"}
    (tmp_path / "data").mkdir()
    for part in ("base", "ft", "tokens"):
        (tmp_path / "data" / part).symlink_to(capitals["data"] / part)
    pair = json.loads((capitals["data"] / "pair.json").read_text()) | names
    pair["text"][0]["source"] = "/texts/$x^{<script>"
    (tmp_path / "data" / "pair.json").write_text(json.dumps(pair))
    quick = ["--num-tokens", 3000, "--sections-per-class", 1, "--output", tmp_path / "out"]
    result = run_script("analyze.py", capitals["run"], "--dataset", tmp_path / "data", *quick, check=True)
    assert "Traceback" not in result.stderr
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert r"a$b_{c}\frac$^&lt;i&gt;&amp;amp; and {{ 7 * 7 }}$$" in page
    assert "<script>.txt" not in page and (tmp_path / "out" / "figures" / "relative_norm.svg").is_file()


def test_the_pass_over_all_latents_takes_memory_for_the_dictionary_alone():
    used = []
    for tokens in (1024, 4096):
        flags = ["--analysis", "--num-tokens", tokens, "--d-model", 64]
        printed = run_script("benchmarks/memory.py", *flags, check=True).stdout
        used.append(float(re.search(r"above them ([\d.]+) GB", printed)[1]))
    assert used[1] < 2 and used[1] < used[0] + 0.3, used  # both about 0.4
