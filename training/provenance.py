"""Provenance of a result: command, commit, date, seed, machine and versions."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from cascadeexit.hub import DEFAULT_MODEL

_VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")       # CPU flags in Linux, best first


def provenance(seed: int | None = None) -> dict:
    """Describe this run of a command. Every result file has this description.

    Returns a dict that can be saved as JSON: `command`, `commit`, `date`, `seed`, `machine` and `versions`. All values
    are text, except `seed`, and `versions`: {name of the package: version}.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else sys.argv[0]
    return {
        "command": " ".join([program, *(shlex.quote(_portable(argument)) for argument in sys.argv[1:])]),
        "commit": (_git("rev-parse", "--short", "HEAD") or "unknown")
                  + ("+changes" if _git("status", "--porcelain") else ""),
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "transformers")},
    }


def results_file(model: str, exits: Path | None, name: str) -> Path:
    """Return the path of the result file `name` in assets/results.

    Raises ValueError, whose message asks for --out, if the model or the exits are not the shipped ones, or if this is
    not a git checkout.
    """
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        raise ValueError("give --out FILE: assets/results is in a checkout, and this is an installed package")
    if model != DEFAULT_MODEL or exits is not None:
        raise ValueError("give --out FILE: assets/results holds results of the shipped model and its exits only")
    return root / "assets" / "results" / name


def _portable(argument: str) -> str:
    """Shorten a path outside the working folder to its last two parts, so that no private folder is published."""
    outside = argument.startswith(("../", "/", "~")) and " " not in argument
    return "/".join(Path(argument).parts[-2:]).lstrip("/") if outside else argument


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in lines}
        cpu = facts.get("model name", cpu)
        # Generations of one model name differ most in their vector instructions.
        cpu += next((f" ({unit})" for unit in _VECTORS if unit in facts.get("flags", "").split()), "")
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:                                     # a result is saved without git, too
        return ""
    return done.stdout.strip()
