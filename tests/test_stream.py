"""The stream holds what the engine wrote: pieces add up, hostile text survives, rejected drafts leave no trace."""

import gc
import json
import weakref

import pytest

from cascadeexit import hub, metrics
from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.events import Span, Status, TokenEvent
from cascadeexit.folders import cache_folder
from cascadeexit.inspection import inspect
from cascadeexit.race import race
from cascadeexit.shape import Shape
from cascadeexit.sides import CASCADE, FULL, Side
from cascadeexit.stream import (
    MOMENTS,
    TokenStream,
    error_line,
    frames,
    model_line,
    stopped,
)
from cascadeexit.text import TextDecoder, token_bytes
from cascadeexit.wire import expand
from tests.helpers import run_stream
from tests.tiny_models import tiny_engine
from tests.tiny_text import HOSTILE, tiny_tokenizer

SIDES = [Side(CASCADE, "With exits", DecodeConfig()), Side(FULL, "Full model", DecodeConfig(mode="full"))]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids) -> list[str]:
    decoder = TextDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def ids_of(tokenizer, words: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(words.split())


def records(stream: TokenStream, type: str | None = None) -> list[dict]:
    every = [expand(line) for line in stream.text.splitlines()]
    return [r for r in every if type in (None, r["type"])]


# -- text ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", ["h i Ġt h e r e", "ð Ł ĺ Ģ", "a ð Ł ĺ Ģ b â Ĥ ¬", "a ð Ł b",
                                   "ð ð Ł ĺ Ģ Ł", "â Ĥ", "h i </s>", "ð </s> Ł", "Ċ Ċ Ġ Ċ", ""])
def test_pieces_add_up_to_the_whole_text(tokenizer, words):
    ids = ids_of(tokenizer, words)
    assert "".join(pieces(tokenizer, ids)) == decoded(tokenizer, ids)


def test_a_character_appears_with_the_token_that_completes_it(tokenizer):
    assert pieces(tokenizer, ids_of(tokenizer, "a ð Ł ĺ Ģ b")) == ["a", "", "", "", "😀", "b", ""]


def test_pieces_of_the_bundled_tokenizer_add_up():
    folder = cache_folder() / hub.DEFAULT_MODEL
    if not folder.is_dir():
        pytest.skip("the bundled model is not on this machine yet")
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Naïve 👩‍👩‍👧 says: 你好, שלום!\n\n\tif x:\r\n  y = '\u202e'<|im_end|> 🌊🌊"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    out = pieces(tokenizer, ids)
    assert "".join(out) == decoded(tokenizer, ids) == text
    assert "" in out[:-1], "this text must hold a character of several tokens"


@pytest.mark.parametrize("mode", ["cascade", "verified"])
def test_the_stream_holds_the_text_of_both_sides(tokenizer, mode):
    stream = run_stream(tiny_engine(seed=3), tokenizer, mode)
    for name, side in stream.sides.items():
        texts = {r["i"]: r["text"] for r in records(stream, "token")
                 if r["side"] == name and r["status"] in ("emitted", "accepted")}
        for patch in records(stream, "text"):
            texts[patch["i"]] += patch["text"] if patch["side"] == name else ""
        assert "".join(texts[i] for i in range(len(texts))) == decoded(tokenizer, side.ids)


def test_an_incomplete_character_at_the_end_is_not_lost(tokenizer):
    stream = TokenStream(tiny_engine(), tokenizer, SIDES, [1])
    for i, token in enumerate(ids_of(tokenizer, "a ð Ł")):
        stream.add(CASCADE, TokenEvent(i, token, 3, (None,) * 3, Status.EMITTED, i + 1.0, 0))
    stream.close_text()
    assert [r.get("part", False) for r in records(stream, "token")] == [False, True, True]
    assert records(stream, "text") == [{"type": "text", "side": "cascade", "i": 2, "text": "\ufffd"}]


def test_a_part_of_a_character_has_its_bytes(tokenizer):
    stream = TokenStream(tiny_engine(), tokenizer, SIDES, [1])
    for i, token in enumerate(ids_of(tokenizer, "a ð Ł ĺ Ģ b â Ĥ ¬")):
        stream.add(FULL, TokenEvent(i, token, 3, (None,) * 3, Status.EMITTED, i + 1.0, 0))
    assert [r.get("bytes") for r in records(stream, "token")] == [None, "f0", "9f", "98", "80", None, "e2", "82", "ac"]
    assert all(token_bytes(tokenizer, i) == tokenizer.decode([i]).encode()
               for i in ids_of(tokenizer, "a Ġ Ċ Ġx </s> 9"))


def test_special_tokens_are_marked(tokenizer):
    stream = TokenStream(tiny_engine(), tokenizer, SIDES, [1])
    stream.add(FULL, TokenEvent(0, tokenizer.eos_token_id, 3, (None,) * 3, Status.EMITTED, 1.0, 0))
    assert records(stream, "token")[0] | {"special": True, "text": "</s>"} == records(stream, "token")[0]


# -- the stream ---------------------------------------------------------------------------------------------

def test_the_stream_is_plain_json_and_only_grows(tokenizer):
    engine = tiny_engine()
    config = DecodeConfig(max_new_tokens=9, thresholds=0.5)
    stream = TokenStream(engine, tokenizer, SIDES, [5, 6])
    before = stream.text
    for text in frames(stream, race({CASCADE: engine.generate([5, 6], config),
                                           FULL: engine.generate([7, 8], config)})):
        assert text.startswith(before)
        before = text
    assert [r["type"] for r in records(stream)][:2] == ["model", "run"]
    assert stream.text.isascii() and "<" not in stream.text


@pytest.mark.parametrize("text", [*HOSTILE, "\ud83d", "\u2028", "\x00", "line\nbreak"])
def test_any_text_survives(text):
    line = error_line(text)
    assert line.count("\n") == 1 and line.isascii() and "<" not in line
    assert json.loads(line)["message"] == text


def event(i: int, token: int, status: Status, **fields) -> TokenEvent:
    return TokenEvent(i, token, fields.pop("exit", 3), (None,) * 3, status, i + 1.0, 0, **fields)


def test_work_late_checks_and_the_reading_of_a_prompt_are_recorded(tokenizer):
    stream = TokenStream(tiny_engine(), tokenizer, SIDES, [5] * 700)
    stream.add(CASCADE, event(256 - 700, 5, Status.READING))
    stream.add(CASCADE, event(0, 9, Status.EMITTED, exit=0, spans=(Span(0, 1, 1),)))
    stream.add(CASCADE, event(1, 8, Status.EMITTED, exit=1, spans=(Span(0, 1, 1), Span(1, 2, 2))))
    stream.add(CASCADE, event(2, 7, Status.EMITTED, spans=(Span(0, 4, 3),), checked=(9, 4)))
    assert records(stream, "reading") == [dict(type="reading", side="cascade", read=256, total=700)]
    assert [r["ran"] for r in records(stream, "token")] == [[[0, 1, 1]], [[0, 1, 1], [1, 2, 2]], [[0, 4, 3]]]
    assert records(stream, "checked") == [dict(type="checked", side="cascade", i=0, ids=[9, 4])]
    assert stream.sides[CASCADE].ids == [9, 8, 7]


def test_work_of_events_that_are_not_shown_goes_with_the_next_one(tokenizer):
    stream = TokenStream(tiny_engine(), tokenizer, SIDES, [5])
    stream.add(CASCADE, event(0, 9, Status.DRAFT, exit=0, spans=(Span(0, 1, 1),)))
    stream.add(CASCADE, event(0, 8, Status.DRAFT, exit=0, spans=(Span(0, 1, 2),)))         # another branch
    stream.add(CASCADE, event(0, 9, Status.REJECTED, spans=(Span(0, 4, 3),)))
    stream.add(CASCADE, event(0, 8, Status.REJECTED))
    stream.add(CASCADE, event(0, 7, Status.EMITTED))
    assert [r.get("ran") for r in records(stream, "token")] == [[[0, 1, 1]], None, [[0, 1, 2], [0, 4, 3]]]


@pytest.mark.parametrize("mode, options", [("full", {}), ("cascade", {}),
                                           ("verified", dict(max_draft=7, thresholds=None)),
                                           ("verified", dict(max_draft=7, thresholds=0.3)),
                                           ("verified", dict(max_draft=3, tolerance=0.5))])
def test_the_weights_of_every_pass_are_charged_to_its_first_final_token(tokenizer, mode, options):
    stream = run_stream(tiny_engine(seed=2), tokenizer, mode, **options)
    tokens = [r for r in records(stream, "token") if r["side"] == CASCADE]
    final = [r for r in tokens if r["status"] in ("emitted", "accepted")]
    cost = [r for r in records(stream, "stats") if r["side"] == CASCADE][-1]["cost"]
    assert sum(r["read"] for r in final) / len(final) == pytest.approx(cost, abs=1e-4)
    assert not any("read" in r for r in tokens if r not in final)
    for before, after in zip(final[1:], final[2:]):
        same_pass = mode == "verified" and before["status"] == "accepted"
        assert (after["read"] == 0) == same_pass


def test_a_tree_is_recorded_when_its_pass_is_judged(tokenizer):
    stream = TokenStream(tiny_engine(), tokenizer, SIDES, [5])
    tree = [(0, 10, -1, 0.61234567), (1, 11, 0, 0.5), (1, 12, 0, 0.25), (2, 11, 2, None), (0, 12, -1, 0.125)]
    for i, token, parent, p in tree:
        stream.add(CASCADE, event(i, token, Status.DRAFT, exit=-1 if p is None else 0, parent=parent, probability=p))
    for i, token in ((0, 10), (1, 12)):
        stream.add(CASCADE, event(i, token, Status.ACCEPTED))
    for i, token in ((1, 11), (2, 11)):
        stream.add(CASCADE, event(i, token, Status.REJECTED))
        assert records(stream, "tree") == []
    stream.add(CASCADE, event(0, 12, Status.REJECTED))
    stream.add(CASCADE, event(2, 7, Status.EMITTED))
    found, = records(stream, "tree")
    assert (found["side"], found["i"]) == ("cascade", 0)
    assert [(d[0], d[2], d[3], d[4], d[5]) for d in found["drafts"]] == [
        (10, -1, 0.6123, 0, True), (11, 0, 0.5, 0, False), (12, 0, 0.25, 0, True), (11, 2, None, -1, False),
        (12, -1, 0.125, 0, False)]
    assert [d[1] for d in found["drafts"]] == [tokenizer.decode([d[0]]) for d in found["drafts"]]


@pytest.mark.parametrize("mode", ["verified", "cascade"])
def test_trees_of_a_run_hold_every_draft_and_the_accepted_text(tokenizer, mode):
    stream = run_stream(tiny_engine(seed=2), tokenizer, mode, max_draft=7, thresholds=0.3)
    events, trees = stream.sides[CASCADE].events, records(stream, "tree")
    assert sum(len(tree["drafts"]) for tree in trees) == sum(e.status is Status.DRAFT for e in events)
    for tree in trees:
        accepted = [d[0] for d in tree["drafts"] if d[5]]
        assert stream.sides[CASCADE].ids[tree["i"]:tree["i"] + len(accepted)] == accepted
    assert bool(trees) == (mode == "verified")


def test_a_text_that_repeats_itself_is_said_to(tokenizer):
    stream = TokenStream(tiny_engine(), tokenizer, SIDES, [5])
    for i in range(60):
        for name in (CASCADE, FULL):
            stream.add(name, event(i, 10 + i % 4, Status.EMITTED))
    stream.close_text()
    stream.end(CASCADE, inspect(tiny_engine(), [5], stream.sides[CASCADE].final))
    loops = records(stream, "end")[0]["loops"]
    assert (loops["start"], loops["period"]) == (0, 4) and 0.9 < loops["share"] < 1


@pytest.mark.parametrize("max_draft", [1, 3, 7])
def test_drafts_and_rejections_leave_exactly_the_final_tokens(tokenizer, max_draft):
    engine = tiny_engine(seed=2)
    stream = run_stream(engine, tokenizer, "verified", max_draft=max_draft, thresholds=0.3)
    pending, final, rejected = {}, [], 0
    for r in (r for r in records(stream, "token") if r["side"] == CASCADE):
        if r["status"] == "draft":
            pending[r["i"]] = r["id"]
        elif r["status"] == "rejected":
            assert pending.pop(r["i"]) == r["id"]
            rejected += 1
        else:
            assert r["i"] == len(final) and pending.pop(r["i"], r["id"]) == r["id"]
            final.append(r["id"])
    assert pending == {} and rejected > 0
    assert final == engine.run([5, 6, 7], DecodeConfig(mode="full", max_new_tokens=60)).token_ids


def test_numbers_are_those_of_metrics(tokenizer):
    engine = tiny_engine(seed=3)
    stream = run_stream(engine, tokenizer, "cascade")
    ours, theirs = (stream.sides[name] for name in (CASCADE, FULL))
    stats = [r for r in records(stream, "stats") if r["side"] == CASCADE][-1]
    expected = metrics.summarize(ours.events, engine.costs)
    for name in ("tokens", "cost", "first_token_seconds", "token_seconds_p90", "tokens_per_second"):
        assert stats[name] == pytest.approx(getattr(expected, name), abs=1e-5)
    assert stats["routing_share"] == pytest.approx(expected.routing_share, abs=1e-5) and stats["done"]
    end = records(stream, "end")[0]
    match = metrics.match(ours.ids, theirs.ids)
    assert end["first_divergence"] == match.first_divergence and end["sequence"] == match.sequence
    choices = engine.full_choices([5, 6, 7], ours.ids)
    assert end["moments"] == inspect(engine, [5, 6, 7], ours.events).moments(tokenizer, ours.final, MOMENTS)
    gaps = [m["p_full"] - m["p_said"] for m in end["moments"]]
    assert end["moments"] and gaps == pytest.approx(sorted(gaps, reverse=True), abs=1e-3)
    assert end["agreement"] == pytest.approx(metrics.agreement(ours.ids, choices), abs=1e-5)


def test_only_a_verified_run_without_tolerance_may_claim_to_be_identical(tokenizer):
    engine = tiny_engine()
    for mode, options, claim in (("verified", {}, True), ("verified", {"temperature": 0.8}, True),
                                 ("verified", {"tolerance": 0.1}, None), ("cascade", {}, None)):
        stream = run_stream(engine, tokenizer, mode, **options)
        assert records(stream, "end")[0]["identical"] is claim


def test_a_stream_does_not_keep_its_model_alive(tokenizer):
    """A page keeps many streams, while other models are loaded."""
    engine = tiny_engine()
    stream, model = run_stream(engine, tokenizer, Mode.CASCADE), weakref.ref(engine.model)
    del engine
    gc.collect()
    assert model() is None and stream.text


def test_stopping_keeps_the_text_and_is_recorded_once(tokenizer):
    idle = model_line(Shape.of(tiny_engine()))
    assert stopped(idle) == idle
    running = idle + '{"type":"token"}\n'
    assert stopped(running) == running + '{"type":"stopped"}\n'
    ended = run_stream(tiny_engine(), tokenizer, "full").text
    for text in ("", "no json", "[]", stopped(running), ended):
        assert stopped(text) == text
