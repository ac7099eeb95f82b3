"""One line of words for each section's latent, from a language model behind a chat endpoint, and how well that line holds.

Description and detection as in Paulo et al., arXiv 2410.13928: the labeller sees examples with the active tokens marked and
describes them; then it sees unmarked ones that it was not shown, among texts on which the latent is silent, and says which of
them fit the description.
"""

from __future__ import annotations

import json
import random
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.data import Data
from analysis.endpoint import THREADS, Endpoint, Unanswered, found_json
from analysis.examples import silent_windows
from crosscoder import CrossCoder
from run.machine import progress_bar, say

SHOWN_TOGETHER = 5  # texts in one request of detection, as in delphi
MARKED = 0.3  # share of an example's largest activation from which a token is marked, as in delphi
LEAST = 3  # active and silent texts that a score needs of each
WORDS = 200  # characters of a description
COLUMNS = {
    "label": "what the latent is active on, in the words of a language model (--label-url), from some of its examples",
    "label_score": "detection: how well that model tells texts with the latent, none of which it was shown, from texts without "
    "it, by the label alone; balanced accuracy, 0.5 is chance (arXiv 2410.13928)",
}
DESCRIBE = """You study the features of a language model. Below are texts on which one feature is active. The tokens on which
it is active stand between << and >>; the strength of each text goes from 1 to 10. Say in one line, at most 20 words,
what these tokens or their contexts have in common, so specifically that a reader could find more such texts. Name a token
itself if it is always the same. Do not mention the marks, the strengths or the word feature.
Answer with JSON alone: {"description": "..."}"""
DETECT = """You will be given a description of what some texts contain, and numbered texts. For each text say 1 if it contains
what is described and 0 if not. About half of them may.
Answer with JSON alone, one number for each text in their order: {"contains": [0, 1, ...]}"""


class Job(NamedTuple):
    """What is asked about one latent."""

    section: dict  # gets the label
    shown: list[dict]  # examples to describe
    texts: list[str]  # to tell apart, in a random order
    truth: list[int]  # [len(texts)] 1 where the latent is active


def open_labeller(url: str | None, model: str | None, folder: Path, data: Data, tokenizer) -> Endpoint | None:
    """The endpoint, asked once whether it answers, or None without --label-url. ValueError if nothing can be labelled."""
    if not url or not model:
        return None
    if data.text is None or tokenizer is None:
        missing = "texts" if data.text is None else "tokenizer; name one with --base-model and --ft-model"
        raise ValueError(f"--label-url: latents are described from their texts, and {data.name} has no {missing}")
    endpoint = Endpoint(url, model, folder / "label_cache.jsonl")
    endpoint.probe()
    return endpoint


# --- what is asked


def split_examples(section: dict) -> tuple[list[dict], list[dict]]:
    """The examples to describe and those held out: every other one, less what shares text with one shown."""
    shown, held_out = section["examples"][::2], section["examples"][1::2]
    seen = {"".join(e["tokens"]) for e in shown}
    taken = {place for e in shown for place in places(e)}
    return shown, [e for e in held_out if "".join(e["tokens"]) not in seen and taken.isdisjoint(places(e))]


def places(e: dict) -> list[tuple[int, int]]:
    """Sequence and position of each token of an example."""
    start = e["position"] - e["peak"]
    return [(e["sequence"], start + i) for i in range(len(e["tokens"]))]


def make_job(section: dict, silent: list[str], seed: int) -> Job:
    """silent: texts on which the latent is at no token active; as many are used as there are held-out ones."""
    shown, held_out = split_examples(section)
    pairs = [("".join(e["tokens"]), 1) for e in held_out] + [(text, 0) for text in silent[: len(held_out)]]
    random.Random(f"{seed} {section['latent']}").shuffle(pairs)
    return Job(section, shown, [text for text, _ in pairs], [fits for _, fits in pairs])


def marked(e: dict, most: float) -> str:
    """An example on one line: how strong it is, from 1 to 10, and its text with the active tokens between marks."""
    least, text, inside = MARKED * (e["values"][e["peak"]] or 0), "", False
    for i, (token, value) in enumerate(zip(e["tokens"], e["values"], strict=True)):
        active = i == e["peak"] or (value or 0) > least
        text += (">>" if inside and not active else "") + ("<<" if active and not inside else "") + token
        inside = active
    strength = max(1, round(10 * (e["values"][e["peak"]] or 0) / most))
    return f"(strength {strength}) " + json.dumps(text + ">>" * inside, ensure_ascii=False)


def description_messages(job: Job) -> list[dict]:
    most = max(e["values"][e["peak"]] or 0 for e in job.section["examples"]) or 1
    said = [f"{i}. {marked(e, most)}" for i, e in enumerate(job.shown, 1)]
    for model, name in (("base", "the base model"), ("ft", "its fine-tuned version")):
        if lens := job.section.get("lens"):
            tokens = json.dumps([token for token, _ in lens[model]["more"]], ensure_ascii=False)
            said.append(f"In {name} it raises the next tokens {tokens}")
    return [{"role": "system", "content": DESCRIBE}, {"role": "user", "content": "\n".join(said)}]


def detection_messages(description: str, texts: list[str]) -> list[dict]:
    said = [f"Description: {description}", *(f"{i}. {json.dumps(t, ensure_ascii=False)}" for i, t in enumerate(texts, 1))]
    return [{"role": "system", "content": DETECT}, {"role": "user", "content": "\n".join(said)}]


def read_description(text: str) -> str:
    said = found_json(text)
    said = said.get("description") if isinstance(said, dict) else None
    if not isinstance(said, str) or not said.strip():
        raise ValueError("no description")
    return " ".join("".join(c if c.isprintable() else " " for c in said).split())[:WORDS]


def read_verdicts(text: str, count: int) -> list[int]:
    said = found_json(text)
    said = said.get("contains") if isinstance(said, dict) else said
    if not isinstance(said, list) or len(said) != count or any(one not in (0, 1) for one in said):
        raise ValueError("not one 0 or 1 a text")
    return [int(one) for one in said]


# --- asking


def label(endpoint: Endpoint, job: Job) -> dict:
    """The label of a latent: `description`, `score`, and of the texts with and without it how many were told right."""
    description = endpoint.ask(description_messages(job), read_description)
    right: dict[int, list[bool]] = {1: [], 0: []}
    for start in range(0, len(job.texts), SHOWN_TOGETHER):
        texts, truth = (of[start : start + SHOWN_TOGETHER] for of in (job.texts, job.truth))
        said = endpoint.ask(detection_messages(description, texts), partial(read_verdicts, count=len(texts)))
        for verdict, fits in zip(said, truth, strict=True):
            right[fits].append(verdict == fits)
    active, silent = right[1], right[0]
    score = (np.mean(active) + np.mean(silent)) / 2 if min(len(active), len(silent)) >= LEAST else None
    return {
        "description": description, "score": None if score is None else round(float(score), 4),
        "active_texts": len(active), "recognised": sum(active), "silent_texts": len(silent), "rejected": sum(silent),
    }  # fmt: skip


def cost(endpoint: Endpoint, jobs: list[Job]) -> tuple[int, int, int]:
    """(requests, about how many tokens, requests answered by the cache) that these jobs take."""
    asked = []
    for job in jobs:
        first = description_messages(job)
        description = endpoint.recall(first, read_description) or "x" * 100
        starts = range(0, len(job.texts), SHOWN_TOGETHER)
        asked += [first, *(detection_messages(description, job.texts[i : i + SHOWN_TOGETHER]) for i in starts)]
    new = [one for one in asked if endpoint.key_of(one) not in endpoint.known]
    characters = sum(len(message["content"]) for one in new for message in one)
    return len(new), characters // 4 + 30 * len(new), len(asked) - len(new)


def add_labels(
    endpoint: Endpoint | None, sections: list[dict], crosscoder: CrossCoder, data: Data, tokenizer, context: int, seed: int,
    notes: list[str],
) -> dict:  # fmt: skip
    """Give each section with examples its `label`, None where none could be had. Returns what metrics.json says of it."""
    with_examples = [section for section in sections if section["examples"]]
    if endpoint is None or not with_examples:
        return {}
    wanted = max(len(section["examples"]) for section in with_examples)
    chosen = np.array([section["latent"] for section in with_examples])
    silent = silent_windows(crosscoder, data, chosen, tokenizer, wanted=wanted, context=context, seed=seed)
    jobs = [make_job(section, texts, seed) for section, texts in zip(with_examples, silent, strict=True)]
    new, tokens, old = cost(endpoint, jobs)
    say(f"labels: {new:,} requests to {endpoint.model}, about {tokens:,} tokens; {old:,} are answered by {endpoint.cache}")
    faults: list[str] = []

    def work(job: Job) -> None:
        try:
            job.section["label"] = label(endpoint, job)
        except Unanswered as error:
            job.section["label"] = None
            faults.append(str(error))

    with ThreadPool(THREADS) as pool, progress_bar("labels", len(jobs)) as bar:
        for _ in pool.imap_unordered(work, jobs):
            bar.update()
    if faults:
        notes.append(f"{len(faults)} of {len(jobs)} latents have no label: {faults[0]}; the same command asks again")
    labels = [job.section["label"] for job in jobs if job.section["label"]]
    scores = [one["score"] for one in labels if one["score"] is not None]
    return {"labels": {
        "model": endpoint.model, "described": len(labels), "of": len(jobs), "requests": endpoint.requests,
        "tokens": endpoint.tokens or None, "median_score": float(np.median(scores)) if scores else None,
    }}  # fmt: skip


def told(metrics: dict) -> str:
    """A line of the printed summary, empty without labels."""
    if not (one := metrics.get("labels")):
        return ""
    score = "" if one["median_score"] is None else f", median detection score {one['median_score']:.2f}"
    tokens = f", {one['tokens']:,} tokens" if one["tokens"] else ""
    return (
        f"labels     {one['described']} of {one['of']} latents by {one['model']}{score}; {one['requests']} requests{tokens}\n"
    )


def columns(sections: list[dict], d_hidden: int) -> dict[str, np.ndarray]:
    """COLUMNS of the table, [d_hidden] each, None and NaN for latents without a label. Empty without --label-url."""
    if not any("label" in section for section in sections):
        return {}
    table = {"label": np.full(d_hidden, None, dtype=object), "label_score": np.full(d_hidden, np.nan)}
    for section in sections:
        if one := section.get("label"):
            table["label"][section["latent"]] = one["description"]
            table["label_score"][section["latent"]] = np.nan if one["score"] is None else one["score"]
    return table
