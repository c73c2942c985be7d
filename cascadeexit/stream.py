"""TokenStream: a race as lines of JSON. The page draws them, a file keeps them, a test reads them.

Lines by `type`, one record a line, in order of time:

    model    format, model, layers, exits [{layer, depth}], trained, colours
    run      run (its id), mode, greedy, thresholds, tolerance (of verified), prompt_tokens, max_new_tokens, settings
             (as chosen on the page)
    token    side ('cascade' or 'full'), i (position), id, status (emitted, draft, accepted, rejected); if not rejected
             text, exit (0 the first, -1 copied from earlier in the text), t (engine seconds), conf (of each exit, null
             = not asked), read (weights read, in tokens of the full model); ms since the token before; special where it
             holds; for a piece of a character its bytes (in hexadecimal), and part when later tokens finish it
    text     side, i, text: what a cut character at the end turned out to be
    stats    side, seconds, done and the fields of metrics.RunStats, so far
    versus   n, speedup, positional, rolling, first_divergence: one text beside the other, so far
    end      agreement, positional, first_divergence, sequence, identical, differs [positions where the full model
             would have said something else after the same text]
    stopped  a visitor stopped it
    error    message

A page takes two more that no record holds: `replay` before a recorded stream, `status` while a run is prepared.

Every number comes from `metrics`, so the page and the benchmark cannot disagree about what a word means.
"""

import copy
import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from cascadeexit import metrics
from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.events import Status, TokenEvent
from cascadeexit.inspection import Inspection
from cascadeexit.shape import Shape

CASCADE, FULL = "cascade", "full"           # the two sides of a race
FORMAT = 1                                  # of the stream; a reader refuses what it does not know
FRAME_SECONDS, STATS_SECONDS = 0.07, 0.2    # the browser redraws whole frames: more of them only cost time
ROLLING = 32                                # positions in the moving match rate
_BROKEN = "\ufffd"                          # how decoders show an unfinished or invalid UTF-8 sequence

# Paul Tol's "light" scheme, shallow to deep: black text on each is readable, also for colour-blind eyes.
_DEPTH_COLOURS = ("#99DDFF", "#77AADD", "#44BB99", "#BBCC33", "#EEDD88", "#EE8866")
_FULL_COLOUR = "#DDDDDD"
COPIED_COLOUR = "#FFAABB"                   # as in app.css


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


# How byte-level tokenizers write bytes: those of printable Latin letters as themselves, the others moved up.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(b): b for b in _PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - {*_PLAIN}))}


def token_bytes(tokenizer, token_id: int) -> bytes:
    """The bytes that a token stands for, also where they are no whole character."""
    word = tokenizer.convert_ids_to_tokens(token_id)
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", word):                # byte fallback
        return bytes.fromhex(word[3:5])
    if _BROKEN in tokenizer.decode([token_id]) and set(word) <= set(_BYTES):
        return bytes(_BYTES[c] for c in word)
    return tokenizer.decode([token_id]).encode("utf-8", "replace")


class _Side:
    """One stream of events, on its way to text."""

    def __init__(self, tokenizer):
        self.decoder = TextDecoder(tokenizer)
        self.ahead: TextDecoder | None = None       # runs ahead of `decoder` on tokens that are not final yet
        self.drafts: dict[int, int] = {}            # the first path of drafts, which is the one to show: place -> token
        self.events: list[TokenEvent] = []
        self.final: list[TokenEvent] = []

    @property
    def ids(self) -> list[int]:
        return [e.token_id for e in self.final]

    def shows(self, event: TokenEvent) -> bool:
        """False for drafts beside the first path, which come and go unseen; for those of it, once each way."""
        if event.status is Status.DRAFT:
            if event.index != len(self.final) + len(self.drafts):
                return False
            self.drafts[event.index] = event.token_id
        elif event.status is Status.REJECTED:
            if self.drafts.get(event.index) != event.token_id:
                return False
            del self.drafts[event.index]
        return True

    def piece(self, event: TokenEvent) -> str:
        """This event's text: for good when it is final, a first guess when it is a draft."""
        self.events.append(event)
        if event.final:
            self.ahead = None
            self.final.append(event)
            self.drafts.pop(event.index, None)
            return self.decoder.push(event.token_id)
        if event.status is Status.REJECTED:
            return ""
        self.ahead = self.ahead or copy.copy(self.decoder)
        return self.ahead.push(event.token_id)


class TokenStream:
    """A race as one string of JSON lines that only grows: the page's input, and a record of the run.

    The string is ASCII and has no '<', so it survives any transport; read in pieces or whole, it says the same.

    Args:
        settings: what the visitor chose, kept in the record as it is: it must survive JSON.
    """

    def __init__(self, engine: Engine, tokenizer, config: DecodeConfig, prompt_ids: Sequence[int],
                 settings: dict | None = None):
        self.config, self.prompt_ids, self.shape = config, list(prompt_ids), Shape.of(engine)
        self._costs, self._eos = engine.costs_for(config), engine.model.eos_ids     # not the engine: pages keep many
        self.run = uuid.uuid4().hex[:12]
        self.sides = {CASCADE: _Side(tokenizer), FULL: _Side(tokenizer)}
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.all_special_ids)
        self.text = model_line(self.shape)
        self._write("run", run=self.run, mode=config.mode, greedy=config.temperature == 0,
                    thresholds=engine.thresholds(config), prompt_tokens=len(self.prompt_ids),
                    max_new_tokens=config.max_new_tokens, tolerance=config.tolerance, settings=settings or {})

    def add(self, name: str, event: TokenEvent) -> None:
        """One more event of the side with this name."""
        side = self.sides[name]
        if not side.shows(event):
            side.events.append(event)
            return
        piece = side.piece(event)
        record = dict(side=name, i=event.index, id=event.token_id, status=event.status)
        if event.status is not Status.REJECTED:
            record |= dict(text=piece, exit=event.exit, t=event.seconds, conf=event.confidences,
                           read=event.weight_bytes / self._costs.full_token_bytes)
        if event.final and len(side.final) > 1:
            record["ms"] = 1000 * metrics.token_seconds(side.final[-2:])[0]
        if event.token_id in self._special:
            record["special"] = True
        elif event.final and _BROKEN in self._tokenizer.decode([event.token_id]):
            record["bytes"] = token_bytes(self._tokenizer, event.token_id).hex()
            if side.decoder.holding:
                record["part"] = True       # a later token finishes its character
        self._write("token", **_rounded(record))

    def add_stats(self) -> None:
        """The numbers so far, of both sides, and how far their texts are the same."""
        speed = {}
        for name, side in self.sides.items():
            if side.final:
                stats = metrics.summarize(side.events, self._costs)
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
                or side.final[-1].token_id in self._eos)

    def close_text(self) -> None:
        """Both sides are done: give each last token the text held back for it, and the final numbers."""
        for name, side in self.sides.items():
            rest = side.decoder.flush()
            if rest:
                self._write("text", side=name, i=side.final[-1].index, text=rest)
        self.add_stats()

    def end(self, seen: Inspection) -> None:
        """The verdict, by what the full model would say after each prefix of the left text."""
        ours, theirs = (side.ids for side in self.sides.values())
        match, choices = metrics.match(ours, theirs), seen.full_choices
        greedy = self.config.temperature == 0
        lossless = self.config.mode is Mode.VERIFIED and not self.config.tolerance      # sampled, too: same seed
        self._write("end", agreement=_rounded(metrics.agreement(ours, choices)),
                    positional=_rounded(match.positional), first_divergence=match.first_divergence,
                    sequence=match.sequence, identical=match.sequence if lossless else None,
                    differs=[i for i, (a, b) in enumerate(zip(ours, choices)) if a != b] if greedy else [])

    def fail(self, message: str) -> None:
        self.text += error_line(message)

    def _write(self, type: str, **record) -> None:
        self.text += write_line(type, **record)


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

def model_line(shape: Shape) -> str:
    """What runs here, as the first line of a stream; alone, it is a stream in which nothing has run yet."""
    exits = [dict(layer=layer, depth=round(layer / shape.num_layers, 4)) for layer in shape.exit_layers]
    return write_line("model", format=FORMAT, model=shape.name, layers=shape.num_layers, exits=exits,
                      trained=shape.trained, colours=colours(len(exits)))


def status_line(message: str) -> str:
    """What the server is doing before a run can begin; no part of a record."""
    return write_line("status", message=message)


def replay_line() -> str:
    """Before a recorded stream: draw it at the pace at which it happened."""
    return write_line("replay")


def error_line(message: str) -> str:
    """Alone: a run that could not begin. At the end of a stream: one that broke off."""
    return write_line("error", message=message)


def stopped(text: str) -> str:
    """The stream of a run that somebody stopped: what was said stays. No change when nothing was running."""
    try:
        kind = json.loads(text.rstrip("\n").rpartition("\n")[2])["type"]
    except (ValueError, KeyError, TypeError):
        return text
    return text if kind in ("model", "end", "stopped", "error", "status") else text + write_line("stopped")


def write_line(type: str, **record) -> str:
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
