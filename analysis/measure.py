"""What analyze.py measures: every latent in one pass over the rows, the held-out metrics, and which latents deserve a look."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from analysis import ranking
from analysis.data import CODES_TOGETHER, Data, normalized_rows
from analysis.difference import DifferenceSums, add_rows
from analysis.labels import COLUMNS as LABEL_COLUMNS
from crosscoder import CrossCoder
from ops import latents
from ops.variance import VarianceTotals
from sources.planted import RECOVERED, PlantedConcepts

BLOCKS = 16  # parts of the tokens whose differences give each latent's uncertainty
RANDOM_SHARED = 10  # unchanged latents that get a section, to compare with
CURVE_ROWS = 8192  # held-out rows behind the threshold curve
CURVE = (0.25, 0.5, 0.75, 1, 1.5, 2, 4)  # L0 at its points, as multiples of the crosscoder's own

# What each column of latents.parquet says. Lengths are in the normalised space of the crosscoder.
COLUMNS = {
    "latent": "index of the latent",
    "direction": "the model whose decoder row is longer: ft (there is more of the latent there) or base",
    "rank": "1 first: place among the latents of its direction by change_score - 2 * change_error; never active ones come last",
    "changed": "whether change_score lies beyond the cut by more than its error explains (Student's t, Benjamini-Hochberg over "
    "all live latents: of those called changed at most 5 % are expected not to be beyond it). The cut: the median score + 4 "
    "spreads of the scores (1.4826 * median deviation) + 0.1, at most 0.5",
    "change_score": "share of the latent that the other model lacks: 1 - the larger of nu_error and nu_reconstruction of its "
    "direction. About 0: both models have it, 1: one alone",
    "change_error": "standard error of change_score: jackknife over 16 parts of the tokens; infinite if fewer than 4 have it",
    "change_p": "chance of so high a change_score in a latent whose true score is at the cut",
    "tag": "class by relative norm: base_only below 0.2, ft_only above 0.8 (arXiv 2602.11729)",
    "tag_scaling": "class by latent scaling: exclusive where |nu_error| < 0.2 and |nu_reconstruction| < 0.5 (arXiv 2504.02922)",
    "tag_delta_norm": "class by delta_norm: below 0.1, 0.4 to 0.6, above 0.9, else other (arXiv 2504.02922)",
    "dead": "active at none of the tokens measured",
    "dec_base_norm": "norm of the decoder row in the base model",
    "dec_ft_norm": "norm of the decoder row in the fine-tuned model",
    "relative_norm": "dec_ft_norm / (dec_base_norm + dec_ft_norm): 0 base-only, 1 fine-tuned-only",
    "delta_norm": "(1 + (dec_ft_norm - dec_base_norm) / max of both) / 2: 0 base-only, 1 fine-tuned-only",
    "dec_norm_diff": "1 - delta_norm, as in the tables of Minder et al.: 0 fine-tuned-only, 1 base-only",
    "dec_cos_sim": "cosine of the two decoder rows",
    "enc_base_norm": "norm of the encoder weights that read the base model",
    "enc_ft_norm": "norm of the encoder weights that read the fine-tuned model",
    "enc_norm_diff": "as dec_norm_diff, of the encoder weights",
    "enc_cos_sim": "cosine of the two models' encoder weights",
    "frequency": "share of all tokens measured at which the latent is active",
    "freq_train": "the same over the training rows",
    "freq_val": "the same over the held-out rows",
    "mean_act": "mean activation over the tokens at which it is active",
    "max_act_train": "largest activation, training rows",
    "max_act_val": "largest activation, held-out rows",
    "difference": "mean over tokens of activation^2 * |row_ft - row_base|^2: what it writes of the models' squared difference",
    "beta_error_base": "least-squares factor of activation * row_ft in the base model's error without this latent",
    "beta_error_ft": "the same in the fine-tuned model's error",
    "beta_reconstruction_base": "the same in the base model's reconstruction",
    "beta_reconstruction_ft": "the same in the fine-tuned model's reconstruction",
    "beta_activation_base": "the same in the base model's activation",
    "beta_activation_ft": "the same in the fine-tuned model's activation",
    "beta_activation_no_bias_base": "the same in the base model's activation less the decoder bias",
    "beta_activation_no_bias_ft": "the same in the fine-tuned model's activation less the decoder bias",
    "beta_ratio_error": "nu_error = beta_error_base / beta_error_ft: high means the base row was shrunk away",
    "beta_ratio_reconstruction": "nu_reconstruction = the ratio of the reconstructions: high: others reconstruct it in base",
    "beta_activation_ratio": "beta_activation_base / beta_activation_ft",
    "base_beta_ratio_error": "nu_error with the roles of the models exchanged (row_base asked for in the fine-tuned model)",
    "base_beta_ratio_reconstruction": "nu_reconstruction with the roles exchanged",
    "planted_concept": "planted concepts: the concept that the latent points at best",
    "planted_kind": "planted concepts: which model has that concept",
    "planted_cosine": "planted concepts: the cosine with it, for a shared concept the smaller of the two models'",
}


ACTIVITY = ("dead", "frequency", "freq_train", "freq_val", "mean_act", "max_act_train", "max_act_val")


# --- every latent


@torch.no_grad()
def measure_latents(
    crosscoder: CrossCoder, data: Data, without: DifferenceSums | None = None
) -> tuple[dict[str, latents.LatentSums], dict, list[latents.LatentSums]]:
    """The sums of each split that has rows, the held-out metrics, and the sums of each block of tokens (see `by_block`).

    Of more than two models the codes are those of all, the sums and metrics of the first two.

    Memory is that of the dictionary, some numbers a latent and block, and a few batches. without: gets the same rows, for what
    is said of them without a dictionary.
    """
    n_texts = len(data.text.names) if data.text else 1
    sums: dict[str, latents.LatentSums] = {}
    parts: dict[int, latents.LatentSums] = {}
    totals, per_token = VarianceTotals(), []
    for block, split, rows, x in by_block(crosscoder, data):
        group = data.text and torch.from_numpy(data.text.text_of[data.text.sequence[rows]]).long().to(x.device)
        if without is not None:
            add_rows(without, data, rows, crosscoder.denormalize(x)[:, :2])
        f = crosscoder.encode(x, normalized=True)  # [batch, d_hidden]
        x = x[:, :2]
        part, x_hat = latents.latent_sums(x, f, crosscoder.W_dec[:, :2], crosscoder.b_dec[:2], group, n_texts)
        sums[split] = sums[split] + part if split in sums else part
        parts[block] = parts[block] + part if block in parts else part
        if split == "validation":
            totals.add(x, x_hat)
            per_token.append((f > 0).sum(1).cpu())
    if not per_token:
        raise ValueError("--dataset: every held-out row holds NaN or inf; collect it again with --dtype float32")
    per_token = torch.cat(per_token).float()
    together, *each = totals.explained().tolist()
    metrics = {
        "explained_variance": together,
        **{f"explained_variance_{'AB'[model]}": one for model, one in enumerate(each)},
        "l0_loss": per_token.mean().item(),
        "l0_percentiles": {str(q): per_token.quantile(q / 100).item() for q in (5, 25, 50, 75, 95)},
    }
    return sums, metrics, list(parts.values())


def by_block(crosscoder: CrossCoder, data: Data) -> Iterator[tuple[int, str, np.ndarray, Tensor]]:
    """(block, split, row numbers, normalised activations) of all rows to measure, each batch of one block and split.

    The blocks are parts of the data that are as good as independent, so that the differences between them say how uncertain
    a sum is: sequences by their number, or stretches of rows where it is not known which sequence a row is of.
    """
    size, after = max(1, min(1024, CODES_TOGETHER // crosscoder.d_hidden)), data.first_train + data.train_rows
    waiting: dict[tuple[int, str], list[tuple[np.ndarray, Tensor]]] = {}
    for rows, x in normalized_rows(crosscoder, data, what="latents"):
        split = "train" if rows[0] >= data.first_train else "validation"
        block = data.text.sequence[rows] % BLOCKS if data.text else rows * BLOCKS // after
        for b in np.unique(block).tolist():
            here = block == b
            held = waiting.setdefault((b, split), [])
            held.append((rows[here], x[torch.from_numpy(here).to(x.device)]))
            if sum(len(r) for r, _ in held) >= size:
                yield b, split, *merge(waiting.pop((b, split)))
    for (b, split), held in waiting.items():
        yield b, split, *merge(held)


def merge(held: list[tuple[np.ndarray, Tensor]]) -> tuple[np.ndarray, Tensor]:
    rows, x = zip(*held, strict=True)
    return np.concatenate(rows), torch.cat(x)


def define(table: dict[str, np.ndarray], text_names: list[str]) -> dict[str, str]:
    """What each column of `latent_table` says."""
    known = COLUMNS | LABEL_COLUMNS
    for i, text in enumerate(text_names):
        known[f"freq_text_{i}"] = f"share of the tokens of {text} at which the latent is active"
        known[f"mean_text_{i}"] = f"mean activation over all tokens of {text}, zeros included"
    return {name: known[name] for name in table}


def all_rows(sums: dict[str, latents.LatentSums]) -> latents.LatentSums:
    """The sums of the held-out rows, and of training rows where there are any."""
    return sums["validation"] + sums["train"] if "train" in sums else sums["validation"]


def activity(sums: dict[str, latents.LatentSums]) -> dict[str, Tensor]:
    """The columns ACTIVITY, [d_hidden] each: when and how strongly a latent is active."""
    both, held_out, train = all_rows(sums), sums["validation"], sums.get("train")
    count = both.count.sum(0)
    unknown = torch.full_like(both.f_max, torch.nan)
    return {
        "dead": count == 0,
        "frequency": count / both.tokens,
        "freq_train": train.count.sum(0) / train.tokens if train else unknown,
        "freq_val": held_out.count.sum(0) / held_out.tokens,
        "mean_act": both.f.sum(0) / count,
        "max_act_train": train.f_max if train else unknown,
        "max_act_val": held_out.f_max,
    }


@torch.no_grad()
def latent_table(
    crosscoder: CrossCoder, sums: dict[str, latents.LatentSums], ranked: ranking.Ranking, data: Data
) -> dict[str, np.ndarray]:
    """Every latent, column by column; `define` says what each is. Of more than two models the first two are compared."""
    W_dec, W_enc = crosscoder.W_dec.detach()[:, :2], crosscoder.W_enc.detach()[:2].permute(2, 0, 1)  # [d_hidden, 2, d_model]
    norms, enc_norms = W_dec.norm(dim=-1), W_enc.norm(dim=-1)  # [d_hidden, 2]
    both = all_rows(sums)
    base, ft = (latents.latent_scaling(both.scaling(of), W_dec, of) for of in (0, 1))
    delta, names = latents.delta_norm(norms), np.array(latents.CLASSES)
    by_delta = [mask.cpu() for mask in (delta < 0.1, (delta >= 0.4) & (delta <= 0.6), delta > 0.9)]
    n2 = both.f_squared * W_dec[:, 1].double().pow(2).sum(-1)  # [d_hidden]
    no_bias = ft.activation - (crosscoder.b_dec[:2].double() @ W_dec[:, 1].double().T) * both.f.sum(0) / n2
    table = {
        "latent": torch.arange(crosscoder.d_hidden),
        **ranking.columns(ranked),
        "tag": names[latents.classify(norms).cpu()],
        "tag_scaling": names[latents.classify_by_scaling(base, ft, norms).cpu()],
        "tag_delta_norm": np.select(by_delta, names, "other"),
        "dec_base_norm": norms[:, 0],
        "dec_ft_norm": norms[:, 1],
        "relative_norm": latents.relative_norm(norms),
        "delta_norm": delta,
        "dec_norm_diff": 1 - delta,
        "dec_cos_sim": latents.cosine(W_dec),
        "enc_base_norm": enc_norms[:, 0],
        "enc_ft_norm": enc_norms[:, 1],
        "enc_norm_diff": 1 - latents.delta_norm(enc_norms),
        "enc_cos_sim": latents.cosine(W_enc),
        **activity(sums),
        "difference": both.f_squared / both.tokens * (W_dec[:, 1] - W_dec[:, 0]).double().pow(2).sum(-1),
    }
    for name, beta in (ft._asdict() | {"activation_no_bias": no_bias}).items():
        table[f"beta_{name}_base"], table[f"beta_{name}_ft"] = beta
    table["beta_ratio_error"], table["beta_ratio_reconstruction"] = ft.nu(1)
    table["beta_activation_ratio"] = ft.activation[0] / ft.activation[1]
    table["base_beta_ratio_error"], table["base_beta_ratio_reconstruction"] = base.nu(0)
    if data.text and len(data.text.names) > 1:
        n_tokens = both.group_tokens.clamp_min(1)
        for i in range(len(data.text.names)):
            table |= {f"freq_text_{i}": both.count[i] / n_tokens[i], f"mean_text_{i}": both.f[i] / n_tokens[i]}
    return {name: column if isinstance(column, np.ndarray) else column.cpu().numpy() for name, column in table.items()}


def overview(crosscoder: CrossCoder, table: dict[str, np.ndarray], metrics: dict) -> dict:
    """The metrics with the counts of the table: dead share, classes under several cuts, density."""
    live = ~table["dead"]
    norms = torch.from_numpy(np.stack([table["dec_base_norm"], table["dec_ft_norm"]], axis=1))
    agreed = np.where(table["tag"] == table["tag_scaling"], table["tag"], "shared")
    ways = {"latents": agreed, "latents_by_norm": table["tag"], "latents_by_scaling": table["tag_scaling"]}
    edges = np.linspace(-7, 0, 51)
    density, _ = np.histogram(np.log10(table["frequency"][live]).clip(-7, 0), edges)
    return metrics | {
        "variant": crosscoder.variant,
        "d_hidden": crosscoder.d_hidden,
        "k": crosscoder.k,
        "threshold": None if crosscoder.folded else crosscoder.threshold.item(),
        "dead_fraction": float(1 - live.mean()),
        **{way: {name: int((live & (tags == name)).sum()) for name in latents.CLASSES} for way, tags in ways.items()},
        "latents_by_published_cuts": latents.published_counts(norms, torch.from_numpy(live)),
        "density": {"log10_frequency_edges": edges.tolist(), "latents": density.tolist()},
    }


@torch.no_grad()
def threshold_curve(crosscoder: CrossCoder, data: Data) -> list[dict]:
    """L0 and explained variance at several thresholds, over some held-out rows: how much depends on the chosen one.

    Empty for a folded crosscoder, whose thresholds differ from latent to latent.
    """
    if crosscoder.folded:
        return []
    rows = np.arange(min(data.val_rows, CURVE_ROWS))
    batches = [x for _, x in normalized_rows(crosscoder, data, rows)]
    own, points = crosscoder.threshold.clone(), []
    active = sum((crosscoder.encode(x, normalized=True) > 0).sum().item() for x in batches)
    most = int(CURVE[-1] * active) + 1
    try:
        crosscoder.threshold.zero_()
        scores = torch.zeros(1)  # the largest, as many as the point with the largest L0 needs; 0 where all are kept
        for x in batches:
            score = crosscoder.score(crosscoder.encode(x, normalized=True)).flatten().cpu()
            scores = torch.cat([scores, score[score > 0]])
            scores = scores.topk(min(most, len(scores))).values
        for factor in CURVE:
            if not 0 < (count := int(factor * active)) < len(scores):
                continue
            crosscoder.threshold.copy_((scores[count - 1] + scores[count]) / 2)
            totals = VarianceTotals()
            for x in batches:
                totals.add(x[:, :2], crosscoder.decode(crosscoder.encode(x, normalized=True), normalized=True)[:, :2])
            point = {"threshold": crosscoder.threshold.item(), "l0": count / sum(map(len, batches))}
            points.append(point | {"explained_variance": totals.explained()[0].item(), "own": factor == 1})
    finally:
        crosscoder.threshold.copy_(own)
    return points


def cosine_of_random_pairs(W_dec: Tensor, seed: int) -> np.ndarray:
    """[d_hidden] cosine of each latent's base row and the fine-tuned row of a random latent. W_dec: [d_hidden, 2, d_model]."""
    other = torch.from_numpy(np.random.default_rng(seed).permutation(len(W_dec))).to(W_dec.device)
    return latents.cosine(torch.stack([W_dec[:, 0], W_dec[other, 1]], dim=1)).cpu().numpy()


def planted_truth(source: PlantedConcepts, crosscoder: CrossCoder, table: dict) -> tuple[dict, dict]:
    """The score against the truth, by norm and by scaling; and the truth concept by concept. Adds columns to the table."""
    W_dec, dead, names = crosscoder.W_dec.detach().cpu(), torch.from_numpy(table["dead"]), np.array(latents.CLASSES)
    by_scaling = torch.from_numpy((table["tag_scaling"][:, None] == names).argmax(1))
    scores = {"by_norm": source.score(W_dec, dead), "by_scaling": source.score(W_dec, dead, by_scaling)}
    fit, kind = source.fit(W_dec, dead), names[source.kind.numpy()]  # [n_concepts, d_hidden], [n_concepts]
    (cosine, concept), (best, latent) = ((t.numpy() for t in fit.max(axis)) for axis in (0, 1))
    table |= {"planted_concept": concept, "planted_kind": kind[concept], "planted_cosine": cosine}
    truth = {
        "concept": np.arange(len(kind)), "kind": kind, "rate": source.rate.numpy(), "latent": latent, "cosine": best,
        "recovered": best > RECOVERED, **{name: table[name][latent] for name in ("tag", "tag_scaling", "relative_norm")},
    }  # fmt: skip
    return scores, truth


def choose(table: dict, asked: list[int], per_direction: int, seed: int) -> np.ndarray:
    """Latents that get a section: those asked for, the first by rank of each direction, and a random sample of shared ones."""
    live = ~table["dead"]
    first = np.flatnonzero(live & (table["rank"] <= per_direction))
    first = first[np.lexsort((table["direction"][first] == "base", table["rank"][first]))]
    shared = np.flatnonzero(live & ~table["changed"] & (table["tag"] == "shared") & (table["tag_scaling"] == "shared"))
    some = sorted(np.random.default_rng(seed).permutation(shared)[: min(per_direction, RANDOM_SHARED)].tolist())
    return np.array(list(dict.fromkeys([*asked, *first.tolist(), *some])), dtype=np.int64)
