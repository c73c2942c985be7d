"""Views: Plotly figures of a finished run and of an evaluation. They do not depend on the page."""

from collections.abc import Sequence

import plotly.graph_objects as go

from cascadeexit import metrics
from cascadeexit.evaluation import Result, quality_speed_points, summarize_results
from cascadeexit.shape import exit_name
from cascadeexit.sides import CASCADE, FULL
from cascadeexit.stream import COPIED_COLOUR, TokenStream, colours

_OUTLINE = "#7D838C"                        # visible on a light and on a dark page
_KIND_COLOURS = ("#4477AA", "#228833", "#CCBB44", "#66CCEE", "#AA3377")      # Paul Tol's "bright" scheme


def figures(stream: TokenStream, full_choices: Sequence[int]) -> list[go.Figure]:
    """All figures of a run, in the page's order.

    full_choices: the full model's choice at each position, given the text with exits before it.
    """
    return [routing_figure(stream), latency_figure(stream), confidence_figure(stream, full_choices)]


def routing_figure(stream: TokenStream) -> go.Figure:
    """Share of the tokens that each exit wrote."""
    exits, final = len(stream.shape.exit_layers), stream.sides[CASCADE].final
    share, copied = metrics.routing_share(final, exits + 1), metrics.copied_share(final)
    names = [exit_name(s, stream.shape).partition(" (")[0] for s in range(len(share))]
    palette = colours(exits)
    if copied:
        share, names, palette = (*share, copied), [*names, "Copied"], (*palette, COPIED_COLOUR)
    figure = go.Figure(go.Bar(
        x=share, y=names, orientation="h", cliponaxis=False,
        text=[f"{part:.1%}" for part in share], textposition="outside",
        marker=dict(color=palette, line=dict(color=_OUTLINE, width=1)),
        hovertemplate="%{y}: %{x:.1%} of the tokens<extra></extra>"))
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickformat=".0%", range=[0, 1.08])
    return _styled(figure, "Which exit wrote the tokens", legend=False)


def latency_figure(stream: TokenStream) -> go.Figure:
    """Milliseconds from each token to the next, for both sides."""
    figure = go.Figure()
    for side, name, line in ((FULL, "Full model", dict(color=_OUTLINE, width=1.5, dash="dot")),
                             (CASCADE, "With exits", dict(color="#3F8FC7", width=1.5))):
        waits = [1000 * s for s in metrics.token_seconds(stream.sides[side].final)]
        figure.add_scatter(x=list(range(1, len(waits) + 1)), y=waits, name=name, mode="lines", line=line,
                           hovertemplate="token %{x}: %{y:.1f} ms<extra>" + name + "</extra>")
    figure.update_xaxes(title="token")
    figure.update_yaxes(ticksuffix=" ms", rangemode="tozero")
    return _styled(figure, "Time per token")


def confidence_figure(stream: TokenStream, full_choices: Sequence[int]) -> go.Figure:
    """Confidence of the exit that wrote each token; crosses where the full model would choose another token."""
    exits, final, figure = len(stream.shape.exit_layers), stream.sides[CASCADE].final, go.Figure()
    palette = colours(exits)
    for s in range(exits):
        points = [e for e in final if e.exit == s]
        figure.add_scatter(
            x=[e.index for e in points], y=[e.confidences[s] for e in points],
            mode="markers", name=f"Exit {s + 1}",
            marker=dict(color=palette[s], size=8, line=dict(color=_OUTLINE, width=0.6)),
            hovertemplate="token %{x}: confidence %{y:.0%}<extra>" + f"Exit {s + 1}</extra>")
    others = [e for e, choice in zip(final, full_choices)
              if 0 <= e.exit < exits and e.token_id != choice]
    figure.add_scatter(
        x=[e.index for e in others], y=[e.confidences[e.exit] for e in others], mode="markers",
        name="full model would choose another token",
        marker=dict(color="#D55E00", size=8, symbol="x-thin-open", line_width=2),
        hovertemplate="token %{x}: the full model would choose another token<extra></extra>")
    figure.update_xaxes(title="token")
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    return _styled(figure, "Confidence of the exits", legend_rows=1 + exits // 2)


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


def _styled(figure: go.Figure, title: str, legend: bool = True, legend_rows: int = 1) -> go.Figure:
    """Make a figure readable on light and dark pages: transparent, neutral lines, text in the page's colour."""
    axis = dict(gridcolor="rgba(128,128,128,0.22)", zerolinecolor="rgba(128,128,128,0.45)", automargin=True)
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        title=dict(text=f"<b>{title}</b>", x=0, xref="container", y=0.97, yanchor="top", font=dict(size=14)),
        template="none", height=300, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family="IBM Plex Sans, system-ui, sans-serif", color=_OUTLINE, size=12),
        margin=dict(l=8, r=8, t=54 + 22 * legend_rows, b=8), showlegend=legend,
        legend=dict(orientation="h", y=1.02, yanchor="bottom", x=0))
    return figure
