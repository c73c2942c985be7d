"""Self-check at load: correct backends pass, wrong ones are found, and `torch` takes over with the reason."""

import gc
import weakref

import pytest
import torch

from cascadeexit import backends, hub, selfcheck
from cascadeexit.backends.torch import TorchBackend
from cascadeexit.backends.torch.layers import TorchLayers
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.library import Library, Offer
from cascadeexit.model import SegmentedModel
from cascadeexit.page import Page
from cascadeexit.runner import Runner
from cascadeexit.settings import Settings
from cascadeexit.wire import expand
from tests.tiny_models import EXIT_LAYERS, tiny_base
from tests.tiny_text import tiny_tokenizer


class Wrong(TorchLayers):
    """Layers that compute wrongly, as `fault` says."""

    fault = ""

    def run(self, segments, rows, cache, parents=None):
        if self.fault == "crash":
            raise RuntimeError("no kernel image is available")
        out = super().run(segments, rows, cache, parents)
        if self.fault == "nan":
            out[-1] = out[-1] * torch.nan
        if self.fault == "scale":                           # of what the last segment adds
            before = out[-2] if len(out) > 1 else rows
            out[-1] = before + (out[-1] - before) * 1.1
        if self.fault == "neighbours" and rows.shape[1] > 1:        # a row depends on the rows beside it
            out[-1] = out[-1] - out[-1].roll(1, dims=1)
        return out

    def embed(self, ids):
        rows = super().embed(ids)
        return rows.roll(1, dims=-1) if self.fault == "embedding" else rows

    def norm(self, rows):
        return super().norm(rows) * (1.1 if self.fault == "norm" else 1.0)


class ToyBackend(TorchBackend):
    name, layers_type = "toy", Wrong


def engine_of(backend, dtype=torch.float32):
    base = tiny_base(dtype=dtype)
    model = SegmentedModel(base, EXIT_LAYERS, backend=backend)
    return Engine(model, ExitBank.untrained(model)), backends.reference(base, model.bounds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_correct_backend_passes(family, dtype):
    base = tiny_base(family, dtype=dtype)
    model = SegmentedModel(base, EXIT_LAYERS)
    result = selfcheck.check(Engine(model, ExitBank.untrained(model)), backends.reference(base, model.bounds))
    assert result.passed and result.error < 1 and result.layers >= 2 and result.tokens >= selfcheck.LEAST_TOKENS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fault, problem", [
    ("crash", "RuntimeError: no kernel image"), ("nan", "differed"), ("scale", "layers 6 to 6 differed"),
    ("neighbours", "differed"), ("embedding", "the embedding differed"), ("norm", "the vocabulary projection diff")])
def test_a_wrong_backend_is_found(monkeypatch, fault, problem, dtype):
    monkeypatch.setattr(Wrong, "fault", fault)
    monkeypatch.setattr(selfcheck, "SECONDS", 60)
    engine, reference = engine_of(ToyBackend, dtype)
    result = selfcheck.check(engine, reference)
    assert not result.passed and problem in result.problem, result


def test_texts_that_differ_are_found(monkeypatch):
    engine, _ = engine_of("torch")
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda prompt, config: generate(
        prompt if config.mode == "full" else prompt[::-1], config))
    assert "verified" in selfcheck.check(engine, None).problem


def test_a_large_model_is_checked_in_part(monkeypatch):
    monkeypatch.setattr(selfcheck, "SECONDS", 0)
    engine, reference = engine_of(ToyBackend)
    result = selfcheck.check(engine, reference)
    assert result.passed and result.layers == EXIT_LAYERS[0] and result.tokens == selfcheck.LEAST_TOKENS


def test_the_reference_copies_no_weights_and_leaves_the_model_as_it_is():
    base = tiny_base()
    modules = [type(module) for module in base.modules()]
    reference = backends.reference(base, (0, 3, 6))
    ours = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in reference.layers._decoder.parameters()} <= ours
    assert reference.head.weight.data_ptr() in ours and [type(module) for module in base.modules()] == modules


@pytest.fixture
def folder(tmp_path):
    tiny_base().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def wrong(monkeypatch):
    """The backend that is chosen first computes wrongly."""
    monkeypatch.setattr(Wrong, "fault", "norm")
    monkeypatch.setattr(backends, "BACKENDS", {"toy": ToyBackend, "torch": TorchBackend})


def test_loading_falls_back_to_torch_and_says_why(folder, wrong, caplog):
    lines = []
    engine, _ = hub.load(str(folder), dtype="float32", device="cpu", progress=lines.append)
    assert engine.model.backend.name == "torch" and engine.self_check.backend == "toy"
    assert engine.notice.startswith("The model runs on the slower torch backend because the toy backend failed")
    assert engine.notice in lines and engine.notice in caplog.text
    full = engine.run([5, 6, 7], DecodeConfig(mode="full", max_new_tokens=12)).token_ids
    assert engine.run([5, 6, 7], DecodeConfig(mode="verified", max_new_tokens=12)).token_ids == full


def test_a_wrong_backend_is_freed_before_torch_takes_over(folder, wrong, monkeypatch):
    alive, made = [], []
    build = hub.SegmentedModel

    def watched(*args, **kwargs):
        alive.append([ref() is not None for ref in made])
        model = build(*args, **kwargs)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(hub, "SegmentedModel", watched)
    hub.load(str(folder), dtype="float32", device="cpu")
    assert alive == [[], [False]]


def test_the_transformers_model_is_released_after_the_check(folder, monkeypatch):
    bases, load_model = [], hub.load_model

    def watched(*args, **kwargs):
        base, *others = load_model(*args, **kwargs)
        bases.append(weakref.ref(base))
        return base, *others

    monkeypatch.setattr(hub, "load_model", watched)
    engine, _ = hub.load(str(folder), dtype="bfloat16", device="cpu")
    gc.collect()
    assert engine.self_check.passed and bases[0]() is None


def test_the_check_can_be_switched_off(folder, wrong):
    engine, _ = hub.load(str(folder), dtype="float32", device="cpu", self_check=False)
    assert engine.model.backend.name == "toy" and engine.self_check is None and not engine.notice


def test_loading_checks_by_default_and_is_silent_where_all_is_well(folder, caplog):
    engine, _ = hub.load(str(folder), dtype="float32", device="cpu")
    assert engine.self_check.passed and not engine.notice and "self-check" not in caplog.text


def test_the_page_tells_a_visitor_why_the_model_is_slow(folder, wrong):
    page = Page(Runner(Library([Offer("tiny", str(folder))], device="cpu", dtype=torch.float32)))
    settings = Settings(model="tiny", prompt="hi", max_new_tokens=4, chat=False, thresholds=(0.5,) * 3)
    frames = list(page.respond(settings))
    records = [expand(line) for frame in frames for line in (frame.stream or "").splitlines()]
    statuses = [record["message"] for record in records if record["type"] == "status"]
    notice = page.library.get("tiny")[0].notice
    assert statuses.count(notice) >= 2 and [f.notice.message for f in frames if f.notice] == [notice]
    assert expand(frames[-1].stream.splitlines()[-1])["message"] == notice, "it stays on the status line"
    assert any(record["type"] == "end" for record in records), "the run has finished"
