"""Run adapters over whole documents in training, with carried states like those in decoding.

In decoding, the carried state comes from the full model or from an exit, depending on which of them produced the newest
token. In training, a random choice decides from which of them the carried state comes.

Letters: N all positions, n positions that `Features.wanted` selects, D hidden size, E exits.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from cascadeexit.carry import carried_states
from cascadeexit.exits import ExitBank
from training.features import Features, FeatureStore
from training.vocabulary import SampledHead

MAX_CHAIN = 3           # at most so many tokens in a row come from an exit in training

Inputs = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]      # such as `training.inputs.AdapterInputs`


def plain_inputs(s: int, h: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states and carried states unchanged.

    Pass this function as `inputs` for adapters that read inputs without normalisation.
    """
    return h, carried


def adapted_states(bank: ExitBank, inputs: Inputs, features: list[Features], own_share: float = 0.0,
                   generator: torch.Generator | None = None, max_chain: int = MAX_CHAIN,
                   exits: list[int] | None = None) -> list[Tensor]:
    """Compute the adapted hidden states of exits at the n positions that `Features.wanted` selects.

    Args:
        inputs: function that normalises the inputs of adapters, such as `training.inputs.AdapterInputs`.
        features: features of the documents.
        own_share: share of the positions where an exit reads the carried state of an exit instead of the full model's.
            The exit that this state comes from is chosen at random for each position. The exit before the first layer
            is different: it reads only its own states there, because it drafts whole chains.
        max_chain: largest number of consecutive tokens that come from an exit.
        exits: indices of the exits to run; None = all.

    Returns a tensor (n, D) for each of these exits.
    """
    device = bank.adapters[0].norm.weight.device
    h = torch.cat([f.exits for f in features]).to(device)                                       # (N, E, D)
    full = torch.cat([carried_states(f.top) for f in features]).to(device)                      # (N, D)
    places = torch.cat([torch.arange(len(f.ids)) for f in features]).to(device)                 # in their documents
    rows = torch.cat([f.wanted for f in features]).to(device).nonzero()[:, 0]                   # (n,)
    every, out = list(range(len(bank.adapters))), []

    def carried(sources: list[int]) -> Tensor:
        return mixed_carried_states(bank, inputs, h, full, places, rows, own_share, sources, generator, max_chain)

    shared = carried(every)
    for s in every if exits is None else exits:
        before_first_layer = bank.config.layers[s] == 0
        out.append(bank.adapters[s](*inputs(s, h[rows, s].float(), carried([s]) if before_first_layer else shared)))
    return out


@torch.no_grad()
def mixed_carried_states(bank: ExitBank, inputs: Inputs, h: Tensor, full: Tensor, places: Tensor, rows: Tensor,
                         own_share: float, sources: list[int], generator: torch.Generator | None,
                         max_chain: int) -> Tensor:
    """Compute carried states for n positions (n, D). Some come from the full model, a random share from exits.

    A state from an exit is computed as if this exit had produced the newest tokens, called a chain. About half of the
    chains have one token, a quarter have two, and so on, up to `max_chain`. If the adapters do not read the carried
    state, all states come from the full model.

    Args:
        h: hidden states at the exits (N, E, D).
        full: carried states of the full model (N, D).
        places: for each of the N positions, its index in its document (N,).
        rows: the positions for which carried states are returned (n,).
        own_share: share of these positions that get the state of an exit.
        sources: indices of the exits from which states may come. One of them is chosen at random for each position.
    """
    carried = full[rows].float()
    if not own_share or not bank.adapters[0].reads_carried:
        return carried
    draw = torch.rand(3, len(rows), generator=generator).to(rows.device)
    source = (draw[0] * len(sources)).long()
    length = (-draw[2].log2().floor().long()).clamp(1, max_chain)                        # 1, 2, 3 ... by halves
    length = torch.minimum(length.masked_fill(draw[1] >= own_share, 0), places[rows])
    for back in range(max_chain, 0, -1):
        for i, s in enumerate(sources):
            here = (length >= back) & (source == i)
            at = rows[here] - back
            before = torch.where((length[here] == back)[:, None], full[at].float(), carried[here])
            carried[here] = bank.adapters[s](*inputs(s, h[at, s].float(), before)).float()
    return carried


@torch.no_grad()
def agreement(bank: ExitBank, inputs: Inputs, store: FeatureStore, documents: list[int], head: SampledHead,
              accelerator: Accelerator, own_share: float = 0.0, exits: list[int] | None = None) -> list[float]:
    """Measure each exit's top-1 agreement with the full model on these documents. Returns one share in [0, 1] per exit.

    Each process reads a part of the documents, so all processes must call this.

    Args:
        documents: indices of the documents.
        head: the vocabulary head of the exits.
        own_share: share of the positions that get the carried state of an exit, as if this exit had
            produced the newest token.
        exits: indices of the exits to measure; None = all.
    """
    exits = list(range(len(bank.adapters))) if exits is None else exits
    sums = torch.zeros(len(exits) + 1, dtype=torch.float64, device=accelerator.device)      # and the rows
    for number in documents[accelerator.process_index::accelerator.num_processes]:
        f, generator = store[number], torch.Generator().manual_seed(number)
        choices = f.choices[f.wanted].to(accelerator.device)
        with accelerator.autocast():
            hidden = adapted_states(bank, inputs, [f], own_share, generator, max_chain=1, exits=exits)
        for i, (s, rows) in enumerate(zip(exits, hidden)):
            words = head.own[:bank.config.words(s)]
            sums[i] += (F.linear(rows.to(words.dtype), words).argmax(-1) == head.local[choices]).sum()
        sums[-1] += len(choices)
    *hits, rows = accelerator.reduce(sums).tolist()
    return [hit / max(1, rows) for hit in hits]
