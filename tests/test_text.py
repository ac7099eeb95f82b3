"""Text sources with the real tokenizer and no models: packing, chats, columns, kinds of files, the mix of several."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
from datasets import Dataset, DatasetDict
from helpers import CHATML
from transformers import AutoTokenizer

from collecting import text


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny["ft"])


def decoded(tokenizer, *specs, **options) -> list[str]:
    sources = text.open_sources([str(spec) for spec in specs], tokenizer, **{"seq_len": 64} | options)
    return [tokenizer.decode(tokens.tolist()) for _, tokens in text.mix(sources)]


def test_documents_are_packed_whole_and_in_order(tokenizer, tmp_path):
    docs = [f"document {i} says {'word ' * (i % 40)}end {i}." for i in range(200)]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"content": doc}) for doc in docs))
    sequences = decoded(tokenizer, tmp_path / "docs.jsonl")
    assert all(s.startswith("<bos>") for s in sequences)
    assert "".join(s.removeprefix("<bos>") for s in sequences) == "".join(doc + "<eos>" for doc in docs)
    ids = [t for _, t in text.mix(text.open_sources([str(tmp_path / "docs.jsonl")], tokenizer, seq_len=64))]
    assert {len(t) for t in ids[:-1]} == {64}
    alone = decoded(tokenizer, tmp_path / "docs.jsonl", pack=False)
    assert len(alone) == 200
    assert all(("<bos>" + doc).startswith(s) for s, doc in zip(alone, docs, strict=True))


def test_long_documents_keep_every_character(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARS", 1000)
    words = "".join(f"word{i} " for i in range(5000)) + "x" * 5000 + "\nüñí\n"
    (tmp_path / "long.txt").write_text(words, encoding="utf-8")
    got = "".join(s.removeprefix("<bos>") for s in decoded(tokenizer, tmp_path / "long.txt"))
    assert got == words + "<eos>"


def test_columns_and_chat_templates(tokenizer, tmp_path):
    table = [{"prompt": f"Why {i}?", "answer": "Because." if i else None, "id": i} for i in range(3)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, table)))
    assert decoded(tokenizer, tmp_path / "qa.jsonl", pack=False, text_column=("prompt", "answer"))[:2] == [
        "<bos>Why 0?", "<bos>Why 1?\n\nBecause.",
    ]  # fmt: skip
    turns = decoded(tokenizer, tmp_path / "qa.jsonl", pack=False, text_column=("prompt", "answer"), chat_template=True)
    assert turns[1] == "<bos>user: Why 1?<eos>\nassistant: Because.<eos>\n"
    chats = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, {"conversations": []}]
    (tmp_path / "chat.json").write_text(json.dumps(chats))
    (tmp_path / "web.csv").write_text('text,url\n"plain, with a comma",u\n,u\n')
    mixed = decoded(tokenizer, tmp_path / "chat.json", tmp_path / "web.csv", pack=False, chat_template=True)
    assert mixed == ["<bos>user: Hi<eos>\nassistant: Ho<eos>\n", "<bos>plain, with a comma"]


IN_PAIRS = "{% for m in messages %}{{ bos_token if loop.index is odd }}{{ m['content'] }}{{ eos_token }}\n{% endfor %}"


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("template, done", [(None, "left out"), (CHATML, "kept"), (IN_PAIRS, "kept"), ("{{ messages }}", None)])
def test_the_bos_of_a_chat_template_is_neither_lost_nor_doubled(tokenizer, tmp_path, template, done, pack):
    """In ChatML and its like it is a structural token, which opens every turn."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    chats = [[{"role": r, "content": f"{r} says {i}"} for r in ("user", "assistant") * (1 + i % 2)] for i in range(100)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in chats))
    whole = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in chats]
    (source,) = text.open_sources([str(tmp_path / "chat.jsonl")], tokenizer, 256, pack=pack, chat_template=True)
    sequences = [tokens.tolist() for _, tokens in text.mix([source])]
    shown = [tokenizer.decode(tokens) for tokens in sequences]
    assert all(s.startswith("<bos>") and "<bos><bos>" not in s for s in shown)
    if not pack:
        assert shown == [chat if chat.startswith("<bos>") else "<bos>" + chat for chat in whole]
    else:
        parts = [chat.removeprefix("<bos>") if done == "left out" else chat for chat in whole]
        left = tokenizer("".join(part + "<eos>" for part in parts), add_special_tokens=False).input_ids
        for tokens in sequences:
            n = len(tokens) - (left[0] != 1)  # its first token was put there, unless the text goes on with the same one
            assert tokens[-n:] == left[:n]
            left = left[n:]
        assert not left
    assert source.template_bos == done


def test_a_template_cannot_leave_its_sandbox_and_knows_no_day(tokenizer, tmp_path, capsys):
    tokenizer, chat = copy.deepcopy(tokenizer), tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    flags = {"pack": False, "chat_template": True}
    for attempt in (
        f"{{{{ cycler.__init__.__globals__.os.popen('touch {tmp_path}/escaped').read() }}}}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ 'x' * 10**13 }}",
    ):
        tokenizer.chat_template = attempt
        with pytest.raises(ValueError, match="the chat template refused all of its 1 conversations"):
            decoded(tokenizer, chat, **flags)
    assert not (tmp_path / "escaped").exists() and capsys.readouterr().out.count("is unsafe") == 2
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"  # as Llama 3.2 does
    assert decoded(tokenizer, chat, **flags) == ["<bos>26 Jul 2024 hello"]


def test_text_of_any_bytes_and_lines_of_any_length(tokenizer, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"before \xff\xfe\x80 between \x00 after")
    assert decoded(tokenizer, tmp_path / "bytes.txt") == ["<bos>before \ufffd\ufffd\ufffd between \x00 after<eos>"]
    (tmp_path / "long.txt").write_bytes(b"x = 1; " * 14_300_000)  # one line of 100 MB, of which only the beginning is read
    sources = text.open_sources([str(tmp_path / "long.txt")], tokenizer, 64)
    assert [len(tokens) for _, tokens in itertools.islice(text.mix(sources), 100)] == [64] * 100


@pytest.mark.parametrize(
    "name, content, line, why",
    [
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": ', 3, "Expecting value"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "a\xff b"}\n', 2, "codec can't decode byte 0xff"),
        ("a.jsonl", b'{"text": "a\x00b"}\n', 1, "Invalid control character"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "a \\ud800 b"}\n', 2, "surrogates not allowed"),
        ("a.csv", b"text\nfine\na\xff\xfe b\n", 3, "codec can't decode byte 0xff"),
    ],
)
def test_broken_lines_are_counted_from_one(tokenizer, tmp_path, name, content, line, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        decoded(tokenizer, tmp_path / name)
    message = str(error.value)
    assert f": {name}, line {line}, cannot be read (" in message and why in message and "mend or remove" in message


@pytest.mark.parametrize(
    "name, content, options, want",
    [
        ("qa.csv", "prompt,answer\nwhat,that\n", {}, "which column holds the text? it has prompt, answer"),
        ("qa.csv", "prompt,answer\nwhat,that\n", {"text_column": ("reply",)}, "has no such column; it has prompt, answer"),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "hello"}]}', {}, "add --chat-template"),
        ("web.jsonl", '{"text": "hello"}', {"chat_template": True}, "--chat-template: no --text has a messages column"),
        ("web.txt", "hello", {"text_column": ("text",)}, "--text-column text: plain text files have no columns"),
        ("web.zip", "hello", {}, "is of an unknown kind"),
        ("web.txt", "", {}, "holds no file with content"),
    ],
)
def test_bad_text_is_refused(tokenizer, tmp_path, name, content, options, want):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        decoded(tokenizer, tmp_path / name, **options)
    assert want in str(error.value)
    assert "\n" not in str(error.value)


def test_other_text_sources_are_refused(tokenizer, tmp_path):
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text('{"text": "hello"}')
    with pytest.raises(ValueError, match="holds files of several kinds"):
        decoded(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="weight -1 is not a positive number"):
        decoded(tokenizer, f"{tmp_path / 'a.jsonl'}=-1")
    with pytest.raises(ValueError, match="the Hub does not give it"):
        decoded(tokenizer, "nobody/nothing:default:train=2")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    with pytest.raises(ValueError, match="the tokenizer has no template"):
        decoded(tokenizer, tmp_path / "a.jsonl", chat_template=True)


def test_folders_of_save_to_disk_and_parquet(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    rows.save_to_disk(tmp_path / "plain")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "part.parquet")
    (tmp_path / "folder" / "README.md").write_text("no text of the data")
    for name in ("plain", "splits", "folder"):
        assert decoded(tokenizer, tmp_path / name) == ["<bos>one<eos>two<eos>"]


def test_chats_that_the_template_refuses_are_counted(tokenizer, tmp_path, capsys):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + (
        tokenizer.chat_template
    )
    roles = ["user", "system", "user", "system"]
    rows = [{"messages": [{"role": role, "content": f"turn {i}"}]} for i, role in enumerate(roles)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (source,) = text.open_sources([str(tmp_path / "chat.jsonl")], tokenizer, 64, pack=False, chat_template=True)
    assert len(list(text.mix([source]))) == 2
    assert source.refused == 2
    assert capsys.readouterr().out.count("no system role") == 1
    (tmp_path / "chat.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="refused all of its 1 conversations"):
        decoded(tokenizer, tmp_path / "chat.jsonl", chat_template=True)


def test_sources_that_run_out_or_give_nothing(tokenizer, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("short text " * 100)
    (tmp_path / "long.txt").write_text("long text " * 2000)
    specs = [f"{tmp_path}/short.txt=1", f"{tmp_path}/long.txt=1"]
    sequences = decoded(tokenizer, *specs)
    assert capsys.readouterr().out.count("short.txt: ran out after") == 1
    assert sum(s.count("long text") for s in sequences) > 1800
    (tmp_path / "blank.jsonl").write_text(json.dumps({"text": "  \n "}))
    with pytest.raises(ValueError, match="blank.jsonl: gives no text"):
        decoded(tokenizer, tmp_path / "blank.jsonl", tmp_path / "long.txt")


def test_mix_is_always_near_its_weights(tokenizer, tiny):
    sources = text.open_sources([f"{tiny['code']}=2", f"{tiny['prose']}=0.5"], tokenizer, seq_len=64)
    given = [0, 0]
    for index, tokens in itertools.islice(text.mix(sources), 500):
        given[index] += len(tokens)
        assert abs(given[0] - 4 * given[1]) <= 5 * 64
