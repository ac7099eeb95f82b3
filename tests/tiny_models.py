"""Two small real language models for tests, benchmarks and the offline walk-through, built from text that any machine has.

    python tests/tiny_models.py OUT

trains a BPE tokenizer and a Llama of 4 layers on the source code of Python's standard library (OUT/base), and trains it
further on English documentation (OUT/ft), and another one on code and documentation in capital letters in turn (OUT/caps):
a fine-tune that learns something the base model does not know. OUT/text holds the texts. No network, a minute or less.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
)
TEXT_CHARS = 1_500_000  # of each text, at most: about 500k tokens


def build(out: str | os.PathLike, steps: int = 250, verbose: bool = False) -> dict[str, str]:
    """Train and save both models. Returns the paths: base, ft (model folders with tokenizer), code, prose (text files).

    `steps` optimizer steps of 2048 tokens for the base model, half as many for the fine-tuned one.
    """
    transformers_logging.disable_progress_bar()
    paths = {name: str(Path(out) / name) for name in ("base", "ft")}
    paths |= {name: str(Path(out) / "text" / f"{name}.txt") for name in ("code", "prose")}
    texts = {"code": standard_library_code(), "prose": documentation()}
    (Path(out) / "text").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        Path(paths[name]).write_text(text, encoding="utf-8")

    tokenizer = train_tokenizer([paths["code"], paths["prose"]])
    ids = {name: torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for name, text in texts.items()}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    for name, text, n_steps in (("base", "code", steps), ("ft", "prose", steps // 2)):
        train(model, ids[text], n_steps)
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
        if verbose:
            losses = ", ".join(f"{held_out_loss(model, ids[t]):.3f} on {t}" for t in texts)
            print(f"{name}: trained {n_steps} steps on {text}, loss in nats a token {losses}")
    if verbose:
        print(f"{out}: base, ft and text ({', '.join(f'{t} {len(ids[t]):,} tokens' for t in texts)})")
    return paths


def fine_tune_on_capitals(out: str | os.PathLike, steps: int = 400) -> dict[str, str]:
    """Fine-tune the base model of `build` on code and on the prose in capital letters, in turn, so that it forgets nothing.

    Capitals are tokenized into pieces that the base model rarely saw. Returns the paths: caps (model folder), capitals (text).
    """
    paths = {"caps": str(Path(out) / "caps"), "capitals": str(Path(out) / "text" / "caps.txt")}
    texts = [(Path(out) / "text" / f"{name}.txt").read_text(encoding="utf-8") for name in ("code", "prose")]
    texts[1] = texts[1].upper()
    Path(paths["capitals"]).write_text(texts[1], encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(out) / "base")
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    pieces = min(map(len, ids)) // 128
    in_turn = torch.stack([i[: pieces * 128].view(pieces, 128) for i in ids], dim=1).flatten()
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(Path(out) / "base")
    train(model, in_turn, steps)
    model.save_pretrained(paths["caps"])
    tokenizer.save_pretrained(paths["caps"])
    return paths


def standard_library_code() -> str:
    """Source of the top-level modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(f.read_text(encoding="utf-8", errors="replace") for f in files)[:TEXT_CHARS]


def documentation() -> str:
    """English prose: the language reference that `help()` shows, then docstrings of the library's packages."""
    from pydoc_data.topics import topics

    parts = [text for _, text in sorted(topics.items())]
    size = sum(map(len, parts))
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py")):
        if size > TEXT_CHARS:
            break
        if file.parts[-2] in ("site-packages", "pydoc_data", "test", "idlelib", "encodings"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        parts += [doc for doc in docs if doc and len(doc) > 80]
        size = sum(map(len, parts))
    return "\n\n".join(parts)[:TEXT_CHARS]


def train_tokenizer(files: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train(
        files,
        trainers.BpeTrainer(
            vocab_size=1024, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def windows(ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    x = ids[starts[:, None] + torch.arange(128)]  # [batch, 128]
    x[:, 0] = 1  # <bos>, as in the sequences that collect.py makes
    return x


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int) -> None:
    """Next-token training on random windows; the last tenth of the text is held out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    random = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        x = windows(ids, torch.randint(len(ids) * 9 // 10 - 128, (16,), generator=random))
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    x = windows(ids, torch.arange(len(ids) * 9 // 10, len(ids) - 128, 128)[:64])
    return model(input_ids=x, labels=x).loss.item()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tiny_models.py OUT")
    build(sys.argv[1], verbose=True)
    fine_tune_on_capitals(sys.argv[1])
