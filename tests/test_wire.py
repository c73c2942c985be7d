"""Lines of the stream: any record comes back as it was, and tokens take few bytes."""

import json

import pytest

from cascadeexit.sides import CASCADE, FORKS, FULL, SECOND
from cascadeexit.wire import expand, write_line
from tests.helpers import run_stream
from tests.tiny_models import tiny_engine
from tests.tiny_text import HOSTILE, tiny_tokenizer

TOKEN = dict(side=CASCADE, i=3, id=77, status="emitted", text="a", exit=1, t=1.234567, conf=[0.5, None, 0.12345])


@pytest.mark.parametrize("change", [
    {}, dict(read=0.83657), dict(ms=25.434), dict(ran=[[0, 2, 1]]), dict(ran=[[0, 1, 1], [1, 4, 7]], ms=0.0, read=1.5),
    dict(special=True), dict(bytes="f09f", part=True), dict(conf=[None] * 3), dict(conf=[0.0, 1.0, None]),
    dict(conf=[]), dict(exit=-1, status="accepted"), dict(status="draft", text=""), dict(side=FULL), dict(side=SECOND),
    dict(side=FORKS[0]), dict(side=FORKS[-1]), dict(t=0.0), dict(t=1e9), *(dict(text=text) for text in HOSTILE),
    dict(text="\ud83d"), dict(text="\u2028\n<")])
def test_a_token_comes_back_as_it_was(change):
    record = TOKEN | change
    line = write_line("token", **record)
    assert expand(line) == {"type": "token", **record}
    assert line.isascii() and "<" not in line and line.count("\n") == 1


def test_a_rejected_token_and_any_other_record_come_back():
    rejected = dict(side=FULL, i=1, id=2, status="rejected")
    assert expand(write_line("token", **rejected)) == {"type": "token", **rejected}
    assert expand(write_line("stats", side=FULL, tokens=3)) == {"type": "stats", "side": FULL, "tokens": 3}


def test_lines_of_tokens_take_a_third_of_the_bytes_of_objects():
    lines = run_stream(tiny_engine(seed=3), tiny_tokenizer(), "cascade").text.splitlines()
    tokens = [line for line in lines if expand(line)["type"] == "token"]
    objects = [json.dumps(expand(line), separators=(",", ":")) for line in tokens]
    assert len(tokens) == 120 and sum(map(len, tokens)) < 0.4 * sum(map(len, objects))
