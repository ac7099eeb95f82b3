"""Read crosscoders of other projects and our own: a folder, a .pt file or a Hub id in any layout that formats.py names.

Files are read as tensors alone, no pickled code is run. Shapes, types and values are checked before anything is allocated.
"""

from __future__ import annotations

import json
import math
import zipfile
from itertools import count, takewhile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from crosscoder import CrossCoder, hub_folder
from run.machine import first_line, library_errors

TORCH_FILES = ("cc_weights.pt", "model.pt", "model_final.pt")
FILES = ("config.json", "model.safetensors", "cfg.json", "sae_weights.safetensors", *TORCH_FILES)
HALVES = ("base", "ft")
WHOLE = ("k", "code_normalization_id")  # tensors of a whole number; all others hold floats
# How crosscoder_learning numbers what it weights a latent's code with, beside the decoder norms n_m = |W_dec[j, m]|
CODE_NORMALIZATIONS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}


def read_crosscoder(source: str | Path, activation_scale: tuple[float, ...] | None = None) -> CrossCoder:
    """The crosscoder in a folder, a .pt file or a Hub repository of any known layout; raw activations go in.

    ValueError, naming the file, for what is missing, broken or has no meaning here.
    activation_scale: per model, base first, what ckkissane's training multiplied the activations with.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = hub_folder(str(source), [*FILES, *(f"{half}/{name}" for half in (*HALVES, "model_*") for name in FILES)])
    if path.is_file() and path.name in ("model.safetensors", "sae_weights.safetensors"):
        path = path.parent  # the config there says what it is
    if (path / "crosscoder" / "config.json").is_file():  # a run of ours
        path = path / "crosscoder"
    there = {name for name in FILES if (path / name).is_file()}
    halves = list(takewhile(lambda half: (path / half / "sae_weights.safetensors").is_file(), map(half_name, count())))
    if {"config.json", "model.safetensors"} <= there:
        config = read_json(path / "config.json")
        if "activation_dim" in config:
            crosscoder = from_crosscoder_learning(read_tensors(path / "model.safetensors"), config, path)
        elif "d_hidden" in config:
            crosscoder = CrossCoder.from_pretrained(path)
        else:
            raise ValueError(f"{path}: its config.json has neither d_hidden nor activation_dim, it is no crosscoder known here")
    elif {"cfg.json", "sae_weights.safetensors"} <= there:
        crosscoder = from_sae(*read_sae(path), path)
    elif len(halves) > 1:
        crosscoder = from_halves([read_sae(path / half) for half in halves], path)
    else:
        file = path if path.is_file() else next((path / name for name in TORCH_FILES if name in there), None)
        if file is None:
            needs = "config.json and model.safetensors, cfg.json and sae_weights.safetensors, or a .pt file like cc_weights.pt"
            raise ValueError(f"{source}: is no crosscoder; a folder needs {needs}")
        tensors = read_tensors(file)
        beside = next((f for name in ("cfg.json", "config.json") if (f := file.parent / name).is_file()), None)
        config = read_json(beside) if beside else {}
        if "encoder.weight" not in tensors:
            return from_ckkissane(tensors, activation_scale or config.get("activation_scale"), file)
        config = config.get("trainer", config)
        crosscoder = from_crosscoder_learning(tensors, config if isinstance(config, dict) else {}, file)
    if activation_scale is not None:
        raise ValueError(f"--activation-scale: {source} says itself how it scales activations; leave the flag out")
    return crosscoder


def read_json(path: Path) -> dict:
    with library_errors(f"{path}: cannot be read", "copy it again", (OSError, ValueError, RecursionError)):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pt file, floats as float32. ValueError where they are not plain or more than the file."""
    try:
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            if zipfile.is_zipfile(path) and sum(entry.file_size for entry in zipfile.ZipFile(path).infolist()) > size:
                raise ValueError("it is compressed")
            content = torch.load(path, map_location="cpu", weights_only=True)
            for name in ("model_state_dict", "state_dict"):
                if not isinstance(content, dict):
                    raise ValueError(f"it holds a {type(content).__name__} and no state dict")
                content = content.get(name, content)
            tensors = content
        found = [(name.removeprefix("_orig_mod."), t.detach()) for name, t in tensors.items() if isinstance(t, Tensor)]
        for name, t in found:
            if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized or t.is_complex():
                raise ValueError(f"{name} is no plain tensor of real numbers")
        if sum(t.nbytes for _, t in found) > size:  # expanded ones share their bytes
            raise ValueError(f"its tensors stand for {sum(t.nbytes for _, t in found):,} bytes, the file has {size:,}")
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in found}
        if len(tensors) < len(found):
            raise ValueError("a name is there twice, with and without _orig_mod.")
        return tensors
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise anything
        reason = first_line(error).split(". ")[0]
        raise ValueError(f"{path}: is no file of plain tensors ({reason}); copy it again, or save its state dict") from None


def sizes(tensors: dict[str, Tensor], decoder: str, path: Path) -> tuple[int, ...]:
    """The three sizes of a crosscoder's decoder."""
    if decoder not in tensors or tensors[decoder].ndim != 3:
        raise ValueError(f"{path}: has no tensor {decoder} with three axes; it holds {', '.join(sorted(tensors)) or 'none'}")
    return tuple(tensors[decoder].shape)


def require(tensors: dict[str, Tensor], shapes: dict[str, tuple], path: Path, optional: dict[str, tuple] | None = None) -> None:
    """ValueError unless the tensors are those of `shapes`, perhaps some of `optional`, and no others, all with these shapes."""
    for name in shapes:
        if name not in tensors:
            raise ValueError(f"{path}: has no tensor {name}; it holds {', '.join(sorted(tensors)) or 'none'}")
    shapes = shapes | (optional or {})
    for name, t in tensors.items():
        if name not in shapes:  # left out, it would change the codes without a word
            raise ValueError(f"{path}: holds {name} as well, which is not known here; known are {', '.join(shapes)}")
        if tuple(t.shape) != shapes[name]:
            raise ValueError(f"{path}: {name} has the shape {tuple(t.shape)} and not {shapes[name]}")
        if t.is_floating_point() == (name in WHOLE) or t.dtype == torch.bool:
            raise ValueError(f"{path}: {name} is of the type {t.dtype}; only {' and '.join(WHOLE)} are whole numbers")


def assemble(  # noqa: PLR0913 - the tensors of a crosscoder, by name
    path: Path | str, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor,
    mean: Tensor | None = None, scale: Tensor | None = None, threshold: Tensor | float = 0.0, k: int | None = None,
) -> CrossCoder:  # fmt: skip
    """A crosscoder of the given weights, in the shapes of `CrossCoder`; k: it is a batch_topk. path: named in a ValueError."""
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": torch.as_tensor(threshold).float()}
    tensors["mean"] = torch.zeros_like(b_dec) if mean is None else mean
    tensors["scale"] = torch.ones(len(b_dec)) if scale is None else scale.expand(len(b_dec))
    with library_errors(f"{path}: is no crosscoder", kinds=ValueError):
        return CrossCoder.from_tensors(tensors, "vanilla" if k is None else "batch_topk", k)


def from_crosscoder_learning(tensors: dict[str, Tensor], config: dict, path: Path) -> CrossCoder:
    """CrossCoder or BatchTopKCrossCoder, from its state dict; `config` decides only what the tensors do not say."""
    n_models, d_hidden, d_model = sizes(tensors, "decoder.weight", path)
    shapes = {"encoder.weight": (n_models, d_model, d_hidden), "encoder.bias": (d_hidden,)}
    shapes |= {"decoder.weight": (n_models, d_hidden, d_model), "decoder.bias": (n_models, d_model)}
    optional: dict[str, tuple] = {"code_normalization_id": (), "k": (), "target_rms": ()}
    optional |= {name: (n_models, d_model) for name in ("activation_mean", "activation_std")}
    for name in ("activation_global_scale", "threshold"):  # one number, or one for each model
        optional[name] = (n_models,) if name in tensors and tensors[name].ndim else ()
    if {"activation_std", "activation_global_scale"} & tensors.keys():
        shapes["activation_mean"] = (n_models, d_model)
    require(tensors, shapes, path, optional)
    for name in ("encoder_layers", "latent_processor", "num_decoder_layers"):
        if config.get(name) not in (None, n_models, list(range(n_models))):
            raise ValueError(f"{path}: its {name} is {config[name]}; only crosscoders that leave it out are read")
    for name, size in (("activation_dim", d_model), ("dict_size", d_hidden)):
        if config.get(name) not in (None, size):
            raise ValueError(f"{path}: its {name} is {config[name]} and that of its tensors {size}; the config is another's")
    if "k" not in tensors and ("threshold" in tensors or config.get("dict_class") == "BatchTopKCrossCoder"):
        raise ValueError(f"{path}: has no tensor k, as a BatchTopKCrossCoder must; save its whole state dict")
    W_dec = tensors["decoder.weight"].transpose(0, 1)  # [d_hidden, n_models, d_model]
    mean, scale = tensors.get("activation_mean"), tensors.get("activation_global_scale")
    if mean is None or mean.isnan().all():  # all NaN: it has no normaliser
        mean, scale = None, None
    elif scale is None:
        require(tensors, shapes | {"activation_std": (n_models, d_model)}, path, optional)
        spread = tensors["activation_std"].pow(2).sum(-1)  # [n_models]
        scale = tensors.get("target_rms", torch.tensor(1.0)) / (spread + 1e-8).sqrt()
    k = int(tensors["k"]) if "k" in tensors else None
    threshold = torch.tensor(0.0) if k is None else threshold_of(tensors, config, W_dec, path)
    weights = tensors["encoder.weight"], tensors["encoder.bias"], W_dec, tensors["decoder.bias"]
    return assemble(path, *weights, mean, scale, threshold, k)


def threshold_of(tensors: dict[str, Tensor], config: dict, W_dec: Tensor, path: Path) -> Tensor:
    """The threshold of a BatchTopKCrossCoder: [] on the score as ours, [d_hidden] on codes where it weights otherwise."""
    threshold = tensors.get("threshold", torch.tensor(-1.0))
    weighting = str(config.get("code_normalization", "CROSSCODER")).upper()
    if "code_normalization_id" in tensors:
        number = int(tensors["code_normalization_id"])
        weighting = CODE_NORMALIZATIONS.get(number, f"number {number}")
    if weighting == "DECOUPLED" or threshold.ndim:
        raise ValueError(f"{path}: its code normalization is DECOUPLED, one code per model; here a latent has one code")
    if not 0 <= threshold < torch.inf:
        raise ValueError(f"{path}: its threshold is {threshold:g}, so it was never fitted; use a later checkpoint")
    norms = W_dec.norm(dim=-1)  # [d_hidden, n_models]
    weights = {"NONE": torch.ones(len(W_dec)), "SAE": norms.pow(2).sum(-1).sqrt(), "CROSSCODER": norms.sum(-1)}
    alphas = [config.get(f"code_normalization_alpha_{name}", usual) for name, usual in (("sae", 1.0), ("cc", 0.1))]
    if are_positive(alphas):
        weights["MIXED"] = alphas[0] * weights["SAE"] + alphas[1] * weights["CROSSCODER"]
    if weighting not in weights:
        raise ValueError(f"{path}: its code normalization {weighting} with the alphas {alphas} is not known here")
    if weighting != "CROSSCODER":  # ours is compared with the score; any other one with the code, latent by latent
        return torch.where(weights[weighting] > 0, threshold / weights[weighting], torch.inf)
    return threshold


def are_positive(values) -> bool:
    """Whether it is a list of positive finite numbers, and nothing else that JSON could give."""
    return isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) and 0 < v < math.inf for v in values)


def from_ckkissane(tensors: dict[str, Tensor], activation_scale, path: Path) -> CrossCoder:
    """W_enc [2, d_model, d_hidden], W_dec [d_hidden, 2, d_model], ReLU, and the activation scales its training used."""
    d_hidden, n_models, d_model = sizes(tensors, "W_dec", path)
    shapes = {"W_enc": (n_models, d_model, d_hidden), "W_dec": (d_hidden, n_models, d_model)}
    require(tensors, shapes | {"b_enc": (d_hidden,), "b_dec": (n_models, d_model)}, path)
    if activation_scale is None:
        remedy = "convert it by formats.py with --activation-scale BASE FT, of which formats.py --help says what they are"
        raise ValueError(f"{path}: does not say what its training multiplied the activations with; {remedy}")
    if not are_positive(activation_scale) or len(activation_scale) != n_models:
        raise ValueError(f"--activation-scale: {n_models} positive numbers are needed, one for each model of {path}")
    W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    return assemble(path, W_enc, b_enc, W_dec, b_dec, scale=torch.tensor(activation_scale, dtype=torch.float32))


def read_sae(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config of a SAELens folder with a ReLU or JumpReLU SAE, the input bias moved into b_enc."""
    config, path = read_json(folder / "cfg.json"), folder / "cfg.json"
    tensors = read_tensors(folder / "sae_weights.safetensors")
    d_model, d_hidden, kind = config.get("d_in"), config.get("d_sae"), config.get("architecture", "standard")
    if kind not in ("standard", "jumprelu") or config.get("activation_fn_str", config.get("activation_fn", "relu")) != "relu":
        raise ValueError(f"{path}: an SAE of the kind {kind} is not read; standard (ReLU) and jumprelu are")
    for name in ("normalize_activations", "reshape_activations"):
        if config.get(name, "none") != "none":
            remedy = "only SAEs that take raw activations are read: fold it into the weights with SAELens first"
            raise ValueError(f"{path}: {name} is {config[name]}; {remedy}")
    bias_first = config.get("apply_b_dec_to_input", True)
    if type(bias_first) is not bool or type(config.setdefault("metadata", {})) is not dict:
        raise ValueError(f"{path}: apply_b_dec_to_input must be true or false, metadata an object")
    shapes = {"W_enc": (d_model, d_hidden), "W_dec": (d_hidden, d_model), "b_enc": (d_hidden,), "b_dec": (d_model,)}
    shapes |= {"threshold": (d_hidden,)} if kind == "jumprelu" else {}
    require(tensors, shapes, folder / "sae_weights.safetensors")
    if bias_first:
        tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    threshold = tensors.get("threshold", torch.zeros(())).clamp_min(0)  # [d_hidden] on codes after the ReLU
    tensors["threshold"] = threshold if (threshold != 0).any() else torch.zeros(())  # [] where all codes are ReLU's
    return tensors, config


def from_sae(sae: dict[str, Tensor], config: dict, path: Path) -> CrossCoder:
    """One SAE as both halves: its codes and reconstructions where both models have the same activation."""
    if config["metadata"].get("crosscoder_half"):
        raise ValueError(f"{path}: is one half of a crosscoder; give the folder above it, which holds base/ and ft/")
    W_enc = (sae["W_enc"] / 2).expand(2, -1, -1)  # [2, d_model, d_hidden], each half of the pre-activation
    W_dec, b_dec = sae["W_dec"][:, None].expand(-1, 2, -1), sae["b_dec"].expand(2, -1)
    return assemble(path, W_enc, sae["b_enc"], W_dec, b_dec, threshold=sae["threshold"])


def from_halves(halves: list[tuple[dict[str, Tensor], dict]], path: Path) -> CrossCoder:
    """The halves that `write_crosscoder` made, put together: each has its encoder rows and the bias of both."""
    saes, notes = [sae for sae, _ in halves], [config["metadata"] for _, config in halves]
    belong = [note.get("crosscoder_half") for note in notes] == [half_name(model) for model in range(len(notes))]
    belong &= notes[0].get("n_models", 2) == len(notes) and all(note.get("k") == notes[0].get("k") for note in notes)
    if not belong or not all(torch.equal(saes[0][name], sae[name]) for sae in saes for name in ("b_enc", "threshold")):
        raise ValueError(f"{path}: base/ and ft/ are two SAEs and not the halves of one crosscoder; give one of them")
    for sae in saes[1:]:
        require(sae, {name: tuple(t.shape) for name, t in saes[0].items()}, path)
    W_enc, W_dec, b_dec = (torch.stack([sae[name] for sae in saes]) for name in ("W_enc", "W_dec", "b_dec"))
    W_dec = W_dec.transpose(0, 1)  # [d_hidden, n_models, d_model]
    return assemble(path, W_enc, saes[0]["b_enc"], W_dec, b_dec, threshold=saes[0]["threshold"], k=notes[0].get("k"))


def half_name(model: int) -> str:
    """The folder of a model's SAE."""
    return HALVES[model] if model < len(HALVES) else f"model_{model}"


def has_threshold(crosscoder: CrossCoder) -> bool:
    """Whether some latent needs more than a positive code to be on (and is not off for good)."""
    return bool(((crosscoder.threshold > 0) & crosscoder.threshold.isfinite()).any())
