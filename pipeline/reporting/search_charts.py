"""The charts and the table of a search, from <run>/tune/results.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from pipeline.reporting.charts import BLUE, GREY, ORANGE, Chart, chart_layout, plain_figure
from pipeline.tuning.search import told

Row = Mapping[str, Any]

LOG_SPREAD = 20.0
"""An option whose values differ by more than this factor has a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the report says of a search."""

    charts: list[Chart]
    counts: str
    best: str  # the preset, relative to the run's directory
    front: list[tuple[int, int, float, str]]  # trial, bytes, accuracy in percent, values
    failed: list[tuple[int, str]]


def search(results: Mapping[str, Any]) -> Search:
    """Of results.json."""
    rows = results["trials"]
    by_number = {row["trial"]: row for row in rows}
    front = [by_number[number] for number in results["pareto"]]
    counts = {s: sum(row["status"] == s for row in rows) for s in ("finished", "stopped", "failed")}
    charts = [learning_curves(rows), coordinates_chart(rows, results["space"])]
    if len({row["stored_bytes"] for row in rows}) > 1 and front:
        charts.append(pareto_chart(rows, front))
    return Search(
        charts=[chart for chart in charts if chart is not None],
        counts=", ".join(f"{count} {status}" for status, count in counts.items() if count),
        best="tune/best.toml",
        front=[
            (r["trial"], r["stored_bytes"], 100 * r["accuracy"], told(r["values"])) for r in front
        ],
        failed=[(row["trial"], row["error"]) for row in rows if row["error"]],
    )


def learning_curves(rows: Sequence[Row]) -> Chart | None:
    """Accuracy of every trial by step, as far as it was decided that it goes on."""
    traces, last = [], []
    for row in rows:
        if not row["rungs"]:
            continue
        steps, values = zip(*row["rungs"], strict=True)
        percent = [100 * value for value in values]
        finished = row["status"] == "finished"
        last.append((percent[-1], row["trial"]))
        traces.append(
            go.Scatter(
                x=list(steps),
                y=percent,
                name=f"trial {row['trial']}",
                mode="lines+markers",
                line={"width": 2 if finished else 1.25, "color": BLUE if finished else ORANGE},
                opacity=1 if finished else 0.6,
                hovertemplate=f"trial {row['trial']}, {row['status']}: %{{y:.1f}} %<extra></extra>",
            )
        )
    if not traces:
        return None
    figure = go.Figure(traces, chart_layout(x="step", y="accuracy, %"))
    figure.update_layout(hovermode="closest")
    best, trial = max(last)
    return Chart(
        name="tune-curves",
        title="Trials",
        note="Accuracy on images held out of train, at each rung. Blue: finished; orange: stopped.",
        summary=f"{len(traces)} trials; the highest last value is {best:.1f} %, of trial {trial}.",
        figure=plain_figure(figure),
    )


def coordinates_chart(rows: Sequence[Row], space: Sequence[str]) -> Chart | None:
    """Parallel coordinates: each line a trial, through its values to its accuracy."""
    rows = [row for row in rows if row["accuracy"] is not None]
    if len(rows) < 2:
        return None
    accuracies = [100 * row["accuracy"] for row in rows]
    dimensions = [_dimension(key, [row["values"][key] for row in rows]) for key in space]
    dimensions.append({"label": "accuracy, %", "values": accuracies})
    line = {"color": accuracies, "colorscale": [[0, ORANGE], [1, BLUE]]}
    font = {"color": GREY, "size": 12}
    lines = go.Parcoords(
        dimensions=dimensions,
        line=line,
        labelfont=font,
        tickfont=font,
        rangefont={"color": "rgba(0,0,0,0)", "size": 1},
    )
    figure = go.Figure([lines], chart_layout(x="", y=""))
    figure.update_layout(height=340, margin={"l": 60, "r": 60, "t": 50, "b": 20})
    return Chart(
        name="tune-coordinates",
        title="Values and accuracy",
        note="Each line is a trial; drag along an axis to choose some. Stopped trials end with the "
        "accuracy at the rung that stopped them.",
        summary=f"{len(rows)} trials over {', '.join(space)}.",
        figure=plain_figure(figure),
    )


def _dimension(key: str, values: Sequence[Any]) -> dict[str, Any]:
    label = key.rpartition(".")[2].replace("_", " ")
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        low, high = min(values), max(values)
        if low > 0 and high / low > LOG_SPREAD:
            ticks = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            return {
                "label": label,
                "values": [math.log10(v) for v in values],
                "tickvals": list(ticks),
                "ticktext": [f"{10.0**tick:g}" for tick in ticks],
            }
        return {"label": label, "values": [float(v) for v in values]}
    names = sorted({str(value) for value in values})
    return {
        "label": label,
        "values": [names.index(str(value)) for value in values],
        "tickvals": list(range(len(names))),
        "ticktext": names,
    }


def pareto_chart(rows: Sequence[Row], front: Sequence[Row]) -> Chart:
    """Accuracy against stored bytes; the line joins the trials that none beats."""
    finished = [row for row in rows if row["status"] == "finished"]
    dots = go.Scatter(
        x=[row["stored_bytes"] for row in finished],
        y=[100 * row["accuracy"] for row in finished],
        text=[f"trial {row['trial']}" for row in finished],
        mode="markers",
        marker={"size": 9, "color": ORANGE, "opacity": 0.85},
        hovertemplate="%{text}: %{y:.1f} %, %{x} bytes<extra></extra>",
    )
    line = go.Scatter(
        x=[row["stored_bytes"] for row in front],
        y=[100 * row["accuracy"] for row in front],
        mode="lines",
        line={"width": 2, "color": BLUE, "shape": "hv"},
        hoverinfo="skip",
    )
    figure = go.Figure([line, dots], chart_layout(x="stored bytes", y="accuracy, %"))
    figure.update_layout(hovermode="closest")
    figure.update_xaxes(type="log")
    points = "; ".join(f"{r['stored_bytes']} bytes: {100 * r['accuracy']:.1f} %" for r in front)
    return Chart(
        name="tune-pareto",
        title="Accuracy against size",
        note="Finished trials; the line joins those that no smaller or equal set beats.",
        summary=f"{points}.",
        figure=plain_figure(figure),
    )
