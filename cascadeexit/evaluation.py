"""Evaluation: many prompts, each decoded with exits and in full, in numbers per prompt and over all.

Prompts come from anywhere, so they are read within limits; a prompt that cannot run keeps its place with the reason.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import geometric_mean

from cascadeexit import metrics
from cascadeexit.engine import DecodeConfig, Engine, Mode
from cascadeexit.race import race

FORMAT = 1
MAX_BYTES, MAX_PROMPTS, MAX_CHARACTERS = 1_000_000, 200, 4_000
_COLUMNS = ("prompt", "text", "instruction")        # where a row's prompt may stand, the first that is there


@dataclass(frozen=True)
class Prompt:
    text: str
    kind: str = "own"


@dataclass(frozen=True)
class Result:
    """One prompt. Rates are in [0, 1]; None where a prompt did not run (`error` says why) or nothing was measured."""

    index: int
    kind: str
    prompt: str
    error: str | None = None
    tokens: int = 0
    speedup: float | None = None                    # tokens/s over those of `full`, decode only
    agreement: float | None = None
    positional: float | None = None
    first_divergence: int | None = None
    identical: bool | None = None
    average_depth: float | None = None
    cost: float | None = None
    acceptance: float | None = None
    routing_share: tuple[float, ...] = ()
    text: str = ""
    full_text: str = ""


# -- prompt sets -----------------------------------------------------------------------------------------------------


def read_prompts(content: str, name: str = "") -> list[Prompt]:
    """Prompts of a pasted text or a file's content: one a line, JSONL rows, or CSV with a header.

    Args:
        name: of the file; its ending decides (.csv, .jsonl), else the text itself: lines of JSON objects are JSONL.

    Raises ValueError that names the line, what was expected and what came.
    """
    content = content.removeprefix("\ufeff")
    if name.lower().endswith(".csv"):
        prompts = _from_csv(content)
    elif name.lower().endswith(".jsonl") or content.lstrip().startswith("{"):
        prompts = _from_jsonl(content)
    else:
        prompts = [Prompt(line.strip()) for line in content.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("there is no prompt in it: write one a line")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts are too many, the limit is {MAX_PROMPTS}")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt.text) > MAX_CHARACTERS:
            raise ValueError(f"prompt {number} has {len(prompt.text):,} characters, the limit is {MAX_CHARACTERS:,}")
    return prompts


def read_prompt_file(path: str | Path) -> list[Prompt]:
    """Prompts of a .txt, .jsonl or .csv file in UTF-8. Raises ValueError as `read_prompts` does."""
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"the file has {path.stat().st_size:,} bytes, the limit is {MAX_BYTES:,}")
    try:
        return read_prompts(path.read_bytes().decode("utf-8"), path.name)
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is no UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _from_jsonl(content: str) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f'line {number}: expected a JSON object such as {{"prompt": "..."}}, got '
                             f"{line[:60]!r}") from None
        prompts.append(_from_row(row if isinstance(row, dict) else {}, f"line {number}"))
    return prompts


def _from_csv(content: str) -> list[Prompt]:
    try:
        rows = list(csv.DictReader(io.StringIO(content, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"this is no CSV table ({error})") from None
    return [_from_row(row, f"row {number}") for number, row in enumerate(rows, 1)]


def _from_row(row: dict, place: str) -> Prompt:
    text = next((row[c] for c in _COLUMNS if isinstance(row.get(c), str) and row[c].strip()), None)
    if text is None:
        raise ValueError(f"{place}: expected a text under {', '.join(_COLUMNS[:-1])} or {_COLUMNS[-1]}, got "
                         f"{', '.join(map(repr, list(row)[:6])) or 'none of them'}")
    kind = row.get("kind")
    return Prompt(text.strip(), kind.strip()[:40] if isinstance(kind, str) and kind.strip() else "own")


# -- running ---------------------------------------------------------------------------------------------------------


def evaluate(engine: Engine, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str],
             prompts: Sequence[Prompt], config: DecodeConfig, full: DecodeConfig) -> Iterator[Result | None]:
    """One Result a prompt, in order; None now and then between them, so that a caller can stop in the middle.

    encode raises ValueError for a prompt that cannot be used.
    """
    for index, prompt in enumerate(prompts):
        about = dict(index=index, kind=prompt.kind, prompt=prompt.text)
        try:
            ids = encode(prompt.text)
            contest = race({"exits": engine.generate(ids, config), "full": engine.generate(ids, full)})
        except ValueError as error:
            yield Result(**about, error=str(error))
            continue
        events = {"exits": [], "full": []}
        try:
            for side, event in contest:
                events[side].append(event)
                yield None
        finally:
            contest.close()
        yield _result(engine, ids, decode, about, config.temperature == 0, **events)


def _result(engine: Engine, ids: list[int], decode, about: dict, greedy: bool, exits: list, full: list) -> Result:
    ours, theirs = ([e.token_id for e in events if e.final] for events in (exits, full))
    stats, whole = (metrics.summarize(events, engine.costs) for events in (exits, full))
    match = metrics.match(ours, theirs)
    return Result(
        **about, tokens=stats.tokens, text=decode(ours), full_text=decode(theirs),
        speedup=stats.tokens_per_second / whole.tokens_per_second
        if stats.tokens_per_second and whole.tokens_per_second else None,
        agreement=metrics.agreement(ours, engine.full_choices(ids, ours)) if greedy else None,
        positional=match.positional, first_divergence=match.first_divergence, identical=match.sequence,
        average_depth=stats.average_depth, cost=stats.cost, acceptance=stats.acceptance,
        routing_share=stats.routing_share)


def summarize_results(results: Sequence[Result]) -> dict:
    """Over all prompts that ran: rates weighted by tokens, the speed-up as a geometric mean; and the same by kind."""
    def over(rows: Sequence[Result]) -> dict:
        ran = [r for r in rows if r.error is None]
        tokens = sum(r.tokens for r in ran)

        def mean(name: str) -> float | None:
            known = [(getattr(r, name), r.tokens) for r in ran if getattr(r, name) is not None]
            return sum(v * n for v, n in known) / sum(n for _, n in known) if any(n for _, n in known) else None

        speedups = [r.speedup for r in ran if r.speedup]
        routing = [sum(r.routing_share[s] * r.tokens for r in ran) / tokens
                   for s in range(len(ran[0].routing_share))] if tokens else []
        return dict(prompts=len(rows), failed=len(rows) - len(ran), tokens=tokens, routing_share=routing,
                    speedup=geometric_mean(speedups) if speedups else None,
                    agreement=mean("agreement"), cost=mean("cost"), average_depth=mean("average_depth"),
                    identical=sum(bool(r.identical) for r in ran) / len(ran) if ran else None)
    return over(results) | {"kinds": {kind: over([r for r in results if r.kind == kind])
                                      for kind in dict.fromkeys(r.kind for r in results)}}


# -- files -----------------------------------------------------------------------------------------------------------


def results_json(results: Sequence[Result], config: DecodeConfig, model: str) -> str:
    """Everything, versioned: {format, model, config, summary, results}."""
    settings = asdict(config) | {"mode": Mode(config.mode).value}
    return json.dumps({"format": FORMAT, "model": model, "config": settings, "summary": summarize_results(results),
                       "results": [asdict(r) for r in results]}, indent=1)


def results_csv(results: Sequence[Result]) -> str:
    """One row a prompt. Text that a spreadsheet would run as a formula gets an apostrophe."""
    out = io.StringIO(newline="")
    table = csv.writer(out)
    names = [f.name for f in fields(Result)]
    table.writerow(names)
    for result in results:
        table.writerow([_cell(getattr(result, name)) for name in names])
    return out.getvalue()


def _cell(value):
    if isinstance(value, tuple):
        return " ".join(f"{v:.4f}" for v in value)
    if isinstance(value, str):
        return "'" + value if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    return "" if value is None else value
