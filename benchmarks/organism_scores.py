"""How well orders of latents name an implanted change: the scores of organisms.py, whose docstring says what they mean."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from analysis.data import Data, normalized_rows, open_data
from analysis.difference import DifferenceSums
from config import TrainConfig
from crosscoder import CrossCoder

STRONGEST, FIRST = 20, 20


def orders(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Live latents, the most changed first, by the columns that a table of latents has; without those that have NaN there."""
    if "relative_norm" not in table:  # of a dictionary of the difference
        ranked = np.argsort(table["rank"])
        return {"rank, --difference": ranked[~table["dead"][ranked]]}
    keys = {"nu reconstruction": np.abs(table["beta_ratio_reconstruction"])}
    keys |= {"relative norm": -table["relative_norm"], "difference": -table["difference"]}
    if "rank" in table:  # a list for each direction, and both in one as in findings.json
        keys |= {f"rank, more in {of}": np.where(table["direction"] == of, table["rank"], np.nan) for of in ("ft", "base")}
        keys["change score"] = 2 * table["change_error"] - table["change_score"]
    places = {name: np.flatnonzero(~table["dead"] & ~np.isnan(key)) for name, key in keys.items()}
    return {name: live[np.argsort(keys[name][live], kind="stable")] for name, live in places.items()}


def places(order: np.ndarray, relevant: np.ndarray) -> dict:
    """Place of the first relevant one, from 1, how many of the first FIRST are, and how many of a random order's would be."""
    hits = relevant[order]
    first, share = int(hits.argmax()) + 1 if hits.any() else "none", float(hits.sum()) / max(1, len(hits))
    return {"first": first, "in_first": int(hits[:FIRST].sum()), "in_first_random": round(FIRST * share, 2)}


def best_f1(maxima: np.ndarray, truth: np.ndarray) -> dict:
    """The column and threshold of best F1 on sequences of even number, scored on the others. [sequences, n], [sequences]."""
    if not truth.any():
        return {}
    even, best = np.arange(len(truth)) % 2 == 0, (0.0, -1, np.inf)
    for column, values in enumerate(maxima[even].T):
        order = np.argsort(-values, kind="stable")
        f1 = 2 * truth[even][order].cumsum() / (np.arange(1, len(order) + 1) + truth[even].sum())
        values = values[order]
        f1[np.append(values[1:] == values[:-1], False) | (values <= 0)] = 0  # a threshold lies between different values
        if f1.max() > best[0]:
            best = (f1.max(), column, values[f1.argmax()])
    told, truth = maxima[~even, best[1]] >= best[2], truth[~even]
    f1 = 2 * (told & truth).sum() / max(1, told.sum() + truth.sum())
    false_positive_rate = (told & ~truth).sum() / max(1, (~truth).sum())
    return {"f1": round(float(f1), 3), "false_positive_rate": round(float(false_positive_rate), 4), "best": best[1]}


@torch.no_grad()
def strongest(crosscoder: CrossCoder, data: Data, values: Callable[[torch.Tensor], torch.Tensor]) -> tuple[np.ndarray, ...]:
    """(which of n latents are relevant [n], their maxima [sequences, n], which sequences are injected [sequences]).

    values: normalised rows [batch, 2, d_model] -> [batch, n], above 0 where active.
    """
    is_injected = torch.tensor([name == "injected.jsonl" for name in data.text.names])[data.text.text_of]  # [sequences]
    top = kept = maxima = None
    for rows, x in normalized_rows(crosscoder, data, what="strongest tokens"):
        f, sequence = values(x), torch.from_numpy(data.text.sequence[rows].astype(np.int64))
        if top is None:
            top, kept, maxima = f[:0], f[:0] > 0, f.new_zeros(len(is_injected), f.shape[1])
        maxima.scatter_reduce_(0, sequence[:, None].expand_as(f), f, "amax")
        top, index = torch.cat([top, f]).topk(STRONGEST, dim=0)
        kept = torch.cat([kept, is_injected[sequence][:, None].expand(f.shape)]).gather(0, index)
    return ((kept & (top > 0)).sum(0) >= STRONGEST / 2).numpy(), maxima.numpy(), is_injected.numpy()


@torch.no_grad()
def difference_directions(crosscoder: CrossCoder, data: Data) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Dictionaries of x_ft - x_base that nothing was trained for, the direction of most energy first: its principal components,
    both signs in turn, and as many random directions as the crosscoder has latents. {} where the models do not differ."""
    differ = lambda x: (x := crosscoder.denormalize(x))[:, 1] - x[:, 0]  # noqa: E731
    sums = DifferenceSums()
    for _, x in normalized_rows(crosscoder, data, what="components"):
        sums.add(crosscoder.denormalize(x))
    if not sums.products.any():
        return {}
    axes, mean = sums.components()[1].float(), sums.means()[1][0].float()  # [components, d_model], [d_model]
    both = torch.stack([axes, -axes], dim=1).flatten(0, 1)  # [2 * components, d_model]
    drawn = torch.randn(crosscoder.d_hidden, len(mean), generator=torch.Generator().manual_seed(0))
    drawn /= drawn.norm(dim=1, keepdim=True)
    energy = sum(
        ((differ(x) - mean) @ drawn.T).relu().pow(2).sum(0) for _, x in normalized_rows(crosscoder, data, what="random")
    )
    drawn = drawn[energy.argsort(descending=True)]
    named = {"PCA of the difference": both, "random directions": drawn}
    return {name: lambda x, rows=rows: ((differ(x) - mean) @ rows.T).relu() for name, rows in named.items()}


def score(run: Path, ranked: Path, relevance: Path) -> list[dict]:
    """A line for each order. ranked: the dataset of the run; relevance: the one that says what is relevant."""
    crosscoder = CrossCoder.from_pretrained(run / "crosscoder")
    read = pq.read_table(run / "analysis" / "latents.parquet")
    table = {name: read[name].to_numpy() for name in read.column_names}
    opened = [open_data(TrainConfig(dataset=str(path)), None, crosscoder, 1 << 40, []) for path in (ranked, relevance)]
    relevant, *seen = strongest(crosscoder, opened[1], lambda x: crosscoder.encode(x, normalized=True))
    counts = {"injected_share": round(float(seen[1][opened[1].text.sequence].mean()), 4)}
    counts |= {"live": int((~table["dead"]).sum()), "relevant": int((relevant & ~table["dead"]).sum())}
    counts["changed"] = int(table["changed"].sum()) if "changed" in table else ""
    for kind, way in itertools.product(("ft_only", "base_only"), ("", "_scaling")):
        told = table.get("tag" + way)
        counts[kind + way] = "" if told is None else int(((told == kind) & ~table["dead"]).sum())
    found = [{"order": name, **places(order, relevant), **best_f1(*seen)} for name, order in orders(table).items()]
    for name, values in difference_directions(crosscoder, opened[0]).items() if crosscoder.n_models == 2 else ():
        relevant, *seen = strongest(crosscoder, opened[1], values)
        parts = places(np.arange(len(relevant)), relevant)
        if name.startswith("PCA"):
            parts["in_first_random"] = ""  # all of them are among the first
        found.append({"order": name, **parts, **best_f1(*seen)})
    return [counts | line for line in found]


def steered(lines: list[dict]) -> dict:
    """How much more often the base and less often the fine-tuned model shows the behaviour, with the latents and with random
    ones, where the two are furthest apart. lines: of steering.jsonl."""
    told = {}
    for of, sign in (("base", 1), ("ft", -1)):
        found = [
            [sign * (line[name] - line["shown_before"]) for name in ("shown", "shown_random")]
            for line in lines if line["model"] == of and line["shown"] is not None
        ]  # fmt: skip
        if found:
            best = max(found, key=lambda pair: pair[0] - abs(pair[1]))
            told |= {f"steered_{of}": round(best[0], 3), f"random_{of}": round(best[1], 3)}
    return told
