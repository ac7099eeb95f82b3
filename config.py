"""Every knob of the project: edit a default here, or give the flag on the command line.

The comment above a field is its --help, `# --- title` its group there. A field at None is decided when the run starts, as its
comment says after `Default:`, or from the block REAL (a run on your activations) or PLANTED (the demonstration, which makes
its own). Why a default is what it is: docs/recipes.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

# Sizes of a run on real activations, meant for one GPU. The recipe is that of the open Gemma-2-2b crosscoders.
REAL = dict(
    d_hidden=16_384, k=100, k_start=32.0, batch_size=4096, l1_coeff=2.0, l1_warmup=0.8, resample_until=0.6,
    val_tokens=131_072, buffer_tokens=262_144, log_every=50, val_every=1000, save_every=1000,
)  # fmt: skip
# Sizes of the demonstration on planted concepts: a minute on two CPU cores.
PLANTED = dict(
    d_hidden=2048, k=16, k_start=32.0, batch_size=1024, l1_coeff=2.0, l1_warmup=0.8, resample_until=0.6,
    num_tokens=1_000_000, val_tokens=16_384, log_every=50, val_every=500, save_every=500,
)  # fmt: skip
# With --variant batch_topk, where k decides how sparse the codes are and the penalty only separates concepts.
TOPK = dict(l1_coeff=1.3)
# With --init-from: a trained dictionary is sparse and its concepts are apart from the first step.
WARM, WARM_TOPK = dict(k_start=1.0, l1_warmup=0.0, resample_until=0.0), dict(l1_coeff=0.0)
# Peak learning rate = LR_FACTOR / sqrt(d_model * d_hidden). Found on planted worlds (d_model 64 to 256, d_hidden 512 to 4096,
# batches of 512 to 2048, seeds 101 to 103) and the tiny Llama pair of tests/; for Gemma-2-2b with 73,728 latents it gives
# 1.5e-4, near what others use, but nothing of that size was tuned here.
LR_FACTOR = 2

# The flags that most runs need, which each command's --help shows first.
FIRST = {
    "TrainConfig": "dataset variant d_hidden k l1_coeff num_tokens epochs batch_size run_name resume",
    "CollectConfig": "base_model ft_model hook text chat_template num_tokens output batch_size model_dtype device",
    "AnalyzeConfig": "run base_model ft_model model_dtype dataset num_tokens latents sections_per_class output device",
    "FormatsConfig": "src dst to activation_scale",
}


@dataclass(kw_only=True, frozen=True)
class DatasetFlags:
    """Activations that lie on the disk or on the Hub."""

    # --- own activations

    # Activations that collect.py wrote: a folder or a Hub id.
    dataset: str | None = None

    # Activations of the base model, one row a token: a folder (save_to_disk), a .parquet or .arrow file, or a Hub id
    # (`user/name`, `user/name:config:split`). Goes with --ft-dataset, instead of --dataset.
    base_dataset: str | None = None
    # Activations of the fine-tuned model at the same tokens in the same order.
    ft_dataset: str | None = None

    # Column of the base dataset that holds the activations. Default: the only column of float lists.
    base_column: str | None = None
    # The same for the fine-tuned dataset. Default: the only column of float lists.
    ft_column: str | None = None


@dataclass(kw_only=True, frozen=True)
class ModelFlags:
    """Two models and the text that both read: what collect.py stores, and what train.py trains on without storing it."""

    # --- models and text

    # Base model: a Hugging Face id or a folder.
    base_model: str | None = None
    # Fine-tuned model, of the same tokenizer. Default: with --ft-adapter the base model.
    ft_model: str | None = None
    # LoRA or other peft adapter that is merged into the fine-tuned model: a Hugging Face id or a folder (`pip install peft`).
    ft_adapter: str | None = None

    # Branch, tag or commit of a base model on the Hub, e.g. a training checkpoint. Default: its newest.
    base_revision: str | None = None
    # The same for the fine-tuned model. Default: its newest.
    ft_revision: str | None = None

    # Where to read: dotted path of a module, e.g. model.layers.16.mlp (its output) or model.layers.16.mlp.input.
    hook: str | None = None
    # Hook in the fine-tuned model, where its path differs. Default: the same as --hook.
    ft_hook: str | None = None

    # Hub id (name:config:split), folder or .txt, .jsonl, .csv, .parquet file; =WEIGHT: its share.
    text: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)

    # Columns that hold the text, joined by a blank line, e.g. --text-column prompt answer (with --chat-template two turns). Of
    # several sources each uses those that it has. Default: text, content, messages or conversation, whichever a source has.
    text_column: list[str] = field(default_factory=list)

    # Format chats with the fine-tuned model's chat template.
    chat_template: bool = False

    # Tokens per sequence.
    seq_len: int = 1024
    # Join documents until a sequence is full. --no-pack: one document a sequence, cut to --seq-len.
    pack: bool = True

    # Precision of the models.
    model_dtype: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = "bfloat16"

    # Leading positions of each sequence left out (BOS, attention sinks: 1 for Gemma 2, 21 for Qwen 2.5, 25 for Llama 3). With
    # --no-pack also the opening of a chat template, which a base model never saw.
    skip_first: int = 1
    # Rows whose norm in either model is above this multiple of the median are left out (attention sinks), by train.py too where
    # the data has no pair.json.
    max_norm_ratio: float = 10.0

    # Device of the base model. Default: --device.
    base_device: str | None = None
    # Device of the fine-tuned model. Default: --device.
    ft_device: str | None = None


@dataclass(kw_only=True, frozen=True)
class TrainConfig(ModelFlags, DatasetFlags):
    """Train a crosscoder on two models' activations, or without data on made-up ones.

    python train.py --dataset data/pair --variant batch_topk --d-hidden 32_768
    """

    # --- live training

    # Sequences per forward pass of the two models.
    model_batch_size: int = 8
    # Most rows in the buffer that batches are drawn from, 4 x d_model bytes each, at most a tenth of the run; also with
    # --streaming. More mixes better.
    buffer_tokens: int | None = None
    # Folder that keeps the activations of the first pass over the texts, as the dataset that collect.py would write.
    keep_activations: str | None = None

    # --- data

    # More than two models: activations of one model, given once for each, the base model first, as for --base-dataset.
    model_dataset: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    # Train on x_ft - x_base, as if of one model: its dictionary holds what fine-tuning changed and nothing of what stayed.
    difference: bool = False
    # Read datasets on the Hub, or folders of .parquet files, while training instead of downloading them first.
    streaming: bool = False

    # Length of the run in tokens (rows). Default: one pass over the dataset, 1_000_000 in the demonstration.
    num_tokens: int | None = None
    # Length of the run in passes, instead of --num-tokens.
    epochs: int | None = None

    # Rows held out of training, behind every val_ metric: the split validation, else the last rows (--streaming: the first),
    # at most a tenth of all.
    val_tokens: int | None = None

    # Subtract each model's mean activation before scaling its mean norm to sqrt(d_model).
    center: bool = True

    # --- dictionary

    # Start from a trained crosscoder in any layout that formats.py reads, or from a SAELens SAE of the base model for both
    # halves: a folder, .pt file or Hub id. --d-hidden and --k are then its own.
    init_from: str | None = None

    # Sparse by an L1 penalty, or by k.
    variant: Literal["vanilla", "batch_topk"] = "vanilla"
    # Latents, 8 to 32 times d_model as a rule.
    d_hidden: int | None = None
    # batch_topk: mean active latents per token.
    k: int | None = None
    # batch_topk: the run starts with this multiple of k. Default: 32, or 1 with --init-from.
    k_start: float | None = None
    # Share of the run over which k falls to its final value, by equal factors.
    k_anneal: float = 0.8

    # Weight of the L1 loss. Default: 2; 1.3 for batch_topk.
    l1_coeff: float | None = None
    # Share of the run over which the L1 weight rises from 0; with batch_topk it falls to 0 again at the end. Default: 0.8, or 0
    # with --init-from.
    l1_warmup: float | None = None

    # Weight of the auxiliary loss, in which dead latents predict the residual (Gao et al., arXiv 2406.04093). 0: off.
    aux_coeff: float = 1.0
    # Dead latents per token that the auxiliary loss uses. Default: d_model / 2.
    k_aux: int | None = None
    # A latent is dead when it has not fired for this share of the run, at most 10 million tokens.
    dead_window: float = 0.1

    # From a fifth of the run to this share of it, idle latents (small decoder norms) and copies (of a latent with a larger one)
    # start anew at what the residual of one model holds and the other's does not: rare exclusive concepts are found so. With
    # batch_topk copies are also tried on large residuals of any kind. 0: never. Default: 0.6, or 0 with --init-from.
    resample_until: float | None = None

    # Norm of each decoder row per model at the start; the encoder starts as its transpose.
    dec_init_norm: float = 1.0

    # --- optimisation

    # Tokens per step; some ten thousand steps are wanted.
    batch_size: int | None = None
    # Tokens computed at once; fewer take less memory. With batch_topk each part keeps its own k * tokens codes. Default: the
    # whole batch.
    micro_batch_size: int | None = None

    # Peak learning rate of Adam. Default: 2 / sqrt(d_model * d_hidden).
    lr: float | None = None
    # Share of the run over which the learning rate rises from 0.
    lr_warmup: float = 0.02
    # Share of the run, at its end, over which the learning rate falls linearly to 0.
    lr_decay: float = 0.8

    # Adam's decay of the gradient mean.
    beta1: float = 0.9
    # Adam's decay of the squared gradient mean.
    beta2: float = 0.999
    # Largest norm of the whole gradient; larger ones are scaled down to it.
    grad_clip: float = 1.0

    # Precision of the matrix products alone. auto: bfloat16 on CUDA and on processors that multiply it (AMX, AVX-512).
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # CUDA if there is one, or cpu, cuda:1, ...
    device: str = "auto"
    # Decides weights and row order: same seed and machine, same numbers.
    seed: int = 0

    # --- logging and saving

    # Steps between lines of metrics.jsonl (and points in wandb).
    log_every: int | None = None
    # Steps between measurements on the held-out rows.
    val_every: int | None = None
    # Steps between checkpoints. One is also written at the end, on Ctrl-C and on SIGTERM.
    save_every: int | None = None
    # Newest checkpoints kept; each is three times the size of the weights.
    keep_checkpoints: int = 2

    # auto: online where wandb finds a key or a login, else offline files inside the run's folder.
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    # wandb project that the run appears in.
    wandb_project: str = "crosscoder"
    # wandb user or team. Default: yours.
    wandb_entity: str | None = None

    # Folder in --output-dir. Default: variant and time.
    run_name: str | None = None
    # Folder of all runs.
    output_dir: str = "runs"

    # Hub repository (user/name) that the finished crosscoder goes to, with a card made from the run. A new one is private.
    push_to_hub: str | None = None

    # Run to go on with: its folder, or auto for --run-name, new or not. Its config.json has the other flags.
    resume: str | None = None
    # config.json of an earlier run to start from; flags on the command line win over it.
    config: str | None = None


@dataclass(kw_only=True, frozen=True)
class CollectConfig(ModelFlags):
    """Run two models or more over the same text and store their activations.

    python collect.py --base-model A --ft-model B --hook H --text T --output data
    """

    # --- models and text

    # Instead of --base-model and --ft-model, also for more than two: given once for each model, the base model first. A branch,
    # tag or commit on the Hub is named with @, e.g. --model EleutherAI/pythia-70m@step1000.
    model: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    # Module to read, e.g. model.layers.13; each of several makes OUTPUT/HOOK.
    hook: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)  # type: ignore[assignment]
    # Folder to write. The same command goes on with an unfinished collection there.
    output: str
    # Rows (tokens) to store, those held out included.
    num_tokens: int = 1_000_000

    # --- storing

    # Rows held out: one of every four sequences from the beginning of the texts, until there are enough. Default: a twentieth
    # of --num-tokens, at most 2 million.
    val_tokens: int | None = None
    # Sequences a pass; fewer take less memory.
    batch_size: int = 8
    # Precision of the stored activations: 2 or 4 bytes a value.
    dtype: Literal["float16", "float32"] = "float16"
    # Rows shuffled together and written as one shard, at most a twentieth of --num-tokens. More mixes better; memory holds two
    # shards, and a kill loses the one in work.
    shard_rows: int = 131_072
    # Decides the shuffling and the held-out sequences.
    seed: int = 0
    # CUDA if there is one, or cpu, cuda:1, ...
    device: str = "auto"
    # Hub dataset repository (user/name) that the complete collection goes to, for train.py --dataset. A new one is private.
    push_to_hub: str | None = None


@dataclass(kw_only=True, frozen=True)
class FormatsConfig:
    """Convert a crosscoder between our layout and those of other projects.

    python formats.py runs/gemma/crosscoder out --to crosscoder_learning
    """

    # Folder, .pt file or Hub id (user/name, user/name/folder), in any layout of --to.
    src: Annotated[str, tyro.conf.Positional]
    # Folder to write, not there yet or empty.
    dst: Annotated[str, tyro.conf.Positional]

    # Layout to write. crosscoder: ours. crosscoder_learning: that of Minder et al. ckkissane: cfg.json, cc_weights.pt (vanilla
    # alone). saelens: of each model a JumpReLU SAE with its half of the decoder.
    to: Literal["crosscoder", "crosscoder_learning", "ckkissane", "saelens"]

    # For a ckkissane source: what base and ft activations were multiplied with, sqrt(d_model) / mean norm; 1 1 if that is in
    # the weights.
    activation_scale: tuple[float, float] | None = None


@dataclass(kw_only=True, frozen=True)
class AnalyzeConfig(DatasetFlags):
    """Rank the latents that fine-tuning changed and write a page, report.html.

    python analyze.py runs/NAME --base-model A --ft-model B
    """

    # A run's folder, or a crosscoder with --dataset.
    run: Annotated[str, tyro.conf.Positional]

    # --- models

    # Base model, for KL, loss, steering: an id or a folder.
    base_model: str | None = None
    # Fine-tuned model: an id or a folder. Default: with --ft-adapter the base model.
    ft_model: str | None = None
    # Adapter that is merged into the fine-tuned model, as for collect.py.
    ft_adapter: str | None = None
    # Where to replace activations. Default: where the dataset was collected, as its pair.json says.
    hook: str | None = None
    # Hook in the fine-tuned model, where its path differs. Default: the same as --hook.
    ft_hook: str | None = None

    # Precision of the models.
    model_dtype: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = "bfloat16"
    # Sequences per forward pass of the models.
    model_batch_size: int = 4
    # Tokens of held-out sequences that the models run over, each in about 20 passes of one model. Default: 65,536; on a CPU
    # fewer with a large model: 2e11 over its parameters.
    patch_tokens: int | None = None

    # --- steering with the models

    # Latents to add and take away, e.g. 12,99, one by one and together; none: no steering. Default, given the models: the first
    # 3 by rank, together. A prompt costs, for each group, some 160 passes over it and an answer, and 18 answers of 24 tokens.
    steer: str | None = None
    # Prompts, one a line, or a .jsonl with prompt or messages. Default: 8 user turns or openings of the held-out texts.
    prompts: str | None = None
    # Regular expression; counted are the answers in which it is found, e.g. "(?i)iceland".
    behaviour: str | None = None
    # Tokens at which activations are steered: those of prompt and answer, or the answer's alone.
    steer_at: Literal["all", "answer"] = "all"

    # --- measuring and showing

    # Rows (tokens) to read, held-out ones first. Rare latents need many.
    num_tokens: int = 1_000_000

    # Latents that get a section too, e.g. 12,99.
    latents: str = ""
    # First latents by rank, of each direction.
    sections_per_class: int = 30
    # Strongest examples of such a latent. As many are drawn evenly from the lower ranges of its activation.
    examples: int = 10
    # Tokens shown before and after an example's strongest token.
    context: int = 24
    # Folder to write; it is replaced. Default: RUN/analysis.
    output: str | None = None
    # Decides which shared latents and which weaker examples are drawn.
    seed: int = 0
    # CUDA if there is one, or cpu, cuda:1, ...
    device: str = "auto"

    # --- latents in words and for other tools

    # Chat endpoint that describes latents, e.g. https://api.openai.com/v1 or a local one; its key in OPENAI_API_KEY.
    label_url: str | None = None
    # Model to ask there.
    label_model: str | None = None
    # Write RUN/analysis/export/NAME for another tool, repeatable: delphi's cache of latents, files that neuronpedia imports.
    export: Annotated[list[Literal["delphi", "neuronpedia"]], tyro.conf.UseAppendAction] = field(default_factory=list)


def model_flags(config: ModelFlags) -> dict:
    """The flags that say which models read which text, and how, without the devices: {field: value}."""
    names = [f.name for f in dataclasses.fields(ModelFlags) if f.name not in ("base_device", "ft_device")]
    return {name: getattr(config, name) for name in names}
