"""Tokens a second of collect.py against a bare Hugging Face forward pass that stops at the same layer.

    python benchmarks/collect_speed.py

Then the same again with two hooks, the other four layers lower: what the second one costs in time and in processor time.

Two Llamas of random weights (12 layers, 768 wide), batches of 64 sequences of 128 tokens, MLP output in the middle layer. A
collection runs, and before each of its forward batches the bare pass runs both models' lower layers over ready token ids and
throws the activations away: the two take turns, so that a machine that is faster now and slower then is so for both. What lies
between two bare passes is the collection's: text, both models, filters, scales, shuffling and writing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from step import machine
from tiny_models import standard_library_code, train_tokenizer

import collect
from collecting import language_model
from config import CollectConfig

BATCH, LENGTH, LAYER = 64, 128, 6


def make_models(folder: Path, device: torch.device) -> list[LlamaForCausalLM]:
    """Two untrained Llamas with one tokenizer, saved as base and ft; the same, cut after the hook's layer."""
    (folder / "text.txt").write_text(standard_library_code())
    tokenizer = train_tokenizer([str(folder / "text.txt")])
    models = []
    for seed, name in enumerate(("base", "ft")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        model.model.layers = model.model.layers[: LAYER + 1]
        models.append(model.model.to(device))
    return models


@torch.no_grad()
def bare(models: list, device: torch.device) -> None:
    """One batch through both models' lower layers."""
    ids = torch.randint(3, 1024, (BATCH, LENGTH), device=device)
    for model in models:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turns(models: list, folder: Path, batches: int, hooks: list[str], device: torch.device) -> np.ndarray:
    """[2, 2] seconds of a batch, the bare pass's and the collection's, each over so many: on the clock, of the processor."""
    original, ended, began = language_model.paired_activations, [], []

    def after_a_bare_pass(*args, **settings):
        ended.append((time.perf_counter(), time.process_time()))
        bare(models, device)
        began.append((time.perf_counter(), time.process_time()))
        return original(*args, **settings)

    language_model.paired_activations = after_a_bare_pass
    rows = (batches + 1) * BATCH * LENGTH  # the last batch is not counted: what follows it is the end of the collection
    config = CollectConfig(
        base_model=str(folder / "base"), ft_model=str(folder / "ft"), hook=hooks, model_dtype="float32",
        text=[str(folder / "text.txt")], pack=True, seq_len=LENGTH, batch_size=BATCH, num_tokens=rows, device=str(device),
        shard_rows=2 * BATCH * LENGTH, skip_first=0, val_tokens=0, output=str(folder / f"rows{len(hooks)}"),
    )  # fmt: skip
    collect.main(config)
    language_model.paired_activations = original
    ended, began = np.array(ended), np.array(began)
    return np.stack([(began - ended)[:-1].sum(0), (ended[1:] - began[:-1]).sum(0)]) / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="of each way")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models, hooks = make_models(folder, device), [f"model.layers.{LAYER - 4}.mlp", f"model.layers.{LAYER}.mlp"]
        one, two = (take_turns(models, folder, args.batches, given, device) for given in (hooks[1:], hooks))
    tokens, plain, ours = BATCH * LENGTH, *one[:, 0]
    print(f"{machine(device)}: two Llamas of 12 layers, 768 wide, {BATCH} x {LENGTH} tokens, up to layer {LAYER}\n")
    print("| way | tokens/s | of the bare pass |\n|---|---:|---:|")
    print(f"| bare forward pass | {tokens / plain:,.0f} | |\n| collect.py | {tokens / ours:,.0f} | {plain / ours:.0%} |")
    print(f"| collect.py, two hooks | {tokens / two[1, 0]:,.0f} | {two[0, 0] / two[1, 0]:.0%} |")
    # against the bare pass of the same run, so that a machine that has become slower is no slower way
    clock, processor = (two[1] / two[0]) / (one[1] / one[0])
    print(f"\ntwo hooks against one: {clock:.2f} times the time, {processor:.2f} times the processor's")


if __name__ == "__main__":
    main()
