"""`python -m training.gpu`: steps that are done stay done, a step that fails costs no other, the smoke form works."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import budgets, gpu, results, steps
from training.budgets import MINUTES
from training.json_files import save_json
from training.steps import DONE, FAILED, RESULT, TIMED_OUT, Step, run_step

ROOT = Path(__file__).parents[1]
WRITE = "import sys, json; json.dump({'answer': 42}, open(sys.argv[1], 'w'))"
COUNT = "import sys; open(sys.argv[1], 'a').write('x'); " + WRITE.replace("sys.argv[1]", "sys.argv[2]")


def step(name: str, code: str, *words: str, limit: int = 120) -> Step:
    return Step(name, ("-c", code, *words), limit)


def test_a_step_saves_its_result_and_how_it_ended(tmp_path):
    record = run_step(step("good", WRITE, RESULT), tmp_path, 60)
    assert record["status"] == DONE and record["result"] == {"answer": 42} and record["limit"] == 120
    printed = run_step(step("printed", "print('a warning'); print('{\"a\": 1}'); print('the end')"), tmp_path, 60)
    assert printed["result"] == {"a": 1}
    bad = run_step(step("bad", f"{WRITE}; print('before'); raise RuntimeError('CUDA error: misaligned address')",
                        RESULT), tmp_path, 60)
    assert bad["status"] == FAILED and bad["result"] == {"answer": 42}, "what was saved before the error counts"
    assert bad["output"][-1] == "RuntimeError: CUDA error: misaligned address"
    silent = run_step(step("silent", "pass", RESULT), tmp_path, 60)
    assert silent["status"] == FAILED and silent["result"] is None


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    code = ("import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; "
            "time.sleep(600)']); open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(600)")
    record = run_step(step("hangs", code, str(tmp_path / "pid")), tmp_path, 5)
    assert record["status"] == TIMED_OUT and 5 <= record["seconds"] < 60
    child, end = Path("/proc") / (tmp_path / "pid").read_text() / "stat", time.time() + 30
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.time() < end:
        time.sleep(0.1)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_second_call_does_only_what_is_not_done(tmp_path, capsys):
    out, ran, flag = tmp_path / "gpu.json", tmp_path / "ran", tmp_path / "flag"
    flaky = step("flaky", f"import os; assert os.path.exists({str(flag)!r}), 'no flag'; {WRITE}", RESULT)
    chosen = [step("first", COUNT, str(ran), RESULT), flaky, step("last", COUNT, str(ran), RESULT)]
    result = gpu.measure(chosen, out, tmp_path, 300, [])
    assert [result["steps"][s.name]["status"] for s in chosen] == [DONE, FAILED, DONE], "the last one ran all the same"
    assert json.loads(out.read_text())["steps"] == result["steps"]
    assert "AssertionError: no flag" in capsys.readouterr().out
    flag.touch()
    result = gpu.measure(chosen, out, tmp_path, 300, [])
    assert {record["status"] for record in result["steps"].values()} == {DONE} and ran.read_text() == "xx"
    assert capsys.readouterr().out.count("done before") == 2
    gpu.measure(chosen, out, tmp_path, 300, ["last"])
    assert ran.read_text() == "xxx"
    assert {"command", "commit", "date", "machine", "seed", "versions"} <= set(result["provenance"])


def test_no_step_starts_when_the_time_is_over(tmp_path, capsys):
    result = gpu.measure([step("late", WRITE, RESULT)], tmp_path / "gpu.json", tmp_path, 1, [])
    assert not result["steps"] and "no time left" in capsys.readouterr().out


def test_results_of_another_machine_are_not_continued(tmp_path):
    out = tmp_path / "gpu.json"
    save_json(out, {"device": "cuda", "gpu": "NVIDIA H100", "steps": {}, "budgets": []})
    with pytest.raises(ValueError, match="NVIDIA H100, and this machine has no GPU"):
        gpu.opened(out)


def test_all_steps_end_in_time_and_their_commands_are_known(tmp_path, monkeypatch):
    """Their limits add up to less than the whole may take, and each program takes its options."""
    listed = gpu.gpu_steps(tmp_path)
    assert sum(s.limit for s in listed) < 60 * MINUTES
    assert len({s.name for s in listed}) == len(listed) and {s.name for s in gpu.smoke_steps(tmp_path)} == {
        s.name for s in listed}
    for s in listed:
        assert s.command[0] == "-m"
        if s.command[1] != "pytest":
            monkeypatch.setattr(sys, "argv", [*s.command[1:], "--help"])
            with pytest.raises(SystemExit) as end:
                importlib.import_module(s.command[1]).main()
            assert end.value.code == 0, s.name


def test_budgets_say_met_missed_or_not_measured():
    found = {"replay 3B": {"rows": {"full": {"roofline_multiple": 0.78}, "cascade": {"of_allowed": 0.9}}},
             "lossless bf16": {"verified_differing_tokens": 0}, "tests": {"passed": 0, "skipped": 9, "failed": 0}}
    for name, met in (("NVIDIA H100 80GB HBM3", False), ("NVIDIA H200", True)):
        checked = {b["what"]: b for b in (budget.check(found) for budget in budgets.budgets(name))}
        assert checked["3B `full`, roofline multiple"]["met"] is met
    assert checked["3B `cascade`, share of the speed-up that bytes allow"]["met"] is False
    assert checked["bf16, tokens of `verified` that differ"]["met"] is True
    assert checked["failed GPU tests"]["met"] is checked["visitors' runs that failed"]["met"] is None, "not measured"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_smoke_form_survives_a_kill_and_fills_the_page(tmp_path):
    """Every step on a CPU with tiny models: killed in the first one, then continued to the end."""
    out = tmp_path / "gpu-smoke.json"
    command = [sys.executable, "-m", "training.gpu", "--smoke", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline().startswith("[1/11] device: at most")
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 128 + signal.SIGTERM
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    found = {name: record["result"] for name, record in result["steps"].items()}
    assert {record["status"] for record in result["steps"].values()} == {DONE} and len(found) == 11
    assert [found[f"lossless {dtype}"]["verified_differing_tokens"] for dtype in ("bf16", "fp16")] == [0, 0]
    assert found["visitors"]["visitors"] == 3 and not found["visitors"]["errors"] and found["visitors"]["written"]
    assert found["visitors"]["first_token_seconds"]["worst"] <= found["visitors"]["seconds"]["worst"]
    assert found["expected 3B"]["rows"]["full"]["kernels"] > 0 and result["device"] == "cpu"
    page = results.pages(page_root(tmp_path, out))[tmp_path / "assets" / "results" / "README.md"]
    assert "Nothing here was measured on a GPU" in page and "tried on a CPU" in page
    assert "| replay 3B | done |" in page and "3 visitors at the same moment" in page


def page_root(folder: Path, result: Path) -> Path:
    """Make a root with the committed files that the pages are made from, and this result."""
    for path in [*(ROOT / "assets").rglob("*.json"), *(ROOT / "assets").rglob("README.md"), ROOT / "README.md"]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (folder / "assets" / "results" / result.name).write_bytes(result.read_bytes())
    return folder


def test_a_step_names_no_folder_of_this_machine():
    assert step("x", "pass", str(steps.ROOT / "runs" / "model")).shown() == "python -c pass model"
