"""Views: the Plotly figure of an evaluation. It does not depend on the page."""

from collections.abc import Sequence

import plotly.graph_objects as go

from cascadeexit.evaluation import Result, quality_speed_points, summarize_results

_OUTLINE = "#7D838C"                        # visible on a light and on a dark page
_KIND_COLOURS = ("#4477AA", "#228833", "#CCBB44", "#66CCEE", "#AA3377")      # Paul Tol's "bright" scheme


def quality_speed_figure(results: Sequence[Result], curve: Sequence[dict] = ()) -> go.Figure:
    """Agreement against speed-up: a point for each prompt and one for all prompts together.

    curve: {threshold, agreement, cost} of thresholds measured before. Their speed-up is estimated from the weights
        read: 1 / cost.
    """
    figure = go.Figure()
    if curve:
        figure.add_scatter(
            x=[1 / point["cost"] for point in curve], y=[point["agreement"] for point in curve], mode="lines+markers",
            name="earlier measurement of other thresholds (speed estimated from weights read)",
            line=dict(color=_OUTLINE, width=1.5, dash="dot"),
            text=[f"first exit's threshold {point['threshold']:g}" for point in curve],
            hovertemplate="%{text}: %{y:.1%} agreement, %{x:.2f}x estimated from weights read<extra></extra>")
    points = quality_speed_points(results)
    for kind, colour in zip(dict.fromkeys(p["kind"] for p in points), (*_KIND_COLOURS, *[_OUTLINE] * len(points))):
        mine = [p for p in points if p["kind"] == kind]
        # Plotly reads markup in labels, and anybody can write a prompt: replace angle brackets.
        labels = [p["label"].replace("<", "‹").replace(">", "›") for p in mine]
        figure.add_scatter(x=[p["x"] for p in mine], y=[p["y"] for p in mine], mode="markers",
                           name=kind.replace("<", "‹"), text=labels, marker=dict(size=9, color=colour),
                           hovertemplate="%{text}<br>%{y:.1%} agreement, %{x:.2f}x<extra></extra>")
    if points:
        total = summarize_results(results)
        figure.add_scatter(x=[total.speedup], y=[total.agreement], mode="markers", name="all prompts",
                           marker=dict(symbol="star", size=17, color="#D55E00", line=dict(width=1, color=_OUTLINE)),
                           hovertemplate="all: %{y:.1%} agreement, %{x:.2f}x<extra></extra>")
    figure.update_xaxes(title="speed-up (1 = as fast as the full model)")
    figure.update_yaxes(title="agreement", tickformat=".0%")
    return _styled(figure, "Quality against speed")


def _styled(figure: go.Figure, title: str) -> go.Figure:
    """Make a figure readable on light and dark pages: transparent, neutral lines, text in the page's colour."""
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
