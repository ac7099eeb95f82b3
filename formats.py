"""Other people's crosscoders: read and write their folders, keep codes and reconstructions on raw activations.

    python formats.py SRC DST --to {crosscoder,crosscoder_learning,ckkissane,saelens}

SRC is a folder, a .pt file or a Hub id (`user/name`, `user/name/folder`) in any of these layouts:

    crosscoder            ours: config.json, model.safetensors
    crosscoder_learning   CrossCoder and BatchTopKCrossCoder of Minder et al.: config.json, model.safetensors, or a .pt
    ckkissane             cfg.json, cc_weights.pt; the activation scales are in neither: --activation-scale
    saelens               cfg.json, sae_weights.safetensors: an SAE of the base model, which becomes both halves; or the two
                          halves of a crosscoder, base/ and ft/, as written here

A .pt file may hold its tensors under `model_state_dict`.
"""

from __future__ import annotations

from config import FormatsConfig
from run.flags import parse

if __name__ == "__main__":
    CONFIG = parse(FormatsConfig)  # before torch is imported, so that --help and a wrong flag answer at once

import json
import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from crosscoder import CrossCoder
from ops.files import whole_file
from run.foreign import CODE_NORMALIZATIONS, half_name, has_threshold, read_crosscoder
from run.machine import library_errors, run_entry, write_text

ALIKE = 1e-4  # relative spread of thresholds that are one number but for rounding


def main(config: FormatsConfig) -> None:
    dst = Path(config.dst).expanduser()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst}: exists and is not an empty folder; choose another")
    crosscoder = read_crosscoder(config.src, config.activation_scale)
    write_crosscoder(crosscoder, dst, config.to)
    kind = f"{crosscoder.variant}, {crosscoder.n_models} models of width {crosscoder.d_model}, {crosscoder.d_hidden:,} latents"
    print(f"{dst}: {kind}, as {config.to}")
    if config.to == "crosscoder":
        print(f"next: python analyze.py {shlex.quote(str(dst))} --dataset DATA")


def write_crosscoder(crosscoder: CrossCoder, folder: Path, to: str) -> None:
    """Write a crosscoder in the layout `to`. ValueError if it has something that the layout has no place for."""
    if to == "crosscoder":
        return crosscoder.save_pretrained(folder)
    layouts = {"crosscoder_learning": as_crosscoder_learning, "ckkissane": as_ckkissane, "saelens": as_saelens}
    for name, content in layouts[to](crosscoder).items():
        path = folder / name
        if path.suffix == ".json":
            write_text(path, json.dumps(content, indent=2) + "\n")
            continue
        plain = {name: t.detach().cpu().contiguous() for name, t in content.items()}
        for name, t in plain.items():
            if not (t.isfinite() | (t.isposinf() if name == "threshold" else False)).all():
                raise ValueError(f"--to {to}: {name} would hold NaN or inf: mean or scale is too large or too small to fold in")
        errors = library_errors(f"{path}: cannot be written", "make room on the disk", (RuntimeError, SafetensorError))
        with errors, whole_file(path) as partial:
            torch.save(plain, partial) if path.suffix == ".pt" else save_file(plain, partial)


def as_crosscoder_learning(crosscoder: CrossCoder) -> dict[str, dict]:
    """The files of its CrossCoder or BatchTopKCrossCoder; mean and scale go into its normaliser.

    It has one threshold on the score. ValueError for thresholds per latent that differ both on the codes and on the score.
    """
    sparse = crosscoder.variant == "batch_topk"
    threshold, weighting = crosscoder.threshold, 1
    W_enc, b_enc = crosscoder.W_enc.detach().clone(), crosscoder.b_enc.detach().clone()
    if crosscoder.folded:
        on = threshold.isfinite()
        W_enc[:, :, ~on], b_enc[~on] = 0, 0  # latents without decoder rows stay off below any threshold
        scores = {4: threshold[on], 1: (threshold * crosscoder.decoder_norms().sum(-1))[on]}
        alike = [number for number, v in scores.items() if len(v) and v.max() - v.min() <= ALIKE * v.max()]
        if not alike or has_threshold(crosscoder) > sparse:  # its CrossCoder has no threshold at all
            remedy = "convert the crosscoder that this one was folded from, or use --to saelens"
            raise ValueError(f"--to crosscoder_learning: these thresholds differ by latent and it has one for all; {remedy}")
        weighting = alike[0]
        threshold = scores[weighting].median()
    d_model, scale = crosscoder.d_model, crosscoder.scale
    tensors = {
        "encoder.weight": W_enc, "encoder.bias": b_enc,
        "decoder.weight": crosscoder.W_dec.transpose(0, 1), "decoder.bias": crosscoder.b_dec,
        "code_normalization_id": torch.tensor(weighting),
        "target_rms": torch.tensor(1.0),
        "activation_mean": crosscoder.mean,
        "activation_std": (1 / (scale * d_model**0.5))[:, None].expand(-1, d_model),  # total spread 1 / scale
        "activation_global_scale": scale,
    }  # fmt: skip
    config = {
        "activation_dim": d_model, "dict_size": crosscoder.d_hidden, "num_layers": crosscoder.n_models,
        "norm_init_scale": None, "activation_mean": None, "activation_std": None, "target_rms": 1.0,
        "code_normalization": CODE_NORMALIZATIONS[weighting],
    }  # fmt: skip
    if sparse:
        tensors |= {"k": torch.tensor(crosscoder.k, dtype=torch.int32), "threshold": threshold}
        config |= {"k": crosscoder.k, "dict_class": "BatchTopKCrossCoder"}
    else:
        config |= {
            "same_init_for_all_layers": True, "init_with_transpose": True, "encoder_layers": None, "latent_processor": None,
            "num_decoder_layers": None, "code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": 0.1,
            "dict_class": "CrossCoder",
        }  # fmt: skip
    return {"model.safetensors": tensors, "config.json": config}


def as_ckkissane(crosscoder: CrossCoder) -> dict[str, dict]:
    """Weights that take raw activations, as after its `fold_activation_scaling_factor`. ReLU alone: no threshold fits in."""
    if crosscoder.n_models != 2 or has_threshold(crosscoder):
        remedy = "use --to crosscoder_learning or --to saelens"
        raise ValueError(f"--to ckkissane: it has two models and plain ReLU codes, no threshold; {remedy}")
    folded = crosscoder.fold_normalization()
    tensors = {name: getattr(folded, name).detach().clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    off = folded.threshold.isinf()  # latents without decoder rows
    tensors["W_enc"][:, :, off], tensors["b_enc"][off] = 0, 0
    config = {
        "d_in": folded.d_model, "dict_size": folded.d_hidden, "enc_dtype": "fp32", "device": "cpu", "seed": 0,
        "dec_init_norm": 0.08, "activation_scale": [1.0, 1.0],
    }  # fmt: skip
    return {"cc_weights.pt": tensors, "cfg.json": config}


def as_saelens(crosscoder: CrossCoder) -> dict[str, dict]:
    """Each model's half as a JumpReLU SAE on raw activations, with f * sum_m |W_dec[j, m]| as its codes.

    Its decoder is right for every latent; its encoder sees this model's share of the pre-activation alone.
    """
    folded = crosscoder.fold_normalization()
    size = crosscoder.decoder_norms().detach().sum(-1)  # [d_hidden]
    size = torch.where(size > 0, size, 1.0)
    note = "decoder of one model of a crosscoder; codes need the pre-activations of all its models"
    files: dict[str, dict] = {}
    for model in range(crosscoder.n_models):
        half = half_name(model)
        files[f"{half}/sae_weights.safetensors"] = {
            "W_enc": folded.W_enc[model] * size, "b_enc": folded.b_enc * size,
            "W_dec": folded.W_dec[:, model] / size[:, None], "b_dec": folded.b_dec[model],
            "threshold": folded.threshold.expand(folded.d_hidden) * size,
        }  # fmt: skip
        files[f"{half}/cfg.json"] = {
            "d_in": folded.d_model, "d_sae": folded.d_hidden, "dtype": "float32", "device": "cpu", "architecture": "jumprelu",
            "normalize_activations": "none", "reshape_activations": "none", "apply_b_dec_to_input": False,
            "metadata": {"crosscoder_half": half, "k": crosscoder.k, "n_models": crosscoder.n_models, "note": note},
        }  # fmt: skip
    return files


if __name__ == "__main__":
    run_entry("formats.py", main, CONFIG, "nothing was written")
