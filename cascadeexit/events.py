"""TokenEvent: what the engine reports about each token. The page, the benchmark and the tests read the same events."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

COPIED = -1     # exit of a token that was copied from earlier in the text and accepted


class Status(StrEnum):
    """Status of a `TokenEvent`: it names what happened to the token, or to the prompt, at this moment."""

    READING = "reading"      # a chunk of a long prompt was read; this says nothing about the generated text
    EMITTED = "emitted"      # final at once: tokens of full and cascade, corrections and bonus tokens of verified
    DRAFT = "draft"          # drafted in verified mode, not final yet
    ACCEPTED = "accepted"    # a draft that the full model accepted: final
    REJECTED = "rejected"    # a draft that the full model rejected; another token will be emitted at its position


class Span(NamedTuple):
    """Neighbouring segments, from number `first` to number `end` - 1, that ran together for `rows` positions."""

    first: int
    end: int
    rows: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token and its status at one moment.

    An EMITTED or ACCEPTED event makes the token at its position final. Positions become final in order. A long prompt
    is read in chunks. Each chunk except the last gives a READING event, so that a run can be interrupted between
    chunks.
    """

    index: int                                  # position in the generated text, from 0; READING: the number of
                                                # positions read minus the length of the prompt, so it is negative
    token_id: int
    exit: int                                   # segment that produced the token: 0 is the first exit, the last segment
                                                # the full model; COPIED for an n-gram lookup
    confidences: tuple[float | None, ...]       # one per exit, in [0, 1]; None where it was not computed
    status: Status
    seconds: float                              # engine time since the run began: prefill included, waiting excluded
    weight_bytes: int                           # weight bytes read since the previous event, prefill excluded
    spans: tuple[Span, ...] = ()                # passes since the previous event, in order, prefill excluded. In
                                                # cascade, a pass has several rows if it computes layers that exits
                                                # skipped; in verified, if it verifies drafts
    parent: int = -1                            # DRAFT: index of the draft that it follows, among the DRAFT events of
                                                # this pass; -1: it follows the newest token of the text
    probability: float | None = None            # DRAFT: estimated probability that it follows its parent, in [0, 1]
    checked: tuple[int, ...] = ()               # the full model's choices, oldest first, at the positions that exits
                                                # wrote since the last check. The last position is index - 1. () unless
                                                # `DecodeConfig.check_late` is True

    @property
    def final(self) -> bool:
        """True if this event makes the token at its position final."""
        return self.status in (Status.EMITTED, Status.ACCEPTED)
