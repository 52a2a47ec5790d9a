"""Tables of the study's rows: mean over distillation seeds, paired differences, what could be seen.

    python study_tables.py study.jsonl [--against gaussian]

A seed's accuracy is the mean of its evaluation runs. The seeds of two variants share their first
images, real batches, extractors and evaluation networks, so the differences are paired. How far a
difference scatters between seeds is pooled over the variants of a table: two or three seeds of one
variant say too little of it.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

LEFT_OUT = {"compile", "chunk", "precision"}  # how a row was computed, not what


FAR = {"random", "random-1", "herding", "psi-plain"}  # from the others; they scatter otherwise


def standard_error(values: list[float]) -> float:
    """Of the mean; NaN for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def points(row: dict[str, Any]) -> float:
    """Accuracy of a row, in percent."""
    return 100 * statistics.mean(row["accuracy"])


def paired(rows: list[dict[str, Any]], against: str) -> dict[str, list[float]]:
    """variant -> its difference to another one, of each seed that both have."""
    base = {row["seed"]: points(row) for row in rows if row["variant"] == against}
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["variant"] != against and row["seed"] in base:
            found[row["variant"]].append(points(row) - base[row["seed"]])
    return found


def pooled(differences: dict[str, list[float]]) -> float:
    """Standard deviation of a seed's difference, over all variants but the far; NaN without any."""
    several = [v for name, v in differences.items() if len(v) > 1 and name not in FAR]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in several)
    return math.sqrt(squares / freedom) if freedom else math.nan


def table(rows: list[dict[str, Any]], against: str) -> str:
    """Markdown; one row a variant, best first."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["variant"]].append(row)
    differences = paired(rows, against)
    scatter = pooled(differences)
    lines = [
        f"| variant | accuracy | seeds | minus {against}, paired | CPU s a step |",
        "|---|---|---|---|---|",
    ]
    means = {name: statistics.mean(map(points, seeds)) for name, seeds in found.items()}
    for name in sorted(means, key=lambda name: -means[name]):
        seeds, difference = found[name], ""
        if both := differences.get(name):
            own = name in FAR
            error = standard_error(both) if own else scatter / math.sqrt(len(both))
            difference = f"{statistics.mean(both):+.2f} ± {error:.2f}"
        timed = [row["step_cpu_s"] for row in seeds if "step_cpu_s" in row]
        time = f"{statistics.median(timed):.2f}" if timed else ""
        accuracy = f"{means[name]:.2f} ± {standard_error(list(map(points, seeds))):.2f}"
        lines.append(f"| {name} | {accuracy} | {len(seeds)} | {difference} | {time} |")
    return "\n".join(lines).replace(" ± nan", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--against", default="gaussian")
    args = parser.parse_args()
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for path in args.rows:
        for row in map(json.loads, path.read_text().splitlines()):
            settings = {k: v for k, v in row["settings"].items() if k not in LEFT_OUT}
            groups[json.dumps(settings), row["ipc"]].append(row)
    for (settings, ipc), rows in groups.items():
        spread = [statistics.stdev(row["accuracy"]) for row in rows if len(row["accuracy"]) > 1]
        print(f"\nIPC {ipc}; {settings}")
        print(
            f"standard deviations: evaluation runs of one set {100 * statistics.mean(spread):.2f}, "
            f"paired differences of one seed {pooled(paired(rows, args.against)):.2f}"
        )
        print(table(rows, args.against))


if __name__ == "__main__":
    main()
