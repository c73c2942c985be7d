"""Sides: the texts of one run that stand beside each other, and how each of them grows."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cascadeexit.config import DecodeConfig
from cascadeexit.events import Status, TokenEvent
from cascadeexit.text import TextDecoder

MAX_FORKS = 20              # of one run
CASCADE, SECOND, FULL = "cascade", "second", "full"
FORKS = tuple(f"fork{n}" for n in range(1, MAX_FORKS + 1))
NAMES = (CASCADE, SECOND, FULL, *FORKS)     # every name; its place stands for it on the wire, so only append


@dataclass(frozen=True)
class Side:
    """One side of a run: how it is decoded, and its name and title on the page."""

    name: str
    title: str
    config: DecodeConfig


class SideText:
    """The text of one side: its events, decoded to pieces of text.

    Positions are absolute. A fork begins at a position of another side's text, with a token that a visitor chose.

    Args:
        prompt_ids: of the run.
        of: for a fork, the name of the side that it continues.
        before: for a fork, the tokens of the other side before it.
        chosen: for a fork, the event of its first token, at position len(before).

    Attributes:
        events: all events, those of `chosen` and of drafts that are not shown included.
        final: the final ones.
        closed: True when nothing more will be added.
    """

    def __init__(self, tokenizer, side: Side, prompt_ids: Sequence[int], of: str = "",
                 before: Sequence[int] = (), chosen: TokenEvent | None = None):
        self.side, self.prompt_ids, self.chosen = side, [*prompt_ids], chosen
        self.of, self.before = of, [*before]
        self.decoder = TextDecoder(tokenizer)
        for token_id in before:
            self.decoder.push(token_id)
        self.events: list[TokenEvent] = []
        self.final: list[TokenEvent] = []
        self.closed = False
        self._draft_decoder: TextDecoder | None = None  # a copy of `decoder` that has also decoded the drafts
        self._shown: dict[int, int] = {}                # position -> token, of the draft tree's path that is shown
        self._pass: list[TokenEvent] = []               # drafts of the verification pass in progress
        self._verdicts: list[TokenEvent] = []

    @property
    def ids(self) -> list[int]:
        """All tokens of the text from position 0 on."""
        return [*self.before, *(e.token_id for e in self.final)]

    @property
    def start(self) -> int:
        """Position of the first token that was decoded."""
        return len(self.before) + (self.chosen is not None)

    @property
    def read_ids(self) -> list[int]:
        """All tokens that are read before the first one is decoded."""
        return [*self.prompt_ids, *self.before, *([self.chosen.token_id] if self.chosen else [])]

    @property
    def decoded(self) -> list[TokenEvent]:
        """All events that the engine made."""
        return self.events[1:] if self.chosen else self.events

    def placed(self, event: TokenEvent) -> TokenEvent:
        """Convert an event of the engine, whose positions count from its prompt on, to absolute positions."""
        return replace(event, index=event.index + self.start) if self.start else event

    def shows(self, event: TokenEvent) -> bool:
        """Return True if the page shows this event. Drafts and rejections are shown for the first path only."""
        if event.status is Status.DRAFT:
            if event.index != len(self.before) + len(self.final) + len(self._shown):
                return False
            self._shown[event.index] = event.token_id
        elif event.status is Status.REJECTED:
            if self._shown.get(event.index) != event.token_id:
                return False
            del self._shown[event.index]
        return True

    def add(self, event: TokenEvent) -> str:
        """Add an event that is shown. Returns its text. The text of a draft can still change."""
        self.events.append(event)
        if event.final:
            self._draft_decoder = None
            self.final.append(event)
            self._shown.pop(event.index, None)
            return self.decoder.push(event.token_id)
        if event.status is Status.REJECTED:
            return ""
        self._draft_decoder = self._draft_decoder or copy.copy(self.decoder)
        return self._draft_decoder.push(event.token_id)

    def tree(self, event: TokenEvent) -> list[tuple[TokenEvent, bool]] | None:
        """Follow the drafts of verification passes. Returns (draft, accepted) of all, with a pass's last verdict."""
        if event.status is Status.DRAFT:
            self._pass.append(event)
        elif event.status in (Status.ACCEPTED, Status.REJECTED):
            self._verdicts.append(event)
        if not self._pass or len(self._verdicts) < len(self._pass):
            return None
        drafts, path = self._pass, [-1]
        for verdict in self._verdicts:
            if verdict.final:
                path += [i for i, d in enumerate(drafts) if d.parent == path[-1] and d.token_id == verdict.token_id]
        self._pass, self._verdicts = [], []
        return [(draft, i in path) for i, draft in enumerate(drafts)]
