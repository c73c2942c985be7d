"""TokenEvent: what the engine says about each token. Page, benchmark and tests all consume this one stream."""

from dataclasses import dataclass
from enum import StrEnum

COPIED = -1     # as a token's exit: no exit wrote it, it was copied from earlier in the text and confirmed


class Status(StrEnum):
    EMITTED = "emitted"      # final at once: full and cascade tokens, corrections and bonus tokens of verified
    DRAFT = "draft"          # guessed by an exit in verified mode, not final yet
    ACCEPTED = "accepted"    # a draft that the full model confirmed: final
    REJECTED = "rejected"    # a draft that the full model replaced; its position will be emitted anew


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token at one moment.

    A position is final when its EMITTED or ACCEPTED event arrives, and final positions arrive in order.
    """

    index: int                                  # position in the generated text, from 0
    token_id: int
    exit: int                                   # segment that produced it, 0 the first exit, the last the full model;
                                                # COPIED: none, a draft from the text itself
    confidences: tuple[float | None, ...]       # one per exit, in [0, 1]; None where the exit was not asked
    status: Status
    seconds: float                              # engine time since the run began, prefill included; waiting excluded
    weight_bytes: int                           # weight bytes read since the previous event, prefill excluded

    @property
    def final(self) -> bool:
        return self.status in (Status.EMITTED, Status.ACCEPTED)
