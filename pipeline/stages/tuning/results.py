"""Results of a search: table, Pareto front, and the best trials as presets."""

import csv
import io
import json
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from upath import UPath

from pipeline.observe.progress import values_text
from pipeline.runtime.files import Manifest, write_atomic
from pipeline.stages.tuning.search_space import TuneConfig

if TYPE_CHECKING:
    from pipeline.cli import Command


def pareto(rows: list[dict[str, Any]]) -> list[int]:
    """Pareto front of the finished trials in accuracy and stored bytes, smallest first."""
    finished = [row for row in rows if row["status"] == "finished"]
    finished.sort(key=lambda row: (row["stored_bytes"], -row["accuracy"], row["trial"]))
    front: list[dict[str, Any]] = []
    for row in finished:
        if not front or row["accuracy"] > front[-1]["accuracy"]:
            front.append(row)
    return [row["trial"] for row in front]


def write_results(
    directory: UPath, manifest: Manifest, config: TuneConfig, command: "Command"
) -> None:
    """Write results.json, results.csv, and presets: best.toml and one per Pareto-front trial."""
    rows, front = manifest["trials"], manifest["pareto"]
    best = (
        front[-1]
        if front
        else max(
            (row for row in rows if row["accuracy"] is not None),
            key=lambda row: (row["step"], row["accuracy"]),
        )["trial"]
    )
    content = {"trials": rows, "pareto": front, "best": best, "space": list(config.space)}
    write_atomic(directory / "results.json", json.dumps(content, indent=1))
    names = [name for name in rows[0] if name not in ("values", "accuracies", "rungs")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, *config.space])
    for row in rows:
        writer.writerow([row[name] for name in names] + [row["values"][k] for k in config.space])
    write_atomic(directory / "results.csv", buffer.getvalue())
    by_number = {row["trial"]: row for row in rows}
    files = {number: f"trial-{number:03d}.toml" for number in front} | {best: "best.toml"}
    for number, name in files.items():
        write_atomic(directory / name, preset(by_number[number], command))


def preset(row: Mapping[str, Any], command: "Command") -> str:
    """The configuration of a trial as a preset for the whole pipeline, under a new run name."""
    name = f"{command.config.run_directory.name}-trial-{row['trial']:03d}"
    changed = command.changed({**row["values"], "name": name, "tune": {}})
    about = (
        f"# Trial {row['trial']} of the search in {command.config.run_directory.name}: "
        f"{100 * row['accuracy']:.1f} % on images held out of train, "
        f"after {row['step']} steps.\n# {values_text(row['values'])}\n"
    )
    return about + changed.toml


def summary(manifest: Manifest) -> str:
    """Trial counts by status, errors, and the Pareto front, as text."""
    rows = manifest["trials"]
    counts = {s: sum(r["status"] == s for r in rows) for s in ("finished", "stopped", "failed")}
    lines = [f"[tune] {', '.join(f'{count} {status}' for status, count in counts.items())}"]
    lines += [f"[tune] trial {r['trial']} failed: {r['error']}" for r in rows if r["error"]]
    lines.append(f"[tune] {'trial':>5}  {'bytes':>9}  {'select %':>8}  values (the Pareto front)")
    for row in rows:
        if row["trial"] in manifest["pareto"]:
            spread = row["accuracies"]
            shown = f"{100 * statistics.fmean(spread):.1f}"
            lines.append(
                f"[tune] {row['trial']:>5}  {row['stored_bytes']:>9}  {shown:>8}  "
                f"{values_text(row['values'])}"
            )
    return "\n".join(lines)
