"""The command `cascadeexit`: what it prints, and what it says about wrong input."""

import io
import os
import signal
import sys

import pytest

from cascadeexit import __version__, console, hub
from cascadeexit.config import DecodeConfig
from cascadeexit.events import COPIED
from cascadeexit.prompts import token_ids
from cascadeexit.terminal import color_of, painted
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer


@pytest.fixture
def tiny(monkeypatch):
    """A tiny engine and its tokenizer, in the place of every model that the command loads."""
    loaded = tiny_engine(), tiny_tokenizer()
    monkeypatch.setattr(hub, "load", lambda *args, **options: loaded)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return loaded


def text_of(engine, tokenizer, prompt: str, config: DecodeConfig) -> str:
    return tokenizer.decode(engine.run(token_ids(tokenizer, prompt), config).token_ids)


@pytest.mark.parametrize("mode", ["full", "cascade", "verified"])
def test_run_prints_the_text_alone_and_the_numbers_beside_it(tiny, capsys, mode):
    console.main(["run", "hello", "--mode", mode, "--max-new-tokens", "12"])
    out, err = capsys.readouterr()
    assert out == text_of(*tiny, "hello", DecodeConfig(mode=mode, max_new_tokens=12)) + "\n"
    assert err.startswith("12 tokens, the first after ") and "tokens/s" in err
    assert ("drafts accepted" in err) == (mode == "verified") and "\x1b" not in out + err


def test_run_reads_a_prompt_from_the_standard_input(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    console.main(["run", "-", "--max-new-tokens", "5"])
    assert capsys.readouterr().out == text_of(*tiny, "hello", DecodeConfig(mode="verified", max_new_tokens=5)) + "\n"


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no such signal here")
def test_run_ends_quietly_when_its_reader_has_read_enough(tiny, monkeypatch):
    before, (reader, writer) = signal.getsignal(signal.SIGPIPE), os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as closed, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "stdout", closed)
        console.main(["run", "hello", "--max-new-tokens", "5"])
    assert ended.value.code == 141 and signal.getsignal(signal.SIGPIPE) == before     # else a server here would die


def test_run_colours_each_token_by_its_exit(tiny, capsys):
    console.main(["run", "hello", "--mode", "cascade", "--threshold", "0", "--max-new-tokens", "3", "--color"])
    out, err = capsys.readouterr()
    assert f"\x1b[38;5;{color_of(0, 3)}m" in out and painted("Exit 1 (after layer 2 of 6)", color_of(0, 3)) in err
    assert len({color_of(exit, 3) for exit in (COPIED, 0, 1, 2, 3)}) == 5 and color_of(3, 3) is None


def test_a_terminal_gets_no_control_characters_of_a_model():
    assert painted("a\x1b[2Jb\tc\n\r\x9b", None) == "a\ufffd[2Jb\tc\n\ufffd\ufffd"


@pytest.mark.parametrize("words, message", [
    (["run", " "], "cascadeexit run: the prompt is empty"),
    (["run", "x", "--threshold", "3"], "thresholds must be a number from 0 to 1, got 3"),
    (["run", "x", "--mode", "full", "--target-disagreement", "0.1"], "target_disagreement goes with mode cascade"),
    (["run", "x", "--mode", "cascade", "--target-disagreement", "0.1"], "needs exits that were calibrated"),
])
def test_wrong_input_ends_with_one_sentence(tiny, words, message):
    with pytest.raises(SystemExit, match=message):
        console.main(words)


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["doctor", "--help"], ["train", "--help"]])
def test_every_command_has_help(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cascadeexit"])
    with pytest.raises(SystemExit) as end:
        console.main(words)
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith(f"usage: {' '.join(['cascadeexit', *words[:-1]])} ")


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        console.main(["--version"])
    assert capsys.readouterr().out == f"cascadeexit {__version__}\n"


def test_the_options_of_the_recipe_become_its_variables():
    variables = console._recipe_variables(["--model", "m", "--out", "o", "--texts", "a", "b", "--distill=--epochs 1"])
    assert variables == {"MODEL": "m", "OUT": "o", "TEXTS": "a b", "DISTILL": "--epochs 1"}
    smoke = console._recipe_variables(["--smoke", "--out", "o"])
    assert smoke.keys() == {"SMOKE", "SMOKE_OUT"} and smoke["SMOKE_OUT"] == "o"
    script = (console.project_folder() / "training" / "run.sh").read_text(encoding="utf-8")
    assert all(f"${{{name}:-" in script for name in {*variables, *smoke}), "the recipe reads all of them"
