"""The findings: what changed, in lists and in words, for programs (findings.json), a screen (findings.md) and the page."""

from __future__ import annotations

import numpy as np

from analysis.measure import COLUMNS

NEAREST = 10  # latents listed that did not pass, where none did the reader still sees what comes closest
SCREEN = 10  # changes in findings.md
FIRST_COMPONENTS = 3  # of the difference, which names a narrow change too where no text of it was collected
MODELS = {"ft": "fine-tuned model", "base": "base model"}
DEFINED = ("direction", "rank", "change_score", "change_error", "change_p", "changed")
NUMBERS = (
    "change_score", "change_error", "change_p", "frequency", "mean_act", "relative_norm", "dec_cos_sim", "difference",
    "nu_error", "nu_reconstruction",
)  # fmt: skip


def own_nu(table: dict[str, np.ndarray], of: str) -> np.ndarray:
    """[d_hidden] nu of "error" or "reconstruction" in each latent's direction."""
    return np.where(table["direction"] == "ft", table[f"beta_ratio_{of}"], table[f"base_beta_ratio_{of}"])


def find(
    table: dict[str, np.ndarray], null: dict, metrics: dict, sections: list[dict], text_names: list[str], pair: str,
    command: str,
) -> dict:  # fmt: skip
    """What findings.json holds; docs/data.md describes it. `sections`: the latents' examples, lines of examples.jsonl."""
    table = table | {f"nu_{of}": own_nu(table, of) for of in ("error", "reconstruction")}
    seen = {one["latent"]: one for one in sections}
    order, steered = in_order(table), metrics.get("steering")
    passed = table["changed"][order]
    changes = [describe(table, int(j), seen.get(int(j), {}), text_names) for j in order[passed]]
    nearest = [describe(table, int(j), seen.get(int(j), {}), text_names) for j in order[~passed][:NEAREST]]
    found = {
        "pair": pair,
        "command": command,
        "run": metrics["run"],
        "data": metrics["data"],
        "rows": metrics["rows_validation"] + metrics["rows_train"],
        "changed": {name: sum(one["direction"] == name for one in changes) for name in MODELS},
        "null": null,
        "definitions": {name: COLUMNS[name] for name in DEFINED},
        "kl": kl_closed(metrics.get("patching")),
        "components": components(metrics.get("difference", {})),
    }  # fmt: skip
    if steered:
        found["steering"] = steered
        for one in changes + nearest:
            alone = (group for group in steered["latents"] if group["latents"] == [one["latent"]])
            one["steering"] = next(alone, None)
    return {"summary": in_words(found, changes, nearest)} | found | {"changes": changes, "nearest": nearest}


def in_order(table: dict[str, np.ndarray]) -> np.ndarray:
    """Live latents of both directions, the most changed first: as the ranks."""
    key = np.nan_to_num(table["change_score"] - 2 * table["change_error"], nan=-np.inf)
    order = np.argsort(-key, kind="stable")
    return order[~table["dead"][order]]


def describe(table: dict[str, np.ndarray], latent: int, section: dict, text_names: list[str]) -> dict:
    """One entry of the lists: what the table says of a latent, and the strongest examples and logit lens of its section."""
    top = [one for one in section.get("examples", []) if one["range"] == "top"]
    lens = section.get("lens")  # only with the two models
    texts = {text: number(table[f"freq_text_{i}"][latent]) for i, text in enumerate(text_names) if f"freq_text_{i}" in table}
    planted = {name: table[name][latent].item() for name in ("planted_concept", "planted_kind") if name in table}
    return {
        "latent": latent,
        "direction": str(table["direction"][latent]),
        "rank": int(table["rank"][latent]),
        "changed": bool(table["changed"][latent]),
        **{name: number(table[name][latent]) for name in NUMBERS},
        "classes": {way: str(table[tag][latent]) for way, tag in (("norm", "tag"), ("scaling", "tag_scaling"))},
        "frequency_by_text": texts,
        "label": table["label"][latent] if "label" in table else None,
        "label_score": number(table["label_score"][latent]) if "label" in table else None,
        **planted,
        "tokens": strongest_tokens(top),
        "examples": [example(one) for one in top],
        "lens": lens and {of: [token for token, _ in lens[of]["more"]] for of in lens},
    }


def number(value) -> float | None:
    """Four digits, None for NaN and infinity."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def strongest_tokens(top: list[dict], most: int = 6) -> list[str]:
    """The different tokens at which the strongest examples peak, the strongest first."""
    return list(dict.fromkeys(one["tokens"][one["peak"]].strip() or repr(one["tokens"][one["peak"]]) for one in top))[:most]


def example(one: dict) -> dict:
    """An example of examples.jsonl as text: before, at and after its strongest token."""
    peak, tokens = one["peak"], one["tokens"]
    text = {"before": "".join(tokens[:peak]), "token": tokens[peak], "after": "".join(tokens[peak + 1 :])}
    return {name: one[name] for name in ("text", "sequence", "position")} | {"activation": one["values"][peak]} | text


def kl_closed(patching: dict | None) -> dict | None:
    """Which share of the KL divergence to the fine-tuned model the first latents close in the base model, and random ones."""
    if not patching:
        return None
    found = patching["diffing"]["base model"]
    before = found["before"]["all"]
    sets = {name: found[name] for name in ("first_ranked", "as_many_random") if name in found}
    return {"before": before} | {
        name: {"latents": one["latents"], "share_closed": 1 - one["kl"]["all"] / before if before else None}
        for name, one in sets.items()
    }


def components(difference: dict) -> list[dict]:
    """The first principal components of the models' difference, each with what its two sides are strongest on."""
    told = lambda top: {"tokens": strongest_tokens(top), "examples": [example(one) for one in top]}  # noqa: E731
    return [
        {"share": number(one["share"])} | {side: told(top) for side, top in one["examples"].items()}
        for one in difference.get("components", [])[:FIRST_COMPONENTS]
    ]


def in_words(found: dict, changes: list[dict], nearest: list[dict]) -> list[str]:
    """The sentences with which the page, findings.md and the printed screen begin."""
    null, counts = found["null"], found["changed"]
    rate = f"{null['false_discovery_rate']:.0%}".replace("%", " %")
    if changes:
        words = [
            f"{len(changes):,} of {null['tested']:,} live latents changed beyond chance: {counts['ft']:,} stand more in the "
            f"fine-tuned model, {counts['base']:,} more in the base model. At most {rate} of them are expected to be false."
        ]
    else:
        words = [f"No change found above chance among {null['tested']:,} live latents, at a false discovery rate of {rate}."]
    for one in changes[:2] or nearest[:1]:
        words.append(f"{'First' if one is (changes or nearest)[0] else 'Then'}{'' if changes else ' in line'}: {sentence(one)}")
    typical = f"A typical latent lacks {percent(null['center'])} in one of the models, give or take {percent(null['spread'])}."
    words.append(typical)
    if found["components"] and found["components"][0]["plus"]["examples"]:
        words.append(f"Without a dictionary: {of_component(found['components'][0])}")
    if kl := found["kl"]:
        closed = [
            f"{one['latents']} {label} {'close' if share >= 0 else 'widen it by'} {percent(abs(share))}"
            for name, label in (("first_ranked", "latents ranked first"), ("as_many_random", "random ones"))
            if (one := kl.get(name)) and (share := one["share_closed"]) is not None
        ]
        words += [f"Of the KL divergence from base to fine-tuned model, {', '.join(closed)}."] if closed else []
    return words + steering_words(found.get("steering"))


def steering_words(steered: dict | None) -> list[str]:
    """What steering with the first latents did, and with all of them together to the behaviour."""
    if not steered:
        return []
    tried = {
        ", ".join(map(str, one["latents"])) + " together" * (len(one["latents"]) > 1): one["beyond_random"]
        for one in steered["latents"]
    }
    beyond = " and ".join(name for name, more in tried.items() if more) or "none"
    words = [
        f"Steered with {' and with '.join(tried)}; further towards the other model than with random latents of the same "
        f"length: {beyond}."
    ]
    last = steered["latents"][-1]
    for name, model in MODELS.items():
        if (one := last[name])["shown"] is not None:
            words.append(
                f"The {model} steered with {', '.join(map(str, last['latents']))} shows the behaviour in "
                f"{percent(one['shown'])} of its answers (without {percent(one['shown_before'])}, with random latents "
                f"{percent(one['shown_random'])})."
            )
    return words


def sentence(one: dict) -> str:
    other = MODELS["base" if one["direction"] == "ft" else "ft"]
    tokens = ", ".join(f"“{token}”" for token in one["tokens"][:4])
    text = f", as in “{said(one['examples'][0])}”" if one["examples"] else ""
    active = f"active on {percent(one['frequency'])} of the tokens" + (f", strongest on {tokens}{text}" if tokens else "")
    label = f", “{one['label']}”" if one["label"] else ""
    return f"latent {one['latent']}{label}, {active}; the {other} lacks {share(one)} of it."


def of_component(one: dict) -> str:
    sides = [
        f"{name} on {', '.join(f'“{token}”' for token in one[side]['tokens'][:4])}, as in “{said(one[side]['examples'][0])}”"
        for side, name in (("plus", "strongest"), ("minus", "at its other end"))
        if one[side]["examples"]
    ]
    return f"the first principal component of the difference holds {percent(one['share'])} of its variance, {'; '.join(sides)}."


def said(one: dict) -> str:
    return plain(snippet(one)).strip()


def share(one: dict) -> str:
    """A change score with two standard errors."""
    error = "" if one["change_error"] is None else f" ± {percent(2 * one['change_error'])}"
    return percent(None if one["change_score"] is None else min(1.0, one["change_score"])) + error


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2g} %" if abs(value) < 0.995 else f"{100 * value:.0f} %"


def as_markdown(found: dict) -> str:
    """findings.md: one screen."""
    lines = [f"# {plain(found['pair'])}: what changed", "", *map(plain, found["summary"])]
    listed = found["changes"][:SCREEN] or found["nearest"]
    if not found["changes"]:
        lines += ["", "Nearest, none of them beyond chance:"]
    heads = ["more in", "rank", "latent", "the other lacks", "active on", "strongest tokens", "example"]
    labelled = any(one["label"] for one in listed)
    heads += ["label", "its score"] * labelled
    lines += ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for one in listed:
        tokens = " ".join(one["tokens"]) or (f"planted: {one['planted_kind']}" if "planted_kind" in one else "")
        text = snippet(one["examples"][0]) if one["examples"] else ""
        cells = [one["direction"], one["rank"], one["latent"], share(one), percent(one["frequency"]), tokens, text]
        cells += [one["label"] or "–", "–" if one["label_score"] is None else f"{one['label_score']:.2f}"] * labelled
        lines.append("| " + " | ".join(plain(str(cell)) for cell in cells) + " |")
    if len(found["changes"]) > SCREEN:
        lines += ["", f"{len(found['changes']) - SCREEN:,} more in findings.json."]
    null = found["null"]
    lines += [
        "",
        f"Changed: lacks more than {percent(null['cut'])}, far from what typical latents lack, and more than chance explains "
        f"({null['blocks']} parts of {found['rows']:,} rows, Benjamini-Hochberg).",
        f"Made by: {found['command']}",
    ]
    return "\n".join(lines) + "\n"


def snippet(one: dict, around: int = 28) -> str:
    """An example's strongest token in brackets, and some characters on both sides."""
    return f"{one['before'][-around:]}[{one['token']}]{one['after'][:around]}"


def plain(text: str) -> str:
    """On one line, without what moves a terminal's cursor or ends a table's cell."""
    return "".join(c if c.isprintable() else " " for c in text).replace("|", "¦")
