"""--push-to-hub: a trained crosscoder or a paired dataset as a repository of the Hugging Face Hub with a filled-in card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from torch import Tensor

from ops.latents import model_names
from run.machine import library_errors

FLAG = "--push-to-hub"


def open_repository(name: str, kind: str) -> None:
    """Make the model or dataset repository `user/name`, private, unless it is there. ValueError where the Hub refuses."""
    if name.count("/") != 1 or not all(name.split("/")) or name.startswith((".", "~")):
        raise ValueError(f"{FLAG} {name}: is no Hub repository; give one as user/name")
    with library_errors(f"{FLAG} {name}: the Hub refuses it", "log in with `hf auth login`, or leave the flag out"):
        HfApi().create_repo(name, repo_type=kind, private=True, exist_ok=True)


def push_crosscoder(name: str, run: Path, norms: Tensor, pair: dict | None) -> None:
    """Upload RUN/crosscoder and RUN/summary.json with a card. norms, pair: as for `model_card`."""
    record, summary = (json.loads((run / file).read_text()) for file in ("config.json", "summary.json"))
    card = model_card(name, record, summary, norms, pair)
    files: dict[str, Path | bytes] = {file: run / "crosscoder" / file for file in ("config.json", "model.safetensors")}
    files |= {"summary.json": run / "summary.json", "README.md": card.encode()}
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in files.items()]
    remedy = f"the run is complete in {run}, try again with python train.py --resume {run} {FLAG} {name}"
    with library_errors(f"{FLAG} {name}: the Hub refuses it", remedy):
        HfApi().create_commit(name, operations, commit_message="Crosscoder")
    print(f'pushed     {name}: CrossCoder.from_pretrained("{name}")')


def push_dataset(name: str, out: Path, pair: dict) -> None:
    """Upload a complete paired dataset with a card that makes base, ft and tokens its configs."""
    card = CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=dataset_card(name, pair).encode())
    patterns = [*(f"{part}/**" for part in model_names(len(pair["stored_scale"]))), "tokens/**", "pair.json"]
    with library_errors(f"{FLAG} {name}: the Hub refuses it", f"{out} is complete, the same command tries again"):
        HfApi().create_commit(name, [card], repo_type="dataset", commit_message="Card")
        HfApi().upload_folder(
            repo_id=name, folder_path=out, repo_type="dataset", allow_patterns=patterns, commit_message="Activations"
        )
    print(f"pushed to {name}: python train.py --dataset {name}")


# --- cards


def shown(name: str | None) -> str:
    """A Hub id as it is, of a folder on this machine only its own name; what Markdown would take for a mark is escaped."""
    name = name or "unknown"
    if Path(name).exists() or name[0] in "/.~":
        name = Path(name).name
    return re.sub(r"([\\`*_\[\]<>|$~#&])", r"\\\1", " ".join(name.split()))


def code(text: str) -> str:
    """Text between backticks, in which no mark counts but a backtick."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def front(**fields) -> str:
    """YAML between dashes; JSON values are YAML."""
    return "---\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()) + "---\n\n"


def model_card(name: str, record: dict, summary: dict, norms: Tensor, pair: dict | None = None) -> str:
    """Data, hook, metrics, classes and how to load, from a run's config.json and summary.json.

    norms: [d_hidden, n_models] decoder norms. pair: what the pair.json of the run's paired dataset says.
    """
    config, data = record["resolved"], record["data"]
    origin, made = (pair or {}) if config["dataset"] else config, "planted concepts, activations with known directions"
    if config["dataset"]:
        made = f"the paired dataset {shown(config['dataset'])}"
    elif config["base_dataset"]:
        made = f"the datasets {shown(config['base_dataset'])} (base) and {shown(config['ft_dataset'])} (fine-tuned)"
    elif config["model_dataset"]:
        made = "the datasets " + ", ".join(map(shown, config["model_dataset"]))
    elif config["base_model"]:
        made = "live activations"
    models = {"Base model": origin.get("base_model"), "Fine-tuned model": origin.get("ft_model") or origin.get("base_model")}
    lines = [f"- {role}: {shown(model)}" for role, model in models.items() if model]
    lines += [f"- Adapter of the fine-tuned model: {shown(origin['ft_adapter'])}"] if origin.get("ft_adapter") else []
    lines += [f"- Hook: {code(origin['hook'])}"] if origin.get("hook") else []
    lines += [f"- Trained on {summary['tokens']:,} tokens of {made}; {data['val_rows']:,} held-out rows"]
    one = data["n_models"] == 1  # trained with --difference
    what, rows_of = ("difference", "differences, ft - base") if one else ("activations", "activations, base first")
    of = "the difference of 2 models" if one else f"{data['n_models']} models"
    kind = f"{config['variant']}, {config['d_hidden']:,} latents, {of} of width {data['d_model']}"
    kind += f", k {config['k']}" if config["variant"] == "batch_topk" else f", l1_coeff {config['l1_coeff']:g}"
    roles = {"": "", "_A": ", base model", "_B": ", fine-tuned model"}
    ends = {k.removeprefix("explained_variance"): v for k, v in summary.items() if k.startswith("explained_variance")}
    ends = {"": ends[""]} if one else ends
    rows = {f"explained variance{roles.get(end, f', model {end[-1:]}')}": f"{v:.4f}" for end, v in ends.items()}
    rows |= {"L0 (active latents a token)": f"{summary['l0_loss']:.2f}", "dead latents": f"{summary['dead_fraction']:.1%}"}
    rows |= {f"latents, {label.replace('_', '-')}": f"{count:,}" for label, count in summary["latents"].items()}
    hub_ids = [m for m in models.values() if m and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", m, re.ASCII) and not Path(m).exists()]
    fields = {"tags": ["crosscoder", "sparse-dictionary", "model-diffing"]} | ({"base_model": hub_ids} if hub_ids else {})
    return front(**fields) + "\n".join(
        [
            f"# {name.split('/')[1]}", "",
            f"A crosscoder: one sparse dictionary for the {what} of a base model and its fine-tuned version.", "",
            f"- {kind}", *lines, "", "| held out | |", "|---|---:|", *(f"| {a} | {b} |" for a, b in rows.items()), "",
            *([] if one else norm_figure(norms)), "## Loading", "", "```python", "from crosscoder import CrossCoder", "",
            f'crosscoder = CrossCoder.from_pretrained("{name}")',
            f"f = crosscoder.encode(x)  # x: [batch, {data['n_models']}, {data['d_model']}] raw {rows_of}",
            "x_hat = crosscoder.decode(f)", "```", "",
        ]
    )  # fmt: skip


def norm_figure(norms: Tensor) -> list[str]:
    """A chapter with a histogram of the relative norms, in text. norms: [d_hidden, n_models]."""
    relative = norms[:, 1] / norms[:, :2].sum(-1).clamp_min(1e-12)
    counts = torch.histc(relative.float().cpu(), 10, 0, 1).int().tolist()
    marks = ["#" * -(-40 * n // max(1, *counts)) for n in counts]
    rows = (f"{i / 10:.1f}-{(i + 1) / 10:.1f} {marks[i]:<40} {n:,}" for i, n in enumerate(counts))
    says = "Norm of a latent's fine-tuned decoder row over the sum of both: 0 only base, 1 only fine-tuned."
    return ["## Relative norms", "", says, "", "```", *rows, "```", ""]


def dataset_card(name: str, pair: dict) -> str:
    """Models, hook, texts and rows, and where each config's files are."""
    splits = [split for split, rows in pair["rows"].items() if rows]
    parts = model_names(len(pair["stored_scale"]))
    files = {part: [{"split": split, "path": f"{part}/{split}/*.arrow"} for split in splits] for part in parts}
    files["tokens"] = [{"split": "train", "path": "tokens/*.arrow"}]
    configs = [{"config_name": part, "data_files": patterns} for part, patterns in files.items()]
    texts = ", ".join(f"{shown(source['source'])} ({source['tokens']:,} tokens)" for source in pair["text"])
    adapter = f" with the adapter {shown(pair['ft_adapter'])}" if pair.get("ft_adapter") else ""
    scales = ", x ".join(f"{x:.6g} ({part})" for x, part in zip(pair["stored_scale"], parts, strict=True))
    lines = [
        f"# {name.split('/')[1]}", "",
        f"Activations of {len(parts)} language models at the same tokens; row i of {', '.join(f'`{part}`' for part in parts)} "
        "is the same token.", "",
        f"- Base model: {shown(pair['base_model'])}",
        f"- Fine-tuned model: {shown(pair['ft_model'])}{adapter}",
        *(f"- Model {part}: {shown(name)}" for part, name in zip(parts[2:], pair.get("models", [])[2:], strict=True)),
        f"- Hook: {code(pair['hook'])}, width {pair['d_model']}, {pair['dtype']}",
        f"- Text: {texts}",
        *(f"- {rows:,} rows in `{split}`" for split, rows in pair["rows"].items()),
        f"- Stored value = activation x {scales}", "",
        "```bash", f"python train.py --dataset {name}", "```", "",
    ]  # fmt: skip
    return front(tags=["activations", "crosscoder"], configs=configs) + "\n".join(lines)
