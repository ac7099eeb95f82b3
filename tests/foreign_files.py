"""Small crosscoders, and files of other projects written by hand from their documented layouts."""

import json

import torch
from safetensors.torch import save_file

from crosscoder import CrossCoder

D, F, K = 16, 48, 5


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = draw(300, 2, D, seed=9) * torch.tensor([2.0, 0.5])[:, None] + draw(2, D, seed=8)  # raw activations


def make(variant="batch_topk", folded=False) -> CrossCoder:
    """A crosscoder with halves, means and scales that differ, its threshold fitted on X."""
    crosscoder = CrossCoder(D, F, 2, variant, K)
    with torch.no_grad():
        for seed, parameter in enumerate(crosscoder.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed, scale=0.3))
    crosscoder.mean.copy_(draw(2, D, seed=8))
    crosscoder.scale.copy_(torch.tensor([0.5, 2.5]))
    if variant == "batch_topk":
        crosscoder.fit_threshold(lambda: [crosscoder.normalize(X)])
    return crosscoder.fold_normalization() if folded else crosscoder


CL = {"encoder.weight": draw(2, D, F, seed=1, scale=0.3), "encoder.bias": draw(F, seed=2, scale=0.3)}
CL |= {"decoder.weight": draw(2, F, D, seed=3, scale=0.3), "decoder.bias": draw(2, D, seed=4)}


def crosscoder_learning(folder, tensors, **config):
    save_file(tensors, folder / "model.safetensors")
    sizes = {"activation_dim": D, "dict_size": F, "num_layers": 2}
    (folder / "config.json").write_text(json.dumps(sizes | config))
    return folder


def saelens(folder, kind="standard", **config):
    tensors = {"W_enc": CL["encoder.weight"][0], "b_enc": CL["encoder.bias"], "b_dec": CL["decoder.bias"][0]}
    tensors["W_dec"] = CL["decoder.weight"][0]
    if kind == "jumprelu":
        tensors["threshold"] = draw(F, seed=6).abs()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    usual = {"d_in": D, "d_sae": F, "normalize_activations": "none", "reshape_activations": "none", "architecture": kind}
    (folder / "cfg.json").write_text(json.dumps(usual | config))
    return tensors
