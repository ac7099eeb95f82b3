"""analyze.py --label-url against a chat endpoint on this machine: what is asked, what becomes of the answers, what breaks."""

import gzip
import json
import re
import signal
import threading
import time
from pathlib import Path

import chat_server
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, one_line_error, open_pair, run_script, train
from processes import Started

from analysis import examples
from analysis.data import Data, open_text
from analysis.endpoint import GIVE_UP, KEY, Endpoint, Unanswered, read_cache
from crosscoder import CrossCoder
from sources.batches import read_kept

SECRET = "sk-test-4711-do-not-tell"
FEW = ["--num-tokens", 10_000, "--sections-per-class", 4, "--examples", 8, "--context", 8]


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory) -> Path:
    """A small crosscoder on the tiny models' activations."""
    sizes = ["--d-hidden", 64, "--batch-size", 512, "--num-tokens", 60_000, "--variant", "batch_topk", "--k", 4]
    return train(tmp_path_factory.mktemp("runs"), "a", "--dataset", pair, *sizes, "--wandb", "disabled")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def analyze(run, url, *flags, check=True):
    return run_script("analyze.py", run, *FEW, "--label-url", url, "--label-model", "stand-in", *flags, check=check)


def marked_tokens(one) -> list[str]:
    return [token.strip() for text in one.texts for token in re.findall(r"<<(.*?)>>", text, re.S)]


class Answers:
    """A labeller that names the tokens that were marked, with a number, and finds those texts that hold one of them."""

    def __init__(self):
        self.lock, self.known = threading.Lock(), {}

    def __call__(self, one):
        if one.kind == "probe":
            return "ready"
        if one.kind == "describe":
            with self.lock:
                description = f"pattern {len(self.known)} ".ljust(100, "x")  # as long as the stated cost takes it to be
                self.known[description] = {token for token in marked_tokens(one) if token}
            return "Here it is:\n```json\n" + json.dumps({"description": f"{description}\n"}) + "\n```"
        return json.dumps({"contains": self.verdicts(one)})

    def verdicts(self, one) -> list[int]:
        tokens = self.known[re.match("Description: (.*)", one.messages[1]["content"])[1]]
        return [int(any(token in text for token in tokens)) for text in one.texts]


@pytest.fixture(scope="module")
def labelled(run, tmp_path_factory):
    """An analysis with labels: its folder, what it printed, what was asked, and who answered."""
    answers, out = Answers(), tmp_path_factory.mktemp("labelled") / "out"
    patch = pytest.MonkeyPatch()
    patch.setenv(KEY, SECRET)
    with chat_server.serve(answers) as (url, asked):
        printed = analyze(run, url, "--output", out, "--export", "neuronpedia")
        yield out, printed, list(asked), answers
        patch.undo()


def read_sections(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]


# --- right answers


def test_every_section_is_described_and_scored_on_examples_it_was_not_shown(labelled):
    out, _, asked, answers = labelled
    table = pq.read_table(out / "latents.parquet").to_pydict()
    describe = {tuple(one.texts): one for one in asked if one.kind == "describe"}
    detect = [one for one in asked if one.kind == "detect"]
    sections = read_sections(out)
    assert len(sections) == len(describe) == len(answers.known) > 8
    scores = []
    for section in sections:
        label = section["label"]
        assert table["label"][section["latent"]] == label["description"] in answers.known
        texts = ["".join(e["tokens"]) for e in section["examples"]]
        mine = [one for one in detect if one.user.startswith(f"Description: {label['description']}\n")]
        tested = [(text, said) for one in mine for text, said in zip(one.texts, answers.verdicts(one), strict=True)]
        (shown,) = (
            {text.replace("<<", "").replace(">>", "") for text in one.texts}
            for one in describe.values()
            if {token for token in marked_tokens(one) if token} == answers.known[label["description"]]
            and one.texts[0].replace("<<", "").replace(">>", "") == texts[0]
        )
        assert shown <= set(texts) and not shown & {text for text, _ in tested}
        active = [said for text, said in tested if text in texts]
        silent = [1 - said for text, said in tested if text not in texts]
        assert len(active) == label["active_texts"] >= 4 and sum(active) == label["recognised"]
        assert len(active) >= len(silent) == label["silent_texts"] >= 3 and sum(silent) == label["rejected"]
        score = (np.mean(active) + np.mean(silent)) / 2
        assert label["score"] == pytest.approx(score, abs=1e-4) == table["label_score"][section["latent"]]
        scores.append(score)
    assert max(scores) > 0.7 and min(scores) < 1
    others = set(range(64)) - {section["latent"] for section in sections}
    assert others and all(table["label"][j] is None and np.isnan(table["label_score"][j]) for j in others)


def test_labels_stand_in_findings_screen_and_page(labelled):
    out, printed, asked, _ = labelled
    found = json.loads((out / "findings.json").read_text())
    table = pq.read_table(out / "latents.parquet").to_pydict()
    listed = [one for one in found["changes"] + found["nearest"] if one["label"]]
    assert listed and all(one["label"] == table["label"][one["latent"]] for one in listed)
    first = (found["changes"] or found["nearest"])[0]
    screen, page = (out / "findings.md").read_text(), (out / "report.html").read_text(encoding="utf-8")
    assert f"| {first['label']} | {first['label_score']:.2f} |" in screen and f"“{first['label']}”" in found["summary"][1]
    assert f"“{first['label']}”" in page and f"detection {first['label_score']:.2f}" in page
    metrics = json.loads((out / "metrics.json").read_text())["labels"]
    assert metrics["requests"] == len(asked) and metrics["tokens"] == 7 * len(asked)
    assert metrics["described"] == metrics["of"] == len(read_sections(out))
    stated = re.search(r"labels: ([\d,]+) requests to stand-in, about ([\d,]+) tokens; 0 are answered", printed.stdout)
    assert int(stated[1].replace(",", "")) == len(asked) - 1  # without the probe
    characters = sum(len(m["content"]) for one in asked[1:] for m in one.messages)
    assert int(stated[2].replace(",", "")) == characters // 4 + 30 * (len(asked) - 1)
    assert f"{metrics['described']} of {metrics['of']} latents by stand-in" in printed.stdout


def test_neuronpedia_gets_the_labels(labelled):
    out, *_ = labelled
    (batch,) = (out / "export" / "neuronpedia").glob("*/*/explanations/batch-0.jsonl.gz")
    lines = [json.loads(line) for line in gzip.decompress(batch.read_bytes()).decode().splitlines()]
    table = pq.read_table(out / "latents.parquet").to_pydict()
    assert len(lines) == len({line["id"] for line in lines}) == len(read_sections(out))
    assert all(line["description"] == table["label"][int(line["index"])] for line in lines)
    assert {(line["modelId"], line["layer"]) for line in lines} == {("ft", batch.parent.parent.name)}
    fields = {"id", "modelId", "layer", "index", "description", "authorId"}
    assert all(set(line) == fields for line in lines)


def test_a_dictionary_of_the_difference_is_labelled_and_exported_too(pair, tmp_path):
    sizes = ["--d-hidden", 64, "--batch-size", 512, "--num-tokens", 30_000, "--variant", "batch_topk", "--k", 4]
    run = train(tmp_path, "d", "--difference", "--dataset", pair, *sizes, "--wandb", "disabled")
    with chat_server.serve(Answers()) as (url, _):
        printed = analyze(run, url, "--export", "delphi", "--export", "neuronpedia").stdout
    out, sections = run / "analysis", read_sections(run / "analysis")
    table = pq.read_table(out / "latents.parquet")
    assert sections and all(table["label"][one["latent"]].as_py() == one["label"]["description"] for one in sections)
    assert list(json.loads(table.schema.metadata[b"definitions"])) == table.column_names
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count(f"“{sections[0]['label']['description']}”") == 2  # in the table and above its examples
    assert f"{len(sections)} of {len(sections)} latents by stand-in" in printed and printed.count("exported   ") == 2


def test_the_key_is_sent_and_written_nowhere(labelled):
    out, printed, asked, _ = labelled
    assert {one.key for one in asked} == {f"Bearer {SECRET}"} and {one.model for one in asked} == {"stand-in"}
    files = [path for path in out.rglob("*") if path.is_file()]
    assert (out / "label_cache.jsonl") in files and not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert SECRET not in printed.stdout + printed.stderr


def test_an_answer_is_paid_for_once(labelled, run):
    out, printed, asked, answers = labelled
    before = pq.read_table(out / "latents.parquet").to_pydict()
    with (out / "label_cache.jsonl").open("a") as cache:
        cache.write('\n{"key": "cut o')  # as a kill leaves it
    with chat_server.serve(answers) as (url, again):
        printed = analyze(run, url, "--output", out).stdout
        assert [one.kind for one in again] == ["probe"] and "labels: 0 requests to stand-in" in printed
        after = pq.read_table(out / "latents.parquet").to_pydict()
        assert after["label"] == before["label"] and f"{len(asked) - 1} are answered by" in printed
    messages = [{"role": "user", "content": "the same"}]
    keys = {Endpoint("http://a/v1", model, out / "label_cache.jsonl").key_of(messages) for model in ("one", "other")}
    assert len(keys) == 2  # another model's answers are not these


def test_a_killed_analysis_goes_on_where_it_was(run, tmp_path):
    answers = Answers()

    def slowly(one):
        time.sleep(0.02 if one.kind != "probe" else 0)
        return answers(one)

    with chat_server.serve(slowly) as (url, asked):
        process = Started(
            ROOT / "analyze.py", run, *FEW, "--label-url", url, "--label-model", "m", "--output", tmp_path / "out"
        )  # fmt: skip
        cache = tmp_path / "out" / "label_cache.jsonl"
        while process.poll() is None and (not cache.exists() or cache.read_text().count("\n") < 10):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "out" / "report.html").exists()
        first = {tuple(map(str, one.messages)) for one in asked}
        known = cache.read_text().count("\n")
        del asked[:]
        printed = run_script(
            "analyze.py", run, *FEW, "--label-url", url, "--label-model", "m", "--output", tmp_path / "out", check=True
        ).stdout  # fmt: skip
        twice = [one for one in asked if one.kind != "probe" and tuple(map(str, one.messages)) in first]
        assert len(twice) <= 8  # those that were under way
        assert f"{known} are answered by" in printed and all(section["label"] for section in read_sections(tmp_path / "out"))


# --- wrong answers, refusals, silence


def test_rate_limits_faults_and_wrong_json_are_overcome_and_one_latent_never_gets_any(run, tmp_path):
    """Each request is first met with 429 or 503, then with wrong JSON; the model has its own temperature alone."""
    answers, met, lost = Answers(), set(), []

    def careless(one):
        if one.temperature is not None:
            return 400, {}, {"error": {"message": "Unsupported value: 'temperature' does not support 0"}}
        if one.user not in met:
            met.add(one.user)
            return [(429, {"Retry-After": "0"}, {}), (503, {}, {"error": "overloaded"})][len(met) % 2]
        if one.kind == "describe" and (not lost or lost[0] == one.messages[1]["content"]):
            lost.append(one.messages[1]["content"])
            return "I would say it is about names."
        if len(one.messages) == 2 and one.kind != "probe":
            return ["", '{"description": 3}', '{"contains": [1]}', "{'contains': "][len(one.user) % 4]
        return answers(one)

    with chat_server.serve(careless) as (url, asked):
        printed = analyze(run, url, "--output", tmp_path / "out").stdout
    assert sum(one.temperature is not None for one in asked) == 1 and len(met) > 20
    sections = read_sections(tmp_path / "out")
    (without,) = (section for section in sections if section["label"] is None)
    assert len(lost) == 3 and all(len(section["label"]["description"]) > 5 for section in sections if section != without)
    assert f"1 of {len(sections)} latents have no label: three answers were not the JSON asked for" in printed
    table = pq.read_table(tmp_path / "out" / "latents.parquet").to_pydict()
    assert table["label"][without["latent"]] is None
    assert "about names" not in (tmp_path / "out" / "label_cache.jsonl").read_text()


def test_an_endpoint_that_stops_answering_costs_no_analysis(run, tmp_path):
    answers, count = Answers(), [0]

    def revoked(one):
        count[0] += 1
        return answers(one) if count[0] < 12 else (401, {}, {"error": {"message": f"Incorrect API key: {SECRET}"}})

    with chat_server.serve(revoked) as (url, asked):
        printed = analyze(run, url, "--output", tmp_path / "out", "--sections-per-class", 12)
    sections = read_sections(tmp_path / "out")
    missing = sum(section["label"] is None for section in sections)
    assert missing > 0 and (tmp_path / "out" / "report.html").exists() and len(asked) < 12 + 16
    assert f"{missing} of {len(sections)} latents have no label: refuses the key in {KEY} (status 401)" in printed.stdout
    assert SECRET not in printed.stdout + printed.stderr + (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {}, {"error": {"message": f"Incorrect API key provided: {SECRET}"}}), f"refuses the key in {KEY} (status 401)"),
        ((404, {}, {"error": {"message": f"no model stand-in for {SECRET}"}}), "status 404 (no model stand-in for ***)"),
        ((301, {"Location": "http://127.0.0.1:9/"}, {}), "answers with status 301"),
        ((200, {}, {"choices": []}), "holds no text at choices[0].message.content"),
        ((200, {}, b"<html>"), "holds no text at choices[0].message.content"),
        ((404, {}, b"<html>"), "answers with status 404 (Not Found)"),
        ((200, {}, "<html>"), "holds no text at choices[0].message.content"),
    ],
)
def test_an_endpoint_that_refuses_is_one_line_before_the_measuring(run, tmp_path, answer, said):
    with chat_server.serve(lambda one: answer) as (url, asked):
        result = analyze(run, url, "--output", tmp_path / "out", check=False)
    line = one_line_error(result, "analyze.py")
    assert line.startswith(f"analyze.py: error: --label-url {url}: ") and said in line and len(asked) == 1
    assert "measuring" not in result.stdout and SECRET not in result.stdout + result.stderr


def test_an_endpoint_that_is_down_is_one_line_before_the_measuring(run, tmp_path):
    with chat_server.serve(Answers()) as (url, _):
        pass
    result = analyze(run, url, "--output", tmp_path / "out", check=False)
    assert "Connection refused" in one_line_error(result, "analyze.py") and "measuring" not in result.stdout


def test_a_stop_does_not_wait_for_an_answer(run, tmp_path):
    hang = threading.Event()

    def silent(one):
        return "ready" if one.kind == "probe" else hang.wait(60) and ""

    with chat_server.serve(silent) as (url, asked):
        process = Started(
            ROOT / "analyze.py", run, *FEW, "--label-url", url, "--label-model", "m", "--output", tmp_path / "out"
        )  # fmt: skip
        while process.poll() is None and len(asked) < 5:
            time.sleep(0.01)
        begin = time.time()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143 and time.time() - begin < 10
        hang.set()


def test_silence_is_waited_for_and_then_given_up(tmp_path):
    calm = threading.Event()
    with chat_server.serve(lambda one: calm.wait(20) and "late") as (url, asked):
        endpoint = Endpoint(url, "m", tmp_path / "cache.jsonl", timeout=0.1, wait=0.001)
        endpoint.be_patient(total=5, read=2)
        for i in range(GIVE_UP):
            with pytest.raises(Unanswered, match="does not answer .*timed out"):
                endpoint.ask([{"role": "user", "content": str(i)}], str)
        assert len(asked) == 3 * GIVE_UP
        with pytest.raises(Unanswered, match="had stopped answering"):
            endpoint.ask([{"role": "user", "content": "more"}], str)
        assert len(asked) == 3 * GIVE_UP and not (tmp_path / "cache.jsonl").exists()
        calm.set()
        endpoint = Endpoint(url, "m", tmp_path / "cache.jsonl", timeout=5, wait=0.001)
        assert endpoint.ask([{"role": "user", "content": "0"}], str) == "late"
        with endpoint.cache.open("a") as cache:
            cache.write('\n{"key": "cut o')  # as a kill leaves it
        endpoint.ask([{"role": "user", "content": "1"}], str)
        assert len(read_cache(endpoint.cache)) == 2


def test_only_failures_in_a_row_are_given_up_on(tmp_path):
    with chat_server.serve(lambda one: (503, {}, {}) if one.user.startswith("bad") else "yes") as (url, _):
        endpoint = Endpoint(url, "m", tmp_path / "cache.jsonl")
        endpoint.be_patient(total=0)
        for i in range(GIVE_UP + 1):
            with pytest.raises(Unanswered, match="answers with status 503"):
                endpoint.ask([{"role": "user", "content": f"bad {i}"}], str)
            assert endpoint.ask([{"role": "user", "content": f"good {i}"}], str) == "yes"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--label-url", "http://127.0.0.1:9/v1"], "--label-url is given without --label-model"),
        (["--label-model", "m"], "--label-model is given without --label-url"),
        (["--label-url", "ftp://127.0.0.1:9/v1", "--label-model", "m"], "must begin with http:// or https://"),
        (["--label-url", "http:///v1", "--label-model", "m"], "must begin with http:// or https://"),
        (["--label-url", "127.0.0.1:9", "--label-model", "m"], "must begin with http:// or https://"),
        (["--label-url", f"http://me:{SECRET}@127.0.0.1:9", "--label-model", "m"], "must not hold a key"),
        (["--label-url", f"http://127.0.0.1:9/?key={SECRET}", "--label-model", "m"], "must not hold a key"),
    ],
)
def test_flags_that_cannot_be_are_one_line(run, flags, said):
    line = one_line_error(run_script("analyze.py", run, *flags), "analyze.py")
    assert said in line and SECRET not in line


def test_a_key_that_cannot_be_one_is_not_repeated(run, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, f"{SECRET}\n{SECRET}")
    line = one_line_error(analyze(run, "http://127.0.0.1:9", "--output", tmp_path, check=False), "analyze.py")
    assert f"{KEY}: holds characters that no key has" in line and SECRET not in line


def test_data_without_texts_has_no_labels(tmp_path):
    planted = train(tmp_path, "planted", "--d-hidden", 64, "--num-tokens", 2000, "--wandb", "disabled", "--val-tokens", 256)
    result = run_script("analyze.py", planted, "--label-url", "http://127.0.0.1:9/v1", "--label-model", "m")
    assert "planted concepts has no texts" in one_line_error(result, "analyze.py") and "measuring" not in result.stdout


# --- what is asked


def test_silent_texts_are_silent(pair, run, monkeypatch):
    """Of each latent, against its codes of all stored rows."""
    crosscoder = CrossCoder.from_pretrained(run / "crosscoder")
    source = open_pair(str(pair), (None, None), None, 10**9, 0)
    data = Data(source, str(pair), open_text(str(pair), source), 4000, 6000)
    assert data.first_train == source.val_rows > 4000
    names = lambda text, found, *_: [[f"{w.sequence} {w.start} {w.peak + 8}"] for w in found]  # noqa: E731
    monkeypatch.setattr(examples, "window_texts", names)
    found = examples.silent_windows(crosscoder, data, np.arange(64), None, wanted=6, context=8, seed=1)
    f, place = [], []
    for split, first, count in (("validation", 0, source.val_rows), ("train", data.first_train, source.train_rows)):
        kept, x = read_kept(source, split, np.arange(count))
        with torch.no_grad():
            f.append(crosscoder.encode(x / source.stored_scale.float()[:, None]).numpy())
        place += [(int(data.text.sequence[r + first]), int(data.text.position[r + first])) for r in kept]
    f, place = np.concatenate(f), np.array(place)
    counts = []
    for latent, texts in enumerate(found):
        counts.append(len(texts))
        for text in texts:
            sequence, start, end = map(int, text.split())
            inside = (place[:, 0] == sequence) & (place[:, 1] >= start) & (place[:, 1] <= end)
            assert inside.any() and (f[inside, latent] == 0).all()
    assert max(counts) == 6 and len({text for texts in found for text in texts}) > 6
