"""Build: compiles the C++ kernels once, with this machine's compiler and for its processor.

The compiled library is kept in the cache folder. Its file name contains a hash of the sources, the flags, the compiler
and the processor. Its last bytes are the SHA-256 of all others, which is checked before the library is loaded.
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
import time
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from cascadeexit.backends.cpu.structures import Adapter, Cache, Estimator, Matrix, Screen, Stack
from cascadeexit.folders import cache_folder

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("src")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 300       # longest time of a compiler
_WORK = "kernels-work-"     # begin of the names of folders in which compilers work
_DIGEST_BYTES = hashlib.sha256().digest_size
_VECTORS = ("AVX512BF16", "AVX512VNNI", "AVX512BW", "AVX512F", "AVX2")      # compiler macros that src/*.h asks for


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library of compiled kernels. The first call compiles them if needed, which takes seconds.

    Returns None if there is no compiler, or if compiling or loading fails; the reason is logged. Also returns None if
    the environment variable CASCADEEXIT_KERNELS is 0, which disables the kernels; then nothing is logged.
    """
    if os.environ.get("CASCADEEXIT_KERNELS") == "0":
        return None
    compiler = find_compiler()
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


def find_compiler() -> str | None:
    """Return the path of the C++ compiler: $CXX, else g++, else clang++. Returns None if none is installed."""
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")


def facts() -> dict[str, str]:
    """Describe the kernels on this machine. Compiles them first if needed. Returns {fact: value}.

    The facts are: "compiler", its path or "none"; "kernels", the path of the compiled library; "vector extensions", the
    extensions of the processor that the kernels use; "kernels out of date", how many other libraries are in the cache
    folder. If there are no kernels, "kernels" and "vector extensions" are missing. If there are no other libraries,
    "kernels out of date" is missing.
    """
    compiler, others = find_compiler(), sorted(cache_folder().glob("kernels-*.so"))
    found = {"compiler": compiler or "none"}
    if library() is not None:
        current = kernels_file(compiler)
        others = [path for path in others if path != current]
        found["kernels"] = str(current)
        target = subprocess.run([compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull], capture_output=True,
                                text=True, timeout=60).stdout
        found["vector extensions"] = ", ".join(
            name.lower() for name in _VECTORS if f"#define __{name}__ " in target) or "none that the kernels know"
    if others:
        found["kernels out of date"] = (f"{len(others)} files kernels-*.so in {cache_folder()} are of other versions, "
                                        "compilers or processors and can be deleted")
    return found


def why_not() -> str:
    """Return the reason why the kernels are not available, and what to do; "" if they are available.

    Compiles the kernels first if needed, which takes seconds.
    """
    if os.environ.get("CASCADEEXIT_KERNELS") == "0":
        return "CASCADEEXIT_KERNELS=0 disables the kernels: unset this variable"
    if library() is not None:
        return ""
    if find_compiler() is None:
        return "no C++ compiler is installed: install one (apt-get install g++)"
    return "the kernels could not be compiled: the log above has the compiler's message; install a newer g++"


def _target(compiler: str) -> str:
    """Return the compiler's messages about `-march=native`. They identify this machine's processor."""
    return subprocess.run([compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull], capture_output=True,
                          text=True, timeout=60).stderr


def kernels_file(compiler: str) -> Path:
    """Return the path of the compiled library for the current sources, this compiler and this machine's processor.

    The file may not exist yet.
    """
    sources = [(path.name, path.read_bytes()) for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(repr((sources, FLAGS, _target(compiler), platform.machine())).encode()).hexdigest()[:16]
    return cache_folder() / f"kernels-{key}.so"


def _build(compiler: str) -> Path:
    """Compile the library if its file does not exist or is damaged. Returns its path."""
    path = kernels_file(compiler)
    if not _is_whole(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        with tempfile.TemporaryDirectory(prefix=_WORK, dir=path.parent) as folder:  # two at once: the last one wins
            made = Path(folder) / "kernels.so"
            subprocess.run([compiler, *FLAGS, "-o", str(made), str(SOURCES / "kernels.cpp")], check=True,
                           capture_output=True, text=True, timeout=COMPILE_SECONDS)
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())    # loaders ignore what follows the library
            os.replace(made, path)
    return path


def _is_whole(path: Path) -> bool:
    """Return True if the file ends in the SHA-256 of all bytes before it, as `_build` writes it.

    A library that is cut off, for example because the disk was full, kills the process that loads it.
    """
    if not path.is_file():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _remove_stale(folder: Path) -> None:
    """Delete the folders of compilers that were killed. A folder that may still be in use is kept."""
    for work in folder.glob(f"{_WORK}*"):
        try:
            if time.time() - work.stat().st_mtime > 2 * COMPILE_SECONDS:
                shutil.rmtree(work, ignore_errors=True)
        except OSError:                 # another process was faster
            continue


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument and result types of the library's functions for ctypes. Returns `lib`."""
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
