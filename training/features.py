"""Hidden states of the frozen model at its exits, computed once and kept in memory-mapped chunks within a budget.

Adapters and estimators work position by position, so a training row is just the hidden state at each exit and the
one that the head reads at the top. Rows are kept where the next token was the model's own choice (policy text) or,
in plain text, everywhere.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from cascadeexit.model import SegmentedModel
from training.data import Document, Split

_CHUNK_TOKENS = 20_000


@dataclass
class Features:
    """Rows of all documents. E exits, D hidden size."""

    exits: Tensor       # (n, E, D) hidden state after each exit's layer
    top: Tensor         # (n, D) last hidden state after the final norm: what the full head reads
    split: Tensor       # (n,) Split of the row's document
    policy: Tensor      # (n,) 1 where the next token was the model's own choice

    def rows(self, split: Split, policy_only: bool = False) -> Tensor:
        """Indices of the rows of a split: (m,)."""
        chosen = self.split == split
        return (chosen & (self.policy == 1) if policy_only else chosen).nonzero()[:, 0]


def compute(model: SegmentedModel, documents: list[Document], folder: Path, budget_gb: float) -> Features:
    """Features of these documents, in order, until the disk budget is used; finished chunks are read back."""
    row_bytes = (model.num_segments * model.hidden_size) * model.head_weight.element_size() + 2
    budget = int(budget_gb * 1e9 / row_bytes)
    chunks, total = [], 0
    with tqdm(total=min(budget, sum(map(_num_rows, documents))), unit="row", unit_scale=True, desc="features") as bar:
        for batch in _chunks(documents):
            rows = sum(map(_num_rows, batch))
            if total + rows > budget:
                bar.write(f"the feature budget of {budget_gb} GB is used: {total} rows kept, the rest is left out")
                break
            chunks.append(_chunk(model, batch, folder))
            total += rows
            bar.update(rows)
    names = ("exits", "top", "split", "policy")
    return Features(**{name: torch.cat([chunk[name] for chunk in chunks]) for name in names})


def _wanted(document: Document) -> Tensor:
    """Positions to keep: those whose next token the model chose, or all of a plain text."""
    chosen = torch.tensor(document.chosen, dtype=torch.bool)
    return (chosen[1:] if chosen.any() else torch.ones(len(chosen) - 1, dtype=torch.bool)).nonzero()[:, 0]


def _num_rows(document: Document) -> int:
    return len(_wanted(document))


def _chunks(documents: list[Document]):
    batch, tokens = [], 0
    for document in documents:
        batch.append(document)
        tokens += len(document.ids)
        if tokens >= _CHUNK_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


@torch.inference_mode()
def _chunk(model: SegmentedModel, documents: list[Document], folder: Path) -> dict[str, Tensor]:
    signature = hashlib.blake2b(repr((model.head_fingerprint, model.bounds, str(model.dtype),
                                      [d.ids for d in documents])).encode(), digest_size=12).hexdigest()
    path = folder / f"features-{signature}.safetensors"
    if not path.exists():
        parts = [_document(model, document) for document in documents]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.cat([p[name] for p in parts]) for name in parts[0]}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _document(model: SegmentedModel, document: Document) -> dict[str, Tensor]:
    cache, h, at_exit = model.new_cache(model.pad(len(document.ids))), model.embed(document.ids), []
    wanted = _wanted(document).to(model.device)
    for s in range(model.num_segments):
        h = model.run_segment(s, h, cache)
        at_exit.append(h[0, wanted])
    top = model.norm(at_exit.pop())
    n = len(wanted)
    return {"exits": torch.stack(at_exit, 1).cpu(), "top": top.cpu(),
            "split": torch.full((n,), document.split, dtype=torch.uint8),
            "policy": torch.full((n,), int(any(document.chosen)), dtype=torch.uint8)}
