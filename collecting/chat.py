"""Chats as the template of a tokenizer writes them."""

from __future__ import annotations

import re

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them
SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"  # a chat must not depend on the day of a restart
EXCHANGE = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]  # to see what a template does


def template_bos(tokenizer) -> str | None:
    """Whether the BOS that the chat template writes is "left out", because every sequence gets one anyway, or "kept".

    It is left out where it marks the beginning of a text: it comes once, at the front, however many turns there are. In ChatML
    and its like it opens every turn, and a conversation without its first one would be damaged. None: the template writes none.
    """
    try:
        shown = [format_chat(tokenizer, EXCHANGE * times) for times in (1, 2)]
    except Exception:  # noqa: BLE001 - a template may raise anything
        return "kept"
    bos = tokenizer.bos_token
    if bos is None or not any(bos in text for text in shown):
        return None
    return "left out" if all(text.startswith(bos) and text.count(bos) == 1 for text in shown) else "kept"


def answer_marker(tokenizer) -> tuple[list[int], list[int]] | None:
    """The tokens that the chat template writes before an answer, and the white space that may follow them before its text.

    None where there is no template, or where it writes nothing between a question and its answer.
    """
    try:
        between = re.search(r"QUESTION(.*?)(\s*)ANSWER", format_chat(tokenizer, EXCHANGE), re.DOTALL).groups()
    except Exception:  # noqa: BLE001 - as above, and there may be no template, or no answer in what it writes
        return None
    marker, space = (tokenizer(part, add_special_tokens=False).input_ids for part in between)
    return (marker, space) if marker else None


def format_chat(tokenizer, turns: list[dict]) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = SAME_DAY + template
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)


def turn(message: dict) -> dict:
    """{role, content}, also from ShareGPT's {from, value}."""
    role = message.get("role") or message.get("from")
    return {"role": ROLES.get(role, role), "content": message.get("content") or message.get("value") or ""}
