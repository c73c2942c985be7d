"""TokenStream: a race as lines of JSON. The page draws them, a file stores them, and tests read them.

Each line is one record, in order of time. Records by `type`:

    model    format, model, layers, exits [{layer, depth}], trained, colours
    run      run (its id), mode, greedy, thresholds, tolerance (of verified mode), prompt_tokens, max_new_tokens,
             settings (as chosen on the page)
    token    side ('cascade' or 'full'), i (position), id, status (emitted, draft, accepted, rejected).
             Unless rejected: text, exit (0 the first exit, -1 copied from earlier in the text), t (engine seconds),
             conf (confidence of each exit, null where it was not computed), read (weights read, as a multiple of what
             the full model reads for a token). Where they apply: ms since the token before; special; for a piece of a
             character its bytes (hexadecimal), and part when a later token completes the character
    text     side, i, text: how an incomplete character at the end of the text is shown
    stats    side, seconds, done and the fields of metrics.RunStats, so far
    versus   n, speedup, positional, rolling, first_divergence: the two texts compared, so far
    end      agreement, positional, first_divergence, sequence, identical, differs [positions where the full model
             would choose another token after the same text]
    stopped  the visitor stopped the run
    error    message

Two more types reach the page and are never recorded: `replay` before a recorded stream, `status` while a run is
prepared. Every number comes from `metrics`, so page and benchmark use the same definitions.
"""

import copy
import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from cascadeexit import metrics
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.events import Status, TokenEvent
from cascadeexit.inspection import Inspection
from cascadeexit.shape import Shape

CASCADE, FULL = "cascade", "full"           # the two sides of a race
FORMAT = 1                                  # of the stream; a reader refuses what it does not know
FRAME_SECONDS, STATS_SECONDS = 0.07, 0.2    # shorter intervals look the same and cost time
ROLLING = 32                                # positions in the moving match rate
_BROKEN = "\ufffd"                          # how decoders show an incomplete or invalid UTF-8 sequence

# One ramp from light to dark, after ColorBrewer's YlGnBu, so that colour reads as depth, also for colour-blind readers.
# Black text has a contrast of at least 7:1 on each. Tokens of the full model have no background.
_DEPTH_COLOURS = ("#FFF2A8", "#C3E8A9", "#83D3B4", "#5BBFC8", "#55A5D6", "#7F98DB")
_FULL_COLOUR = "#DDDDDD"
COPIED_COLOUR = "#F2C4D8"                   # as in app.css


def colours(num_exits: int) -> tuple[str, ...]:
    """Return a colour for each exit and for the full model. Exits beyond the palette share its last colour."""
    last = len(_DEPTH_COLOURS) - 1
    return (*(_DEPTH_COLOURS[min(s, last)] for s in range(num_exits)), _FULL_COLOUR)


class TextDecoder:
    """Decodes one token at a time. The joined pieces equal the text that the tokenizer decodes from all tokens at once.

    A token that ends inside a character gives ''; the token that completes the character gives its text.
    (Tokenizers with byte fallback rewrite a character when invalid bytes follow it; earlier pieces are not corrected.)
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []   # last complete tokens: decoders treat the first token of a text differently
        self._held: list[int] = []      # tokens of an incomplete character

    @property
    def holding(self) -> bool:
        """True while a character is incomplete."""
        return bool(self._held)

    def push(self, token_id: int) -> str:
        """Decode the next token. Returns the text that it adds."""
        # Lists are replaced, never changed in place: a shallow copy of a decoder can decode drafts.
        self._held = [*self._held, token_id]
        piece = self._pending()
        if piece.endswith(_BROKEN):
            return ""
        self._context, self._held = self._held, []
        return piece

    def flush(self) -> str:
        """Return the text of an incomplete character at the end, or '' if there is none."""
        piece, self._held = self._pending() if self._held else "", []
        return piece

    def _pending(self) -> str:
        return self._decode(self._context + self._held)[len(self._decode(self._context)):]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# Byte-level tokenizers write a byte as one character: printable Latin-1 as itself, others from U+0100 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(b): b for b in _PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - {*_PLAIN}))}


def token_bytes(tokenizer, token_id: int) -> bytes:
    """Return the bytes of a token, also if the token is only a part of a character."""
    word = tokenizer.convert_ids_to_tokens(token_id)
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", word):                # byte fallback
        return bytes.fromhex(word[3:5])
    if _BROKEN in tokenizer.decode([token_id]) and set(word) <= set(_BYTES):
        return bytes(_BYTES[c] for c in word)
    return tokenizer.decode([token_id]).encode("utf-8", "replace")


class _Side:
    """Events of one side of the race, decoded to text."""

    def __init__(self, tokenizer):
        self.decoder = TextDecoder(tokenizer)
        self.draft_decoder: TextDecoder | None = None   # a copy of `decoder` that has also decoded the drafts
        self.drafts: dict[int, int] = {}                # position -> token, of the draft tree's path that is shown
        self.events: list[TokenEvent] = []
        self.final: list[TokenEvent] = []

    @property
    def ids(self) -> list[int]:
        return [e.token_id for e in self.final]

    def shows(self, event: TokenEvent) -> bool:
        """Return True if the page shows this event. Drafts and rejections are shown for the first path only."""
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
        """Return the text of this event. The text of a draft can still change."""
        self.events.append(event)
        if event.final:
            self.draft_decoder = None
            self.final.append(event)
            self.drafts.pop(event.index, None)
            return self.decoder.push(event.token_id)
        if event.status is Status.REJECTED:
            return ""
        self.draft_decoder = self.draft_decoder or copy.copy(self.decoder)
        return self.draft_decoder.push(event.token_id)


class TokenStream:
    """A race as one growing string of JSON lines: the input of the page, and the record of the run.

    The string is ASCII without '<', so that no transport changes it. Reading it in pieces or whole gives the same.

    Args:
        settings: what the visitor chose, recorded as it is; must be plain JSON.
    """

    def __init__(self, engine: Engine, tokenizer, config: DecodeConfig, prompt_ids: Sequence[int],
                 settings: dict | None = None):
        # Not the engine: a page keeps many streams, and models must be freed meanwhile.
        self.config, self.prompt_ids, self.shape = config, list(prompt_ids), Shape.of(engine)
        self._costs, self._eos = engine.costs_for(config), engine.model.eos_ids
        self.run = uuid.uuid4().hex[:12]
        self.sides = {CASCADE: _Side(tokenizer), FULL: _Side(tokenizer)}
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.all_special_ids)
        self.text = model_line(self.shape)
        self._write("run", run=self.run, mode=config.mode, greedy=config.temperature == 0,
                    thresholds=engine.thresholds(config), prompt_tokens=len(self.prompt_ids),
                    max_new_tokens=config.max_new_tokens, tolerance=config.tolerance, settings=settings or {})

    def add(self, name: str, event: TokenEvent) -> None:
        """Append an event of the side with this name."""
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
                record["part"] = True       # a later token completes its character
        self._write("token", **_rounded(record))

    def add_stats(self) -> None:
        """Append the numbers of both sides so far, and how well their texts match."""
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
        """Append the text of incomplete characters at the end, and the final numbers, once both sides are done."""
        for name, side in self.sides.items():
            rest = side.decoder.flush()
            if rest:
                self._write("text", side=name, i=side.final[-1].index, text=rest)
        self.add_stats()

    def end(self, inspection: Inspection) -> None:
        """Append agreement and match. The full model's choices, after each prefix of the text, are in `inspection`."""
        ours, theirs = (side.ids for side in self.sides.values())
        match, choices = metrics.match(ours, theirs), inspection.full_choices
        greedy = self.config.temperature == 0
        lossless = self.config.mode is Mode.VERIFIED and not self.config.tolerance
        self._write("end", agreement=_rounded(metrics.agreement(ours, choices)),
                    positional=_rounded(match.positional), first_divergence=match.first_divergence,
                    sequence=match.sequence, identical=match.sequence if lossless else None,
                    differs=[i for i, (a, b) in enumerate(zip(ours, choices)) if a != b] if greedy else [])

    def fail(self, message: str) -> None:
        """Append an error: the run broke off."""
        self.text += error_line(message)

    def _write(self, type: str, **record) -> None:
        self.text += write_line(type, **record)


def frames(stream: TokenStream, contest: Iterable[tuple[str, TokenEvent]]) -> Iterator[str]:
    """Add the events of a race to a stream; yields the stream's text for the first token, then at each frame."""
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
    """Return the first line of a stream, which describes the model. Before any run, it is the page's whole stream."""
    exits = [dict(layer=layer, depth=round(layer / shape.num_layers, 4)) for layer in shape.exit_layers]
    return write_line("model", format=FORMAT, model=shape.name, layers=shape.num_layers, exits=exits,
                      trained=shape.trained, colours=colours(len(exits)))


def status_line(message: str) -> str:
    """Return a line that tells what the server does before a run begins. It is never saved in a record."""
    return write_line("status", message=message)


def replay_line() -> str:
    """Return the line to put before a recorded stream: the page then draws it at the speed of the recorded run."""
    return write_line("replay")


def error_line(message: str) -> str:
    """Return a line that reports an error. Alone, it means that no run began; after others, that the run failed."""
    return write_line("error", message=message)


def stopped(text: str) -> str:
    """Mark a stream as stopped by the visitor, and return it. Nothing changes where no run is in progress."""
    try:
        kind = json.loads(text.rstrip("\n").rpartition("\n")[2])["type"]
    except (ValueError, KeyError, TypeError):
        return text
    return text if kind in ("model", "end", "stopped", "error", "status") else text + write_line("stopped")


def write_line(type: str, **record) -> str:
    """One record as a line of JSON."""
    # ASCII escapes carry lone surrogates safely; '<' is escaped so that no value can look like markup.
    text = json.dumps({"type": type, **record}, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c") + "\n"


def _rounded(value):
    """Round floats, also inside nested lists and dicts, to the digits that the page can show."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, (tuple, list)):
        return [_rounded(v) for v in value]
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value
