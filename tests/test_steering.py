"""Steering: through analyze.py on a fine-tune whose change is known, and every addition against plain forward hooks."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CHATML, HOOK, ROOT, one_line_error, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis import steering
from collecting import chat, earlier_blocks, steered_model
from crosscoder import CrossCoder

CAPITALS = r"\A[^a-z]+\Z"  # no other letter
ASKED = ["THE NAME OF THE CLASS IS", "IF THE VALUE IS NOT", "def main(self, name", "import os", "AN OBJECT OF THIS TYPE"]


def read_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "steering.jsonl").read_text().splitlines()]


def plain_model(path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def models(capitals) -> list[tuple]:
    return [(plain_model(capitals[name]), HOOK) for name in ("base", "ft")]


@pytest.fixture(scope="module")
def tokenizer(capitals):
    return AutoTokenizer.from_pretrained(capitals["base"])


# --- what is added, against hooks of torch


@torch.no_grad()
def logits_by_hand(model, hook: str, ids: list[int], vector: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """[seq, vocabulary] of one sequence, the vector added at the positions `where` by a hook of torch."""
    extra = where[None, :, None] * vector
    module = model.get_submodule(hook.removesuffix(".input").removesuffix(".output"))
    if hook.endswith(".input"):
        handle = module.register_forward_pre_hook(lambda module, args: (args[0] + extra, *args[1:]))
    else:
        handle = module.register_forward_hook(
            lambda module, args, out: (out[0] + extra, *out[1:]) if isinstance(out, tuple) else out + extra
        )
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits


@pytest.mark.parametrize("hook", [HOOK, "model.layers.1.mlp.output", "model.layers.2.mlp.input", "model.layers.1.self_attn"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_vector_is_added_where_it_says_and_nowhere_else(models, tokenizer, hook, alone):
    model, prompts = models[0][0], [prompt.ids for prompt in steering.as_prompts(ASKED, tokenizer)]
    draw = torch.Generator().manual_seed(0)
    vectors = 3 * torch.randn(len(prompts), 64, generator=draw)
    vectors[1] *= -1
    told = [torch.randint(3, 900, (3 + i,), generator=draw).tolist() for i in range(len(prompts))]
    found = steered_model.answer_logits(model, hook, prompts, told, vectors, skip_first=2, answer_alone=alone)
    expected = []
    for prompt, answer, vector in zip(prompts, told, vectors, strict=True):
        where = torch.arange(len(prompt + answer)) >= (len(prompt) - 1 if alone else 2)
        expected.append(logits_by_hand(model, hook, prompt + answer, vector, where)[len(prompt) - 1 : -1])
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)
    plain = model(input_ids=torch.tensor([prompts[0] + told[0]])).logits[0, len(prompts[0]) - 1 : -1]
    assert not torch.allclose(found[: len(told[0])], plain, atol=0.1)


@pytest.mark.parametrize("alone", [False, True])
def test_generation_steers_every_token_in_turn(models, tokenizer, alone):
    """Left padding and the cache of earlier tokens, against one sequence at a time, all of it computed anew for each token."""
    model, prompts = models[1][0], [prompt.ids for prompt in steering.as_prompts(ASKED, tokenizer)]
    vectors = 0.5 * torch.randn(len(prompts), 64, generator=torch.Generator().manual_seed(1))
    found = steered_model.answers(model, HOOK, prompts, vectors, tokens=6, skip_first=3, answer_alone=alone)
    for prompt, vector, answer in zip(prompts, vectors, found, strict=True):
        told = []
        while len(told) < 6 and told[-1:] != [tokenizer.eos_token_id]:
            where = torch.arange(len(prompt + told)) >= (len(prompt) - 1 if alone else min(3, len(prompt) - 1))
            told.append(int(logits_by_hand(model, HOOK, prompt + told, vector, where)[-1].argmax()))
        assert answer == told


def test_without_strength_the_models_say_what_they_say(models, tokenizer):
    prompts = [prompt.ids for prompt in steering.as_prompts(ASKED, tokenizer)]
    found = steered_model.answers(*models[0], prompts, torch.zeros(len(prompts), 64), tokens=12, skip_first=1)
    for prompt, answer in zip(prompts, found, strict=True):
        told = models[0][0].generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert answer == told


def test_an_answer_ends_with_its_end_token(models, tokenizer, monkeypatch):
    """Some answers of a batch end before others; what comes after an end is padding."""
    model, prompts = models[0][0], [prompt.ids for prompt in steering.as_prompts(ASKED, tokenizer)]
    nothing = torch.zeros(len(prompts), 64)
    whole = steered_model.answers(model, HOOK, prompts, nothing, tokens=8, skip_first=1)
    end = whole[1][3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, end])
    found = steered_model.answers(model, HOOK, prompts, nothing, tokens=8, skip_first=1)
    assert found == [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole]
    assert len(found[1]) <= 4 and max(map(len, found)) == 8


@pytest.mark.parametrize("hook", [HOOK, "model.layers.1.mlp.output", "model.layers.2.input", "model.layers.1.self_attn"])
@torch.no_grad()
def test_the_blocks_before_the_hook_run_once(models, tokenizer, hook):
    """The answers' logits are those of whole passes, and the first blocks see one pass only."""
    model, prompts = models[0][0], [prompt.ids for prompt in steering.as_prompts(ASKED, tokenizer)]
    told = [[5 + i] * (3 + i) for i in range(len(prompts))]
    vectors = torch.randn(3, len(prompts), 64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    ask = lambda some: steered_model.answer_logits(  # noqa: E731
        model, hook, prompts * len(some), told * len(some), some.flatten(0, 1), skip_first=2
    )
    whole, passes = torch.cat([ask(vectors[:1]), ask(vectors[1:])]), []
    watched = model.get_submodule("model.layers.0.input_layernorm").register_forward_hook(lambda *_: passes.append(1))
    with earlier_blocks.run_once(model, hook):
        passes.clear()  # those of the check
        found = torch.cat([ask(vectors[:1]), ask(vectors[1:])])
    assert len(passes) == 1
    assert torch.allclose(found, whole, atol=1e-4) and not torch.allclose(
        whole[: len(whole) // 3], whole[-len(whole) // 3 :], atol=0.1
    )
    assert torch.equal(ask(vectors[:1]), whole[: len(whole) // 3]) and len(passes) == 2  # and as before afterwards
    watched.remove()


def test_a_hook_that_no_pass_reaches_is_named(models):
    with pytest.raises(ValueError, match="--hook model.layers: a forward pass does not reach it"):
        steered_model.answers(models[0][0], "model.layers", [[1, 5]], torch.zeros(1, 64), tokens=2, skip_first=1)


def test_the_direction_is_the_longer_row_in_raw_activations_with_its_typical_length(capitals):
    crosscoder = CrossCoder.from_pretrained(capitals["run"] / "crosscoder")
    table = pd.read_parquet(capitals["analysis"] / "latents.parquet")
    live = table[~table["dead"]]
    ft, base = (int(live[live["direction"] == of]["latent"].iloc[0]) for of in ("ft", "base"))
    typical = table["mean_act"].to_numpy()
    x = torch.zeros(1, crosscoder.d_hidden)
    for latent, model, sign in ((ft, 1, 1), (base, 0, -1)):
        x[0, latent] = float(typical[latent])
        written = (crosscoder.decode(x) - crosscoder.decode(0 * x))[0, model].detach()  # as the crosscoder itself writes it
        found = steering.direction(crosscoder, table, [latent])
        assert torch.allclose(found, sign * written, atol=1e-5)
        x[0, latent] = 0
    both = steering.direction(crosscoder, table, [ft, base])
    parts = steering.direction(crosscoder, table, [ft]) + steering.direction(crosscoder, table, [base])
    assert torch.allclose(both, parts, atol=1e-6)
    for control in steering.draw_controls(table, [ft, base], 19, seed=0):
        assert not {ft, base} & set(control) and not table["dead"][control].any()
        assert (table["rank"][control] > live["rank"].median()).all()
        assert steering.direction(crosscoder, table, [ft, base], control).norm() == pytest.approx(both.norm().item(), rel=1e-5)
    assert len({tuple(one) for one in steering.draw_controls(table, [ft], 19, seed=0)}) == 19


def test_a_planted_cause_is_found(capitals, tokenizer):
    """The fine-tuned model is the base model with a vector towards capitals added: a factor of 2 of latent 0 is that vector."""
    base, ft = (plain_model(capitals["base"]) for _ in range(2))
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    upper = torch.tensor([text.strip().isalpha() and text.isupper() for text in texts])
    towards = (base.lm_head.weight[upper].mean(0) - base.lm_head.weight.mean(0)).detach()
    crosscoder = CrossCoder(64, 40, seed=1)  # rows of random directions
    with torch.no_grad():
        crosscoder.scale.copy_(torch.tensor([2.0, 4.0]))
        crosscoder.W_dec[0, 1] = towards / towards.norm()
    table = {
        "mean_act": np.full(40, 10.0),
        "direction": np.full(40, "ft"),
        "dead": np.zeros(40, bool),
        "rank": 1 + np.arange(40),
    }
    vector = 2 * 10.0 * crosscoder.W_dec[0, 1].detach() / 4
    ft.get_submodule(HOOK).register_forward_hook(lambda module, args, out: out + vector)
    asked = ["def main(self, name", "import os", "for line in lines:", "return self", "    if not", "class A", "while", "x = ["]
    prompts = steering.as_prompts([*asked, "def __init__(self, file", "try:\n    import", "raise", "assert len(x)"], tokenizer)
    lines = steering.steer(
        [(base, HOOK), (ft, HOOK)],
        crosscoder,
        table,
        [[0], [1]],
        prompts,
        tokenizer,
        factors=(1, 2),
        behaviour=CAPITALS,
        tokens=8,
        skip_first=0,
    ).to_dict("records")
    exact = [line for line in lines if line["latents"] == [0] and line["factor"] == 2]
    assert [line["model"] for line in exact] == ["base", "ft"]
    for line in exact:
        assert line["kl"] < 1e-4 < 0.5 < line["kl_before"]
        assert [one["steered"] for one in line["answers"]] == [one["other"] for one in line["answers"]]
    planted, other = steering.summarise(lines)
    for one in (planted["base"], planted["ft"]):
        assert one["beyond_random_kl"] and one["beyond_random_shown"] and one["random_as_much"] == 0
        assert one["shown"] == one["shown_other"] and abs(one["shown"] - one["shown_before"]) > 0.5
        assert abs(one["shown_random"] - one["shown"]) > 0.5
    assert (
        planted["beyond_random"] and other["base"]["kl"] > 0.7 * other["base"]["kl_before"]
    )  # one latent that is random itself


# --- through the command line


def test_what_is_steered_by_itself(capitals):
    """The fixture names no latents: the first three by rank together, with prompts from the held-out texts."""
    lines, found = read_lines(capitals["analysis"]), json.loads((capitals["analysis"] / "findings.json").read_text())
    first = [one["latent"] for one in (found["changes"] + found["nearest"])[:3]]
    groups = [first]
    told = [(line["latents"], line["model"], line["factor"]) for line in lines]
    assert told == [(g, m, f) for m in ("base", "ft") for g in groups for f in steering.FACTORS]
    data = json.loads((capitals["analysis"] / "metrics.json").read_text())
    assert found["steering"] == data["steering"] and [one["latents"] for one in found["steering"]["latents"]] == groups
    assert found["steering"]["prompts"] == steering.PROMPTS
    assert all(one["steering"] is None for one in found["changes"])  # none was steered with alone
    page = (capitals["analysis"] / "report.html").read_text(encoding="utf-8")
    assert '<h2 id="steering">' in page and page.count('class="pairs"') == 8 * len(groups) * 2
    named = ", ".join(map(str, first))
    assert re.search(rf"^steering   {named}: base, KL to ft [\d.]+ -> [\d.]+ \(random [\d.]+\)", capitals["printed"], re.M)
    assert any(sentence.startswith("Steered with ") for sentence in found["summary"])


def test_the_numbers_of_a_line_equal_a_direct_computation(capitals, models, tokenizer):
    """KL and log-probability of each answer token by plain hooks, for a line of the fixture's analysis, in both models."""
    crosscoder = CrossCoder.from_pretrained(capitals["run"] / "crosscoder")
    table = pd.read_parquet(capitals["analysis"] / "latents.parquet")
    prompts = steering.as_prompts(ASKED[:3], tokenizer)
    latent = int(table[table["changed"] & (table["rank"] == 1) & (table["direction"] == "ft")]["latent"].iloc[0])
    lines = steering.steer(models, crosscoder, table, [[latent]], prompts, tokenizer, factors=(2,), tokens=5, controls=2)
    vector = 2 * table["mean_act"][latent] * crosscoder.W_dec[latent, 1].detach() / crosscoder.scale[1]
    for m, line in enumerate(lines.to_dict("records")):
        (mine, _), (other, _) = models[m], models[1 - m]
        kl, logprob = [], []
        for prompt, answers in zip(prompts, line["answers"], strict=True):
            own = other.generate(torch.tensor([prompt.ids]), max_new_tokens=5, do_sample=False)[0, len(prompt.ids) :].tolist()
            assert answers["other"] == tokenizer.decode(own, skip_special_tokens=True)
            ids, where = prompt.ids + own, torch.arange(len(prompt.ids + own)) >= 1
            steered = logits_by_hand(mine, HOOK, ids, (1 - 2 * m) * vector, where)[len(prompt.ids) - 1 : -1].log_softmax(-1)
            reference = logits_by_hand(other, HOOK, ids, 0 * vector, where)[len(prompt.ids) - 1 : -1].log_softmax(-1)
            kl += (reference.exp() * (reference - steered)).sum(-1).tolist()
            logprob += steered.gather(-1, torch.tensor(own)[:, None])[:, 0].tolist()
        assert line["kl"] == pytest.approx(np.mean(kl), rel=1e-3)
        assert line["logprob"] == pytest.approx(np.mean(logprob), rel=1e-3)
        assert line["norm"] == pytest.approx(vector.norm().item(), rel=1e-5)
        assert len(line["kl_random"]) == len(line["logprob_random"]) == 2 and line["kl_random"][0] != line["kl"]


def test_latents_of_capitals_cause_capitals(capitals, tmp_path):
    """The latents that are most active on the fine-tune's text, with prompts that both models go on differently with."""
    table = pd.read_parquet(capitals["analysis"] / "latents.parquet")
    live = table[table["changed"] & (table["direction"] == "ft")]
    chosen = live.sort_values("mean_text_1", ascending=False)["latent"].iloc[:3].tolist()
    (tmp_path / "prompts.txt").write_text("\n".join(ASKED[:2] + ASKED[4:] + ["RETURN THE", "A LIST OF ALL", "IN THIS CASE"]))
    flags = ["--prompts", tmp_path / "prompts.txt", "--behaviour", CAPITALS, "--steer", ",".join(map(str, chosen))]
    flags += ["--patch-tokens", 500, "--num-tokens", 3000, "--sections-per-class", 1, "--output", tmp_path / "out"]
    run_script("analyze.py", capitals["run"], *capitals["models"], *flags, check=True)
    findings = json.loads((tmp_path / "out" / "findings.json").read_text())
    found, own = findings["steering"]["latents"], {one["latent"]: one["steering"] for one in findings["changes"]}
    assert [group["latents"] for group in found] == [*([latent] for latent in chosen), chosen]
    alone = dict(zip(chosen, found[:3], strict=True))
    assert any(own.values()) and own == {latent: alone.get(latent) for latent in own}
    base, ft = ([group[name] for group in found] for name in ("base", "ft"))
    assert any(one["kl"] < one["kl_before"] < one["kl_random"] for one in base)  # 2.007 < 2.035 < 2.070
    together = ft[3]  # the best one alone: 2 or 3 of 6 answers in capitals, as the crosscoder falls, random ones 23 or 24 of 30
    assert together["shown_before"] > 0.8 and together["shown"] < together["shown_random"] - 0.3  # none, random latents all
    assert any(group["beyond_random"] for group in found)  # six prompts may be too few for the rate alone


def test_the_same_model_twice_is_moved_by_nothing(capitals, tmp_path):
    models = ["--base-model", capitals["base"], "--ft-model", capitals["base"], "--model-dtype", "float32"]
    flags = ["--patch-tokens", 500, "--num-tokens", 3000, "--sections-per-class", 1, "--output", tmp_path / "out"]
    done = run_script("analyze.py", capitals["run"], *models, *flags, "--behaviour", CAPITALS, check=True)
    found = json.loads((tmp_path / "out" / "findings.json").read_text())["steering"]
    assert len(found["latents"]) == 1
    for group in found["latents"]:
        assert not group["beyond_random"] and group["base"]["kl_before"] == pytest.approx(0, abs=1e-6)
        assert group["base"]["kl"] > 0 and group["ft"]["kl"] > 0
    assert done.stdout.count("no more than random") == 1
    assert (tmp_path / "out" / "report.html").read_text().count("<td>no more than random</td>") == 2


def test_only_the_answer_is_steered_where_asked_and_nothing_with_none(capitals, tmp_path):
    flags = ["--patch-tokens", 500, "--num-tokens", 3000, "--sections-per-class", 1, "--output", tmp_path / "out"]
    asked = [{"prompt": "<script>alert(1)</script> {{ 7 * 7 }}"}, {"messages": [{"from": "human", "value": "THE\nCLASS"}]}]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, asked)))
    steer = ["--steer", "3,9,3", "--steer-at", "answer", "--prompts", tmp_path / "prompts.jsonl"]
    run_script("analyze.py", capitals["run"], *capitals["models"], *flags, *steer, check=True)
    lines, n = read_lines(tmp_path / "out"), len(steering.FACTORS)
    assert [line["latents"] for line in lines[: 3 * n : n]] == [[3], [9], [3, 9]] and len(lines) == 6 * n
    assert [one["prompt"] for one in lines[0]["answers"]] == ["<script>alert(1)</script> {{ 7 * 7 }}", "THE\nCLASS"]
    assert lines[0]["shown"] is None
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; {{ 7 * 7 }}" in page
    run_script("analyze.py", capitals["run"], *capitals["models"], *flags, "--steer", "none", check=True)
    assert read_lines(tmp_path / "out") == [] and '"steering"' not in (tmp_path / "out" / "findings.json").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steer", "3,256"], "--steer 3,256: '256' is no latent of this crosscoder, which has 0 to 255"),
        (["--steer", ""], "--steer: names no latent"),
        (["--behaviour", "(["], "--behaviour ([: is no regular expression (unterminated character set at position 1)"),
        (["--prompts", "EMPTY.txt"], "holds no prompt; give one a line"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read"),
        (["--prompts", "BROKEN.jsonl"], "line 2 has no `prompt`, nor `messages` of a user"),
    ],
)
def test_what_cannot_be_steered_is_one_line_before_any_work(capitals, tmp_path, flags, message):
    (tmp_path / "EMPTY.txt").write_text("\n \n")
    (tmp_path / "BROKEN.jsonl").write_text('{"prompt": "a"}\n{"messages": [{"role": "assistant", "content": "b"}]}\n')
    flags = [str(tmp_path / flag) if flag.isupper() or flag[:5].isupper() else flag for flag in flags]
    result = run_script("analyze.py", capitals["run"], *capitals["models"], *flags)
    assert message in one_line_error(result, "analyze.py") and result.stdout == ""
    without = run_script("analyze.py", capitals["run"], *flags)
    assert f"{flags[0]} is given without --base-model and --ft-model" in one_line_error(without, "analyze.py")


# --- prompts


def test_chats_give_user_turns_and_texts_give_openings(tiny, tmp_path):
    turns = lambda i: [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i + 1} or so."}]  # noqa: E731
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": turns(i)}) for i in range(300)))
    flags = ["--text", tiny["code"], "--text", tmp_path / "chats.jsonl", "--no-pack", "--seq-len", 64, "--chat-template"]
    run_script(
        "collect.py", "--base-model", tiny["base"], "--ft-model", tiny["ft"], "--hook", HOOK, *flags, "--num-tokens", 4000,
        "--val-tokens", 1000, "--model-dtype", "float32", "--output", tmp_path / "data", check=True,
    )  # fmt: skip
    from analysis.data import open_data
    from config import TrainConfig

    data = open_data(TrainConfig(dataset=str(tmp_path / "data")), None, CrossCoder(64, 8), 1 << 30, [])
    tokenizer = AutoTokenizer.from_pretrained(tiny["ft"])
    prompts = steering.dataset_prompts(data, tokenizer)
    assert len(prompts) == steering.PROMPTS and len({prompt.text for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        asked = re.fullmatch(r"user: (What is \d+\?)\s+assistant:", prompt.text)
        assert asked and prompt.ids == steering.as_prompts([asked[1]], tokenizer, chat=True)[0].ids
    data.source.pair["chat_template"] = False
    opened = steering.dataset_prompts(data, tokenizer)
    assert all(len(prompt.ids) == 1 + steering.OPENING for prompt in opened) and len(opened) == steering.PROMPTS


def test_a_question_ends_where_its_answer_begins(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny["ft"])
    assert chat.format_question(tokenizer, "Why?") == "user: Why?<eos>\nassistant:"  # the template does not open an answer
    tokenizer.chat_template = CHATML + "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
    assert chat.format_question(tokenizer, "Why?") == "<bos>user\nWhy?<eos>\n<bos>assistant\n"


# --- from Python


def test_the_documented_calls_run(capitals, tmp_path, monkeypatch, capsys):
    """Every block of the section in docs/data.md, in the order and under the names that the README's example gives them."""
    section = (ROOT / "docs" / "data.md").read_text().split("## From Python")[1].split("\n## ")[0]
    for name, target in {"runs/caps": capitals["run"], "data/caps": capitals["data"], "tiny/base": capitals["base"],
                         "tiny/caps": capitals["ft"]}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, names)
    table, ranked, lines = names["table"], names["ranked"], names["lines"]
    assert names["x"].shape == (20_000, 2, 64) and len(ranked) == len(table) and len(lines) == 2 * 2 * len(steering.FACTORS)
    both = ~table["dead"] & ranked["change_score"].notna()
    assert np.corrcoef(ranked["change_score"][both], table["change_score"][both])[0, 1] > 0.95  # of a quarter of the rows
    first = ranked[ranked["changed"] & (ranked["direction"] == "ft")].sort_values("rank").index[:5]
    assert table["changed"][first].all() and ranked.attrs["cut"] == pytest.approx(names["ranked"].attrs["center"], abs=0.5)
    assert "shown" in capsys.readouterr().out


# --- what is said of it


def test_more_often_is_fishers_exact_test():
    assert steering.more_often(3, 4, 1, 4) == pytest.approx(17 / 70)  # the lady tasting tea
    assert steering.more_often(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert steering.more_often(0, 8, 0, 16) == 1 and steering.more_often(8, 8, 16, 16) == 1


def test_a_latent_counts_only_beyond_its_controls():
    def line(kl, random, shown=None, shown_random=None, factor=1):
        return {"latents": [1], "model": "base", "factor": factor, "norm": 1.0, "random": [[0]] * len(random), "kl_before": 1.0,
                "kl": kl, "kl_random": random, "logprob_before": -1.0, "logprob": -1.0, "logprob_random": random,
                "shown_before": 0.0, "shown": shown, "shown_random": shown_random, "shown_other": 1.0,
                "answers": [{}] * 8}  # fmt: skip

    worse = [1.1] * 18
    assert steering.best([line(0.9, [*worse, 0.95])])["beyond_random_kl"]
    assert not steering.best([line(0.9, [*worse, 0.85])])["beyond_random_kl"]
    assert not steering.best([line(0.9, [*worse, 1.2]), line(2.0, [*worse, 0.85], factor=2)])["beyond_random_kl"]
    assert not steering.best([line(1.05, [1.2] * 19)])["beyond_random_kl"]  # does harm, if less than the others
    assert not steering.best([line(0.9, worse[:5])])["beyond_random_kl"]  # too few to tell
    told = steering.best([line(1.2, [1.3] * 19, 0.1, 0.0), line(1.5, [1.0] * 19, 1.0, 0.0, factor=4)])
    assert told["beyond_random_shown"] and told["factor"] == 4 and not told["beyond_random_kl"]
    assert not steering.best([line(1.2, [1.3] * 19, 0.25, 0.1)])["beyond_random_shown"]
