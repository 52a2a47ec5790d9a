"""Stage search-proxy: rank correlation of architectures between a small set and the whole set.

A grid of ConvNets is trained on each set (Zhao et al., DC, 2021). Spearman's rank correlation
measures how well the small set serves as a proxy in architecture search.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ncfm.models import ModelConfig, Norm
from pipeline.errors import UsageError
from pipeline.graph import log
from pipeline.runtime.files import Manifest, write_atomic
from pipeline.runtime.identity import fingerprint
from pipeline.stages.network_stage import NetworkStage, evaluation_task
from pipeline.stages.networks import EvaluationTask, SetName
from pipeline.stages.pretrain import check_model

SEARCH_PROXY_VERSION = 1
"""Raise when this stage's results change; see tests/integration/test_golden.py."""


@dataclass(frozen=True, kw_only=True)
class SearchProxyConfig:
    """The grid of ConvNets."""

    widths: tuple[int, ...] = (32, 64, 128)
    depths: tuple[int, ...] = (1, 2, 3)
    norms: tuple[Norm, ...] = ("none", "instance", "batch")
    repeats: int = 1
    """Fresh networks per architecture and set; architectures are ranked by the mean."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "norms"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")

    def grid(self) -> list[ModelConfig]:
        """All combinations. Raises ValueError if there are fewer than three to rank."""
        models = [
            ModelConfig(depth=depth, width=width, norm=norm)
            for depth in self.depths
            for width in self.widths
            for norm in self.norms
        ]
        if len(models) < 3:
            raise ValueError(f"search_proxy needs at least 3 architectures, got {len(models)}")
        return models


class SearchProxy(NetworkStage):
    """Rank correlation of each set with the whole set, written to search-proxy.json."""

    name = "search-proxy"
    sets: tuple[SetName, ...] = ("distilled", "random", "random_same_factor", "whole")

    @cached_property
    def _models(self) -> list[ModelConfig]:
        try:
            models = self.config.search_proxy.grid()
        except ValueError as error:
            raise UsageError(str(error)) from error
        for model in models:
            check_model(self.run, model)
        return models

    @cached_property
    def tasks(self) -> Sequence[EvaluationTask]:
        """See NetworkStage."""
        return [
            evaluation_task(self.run, name, repeat, model=model)
            for name in self.sets
            for model in self._models
            for repeat in range(self.config.search_proxy.repeats)
        ]

    def identity(self) -> str:
        """See Stage."""
        return fingerprint("search-proxy", SEARCH_PROXY_VERSION, *self._names)

    def build(self) -> Manifest:
        """See Stage."""
        results, repeats = self.results(), self.config.search_proxy.repeats
        values = iter(result["accuracy"] for result in results)
        accuracies: dict[str, list[list[float]]] = {
            name: [[next(values) for _ in range(repeats)] for _ in self._models]
            for name in self.sets
        }
        return {
            **proxy_content(self._models, accuracies),
            "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        }

    def summarise(self, manifest: Manifest) -> None:
        """See Stage."""
        content = {key: manifest[key] for key in ("networks", "sets")}
        write_atomic(self.run.directory / "search-proxy.json", json.dumps(content, indent=1))
        log(proxy_table(manifest))


def describe(model: ModelConfig) -> str:
    """Short description of a ConvNet."""
    return f"depth {model.depth}, width {model.width}, {model.norm} norm"


def proxy_content(
    models: Sequence[ModelConfig], accuracies: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, Any]:
    """{"networks": [...], "sets": {set: {"accuracy": [[..repeats..] ..networks..], "mean",
    "correlation", "p_value", "best_found"}}} from the accuracies in [0, 1] of each network.

    Correlation and p-value are with the set "whole" (None if all accuracies on a set are equal);
    best_found is the whole-set accuracy of the network that is best on the set.
    """
    means = {n: [statistics.fmean(runs) for runs in each] for n, each in accuracies.items()}
    sets: dict[str, Any] = {}
    for name, values in means.items():
        entry: dict[str, Any] = {"accuracy": [list(r) for r in accuracies[name]], "mean": values}
        if name != "whole":
            correlation, p_value = rank_correlation(values, means["whole"])
            best = max(range(len(values)), key=values.__getitem__)
            entry |= {
                "correlation": correlation,
                "p_value": p_value,
                "best_found": means["whole"][best],
            }
        sets[name] = entry
    return {"networks": [describe(model) for model in models], "sets": sets}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None]:
    """Spearman's rho and its two-sided p-value; None if either input is constant."""
    from scipy.stats import spearmanr

    if len(set(x)) < 2 or len(set(y)) < 2:
        return None, None
    result = spearmanr(x, y)
    p_value = float(result.pvalue)
    return float(result.statistic), None if math.isnan(p_value) else p_value


def proxy_table(content: Mapping[str, Any]) -> str:
    """Rank correlations as text."""
    whole = content["sets"]["whole"]["mean"]
    lines = [f"{len(content['networks'])} networks, best on the whole set {100 * max(whole):.1f} %"]
    for name, entry in content["sets"].items():
        if name != "whole":
            rho = entry["correlation"]
            lines.append(
                f"{name:20s}  rank correlation {'none' if rho is None else f'{rho:+.2f}'}  "
                f"its best network reaches {100 * entry['best_found']:.1f} %"
            )
    return "\n".join(lines)
