"""The README is correct: every code block runs or is checked, and every file, flag and link it names exists.

A block is found by its language. A Python block is executed, a shell block is checked command by command with the
checks in `COMMANDS`, the tree of files is compared with the files. A block that nothing here knows fails the test.
"""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pytest import MonkeyPatch

from cascadeexit import console

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README.split("\n---\n", 1)[1]                    # without the front matter
BLOCKS = re.findall(r"^(?:<!-- ([\w-]+) -->\n)?```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
SHELL = [code for _, language, code in BLOCKS if language == "bash"]
PYTHON = [code for marker, language, code in BLOCKS if language == "python" and marker != "api-example"]
INLINE = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE))
MAX_BYTES = 12_288


def test_the_readme_stays_short():
    assert len(README.encode()) <= MAX_BYTES, "move details to assets/results/README.md, a docstring or a model card"


def test_every_block_is_checked_by_a_test():
    assert TEXT.count("\n```") == 2 * len(BLOCKS), "a block could not be read"
    assert {language for _, language, _ in BLOCKS} <= {"bash", "python", "text", "bibtex"}
    assert [marker for marker, _, _ in BLOCKS if marker] == ["api-example", "test-command"]
    assert "<!-- api-example -->" in (ROOT / "tests" / "test_openai.py").read_text(encoding="utf-8"), "it runs there"
    assert "<!-- test-command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8"), "it runs there"
    assert len(SHELL) == 6 and len(PYTHON) == 1


@pytest.mark.bundled
@pytest.mark.parametrize("code", PYTHON)
def test_a_python_block_runs_on_the_bundled_model(code, capsys):
    short, changes = re.subn(r"max_new_tokens=\d+", "max_new_tokens=8", code)
    assert changes == short.count("DecodeConfig(mode="), "every run says how long it is"
    names: dict = {}
    exec(short, names)
    assert len(names["run"].token_ids) == 8, "the last run has a target disagreement"
    lines = capsys.readouterr().out.splitlines()
    assert sum(re.fullmatch(r"\d+ \d+ .*", line) is not None for line in lines) == 8, "one line for each event"


# -- shell commands ----------------------------------------------------------------------------------------------------


def help_of(module: str, words: list[str]) -> str:
    """Return what `python -m module WORDS --help` prints, without starting a process."""
    positional = list(words[:next((i for i, word in enumerate(words) if word.startswith("-")), len(words))])
    out: list[str] = []
    with MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [module, *positional, "--help"])
        patch.setattr(sys.stdout, "write", out.append)
        importlib.import_module(module).main()
    assert end.value.code == 0
    return "".join(out)


def check_flags(module: str, words: list[str]) -> None:
    options = re.findall(r"(?<![\w-])--?[\w-]+", help_of(module, words))
    assert not {word for word in words if word.startswith("-")} - set(options), f"unknown option: {module} {words}"


def check_python(words: list[str], _: dict[str, str]) -> None:
    if words[0].endswith(".py"):
        check_flags(words[0].removesuffix(".py"), words[1:])
    elif words[1] == "pytest":
        check_pytest(words[2:])
    elif words[1] == "venv":
        assert words[2] == ".venv" and importlib.util.find_spec("venv")
    else:
        assert words[0] == "-m" and words[1].startswith(("training.", "cascadeexit.")), words
        check_flags(words[1], words[2:])


def check_pytest(words: list[str]) -> None:
    for flag, value in zip(words[::2], words[1::2], strict=True):
        if flag == "-n":
            assert any(Requirement(line.split("#")[0]).name == "pytest-xdist"
                       for line in (ROOT / "tests" / "requirements.txt").read_text().splitlines())
        else:
            assert flag == "-m" and f'"{value}: ' in (ROOT / "pyproject.toml").read_text(), f"no marker {value}"


def check_pip(words: list[str], _: dict[str, str]) -> None:
    assert words[0] == "install"
    if words[1][0] == ".":
        extras = Requirement(f"cascadeexit{words[1].removeprefix('.')}").extras
        assert extras <= set(PROJECT["optional-dependencies"]) and not words[2:]
        return
    assert set(words[1::2]) == {"-r"}
    for file in words[2::2]:
        assert [Requirement(line.split("#")[0]) for line in (ROOT / file).read_text().splitlines()]


def check_console(words: list[str], _: dict[str, str]) -> None:
    out: list[str] = []
    with MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys.stdout, "write", out.append)
        console.main([words[0], "--help"])
    assert end.value.code == 0 and {word for word in words if word[:2] == "--"} <= set("".join(out).split())


def check_recipe(words: list[str], variables: dict[str, str]) -> None:
    """`tests/test_recipe.py` runs the smoke recipe; here only the variables of the command are compared."""
    script = (ROOT / "training" / "run.sh").read_text(encoding="utf-8")
    assert not words and all(f"${{{name}:-" in script for name in variables), variables


def check_upload(words: list[str], _: dict[str, str]) -> None:
    assert words[0] == "upload" and words[2:4] == [".", "."], "a Space's name, this folder, the Space's root"
    shown = subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "--help"], capture_output=True,
                           text=True, check=True).stdout
    assert all(word in shown for word in words if word.startswith("--"))


def check_activate(words: list[str], _: dict[str, str]) -> None:
    assert words == [".venv/bin/activate"]


def check_ruff(words: list[str], _: dict[str, str]) -> None:
    assert words == ["check", "."]


def check_apt(words: list[str], _: dict[str, str]) -> None:
    assert words[0] == "install" and set(words[1:]) <= set((ROOT / ".ci" / "run").read_text().split())


COMMANDS = {"python": check_python, "python3": check_python, "pip": check_pip, "training/run.sh": check_recipe,
            "hf": check_upload, ".": check_activate, "ruff": check_ruff, "apt-get": check_apt,
            "cascadeexit": check_console}


def check_command(line: str) -> None:
    """Check one command: `NAME=value ... program words`."""
    words = shlex.split(line)
    variables = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    assert words[0] in COMMANDS, f"no check for the program '{words[0]}': add one to COMMANDS"
    COMMANDS[words[0]](words[1:], variables)


@pytest.mark.parametrize("block", SHELL)
def test_a_shell_block_names_programs_options_and_files_that_exist(block):
    for line in re.split(r"&&|\n", block.strip()):
        check_command(line.strip())


@pytest.mark.parametrize("line", sorted({code for code in INLINE if code.split()[0] in COMMANDS}))
def test_a_command_inside_a_sentence_is_checked_too(line):
    check_command(line)


def test_a_wrong_command_is_found():
    for line in ("python app.py --modell x", "python -m training.benchmark --fast", "make all", "FOO=1 training/run.sh",
                 "python -m pytest -m fast"):
        with pytest.raises(AssertionError):
            check_command(line)


# -- files, links, variables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_a_link_leads_somewhere(target):
    assert re.match(r"https://arxiv\.org/abs/\d{4}\.\d{5}$", target) or (ROOT / target).exists()


def test_a_file_named_in_a_sentence_exists():
    named = [code for code in INLINE if re.fullmatch(r"[\w./-]+/[\w-]+\.(py|sh|md|json)", code)]
    assert len(named) >= 4 and all((ROOT / name).is_file() for name in named), named


def test_a_variable_named_in_a_sentence_is_read():
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "cascadeexit").rglob("*.py"))
    variables = [code for code in INLINE if code.startswith("CASCADEEXIT_")]
    assert variables and all(f'"{name}"' in source for name in variables)


def tree_paths() -> list[str]:
    """Paths of the commented tree of files; a line may name several files of one folder."""
    tree, paths, folder = next(code for _, language, code in BLOCKS if language == "text"), [], ""
    for line in tree.splitlines():
        names = re.match(r"\s*((?:[\w.]+(?:\.py|\.sh|/) +)+)", line)[1].split()
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
            paths.append(names[0])
        else:
            paths += [folder + name for name in names]
    return paths


@pytest.mark.parametrize("path", tree_paths())
def test_the_tree_of_files_is_the_tree_on_disk(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
