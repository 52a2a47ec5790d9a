"""Tables of the study's rows: mean over distillation seeds, paired differences, what could be seen.

    python tests/benchmarks/study_tables.py ncfm/study.jsonl [--against gaussian]

A seed's accuracy is the mean of its evaluation runs. The seeds of two variants share their first
images, real batches, extractors and evaluation networks, so the differences are paired.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

LEFT_OUT = {"compile", "chunk", "precision"}  # how a row was computed, not what


def standard_error(values: list[float]) -> float:
    """Of the mean; NaN for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(rows: list[dict[str, Any]], against: str) -> str:
    """Markdown; one row a variant, best first."""
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        found[row["variant"]][row["seed"]] = row

    def points(row: dict[str, Any]) -> float:
        return 100 * statistics.mean(row["accuracy"])

    lines = [
        f"| variant | accuracy | seeds | minus {against}, paired | CPU s a step |",
        "|---|---|---|---|---|",
    ]
    base = found.get(against, {})
    means = {name: statistics.mean(map(points, seeds.values())) for name, seeds in found.items()}
    for name in sorted(means, key=lambda name: -means[name]):
        seeds = found[name]
        error = standard_error([points(row) for row in seeds.values()])
        both = [points(seeds[s]) - points(base[s]) for s in seeds if s in base]
        difference = (
            f"{statistics.mean(both):+.2f} ± {standard_error(both):.2f}"
            if both and name != against
            else ""
        )
        timed = [row["step_cpu_s"] for row in seeds.values() if "step_cpu_s" in row]
        time = f"{statistics.median(timed):.2f}" if timed else ""
        accuracy = f"{means[name]:.2f} ± {error:.2f}"
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
        print(f"evaluation runs of one set: standard deviation {100 * statistics.mean(spread):.2f}")
        print(table(rows, args.against))


if __name__ == "__main__":
    main()
