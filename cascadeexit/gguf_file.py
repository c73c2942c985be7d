"""GGUF files: finds a GGUF file that a user names, checks it, and converts it once.

A name is the path of a file, such as ./my-model.gguf, or a file in a Hub repository, as owner/name:file.gguf.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader
from huggingface_hub import hf_hub_download

from cascadeexit.conversion import ModelUnavailable, Progress, convert, disk_full, made_once, no_space
from cascadeexit.folders import cache_folder
from cascadeexit.model import SUPPORTED
from cascadeexit.values import first_line

ENDING = ".gguf"
BYTES_PER_WEIGHT = 2       # of bf16


def is_gguf(model: str) -> bool:
    """Return True if this name of a model means a GGUF file."""
    return model.lower().endswith(ENDING)


def gguf_name(model: str) -> str:
    """Return the short name of a model in a GGUF file: the name of the file without its ending, in lower case."""
    return Path(model.rpartition(":")[2]).name[:-len(ENDING)].lower()


@dataclass(frozen=True)
class GgufFacts:
    """Number of layers and number of weights of the model in a GGUF file, read from the file's header."""

    layers: int
    weights: int


def gguf_path(model: str, token: str | None = None) -> Path:
    """Return the path of a GGUF file. A file on the Hub is downloaded if it is not in the Hub's cache.

    Args:
        model: path of a GGUF file, or owner/name:file.gguf for a file on the Hugging Face Hub.
        token: access token for the Hub; default $HF_TOKEN, else the token that `hf auth login` stored.

    Raises ModelUnavailable if there is no such local file. Errors of the Hub are raised as `huggingface_hub` raises
    them.
    """
    path, (repository, _, name) = Path(model).expanduser(), model.rpartition(":")
    if path.is_file():
        return path
    if not repository or repository.startswith((".", "/", "~")):
        raise ModelUnavailable(f"there is no file {path}. Check the path, or give a file on the Hub as "
                               "owner/name:file.gguf.")
    return Path(hf_hub_download(repository, name, token=token))


def read_facts(path: Path) -> GgufFacts:
    """Read the header of a GGUF file. Checks that the file is complete and that its model type is supported.

    Raises ModelUnavailable if the file is damaged or is no GGUF file, and ValueError for an unsupported model type.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelUnavailable(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
    try:
        reader = GGUFReader(path)
        kind = reader.get_field("general.architecture").contents()
        layers = reader.get_field(f"{kind}.block_count")
    except (ValueError, IndexError, AttributeError, KeyError) as error:     # what the reader raises at a cut file
        raise ModelUnavailable(f"{path} cannot be read ({first_line(error)}): the file is damaged or cut off. Download "
                               "it again.") from error
    if kind not in SUPPORTED or layers is None:
        raise ValueError(f"{path} has a model of type '{kind}', which is not supported. Supported types: "
                         f"{', '.join(SUPPORTED)}.")
    return GgufFacts(int(layers.contents()), int(sum(tensor.n_elements for tensor in reader.tensors)))


def converted(path: Path, progress: Progress | None = None) -> Path:
    """Return the folder with the model of a GGUF file in bf16. On first use, convert the file.

    One of the folder's parents is named by a hash of the file's path, size and date, so that a changed file is
    converted again.

    progress: function that gets short messages about slow steps; by default they are logged.

    Raises the errors of `read_facts`, and ModelUnavailable if the file cannot be converted or the disk is too full.
    """
    facts, name = path.stat(), gguf_name(path.name)
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:12]
    final = cache_folder() / "gguf" / key / name
    if final.is_dir():
        return final
    needed = BYTES_PER_WEIGHT * read_facts(path).weights

    def make(work: Path, say: Progress) -> Path:
        say(f"Converting {path.name} ({facts.st_size / 1e6:.0f} MB) to bf16, once ...")
        try:
            convert(path, work / "model")
        except Exception as error:      # transformers raises errors of many kinds here, Rust's too
            if disk_full(error):
                raise no_space(work.parent, needed) from error
            raise ModelUnavailable(f"{path} could not be converted ({first_line(error)}): the file is damaged, or "
                                   "transformers does not read its kind of GGUF. Try another file of this model."
                                   ) from error
        return work / "model"

    return made_once(final, make, needed, progress)
