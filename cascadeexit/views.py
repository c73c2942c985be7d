"""Views: makes the Plotly figure that shows the results of many prompts.

This module imports nothing of the web page.
"""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from cascadeexit.evaluation import Result, quality_speed_points, summarize_results

_OUTLINE = "#7D838C"                        # visible on a light and on a dark page
_KIND_COLOURS = ("#4477AA", "#228833", "#CCBB44", "#66CCEE", "#AA3377")      # Paul Tol's "bright" scheme


def quality_speed_figure(results: Sequence[Result], curve: Sequence[dict] = ()) -> go.Figure:
    """Plot the agreement with the full model in two charts: against the speed-up, and against the weights read.

    Each chart has a point for each prompt, and a point for all prompts together.

    curve: earlier measurements with other thresholds, {threshold, agreement, cost} each. They include no speed on this
        machine, so they appear only in the lower chart, as a line.
    """
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.22)
    if curve:
        figure.add_scatter(
            x=[point["cost"] for point in curve], y=[point["agreement"] for point in curve], mode="lines+markers",
            name="earlier measurement of other thresholds", line=dict(color=_OUTLINE, width=1.5, dash="dot"),
            text=[f"first exit's threshold {point['threshold']:g}" for point in curve], row=2, col=1,
            hovertemplate="%{text}: %{y:.1%} agreement, %{x:.0%} of the weights read<extra></extra>")
    points = quality_speed_points(results)
    for kind, colour in zip(dict.fromkeys(p["kind"] for p in points), (*_KIND_COLOURS, *[_OUTLINE] * len(points))):
        mine = [p for p in points if p["kind"] == kind]
        # Plotly reads markup in labels, and anybody can write a prompt: replace angle brackets.
        labels = [p["label"].replace("<", "‹").replace(">", "›") for p in mine]
        _add_to_both(figure, [p["x"] for p in mine], [p["cost"] for p in mine], [p["y"] for p in mine],
                     kind.replace("<", "‹"), "%{text}<br>", text=labels, marker=dict(size=9, color=colour))
    if points:
        total = summarize_results(results)
        _add_to_both(figure, [total.speedup], [total.cost], [total.agreement], "all prompts", "all: ",
                     marker=dict(symbol="star", size=17, color="#D55E00", line=dict(width=1, color=_OUTLINE)))
    figure.update_xaxes(title="speed-up, measured (1 = as fast as the full model)", row=1, col=1)
    figure.update_xaxes(title="weights read (share of what the full model reads)", tickformat=".0%", row=2, col=1)
    figure.update_yaxes(title="agreement", tickformat=".0%")
    return _styled(figure, "Quality against speed").update_layout(height=560)


def _add_to_both(figure: go.Figure, speedups: list, costs: list, agreements: list, name: str, words: str,
                 **options) -> None:
    """Add points to both charts, with one entry in the legend.

    Args:
        speedups, costs: x of the points in the upper and in the lower chart.
        agreements: y of the points in both charts.
        words: beginning of the text that a point shows under the mouse.
    """
    for row, x, form in ((1, speedups, "%{x:.2f}×"), (2, costs, "%{x:.0%} of the weights read")):
        figure.add_scatter(x=x, y=agreements, mode="markers", name=name, legendgroup=name, showlegend=row == 1,
                           hovertemplate=f"{words}%{{y:.1%}} agreement, {form}<extra></extra>", row=row, col=1,
                           **options)


def _styled(figure: go.Figure, title: str) -> go.Figure:
    """Give a figure a title, and colours that are readable on light and dark pages. Returns the figure."""
    axis = dict(gridcolor="rgba(128,128,128,0.22)", zerolinecolor="rgba(128,128,128,0.45)", automargin=True)
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        title=dict(text=f"<b>{title}</b>", x=0, xref="container", y=0.97, yanchor="top", font=dict(size=14)),
        template="none", height=300, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family="IBM Plex Sans, system-ui, sans-serif", color=_OUTLINE, size=12),
        margin=dict(l=8, r=8, t=76, b=8), showlegend=True,
        legend=dict(orientation="h", y=1.02, yanchor="bottom", x=0))
    return figure
