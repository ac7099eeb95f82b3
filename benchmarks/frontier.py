"""Explained variance against L0 of finished runs: what each setting of l1_coeff or k buys.

    for l1 in 0.25 0.5 1 2 4; do python train.py --l1-coeff $l1 --output-dir runs/frontier --run-name l1-$l1; done
    for k in 2 4 8 16 32; do python train.py --variant batch_topk --k $k --output-dir runs/frontier --run-name k-$k; done
    python benchmarks/frontier.py runs/frontier

Takes run folders, or folders of runs, trained on the same data; reads config.json and summary.json of each. Prints a table
and draws DIR/frontier.png. Choose the run to the left of where the curve goes flat: from there on every further active
latent explains little more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt


def finished(folders: list[Path]) -> list[dict]:
    """What the finished runs in these folders were asked for and reached, by variant and L0."""
    runs = []
    for folder in folders:
        for summary_file in sorted({folder / "summary.json", *folder.glob("*/summary.json")}):
            if not summary_file.is_file():
                continue
            config = json.loads((summary_file.parent / "config.json").read_text())
            asked, data = config["resolved"], config["data"]
            dial = f"l1 {asked['l1_coeff']:g}" if asked["variant"] == "vanilla" else f"k {asked['k']}"
            measured_on = {name: asked[name] for name in ("dataset", "base_dataset", "ft_dataset", "val_tokens")} | data
            run = {"dial": dial, "variant": asked["variant"], "d_hidden": asked["d_hidden"], "measured_on": measured_on}
            runs.append(run | json.loads(summary_file.read_text()))
    return sorted(runs, key=lambda run: (run["variant"], run["d_hidden"], run["l0_loss"]))


def draw(runs: list[dict], path: Path) -> None:
    """A curve for each variant and number of latents, each point labelled with its dial."""
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for variant, d_hidden in dict.fromkeys((run["variant"], run["d_hidden"]) for run in runs):
        curve = [run for run in runs if (run["variant"], run["d_hidden"]) == (variant, d_hidden)]
        places = [run["l0_loss"] for run in curve], [run["explained_variance"] for run in curve]
        axis.plot(*places, marker="o", label=f"{variant}, {d_hidden:,} latents")
        below = variant == "vanilla"
        for run, l0, explained in zip(curve, *places, strict=True):
            offset = (5, -12) if below else (-5, 7)
            axis.annotate(
                run["dial"], (l0, explained), xytext=offset, textcoords="offset points", fontsize="small",
                ha="left" if below else "right",
            )  # fmt: skip
    axis.set(xscale="log", xlabel="L0: active latents a token", ylabel="explained variance, held out")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.margins(0.1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders that hold runs")
    parser.add_argument("--output", type=Path, help="where to draw; default: frontier.png in the first folder")
    args = parser.parse_args()
    runs = finished(args.folders)
    if not runs:
        sys.exit(f"frontier.py: error: no finished run (summary.json) in {', '.join(map(str, args.folders))}")
    for other in runs[1:]:
        if other["measured_on"] != runs[0]["measured_on"]:
            print("note: these runs were not measured on the same rows; their points do not compare")
            break
    names = ["l0_loss", "explained_variance", "explained_variance_A", "explained_variance_B", "dead_fraction"]
    print("| variant | latents | dial | L0 | EV | EV base | EV ft | dead |\n|---|---:|---|" + "---:|" * len(names))
    for run in runs:
        cells = [f"{run[name]:.1f}" if name == "l0_loss" else f"{run[name]:.3f}" for name in names]
        print(f"| {run['variant']} | {run['d_hidden']} | {run['dial']} | {' | '.join(cells)} |")
    draw(runs, args.output or args.folders[0] / "frontier.png")


if __name__ == "__main__":
    main()
