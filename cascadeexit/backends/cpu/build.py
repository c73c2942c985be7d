"""Build: the C++ kernels, compiled once by the machine's own compiler for this very processor.

The shared library lies in the cache folder under a name that hashes sources, flags, compiler and processor.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from cascadeexit.backends.cpu.structures import Adapter, Cache, Estimator, Matrix, Screen, Stack
from cascadeexit.folders import cache_folder

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("src")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None, with a line in the log, where they cannot be had.

    CASCADEEXIT_KERNELS=0 in the environment disables them.
    """
    if os.environ.get("CASCADEEXIT_KERNELS") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        log.warning("No C++ compiler (g++) here: the model runs in PyTorch, several times slower.")
        return None
    try:
        return _declare(ctypes.CDLL(str(_build(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.warning("The CPU kernels could not be built, so the model runs in PyTorch, several times slower: %s",
                    reason.strip()[-500:])
        return None


def _build(compiler: str) -> Path:
    """Return the shared library for these sources, this compiler and this processor; compile it where it is missing."""
    target = subprocess.run([compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull], capture_output=True,
                            text=True, timeout=60).stderr                   # names the processor that `native` is
    sources = [(path.name, path.read_bytes()) for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(repr((sources, FLAGS, target, platform.machine())).encode()).hexdigest()[:16]
    path = cache_folder() / f"kernels-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:    # two processes at once: the last one wins
            made = Path(folder) / "kernels.so"
            subprocess.run([compiler, *FLAGS, "-o", str(made), str(SOURCES / "kernels.cpp")], check=True,
                           capture_output=True, text=True, timeout=300)
            os.replace(made, path)
    return path


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the exported functions' types."""
    lib.ce_row_cost.restype = c_float
    lib.ce_row_cost.argtypes = [c_int32]
    lib.ce_key_bytes.argtypes = lib.ce_value_bytes.argtypes = [c_int32]
    lib.ce_packed_bytes.restype = c_int64
    lib.ce_packed_bytes.argtypes = [c_int32, c_int32]
    lib.ce_pack.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_int32, c_int32]
    lib.ce_coded_bytes.restype = c_int64
    lib.ce_coded_bytes.argtypes = [c_int32, c_int32]
    lib.ce_code.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_void_p, *[c_int32] * 4]
    lib.ce_rows.argtypes = [POINTER(Matrix), c_void_p, c_int32, c_void_p]
    lib.ce_linear.argtypes = [POINTER(Matrix), c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_argmax.argtypes = [POINTER(Matrix), POINTER(Screen), c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_layers.argtypes = [POINTER(Stack), c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int32, POINTER(Cache),
                              c_int32, c_void_p, c_void_p, c_int32]
    lib.ce_keep.argtypes = [POINTER(Cache), c_int32, c_int32, c_int32, c_int32, c_void_p, c_int32]
    lib.ce_exit.argtypes = [POINTER(Adapter), c_void_p, c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_norm.argtypes = [c_void_p, c_float, c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_likeliest.argtypes = [POINTER(Matrix), c_void_p, c_float, c_int32, c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_draft.argtypes = [POINTER(Matrix), POINTER(Adapter), POINTER(Matrix), *[c_void_p] * 4, c_float, c_int32,
                             c_void_p, c_void_p, c_int32, c_int32]
    lib.ce_gathered.argtypes = [POINTER(Matrix), c_void_p, POINTER(c_void_p), c_int32, c_void_p, c_int32]
    lib.ce_softmax_facts.argtypes = [POINTER(Matrix), *[c_void_p] * 4, c_int32, c_int32]
    lib.ce_confidence.argtypes = [POINTER(Matrix), POINTER(Estimator), *[c_void_p] * 4, c_int32, c_int32]
    return lib
