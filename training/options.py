"""Command-line options that several commands of the recipe share, each declared once."""

import argparse
import math
from pathlib import Path

from cascadeexit.hub import DEFAULT_MODEL

_MODEL = "bundled name, Hub id or local folder"


def command_parser(doc: str | None) -> argparse.ArgumentParser:
    """Make a parser for a command. Its help begins with the text `doc`, with the line breaks of `doc`.

    Args:
        doc: docstring of the command's module.
    """
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model(p: argparse.ArgumentParser) -> None:
    """Add --model. Its default is the bundled model."""
    p.add_argument("--model", default=DEFAULT_MODEL, help=_MODEL)


def add_model_and_exits(p: argparse.ArgumentParser) -> None:
    """Add --model and --exits, for commands that measure. The defaults are the bundled model and the shipped exits."""
    add_model(p)
    p.add_argument("--exits", type=Path, help="exits folder; default: the shipped exits")


def add_exits_and_data(p: argparse.ArgumentParser, exits: str, data: str = "folders written by training.data") -> None:
    """Add --model, --exits and --data, for commands that improve exits.

    Args:
        exits: help text of --exits.
        data: help text of --data.
    """
    p.add_argument("--model", help=f"{_MODEL}; default: the model that the exits were made for")
    p.add_argument("--exits", type=Path, required=True, help=exits)
    add_data(p, data)


def add_data(p: argparse.ArgumentParser, help: str = "folders written by training.data") -> None:
    """Add --data, which takes one folder or several."""
    p.add_argument("--data", type=Path, nargs="+", required=True, help=help)


def add_features(p: argparse.ArgumentParser, folder: str) -> None:
    """Add --features, the folder for hidden states on disk, and --feature-gb, the limit of its size.

    Args:
        folder: the default folder, as the help text names it.
    """
    p.add_argument("--features", type=Path, help=f"folder for hidden states; default: {folder}")
    p.add_argument("--feature-gb", type=float, default=20.0, help="disk space for hidden states, in GB; what does not "
                   "fit is computed again each time that it is needed")


def add_device_map(p: argparse.ArgumentParser) -> None:
    """Add --device-map, for a model that is too large for one device."""
    p.add_argument("--device-map", help="'auto' spreads a model that is too large for one device over all devices, "
                   "main memory and disk; only with a single process")


def add_seed(p: argparse.ArgumentParser, help: str = "seed of all random numbers") -> None:
    """Add --seed."""
    p.add_argument("--seed", type=int, default=0, help=help)


def add_loop(p: argparse.ArgumentParser, *, epochs: float, lr: float, fit_documents: int, checkpoint: str) -> None:
    """Add the options of the training loop, with these defaults.

    Args:
        checkpoint: the folder of the checkpoint, as the help text names it.
    """
    p.add_argument("--epochs", type=float, default=epochs, help="passes over the training documents")
    p.add_argument("--fit-minutes", type=float, default=math.inf, help="train as many steps as fit into this time, but "
                   "no more than --epochs needs; the first steps are timed")
    p.add_argument("--batch", type=int, default=1024, help="training rows (positions) per step, over all processes")
    p.add_argument("--micro-batch", type=int, default=8192, help="tokens in one backward pass; a step may have several")
    p.add_argument("--lr", type=float, default=lr, help="highest learning rate")
    p.add_argument("--fit-documents", type=int, default=fit_documents, help="number of training documents from which "
                   "the normalisation of the inputs is computed, and for some adapters also the first weights")
    p.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16", help="precision of the forward passes")
    p.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                   help=f"continue from the last checkpoint in {checkpoint}")
    p.add_argument("--data-note", default="", help="what the data is, in words, for the model card")
    add_seed(p)


def add_dtype(p: argparse.ArgumentParser) -> None:
    """Add --dtype, the data type of the model's weights."""
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                   help="data type of the model's weights")


def add_prompts(p: argparse.ArgumentParser, *, prompts: int, tokens: int) -> None:
    """Add --prompts and --tokens: how many of the project's prompts to decode, and how many new tokens for each."""
    p.add_argument("--prompts", type=int, default=prompts, help="number of the project's prompts to decode")
    p.add_argument("--tokens", type=int, default=tokens, help="new tokens per prompt")


def thresholds(text: str) -> float | tuple[float | None, ...]:
    """Convert a command-line argument to thresholds.

    "0.6" gives 0.6, the threshold of the first exit. "no,0.3,0.4" gives (None, 0.3, 0.4), one threshold for each exit;
    None disables an exit.

    Raises ValueError for other text.
    """
    if "," not in text:
        return float(text)
    return tuple(None if part == "no" else float(part) for part in text.split(","))
