"""Hub: finds and loads a model and the exits that belong to it.

The model is the bundled one, one in a local folder, a GGUF file, or one on the Hugging Face Hub.
"""

import gc
import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from cascadeexit import payoff, selfcheck
from cascadeexit.artifact import check_finite, is_pointer
from cascadeexit.backends import REFERENCE, reference
from cascadeexit.backends.memory import give_back
from cascadeexit.backends.weights import bring_outer_weights
from cascadeexit.bundled import DEFAULT_MODEL, bundled_model
from cascadeexit.conversion import ModelUnavailable, Progress, disk_full
from cascadeexit.engine import Engine
from cascadeexit.exits import CONFIG_FILE, WEIGHTS_FILE, ExitBank, download, read_config
from cascadeexit.folders import assets_folder
from cascadeexit.gguf_file import converted, gguf_name, gguf_path, is_gguf, read_facts
from cascadeexit.model import SUPPORTED, SegmentedModel, check_supported
from cascadeexit.prompts import opening_ids
from cascadeexit.shape import Shape
from cascadeexit.values import first_line, shown

log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_SHIPPED_EXITS = assets_folder() / "exits"


# -- loading ---------------------------------------------------------------------------------------------------------


def load(model: str | None = None, exits: str | Path | None = None, *, device: str | None = None,
         dtype: torch.dtype | str | None = None, backend: str | None = None, progress: Progress | None = None,
         device_map: str | dict | None = None, self_check: bool = True, measure: bool = True,
         compute: bool = True) -> tuple[Engine, object]:
    """Load a model with its exits and its tokenizer. Returns an engine that is ready to decode, and the tokenizer.

    Args:
        model: the bundled name, a Hub id, a local folder, or a GGUF file: its path, or owner/name:file.gguf on the Hub.
            Default $CASCADEEXIT_MODEL, else the bundled model.
        exits: a folder of trained exits, or a Hub id such as owner/name; default the exits shipped for this model,
            else untrained exits.
        device: 'cpu', 'cuda' or 'cuda:N'; default a GPU if there is one, else the CPU.
        dtype: a torch dtype or its name; default bfloat16, or float16 on a GPU that only emulates bfloat16.
        backend: 'cpu', 'gpu' or 'torch'; default the fastest that fits.
        progress: function that gets short messages about slow steps; by default they are logged.
        device_map: as for `load_model`. 'auto' is for a model that is too large for one device.
        self_check: compare the backend with the `torch` backend. If they differ, the engine runs on `torch` instead,
            and the reason goes to `Engine.notice` and to `progress`. `Engine.self_check` has the result of the
            comparison.
        measure: measure for about a second which exits and drafts save time on this machine, and switch off those
            that do not (`Engine.payoff`). False uses all exits and drafts.
        compute: False for a process that will be forked. The model is then loaded, but no layer runs.

    Raises ModelUnavailable if the model cannot be loaded; ValueError for an unsupported model, for exits of another
    model, or for a backend that cannot run the model here; FileNotFoundError if the folder holds no exits.
    """
    base, tokenizer, name = load_model(model, device=device, dtype=dtype, progress=progress, device_map=device_map)
    engine = attach(base, name, exits, backend=backend, progress=progress, self_check=self_check and compute)
    del base                                    # the backend keeps what it needs
    opening = _opening(tokenizer, name) if compute else []
    if max(opening, default=0) < engine.model.vocab_size:
        engine.read_opening(opening)
    else:
        log.warning("The chat template of %s uses token ids that the model does not have: use the model with chat off.",
                    name)
    if measure and compute:
        engine.payoff = payoff.measure(engine, model or os.environ.get("CASCADEEXIT_MODEL") or DEFAULT_MODEL)
        for sentence in engine.payoff.sentences():
            (progress or log.info)(sentence)
    give_back()
    return engine, tokenizer


def _opening(tokenizer, name: str) -> list[int]:
    """Return the token ids with which every chat with this model begins. Raises ValueError for a wrong chat template.

    name: short name of the model, for the message.
    """
    try:
        return opening_ids(tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}. Correct or remove the template of {name}: the file chat_template.jinja, or the key "
                         "chat_template in tokenizer_config.json.") from error


def attach(base, name: str, exits: str | Path | None = None, *, backend: str | None = None,
           progress: Progress | None = None, self_check: bool = True) -> Engine:
    """Make an engine for a transformers model that is in memory. Freezes the model and puts it in eval mode.

    Args:
        base: a transformers *ForCausalLM of a supported type.
        name: short name of the model, by which shipped exits are found.
        exits, backend, progress, self_check: as for `load`.

    Raises ValueError and FileNotFoundError as `load` does.
    """
    folder = find_exits(name, exits)
    bank = ExitBank.load(folder) if folder else None
    layers = bank.config.layers if bank else default_exit_layers(base.config.num_hidden_layers)
    make = partial(_engine, base, layers, bank, name)
    return _checked(make, base, backend, progress) if self_check else make(backend)


def _engine(base, layers: Sequence[int], bank: ExitBank | None, name: str, backend: str | None) -> Engine:
    model = SegmentedModel(base, layers, name=name, backend=backend)
    return Engine(model, bank or ExitBank.untrained(model))


def _checked(make: Callable[[str], Engine], base, backend: str | None, progress: Progress | None) -> Engine:
    """Make an engine and run its self-check. If the check fails, make an engine on the `torch` backend instead.

    Returns the engine with the result in `self_check` and, after a failed check, the reason in `notice`.

    Args:
        make: function that makes an engine on the backend of this name.
        base: the transformers model.
    """
    engine = make(backend)
    is_reference = engine.model.backend.name == REFERENCE
    result = selfcheck.check(engine, None if is_reference else reference(base, engine.model.bounds))
    if not result.passed:
        notice = f"The self-check of the model failed: {result.problem}."
        if not is_reference:
            notice = selfcheck.instead_words(result)
            del engine                          # first, since two copies of a large model might not fit
            gc.collect()
            engine = make(REFERENCE)
        engine.notice = notice
        log.warning("%s", notice)
        if progress:
            progress(notice)
    engine.self_check = result
    return engine


def load_model(model: str | None = None, *, device: str | None = None, dtype: torch.dtype | str | None = None,
               progress: Progress | None = None, token: str | None = None,
               device_map: str | dict | None = None) -> tuple[object, object, str]:
    """Load a frozen transformers model without exits. Returns the model, its tokenizer and its short name.

    Args:
        model, device, dtype, progress: as for `load`.
        token: access token for gated and private Hub models; default $HF_TOKEN, else the token that `hf auth login`
            stored on this machine.
        device_map: as in transformers; it replaces `device`. 'auto' spreads a model over several devices, main memory
            and disk.

    Raises ModelUnavailable if the model cannot be loaded, and ValueError for an unsupported model or device, and for
    weights that are not numbers.
    """
    model, place = model or os.environ.get("CASCADEEXIT_MODEL") or DEFAULT_MODEL, find_device(device)
    dtype = _torch_dtype(dtype, place)
    source = resolve(model, progress, token)
    hub = dict(token=token, trust_remote_code=False)    # if unset, transformers asks on the console
    read_model_config(model, source, hub)
    try:
        base, found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa",
                                                           device_map=device_map, output_loading_info=True, **hub)
    except Exception as error:      # the readers of these files raise errors of many kinds, KeyError and Rust's too
        raise _explained(model, source, error) from error
    _check_complete(source, found["missing_keys"])
    tokenizer = load_tokenizer(model, progress=progress, token=token)
    if device_map:
        bring_outer_weights(base)
    else:
        base = base.to(place)
    check_finite(source, base.named_parameters())
    return base.eval().requires_grad_(False), tokenizer, short_name(source)


def _check_complete(source: str, missing: Collection[str]) -> None:
    """Raise ModelUnavailable if the files of a model lack tensors: transformers fills these with random numbers.

    missing: names of the tensors that were not found.
    """
    if missing:
        first, more = sorted(missing)[0], f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelUnavailable(f"the model in {source} is not complete: the weights '{first}'{more} are missing. "
                               "Download it again, or save it again with save_pretrained.")


def load_tokenizer(model: str, *, progress: Progress | None = None, token: str | None = None):
    """Load and return the tokenizer of a model.

    Args:
        model: the bundled name, a Hub id, a local folder or a GGUF file.
        progress, token: as for `load_model`.

    Raises ModelUnavailable if the tokenizer cannot be loaded.
    """
    source = resolve(model, progress, token)
    try:
        return AutoTokenizer.from_pretrained(source, token=token, trust_remote_code=False)
    except Exception as error:
        raise _explained(model, source, error) from error


def describe(model: str | None = None, exits: str | Path | None = None) -> Shape:
    """Return the name, the size and the exits of the model that `load` would load, without reading weights.

    Raises those errors of `load` that can be detected from the config files.
    """
    model = model or os.environ.get("CASCADEEXIT_MODEL") or DEFAULT_MODEL
    name = short_name(model)
    folder = find_exits(name, exits)
    if folder is not None and not exits and (model == DEFAULT_MODEL or _on_hub(model)):     # it may not be here yet
        config = read_config(folder)
        return Shape(name, config.num_layers, config.layers, config.trained)
    if is_gguf(model):                                          # it may not be converted yet
        layers = read_facts(_gguf_path(model)).layers
    else:
        layers = read_model_config(model, resolve(model), dict(trust_remote_code=False)).num_hidden_layers
    if folder is None:
        return Shape(name, layers, default_exit_layers(layers), False)
    config = read_config(folder)
    return Shape(name, layers, config.layers, config.trained)


def _on_hub(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def short_name(source: str) -> str:
    """Return the short name of a model: the last part of its path or Hub id, in lower case.

    The name of a GGUF file loses its ending.
    """
    if is_gguf(source):
        return gguf_name(source)
    return Path(os.path.abspath(Path(source).expanduser())).name.lower()


def find_device(wanted: str | None) -> torch.device:
    """Return the device with this name. None means a GPU if there is one, else the CPU.

    Raises ValueError if the device does not exist here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0    # the count ignores old drivers
    try:
        device = torch.device(wanted or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device '{wanted}' is unknown: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise ValueError(f"device '{wanted}' is not available: this torch ({torch.__version__}) sees {gpus} CUDA "
                         "devices. Use cpu, or cuda:N with an N below this number.")
    return device


def resolve(model: str, progress: Progress | None = None, token: str | None = None) -> str:
    """Convert a model's name to something that transformers can load: the path of a folder, or a Hub id.

    The bundled model is downloaded if needed, and a GGUF file is converted. Raises ModelUnavailable if this fails, or
    if a local folder or its config.json is missing, and ValueError for a GGUF file of an unsupported model.
    """
    if model == DEFAULT_MODEL:
        return str(bundled_model(progress=progress))
    if is_gguf(model):
        return str(converted(_gguf_path(model, token), progress))
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelUnavailable(f"{folder} is a folder but holds no config.json: give the folder that a model was "
                                   "saved to with save_pretrained.")
        return str(folder)
    if model.startswith((".", "/", "~")):
        raise ModelUnavailable(f"there is no folder {folder}. Check the path, or give a Hub id such as owner/name.")
    return model


def _gguf_path(model: str, token: str | None = None) -> Path:
    """Return the path of a GGUF file; see `gguf_path`. Errors of the Hub become ModelUnavailable."""
    try:
        return gguf_path(model, token)
    except ModelUnavailable:
        raise
    except Exception as error:      # the Hub's client raises errors of many kinds
        raise _explained(model, model, error) from error


def find_exits(name: str, exits: str | Path | None = None) -> Path | None:
    """Return the folder of exits to use: `exits` if given, else the folder shipped for the model `name`, else None.

    Exits on the Hub are downloaded. Raises FileNotFoundError if the given folder holds no exits, and ModelUnavailable
    if the download fails.
    """
    if isinstance(exits, str) and _on_hub(exits):
        exits = _downloaded(exits)
    folder = Path(exits) if exits else _SHIPPED_EXITS / name
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing and exits:
        raise FileNotFoundError(f"{folder} holds no exits ({' and '.join(missing)} missing): give a folder written by "
                                "python -m training.distill")
    return None if missing else folder


def _downloaded(repo_id: str) -> Path:
    try:
        return download(repo_id)
    except (HTTPError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnavailable(f"the exits {repo_id} are not a local folder and could not be fetched from the Hub "
                               f"({first_line(error)}). Check the spelling and the network; a private repository needs "
                               "HF_TOKEN.") from error


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """Return the number of layers below each exit, for exits at 30, 57 and 80% of the depth.

    The original CascadeExit has its exits at these depths. A shallow model may get fewer than three exits. Raises
    ValueError for a model of one layer, because an exit needs a layer below it and a layer above it.
    """
    if num_layers < 2:
        raise ValueError(f"a model of {num_layers} layer has no place for an exit: give a model of at least 2 layers")
    wanted = (round(share * num_layers) for share in (0.3, 0.57, 0.8))
    return tuple(sorted({min(max(layer, 1), num_layers - 1) for layer in wanted}))


def exit_layers(text: str | None, num_layers: int) -> tuple[int, ...]:
    """Convert text to exit layers: the number of layers below each exit.

    The text holds layers, such as '8,16,22', or shares of the depth, such as '0.3,0.57,0.8'. None gives 0 and the
    `default_exit_layers`. The exit at 0 is before the first layer, so it drafts in nearly no time.

    Raises ValueError for text that does not hold numbers.
    """
    if text is None:
        return 0, *default_exit_layers(num_layers)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--exits takes layers such as 8,16,22 or shares of the depth such as 0.3,0.57,0.8, got "
                         f"'{text}'") from None
    return tuple(round(x * num_layers) if x < 1 else int(x) for x in numbers)


def _torch_dtype(dtype: torch.dtype | str | None, place: torch.device) -> torch.dtype:
    """Return the torch dtype in which to load a model.

    The default is bf16, or fp16 on a GPU that only emulates bf16, such as a T4.

    Args:
        dtype: a torch dtype or its name; None for the default.
        place: the device that the model will be on.

    Raises ValueError for an unknown dtype, and for fp16 on a CPU.
    """
    if dtype is None:
        if place.type == "cpu":
            return torch.bfloat16
        with torch.cuda.device(place):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype must be a torch dtype or the name of one, such as 'bfloat16', got {dtype!r}")
    if found is torch.float16 and place.type == "cpu":
        raise ValueError("float16 is for GPUs: on a CPU, the text of verified in float16 might differ from the text of "
                         "full. Use bfloat16 or float32.")
    return found


def read_model_config(model: str, source: str, hub: dict):
    """Load and return the transformers config of a model, after checking that the model is supported.

    So no weights of an unsupported model are downloaded.

    Args:
        model: name of the model, for error messages.
        source: folder or Hub id to load from.
        hub: options for the Hub, such as `token`.

    Raises ValueError for an unsupported or quantised model, and ModelUnavailable if the config cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except ValueError as error:
        if _model_type(source, hub) in SUPPORTED:       # a value of the config is wrong
            raise _explained(model, source, error) from error
        # No model type, one that transformers does not know, or one with code of its own.
        raise ValueError(f"{model} is not supported: its config.json describes none of the model types "
                         f"{', '.join(SUPPORTED)} ({first_line(error)})") from error
    except Exception as error:
        raise _explained(model, source, error) from error
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise ValueError(f"{model} is quantised ({shown(method)}), which is not supported. Give the model with its "
                         "original weights, or a GGUF file of it.")
    check_supported(config)
    return config


def _model_type(source: str, hub: dict) -> str | None:
    """Return the model type that a config.json names, although the config may be wrong; None if it names none."""
    try:
        return PreTrainedConfig.get_config_dict(source, **hub)[0].get("model_type")
    except Exception:               # of transformers, of many kinds
        return None


# -- errors ----------------------------------------------------------------------------------------------------------


def _explained(model: str, source: str, error: Exception) -> ModelUnavailable:
    """Convert an error of transformers to a ModelUnavailable error that names the reason and says what to do."""
    reasons = [error]
    while reasons[-1].__cause__ is not None:
        reasons.append(reasons[-1].__cause__)

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(reason, kinds) for reason in reasons)

    if Path(source).is_dir():
        if pointer := next(filter(is_pointer, sorted(Path(source).iterdir())), None):
            return ModelUnavailable(f"{pointer} is a Git LFS pointer, not the file itself: run `git lfs pull` in its "
                                    "folder, or download the file.")
        advice = "Delete the folder and restart the program, which makes it again." if model == DEFAULT_MODEL else (
            "The folder needs config.json, safetensors weights and a tokenizer, as save_pretrained writes them.")
        return ModelUnavailable(f"the model in {source} could not be loaded ({first_line(error)}): a file is missing "
                                f"or damaged. {advice}")
    if caused_by(GatedRepoError) or "gated repo" in str(error):
        return ModelUnavailable(f"{model} is gated: accept its licence on its Hub page, then set HF_TOKEN to an "
                                "access token of the account that accepted it.")
    if caused_by(RepositoryNotFoundError, HFValidationError):
        return ModelUnavailable(f"there is no model '{model}': it is neither '{DEFAULT_MODEL}', nor a local folder, "
                                "nor a Hub id that can be seen. Check the spelling; a private model needs HF_TOKEN.")
    if any(disk_full(reason) for reason in reasons):
        return ModelUnavailable(f"the disk filled up while {model} was fetched. Make room, or set HF_HOME to a folder "
                                "on another disk.")
    # HTTPError comes from the version of httpx that huggingface_hub uses; an answer of the Hub is an HfHubHTTPError.
    no_answer = caused_by(HTTPError) and not caused_by(HfHubHTTPError)
    if no_answer or caused_by(LocalEntryNotFoundError, ConnectionError):
        return ModelUnavailable(f"{model} is neither a local folder nor in the local Hub cache, and the Hub could not "
                                f"be reached ({first_line(error)}). Connect to the network, give a local folder, or "
                                f"use the bundled '{DEFAULT_MODEL}'.")
    return ModelUnavailable(f"{model} could not be loaded ({first_line(error)}). A Hub model needs config.json, "
                            "safetensors weights and a tokenizer. If this model has them, its download may be "
                            "damaged: delete its folder in the Hub cache and start again.")
