"""A test process that dies must not stop the other tests, nor keep the run from ending."""

import os
import re
import subprocess
import sys
from pathlib import Path

CONFTEST = """
import pytest

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from tests.lots import Lots
    config.option.loadscopereorder = False
    return Lots(config, log)
"""
TESTS = """
import os
import pytest

@pytest.mark.parametrize("number", range(40))
def test_number(number):
    if number in DYING:
        os._exit(1)
"""


def test_a_run_ends_when_processes_die(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name, dying in (("test_early", {3}), ("test_late", {38, 39})):
        (tmp_path / f"{name}.py").write_text(f"DYING = {dying}\n{TESTS}")
    result = subprocess.run([sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-rf", str(tmp_path)],
                            capture_output=True, text=True, timeout=120, env=_environment())
    counts = dict(re.findall(r"(\d+) (passed|failed)", result.stdout.splitlines()[-1]))
    assert counts == {"3": "failed", "77": "passed"}, result.stdout[-2000:]
    died = set(re.findall(r"FAILED .*?(test_\w+)\.py::test_number\[(\d+)\]", result.stdout))
    assert died == {("test_early", "3"), ("test_late", "38"), ("test_late", "39")}


def _environment() -> dict[str, str]:
    """Return an environment in which `tests.lots` is found, and which does not look like a process of pytest-xdist."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[1])}
