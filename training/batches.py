"""Batches: choose the documents of each training step, and divide them into micro-batches."""

import math

import torch


def batches(rows: dict[int, int], batch: int, epochs: float, seed: int,
            repeats: dict[int, int] | None = None) -> list[list[int]]:
    """Choose the documents of each training step. Returns a list of document numbers for each step.

    Every epoch reads the documents in a new random order. A row is a position that `Features.wanted` selects. A step
    takes documents until they have at least `batch` rows together. Only the last step may have fewer rows.

    Args:
        rows: {document number: number of its rows}.
        batch: smallest number of rows in a step.
        epochs: passes over all documents; may be a fraction.
        repeats: {document number: how often one epoch reads it}. An epoch reads all other documents once.
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
    """Divide the documents of a step into micro-batches of at most `tokens` tokens each.

    A document with more tokens becomes a micro-batch of its own.

    Args:
        documents: numbers of the documents.
        lengths: {document number: number of its tokens}.
    """
    parts, room = [], 0
    for number in documents:
        room -= lengths[number]
        if room < 0:
            parts.append([])
            room = tokens - lengths[number]
        parts[-1].append(number)
    return parts
