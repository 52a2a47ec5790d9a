"""Stage search-proxy: whether the distilled set ranks architectures as the whole set does.

A grid of ConvNets is trained on each set (Zhao et al., DC, 2021); Spearman's rank correlation says
how far one could have searched on the small set.
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
from pipeline.stages.network_stage import NetworkStage, check_model, evaluation_task
from pipeline.stages.networks import EvaluationTask, SetName

SEARCH_PROXY_VERSION = 1
"""To be raised when this stage's results change; see tests/integration/test_golden.py."""


@dataclass(frozen=True, kw_only=True)
class SearchProxyConfig:
    """The grid of ConvNets."""

    widths: tuple[int, ...] = (32, 64, 128)
    depths: tuple[int, ...] = (1, 2, 3)
    norms: tuple[Norm, ...] = ("none", "instance", "batch")
    repeats: int = 1
    """Fresh networks per architecture and set; ranks are of their mean."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "norms"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")

    def grid(self) -> list[ModelConfig]:
        """All combinations. Raises ValueError if there are fewer than three: nothing to rank."""
        found = [
            ModelConfig(depth=depth, width=width, norm=norm)
            for depth in self.depths
            for width in self.widths
            for norm in self.norms
        ]
        if len(found) < 3:
            raise ValueError(f"search_proxy needs at least 3 architectures, got {len(found)}")
        return found


class SearchProxy(NetworkStage):
    """Whether each set ranks architectures as the whole set does, into search-proxy.json."""

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
        found: dict[str, list[list[float]]] = {
            name: [[next(values) for _ in range(repeats)] for _ in self._models]
            for name in self.sets
        }
        return {
            **proxy_content(self._models, found),
            "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        }

    def summarise(self, manifest: Manifest) -> None:
        """See Stage."""
        content = {key: manifest[key] for key in ("networks", "sets")}
        write_atomic(self.run.directory / "search-proxy.json", json.dumps(content, indent=1))
        log(proxy_table(manifest))


def describe(model: ModelConfig) -> str:
    """A ConvNet in words."""
    return f"depth {model.depth}, width {model.width}, {model.norm} norm"


def proxy_content(
    models: Sequence[ModelConfig], accuracies: Mapping[str, Sequence[Sequence[float]]]
) -> dict[str, Any]:
    """{"networks": [...], "sets": {set: {"accuracy": [[..repeats..] ..networks..], "mean",
    "correlation", "p_value", "best_found"}}} from the accuracies in [0, 1] of each network.

    Correlation and p-value are with the set "whole"; best_found is the whole-set accuracy of the
    network that the set would have chosen. A set on which all networks do equally well has none.
    """
    means = {n: [statistics.fmean(runs) for runs in found] for n, found in accuracies.items()}
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
    """Spearman's rho in [-1, 1] and its two-sided p-value; None where one side is constant."""
    from scipy.stats import spearmanr

    if len(set(x)) < 2 or len(set(y)) < 2:
        return None, None
    found = spearmanr(x, y)
    p_value = float(found.pvalue)
    return float(found.statistic), None if math.isnan(p_value) else p_value


def proxy_table(content: Mapping[str, Any]) -> str:
    """Rank correlations as text."""
    whole = content["sets"]["whole"]["mean"]
    lines = [f"{len(content['networks'])} networks, best on the whole set {100 * max(whole):.1f} %"]
    for name, found in content["sets"].items():
        if name != "whole":
            rho = found["correlation"]
            lines.append(
                f"{name:20s}  rank correlation {'none' if rho is None else f'{rho:+.2f}'}  "
                f"its choice reaches {100 * found['best_found']:.1f} %"
            )
    return "\n".join(lines)
