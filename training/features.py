"""Features: results of the frozen model that training needs, such as the hidden states at its exits.

Features are kept on disk up to a size limit. For the documents beyond this limit, the model computes the features each
time they are needed. A document has features at all its positions, also at those that are not trained: an exit also
reads the carried state of the position before, and n-gram lookup reads all the text before.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from cascadeexit.model import SegmentedModel
from training.documents import Document, Split, load_documents

_CHUNK_TOKENS = 20_000


@dataclass(frozen=True)
class Features:
    """Results of the frozen model for one document. Letters: T tokens, E exits, D hidden size.

    Exits, estimators and drafters are trained only at the positions that `wanted` selects: those at which the model
    chose the next token. In a document that the model did not write, these are all positions except the last.
    """

    ids: Tensor         # (T,) token ids
    exits: Tensor       # (T, E, D) hidden state after each exit's layer
    top: Tensor         # (T, D) last hidden state after the final norm: what the full model's head reads
    choices: Tensor     # (T,) id of the token that the full model chooses after each position
    wanted: Tensor      # (T,) True at the positions used in training


class FeatureStore:
    """Provides the features of each document: `store[i]` returns the `Features` of document number i, from 0.

    `prepared_store` makes a store that is ready to read. For any other store, call `prepare` and then `open` first.

    Args:
        folder: folder for features on disk.
        budget_gb: disk space for features, in gigabytes; 0 = keep none on disk.

    Raises ValueError if a document has more tokens than the model has positions.
    """

    def __init__(self, model: SegmentedModel, documents: Sequence[Document], folder: Path, budget_gb: float):
        self.model, self.documents, self.folder = model, list(documents), folder
        longest = max((len(document.ids) for document in self.documents), default=0)
        if longest > model.max_positions:
            raise ValueError(f"a document has {longest} tokens, {model.name} has {model.max_positions} positions: "
                             "write the data again with a smaller --max-length")
        token_bytes = (model.num_segments * model.hidden_size) * model.dtype.itemsize + 9
        self._chunks: list[range] = []                      # documents of each chunk on disk
        room, first, tokens = budget_gb * 1e9 / token_bytes, 0, 0
        for i, document in enumerate(self.documents):
            tokens += len(document.ids)
            room -= len(document.ids)
            if room < 0:
                break
            after = self.documents[i + 1].shard if i + 1 < len(self.documents) else None
            if tokens >= _CHUNK_TOKENS or document.shard != after:      # a chunk never spans two shards
                self._chunks.append(range(first, i + 1))
                first, tokens = i + 1, 0
        self._loaded: dict[int, Features] = {}
        self._reader = ThreadPoolExecutor(1)
        self._rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def kept(self) -> int:
        """Number of documents whose features are on disk. Other features are computed each time they are read."""
        return self._chunks[-1].stop if self._chunks else 0

    def prepare(self, rank: int = 0, world: int = 1) -> None:
        """Compute the features that are missing on disk, up to the size limit, and write them.

        Args:
            rank: index of this process. Each process computes a part.
            world: number of processes.
        """
        missing = [c for c in self._chunks[rank::world] if not self._path(c).exists()]
        total = sum(len(self.documents[i].ids) for c in missing for i in c)
        with tqdm(total=total, unit="token", unit_scale=True, desc="features", disable=not missing) as bar:
            for chunk in missing:
                features = []
                for i in chunk:
                    features.append(_run(self.model, self.documents[i]))
                    bar.update(len(self.documents[i].ids))
                self._write(chunk, features)

    def put(self, features: Sequence[Features]) -> None:
        """Write the given features to disk, up to the size limit, instead of computing them as `prepare` does.

        Args:
            features: the features of all documents, in the order of the documents.
        """
        for chunk in self._chunks:
            self._write(chunk, features[chunk.start:chunk.stop])

    def open(self) -> None:
        """Open the features on disk for reading. Raises FileNotFoundError if some were not written."""
        for chunk in self._chunks:
            tensors = load_file(self._path(chunk))
            ends = list(accumulate(len(self.documents[i].ids) for i in chunk))
            for i, a, b in zip(chunk, [0, *ends], ends):
                self._loaded[i] = Features(**{name: t[a:b] for name, t in tensors.items()})

    def __getitem__(self, i: int) -> Features:
        """Return the features of document number `i`, on the model's device."""
        if i not in self._loaded:
            return _run(self.model, self.documents[i])
        return Features(**{name: t.to(self.model.device) for name, t in vars(self._loaded[i]).items()})

    def expect(self, numbers: Sequence[int]) -> None:
        """Prefetch the features of these documents: a thread reads them from disk, so that later access is fast."""
        kept = [self._loaded[i] for i in numbers if i in self._loaded]
        self._reader.submit(lambda: [t.clone() for f in kept for t in vars(f).values()])

    def rows(self, i: int) -> int:
        """Count the positions of document number `i` that `Features.wanted` selects."""
        if i not in self._rows:
            self._rows[i] = int(wanted(self.documents[i]).sum())
        return self._rows[i]

    def choices(self, numbers: Sequence[int], limit: int = 2_000_000) -> Tensor:
        """Return the full model's choices at the n positions that `Features.wanted` selects, as token ids (n,).

        Args:
            numbers: indices of the documents. They are read in this order.
            limit: when n reaches this number, no further documents are read.
        """
        parts, total = [], 0
        for i in numbers:
            f = self._loaded.get(i) or self[i]          # of a memory-mapped file only the choices are read
            parts.append(f.choices[f.wanted].cpu())
            total += len(parts[-1])
            if total >= limit:
                break
        return torch.cat(parts).long() if parts else torch.zeros(0, dtype=torch.long)

    def fingerprint(self) -> str:
        """Return a hash of all documents, in order: their tokens, and which of these the model chose."""
        digest = hashlib.blake2b(digest_size=8)
        for d in self.documents:
            digest.update(repr((d.ids, d.chosen)).encode())
        return digest.hexdigest()

    def of(self, split: Split, policy_only: bool = False) -> list[int]:
        """Return the indices of a split's documents. `policy_only` leaves out text that the model did not write."""
        return [i for i, d in enumerate(self.documents) if d.split == split and (any(d.chosen) or not policy_only)]

    def measured(self, split: Split) -> list[int]:
        """Return the indices of those documents of a split with which exits are measured.

        If the split has documents that the model wrote, only these are used. Else all its documents are used.
        """
        return self.of(split, policy_only=True) or self.of(split)

    def _path(self, chunk: range) -> Path:
        signature = repr((self.model.head_fingerprint, self.model.bounds, str(self.model.dtype),
                          [(self.documents[i].ids, self.documents[i].chosen) for i in chunk]))
        return self.folder / f"{hashlib.blake2b(signature.encode(), digest_size=12).hexdigest()}.safetensors"

    def _write(self, chunk: range, features: Sequence[Features]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(chunk)
        save_file({name: torch.cat([vars(f)[name] for f in features]).cpu().contiguous() for name in vars(features[0])},
                  path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


def prepared_store(model: SegmentedModel, data: Sequence[Path], folder: Path, budget_gb: float,
                   accelerator: Accelerator | None = None) -> FeatureStore:
    """Make a store with all documents of these data folders, ready to read.

    Features that are missing on disk are computed and written, up to the size limit. With several processes, each
    process computes a part, so all processes must call this.

    Args:
        data: folders that training.data wrote.
        folder: folder for features on disk.
        budget_gb: disk space for features, in gigabytes; 0 = keep none on disk.
        accelerator: needed with several processes.

    Raises FileNotFoundError if a data folder has no shard file, and ValueError if a document has more tokens than the
    model has positions.
    """
    store = FeatureStore(model, load_documents(data), folder, budget_gb)
    if accelerator:
        store.prepare(accelerator.process_index, accelerator.num_processes)
        accelerator.wait_for_everyone()
    else:
        store.prepare()
    store.open()
    return store


def wanted(document: Document) -> Tensor:
    """Compute `Features.wanted` for a document of T tokens. Returns a tensor (T,) of True and False.

    It is True at the positions at which the model chose the next token. In a document that the model did not write, it
    is True at all positions except the last.
    """
    chosen = torch.tensor(document.chosen, dtype=torch.bool)
    after = torch.cat([chosen[1:], chosen.new_zeros(1)])
    if not chosen.any():
        after[:-1] = True
    return after


@torch.inference_mode()
def _run(model: SegmentedModel, document: Document) -> Features:
    layers, count = model.layers, len(document.ids)
    *at_exit, last = layers.run(range(model.num_segments), layers.embed(document.ids),
                                layers.new_cache(count + layers.row_multiple))
    top = layers.norm(last)
    return Features(ids=torch.tensor(document.ids, dtype=torch.int32, device=model.device),
                    exits=torch.stack([layers.tensor(rows)[0].to(model.device) for rows in at_exit], 1),
                    top=layers.tensor(top)[0].to(model.device),
                    choices=model.head.logits(top)[0].argmax(-1).int(), wanted=wanted(document).to(model.device))
