"""Simulation: count on a CPU what the `gpu` backend would do on a GPU, and estimate the time per token.

The engine runs `training.replay` with tensors on the `meta` device, which have a shape but no numbers. Drafts, passes,
catch-up (passes through layers that exits skipped) and exits follow the same scripts as on a GPU, so every kernel
launch is known. The estimated time of a token is

    bytes / bandwidth + kernels x time of a kernel + replays x time of a replay

Here a replay is one start of a recorded CUDA graph, with the wait for its result. The times and bandwidths in `ASSUMED`
are assumptions, not measurements. The result contains them. The simulation needs the package `triton`, but no GPU.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cascadeexit.backends.base import Choice
from cascadeexit.backends.gpu import GpuBackend, fits_shape
from training import replay

# Bandwidths are nine tenths of the data sheets'. The cost of a kernel follows from published times of models of 1B
# parameters in a CUDA graph; that of a replay is a guess: a launch, an answer, and Python between two answers.
ASSUMED = {"bandwidth": {"H100": 0.9 * 3.35e12, "H200": 0.9 * 4.8e12}, "kernel_seconds": 2e-6,
           "replay_seconds": 60e-6}
_TILES = {"qkv_heads": 0, "attend": 2, "combine": 0, "linear": 0, "gated": 0}   # index of the tiles in a kernel's grid
_MOST_PASSES = 4                # passes of one catch-up, from `_CATCH_UP_ROWS` of the backend
_NO_KERNEL = ("empty", "new_empty")             # PyTorch operations that only allocate


@dataclass
class Count:
    """Counts the work of one run: weight and KV cache bytes that kernels read, kernels, and starts of CUDA graphs.

    Attributes:
        weights: identifiers of the memory of all weights, from the function `storage`. Only the bytes of these weights,
            and of keys and values, are counted.
        context_bytes: bytes of keys and values that the attention of one layer reads, as a mean over the run.
        bytes: bytes read so far.
        kernels: kernels started so far.
        replays: recorded CUDA graphs started so far.
    """

    weights: set[int] = field(default_factory=set)
    context_bytes: float = 0.0
    bytes: float = 0.0
    kernels: int = 0
    replays: int = 0

    def launched(self, name: str, grid, args: Sequence, options) -> None:
        """Count one launch of a Triton kernel and the bytes that it reads.

        A launch on 2 to 4 tiles of rows counts as one launch per tile. Such launches belong to catch-up, and a GPU
        would run a separate pass for each tile.

        Args:
            name: name of the kernel.
            grid: number of programs in each dimension.
            args: arguments of the kernel.
        """
        tiles = grid[_TILES[name]] if name in _TILES else 1
        passes = tiles if tiles <= _MOST_PASSES else 1
        weights = {id(arg): arg for arg in args if isinstance(arg, torch.Tensor) and storage(arg) in self.weights}
        self.kernels += passes
        self.bytes += passes * (self.context_bytes * (name == "attend")
                                + sum(weight.nbytes for weight in weights.values()))


def storage(tensor: torch.Tensor) -> int:
    """Return a number that identifies the memory of a tensor. A tensor and its views have the same number."""
    return tensor.untyped_storage()._cdata


class _Operations(TorchDispatchMode):
    """Counts each PyTorch operation on `meta` tensors as one kernel. Views and allocations do not count."""

    def __init__(self, count: Count):
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        views = any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, torch.Tensor) and first.is_meta and not views:
            self._count.kernels += not function._schema.name.partition("::")[2].startswith(_NO_KERNEL)
        return out


def simulated(count: Count) -> type[GpuBackend]:
    """Make a variant of the `gpu` backend that runs without a GPU and without numbers.

    It counts one replay (start of a recorded CUDA graph) at each point where the real backend would wait for the GPU.

    Args:
        count: where replays are counted. Its `weights` get the weights of the model.

    Returns a subclass of `GpuBackend`.
    """
    from cascadeexit.backends.gpu.exits import GpuExits
    from cascadeexit.backends.gpu.heads import GpuHead

    class Head(GpuHead):
        def choices(self, rows) -> list[Choice]:
            logits, _ = self.launch(self._ready(rows))
            count.replays += 1
            return [Choice(0, float)] * len(logits)

    class Exits(GpuExits):
        def __init__(self, bank, backend):
            words, sketch = bank.config.head_size, bank.config.sketch_size
            bank.head_ids, bank.sketch_ids = torch.arange(words), torch.arange(sketch)         # numbers are read here
            super().__init__(bank, backend)
            bank.to("meta")

        def confidence(self, s, hidden, copied, before=None) -> list[float]:
            copies = torch.empty(len(hidden), 2, device="meta")
            self._chance(s, hidden, copies, before)
            self._heads[s].launch(hidden)               # the recording of an exit includes its choice
            count.replays += 1
            return [0.0] * len(hidden)

        def choice(self, s, hidden) -> int:
            return 0

        def drafts(self, tokens, carried, k, temperature, context=None):
            ids = torch.empty(len(tokens), dtype=torch.int64, device="meta")
            hidden, _ = self._drafted(ids, torch.cat(list(carried)), context, temperature, k, self._counts(len(tokens)))
            count.replays += 1
            return [(state, [0.0] * k, [0] * k) for state in hidden[:, None]]

    class Simulated(GpuBackend):
        fits = staticmethod(fits_shape)

        def __init__(self, base, bounds):
            super().__init__(base, bounds)
            self.head.__class__ = Head
            count.weights |= {storage(weight) for weight in base.parameters()}

        def vocab_head(self, weight, *, rounded=False):
            count.weights.add(storage(weight))
            return super().vocab_head(weight, rounded=rounded)

        def exits(self, bank):
            count.weights |= {storage(weight) for weight in bank.parameters()}
            return Exits(bank, self)

    return Simulated


@contextmanager
def counting(count: Count) -> Iterator[None]:
    """Context manager: inside the `with` block, add kernel launches and operations on `meta` tensors to `count`."""
    from cascadeexit.backends.gpu import launches

    launches._listeners.append(count.launched)
    try:
        with _Operations(count):
            yield
    finally:
        launches._listeners.remove(count.launched)


def simulate(shape: str, tokens: int) -> dict:
    """Count bytes, kernels and replays per token for each run in `replay.jobs_of`, and estimate the time per token.

    Args:
        shape: name of the model's shape in `replay.SHAPES`.
        tokens: new tokens per run.

    A replay is one start of a recorded CUDA graph.

    Returns {"shape": ..., "tokens": ..., "assumed": `ASSUMED`, "rows": {name of the run: row}}. A row has `bytes`,
    `kernels` and `replays` per token, and `expected_ms`: {GPU: estimated milliseconds per token}.

    Raises ValueError if Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--simulate needs the package triton: pip install triton")
    count = Count()
    engine = replay.make_engine(shape, torch.device("meta"), simulated(count))
    shapes, _ = replay.SHAPES[shape]
    per_position = engine.model.layers.new_cache(1)
    per_layer = per_position.nbytes / per_position.capacity / shapes["num_hidden_layers"]
    rows = {}
    for name, job in replay.jobs_of(engine).items():
        with_prompt, prompt = (_counted(engine, count, job, n, per_layer) for n in (tokens + 1, 1))
        each = {what: (with_prompt[what] - prompt[what]) / tokens for what in ("bytes", "kernels", "replays")}
        rows[name] = each | {"expected_ms": {gpu: 1e3 * expected_seconds(each, bandwidth)
                                             for gpu, bandwidth in ASSUMED["bandwidth"].items()}}
    return {"shape": shape, "tokens": tokens, "assumed": ASSUMED, "rows": rows}


def _counted(engine, count: Count, job: tuple[float, dict], tokens: int, per_layer: float) -> dict:
    """Run one job of `replay.jobs_of`, and return the work of the whole run, prefill of the prompt included.

    Args:
        per_layer: bytes of keys and values of one position in one layer.
    """
    count.bytes, count.kernels, count.replays = 0.0, 0, 0
    count.context_bytes = per_layer * (len(replay.PROMPT) + tokens / 2)
    with counting(count):
        replay.replayed(engine, job, tokens, 0)
    return {"bytes": count.bytes, "kernels": count.kernels, "replays": count.replays}


def expected_seconds(row: dict, bandwidth: float) -> float:
    """Estimate the seconds per token: bytes / bandwidth + kernels x time of a kernel + replays x time of a replay.

    The two times are the assumptions in `ASSUMED`. A replay is one start of a recorded CUDA graph.

    Args:
        row: {"bytes": bytes read, "kernels": kernels started, "replays": graphs started}, each per token.
        bandwidth: memory bandwidth in bytes per second.
    """
    return (row["bytes"] / bandwidth + row["kernels"] * ASSUMED["kernel_seconds"]
            + row["replays"] * ASSUMED["replay_seconds"])


def table(result: dict) -> str:
    """Format the result of `simulate` as a text table, with its assumptions."""
    gpus = result["assumed"]["bandwidth"]
    lines = [f"{result['shape']}, random weights, bf16, simulated: {result['tokens']} tokens. Assumed: "
             + ", ".join(f"{gpu} {bandwidth / 1e9:,.0f} GB/s" for gpu, bandwidth in gpus.items())
             + f"; {1e6 * result['assumed']['kernel_seconds']:g} us a kernel, "
             f"{1e6 * result['assumed']['replay_seconds']:g} us a replay", "",
             f"{'a token':<26}{'MB':>8}{'kernels':>9}{'replays':>9}" + "".join(f"{'ms, ' + gpu:>10}" for gpu in gpus)]
    lines += [f"{name:<26}{row['bytes'] / 1e6:>8.0f}{row['kernels']:>9.0f}{row['replays']:>9.2f}"
              + "".join(f"{ms:>10.2f}" for ms in row["expected_ms"].values()) for name, row in result["rows"].items()]
    return "\n".join(lines)
