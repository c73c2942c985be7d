"""The endpoints, called as a program calls them."""

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from cascadeexit.calibration import Calibration, Point
from cascadeexit.config import DecodeConfig
from tests.browser.server import serve
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer


@pytest.fixture(scope="module")
def served():
    engine, tokenizer = tiny_engine(seed=3), tiny_tokenizer()
    with serve(engine, tokenizer) as url:
        yield engine, tokenizer, Client(url, verbose=False)


def test_models_are_listed(served):
    engine, _, client = served
    assert client.predict(api_name="/models") == [
        {"model": engine.model.name, "layers": 6, "exit_layers": [2, 3, 5], "trained": False}]


@pytest.mark.parametrize("mode", ["cascade", "verified", "full"])
def test_generate_returns_what_the_engine_writes(served, mode):
    engine, tokenizer, client = served
    answer = client.predict(prompt="hi there", mode=mode, threshold=0.5, max_new_tokens=24, chat=False,
                            api_name="/generate")
    run = engine.run(tokenizer("hi there").input_ids, DecodeConfig(
        mode=mode, thresholds=0.5 if mode == "cascade" else None, max_new_tokens=24))
    assert answer["token_ids"] == run.token_ids and len(answer["exits"]) == 24
    assert answer["text"] == tokenizer.decode(run.token_ids, skip_special_tokens=True)
    assert answer["stats"]["routing_share"] == pytest.approx(run.stats.routing_share)


def test_compare_measures_both_sides(served):
    engine, tokenizer, client = served
    answer = client.predict(prompt="hi there", mode="verified", threshold=0.3, max_new_tokens=24, api_name="/compare")
    assert answer["identical"] and answer["exits"]["token_ids"] == answer["full"]["token_ids"]
    assert answer["agreement"] == 1.0 and answer["speedup"] > 0


def test_a_tolerance_is_passed_to_the_engine(served):
    engine, tokenizer, client = served
    options = dict(mode="verified", max_new_tokens=24, tolerance=0.9)
    answer = client.predict(prompt="hi there", chat=False, **options, api_name="/generate")
    assert answer["token_ids"] == engine.run(tokenizer("hi there").input_ids, DecodeConfig(**options)).token_ids
    with pytest.raises(AppError, match="tolerance goes with mode verified and temperature 0"):
        client.predict(prompt="hi there", temperature=1.0, **options, api_name="/generate")


def test_a_target_disagreement_needs_calibrated_exits(served):
    engine, _, client = served
    options = dict(prompt="hi there", chat=False, max_new_tokens=12, target_disagreement=0.1)
    with pytest.raises(AppError, match="training.calibrate"):
        client.predict(**options, api_name="/generate")
    engine.bank.calibration = Calibration("", 9, 64, 0.1, (Point(0.7, 0.0, 0.05, 1.0), Point(0.1, 0.2, 0.3, 1.0)))
    try:
        answer = client.predict(**options, api_name="/generate")
        with pytest.raises(AppError, match="target_disagreement goes with mode cascade"):
            client.predict(**options, temperature=0.5, api_name="/generate")
    finally:
        engine.bank.calibration = None
    by_threshold = client.predict(**options | dict(target_disagreement=0, threshold=0.7), api_name="/generate")
    assert answer["token_ids"] == by_threshold["token_ids"] and answer["exits"] == by_threshold["exits"]


def test_evaluate_keeps_failures(served):
    answer = served[2].predict(texts=["hi there", ""], max_new_tokens=8, chat=False, api_name="/evaluate")
    assert answer["summary"]["prompts"] == 2 and answer["summary"]["failed"] == 1
    assert answer["results"][0]["tokens"] == 8 and "write a prompt" in answer["results"][1]["error"]


@pytest.fixture
def runs(served, monkeypatch) -> list[str]:
    """Modes of the runs that the engine began during the test."""
    engine, modes = served[0], []
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda ids, config: modes.append(config.mode) or generate(ids, config))
    return modes


@pytest.mark.parametrize("route", ["run", "api"])
def test_a_direct_call_that_would_skip_the_queue_is_refused_and_runs_nothing(served, runs, route):
    url = f"{served[2].src}gradio_api/{route}"
    for endpoint, first in (("generate", "hi there"), ("compare", "hi there"), ("evaluate", ["hi there"])):
        for address in (f"{url}/{endpoint}", f"{url}/{endpoint}/"):
            answer = httpx.post(address, json={"data": [first]})
            assert answer.status_code == 404 and "join the queue" in answer.json()["detail"]
    assert runs == []


def test_a_direct_call_by_number_reaches_no_queued_function(served, runs):
    """The page's own functions have no public name, but the page's configuration shows their numbers."""
    _, _, client = served
    queued = [d for d in client.config["dependencies"] if d["queue"]]
    assert len(queued) == 11, ("run, retry and its seed, fork, measure, the check after Stop, replay and evaluate on "
                               "the page; generate, compare and evaluate for programs")
    for dependency in queued:
        answer = httpx.post(f"{client.src}gradio_api/run/predict",
                            json={"fn_index": dependency["id"], "data": [None] * len(dependency["inputs"])})
        assert answer.status_code == 404, dependency["api_name"]
    assert runs == []


def test_a_call_through_the_queue_is_answered_without_the_client_library(served, runs):
    named = dict(prompt="hi there", mode="full", max_new_tokens=8)
    in_order = {"data": ["hi there", "full", 0.5, 8, 7, 0, 0, 1, 0, True, "", 0]}
    for route, body in (("call/v2", named), ("call", in_order)):
        url = f"{served[2].src}gradio_api/{route}/generate"
        event = httpx.post(url, json=body).json()["event_id"]
        answer = httpx.get(f"{url}/{event}", timeout=60).text
        assert "event: complete" in answer and '"token_ids"' in answer
    assert runs == ["full", "full"]


@pytest.mark.parametrize("wrong, reason", [
    ({"prompt": "  "}, "write a prompt"), ({"mode": "warp"}, "mode must be one of"), ({"threshold": -1}, "thresholds"),
    ({"max_new_tokens": 0}, "at least 1"), ({"max_new_tokens": 100_000}, "positions"),
    ({"model": "<b>other</b>"}, "not offered here"), ({"max_draft": 10**9}, "max_draft must be below"),
    ({"temperature": 1e-40}, "temperature must be"), ({"prompt": 5}, "should be text")])
def test_bad_input_is_answered_with_the_reason(served, wrong, reason):
    with pytest.raises(AppError, match=reason):
        served[2].predict(**{"prompt": "hi", "chat": False} | wrong, api_name="/generate")
