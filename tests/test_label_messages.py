"""What a labeller is shown and asked, and how its answers are read, without an endpoint."""

import pytest

from analysis import labels
from analysis.endpoint import found_json


def test_held_out_examples_share_no_text_with_those_shown():
    def example(sequence, position, tokens="abcde", peak=2):
        return {"sequence": sequence, "position": position, "peak": peak, "tokens": list(tokens), "values": [0, 0, 1, 0, None]}

    first, overlapping, other = example(1, 10), example(1, 14, "efghi"), example(2, 15, "vwxyz")
    same_words, apart, last = example(3, 7), example(1, 13, "fghij", 0), example(9, 9, "klmno")
    shown, held_out = labels.split_examples({"examples": [first, overlapping, other, same_words, last, apart]})
    assert shown == [first, other, last] and held_out == [apart]


@pytest.mark.parametrize(("active", "silent", "score"), [(6, 3, 0.5), (6, 2, None), (2, 6, None)])
def test_who_says_yes_to_all_scores_one_half_whatever_the_counts(active, silent, score):
    class Yes:
        def ask(self, messages, read):
            system, user = (message["content"] for message in messages)
            return "all" if "<<" in system else [1] * sum(line[0].isdecimal() for line in user.splitlines())

    section = {"examples": [{"peak": 0, "values": [1.0]}], "latent": 0}
    job = labels.Job(section, [], [f"{i}" for i in range(active + silent)], [1] * active + [0] * silent)
    found = labels.label(Yes(), job)
    assert found["score"] == score and (found["recognised"], found["rejected"]) == (active, 0)


def test_the_active_tokens_are_marked():
    e = {"peak": 2, "tokens": ["a", "b", "c", "\n", "e"], "values": [0.0, 0.4, 1.0, 0.2, None]}
    assert labels.marked(e, 2.0) == '(strength 5) "a<<bc>>\\ne"'
    assert labels.marked(e | {"values": [None, 0.0, 0.01, 0.01, 0.01]}, 2.0) == '(strength 1) "ab<<c\\ne>>"'


def test_what_the_lens_says_is_told():
    e = {"peak": 0, "tokens": ["a"], "values": [1.0]}
    lens = {"base": {"more": [[" one", 4.0]]}, "ft": {"more": [[" two", 5.0], ["\n", 4.0]]}}
    job = labels.make_job({"latent": 3, "examples": [e | {"sequence": 0, "position": 0}], "lens": lens}, [], 0)
    said = labels.description_messages(job)[1]["content"].splitlines()
    assert said[1] == 'In the base model it raises the next tokens [" one"]'
    assert said[2] == 'In its fine-tuned version it raises the next tokens [" two", "\\n"]'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"description": "braces {like} [these]"}', {"description": "braces {like} [these]"}),
        ('<think>{"description": "no"}</think> Sure [1]: {"description": "yes"}.', {"description": "yes"}),
        ('<think>{"contains": [0, 1]}</think> [1, 0]', [1, 0]),
        ('{"a": 1}, or {rather} {"a": 2}, as in [1]', {"a": 2}),
        ("```json\n[1, 0]\n```", [1, 0]),
        ('{"a": 1} {"b"', {"a": 1}),
    ],
)
def test_json_is_found_in_an_answer(text, value):
    assert found_json(text) == value


@pytest.mark.parametrize("text", ["", "none", '{"contains": [1, 2]}', '{"contains": [1]}', '{"contains": "10"}', "[" * 100_000])
def test_what_is_no_verdict_is_refused(text):
    with pytest.raises(ValueError):
        labels.read_verdicts(text, 2)
