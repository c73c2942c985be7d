"""Findings: what the result files together say, and what they do not say."""

import re
from dataclasses import dataclass
from fnmatch import fnmatch

from cascadeexit.settings import DEFAULT_THRESHOLD
from training.comparison import exits_beside
from training.pictures import kind_of

# Files that the report can show: pattern of the name, what is unknown without such a file, and how to make it.
EXPECTED = (
    ("benchmark_*", "Speed and quality of the modes and their rivals", "python -m training.benchmark --growth"),
    ("gpu_*", "Everything on a GPU: speed, memory, start-up, the lossless check",
     "python -m training.gpu --out assets/results/gpu-NAME.json"),
    ("tasks*", "Answers to tasks: following instructions, mathematics, code and summaries, with intervals", ""),
    ("proof*", "Whether certified bounds hold when the calibration is repeated on other prompts", ""),
    ("lossless_*", "Whether verified text equals the full model's, token by token",
     "python -m training.evaluate lossless"),
    ("exits*", "Agreement of each exit on held-out text and on WikiText-2", "python -m training.evaluate exits"),
    ("decode", "Routing of the cascade, and drafts of single exits", "python -m training.evaluate decode"),
    ("baselines", "The published setting, without a KV cache", "python -m training.baselines"),
    ("defaults", "The settings of the page", "python -m training.defaults"),
    ("check_late*", "The cost of reporting agreement while a text grows", "python -m training.benchmark --check-late"))


@dataclass(frozen=True)
class Gap:
    """Something that was not measured: what it is, how that can be seen, and a command that would measure it."""

    what: str
    why: str
    command: str = ""


def files_of(figures: dict) -> dict[str, dict]:
    """Return {name: content} of the files in assets/results, out of the result of `training.results.read_all`."""
    return {name: content for name, content in figures.items() if isinstance(content, dict) and "provenance" in content}


def benchmarks_of(figures: dict) -> dict[str, dict]:
    """Return {name: result} of the benchmarks, those with the most prompts first."""
    found = {name: content for name, content in files_of(figures).items() if name.startswith("benchmark")}
    return dict(sorted(found.items(), key=lambda named: (-named[1]["prompts"], named[0])))


def unused_files(figures: dict) -> list[str]:
    """List the names of result files that the report does not show, because its template does not know them."""
    shown = ("benchmark_*", "gpu_*", "lossless_*", "exits", "exits_*", "decode", "baselines", "defaults", "check_late*")
    return [name for name in files_of(figures) if not any(fnmatch(name, pattern) for pattern in shown)]


def beaten(rows: dict[str, dict]) -> list[str]:
    """List cascades for which a verified setting is at least as fast, and at least as close to the full model."""
    verified = [row for name, row in rows.items() if kind_of(name) == "verified"]
    return [name for name, row in rows.items() if kind_of(name) == "cascade" and any(
        other["over_full"] >= row["over_full"] and other["agreement"] >= row["agreement"] for other in verified)]


def conclusions(figures: dict) -> dict:
    """Choose the figures that the report's five conclusions are made of.

    Returns a dict. An entry is None if its file is missing:
    - `benchmark`: the first of `benchmarks_of`.
    - `tolerant`: (name, row) of its fastest verified setting that may change the text.
    - `cascade`: (name, row) of its cascade that is closest to the full model, among those that are not in `beaten`.
    - `beaten`: result of `beaten` for this benchmark.
    - `point`: point of the calibration at the page's default threshold, else its middle point.
    - `pairs`: the pairs of `exits_beside` that have an exit of ours.
    """
    benchmark = next(iter(benchmarks_of(figures).values()), None)
    rows = benchmark["rows"] if benchmark else {}
    lost = beaten(rows)
    tolerant = [named for named in rows.items() if kind_of(named[0]) == "verified" and named[1]["sequence_match"] < 1]
    rest = [named for named in rows.items() if kind_of(named[0]) == "cascade" and named[0] not in lost]
    return {"benchmark": benchmark, "beaten": lost, "point": _default_point(calibration_of(figures)),
            "tolerant": max(tolerant, key=lambda named: named[1]["over_full"], default=None),
            "cascade": max(rest, key=lambda named: named[1]["agreement"], default=None),
            "pairs": [pair for pair in exits_beside(figures) if pair["ours"]]}


def calibration_of(figures: dict) -> dict | None:
    """Return the calibration of the default exits; None if they have none."""
    return next((artifact["calibration"] for artifact in figures["artifacts"]), None)


def _default_point(calibration: dict | None) -> dict | None:
    points = calibration["points"] if calibration else []
    middle = points[len(points) // 2] if points else None
    return next((point for point in points if point["threshold"] == DEFAULT_THRESHOLD), middle)


def gaps(figures: dict) -> list[Gap]:
    """List what was not measured, as far as missing files and missing entries of files show it."""
    files = {name: content for name, content in files_of(figures).items() if content.get("gpu", True)}   # no smoke runs
    missing = [Gap(what, f"no file {file_name(pattern)}", command) for pattern, what, command in EXPECTED
               if not any(fnmatch(name, pattern) for name in files)]
    if not any(artifact["calibration"] for artifact in figures["artifacts"]):
        missing.append(Gap("Certified bounds of the disagreement", "no file calibration.json beside the exits",
                           "python -m training.calibrate"))
    return [*missing, *_narrow(files), *_of_older_exits(files, figures["shipped"]), *_without_agreement(files)]


def _narrow(files: dict[str, dict]) -> list[Gap]:
    """Return gaps for models and machines: every file is about those that are listed."""
    models = sorted({content["model"] for content in files.values() if "model" in content})
    machines = sorted({content["provenance"]["machine"] for name, content in files.items()
                       if name.startswith(("benchmark", "gpu"))})
    return [*([Gap("Models other than " + " and ".join(models), "every file names only these")] if models else []),
            *([Gap("Speed on machines other than these: " + "; ".join(machines), "every benchmark ran there")]
              if machines else [])]


def _of_older_exits(files: dict[str, dict], shipped: list[str]) -> list[Gap]:
    return [Gap(f"The figures of {file_name(name)} with the exits that ship now", "that file is of older exits",
                re.sub(r" --out \S+", "", content["provenance"]["command"]))
            for name, content in files.items() if isinstance(content.get("exits"), str)
            and content["exits"] not in shipped]


def _without_agreement(files: dict[str, dict]) -> list[Gap]:
    rivals = sorted({row for name, content in files.items() if name.startswith("benchmark")
                     for row, figures in content["rows"].items() if "agreement" not in figures})
    return [Gap("Agreement, token by token, of " + "; ".join(rivals),
                "their rows have only the share of identical texts")] if rivals else []


def file_name(name: str) -> str:
    """Return the file of a name of `files_of`: 'benchmark_cpu' is in benchmark-cpu.json."""
    return f"{name.replace('_', '-')}.json"
