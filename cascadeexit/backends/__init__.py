"""Backends: the code that computes a model's layers, vocabulary heads and exits.

`torch` is the reference and runs on every device. `cpu` has our C++ kernels for bf16 models on a CPU. `gpu` has our
Triton kernels for bf16 and fp16 models on CUDA. To add a backend, write a class with the members of `base.Backend`.
Pass this class to `SegmentedModel`, or list it in `BACKENDS`.
"""

import logging
from collections.abc import Sequence

from cascadeexit.backends.base import Backend, Unusable
from cascadeexit.backends.cpu import CpuBackend
from cascadeexit.backends.gpu import GpuBackend
from cascadeexit.backends.torch import TorchBackend, TorchReference
from cascadeexit.backends.weights import outer_weights

log = logging.getLogger(__name__)

# `make` takes the first one that fits the model.
BACKENDS: dict[str, type[Backend]] = {"cpu": CpuBackend, "gpu": GpuBackend, "torch": TorchBackend}
REFERENCE = TorchBackend.name


def build() -> None:
    """Prepare every backend on this machine once, for example compile its kernels. This needs no model."""
    for kind in BACKENDS.values():
        kind.build()


def make(base, bounds: Sequence[int], wanted: str | type[Backend] | None = None) -> Backend:
    """Make the backend for a transformers model that is cut into segments.

    Args:
        base: a transformers *ForCausalLM.
        bounds: layer numbers at which segments begin and end; see `Backend.__init__`.
        wanted: the name of a backend, or a backend class. None takes the first backend in `BACKENDS` that can run this
            model on this machine.

    Raises ValueError if the name is unknown, or if the wanted backend cannot run this model on this machine. Raises
    Unusable if `fits` of the wanted backend is True, but its constructor fails.
    """
    if wanted is None:
        for kind in BACKENDS.values():
            if kind.fits(base):
                try:
                    return kind(base, tuple(bounds))
                except Unusable as error:
                    log.warning("The backend '%s' cannot be used: %s", kind.name, error)
        raise AssertionError("the backend 'torch' fits every model")
    if isinstance(wanted, str):
        if wanted not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got '{wanted}'")
        kind = BACKENDS[wanted]
    else:
        kind = wanted
    if not kind.fits(base):
        weights = outer_weights(base)
        raise ValueError(f"the backend '{kind.name}' cannot run this model here ({weights.dtype} on {weights.device}): "
                         "name no backend, or 'torch'")
    return kind(base, tuple(bounds))


def why_not(base) -> dict[str, str]:
    """Return {backend name: reason} for all backends that cannot run a model on this machine.

    base: the model, a transformers *ForCausalLM.
    """
    return {name: getattr(kind, "why_not", lambda _: "it does not fit this model or machine")(base)
            for name, kind in BACKENDS.items() if not kind.fits(base)}


def facts(name: str) -> dict[str, str]:
    """Return {fact: value} about one backend on this machine, for example {"kernels": path of the compiled library}.

    name: name of the backend, for example "cpu".

    Returns {} if the backend has no facts, or if no backend has this name.
    """
    return getattr(BACKENDS.get(name), "facts", dict)()


def reference(base, bounds: Sequence[int]) -> Backend:
    """Make a `torch` backend that shares the weights of `base`, for checking another backend in a few passes.

    Args:
        base: a transformers *ForCausalLM.
        bounds: layer numbers at which segments begin and end; see `Backend.__init__`.
    """
    return TorchReference(base, tuple(bounds))
