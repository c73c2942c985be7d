"""Terminal: prints the text of a run while it is decoded, and a summary after it."""

import re
from collections.abc import Iterable
from typing import TextIO

from cascadeexit.events import COPIED, TokenEvent
from cascadeexit.metrics import RunStats
from cascadeexit.shape import Shape, exit_name
from cascadeexit.text import TextDecoder

_EXIT_COLORS = (35, 39, 178, 170, 208, 44)      # of the 256 terminal colours: readable on black and on white
_COPIED_COLOR = 245
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")        # a terminal would obey them: all but tab and line feed


def color_of(exit: int, num_exits: int) -> int | None:
    """Return the terminal colour of an exit's tokens, a number from 0 to 255.

    None stands for the full model, whose tokens keep the terminal's own colour.

    exit: segment that produced the token, as in `TokenEvent.exit`.
    """
    if exit == COPIED:
        return _COPIED_COLOR
    return None if exit == num_exits else _EXIT_COLORS[exit % len(_EXIT_COLORS)]


def painted(text: str, color: int | None) -> str:
    """Return the text with the codes that a terminal needs to show it in a colour.

    Control characters except tab and line feed are replaced by U+FFFD, because a terminal would obey them.

    color: number of a terminal colour, 0 to 255; None leaves the terminal's own colour.
    """
    text = _CONTROLS.sub("\ufffd", text)
    return text if color is None or not text else f"\x1b[38;5;{color}m{text}\x1b[39m"


def print_tokens(events: Iterable[TokenEvent], tokenizer, *, num_exits: int, eos_ids: Iterable[int], color: bool,
                 out: TextIO) -> list[TokenEvent]:
    """Print the text of each final token as soon as it is decoded. Returns a list of all events.

    Args:
        events: the events of a run, as they happen.
        num_exits: number of exits of the model, for the colours.
        eos_ids: ids of the tokens that end a text; they are not printed.
        color: print each token in the colour of its exit, and replace control characters.
        out: where to print.
    """
    seen, decoder, ends = [], TextDecoder(tokenizer), frozenset(eos_ids)
    for event in events:
        seen.append(event)
        if event.final and event.token_id not in ends:
            piece = decoder.push(event.token_id)
            out.write(painted(piece, color_of(event.exit, num_exits)) if color else piece)
            out.flush()
    rest = decoder.flush()
    out.write(f"{painted(rest, None) if color else rest}\n")
    out.flush()
    return seen


def summary(stats: RunStats, shape: Shape, color: bool) -> str:
    """Return the speed, the acceptance rate and the routing of a run as lines of text.

    color: write the name of each exit in the colour of its tokens.
    """
    lines = [f"{stats.tokens} tokens"]
    if stats.first_token_seconds is not None:
        lines[0] += f", the first after {stats.first_token_seconds:.2f} s"
    if stats.tokens_per_second is not None:
        lines[0] += f", then {stats.tokens_per_second:.1f} tokens/s"
    if stats.acceptance is not None:
        lines.append(f"{stats.acceptance:.0%} of the drafts accepted, {stats.tokens_per_verification:.2f} tokens per "
                     "verification pass")
    shares = [(s, exit_name(s, shape), share) for s, share in enumerate(stats.routing_share)]
    shares.append((COPIED, "Copied from earlier in the text", stats.copied_share))
    for exit, name, share in shares:
        if share:
            lines.append(f"{share:5.0%}  {painted(name, color_of(exit, shape.num_exits) if color else None)}")
    return "\n".join(lines)
