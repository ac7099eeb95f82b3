"""--init-from: a run begins where the crosscoder or SAE that it is given stands."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from helpers import metrics, one_line_error, run_script
from safetensors.torch import load_file, save_file

from crosscoder import CrossCoder
from formats import write_crosscoder
from ops.variance import explained_variance
from run.foreign import read_crosscoder
from run.warm_start import WarmStart

D, F = 16, 64
FLAGS = ["--compute-dtype", "float32", "--batch-size", 256, "--val-tokens", 1000, "--wandb", "disabled", "--log-every", 1]
STILL = ["--lr", 1e-12, "--num-tokens", 512, "--val-every", 1]  # two steps that move nothing


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list:
    """Activations of sparse concepts, with other scales and means in each model; and the raw held-out rows."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    codes = random.exponential(size=(9000, 32)) * (random.random((9000, 32)) < 0.1)
    rows, given = [], []
    for i, name in enumerate(("base", "ft")):
        x = (codes @ random.normal(size=(32, D)) * (1 + 5 * i) + 3 * random.normal(size=D)).astype("float32")
        features = Features({"activation": List(Value("float32"), length=D)})
        Dataset.from_dict({"activation": list(x)}, features=features).save_to_disk(str(folder / name))
        rows.append(torch.from_numpy(x[-1000:]))
        given += [f"--{name}-dataset", folder / name]
    return [given, torch.stack(rows, dim=1)]


def train(tmp_path, data, name, *flags, check=True):
    """A run's folder, or what it printed when it was refused."""
    command = ["train.py", *data[0], *FLAGS, "--output-dir", tmp_path, "--run-name", name, *flags]
    result = run_script(*command, check=check)
    return tmp_path / name if check else one_line_error(result, "train.py")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> dict:
    """Folders of a crosscoder of each variant, trained for a moment on the held-out rows."""
    folders = {}
    for variant in ("vanilla", "batch_topk"):
        crosscoder = CrossCoder(D, F, 2, variant, 4, dec_init_norm=1.0)
        crosscoder.mean.copy_(data[1].mean(0))
        crosscoder.scale.copy_(D**0.5 / (data[1] - data[1].mean(0)).norm(dim=-1).mean(0))
        x, optimizer = crosscoder.normalize(data[1]), torch.optim.Adam(crosscoder.parameters(), lr=5e-3)
        for _ in range(300):
            crosscoder.losses(x, 0.3 if variant == "vanilla" else 0.0).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if variant == "batch_topk":
            crosscoder.fit_threshold(lambda x=x, crosscoder=crosscoder: [x])
        folders[variant] = tmp_path_factory.mktemp("trained") / variant
        crosscoder.save_pretrained(folders[variant])
    return folders


def by_model(crosscoder, x) -> list[float]:
    """Explained variance of the base and of the fine-tuned model on raw rows."""
    return explained_variance(x, crosscoder(x))[1:].tolist()


def started(run, what="val_explained_variance") -> list[float]:
    return [metrics(run)[0][f"{what}_{model}"] for model in "AB"]


@pytest.mark.parametrize("variant", ["vanilla", "batch_topk"])
def test_begins_at_the_explained_variance_of_the_source(tmp_path, data, trained, variant):
    crosscoder = CrossCoder.from_pretrained(trained[variant])
    want = by_model(crosscoder, data[1])
    assert min(want) > 0.7
    source, flags = trained[variant], []
    if variant == "vanilla":  # another normalisation, and a source in another layout that has its own in the weights
        write_crosscoder(crosscoder, tmp_path / "halves", "saelens")
        source, flags = tmp_path / "halves", ["--no-center"]
    run = train(tmp_path, data, "again", "--variant", variant, "--init-from", source, *flags, *STILL)
    got = load_file(run / "crosscoder" / "model.safetensors")
    assert not torch.allclose(got["scale"], crosscoder.scale, rtol=1e-3) and (variant == "vanilla") == (got["mean"] == 0).all()
    line = metrics(run)[0]
    assert started(run) == pytest.approx(want, abs=2e-3 if variant == "batch_topk" else 1e-5)  # that one moves its threshold
    assert started(run, "explained_variance") == pytest.approx(want, abs=0.1)  # of another batch
    active = (crosscoder.encode(data[1]) > 0).sum(-1).float().mean().item()
    assert line["l0_loss"] == pytest.approx(active, rel=0.15) and (line["l1_coeff"] > 0) == (variant == "vanilla")
    record = json.loads((run / "config.json").read_text())["resolved"]
    assert (record["d_hidden"], record["k_start"], record["l1_warmup"], record["resample_until"]) == (F, 1.0, 0.0, 0.0)
    assert record["k"] == 4 or variant == "vanilla"


def test_an_sae_of_the_base_model_for_both_halves(tmp_path, data):
    sae = {"W_enc": torch.randn(D, F) * 0.05, "b_enc": torch.randn(F), "b_dec": data[1].mean((0, 1))}
    sae["W_dec"] = sae["W_enc"].T.contiguous()
    save_file(sae, tmp_path / "sae_weights.safetensors")
    config = {"d_in": D, "d_sae": F, "architecture": "standard", "normalize_activations": "none"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    run = train(tmp_path, data, "run", "--init-from", tmp_path, *STILL)
    want = by_model(read_crosscoder(tmp_path), data[1])
    assert started(run) == pytest.approx(want, abs=1e-5) and want[0] != pytest.approx(want[1], abs=1e-2)


@pytest.mark.parametrize("given", [None, 3])
def test_a_jumprelu_sae_begins_with_as_many_active_latents_as_it_has(tmp_path, given):
    """It has thresholds, which differ by latent, and no k. 64 orthogonal concepts, 6 of them active at a token."""
    random, width, active = np.random.default_rng(0), 64, 6
    directions = np.linalg.qr(random.normal(size=(width, width)))[0]
    size = np.geomspace(1, 10, width)  # of each concept; noise comes up to a fifth of it
    codes = (random.random((9000, width)) < active / width) * (0.5 + random.exponential(size=(9000, width)))
    x = (codes + random.uniform(0, 0.2, size=codes.shape)) * size @ directions + 3 * random.normal(size=width)
    features = Features({"activation": List(Value("float32"), length=width)})
    for name in ("base", "ft"):
        Dataset.from_dict({"activation": list(x.astype("float32"))}, features=features).save_to_disk(str(tmp_path / name))
    sae = {
        "W_enc": directions.T,
        "W_dec": directions,
        "b_enc": np.zeros(width),
        "b_dec": x.mean(0) - codes.mean(0) * size @ directions,
    }
    sae["threshold"] = 0.35 * size
    save_file({name: torch.tensor(t).float().contiguous() for name, t in sae.items()}, tmp_path / "sae_weights.safetensors")
    config = {"d_in": width, "d_sae": width, "architecture": "jumprelu", "normalize_activations": "none"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))

    rows = torch.tensor(x[-1000:]).float()[:, None].repeat(1, 2, 1)
    source = read_crosscoder(tmp_path)
    want = explained_variance(rows, source(rows))[0].item()
    data = [["--base-dataset", tmp_path / "base", "--ft-dataset", tmp_path / "ft"]]
    flags = ["--variant", "batch_topk", "--init-from", tmp_path, "--save-every", 1, *STILL]
    run = train(tmp_path, data, "run", *flags, *([] if given is None else ["--k", given]))
    k, first = given or active, metrics(run)[0]
    record = json.loads((run / "config.json").read_text())
    assert (record["resolved"]["k"], record["given"]["k"]) == (k, given)
    assert first["l0_loss"] == k and first["val_l0_loss"] == pytest.approx(k, rel=0.05)
    if given is None:
        assert want > 0.95 and first["val_explained_variance"] == pytest.approx(want, abs=0.02)
        assert first["explained_variance"] == pytest.approx(want, abs=0.02)
        (tmp_path / "sae_weights.safetensors").unlink()
        run_script("train.py", "--resume", run, "--num-tokens", 768, check=True)
        assert metrics(run)[-2]["l0_loss"] == k  # the line before the last one, which is of held-out rows


def test_goes_on_learning_and_resumes_without_the_source(tmp_path, data, trained):
    crosscoder = CrossCoder.from_pretrained(trained["vanilla"])
    crosscoder.save_pretrained(tmp_path / "source")
    flags = ["--init-from", tmp_path / "source", "--num-tokens", 5120, "--save-every", 5, "--l1-coeff", 0.3, "--k-aux", 4]
    whole = train(tmp_path, data, "whole", *flags)
    moved = load_file(whole / "crosscoder" / "model.safetensors")["W_dec"]
    assert not torch.allclose(moved, crosscoder.W_dec, atol=1e-4)
    (tmp_path / "source" / "model.safetensors").unlink()
    last = whole / "crosscoder" / "model.safetensors"
    before = last.read_bytes()
    for path in (whole / "checkpoints").glob("step_00000020"):
        path.rename(tmp_path / "aside")  # as if it had been killed after step 15
    run_script("train.py", "--resume", whole, check=True)
    assert last.read_bytes() == before


def test_what_does_not_fit_is_refused(tmp_path, data, trained):
    source = trained["vanilla"]
    refused = train(tmp_path, data, "a", "--init-from", source, "--d-hidden", 32, check=False)
    assert f"--d-hidden 32: --init-from {source} has 64 latents; leave the flag out" in refused
    CrossCoder(D + 1, F).save_pretrained(tmp_path / "wide")
    refused = train(tmp_path, data, "a", "--init-from", tmp_path / "wide", check=False)
    assert f"is for 2 models of width {D + 1}, the activations are of 2 of width {D}" in refused
    assert not (tmp_path / "a").exists()
    for wanted, other, codes in (("vanilla", "batch_topk", "plain ReLU codes"), ("batch_topk", "vanilla", "above a threshold")):
        with pytest.raises(ValueError, match=f"^--variant {other}: .* has .*{codes}; give --variant {wanted}"):
            WarmStart(str(trained[wanted]), other, None)
    with pytest.raises(ValueError, match="--init-from ./nowhere: there is no such file or folder"):
        WarmStart("./nowhere", "vanilla", None)
