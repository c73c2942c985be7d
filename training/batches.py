"""Batches: choose the documents of each training step, and divide them into micro-batches."""

import math

import torch


def batches(rows: dict[int, int], batch: int, epochs: float, seed: int,
            repeats: dict[int, int] | None = None) -> list[list[int]]:
    """List the document numbers of each step.

    Every epoch has its own order. A step ends when it has at least `batch` rows.

    Args:
        rows: training rows of each document, by its number.
        repeats: how often one epoch reads a document; documents that are not listed are read once.
    """
    order, numbers = [], [i for i in sorted(rows) for _ in range((repeats or {}).get(i, 1))]
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(seed * 1009 + epoch)
        order += [numbers[i] for i in torch.randperm(len(numbers), generator=generator)]
    steps, waiting = [], 0
    for number in order[:round(epochs * len(numbers))]:
        if not waiting:
            steps.append([])
        steps[-1].append(number)
        waiting = waiting + rows[number]
        waiting = 0 if waiting >= batch else waiting
    return steps


def micro_batches(documents: list[int], lengths: dict[int, int], tokens: int) -> list[list[int]]:
    """Divide documents into parts of at most `tokens` tokens. A longer document is a part by itself."""
    parts, room = [], 0
    for number in documents:
        room -= lengths[number]
        if room < 0:
            parts.append([])
            room = tokens - lengths[number]
        parts[-1].append(number)
    return parts
