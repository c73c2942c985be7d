"""Writing: decodes one prompt of a request, and turns the events of the run into text that ends at a stop text."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from cascadeexit.config import DecodeConfig
from cascadeexit.events import TokenEvent
from cascadeexit.runner import Check, Runner, Task
from cascadeexit.scoring import Scores
from cascadeexit.sides import CASCADE
from cascadeexit.text import TextDecoder


@dataclass(frozen=True)
class Job:
    """The work for one prompt of a request: what to decode, and where the text stops."""

    ids: Sequence[int]                  # of the prompt
    config: DecodeConfig | None         # None: nothing is written
    stops: Sequence[str] = ()
    echo: str | None = None             # the prompt as text, if the answer repeats it
    scored: bool = False                # True: also compute each token's log probability by the full model


@dataclass(frozen=True)
class Written:
    """The result of a job. `token_ids` has all tokens that were written, also the token that ended the text."""

    job: Job
    text: str
    token_ids: Sequence[int]
    events: Sequence[TokenEvent]        # up to the last of these tokens
    finish: str                         # "stop" (end of the text, or a stop text) or "length"
    scores: Scores | None = None        # of the prompt's tokens from the second on, if it is repeated, and of token_ids


@dataclass
class StoppedText:
    """Turns tokens into text up to the first stop text, which does not belong to the result.

    Call `push` for each token, and `flush` at the end. Text that might be the beginning of a stop text is held back
    until this is clear. Special tokens have no text.

    Attributes:
        text: the text that was returned so far.
        stopped: True after a stop text was found. No token may follow.
    """

    tokenizer: object
    stops: Sequence[str] = ()
    text: str = ""
    stopped: bool = False
    _held: str = ""
    _special: frozenset[int] = frozenset()
    _decoder: TextDecoder = field(init=False)

    def __post_init__(self):
        self._decoder = TextDecoder(self.tokenizer)
        self._special = frozenset(self.tokenizer.all_special_ids)

    def push(self, token_id: int) -> str:
        """Add a token. Returns the text that is certain now; often "", sometimes more than the token's own text."""
        return "" if token_id in self._special else self._grown(self._decoder.push(token_id))

    def flush(self) -> str:
        """End the text. Returns the rest of it, which was held back; "" if a stop text was found."""
        if self.stopped:
            return ""
        rest = self._grown(self._decoder.flush()) + ("" if self.stopped else self._held)
        self.text, self._held = self.text + ("" if self.stopped else self._held), ""
        return rest

    def _grown(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        certain = min(found) if found else len(text) - _beginning(text, self.stops)
        self._held = text[certain:]
        self.text += text[:certain]
        return text[:certain]


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of the text might be the beginning of a stop text."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def write(runner: Runner, label: str, job: Job) -> Iterator[str | Written]:
    """Decode the prompt of a job. Yields pieces of the new text, which may be "", and at last the `Written`.

    The caller stops the job by closing this generator.

    label: name of the model in the library; it must be in memory.

    Raises ValueError and RunFailed as `Runner.race` does.
    """
    engine, tokenizer = runner.library.get(label)
    text, events, scores = StoppedText(tokenizer, job.stops), [], None
    if job.config:
        with closing(runner.race(label, {CASCADE: Task(job.ids, job.config)})) as batches:
            for batch in batches:
                yield _added(text, batch.events, events)
                if text.stopped:
                    break
        yield text.flush()
    final = [event for event in events if event.final]
    if job.scored:
        read = Task(job.ids, events=final, whole=job.echo is not None)
        with closing(runner.race(label, {CASCADE: read}, Check.SCORES)) as batches:
            for batch in batches:
                scores = batch.scores.get(CASCADE)
                yield ""
    ended = text.stopped or (final and final[-1].token_id in engine.model.eos_ids)
    yield Written(job, text.text, [event.token_id for event in final], events, "stop" if ended else "length", scores)


def _added(text: StoppedText, batch: Sequence[tuple[str, TokenEvent]], events: list[TokenEvent]) -> str:
    """Add the events of a batch to a text and to `events`, up to a stop text. Returns the new piece of the text."""
    pieces = []
    for _, event in batch:
        events.append(event)
        if event.final:
            pieces.append(text.push(event.token_id))
        if text.stopped:
            break
    return "".join(pieces)
