"""Accelerator: finds out why torch cannot use the NVIDIA GPU of this machine or of this Hugging Face Space."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def nvidia_driver() -> str | None:
    """Return the version of the installed NVIDIA driver, such as '550.54.15'.

    Returns 'unknown' if the driver does not tell its version, and None if no driver is installed.
    """
    try:
        found = re.search(r"(?:Kernel Module|x86_64|aarch64)\s+(\d[\d.]+)", _DRIVER_FILE.read_text())
    except OSError:
        return None
    return found[1] if found else "unknown"


def cuda_problem(environ: Mapping[str, str] = os.environ) -> str | None:
    """Explain why torch cannot use the NVIDIA GPU of this machine, and what to do about it.

    Returns the explanation as text. Returns None if torch can use a GPU, and on machines without an NVIDIA driver.

    environ: the environment variables.
    """
    driver = nvidia_driver()
    if torch.cuda.is_available() or driver is None:
        return None
    if torch.version.cuda is None:
        return (f"This machine has an NVIDIA driver ({driver}), but torch {torch.__version__} is a build for the CPU. "
                "Install one for CUDA: see https://pytorch.org/get-started/locally")
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "none", "NoDevFiles"):
        return (f"The environment variable CUDA_VISIBLE_DEVICES is '{hidden}', which hides all devices. Unset it, or "
                "set it to the number of a device, such as 0.")
    visible = "is not set" if hidden is None else f"is '{hidden}': check that this device exists"
    return (f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but sees no device with the driver "
            f"{driver}. The driver is probably too old: update it, or install a torch built for an older CUDA "
            f"(`nvidia-smi` shows the newest that the driver knows). CUDA_VISIBLE_DEVICES {visible}.")


def space_problem(environ: Mapping[str, str] = os.environ) -> str | None:
    """Explain why torch cannot use the GPU of this Hugging Face Space, and what to do about it.

    Returns the explanation as text. Returns None in four cases: torch can use the GPU, the Space has only a CPU, the
    Space runs on ZeroGPU, or this process does not run in a Space. On ZeroGPU a missing GPU is normal, because the
    `spaces` package provides it only during single calls.

    environ: the environment variables. ACCELERATOR names the hardware of a Space.
    """
    hardware = (environ.get("ACCELERATOR") or environ.get("SPACE_HARDWARE") or "none").strip().lower()
    local, no_gpu = "SPACE_ID" not in environ, hardware == "none" or hardware.startswith("cpu")
    zero = bool(environ.get("SPACES_ZERO_GPU")) or hardware.startswith("zero")
    if local or no_gpu or zero or torch.cuda.is_available():
        return None
    reason = cuda_problem(environ) or f"torch {torch.__version__} finds no NVIDIA driver."
    return (f"this Space has a GPU ({hardware}), but torch cannot use it. {reason} Restart the Space, or choose CPU "
            "hardware in its settings.")
