"""Every knob of the project, with its unit, its default and the reason for it. The comment above a field is also its --help.

Edit a default here, or give the flag on the command line. A field left at None is decided when the run starts: sizes
come from the block REAL (a run on your activations) or PLANTED (the demonstration), the rest as its text says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

# Sizes of a run on real activations, meant for one GPU. The recipe is that of the open Gemma-2-2b crosscoders.
REAL = dict(
    d_hidden=16_384, k=100, k_start=32.0, batch_size=4096, l1_coeff=2.0, l1_warmup=0.8,
    val_tokens=131_072, buffer_tokens=262_144, log_every=50, val_every=1000, save_every=1000,
)  # fmt: skip
# Sizes of the demonstration on planted concepts: a minute on two CPU cores.
PLANTED = dict(
    d_hidden=2048, k=16, k_start=32.0, batch_size=1024, l1_coeff=2.0, l1_warmup=0.8, num_tokens=1_000_000,
    val_tokens=16_384, log_every=50, val_every=500, save_every=500,
)  # fmt: skip
# With --variant batch_topk, where k decides how sparse the codes are and the penalty only separates concepts.
TOPK = dict(l1_coeff=1.5)
# With --init-from: a trained dictionary is sparse and its concepts are apart from the first step.
WARM, WARM_TOPK = dict(k_start=1.0, l1_warmup=0.0), dict(l1_coeff=0.0)
# Peak learning rate = LR_FACTOR / sqrt(d_model * d_hidden). Found on planted worlds (d_model 64 to 256, d_hidden 512 to 4096,
# batches of 512 to 2048, seeds 101 to 103) and the tiny Llama pair of tests/; for Gemma-2-2b with 73,728 latents it gives
# 1.1e-4, near what others use, but nothing of that size was tuned here.
LR_FACTOR = 1.44


@dataclass(kw_only=True, frozen=True)
class DatasetFlags:
    """Activations that lie on the disk or on the Hub."""

    # Paired activations written by collect.py: a folder, or a Hub dataset with the configs base, ft and tokens.
    dataset: str | None = None

    # Activations of the base model, one row a token: a folder (save_to_disk), a .parquet or .arrow file, or a Hub id
    # (`user/name`, `user/name:config:split`). Goes with --ft-dataset, instead of --dataset.
    base_dataset: str | None = None

    # Activations of the fine-tuned model at the same tokens in the same order.
    ft_dataset: str | None = None

    # Column of the base dataset that holds the activations. None: the only column of float lists.
    base_column: str | None = None

    # The same for the fine-tuned dataset.
    ft_column: str | None = None


@dataclass(kw_only=True, frozen=True)
class ModelFlags:
    """Two models and the text that both read: what collect.py stores, and what train.py trains on without storing it."""

    # Base model: a Hugging Face id or a folder.
    base_model: str | None = None

    # Branch, tag or commit of a base model on the Hub, e.g. a training checkpoint. None: its newest.
    base_revision: str | None = None

    # Fine-tuned model: a Hugging Face id or a folder. Its tokenizer must agree with the base model's. May be left out with
    # --ft-adapter: then it is the base model with that adapter.
    ft_model: str | None = None

    # The same as --base-revision for the fine-tuned model.
    ft_revision: str | None = None

    # LoRA or other peft adapter that is merged into the fine-tuned model: a Hugging Face id or a folder (`pip install peft`).
    ft_adapter: str | None = None

    # Where to read: dotted path of a module, e.g. model.layers.16.mlp (its output) or model.layers.16.mlp.input.
    hook: str | None = None

    # Hook in the fine-tuned model, where its path differs. None: the same as --hook.
    ft_hook: str | None = None

    # Text source, repeatable: a Hub id (`user/name:config:split`), a folder, or a .txt, .jsonl, .csv or .parquet file.
    # Add =WEIGHT for its share of the tokens: --text web=1 --text chat=1 is the published recipe.
    text: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)

    # Columns that hold the text, joined by a blank line, e.g. --text-column prompt answer. Of several sources each uses
    # those of the columns that it has. Empty: text, content, messages or conversation, whichever the source has.
    text_column: list[str] = field(default_factory=list)

    # Format messages (or prompt and answer columns, in turn user and assistant) with the fine-tuned model's chat template.
    # Sources with a single column of plain text stay as they are, so web text and chats mix.
    chat_template: bool = False

    # Tokens per sequence.
    seq_len: int = 1024

    # Join documents until a sequence is full. --no-pack: one document a sequence, cut to --seq-len; those of similar length
    # share a forward pass, so that little is padding.
    pack: bool = True

    # Precision in which the models run. int8 and nf4: weights of 1 or half a byte each, made by bitsandbytes when a model is
    # loaded (`pip install bitsandbytes accelerate`), the rest bfloat16. A model that was saved quantised loads as it is.
    model_dtype: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = "bfloat16"

    # Leading positions of each sequence left out (BOS and attention sinks: Gemma 1, Qwen 2.5 about 21, Llama 3 about 25). With
    # --no-pack also the opening of a chat template, which a base model never saw.
    skip_first: int = 1

    # Rows with a norm above this multiple of the median, in either model, are left out of both (activation sinks). train.py
    # applies it to datasets without a pair.json too.
    max_norm_ratio: float = 10.0

    # Device of the base model, if another than --device.
    base_device: str | None = None

    # Device of the fine-tuned model, if another than --device.
    ft_device: str | None = None


@dataclass(kw_only=True, frozen=True)
class TrainConfig(ModelFlags, DatasetFlags):
    """Train a crosscoder on the paired activations of a base model and its fine-tuned version.

    Without data it trains on planted concepts, activations whose true directions are known, and prints how many of them it
    found. Real data: `python collect.py ...` first, then `python train.py --dataset OUT`; or straight from the two models
    with --base-model, --ft-model, --hook, --text and --num-tokens.
    """

    # --- straight from the two models

    # Sequences per forward pass of the two models.
    model_batch_size: int = 8

    # Most rows that the buffer holds, from which batches are drawn mixed, half of them replaced at a time; also with
    # --streaming. More mixes better and takes 4 x d_model bytes a row. None: 262,144, at most a tenth of the run.
    buffer_tokens: int | None = None

    # Folder that keeps the activations of the first pass over the texts, as the paired dataset that collect.py would write.
    keep_activations: str | None = None

    # --- data

    # More than two models: activations of one model, given once for each, the base model first; all at the same tokens in
    # the same order, as for --base-dataset. Metrics of the third model end in _C, and so on.
    model_dataset: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)

    # Train on x_ft - x_base, as if of one model: its dictionary holds what fine-tuning changed and nothing of what stayed.
    difference: bool = False

    # Read the datasets over the network while training instead of downloading them first, through a buffer (--buffer-tokens).
    # Goes with datasets on the Hub, or folders of .parquet files. Held-out rows and mean and scale come from their first rows.
    streaming: bool = False

    # Length of the run in tokens (paired rows). None: one epoch (planted concepts: the size in PLANTED). Beyond the rows
    # of the dataset or the end of the texts they come again in another order.
    num_tokens: int | None = None

    # Length of the run in passes over the dataset, instead of --num-tokens.
    epochs: int | None = None

    # Held-out rows, never trained on, behind every val_ metric. A dataset without a validation split gives its last rows, with
    # --streaming its first, texts give whole sequences. None: the size in REAL, at most a tenth of the rows or of --num-tokens.
    val_tokens: int | None = None

    # Subtract each model's mean activation before scaling its mean norm to sqrt(d_model). Uncentred outlier dimensions
    # are the best known predictor of dead latents (arXiv 2605.31518).
    center: bool = True

    # --- dictionary

    # Start from a trained crosscoder in any layout that formats.py reads (folder, .pt file or Hub id), or from a SAELens SAE
    # of the base model for both halves. --d-hidden and --k are then its own; of one with thresholds and no k (JumpReLU), k is
    # its L0 on the first rows.
    init_from: str | None = None

    # vanilla: ReLU codes with an L1 penalty weighted by decoder norms. batch_topk: the k * batch largest codes of a batch
    # are kept, so L0 is chosen instead of tuned.
    variant: Literal["vanilla", "batch_topk"] = "vanilla"

    # Number of latents. Usual: 8 to 32 times d_model.
    d_hidden: int | None = None

    # batch_topk: most active latents per token, averaged over a batch. The penalty may leave fewer; --l1-coeff 0 gives just k.
    k: int | None = None

    # batch_topk: the run starts with this multiple of k. With many active latents each concept soon has one of its own; from
    # k alone, concepts that occur together share one and are never told apart. None: 32, or 1 with --init-from.
    k_start: float | None = None

    # Share of the run over which k falls to its final value, by equal factors.
    k_anneal: float = 0.8

    # Weight of the L1 loss. None: 2 for vanilla, 1.5 for batch_topk, where it only separates concepts
    # that k alone leaves mixed: it falls to 0 over the last fifth of the run. 0 with --init-from and batch_topk.
    l1_coeff: float | None = None

    # Share of the run over which the L1 weight rises from 0. A weak penalty tells rare concepts apart, a strong one then makes
    # the codes sparse; strong from the start it keeps whole groups of rare concepts in one latent. None: 0.8, or 0 with
    # --init-from.
    l1_warmup: float | None = None

    # Weight of the auxiliary loss, in which dead latents predict the residual (Gao et al., arXiv 2406.04093), in the units of
    # l2_loss; vanilla leaves their biases out there. 0 turns it off; it costs nothing until a latent can be dead.
    aux_coeff: float = 1.0

    # Dead latents per token that the auxiliary loss uses. None: d_model / 2.
    k_aux: int | None = None

    # A latent is dead when it has not fired for this share of the run, at most 10 million tokens.
    dead_window: float = 0.1

    # Norm of each decoder row per model at the start; the encoder starts as its transpose. With batch_topk smaller rows lose
    # rare concepts (one seed of the hard world: 0.92 of the exclusive ones found at 1, 0.73 at 0.08); vanilla hardly changes.
    dec_init_norm: float = 1.0

    # --- optimisation

    # Tokens per step. Where tokens are few, make it small enough for some ten thousand steps: with 6 million tokens of the hard
    # planted world 30 % of the latents called exclusive were wrong in batches of 2048, 14 % in 1024, 1 % in 512 (one seed).
    batch_size: int | None = None

    # Tokens computed at once, fewer for less memory: the gradients of a step's parts add up. With batch_topk each part
    # keeps its own k * tokens scores. None: the whole batch.
    micro_batch_size: int | None = None

    # Peak learning rate of Adam. None: 1.44 / sqrt(d_model * d_hidden). A lower one tells more of the rare shared concepts of
    # the hard planted world apart and leaves fewer latents dead, a higher one finds more of the rarest exclusive ones.
    lr: float | None = None

    # Share of the run over which the learning rate rises from 0.
    lr_warmup: float = 0.02

    # Share of the run, at its end, over which the learning rate falls linearly to 0. A shorter fall leaves more latents dead.
    lr_decay: float = 0.4

    # Adam's decay of the gradient mean.
    beta1: float = 0.9

    # Adam's decay of the squared gradient mean.
    beta2: float = 0.999

    # Largest norm of the whole gradient; larger ones are scaled down to it.
    grad_clip: float = 1.0

    # Precision of the matrix products alone. auto: bfloat16 on CUDA and on processors with AMX, there four times as fast.
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    # auto (CUDA where there is one), cpu, cuda, cuda:1, ...
    device: str = "auto"

    # Decides weights, row order and planted concepts: same seed and machine, same numbers.
    seed: int = 0

    # --- watching and saving

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

    # wandb user or team. None: your default.
    wandb_entity: str | None = None

    # The run is written to OUTPUT_DIR/RUN_NAME. None: made from the variant and the time.
    run_name: str | None = None

    # Folder of all runs.
    output_dir: str = "runs"

    # Hub repository (user/name) that the finished crosscoder goes to, with a card made from the run. A new one is private.
    push_to_hub: str | None = None

    # auto: go on from the newest checkpoint of --run-name, fresh if nothing is there yet. PATH: of that run or checkpoint.
    # The run's own config.json supplies all other flags; only length, logging and device flags may differ from it.
    resume: str | None = None

    # config.json of an earlier run to start from; flags on the command line win over it.
    config: str | None = None


@dataclass(kw_only=True, frozen=True)
class CollectConfig(ModelFlags):
    """Run two models over the same text and write their activations at one hook as a paired dataset for train.py."""

    # Base model: a Hugging Face id or a folder.
    base_model: str = field()

    # Where to read: dotted path of a module, e.g. model.layers.16.mlp (its output) or model.layers.16.mlp.input.
    hook: str = field()

    # Folder to write. An unfinished collection there goes on after its last complete shard, if models and texts are the same.
    output: str

    # Rows (paired token activations) to store, held-out rows included.
    num_tokens: int = 1_000_000

    # Rows held out, as closely as whole sequences allow: one of every four sequences from the beginning of the texts, until
    # there are enough, outliers counted. At most a quarter of --num-tokens. None: a twentieth, at most 2 million.
    val_tokens: int | None = None

    # Sequences per forward pass.
    batch_size: int = 8

    # Precision of the stored activations: 2 or 4 bytes a value.
    dtype: Literal["float16", "float32"] = "float16"

    # Rows shuffled together and written as one shard, and at most a twentieth of --num-tokens, because a kill loses the shard
    # in work: more mixes better and needs more memory, which holds two.
    shard_rows: int = 131_072

    # Decides the shuffling and the held-out sequences.
    seed: int = 0

    # Device of both models: auto (CUDA where there is one), cpu, cuda, cuda:1, ...
    device: str = "auto"

    # Hub dataset repository (user/name) that the complete collection goes to, for train.py --dataset. A new one is private.
    push_to_hub: str | None = None


@dataclass(kw_only=True, frozen=True)
class FormatsConfig:
    """Convert a crosscoder between our layout and those of other projects. Codes and reconstructions stay the same."""

    # What to convert: a folder, a .pt file, or a Hub id (user/name or user/name/folder), in any layout that --to knows.
    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]

    # Folder to write; must not hold anything yet.
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]

    # Layout to write. crosscoder: ours. crosscoder_learning: CrossCoder or BatchTopKCrossCoder of Minder et al. ckkissane:
    # cfg.json and cc_weights.pt (vanilla alone). saelens: for each model a JumpReLU SAE with its half of the decoder.
    to: Literal["crosscoder", "crosscoder_learning", "ckkissane", "saelens"]

    # For a ckkissane source, whose files do not say it: what its training multiplied the activations of the base and the
    # fine-tuned model with, sqrt(d_model) / mean norm; 1 1 if that is already in the weights.
    activation_scale: tuple[float, float] | None = None


@dataclass(kw_only=True, frozen=True)
class AnalyzeConfig(DatasetFlags):
    """Say what fine-tuning changed: ranked latents, findings, figures and one page, RUN/analysis/report.html.

    RUN is a folder that train.py wrote, or the folder of a crosscoder alone. The activations are those that the run was
    trained on (planted concepts are made again), unless others are named. With --base-model and --ft-model it also measures
    what the models lose when their activations are replaced.
    """

    # Folder of a run (runs/NAME), or of a saved crosscoder alone, which then needs a dataset.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]

    # Base model, to replace activations in it: a Hugging Face id or a folder. Goes with --ft-model.
    base_model: str | None = None

    # Fine-tuned model: a Hugging Face id or a folder. May be left out with --ft-adapter. Of models named as in the dataset's
    # pair.json the revisions are those that it names.
    ft_model: str | None = None

    # Adapter that is merged into the fine-tuned model, as for collect.py.
    ft_adapter: str | None = None

    # Where to replace activations. None: where the dataset was collected, as its pair.json says.
    hook: str | None = None

    # Hook in the fine-tuned model, where its path differs. None: the same as --hook.
    ft_hook: str | None = None

    # Precision in which the models run, as for collect.py.
    model_dtype: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = "bfloat16"

    # Sequences per forward pass of the models.
    model_batch_size: int = 4

    # Tokens of held-out sequences that the models run over. Each takes about 20 forward passes of one model.
    patch_tokens: int = 65_536

    # Rows (tokens) on which the latents are measured: held-out ones first, then training rows. Rare latents need many; the
    # metrics are of the held-out rows alone.
    num_tokens: int = 1_000_000

    # Latents that get a section with examples, separated by commas, e.g. --latents 12,99.
    latents: str = ""

    # Latents that get a section as well: so many of the first by rank in each direction, and up to 10 unchanged ones.
    sections_per_class: int = 30

    # Strongest examples of such a latent. As many are drawn evenly from the lower ranges of its activation.
    examples: int = 10

    # Tokens shown before and after an example's strongest token.
    context: int = 24

    # Folder to write; what an earlier analysis left there is replaced. None: RUN/analysis.
    output: str | None = None

    # Decides which shared latents and which weaker examples are drawn.
    seed: int = 0

    # auto (CUDA where there is one), cpu, cuda, cuda:1, ...
    device: str = "auto"


def model_flags(config: ModelFlags) -> dict:
    """The flags that say which models read which text, and how, without the devices: {field: value}."""
    names = [f.name for f in dataclasses.fields(ModelFlags) if f.name not in ("base_device", "ft_device")]
    return {name: getattr(config, name) for name in names}
