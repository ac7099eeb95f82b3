"""Tokens a second of collect.py against a bare Hugging Face forward pass that stops at the same layer.

    python benchmarks/collect_speed.py

Two Llamas of random weights (12 layers, 768 wide), batches of 64 sequences of 128 tokens, MLP output in the middle layer. The
bare pass runs both models' lower layers over ready token ids and throws the activations away; collect.py also reads text,
filters, scales, shuffles and writes. Its rate comes from two collections of unlike length, so that starting up and the first
look at the norms do not count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from step import machine
from tiny_models import standard_library_code, train_tokenizer

from paired_rows import CALIBRATION_ROWS

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
def bare(models: list, device: torch.device, batches: int) -> float:
    """Tokens a second of both models' lower layers."""
    ids = torch.randint(3, 1024, (BATCH, LENGTH), device=device)
    mask = torch.ones_like(ids)
    for n in (1, batches):  # the first time to warm up
        started = time.perf_counter()
        for _ in range(n):
            for model in models:
                out = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        if device.type == "cuda":
            torch.cuda.synchronize()
    del out
    return batches * BATCH * LENGTH / (time.perf_counter() - started)


def collect(folder: Path, rows: int, device: torch.device) -> float:
    """Seconds of a collection."""
    command = [sys.executable, str(ROOT / "collect.py"), "--base-model", str(folder / "base"), "--ft-model", str(folder / "ft")]
    command += ["--hook", f"model.layers.{LAYER}.mlp", "--text", str(folder / "text.txt"), "--pack", "--seq-len", str(LENGTH)]
    command += ["--batch-size", str(BATCH), "--num-tokens", str(rows), "--model-dtype", "float32", "--device", str(device)]
    command += ["--skip-first", "0", "--val-tokens", "0"]  # so that a row is a token and no forward batch is cut
    started = time.perf_counter()
    subprocess.run([*command, "--output", str(folder / f"rows-{rows}")], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=6, help="by which the collections differ, and of the bare pass")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(folder, device)
        more = args.batches * BATCH * LENGTH  # rows; both collections look at the norms of as many first rows
        short = collect(folder, CALIBRATION_ROWS, device)
        long = collect(folder, CALIBRATION_ROWS + more, device)
        ours = more / (long - short)
        rate = bare(models, device, args.batches)
    print(f"{machine(device)}: two Llamas of 12 layers, 768 wide, {BATCH} x {LENGTH} tokens, up to layer {LAYER}\n")
    print("| way | tokens/s | of the bare pass |\n|---|---:|---:|")
    print(f"| bare forward pass | {rate:,.0f} | |\n| collect.py | {ours:,.0f} | {ours / rate:.0%} |")


if __name__ == "__main__":
    main()
