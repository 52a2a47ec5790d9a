"""Optional sections of the report: steps, classes, fidelity, uses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from upath import UPath

from ncfm import SyntheticSet
from pipeline.observe.preview import preview_png
from pipeline.observe.reporting.charts import Chart
from pipeline.observe.reporting.gallery import Gallery, data_uri
from pipeline.observe.reporting.result_charts import (
    class_ncfd_chart,
    confusion_chart,
    continual_charts,
    proxy_chart,
)
from pipeline.observe.reporting.tables import SET_NAMES
from pipeline.observe.snapshots import read_snapshots
from pipeline.runtime.files import read_json

MAX_SHEET_CLASSES = 40  # per image of the slider
SHOWN_CLASSES, SHOWN_IMAGES = 3, 3  # best and worst classes, images of each

NOTHING = "\N{EN DASH}"  # empty cell

AUDIT_COLUMNS = {
    "real": "All real",
    "distilled": "Distilled",
    "random": "Random",
    "random_same_factor": "Same factor",
    "held_out": "Held out",
    "noise": "Noise",
}
AUDIT_NAMES = {
    "ncfd": "NCFD, mean of the classes",
    "amplitude": "NCFD, amplitude part (diversity)",
    "phase": "NCFD, phase part (realism)",
    "frechet": "Fréchet distance",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "intrinsic_dimension": "Intrinsic dimension",
    "label_sharpness": "Label sharpness",
    "nearest_real": "Nearest real, mean",
    "nearest_real_least": "Nearest real, least",
}


def steps_section(
    directory: UPath, stages: Mapping[str, Any], distilled: SyntheticSet
) -> dict[str, Any] | None:
    """Images of the step slider; None if the run has no snapshots."""
    identity = stages.get("distill", {}).get("fingerprint")
    if not identity:
        return None
    names = distilled.class_names
    snapshots = read_snapshots(directory / "snapshots" / identity, len(names))
    if len(snapshots) < 2:
        return None
    size = distilled.images.shape[-1]
    frames = []
    for snapshot in snapshots:
        sheet = preview_png(
            snapshot.images,
            snapshot.labels,
            names,
            scale=max(1, round(64 / size)),
            max_classes=MAX_SHEET_CLASSES,
        )
        width, height = (int.from_bytes(sheet[at : at + 4], "big") for at in (16, 20))
        frames.append(
            {
                "step": snapshot.step,
                "uri": data_uri("image/png", sheet),
                "width": width,
                "height": height,
            }
        )
    shown = len(snapshots[-1].images)
    note = f"{shown} of {len(distilled.images)}" if shown < len(distilled.images) else ""
    return {"frames": frames, "last": snapshots[-1].step, "note": note}


def class_section(rows: Sequence[Mapping[str, Any]], gallery: Gallery) -> dict[str, Any] | None:
    """Best and worst classes of the distilled set's first row, and its confusion matrix; None
    without per-class accuracies.
    """
    row = next((r for r in rows if r["set"] == "distilled" and "per_class" in r), None)
    names = [entry.name for entry in gallery.classes]
    if row is None or len(row["per_class"]) < 2:
        return None
    confusion = row.get("confusion")
    order = sorted(range(len(row["per_class"])), key=lambda c: -row["per_class"][c])
    shown = min(SHOWN_CLASSES, len(order) // 2)

    def entry(c: int) -> dict[str, Any]:
        values = {"name": names[c], "accuracy": 100 * row["per_class"][c], "confused": ""}
        if confusion is not None:
            others = [(n, j) for j, n in enumerate(confusion[c]) if j != c]
            most, other = max(others)
            if most and other < len(names):
                share = 100 * most / sum(confusion[c])
                values |= {"confused": names[other], "share": share}
        return {**values, "images": gallery.classes[c].after[:SHOWN_IMAGES]}

    known = [c for c in order if c < len(names)]
    return {
        "best": [entry(c) for c in known[:shown]],
        "worst": [entry(c) for c in known[::-1][:shown]],
        "confusion": confusion_chart(confusion, names)
        if confusion is not None and len(confusion) == len(names)
        else None,
    }


def audit_section(directory: UPath, names: Sequence[str]) -> dict[str, Any] | None:
    """Fidelity table, nearest pairs, and chart by class; None without audit.json."""
    content = read_json(directory / "audit.json")
    if content is None:
        return None
    rows = content["rows"]
    groups = []
    for extractor in dict.fromkeys(row["extractor"] for row in rows):
        lines = []
        group = [row for row in rows if row["extractor"] == extractor]
        for measure in dict.fromkeys(row["measure"] for row in group):
            by_set = {row["set"]: row for row in group if row["measure"] == measure}
            lines.append(
                {
                    "label": AUDIT_NAMES.get(measure, measure),
                    "better": next(iter(by_set.values()))["better"],
                    "cells": [_cell(by_set.get(name)) for name in AUDIT_COLUMNS],
                }
            )
        groups.append((f"By features of {extractor}" if extractor else "By pixels", lines))
    pairs = directory / "audit" / "nearest.png"
    first: dict[str, list[float]] = next(iter(content["per_class_ncfd"].values()), {})
    shown = {n: v for n, v in first.items() if n in ("distilled", "random", "random_same_factor")}
    complete = all(v is not None and v == v for values in shown.values() for v in values)
    return {
        "columns": list(AUDIT_COLUMNS.values()),
        "groups": groups,
        "images": content["images"]["distilled"],
        "real_images": content["real_images"],
        "draws": max(row["draws"] for row in rows),
        "pairs": data_uri("image/png", pairs.read_bytes()) if pairs.exists() else "",
        "pairs_height": 160,
        "chart": class_ncfd_chart(shown, names, SET_NAMES) if shown and complete else None,
    }


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return NOTHING
    spread = "" if row["std"] is None else f" ± {_digits(row['std'], 1)}"
    return "0" if abs(row["value"]) < 1e-6 else f"{_digits(row['value'], 3)}{spread}"


def _digits(value: float, count: int) -> str:
    """Format with `count` significant digits, without an exponent."""
    return np.format_float_positional(
        value, precision=count, unique=False, fractional=False, trim="-"
    )


def uses_section(directory: UPath) -> list[Chart]:
    """Charts of the stages continual and search-proxy, if they have run."""
    continual = read_json(directory / "continual.json")
    proxy = read_json(directory / "search-proxy.json")
    charts = continual_charts(continual["rows"], SET_NAMES) if continual else []
    return [*charts, *([proxy_chart(proxy, SET_NAMES)] if proxy else [])]
