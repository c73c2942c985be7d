"""An evaluation's numbers are those of metrics; what cannot run keeps its place; prompt sets are read within limits."""

import csv
import io
import json

import pytest
from conftest import tiny_engine

from cascadeexit import metrics
from cascadeexit.engine import DecodeConfig
from cascadeexit.evaluation import (
    MAX_CHARACTERS,
    MAX_PROMPTS,
    Prompt,
    evaluate,
    read_prompt_file,
    read_prompts,
    results_csv,
    results_json,
    summarize_results,
)
from tests.browser.tiny_text import HOSTILE, tiny_tokenizer


@pytest.fixture(scope="module")
def tried():
    engine, tokenizer = tiny_engine(seed=3), tiny_tokenizer()

    def encode(text):
        if text == "bad":
            raise ValueError("this one is bad")
        return tokenizer(text).input_ids
    prompts = [Prompt("hi there", "chat"), Prompt("bad"), Prompt("=1+1", "chat")]
    configs = [DecodeConfig(mode=mode, thresholds=0.5, max_new_tokens=30) for mode in ("cascade", "full")]
    results = [r for r in evaluate(engine, encode, tokenizer.decode, prompts, *configs) if r is not None]
    return engine, tokenizer, configs, results


def test_numbers_are_those_of_the_runs(tried):
    engine, tokenizer, (config, full), results = tried
    for result in (results[0], results[2]):
        ids = tokenizer(result.prompt).input_ids
        ours, theirs = engine.run(ids, config), engine.run(ids, full)
        match = metrics.match(ours.token_ids, theirs.token_ids)
        assert (result.text, result.full_text) == tuple(tokenizer.decode(run.token_ids) for run in (ours, theirs))
        assert result.routing_share == ours.stats.routing_share and result.cost == ours.stats.cost
        assert (result.positional, result.first_divergence) == (match.positional, match.first_divergence)
        assert result.agreement == metrics.agreement(ours.token_ids, engine.full_choices(ids, ours.token_ids))
        assert result.speedup > 0


def test_a_prompt_that_cannot_run_keeps_its_place(tried):
    results = tried[3]
    assert [r.index for r in results] == [0, 1, 2]
    assert results[1].error == "this one is bad" and results[1].agreement is None
    summary = summarize_results(results)
    assert summary["prompts"] == 3 and summary["failed"] == 1 and summary["kinds"]["own"]["failed"] == 1
    assert summary["agreement"] == pytest.approx((results[0].agreement * results[0].tokens + results[2].agreement
                                                  * results[2].tokens) / (results[0].tokens + results[2].tokens))
    assert sum(summary["routing_share"]) == pytest.approx(1)


def test_stopping_in_the_middle_closes_both_sides(tried, monkeypatch):
    engine, tokenizer, configs, _ = tried
    closed, fast = [], engine.generate

    def generate(ids, config):
        try:
            yield from fast(ids, config)
        finally:
            closed.append(config.mode)
    monkeypatch.setattr(engine, "generate", generate)
    running = evaluate(engine, lambda text: tokenizer(text).input_ids, tokenizer.decode, [Prompt("hi there")], *configs)
    for _ in range(5):
        next(running)
    running.close()
    assert sorted(closed) == ["cascade", "full"]


def test_files_hold_everything_and_run_nothing(tried):
    results = tried[3]
    file = json.loads(results_json(results, tried[2][0], "tiny"))
    assert file["format"] == 1 and file["config"]["mode"] == "cascade" and len(file["results"]) == 3
    assert file["results"][0]["text"] == results[0].text
    rows = list(csv.DictReader(io.StringIO(results_csv(results), newline="")))
    assert rows[0]["prompt"] == "hi there" and rows[2]["prompt"] == "'=1+1" and rows[1]["error"] == "this one is bad"
    assert float(rows[0]["agreement"]) == pytest.approx(results[0].agreement)


def test_nothing_ran():
    assert summarize_results([])["prompts"] == 0 and summarize_results([])["agreement"] is None


@pytest.mark.parametrize("content, name, expected", [
    ("one\n\n two \r\n", "", [Prompt("one"), Prompt("two")]),
    ('{"prompt": "one", "kind": "code"}\n\n{"text": "two"}', "", [Prompt("one", "code"), Prompt("two")]),
    ('{"instruction": "one"}', "a.JSONL", [Prompt("one")]),
    ('\ufeffkind,prompt\nchat,"a, b\nc"\n', "a.csv", [Prompt("a, b\nc", "chat")]),
    ("\n".join(HOSTILE), "a.txt", [Prompt(line.strip()) for line in "\n".join(HOSTILE).splitlines() if line.strip()]),
])
def test_prompts_are_read_from_every_kind_of_file(content, name, expected):
    assert read_prompts(content, name) == expected


@pytest.mark.parametrize("content, name, reason", [
    (" \n", "", "no prompt"), ("", "a.csv", "no prompt"),
    ("\n".join("abc" for _ in range(MAX_PROMPTS + 1)), "", f"{MAX_PROMPTS + 1} prompts are too many"),
    ("a\n" + "b" * (MAX_CHARACTERS + 1), "", "prompt 2 has"),
    ('{"prompt": "a"}\n{oops', "", "line 2: expected a JSON object"),
    ('{"prompt": 5}', "", "line 1: expected a text under prompt"), ("[1]", "a.jsonl", "line 1: expected a text"),
    ("question\nwhy", "a.csv", "row 1: expected a text under prompt.*'question'"),
    ('prompt\n"open', "a.csv", "no CSV table"),
])
def test_what_is_no_prompt_set_is_named(content, name, reason):
    with pytest.raises(ValueError, match=reason):
        read_prompts(content, name)


def test_files_must_be_text_of_some_size(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8"):
        read_prompt_file(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("x" * 1_000_001)
    with pytest.raises(ValueError, match="the limit is"):
        read_prompt_file(tmp_path / "b.txt")
