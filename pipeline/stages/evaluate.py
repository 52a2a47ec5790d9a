"""Stage evaluate: accuracy of fresh networks trained on the distilled set and on baselines."""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from upath import UPath

from ncfm.allocation import images_text
from ncfm.evaluate import confidence_interval, ranking_measures
from pipeline.graph import log
from pipeline.runtime.files import Manifest, write_atomic
from pipeline.runtime.identity import fingerprint
from pipeline.stages.network_stage import NetworkStage, evaluation_task, named_model
from pipeline.stages.networks import CACHED_BEST, EvaluationTask, SetName
from pipeline.stages.protocols import protocol_changes

SOFT: dict[str, tuple[SetName, SetName]] = {
    "distilled": ("distilled_soft", "distilled_soft_views"),
    "random": ("random_soft", "random_soft_views"),
}
"""Set -> the same set with stored soft labels, and with soft labels of every view."""


class Evaluate(NetworkStage):
    """Accuracies of the distilled set and its baselines, for every network."""

    name = "evaluate"

    @property
    def directory(self) -> UPath:
        """See Stage."""
        return self.run.directory / "evaluation"

    @cached_property
    def tasks(self) -> Sequence[EvaluationTask]:
        """See NetworkStage."""
        cfg = self.config
        sets: list[SetName] = []
        for name in cfg.evaluate.sets:
            wanted = cfg.curate.soft_labels, cfg.curate.per_view
            sets += [name, *itertools.compress(SOFT.get(name, ()), wanted)]
        names = cfg.evaluate.networks or (cfg.model.name,)
        models = [named_model(self.run, name) for name in names]
        return [
            evaluation_task(self.run, name, repeat, model=model)
            for model in models
            for name in sets
            for repeat in range(cfg.evaluate.runs(name))
        ]

    def identity(self) -> str:
        """See Stage."""
        # Rows with these keys are rebuilt, from cached results, where older ones had other keys.
        keys = ["best_on_test"] if self.config.evaluate.best_on_test_every else []
        return fingerprint("evaluate", *self._names, *keys)

    def build(self) -> Manifest:
        """{"rows": [...], "measures": [...]}, one row for each set and network."""
        results = self.results()
        rows = rows_of(self.tasks, results)
        return {
            "rows": rows,
            "measures": measures(rows),
            "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        }

    def summarise(self, manifest: Manifest) -> None:
        """See Stage."""
        cfg = self.config
        content = {
            "protocol": cfg.evaluate.protocol,
            "changes": protocol_changes(cfg.evaluate, cfg.curate),
            "rows": manifest["rows"],
            "measures": manifest["measures"],
        }
        write_atomic(self.run.directory / "evaluation.json", json.dumps(content, indent=1))
        log(table(manifest["rows"]))


def rows_of(
    tasks: Sequence[EvaluationTask], results: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each set and network, in the order of the tasks."""
    groups: dict[tuple[str, str], list[tuple[EvaluationTask, Mapping[str, Any]]]] = {}
    for task, result in zip(tasks, results, strict=True):
        groups.setdefault((task.set, task.model.name), []).append((task, result))
    return [_row([task for task, _ in g], [result for _, result in g]) for g in groups.values()]


def _row(tasks: Sequence[EvaluationTask], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of evaluation.json."""
    task, values = tasks[0], [result["accuracy"] for result in results]
    row: dict[str, Any] = {
        "set": task.set,
        "network": task.model.name,
        "images_per_class": round(statistics.fmean(task.ipc)),
        "accuracy": values,
        "mean": statistics.fmean(values),
        "std": _std(values),
        "epochs": task.training.epochs,
        "ci95": confidence_interval(values),
        "per_class": torch.tensor([r["per_class"] for r in results]).double().mean(0).tolist(),
    }
    if len(set(task.ipc)) > 1:
        row["images_of_a_class"] = [min(task.ipc), max(task.ipc)]  # least, most
    if task.is_soft or task.is_relabelled:
        row["label_bytes"] = task.label_bytes()
    if all(result["confusion"] is not None for result in results):
        row["confusion"] = torch.tensor([r["confusion"] for r in results]).sum(0).tolist()
    if task.best_on_test_every:
        best = [result[CACHED_BEST] for result in results]
        row |= {
            "best_on_test": best,
            "best_on_test_mean": statistics.fmean(best),
            "best_on_test_std": _std(best),
        }
    return row


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def measures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """DD-Ranking's measures for every network with the required rows: {"set", "network", and the
    fields of RankingMeasures}.
    """
    ranked = []
    for network in dict.fromkeys(row["network"] for row in rows):
        mean = {row["set"]: row["mean"] for row in rows if row["network"] == network}
        for used, random in (
            ("distilled", "random"),
            ("distilled_soft", "random_soft"),
            ("distilled_soft_views", "random_soft_views"),
        ):
            if {"whole", "distilled", used, random} <= mean.keys():
                values = ranking_measures(
                    whole=mean["whole"],
                    hard=mean["distilled"],
                    as_used=mean[used],
                    random=mean[random],
                )
                ranked.append({"set": used, "network": network, **dataclasses.asdict(values)})
    return ranked


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text, accuracies in percent."""
    has_best = any("best_on_test" in row for row in rows)
    header = ["set", "network", "images/class", "epochs", "accuracy %", "95 % interval", "runs"]
    lines = [[*header, *(["best on test %"] if has_best else [])]]
    for row in rows:
        mean, half = 100 * row["mean"], row.get("ci95")
        lines.append(
            [
                row["set"],
                row["network"],
                images_text(row.get("images_of_a_class", [row["images_per_class"]])),
                str(row["epochs"]),
                f"{mean:.1f} +- {100 * row['std']:.1f}",
                ""
                if half is None
                else f"{max(0, mean - 100 * half):.1f} to {min(100, mean + 100 * half):.1f}",
                str(len(row["accuracy"])),
            ]
        )
        if "best_on_test" in row:
            mean, std = row["best_on_test_mean"], row["best_on_test_std"]
            lines[-1].append(f"{100 * mean:.1f} +- {100 * std:.1f}")
        elif has_best:
            lines[-1].append("")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
