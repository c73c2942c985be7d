"""The numbers of an evaluation are those of its runs; a prompt that cannot run keeps its place."""

import csv
import io
import json
from dataclasses import asdict, replace
from math import sqrt
from statistics import median

import pytest

from cascadeexit import evaluation, metrics, runner
from cascadeexit.config import DecodeConfig
from cascadeexit.evaluation import (
    Result,
    evaluate,
    quality_speed_points,
    results_csv,
    results_json,
    summarize_results,
)
from cascadeexit.library import Library
from cascadeexit.prompts import Prompt, read_prompts
from cascadeexit.runner import RunFailed, Runner
from tests.tiny_models import tiny_engine
from tests.tiny_text import HOSTILE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONFIG = DecodeConfig(thresholds=0.5, max_new_tokens=30)
PROMPTS = [Prompt("chat", "hi there"), Prompt("own", "bad"), Prompt("own", ""), Prompt("code", "=1+1"),
           Prompt("chat", "sky " * 300), Prompt("chat", "why?")]


def encode(text: str) -> list[int]:
    if text == "bad":
        raise ValueError("this one is bad")
    return TOKENIZER(text).input_ids


def evaluation_of(engine, prompts, config=CONFIG, **options):
    return evaluate(Runner(Library.of(engine, TOKENIZER)), engine.model.name, encode, prompts, config, TOKENIZER.decode,
                    **options)


def written(engine, prompts, config=CONFIG, **options) -> list[Result]:
    return list(evaluation_of(engine, prompts, config, **options))


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(seed=3)


@pytest.fixture(scope="module")
def results(engine):
    return written(engine, PROMPTS)


# -- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, mode="verified", max_draft=3),
                                    replace(CONFIG, temperature=0.8, seed=5)], ids=["cascade", "verified", "sampled"])
def test_numbers_are_those_of_the_runs(engine, config):
    for result in written(engine, [PROMPTS[0], PROMPTS[3]], config):
        ids = encode(result.prompt)
        ours, theirs = (engine.run(ids, replace(config, mode=mode)) for mode in (config.mode, "full"))
        match = metrics.match(ours.token_ids, theirs.token_ids)
        assert (result.text, result.full_text) == (TOKENIZER.decode(ours.token_ids), TOKENIZER.decode(theirs.token_ids))
        assert result.tokens == ours.stats.tokens == len(ours.token_ids)
        assert (result.routing_share, result.average_depth, result.cost, result.acceptance) == (
            ours.stats.routing_share, ours.stats.average_depth, ours.stats.cost, ours.stats.acceptance)
        assert (result.positional, result.first_divergence, result.sequence) == (
            match.positional, match.first_divergence, match.sequence)
        expected = metrics.agreement(ours.token_ids, engine.full_choices(ids, ours.token_ids))
        assert result.agreement == (None if config.temperature else expected)
        assert result.speedup == result.tokens_per_second / result.full_tokens_per_second > 0
        assert result.error is None


def test_late_checks_change_no_result(engine, results):
    [checked] = written(engine, PROMPTS[:1], replace(CONFIG, check_late=True))
    assert checked.error is None
    for name in ("text", "full_text", "agreement", "routing_share", "cost"):
        assert getattr(checked, name) == getattr(results[0], name)


def test_verified_writes_what_full_writes(engine):
    for result in written(engine, [PROMPTS[0], PROMPTS[5]], replace(CONFIG, mode="verified")):
        assert result.agreement == 1 and result.sequence and result.first_divergence is None
        assert result.text == result.full_text and result.acceptance is not None


def test_a_tolerance_is_for_the_run_with_exits_alone(engine):
    [result] = written(engine, PROMPTS[:1], replace(CONFIG, mode="verified", thresholds=None, tolerance=0.9))
    full = engine.run(encode(result.prompt), DecodeConfig(mode="full", max_new_tokens=30))
    assert result.error is None and result.full_text == TOKENIZER.decode(full.token_ids)


def test_a_run_that_broke_off_keeps_its_place_and_the_rest_goes_on(engine):
    def worker(compute, seconds):
        def call(label, tasks, check):
            if len(tasks["cascade"].ids) == len(encode("hi there")):
                raise RunFailed("Worker", "it died")
            yield from compute(label, tasks, check)
        return call
    library = Library.of(engine, TOKENIZER)
    first, last = evaluate(Runner(library, worker), engine.model.name, encode, [PROMPTS[0], PROMPTS[5]], CONFIG,
                           TOKENIZER.decode)
    assert first.error == "Worker: it died" and last.error is None and last.tokens


def test_a_text_of_one_token_has_no_speed(engine):
    [result] = written(engine, PROMPTS[:1], replace(CONFIG, max_new_tokens=1))
    assert result.tokens == 1 and result.speedup is result.tokens_per_second is None
    assert result.agreement is not None and quality_speed_points([result]) == []
    assert summarize_results([result]).speedup is None


def test_prompts_that_cannot_run_keep_their_place_and_the_rest_goes_on(results):
    assert [r.index for r in results] == list(range(len(PROMPTS)))
    assert [(r.kind, r.prompt) for r in results] == [(p.kind, p.text) for p in PROMPTS]
    assert [r.index for r in results if r.error] == [1, 2, 4]
    assert results[1].error == "this one is bad"
    assert "empty" in results[2].error and "1024" in results[4].error
    assert asdict(results[1]) == asdict(Result(1, "own", "bad", "this one is bad"))


def test_a_config_that_fits_no_prompt_is_refused_at_once(engine):
    for config in (replace(CONFIG, thresholds=(0.5,)), replace(CONFIG, mode="verified", max_draft=1_000)):
        with pytest.raises(ValueError, match="thresholds|max_draft"):
            evaluation_of(engine, PROMPTS, config)      # before the first result is asked for


@pytest.fixture
def watched(engine, monkeypatch):
    """Modes of the runs that began, and of those that were closed."""
    began, closed, generate = [], [], engine.generate

    def watch(stream, mode):
        began.append(mode)
        try:
            yield from stream
        finally:
            stream.close()
            closed.append(mode)
    monkeypatch.setattr(engine, "generate", lambda ids, config: watch(generate(ids, config), config.mode))
    return began, closed


@pytest.fixture
def event_by_event(monkeypatch):
    """A batch for each event."""
    monkeypatch.setattr(runner, "BATCH_SECONDS", 0.0)


def test_closing_in_the_middle_of_a_prompt_closes_both_runs(engine, watched, event_by_event, monkeypatch):
    began, closed = watched
    # Kept alive, so that garbage collection cannot close what the generator forgot to close.
    kept, race = [], runner.race
    monkeypatch.setattr(runner, "race", lambda sides: kept.append(race(sides)) or kept[-1])
    running = evaluation_of(engine, PROMPTS, pauses=True)
    assert [next(running) for _ in range(5)] == [None] * 5
    assert sorted(began) == ["cascade", "full"] and closed == []
    running.close()
    assert sorted(closed) == ["cascade", "full"] and list(running) == []


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_closing_between_prompts_leaves_nothing_open(engine, watched, taken):
    began, closed = watched
    running = evaluation_of(engine, PROMPTS)
    for _ in range(taken):
        next(running)
    running.close()
    assert sorted(began) == sorted(closed) == ["cascade", "full"] * (taken > 0)


def test_a_run_that_breaks_closes_both_sides(engine, watched, event_by_event, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")
    running = evaluation_of(engine, PROMPTS, pauses=True)
    next(running), next(running), next(running)
    monkeypatch.setattr(engine.model.layers, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(running)
    assert sorted(watched[1]) == ["cascade", "full"]


def test_pauses_change_nothing_but_the_pauses(engine):
    timeless = [replace(r, tokens_per_second=0, full_tokens_per_second=0, speedup=0) for r in (
        *written(engine, PROMPTS[:2]), *filter(None, written(engine, PROMPTS[:2], pauses=True)))]
    assert timeless[:2] == timeless[2:]


# -- over all --------------------------------------------------------------------------------------------------------

MADE = [Result(0, "a", "p", None, 30, 0.9, 0.5, 4, False, (0.5, 0.5), 0.6, 0.7, None, 10.0, 5.0, 2.0),
        Result(1, "b", "q", None, 10, 0.5, 1.0, None, True, (0.1, 0.9), 1.0, 1.1, 0.25, 20.0, 40.0, 0.5),
        Result(2, "a", "r", "no"),
        Result(3, "a", "s", None, 60, 1.0, 0.0, 0, False, (1.0, 0.0), 0.2, 0.3, 0.75, 90.0, 10.0, 9.0),
        Result(4, "c", "t", None, 0, None, 0.5, 20, False, (0.0, 0.0))]


def test_a_summary_weighs_by_tokens_and_multiplies_speeds():
    s = summarize_results(MADE)
    assert (s.prompts, s.failed, s.tokens) == (5, 1, 100)
    assert s.agreement == pytest.approx((27 + 5 + 60) / 100)
    assert s.routing_share == pytest.approx(((15 + 1 + 60) / 100, (15 + 9) / 100))
    assert s.average_depth == pytest.approx((18 + 10 + 12) / 100) and s.cost == pytest.approx((21 + 11 + 18) / 100)
    assert s.acceptance == pytest.approx(0.5) and s.positional == pytest.approx(0.5)
    assert s.first_divergence == 4 and s.sequence == pytest.approx(1 / 4)
    assert (s.tokens_per_second, s.full_tokens_per_second) == (20, 10)
    assert s.speedup == pytest.approx(9 ** (1 / 3))         # 2 x 0.5 x 9


def test_a_summary_has_the_same_numbers_for_each_kind():
    s = summarize_results(MADE)
    assert list(s.kinds) == ["a", "b", "c"]
    assert s.kinds["a"] == replace(summarize_results([MADE[0], *MADE[2:4]]), kinds={})
    assert s.kinds["a"].failed == 1 and s.kinds["a"].speedup == pytest.approx(sqrt(18))
    assert s.kinds["b"].agreement == 0.5 and s.kinds["b"].first_divergence is None


@pytest.mark.parametrize("nothing", [[], [MADE[2]]], ids=["no results", "all failed"])
def test_a_summary_of_nothing_has_no_numbers(nothing):
    s = summarize_results(nothing)
    assert (s.prompts, s.failed, s.tokens, s.routing_share) == (len(nothing), len(nothing), 0, ())
    assert s.agreement is s.speedup is s.positional is s.tokens_per_second is None
    json.loads(results_json(nothing, CONFIG, "tiny")), results_csv(nothing)


def test_a_summary_of_runs_holds_their_numbers(results):
    ran, s = [r for r in results if r.error is None], summarize_results(results)
    assert s.failed == 3 and s.tokens == sum(r.tokens for r in ran) and sum(s.routing_share) == pytest.approx(1)
    assert s.agreement * s.tokens == pytest.approx(sum(r.agreement * r.tokens for r in ran))
    assert s.tokens_per_second == median(r.tokens_per_second for r in ran)


def test_points_hold_quality_and_speed(results):
    points = quality_speed_points([*results, replace(MADE[0], prompt="two\n words " * 20)])
    assert [p["kind"] for p in points] == ["chat", "code", "chat", "a"]
    assert points[0] == dict(x=results[0].speedup, y=results[0].agreement, cost=results[0].cost, label="hi there",
                             kind="chat")
    assert points[-1]["label"].startswith("two words two") and len(points[-1]["label"]) == evaluation.LABEL_CHARACTERS


# -- files -----------------------------------------------------------------------------------------------------------

NASTY = ('=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "\t=1", "\r\n=1", 'a "quoted", cell\nof two lines',
         "\u202eabc", "nul \0 inside", "'", " =1", "1,5", *HOSTILE)


def table(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_json_holds_everything(results):
    file = json.loads(results_json(results, replace(CONFIG, thresholds=(0.5, None, 0.9)), "tiny"))
    assert list(file) == ["format", "model", "config", "summary", "results"]
    assert file["format"] == evaluation.FORMAT == 1 and file["model"] == "tiny"
    assert file["config"]["mode"] == "cascade" and file["config"]["thresholds"] == [0.5, None, 0.9]
    assert DecodeConfig(**file["config"]) == replace(CONFIG, thresholds=[0.5, None, 0.9])
    assert file["summary"] == json.loads(json.dumps(asdict(summarize_results(results))))
    assert [Result(**{**row, "routing_share": tuple(row["routing_share"])}) for row in file["results"]] == results


def test_csv_holds_every_number_as_it_is(results):
    rows = table(results_csv(results))
    assert len(rows) == len(results)
    for row, result in zip(rows, results):
        shares = [row.pop(f"routing_share_{s + 1}") for s in range(4)]
        assert [float(s) for s in shares if s] == list(result.routing_share)
        assert set(row) == set(asdict(result)) - {"routing_share"}
        for name, value in asdict(result).items():
            if isinstance(value, float):
                assert float(row[name]) == value
            elif name not in ("prompt", "text", "full_text", "routing_share"):
                assert row[name] == ("" if value is None else str(value))


def test_a_spreadsheet_runs_nothing_of_a_csv():
    rows = table(results_csv([Result(0, text, text, text, text=text, full_text=text) for text in NASTY]))
    for row, text in zip(rows, NASTY, strict=True):
        for name in ("kind", "prompt", "error", "text", "full_text"):
            assert row[name] == ("'" + text if text[0] in "=+-@\t\r\n" else text)
    [row] = table(results_csv([Result(0, "own", "p", speedup=-1.5)]))
    assert row["speedup"] == "-1.5"                         # a number stays a number


def test_hostile_text_survives(engine):
    prompts = [Prompt("own", text) for text in HOSTILE]
    results = written(engine, prompts, replace(CONFIG, max_new_tokens=8))
    assert [r.prompt for r in results] == list(HOSTILE) and not any(r.error for r in results)
    assert [r["prompt"] for r in json.loads(results_json(results, CONFIG, HOSTILE[0]))["results"]] == list(HOSTILE)
    assert [r["prompt"] for r in table(results_csv(results))] == list(HOSTILE)
    assert read_prompts("\n".join(HOSTILE)) == prompts
    assert read_prompts("\n".join(json.dumps({"prompt": text}) for text in HOSTILE)) == prompts


def test_half_characters_can_be_saved():
    results = [Result(0, "own", "a\ud800", "b\udfff")]
    assert json.loads(results_json(results, CONFIG, "tiny"))["results"][0]["prompt"] == "a\ud800"
    assert table(results_csv(results).encode("utf-8").decode("utf-8"))[0]["prompt"] == "a\\ud800"
