"""Stage continual: class-incremental learning with the distilled set as the memory.

Classes arrive in groups. After each group a network is trained from scratch on the images of all
classes so far, and tested on these classes (Prabhu et al., GDumb, 2020; Zhao and Bilen, DM, 2023;
the NCFM paper's supplement).
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ncfm.seeding import keyed_generator
from pipeline.errors import UsageError
from pipeline.graph import log
from pipeline.runtime.files import Manifest, write_atomic
from pipeline.runtime.identity import fingerprint
from pipeline.stages.network_stage import NetworkStage, evaluation_task
from pipeline.stages.networks import EvaluationTask, SetName
from pipeline.stages.shard import Shard

CONTINUAL_VERSION = 1
"""Raise when this stage's results change; see tests/integration/test_golden.py."""


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """Class-incremental learning."""

    steps: tuple[int, ...] = (5, 10)
    """Numbers of groups that the classes are divided into; each is a separate experiment."""
    repeats: int = 5
    """Class orders, each with fresh networks (DM: 5)."""

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must be numbers of at least 1, got {self.steps}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


class Continual(NetworkStage):
    """Class-incremental learning with each set as the memory, into continual.json."""

    name = "continual"

    @cached_property
    def _keys(self) -> list[tuple[SetName, "Moment"]]:
        classes = len(self.run.stage(Shard).manifest["class_names"])
        try:
            points = moments(classes, self.config.continual, self.config.seed)
        except ValueError as error:
            raise UsageError(str(error)) from error
        sets: list[SetName] = ["distilled", "random", "random_same_factor", "herding"]
        return [(name, moment) for name in sets for moment in points]

    @cached_property
    def tasks(self) -> Sequence[EvaluationTask]:
        """See NetworkStage."""
        model = self.config.model
        return [
            evaluation_task(self.run, name, moment.repeat, model=model, classes=moment.classes)
            for name, moment in self._keys
        ]

    def identity(self) -> str:
        """See Stage."""
        return fingerprint("continual", CONTINUAL_VERSION, *self._names)

    def build(self) -> Manifest:
        """See Stage."""
        results = self.results()
        return {
            "rows": continual_rows(self._keys, [result["accuracy"] for result in results]),
            "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        }

    def summarise(self, manifest: Manifest) -> None:
        """See Stage."""
        content = json.dumps({"rows": manifest["rows"]}, indent=1)
        write_atomic(self.run.directory / "continual.json", content)
        log(continual_table(manifest["rows"]))


@dataclass(frozen=True)
class Moment:
    """One step of an experiment."""

    steps: int
    step: int  # 1 to steps
    repeat: int
    classes: tuple[int, ...]  # all classes so far, in their order of arrival


def moments(num_classes: int, config: ContinualConfig, seed: int) -> list[Moment]:
    """All networks to train. Raises ValueError if there are more steps than classes.

    The class order depends only on (seed, repeat): it is the same for every number of steps.
    """
    points = []
    for steps in config.steps:
        if steps > num_classes:
            raise ValueError(f"continual.steps {steps} is more than the {num_classes} classes")
        for repeat in range(config.repeats):
            generator = keyed_generator(seed, "class_order", repeat)
            order = torch.randperm(num_classes, generator=generator)
            seen: list[int] = []
            for step, group in enumerate(order.tensor_split(steps), start=1):
                seen += group.tolist()
                points.append(Moment(steps, step, repeat, tuple(seen)))
    return points


def continual_rows(
    points: Sequence[tuple[str, Moment]], accuracies: Sequence[float]
) -> list[dict[str, Any]]:
    """Rows {"set", "steps", "step", "classes", "accuracy": [..repeats..], "mean", "std"} from the
    accuracies in [0, 1] of (set, moment).
    """
    groups: dict[tuple[str, int, int], list[tuple[Moment, float]]] = {}
    for (name, moment), value in zip(points, accuracies, strict=True):
        groups.setdefault((name, moment.steps, moment.step), []).append((moment, value))
    return [
        {
            "set": name,
            "steps": steps,
            "step": step,
            "classes": len(group[0][0].classes),
            "accuracy": [value for _, value in group],
            "mean": statistics.fmean(value for _, value in group),
            "std": statistics.stdev(v for _, v in group) if len(group) > 1 else 0.0,
        }
        for (name, steps, step), group in groups.items()
    ]


def continual_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy (%) after the last step, and the mean over all steps, of each experiment."""
    lines = []
    for name, steps in dict.fromkeys((row["set"], row["steps"]) for row in rows):
        group = [row for row in rows if (row["set"], row["steps"]) == (name, steps)]
        last, average = group[-1], statistics.fmean(row["mean"] for row in group)
        lines.append(
            f"{steps:3d} steps  {name:20s}  last {100 * last['mean']:5.1f} +- "
            f"{100 * last['std']:.1f}  mean over steps {100 * average:5.1f}"
        )
    return "\n".join(lines)
