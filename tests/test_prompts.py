"""Prompt sets are read within limits, and anything else is refused with line and reason."""

import os

import pytest

from cascadeexit.prompts import (
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_KIND_CHARACTERS,
    MAX_PROMPTS,
    Prompt,
    bundled_prompts,
    read_prompts,
    visitor_token_ids,
)
from tests.tiny_text import tiny_tokenizer


def own(*texts: str) -> list[Prompt]:
    return [Prompt("own", text) for text in texts]


ROWS = '{"prompt": "one", "kind": "code"}\n\n{"text": " two "}\r\n{"instruction": "three", "set": "facts", "n": 1}\n'
READ = [Prompt("code", "one"), Prompt("own", " two "), Prompt("facts", "three")]


@pytest.mark.parametrize("pasted, expected", [
    ("one\n\n two \r\nthree\r \t\n", own("one", "two", "three")),
    ("\ufeffone", own("one")),
    (ROWS, READ),
    ('{"prompt": "one"}\nnot json', own('{"prompt": "one"}', "not json")),      # not every line is JSON: plain text
    ('{"prompt": "one", "kind": " code "}\n{"prompt": "two", "kind": " "}', [Prompt("code", "one"), *own("two")]),
    ("{x} is a set.", own("{x} is a set.")), ("[1]\n5\n\"a\"", own("[1]", "5", '"a"')),
    ("[" * 9000, None),                                                          # too deep to be JSON, and too long
    ("one\u2028still one\x0bstill\x85still", own("one\u2028still one\x0bstill\x85still")),
    ('{"prompt": "one\u2028still one"}', own("one\u2028still one")),
    ("/etc/passwd", own("/etc/passwd")),                                         # a str is never opened
])
def test_pasted_prompts(pasted, expected):
    if expected is None:
        with pytest.raises(ValueError, match="shorten it"):
            read_prompts(pasted)
    else:
        assert read_prompts(pasted) == expected


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "\ufeffone\n\ntwo", own("one", "two")), ("a.txt", '{"prompt": "one"}', own('{"prompt": "one"}')),
    ("A.JSONL", ROWS, READ), ("a.jsonl", "\ufeff" + ROWS, READ), ("a.jsonl", '{"prompt": null, "text": "b"}', own("b")),
    ("a.csv", '\ufeffkind,prompt\r\nchat,"a, ""b""\r\nc"\r\n,d\r\n', [Prompt("chat", 'a, "b"\r\nc'), *own("d")]),
    ("a.csv", "\n Prompt ,set,,\none,facts,,\n,,,\ntwo\n", [Prompt("facts", "one"), *own("two")]),
    ("a.csv", "prompt\n=1+1\n", own("=1+1")),
])
def test_prompt_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == expected


def test_values_at_the_limits_are_allowed():
    assert len(read_prompts("a\n" * MAX_PROMPTS)) == MAX_PROMPTS
    assert read_prompts("é" * MAX_CHARACTERS) == own("é" * MAX_CHARACTERS)
    assert read_prompts("one\ntwo", limit=2) == own("one", "two")
    assert read_prompts("a" + "\n" * (MAX_BYTES - 1)) == own("a")


@pytest.mark.parametrize("pasted, reason", [
    ("", "at least one prompt, got none: write one per line"), (" \n\t\n", "at least one prompt, got none"),
    ("a\n\n" + "b\n" * MAX_PROMPTS, "line 202: expected at most 200 prompts, got more: leave some out"),
    ("a\n\n" + "b" * (MAX_CHARACTERS + 1), "line 3: expected a prompt of at most 4,000 characters, got 4,001: shorten"),
    ("é\n" * (MAX_BYTES // 2), "at most 1,000,000 bytes, got 1,500,000: split the prompts into smaller sets"),
    ("a\r\nb\0", "line 2: expected text, got a NUL character: save the prompts as plain UTF-8 text"),
    ("a\nb\ud800", r"line 2: expected a prompt of whole characters, got '\\ud800': remove it"),
    ('{"prompt": "\\u0000"}', r"line 1: expected a prompt of whole characters, got '\\x00': remove it"),
    ('{"prompt": "a"}\n{"text": "a\\udc00"}', r"line 2: expected a prompt of whole characters, got '\\udc00'"),
    ('{"prompt": "a", "kind": "\\ud800"}', "line 1: expected a kind of whole characters"),
    ('{"prompt": "a", "kind": "' + "k" * 41 + '"}', f"at most {MAX_KIND_CHARACTERS} characters, got 41: shorten it"),
    ('{"prompt": "a", "kind": 5}', "line 1: expected a word as the prompt's kind, got 5: put it in quotes"),
    ('{"prompt": "a"}\n\n{"prompt": 5}', "line 3: expected a text under prompt or text or instruction, got 5: write"),
    ('{"prompt": [1]}', r"got \[1\]: write the prompt"), ('{"prompt": {}}', "got {}: write the prompt"),
    ('{"prompt": ' + "[" * 400 + "]" * 400 + "}", r"got \[\[\[\[\[...\]\]\]\]\]: write the prompt"),
    ('{"question": "a"}', "line 1: expected a text under prompt or text or instruction, got none: write the prompt"),
    ('{"prompt": " "}', "got ' ': write the prompt, or leave the line out"),
])
def test_pasted_text_that_is_not_a_prompt_set(pasted, reason):
    with pytest.raises(ValueError, match=reason):
        read_prompts(pasted)


@pytest.mark.parametrize("name, content, reason", [
    ("a.txt", b"", "at least one prompt, got none"), ("a.csv", b"", "at least one"), ("a.jsonl", b"\n", "at least one"),
    ("a.csv", b"prompt,kind\n", "at least one"), ("a.csv", b"prompt\n" + b"a\n" * 201, "line 202: expected at most"),
    ("a.txt", b"one\ntwo \xff", "line 2: expected UTF-8 text, got the byte 0xff: save the file as UTF-8"),
    ("a.txt", "one".encode("utf-16"), "line 1: expected UTF-8 text, got the byte 0xff"),
    ("a.txt", b"one\n\0", "line 2: expected text, got a NUL character"),
    ("a.csv", "prompt\none".encode("utf-16-le"), "line 1: expected text, got a NUL character"),
    ("a.txt", b"x" * (MAX_BYTES + 1), "at most 1,000,000 bytes, got 1,000,001: split the prompts into smaller sets"),
    ("a.jsonl", b'{"prompt": "a"}\n\n{oops', "line 3: expected a JSON object such as .*, got '{oops': correct"),
    ("a.jsonl", b"[1]", r"line 1: expected a JSON object such as .*, got '\[1\]'"),
    ("a.jsonl", b'{"prompt": ' + b"[" * 90_000, "line 1: expected a JSON object"),
    ("a.jsonl", b'{"prompt": ' + b"9" * 9_000 + b"}", "line 1: expected a JSON object"),
    ("a.jsonl", "\u202e".encode(), r"got '\\u202e'"),
    ("a.csv", b"question,kind\nwhy,x", "line 1: expected .* one column named prompt, got 'question,kind': name"),
    ("a.csv", b"\nprompt;kind\na;b", "line 2: expected .* one column named prompt, got 'prompt;kind'.*put commas"),
    ("a.csv", b"prompt,prompt\na,b", "expected a header with one column named prompt"),
    ("a.csv", b'prompt\n"a\nb"\nHello, world', "line 4: expected one cell per column, 1 in all, got 2: put prompts"),
    ("a.csv", b'prompt\na\n"open\nstill', "line 3: expected comma-separated cells, got a row .*: close every"),
    ("a.csv", b'prompt\n"a"b', "line 2: expected comma-separated cells"),
    ("a.csv", b"prompt\n" + b"x" * 200_000, "line 2: expected comma-separated cells.*field larger"),
    ("a.csv", b"prompt,kind\n,chat", "line 2: expected a text under prompt, got '': write the prompt"),
    ("a.csv", b"kind,prompt\nchat", "line 2: expected a text under prompt, got none: write the prompt"),
    ("a.pdf", b"one", r"ends in .txt or .jsonl or .csv, got 'a.pdf': save the prompts in one"),
    ("a", b"one", "ends in .txt"),
])
def test_files_that_are_not_a_prompt_set(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_prompts(tmp_path / name)


def test_a_path_that_is_not_a_file_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")                        # opening it would wait for ever
    for name in ("none.txt", "folder.txt", "pipe.txt", "nul\0.txt"):
        with pytest.raises(ValueError, match="expected a file, got .* which is not a file: choose another"):
            read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="expected a file that can be read, got .*: choose another"):
        read_prompts(tmp_path / f"{'x' * 300}.txt")


def test_a_file_without_read_permission_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(ValueError, match=r"can be read, got 'a.txt' \(Permission denied\): choose another"):
        read_prompts(tmp_path / "a.txt")


@pytest.mark.parametrize("template, reason", [
    ("{% if %}", "TemplateSyntaxError"), ("{{ nothing.here }}", "UndefinedError"), ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ raise_exception('no users') }}", "no users"), ("{{ messages + 1 }}", "TypeError")])
def test_a_chat_template_that_fails_gets_one_sentence(template, reason):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"the chat template of this model cannot write these turns \(.*{reason}"):
        visitor_token_ids(tokenizer, "hi", True)
    assert visitor_token_ids(tokenizer, "hi", False)


@pytest.mark.parametrize("prompt", [5, ["hi"], {"a": "b" * 9999}, True])
def test_a_prompt_that_is_not_text_is_refused(prompt):
    with pytest.raises(ValueError, match="The prompt should be text, got .{1,70}$"):
        visitor_token_ids(tiny_tokenizer(), prompt, False)


def test_kinds_of_bundled_prompts_alternate():
    prompts = bundled_prompts()
    kinds = list(dict.fromkeys(p.kind for p in prompts))
    assert [p.kind for p in prompts[:len(kinds)]] == kinds and len(prompts) == len(set(prompts)) <= MAX_PROMPTS
    few = bundled_prompts(["code", "chat"], each=2)
    assert [p.kind for p in few] == ["code", "chat", "code", "chat"] and set(few) < set(prompts)
    assert bundled_prompts([]) == []
    with pytest.raises(ValueError, match="no bundled prompts of kind 'poetry'; the kinds are chat"):
        bundled_prompts(["chat", "poetry"])
