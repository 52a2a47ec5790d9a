"""The study's accuracies as one picture: a panel a setting, a dot a seed, a bar their mean.

python study_plot.py study.jsonl --out study.svg
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from study_tables import FAR, LEFT_OUT, points


def panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """title -> variant -> accuracy (%) of each seed; settings with at least three variants."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        settings = {k: v for k, v in row["settings"].items() if k not in LEFT_OUT}
        data = "Imagenette, 64 px" if settings["real_batch"] == 64 else "Fashion-MNIST"
        title = f"{data}, IPC {row['ipc']}, width {settings['width']}, {settings['steps']} steps"
        if row["variant"] not in FAR:
            found[title][row["variant"]].append(points(row))
    return {title: dict(variants) for title, variants in found.items() if len(variants) > 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same rows, the same file
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for path in args.rows for line in path.read_text().splitlines()]
    made = panels(rows)
    heights = [len(variants) + 2 for variants in made.values()]
    figure, axes = plt.subplots(
        len(made), 1, figsize=(7, 0.22 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, (title, variants) in zip(axes[:, 0], made.items(), strict=True):
        names = sorted(variants, key=lambda name: statistics.mean(variants[name]))
        for y, name in enumerate(names):
            values = variants[name]
            axis.plot(values, [y] * len(values), "o", color="0.6", markersize=4)
            axis.plot([statistics.mean(values)], [y], "|", color="black", markersize=12)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.grid(axis="x", color="0.9")
        axis.tick_params(axis="x", labelsize=8)
    axes[-1, 0].set_xlabel("accuracy (%) of networks trained on the set", fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
