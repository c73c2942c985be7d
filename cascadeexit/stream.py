"""TokenStream: a run as lines of text. The page shows them, a file stores them, and tests read them.

Each line is one record. Records come in the order of time. `cascadeexit.wire` writes a record as a line. A side is one
of the texts of the run. These are the types of records and their fields; {...} is an object, and [...] a list:

    model    format, model (name), layers (number), exits [{layer, depth}], trained, colours
    run      run (its id), sides [{name, mode, thresholds, tolerance, title}] in the order of the panels, the full model
             last; mode, thresholds and tolerance of the first side; greedy, prompt_tokens (number), max_new_tokens,
             settings (as chosen on the page), machine (one line of text), date (YYYY-MM-DD)
    reading  side, read, total: `read` of the `total` tokens before the text were read so far
    token    side, i (position), id, status (emitted, draft, accepted, rejected).
             All but rejected tokens have: text; exit (0 is the first exit, -1 means copied from earlier in the text);
             t (engine time in seconds); conf (confidence of each exit, null if it was not computed).
             Final tokens (emitted or accepted) have: read (weights read since the final token before, drafting and
             verification included; 1 is what the full model reads for one token).
             Some tokens have: ms (milliseconds since the token before); ran [[first, end, rows]] (since the event
             before, the segments `first` to `end` - 1 ran for `rows` positions); special (true for a special token);
             bytes (hexadecimal, for a part of a character); part (true if a later token completes the character)
    checked  side, i, ids: the full model's choices at positions i, i + 1, ..., which were computed together with layers
             that exits had skipped
    tree     side, i (position of the first draft), drafts [[id, text, parent, p, exit, accepted]]: all drafts of a
             verification pass, after the pass. parent is the index of the draft that this draft follows, or -1; p is
             the estimated probability that it follows its parent, or null
    text     side, i, text: text of an incomplete character at the end, whose last token is at position i
    stats    side, seconds, done, and the fields of `metrics.RunStats`: statistics so far
    versus   side, n, speedup, positional, rolling, first_divergence: comparison of the first n tokens of this side with
             those of the full model; rolling is the positional match of the newest 32 of them
    end      side, and results about its whole text:
             agreement (null if tokens are sampled); positional (null if there is nothing to compare with);
             first_divergence; sequence (true if both texts are equal, null if one is not complete);
             identical (the same, but null for a fork and for a mode that is not lossless);
             differs [positions at which the full model would choose another token after the same text];
             moments [{i, said, full, p_said, p_full, id}] (the worst of these positions, as in `Inspection.moments`);
             loops {start, period, share} if the text ends in a loop, else null.
             If tokens are sampled, differs and moments are []
    fork     side, of, at, id, text, title: a new side that continues side `of`. The text before position `at` is that
             of side `of`. The token at position `at` is the one that the visitor chose; it has this id and text. The
             settings are those of side `of`, or those of the first side if `of` is the full model's text
    spread   side, speedups, tokens: the speed-up in each short repeat of the run; a repeat has at most `tokens` tokens
    stopped  the visitor stopped the run; its texts may still be checked afterwards
    error    message

The page gets two more types of records, which are never saved. `replay` comes before a recorded stream. `status` says
what the server does. All statistics come from `metrics`, so the page and the benchmark use the same definitions.
"""

import datetime
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from cascadeexit import machine, metrics
from cascadeexit.config import Mode
from cascadeexit.engine import Engine
from cascadeexit.events import Status, TokenEvent
from cascadeexit.inspection import Inspection
from cascadeexit.repetition import find_loop
from cascadeexit.shape import Shape
from cascadeexit.sides import FULL, Side, SideText
from cascadeexit.text import BROKEN, token_bytes
from cascadeexit.wire import expand, write_line

FORMAT = 1                                  # of the stream; a reader refuses what it does not know
FRAME_SECONDS, STATS_SECONDS = 0.07, 0.5    # shorter intervals look the same and cost time and bytes
MOMENTS = 20                                # largest number of `moments` in the record `end`
ROLLING = 32                                # positions in the moving match rate

# One ramp from light to dark, after ColorBrewer's YlGnBu, so that colour reads as depth, also for colour-blind readers.
# Black text has a contrast of at least 7:1 on each. Tokens of the full model have no background.
_DEPTH_COLOURS = ("#FFF2A8", "#C3E8A9", "#83D3B4", "#5BBFC8", "#55A5D6", "#7F98DB")
_FULL_COLOUR = "#DDDDDD"
COPIED_COLOUR = "#F2C4D8"                   # as in app.css


def colours(num_exits: int) -> tuple[str, ...]:
    """Return a colour for each exit and, last, for the full model, as '#RRGGBB'.

    Exits beyond the end of the palette have its last colour.
    """
    last = len(_DEPTH_COLOURS) - 1
    return (*(_DEPTH_COLOURS[min(s, last)] for s in range(num_exits)), _FULL_COLOUR)


class TokenStream:
    """A run as one growing string of lines. The page shows this string, and a file stores it.

    The result is the same whether the string is read piece by piece or at once.

    Args:
        sides: the sides in the order of the panels. The side `FULL` is the one with which all others are compared.
        prompt_ids: token ids of the prompt.
        settings: what the visitor chose, from `Settings.record`; None for nothing. It is written to the stream.
    """

    def __init__(self, engine: Engine, tokenizer, sides: Sequence[Side], prompt_ids: Sequence[int],
                 settings: dict | None = None):
        # Not the engine: a page keeps many streams, and models must be freed meanwhile.
        config = sides[0].config
        self.shape, self._costs, self.eos_ids = Shape.of(engine), engine.costs_for(config), engine.model.eos_ids
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.all_special_ids)
        self.run = uuid.uuid4().hex[:12]
        self.prompt_ids = list(prompt_ids)
        self.sides = {side.name: SideText(tokenizer, side, prompt_ids) for side in sides}
        described = [dict(name=side.name, title=side.title, mode=side.config.mode, tolerance=side.config.tolerance,
                          thresholds=engine.thresholds(side.config)) for side in sides]
        self.text = model_line(self.shape)
        self._write("run", run=self.run, sides=described, mode=config.mode, greedy=config.temperature == 0,
                    thresholds=engine.thresholds(config), prompt_tokens=len(self.prompt_ids),
                    max_new_tokens=config.max_new_tokens, tolerance=config.tolerance, settings=settings or {},
                    machine=machine.describe(engine.model.device), date=datetime.date.today().isoformat())

    # -- while texts are written ----------------------------------------------------------------------------------

    def add(self, name: str, event: TokenEvent) -> None:
        """Append the records of an event that the engine made for the side with this name."""
        side = self.sides[name]
        if event.status is Status.READING:
            total = len(side.read_ids)
            self._write("reading", side=name, read=total + event.index, total=total)
            return
        event = side.placed(event)
        tree = side.tree(event)
        if side.shows(event):
            self._write_token(side, event)
        else:
            side.events.append(event)
            side.unwritten += event.spans
            side.unread += event.weight_bytes
        if event.checked:
            self._write("checked", side=name, i=event.index - len(event.checked), ids=list(event.checked))
        if tree:
            self._write("tree", side=name, i=tree[0][0].index, drafts=[self._draft(*draft) for draft in tree])

    def _draft(self, draft: TokenEvent, accepted: bool) -> list:
        return [draft.token_id, self._tokenizer.decode([draft.token_id]), draft.parent, rounded(draft.probability, 4),
                draft.exit, accepted]

    def _write_token(self, side: SideText, event: TokenEvent) -> None:
        record = dict(side=side.side.name, i=event.index, id=event.token_id, status=event.status, text=side.add(event))
        spans, side.unwritten = side.unwritten + event.spans, ()
        side.unread += event.weight_bytes
        if event.status is Status.REJECTED:
            del record["text"]
            side.unwritten = spans          # of a pass without accepted drafts: its last event brings them
        else:
            record |= dict(exit=event.exit, t=event.seconds, conf=event.confidences, ran=spans)
        if event.final:                     # the first final token of a pass is charged with its drafts, too
            record["read"], side.unread = side.unread / self._costs.full_token_bytes, 0
        if event.final and event.index > side.start:
            record["ms"] = 1000 * metrics.token_seconds(side.final[-2:])[0]
        if event.token_id in self._special:
            record["special"] = True
        elif event.final and BROKEN in self._tokenizer.decode([event.token_id]):
            record["bytes"] = token_bytes(self._tokenizer, event.token_id).hex()
            if side.decoder.holding:
                record["part"] = True       # a later token completes its character
        self._write("token", **record)

    def add_stats(self, names: Iterable[str] | None = None) -> None:
        """Append the statistics of these sides so far, and the comparison of each with the full model's text.

        names: names of the sides; None for all sides.
        """
        names = self.sides if names is None else names
        for name in names:
            side = self.sides[name]
            if len(side.ids) > side.start:
                self._write("stats", side=name, seconds=round(side.final[-1].seconds, 5), done=self._done(side),
                            **rounded(asdict(metrics.summarize(side.decoded, self._costs))))
        for name in names:
            self._write_versus(name)

    def _write_versus(self, name: str) -> None:
        """Append the comparison of a side's text with the full model's text, up to the length of the shorter one."""
        if name == FULL or FULL not in self.sides:
            return
        ours, theirs = self.sides[name].ids, self.sides[FULL].ids
        n = min(len(ours), len(theirs))
        if n:
            so_far = metrics.match(ours[:n], theirs[:n])
            recent = metrics.match(ours[max(0, n - ROLLING):n], theirs[max(0, n - ROLLING):n])
            speeds = [metrics.tokens_per_second([e for e in self.sides[s].decoded if e.final]) for s in (name, FULL)]
            self._write("versus", side=name, n=n, speedup=rounded(speeds[0] / speeds[1]) if all(speeds) else None,
                        positional=rounded(so_far.positional), rolling=rounded(recent.positional),
                        first_divergence=so_far.first_divergence)

    def _done(self, side: SideText) -> bool:
        """Return True if a side's text is complete."""
        return len(side.ids) > side.start and (len(side.ids) - side.start == side.side.config.max_new_tokens
                                               or side.final[-1].token_id in self.eos_ids)

    # -- after that -----------------------------------------------------------------------------------------------

    def close_text(self) -> None:
        """Close each open side: append a `text` record if its last character is incomplete, and a `stats` record."""
        names = [name for name, side in self.sides.items() if not side.closed]
        for name in names:
            side = self.sides[name]
            rest, side.closed = side.decoder.flush(), True
            if rest:
                self._write("text", side=name, i=side.final[-1].index, text=rest)
        self.add_stats(names)

    def end(self, name: str, inspection: Inspection) -> None:
        """Append a side's `end` record: how its text compares with the full model's choices and the full model's text.

        inspection: inspection of the side's final tokens. It has the full model's choice at each position.
        """
        side, config = self.sides[name], self.sides[name].side.config
        whole = FULL in self.sides and self._done(side) and self._done(self.sides[FULL])
        theirs = self.sides[FULL].ids if FULL in self.sides else []
        n = None if whole else min(len(side.ids), len(theirs))
        match = metrics.match(side.ids[:n], theirs[:n])
        pairs = [(e.index, e.token_id, choice) for e, choice in zip(side.final, inspection.full_choices)
                 if e.index >= side.start]                          # a token that a visitor chose is no choice of ours
        greedy, lossless = config.temperature == 0, config.mode is Mode.VERIFIED and not config.tolerance
        loop = find_loop(side.ids)
        agreement = metrics.agreement([token for _, token, _ in pairs], [choice for _, _, choice in pairs])
        self._write("end", side=name, agreement=rounded(agreement) if greedy else None,
                    positional=None if n == 0 else rounded(match.positional), first_divergence=match.first_divergence,
                    sequence=match.sequence if whole else None,
                    identical=match.sequence if whole and lossless and not side.start else None,
                    differs=[i for i, token, choice in pairs if token != choice] if greedy else [],
                    moments=self._moments(side, inspection) if greedy else [],
                    loops=rounded(loop._asdict()) if loop else None)

    def _moments(self, side: SideText, inspection: Inspection) -> list[dict]:
        """Return the positions at which a side's decoded text departs furthest from the full model's choice.

        The form is that of `Inspection.moments`. Positions are counted from the beginning of the text.
        """
        found = inspection.moments(self._tokenizer, side.final, MOMENTS + 1)
        found = [moment | {"i": moment["i"] + len(side.before)} for moment in found]
        return [moment for moment in found if moment["i"] >= side.start][:MOMENTS]

    def fork(self, side: Side, of: str, chosen: TokenEvent) -> None:
        """Add a fork: a new text that copies another text of the run up to one token, replaces it, and goes on.

        Args:
            side: the new text.
            of: name of the text that is copied.
            chosen: event of the new token, at its position in the text.
        """
        before = self.sides[of].ids[:chosen.index]
        self.sides[side.name] = SideText(self._tokenizer, side, self.prompt_ids, of, before, chosen)
        self._write("fork", side=side.name, of=of, at=chosen.index, id=chosen.token_id,
                    text=self._tokenizer.decode([chosen.token_id]), title=side.title)
        self._write_token(self.sides[side.name], chosen)

    def spread(self, name: str, speedups: Sequence[float], tokens: int) -> None:
        """Append the speed-ups of a side in short repeats of the run.

        tokens: largest number of tokens in a repeat.
        """
        self._write("spread", side=name, speedups=rounded(list(speedups), 3), tokens=tokens)

    def status(self, message: str) -> None:
        """Append a line that says what the server does now."""
        self.text += status_line(message)

    def stop(self) -> None:
        """Append a line that says that the visitor stopped the run."""
        self.text = stopped(self.text)

    def fail(self, message: str) -> None:
        """Append an `error` record with this message: the run failed."""
        self.text += error_line(message)

    def _write(self, type: str, **record) -> None:
        self.text += write_line(type, **record)


def frames(stream: TokenStream, contest: Iterable[tuple[str, TokenEvent]]) -> Iterator[str]:
    """Add the events of a race to a stream. Yields the stream's text for the page.

    Yields at the first event. Later it yields at an event if `FRAME_SECONDS` have passed since the last yield.

    contest: events of the race, as (name of the side, event).
    """
    next_frame, names = 0.0, {}
    next_stats = time.monotonic() + STATS_SECONDS
    for name, event in contest:
        stream.add(name, event)
        names[name] = None
        now = time.monotonic()
        if now >= next_stats:
            stream.add_stats(names)
            next_stats = now + STATS_SECONDS
        if now >= next_frame:
            yield stream.text
            next_frame = now + FRAME_SECONDS


# -- single lines -------------------------------------------------------------------------------------------

def model_line(shape: Shape, label: str = "") -> str:
    """Return the first line of a stream, which describes the model. Before any run, the page shows only this line.

    label: name of the model on the menu; "" if it is the name in `shape`.
    """
    exits = [dict(layer=layer, depth=round(layer / shape.num_layers, 4)) for layer in shape.exit_layers]
    return write_line("model", format=FORMAT, model=label or shape.name, layers=shape.num_layers, exits=exits,
                      trained=shape.trained, colours=colours(len(exits)))


def status_line(message: str) -> str:
    """Return a line that tells the visitor what the server does. This line is never saved in a file."""
    return write_line("status", message=message)


def replay_line() -> str:
    """Return the line to put before a recorded stream, so that the page plays it at the speed of the recorded run."""
    return write_line("replay")


def error_line(message: str) -> str:
    """Return a line that reports an error.

    As the only line it means that no run began. After other lines it means that the run failed.
    """
    return write_line("error", message=message)


def stopped(text: str) -> str:
    """Add the record `stopped`, which means that the visitor stopped the run, to the text of a stream.

    Returns the new text. If no run is in progress, returns the text unchanged.
    """
    for line in reversed(text.splitlines()):
        try:
            kind = expand(line)["type"]
        except (ValueError, KeyError, TypeError):
            return text
        if kind != "status":
            return text if kind in ("model", "end", "spread", "stopped", "error") else text + write_line("stopped")
    return text


def rounded(value, digits: int = 5):
    """Return a value with its floats rounded to as many digits as the page can show.

    Floats inside lists, tuples and dicts are rounded, too. Tuples become lists.

    digits: number of decimal places.
    """
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, (tuple, list)):
        return [rounded(v, digits) for v in value]
    return {k: rounded(v, digits) for k, v in value.items()} if isinstance(value, dict) else value
