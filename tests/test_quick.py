"""Quick exits: the parts are commands that exist, a stopped training goes on, and a failure is told."""

import importlib
import json
import sys

import pytest
import torch

from cascadeexit import console, load
from cascadeexit.examples import EXAMPLES
from cascadeexit.prompts import bundled_prompts
from training import quick
from training.calibrate import prompts_of
from training.documents import Split, load_documents
from training.questions import questions
from training.quick import Part, Quick, parse_args, parts_of
from training.tiny import TEXT, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick") / "tiny"
    tokenizer = make_tokenizer(TEXT.read_text(encoding="utf-8"), 384)
    torch.manual_seed(0)
    make_model(len(tokenizer), layers=4, hidden=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model, tmp_path, *more: str):
    return parse_args(["--model", str(model), "--out", str(tmp_path / "out"), *more])


def test_every_part_is_a_command_with_options_that_it_knows(model, tmp_path, monkeypatch):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    parts = parts_of(options(model, tmp_path, "--prompts", str(prompts), "--exits", "0,0.5"))
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert parts[0].command(2.0)[:3] == ["cascadeexit", "run", "Hello"]
    for part in parts[1:]:
        module, *words = part.command(2.0)
        command = importlib.import_module(module)
        monkeypatch.setattr(sys, "argv", [module, *words])
        args = command.parser().parse_args() if hasattr(command, "parser") else command.parse_args()
        assert str(args.model) == str(model)


def test_no_question_is_one_of_the_prompts_that_measure():
    asked = questions()
    assert len(asked) == len(set(asked)) > 1000
    assert not set(asked) & {prompt.text for prompt in bundled_prompts()} and not set(asked) & set(EXAMPLES.values())
    assert questions(1) != asked and sorted(questions(1)) == sorted(asked)


def take(monkeypatch, *commands: tuple[str, ...]) -> None:
    parts = [Part(f"part {i}", 1 / len(commands), lambda minutes, words=words: list(words))
             for i, words in enumerate(commands)]
    monkeypatch.setattr(quick, "parts_of", lambda args: parts)


def test_parts_that_are_done_are_not_done_again(model, tmp_path, monkeypatch):
    args = options(model, tmp_path)
    take(monkeypatch, ("this",), ("no_such_module",))
    with pytest.raises(ValueError, match=r"part 1 failed:(.|\n)*no_such_module(.|\n)*tries it again"):
        list(Quick(args).run())
    take(monkeypatch, ("no_such_module",), ("calendar", "2026"))
    told = list(Quick(args).run())
    assert [p.part for p in told] == sorted(p.part for p in told) and told[-1].done == pytest.approx(1)
    assert [p.done for p in told] == sorted(p.done for p in told)
    log = (args.out / "quick.log").read_text()
    assert "Beautiful is better than ugly" in log and "November" in log
    assert all(part["done"] for part in json.loads((args.out / "quick.json").read_text())["parts"].values())


def test_another_training_in_the_folder_is_refused(model, tmp_path, monkeypatch):
    take(monkeypatch, ("this",))
    list(Quick(options(model, tmp_path)).run())
    with pytest.raises(ValueError, match=r"other settings, \(old, new\): {'width': \('512', '64'\)}"):
        Quick(options(model, tmp_path, "--width", "64"))


def test_a_training_that_is_left_ends_its_process_and_can_go_on(model, tmp_path, monkeypatch):
    take(monkeypatch, ("http.server", "0"))                     # it would never end
    run = Quick(options(model, tmp_path)).run()
    assert next(run).part == "part 0"
    run.close()
    record = json.loads((tmp_path / "out" / "quick.json").read_text())["parts"]["part 0"]
    assert not record["done"] and record["seconds"] > 0


def test_held_out_text_is_for_tests_alone_and_answers_no_training_prompt(model, tmp_path, monkeypatch):
    from training import data

    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(300)))

    def write(name: str, *more: str):
        monkeypatch.setattr(sys, "argv", ["data", "policy", "--model", str(model), "--prompts", str(prompts), "--out",
                                          str(tmp_path / name), "--batch", "16", "--steps", "96", *more])
        data.main()
        return load_documents([tmp_path / name])

    held_out, usual = write("held-out", "--tokens", "1", "--held-out"), write("usual", "--tokens", "9000",
                                                                              "--minutes", "0")
    assert held_out and {d.split for d in held_out} == {Split.TEST}
    assert len(list((tmp_path / "usual").glob("shard-*"))) == 1, "no second round once the time is over"
    trained = {d.key for d in usual if d.split == Split.TRAIN}
    assert trained and not trained & {d.key for d in held_out}
    assert prompts_of(held_out, 99, 0)


def test_the_console_knows_it(capsys, monkeypatch):
    assert "quick" in console.STEPS
    with pytest.raises(SystemExit):
        console.main(["train", "--help"])
    assert "cascadeexit train quick --model" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_gets_useful_exits(model, tmp_path):
    trained = Quick(options(model, tmp_path, "--minutes", "1", "--batch", "32", "--length", "96"))
    assert list(trained.run())[-1].done == pytest.approx(1)
    result = trained.speeds()
    assert result["same"] == 1 and result["verified"] > 0
    engine, _ = load(str(model), tmp_path / "out" / "exits")
    assert engine.bank.config.trained and engine.bank.drafter and engine.bank.calibration
