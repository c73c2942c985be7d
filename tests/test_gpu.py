"""Equality of modes on CUDA: one row bucket for decoding and verification makes it bitwise there, too."""

import pytest
import torch

from cascadeexit import hub
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.inspection import inspect
from cascadeexit.model import SegmentedModel
from cascadeexit.prompts import bundled_prompts, token_ids
from tests.tiny_models import logits_of, through, tiny_base, tiny_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROMPT = [11, 3, 60, 22, 9, 41, 77, 30, 2]


OURS = dict(layers=(0, 3), adapter="carry", confidence="sketch", sketch_size=40)        # what ships, tiny


def on_gpu(family: str, dtype: torch.dtype, **shape) -> Engine:
    tiny = tiny_engine(family, dtype=dtype, **shape)
    model = SegmentedModel(tiny_base(family, dtype=dtype).cuda(), tiny.model.exit_layers)
    bank = ExitBank(tiny.bank.config)
    bank.load_state_dict(tiny.bank.state_dict())
    return Engine(model, bank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_verified_equals_full_on_tiny_models(family, dtype):
    engine = on_gpu(family, dtype)
    full = engine.run(PROMPT, DecodeConfig(mode="full", max_new_tokens=60)).token_ids
    for threshold in (0, 0.3, 0.6, 0.9):
        for max_draft in (1, 3, 7, 15):
            config = DecodeConfig(mode="verified", max_new_tokens=60, thresholds=threshold, max_draft=max_draft)
            assert engine.run(PROMPT, config).token_ids == full, (threshold, max_draft)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_verified_with_a_draft_tree_equals_full_on_tiny_models(family, dtype, temperature):
    engine, drafted = on_gpu(family, dtype, **OURS), 0
    for prompt in (PROMPT, [9, 3] * 12):
        settings = dict(max_new_tokens=60, temperature=temperature, seed=4)
        full = engine.run(prompt, DecodeConfig(mode="full", **settings))
        for max_draft in (1, 7, 15):
            run = engine.run(prompt, DecodeConfig(mode="verified", max_draft=max_draft, **settings))
            assert run.token_ids == full.token_ids, (prompt, max_draft)
            drafted += run.stats.drafted
        if not temperature:
            assert inspect(engine, prompt, full.events).full_choices == full.token_ids
    assert drafted


def test_confidences_equal_those_of_a_cpu(family):
    config = DecodeConfig(thresholds=0.5, max_new_tokens=24)
    theirs, ours = on_gpu(family, torch.float32, **OURS), tiny_engine(family, dtype=torch.float32, **OURS)
    for prompt in (PROMPT, [9, 3] * 12):
        a, b = (inspect(engine, prompt, ours.run(prompt, config).events).confidences for engine in (theirs, ours))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("config", [DecodeConfig(mode="full"), DecodeConfig(mode="cascade", thresholds=0.5),
                                    DecodeConfig(mode="cascade", thresholds=0.4, check_late=True),
                                    DecodeConfig(mode="verified", thresholds=0.4, max_draft=5),
                                    DecodeConfig(mode="verified")], ids=lambda c: f"{c.mode} {c.thresholds}")
@pytest.mark.parametrize("shape", [{}, OURS], ids=["published", "ours"])
@pytest.mark.parametrize("dtype, backend", [(torch.float32, "torch"), (torch.bfloat16, "gpu"), (torch.float16, "gpu")])
def test_recorded_kernels_give_the_results_of_single_kernels(family, config, shape, dtype, backend, monkeypatch):
    recorded = on_gpu(family, dtype, **shape)
    monkeypatch.setenv("CASCADEEXIT_GRAPHS", "0")
    plain = on_gpu(family, dtype, **shape)
    assert recorded.model.backend.name == plain.model.backend.name == backend
    if backend == "torch":
        assert recorded.model.layers.recorded_rows and not plain.model.layers.recorded_rows
    else:
        assert recorded.model.layers.passes.usable and plain.model.layers.passes is None
    for _ in range(2):
        ours, theirs = (engine.run(PROMPT, config) for engine in (recorded, plain))
        assert ours.token_ids == theirs.token_ids
        assert [event.checked for event in ours.events] == [event.checked for event in theirs.events]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.bundled
def test_verified_equals_full_on_the_bundled_model(dtype):
    engine, tokenizer = hub.load(hub.DEFAULT_MODEL, dtype=dtype, device="cuda")
    for prompt in [p.text for p in bundled_prompts()[:8]]:
        ids = token_ids(tokenizer, prompt)
        full = engine.run(ids, DecodeConfig(mode="full", max_new_tokens=128)).token_ids
        for threshold in (0, 0.3, 0.6, 0.9, None):
            config = DecodeConfig(mode="verified", max_new_tokens=128, thresholds=threshold, max_draft=7)
            assert engine.run(ids, config).token_ids == full, (prompt, threshold)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_layers_are_those_of_torch(family, dtype):
    """As near to the fp32 model with these weights as the `torch` backend is, whole and token by token, bitwise."""
    text, logits = [*PROMPT, *range(2, 70)], {}
    for name in ("gpu", "torch", "exact"):
        base = tiny_base(family, dtype=dtype).cuda()
        base, backend = base if name != "exact" else base.float(), "gpu" if name == "gpu" else "torch"
        model = SegmentedModel(base, (3,), backend=backend)
        with torch.inference_mode():
            logits[name] = logits_of(model, through(model, model.layers.new_cache(128), text))[0].float()
            if name == "gpu":
                cache = model.layers.new_cache(300)
                alone = torch.cat([logits_of(model, through(model, cache, [token]))[0] for token in text])
                assert torch.equal(alone, logits[name])
    ours, theirs = ((logits[name] - logits["exact"]).abs().mean() for name in ("gpu", "torch"))
    assert ours <= 1.2 * theirs
