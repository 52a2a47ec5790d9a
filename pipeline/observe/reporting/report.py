"""Stage report: one self-contained HTML file from what the run directory holds."""

import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs
from upath import UPath

from ncfm import load
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

    Only files of the run directory are read. Of these config.toml and distilled/, or the results of
    a search, must exist; what else is missing, the report says, with the command that makes it. The
    same files give the same report but for `now`, the time it names as its own (default: the
    clock's).

    Raises:
        FileNotFoundError: config.toml or distilled/ is missing; the message says what makes it.
        ValueError: a synthetic set is damaged.
    """
    path = run_directory / "report.html"
    page = template("report.html.j2").render(_content(run_directory, now or datetime.now(UTC)))
    write_atomic(path, page)
    return path


def template(name: str) -> jinja2.Template:
    """A page of this folder; what is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _content(directory: UPath, now: datetime) -> dict[str, Any]:
    """Everything that the template shows."""
    config_toml = _config_toml(directory)
    config = tomllib.loads(config_toml)
    name = str(config.get("name") or directory.name)
    config_path = f"{config.get('storage_path', directory.parent.name)}/{name}/config.toml"

    def command(stage: str) -> str:
        words = ["python", "pipeline/run.py", stage, "--config", config_path]
        return shlex.join(word for word in words if word)

    results = read_json(directory / "tune" / "results.json")
    found = search(results) if results is not None else None
    if not (directory / "distilled" / "manifest.json").exists():
        if found is not None:
            return {
                **_NOTHING,
                "name": name,
                "search": found,
                "plotly_js": get_plotlyjs(),
                **_cost(directory),
                **_configuration(config_toml),
            }
        raise FileNotFoundError(
            f"{directory} holds no distilled set to report on; make it with: {command('distill')}"
        )
    return {
        "name": name,
        "search": found,
        **_of_set(directory, name, command, now),
        **_configuration(config_toml),
    }


def _of_set(
    directory: UPath, name: str, command: Callable[[str], str], now: datetime
) -> dict[str, Any]:
    """What the template shows of a distilled set, and of its making and use."""
    distilled = load(directory / "distilled")
    has_initial = (directory / "initial" / "manifest.json").exists()
    initial = load(directory / "initial") if has_initial else None
    rows = read_rows(directory / "metrics.jsonl")
    curves = distillation_charts([row for row in rows if row.get("stage") == "distill"])
    pretraining = pretraining_chart([row for row in rows if row.get("stage") == "pretrain"])
    judged = read_json(directory / "evaluation.json") or {}
    evaluation, measured = evaluation_rows(judged.get("rows", [])), judged.get("measures", [])
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
        "missing": [(what, command(stage)) for found, what, stage in wanted if not found],
        "gallery": shown,
        "steps": steps,
        "has_steps": steps is not None,
        "classes": class_section(judged.get("rows", []), shown),
        "audit": audit,
        "uses": uses,
        "has_interval": any(row.interval for row in evaluation),
        "has_best_on_test": any(row.best_on_test is not None for row in evaluation),
        "protocol": _protocol(judged),
        "measures": [{**row, "label": SET_NAMES.get(row["set"], row["set"])} for row in measured],
        "set": distilled,
        "images_per_class": manifest["images_per_class"],
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


# What the template shows of a run that has only searched so far.
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


def _protocol(judged: Mapping[str, Any]) -> str:
    """The evaluation protocol in words, with what was changed of it."""
    if "protocol" not in judged:
        return ""
    changed = [name.removeprefix("evaluate.") for name in judged.get("changes", [])]
    return str(judged["protocol"]) + (f", but for {', '.join(changed)}" if changed else "")


# ------------------------------------------------------------------ configuration and provenance


def _config_toml(directory: UPath) -> str:
    try:
        return (directory / "config.toml").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{directory} is not the directory of a run: it has no config.toml; "
            "python pipeline/run.py makes one"
        ) from None


def _config_parts(text: str) -> list[str]:
    """The file, divided before each [table]."""
    return [part.strip() for part in re.split(r"(?m)^(?=\[)", text) if part.strip()]


def _reproduce(provenance: Mapping[str, Any], name: str) -> dict[str, str]:
    """The command that was given, and the commands that do the same again in a new directory."""
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
    """(group, [(name, value)]): all but what the report shows elsewhere."""
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
