"""Run all measurements that need a GPU, with one command. The command can be interrupted and continued.

    python -m training.gpu --out assets/results/gpu-h100.json
    python -m training.gpu --smoke --out runs/gpu-smoke.json         # test of all steps on a CPU, with tiny models

Each step runs in its own process with a time limit. All steps together get 25 minutes, unless --minutes says otherwise.
A step that fails or hangs is recorded and does not stop the other steps. The result is written after each step. If the
same command runs again, it runs only the steps that are not done. A folder beside the result, with the ending .steps,
holds the output of the steps. It can be deleted later.

Before the first run, install what the tests need: pip install -r requirements.txt -r tests/requirements.txt
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import torch

from training.budgets import MINUTES, budgets
from training.command import run_command
from training.json_files import read_json, save_json
from training.options import command_parser
from training.provenance import provenance
from training.steps import DONE, RESULT, Step, run_step

_LEAST_SECONDS = 5                  # with less time left, no step is started
_SMOKE_LIMIT = 300                  # seconds for each step with --smoke: a busy CPU imports slowly
_COLD = "triton"                    # folder of the kernels that the first start compiles


def gpu_steps(folder: Path) -> list[Step]:
    """Return the list of steps for a GPU. Quick and important steps come first.

    Args:
        folder: folder in which steps may keep files.
    """
    lossless = ("-m", "training.evaluate", "lossless", "--prompts", "50", "--out", RESULT, "--dtype")
    replay = ("-m", "training.benchmark", "--replay", "--tokens", "128", "--out", RESULT, "--shape")
    visitors = ("-m", "training.visitors", "--out", RESULT, "--visitors")
    return [
        Step("device", ("-m", "cascadeexit.doctor", "--json"), 90),
        Step("start, nothing compiled", (*visitors, "1"), 120, {"TRITON_CACHE_DIR": str(folder / _COLD)}),
        Step("tests", ("-m", "pytest", "-q", "-m", "gpu", f"--junitxml={RESULT}"), 180),
        Step("replay 3B", (*replay, "llama-3.2-3b"), 120),
        Step("race", ("-m", "training.benchmark", "--prompts", "20", "--tokens", "128", "--out", RESULT,
                      "--skip", "generate, early exit"), 270),
        Step("lossless bf16", (*lossless, "bfloat16"), 210),
        Step("lossless fp16", (*lossless, "float16", "--reference", "0"), 150),
        Step("visitors", (*visitors, "20"), 60),
        Step("replay 8B", (*replay, "llama-3.1-8b"), 150),
        Step("expected 3B", (*replay, "llama-3.2-3b", "--simulate"), 60),
        Step("expected 8B", (*replay, "llama-3.1-8b", "--simulate"), 60)]


def smoke_steps(folder: Path) -> list[Step]:
    """Return the same steps as `gpu_steps`, but for a CPU and with tiny models. fp32 replaces fp16, which needs a GPU.

    Args:
        folder: folder with the tiny model, in which steps may keep files.
    """
    model, tokens = ("--model", str(folder / "model")), ("--tokens", "6")
    instead = {
        "device": model, "start, nothing compiled": (*model, *tokens), "visitors": (*model, *tokens, "--visitors", "3"),
        "tests": ("tests/test_gpu.py",), "race": (*model, *tokens, "--prompts", "1", "--tolerances", "0.3",
                                                  "--cascade-thresholds", "0.5", "--skip", "generate, "),
        "lossless bf16": (*model, *tokens, "--prompts", "1", "--reference", "1"),
        "lossless fp16": (*model, *tokens, "--prompts", "1", "--dtype", "float32")}
    tiny = (*tokens, "--shape", "tiny")
    return [Step(step.name, (*step.command, *instead.get(step.name, tiny)), _SMOKE_LIMIT, step.environment)
            for step in gpu_steps(folder)]


def measure(steps: list[Step], out: Path, folder: Path, seconds: float, again: list[str]) -> dict:
    """Run the steps that are not done, and write the result after each of them.

    Args:
        out: result file. If it exists, it is continued.
        folder: folder for the files of the steps.
        seconds: time limit for all steps together.
        again: names of steps that run again although they are done.

    Returns the result, a dict that is also the content of `out`:
    - `provenance`: how it was made, see `training.provenance`.
    - `device`, `gpu`: "cuda" or "cpu", and the name of the GPU; None without a GPU.
    - `steps`: {name of the step: its record, from `run_step`}.
    - `budgets`: a dict for each budget, from `Budget.check`.

    Raises ValueError if `out` is a result from another GPU.
    """
    result = opened(out)
    end = time.monotonic() + seconds
    for number, step in enumerate(steps, 1):
        line, record = f"[{number}/{len(steps)}] {step.name}", result["steps"].get(step.name)
        if record and record["status"] == DONE and step.name not in again:
            print(f"{line}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            print(f"{line}: no time left", flush=True)
            continue
        print(f"{line}: at most {min(left, step.limit):.0f} s", flush=True)
        result["steps"][step.name] = record = run_step(step, folder, left)
        print(f"{line}: {record['status']} after {record['seconds']:.0f} s", flush=True)
        if record["status"] != DONE:
            print("\n".join(f"    {text}" for text in record["output"][-5:]), flush=True)
        found = {name: r["result"] for name, r in result["steps"].items() if r["result"] is not None}
        result["budgets"] = [budget.check(found) for budget in budgets(result["gpu"] or "")]
        save_json(out, result)
    return result


def opened(out: Path) -> dict:
    """Read the result in `out`, or make a new result without steps if there is no such file.

    Returns the result, as `measure` does, with the provenance of this run. Raises ValueError if the file is a result
    from another GPU.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    made = provenance(0)
    before = read_json(out) or {"device": "cuda" if gpu else "cpu", "gpu": gpu, "steps": {}, "budgets": []}
    if before["gpu"] != gpu:
        raise ValueError(f"{out} holds results of {before['gpu'] or 'a CPU'}, and this machine has {gpu or 'no GPU'}: "
                         "give another --out")
    return {"provenance": made} | before | {"provenance": made}


def summary(result: dict) -> str:
    """Format the budgets as text, one per line: met, missed or not measured; then the measured value and the target."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    lines = [f"{words[b['met']]:<14}{b['what']}: "
             f"{'-' if b['measured'] is None else format(b['measured'], '.3g')}, "
             f"at {'least' if b['at_least'] else 'most'} {b['target']:g}" for b in result["budgets"]]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    p = command_parser(__doc__)
    p.add_argument("--out", type=Path, required=True, help="result file; an interrupted measurement is continued")
    p.add_argument("--smoke", action="store_true", help="tiny models on a CPU: tries the steps, measures nothing")
    p.add_argument("--minutes", type=float, default=MINUTES, help="time for all steps of this call")
    p.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run these steps only")
    p.add_argument("--again", nargs="+", default=[], metavar="STEP", help="run these steps although they are done")
    p.add_argument("--list", action="store_true", help="only print the steps, their time limits and their "
                   "commands")
    args = p.parse_args()
    args.folder = args.out.resolve().with_suffix(".steps")
    args.steps = (smoke_steps if args.smoke else gpu_steps)(args.folder)
    if unknown := {*args.only, *args.again} - {step.name for step in args.steps}:
        p.error(f"unknown steps {', '.join(sorted(unknown))}: there are {', '.join(s.name for s in args.steps)}")
    args.steps = [step for step in args.steps if not args.only or step.name in args.only]
    return args


def make_tiny_model(folder: Path) -> None:
    """Make the tiny model for --smoke in this folder, unless the folder has it. Raises ValueError if that fails."""
    if not (folder / "config.json").exists():
        step = Step("tiny model", ("-m", "training.tiny", "--layers", "4", "--out", str(folder)), _SMOKE_LIMIT)
        record = run_step(step, folder.parent, step.limit)
        if not (folder / "config.json").exists():
            raise ValueError("no tiny model could be made:\n" + "\n".join(record["output"]))


def _stop(*_) -> None:
    """Handle the signal SIGTERM: end this process with SystemExit, so that the running step is ended, too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    args = parse_args()
    if args.list:
        print("\n".join(f"{step.name:<26}{step.limit:>4} s  {step.shown()}" for step in args.steps))
        return
    if not (args.smoke or torch.cuda.is_available()):
        raise ValueError("torch sees no GPU here: python -m cascadeexit.doctor says why. --smoke tries the steps on a "
                         "CPU")
    signal.signal(signal.SIGTERM, _stop)
    if args.smoke:
        make_tiny_model(args.folder / "model")
    result = measure(args.steps, args.out, args.folder, 60 * args.minutes, args.again)
    print(summary(result))
    missing = [step.name for step in args.steps if result["steps"].get(step.name, {}).get("status") != DONE]
    if missing:
        raise SystemExit(f"not done: {', '.join(missing)}. The same command tries them again.")


if __name__ == "__main__":
    run_command(main)
