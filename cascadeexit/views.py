"""Views: what a run looks like. TokenEvents become text, a stream of JSON lines, and Plotly figures.

It knows tokens, numbers and colours; it knows no page and no server. Every number comes from `metrics`, so
the page and the benchmark cannot disagree about what a word means.
"""

import copy
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import plotly.graph_objects as go

from cascadeexit import metrics
from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.events import Status, TokenEvent

CASCADE, FULL = "cascade", "full"           # the two sides of a race
FORMAT = 1                                  # of the stream; a reader refuses what it does not know
FRAME_SECONDS, STATS_SECONDS = 0.07, 0.2    # the browser redraws whole frames: more of them only cost time
ROLLING = 32                                # positions in the moving match rate
_BROKEN = "\ufffd"                          # how decoders show an unfinished or invalid UTF-8 sequence

# Paul Tol's "light" scheme, shallow to deep: black text on each is readable, also for colour-blind eyes.
_DEPTH_COLOURS = ("#99DDFF", "#77AADD", "#44BB99", "#BBCC33", "#EEDD88", "#EE8866")
_FULL_COLOUR = "#DDDDDD"
_OUTLINE = "#7D838C"                        # visible on a light and on a dark page


def colours(num_exits: int) -> tuple[str, ...]:
    """One colour per segment; exits beyond the palette share its last colour, the full model is grey."""
    last = len(_DEPTH_COLOURS) - 1
    return (*(_DEPTH_COLOURS[min(s, last)] for s in range(num_exits)), _FULL_COLOUR)


class TextDecoder:
    """Token ids in, text pieces out, such that the pieces add up to what the tokenizer decodes for them all.

    A token that ends inside a character gets '', and the token that completes the character brings its text.
    (Tokenizers with byte fallback rewrite a character when invalid bytes follow it; that is not undone.)
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []   # the last finished tokens: decoders treat the first of a text apart
        self._held: list[int] = []      # tokens whose text is not finished

    @property
    def holding(self) -> bool:
        return bool(self._held)

    def push(self, token_id: int) -> str:
        # New lists, never changed in place: a shallow copy of a decoder can run ahead on drafts.
        self._held = [*self._held, token_id]
        piece = self._pending()
        if piece.endswith(_BROKEN):
            return ""
        self._context, self._held = self._held, []
        return piece

    def flush(self) -> str:
        """The text of an unfinished end; '' when there is none."""
        piece, self._held = self._pending() if self._held else "", []
        return piece

    def _pending(self) -> str:
        return self._decode(self._context + self._held)[len(self._decode(self._context)):]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class _Side:
    """One stream of events, on its way to text."""

    def __init__(self, tokenizer):
        self.decoder = TextDecoder(tokenizer)
        self.ahead: TextDecoder | None = None       # runs ahead of `decoder` on tokens that are not final yet
        self.events: list[TokenEvent] = []
        self.final: list[TokenEvent] = []

    @property
    def ids(self) -> list[int]:
        return [e.token_id for e in self.final]

    def piece(self, event: TokenEvent) -> str:
        """This event's text: for good when it is final, a first guess when it is a draft."""
        self.events.append(event)
        if event.final:
            self.ahead = None
            self.final.append(event)
            return self.decoder.push(event.token_id)
        if event.status is Status.REJECTED:
            return ""
        self.ahead = self.ahead or copy.copy(self.decoder)
        return self.ahead.push(event.token_id)


class TokenStream:
    """A race as one string of JSON lines that only grows: the page's input, and a record of the run.

    Lines by `type`: model, run, token, text, stats, versus, then one of end, stopped, error. The string is
    ASCII and has no '<', so it survives any transport; read in pieces or whole, it says the same.
    """

    def __init__(self, engine: Engine, tokenizer, config: DecodeConfig, num_prompt_tokens: int):
        self.engine, self.config = engine, config
        self.sides = {CASCADE: _Side(tokenizer), FULL: _Side(tokenizer)}
        self._special = frozenset(tokenizer.all_special_ids)
        self.text = model_line(engine)
        self._write("run", run=uuid.uuid4().hex[:12], mode=config.mode, greedy=config.temperature == 0,
                    thresholds=config.threshold_per_exit(engine.num_exits), prompt_tokens=num_prompt_tokens,
                    max_new_tokens=config.max_new_tokens)

    def add(self, name: str, event: TokenEvent) -> None:
        """One more event of the side with this name."""
        side = self.sides[name]
        piece = side.piece(event)
        record = dict(side=name, i=event.index, id=event.token_id, status=event.status)
        if event.status is not Status.REJECTED:
            record |= dict(text=piece, exit=event.exit, t=event.seconds, conf=event.confidences)
        if event.final and len(side.final) > 1:
            record["ms"] = 1000 * metrics.token_seconds(side.final[-2:])[0]
        if event.token_id in self._special:
            record["special"] = True
        elif event.final and side.decoder.holding:
            record["part"] = True           # a later token finishes its character
        self._write("token", **_rounded(record))

    def add_stats(self) -> None:
        """The numbers so far, of both sides, and how far their texts are the same."""
        speed = {}
        for name, side in self.sides.items():
            if side.final:
                stats = metrics.summarize(side.events, self.engine.costs)
                speed[name] = stats.tokens_per_second
                self._write("stats", side=name, seconds=round(side.final[-1].seconds, 5),
                            done=self._done(side), **_rounded(asdict(stats)))
        ours, theirs = (side.ids for side in self.sides.values())
        n = min(len(ours), len(theirs))
        if n:
            so_far = metrics.match(ours[:n], theirs[:n])
            recent = metrics.match(ours[max(0, n - ROLLING):n], theirs[max(0, n - ROLLING):n])
            speedup = speed[CASCADE] / speed[FULL] if all(speed.values()) else None
            self._write("versus", n=n, speedup=_rounded(speedup), positional=_rounded(so_far.positional),
                        rolling=_rounded(recent.positional), first_divergence=so_far.first_divergence)

    def _done(self, side: _Side) -> bool:
        return (len(side.final) == self.config.max_new_tokens
                or side.final[-1].token_id in self.engine.model.eos_ids)

    def close_text(self) -> None:
        """Both sides are done: give each last token the text held back for it, and the final numbers."""
        for name, side in self.sides.items():
            rest = side.decoder.flush()
            if rest:
                self._write("text", side=name, i=side.final[-1].index, text=rest)
        self.add_stats()

    def end(self, full_choices: Sequence[int]) -> None:
        """The verdict. `full_choices`: what the full model would say after each prefix of the left text."""
        ours, theirs = (side.ids for side in self.sides.values())
        match = metrics.match(ours, theirs)
        lossless = self.config.mode is Mode.VERIFIED and self.config.temperature == 0
        self._write("end", agreement=_rounded(metrics.agreement(ours, full_choices)),
                    positional=_rounded(match.positional), first_divergence=match.first_divergence,
                    sequence=match.sequence, identical=match.sequence if lossless else None)

    def fail(self, message: str) -> None:
        self.text += error_line(message)

    def _write(self, type: str, **record) -> None:
        self.text += _line(type, **record)


def frames(stream: TokenStream, contest: Iterable[tuple[str, TokenEvent]]) -> Iterator[str]:
    """Feed a race to a stream; yields its text when a frame is due, and for the first token at once."""
    next_frame = 0.0
    next_stats = time.monotonic() + STATS_SECONDS
    for name, event in contest:
        stream.add(name, event)
        now = time.monotonic()
        if now >= next_stats:
            stream.add_stats()
            next_stats = now + STATS_SECONDS
        if now >= next_frame:
            yield stream.text
            next_frame = now + FRAME_SECONDS


# -- single lines -------------------------------------------------------------------------------------------

def model_line(engine: Engine) -> str:
    """What runs here, as the first line of a stream; alone, it is a stream in which nothing has run yet."""
    layers = engine.model.exit_layers
    exits = [dict(layer=layer, depth=round(depth, 4)) for layer, depth in zip(layers, engine.costs.depths)]
    return _line("model", format=FORMAT, model=engine.model.name, layers=engine.model.num_layers, exits=exits,
                 trained=engine.bank.config.trained, colours=colours(engine.num_exits))


def error_line(message: str) -> str:
    """Alone: a run that could not begin. At the end of a stream: one that broke off."""
    return _line("error", message=message)


def stopped(text: str) -> str:
    """The stream of a run that somebody stopped: what was said stays. No change when nothing was running."""
    try:
        kind = json.loads(text.rstrip("\n").rpartition("\n")[2])["type"]
    except (ValueError, KeyError, TypeError):
        return text
    return text if kind in ("model", "end", "stopped", "error") else text + _line("stopped")


def exit_name(s: int, engine: Engine) -> str:
    """Plain words for segment s."""
    if s == engine.num_exits:
        return "Full model"
    return f"Exit {s + 1} (after layer {engine.model.exit_layers[s]} of {engine.model.num_layers})"


def _line(type: str, **record) -> str:
    # ASCII escapes carry lone surrogates safely; '<' is escaped so that no value can look like markup.
    text = json.dumps({"type": type, **record}, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c") + "\n"


def _rounded(value):
    """Floats in any nesting, to as many digits as a page can show."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, (tuple, list)):
        return [_rounded(v) for v in value]
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


# -- figures of a finished run ------------------------------------------------------------------------------

def figures(stream: TokenStream, full_choices: Sequence[int]) -> list[go.Figure]:
    """All of them, in the order in which the page shows them."""
    return [routing_figure(stream), latency_figure(stream), confidence_figure(stream, full_choices)]


def routing_figure(stream: TokenStream) -> go.Figure:
    """Which exit wrote how much of the text."""
    engine, final = stream.engine, stream.sides[CASCADE].final
    share = metrics.routing_share(final, engine.model.num_segments)
    names = [exit_name(s, engine).partition(" (")[0] for s in range(len(share))]
    figure = go.Figure(go.Bar(
        x=share, y=names, orientation="h", cliponaxis=False,
        text=[f"{part:.1%}" for part in share], textposition="outside",
        marker=dict(color=colours(engine.num_exits), line=dict(color=_OUTLINE, width=1)),
        hovertemplate="%{y}: %{x:.1%} of the tokens<extra></extra>"))
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickformat=".0%", range=[0, 1.08])
    return _styled(figure, "Where the tokens left the model", legend=False)


def latency_figure(stream: TokenStream) -> go.Figure:
    """Milliseconds from each token to the next, both sides over the same axis."""
    figure = go.Figure()
    for side, name, line in ((FULL, "Full model", dict(color=_OUTLINE, width=1.5, dash="dot")),
                             (CASCADE, "With exits", dict(color="#3F8FC7", width=1.5))):
        waits = [1000 * s for s in metrics.token_seconds(stream.sides[side].final)]
        figure.add_scatter(x=list(range(1, len(waits) + 1)), y=waits, name=name, mode="lines", line=line,
                           hovertemplate="token %{x}: %{y:.1f} ms<extra>" + name + "</extra>")
    figure.update_xaxes(title="token")
    figure.update_yaxes(ticksuffix=" ms", rangemode="tozero")
    return _styled(figure, "How long each token took")


def confidence_figure(stream: TokenStream, full_choices: Sequence[int]) -> go.Figure:
    """How sure the exit was that wrote each token; crosses where the full model would have differed."""
    engine, figure = stream.engine, go.Figure()
    final, palette = stream.sides[CASCADE].final, colours(stream.engine.num_exits)
    for s in range(engine.num_exits):
        points = [e for e in final if e.exit == s]
        figure.add_scatter(
            x=[e.index for e in points], y=[e.confidences[s] for e in points],
            mode="markers", name=f"Exit {s + 1}",
            marker=dict(color=palette[s], size=8, line=dict(color=_OUTLINE, width=0.6)),
            hovertemplate="token %{x}: %{y:.0%} sure<extra>" + f"Exit {s + 1}</extra>")
    others = [e for e, choice in zip(final, full_choices)
              if e.exit < engine.num_exits and e.token_id != choice]
    figure.add_scatter(
        x=[e.index for e in others], y=[e.confidences[e.exit] for e in others], mode="markers",
        name="full model differs", marker=dict(color="#D55E00", size=8, symbol="x-thin-open", line_width=2),
        hovertemplate="token %{x}: the full model would say something else<extra></extra>")
    figure.update_xaxes(title="token")
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    return _styled(figure, "How sure the exits were")


def _styled(figure: go.Figure, title: str, legend: bool = True) -> go.Figure:
    """Readable on light and dark: nothing behind the marks, neutral lines; the page colours the text."""
    axis = dict(gridcolor="rgba(128,128,128,0.22)", zerolinecolor="rgba(128,128,128,0.45)", automargin=True)
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        title=dict(text=f"<b>{title}</b>", x=0, xref="container", y=0.97, yanchor="top", font=dict(size=14)),
        template="none", height=300, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family="IBM Plex Sans, system-ui, sans-serif", color=_OUTLINE, size=12),
        margin=dict(l=8, r=8, t=76, b=8), showlegend=legend,
        legend=dict(orientation="h", y=1.02, yanchor="bottom", x=0))
    return figure
