"""TokenEvent: what the engine reports about each token. Page, benchmark and tests read the same events."""

from dataclasses import dataclass
from enum import StrEnum

COPIED = -1     # exit of a token that was copied from earlier in the text and accepted


class Status(StrEnum):
    EMITTED = "emitted"      # final at once: tokens of full and cascade, corrections and bonus tokens of verified
    DRAFT = "draft"          # drafted in verified mode, not final yet
    ACCEPTED = "accepted"    # a draft that the full model accepted: final
    REJECTED = "rejected"    # a draft that the full model rejected; another token will be emitted at its position


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token and its status at one moment.

    A position is final with its EMITTED or ACCEPTED event, and final positions come in order.
    """

    index: int                                  # position in the generated text, from 0
    token_id: int
    exit: int                                   # segment that produced the token: 0 is the first exit, the last segment
                                                # the full model; COPIED for an n-gram lookup
    confidences: tuple[float | None, ...]       # one per exit, in [0, 1]; None where it was not computed
    status: Status
    seconds: float                              # engine time since the run began: prefill included, waiting excluded
    weight_bytes: int                           # weight bytes read since the previous event, prefill excluded

    @property
    def final(self) -> bool:
        return self.status in (Status.EMITTED, Status.ACCEPTED)
