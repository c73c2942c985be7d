"""Backends: all code that decides how numbers are computed.

`torch` is the reference and runs on every device. `cpu` has our C++ kernels for bf16 models on a CPU. `gpu` has our
Triton kernels for bf16 and fp16 models on CUDA. A new backend is a class with the attributes of `base.Backend`: pass
it to `SegmentedModel`, or list it in `BACKENDS`.
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
    """Do the one-time work of all backends on this machine, such as compiling kernels. No model is needed for it."""
    for kind in BACKENDS.values():
        kind.build()


def make(base, bounds: Sequence[int], wanted: str | type[Backend] | None = None) -> Backend:
    """Make the backend for a transformers model that is cut into segments at `bounds`.

    wanted: name of the backend, a class of your own, or None for the fastest backend that fits.

    Raises ValueError for an unknown name, and for a backend that cannot run this model here.
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
                         "leave the choice open, or use 'torch'")
    return kind(base, tuple(bounds))


def why_not(base) -> dict[str, str]:
    """Find the backends that cannot run this model here. Returns {backend name: the reason, and what to do}."""
    return {name: getattr(kind, "why_not", lambda _: "it does not fit this model or machine")(base)
            for name, kind in BACKENDS.items() if not kind.fits(base)}


def facts(name: str) -> dict[str, str]:
    """Describe what a backend has on this machine, such as compiled kernels: {fact: value}, which may be empty."""
    return getattr(BACKENDS.get(name), "facts", dict)()


def reference(base, bounds: Sequence[int]) -> Backend:
    """Make a `torch` backend for a few passes that check another backend. It copies no weights."""
    return TorchReference(base, tuple(bounds))
