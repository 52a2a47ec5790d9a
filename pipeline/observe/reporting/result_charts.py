"""Result charts as plotly figures: confusion, fidelity by class, uses, run comparison."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from pipeline.observe.reporting.charts import BLUE, GREY, ORANGE, Chart, chart_layout, plain_figure

COLORS = (BLUE, ORANGE, "#2e9e6b", "#b058b8", "#b8860b", "#d04a6a", "#5a7f8f", GREY)
MAX_TICKS = 30  # class names on an axis


def _safe(text: str) -> str:
    return html.escape(text, quote=False)


def _legend(figure: go.Figure) -> None:
    """Add a legend above the plot, with one line per entry for narrow charts."""
    figure.update_layout(
        showlegend=True,
        height=figure.layout.height + 20 * len(figure.data),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )


def confusion_chart(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Chart:
    """Confusion matrix: true class (rows) and predicted class (columns), as shares of the row."""
    shares = [[value / max(sum(row), 1) for value in row] for row in counts]
    safe = [_safe(name) for name in names]
    figure = go.Figure(
        go.Heatmap(
            z=[[round(value, 4) for value in row] for row in shares],
            x=safe,
            y=safe,
            zmin=0,
            zmax=1,
            colorscale=[[0, "rgba(47, 128, 208, 0.04)"], [1, "rgba(47, 128, 208, 1)"]],
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate="%{y} predicted as %{x}: %{z:.1%}<extra></extra>",
        )
    )
    figure.update_layout(chart_layout(x="predicted class", y="true class"))
    figure.update_layout(height=min(680, 150 + 26 * len(names)), hovermode="closest")
    shown = len(names) <= MAX_TICKS
    figure.update_xaxes(type="category", showgrid=False, showticklabels=shown, tickangle=-45)
    figure.update_yaxes(type="category", showgrid=False, showticklabels=shown, autorange="reversed")
    worst = max(
        ((shares[i][j], i, j) for i in range(len(names)) for j in range(len(names)) if i != j),
        default=None,
    )
    summary = "" if worst is None else (
        f"Most frequent error: {worst[0]:.0%} of {names[worst[1]]} predicted as {names[worst[2]]}."
    )  # fmt: skip
    return Chart(
        name="confusion",
        title="Confusion matrix",
        note="Each row: predictions for the test images of a class; the diagonal is correct.",
        summary=summary,
        figure=plain_figure(figure),
    )


def class_ncfd_chart(
    values: Mapping[str, Sequence[float]], names: Sequence[str], labels: Mapping[str, str]
) -> Chart:
    """Dot plot of the NCFD by class and set; `labels` are the sets' display names."""
    safe = [_safe(name) for name in names]
    figure = go.Figure()
    for color, (name, points) in zip(COLORS, values.items(), strict=False):
        figure.add_scatter(
            x=[float(f"{v:.5g}") for v in points],
            y=safe,
            mode="markers",
            name=labels.get(name, name),
            marker={"size": 9, "color": color, "opacity": 0.85},
            hovertemplate="%{y}: %{x:.3g}",
        )
    figure.update_layout(chart_layout(x="NCFD", y=""))
    figure.update_layout(height=min(900, 110 + 22 * len(names)), hovermode="closest")
    figure.update_yaxes(
        type="category", autorange="reversed", showticklabels=len(names) <= MAX_TICKS
    )
    figure.update_xaxes(rangemode="tozero")
    _legend(figure)
    distilled = values.get("distilled", ())
    summary = f"Distilled: {min(distilled):.3g} to {max(distilled):.3g}." if distilled else ""
    return Chart(
        name="class-ncfd",
        title="NCFD of each class to all its real images",
        note="Lower is better.",
        summary=summary,
        figure=plain_figure(figure),
    )


def continual_charts(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[Chart]:
    """Accuracy by the number of classes so far, one chart per number of steps."""
    charts = []
    orders = max(len(row["accuracy"]) for row in rows)
    spread = f" Bars: standard deviation over {orders} orders of the classes." * (orders > 1)
    for steps in dict.fromkeys(row["steps"] for row in rows):
        figure, last = go.Figure(), []
        names = dict.fromkeys(row["set"] for row in rows)
        for color, name in zip(COLORS, names, strict=False):
            group = [row for row in rows if (row["set"], row["steps"]) == (name, steps)]
            label = labels.get(name, name)
            figure.add_scatter(
                x=[row["classes"] for row in group],
                y=[round(100 * row["mean"], 2) for row in group],
                error_y={
                    "array": [round(100 * row["std"], 2) for row in group],
                    "width": 2,
                    "thickness": 1,
                },
                mode="lines+markers",
                name=label,
                line={"color": color, "width": 2},
                hovertemplate="%{y:.1f} %",
            )
            last.append(f"{label} {100 * group[-1]['mean']:.1f} %")
        figure.update_layout(chart_layout(x="classes seen", y="accuracy, %"))
        figure.update_yaxes(rangemode="tozero")
        _legend(figure)
        charts.append(
            Chart(
                name=f"continual-{steps}",
                title=f"Class-incremental learning, {steps} steps",
                note="A fresh network at each step, on the stored images of all classes so far."
                + spread,
                summary="After the last step: " + ", ".join(last) + ".",
                figure=plain_figure(figure),
            )
        )
    return charts


def proxy_chart(content: Mapping[str, Any], labels: Mapping[str, str]) -> Chart:
    """Accuracy of each architecture on the small sets against that on the whole set."""
    figure, correlations, chosen = go.Figure(), [], []
    whole = [round(100 * value, 2) for value in content["sets"]["whole"]["mean"]]
    small = {name: entry for name, entry in content["sets"].items() if name != "whole"}
    for color, (name, entry) in zip(COLORS, small.items(), strict=False):
        label, rho = labels.get(name, name), entry["correlation"]
        figure.add_scatter(
            x=whole,
            y=[round(100 * value, 2) for value in entry["mean"]],
            text=[_safe(network) for network in content["networks"]],
            mode="markers",
            name=label,
            marker={"size": 9, "color": color, "opacity": 0.85},
            hovertemplate="%{text}: %{y:.1f} % (whole set %{x:.1f} %)",
        )
        correlations.append(f"{label} {'none' if rho is None else f'{rho:+.2f}'}")
        chosen.append(f"{label} {100 * entry['best_found']:.1f} %")
    figure.update_layout(chart_layout(x="accuracy on the whole set, %", y="on the small set, %"))
    figure.update_layout(hovermode="closest")
    _legend(figure)
    return Chart(
        name="search-proxy",
        title="Architecture search on the small set",
        note=f"Each dot: one of {len(whole)} ConvNets.",
        summary=f"Rank correlation with the whole set: {', '.join(correlations)}. The network "
        f"that is best on the small set reaches on the whole one: {', '.join(chosen)}; "
        f"the best of all: {max(whole):.1f} %.",
        figure=plain_figure(figure),
    )


def overlay_chart(key: str, title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    """One metric of several runs: run -> (step, value) pairs."""
    figure, ends = go.Figure(), []
    for color, (run, points) in zip(COLORS * len(curves), curves.items(), strict=False):
        stride = -(-len(points) // 1000)
        kept = [p for i, p in enumerate(points) if i % stride == 0 or i == len(points) - 1]
        figure.add_scatter(
            x=[step for step, _ in kept],
            y=[float(f"{value:.6g}") for _, value in kept],
            name=_safe(run),
            mode="lines" if len(kept) > 1 else "markers",
            line={"color": color, "width": 2},
            hovertemplate="%{y:.4g}",
        )
        ends.append(f"{run} {points[-1][1]:.3g}")
    figure.update_layout(chart_layout(x="step", y=""))
    return Chart(
        name=key.replace("/", "-"),
        title=title,
        note="",
        summary="At the end: " + ", ".join(ends) + ".",
        figure=plain_figure(figure),
    )
