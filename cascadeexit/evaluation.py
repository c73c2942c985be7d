"""Evaluation: decodes prompts with exits and with the full model, compares both, and writes results as JSON or CSV.

If a prompt cannot run, its result holds the error.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean, geometric_mean, median

from cascadeexit import metrics
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.engine import Engine
from cascadeexit.events import TokenEvent
from cascadeexit.prompts import Prompt
from cascadeexit.runner import Check, RunFailed, Runner, Task
from cascadeexit.sides import CASCADE, FULL

FORMAT = 1                          # of the JSON file: a reader refuses other formats
LABEL_CHARACTERS = 60               # length of a chart point's label


@dataclass(frozen=True)
class Result:
    """Result of one prompt, which was decoded twice: with the given config, and with the full model.

    The fields that begin with `full_` describe the full model's run. The other measured fields describe the run with
    the given config. `speedup` is `tokens_per_second` / `full_tokens_per_second`. `metrics.RunStats` explains
    `routing_share`, `average_depth`, `cost` and `acceptance`. Shares are in [0, 1]; `cost` can be above 1. If the
    prompt could not run, `error` has the reason, and the measured fields keep their defaults. Any other number that was
    not measured is None.
    """

    index: int
    kind: str
    prompt: str
    error: str | None = None
    tokens: int = 0
    agreement: float | None = None                  # as from metrics.agreement; None when tokens are sampled
    positional: float | None = None                 # as in metrics.Match, like the next two
    first_divergence: int | None = None
    sequence: bool | None = None
    routing_share: tuple[float, ...] = ()
    average_depth: float | None = None
    cost: float | None = None
    acceptance: float | None = None
    tokens_per_second: float | None = None          # decode only: after the first token
    full_tokens_per_second: float | None = None
    speedup: float | None = None
    text: str = ""
    full_text: str = ""


@dataclass(frozen=True)
class Summary:
    """Summary of the results of several prompts. The fields have the meaning and the units of `Result`.

    The comment beside a field says how it combines the numbers of the prompts. A number that was measured for no prompt
    is None.
    """

    prompts: int                                    # number of prompts, failed ones included
    failed: int                                     # number of prompts that could not run
    tokens: int                                     # sum over prompts
    agreement: float | None                         # mean over all tokens, like the next two
    average_depth: float | None
    cost: float | None
    routing_share: tuple[float, ...]                # share of all tokens that each segment produced
    acceptance: float | None                        # mean over prompts with verified drafts
    positional: float | None                        # mean over prompts
    first_divergence: float | None                  # median over texts that diverge
    sequence: float | None                          # share of texts that are identical to the full model's
    tokens_per_second: float | None                 # median over prompts, like the next
    full_tokens_per_second: float | None
    speedup: float | None                           # geometric mean over prompts
    kinds: dict[str, "Summary"] = field(default_factory=dict)       # summary of each kind; empty in these


# -- running ---------------------------------------------------------------------------------------------------------


def evaluate(runner: Runner, label: str, encode: Callable[[str], list[int]], prompts: Sequence[Prompt],
             config: DecodeConfig, decode: Callable[[list[int]], str], pauses: bool = False
             ) -> Iterator[Result | None]:
    """Decode each prompt with `config` and with the full model. Yields one Result per prompt, in order.

    A prompt's run with `config` and its run of the full model take turns (`race`), so that their speeds are comparable.

    A prompt cannot run if it is empty or too long, if `encode` refuses it with a ValueError, or if its run fails with
    RunFailed. The Result of such a prompt holds the error, and the evaluation goes on. Closing the generator also ends
    the runs of the current prompt.

    Args:
        label: name of a model in the runner's library; the model must be loaded.
        encode: function that converts a prompt to token ids.
        decode: function that converts token ids to text.
        pauses: also yield None after every batch of events. The caller can then close the generator in the middle of a
            prompt.

    Raises ValueError at the call, before the first Result, if the config does not suit the model's engine.
    """
    engine, _ = runner.library.get(label)
    engine.check([0], replace(config, max_new_tokens=1))    # token 0 stands for any prompt: only the config can fail
    return _evaluate(runner, label, encode, prompts, config, decode, pauses)


def _evaluate(runner: Runner, label: str, encode, prompts, config: DecodeConfig, decode, pauses: bool
              ) -> Iterator[Result | None]:
    engine, _ = runner.library.get(label)
    # `full` has none of the other modes' settings.
    full = replace(config, mode=Mode.FULL, tolerance=0.0, target_disagreement=None, check_late=False)
    for index, prompt in enumerate(prompts):
        identity = dict(index=index, kind=prompt.kind, prompt=prompt.text)
        try:
            ids = encode(prompt.text)
            contest = runner.race(label, {CASCADE: Task(ids, config), FULL: Task(ids, full)},
                                  Check.NOTHING if config.temperature else Check.CHOICES)
        except ValueError as error:
            yield Result(**identity, error=str(error))
            continue
        events, choices = {CASCADE: [], FULL: []}, None
        try:
            for batch in contest:
                choices = batch.choices.get(CASCADE)
                for side, event in batch.events:
                    events[side].append(event)
                if pauses:
                    yield None
        except RunFailed as error:
            yield Result(**identity, error=f"{error.title}: {error}")
            continue
        finally:
            contest.close()
        yield Result(**identity, **_numbers(engine, config, decode, events[CASCADE], events[FULL], choices))


def _numbers(engine: Engine, config: DecodeConfig, decode, exits: list[TokenEvent], full: list[TokenEvent],
             choices: Sequence[int] | None) -> dict:
    """Compute the fields of a Result that are measured, as {name: value}.

    Args:
        exits, full: all events of the run with exits, and all events of the full model's run.
        choices: the full model's choice at each position of the text that exits wrote; None if tokens are sampled.
    """
    ours, theirs = ([e.token_id for e in events if e.final] for events in (exits, full))
    stats, full_stats = (metrics.summarize(events, engine.costs_for(config)) for events in (exits, full))
    match, speeds = metrics.match(ours, theirs), (stats.tokens_per_second, full_stats.tokens_per_second)
    return dict(
        tokens=stats.tokens,
        agreement=None if choices is None else metrics.agreement(ours, choices),
        positional=match.positional, first_divergence=match.first_divergence, sequence=match.sequence,
        routing_share=stats.routing_share, average_depth=stats.average_depth, cost=stats.cost,
        acceptance=stats.acceptance, tokens_per_second=speeds[0], full_tokens_per_second=speeds[1],
        speedup=speeds[0] / speeds[1] if all(speeds) else None,
        text=decode(ours), full_text=decode(theirs))


def summarize_results(results: Sequence[Result]) -> Summary:
    """Summarize all results together, and the results of each kind of prompt separately.

    Returns the summary of all results. Its field `kinds` is {kind of prompt: summary of the results of this kind}.
    """
    kinds = dict.fromkeys(r.kind for r in results)
    return replace(_over(results), kinds={kind: _over([r for r in results if r.kind == kind]) for kind in kinds})


def _over(results: Sequence[Result]) -> Summary:
    """Summarize these results as one group. `Summary.kinds` stays empty."""
    ran = [r for r in results if r.error is None]

    def known(name: str, over: Callable[[list], float]) -> float | None:
        values = [getattr(r, name) for r in ran if getattr(r, name) is not None]
        return over(values) if values else None

    return Summary(
        prompts=len(results), failed=len(results) - len(ran), tokens=sum(r.tokens for r in ran),
        agreement=_by_tokens([(r.agreement, r.tokens) for r in ran]),
        average_depth=_by_tokens([(r.average_depth, r.tokens) for r in ran]),
        cost=_by_tokens([(r.cost, r.tokens) for r in ran]),
        routing_share=tuple(_by_tokens(list(zip(shares, [r.tokens for r in ran])))
                            for shares in zip(*(r.routing_share for r in ran))),
        acceptance=known("acceptance", fmean), positional=known("positional", fmean),
        first_divergence=known("first_divergence", median), sequence=known("sequence", fmean),
        tokens_per_second=known("tokens_per_second", median),
        full_tokens_per_second=known("full_tokens_per_second", median), speedup=known("speedup", geometric_mean))


def _by_tokens(pairs: Sequence[tuple[float | None, int]]) -> float | None:
    """Compute the mean of values, each weighted by its number of tokens.

    Pairs whose value is None are left out. Returns None if no tokens are left.

    pairs: (value, number of tokens).
    """
    pairs = [(value, tokens) for value, tokens in pairs if value is not None]
    total = sum(tokens for _, tokens in pairs)
    return sum(value * tokens for value, tokens in pairs) / total if total else None


def quality_speed_points(results: Sequence[Result]) -> list[dict]:
    """Make a chart point for each prompt whose speed-up and agreement were measured.

    A point is a dict: `x` is the speed-up, `y` the agreement, `cost` the weights read as a share of what the full model
    reads, `kind` the kind of prompt, and `label` the beginning of the prompt.

    The label and the kind are untrusted text. Escape them before they are shown as HTML.
    """
    return [dict(x=r.speedup, y=r.agreement, cost=r.cost, kind=r.kind,
                 label=" ".join(r.prompt.split())[:LABEL_CHARACTERS])
            for r in results if r.speedup is not None and r.agreement is not None]


# -- files -----------------------------------------------------------------------------------------------------------


def results_json(results: Sequence[Result], config: DecodeConfig, model: str) -> str:
    """Return all results as JSON text in ASCII.

    It is an object with the keys "format" (a number), "model" (its name), "config" (fields of `DecodeConfig`),
    "summary" (fields of `Summary`) and "results" (a list with the fields of each `Result`).
    """
    return json.dumps({"format": FORMAT, "model": model, "config": asdict(config),
                       "summary": asdict(summarize_results(results)), "results": [asdict(r) for r in results]},
                      indent=1)


def results_csv(results: Sequence[Result]) -> str:
    """Return all results as CSV text, with a header and one row per prompt. The columns are the fields of `Result`.

    The routing share of segment number s, counted from 1, has a column of its own, `routing_share_s`. A number that was
    not measured is an empty cell.
    """
    names = [f.name for f in fields(Result) if f.name != "routing_share"]
    segments = max((len(r.routing_share) for r in results), default=0)
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerow([*names, *(f"routing_share_{s + 1}" for s in range(segments))])
    for result in results:
        shares = [*result.routing_share, *[None] * (segments - len(result.routing_share))]
        table.writerow([_cell(value) for value in (*(getattr(result, name) for name in names), *shares)])
    return out.getvalue()


def _cell(value):
    """Convert a value for a CSV cell. None becomes an empty cell.

    Text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    text = value.encode("utf-8", "backslashreplace").decode("utf-8")       # a file cannot hold lone surrogates
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text
