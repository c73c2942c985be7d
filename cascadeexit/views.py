"""Views: what a run looks like. TokenEvents become text, a stream of JSON lines, and Plotly figures.

It knows tokens, numbers and colours; it knows no page and no server. Every number comes from `metrics`, so the page
and the benchmark cannot disagree about what a word means.
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
    """Token ids in, text pieces out, such that the pieces add up to what the tokenizer decodes for all of them.

    A token that ends inside a character gets '' and its text comes with the token that completes the character.
    (Tokenizers with byte fallback rewrite a finished character when invalid bytes follow it; that is not undone.)
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []       # the last finished tokens: decoders treat the first token of a text apart
        self._held: list[int] = []          # tokens whose text is not finished

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

    def done(self, config: DecodeConfig, engine: Engine) -> bool:
        return len(self.final) == config.max_new_tokens or self.final[-1].token_id in engine.model.eos_ids

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

    Lines by `type`: model, run, token, text, stats, versus, then one of end, stopped, error. The string is ASCII and has
    no '<', so it survives any transport, HTML included; a reader may take it in pieces or whole, and gets the same.
    """

    def __init__(self, engine: Engine, tokenizer, config: DecodeConfig, num_prompt_tokens: int):
        self.engine, self.config = engine, config
        self.sides = {CASCADE: _Side(tokenizer), FULL: _Side(tokenizer)}
        self._special = frozenset(tokenizer.all_special_ids)
        self.text = model_line(engine)
        self._write("run", run=uuid.uuid4().hex[:12], mode=config.mode, greedy=config.temperature == 0,
                    thresholds=config.threshold_per_exit(engine.num_exits), prompt_tokens=num_prompt_tokens,
                    max_new_tokens=config.max_new_tokens)

    def add(self, side: str, event: TokenEvent) -> None:
        """One more event of one side."""
        state = self.sides[side]
        piece = state.piece(event)
        record = dict(side=side, i=event.index, id=event.token_id, status=event.status)
        if event.status is not Status.REJECTED:
            record |= dict(text=piece, exit=event.exit, t=round(event.seconds, 5),
                           conf=[c if c is None else round(c, 3) for c in event.confidences])
        if event.final and len(state.final) > 1:
            record["ms"] = round(1000 * metrics.token_seconds(state.final[-2:])[0], 2)
        if event.token_id in self._special:
            record["special"] = True
        elif event.final and state.decoder.holding:
            record["part"] = True           # its character is finished by a later token
        self._write("token", **record)

    def add_stats(self) -> None:
        """The numbers so far, of both sides, and how far their texts are the same."""
        for side, state in self.sides.items():
            if state.final:
                stats = metrics.summarize(state.events, self.engine.costs)
                self._write("stats", side=side, seconds=round(state.final[-1].seconds, 5), done=state.done(self.config, self.engine),
                            **_rounded(asdict(stats)))
        ours, theirs = (self.sides[s].ids for s in (CASCADE, FULL))
        n = min(len(ours), len(theirs))
        if n:
            so_far = metrics.match(ours[:n], theirs[:n])
            recent = metrics.match(ours[max(0, n - ROLLING):n], theirs[max(0, n - ROLLING):n])
            self._write("versus", n=n, speedup=self._speedup(), positional=round(so_far.positional, 4),
                        rolling=round(recent.positional, 4), first_divergence=so_far.first_divergence)

    def _speedup(self) -> float | None:
        """Tokens per second against the full model in the same race."""
        ours, theirs = (metrics.summarize(s.events, self.engine.costs).tokens_per_second for s in self.sides.values())
        return round(ours / theirs, 3) if ours and theirs else None

    def close_text(self) -> None:
        """Both sides are done: give the last token of each the text that was held back for it, and final numbers."""
        for side, state in self.sides.items():
            rest = state.decoder.flush()
            if rest:
                self._write("text", side=side, i=state.final[-1].index, text=rest)
        self.add_stats()

    def end(self, full_choices: Sequence[int]) -> None:
        """The verdict. `full_choices`: what the full model would say after each prefix of the cascade's own text."""
        ours, theirs = (self.sides[s].ids for s in (CASCADE, FULL))
        match = metrics.match(ours, theirs)
        agreement = metrics.agreement(ours, full_choices)
        lossless = self.config.mode is Mode.VERIFIED and self.config.temperature == 0
        self._write("end", agreement=agreement if agreement is None else round(agreement, 4),
                    positional=round(match.positional, 4), first_divergence=match.first_divergence,
                    sequence=match.sequence, identical=match.sequence if lossless else None)

    def fail(self, message: str) -> None:
        self.text += error_line(message)

    def _write(self, type: str, **record) -> None:
        self.text += _line(type, **record)


def frames(stream: TokenStream, contest: Iterable[tuple[str, TokenEvent]]) -> Iterator[str]:
    """Feed a race to a stream; yields its text when the page is due for another frame, the first token at once."""
    next_frame = 0.0
    next_stats = time.monotonic() + STATS_SECONDS
    for side, event in contest:
        stream.add(side, event)
        now = time.monotonic()
        if now >= next_stats:
            stream.add_stats()
            next_stats = now + STATS_SECONDS
        if now >= next_frame:
            yield stream.text
            next_frame = now + FRAME_SECONDS


# -- single lines -----------------------------------------------------------------------------------------------------

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


def _rounded(record: dict) -> dict:
    def short(value):
        if isinstance(value, float):
            return round(value, 5)
        return [short(v) for v in value] if isinstance(value, tuple) else value
    return {key: short(value) for key, value in record.items()}


# -- figures of a finished run ----------------------------------------------------------------------------------------

def routing_figure(stream: TokenStream) -> go.Figure:
    """Which exit wrote how much of the text."""
    engine, final = stream.engine, stream.sides[CASCADE].final
    share = metrics.routing_share(final, engine.model.num_segments)
    names = [exit_name(s, engine) for s in range(len(share))]
    figure = go.Figure(go.Bar(
        x=share, y=names, orientation="h", text=[f"{part:.0%}" for part in share], textposition="auto",
        marker=dict(color=colours(engine.num_exits), line=dict(color=_OUTLINE, width=1)),
        textfont=dict(color="#000000"), hovertemplate="%{y}: %{x:.1%} of the tokens<extra></extra>"))
    figure.update_yaxes(autorange="reversed", ticklabelstandoff=8)
    figure.update_xaxes(tickformat=".0%", range=[0, 1], title="part of the tokens")
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
    figure.update_yaxes(title="milliseconds", rangemode="tozero")
    return _styled(figure, "How long each token took")


def confidence_figure(stream: TokenStream, full_choices: Sequence[int]) -> go.Figure:
    """How sure the exit was that wrote each token; crosses where the full model would have said something else."""
    engine, figure = stream.engine, go.Figure()
    palette = colours(engine.num_exits)
    final = stream.sides[CASCADE].final
    for s in range(engine.num_exits):
        points = [(e.index, e.confidences[s], e.token_id == choice)
                  for e, choice in zip(final, full_choices) if e.exit == s]
        figure.add_scatter(
            x=[p[0] for p in points], y=[p[1] for p in points], mode="markers", name=f"Exit {s + 1}",
            marker=dict(color=palette[s], size=[8 if p[2] else 10 for p in points],
                        symbol=["circle" if p[2] else "x" for p in points], line=dict(color=_OUTLINE, width=1)),
            customdata=["the full model agrees" if p[2] else "the full model would differ" for p in points],
            hovertemplate="token %{x}: %{y:.0%} sure, %{customdata}<extra>" + f"Exit {s + 1}</extra>")
    figure.update_xaxes(title="token")
    figure.update_yaxes(title="confidence", range=[-0.03, 1.03], tickformat=".0%")
    return _styled(figure, "How sure the exits were (× = the full model would differ)")


def _styled(figure: go.Figure, title: str, legend: bool = True) -> go.Figure:
    """Readable on a light and on a dark page: nothing behind the marks, neutral lines; the page colours the text."""
    axis = dict(gridcolor="rgba(128,128,128,0.22)", zerolinecolor="rgba(128,128,128,0.45)", automargin=True)
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        title=dict(text=title, x=0, xref="paper", font=dict(size=14)), template="none", height=300, showlegend=legend,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font=dict(color=_OUTLINE, size=12),
        margin=dict(l=48, r=12, t=44, b=72), legend=dict(orientation="h", y=-0.28, x=0))
    return figure
