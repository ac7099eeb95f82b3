"""Chats as the template of a tokenizer writes them."""

from __future__ import annotations

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them
SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"  # a chat must not depend on the day of a restart


def template_bos(tokenizer) -> str | None:
    """Whether the BOS that the chat template writes is "left out", because every sequence gets one anyway, or "kept".

    It is left out where it marks the beginning of a text: it comes once, at the front, however many turns there are. In ChatML
    and its like it opens every turn, and a conversation without its first one would be damaged. None: the template writes none.
    """
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    try:
        shown = [format_chat(tokenizer, turns * times) for times in (1, 2)]
    except Exception:  # noqa: BLE001 - a template may raise anything
        return "kept"
    bos = tokenizer.bos_token
    if bos is None or not any(bos in text for text in shown):
        return None
    return "left out" if all(text.startswith(bos) and text.count(bos) == 1 for text in shown) else "kept"


def format_chat(tokenizer, turns: list[dict]) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = SAME_DAY + template
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)


def turn(message: dict) -> dict:
    """{role, content}, also from ShareGPT's {from, value}."""
    role = message.get("role") or message.get("from")
    return {"role": ROLES.get(role, role), "content": message.get("content") or message.get("value") or ""}


def answer_marker(tokenizer) -> tuple[list[int], list[int]] | None:
    """The tokens that the chat template writes before an answer, and the white space that may follow them before its text.

    None where there is no template, or where it writes nothing between a question and its answer.
    """
    if tokenizer.chat_template is None:
        return None
    question, answer = "QUESTION", "ANSWER"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        between = text[text.index(question) + len(question) : text.index(answer)]
    except Exception:  # noqa: BLE001 - a template may raise anything
        return None
    marker, space = (
        tokenizer(part, add_special_tokens=False).input_ids if part else []
        for part in (between.rstrip(), between[len(between.rstrip()) :])
    )
    return (marker, space) if marker else None
