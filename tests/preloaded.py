"""What the servers of processes.py hold before they fork: the libraries, the entries, and command lines understood once."""

import gc
from importlib import import_module

import config
from run.flags import parse

LIBRARIES = ["torch._dynamo", "datasets", "transformers.models.llama.modeling_llama", "nnsight", "wandb", "matplotlib.pyplot"]
ENTRIES = ["train", "collect", "analyze", "formats", "sources.live", "collecting.paired_rows", "analysis.steering"]

for name in LIBRARIES + ENTRIES:
    import_module(name)
parse(config.TrainConfig, ["--num-tokens", "1"])
parse(config.CollectConfig, ["--output", "x", "--base-model", "x", "--ft-model", "x", "--hook", "x", "--text", "x"])
parse(config.AnalyzeConfig, ["x"])
parse(config.FormatsConfig, ["x", "x", "--to", "crosscoder"])
gc.collect()
gc.freeze()  # or the first collection in each child would write to all of these pages, and they would be copied
