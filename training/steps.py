"""Steps of a long measurement. Each step is a command that runs in its own process, with a time limit.

A step that crashes, hangs or breaks its CUDA context cannot harm the other steps. Its process and all processes that it
started are ended. Its record says what happened.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
DONE, FAILED, TIMED_OUT = "done", "failed", "timed out"
RESULT = "{result}"                     # in a command: the file that the step's result goes to
_LAST_LINES = 25                        # of the output of a step that failed
_LONGEST_LINE = 300
_GRACE_SECONDS = 5                      # between asking a process to end and ending it


@dataclass(frozen=True)
class Step:
    """One step of a long measurement: a command with a time limit. `run_step` runs it.

    Attributes:
        name: name of the step, from which the names of its files are made.
        command: arguments for Python. `RESULT` in an argument is replaced by the path of the result file, which holds
            JSON, or JUnit XML from pytest. A command without `RESULT` must print its result as JSON.
        limit: seconds after which the step is ended.
        environment: environment variables that are added.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    environment: dict[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """Return the command as text. Absolute paths are shortened to their last part."""
        return " ".join(["python", *(Path(word).name if os.path.isabs(word) else word for word in self.command)])


def run_step(step: Step, folder: Path, seconds: float) -> dict:
    """Run a step and wait until it ends.

    Args:
        folder: folder for the files of the step: its result, its output, and what it needs to continue after an
            interruption.
        seconds: time limit. If the limit of the step is shorter, that one applies.

    Returns the record of the step, a dict that can be saved as JSON:
    - `status`: "done", "failed" or "timed out". A step without a result counts as failed.
    - `seconds`, `limit`: time that the step took, and the step's own time limit.
    - `command`: the command as text.
    - `result`: the result that the step wrote or printed; None if there is none.
    - `output`, if the status is not "done": list of the last lines of its output.
    """
    name = step.name.replace(" ", "-").replace(",", "")
    result, printed = folder / f"{name}.json", folder / f"{name}.log"
    result.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    limit, started = min(seconds, step.limit), time.monotonic()
    command = [sys.executable, *(word.replace(RESULT, str(result)) for word in step.command)]
    with printed.open("w", encoding="utf-8") as output:
        status = _wait(command, output, limit, os.environ | step.environment)
    record = {"status": status, "seconds": round(time.monotonic() - started, 1), "limit": step.limit,
              "command": step.shown(), "result": _read(result if RESULT in str(step.command) else printed)}
    if status == DONE and record["result"] is None:
        record["status"] = FAILED
    if record["status"] != DONE:
        record["output"] = _last_lines(printed)
    return record


def _wait(command: list[str], output, limit: float, environment: dict[str, str]) -> str:
    """Run a command until it ends or reaches the limit, in seconds. Returns its status: done, failed or timed out."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                               stderr=subprocess.STDOUT, start_new_session=True)
    with ended(process):
        try:
            return DONE if process.wait(limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            return TIMED_OUT


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Context manager: at the end of the `with` block, end the process and all processes that it started.

    This also happens after an error or Ctrl-C.
    """
    try:
        yield
    finally:
        for send in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, send) if hasattr(os, "killpg") else process.send_signal(send)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)


def _read(path: Path) -> dict | None:
    """Read the result of a step from a file. Returns None if the file has no result.

    The file holds JSON, or printed output in which a line begins with a JSON object, or JUnit XML. For JUnit XML, the
    result is that of `_test_counts`.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if text.startswith("<?xml"):
        return _test_counts(text)
    begin = re.search(r"^\{", text, re.MULTILINE)                    # warnings may come before it
    with contextlib.suppress(ValueError):
        return json.JSONDecoder().raw_decode(text, begin.start())[0] if begin else None
    return None


def _test_counts(xml: str) -> dict:
    """Count the tests in a JUnit XML report: passed, skipped and failed. `failures` lists the names of failed tests."""
    counts = {"passed": 0, "skipped": 0, "failed": 0, "failures": []}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        counts["failed" if bad else "skipped" if case.find("skipped") is not None else "passed"] += 1
        if bad:
            counts["failures"].append(case.get("name"))
    return counts


def _last_lines(path: Path) -> list[str]:
    """Return the last lines of a step's output. Private folders in it are replaced by "." and "~"."""
    text = path.read_text(encoding="utf-8", errors="replace").replace(str(ROOT), ".").replace(str(Path.home()), "~")
    return [line[-_LONGEST_LINE:] for line in text.splitlines()[-_LAST_LINES:]]
