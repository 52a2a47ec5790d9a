"""Accuracies of finished runs, kept as rows, and the tables of the documents made from them.

    python tests/benchmarks/results.py record runs/NAME --data Fashion-MNIST
    python tests/benchmarks/results.py tables

`record` adds a row for each evaluated set of a run to `pipeline/presets/results.jsonl`, in place of
an older one of the same measurement. `tables` writes RESULTS.md, the README's table and the line
`# Measured:` of each preset from these rows and from `published.jsonl` beside them.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.methods import method_settings
from pipeline.runtime.identity import dotted
from pipeline.stages.protocols import protocol_settings

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "pipeline" / "presets"
ROWS, PUBLISHED = PRESETS / "results.jsonl", PRESETS / "published.jsonl"
NOT_THE_METHOD = ("name", "seed", "storage_path", "num_workers", "source", "runtime", "tracking",
    "use_gpu", "tune", "plan", "audit", "continual", "search_proxy", "export")  # fmt: skip
MEASUREMENT = ("data", "ipc", "set", "network", "width", "seed", "method", "steps",
    "evaluation_epochs", "options")  # fmt: skip
SHOWN = ("ipc", "method", "shard.image_size", "model.width", "distill.num_steps",
    "evaluate.repeats", "evaluate.sets", "evaluate.training.epochs")  # fmt: skip
"""Options that have columns of their own."""
BEGIN, END = "<!-- results: made by tests/benchmarks/results.py -->", "<!-- end of results -->"

Row = Mapping[str, Any]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------------- record


def rows_of(run: Path, data: str, preset: str, machine: str) -> list[dict[str, Any]]:
    """A row for each evaluated set and network of a run. Raises FileNotFoundError if the run is not
    finished.
    """
    text = (run / "config.toml").read_text()
    config = tomllib.loads(text.replace("legacy_every", "best_on_test_every"))  # its former name
    evaluation = json.loads((run / "evaluation.json").read_text())
    finished = (run / "evaluation.json").stat().st_mtime
    stages = json.loads((run / "stages.json").read_text())
    provenance = json.loads((run / "distilled" / "manifest.json").read_text())["provenance"]
    usual = json.loads(json.dumps(dataclasses.asdict(RunConfig())))  # lists, as TOML has them
    protocol = protocol_settings(config["evaluate"]["protocol"])
    defaults = dotted(usual) | json.loads(json.dumps(protocol)) | {"evaluate.protocol": "default"}
    if method := config.get("method"):
        sizes = {"ipc": config["ipc"], "image_size": config["shard"]["image_size"]}
        defaults |= json.loads(json.dumps(method_settings(method, **sizes)))
    options = {
        name: value
        for name, value in dotted(config).items()
        if name.split(".")[0] not in NOT_THE_METHOD
        and name not in SHOWN
        and value != defaults.get(name)
    }
    hours = sum(stages[name]["seconds"] for name in ("pretrain", "distill", "evaluate")) / 3600
    rows = []
    for row in evaluation["rows"]:
        found = {
            "data": data,
            "preset": preset,
            "ipc": config["ipc"],
            "set": row["set"],
            "network": row["network"],
            "width": config["model"]["width"],
            "seed": config["seed"],
            "accuracy": [round(value, 5) for value in row["accuracy"]],
            "method": config.get("method") or "",
            "steps": config["distill"]["num_steps"],
            "evaluation_epochs": row["epochs"],
            "options": options,
            "hours": round(hours, 2),  # of the whole run, on all cores of the machine
            "machine": machine,
            "commit": provenance.get("versions", {}).get("git", "unknown"),
            "date": datetime.fromtimestamp(finished, UTC).date().isoformat(),
        }
        if best := row.get("best_on_test", row.get("legacy")):  # the key's former name
            found["best_on_test"] = [round(value, 5) for value in best]
        rows.append(found)
    return rows


def key(row: Row) -> str:
    """What makes two rows the same measurement."""
    return json.dumps([row[name] for name in MEASUREMENT], sort_keys=True)


def record(runs: Iterable[Path], data: str, preset: str | None, machine: str) -> None:
    """Add the rows of runs to the file of rows."""
    rows = {key(row): row for row in read_jsonl(ROWS)}
    for run in runs:
        used = (
            preset
            if preset is not None
            else (run.name if (PRESETS / f"{run.name}.toml").exists() else "")
        )
        rows |= {key(row): row for row in rows_of(run, data, used, machine)}
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


# ---------------------------------------------------------------------- tables


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ in their seed alone."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key({**row, "seed": None}), []).append(row)
    return list(found.values())


def accuracy(rows: Sequence[Row], name: str = "accuracy") -> str:
    """Mean and standard error over the distillation seeds, in percent; over the networks if there
    is one seed.
    """
    seeds = [statistics.fmean(row[name]) for row in rows]
    values = seeds if len(seeds) > 1 else list(rows[0][name])
    mean = f"{100 * statistics.fmean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def mean_of(rows: Sequence[Row]) -> float:
    """Mean accuracy of a group, from 0 to 1."""
    return statistics.fmean(statistics.fmean(row["accuracy"]) for row in rows)


def best(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """(data, images per class) -> the group of distilled sets with the highest mean."""
    found: dict[tuple[str, int], list[Row]] = {}
    for group in groups(row for row in rows if row["set"] == "distilled"):
        place = (group[0]["data"], group[0]["ipc"])
        if place not in found or mean_of(group) > mean_of(found[place]):
            found[place] = group
    return found


def table(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first line is its header."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + " --- |" * len(lines[0]), *rows[1:]])


def of_publications(published: Iterable[Row], data: str, ipc: int) -> list[Row]:
    """What was published for these images; `CIFAR-10 (JPEG)` is beside what was for CIFAR-10."""
    name = data.partition(" (")[0]
    return [row for row in published if (row["data"], row["ipc"]) == (name, ipc)]


def readme_table(rows: Sequence[Row], published: Sequence[Row]) -> str:
    """The best of ours, beside the best that was published."""
    lines = [["Data", "images per class", "test accuracy %", "networks", "steps", "published %"]]
    for (data, ipc), group in sorted(best(rows).items()):
        others = of_publications(published, data, ipc)
        top = max(others, key=lambda row: row["accuracy"], default=None)
        lines.append([
            data, str(ipc), accuracy(group), networks(group), f"{group[0]['steps']:,}",
            f"{top['accuracy']:.1f} ({top['method']})" if top else "",
        ])  # fmt: skip
    return table(lines)


def hours(group: Sequence[Row]) -> str:
    """Mean hours of a run; nothing where they were not kept."""
    kept = [row["hours"] for row in group if row["hours"] is not None]
    return f"{statistics.fmean(kept):.1f}" if kept else ""


def networks(group: Sequence[Row]) -> str:
    """How many networks judged how many sets."""
    return f"{len(group)} x {len(group[0]['accuracy'])}, width {group[0]['width']}"


def shared(options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The options that all have, with the same values."""
    first, *rest = options
    return {k: v for k, v in first.items() if all(k in o and o[k] == v for o in rest)}


def listed(options: dict[str, Any]) -> str:
    """Options as in a sentence."""
    return ", ".join(f"`{name}={value}`" for name, value in options.items())


def results_page(rows: Sequence[Row], published: Sequence[Row]) -> str:
    """RESULTS.md."""
    parts = [
        "# Results",
        "Made by `python tests/benchmarks/results.py tables` from "
        "`pipeline/presets/results.jsonl`. Test accuracy in percent, of the last epoch, on the "
        "complete test set: mean ± standard error over distillation seeds, or over networks where "
        "there is one seed. *Sets x networks*: distillation seeds, and fresh networks each. "
        "*Hours*: of pretraining, distillation and evaluation together, on all of the machine. "
        "*Options*: those that differ from the defaults.",
    ]
    for data, ipc in sorted({(row["data"], row["ipc"]) for row in rows}):
        lines = [["set", "method", "accuracy %", "best on test %", "sets x networks", "steps",
                  "epochs", "hours", "options", "commit"]]  # fmt: skip
        mine = [row for row in rows if (row["data"], row["ipc"]) == (data, ipc)]
        common = shared([row["options"] for row in mine])
        for group in sorted(groups(mine), key=mean_of, reverse=True):
            first = group[0]
            own = {k: v for k, v in first["options"].items() if k not in common}
            lines.append([
                first["set"], (first["method"] or "ours") * first["set"].startswith("distilled"),
                accuracy(group),
                accuracy(group, "best_on_test") if "best_on_test" in first else "",
                networks(group), f"{first['steps']:,}", f"{first['evaluation_epochs']:,}",
                hours(group), listed(own), first["commit"][:9],
            ])  # fmt: skip
        parts.append(f"## {data}, {ipc} image{'s' * (ipc > 1)} per class")
        parts += [f"All rows: {listed(common)}."] * bool(common) + [table(lines)]
        others = of_publications(published, data, ipc)
        if others:
            ordered = sorted(others, key=lambda row: -row["accuracy"])
            texts = [f"{row['method']} {row['accuracy']:.1f}" for row in ordered]
            where = ", on the original images" * ("(" in data)
            parts.append(f"Published by their authors{where}: {', '.join(texts)}.")
    return "\n\n".join(parts) + "\n"


def with_table(readme: str, text: str) -> str:
    """The README with the table between its two marks. Raises ValueError without them."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def measured_line(preset: str, rows: Sequence[Row]) -> str | None:
    """What the header of a preset says of its own runs."""
    found = [g for g in groups(rows) if g[0]["preset"] == preset and g[0]["set"] == "distilled"]
    if not found:
        return None
    group = max(found, key=mean_of)
    return (
        f"# Measured: {accuracy(group)} % ({networks(group)}; {group[0]['steps']:,} steps; commit "
        f"{group[0]['commit'][:9]}): RESULTS.md."
    )


PASS_S = 0.85 / (10 * (128 + 6 * 40))
"""Seconds of a forward pass of a 32 px image on both cores, at width 128: cifar10_ipc10's step by
its passes (a synthetic image costs six). Training on an image took 3.6 passes in its pool."""
PASSES = {28: 0.77, 32: 1, 64: 4.5, 128: 19, 224: 73}
"""Image size -> cost of a pass; from 64 px on by the FLOP of its ConvNet."""
CLASSES = {"cifar100": 100, "tinyimagenet": 200}  # the others have ten
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "tinyimagenet": 100_000, "fashionmnist": 60_000,
    "imagenette": 9_469, "imagewoof": 9_025, "imagefruit": 13_000, "imagemeow": 13_000,
    "imagesquawk": 13_000, "imageyellow": 13_000}  # fmt: skip


def cost_line(preset: str, text: str) -> str:
    """What the header of a preset that was not run says instead: its cost by arithmetic."""
    values = dotted(dataclasses.asdict(RunConfig())) | dotted(tomllib.loads(text))
    data, ipc = preset.rpartition("_ipc")[0], values["ipc"]
    classes = values["plan.classes"] or CLASSES.get(data, 10)
    images = values["plan.images"] or IMAGES[data]
    decoded = classes * ipc * values["synthetic.factor"] ** 2
    real = classes * min(images // classes, values["distill.real_batch"])
    sets = len(values["evaluate.sets"])
    whole = ("whole" in values["evaluate.sets"]) * values["evaluate.whole_epochs"] * images
    trained = values["pretrain.networks"] * values["pretrain.training.epochs"] * images
    repeats = values["evaluate.repeats"]
    trained += repeats * values["evaluate.training.epochs"] * sets * decoded
    trained += (values["evaluate.whole_repeats"] or repeats) * whole
    passes = 3.6 * trained + values["distill.num_steps"] * (real + 6 * decoded)
    hours = passes * PASS_S * PASSES[values["shard.image_size"]] / 3600
    cost = f"{hours:,.0f} hours" if hours < 72 else f"{float(f'{hours / 24:.2g}'):,.0f} days"
    return (
        f"# Not run: about {cost} on 2 cores, by arithmetic; learning rate and calibration are "
        "those of cifar10_ipc10."
    )


def documents() -> dict[Path, str]:
    """Path -> text of every document that is made from the rows."""
    rows, published = read_jsonl(ROWS), read_jsonl(PUBLISHED)
    readme = (ROOT / "README.md").read_text()
    found = {ROOT / "RESULTS.md": results_page(rows, published)}
    found[ROOT / "README.md"] = with_table(readme, readme_table(rows, published))
    for path in sorted(PRESETS.glob("*.toml")):
        line, text = measured_line(path.stem, rows), path.read_text()
        if line is None and "_ipc" in path.stem:
            line = cost_line(path.stem, text)
        if line is not None:
            found[path] = re.sub(r"^# (Measured|Not run): .*$", line, text, flags=re.M)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("runs", nargs="+", type=Path)
    recorder.add_argument("--data", required=True, help="what tables call the data")
    recorder.add_argument("--preset", help="the preset used; default: that of the run's name")
    recorder.add_argument("--machine", default=f"{os.cpu_count()} cores, {processor()}")
    commands.add_parser("tables")
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.runs, arguments.data, arguments.preset, arguments.machine)
    else:
        for path, text in documents().items():
            path.write_text(text)


def processor() -> str:
    """The processor's name."""
    done = subprocess.run(["lscpu"], capture_output=True, text=True, check=False)
    name = re.search(r"Model name:\s*(.*)", done.stdout)
    return name[1] if name else platform.processor()


if __name__ == "__main__":
    main()
