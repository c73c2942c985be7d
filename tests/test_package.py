"""The package: its metadata agree with the checkout, the core needs no page, and a built wheel runs."""

import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import cascadeexit
from cascadeexit import console, folders

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
# Any of these modules makes the import fail, as if its package were not installed.
WITHOUT_THE_PAGE = """
import sys
sys.modules |= dict.fromkeys(("gradio", "gradio_client", "plotly", "datasets", "httpx"))
"""


def ranges(lines) -> dict[str, Requirement]:
    found = [Requirement(line.split("#")[0].strip()) for line in lines]
    return {requirement.name: requirement for requirement in found}


def test_requirements_and_metadata_have_the_same_ranges():
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert ranges(declared) == ranges((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert len(set(declared)) == len(ranges(declared)), "two extras name one package with different ranges"
    for extra, packages in console.EXTRAS.items():
        assert set(packages) == set(ranges(extras[extra])), extra


def test_the_changelog_begins_with_this_version():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    versions = [line for line in lines if line.startswith("## [") and "Unreleased" not in line]
    assert versions[0].startswith(f"## [{cascadeexit.__version__}] - ")


def test_the_wheel_takes_files_that_exist_to_where_they_are_looked_for():
    for source, target in SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        assert (ROOT / source).exists() and target == f"cascadeexit/project/{source}"
    assert folders.project_folder() == ROOT and folders.assets_folder().is_dir()


def test_the_core_decodes_without_the_packages_of_the_page():
    code = WITHOUT_THE_PAGE + """
from cascadeexit import DecodeConfig
from cascadeexit import console
from tests.tiny_models import IDS, tiny_engine
assert len(tiny_engine().run(IDS, DecodeConfig(mode="verified", max_new_tokens=4)).token_ids) == 4
for command, extra in (("serve", "app"), ("train", "train")):
    try:
        console.main([command])
    except SystemExit as end:
        assert f"pip install 'cascadeexit[{extra}]'" in str(end), end
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_built_wheel_runs_in_another_folder(tmp_path):
    """Build the wheel and run it in an environment that has this one's packages, but not the checkout."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path),
                    str(ROOT)], check=True)
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    library = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                                  capture_output=True, text=True, check=True).stdout.strip())
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(library),
                    *map(str, tmp_path.glob("*.whl"))], check=True)
    own = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    (library / "own.pth").write_text(f"{own}\n")        # after the wheel on sys.path
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def command(*words: str) -> str:
        done = subprocess.run([python, "-m", "cascadeexit", *words], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert command("--version") == f"cascadeexit {cascadeexit.__version__}\n"
    assert command("run", "Explain why the sky is blue.", "--max-new-tokens", "12").startswith("The sky is blue")
    for words in (("serve",), ("doctor",), ("train",), ("train", "distill")):
        assert "--model" in command(*words, "--help")
