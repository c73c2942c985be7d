"""Conversion: makes a folder of bf16 safetensors from a GGUF file, once.

GGUF is the file format of llama.cpp. Its weights are often rounded to 4 bits, and reading them takes long. The
converted model loads in seconds. A lock and a temporary folder make sure that the final folder is either complete or
missing.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from cascadeexit.values import first_line

log = logging.getLogger(__name__)
Progress = Callable[[str], None]


class ModelUnavailable(RuntimeError):
    """Raised if a model cannot be loaded. The message names what was tried, the reason, and what to do."""


def made_once(final: Path, make: Callable[[Path, Progress], Path], disk_bytes: int,
              progress: Progress | None = None) -> Path:
    """Return the folder `final`. If it does not exist, `make` makes it.

    Several processes may call this at the same time. One of them does the work, and the others wait for it.

    Args:
        final: path of the folder.
        make: function that gets a temporary folder and a function for messages. It returns the finished folder, which
            lies in the temporary folder and is then moved to `final`.
        disk_bytes: disk space that `make` needs.
        progress: function that gets short messages about slow steps; by default they are logged.

    Raises ModelUnavailable if the folder cannot be written, and the errors of `make`.
    """
    say, cache = progress or log.info, final.parent
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{final.name}.lock", say):
            if final.is_dir():
                return final
            for stale in cache.glob(f"{final.name}.tmp-*"):         # left by a killed run: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            if shutil.disk_usage(cache).free < disk_bytes:
                raise no_space(cache, disk_bytes)
            work = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=cache))
            try:
                os.replace(make(work, say), final)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if disk_full(error):
            raise no_space(cache, disk_bytes) from error
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


def convert(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to bf16 safetensors, and save the model and its tokenizer in `folder`.

    Raises many kinds of errors of transformers if it cannot read the file.
    """
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def no_space(folder: Path, disk_bytes: int) -> ModelUnavailable:
    """Return the error for a disk that is too full. The caller raises it.

    Args:
        folder: folder that was to be written.
        disk_bytes: disk space that was needed.
    """
    free = shutil.disk_usage(folder).free // 10**6
    return ModelUnavailable(f"the disk of {folder} is too full: about {disk_bytes // 10**6} MB are needed temporarily, "
                            f"{free} MB are free. Make room, or set CASCADEEXIT_CACHE to a folder on another disk.")


def disk_full(error: Exception | str) -> bool:
    """Return True if a full disk caused this error.

    Errors from Rust libraries and from pip have no error number, so they are recognised by their message.
    """
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
