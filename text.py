"""Text sources -> token sequences: local files and Hub datasets, plain or chat, packed, and mixed by weight.

Everything here is deterministic: the same arguments give the same sequences, so a restart can skip those already done.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm

datasets.disable_progress_bars()
datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # its errors reach the user as ours, in one line

TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TEXTS = (".txt", ".md", ".py")
KINDS = f"{', '.join(TABLES)}, {', '.join(TEXTS)}"
DEFAULT_COLUMNS = ("text", "content", "messages", "conversation", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them
PIECE_CHARS = 1_000_000  # longer documents are tokenized in pieces: tokenizers need many times the size of their text
TOKENIZE_TOGETHER = 256  # documents: enough for the tokenizer's threads


@dataclasses.dataclass
class Source:
    """One --text source, opened. `tokens` counts what it has handed out, `refused` what its chat template could not format."""

    name: str
    weight: float
    sequences: Iterator[np.ndarray] | None = None  # int32 [<= seq_len] each
    templated: bool = False
    tokens: int = 0
    refused: int = 0


def open_sources(
    specs: list[str],
    tokenizer,
    seq_len: int,
    skip_first: int = 0,
    pack: bool = True,
    text_column: tuple[str, ...] = (),
    chat_template: bool = False,
) -> list[Source]:
    """`SRC` or `SRC=WEIGHT` each -> Sources. ValueError, naming the flag, if one cannot be opened or lacks the columns."""
    sources, any_table = [], False
    for spec in specs:
        name, weight = split_weight(spec)
        path = local_path(name)
        rows = load_hub(name) if path is None else load_local(name, path)
        source = Source(name, weight)
        if isinstance(rows, list):  # plain text files
            documents = (read_chunks(file) for file in rows)
        else:
            documents = table_documents(source, rows, tokenizer, text_column, chat_template)
            any_table = True
        source.sequences = token_sequences(tokenize(documents, tokenizer), tokenizer, seq_len, skip_first, pack)
        sources.append(source)
    if text_column and not any_table:
        raise ValueError(f"--text-column {' '.join(text_column)}: plain text files have no columns; leave it out")
    if chat_template and not any(source.templated for source in sources):
        raise ValueError("--chat-template: no --text has a messages column or several text columns to format; leave it out")
    return sources


def mix(sources: list[Source]) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the source, int32 tokens [<= seq_len]): always from the source that is furthest behind its weight.

    A source that runs out is reported once and the others go on. ValueError if one hands out nothing at all.
    """
    left = list(range(len(sources)))
    while left:
        index = min(left, key=lambda i: (sources[i].tokens / sources[i].weight, i))
        source = sources[index]
        tokens = next(source.sequences, None)
        if tokens is not None:
            source.tokens += len(tokens)
            yield index, tokens
            continue
        left.remove(index)
        if source.tokens == 0:
            why = f": the chat template refused all of its {source.refused} conversations" if source.refused else ""
            raise ValueError(f"--text {source.name}: gives no text longer than --skip-first{why}; check it and --text-column")
        if left:
            tqdm.write(f"--text {source.name}: ran out after {source.tokens:,} tokens; the other sources go on")


# --- where the text is


def split_weight(spec: str) -> tuple[str, float]:
    """`SRC=WEIGHT` -> (SRC, WEIGHT); without a number after the last `=` the weight is 1."""
    name, equals, right = spec.rpartition("=")
    if not equals or not name or os.path.exists(os.path.expanduser(spec)):
        return spec, 1.0
    try:
        weight = float(right)
    except ValueError:
        return spec, 1.0
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"--text {spec}: the weight {right} is not a positive number")
    return name, weight


def local_path(name: str) -> Path | None:
    """The path if `name` is one that exists, None for a Hub id. ValueError for a missing absolute, `./`, `../` or `~` path."""
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    if path.is_absolute() or name.startswith(("./", "../")):
        raise ValueError(f"--text {name}: there is no such file or folder; check the path")
    return None


def load_hub(name: str) -> datasets.IterableDataset:
    """`id`, `id:config` or `id:config:split` (the split is train unless given), streamed."""
    parts = name.split(":")
    if len(parts) > 3 or not parts[0]:
        raise ValueError(f"--text {name}: is neither an existing path nor a Hub id of the form id:config:split")
    config, split = (parts[1:] + ["", ""])[:2]
    try:
        return datasets.load_dataset(parts[0], config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises a dozen types here, from HTTP errors to missing configs
        raise ValueError(
            f"--text {name}: is no existing path, and the Hub does not give it as a dataset ({one_line(error)}); "
            "check the name and the network, or give a file or folder"
        ) from None


def load_local(name: str, path: Path) -> list[Path] | datasets.Dataset | datasets.IterableDataset:
    """Plain text files as a list of paths; tables and folders of save_to_disk as a dataset, read as they are needed."""
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            if "train" not in splits and len(splits) > 1:
                raise ValueError(f"it has the splits {', '.join(splits)} and none named train; give the folder of one")
            return splits["train"] if "train" in splits else next(iter(splits.values()))
    except Exception as error:  # whatever a damaged folder makes the library raise
        raise ValueError(f"--text {name}: cannot be read as a dataset folder ({one_line(error)})") from None
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not any(p[0] == "." for p in f.relative_to(path).parts))
    files = [file for file in files if file.stat().st_size]
    kinds = {TABLES[f.suffix] for f in files if f.suffix in TABLES}
    texts = [f for f in files if f.suffix in TEXTS]
    if len(kinds) > 1 or (kinds and any(f.suffix != ".md" for f in texts)):  # a README.md beside tables is no text of theirs
        found = sorted({f.suffix for f in files if f.suffix in TABLES or f.suffix in TEXTS})
        raise ValueError(f"--text {name}: holds files of several kinds ({', '.join(found)}); give a folder with one kind")
    if kinds:
        tables = [str(f) for f in files if f.suffix in TABLES]
        try:
            return datasets.load_dataset(kinds.pop(), data_files=tables, split="train", streaming=True)
        except Exception as error:  # whatever a broken file makes the reader raise
            raise ValueError(f"--text {name}: cannot be read ({one_line(error)})") from None
    if not texts:
        what = "holds no file with content" if path.is_dir() or not files else "is of an unknown kind"
        raise ValueError(f"--text {name}: {what}; known are {KINDS} and folders of save_to_disk")
    return texts


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(" .") or type(error).__name__


def read_rows(name: str, rows: Iterable[dict]) -> Iterator[dict]:
    """The rows, with the errors of broken files and connections as one sentence."""
    n_read = 0
    try:
        for row in rows:
            yield row
            n_read += 1
    except Exception as error:  # parsers and HTTP clients each raise their own
        raise ValueError(f"--text {name}: reading stopped after {n_read:,} rows ({one_line(error)})") from None


def read_chunks(file: Path) -> Iterator[str]:
    """A text file in parts, so that its size does not matter."""
    with open(file, encoding="utf-8", errors="replace") as f:
        yield from iter(lambda: f.read(PIECE_CHARS), "")


# --- which text of a row


def table_documents(source: Source, rows, tokenizer, text_column: tuple[str, ...], chat_template: bool) -> Iterator[tuple[str]]:
    """The text of each row of a table, as a document of one part. Decides whether the chat template applies to it."""
    name = f"--text {source.name}"
    sample = list(itertools.islice(read_rows(source.name, rows), 20))
    if not sample:
        raise ValueError(f"{name}: holds no rows; give a source with text in it")
    columns = choose_columns(source.name, sample, text_column)
    messages = [c for c in columns if any(isinstance(row[c], list) for row in sample)]
    if messages and len(columns) > 1:
        raise ValueError(
            f"{name}: {messages[0]!r} holds chat messages and cannot be joined with {', '.join(columns)}; give it alone"
        )
    if messages and not chat_template:
        raise ValueError(f"{name}: the column {messages[0]!r} holds chat messages; add --chat-template to format them")
    # one column of plain strings is no conversation: web text stays as it is beside chats
    source.templated = chat_template and (bool(messages) or len(columns) > 1)
    if source.templated and tokenizer.chat_template is None:
        raise ValueError(f"--chat-template: the tokenizer has no template to format {name} with; leave the flag out")
    rows = read_rows(source.name, rows.select_columns(list(columns)))
    if source.templated:
        return ((text,) for text in templated(source, rows, columns, tokenizer))
    return (("\n\n".join(strings(row, columns)),) for row in rows)


def choose_columns(name: str, sample: list[dict], text_column: tuple[str, ...]) -> tuple[str, ...]:
    """Those of --text-column that the source has, or else its usual text column, or else its only column of strings."""
    have = list(sample[0])
    listing = f"it has {', '.join(have)}"
    if text_column:
        if not (columns := tuple(c for c in text_column if c in have)):
            raise ValueError(f"--text-column {' '.join(text_column)}: --text {name} has no such column; {listing}")
        return columns
    strings = [c for c in have if any(isinstance(row[c], str) for row in sample)]
    usual = [c for c in DEFAULT_COLUMNS if c in strings or any(isinstance(row.get(c), list) for row in sample)]
    if usual or len(strings) == 1:
        return (usual or strings)[:1]
    raise ValueError(f"--text {name}: which column holds the text? {listing}; name it with --text-column")


def strings(row: dict, columns: tuple[str, ...]) -> list[str]:
    """The row's texts, without missing and empty ones. Numbers (answers in a CSV) are written out."""
    return [str(row[c]) for c in columns if isinstance(row[c], (str, int, float)) and str(row[c]).strip()]


def templated(source: Source, rows: Iterable[dict], columns: tuple[str, ...], tokenizer) -> Iterator[str]:
    """Each row as the chat template writes it, without the BOS that every sequence gets anyway.

    Conversations that the template refuses (many know no system role) are counted in source.refused and left out.
    """
    for row in rows:
        try:
            if len(columns) > 1:
                roles = itertools.cycle(("user", "assistant"))
                turns = [{"role": role, "content": str(row[c] or "")} for c, role in zip(columns, roles, strict=False)]
            else:
                turns = [turn(message) for message in row[columns[0]] or []]
            text = tokenizer.apply_chat_template(turns, tokenize=False) if any(t["content"] for t in turns) else ""
        except Exception as error:  # a template may raise anything
            if source.refused == 0:
                tqdm.write(f"--text {source.name}: left out what the chat template refuses, the first time: {one_line(error)}")
            source.refused += 1
            continue
        yield text.removeprefix(tokenizer.bos_token or "")


def turn(message: dict) -> dict:
    """{role, content}, also from ShareGPT's {from, value}."""
    role = message.get("role") or message.get("from")
    return {"role": ROLES.get(role, role), "content": message.get("content") or message.get("value") or ""}


# --- text to tokens


def pieces(document: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A document (in parts) -> (at most about a million characters, whether they are its last). Blank ones give nothing."""
    rest, cut_before = "", False
    for part in document:
        rest += part
        while len(rest) > 2 * PIECE_CHARS:
            cut = max(rest.rfind(" ", 1, PIECE_CHARS), rest.rfind("\n", 1, PIECE_CHARS))  # where a token would begin anyway
            cut = cut if cut > 0 else PIECE_CHARS
            yield rest[:cut], False
            rest, cut_before = rest[cut:], True
    if cut_before or rest.strip():
        yield rest, True


def tokenize(documents: Iterable[Iterable[str]], tokenizer) -> Iterator[tuple[list[int], bool]]:
    """Documents -> (token ids of a piece, whether it is its document's last)."""
    stream = itertools.chain.from_iterable(pieces(document) for document in documents)
    together, chars = [], 0
    for text, last in stream:
        together.append((text, last))
        chars += len(text)
        if len(together) == TOKENIZE_TOGETHER or chars >= PIECE_CHARS:
            yield from tokenize_together(together, tokenizer)
            together, chars = [], 0
    if together:
        yield from tokenize_together(together, tokenizer)


def tokenize_together(texts: list[tuple[str, bool]], tokenizer) -> Iterator[tuple[list[int], bool]]:
    # verbose=False: no warning about documents longer than the model, they are cut into sequences below
    ids = tokenizer([t for t, _ in texts], add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    return zip(ids, (last for _, last in texts), strict=True)


def token_sequences(
    pieces: Iterable[tuple[list[int], bool]], tokenizer, seq_len: int, skip_first: int, pack: bool
) -> Iterator[np.ndarray]:
    """Pieces of documents -> int32 sequences [<= seq_len], each with the BOS in front if there is one.

    pack: documents are joined by EOS (if there is one) and fill the sequences; else each document gives one, cut to seq_len.
    Sequences that no row would be stored of (no longer than skip_first) are left out.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos, room = tokenizer.eos_token_id, seq_len - len(bos)
    buffer, inside = [], False  # inside: the next piece goes on with the document of the last one
    for ids, last in pieces:
        if not pack:
            if not inside and len(bos) + len(ids) > skip_first:
                yield np.array(bos + ids[:room], dtype=np.int32)
            inside = not last
            continue
        buffer += ids
        inside = not last
        # a chat template may have ended the document with EOS already
        if last and eos is not None and (not ids or ids[-1] != eos):
            buffer.append(eos)
        for start in range(0, len(buffer) - room + 1, room):
            yield np.array(bos + buffer[start : start + room], dtype=np.int32)
        buffer = buffer[len(buffer) // room * room :]
    if len(bos) + len(buffer) > skip_first and buffer:
        yield np.array(bos + buffer, dtype=np.int32)
