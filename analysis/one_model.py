"""A dictionary of the models' difference (train.py --difference): its latents by what they explain of it, and their page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from analysis import measure, report
from analysis.difference import DifferenceSums
from crosscoder import CrossCoder
from ops.latents import LatentSums

LISTED = 200  # latents in the page's table; latents.parquet holds all
COLUMNS = {
    "latent": "index of the latent",
    "rank": "1 explains most",
    "explained": "share of the variance of the difference that is no longer explained when this latent is left out",
    **{name: measure.COLUMNS[name] for name in measure.ACTIVITY},
    "dec_norm": "length of the decoder row in raw activations: what an activation of 1 adds to the difference",
    "cosine_with_mean": "cosine of the decoder row and the mean difference",
}


@torch.no_grad()
def latent_table(crosscoder: CrossCoder, sums: dict[str, LatentSums], without: DifferenceSums) -> dict[str, np.ndarray]:
    """Every latent of a dictionary of the difference, column by column; COLUMNS says what each is.

    Without latent j the error e becomes e + f_j d_j, so the squared error grows by the sum of 2 f_j <e, d_j> + f_j^2 |d_j|^2.
    sums, without: of the same rows.
    """
    both, W_dec = measure.all_rows(sums), crosscoder.W_dec[:, 0].double()  # [d_hidden, d_model]
    mean = without.means()[1][0].to(W_dec.device)
    raw = without.products.diagonal().sum() - without.tokens * mean.square().sum()  # squared deviation of the difference
    own = 2 * both.error[0, 0] + both.f_squared * W_dec.square().sum(-1)
    explained = own / (raw * crosscoder.scale[0].double() ** 2)
    rank = torch.empty_like(both.count[0])
    rank[explained.argsort(descending=True, stable=True)] = torch.arange(1, len(rank) + 1, device=rank.device)
    table = {
        "latent": torch.arange(len(rank)),
        "rank": rank,
        "explained": explained,
        **measure.activity(sums),
        "dec_norm": W_dec.norm(dim=-1) / crosscoder.scale[0],
        "cosine_with_mean": torch.nn.functional.cosine_similarity(W_dec, mean[None]),
    }
    return {name: column.cpu().numpy() for name, column in table.items()}


def choose(table: dict[str, np.ndarray], asked: list[int], most: int) -> np.ndarray:
    """Latents that get a section: those asked for, then the live ones that explain most."""
    ranked = np.argsort(table["rank"])
    return np.array(list(dict.fromkeys([*asked, *ranked[~table["dead"][ranked]][:most].tolist()])), dtype=np.int64)


def overview(crosscoder: CrossCoder, table: dict[str, np.ndarray], metrics: dict) -> dict:
    """The metrics of a crosscoder of one model: of these no latent has a class."""
    facts = {name: getattr(crosscoder, name) for name in ("variant", "d_hidden", "k")}
    return metrics | facts | {"dead_fraction": float(table["dead"].mean()), "latents": {"live": int((~table["dead"]).sum())}}


def render(metrics: dict, table: dict, sections: list[dict], pair: str, steered: list[dict]) -> str:
    """The page as one string, escaped by jinja2."""
    known, rows = {one["latent"]: one for one in sections}, []
    for latent in np.argsort(table["rank"])[:LISTED].tolist():
        if not table["dead"][latent]:
            rows.append({name: table[name][latent].item() for name in COLUMNS} | {"section": known.get(latent)})
    return report.environment().get_template("one_model.html.j2").render(
        m=metrics, rows=rows, sections=sections, steered=steered, pair=pair, definitions=COLUMNS,
        run=Path(metrics["run"]).name, data=Path(metrics["data"]).name,
    )  # fmt: skip
