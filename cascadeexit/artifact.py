"""Artifact: reads the files of trained exits, and refuses wrong ones before anything large is allocated.

Each error names the file and, if it can, the key or the tensor in it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascadeexit.values import first_line, shown

MAX_JSON_BYTES = 50_000_000
_POINTER = b"version https://git-lfs.github.com/spec/"      # first bytes of what Git LFS leaves for a missing file
_FLOATS, _WHOLES = ("F64", "F32", "F16", "BF16"), ("I64", "I32")


def read_object(path: Path) -> dict:
    """Read a JSON file that holds one object, as a dict.

    Raises ValueError if the file holds anything else. The message names the file.
    """
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    _refuse_pointer(path, content)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes: it is another file")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:       # not UTF-8, not JSON, nested too deeply
        raise ValueError(f"{path} is not JSON ({first_line(error)}): the file is damaged") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(found)}")
    return found


def check_keys(found: Mapping, required: Iterable[str], optional: Iterable[str] | None = ()) -> None:
    """Raise ValueError if an object of a JSON file lacks a key, or has a key that is neither required nor optional.

    Args:
        found: the object.
        optional: keys that may be missing; None allows any other keys.
    """
    missing = [key for key in required if key not in found]
    if missing:
        raise ValueError(f"the key '{missing[0]}' is missing")
    unknown = [] if optional is None else [key for key in found if key not in {*required, *optional}]
    if unknown:
        raise ValueError(f"the key {shown(unknown[0])} is unknown")


def check_tensors(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a safetensors file does not hold exactly these tensors. Only the head of the file is read.

    wanted: {name: tensor of the right shape}. These may be on the `meta` device. A tensor of floats may have another
        precision in the file, and so may a tensor of whole numbers.
    """
    with path.open("rb") as file:
        _refuse_pointer(path, file.read(len(_POINTER)))
    try:
        with safe_open(path, "pt") as file:             # this also compares the length of the file with its head
            found = {name: file.get_slice(name) for name in file.keys()}
            facts = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in found.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({first_line(error)}): the file is damaged or "
                         "cut off") from None
    for name in (*wanted, *facts):
        if name not in facts:
            raise ValueError(f"{path} has no tensor '{name}'")
        if name not in wanted:
            raise ValueError(f"{path} has a tensor that the config does not know: {shown(name)}")
        shape, dtype = facts[name]
        if shape != tuple(wanted[name].shape):
            raise ValueError(f"{path}: the tensor '{name}' must have the shape {tuple(wanted[name].shape)}, which the "
                             f"config gives, got {shown(shape)}")
        kinds = _FLOATS if wanted[name].is_floating_point() else _WHOLES
        if dtype not in kinds:
            raise ValueError(f"{path}: the tensor '{name}' must have one of the types {', '.join(kinds)}, got {dtype}")


def check_finite(source: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError if a tensor holds NaN or infinity. The message names the tensor.

    Tensors of whole numbers are skipped, and so are tensors on the `meta` device, which have no numbers.

    Args:
        source: where the tensors come from, for the message.
        tensors: (name, tensor) of each tensor.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and not _finite(tensor):
            raise ValueError(f"{source}: the weights '{name}' hold NaN or infinity: the file is damaged, or training "
                             "went wrong")


def _finite(tensor: Tensor) -> bool:
    """Return True if all numbers are finite. Reads the tensor once and allocates nothing of its size."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())          # both are NaN if a number is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def is_pointer(path: Path) -> bool:
    """Return True if a file is what Git LFS leaves in a checkout for a file that was not fetched."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _refuse_pointer(path: Path, content: bytes) -> None:
    if content.startswith(_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download the file")
