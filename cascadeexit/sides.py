"""Sides: the texts of one run, which the page shows side by side, and how each text grows."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cascadeexit.config import DecodeConfig
from cascadeexit.events import Span, Status, TokenEvent
from cascadeexit.text import TextDecoder

MAX_FORKS = 20              # of one run
CASCADE, SECOND, FULL = "cascade", "second", "full"
FORKS = tuple(f"fork{n}" for n in range(1, MAX_FORKS + 1))
NAMES = (CASCADE, SECOND, FULL, *FORKS)     # all names; lines of a stream hold a name's index, so only append


@dataclass(frozen=True)
class Side:
    """One of the texts of a run: its name, its title on the page, and the config that decodes it."""

    name: str
    title: str
    config: DecodeConfig


class SideText:
    """The text of one side while it grows: its events, and the pieces of text that they add.

    A fork is a side that continues the text of another side after a visitor replaced one token. Positions are counted
    from the beginning of the text, also in a fork.

    Args:
        prompt_ids: token ids of the run's prompt.
        of: name of the side that a fork continues; "" if this is no fork.
        before: token ids of the other side before the replaced token; [] if this is no fork.
        chosen: event of the token that the visitor chose, at position len(before); None if this is no fork.

    Attributes:
        events: all events. They include `chosen`, and drafts that the page does not show.
        final: the final events.
        unwritten: spans of events that the page does not show. They are added to the next event that it shows.
        unread: bytes of weights read since the last final event. They count as read for the next final token.
        closed: True if nothing more will be added.
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
        self.unwritten: tuple[Span, ...] = ()
        self.unread = 0
        self.closed = False
        self._draft_decoder: TextDecoder | None = None  # a copy of `decoder` that has also decoded the drafts
        self._shown: dict[int, int] = {}                # position -> token, of the draft tree's path that is shown
        self._pass: list[TokenEvent] = []               # drafts of the verification pass in progress
        self._verdicts: list[TokenEvent] = []

    @property
    def ids(self) -> list[int]:
        """Token ids of the text from position 0 on."""
        return [*self.before, *(e.token_id for e in self.final)]

    @property
    def start(self) -> int:
        """Position of the first token that the engine decoded: in a fork the one after the visitor's token, else 0."""
        return len(self.before) + (self.chosen is not None)

    @property
    def read_ids(self) -> list[int]:
        """Token ids that the engine reads before it decodes the first token.

        They are the prompt and, in a fork, the tokens up to the one that the visitor chose.
        """
        return [*self.prompt_ids, *self.before, *([self.chosen.token_id] if self.chosen else [])]

    @property
    def decoded(self) -> list[TokenEvent]:
        """All events that the engine made. In a fork, this leaves out the event of the token that the visitor chose."""
        return self.events[1:] if self.chosen else self.events

    def placed(self, event: TokenEvent) -> TokenEvent:
        """Return an event of the engine with its position counted from the beginning of this text.

        The engine counts positions from the end of `read_ids`, the tokens that it read before it began to decode.
        """
        return replace(event, index=event.index + self.start) if self.start else event

    def shows(self, event: TokenEvent) -> bool:
        """Return True if the page shows this event. Call it once for each event, in order.

        If a pass has several drafts for one position, the page shows only the first of them. It shows the rejection of
        this draft, but no other rejection. It shows all other events.
        """
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
        """Add an event that the page shows. Returns the text that its token adds, or "" for a rejected draft.

        When a draft is accepted, its text may differ from the text that was returned for the draft.
        """
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
        """Collect the drafts and verdicts of verification passes. Call it for each event, in order.

        A verdict is an event that accepts or rejects a draft. At the last verdict of a pass, this returns a list of
        (draft, True if it was accepted) with all drafts of the pass. At every other event it returns None.
        """
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
