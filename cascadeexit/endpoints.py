"""Endpoints: functions that programs and agents can call on a running page. Arguments and results are JSON values.

Each public method of `Endpoints` becomes an endpoint, and with `app.py --mcp` also an MCP tool. Callers see the
signature and the docstring of the method as its documentation.

The methods that run a model are generators. While they work, they yield their progress, {"tokens": n} or {"prompts": n}
with the number that is done; the last value is the result. If a caller leaves, its generator is closed, and the next
run may use the model at once.
"""

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial

from cascadeexit import evaluation, metrics, prompts
from cascadeexit.config import CASCADE_THRESHOLD, DecodeConfig, graded_thresholds
from cascadeexit.engine import Engine
from cascadeexit.events import TokenEvent
from cascadeexit.hub import ModelUnavailable
from cascadeexit.runner import Check, Runner, Task
from cascadeexit.settings import DISABLED, Settings
from cascadeexit.sides import CASCADE, FULL
from cascadeexit.values import flag, number, shown

MAX_DRAFT = DecodeConfig.max_draft
MAX_TOKENS = 50_000             # new tokens of one request, over all its prompts
MAX_SECONDS = 900               # of one request, the time in which it waits for other runs included
PROGRESS_SECONDS = 0.25         # between two values that tell the progress


class BadRequest(ValueError):
    """Raised for a request that cannot be answered. The message tells the caller why."""


class Endpoints:
    """The functions that programs can call on a running page. They raise BadRequest if the caller made a mistake.

    The first request for a model loads it, which may take long.
    """

    def __init__(self, runner: Runner):
        self._library, self._runner = runner.library, runner

    def models(self) -> list[dict]:
        """List the models that this page offers.

        Returns a list with an object for each model: model (the name to pass to other endpoints), layers (number of
        layers), exit_layers (number of layers below each exit) and trained (true if its exits are trained).
        """
        return [dict(model=label, layers=shape.num_layers, exit_layers=list(shape.exit_layers), trained=shape.trained)
                for label, shape in self._library.shapes.items()]

    def generate(self, prompt: str, mode: str = "cascade", threshold: float = CASCADE_THRESHOLD,
                 max_new_tokens: int = 128, max_draft: int = MAX_DRAFT, tolerance: float = 0.0,
                 temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, chat: bool = True, model: str = "",
                 target_disagreement: float = 0.0) -> Iterator[dict]:
        """Generate text with early exits.

        Args:
            prompt: the text to answer or, with chat=False, to continue.
            mode: 'cascade' (fast, each token comes from the first confident exit), 'verified' (exactly the full model's
                text) or 'full' (the full model).
            threshold: in cascade mode, the lowest confidence, 0 to 1, at which the first exit is taken. Deeper exits
                need a higher confidence. 1 disables all exits.
            max_new_tokens: largest number of tokens to generate.
            max_draft: in verified mode, the largest number of tokens that are drafted before the full model verifies
                them.
            tolerance: in verified mode at temperature 0, a draft is also accepted if its probability by the full model
                is at least (1 - tolerance) times the probability of the full model's own choice. 0 is lossless.
            temperature: 0 always takes the most likely token; higher values sample.
            top_p: choose only among the most likely tokens, whose probabilities together just reach top_p. 1 means all
                tokens.
            seed: the same seed gives the same text.
            chat: format the prompt with the model's chat template.
            model: a name that `models` lists; empty for the first one.
            target_disagreement: in cascade mode at temperature 0, a value above 0 replaces the threshold. It is the
                largest share of tokens, 0 to 1, that may differ from the full model's choice. It needs calibrated
                exits.

        Returns an object with text, token_ids, exits and stats. `exits` has a number for each token: 0 is the first
        exit, the highest number is the full model, -1 means copied from earlier in the text. `stats` has numbers about
        the run, such as tokens_per_second, routing_share (share of the tokens from each exit and, last, from the full
        model), acceptance (share of the drafts that were accepted) and cost (weights read per token, 1 for the full
        model). Times are in seconds and shares from 0 to 1; null means not measured.
        """
        settings = Settings(model=model, prompt=prompt, mode=mode, max_new_tokens=max_new_tokens, max_draft=max_draft,
                            tolerance=tolerance, temperature=temperature, top_p=top_p, seed=seed, chat=chat)
        label, config, _, ids = self._prepare(settings, threshold, target_disagreement)
        engine, tokenizer = self._library.get(label)
        events: dict[str, list[TokenEvent]] = {CASCADE: []}
        yield from self._run(label, {CASCADE: Task(ids, config)}, Check.NOTHING, events)
        final = [e for e in events[CASCADE] if e.final]
        token_ids, stats = [e.token_id for e in final], metrics.summarize(events[CASCADE], engine.costs_for(config))
        yield dict(text=tokenizer.decode(token_ids, skip_special_tokens=True), token_ids=token_ids,
                    exits=[e.exit for e in final], stats=asdict(stats))

    def compare(self, prompt: str, mode: str = "cascade", threshold: float = CASCADE_THRESHOLD,
                max_new_tokens: int = 128, max_draft: int = MAX_DRAFT, tolerance: float = 0.0, chat: bool = True,
                model: str = "", target_disagreement: float = 0.0) -> Iterator[dict]:
        """Generate a text with early exits and a text with the full model, both at temperature 0, and compare them.

        `generate` explains the arguments.

        Returns an object with `exits` (the run with early exits) and `full` (the run of the full model), each with
        text, token_ids and stats as from `generate`, and five results: speedup (tokens per second of `exits` divided by
        tokens per second of `full`), agreement (share of the tokens of `exits` that the full model would also choose
        after the same text), positional_match (share of positions at which both texts have the same token),
        first_divergence (index of the first different token, or null) and identical (true if the texts are equal).
        """
        settings = Settings(model=model, prompt=prompt, mode=mode, max_new_tokens=max_new_tokens, max_draft=max_draft,
                            tolerance=tolerance, chat=chat)
        label, config, full, ids = self._prepare(settings, threshold, target_disagreement)
        engine, tokenizer = self._library.get(label)
        events: dict[str, list[TokenEvent]] = {CASCADE: [], FULL: []}
        choices = yield from self._run(label, {CASCADE: Task(ids, config), FULL: Task(ids, full)}, Check.CHOICES,
                                       events)
        token_ids = {side: [e.token_id for e in events[side] if e.final] for side in events}
        stats = {side: metrics.summarize(events[side], engine.costs) for side in events}
        texts = {side: dict(text=tokenizer.decode(token_ids[side], skip_special_tokens=True), token_ids=token_ids[side],
                            stats=asdict(stats[side])) for side in events}
        match = metrics.match(token_ids[CASCADE], token_ids[FULL])
        speeds = [stats[side].tokens_per_second for side in events]
        yield dict(exits=texts[CASCADE], full=texts[FULL], speedup=speeds[0] / speeds[1] if all(speeds) else None,
                    agreement=metrics.agreement(token_ids[CASCADE], choices[CASCADE]),
                    positional_match=match.positional, first_divergence=match.first_divergence,
                    identical=match.sequence)

    def evaluate(self, texts: list[str], mode: str = "cascade", threshold: float = CASCADE_THRESHOLD,
                 max_new_tokens: int = 64, max_draft: int = MAX_DRAFT, tolerance: float = 0.0, chat: bool = True,
                 model: str = "", target_disagreement: float = 0.0) -> Iterator[dict]:
        """Compare early exits with the full model on many prompts, at temperature 0.

        Args:
            texts: the prompts. `generate` explains all other arguments.

        Returns an object with `summary`, which has numbers over all prompts, and `results`, which has an object for
        each prompt: agreement (share of the tokens that the full model would also choose), speedup (relative to the
        full model), routing_share (share of the tokens from each exit and, last, from the full model), text, full_text
        and more. If a prompt could not run, error has the reason.
        """
        if not isinstance(texts, list) or not 1 <= len(texts) <= prompts.MAX_PROMPTS:
            got = f"{len(texts):,} prompts" if isinstance(texts, list) else shown(texts)
            raise BadRequest(f"texts should be a list of 1 to {prompts.MAX_PROMPTS} prompts, got {got}")
        wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if wrong is not None:
            raise BadRequest(f"texts[{wrong}] should be text, got {shown(texts[wrong])}")
        settings = Settings(model=model, mode=mode, max_new_tokens=max_new_tokens, max_draft=max_draft,
                            tolerance=tolerance, chat=chat)
        label, config, _, _ = self._prepare(settings, threshold, target_disagreement, with_prompt=False)
        if len(texts) * config.max_new_tokens > MAX_TOKENS:
            raise BadRequest(f"{len(texts):,} texts of {config.max_new_tokens:,} new tokens are too many: one request "
                             f"may ask for {MAX_TOKENS:,} tokens in all. Send several requests.")
        _, tokenizer = self._library.get(label)
        clock, results = _Clock(), []
        with closing(evaluation.evaluate(
                self._runner, label, partial(prompts.visitor_token_ids, tokenizer, chat=chat),
                [prompts.Prompt(prompts.OWN, text) for text in texts], config,
                partial(tokenizer.decode, skip_special_tokens=True), pauses=True)) as moments:
            for result in moments:
                if result is not None:
                    results.append(result)
                if clock.due():
                    yield dict(prompts=len(results))
        yield dict(summary=asdict(evaluation.summarize_results(results)), results=[asdict(r) for r in results])

    def _run(self, label: str, tasks: Mapping[str, Task], check: Check, events: dict[str, list[TokenEvent]]
             ) -> Generator[dict, None, dict[str, list[int]]]:
        """Run tasks as `Runner.race` does. Yields the progress. Returns the `Batch.choices` of each side.

        events: a list for each side, to which the events of the run are added.
        """
        clock, choices = _Clock(), {}
        with closing(self._runner.race(label, tasks, check)) as batches:
            for batch in batches:
                choices |= batch.choices
                for side, event in batch.events:
                    events[side].append(event)
                if clock.due():
                    yield dict(tokens=sum(e.final for side in events.values() for e in side))
        return choices

    def _prepare(self, settings: Settings, threshold: float, target: float, with_prompt: bool = True
                 ) -> tuple[str, DecodeConfig, DecodeConfig, list[int]]:
        """Check a request and load its model.

        Args:
            settings: the request.
            threshold, target: threshold and target_disagreement, as for `generate`.
            with_prompt: False if the request has no prompt in `settings`.

        Returns the name of the model, the config of the run with exits, the config of the full model's run, and the
        token ids of the prompt ([] if `with_prompt` is False).

        Raises BadRequest for every error that the caller can correct.
        """
        try:
            labels = self._library.labels
            label = labels[0] if settings.model in ("", None) else settings.model
            if label not in labels:
                raise ValueError(f"model should be a name that /models lists, got {shown(label)}")
            flag("chat", settings.chat)
            for _ in self._runner.load(label):
                pass
            engine, tokenizer = self._library.get(label)
            config, full = replace(settings, thresholds=_thresholds(engine, settings, threshold, target)
                                   ).decode_configs(engine.num_exits)
            ids = prompts.visitor_token_ids(tokenizer, settings.prompt, settings.chat) if with_prompt else []
            engine.check(ids if with_prompt else [0], config)       # token 0 stands for any prompt
            return label, config, full, ids
        except (ValueError, ModelUnavailable) as error:
            raise BadRequest(str(error)) from None


class _Clock:
    """Tells when a request should report its progress, and ends one that takes too long."""

    def __init__(self):
        self._began = self._last = time.monotonic()

    def due(self) -> bool:
        """Return True if `PROGRESS_SECONDS` have passed since it was True. Raises BadRequest after `MAX_SECONDS`."""
        now = time.monotonic()
        if now - self._began > MAX_SECONDS:
            raise BadRequest(f"The request took more than {MAX_SECONDS} seconds: ask for fewer tokens or prompts.")
        due = now - self._last >= PROGRESS_SECONDS
        self._last = now if due else self._last
        return due


def _thresholds(engine: Engine, settings: Settings, first: float, target: float) -> tuple[float, ...]:
    """Return the threshold of each exit, in [0, 1]; 1 disables an exit.

    If `target` is above 0, the calibration of the exits gives the thresholds. Otherwise they are computed from `first`,
    the threshold of the first exit.
    """
    if not number("target_disagreement", target, 0, 1):
        return graded_thresholds(number("threshold", first, 0, 1), engine.exit_depths)
    calibrated = engine.thresholds(DecodeConfig(mode=settings.mode, temperature=settings.temperature,
                                                target_disagreement=target))
    return tuple(DISABLED if t is None else t for t in calibrated)
