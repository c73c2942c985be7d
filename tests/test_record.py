"""A saved run is read back unchanged; any other file is refused with the reason."""

import json
import re

import pytest

from cascadeexit import record
from tests.helpers import run_stream
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer


@pytest.fixture(scope="module", params=["cascade", "verified"])
def stream(request) -> str:
    return run_stream(tiny_engine(seed=3), tiny_tokenizer(), request.param).text


def test_a_run_is_read_back_unchanged(stream):
    assert record.load(record.dump(stream)) == stream
    assert record.load(record.dump(stream).encode()) == stream


def changed(stream: str, **change) -> str:
    file = json.loads(record.dump(stream))
    for path, value in change.items():
        target, keys = file, path.split("__")
        for key in keys[:-1]:
            target = target[int(key) if key.isdigit() else key]
        target[int(keys[-1]) if keys[-1].isdigit() else keys[-1]] = value
    return json.dumps(file)


@pytest.mark.parametrize("change, reason", [
    ({"format": 99}, "format 99; this page reads format 1"),
    ({"records": []}, "2 to"),
    ({"records": "none"}, "not a recorded run"),
    ({"records__3": 7}, "entry 3: expected one of the types"),
    ({"records__3__type": "virus"}, "entry 3: expected one of the types model"),
    ({"records__2__text": 5}, r"entry 2 \(token\): text should be text, got 5"),
    ({"records__2__side": "left"}, "side should be cascade or full"),
    ({"records__2__exit": 9}, "exit should be 0 to 3, or -1 for a copied token, got 9"),
    ({"records__2__exit": -2}, "exit should be 0 to 3, or -1 for a copied token, got -2"),
    ({"records__2__i": True}, "i should be a whole number"),
    ({"records__2__status": "stolen"}, "status should be one of"),
    ({"records__0__colours": ["url(http://example.org)"] * 4}, "#RRGGBB"),
    ({"records__0__exits": [{"depth": 1}]}, "layer"),
    ({"records__1__type": "stopped"}, "begin with a model and a run"),
    ({"records__0__colours": ["#000000"]}, "colours should be 4"),
    ({"records__2__i": 7}, "its position cannot be 7"),
    ({"records__2__conf": [1]}, "conf should be 3 numbers"),
    ({"records__2__t": float("nan")}, "NaN is not a JSON number"),
    ({"records__2__bytes": "zz"}, "hexadecimal"),
    ({"records__2__read": "much"}, "read should be a number"),
    ({"records__1__thresholds": ["low"] * 3}, "thresholds should be 3 numbers"),
])
def test_a_wrong_entry_is_named(stream, change, reason):
    with pytest.raises(ValueError, match=reason):
        record.load(changed(stream, **change))


@pytest.mark.parametrize("content", ["", "no json", "[]", "{}", "null", b"\xff\xfe", "[" * 5000])
def test_files_of_another_kind_are_refused(content):
    with pytest.raises(ValueError, match="not JSON|not a recorded run"):
        record.load(content)


def test_a_file_that_is_too_large_is_refused_before_it_is_read():
    with pytest.raises(ValueError, match="the limit is"):
        record.load(" " * (record.MAX_BYTES + 1))


def test_an_infinite_number_is_refused(stream):
    first = re.search(r'"t":[0-9.e-]+', record.dump(stream))[0]
    with pytest.raises(ValueError, match="t should be a number, got inf"):
        record.load(record.dump(stream).replace(first, '"t":1e999', 1))


def test_text_for_a_missing_token_is_refused(stream):
    file = json.loads(record.dump(stream))
    file["records"].append(dict(type="text", side="full", i=10_000, text="x"))
    with pytest.raises(ValueError, match="its position cannot be 10000"):
        record.load(json.dumps(file))


def test_shares_of_another_number_of_segments_are_refused(stream):
    file = json.loads(record.dump(stream))
    next(r for r in file["records"] if r["type"] == "stats")["routing_share"] = [1]
    with pytest.raises(ValueError, match="routing_share should be 4 numbers"):
        record.load(json.dumps(file))
