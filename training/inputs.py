"""Normalisation of the adapters' inputs during training. At the end it is folded into the adapters' weights.

Hidden states have a few directions hundreds of times as strong as the rest, and gradient steps make little progress
along the weak ones. Letters: D hidden size, E exits.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascadeexit.carry import carried_states
from cascadeexit.exits import ExitBank
from training.features import FeatureStore


def whitening(moments: Tensor) -> Tensor:
    """Return the matrix M (D, D) that whitens rows x by x M.

    moments: mean of x^T x over the rows (D, D).
    """
    values, vectors = torch.linalg.eigh(moments.double())
    values = values + 0.03 * values.mean()     # of 0.001 to 0.3, the best on held-out text
    return (vectors * values.rsqrt() @ vectors.T).float()


class AdapterInputs:
    """Maps the rows that adapters read in training. `fold` moves the maps into the adapters' weights.

    A `carry` adapter reads its input through linear layers only. It is trained on whitened rows, and its `linear`
    starts as the ridge regression to the full model's last hidden state. A `swiglu` adapter adds its input to its
    output, so its rows are only scaled.

    Args:
        bank: the exits; their adapters change to suit the mapped rows.
        documents: numbers of the documents from which this process computes the maps.
        final_norm: weight of the full model's last norm (D,).
        total: adds up a tensor over all processes.
    """

    def __init__(self, bank: ExitBank, store: FeatureStore, documents: Sequence[int], final_norm: Tensor,
                 total: Callable[[Tensor], Tensor] = lambda sums: sums):
        self.carry = bank.adapters[0].reads_carried
        fit = self._fit_regression if self.carry else self._fit_scale
        self.maps: list[Tensor | float] = [fit(bank, s, store, documents, final_norm, total)
                                           for s in range(len(bank.adapters))]

    @staticmethod
    def _fit_scale(bank: ExitBank, s: int, store: FeatureStore, documents: Sequence[int], final_norm: Tensor,
                   total: Callable[[Tensor], Tensor]) -> float:
        """Return a scale for the rows at exit s, and fit adapter s to rows that were divided by it.

        The scale is their average root mean square, rounded to a power of two: dividing bf16 rows by that is exact.
        """
        rms = [store[i].exits[:, s].float().pow(2).mean().sqrt().item() for i in documents]
        added, number = total(torch.tensor([sum(rms), len(rms)], device=final_norm.device)).tolist()
        scale = 2.0 ** round(math.log2(added / number))
        bank.adapters[s].rescale(1 / scale)
        return scale

    @staticmethod
    def _fit_regression(bank: ExitBank, s: int, store: FeatureStore, documents: Sequence[int], final_norm: Tensor,
                        total: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the whitening (2 D, 2 D) of [hidden state, carried state], and start adapter s from the regression."""
        D, device = len(final_norm), final_norm.device
        rows, xx, xy = (torch.zeros(shape, device=device) for shape in ((), (2 * D, 2 * D), (2 * D, D)))
        for f in map(store.__getitem__, documents):
            x = torch.cat([f.exits[:, s], carried_states(f.top)], -1)[f.wanted].to(device).float()      # (n, 2 D)
            y = f.top[f.wanted].to(device).float() / final_norm
            xx, xy, rows = xx + x.T @ x, xy + x.T @ y, rows + len(x)
        xx, xy, rows = total(xx), total(xy), total(rows)
        whitener = whitening(xx / rows)
        # Ridge regression: (X^T X + lambda I)^-1 X^T Y, in whitened coordinates W X^T Y.
        bank.adapters[s].linear.weight.data.copy_((whitener @ (xy / rows)).T)
        return whitener

    def __call__(self, s: int, h: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Map hidden rows and carried rows of exit s, (n, D) each."""
        if not self.carry:
            return h / self.maps[s], carried
        with torch.autocast(h.device.type, enabled=False):
            return (torch.cat([h, carried], -1) @ self.maps[s]).chunk(2, -1)

    @torch.no_grad()
    def adopt(self, bank: ExitBank, trained: ExitBank) -> list[int]:
        """Copy adapters of an earlier training into the bank, for each layer after which both banks have an exit.

        Returns these layers. Raises ValueError when the adapters have another shape.
        """
        shared = [layer for layer in bank.config.layers if layer in trained.config.layers]
        for layer in shared:
            s = bank.config.layers.index(layer)
            adapter, old = bank.adapters[s], trained.adapters[trained.config.layers.index(layer)]
            try:
                adapter.load_state_dict(old.state_dict())
            except RuntimeError as error:
                raise ValueError(f"the exits to start from have adapters of another shape: {error}") from error
            if self.carry:
                _transform(adapter, torch.linalg.inv(self.maps[s].double()).float())
            else:
                adapter.rescale(1 / self.maps[s])
        return shared

    @torch.no_grad()
    def fold(self, bank: ExitBank) -> None:
        """Make the adapters read plain rows: each map becomes part of its adapter's weights."""
        for adapter, change in zip(bank.adapters, self.maps):
            if self.carry:
                _transform(adapter, change)
            else:
                adapter.rescale(change)


def _transform(adapter: torch.nn.Module, change: Tensor) -> None:
    """Make a `carry` adapter compute for x what it computed for x M before; M is `change`."""
    for projection in (adapter.linear, adapter.gate, adapter.down):
        projection.weight.copy_(projection.weight @ change.T)
