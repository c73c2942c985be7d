"""Values: checks values that come from outside, such as settings and files, and quotes wrong ones in messages."""

import math
import reprlib
from numbers import Integral, Real

SHOWN = 60              # most characters of a wrong value in a message
_LONGEST = 10**18       # Python refuses to write numbers of some thousand digits


class _Short(reprlib.Repr):
    """Writes any value in a few words, without first writing the whole of a large one."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = SHOWN
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxlevel = 4

    def repr_int(self, x, level):
        return repr(x) if abs(x) < _LONGEST else "a number of more than 18 digits"


_SHORT = _Short()


def shown(value) -> str:
    """Format a wrong value for a message: its `repr` in one line, shortened to about 60 characters."""
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def whole(name: str, value, low: int, high: int) -> int:
    """Return a value as int if it is a whole number from `low` to `high`; whole numbers of numpy are accepted.

    Raises ValueError for any other value, also for 5.0, True and text. `name` names the value in the message.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise ValueError(f"{name} must be a whole number from {low:,} to {high:,}, got {shown(value)}")


def as_whole(value):
    """Return 8 for 8.0, as browsers and JSON may send it. Any other value is returned unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(name: str, value, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a value as float if it is a finite number from `low` to `high`; numbers of numpy are accepted.

    Raises ValueError for any other value, also for NaN, True and text. `name` names the value in the message.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:       # a whole number of more than 308 digits
            found = math.nan
        if math.isfinite(found) and low <= found <= high:
            return found
    limits = "a finite number" if -low == high == math.inf else f"a number from {low:g} to {high:g}"
    raise ValueError(f"{name} must be {limits}, got {shown(value)}")


def flag(name: str, value) -> bool:
    """Return the value if it is True or False, else raise ValueError. `name` names the value in the message."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{name} must be true or false, got {shown(value)}")


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, such as "KeyError: 'vocab_size'".

    A long line is shortened to 200 characters.
    """
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
