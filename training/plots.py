"""Plots of training and of the benchmark. Each plot is one HTML file that needs no network."""

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

# Paul Tol's bright scheme, which colour-blind readers can tell apart.
_COLOURS = ("#4477AA", "#CCBB44", "#EE6677", "#228833", "#AA3377", "#66CCEE")


def loss_plot(records: Sequence[dict], layers: Sequence[int], path: Path) -> None:
    """Plot how KL to the full model and agreement change over the training steps, for each exit.

    Args:
        records: records of the training log (log.jsonl) of `training.distill`.
        layers: the layer of each exit that was trained.
        path: the HTML file to write.
    """
    figure = make_subplots(rows=1, cols=2, subplot_titles=("KL(full || exit), nats per token", "Top-1 agreement"))
    steps = [r for r in records if "kl" in r]
    held = [r for r in records if "held_out_agreement" in r]
    for s, layer in enumerate(layers):
        colour, smooth = _COLOURS[s % len(_COLOURS)], max(1, len(steps) // 60)
        style = dict(line_color=colour, legendgroup=str(s))
        x = [r["step"] for r in steps]
        figure.add_scatter(x=x, y=_mean([r["kl"][s] for r in steps], smooth), name=f"exit {layer}", row=1, col=1,
                           **style)
        figure.add_scatter(x=x, y=_mean([r["agreement"][s] for r in steps], smooth), showlegend=False,
                           name=f"exit {layer}, training", row=1, col=2, **style)
        figure.add_scatter(x=[r["step"] for r in held], y=[r["held_out_agreement"][s] for r in held], mode="markers",
                           marker=dict(color=colour, size=9, symbol="diamond"), name=f"exit {layer}, held out", row=1,
                           col=2, legendgroup=str(s))
    figure.update_xaxes(title="step")
    figure.update_yaxes(type="log", row=1, col=1)
    _write(figure, path)


def reliability_plot(exits: Sequence[dict], path: Path) -> None:
    """Plot the share of right choices against the confidence, with a curve for each exit.

    Args:
        exits: reports of the exits, from `training.confidence.measure`. Their `bins` are plotted.
        path: the HTML file to write.
    """
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1], line=dict(dash="dot", color="gray"), name="perfectly calibrated"))
    for s, report in enumerate(exits):
        figure.add_scatter(x=report["bins"]["confidence"], y=report["bins"]["right"], mode="lines+markers",
                           name=f"exit {report['layer']}, ECE {report['ece']:.1%}",
                           line_color=_COLOURS[s % len(_COLOURS)])
    figure.update_layout(xaxis_title="confidence", yaxis_title="share of right choices", width=620, height=560)
    _write(figure, path)


def growth_plot(growth: dict, path: Path) -> None:
    """Plot milliseconds per token against the length of the context and of the output.

    Args:
        growth: result of `training.growth.growth`.
        path: the HTML file to write.
    """
    figure = make_subplots(rows=1, cols=2, subplot_titles=("Against the context length", "Against the output length"))
    for col, kind in enumerate(("context", "output"), 1):
        entries = growth[kind]
        others = (kind, "allowed", "allowed_16_bits", "times")
        names = [name for name in (entries[0] if entries else ()) if name not in others]
        for name, colour in zip(names, _COLOURS):
            figure.add_scatter(x=[e[kind] for e in entries], y=[e[name] for e in entries], name=name,
                               line_color=colour, mode="lines+markers", showlegend=col == 1, row=1, col=col)
        if kind == "context" and entries:
            figure.add_scatter(x=[e[kind] for e in entries], y=[e["allowed"] * entries[0]["full"] for e in entries],
                               name="full, by bytes read", line=dict(dash="dot", color="gray"), row=1, col=1)
    figure.update_xaxes(title="tokens")
    figure.update_yaxes(title="milliseconds a token", rangemode="tozero")
    _write(figure, path)


def _mean(values: list[float], n: int) -> list[float]:
    """Return the running mean: each value is replaced by the mean of itself and the n - 1 values before it."""
    return [sum(values[max(0, i - n + 1):i + 1]) / (i - max(0, i - n + 1) + 1) for i in range(len(values))]


def _write(figure: go.Figure, path: Path) -> None:
    figure.update_layout(template="plotly_white")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True)
