"""Figures and the one-page report of an analysis. Figures are PNG and SVG; the page (report.html.j2) needs no network.

Colours are those of Okabe and Ito, which colour-blind readers tell apart and which keep their order in grey.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path

import jinja2
import matplotlib
import numpy as np

matplotlib.use("agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

from analysis.findings import MODELS, own_nu, percent, share
from ops.latents import BASE_ONLY_BELOW, CLASSES, FT_ONLY_ABOVE, NU_ERROR_BELOW, NU_RECONSTRUCTION_BELOW

COLORS = {"base_only": "#0072B2", "shared": "#7A7A7A", "ft_only": "#D55E00"}
NAMES = {"base_only": "base-only", "shared": "shared", "ft_only": "ft-only"}
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "svg.fonttype": "path", "svg.hashsalt": "crosscoder", "figure.dpi": 110, "legend.frameon": False, "savefig.dpi": 200,
    "figure.figsize": (5.6, 3.1), "figure.constrained_layout.use": True,
}  # fmt: skip
POINTS = {"s": 9, "alpha": 0.6, "linewidths": 0, "rasterized": True}
SHARE = {"ylim": (-0.03, 1.03), "yticks": [0, 0.25, 0.5, 0.75, 1]}  # an axis of relative norms
SET_NAMES = {  # of the sets of latents in patching
    "first_ranked": "first 10 by rank, each direction", "as_many_random": "as many others, random",
    "ft_only": "ft-only", "ft_only_by_both": "ft-only by norm and scaling", "as_many_shared": "as many shared, random",
    "highest_relative_norm": "5 % of highest relative norm", "all": "all latents",
}  # fmt: skip
TABLE = {  # columns of the page's table: heading
    "rank": "rank", "latent": "latent", "direction": "more in", "label": "label", "label_score": "label score",
    "change_score": "the other lacks", "change_error": "± error",
    "changed": "changed", "frequency": "active on", "relative_norm": "relative norm",
    "nu_error": "ν error", "nu_reconstruction": "ν reconstruction", "tag": "by norm", "tag_scaling": "by scaling",
    "planted_concept": "concept", "planted_kind": "its kind", "planted_cosine": "its cosine",
}  # fmt: skip
TABLE_ENDS = {"mean_act": "mean active", "max_act": "max", "dec_cos_sim": "decoder cosine", "difference": "difference"}
OF_THE_PAGE = {  # definitions of columns that only the page has
    "max_act": "largest activation",
    "nu_error": "share of the latent in the error of the model with the shorter decoder row, without this latent's own part",
    "nu_reconstruction": "share of the latent in that model's reconstruction",
}
LEADING, LEADING_EXAMPLES, AROUND = 5, 2, 14  # latents above the fold, examples of each, tokens around the strongest one
FIGURES = ("relative_norm", "nu", "decoder_cosine", "frequency", "planted", "diffing", "threshold", "training")


# --- figures


def draw_figures(folder: Path, table: dict, metrics: dict, curves: list[dict], pair: str, truth: dict | None) -> dict[str, str]:
    """Draw every figure that there is data for, as NAME.png and NAME.svg. Returns the latter as data URIs, by name."""
    live = ~table["dead"]
    if not live.any():
        return {}
    table = {name: column[live] for name, column in table.items()}
    patching, curve = metrics.get("patching"), metrics["threshold_curve"]
    drawings = {  # whether there is something to draw, the function, and what it draws
        "relative_norm": (True, relative_norm_figure, table, pair),
        "nu": (np.isfinite(table["beta_ratio_error"]).any(), nu_figure, table),
        "decoder_cosine": ((table["tag"] == "shared").any(), cosine_figure, table),
        "frequency": (True, frequency_figure, table),
        "planted": (truth, planted_figure, truth),
        "diffing": (patching, diffing_figure, patching),
        "threshold": (len(curve) > 1, threshold_figure, curve),
        "training": (len(curves) > 1, training_figure, curves),
    }
    drawn = {}
    for name in FIGURES:
        wanted, draw, *shown = drawings[name]
        if wanted:
            with plt.rc_context(STYLE):
                figure = draw(*shown)
                figure.savefig(folder / f"{name}.png")
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                plt.close(figure)
            drawn[name] = "data:image/svg+xml;base64," + base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
    return drawn


def relative_norm_figure(table: dict, pair: str):
    figure, axis = plt.subplots()
    for name in CLASSES:
        values = table["relative_norm"][table["tag"] == name]
        axis.hist(values, np.linspace(0, 1, 201), color=COLORS[name], label=f"{NAMES[name]}: {len(values):,}")
    for cut in (BASE_ONLY_BELOW, FT_ONLY_ABOVE):
        axis.axvline(cut, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlim=(0, 1), xticks=SHARE["yticks"], xlabel="relative decoder norm, |ft| / (|base| + |ft|)")
    axis.set(ylabel="Number of Latents")
    axis.set_title(pair, parse_math=False)  # a $ in a model's name does not begin a formula
    axis.legend()
    return figure


def cosine_figure(table: dict):
    figure, axis = plt.subplots()
    cosine, edges = table["dec_cos_sim"][table["tag"] == "shared"], np.linspace(-1, 1, 101)
    axis.hist(cosine, edges, color=COLORS["shared"], label=f"{len(cosine):,} shared latents")
    axis.hist(table["random_cosine"], edges, histtype="step", color="black", label="random pairs")
    axis.set(yscale="log", ylim=(0.7, None), xlim=(-1, 1))
    axis.set(xlabel="cosine of the two decoder rows", ylabel="Number of Latents (log)")
    axis.legend(loc="upper left")
    return figure


def nu_figure(table: dict):
    figure, axes = plt.subplots(2, 2, figsize=(5.6, 4.8), width_ratios=(4, 1), height_ratios=(1, 4), sharex="col", sharey="row")
    (top, corner), (main, right) = axes
    corner.axis("off")
    window, edges = (-0.1, 1.1), np.linspace(-0.1, 1.1, 51)
    finite = np.isfinite(table["beta_ratio_error"]) & np.isfinite(table["beta_ratio_reconstruction"])
    for name in ("shared", "ft_only"):
        some = finite & (table["tag"] == name)
        x, y = (table[f"beta_ratio_{what}"][some].clip(*window) for what in ("error", "reconstruction"))
        main.scatter(x, y, color=COLORS[name], label=f"{NAMES[name]} by norm", **POINTS)
        top.hist(x, edges, color=COLORS[name], alpha=0.7)
        right.hist(y, edges, color=COLORS[name], alpha=0.7, orientation="horizontal")
    main.axvline(NU_ERROR_BELOW, color="black", linewidth=0.8, linestyle="--")
    main.axhline(NU_RECONSTRUCTION_BELOW, color="black", linewidth=0.8, linestyle="--")
    main.set(xlim=window, ylim=window, xlabel="ν error (base / ft)", ylabel="ν reconstruction (base / ft)")
    top.set(ylabel="Latents")
    right.set(xlabel="Latents")
    main.legend(loc="lower right", markerscale=2)
    return figure


def frequency_figure(table: dict):
    figure, (top, main) = plt.subplots(2, 1, figsize=(5.6, 4.2), height_ratios=(1, 3), sharex=True)
    frequency = table["frequency"]
    for name in CLASSES:
        some = table["tag"] == name
        main.scatter(frequency[some], table["relative_norm"][some], color=COLORS[name], label=NAMES[name], **POINTS)
    edges = np.geomspace(max(1e-7, frequency.min() / 2), 1, 51)
    top.hist([frequency[table["tag"] == name] for name in CLASSES], edges, stacked=True, color=list(COLORS.values()))
    top.set(ylabel="Latents")
    main.set(xscale="log", xlabel="frequency, active tokens / all tokens (log)", ylabel="relative decoder norm", **SHARE)
    figure.legend(*main.get_legend_handles_labels(), loc="outside upper right", ncols=3, markerscale=2)
    return figure


def planted_figure(truth: dict):
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    for name in CLASSES:
        kind = truth["kind"] == name
        label = f"{NAMES[name]} concepts: {(kind & truth['recovered']).sum()}"
        for some, style in (
            (kind & truth["recovered"], {"marker": "o", "s": 14, "alpha": 0.7, "label": label}),
            (kind & ~truth["recovered"], {"marker": "x", "s": 28}),
        ):
            axis.scatter(truth["rate"][some], truth["relative_norm"][some], color=COLORS[name], **style)
    for cut in (BASE_ONLY_BELOW, FT_ONLY_ABOVE):
        axis.axhline(cut, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="true frequency of the concept (log)", ylabel="relative norm of its latent", **SHARE)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def diffing_figure(patching: dict):
    halves = patching["diffing"]
    sets = [name for name in halves["base model"] if name != "before"]
    labels = ["nothing added", *(f"{SET_NAMES[name]} ({halves['base model'][name]['latents']:,})" for name in sets)]
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 0.9 + 0.36 * len(labels)), sharey=True)
    for axis, (half, found) in zip(axes, halves.items(), strict=True):
        kls = [found["before"], *(found[name]["kl"] for name in sets)]
        for i, (where, color, text) in enumerate((("all", "#56B4E9", "all tokens"), ("first", "#E69F00", "first tokens"))):
            values = [kl[where] if kl[where] is not None else math.nan for kl in kls]
            bars = axis.barh(np.arange(len(labels)) + (i - 0.5) * 0.38, values, 0.36, color=color, label=text)
            axis.bar_label(bars, fmt=" {:.3g}", fontsize=7)
        axis.set(title=f"later layers of the {half.replace('ft', 'fine-tuned')}")
        axis.set(xlabel="KL to the fine-tuned model, nats a token")
        axis.margins(x=0.15)
        axis.set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def threshold_figure(curve: list[dict]):
    figure, axis = plt.subplots()
    l0, variance = ([point[key] for point in curve] for key in ("l0", "explained_variance"))
    axis.plot(l0, variance, color="#0072B2", marker="o", markersize=4)
    own = [i for i, point in enumerate(curve) if point["own"]]
    axis.plot(l0, variance, "o", markevery=own, markersize=11, markerfacecolor="none", markeredgecolor="#D55E00")
    axis.set(xscale="log", xlabel="L0, active latents a token (log)", ylabel="explained variance")
    axis.set_xticks(l0, [f"{x:.3g}" for x in l0])
    axis.minorticks_off()
    return figure


def training_figure(curves: list[dict]):
    panels = {"explained_variance": "explained variance", "l0_loss": "L0, active latents a token", "loss": "loss",
              "dead_fraction": "share of dead latents"}  # fmt: skip
    styles = {  # of training batches and of held-out rows
        "": {"color": "#0072B2", "linewidth": 1},
        "val_": {"color": "#D55E00", "marker": "o", "markersize": 4, "linestyle": ""},
    }
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 4.2), sharex=True)
    known, tokens = [], 0
    for line in curves:  # the last line, of held-out rows, has no `tokens`
        tokens = line.get("tokens", tokens)
        known.append(line | {"tokens": tokens})
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
        for prefix, style in styles.items():
            points = [(line["tokens"], line[prefix + name]) for line in known if line.get(prefix + name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), **style)
        axis.set(ylabel=label)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0, 0].set_ylim(max(0, axes[0, 0].get_ylim()[0]), 1)  # the first steps may be far below 0
    axes[1, 0].set_yscale("log")
    for axis in axes[1]:
        axis.set(xlabel="training tokens")
    return figure


# --- the page


def short(value):
    """A value for JSON: floats with four significant digits, None for NaN and infinity, NumPy numbers as Python ones."""
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def name_only(path: str) -> str:
    """The last part of every path in "A and B": a page that is passed on says nothing of the machine that made it."""
    return " and ".join(Path(one).name or one for one in path.split(" and "))


def leading(found: dict, sections: list[dict], table: dict) -> list[dict]:
    """The latents above the fold: the first changed ones, the nearest where none changed, with a few tokens of examples."""
    examples, lead = {one["latent"]: one["examples"] for one in sections}, []
    for one in (found["changes"] or found["nearest"])[:LEADING]:
        top = [e for e in examples.get(one["latent"], []) if e["range"] == "top"][:LEADING_EXAMPLES]
        lead.append(one | {"share": share(one), "shown": [around(e, table["max_act"][one["latent"]]) for e in top]})
    return lead


def around(e: dict, most: float) -> dict:
    """The strongest token of an example with those before and after it, each with its share of the latent's largest value."""
    peak, made = e["peak"], []
    for token, value in zip(e["tokens"], e["values"], strict=True):
        made.append({"token": token.replace("\n", "↵").replace("\t", "⇥"), "share": short(min(1, (value or 0) / most))})
    return {"before": made[max(0, peak - AROUND) : peak], "peak": made[peak], "after": made[peak + 1 : peak + 1 + AROUND]}


def environment() -> jinja2.Environment:
    """Templates of this folder, whose text is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    made.filters |= {
        "number": lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}",
        "percent": percent, "name": name_only,
    }  # fmt: skip
    return made


def render_index(pages: dict[str, dict]) -> str:
    """The page that leads to those of several models, each against the base. pages: by folder what its findings.json says."""
    return environment().get_template("index.html.j2").render(pages=pages)


def render(  # noqa: PLR0913 - what the page shows, given by name
    metrics: dict, table: dict, definitions: dict, found: dict, text_names: list[str], *, figures: dict[str, str],
    sections: list[dict], steered: list[dict], truth: dict | None, pair: str,
) -> str:  # fmt: skip
    """The page as one string. All text comes in through jinja2's escaping or as inert JSON, which the page's script writes
    as text, never as HTML."""
    nu = {f"nu_{of}": own_nu(table, of) for of in ("error", "reconstruction")}
    table = table | nu | {"max_act": np.fmax(table["max_act_train"], table["max_act_val"])}
    definitions, headings = definitions | OF_THE_PAGE, dict(TABLE)
    for i, text in enumerate(text_names):
        headings |= {f"freq_text_{i}": f"active on, {text}", f"mean_text_{i}": f"mean, {text}"}
    headings |= TABLE_ENDS
    columns = [
        {
            "name": name, "heading": heading, "definition": definitions[name], "values": [short(v) for v in table[name]],
            "wide": name.startswith(("mean_text", "direction")),  # only in the sections: the rank says its direction
        }
        for name, heading in headings.items() if name in table
    ]  # fmt: skip
    concepts = [dict(zip(truth, map(short, row), strict=True)) for row in zip(*truth.values(), strict=True)] if truth else None
    return environment().get_template("report.html.j2").render(
        m=metrics, columns=columns, dead=table["dead"].tolist(), figures=figures, sections=sections, found=found,
        lead=leading(found, sections, table), steered=steered, concepts=concepts, pair=pair, classes=CLASSES, names=NAMES,
        colors=COLORS, set_names=SET_NAMES, models=MODELS,
    )  # fmt: skip
