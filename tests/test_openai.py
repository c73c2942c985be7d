"""The endpoint in the shape of OpenAI's API, called with its own client, and with httpx where that hides things."""

import json
import math
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import torch
from gradio_client import Client

from cascadeexit import hub
from cascadeexit.config import DecodeConfig
from cascadeexit.inspection import inspect
from cascadeexit.openai import routes, service
from cascadeexit.openai.writing import StoppedText
from cascadeexit.prompts import conversation_ids, visitor_token_ids
from tests.browser.server import serve
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer

ROOT = Path(__file__).parents[1]
TOKENIZER = tiny_tokenizer()
NAME = "llama-untied"
TURNS = [{"role": "system", "content": "abc "}, {"role": "user", "content": "hi there"},
         {"role": "assistant", "content": "who? "}, {"role": "user", "content": "me"}]
GREEDY = dict(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(seed=3)


@pytest.fixture(scope="module")
def url(engine):
    with serve(engine, TOKENIZER) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0)


def text_of(ids) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def full(engine, ids, tokens: int = 24):
    return engine.run(ids, DecodeConfig(mode="full", max_new_tokens=tokens))


def chat(client, **options):
    return client.chat.completions.create(**dict(model=NAME, messages=TURNS, **GREEDY) | options)


def complete(client, **options):
    return client.completions.create(**dict(model=NAME, prompt="hi there", **GREEDY) | options)


def test_each_mode_of_a_model_is_a_model(client):
    assert [model.id for model in client.models.list()] == [NAME, f"{NAME}:full", f"{NAME}:cascade", f"{NAME}:verified"]
    assert client.models.retrieve(f"{NAME}:full").id == f"{NAME}:full"
    with pytest.raises(openai.NotFoundError, match="expected a name that /v1/models lists, got 'gpt'"):
        client.models.retrieve("gpt")


# -- texts ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["full", "verified", "cascade"])
def test_a_chat_writes_what_the_engine_writes(client, engine, mode):
    ids = conversation_ids(TOKENIZER, TURNS)
    answer = chat(client, model=f"{NAME}:{mode}")
    run = engine.run(ids, DecodeConfig(mode=mode, max_new_tokens=24))
    assert answer.choices[0].message.content == text_of(run.token_ids)
    assert answer.choices[0].finish_reason == "length" and answer.model == f"{NAME}:{mode}"
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == len(ids) + 24
    details = answer.usage.completion_tokens_details
    accepted = sum(e.status == "accepted" for e in run.events)
    rejected = sum(e.status == "rejected" for e in run.events)
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (accepted, rejected)
    timings = answer.timings
    assert timings["predicted_n"] == 24 and timings["predicted_per_second"] > 0 and timings["prompt_ms"] > 0
    assert timings["draft_n"] == accepted + rejected and timings["draft_n_accepted"] == accepted
    assert timings["routing_share"] == pytest.approx(run.stats.routing_share)


def test_verified_is_the_default_and_equals_full(client):
    texts = {name: chat(client, model=NAME + name).choices[0].message.content for name in ("", ":verified", ":full")}
    assert len(set(texts.values())) == 1


def test_parts_and_roles_are_read_as_one_text_each(client):
    parts = [{"role": "developer", "content": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c "}]},
             *TURNS[1:]]
    assert chat(client, messages=parts).choices == chat(client).choices


def test_our_own_settings_reach_the_engine(client, engine):
    ids = TOKENIZER("hi there").input_ids
    for extra in (dict(mode="cascade", threshold=0.2), dict(tolerance=0.9), dict(max_draft=2)):
        config = {"mode": "verified"} | extra
        config = {dict(threshold="thresholds").get(name, name): value for name, value in config.items()}
        run = engine.run(ids, DecodeConfig(**config, max_new_tokens=24))
        assert complete(client, extra_body=extra).choices[0].text == text_of(run.token_ids)


def test_the_same_seed_gives_the_same_sampled_text(client, engine):
    options = dict(temperature=0.8, top_p=0.9, seed=7)
    run = engine.run(TOKENIZER("hi there").input_ids, DecodeConfig(mode="full", max_new_tokens=24, **options))
    assert complete(client, **options).choices[0].text == text_of(run.token_ids)
    texts = {complete(client, temperature=1.5).choices[0].text for _ in range(3)}
    assert len(texts) > 1, "without a seed, each answer has its own"


def test_every_prompt_of_a_list_has_a_choice(client, engine):
    prompts = [[5, 9, 33], [7, 8]]
    answer = complete(client, prompt=prompts)
    assert [choice.text for choice in answer.choices] == [text_of(full(engine, ids).token_ids) for ids in prompts]
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.usage.prompt_tokens == 5
    assert answer.timings["predicted_n"] == 48


# -- streams ----------------------------------------------------------------------------------------------------------

def test_a_stream_has_the_events_that_openai_sends(url, engine):
    body = dict(model=NAME, messages=TURNS, **GREEDY, stream=True, stream_options=dict(include_usage=True))
    with httpx.stream("POST", f"{url}v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
    first, *pieces, last, usage = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in pieces)
    assert text == text_of(full(engine, conversation_ids(TOKENIZER, TURNS)).token_ids)
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"
    assert last["timings"]["predicted_n"] == 24
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 24
    assert {chunk["object"] for chunk in (first, *pieces, last, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (first, *pieces, last, usage)}) == 1
    assert all(chunk["usage"] is None for chunk in (first, *pieces, last))


def test_a_streamed_completion_equals_the_whole_one(client):
    options = dict(prompt=["hi there", "abc"], echo=True, logprobs=2)
    texts, ends = {0: "", 1: ""}, {}
    for chunk in complete(client, **options, stream=True):
        assert chunk.usage is None
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.logprobs
    whole = complete(client, **options).choices
    assert list(texts.values()) == [choice.text for choice in whole]
    assert list(ends.values()) == [choice.logprobs for choice in whole]


# -- stop texts -------------------------------------------------------------------------------------------------------

def test_a_text_ends_before_a_stop_text_across_tokens(client, engine):
    run = full(engine, TOKENIZER("hi there").input_ids)
    text = text_of(run.token_ids)
    stop = text[5:8]                        # begins and ends inside the text, over several tokens of one letter
    expected = text[:text.index(stop)]
    answer = complete(client, stop=[stop, "never"])
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "stop"
    assert text_of(run.token_ids[:answer.usage.completion_tokens]).startswith(expected + stop)
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, stop=stop, stream=True))
    assert streamed == expected


def test_text_that_might_begin_a_stop_text_is_held_back_until_it_is_clear():
    text = StoppedText(TOKENIZER, ["abd", "zz"])
    assert [text.push(i) for i in TOKENIZER("abab").input_ids] == ["", "", "ab", ""]
    assert text.flush() == "ab" and text.text == "abab" and not text.stopped
    text = StoppedText(TOKENIZER, ["abd", "zz"])
    assert "".join(map(text.push, TOKENIZER("caabd").input_ids)) == "ca" and text.stopped and text.flush() == ""


# -- log probabilities ------------------------------------------------------------------------------------------------

def test_log_probabilities_of_a_chat_are_those_of_the_full_model(client, engine):
    ids = conversation_ids(TOKENIZER, TURNS)
    answer = chat(client, model=f"{NAME}:cascade", logprobs=True, top_logprobs=3)
    run = engine.run(ids, DecodeConfig(mode="cascade", max_new_tokens=24))
    inspection = inspect(engine, ids, run.events, top=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 24
    for i, token in enumerate(content):
        assert token.token == TOKENIZER.decode([run.token_ids[i]])
        assert math.exp(token.logprob) == pytest.approx(inspection.written[i][-1], rel=1e-4)
        assert [top.token for top in token.top_logprobs] == [TOKENIZER.decode([t]) for t in inspection.token_ids[i][-1]]
        assert [math.exp(top.logprob) for top in token.top_logprobs] == pytest.approx(
            inspection.probabilities[i][-1], rel=1e-4)
    assert chat(client).choices[0].logprobs is None


def test_a_prompt_is_scored_as_lm_eval_asks_for_it(client, engine):
    ids = [0, *TOKENIZER("hi there").input_ids]
    with torch.inference_mode():
        stairs, _ = engine.begin(ids[:1], len(ids))
        *_, rows = stairs.prefill(ids)
        truth = engine.model.head.logits(engine.model.layers.norm(rows))[0].log_softmax(-1)
    answer = complete(client, prompt=ids, max_tokens=1, logprobs=1, echo=True)
    found = answer.choices[0].logprobs
    assert len(found.token_logprobs) == len(found.top_logprobs) == len(found.tokens) == len(ids) + 1
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx([float(truth[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4)
    for i, (logprob, top) in enumerate(zip(found.token_logprobs[1:], found.top_logprobs[1:])):
        assert max(top.values()) == pytest.approx(float(truth[i].max()), abs=1e-4) and logprob in top.values()
    assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values()), "a greedy token is the likeliest"
    text = answer.choices[0].text
    assert [text[a:].startswith(token) for a, token in zip(found.text_offset, found.tokens)] == [True] * (len(ids) + 1)
    scored = complete(client, prompt=ids, max_tokens=0, logprobs=1, echo=True)
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[:-1]
    assert scored.usage.completion_tokens == 0 and scored.choices[0].text == "<s>hi there"


# -- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, reason, param", [
    (dict(messages=[]), "expected 1 to 1,000 messages, got 0", "messages"),
    (dict(temperature=3), "less than or equal to 2, got 3", "temperature"),
    (dict(temperature="1"), "expected a valid number", "temperature"), (dict(top_p=0), "greater than 0", "top_p"),
    (dict(n=2), "does not offer it, got 2", "n"), (dict(tools=[{"type": "function"}]), "does not offer it", "tools"),
    (dict(response_format={"type": "json_object"}), "does not offer it", "response_format"),
    (dict(stop=[""]), "none of them empty, got ['']", "stop"), (dict(stop=["x"] * 17), "at most 16", "stop"),
    (dict(max_tokens=5000), "less than or equal to 4096", "max_tokens"), (dict(max_tokens=0), "or equal to 1", None),
    (dict(max_tokens=2000), "positions", None), (dict(top_logprobs=2), "logprobs to be true", "top_logprobs"),
    (dict(mode="warp"), "'full', 'cascade' or 'verified', got 'warp'", "mode"),
    (dict(threshold=0.5), "threshold goes with mode cascade", None),
    (dict(mode="cascade", target_disagreement=0.1, temperature=0), "training.calibrate", None),
    (dict(model=f"{NAME}:full", mode="cascade"), "expected full", "mode"),
    (dict(messages=[{"role": "tool", "content": "x"}]), "got 'tool'", "messages.0.role"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "reads text alone", "messages.0.content"),
    (dict(messages=[{"role": "user", "content": "a" * 20_001}]), "at most 20,000 characters", "messages"),
    (dict(messages=[{"role": "user", "content": "a" * 1_100}]), "tokens; llama-untied reads at most 1,023", None)])
def test_a_wrong_value_is_answered_with_field_and_reason(url, wrong, reason, param):
    answer = httpx.post(f"{url}v1/chat/completions", json=dict(model=NAME, messages=TURNS) | wrong)
    error = answer.json()["error"]
    assert answer.status_code == 400 and reason in error["message"] and error["type"] == "invalid_request_error"
    assert {*error} == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param


@pytest.mark.parametrize("wrong, reason", [
    (dict(prompt=[]), "none of them empty"), (dict(prompt=""), "the prompt is empty"), (dict(prompt=[[]]), "empty"),
    (dict(prompt=[97]), "must be in 0..96"), (dict(prompt=[5], echo=True, max_tokens=0, logprobs=21), "equal to 20"),
    (dict(prompt=[2**70]), "empty"), (dict(prompt=[True]), "empty"), (dict(prompt=[5], max_tokens=0), "at least 1"),
    (dict(prompt=["a"] * 201), "at most 200 prompts"), (dict(prompt="a", suffix="b"), "does not offer"),
    (dict(), "prompt: expected a value, got none")])
def test_a_wrong_prompt_is_answered_with_the_reason(url, wrong, reason):
    answer = httpx.post(f"{url}v1/completions", json=dict(model=NAME) | wrong)
    assert answer.status_code == 400 and reason in answer.json()["error"]["message"]


def test_what_is_not_a_request_gets_the_same_kind_of_error(url):
    for send, status in ((lambda: httpx.post(f"{url}v1/completions", content=b"{"), 400),
                         (lambda: httpx.post(f"{url}v1/completions", content=b"[1]"), 400),
                         (lambda: httpx.post(f"{url}v1/completions", content=b"[" * 900_000), 400),
                         (lambda: httpx.post(f"{url}v1/completions", content=b'"\\ud800"'), 400),
                         (lambda: httpx.post(f"{url}v1/completions", content=b" " * 1_000_001), 413),
                         (lambda: httpx.post(f"{url}v1/completions", json=dict(model="gpt", prompt="a")), 404),
                         (lambda: httpx.post(f"{url}v1/embeddings", json={}), 404),
                         (lambda: httpx.get(f"{url}v1/completions"), 405)):
        answer = send()
        assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize("wrong", [
    dict(model="m" * 10**5), dict(mode="w" * 10**5), dict(temperature="t" * 10**5), dict(messages="m" * 10**5),
    dict(messages=[{"role": "r" * 10**5, "content": "x"}]), dict(messages=[{"role": "user", "content": ["c" * 10**5]}]),
    dict(stop={"s": "t" * 10**5}), dict(n="n" * 10**5), dict(tools=["t" * 10**5]), dict(seed="1"),
    dict(threshold=[1]), dict(max_draft=10**9), dict(stream="yes"), dict(stream_options=5), dict(logprobs="l" * 10**5)])
def test_every_refusal_is_short_and_repeats_no_long_value(url, wrong):
    answer = httpx.post(f"{url}v1/chat/completions", content=json.dumps(dict(model=NAME, messages=TURNS) | wrong))
    assert answer.status_code in (400, 404) and 0 < len(answer.json()["error"]["message"]) <= 300
    assert len(httpx.get(f"{url}v1/{'a' * 10**4}").json()["error"]["message"]) <= 300


def test_harmless_fields_are_accepted(client):
    chat(client, user="me", metadata={"a": "b"}, store=True, n=1, max_tokens=2, response_format={"type": "text"},
         presence_penalty=0, parallel_tool_calls=None, extra_body=dict(unknown=1, tools=None))


def test_a_key_protects_these_routes_alone(engine, monkeypatch):
    monkeypatch.setenv("CASCADEEXIT_API_KEY", "secret")
    with serve(engine, TOKENIZER) as url:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secrét".encode()}):
            for answer in (httpx.get(f"{url}v1/models", headers=headers),
                           httpx.post(f"{url}v1/completions", headers=headers, json={})):
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert openai.OpenAI(base_url=f"{url}v1", api_key="secret").models.list().data
        assert httpx.get(url).status_code == 200
        assert Client(url, verbose=False).predict(api_name="/models")


# -- turns ------------------------------------------------------------------------------------------------------------

class Watch:
    """Makes runs of the engine slow and as long as asked for, and notes when they begin and end."""

    def __init__(self, engine, monkeypatch, seconds: float = 0.02):
        self.open, self.most, self.began, self.ended = 0, 0, [], []
        generate = engine.generate

        def watched(ids, config):
            self.open += 1
            self.most = max(self.most, self.open)
            self.began.append(config.mode)
            try:
                for event in generate(ids, replace(config, ignore_eos=True)):
                    time.sleep(seconds)
                    yield event
            finally:
                self.open -= 1
                self.ended.append(time.monotonic())
        monkeypatch.setattr(engine, "generate", watched)

    def wait(self, runs: int, seconds: float = 10) -> None:
        """Wait until so many runs have begun."""
        ends = time.monotonic() + seconds
        while len(self.began) < runs:
            assert time.monotonic() < ends, "no run began"
            time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model_at_once(url, engine, client, monkeypatch, stream):
    watch, body = Watch(engine, monkeypatch), dict(model=NAME, prompt="hi", max_tokens=900, stream=stream)
    with pytest.raises(httpx.ReadTimeout), httpx.stream("POST", f"{url}v1/completions", json=body,
                                                        timeout=httpx.Timeout(5, read=0.3)) as answer:
        watch.wait(1)
        for _ in answer.iter_raw():
            if watch.began and stream:
                raise httpx.ReadTimeout("enough")
    left = time.monotonic()
    assert watch.ended == []
    complete(client, max_tokens=1)
    assert watch.ended[0] - left < 1 and watch.open == 0


def test_the_page_and_two_clients_take_turns(url, engine, client, monkeypatch):
    watch = Watch(engine, monkeypatch, 0.01)
    job = Client(url, verbose=False).submit(prompt="hi", mode="full", max_new_tokens=40, api_name="/generate")
    watch.wait(1)
    texts = {}
    others = [threading.Thread(target=lambda name=name: texts.update({name: complete(client, model=f"{NAME}:{name}")}))
              for name in ("verified", "cascade")]
    for other in others:
        other.start()
    for other in others:
        other.join(30)
    assert len(job.result(30)["token_ids"]) == 40 and len(texts) == 2
    assert watch.most == 1 and watch.began[0] == "full" and len(watch.ended) == 3


def test_a_stream_that_waits_is_kept_alive(url, engine, client, monkeypatch):
    monkeypatch.setattr(routes, "COMMENT_SECONDS", 0.1)
    watch = Watch(engine, monkeypatch)
    first = complete(client, max_tokens=40, stream=True)
    watch.wait(1)
    body = dict(model=NAME, prompt="hi there", **GREEDY, stream=True)
    with httpx.stream("POST", f"{url}v1/completions", json=body, timeout=30) as answer:
        events = answer.read().decode().split("\n\n")
    assert ": waiting" in events and "data: [DONE]" in events and list(first)


def test_too_many_requests_are_refused(url, engine, client, monkeypatch):
    watch = Watch(engine, monkeypatch)
    streams = [complete(client, max_tokens=500, stream=True)]
    watch.wait(1)
    streams += [complete(client, stream=True) for _ in range(service.MAX_OPEN - 1)]
    with pytest.raises(openai.RateLimitError, match="20 requests already run or wait here"):
        complete(client)
    for stream in streams:
        stream.close()
    ends = time.monotonic() + 5
    while time.monotonic() < ends:
        try:
            assert complete(client, max_tokens=1).choices
            return
        except openai.RateLimitError:
            time.sleep(0.1)
    pytest.fail("the places are still taken")


def test_a_run_that_fails_is_told_to_the_client(url, client, engine, monkeypatch):
    def broken(ids, config):
        yield from ()
        raise ZeroDivisionError
    monkeypatch.setattr(engine, "generate", broken)
    with pytest.raises(openai.InternalServerError, match="the server's log has the details"):
        complete(client)
    with pytest.raises(openai.APIError, match="the server's log has the details"):
        list(complete(client, stream=True))
    monkeypatch.undo()
    assert complete(client).choices


# -- other clients ----------------------------------------------------------------------------------------------------

def test_open_webui_is_answered(url, engine):
    """Its requests, as it sends them: with fields of its own, and a connection that streams."""
    headers = {"Authorization": "Bearer none", "Content-Type": "application/json", "X-OpenWebUI-User-Name": "Me"}
    listed = httpx.get(f"{url}v1/models", headers=headers).json()
    assert listed["object"] == "list" and {"id", "object", "created", "owned_by"} <= {*listed["data"][0]}
    body = dict(stream=True, model=listed["data"][0]["id"], messages=[{"role": "user", "content": "hi there"}],
                stream_options={"include_usage": True}, temperature=0, max_tokens=8, user={"name": "Me", "id": "1"},
                metadata={"chat_id": "1"}, logit_bias={}, tools=[], response_format=None)
    with httpx.stream("POST", f"{url}v1/chat/completions", headers=headers, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    ids = conversation_ids(TOKENIZER, body["messages"])
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == text_of(
        full(engine, ids, 8).token_ids)
    title = body | dict(stream=False, max_completion_tokens=8)         # as it asks for the title of a chat
    del title["stream_options"], title["max_tokens"]
    assert httpx.post(f"{url}v1/chat/completions", headers=headers, json=title).json()["choices"][0]["message"]


def test_the_readme_example_runs(url, engine, capsys):
    code = re.search("<!-- api-example -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"),
                     re.DOTALL)[1]
    assert "http://127.0.0.1:7860/" in code and f"{hub.DEFAULT_MODEL}:" in code
    exec(code.replace("http://127.0.0.1:7860/", url).replace(hub.DEFAULT_MODEL, NAME), {})
    ids = visitor_token_ids(TOKENIZER, "Explain why the sky is blue.", chat=True)
    run = engine.run(ids, DecodeConfig(mode="cascade", thresholds=0.6, max_new_tokens=48))
    text, shares = capsys.readouterr().out.removesuffix("\n").rsplit(" [", 1)
    assert text == text_of(run.token_ids)
    assert json.loads(f"[{shares}") == pytest.approx(run.stats.routing_share)
