"""Documents: training text as token ids, divided into a training, a calibration and a test split.

A shard is a file with many documents. It holds their token ids one after another, the offset at which each document
begins, a flag for each token (1 = the model chose it), and for each document a key that decides the split.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Split(IntEnum):
    """Purpose of a document: training, calibration of estimators, or tests."""

    TRAIN = 0
    CALIBRATION = 1
    TEST = 2


@dataclass
class Document:
    """One training text: a conversation or a passage."""

    ids: list[int] = field(default_factory=list)        # token ids
    chosen: list[int] = field(default_factory=list)     # 1 where the model chose the token, 0 where it was given
    key: int = 0                # decides the split
    shard: int = 0              # number of the file it was read from

    @property
    def split(self) -> "Split":
        """Split of this document, which follows from `key`. All documents from one prompt have the same key."""
        return split_of(self.key)


def split_of(key: int) -> Split:
    """Return the split of documents with this key. 1 key in 25 is for tests, 2 are for calibration, 22 for training."""
    return {0: Split.TEST, 1: Split.CALIBRATION, 2: Split.CALIBRATION}.get(key % 25, Split.TRAIN)


def held_out_key(key: int) -> int:
    """Return a key of the test split: the largest one that is not above this key."""
    return key - key % 25


def key_of(content: str) -> int:
    """Return a 48-bit hash of a text. Documents with the same key are in the same split."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big")


def save_shard(path: Path, documents: list[Document]) -> None:
    """Write documents to a shard file. The file appears only when it is complete."""
    offsets = torch.tensor([0] + [len(d.ids) for d in documents]).cumsum(0)
    tensors = {
        "ids": torch.tensor([i for d in documents for i in d.ids], dtype=torch.int32),
        "chosen": torch.tensor([c for d in documents for c in d.chosen], dtype=torch.uint8),
        "offsets": offsets,
        "keys": torch.tensor([d.key for d in documents]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.rename(path)


def load_shard(path: Path, number: int = 0) -> list[Document]:
    """Read the documents of a shard file. `Document.shard` of each document becomes `number`."""
    t = load_file(path)
    ids, chosen, offsets = t["ids"].tolist(), t["chosen"].tolist(), t["offsets"].tolist()
    return [Document(ids[a:b], chosen[a:b], key, number) for a, b, key in zip(offsets, offsets[1:], t["keys"].tolist())]


def load_documents(folders: Sequence[Path]) -> list[Document]:
    """Read all documents of these folders, in a fixed order. If several documents have equal tokens, the first is kept.

    Raises FileNotFoundError if a folder holds no shard.
    """
    documents, seen, number = [], set(), 0
    for folder in folders:
        shards = sorted(Path(folder).glob("shard-*.safetensors"))
        if not shards:
            raise FileNotFoundError(f"no shard-*.safetensors in {folder}: write them with python -m training.data")
        for shard in shards:
            for document in load_shard(shard, number):
                fingerprint = hash(tuple(document.ids))
                if fingerprint not in seen:
                    seen.add(fingerprint)
                    documents.append(document)
            number += 1
    return documents
