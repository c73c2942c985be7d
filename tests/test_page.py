"""Handlers of the page without a browser: runs of several sides, Stop, forks, and evaluations that are cancelled."""

import gc
import json

import pytest

from cascadeexit import kept, record
from cascadeexit import page as module
from cascadeexit import runner as runner_module
from cascadeexit.config import DecodeConfig
from cascadeexit.inspection import inspect
from cascadeexit.library import Library
from cascadeexit.page import Page, PromptSource, retried
from cascadeexit.runner import Runner, Task
from cascadeexit.settings import Settings
from cascadeexit.wire import expand
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SETTINGS = Settings(model="llama-untied", prompt="hi there", chat=False, max_new_tokens=40, thresholds=(0.5,) * 6)
IDS = TOKENIZER("hi there").input_ids


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(seed=3)


@pytest.fixture
def page(engine):
    return Page(Runner(Library.of(engine, TOKENIZER)))


def records(frames: list) -> list[dict]:
    """Records of the last frame that has a stream; every frame's stream must begin with the one before."""
    texts = [frame.stream for frame in frames if frame.stream is not None]
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:])), "a frame took something back"
    return [expand(line) for line in texts[-1].splitlines()]


def final(found: list[dict], side: str) -> list[dict]:
    return [r for r in found if r["type"] == "token" and r["side"] == side and r["status"] in ("emitted", "accepted")]


def of(found: list[dict], type: str, side: str | None = None) -> list[dict]:
    return [r for r in found if r["type"] == type and (side is None or r["side"] == side)]


def stopped_after(page: Page, tokens: int, monkeypatch, **change):
    """Begin a run, and stop it when this many tokens were written; returns its id."""
    monkeypatch.setattr(module, "frames", _every)
    monkeypatch.setattr(runner_module, "BATCH_SECONDS", 0.0)
    run = page.respond(Settings(**vars(SETTINGS) | change))
    for frame in run:
        found = [expand(line) for line in frame.stream.splitlines()]
        if len(final(found, "cascade")) + len(final(found, "full")) >= tokens:
            break
    run.close()
    return found[1]["run"], found


def _every(stream, contest):
    for name, event in contest:
        stream.add(name, event)
        yield stream.text


# -- turns ----------------------------------------------------------------------------------------------------------


def test_a_visitor_waits_for_a_programs_run_and_is_told(engine):
    runner = Runner(Library.of(engine, TOKENIZER))
    page, other = Page(runner), runner.race("llama-untied", {"other": Task(IDS, DecodeConfig(max_new_tokens=40))})
    next(other)
    run = page.respond(SETTINGS)
    first, told, again = next(run), next(run), next(run)
    assert of(records([first]), "status") == [] and again.stream is None
    assert of(records([told]), "status")[-1]["message"].startswith("Waiting for another run")
    other.close()
    assert len(final(records(list(run)), "full")) == 40


def test_a_visitor_who_stops_waiting_leaves_the_queue(engine):
    runner = Runner(Library.of(engine, TOKENIZER))
    other = runner.race("llama-untied", {"other": Task(IDS, DecodeConfig(max_new_tokens=40))})
    next(other)
    run = Page(runner).respond(SETTINGS)
    next(run), next(run)
    run.close()
    other.close()
    assert next(runner.race("llama-untied", {"other": Task(IDS, DecodeConfig(max_new_tokens=4))})).events


# -- sides ----------------------------------------------------------------------------------------------------------


def test_a_run_has_three_sides_where_a_preset_stands_beside(page, engine):
    found = records(list(page.respond(Settings(**vars(SETTINGS) | dict(beside="Exact")))))
    sides = found[1]["sides"]
    assert [(s["name"], s["mode"], s["title"]) for s in sides] == [
        ("cascade", "cascade", "Custom thresholds"), ("second", "verified", "Exact: same text, checked"),
        ("full", "full", "Full model")]
    assert found[1]["machine"].startswith("CPU, ") and len(found[1]["date"]) == 10
    full = engine.run(IDS, DecodeConfig(mode="full", max_new_tokens=40)).token_ids
    assert [r["id"] for r in final(found, "second")] == [r["id"] for r in final(found, "full")] == full
    ends = {r["side"]: r for r in of(found, "end")}
    assert {*ends} == {"cascade", "second"} and ends["second"]["identical"] and ends["second"]["agreement"] == 1
    assert {r["side"] for r in of(found, "versus")} == {"cascade", "second"}
    assert [r["message"] for r in of(found, "status")][0] == "Checking quality…"
    run = found[1]["run"]
    assert page.token_card(run, "second", 3)["readings"] and page.layer_map(run, "second", 0, 5)["total"] == 40
    assert page.token_card(run, "full", 3) is None


@pytest.mark.parametrize("arguments", [("x", "cascade", 0), ([], {}, None), (None, None, None)])
def test_cards_of_unknown_tokens_are_none(page, arguments):
    assert page.token_card(*arguments) is None and page.layer_map(*arguments, 5) is None


@pytest.mark.parametrize("start, count, columns", [(-2**64, 2**64, 40), (0, -5, 1), (39, 2**63, 1)])
def test_a_map_has_only_columns_that_are_there(page, start, count, columns):
    run = records(list(page.respond(SETTINGS)))[1]["run"]
    assert len(page.layer_map(run, "cascade", start, count)["columns"]) == columns
    for beyond in (40, 2**64):
        assert page.layer_map(run, "cascade", beyond, count) is None


@pytest.mark.parametrize("side, i", [("cascade", -1), ("cascade", 40), ("cascade", True), ("left", 0), ([], 0),
                                     ({}, {})])
def test_cards_of_wrong_places_are_none(page, side, i):
    run = records(list(page.respond(SETTINGS)))[1]["run"]
    assert page.token_card(run, side, i) is None


def test_a_preset_that_is_not_offered_gets_a_message(page):
    [frame] = page.respond(Settings(**vars(SETTINGS) | dict(beside="Warp")))
    assert "'Warp' cannot be shown" in frame.notice.message


def test_a_sampled_run_has_no_agreement(page):
    end, = of(records(list(page.respond(Settings(**vars(SETTINGS) | dict(temperature=0.8))))), "end")
    assert end["agreement"] is None and end["differs"] == []


# -- Stop -----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_is_checked_as_far_as_it_came(page, engine, monkeypatch):
    run, seen = stopped_after(page, 20, monkeypatch)
    found = records(list(page.analyse(run)))
    assert found[:len(seen)] == seen
    kinds = [r["type"] for r in found]
    assert kinds.count("stopped") == 1 and kinds.index("stopped") < kinds.index("end")
    ours, theirs = ([r["id"] for r in final(found, side)] for side in ("cascade", "full"))
    n, end = min(len(ours), len(theirs)), of(found, "end")[0]
    choices = engine.full_choices(IDS, ours)
    assert end["agreement"] == pytest.approx(sum(map(int.__eq__, ours, choices)) / len(ours), abs=1e-5)
    assert end["positional"] == pytest.approx(sum(map(int.__eq__, ours, theirs)) / n, abs=1e-5)
    assert end["sequence"] is end["identical"] is None, "nobody knows how the texts would have ended"
    assert page.token_card(run, "cascade", len(ours) - 1)
    assert record.load(record.dump(_text(page, run)))


def _text(page: Page, run: str) -> str:
    return page._runs.get(run).stream.text


def test_stop_while_texts_are_checked_gives_the_check_up(page, monkeypatch):
    run = page.respond(SETTINGS)
    for frame in run:
        if "Checking quality" in frame.stream:
            break
    run.close()
    id = expand(frame.stream.splitlines()[1])["run"]
    assert [f.stream for f in page.analyse(id)] == [None]
    assert _text(page, id).endswith('{"type":"stopped"}\n')


@pytest.mark.parametrize("run", ["", "unknown", None, [], {}])
def test_nothing_happens_for_a_run_that_is_not_kept(page, run):
    assert [(f.stream, f.notice) for f in page.analyse(run)] == [(None, None)]


def test_a_finished_run_is_not_checked_again(page):
    found = records(list(page.respond(SETTINGS)))
    assert [f.stream for f in page.analyse(found[1]["run"])] == [None]


# -- forks ----------------------------------------------------------------------------------------------------------


def forked(page: Page, at: int, side: str = "cascade", **change):
    """A finished run, then a fork of it with the likeliest other candidate; returns (run, token, records)."""
    found = records(list(page.respond(Settings(**vars(SETTINGS) | change))))
    return _fork(page, found, at, side)


def _fork(page: Page, found: list[dict], at: int, side: str):
    run = found[1]["run"]
    there = {r["i"]: r["id"] for r in final(found, side)}.get(at)
    top = [c["id"] for c in page.token_card(run, side, at)["readings"][-1]["top"]]
    token = next(c for c in top if c not in (there, TOKENIZER.eos_token_id))
    return run, token, records(list(page.fork(run, side, at, token)))


@pytest.mark.parametrize("at", [0, 7, 38])
@pytest.mark.parametrize("mode", ["cascade", "verified"])
def test_a_fork_continues_as_the_engine_does(page, engine, at, mode):
    run, token, found = forked(page, at, mode=mode)
    before = [r["id"] for r in final(found, "cascade")][:at]
    fork, own = of(found, "fork")[0], final(found, "fork1")
    assert (fork["side"], fork["of"], fork["at"], fork["id"]) == ("fork1", "cascade", at, token)
    config = DecodeConfig(mode=mode, thresholds=[0.5] * 3 if mode == "cascade" else None, max_new_tokens=39 - at)
    wanted = engine.run([*IDS, *before, token], config)
    assert [r["id"] for r in own] == [token, *wanted.token_ids]
    assert [r["i"] for r in own] == list(range(at, at + len(own)))
    assert "".join(r["text"] for r in own) == TOKENIZER.decode([*before, token, *wanted.token_ids])[
        len(TOKENIZER.decode(before)):] or any("part" in r for r in found)
    end = of(found, "end", "fork1")[0]
    choices = inspect(engine, [*IDS, *before, token], wanted.events).full_choices
    assert end["differs"] == [at + 1 + i for i, (a, b) in enumerate(zip(wanted.token_ids, choices)) if a != b]
    assert end["identical"] is None and {m["i"] for m in end["moments"]} <= {*end["differs"]}
    stats = of(found, "stats", "fork1")[-1]
    assert stats["tokens"] == len(wanted.token_ids) and stats["done"]
    here, there = (page.token_card(run, side, at)["readings"][-1]["top"] for side in ("fork1", "cascade"))
    assert [c["id"] for c in here] == [c["id"] for c in there], "the same text is before it"
    assert page.token_card(run, "fork1", max(0, at - 1))
    assert page.layer_map(run, "fork1", 0, 64)["total"] == at + len(own)
    assert page.token_card(run, "fork1", at + len(own)) is None


def test_a_fork_of_a_fork_is_saved_and_loaded(page):
    _, _, found = forked(page, 5)
    run, _, found = _fork(page, found, 9, "fork1")
    assert [(f["side"], f["of"], f["at"]) for f in of(found, "fork")] == [
        ("fork1", "cascade", 5), ("fork2", "fork1", 9)]
    assert [r["i"] for r in final(found, "fork2")] == list(range(9, 40))
    text = _text(page, run)
    loaded = record.load(record.dump(text))
    assert [expand(line) for line in loaded.splitlines()] == [r for r in found if r["type"] != "status"]


@pytest.mark.parametrize("at", [0, 7])
@pytest.mark.parametrize("mode", ["cascade", "verified"])
def test_the_full_text_continues_with_the_settings_of_the_first_side(page, engine, at, mode):
    found = records(list(page.respond(Settings(**vars(SETTINGS) | dict(mode=mode)))))
    run, theirs = found[1]["run"], [r["id"] for r in final(found, "full")]
    found = records(list(page.fork(run, "full", at, theirs[at])))
    fork, own = of(found, "fork")[0], final(found, "fork1")
    assert (fork["of"], fork["at"], fork["id"]) == ("full", at, theirs[at])
    config = DecodeConfig(mode=mode, thresholds=[0.5] * 3 if mode == "cascade" else None, max_new_tokens=39 - at)
    wanted = engine.run([*IDS, *theirs[:at + 1]], config)
    assert [r["id"] for r in own] == [theirs[at], *wanted.token_ids]
    choices = inspect(engine, [*IDS, *theirs[:at + 1]], wanted.events).full_choices
    differs = [at + 1 + i for i, (a, b) in enumerate(zip(wanted.token_ids, choices)) if a != b]
    assert of(found, "end", "fork1")[0]["differs"] == differs
    assert page.layer_map(run, "fork1", 0, 64)["total"] == at + len(own), "its beginning was inspected, too"
    assert page.token_card(run, "fork1", 0)["readings"][-1]["top"][0]["id"] == theirs[0]
    _, _, found = _fork(page, found, at + 2, "fork1")
    assert of(found, "end", "fork2") and page.token_card(run, "fork2", 0)
    assert [expand(line) for line in record.load(record.dump(_text(page, run))).splitlines()] == [
        r for r in found if r["type"] != "status"]


@pytest.mark.parametrize("change, reason", [
    (dict(run="gone"), "no longer keeps this run"), (dict(side="full", at=40), "no such token"),
    (dict(side=[]), "no such token"), (dict(at=40), "no such token"), (dict(at=-1), "no such token"),
    (dict(at=True), "no such token"),
    (dict(token_id="x"), "no such token"), (dict(token_id=10**6), "must be in 0..96"),
    (dict(token_id=1), "ends the text"),
    (dict(at=39), "as long as it may be")])
def test_a_fork_that_cannot_be_gets_a_message(page, change, reason):
    run = records(list(page.respond(SETTINGS)))[1]["run"]
    text = _text(page, run)
    *_, frame = page.fork(**dict(run=run, side="cascade", at=3, token_id=9) | change)
    assert reason in frame.notice.message and frame.stream is None and _text(page, run) == text


def test_a_run_that_grows_cannot_be_forked(page):
    run = page.respond(SETTINGS)
    id = expand(next(run).stream.splitlines()[1])["run"]
    [frame] = page.fork(id, "cascade", 0, 9)
    assert "no such token" in frame.notice.message or "still growing" in frame.notice.message
    run.close()


def test_a_run_has_a_limited_number_of_forks(page, monkeypatch):
    monkeypatch.setattr(kept, "FORKS", ("fork1",))
    _, _, found = forked(page, 5)
    *_, frame = page.fork(found[1]["run"], "cascade", 6, 9)
    assert "already has 1 forks" in frame.notice.message


# -- long prompts ---------------------------------------------------------------------------------------------------


def test_a_long_prompt_can_be_stopped_between_its_chunks(page, monkeypatch):
    monkeypatch.setattr(module, "frames", _every)
    monkeypatch.setattr(runner_module, "BATCH_SECONDS", 0.0)
    run = page.respond(Settings(**vars(SETTINGS) | dict(prompt="sky " * 200)))
    for frame in run:
        found = [expand(line) for line in frame.stream.splitlines()]
        if of(found, "reading"):
            break
    run.close()
    reading, = of(found, "reading")
    assert 0 < reading["read"] < reading["total"] == found[1]["prompt_tokens"] and not of(found, "token")
    assert [f.stream for f in page.analyse(found[1]["run"])] == [None], "there is nothing to check"


# -- many prompts ---------------------------------------------------------------------------------------------------


def test_after_cancel_text_table_chart_and_files_agree(page, monkeypatch):
    monkeypatch.setattr(module, "FIGURE_SECONDS", 1e9)
    running, report = page.evaluate(PromptSource(pasted="one\ntwo\nthree\nfour"), SETTINGS), None
    for progress in running:
        report = report if progress.report is None else progress.report
        if progress.status and progress.status.startswith("2 of 4"):
            break
    running.close()
    shown = page.cancelled(report)
    assert shown.kind == "stopped" and shown.status.startswith("2 of 4") and "left" not in shown.status
    assert len(shown.rows) == 2 == len(json.loads(shown.files["json"].read_text())["results"])
    star = next(trace for trace in shown.figure.data if trace.name == "all prompts")
    assert f"{star.y[0]:.1%}" in shown.status and f"{star.x[0]:.2f}×" in shown.status
    points = [trace for trace in shown.figure.data if trace.name == "own" and trace.xaxis == "x"]
    assert sum(len(trace.x) for trace in points) == 2


def test_the_files_of_an_evaluation_are_deleted_when_it_is_no_longer_kept(page, monkeypatch):
    monkeypatch.setattr(page._reports, "_most", 1)
    folders = []
    for _ in range(2):
        progress = [p for p in page.evaluate(PromptSource(pasted="one"), SETTINGS) if p.files][-1]
        folders.append(progress.files["json"].parent)
        assert {path.name for path in folders[-1].iterdir()} == {"evaluation.json", "evaluation.csv"}
        del progress
        gc.collect()
    assert not folders[0].exists() and folders[1].exists()


@pytest.mark.parametrize("each", ["many", 10**9, -1, [2], 1.5])
def test_a_wrong_number_of_prompts_gets_a_message(page, each):
    shown = list(page.evaluate(PromptSource(kinds=("code",), each=each), SETTINGS))[-1]
    assert shown.kind == "error" and "the number of prompts of each kind must be a whole number" in shown.status


def test_cancel_changes_nothing_when_no_evaluation_runs(page):
    assert page.cancelled("") == page.cancelled("other") == module.Progress()
    ids = [p.report for p in page.evaluate(PromptSource(pasted="one"), SETTINGS)]
    assert ids[-1] == "" and page.cancelled(ids[0]) == module.Progress(), "a finished one is not cancelled"


# -- run again ------------------------------------------------------------------------------------------------------


def test_running_again_at_temperature_0_says_that_the_text_stays():
    assert retried(4, 0.7) == (5, None)
    seed, notice = retried(4, 0)
    assert seed == 4 and "0.7" in notice.message
