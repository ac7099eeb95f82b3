"""Does a latent cause what it was found on? What the models answer with its direction added or taken away, against random ones.

A latent has a row d in the raw activations of the model that has more of it, and a typical activation u, the mean over the
tokens at which it is active. factor * u * d is added to the activation of the model that has less of it, and taken from the
activation of the model that has more: both towards the other model. The vector is the same at every token, as in the latent
steering of diffing-toolkit (science-of-finetuning) and in activation addition (Turner et al., arXiv 2308.10248); what the
latent's own activation at each token carries is measured in `patching`.

Effects, over the other model's own answers: the KL divergence from the other model, and the log-probability of its answer, in
nats a token; and how many new answers show a behaviour. Random latents that are scaled to the same length say what any vector
of that length does.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.data import Data
from analysis.patching import answer_starts, position_losses
from collecting import steered_model
from collecting.chat import answer_marker, format_question
from collecting.earlier_blocks import run_once
from crosscoder import CrossCoder
from run.machine import progress_bar

FACTORS = (1, 1.4, 1.7, 2.8)  # of the typical activation: more breaks the text, whatever the direction
CONTROLS = 19  # random latents: to do more than all of them is a chance of 1 in 20
TOLD = 5  # of these, whose answers are counted for a behaviour; without one the first's are generated, to be read
CHANCE = 0.05  # at which a latent would pass for more than random
PROMPTS, TOKENS = 8, 24  # prompts taken from a dataset; tokens of an answer
OPENING, LONGEST = 16, 128  # tokens of a prompt from plain text; of one from a chat at most
FIRST = 3  # latents that are steered with when none are named


class Prompt(NamedTuple):
    text: str
    ids: list[int]


# --- prompts


def as_prompts(texts: list[str], tokenizer, chat: bool = False) -> list[Prompt]:
    """Prompts as `collect.py` would tokenize their texts. chat: they are a user's turns, which the template is put around."""
    found = []
    for text in texts:
        ids = tokenizer(format_question(tokenizer, text) if chat else text, add_special_tokens=False).input_ids
        bos = tokenizer.bos_token_id
        found.append(Prompt(text, ids if bos is None or ids[:1] == [bos] else [bos, *ids]))
    return found


def dataset_prompts(data: Data, tokenizer, wanted: int = PROMPTS) -> list[Prompt]:
    """The first user's turns of held-out chats, where there are none the openings of held-out texts; from each text in turn."""
    marker = answer_marker(tokenizer) if data.pair.get("chat_template") else None
    skip_first, text = data.pair.get("skip_first", 1), data.text
    asked: dict[int, list[list[int]]] = {}
    opened: dict[int, list[list[int]]] = {}
    for sequence in np.unique(text.sequence[: text.held_out]):
        of, ids = int(text.text_of[sequence]), text.tokens(sequence).tolist()
        starts = answer_starts(ids, marker) if marker else []
        if starts and skip_first < starts[0] <= LONGEST:
            asked.setdefault(of, []).append(ids[: starts[0]])
        if len(ids) > skip_first + OPENING:
            opened.setdefault(of, []).append(ids[: skip_first + OPENING])
        if sum(map(len, asked.values() if marker else opened.values())) >= 8 * wanted * len(text.names):
            break
    queues, found = list((asked or opened).values()), []
    while len(found) < wanted and (queues := [queue for queue in queues if queue]):
        for queue in queues:
            found += [ids] if (ids := queue.pop(0)) not in found else []
    return [Prompt(tokenizer.decode(ids[skip_first:], skip_special_tokens=True).strip(), ids) for ids in found[:wanted]]


# --- what is added


def direction(crosscoder: CrossCoder, table, latents: list[int], instead: list[int] | None = None) -> Tensor:
    """[d_model] raw: a factor of 1 of these latents together, to be added to the base and taken from the fine-tuned model.

    table: columns mean_act and direction, as for `steer`. instead: as many other latents, whose rows stand in for theirs, each
    with the other's length.
    """
    rows = crosscoder.W_dec.detach() / crosscoder.scale[:, None]  # [d_hidden, n_models, d_model]
    typical, longer = np.asarray(table["mean_act"]), np.asarray(table["direction"]) == "ft"
    own, total = torch.zeros_like(rows[0, 0]), torch.zeros_like(rows[0, 0])
    for latent, other in zip(latents, instead or latents, strict=True):
        of = -1 if longer[latent] else 0
        sign = 1 if longer[latent] else -1
        row, used = rows[latent, of] * float(typical[latent]), rows[other, of]
        own += sign * row
        total += sign * used * (row.norm() / used.norm().clamp_min(1e-30))
    return total * (own.norm() / total.norm().clamp_min(1e-30))


def draw_controls(table, latents: list[int], count: int, seed: int) -> list[list[int]]:
    """`count` sets of as many random live latents, of the half ranked last where it has enough: what is about the change but by
    too little to be called changed is mostly in the other half."""
    live, rank = np.flatnonzero(~np.asarray(table["dead"])), np.asarray(table["rank"])
    others = np.setdiff1d(live, latents)
    last = others[rank[others] > np.median(rank[live])]
    pool = np.random.default_rng(seed).permutation(last if len(last) >= count else others)
    return np.resize(pool, (min(count, len(pool)), len(latents))).tolist()


# --- what it does


def effects(
    model: tuple, other: tuple, prompts: list[list[int]], told: list[list[int]], vectors: Tensor, rows: int, bar, **how
) -> Tensor:
    """[n, 2] float64 mean log-probability of the other model's answers, and KL from the other model, with each of n vectors.

    model, other: (model, hook). told: the other model's answers. vectors: [n, d_model]. rows: sequences in a forward pass.
    """
    totals = torch.zeros(len(vectors), 2, dtype=torch.float64)
    for start in range(0, len(prompts), rows):
        asked, answered = prompts[start : start + rows], told[start : start + rows]
        reference = steered_model.answer_logits(
            *other, asked, answered, torch.zeros_like(vectors[:1]).expand(len(asked), -1), **how
        )
        targets = torch.tensor(sum(answered, []), device=reference.device)
        together = max(1, rows // len(asked))
        found = []
        with run_once(*model):
            for some in (vectors[:1], *vectors[1:].split(together)):  # the first by itself: a whole pass is of each prompt once
                logits = steered_model.answer_logits(
                    *model, asked * len(some), answered * len(some), some.repeat_interleave(len(asked), 0), **how
                )
                found += [position_losses(one, reference, targets).sum(0).cpu() for one in logits.split(len(targets))]
                bar.update(len(some) * len(asked))
        totals += torch.stack(found)
    return totals * torch.tensor([-1.0, 1.0]) / max(1, sum(map(len, told)))


def generate(model: tuple, prompts: list[list[int]], vectors: Tensor, rows: int, bar, **how) -> list[list[list[int]]]:
    """[n][prompts] answers with each of n vectors [n, d_model]."""
    found, every = [], vectors.repeat_interleave(len(prompts), 0)
    asked = prompts * len(vectors)
    for start in range(0, len(asked), rows):
        part, before = slice(start, start + rows), bar.n
        share = len(asked[part]) / how["tokens"]
        found += steered_model.answers(*model, asked[part], every[part], after_token=lambda n=share: bar.update(n), **how)
        bar.update(before + len(found[part]) - bar.n)
    return [found[i : i + len(prompts)] for i in range(0, len(found), len(prompts))]


@torch.no_grad()
def steer(  # noqa: PLR0913 - settings, given by name
    models: list[tuple], crosscoder: CrossCoder, table, groups: list[list[int]], prompts: list[Prompt], tokenizer, *,
    factors: tuple[float, ...] = FACTORS, tokens: int = TOKENS, controls: int = CONTROLS, behaviour: str | None = None,
    answer_alone: bool = False, skip_first: int = 1, rows: int = 32, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """What steering does: a line for each group of latents (which are added together), model and factor.

    docs/data.md describes the columns, which are the keys of steering.jsonl. Example:

        >>> table = pandas.read_parquet("runs/caps/analysis/latents.parquet")
        >>> steer(models, crosscoder, table, [[12], [99]], as_prompts(["def main("], tokenizer), tokenizer)

    Args:
        models: (model, hook) of the base and of the fine-tuned one: causal models of transformers, plain or wrapped by nnsight,
            on one device; hook as "model.layers.13".
        table: columns mean_act, direction, dead and rank of latents.parquet, [d_hidden] each.
        groups: latents to steer with, each group together.
        behaviour: a regular expression; an answer shows the behaviour where it is found.
        answer_alone: steer from the last token of a prompt on, not from position `skip_first`.
        rows: sequences in a forward pass.
    """
    ids, place = [prompt.ids for prompt in prompts], crosscoder.W_dec.device
    known = steered_model.known_tokens([model for model, _ in models])
    if strange := [prompt.text for prompt in prompts if max(prompt.ids) >= known]:
        raise ValueError(f"--prompts: {strange[0]!r} holds a token that one of the models does not know; leave it out")
    sets = [[group, *draw_controls(table, group, controls, seed + i)] for i, group in enumerate(groups)]
    added = [
        torch.stack([direction(crosscoder, table, group, one) for one in each])  # [1 + controls, d_model]
        for group, each in zip(groups, sets, strict=True)
    ]
    how = {"skip_first": skip_first, "answer_alone": answer_alone}
    nothing, shown = torch.zeros(1, crosscoder.d_model, device=place), re.compile(behaviour) if behaviour else None
    told_of = min(1 + (TOLD if shown else 1), *map(len, sets))
    total = 2 * len(ids) * (2 + len(factors) * sum(len(one) + told_of for one in sets))
    lines = []
    with progress_bar("steering", total) as bar:
        told = [generate(model, ids, nothing, rows, bar, tokens=tokens, **how)[0] for model in models]
        texts = [[tokenizer.decode(answer, skip_special_tokens=True) for answer in answers] for answers in told]
        told = [[list(itertools.takewhile(lambda token: token < known, answer)) for answer in answers] for answers in told]
        for m, name in enumerate(("base", "ft")):
            sign, other = 1 - 2 * m, 1 - m
            asked = torch.cat([nothing, *(sign * factor * vectors for vectors in added for factor in factors)])
            found = effects(models[m], models[other], ids, told[other], asked, rows, bar, **how).numpy()
            ends = 1 + np.cumsum([len(factors) * len(vectors) for vectors in added])
            for group, each, vectors, end in zip(groups, sets, added, ends, strict=True):
                mine = found[end - len(factors) * len(each) : end].reshape(len(factors), len(each), 2)
                said = generate(
                    models[m], ids, torch.cat([sign * factor * vectors[:told_of] for factor in factors]), rows, bar,
                    tokens=tokens, **how,
                )  # fmt: skip
                said = [[tokenizer.decode(a, skip_special_tokens=True) for a in answers] for answers in said]
                common = {"latents": group, "model": name, "random": each[1:], "norm": vectors[0].norm().item()}
                lines += describe(common, prompts, texts[m], texts[other], factors, found[0], mine, said, shown)
    return pd.DataFrame(lines)


def describe(  # noqa: PLR0913 - what `steer` has measured
    common: dict, prompts: list[Prompt], before_texts: list[str], other_texts: list[str], factors: tuple[float, ...],
    before: np.ndarray, found: np.ndarray, said: list[list[str]], shown: re.Pattern | None,
) -> list[dict]:  # fmt: skip
    """The lines of one group in one model.

    before: [2] log-probability and KL without steering; found: [factors, 1 + controls, 2] with it; the latents come first, then
    their controls. said: [factors * told][prompts] in the same order.
    """
    told, lines = len(said) // len(factors), []

    def rate(answers: list[str]) -> float | None:
        return sum(bool(shown.search(answer)) for answer in answers) / len(answers) if shown and answers else None

    for i, factor in enumerate(factors):
        own, *random = said[i * told : (i + 1) * told]
        each = zip(prompts, before_texts, own, random[0] if random else own, other_texts, strict=True)
        names = ("prompt", "unsteered", "steered", "random", "other")
        line = {"factor": factor, "norm": common["norm"] * factor}
        for k, name in enumerate(("logprob", "kl")):
            line |= {f"{name}_before": before[k], name: found[i, 0, k], f"{name}_random": found[i, 1:, k].tolist()}
        line |= {"shown_before": rate(before_texts), "shown": rate(own), "shown_random": rate(sum(random, []))}
        line |= {"shown_other": rate(other_texts)}
        lines.append(common | line | {"answers": [dict(zip(names, (one[0].text, *one[1:]), strict=True)) for one in each]})
    return lines


# --- what is said of it


def more_often(shown: int, of: int, random_shown: int, random_of: int) -> float:
    """Fisher's exact test, one-sided: the chance that so many or more of the answers show it, were all answers alike."""
    both, most = shown + random_shown, min(of, shown + random_shown)
    ways = sum(math.comb(of, k) * math.comb(random_of, both - k) for k in range(shown, most + 1))
    return ways / math.comb(of + random_of, both)


def summarise(lines: list[dict]) -> list[dict]:
    """For each group of latents {"latents", "base", "ft", "beyond_random"}: each model's line at the factor that did most.

    Most: the smallest KL, or with a behaviour the rate that moved towards the other model's by most more than with random ones.

    beyond_random: in one of the models the KL fell more than with all controls, each at its own best factor (with 19 that is a
    chance of 1 in 20), or the behaviour's rate moved towards the other model's by more than the controls' answers explain
    (Fisher's exact test at 5 %, times the factors).
    """
    found: dict[tuple, dict] = {}
    for line in lines:
        found.setdefault(tuple(line["latents"]), {}).setdefault(line["model"], []).append(line)
    return [
        {"latents": list(latents), **(told := {name: best(of) for name, of in models.items()}),
         "beyond_random": any(one["beyond_random_kl"] or one["beyond_random_shown"] for one in told.values())}
        for latents, models in found.items()
    ]  # fmt: skip


def beyond_random(line: dict, up: bool) -> float:
    """How much further the latents moved the behaviour's rate, up or down, than the random ones moved it either way."""
    own, random = ((line[name] or 0) - line["shown_before"] for name in ("shown", "shown_random"))
    return (own if up else -own) - (0 if line["shown_random"] is None else abs(random))


def best(lines: list[dict]) -> dict:
    """What `summarise` says of one model: the numbers of its best line, the controls' as their mean."""
    before, count = lines[0]["kl_before"], len(lines[0]["answers"])
    closed = before - np.array([[line["kl"], *line["kl_random"]] for line in lines]).min(0)  # [1 + controls]
    as_much = int((closed[1:] >= closed[0]).sum())
    told = {"random_as_much": as_much, "controls": len(closed) - 1}
    told["beyond_random_kl"] = bool(closed[0] > 0 and 1 + as_much <= CHANCE * len(closed))
    told["beyond_random_shown"] = False
    line = min(lines, key=lambda line: line["kl"])
    if line["shown"] is not None:
        up = (lines[0]["shown_other"], lines[0]["model"] == "base") > (lines[0]["shown_before"], False)
        line = min(lines, key=lambda line: (-beyond_random(line, up), line["kl"]))
        of = min(TOLD, len(line["random"])) * count
        rates = [line[name] if up else 1 - line[name] for name in ("shown", "shown_random") if line[name] is not None]
        p = more_often(round(rates[0] * count), count, round(rates[-1] * of), of)
        moved = line["shown"] != line["shown_before"] != line["shown_other"]  # where both show it alike there is no towards
        told["beyond_random_shown"] = p * len(lines) <= CHANCE and moved
    means = {
        f"{name}_random": float(np.mean(line[f"{name}_random"])) if line[f"{name}_random"] else None
        for name in ("kl", "logprob")
    }
    kept = (
        "factor",
        "norm",
        "kl_before",
        "kl",
        "logprob_before",
        "logprob",
        "shown_before",
        "shown",
        "shown_random",
        "shown_other",
    )
    return {name: line[name] for name in kept} | means | told
