"""The endpoints, called as a program calls them."""

import gc
import html
import json
import threading
import time
import uuid

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

import app
from cascadeexit import blocks, endpoints
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
    ({"prompt": "  "}, "write a prompt"), ({"mode": "warp"}, "mode must be one of full, cascade, verified, got 'warp'"),
    ({"threshold": -1}, "threshold must be a number from 0 to 1, got -1"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 100_000}, "positions"), ({"model": "<b>other</b>"}, "model should be a name that"),
    ({"max_draft": 10**9}, "max_draft must be"), ({"temperature": 1e-40}, "temperature must be"),
    ({"prompt": 5}, "should be text, got 5")])
def test_bad_input_is_answered_with_the_reason(served, wrong, reason):
    with pytest.raises(AppError, match=reason):
        served[2].predict(**{"prompt": "hi", "chat": False} | wrong, api_name="/generate")


def refusal(url: str, endpoint: str, **values) -> str:
    """Call an endpoint with these values, as any program can; returns the message of its refusal."""
    url = f"{url}gradio_api/call/v2/{endpoint}"
    event = httpx.post(url, content=json.dumps(values), headers={"content-type": "application/json"}).json()["event_id"]
    answer = httpx.get(f"{url}/{event}", timeout=60).text
    assert "event: error" in answer, answer
    return json.loads(answer.split("data: ")[-1])["error"]


WRONG = [None, "x" * 10**5, float("nan"), float("inf"), True, [1], {"a": 1}, 10**30, -1e300, 1.5]
FIELDS = ("mode", "threshold", "max_new_tokens", "max_draft", "tolerance", "temperature", "top_p", "seed", "chat",
          "model", "target_disagreement")
# Values of the list above that a field may have; an empty seed counts as 0, and an empty model is the first one.
RIGHT = {"chat": (True,), "seed": (None,), "model": (None,), "temperature": (1.5, 10**30)}


@pytest.mark.parametrize("field", FIELDS)
def test_every_wrong_value_gets_one_short_sentence_that_names_its_field(served, field, runs):
    for value in WRONG:
        if value in RIGHT.get(field, ()):
            continue
        message = refusal(served[2].src, "generate", **dict(prompt="hi", mode="verified", chat=False) | {field: value})
        assert field in message and len(message) <= 300 and "x" * 100 not in message, (value, message)
    assert runs == []


@pytest.mark.parametrize("texts, reason", [
    ("hi", "a list of 1 to 200 prompts, got 'hi'"), ([], "got 0 prompts"), (["a"] * 201, "got 201 prompts"),
    ([1], "texts[0] should be text, got 1"), (["a", ["b" * 10**5]], "texts[1] should be text"), ({"a": 1}, "got {"),
    (None, "got None"), ("x" * 10**5, "got 'x")], ids=lambda value: str(value)[:20])
def test_texts_that_are_none_are_refused(served, texts, reason):
    message = refusal(served[2].src, "evaluate", texts=texts)
    assert reason in html.unescape(message) and len(message) <= 300


def test_a_wrong_value_of_a_control_is_named_whatever_gradio_says(served, runs):
    """The page's own functions can be called through the queue with any JSON."""
    _, _, client = served
    components = {c["id"]: c for c in client.config["components"]}
    found = 0
    for dependency in client.config["dependencies"]:
        inputs = [components[i] for i in dependency["inputs"]]
        if not dependency["queue"] or not inputs or dependency["api_visibility"] != "private":
            continue
        for wrong in ("x" * 10**5, {"a": "b" * 10**5}, [["c"] * 10**4], None, 1e300, -5):
            message = through_queue(client.src, dependency["id"], [wrong] * len(inputs))
            assert message is None or 0 < len(message) <= 300, message
            found += message is not None
    assert found > 20 and runs == []
    assert "values, got 0" in through_queue(client.src, first_run(client), [])


def first_run(client) -> int:
    """Number of the page's function that decodes a prompt."""
    return next(d["id"] for d in client.config["dependencies"] if d["queue"] and len(d["inputs"]) > 10)


def through_queue(url: str, fn_index: int, data: list) -> str | None:
    """Call a function of the page as a browser does; returns the message of its error, None if there was none."""
    session = uuid.uuid4().hex
    answer = httpx.post(f"{url}gradio_api/queue/join", json=dict(fn_index=fn_index, data=data, session_hash=session))
    assert answer.status_code == 200, answer.text
    with httpx.stream("GET", f"{url}gradio_api/queue/data", params=dict(session_hash=session), timeout=60) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                assert message["success"] or message["output"]["error"], message
                return None if message["success"] else message["output"]["error"]
    raise AssertionError("no answer")


def test_server_functions_answer_null_to_any_json(served):
    client = served[2]
    view = next(c["id"] for c in client.config["components"] if c["props"].get("elem_id") == "ce-view")
    for name in ("token_card", "layer_map"):
        for data in (None, [], {}, "x", ["run", True], ["run", 2**63, 2**63], [["run"]], [{}] * 9, ["run"] * 10**4):
            answer = httpx.post(f"{client.src}gradio_api/component_server", json=dict(
                data=data, fn_name=name, component_id=view, session_hash="s"))
            assert answer.status_code == 200 and answer.json() is None, (name, data)


# -- callers who leave -------------------------------------------------------------------------------------------------

REQUESTS = {"generate": dict(prompt="hi", mode="full", max_new_tokens=900, chat=False),
            "compare": dict(prompt="hi", mode="verified", max_new_tokens=900, chat=False),
            "evaluate": dict(texts=["hi", "ho"], mode="full", max_new_tokens=900, chat=False)}


@pytest.fixture
def ended(served, monkeypatch):
    """Make runs slow. Returns a list that gets the time at which each run ended."""
    engine, times = served[0], []
    generate = engine.generate

    def slow(ids, config):
        try:
            for event in generate(ids, config):
                time.sleep(0.01)
                yield event
        finally:
            times.append(time.monotonic())

    monkeypatch.setattr(engine, "generate", slow)
    return times


def wait_until(true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_caller_who_cancels_frees_the_model_within_a_second(served, ended, name):
    client = served[2]
    job = client.submit(**REQUESTS[name], api_name=f"/{name}")
    wait_until(job.outputs)                     # it tells its progress while it works
    assert set(job.outputs()[0]) == {"prompts" if name == "evaluate" else "tokens"} and not ended
    left = time.monotonic()
    job.cancel()
    wait_until(lambda: len(ended) == (1 if name == "generate" else 2))
    assert max(ended) - left < 1
    assert len(client.predict(prompt="hi", max_new_tokens=3, chat=False, api_name="/generate")["token_ids"]) == 3


@pytest.mark.parametrize("name", REQUESTS)
def test_a_caller_who_hangs_up_frees_the_model_within_a_second(served, ended, name):
    client = served[2]
    url = f"{client.src}gradio_api/call/v2/{name}"
    event = httpx.post(url, json=REQUESTS[name]).json()["event_id"]
    with httpx.stream("GET", f"{client.src}gradio_api/call/{name}/{event}", timeout=20) as lines:
        assert any(line.startswith("event: generating") for line in lines.iter_lines()) and not ended
    left = time.monotonic()
    wait_until(lambda: ended)
    assert min(ended) - left < 1


def test_requests_have_a_largest_size_and_a_longest_time(served, ended, monkeypatch):
    client = served[2]
    with pytest.raises(AppError, match="80 texts of 900 new tokens are too many: one request may ask for 50,000"):
        client.predict(texts=["hi"] * 80, max_new_tokens=900, api_name="/evaluate")
    monkeypatch.setattr(endpoints, "MAX_SECONDS", 0.5)
    for name, request in REQUESTS.items():
        with pytest.raises(AppError, match="took more than 0.5 seconds: ask for fewer tokens or prompts"):
            client.predict(**request, api_name=f"/{name}")


# -- a full queue, limits --------------------------------------------------------------------------------------------


def test_a_full_queue_still_answers_what_needs_no_model(served, monkeypatch):
    engine, _, client = served
    held, generate = threading.Event(), engine.generate
    monkeypatch.setattr(engine, "generate", lambda ids, config: held.wait(60) and generate(ids, config))
    url, body = f"{client.src}gradio_api/call/v2", dict(prompt="hi", mode="full", max_new_tokens=2, chat=False)
    try:
        events = []
        while (answer := httpx.post(f"{url}/generate", json=body)).status_code == 200:
            events.append(answer.json()["event_id"])
            time.sleep(0.05)
        assert answer.status_code == 503 and blocks.MAX_WAITING <= len(events) <= blocks.MAX_WAITING + 1
        assert f"{blocks.MAX_WAITING} runs already wait here" in answer.json()["detail"]
        assert httpx.get(client.src).status_code == 200 and Client(client.src, verbose=False)
        assert client.predict(api_name="/models")
        replay = next(d["id"] for d in client.config["dependencies"]
                      if [t[1] for t in d["targets"]] == ["upload"])
        upload = {"files": ("run.json", app.TRACE.read_bytes())}
        path = httpx.post(f"{client.src}gradio_api/upload", files=upload).json()[0]
        file = dict(path=path, meta={"_type": "gradio.FileData"})
        assert through_queue(client.src, replay, [file]) is None
    finally:
        held.set()
    for event in events:
        assert "event: complete" in httpx.get(f"{url}/generate/{event}", timeout=60).text


def test_no_statistics_are_public(served):
    for path in ("monitoring", "monitoring/summary", "monitoring/x"):
        assert httpx.get(f"{served[2].src}gradio_api/{path}").status_code in (403, 404), path
        assert httpx.get(f"{served[2].src}{path}").status_code in (403, 404), path


def test_a_request_of_many_large_files_is_refused(served):
    files = [("files", (f"{i}.txt", b"x" * 9_000_000)) for i in range(2)]
    assert httpx.post(f"{served[2].src}gradio_api/upload", files=files[:1]).status_code == 200
    answer = httpx.post(f"{served[2].src}gradio_api/upload", files=files)
    assert answer.status_code == 413 and "at most 11,000,000 bytes" in answer.text
    answer = httpx.post(f"{served[2].src}gradio_api/queue/join", content=iter([b"x" * 6_000_000] * 2))
    assert answer.status_code == 413, "a length that is not stated is counted"


def test_what_gradio_keeps_of_visitors_is_limited(served):
    demo = next(reference for reference in gc.get_objects() if isinstance(reference, app.Demo) and reference.is_running)
    assert demo.delete_cache == (app.CLEAN_SECONDS, app.KEEP_SECONDS)
    assert demo.app.state_holder.capacity == app.SESSIONS
