"""Documents: training text as token ids, divided into training, calibration and test before anything else is done.

A shard holds documents as flat token ids with offsets, a flag per token (1 = the model chose it) and a key per
document, by which they are divided.
"""

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Split(IntEnum):
    TRAIN = 0
    CALIBRATION = 1
    TEST = 2


@dataclass
class Document:
    ids: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)     # 1 where the model picked the token
    key: int = 0
    shard: int = 0              # number of the file it was read from

    @property
    def split(self) -> "Split":
        """Of 25 documents one tests, two calibrate, the rest train. By key, so a prompt never changes sides."""
        return {0: Split.TEST, 1: Split.CALIBRATION, 2: Split.CALIBRATION}.get(self.key % 25, Split.TRAIN)


def key_of(content: str) -> int:
    """A stable 48-bit key: equal content lands in the same split."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big")


def save_shard(path: Path, documents: list[Document]) -> None:
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
    """The documents of a file, which is the shard of this number."""
    t = load_file(path)
    ids, chosen, offsets = t["ids"].tolist(), t["chosen"].tolist(), t["offsets"].tolist()
    return [Document(ids[a:b], chosen[a:b], key, number) for a, b, key in zip(offsets, offsets[1:], t["keys"].tolist())]


def load_documents(folders: list[Path]) -> list[Document]:
    """Every document of these folders, duplicates (equal token ids) dropped, in a fixed order.

    Raises FileNotFoundError when a folder holds no shard.
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
