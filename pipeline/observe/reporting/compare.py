"""`run.py compare RUN RUN ...`: compare tables and curves of several runs in one page."""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from plotly.offline import get_plotlyjs
from upath import UPath

from pipeline.errors import UsageError
from pipeline.observe.progress import read_rows
from pipeline.observe.reporting.charts import DISTILL, Chart
from pipeline.observe.reporting.gallery import data_uri
from pipeline.observe.reporting.report import template
from pipeline.observe.reporting.result_charts import COLORS, overlay_chart
from pipeline.observe.reporting.sections import AUDIT_NAMES, NOTHING
from pipeline.observe.reporting.tables import SET_NAMES, duration, memory, stage_rows
from pipeline.runtime.files import read_json, write_atomic

USAGE = "usage: python pipeline/run.py compare RUN RUN ... [--output compare.html]"


def compare_command(arguments: Sequence[str]) -> UPath:
    """Parse `RUN RUN ... [--output FILE]` and write the page. Raises UsageError."""
    runs, output, rest = [], "compare.html", list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--output" or word.startswith("--output="):
            output = word.partition("=")[2] or (rest.pop(0) if rest else "")
        elif word.startswith("-"):
            raise UsageError(f"compare has no option {word}; {USAGE}")
        else:
            runs.append(UPath(word))
    if len(runs) < 2 or not output:
        raise UsageError(f"compare needs two runs or more; {USAGE}")
    return write_comparison(runs, UPath(output))


def write_comparison(runs: Sequence[UPath], output: UPath) -> UPath:
    """Write a page comparing run directories; parts that a run lacks are left empty.

    Raises UsageError if one is not the directory of a run.
    """
    for run in runs:
        if not (run / "config.toml").exists():
            raise UsageError(f"{run} is not the directory of a run: it has no config.toml")
    names = _names(runs)
    configs = [tomllib.loads((run / "config.toml").read_text(encoding="utf-8")) for run in runs]
    page = template("compare.html.j2").render(
        runs=[
            {"name": name, "color": COLORS[i % len(COLORS)], "preview": _preview(run)}
            for i, (name, run) in enumerate(zip(names, runs, strict=True))
        ],
        accuracy=_accuracy([read_json(run / "evaluation.json") or {} for run in runs]),
        audit=_audit([read_json(run / "audit.json") or {} for run in runs]),
        options=_differences(configs),
        stages=_stages([read_json(run / "stages.json") or {} for run in runs]),
        charts=_charts(dict(zip(names, runs, strict=True))),
        plotly_js=get_plotlyjs(),
        has_steps=False,
    )
    write_atomic(output, page)
    return output


def _names(runs: Sequence[UPath]) -> list[str]:
    """The directories' names; numbered full paths if two are equal."""
    plain = [run.name for run in runs]
    if len(set(plain)) == len(plain):
        return plain
    return [f"{i + 1}: {run}" for i, run in enumerate(runs)]


def _preview(run: UPath) -> str:
    path = run / "distilled" / "preview.png"
    return data_uri("image/png", path.read_bytes()) if path.exists() else ""


def _accuracy(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(row label, one cell per run). The best run is not marked: spreads decide."""
    by_row: dict[tuple[str, str], dict[int, str]] = {}
    for i, evaluation in enumerate(evaluations):
        for row in evaluation.get("rows", []):
            spread = f" ± {100 * row['std']:.1f}" if len(row["accuracy"]) > 1 else ""
            text = f"{100 * row['mean']:.1f}{spread} ({len(row['accuracy'])})"
            by_row.setdefault((row["set"], row["network"]), {})[i] = text
    order = list(SET_NAMES)
    keys = sorted(
        by_row, key=lambda key: (key[1], order.index(key[0]) if key[0] in order else len(order))
    )
    several = len({network for _, network in keys}) > 1
    return [
        (
            SET_NAMES.get(name, name) + (f", {network}" if several else ""),
            [by_row[name, network].get(i, NOTHING) for i in range(len(evaluations))],
        )
        for name, network in keys
    ]


def _audit(audits: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    by_measure: dict[tuple[str, str], dict[int, str]] = {}
    for i, audit in enumerate(audits):
        for row in audit.get("rows", []):
            if row["set"] == "distilled" and row["value"] is not None:
                key = (row["measure"], row["extractor"])
                by_measure.setdefault(key, {})[i] = f"{row['value']:.3g}"
    return [
        (
            AUDIT_NAMES.get(measure, measure) + (f", {extractor}" if extractor else ""),
            [cells.get(i, NOTHING) for i in range(len(audits))],
        )
        for (measure, extractor), cells in by_measure.items()
    ]


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The options that differ between runs."""
    flat = [_flat("", config) for config in configs]
    keys = sorted({key for options in flat for key in options} - {"name"})
    rows = [(key, [_value(options.get(key, NOTHING)) for options in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _value(value: object) -> str:
    """Format a value as on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else {
            f"{prefix}{name}": value
        }  # fmt: skip
    return flat


def _stages(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    rows = [{row.name: row for row in stage_rows(entry)} for entry in stages]
    names = dict.fromkeys(name for run in rows for name in run)
    table = [
        (
            name,
            [f"{run[name].time}, {run[name].memory}" if name in run else NOTHING for run in rows],
        )
        for name in names
    ]
    totals = [
        f"{duration(sum(row.seconds for row in run.values()))}, "
        f"{memory(max((e.get('peak_rss_bytes') or 0 for e in entry.values()), default=0))}"
        for run, entry in zip(rows, stages, strict=True)
    ]
    return [*table, ("all", totals)] if table else []


def _charts(runs: Mapping[str, UPath]) -> list[Chart]:
    """One chart per distillation metric of any run."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for name, run in runs.items():
        for row in read_rows(run / "metrics.jsonl"):
            for key, value in row.items() if row.get("stage") == "distill" else ():
                if key.startswith("distill/") and value is not None and math.isfinite(value):
                    curves.setdefault(key, {}).setdefault(name, {})[int(row["step"])] = value
    return [
        overlay_chart(
            key,
            DISTILL.get(key, (key.removeprefix("distill/").replace("_", " "),))[0],
            {name: sorted(points.items()) for name, points in by_run.items()},
        )
        for key, by_run in curves.items()
    ]
