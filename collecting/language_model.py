"""Language models: load one with its tokenizer, read the activations at a hook, pair those of two models.

The only file that imports nnsight, because that import patches every Python object.
"""

from __future__ import annotations

import difflib
import os
import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import nnsight
import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from run.machine import HUB_SECONDS, close_name, first_line, library_errors

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

QUANTIZED = ("int8", "nf4")  # of --model-dtype
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


class RawRows(NamedTuple):
    """Activations of several models at the same tokens and one hook, one row a token, before any is left out or scaled."""

    acts: list[torch.Tensor]  # of each model [rows, d_model], in its precision and on its device
    norms: np.ndarray  # [rows, n_models] float64, L2; not finite where a value of the row is not
    columns: np.ndarray  # [3, rows] int32: index of the row's sequence, position inside it, id of the token there


# --- loading


@lru_cache
def model_path(name: str, flag: str, revision: str | None = None) -> str:
    """The name with `~` expanded. ValueError if it is neither a folder nor a model or adapter on the Hub.

    The Hub is asked once, where the libraries that load models try six times for each file, and not for what is in the cache.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    if os.path.isabs(path) or name.startswith(("./", "../")) or name.count("/") > 1:
        there = f"there is no such folder{close_name(Path(path))}"
        raise ValueError(f"{flag} {name}: {there}; give a Hugging Face id or the folder of a saved model")
    if not huggingface_hub.constants.HF_HUB_OFFLINE and cached_commit(name, revision) is None:
        fault = f"{flag} {name}: is no folder here, and the Hub does not give it as a model"
        with library_errors(fault, "check the name and the network"):
            huggingface_hub.HfApi().repo_info(name, revision=revision, timeout=HUB_SECONDS)
    return path


def weight_files(folder: Path) -> list[Path]:
    """The files of a model or adapter that decide what it computes, tokenizer included."""
    kinds = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
    return sorted(file for file in folder.iterdir() if file.suffix in kinds and file.is_file())


def load_model(
    name: str, dtype: str, device: str, flag: str = "--model", revision: str | None = None, adapter: str | None = None
) -> nnsight.NNsight:
    """A frozen causal language model, wrapped for `capture`. The plain model is its attribute `_module`.

    name: Hugging Face id or folder; one that was saved quantised loads so. dtype: float32, bfloat16 or float16; int8 or nf4
    quantise the weights by bitsandbytes, the rest is bfloat16. revision: branch, tag or commit on the Hub. adapter: peft
    adapter (id or folder) that is merged into the weights. ValueError (naming `flag`) if it cannot be loaded.
    """
    path = model_path(name, flag, revision)
    if revision and os.path.isdir(path):
        given = f"--model {name}@{revision}" if flag == "--model" else f"{flag.replace('model', 'revision')} {revision}"
        raise ValueError(f"{given}: {flag} {name} is a folder, which has no revisions")
    if os.path.isfile(f"{path}/adapter_config.json") and not os.path.isfile(f"{path}/config.json"):
        remedy = "merge it into its model first" if flag == "--model" else "give it with --ft-adapter, without --ft-model"
        raise ValueError(f"{flag} {name}: is an adapter (LoRA) and no model; {remedy}")
    try:
        remedy = "give a causal language model's Hugging Face id or folder"
        with library_errors(f"{flag} {name}: cannot be loaded", remedy, (OSError, ValueError)):
            model = load_weights(path, dtype, device, revision or "main")
        quantized = hasattr(model.config, "quantization_config")
        if adapter and quantized:
            raise ValueError(f"--ft-adapter {adapter}: is merged into unquantised weights; give --model-dtype bfloat16")
        if adapter:
            model = merge_adapter(model, adapter)
        if not quantized:  # it is on its device already, and cannot be moved
            model.to(device)
    except ImportError as error:  # it names the package that a quantised model needs
        raise ValueError(f"{flag} {name}: {first_line(error)}") from None
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{flag} {name}: does not fit into the memory of {device}; "
            "give each model a device of its own with --base-device and --ft-device"
        ) from None
    # NNsight and not TransformersModel: it needs no tokenizer and leaves the padding side alone
    return nnsight.NNsight(model.requires_grad_(False).eval())


def load_weights(path: str, dtype: str, device: str, revision: str) -> transformers.PreTrainedModel:
    """The model, on the device if it is quantised and else on the CPU."""
    options = {"dtype": getattr(torch, "bfloat16" if dtype in QUANTIZED else dtype), "revision": revision}
    if dtype in QUANTIZED:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=dtype == "int8", load_in_4bit=dtype == "nf4", bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    if dtype in QUANTIZED or hasattr(transformers.AutoConfig.from_pretrained(path, revision=revision), "quantization_config"):
        options["device_map"] = device  # needs accelerate, as quantisation does anyway
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def merge_adapter(model: transformers.PreTrainedModel, adapter: str) -> transformers.PreTrainedModel:
    """The model with a peft adapter (id or folder) added to its weights, in their precision."""
    path = model_path(adapter, "--ft-adapter")
    try:
        import peft
    except ImportError:
        raise ValueError(f"--ft-adapter {adapter}: adapters need peft; `pip install peft`") from None
    remedy = "give an adapter that was trained on --ft-model (without --ft-model: on --base-model)"
    with library_errors(f"--ft-adapter {adapter}: cannot be merged into its model", remedy), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("error", ".*missing adapter keys")  # peft would leave those weights out
        return peft.PeftModel.from_pretrained(model, path).merge_and_unload()


def load_tokenizer(name: str, flag: str, revision: str | None = None):
    """The tokenizer of a model, or None where its folder holds none. ValueError if it cannot be loaded."""
    path = model_path(name, flag, revision)
    if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, file)) for file in TOKENIZER_FILES):
        return None
    with library_errors(f"{flag} {name}: its tokenizer cannot be loaded", kinds=(OSError, ValueError, ImportError)):
        return transformers.AutoTokenizer.from_pretrained(path, revision=revision or "main")


def load_paired_tokenizer(base_name: str, ft_name: str, base_revision=None, ft_revision=None, ft_adapter: str | None = None):
    """The tokenizer for both models: the fine-tuned one's (its adapter's first), or the base model's where that has none.

    Both models must read the same ids as the same tokens; the fine-tuned one may know more. ValueError otherwise.
    """
    base = load_tokenizer(base_name, "--base-model", base_revision)
    ft = None
    if ft_adapter and os.path.isdir(path := model_path(ft_adapter, "--ft-adapter")):
        ft = load_tokenizer(path, "--ft-adapter")
    if ft is None:
        ft = load_tokenizer(ft_name, "--ft-model", ft_revision)
    tokenizer = base if ft is None else ft
    if tokenizer is None:
        raise ValueError(f"--base-model {base_name}, --ft-model {ft_name}: neither folder holds a tokenizer; save one into it")
    if base is not None:
        check_vocabularies(base.get_vocab(), tokenizer.get_vocab())
    tokenizer.padding_side = "right"
    return tokenizer


def check_tokenizer(tokenizer, name: str, flag: str, revision: str | None = None) -> None:
    """ValueError unless the model's tokenizer, where it has one, reads ids as the given one does."""
    if (other := load_tokenizer(name, flag, revision)) is not None:
        check_vocabularies(tokenizer.get_vocab(), other.get_vocab(), f"{flag} {name}", ("the other models", "this one"))


def check_vocabularies(
    base: dict[str, int], ft: dict[str, int], flags: str = "--base-model, --ft-model",
    names: tuple[str, str] = ("the base model", "the fine-tuned one"),
) -> None:  # fmt: skip
    """ValueError unless every token that both know has one id, and every id that both know is one token."""
    base_tokens, ft_tokens = ({index: token for token, index in vocabulary.items()} for vocabulary in (base, ft))
    for what, ours, theirs in (("token", base, ft), ("id", base_tokens, ft_tokens)):
        for one, means in ours.items():
            if theirs.get(one, means) != means:
                raise ValueError(
                    f"{flags}: the tokenizers differ (the {what} {one!r} is {means!r} in {names[0]} and {theirs[one]!r} in "
                    f"{names[1]}), so they cannot be paired; give a model and its fine-tuned version"
                )


def cached_commit(name: str, revision: str | None = None) -> str | None:
    """The commit on the Hub of the cached model or adapter `name`; None for a folder, and for one that is not cached."""
    if os.path.isdir(os.path.expanduser(name)):
        return None
    found = (huggingface_hub.try_to_load_from_cache(name, f, revision=revision) for f in ("config.json", "adapter_config.json"))
    return next((os.path.basename(os.path.dirname(file)) for file in found if isinstance(file, str)), None)


def refuse_unknown_tokens(models: list[nnsight.NNsight], ids: torch.Tensor) -> None:
    """ValueError if a token id is beyond the embedding of one of the models, base first."""
    token = int(ids.max())
    flags = ("--base-model", "--ft-model") if len(models) == 2 else [f"--model number {m + 1}" for m in range(len(models))]
    for model, flag in zip(models, flags, strict=True):
        if token >= (rows := model._module.get_input_embeddings().weight.shape[0]):
            raise ValueError(
                f"{flag}: the text holds the token id {token}, but this model's embedding has only {rows} rows; "
                "take that token out of the text or the chat template"
            )


# --- reading one hook


def parse_hook(model: nnsight.NNsight, hook: str, flag: str = "--hook") -> str:
    """`model.layers.16.mlp` -> `model.layers.16.mlp.output`; `.input` and `.output` stay. ValueError with close names."""
    end = ".input" if hook.endswith(".input") else ".output"
    path, modules = hook.removesuffix(end), dict(model._module.named_modules())
    if path and path in modules:
        return path + end
    hint, parent = "", path  # the longest part that exists: if it is a list of layers, the index is what went wrong
    while parent not in modules:
        parent = parent.rpartition(".")[0]
    index = path[len(parent) + 1 :].split(".")[0]
    if isinstance(modules[parent], torch.nn.ModuleList) and index.isdecimal():
        hint = f"; {parent} has {len(modules[parent])} entries, 0 to {len(modules[parent]) - 1}"
    elif close := difflib.get_close_matches(path, [name for name in modules if name], n=3, cutoff=0.4):
        hint = f"; did you mean {' or '.join(close)}?"
    raise ValueError(f"{flag} {hook}: the model has no module {path!r}{hint}")


@torch.no_grad()
def capture(
    model: nnsight.NNsight, hooks: list[str], input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[torch.Tensor]:
    """Activations [batch, seq, d_model] at each hook (as `parse_hook` returns it), on the model's device, in its dtype.

    hooks: in the order in which the model runs through them (`in_running_order`). input_ids, attention_mask: [batch, seq]
    int64, padded on the right. Nothing past the last hook is computed.
    """
    values: list[torch.Tensor] = []
    with model.trace(input_ids=input_ids, attention_mask=attention_mask, use_cache=False) as tracer:
        for hook in hooks:
            value = model.get(hook)
            # attention modules, and blocks of older transformers, give a tuple
            values.append(nnsight.save(value[0] if isinstance(value, tuple) else value))
        tracer.stop()
    return values


@torch.no_grad()
def in_running_order(model: nnsight.NNsight, hooks: list[str]) -> list[str]:
    """Hooks (as `parse_hook` returns them, each reached by a forward pass) in the order in which a forward pass meets them."""
    plain, met = model._module, dict.fromkeys(hooks, 0)

    def note(hook: str):
        def noted(*_) -> None:
            met[hook] = met[hook] or len([place for place in met.values() if place]) + 1

        return noted

    handles = []
    for hook in hooks:
        path, _, end = hook.rpartition(".")
        module = plain.get_submodule(path)
        register = module.register_forward_pre_hook if end == "input" else module.register_forward_hook
        handles.append(register(note(hook)))
    ids = torch.zeros(2, 3, dtype=torch.long, device=plain.device)
    plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for handle in handles:
        handle.remove()
    return sorted(hooks, key=met.__getitem__)


@torch.no_grad()
def read_logits(
    model: nnsight.NNsight, hook: str, input_ids: torch.Tensor, attention_mask: torch.Tensor, value: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation [batch, seq, d_model] that the model computes at a hook, and its logits [batch, seq, vocabulary].

    With `value` [batch, seq, d_model] that activation is replaced by it (spliced in) and everything after the hook sees the
    replacement. Its dtype and device become the model's. Other arguments as for `capture`.
    """
    path, _, end = hook.rpartition(".")
    with model.trace(input_ids=input_ids, attention_mask=attention_mask, use_cache=False):
        module = model.get(path)
        found = getattr(module, end)
        first = found[0] if isinstance(found, tuple) else found
        activation = nnsight.save(first)
        if value is not None:
            spliced = value.to(first.device, first.dtype)
            setattr(module, end, (spliced, *found[1:]) if isinstance(found, tuple) else spliced)
        logits = nnsight.save(model.output.logits)
    return activation, logits


def token_texts(tokenizer, ids: np.ndarray) -> dict[int, str]:
    """What each of these token ids stands for in running text, with the white space before it; damaged bytes as U+FFFD."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    anchor = tokenizer("a", add_special_tokens=False).input_ids[-1:]  # some decoders drop the space of a first token
    start, found = decode(anchor), {}
    for index in np.unique(ids).tolist():
        whole = decode([*anchor, index])
        found[index] = whole.removeprefix(start) if whole.startswith(start) else decode([index])
    return found


def probe_hook(model: nnsight.NNsight, hook: str, flag: str = "--hook") -> int:
    """d_model at the hook, from a forward over two sequences. ValueError if no [batch, seq, d_model] activation is there."""
    ids = torch.zeros(2, 3, dtype=torch.long, device=model._module.device)
    with library_errors(f"{flag} {hook}: a forward pass does not reach it", "give another module"):
        (value,) = capture(model, [hook], ids, torch.ones_like(ids))
    if not (isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point() and value.shape[:2] == (2, 3)):
        what = f"{value.dtype} tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{flag} {hook}: holds a {what}, not activations [batch, sequence, d_model]; give another module")
    return value.shape[2]


# --- several models over the same tokens


def pad_batch(sequences: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token sequences -> ids [batch, seq] int64, padded on the right with 0; mask [batch, seq] bool, False at padding."""
    ids = pad_sequence([torch.from_numpy(tokens.astype(np.int64)) for tokens in sequences], batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def paired_activations(
    models: list[nnsight.NNsight], hooks: list[list[str]], widths: list[int], indices: list[int], sequences: list[np.ndarray],
    *, skip_first: int = 0, batch_flag: str = "--batch-size",
) -> list[RawRows]:  # fmt: skip
    """Run every model once over one padded batch; for each hook the rows, in reading order.

    hooks: of each model, as `capture` takes them. widths: d_model at each hook. indices: the number of each sequence.
    sequences: int32 tokens each. Kept are the positions >= skip_first without padding. ValueError if a token is unknown to one
    of the models, an activation is not d_model wide, or the batch does not fit into memory (naming `batch_flag`).
    """
    ids, mask = pad_batch(sequences)
    refuse_unknown_tokens(models, ids)
    keep = mask & (torch.arange(ids.shape[1]) >= skip_first)  # [batch, seq]
    try:  # picking rows waits for the device, so all models, which may each have their own, get their work before it
        values = []  # [batch, seq, d_model] of each model and hook
        for model, paths in zip(models, hooks, strict=True):
            device = model._module.device
            values.append(capture(model, paths, ids.to(device), mask.long().to(device)))
            for path, value, d_model in zip(paths, values[-1], widths, strict=True):
                if value.shape != (shape := (*ids.shape, d_model)):
                    raise ValueError(
                        f"{path}: gives a tensor of shape {list(value.shape)} for this batch and not {list(shape)}; "
                        "give a --hook whose output is always [batch, sequence, d_model]"
                    )
        picked = [[value[keep.to(value.device)] for value in of_model] for of_model in values]  # [rows, d_model] each
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{batch_flag} {len(sequences)}: the batch does not fit into the memory of {device}; lower it or --seq-len"
        ) from None
    sequence, position = keep.nonzero(as_tuple=True)  # [rows] each
    columns = torch.stack([torch.tensor(indices)[sequence], position, ids[keep]]).int().numpy()
    rows = []
    for acts in map(list, zip(*picked, strict=True)):  # of one hook
        norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).cpu() for x in acts]  # [rows] each
        rows.append(RawRows(acts, torch.stack(norms, dim=1).numpy(), columns))
    return rows
