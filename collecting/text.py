"""Text sources -> token sequences: local files and Hub datasets, plain or chat, packed, and mixed by weight.

Everything here is deterministic: the same arguments give the same sequences, so a restart can skip those already done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import HfApi
from tqdm import tqdm

from collecting import chat
from run.machine import HUB_SECONDS, close_name, first_line, library_errors

datasets.disable_progress_bars()
datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # its errors reach the user as ours, in one line

TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TEXTS = (".txt", ".md", ".py")
DEFAULT_COLUMNS = ("text", "content", "messages", "conversation", "conversations")
PIECE_CHARS = 1_000_000  # longer documents are tokenized in pieces: tokenizers need many times the size of their text
TOKENIZE_TOGETHER = 256  # documents: enough for the tokenizer's threads
FINGERPRINT_BLOCKS, BLOCK_BYTES = 1024, 65_536  # at most 64 MB are read for a fingerprint, also of a model of 20 GB


@dataclasses.dataclass
class TextSource:
    """One --text source, opened."""

    name: str
    weight: float
    rows: datasets.Dataset | datasets.IterableDataset | None  # None: plain text files
    files: list[Path]  # where it is read from; none for a Hub dataset
    commit: str | None  # of a Hub dataset
    sequences: Iterator[np.ndarray] | None = None  # int32 [<= seq_len] each
    templated: bool = False
    template_bos: str | None = None  # what is done with the BOS that the chat template writes: "left out" or "kept"
    tokens: int = 0  # handed out
    refused: int = 0  # conversations that the chat template could not format


def open_sources(
    specs: list[str], tokenizer, seq_len: int, *, skip_first: int = 0, pack: bool = True, text_column: tuple[str, ...] = (),
    chat_template: bool = False, commits: dict[str, str] | None = None,
) -> list[TextSource]:  # fmt: skip
    """`SRC` or `SRC=WEIGHT` each, opened. commits: of SRC on the Hub, where it must not be the newest.

    ValueError, naming the flag, if one cannot be opened or lacks the columns.
    """
    sources = []
    for spec in specs:
        name, weight = split_weight(spec)
        path = local_path(name)
        source = TextSource(name, weight, *(load_local(name, path) if path else load_hub(name, (commits or {}).get(name))))
        if source.rows is None:
            documents = map(read_chunks, source.files)
        else:
            documents = table_documents(source, tokenizer, text_column, chat_template)
        # not packed, a document gives one sequence, for which its first piece is enough
        parts = (pieces(document) if pack else itertools.islice(pieces(document), 1) for document in documents)
        tokenized = tokenize(itertools.chain.from_iterable(parts), tokenizer)
        source.sequences = token_sequences(tokenized, tokenizer, seq_len, skip_first, pack)
        sources.append(source)
    if text_column and all(source.rows is None for source in sources):
        raise ValueError(f"--text-column {' '.join(text_column)}: plain text files have no columns; leave it out")
    if chat_template and not any(source.templated for source in sources):
        raise ValueError("--chat-template: no --text has a messages column or several text columns to format; leave it out")
    return sources


def mix(sources: list[TextSource]) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the source, int32 tokens [<= seq_len]): always from the source that is furthest behind its weight.

    A source that runs out is reported once and the others go on. ValueError if one hands out nothing at all.
    """
    left = list(range(len(sources)))
    while left:
        index = min(left, key=lambda i: sources[i].tokens / sources[i].weight)
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
    name, _, right = spec.rpartition("=")
    if not name or os.path.exists(os.path.expanduser(spec)):
        return spec, 1.0
    try:
        weight = float(right)
    except ValueError:
        return spec, 1.0
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"--text {spec}: the weight {right} is not a positive number")
    return name, weight


def local_path(name: str) -> Path | None:
    """The path if `name` is one that exists, None for what may be a Hub id. ValueError, with close names, for other paths."""
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    if path.is_absolute() or name.startswith(("./", "../")) or name.count("/") > 1 or path.suffix in (*TABLES, *TEXTS):
        raise ValueError(f"--text {name}: there is no such file or folder{close_name(path)}; check the path")
    return None


def load_hub(name: str, commit: str | None) -> tuple[datasets.IterableDataset, list[Path], str | None]:
    """`id`, `id:config` or `id:config:split` (the split is train unless given), streamed; no files; its commit.

    commit: None for the newest.
    """
    parts = name.split(":")
    if len(parts) > 3 or not parts[0]:
        raise ValueError(f"--text {name}: is neither an existing path nor a Hub id of the form id:config:split")
    config, split = (parts[1:] + ["", ""])[:2]
    fault = f"--text {name}: is no existing path, and the Hub does not give it as a dataset"
    with library_errors(fault, "check the name and the network, or give a file or folder"):
        if commit is None and not datasets.config.HF_HUB_OFFLINE:  # asks once, where load_dataset tries six times
            commit = HfApi().repo_info(parts[0], repo_type="dataset", timeout=HUB_SECONDS).sha
        rows = datasets.load_dataset(parts[0], config or None, split=split or "train", streaming=True, revision=commit)
    return rows, [], commit


def load_local(name: str, path: Path) -> tuple[datasets.Dataset | datasets.IterableDataset | None, list[Path], None]:
    """Tables and folders of save_to_disk as a dataset, read as it is needed, None for plain text; the files; no commit."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        with library_errors(f"--text {name}: cannot be read as a dataset folder"):
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, dict):  # of splits
                if "train" not in rows and len(rows) > 1:
                    raise ValueError(f"it has the splits {', '.join(rows)} and none named train; give the folder of one")
                rows = rows["train"] if "train" in rows else next(iter(rows.values()))
        return rows, [Path(file["filename"]) for file in rows.cache_files], None
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not any(p[0] == "." for p in f.relative_to(path).parts))
    files = [file for file in files if file.stat().st_size]
    tables, texts = ([f for f in files if f.suffix in known] for known in (TABLES, TEXTS))
    kinds = {TABLES[f.suffix] for f in tables}
    if len(kinds) > 1 or (kinds and any(f.suffix != ".md" for f in texts)):  # a README.md beside tables is no text of theirs
        found = sorted({f.suffix for f in tables + texts})
        raise ValueError(f"--text {name}: holds files of several kinds ({', '.join(found)}); give a folder with one kind")
    if kinds:
        with library_errors(f"--text {name}: cannot be read"):
            rows = datasets.load_dataset(kinds.pop(), data_files=[str(f) for f in tables], split="train", streaming=True)
        return rows, tables, None
    if not texts:
        what = "holds no file with content" if path.is_dir() or not files else "is of an unknown kind"
        raise ValueError(f"--text {name}: {what}; known are {', '.join((*TABLES, *TEXTS))} and folders of save_to_disk")
    return None, texts, None


def fingerprint(files: list[Path]) -> str:
    """A hash of the files' names, sizes and evenly spaced blocks, first and last included; of all blocks if they are few."""
    digest = hashlib.sha256()
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{file.name} {size}\n".encode())
        n_blocks = min(-(-size // BLOCK_BYTES), max(2, FINGERPRINT_BLOCKS * size // max(1, sum(sizes))))
        with open(file, "rb") as content:
            for start in np.linspace(0, max(0, size - BLOCK_BYTES), n_blocks, dtype=np.int64):
                content.seek(start)
                digest.update(content.read(BLOCK_BYTES))
    return digest.hexdigest()


def read_rows(source: TextSource, rows: Iterable[dict]) -> Iterator[dict]:
    """The rows, with the errors of broken files and connections as one sentence."""
    n_read = 0
    try:
        for row in rows:
            yield row
            n_read += 1
    except Exception as error:  # parsers and HTTP clients each raise their own
        if line := broken_line(source.files):
            raise ValueError(f"--text {source.name}: {line}; mend or remove that line") from None
        reason = re.sub(r" in row \d+$", "", first_line(error))  # which the parser counts from 0, and anew in each block
        raise ValueError(f"--text {source.name}: reading stopped after {n_read:,} rows ({reason})") from None


def broken_line(files: list[Path]) -> str | None:
    """The first line of .jsonl or .csv files that is no JSON or no UTF-8, counted from 1, and why."""
    for file in files:
        if file.suffix not in (".jsonl", ".csv"):
            continue
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    text = line.decode()
                    if file.suffix == ".jsonl" and text.strip():
                        json.dumps(json.loads(text), ensure_ascii=False).encode()  # a lone half of a surrogate pair fails here
                except (ValueError, RecursionError) as error:
                    return f"{file.name}, line {number}, cannot be read ({first_line(error)})"
    return None


def read_chunks(file: Path) -> Iterator[str]:
    """A text file in parts, so that its size does not matter."""
    with open(file, encoding="utf-8", errors="replace") as f:
        yield from iter(lambda: f.read(PIECE_CHARS), "")


# --- which text of a row


def table_documents(source: TextSource, tokenizer, text_column: tuple[str, ...], chat_template: bool) -> Iterator[tuple[str]]:
    """The text of each row of a table, as a document of one part. Decides whether the chat template applies to it."""
    name = f"--text {source.name}"
    sample = list(itertools.islice(read_rows(source, source.rows), 20))
    if not sample:
        raise ValueError(f"{name}: holds no rows; give a source with text in it")
    columns = choose_columns(source.name, sample, text_column)
    messages = [c for c in columns if any(isinstance(row[c], list) for row in sample)]
    if messages and len(columns) > 1:
        raise ValueError(
            f"{name}: {messages[0]!r} holds chat messages, not to be joined with {', '.join(columns)}; give it alone"
        )
    if messages and not chat_template:
        raise ValueError(f"{name}: the column {messages[0]!r} holds chat messages; add --chat-template to format them")
    # one column of plain strings is no conversation: web text stays as it is beside chats
    source.templated = chat_template and (bool(messages) or len(columns) > 1)
    if source.templated and tokenizer.chat_template is None:
        raise ValueError(f"--chat-template: the tokenizer has no template to format {name} with; leave the flag out")
    rows = read_rows(source, source.rows.select_columns(list(columns)))
    if source.templated:
        source.template_bos = chat.template_bos(tokenizer)
        return zip(templated(source, rows, columns, tokenizer))
    return zip(joined(rows, columns))


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


def joined(rows: Iterable[dict], columns: tuple[str, ...]) -> Iterator[str]:
    """Each row's texts, without missing and empty ones. Numbers (answers in a CSV) are written out."""
    for row in rows:
        yield "\n\n".join(str(row[c]) for c in columns if isinstance(row[c], (str, int, float)) and str(row[c]).strip())


def templated(source: TextSource, rows: Iterable[dict], columns: tuple[str, ...], tokenizer) -> Iterator[str]:
    """Each row as the chat template writes it; its BOS as `source.template_bos` says.

    Conversations that the template refuses (many know no system role) are counted in source.refused and left out.
    """
    for row in rows:
        try:
            if len(columns) > 1:
                roles = itertools.cycle(("user", "assistant"))
                turns = [{"role": role, "content": str(row[c] or "")} for c, role in zip(columns, roles, strict=False)]
            else:
                turns = [chat.turn(message) for message in row[columns[0]] or []]
            text = chat.format_chat(tokenizer, turns) if any(t["content"] for t in turns) else ""
        except Exception as error:  # a template may raise anything
            if source.refused == 0:
                tqdm.write(f"--text {source.name}: left out what the chat template refuses, at first: {first_line(error)}")
            source.refused += 1
            continue
        yield text.removeprefix(tokenizer.bos_token) if source.template_bos == "left out" else text


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


def tokenize(stream: Iterator[tuple[str, bool]], tokenizer) -> Iterator[tuple[list[int], bool]]:
    """(text of a piece, whether it is its document's last) -> the same with token ids."""
    for piece in stream:
        texts, lasts = [piece[0]], [piece[1]]
        while len(texts) < TOKENIZE_TOGETHER and sum(map(len, texts)) < PIECE_CHARS and (piece := next(stream, None)):
            texts.append(piece[0])
            lasts.append(piece[1])
        # verbose=False: no warning about documents longer than the model, they are cut into sequences below
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        yield from zip(ids, lasts, strict=True)


def token_sequences(
    tokenized: Iterable[tuple[list[int], bool]], tokenizer, seq_len: int, skip_first: int, pack: bool
) -> Iterator[np.ndarray]:
    """Pieces of documents -> int32 sequences [<= seq_len], each with one BOS in front if there is such a token.

    pack: documents are joined by EOS (if there is one) and fill the sequences; else each document gives one, cut to seq_len.
    Sequences that no row would be stored of (no longer than skip_first) are left out.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    buffer = []

    def front(first: list[int]) -> list[int]:
        """What is put before these tokens: a chat template may have written the BOS already."""
        return [] if bos is None or first == [bos] else [bos]

    for ids, last in tokenized:
        if not pack:
            if len(sequence := front(ids[:1]) + ids[:seq_len]) > skip_first:
                yield np.array(sequence[:seq_len], dtype=np.int32)
            continue
        buffer += ids
        # a chat template may have ended the document with EOS already
        if last and eos is not None and (not ids or ids[-1] != eos):
            buffer.append(eos)
        at = 0
        while at + (room := seq_len - len(opening := front(buffer[at : at + 1]))) <= len(buffer):
            yield np.array(opening + buffer[at : at + room], dtype=np.int32)
            at += room
        buffer = buffer[at:]
    if buffer and len(sequence := front(buffer[:1]) + buffer) > skip_first:
        yield np.array(sequence, dtype=np.int32)
