"""Turns: runs use the model one after another, in the order in which they asked for it."""

from threading import Condition
from typing import Self

WAIT_SECONDS = 0.1          # longest wait of one `Turn.wait`: a waiting run can be cancelled this often


class Turns:
    """A queue of runs. Only the first `at_once` runs in the queue may use the model at the same time.

    A run calls `join`, and then waits for its turn.
    """

    def __init__(self, at_once: int = 1):
        self._at_once, self._queue, self._changed = at_once, [], Condition()

    def join(self) -> "Turn":
        """Add a run at the end of the queue, and return its `Turn`.

        Use the turn in a `with` block. At the end of the block, the run leaves the queue.
        """
        turn = Turn(self)
        with self._changed:
            self._queue.append(turn)
        return turn

    def _wait(self, turn: "Turn") -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: turn in self._queue[:self._at_once], WAIT_SECONDS)

    def _leave(self, turn: "Turn") -> None:
        with self._changed:
            self._queue.remove(turn)
            self._changed.notify_all()


class Turn:
    """Place of one run in the queue, for a `with` block. At the end of the block, the run leaves the queue.

    The run may join, wait and leave in different threads.
    """

    def __init__(self, turns: Turns):
        self._turns = turns

    def wait(self) -> bool:
        """Wait until this run may use the model, and return True. Returns False if `WAIT_SECONDS` are over before."""
        return self._turns._wait(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._turns._leave(self)
