"""Where an artifact or a result comes from: the command, the code, the versions, the machine, the day."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from cascadeexit.hub import DEFAULT_MODEL

_VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")       # as Linux calls them, best first


def provenance(seed: int | None = None) -> dict:
    """A JSON-ready record of this run, to lie beside what it made."""
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
    """Where a result of the shipped model and its exits belongs. Raises ValueError for others: they want a place."""
    if model != DEFAULT_MODEL or exits is not None:
        raise ValueError("give --out a file: assets/results tells of the shipped model and its exits alone")
    return Path(__file__).parents[1] / "assets" / "results" / name


def save_json(path: Path, content: dict) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_lines(path: Path) -> list[dict]:
    """Records of a JSON-lines file, none where there is none; a line that a kill tore is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _portable(argument: str) -> str:
    """A path outside the working folder by its last two parts: the rest is this machine's affair."""
    outside = argument.startswith(("../", "/", "~")) and " " not in argument
    return "/".join(Path(argument).parts[-2:]).lstrip("/") if outside else argument


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        facts = {name.strip(): value.strip() for name, _, value in lines}
        cpu = facts.get("model name", cpu)
        # The name may not tell generations apart, which differ most in their vectors.
        cpu += next((f" ({unit})" for unit in _VECTORS if unit in facts.get("flags", "").split()), "")
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}"


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:                                     # no git: a result is not lost for that
        return ""
    return done.stdout.strip()
