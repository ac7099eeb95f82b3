"""Figures and the one-page report of an analysis. Figures are PNG and SVG; the page (report.html.j2) needs no network.

Colours are those of Okabe and Ito, which colour-blind readers tell apart and which keep their order in grey.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import numpy as np

matplotlib.use("agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

from ops.latents import BASE_ONLY_BELOW, CLASSES, FT_ONLY_ABOVE, NU_ERROR_BELOW, NU_RECONSTRUCTION_BELOW

COLORS = {"base_only": "#0072B2", "shared": "#7A7A7A", "ft_only": "#D55E00"}
NAMES = {"base_only": "base-only", "shared": "shared", "ft_only": "ft-only"}
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "svg.fonttype": "path", "svg.hashsalt": "crosscoder", "figure.dpi": 110, "legend.frameon": False, "savefig.dpi": 200,
}  # fmt: skip
TABLE = {  # columns of the page's table: heading
    "latent": "latent", "tag": "by norm", "tag_scaling": "by scaling", "relative_norm": "relative norm",
    "dec_cos_sim": "decoder cosine", "beta_ratio_error": "ν error", "beta_ratio_reconstruction": "ν reconstruction",
    "frequency": "frequency", "mean_act": "mean active", "max_act": "max", "difference": "difference",
    "planted_concept": "concept", "planted_kind": "its kind", "planted_cosine": "its cosine",
}  # fmt: skip
CAPTIONS = {  # of each figure, by the name of its files, in the page's order
    "relative_norm": (
        "Relative decoder norm of each live latent, 200 bins: 0 means that only the base model has it, 1 only the fine-tuned "
        "one. Dotted: the cuts 0.2 and 0.8."
    ),
    "nu": (
        "Latent scaling of the fine-tuned model's directions: how much of each is in the base model's error (x) and in its "
        "reconstruction (y), relative to the fine-tuned model. Near 0 on both: truly absent from the base model. Dashed: "
        "the cuts 0.2 and 0.5; points beyond the window lie on its edge. Shared ones have their own marginals."
    ),
    "decoder_cosine": (
        "Cosine of the two decoder rows of shared latents, 100 bins, logarithmic count; the line is for rows of two random "
        "latents."
    ),
    "frequency": "How often each latent is active against its relative norm, with the density of frequencies above.",
    "planted": (
        "The truth: each planted concept's frequency against the relative norm of the latent that points at it best. "
        "Crosses mark concepts that no latent points at (cosine up to 0.83, a cut of ours)."
    ),
    "diffing": (
        "Mean KL divergence to the fine-tuned model, in nats: the base model as it is, and with the fine-tuned side of "
        "some latents added to its activation."
    ),
    "threshold": (
        "Explained variance over active latents a token as the threshold moves, on held-out rows; the ring marks the "
        "crosscoder's own threshold."
    ),
    "training": "The training run: lines are training batches, points held-out rows.",
}


class Figure(NamedTuple):
    """A figure as the page shows it."""

    name: str
    caption: str
    svg: str  # data URI


# --- figures


def draw_figures(
    folder: Path, table: dict, metrics: dict, *, curves: list[dict], pair: str, truth: dict | None
) -> list[Figure]:
    """Draw every figure that there is data for, as NAME.png and NAME.svg."""
    live = ~table["dead"]
    if not live.any():
        return []
    table = {name: column[live] for name, column in table.items()}
    draw: dict[str, Callable] = {
        "relative_norm": lambda: relative_norm_figure(table, pair),
        "frequency": lambda: frequency_figure(table),
    }
    if np.isfinite(table["beta_ratio_error"]).any():
        draw["nu"] = lambda: nu_figure(table)
    if (table["tag"] == "shared").any():
        draw["decoder_cosine"] = lambda: cosine_figure(table)
    if truth is not None:
        draw["planted"] = lambda: planted_figure(truth)
    if "patching" in metrics:
        draw["diffing"] = lambda: diffing_figure(metrics["patching"])
    if len(metrics["threshold_curve"]) > 1:
        draw["threshold"] = lambda: threshold_figure(metrics["threshold_curve"])
    if len(curves) > 1:
        draw["training"] = lambda: training_figure(curves)
    drawn = []
    for name in (name for name in CAPTIONS if name in draw):
        with plt.rc_context(STYLE):
            figure = draw[name]()
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        svg = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
        drawn.append(Figure(name, CAPTIONS[name], f"data:image/svg+xml;base64,{svg}"))
    return drawn


def relative_norm_figure(table: dict, pair: str):
    figure, axis = plt.subplots(figsize=(5.6, 3.1), layout="constrained")
    edges = np.linspace(0, 1, 201)
    for name in CLASSES:
        values = table["relative_norm"][table["tag"] == name]
        axis.hist(values, edges, color=COLORS[name], label=f"{NAMES[name]}: {len(values):,}")
    for cut in (BASE_ONLY_BELOW, FT_ONLY_ABOVE):
        axis.axvline(cut, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel="relative decoder norm, |ft| / (|base| + |ft|)")
    axis.set(ylabel="Number of Latents")
    axis.set_title(pair, parse_math=False)  # a $ in a model's name does not begin a formula
    axis.legend()
    return figure


def cosine_figure(table: dict):
    figure, axis = plt.subplots(figsize=(5.6, 3.1), layout="constrained")
    shared = table["tag"] == "shared"
    axis.hist(
        table["dec_cos_sim"][shared], np.linspace(-1, 1, 101), color=COLORS["shared"], label=f"{shared.sum():,} shared latents"
    )
    axis.hist(table["random_cosine"], np.linspace(-1, 1, 101), histtype="step", color="black", label="random pairs")
    axis.set(
        yscale="log", ylim=(0.7, None), xlim=(-1, 1), xlabel="cosine of the two decoder rows", ylabel="Number of Latents (log)"
    )
    axis.legend(loc="upper left")
    return figure


def nu_figure(table: dict):
    figure, axes = plt.subplots(
        2, 2, figsize=(5.6, 4.8), width_ratios=(4, 1), height_ratios=(1, 4), sharex="col", sharey="row", layout="constrained"
    )
    main, top, right = axes[1, 0], axes[0, 0], axes[1, 1]
    axes[0, 1].axis("off")
    window, edges = (-0.1, 1.1), np.linspace(-0.1, 1.1, 51)
    finite = np.isfinite(table["beta_ratio_error"]) & np.isfinite(table["beta_ratio_reconstruction"])
    for name in ("shared", "ft_only"):
        some = finite & (table["tag"] == name)
        x, y = (table[f"beta_ratio_{what}"][some].clip(*window) for what in ("error", "reconstruction"))
        main.scatter(x, y, s=9, color=COLORS[name], alpha=0.6, linewidths=0, rasterized=True, label=f"{NAMES[name]} by norm")
        for axis, values, way in ((top, x, "vertical"), (right, y, "horizontal")):
            axis.hist(values, edges, color=COLORS[name], alpha=0.7, orientation=way)
    main.axvline(NU_ERROR_BELOW, color="black", linewidth=0.8, linestyle="--")
    main.axhline(NU_RECONSTRUCTION_BELOW, color="black", linewidth=0.8, linestyle="--")
    main.set(xlim=window, ylim=window, xlabel="ν error (base / ft)", ylabel="ν reconstruction (base / ft)")
    top.set(ylabel="Latents")
    right.set(xlabel="Latents")
    main.legend(loc="lower right", markerscale=2)
    return figure


def frequency_figure(table: dict):
    figure, (top, main) = plt.subplots(2, 1, figsize=(5.6, 4.2), height_ratios=(1, 3), sharex=True, layout="constrained")
    frequency = table["frequency"]
    edges = np.geomspace(max(1e-7, frequency.min() / 2), 1, 51)
    for name in CLASSES:
        some = table["tag"] == name
        main.scatter(
            frequency[some], table["relative_norm"][some], s=9, color=COLORS[name], alpha=0.6, linewidths=0, rasterized=True,
            label=NAMES[name],
        )  # fmt: skip
    top.hist([frequency[table["tag"] == name] for name in CLASSES], edges, stacked=True, color=list(COLORS.values()))
    top.set(ylabel="Latents")
    main.set(xscale="log", ylim=(-0.03, 1.03), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="relative decoder norm")
    main.set(xlabel="frequency, active tokens / all tokens (log)")
    figure.legend(*main.get_legend_handles_labels(), loc="outside upper right", ncols=3, markerscale=2)
    return figure


def planted_figure(truth: dict):
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for name in CLASSES:
        for recovered, marker in ((True, "o"), (False, "x")):
            some = (truth["kind"] == name) & (truth["recovered"] == recovered)
            options = {"s": 14, "alpha": 0.7} if recovered else {"s": 28}
            axis.scatter(
                truth["rate"][some], truth["relative_norm"][some], color=COLORS[name], marker=marker, **options,
                label=f"{NAMES[name]} concepts: {some.sum()}" if recovered else None,
            )  # fmt: skip
    for cut in (BASE_ONLY_BELOW, FT_ONLY_ABOVE):
        axis.axhline(cut, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", ylim=(-0.03, 1.03), yticks=[0, 0.25, 0.5, 0.75, 1], xlabel="true frequency of the concept (log)")
    axis.set(ylabel="relative norm of its latent")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def diffing_figure(patching: dict):
    halves = patching["diffing"]
    sets = [name for name in halves["base model"] if name != "before"]
    labels = ["nothing added", *(f"{set_name(name)} ({halves['base model'][name]['latents']:,})" for name in sets)]
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 0.9 + 0.36 * len(labels)), sharey=True, layout="constrained")
    for axis, (half, found) in zip(axes, halves.items(), strict=True):
        kls = [found["before"], *(found[name]["kl"] for name in sets)]
        for i, (where, color, text) in enumerate((("all", "#56B4E9", "all tokens"), ("first", "#E69F00", "first tokens"))):
            values = [kl[where] if kl[where] is not None else math.nan for kl in kls]
            places = np.arange(len(labels)) + (i - 0.5) * 0.38
            axis.barh(places, values, 0.36, color=color, label=text)
            for place, value in zip(places, values, strict=True):
                axis.text(value, place, f" {value:.3g}", va="center", fontsize=7)
        axis.set(
            title=f"later layers of the {half.replace('ft', 'fine-tuned')}", xlabel="KL to the fine-tuned model, nats a token"
        )
        axis.margins(x=0.15)
        axis.set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def set_name(name: str) -> str:
    """The latent sets of patching in words."""
    words = {"ft_only": "ft-only", "ft_only_by_both": "ft-only by norm and scaling", "as_many_shared": "as many shared, random"}
    words |= {"highest_relative_norm": "5 % of highest relative norm", "all": "all latents"}
    return words[name]


def threshold_figure(curve: list[dict]):
    figure, axis = plt.subplots(figsize=(5.6, 3.1), layout="constrained")
    l0, variance = ([point[key] for point in curve] for key in ("l0", "explained_variance"))
    axis.plot(l0, variance, color="#0072B2", marker="o", markersize=4)
    own = [point for point in curve if point["own"]]
    axis.scatter([p["l0"] for p in own], [p["explained_variance"] for p in own], s=120, facecolors="none", edgecolors="#D55E00")
    axis.set(xscale="log", xlabel="L0, active latents a token (log)", ylabel="explained variance")
    axis.set_xticks(l0, [f"{x:.3g}" for x in l0], minor=False)
    axis.minorticks_off()
    return figure


def training_figure(curves: list[dict]):
    panels = {"explained_variance": "explained variance", "l0_loss": "L0, active latents a token", "loss": "loss",
              "dead_fraction": "share of dead latents"}  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 4.2), sharex=True, layout="constrained")
    known, tokens = [], 0
    for line in curves:  # the last line, of held-out rows, has no `tokens`
        tokens = line.get("tokens", tokens)
        known.append(line | {"tokens": tokens})
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
        for key, style in ((name, {"linewidth": 1}), (f"val_{name}", {"marker": "o", "markersize": 4, "linestyle": ""})):
            points = [(line["tokens"], line[key]) for line in known if line.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color="#0072B2" if key == name else "#D55E00", **style)
        axis.set(ylabel=label)
        if name == "loss":
            axis.set_yscale("log")
        elif name == "explained_variance":
            axis.set_ylim(max(0, axis.get_ylim()[0]), 1)  # the first steps may be far below 0
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in axes[1]:
        axis.set(xlabel="training tokens")
    return figure


# --- the page


def short(value):
    """A value for JSON: floats with four significant digits, None for NaN and infinity, NumPy numbers as Python ones."""
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def render(
    metrics: dict, table: dict, *, definitions: dict, text_names: list[str], figures: list[Figure], sections: list[dict],
    truth: dict | None, pair: str,
) -> str:  # fmt: skip
    """The page as one string. All text comes in through jinja2's escaping or as inert JSON, which the page's script writes
    as text, never as HTML."""
    table = table | {"max_act": np.fmax(table["max_act_train"], table["max_act_val"])}
    definitions = definitions | {"max_act": "largest activation"}
    headings = {name: heading for name, heading in TABLE.items() if name in table}
    for i, text in enumerate(text_names):
        if f"freq_text_{i}" in table:
            headings |= {f"freq_text_{i}": f"frequency, {text}", f"mean_text_{i}": f"mean, {text}"}
    columns = [
        {
            "name": name, "heading": heading, "definition": definitions[name], "values": [short(v) for v in table[name]],
            "wide": name.startswith("mean_text"),  # only in the sections, the table is wide enough
        }
        for name, heading in headings.items()
    ]  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["number"] = lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}"
    concepts = None
    if truth is not None:
        concepts = [dict(zip(truth, (short(v) for v in row), strict=True)) for row in zip(*truth.values(), strict=True)]
    return environment.get_template("report.html.j2").render(
        m=metrics, columns=columns, dead=[bool(d) for d in table["dead"]], figures=figures, sections=sections,
        concepts=concepts, pair=pair, classes=CLASSES, names=NAMES, colors=COLORS, set_name=set_name,
    )  # fmt: skip
