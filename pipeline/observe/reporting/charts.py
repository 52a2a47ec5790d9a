"""Training curves of a run as plotly figures (data and layout), drawn by the page."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

Row = Mapping[str, Any]

# Contrast above 3:1 on both white and near-black. The page's style sheet sets the text colour; this
# grey is for exported pictures.
BLUE, ORANGE, GREY = "#2f80d0", "#d5681c", "#7b828c"
_GRID = "rgba(128, 134, 145, 0.25)"
_MAX_POINTS = 1000  # per curve: about a screen's width
_FEW_EPOCHS = 10
_AVERAGED_SHARE = 25  # the bold line averages 1/25 of the logged steps

# Key of a row -> (title, description). Other keys get a chart under their own name.
DISTILL = {
    "distill/ncfd": (
        "Discrepancy (NCFD)",
        "The images' objective: the distance of their features from the real ones.",
    ),
    "distill/mmd": ("Discrepancy (linear MMD)", "The images' objective."),
    "distill/mmd_raw": ("Discrepancy (linear MMD, raw features)", "The images' objective."),
    "distill/psi_objective": (
        "Frequency sampler ψ",
        "The objective that ψ maximises, with the images fixed.",
    ),
    "distill/calibration": (
        "Calibration",
        "Cross-entropy of the synthetic images under the trained network.",
    ),
    "distill/images_per_s": ("Throughput", "Real images per second, all workers together."),
}
_NO_CHART = {
    "distill/step_s",  # redundant with the throughput
    "distill/bytes_per_step",  # constant
    "distill/imbalance",  # in metrics.jsonl
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with its texts."""

    name: str  # unique in a page
    title: str
    note: str  # description
    summary: str  # main values as text, for screen readers and pages without scripts
    figure: dict[str, Any]  # plotly: {"data": [...], "layout": {...}}


def distillation_charts(rows: Sequence[Row]) -> list[Chart]:
    """One chart per distillation metric, known ones first.

    Rows are those of metrics.jsonl with stage distill; of rows with the same step (a resumed run),
    the last counts.
    """
    by_step = {int(row["step"]): row for row in rows}
    steps = sorted(by_step)
    keys = {key for row in rows for key in row if key.startswith("distill/")} - _NO_CHART
    known = [key for key in DISTILL if key in keys]
    moving = "distill/psi_objective" in keys
    charts = []
    for key in [*known, *sorted(keys - set(known))]:
        title, note = DISTILL.get(key, (key.removeprefix("distill/").replace("_", " "), ""))
        if key == "distill/ncfd" and moving:
            note += " It may rise, because ψ moves the frequencies to where they differ most."
        points = [
            (step, float(value))
            for step in steps
            if (value := by_step[step].get(key)) is not None and math.isfinite(value)
        ]
        if points:
            charts.append(_curve(key, title, note, points))
    return charts


def _curve(key: str, title: str, note: str, points: list[tuple[int, float]]) -> Chart:
    steps, values = [step for step, _ in points], [value for _, value in points]
    window = len(points) // _AVERAGED_SHARE | 1  # odd: centred
    averaged = window > 1
    traces = [_line(steps, values, "logged", width=1.25 if averaged else 2, faint=averaged)]
    if averaged:
        traces.append(_line(steps, _moving_mean(values, window), "mean", width=2.25))
        note = f"{note} Bold: mean of {window} logged steps.".strip()
    summary = (
        f"Step {steps[0]}: {_short(values[0])}. Step {steps[-1]}: {_short(values[-1])}. "
        f"Lowest {_short(min(values))}, highest {_short(max(values))}."
    )
    figure = go.Figure(traces, chart_layout(x="step", y=""))
    figure.update_xaxes(range=[0, 1.01 * steps[-1]])
    return Chart(
        name=key.replace("/", "-"),
        title=title,
        note=note,
        summary=summary,
        figure=plain_figure(figure),
    )


def pretraining_chart(rows: Sequence[Row]) -> Chart | None:
    """Training accuracy of the pool's networks by epoch, and their final val accuracy."""
    curves: dict[int, dict[int, Row]] = {}
    for row in rows:
        if row.get("pretrain/accuracy") is not None:
            curves.setdefault(int(row["network"]), {})[int(row["epoch"]) + 1] = row
    if not curves:
        return None
    traces, last, final = [], [], []
    for network, by_epoch in sorted(curves.items()):
        epochs = sorted(by_epoch)
        values = [100 * float(by_epoch[epoch]["pretrain/accuracy"]) for epoch in epochs]
        last.append(values[-1])
        traces.append(
            _line(epochs, values, f"network {network}, train", width=1.5, faint=len(curves) > 1)
        )
        for epoch in epochs:
            if (value := by_epoch[epoch].get("pretrain/val_accuracy")) is not None:
                final.append((epoch, 100 * float(value), f"network {network}, held out"))
    note = "Each line is a network of the pool, on the augmented images it trains on."
    summary = f"{_networks(len(last))}, last epoch, training images: {_range(last)}."
    if final:
        x, y, names = zip(*final, strict=True)
        traces.append(_dots(x, y, names, color=ORANGE))
        note += " Dots: on held-out images, after the last epoch."
        summary += f" Held out: {_range(y)}."
    figure = go.Figure(traces, chart_layout(x="epoch", y="accuracy, %"))
    figure.update_layout(hovermode="closest")
    if max(map(max, curves.values())) <= _FEW_EPOCHS:
        figure.update_xaxes(dtick=1)  # else plotly labels half epochs
    return Chart(
        name="pretrain-accuracy",
        title="Pretraining of the feature extractors",
        note=note,
        summary=summary,
        figure=plain_figure(figure),
    )


def accuracy_chart(groups: Sequence[tuple[str, Sequence[float]]]) -> Chart:
    """Dot plot of (label, accuracies in 0..1): one dot per run, a bar at the mean."""
    labels, means, dots = [], [], []
    for label, runs in groups:
        # plotly interprets some HTML in texts. Labels wrap after a comma, for narrow screens.
        safe = html.escape(label, quote=False)
        labels.append(safe.replace(", ", ",<br>"))
        means.append(100 * sum(runs) / len(runs))
        dots += [(100 * v, labels[-1], f"{safe}, run {i + 1}") for i, v in enumerate(runs)]
    x, y, names = zip(*dots, strict=True)
    mean = go.Scatter(
        x=means,
        y=labels,
        mode="markers",
        marker={"symbol": "line-ns", "size": 22, "line": {"width": 3, "color": BLUE}},
        hovertemplate="mean %{x:.1f} %<extra></extra>",
    )
    figure = go.Figure([mean, _dots(x, y, names, color=ORANGE, value="x")])
    lines = max(label.count("<br>") for label in labels) + 1
    figure.update_layout(chart_layout(x="accuracy, %", y=""))
    figure.update_layout(height=70 + max(42, 12 + 18 * lines) * len(labels))
    figure.update_layout(hovermode="closest")
    figure.update_yaxes(type="category", range=[len(labels) - 0.5, -0.5], ticklabelstandoff=6)
    figure.update_xaxes(rangemode="tozero")
    return Chart(
        name="accuracy",
        title="Every run",
        note="Dots: one trained network each. Bars: their mean.",
        summary="; ".join(f"{g[0]}: {m:.1f} %" for g, m in zip(groups, means, strict=True)) + ".",
        figure=plain_figure(figure),
    )


def _line(
    x: Sequence[int], y: Sequence[float], name: str, *, width: float, faint: bool = False
) -> go.Scatter:
    stride = -(-len(x) // _MAX_POINTS)
    kept = [i for i in range(len(x)) if i % stride == 0 or i == len(x) - 1]
    return go.Scatter(
        x=[x[i] for i in kept],
        y=[float(f"{y[i]:.6g}") for i in kept],
        name=name,
        mode="lines" if len(kept) > 1 else "markers",
        line={"width": width, "color": BLUE},
        opacity=0.45 if faint else 1,
        hovertemplate="%{y:.4g}",
    )


def _dots(
    x: Sequence[Any], y: Sequence[Any], names: Sequence[str], *, color: str, value: str = "y"
) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=list(y),
        text=list(names),
        mode="markers",
        marker={"size": 9, "color": color, "opacity": 0.85},
        hovertemplate=f"%{{text}}: %{{{value}:.1f}} %<extra></extra>",
    )


def chart_layout(*, x: str, y: str) -> go.Layout:
    """Common chart layout, with axis titles."""
    title = {"standoff": 8, "font": {"size": 13}}
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "automargin": True, "ticks": ""}
    return go.Layout(
        template=go.layout.Template(),
        height=280,
        autosize=True,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        hoverlabel={
            "bgcolor": "#262a30",
            "bordercolor": GREY,
            "font": {"color": "#fff", "size": 13},
            "namelength": -1,
        },
        hovermode="x unified",
        modebar={"bgcolor": "rgba(0,0,0,0)"},
        showlegend=False,
        xaxis={**axis, "title": title | {"text": x}, "showspikes": False},
        yaxis={**axis, "title": title | {"text": y}},
    )


def plain_figure(figure: go.Figure) -> dict[str, Any]:
    """A figure as JSON-serialisable data."""
    data: dict[str, Any] = figure.to_plotly_json()
    return data


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean, with a truncated window at the ends."""
    half, means = window // 2, []
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        means.append(sum(part) / len(part))
    return means


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _networks(count: int) -> str:
    return "1 network" if count == 1 else f"{count} networks"


def _range(percent: Sequence[float]) -> str:
    low, high = f"{min(percent):.1f}", f"{max(percent):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"
