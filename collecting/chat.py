"""Chats as the template of a tokenizer writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from run.machine import first_line

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


def format_chat(tokenizer, turns: list[dict], **options) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = SAME_DAY + template
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **options)


def format_question(tokenizer, question: str) -> str:
    """A user's turn as the template writes it, up to where the answer begins; without the BOS that opens any sequence."""
    turns = [{"role": "user", "content": question}]
    asked = format_chat(tokenizer, turns, add_generation_prompt=True)
    if asked == format_chat(tokenizer, turns):  # the template does not know what an answer begins with
        asked = format_chat(tokenizer, [*turns, {"role": "assistant", "content": "ANSWER"}]).rpartition("ANSWER")[0].rstrip(" ")
    return asked.removeprefix(tokenizer.bos_token) if template_bos(tokenizer) == "left out" else asked


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: one a line, or `prompt` or the first user's turn of `messages` in each line of a .jsonl.

    ValueError, naming --prompts, where it holds none or a line without one.
    """
    file, found = Path(path).expanduser(), []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompts {path}: cannot be read ({first_line(error)}); give a text file, one prompt a line"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip() and file.suffix == ".jsonl":
            try:
                row = json.loads(line)
                turns = [turn(message) for message in row.get("messages") or [{"role": "user", "content": row["prompt"]}]]
                line = next(t["content"] for t in turns if t["role"] == "user")
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
                raise ValueError(f"--prompts {path}: line {number} has no `prompt`, nor `messages` of a user") from None
        found += [line] if line.strip() else []
    if not found:
        raise ValueError(f"--prompts {path}: holds no prompt; give one a line")
    return found


def turn(message: dict) -> dict:
    """{role, content}, also from ShareGPT's {from, value}."""
    role = message.get("role") or message.get("from")
    return {"role": ROLES.get(role, role), "content": message.get("content") or message.get("value") or ""}
