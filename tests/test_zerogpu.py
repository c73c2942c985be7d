"""The app on a simulated ZeroGPU (`tests/zerogpu.py` says what is real there), called as a program calls it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from cascadeexit import hub
from cascadeexit.backends.cpu import build
from cascadeexit.config import DecodeConfig
from tests.tiny_text import tiny_tokenizer
from tests.zerogpu import LONG, ROOT

SHORT = dict(prompt="hi there", chat=False, max_new_tokens=24)


@pytest.fixture(scope="module")
def client(zerogpu):
    return Client(zerogpu.url, verbose=False)


@pytest.fixture(scope="module")
def here(zerogpu_model):
    """An engine of the served model, in this process."""
    engine, tokenizer = hub.load(str(zerogpu_model), device="cpu")
    return engine, tokenizer("hi there").input_ids


def test_the_space_reports_one_decorated_function_and_computes_nothing_itself(zerogpu, client, here):
    assert zerogpu.api.starts == 1
    client.predict(**SHORT, api_name="/generate")
    runs = re.findall(r"generate (\w+) in (\d+) of (\d+)", zerogpu.printed)
    assert runs and all(int(parent) == zerogpu.process.pid for _, _, parent in runs), "a run in the Space's process"
    assert {int(worker) for _, worker, _ in runs} <= set(zerogpu.api.workers)
    assert {backend for backend, _, _ in runs} == {"cpu" if build.library() else "torch"}


def test_models_load_under_the_cuda_emulation(zerogpu, zerogpu_model, here, tmp_path):
    """A CUDA call that the emulation does not intercept would raise, and weights are out of reach once on disk."""
    environment = os.environ | dict(SPACES_ZERO_GPU="true", SPACES_ZERO_DEVICE_API_URL="http://127.0.0.1:9",
                                    ZEROGPU_OFFLOAD_DIR=str(tmp_path / "tensors"))
    out = subprocess.run([sys.executable, "-c", "import sys; from tests.zerogpu import load_with_emulation; "
                          "load_with_emulation(sys.argv[1])", str(zerogpu_model)],
                         cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    loaded = json.loads(out.stdout.splitlines()[-1])
    assert loaded["device"] == "cuda:0" and loaded["fingerprint"]
    assert loaded["moved"] >= here[0].model.weight_bytes


@pytest.mark.parametrize("mode", ["full", "cascade", "verified"])
def test_a_worker_writes_what_the_engine_writes(client, here, mode):
    engine, ids = here
    answer = client.predict(**SHORT, mode=mode, threshold=0.5, api_name="/generate")
    run = engine.run(ids, DecodeConfig(mode=mode, thresholds=0.5 if mode == "cascade" else None, max_new_tokens=24))
    assert answer["token_ids"] == run.token_ids and answer["exits"] == [e.exit for e in run.events if e.final]


def test_compare_and_evaluate_run_in_workers_too(client, zerogpu):
    before = len(zerogpu.api.asked)
    answer = client.predict(**SHORT, mode="verified", api_name="/compare")
    assert answer["identical"] and answer["agreement"] == 1.0
    answer = client.predict(texts=["hi there", "", "why"], chat=False, max_new_tokens=24, api_name="/evaluate")
    assert answer["summary"]["failed"] == 1 and answer["results"][2]["tokens"] == 24
    assert len(zerogpu.api.asked) == before + 3, "one call for each race, none for a prompt that cannot run"


def test_a_request_at_v1_runs_in_a_worker(zerogpu, here):
    engine, ids = here
    before, body = len(zerogpu.api.asked), dict(model=zerogpu_name(zerogpu), prompt=ids, temperature=0, max_tokens=24)
    answer = httpx.post(f"{zerogpu.url}v1/completions", json=body, timeout=60).json()
    text = engine.run(ids, DecodeConfig(mode="full", max_new_tokens=24)).token_ids
    assert answer["choices"][0]["text"] == tiny_tokenizer().decode(text, skip_special_tokens=True)
    body |= dict(echo=True, logprobs=1, max_tokens=0)
    scored = httpx.post(f"{zerogpu.url}v1/completions", json=body, timeout=60).json()
    assert len(scored["choices"][0]["logprobs"]["token_logprobs"]) == len(ids)
    assert len(zerogpu.api.asked) == before + 2
    runs = re.findall(r"generate (\w+) in (\d+) of (\d+)", zerogpu.printed)
    assert int(runs[-1][1]) in zerogpu.api.workers and int(runs[-1][2]) == zerogpu.process.pid


def test_a_client_that_leaves_ends_the_run_in_its_worker(zerogpu):
    began, ended = zerogpu.printed.count("generate "), len(zerogpu.api.ended)
    body = dict(model=zerogpu_name(zerogpu), prompt="hi there", max_tokens=LONG, stream=True)
    with httpx.stream("POST", f"{zerogpu.url}v1/completions", json=body) as answer:
        for _ in answer.iter_raw():
            if zerogpu.printed.count("generate ") > began:
                break
    left = time.monotonic()
    while len(zerogpu.api.ended) == ended:
        assert time.monotonic() < left + 1
        time.sleep(0.02)
    assert zerogpu.api.ended[-1] is False, "the worker waits for the next run"


def zerogpu_name(zerogpu) -> str:
    return httpx.get(f"{zerogpu.url}v1/models").json()["data"][0]["id"]


def test_the_time_asked_for_follows_the_length(client, zerogpu):
    for tokens in (16, 256):
        client.predict(**SHORT | dict(max_new_tokens=tokens), api_name="/generate")
    short, long = zerogpu.api.asked[-2:]
    assert 10 <= short <= long <= 60


def test_an_idle_worker_is_used_again(client, zerogpu):
    client.predict(**SHORT, api_name="/generate")
    workers = len(zerogpu.api.workers)
    client.predict(**SHORT, api_name="/generate")
    assert len(zerogpu.api.workers) == workers


def test_two_visitors_at_once_have_a_worker_each(zerogpu, client, here):
    engine, ids = here
    options = SHORT | dict(max_new_tokens=LONG)
    jobs = {mode: client.submit(**options, mode=mode, threshold=0.5, api_name="/generate")
            for mode in ("full", "cascade")}
    for mode, job in jobs.items():
        assert job.result(60)["token_ids"] == engine.run(ids, DecodeConfig(
            mode=mode, thresholds=0.5 if mode == "cascade" else None, max_new_tokens=LONG)).token_ids
    runs = re.findall(r"generate \w+ in (\d+)", zerogpu.printed)
    assert runs[-1] != runs[-2]


def test_a_worker_that_dies_gives_a_clear_message_and_the_next_run_works(zerogpu, client):
    calls = len(zerogpu.api.ended)
    job = client.submit(**SHORT | dict(max_new_tokens=LONG), mode="full", api_name="/generate")
    began = zerogpu.printed.count("generate ")
    while zerogpu.printed.count("generate ") == began:
        time.sleep(0.05)
    os.kill(int(re.findall(r"generate \w+ in (\d+)", zerogpu.printed)[-1]), signal.SIGKILL)
    with pytest.raises(AppError, match="The process that ran the model on the GPU ended early .*Run the prompt again"):
        job.result(30)
    assert zerogpu.api.ended[calls:] == [True]
    assert len(client.predict(**SHORT, api_name="/generate")["token_ids"]) == 24
