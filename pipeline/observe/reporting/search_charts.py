"""Charts and table of a search, from <run>/tune/results.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from pipeline.observe.progress import values_text
from pipeline.observe.reporting.charts import BLUE, ORANGE, Chart, chart_layout, plain_figure

Row = Mapping[str, Any]

LOG_SPREAD = 20.0
"""Ratio of an option's values above which its axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Report section of a search."""

    charts: list[Chart]
    counts: str
    best: str  # the preset, relative to the run's directory
    front: list[tuple[int, int, float, str]]  # trial, bytes, accuracy in percent, values
    failed: list[tuple[int, str]]


def search(results: Mapping[str, Any]) -> Search:
    """Report section from the content of results.json."""
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
            (r["trial"], r["stored_bytes"], 100 * r["accuracy"], values_text(r["values"]))
            for r in front
        ],
        failed=[(row["trial"], row["error"]) for row in rows if row["error"]],
    )


def learning_curves(rows: Sequence[Row]) -> Chart | None:
    """Accuracy of every trial by step, up to its last decided rung."""
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
    best, trial = max(last, key=lambda pair: pair[0])  # of equals the first
    return Chart(
        name="tune-curves",
        title="Trials",
        note="Accuracy on images held out of train, at each rung. Blue: finished; orange: stopped.",
        summary=f"{len(traces)} trials; the highest last value is {best:.1f} %, of trial {trial}.",
        figure=plain_figure(figure),
    )


def coordinates_chart(rows: Sequence[Row], space: Sequence[str]) -> Chart | None:
    """Parallel coordinates: one line per trial, through its values to its accuracy.

    Drawn as scatter lines: plotly's parallel coordinates need WebGL, which not every browser has.
    """
    rows = [row for row in rows if row["accuracy"] is not None]
    if len(rows) < 2:
        return None
    axes = [_axis(key, [row["values"][key] for row in rows]) for key in space]
    axes.append(_axis("accuracy", [round(100 * row["accuracy"], 1) for row in rows]))
    scale = [[0, ORANGE], [1, BLUE]]
    traces = [
        go.Scatter(
            x=list(range(len(axes))),
            y=[axis.places[n] for axis in axes],
            text=[f"{axis.key} {axis.texts[n]}" for axis in axes],
            mode="lines+markers",
            line={"width": 1.5, "color": sample_colorscale(scale, axes[-1].places[n])[0]},
            opacity=0.8,
            hovertemplate=f"trial {row['trial']}: %{{text}}<extra></extra>",
        )
        for n, row in enumerate(rows)
    ]
    figure = go.Figure(traces, chart_layout(x="", y=""))
    figure.update_layout(height=340, hovermode="closest")
    short = [axis.key.rpartition(".")[2] for axis in axes]
    labels = [
        axis.key.replace(".", "<br>") if short.count(name) > 1 else name
        for axis, name in zip(axes, short, strict=True)
    ]
    figure.update_xaxes(
        tickvals=list(range(len(axes))),
        ticktext=labels,
        tickangle=0,
        range=[-0.5, len(axes) - 0.5],
    )
    figure.update_yaxes(visible=False, range=[-0.15, 1.15])
    for number, axis in enumerate(axes):
        for place, text in axis.ticks.items():
            anchor = "top" if place == 0 else "bottom"  # clear of the lines
            figure.add_annotation(
                x=number,
                y=place,
                text=text,
                showarrow=False,
                yanchor=anchor,
                yshift=-4 if place == 0 else 4,
            )
    return Chart(
        name="tune-coordinates",
        title="Values and accuracy",
        note="Each line is a trial, the bluer the better. Stopped trials end with the accuracy at "
        "the rung that stopped them.",
        summary=f"{len(rows)} trials over {', '.join(space)}.",
        figure=plain_figure(figure),
    )


@dataclass(frozen=True)
class _Axis:
    key: str
    places: list[float]  # of the trials, in [0, 1]
    texts: list[str]
    ticks: dict[float, str]


def _axis(key: str, values: Sequence[Any]) -> _Axis:
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        low, high = min(values), max(values)
        logarithmic = low > 0 and high / low > LOG_SPREAD
        places = [math.log(v) if logarithmic else float(v) for v in values]
        texts = [f"{v:.3g}" for v in values]
    else:
        texts = [str(v) for v in values]
        places = [float(sorted(set(texts)).index(text)) for text in texts]
    least, span = min(places), max(places) - min(places)
    places = [(place - least) / span if span else 0.5 for place in places]
    ends = (min(places), max(places))
    named = [(p, t) for p, t in zip(places, texts, strict=True) if len(set(texts)) < 5 or p in ends]
    return _Axis(key.replace("_", " "), places, texts, dict(named))


def pareto_chart(rows: Sequence[Row], front: Sequence[Row]) -> Chart:
    """Accuracy against stored bytes; the line joins the Pareto front."""
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
        note="Finished trials; the line joins those that no set of at most their size beats.",
        summary=f"{points}.",
        figure=plain_figure(figure),
    )
