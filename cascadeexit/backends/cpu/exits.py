"""CpuExits: runs adapters, confidence estimators and the drafter in C++.

Letters: N rows, D hidden size, I inputs, O outputs, E exits except the first, V tokens of the vocabulary.
A row's carried state is the hidden state that produced the newest token before it.
"""

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from itertools import chain
from math import prod

import torch
from torch import Tensor, nn

from cascadeexit.backends.cpu import build
from cascadeexit.backends.cpu.heads import CpuHead
from cascadeexit.backends.cpu.packing import Store, column_scale, rounded
from cascadeexit.backends.cpu.states import Hidden, States, in_bf16, like, tensor_of
from cascadeexit.backends.cpu.structures import Adapter, Estimator, Matrix
from cascadeexit.backends.exits import Exits
from cascadeexit.exits.adapters import CarryAdapter, ExitAdapter
from cascadeexit.exits.bank import ExitBank
from cascadeexit.exits.confidence import read_copies


class CpuExits(Exits):
    """Runs the trained exits of a model in C++. `base.ExitRuntime` describes the methods."""

    drafter_bits = 8            # drafts change only the speed, never the text

    def __init__(self, bank: ExitBank, backend):
        super().__init__(bank, backend)
        self._layers = backend.layers
        self._adapters = [CpuAdapter(a) if CpuAdapter.knows(a) else ModuleAdapter(a) for a in bank.adapters]
        drafter = bank.drafter
        self._draft_adapter = CpuAdapter(drafter.adapter, eight_bits=True) if drafter else self._adapters[0]
        self._read_context = CpuContext(drafter.context.weight) if drafter else None
        self._sketch_estimators = [CpuConfidence(self._sketch, head.alone, head.after)
                                   for head in bank.confidence_heads or ()] if self._sketch else []
        embedding, self._drafter = self._layers.embedding_head, None
        in_one_call = isinstance(self._draft_adapter, CpuAdapter) and embedding is not None
        if bank.config.layers[:1] == (0,) and in_one_call:
            self._drafter = CpuDrafter(embedding, self._draft_adapter, self._draft_head, self._ids)
        all_words = bank.head_ids is not None and len(bank.head_ids.unique()) == bank.config.vocab_size
        if all_words and not backend.head.has_bias:
            self.full_head = backend.head.screened(self._whole, backend.head.weight[bank.head_ids], bank.head_ids)

    def hidden(self, s: int, rows: Hidden, carried: Hidden) -> Hidden:
        return self._adapters[s](rows, carried)

    def confidence(self, s: int, hidden: Hidden, copied: Sequence[tuple[int, int]],
                   before: Hidden | None = None) -> list[float]:
        if self._sketch_estimators:
            return self._sketch_estimators[s](hidden, read_copies(copied, self._places), before)
        if self._bank.confidence_heads is None:
            return self.logits(s, hidden).softmax(-1).amax(-1).tolist()
        return self._bank.confidence_heads[s].chance(tensor_of(hidden)).tolist()

    def context(self, states: Sequence[Hidden], row: int) -> ctypes.Array | None:
        return self._read_context(states, row) if self._read_context else None

    def drafts(self, tokens: Sequence[int], carried: Sequence[Hidden], k: int, temperature: float,
               context: ctypes.Array | None = None) -> list[tuple[States, list[float], list[int]]]:
        if self._drafter:
            return self._drafter(tokens, carried, k, temperature, context)
        return self.drafts_by_parts(tokens, carried, k, temperature, context)

    def drafts_by_parts(self, tokens: Sequence[int], carried: Sequence[Hidden], k: int, temperature: float,
                        context: ctypes.Array | None = None) -> list[tuple[States, list[float], list[int]]]:
        """Draft the next tokens with separate calls for the embedding, the adapter and the vocabulary head.

        `ExitRuntime.drafts` describes the arguments and the result. This method is for models that `CpuDrafter` does
        not support, for example for a model that does not tie its embedding to its head.
        """
        states = torch.cat([tensor_of(state) for state in carried])
        if context is not None:
            states = (states + torch.frombuffer(context, dtype=torch.float32)).to(states.dtype)
        hidden = States((len(tokens), states.shape[-1]))
        self._draft_adapter(tensor_of(self._layers.embed(tokens))[0], states, hidden)
        probs, words = self._draft_head.likeliest(hidden, k, temperature)
        ids = words if self._ids is None else self._bank.head_ids[words]
        each = [hidden.part(i, (1, states.shape[-1])) for i in range(len(tokens))]
        return list(zip(each, probs.tolist(), ids.tolist()))


class ModuleAdapter:
    """Runs an exit's adapter in PyTorch. It is used if the C++ kernels do not support the adapter's type.

    A call takes rows (..., D) and their carried states (..., D), and returns the adapter's output (..., D).
    """

    def __init__(self, adapter: nn.Module):
        self._adapter = adapter

    def __call__(self, rows: Hidden, carried: Hidden, out: Hidden | None = None) -> Hidden:
        out, adapted = like(rows) if out is None else out, self._adapter(tensor_of(rows), tensor_of(carried))
        tensor_of(out).copy_(adapted.reshape(out.shape))
        return out


class CpuAdapter:
    """Runs an exit's adapter in C++.

    A call takes rows (..., D) and their carried states (..., D), and returns the adapter's output (..., D).

    Args:
        adapter: an `ExitAdapter` or a `CarryAdapter`. Its weights are copied.
        eight_bits: round the weights to 8 bits. This changes the results slightly.
    """

    @staticmethod
    def knows(adapter: nn.Module) -> bool:
        """Return True if the C++ kernels support this type of adapter."""
        return type(adapter) in (ExitAdapter, CarryAdapter)

    def __init__(self, adapter: nn.Module, *, eight_bits: bool = False):
        gate, down, up = adapter.gate.weight, adapter.down.weight, adapter.up.weight
        linear = adapter.linear and adapter.linear.weight
        self.carries = linear is not None
        if eight_bits and up.shape[1] % 2 == 0:
            self._store, *parts, scale = _rounded_adapter(gate, down, up, linear)
        else:
            self._store, scale = Store([gate, down, up, *([linear] if self.carries else [])]), None
            matrix = self._store.matrix
            parts = matrix(linear) if self.carries else Matrix(), matrix(gate, down), matrix(up)
        self.structure = Adapter(*parts, self._store.floats(adapter.norm.weight), adapter.norm.eps,
                                 self._store.floats(scale))

    def __call__(self, rows: Hidden, carried: Hidden, out: Hidden | None = None) -> Hidden:
        rows, carried = in_bf16(rows), in_bf16(carried) if self.carries else None
        out = like(rows) if out is None else out
        build.library().ce_exit(byref(self.structure), rows.data_ptr(), carried.data_ptr() if self.carries else None,
                                out.data_ptr(), prod(rows.shape[:-1]), torch.get_num_threads())
        return out


def _rounded_adapter(gate: Tensor, down: Tensor, up: Tensor, linear: Tensor | None):
    """Round an adapter's weights to 8 bits for C++.

    Returns the `Store` of the weights, the three matrices of `Adapter` (`linear`, `gate_down`, `up`) and the scale of
    the inputs (I,).

    An input with large values has small weights, which rounding would lose. So each column of weights is divided by a
    power of 2 near its magnitude before it is rounded. This power of 2 is the scale of the column's input: C++
    multiplies the input by it. The inputs of `up` come from `down`, so here the rows of `down` are multiplied instead.
    """
    gate, down, up = gate.detach().float(), down.detach().float(), up.detach().float()
    whole = [] if linear is None else [linear.detach().float()]
    scale, inner = column_scale(torch.cat([*whole, gate, down])), column_scale(up)
    first = [rounded(weight / scale) for weight in (*whole, gate, down * inner[:, None])]
    (gates, gate_scale), (downs, down_scale) = first[-2:]
    both = torch.stack([gates, downs], 1).flatten(0, 1)                         # interleaved block by block
    size = build.library().ce_block()
    both_scale = torch.stack([gate_scale.view(-1, size), down_scale.view(-1, size)], 1).flatten()
    ups, up_scale = rounded(up / inner)
    store = Store([*(packed for packed, _ in first[:-2]), both, ups])
    matrix = store.matrix_in_8_bits
    straight = matrix(*first[0], len(whole[0])) if whole else Matrix()
    return store, straight, matrix(both, both_scale, len(both_scale)), matrix(ups, up_scale, len(up)), scale


class CpuDrafter:
    """Function object that drafts next tokens. One C++ call runs embedding, adapter and head.

    Args:
        embedding: the head whose weight rows are the embeddings of all tokens (V, D).
        adapter: the drafter's adapter; without a drafter, the adapter of the exit before the first layer.
        head: the vocabulary head for the tokens that may be drafted.
        ids: ids[k] is the token id of logit number k of `head`; None if logit k belongs to token id k.
    """

    def __init__(self, embedding: CpuHead, adapter: CpuAdapter, head: CpuHead, ids: Sequence[int] | None):
        self._embedding, self._adapter, self._head, self._ids = embedding, adapter, head, ids
        self._structures = byref(embedding.matrix), byref(adapter.structure), byref(head.matrix)

    def __call__(self, tokens: Sequence[int], carried: Sequence[Hidden], k: int, temperature: float,
                 context: ctypes.Array | None = None) -> list[tuple[States, list[float], list[int]]]:
        """Draft the k likeliest next tokens after each token; see `ExitRuntime.drafts`.

        carried: as in `ExitRuntime.drafts`, but always in bf16.
        """
        n, k, d = len(tokens), min(k, self._head.words), self._embedding.shape[1]
        states = (c_void_p * n)(*(state.data_ptr() for state in carried)) if self._adapter.carries else None
        hidden, numbers, probs = States((n, d)), (c_int32 * (n * k))(), (c_float * (n * k))()
        build.library().ce_draft(*self._structures, (c_int64 * n)(*tokens), states, context, hidden.data_ptr(),
                                 temperature, k, numbers, probs, n, torch.get_num_threads())
        ids = numbers[:] if self._ids is None else [self._ids[number] for number in numbers]
        return [(hidden.part(i, (1, d)), probs[i * k:i * k + k], ids[i * k:i * k + k]) for i in range(n)]


class CpuContext:
    """Computes the drafter's context in C++; see `ExitRuntime.context`.

    weight: weight (D, E D) of the linear layer that computes the context. It is copied and rounded to 8 bits.
    """

    def __init__(self, weight: Tensor):
        weight = weight.detach().float()
        scale = column_scale(weight)
        whole, factors = rounded(weight / scale)
        self._store = Store([whole])
        self._matrix = self._store.matrix_in_8_bits(whole, factors, len(weight))
        self._scale = self._store.floats(scale)

    def __call__(self, states: Sequence[Hidden], row: int) -> ctypes.Array:
        """Compute the context from one token's hidden states at E exits. Returns an array of D numbers in fp32.

        Args:
            states: hidden states at each of these exits, (1, N, D) each, in bf16.
            row: number of the token's row in each of these states.
        """
        n, d = len(states), self._matrix.outputs
        out = (c_float * d)()
        build.library().ce_gathered(byref(self._matrix), self._scale,
                                    (c_void_p * n)(*(state.data_ptr() + 2 * row * d for state in states)), n, out,
                                    torch.get_num_threads())
        return out


class CpuConfidence:
    """Runs a `SketchConfidence` estimator and the vocabulary head that it reads, in one C++ call.

    Args:
        head: the vocabulary head for the frequent tokens whose probabilities the estimator reads.
        alone: the estimator's network (linear, SiLU, linear) for tokens at which the previous exit did not run. This
            network has 5 inputs.
        after: the network for tokens at which the previous exit ran. It has 12 inputs, which describe both exits.
    """

    def __init__(self, head: CpuHead, alone: nn.Sequential, after: nn.Sequential):
        self._head, self._kept = head, []
        self._alone, self._after = self._estimator(alone), self._estimator(after)

    def _estimator(self, network: nn.Sequential) -> Estimator:
        inner, _, outer = network
        kept = [t.detach().float().contiguous() for t in (inner.weight, inner.bias, outer.weight)]
        self._kept += kept
        return Estimator(*(t.data_ptr() for t in kept), float(outer.bias), inner.in_features, inner.out_features)

    def __call__(self, rows: Hidden, copied: Sequence[tuple[int, float]], before: Hidden | None = None) -> list[float]:
        """Compute the confidences of an exit from outputs of its adapter. Returns N numbers in [0, 1].

        Args:
            rows: outputs of the exit's adapter (N, D).
            copied: result of `read_copies`, one pair for each row.
            before: adapter outputs of the previous exit (N, D); None if that exit did not run.
        """
        rows, before, n = in_bf16(rows), None if before is None else in_bf16(before), len(copied)
        chances = (c_float * n)()
        build.library().ce_confidence(byref(self._head.matrix), byref(self._alone if before is None else self._after),
                                      rows.data_ptr(), (c_float * (2 * n))(*chain.from_iterable(copied)),
                                      None if before is None else before.data_ptr(), chances, n,
                                      torch.get_num_threads())
        return chances[:]
