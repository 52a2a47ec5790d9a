"""Self-contained HTML report of a run directory."""

import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import torch
from plotly.offline import get_plotlyjs
from upath import UPath

from ncfm import load
from ncfm.allocation import images_text
from pipeline.observe.progress import read_rows
from pipeline.observe.reporting.charts import accuracy_chart, distillation_charts, pretraining_chart
from pipeline.observe.reporting.gallery import data_uri, gallery
from pipeline.observe.reporting.search_charts import search
from pipeline.observe.reporting.sections import (
    audit_section,
    class_section,
    steps_section,
    uses_section,
)
from pipeline.observe.reporting.tables import (
    SET_NAMES,
    by_network,
    duration,
    evaluation_rows,
    headline,
    stage_rows,
)
from pipeline.runtime.files import read_json, write_atomic


def write_report(run_directory: UPath, *, now: datetime | None = None) -> UPath:
    """Write report.html of a run; returns its path.

    Reads only files of the run directory. config.toml and distilled/, or the results of a search,
    must exist; the report lists other missing parts with the commands that create them. It is
    deterministic except for `now`, its time stamp (default: the current time).

    Raises:
        FileNotFoundError: config.toml or distilled/ is missing; the message has the command that
            creates it.
        ValueError: a synthetic set is damaged.
    """
    path = run_directory / "report.html"
    page = template("report.html.j2").render(_content(run_directory, now or datetime.now(UTC)))
    write_atomic(path, page)
    return path


def template(name: str) -> jinja2.Template:
    """Load a template of this folder, with autoescaping."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _content(directory: UPath, now: datetime) -> dict[str, Any]:
    """Variables of the report template."""
    config_toml = _config_toml(directory)
    config = tomllib.loads(config_toml)
    name = str(config.get("name") or directory.name)
    config_path = f"{config.get('storage_path', directory.parent.name)}/{name}/config.toml"

    def command(stage: str) -> str:
        words = ["python", "pipeline/run.py", stage, "--config", config_path]
        return shlex.join(word for word in words if word)

    results = read_json(directory / "tune" / "results.json")
    search_results = search(results) if results is not None else None
    if not (directory / "distilled" / "manifest.json").exists():
        if search_results is not None:
            return {
                **_NOTHING,
                "name": name,
                "search": search_results,
                "plotly_js": get_plotlyjs(),
                **_cost(directory),
                **_configuration(config_toml),
            }
        raise FileNotFoundError(
            f"{directory} holds no distilled set to report on; create it with: {command('distill')}"
        )
    return {
        "name": name,
        "search": search_results,
        **_of_set(directory, name, command, now),
        **_configuration(config_toml),
    }


def _of_set(
    directory: UPath, name: str, command: Callable[[str], str], now: datetime
) -> dict[str, Any]:
    """Template variables of a distilled set, its distillation, evaluation and uses."""
    distilled = load(directory / "distilled")
    has_initial = (directory / "initial" / "manifest.json").exists()
    initial = load(directory / "initial") if has_initial else None
    rows = read_rows(directory / "metrics.jsonl")
    curves = distillation_charts([row for row in rows if row.get("stage") == "distill"])
    pretraining = pretraining_chart([row for row in rows if row.get("stage") == "pretrain"])
    evaluated = read_json(directory / "evaluation.json") or {}
    evaluation, measured = evaluation_rows(evaluated.get("rows", [])), evaluated.get("measures", [])
    cost = _cost(directory)
    shown = gallery(initial, distilled)
    steps = steps_section(directory, read_json(directory / "stages.json") or {}, distilled)
    uses = uses_section(directory)
    audit = audit_section(directory, distilled.class_names)
    manifest = read_json(directory / "distilled" / "manifest.json")
    wanted = [
        (initial, "the images before distillation (initial/)", "distill"),
        (curves, "the curves of the distillation (metrics.jsonl)", "distill"),
        (pretraining, "the curves of the pretraining (metrics.jsonl)", "pretrain"),
        (evaluation, "accuracies (evaluation.json)", "evaluate"),
        (cost["stages"], "time and memory of the stages (stages.json)", ""),
    ]
    searched = (directory / "tune/results.json").exists()
    charted = (curves, pretraining, evaluation, uses, audit, searched)
    return {
        "missing": [(part, command(stage)) for value, part, stage in wanted if not value],
        "gallery": shown,
        "steps": steps,
        "has_steps": steps is not None,
        "classes": class_section(evaluated.get("rows", []), shown),
        "audit": audit,
        "uses": uses,
        "has_interval": any(row.interval for row in evaluation),
        "has_best_on_test": any(row.best_on_test is not None for row in evaluation),
        "protocol": _protocol(evaluated),
        "measures": [{**row, "label": SET_NAMES.get(row["set"], row["set"])} for row in measured],
        "set": distilled,
        "images_per_class": images_text(torch.bincount(distilled.labels).tolist()),
        "headline": headline(evaluation),
        "evaluation": evaluation,
        "by_network": by_network(evaluation),
        "runs": accuracy_chart([(r.label, r.runs) for r in evaluation]) if evaluation else None,
        "charts": [*curves, *([pretraining] if pretraining else [])],
        "plotly_js": get_plotlyjs() if any(charted) else "",
        **cost,
        "reproduce": _reproduce(distilled.provenance, name),
        "provenance": _provenance(distilled.provenance, manifest["sha256"], now),
    }


# Template variables of a run with only a search.
_NOTHING: dict[str, Any] = {
    "missing": [],
    "gallery": None,
    "steps": None,
    "has_steps": False,
    "classes": None,
    "audit": None,
    "uses": None,
    "set": None,
    "headline": {},
    "evaluation": [],
    "by_network": ([], {}),
    "runs": None,
    "charts": [],
    "reproduce": None,
    "provenance": [],
}


def _cost(directory: UPath) -> dict[str, Any]:
    stages = stage_rows(read_json(directory / "stages.json") or {})
    return {"stages": stages, "total_time": duration(sum(row.seconds for row in stages))}


def _configuration(text: str) -> dict[str, Any]:
    return {
        "config_parts": _config_parts(text),
        "config_uri": data_uri("text/plain", text.encode()),
    }


def _protocol(evaluated: Mapping[str, Any]) -> str:
    """The evaluation protocol, with its changed options."""
    if "protocol" not in evaluated:
        return ""
    changed = [name.removeprefix("evaluate.") for name in evaluated.get("changes", [])]
    return str(evaluated["protocol"]) + (f", except for {', '.join(changed)}" if changed else "")


# ------------------------------------------------------------------ configuration and provenance


def _config_toml(directory: UPath) -> str:
    try:
        return (directory / "config.toml").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{directory} is not the directory of a run: it has no config.toml; "
            "python pipeline/run.py creates one"
        ) from None


def _config_parts(text: str) -> list[str]:
    """The configuration file, split before each [table]."""
    return [part.strip() for part in re.split(r"(?m)^(?=\[)", text) if part.strip()]


def _reproduce(provenance: Mapping[str, Any], name: str) -> dict[str, str]:
    """The original command, and the commands that reproduce the run in a new directory."""
    git = str(provenance.get("versions", {}).get("git") or provenance.get("git") or "")
    commit = re.search(r"\b[0-9a-f]{40}\b", git)
    again = ["python", "pipeline/run.py", "--config", "config.toml", "--name", f"{name}-again"]
    lines = [f"git checkout {commit[0]}"] if commit else []
    return {
        "given": str(provenance.get("command", "")),
        "again": "\n".join([*lines, shlex.join(again)]),
        "dirty": commit[0] if commit and "dirty" in git else "",
    }


def _provenance(
    provenance: Mapping[str, Any], hashes: Mapping[str, str], now: datetime
) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, [(name, value)]), without the entries shown elsewhere in the report."""
    shown_elsewhere = ("config", "command")
    single, groups = [], []
    for key, value in provenance.items():
        if key in shown_elsewhere:
            continue
        if isinstance(value, Mapping):
            groups.append((key, [(str(name), str(item)) for name, item in value.items()]))
        else:
            single.append((key, str(value)))
    single.append(("report written", now.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")))
    return [("", single), *groups, ("sha256 of distilled/", list(hashes.items()))]
