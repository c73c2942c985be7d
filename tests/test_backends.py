"""Interface of backends: one of a few lines serves engine, drafting and inspection. Choice of a backend."""

import pytest
import torch

from cascadeexit import backends
from cascadeexit.backends.cpu import CpuBackend
from cascadeexit.backends.torch import TorchBackend
from cascadeexit.backends.torch.layers import TorchLayers
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ADAPTERS, CarryAdapter, ExitBank
from cascadeexit.inspection import inspect
from cascadeexit.model import SegmentedModel
from tests.tiny_models import tiny_base, tiny_engine

PROMPT = [11, 3, 60, 22, 9, 41, 77, 30, 2]
CONFIGS = [DecodeConfig(max_new_tokens=30, **options) for options in (
    dict(mode="full"), dict(mode="full", temperature=0.8), dict(mode="cascade", thresholds=0.5),
    dict(mode="verified", thresholds=0.3, max_draft=3), dict(mode="verified"), dict(mode="verified", tolerance=0.5))]


class RowByRow(TorchLayers):
    """Layers that take one row at a time, so that rows are independent as they come."""

    def __init__(self, base, bounds):
        super().__init__(base, bounds)
        self.row_multiple, self.max_rows, self.passes = 1, 16, 0

    def run(self, segments, rows, cache, parents=None):
        self.passes += rows.shape[1]
        each = [super(RowByRow, self).run(segments, rows[:, i:i + 1], cache, parents) for i in range(rows.shape[1])]
        return [self.join(after) for after in zip(*each)]


class ToyBackend(TorchBackend):
    name = "toy"
    layers_type = RowByRow


@pytest.mark.parametrize("shape", [{}, dict(adapter="carry", confidence="sketch", sketch_size=40, layers=(0, 2, 4),
                                            drafter_width=8)], ids=["published", "ours"])
def test_another_backend_needs_nothing_outside_of_itself(shape):
    reference = tiny_engine(**shape)
    bank = ExitBank(reference.bank.config)
    bank.load_state_dict(reference.bank.state_dict())
    engine = Engine(SegmentedModel(tiny_base(), reference.model.exit_layers, backend=ToyBackend), bank)
    assert engine.model.backend.name == "toy"
    engine.read_opening(PROMPT[:4])
    assert engine.opening == PROMPT[:4], "its rows are independent"
    for config in CONFIGS:
        before, expected = engine.model.layers.passes, reference.run(PROMPT, config)
        run = engine.run(PROMPT, config)
        assert run.token_ids == expected.token_ids and engine.model.layers.passes > before
        seen, wanted = (inspect(e, PROMPT, run.events) for e in (engine, reference))
        assert seen.full_choices == wanted.full_choices == engine.full_choices(PROMPT, run.token_ids)
        torch.testing.assert_close(seen.confidences, wanted.confidences, atol=1e-4, rtol=1e-4)


class Bare(torch.nn.Module):
    """A kind of adapter of a few lines: the logit lens with a learned scale for each input."""

    reads_carried, linear = False, None

    def __init__(self, hidden_size: int, width: int, norm_eps: float):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(hidden_size))
        self.norm = torch.nn.RMSNorm(hidden_size, eps=norm_eps)

    def forward(self, h, carried):
        return self.norm(h * self.scale)


class Mine(CarryAdapter):
    """A kind that reads the carried state, as the shipped one does, under another name."""


@pytest.mark.parametrize("kind", [Bare, Mine])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("layers", [(2, 4), (0, 3)], ids=str)
def test_a_new_kind_of_adapter_runs_on_every_backend(monkeypatch, kind, backend, layers):
    if backend == "cpu" and not CpuBackend.fits(tiny_base("qwen3", dtype=torch.bfloat16)):
        pytest.skip("no C++ compiler here")
    monkeypatch.setitem(ADAPTERS, "own", kind)
    model = SegmentedModel(tiny_base("qwen3", dtype=torch.bfloat16), layers, backend=backend)
    engine = Engine(model, ExitBank.untrained(model, adapter="own", width=8))
    full = engine.run(PROMPT, DecodeConfig(mode="full", max_new_tokens=30)).token_ids
    for thresholds in (0.0, 0.3, None):
        config = DecodeConfig(mode="verified", thresholds=thresholds, max_new_tokens=30)
        assert engine.run(PROMPT, config).token_ids == full
    run = engine.run(PROMPT, DecodeConfig(mode="cascade", thresholds=0.0, max_new_tokens=30))
    assert {event.exit for event in run.events} == {0}


def test_a_backend_is_chosen_by_name_and_a_wrong_one_is_refused():
    assert SegmentedModel(tiny_base(), (3,)).backend.name == "torch"
    assert SegmentedModel(tiny_base(), (3,), backend="torch").backend.name == "torch"
    with pytest.raises(ValueError, match=f"backend must be one of {', '.join(backends.BACKENDS)}, got 'warp'"):
        SegmentedModel(tiny_base(), (3,), backend="warp")
    with pytest.raises(ValueError, match=r"'cpu' cannot run this model here \(torch.float32 on cpu\)"):
        SegmentedModel(tiny_base(), (3,), backend="cpu")
