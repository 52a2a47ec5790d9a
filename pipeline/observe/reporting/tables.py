"""Rows of the report's tables, with formatted numbers, from the JSON files of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ncfm.allocation import images_text

STAGE_ORDER = ("shard", "pretrain", "tune", "distill", "curate", "evaluate", "audit", "continual",
    "search-proxy")  # fmt: skip
SET_NAMES = {
    "distilled": "Distilled",
    "distilled_soft": "Distilled, with soft labels",
    "distilled_soft_views": "Distilled, with soft labels of every view",
    "random": "Random images",
    "random_soft": "Random images, with soft labels",
    "random_soft_views": "Random images, with soft labels of every view",
    "random_same_factor": "Random images, same factor",
    "herding": "Herding",
    "whole": "Whole training set",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One row of the accuracy table; accuracies in percent, except `runs` in 0..1."""

    set: str
    label: str  # includes network and number of images if they differ between rows
    network: str
    images_per_class: int  # their mean
    images: str  # of a class: "10", or "3 to 17"
    epochs: int
    runs: Sequence[float]
    mean: float
    std: float | None  # None: a single run
    gain: float | None  # points over random images, same network and number of images
    interval: tuple[float, float] | None = None  # 95 % confidence interval of the mean
    best_on_test: float | None = None
    best_on_test_std: float = 0.0


def evaluation_rows(rows: Sequence[Mapping[str, Any]]) -> list[EvaluationRow]:
    """Rows of evaluation.json, known sets first, with the gain over random images."""
    order = list(SET_NAMES)
    networks = list(dict.fromkeys(row["network"] for row in rows))
    budgets = {row["images_per_class"] for row in rows if row["set"] != "whole"}
    reference = {
        (row["network"], row["images_per_class"]): row["mean"]
        for row in rows
        if row["set"] == "random"
    }
    result = []
    for row in sorted(rows, key=lambda row: order.index(row["set"]) if row["set"] in order else 99):
        label = [SET_NAMES.get(row["set"], row["set"].replace("_", " "))]
        if len(budgets) > 1 and row["set"] != "whole":
            label.append(f"{row['images_per_class']} per class")
        if len(networks) > 1:
            label.append(row["network"])
        base = reference.get((row["network"], row["images_per_class"]))
        no_gain = row["set"] in ("random", "whole")  # the baseline itself; another budget
        result.append(
            EvaluationRow(
                set=row["set"],
                label=", ".join(label),
                network=row["network"],
                images_per_class=row["images_per_class"],
                images=images_text(row.get("images_of_a_class", [row["images_per_class"]])),
                epochs=row["epochs"],
                runs=row["accuracy"],
                mean=100 * row["mean"],
                std=100 * row["std"] if len(row["accuracy"]) > 1 else None,
                gain=None if no_gain or base is None else 100 * (row["mean"] - base),
                interval=_interval(row["mean"], row.get("ci95")),
                best_on_test=100 * row["best_on_test_mean"] if "best_on_test_mean" in row else None,
                best_on_test_std=100 * row.get("best_on_test_std", 0.0),
            )
        )
    return result


def by_network(rows: Sequence[EvaluationRow]) -> tuple[list[str], dict[str, list[Any]]]:
    """The networks, and the row of each set for each of them (None if missing)."""
    networks = list(dict.fromkeys(row.network for row in rows))
    by_set: dict[str, list[Any]] = {}
    for row in rows:
        label = row.label.removesuffix(f", {row.network}")
        by_set.setdefault(label, [None] * len(networks))[networks.index(row.network)] = row
    return networks, by_set


def _interval(mean: float, half: float | None) -> tuple[float, float] | None:
    """Confidence interval in percent, clipped to 0 to 100."""
    if half is None:
        return None
    return max(0.0, 100 * (mean - half)), min(100.0, 100 * (mean + half))


def headline(rows: Sequence[EvaluationRow]) -> dict[str, EvaluationRow]:
    """Rows of the report's header: the first distilled row, and comparable rows of other sets."""
    first = next((row for row in rows if row.set == "distilled"), None)
    by_set: dict[str, EvaluationRow] = {}
    for row in rows:
        if first is None or row.network != first.network:
            continue
        if row.set == "whole" or row.images_per_class == first.images_per_class:
            by_set.setdefault(row.set, row)
    return by_set


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """Time and memory of one stage."""

    name: str
    seconds: float
    time: str
    memory: str
    reused: bool


def stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[StageRow]:
    """The stages of stages.json, in execution order."""
    order = list(STAGE_ORDER)
    names = sorted(stages, key=lambda name: order.index(name) if name in order else len(order))
    return [
        StageRow(
            name=name,
            seconds=float(stages[name]["seconds"]),
            time=duration(float(stages[name]["seconds"])),
            memory=memory(stages[name].get("peak_rss_bytes")),
            reused=bool(stages[name].get("reused", False)),
        )
        for name in names
    ]


def duration(seconds: float) -> str:
    """Format seconds: 8.25 -> 8.2 s, 95 -> 1 min 35 s, 3725 -> 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def memory(count: int | None) -> str:
    """Format bytes in MiB or GiB."""
    if not count:
        return "unknown"
    mib = count / 2**20
    return f"{mib:.0f} MiB" if mib < 1000 else f"{mib / 1024:.2f} GiB"
