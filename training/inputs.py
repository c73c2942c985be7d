"""Normalisation of the adapters' inputs during training. Afterwards, `fold` moves it into the adapters' weights.

In a few directions, hidden states are hundreds of times as large as in the other directions. Without normalisation,
training makes little progress along the weak directions. Letters: D hidden size, E exits.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascadeexit.carry import carried_states
from cascadeexit.exits import ExitBank
from training.features import FeatureStore


def whitening(moments: Tensor) -> Tensor:
    """Compute a whitening matrix M (D, D). For inputs x (n, D), the product x M varies about equally in all directions.

    Args:
        moments: mean of x^T x over the rows (D, D).
    """
    values, vectors = torch.linalg.eigh(moments.double())
    values = values + 0.03 * values.mean()     # of 0.001 to 0.3, the best on held-out text
    return (vectors * values.rsqrt() @ vectors.T).float()


class AdapterInputs:
    """Normalises the inputs of adapters during training. `fold` moves the normalisation into the adapters' weights.

    The normalisation depends on the kind of adapter:
    - A `carry` adapter reads its input through linear layers only. Its inputs are whitened. Its layer `linear` starts
      as the ridge regression from the input to the full model's last hidden state. The target is this state after the
      final norm, divided by the norm's weight.
    - A `swiglu` adapter adds its input to its output, so its inputs are only divided by a number.

    An instance can be called: `inputs(s, h, carried)` returns both inputs of adapter s, normalised.

    Args:
        bank: the exits. The constructor changes their adapters to read normalised inputs.
        documents: indices of the documents from which this process computes the normalisation.
        final_norm: weight of the full model's last norm (D,).
        total: function that adds up a tensor over all processes.
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
        """Return the number by which the hidden states at exit s are divided. Adapter s is changed to suit such inputs.

        The number is the root mean square of a document's hidden states, averaged over the documents. It is rounded to
        a power of two, so that dividing bf16 values by it is exact.
        """
        rms = [store[i].exits[:, s].float().pow(2).mean().sqrt().item() for i in documents]
        added, number = total(torch.tensor([sum(rms), len(rms)], device=final_norm.device)).tolist()
        scale = 2.0 ** round(math.log2(added / number))
        bank.adapters[s].rescale(1 / scale)
        return scale

    @staticmethod
    def _fit_regression(bank: ExitBank, s: int, store: FeatureStore, documents: Sequence[int], final_norm: Tensor,
                        total: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the whitening matrix (2 D, 2 D) of [hidden state, carried state] at exit s.

        Also set the weights of the layer `linear` of adapter s, by ridge regression.
        """
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
        """Normalise the inputs of adapter s: hidden states and carried states, (n, D) each. Returns both."""
        if not self.carry:
            return h / self.maps[s], carried
        with torch.autocast(h.device.type, enabled=False):
            return (torch.cat([h, carried], -1) @ self.maps[s]).chunk(2, -1)

    @torch.no_grad()
    def adopt(self, bank: ExitBank, trained: ExitBank) -> list[int]:
        """Copy adapters of an earlier training into `bank`, for each layer after which both banks have an exit.

        The copies are changed to read normalised inputs.

        Args:
            trained: bank with the exits of the earlier training.

        Returns the layers of the copied adapters. Raises ValueError if the shapes of the adapters differ.
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
        """Move the normalisation into the adapters' weights. After this, the adapters read the inputs as they are."""
        for adapter, change in zip(bank.adapters, self.maps):
            if self.carry:
                _transform(adapter, change)
            else:
                adapter.rescale(change)


def _transform(adapter: torch.nn.Module, change: Tensor) -> None:
    """Change a `carry` adapter: after this, its output for an input x is what its output for x M was before.

    Args:
        change: the matrix M (2 D, 2 D).
    """
    for projection in (adapter.linear, adapter.gate, adapter.down):
        projection.weight.copy_(projection.weight @ change.T)
