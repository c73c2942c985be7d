"""A saved run is read back unchanged; any other file is refused with the reason."""

import json
import re

import pytest

from cascadeexit import record
from cascadeexit.page import ASSETS
from cascadeexit.wire import expand, write_line
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
    ({"records__3": 7}, "entry 3 should be an object, got 7"),
    ({"records__3__type": "virus"}, "entry 3: type should be one of model"),
    ({"records__3__type": ["token"]}, "entry 3: type should be one of model"),
    ({"records__2__text": 5}, r"entry 2 \(token\): text should be text, got 5"),
    ({"records__2__side": "left"}, "side should be one of cascade, full, got 'left'"),
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
    ({"records__2__conf": [2, None, None]}, "conf should hold numbers from 0 to 1"),
    ({"records__2__t": 1e300}, r"t should be a number, got 1e\+300"),
    ({"records__2__id": 10**30}, "id should be a whole number"),
    ({"records__2__ran": [[0, 1]]}, r"ran should hold \[first, end, rows\]"),
    ({"records__2__ran": [[0, 1, "x"]]}, r"ran should hold \[first, end, rows\]"),
    ({"records__2__ran": 5}, "ran should be a list"),
    ({"records__1__sides": 7}, "sides should be a list"),
    ({"records__1__sides": [7, 8]}, "fields should be an object"),
    ({"records__1__sides": []}, "sides should be cascade and full, or cascade, second and full"),
    ({"records__1__sides__0__name": "fork1"}, "sides should be cascade and full, or cascade, second and full"),
    ({"records__1__sides__0__name": ["cascade"]}, "name should be text"),
    ({"records__1__sides__0__title": 5}, "title should be text"),
    ({"records__1__sides__0__thresholds": [1]}, "thresholds should be 3 numbers"),
    ({"records__1__machine": ["CPU"]}, "machine should be text"),
    ({"records__1__date": 2026}, "date should be text"),
])
def test_a_wrong_entry_is_named(stream, change, reason):
    with pytest.raises(ValueError, match=reason):
        record.load(changed(stream, **change))


@pytest.mark.parametrize("change", [
    {"format": "f" * 10**6}, {"records__3": ["x" * 10**6]}, {"records__3__type": "t" * 10**6},
    {"records__2__text": ["x" * 10**6]}, {"records__2__side": "s" * 10**6}, {"records__2__status": "s" * 10**6},
    {"records__2__bytes": "z" * 10**6}, {"records__2__conf": ["c" * 10**6]}, {"records__2__ran": [["r" * 10**6]]},
    {"records__1__sides__0__name": "n" * 10**6}, {"records__1__thresholds": ["t" * 10**6]},
    {"records__3__type": []}, {"records__3__type": {}}, {"records__2__id": 10**400}])
def test_a_long_value_is_not_repeated_in_the_message(stream, change):
    with pytest.raises(ValueError) as caught:
        record.load(changed(stream, **change))
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def appended(stream: str, *records: dict) -> str:
    file = json.loads(record.dump(stream))
    return json.dumps(file | dict(records=[*file["records"], *records]))


FORK = dict(type="fork", side="fork1", of="cascade", at=3, id=5, text="x", title="Fork 1")
TREE = dict(type="tree", side="cascade", i=3, drafts=[[5, "x", -1, 0.5, 0, True], [6, "y", 0, None, -1, False]])
CHECKED = dict(type="checked", side="cascade", i=3, ids=[1, 2])
READING = dict(type="reading", side="full", read=256, total=700)
END = dict(type="end", side="cascade", positional=0.5, sequence=None, agreement=None, differs=[1], moments=[
    dict(i=1, id=2, said="a", full="b", p_said=0.1, p_full=0.4)], loops=dict(start=3, period=4, share=0.5))


@pytest.mark.parametrize("entry", [FORK, FORK | dict(of="full"), TREE, CHECKED, READING, END],
                         ids=lambda entry: entry["type"])
def test_every_type_is_read_back(stream, entry):
    assert record.load(appended(stream, entry)) == stream + write_line(**entry)


@pytest.mark.parametrize("entry, change, reason", [
    (FORK, dict(of="second"), "should continue a side of this run"), (FORK, dict(of="fork2"), "should continue a side"),
    (FORK, dict(of=[]), "of should be text"), (FORK, dict(side="cascade"), "should continue a side"),
    (FORK, dict(side="fork99"), "should continue a side"), (FORK, dict(at=-1), "cannot begin at -1"),
    (FORK, dict(at=60), "cannot begin at 60"), (FORK, dict(title=None), "title should be text"),
    (TREE, dict(drafts=[[5, "x", 0, 0.5, 0, True]]), "a draft should be"),
    (TREE, dict(drafts=[[5, "x", -1, 0.5, 9, True]]), "a draft should be"),
    (TREE, dict(drafts=[[5, "x", -1, "p", 0, True]]), "a draft should be"),
    (TREE, dict(drafts=[[5, "x", -1, 0.5, 0]]), "a draft should be"),
    (TREE, dict(drafts=[{}]), "a draft should be"), (TREE, dict(side="second"), "side should be one of"),
    (TREE, dict(i=-1), "its position cannot be -1"),
    (CHECKED, dict(ids=["x"]), "ids should hold whole numbers"), (CHECKED, dict(i=59), "its position cannot be 59"),
    (READING, dict(total="many"), "total should be a whole number"), (END, dict(side="left"), "side should be one of"),
    (END, dict(moments=[7]), "fields should be an object"), (END, dict(moments=[dict(i=1)]), "id should be"),
    (END, dict(loops=[1]), "loops should be an object"), (END, dict(loops={}), "start should be a whole number"),
    (END, dict(differs=[0.5]), "differs should hold whole numbers")])
def test_a_wrong_value_of_any_type_is_named(stream, entry, change, reason):
    with pytest.raises(ValueError, match=reason):
        record.load(appended(stream, entry | change))


def test_tokens_of_a_fork_come_in_order_after_its_begin(stream):
    token = dict(type="token", side="fork1", i=3, id=5, status="emitted", text="x", exit=3, t=0.0, conf=[None] * 3)
    assert record.load(appended(stream, FORK, token, token | dict(i=4)))
    for wrong in ((token,), (FORK, token | dict(i=0)), (FORK, token, token), (FORK, FORK)):
        with pytest.raises(ValueError, match="side should be one of|its position cannot be|should continue"):
            record.load(appended(stream, *wrong))


def test_fields_that_nobody_reads_cannot_do_harm(stream):
    """They may have any value, and of tokens they are left out."""
    odd = dict(side={}, exit="x", conf=7, thresholds="y", routing_share=None)
    assert record.load(appended(stream, dict(type="stopped", **odd)))
    rejected = dict(type="token", side="cascade", i=1, id=2, status="rejected", text=[], conf=5, exit="z")
    assert record.load(appended(stream, rejected)) == stream + write_line("token", side="cascade", i=1, id=2,
                                                                          status="rejected")


def test_a_run_that_was_saved_before_there_were_sides_is_read():
    old = json.loads((ASSETS / "traces" / "sky.json").read_text(encoding="utf-8"))
    for entry in old["records"]:
        for name in ("sides", "machine", "date", "ran") + (("side",) if entry["type"] in ("versus", "end") else ()):
            entry.pop(name, None)
    loaded = [expand(line) for line in record.load(json.dumps(old)).splitlines()]
    assert len(loaded) == len(old["records"])
    assert [r["id"] for r in loaded if r["type"] == "token"] == [
        r["id"] for r in old["records"] if r["type"] == "token"]


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
