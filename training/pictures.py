"""Pictures: the charts of the report, made from result files. Each function returns a chart with its legend."""

from collections.abc import Sequence

from markupsafe import Markup

from cascadeexit.stream import colours
from training.charts import Axis, Series, chart, legend
from training.comparison import measured_exits
from training.results import fixed, percent

BEFORE = {"after_full": "after a token of the full model", "after_exit": "after a token of its own"}


def kind_of(name: str) -> str:
    """Return the kind of a contender of the benchmark: "full", "cascade", "verified" or "rival"."""
    return next((kind for kind in ("full", "cascade", "verified") if name.split()[0].rstrip(",") == kind), "rival")


def quality_chart(benchmark: dict, calibration: dict | None) -> Markup:
    """Draw agreement against speed for each mode that the benchmark measured.

    Args:
        benchmark: result of `training.benchmark`.
        calibration: result of `training.calibrate` for the same exits. Its certified bounds are drawn as strokes
            below the thresholds of the cascade. None = draw no bounds.
    """
    bounds = {f"cascade {point['threshold']}": 1 - point["at_most"]
              for point in (calibration or {"points": ()})["points"]}
    series = []
    for kind, listed, name in (("cascade", False, "cascade, by threshold of the first exit"),
                               ("cascade", True, "cascade, by thresholds of all exits"),
                               ("verified", False, "verified, by tolerance"), ("full", False, "full model")):
        rows = {row: figures for row, figures in benchmark["rows"].items()
                if kind_of(row) == kind and (kind == "cascade" and "," in row) == listed}
        points = [(row["over_full"], row["agreement"], _short(label, kind)) for label, row in rows.items()]
        strokes = [(row["over_full"], row["agreement"], bounds[label]) for label, row in rows.items()
                   if label in bounds]
        if points:
            line = not listed and len(points) > 1
            series.append(Series(name, f"{kind} dashed" if listed else kind, points, line=line, bounds=strokes))
    drawn = [bound for each in series for _, _, bound in each.bounds]
    x = Axis.round("speed, x full", [1.0, *(point[0] for each in series for point in each.points)], "{:g}".format)
    y = Axis.round("agreement with the full model", [1.0, *(p[1] for each in series for p in each.points), *drawn],
                   _percent)
    return chart("Agreement against speed", series, x, y) + legend(series)


def _short(name: str, kind: str) -> str:
    """Shorten the name of a contender to what differs from others of its kind: 'cascade 0.6' to '0.6'."""
    return name.removeprefix(kind).lstrip(", ").replace("no,", "off,") or name


def calibration_chart(calibration: dict) -> Markup:
    """Draw the measured disagreement and its certified bound against the cost of each threshold."""
    points = calibration["points"]
    series = [Series(f"certified: at most this, with {percent(1 - calibration['delta'], 0)} confidence", "certified",
                     [(p["cost"], p["at_most"], f"{p['threshold']:g}") for p in points]),
              Series("measured", "cascade", [(p["cost"], p["disagreement"], "") for p in points])]
    x = Axis.round("bytes read, x full", [p["cost"] for p in points], "{:g}".format)
    y = Axis.round("tokens that differ", [0.0, *(p["at_most"] for p in points)], _percent)
    return chart("Disagreement against cost", series, x, y) + legend(series)


def reliability_chart(confidence: dict) -> Markup:
    """Draw the share of right choices against the confidence, for each exit.

    confidence: result of `training.confidence`.
    """
    exits = confidence["exits"]
    series = [Series("perfectly calibrated", "ideal", [(0.0, 0.0, ""), (1.0, 1.0, "")], dots=False)]
    for exit, colour in zip(exits, colours(len(exits))):
        bins = zip(exit["bins"]["confidence"], exit["bins"]["right"], strict=True)
        series.append(Series(f"exit after layer {exit['layer']}, error {percent(exit['ece'])}", "exit",
                             [(confidence, right, "") for confidence, right in bins], colour, line=False))
    unit = {value: _percent(value) for value in (0.0, 0.25, 0.5, 0.75, 1.0)}
    return (chart("Share of right choices against confidence", series, Axis("confidence", 0.0, 1.0, unit),
                  Axis("right choices", 0.0, 1.0, unit)) + legend(series))


def depth_chart(figures: dict, text: str) -> Markup:
    """Draw top-1 agreement against depth on one text, for our exits and, where they read it, the published ones.

    Args:
        figures: result of `training.results.read_all`.
        text: name of the text, as in the results of `training.evaluate exits`.
    """
    series, css = [], iter(("verified", "cascade", "certified"))
    for result, num_layers in measured_exits(figures):
        colour = next(css, "rival")
        for before, report in result["texts"].get(text, {}).items():
            name = f"{result['adapter']}, {BEFORE[before]}" if result["adapter"] == "carry" else result["adapter"]
            points = [(exit["layer"] / num_layers, exit["top1"], "") for exit in report["exits"]]
            series.append(Series(name, f"{colour} dashed" if before == "after_exit" else colour, points))
    published = figures["published"]
    if text == published["text"]:
        series.append(Series(f"published, {published['model']}", "published", [
            (exit["layer"] / published["num_layers"], exit["top1"], "") for exit in published["exits"]]))
    x = Axis.round("depth of the exit", [0.0, *(point[0] for each in series for point in each.points)], _percent)
    y = Axis.round("top-1 agreement", [0.0, *(point[1] for each in series for point in each.points)], _percent)
    return chart(f"Top-1 agreement against depth, {text}", series, x, y) + legend(series)


def context_chart(growth: list[dict]) -> Markup:
    """Draw how the time per token grows with the context, as a multiple of the time at the shortest context.

    growth: the entry "context" of the growth that `training.benchmark` measured.
    """
    first, lengths = growth[0], [entry["context"] for entry in growth]
    names = (("full", "full"), ("verified", "verified"), ("transformers generate", "rival"))
    series = [Series(name, css, [(entry["context"], entry[name] / first[name], "") for entry in growth])
              for name, css in names if name in first]
    series.append(Series("full, as the bytes read would allow", "ideal",
                         [(entry["context"], entry["allowed"], "") for entry in growth], dots=False))
    x = Axis.doubling("tokens of context", lengths)
    y = Axis.round("time per token, x first", [0.0, *(p[1] for each in series for p in each.points)], "{:g}".format)
    return chart("Time per token against context", series, x, y) + legend(series)


def output_chart(growth: list[dict]) -> Markup:
    """Draw milliseconds per token against the length of the output.

    growth: the entry "output" of the growth that `training.benchmark` measured.
    """
    series = [Series(name, name, [(entry["output"], entry[name], "") for entry in growth])
              for name in ("full", "verified")]
    y = Axis.round("milliseconds a token", [0.0, *(p[1] for each in series for p in each.points)], "{:g}".format)
    return (chart("Time per token against output", series,
                  Axis.doubling("tokens of output", [entry["output"] for entry in growth]), y) + legend(series))


def speed_bars(rows: dict[str, dict]) -> Markup:
    """Draw a bar for the speed of each contender of the benchmark, the fastest first. Returns a <ul> element."""
    longest = max(row["tokens_per_second"] for row in rows.values())
    return Markup('<ul class="bars">') + Markup("").join(
        _bar(name, row, row["tokens_per_second"] / longest) for name, row in _fastest_first(rows)) + Markup("</ul>")


def _fastest_first(rows: dict[str, dict]) -> Sequence[tuple[str, dict]]:
    return sorted(rows.items(), key=lambda named: -named[1]["tokens_per_second"])


def _bar(name: str, row: dict, share: float) -> Markup:
    return Markup('<li class="{}"><span>{} <small>{} identical</small></span><b>{}</b><i style="width:{}"></i></li>'
                  ).format(kind_of(name), name.replace("no,", "off,"), percent(row["sequence_match"], 0),
                           fixed(row["tokens_per_second"], 1), percent(share))


def _percent(value: float) -> str:
    return percent(value, 0)
