"""Cutting a model at its exits changes nothing; what cannot be cut is refused with the reason."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    SmolLM3Config,
)

from cascadeexit import selfcheck
from cascadeexit.backends import why_not
from cascadeexit.backends.torch import attention
from cascadeexit.backends.torch.attention import additive_mask, attend
from cascadeexit.backends.torch.cache import TorchCache
from cascadeexit.backends.torch.layers import TorchLayers
from cascadeexit.backends.torch.linear import PackedLinear, can_pack, frozen_linear
from cascadeexit.backends.weights import bring_outer_weights
from cascadeexit.config import DecodeConfig
from cascadeexit.engine import Engine
from cascadeexit.exits import ExitBank
from cascadeexit.model import SegmentedModel, check_supported
from tests.tiny_models import EXIT_LAYERS, SHAPE, base_of, logits_of, through, tiny_base


def test_segments_in_turn_are_the_whole_model(family):
    base, model = tiny_base(family), SegmentedModel(tiny_base(family), EXIT_LAYERS)
    ids = [5, 9, 33, 2, 71, 8, 15]
    with torch.inference_mode():
        cache = model.layers.new_cache(16)
        ours = logits_of(model, through(model, cache, ids))
        torch.testing.assert_close(ours, base(torch.tensor([ids])).logits, atol=1e-4, rtol=1e-4)
    assert cache.lengths == [len(ids)] * model.num_layers


@pytest.mark.parametrize("kind", [MistralConfig, Qwen2Config])
def test_other_supported_families_decode_as_transformers_does(kind):
    torch.manual_seed(0)
    config = kind(**SHAPE, sliding_window=None) if kind is MistralConfig else kind(**SHAPE)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.inference_mode():
        expected = base(ids).logits
        model = SegmentedModel(base, (3,))
        ours = logits_of(model, through(model, model.layers.new_cache(16), ids))
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


TORCH_ONLY = {"phi3": Phi3Config(**SHAPE), "phi4": Phi3Config(**SHAPE, partial_rotary_factor=0.5),
              "olmo2": Olmo2Config(**SHAPE), "smollm3": SmolLM3Config(**SHAPE, no_rope_layer_interval=3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TORCH_ONLY)
def test_families_of_the_torch_backend_write_what_transformers_writes_in_every_mode(family, dtype):
    base, ids = base_of(TORCH_ONLY[family], dtype), [5, 9, 33, 2, 71, 8, 15]
    assert set(why_not(base)) == {"cpu", "gpu"}
    with torch.inference_mode():
        expected = base.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    model = SegmentedModel(base, (0, 3))
    engine = Engine(model, ExitBank.untrained(model))
    full = engine.run(ids, DecodeConfig(mode="full", max_new_tokens=40, ignore_eos=True)).token_ids
    if dtype is torch.float32:
        assert full == expected[0, len(ids):].tolist()
    assert engine.full_choices(ids, full) == full, "without and with the cache"
    for options in (dict(), dict(thresholds=0.0), dict(thresholds=0.3)):
        config = DecodeConfig(mode="verified", max_new_tokens=40, ignore_eos=True, **options)
        assert engine.run(ids, config).token_ids == full, options
    asked = engine.run(ids, DecodeConfig(thresholds=[None, 1.0], max_new_tokens=40, ignore_eos=True))
    middle = sorted(event.confidences[1] for event in asked.events)[20]
    cascade = engine.run(ids, DecodeConfig(thresholds=[None, middle], max_new_tokens=40, ignore_eos=True))
    choices = engine.full_choices(ids, cascade.token_ids)
    deep = [i for i, event in enumerate(cascade.events) if event.exit == 2]
    assert 0 < len(deep) < 40 and all(cascade.token_ids[i] == choices[i] for i in deep), "after tokens of exits"
    assert selfcheck.check(engine, None).passed


@pytest.mark.parametrize("config, reason", [
    (GPT2Config(), "gpt2.*llama"),
    (Gemma3TextConfig(**SHAPE, head_dim=8), "gemma3_text.*sliding-window attention.*angles.*phi3"),
    (Phi3Config(**SHAPE, sliding_window=128), "phi3 model uses sliding-window"),
    (Phi3Config(**SHAPE | dict(max_position_embeddings=4096), rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 1024}), "longrope"),
    (SmolLM3Config(**SHAPE, use_sliding_window=True, sliding_window=64), "smollm3 model uses sliding-window"),
    (MistralConfig(**SHAPE, sliding_window=128), "sliding-window"),
    (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=64, max_window_layers=2), "sliding-window"),
    (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
], ids=["gpt2", "gemma3", "phi3", "phi3-long", "smollm3", "mistral", "qwen2", "dynamic-rope"])
def test_unsupported_architectures_name_the_reason(config, reason):
    with pytest.raises(ValueError, match=reason):
        check_supported(config)


OUTER = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


def spread_map(outer: str = "cpu") -> dict[str, str]:
    """A device map with every other layer on the disk, and the weights around the layers at `outer`."""
    layers = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(SHAPE["num_hidden_layers"])}
    return dict.fromkeys(OUTER, outer) | layers | {"model.rotary_emb": "cpu"}


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("outer", ["cpu", "disk"])
def test_a_model_spread_over_memory_and_disk_is_the_same_model(tmp_path, family, outer):
    tiny_base(family).save_pretrained(tmp_path)
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=spread_map(outer),
                                                  offload_folder=tmp_path / "disk")
    assert spread.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    bring_outer_weights(spread)
    ids, rows = [5, 9, 33, 2, 71, 8, 15], []
    for base in (tiny_base(family), spread):
        model = SegmentedModel(base, EXIT_LAYERS)
        with torch.inference_mode():
            rows.append(logits_of(model, through(model, model.layers.new_cache(16), ids)))
    torch.testing.assert_close(*rows, atol=1e-4, rtol=1e-4)


class TwoDevices:
    """Layers on the CPU and on the `meta` device: their places are real, the numbers of the second are not."""

    def __init__(self):
        self.base = tiny_base()
        self.base.model.layers[3:].to("meta")
        self.base.hf_device_map = {"model.layers.0": "cpu", "model.layers.3": "meta"}
        self.layers = TorchLayers(self.base, (0, 2, 6))


def test_each_layers_cache_lies_where_the_layer_runs():
    layers = TwoDevices().layers
    cache = layers.new_cache(16)
    for buffers in (cache.keys, cache.values):
        assert [buffer.device.type for buffer in buffers] == ["cpu"] * 3 + ["meta"] * 3
    assert cache.nbytes == 2 * 6 * 2 * 8 * 16 * 4, "keys and values, layers, heads, head size, slots, bytes"


def test_no_cache_moves_between_devices():
    """Between the devices go rows, masks and angles only, once for each change of device."""
    layers, moved = TwoDevices().layers, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and args[0].device != out.device:
                moved.append(tuple(args[0].shape))
            return out

    cache = layers.new_cache(64)
    rows = layers.embed([5, 9, 33, 2])
    with torch.no_grad(), Watch(), pytest.raises(NotImplementedError):          # meta tensors cannot come back
        layers.run(range(2), rows, cache)
    buffer = tuple(cache.keys[0].shape)
    assert (1, 4, 32) in moved and buffer not in moved and len(moved) <= 6, moved
    assert cache.lengths[:2] == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_callers_model_stays_as_it_is(family, dtype):
    """Weights, modules and config: it answers as before, also after its attention was changed by its owner."""
    base, ids = tiny_base(family, dtype=dtype), torch.tensor([[5, 9, 33, 2]])
    with torch.inference_mode():
        before, modules = base(ids).logits, [type(module) for module in base.modules()]
        SegmentedModel(base, EXIT_LAYERS)
        assert [type(module) for module in base.modules()] == modules
        assert base.config._attn_implementation == "sdpa" and torch.equal(base(ids).logits, before)


@pytest.mark.parametrize("layers", [(-1, 3), (0, 0), (3, 3), (4, 2), (3, 6)])
def test_exit_layers_must_ascend_inside_the_model(layers):
    with pytest.raises(ValueError, match="ascend"):
        SegmentedModel(tiny_base(), layers)


def test_fingerprint_does_not_depend_on_the_loaded_dtype():
    bf16 = tiny_base(dtype=torch.bfloat16)
    fp32 = tiny_base(dtype=torch.bfloat16).float()
    other = tiny_base(seed=1)
    prints = [SegmentedModel(base, EXIT_LAYERS).head_fingerprint for base in (bf16, fp32, other)]
    assert prints[0] == prints[1] != prints[2]


SDPA_KERNELS = {        # of CUDA; on meta tensors each answers with the shape and strides of its real output
    "efficient": lambda q, k, v, mask: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0],
    "cudnn": lambda q, k, v, mask: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, mask, False)[0],
    "flash": lambda q, k, v, mask: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0],
}


@pytest.mark.parametrize("kernel", SDPA_KERNELS)
@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("rows", [1, 16])
def test_attention_accepts_the_output_layout_of_every_cuda_kernel(kernel, heads, kv_heads, rows, monkeypatch):
    """Without a GPU: a `view` of a transposed output raises on meta tensors as it does on CUDA."""
    calls = []

    def fused(query, key, value, attn_mask, scale):
        calls.append(query.shape)
        return SDPA_KERNELS[kernel](query, key, value, attn_mask.expand(query.shape[0], query.shape[1], -1, -1))

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", fused)
    query = torch.empty(2, heads, rows, 64, dtype=torch.bfloat16, device="meta")
    key, value = (torch.empty(2, kv_heads, 128, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    seen = torch.empty(2, 1, rows, 128, dtype=torch.bool, device="meta")
    out = attend(query, key, value, additive_mask(seen, heads // kv_heads, torch.bfloat16), 0.125)
    assert out.shape == query.shape and calls == [(2, kv_heads, heads // kv_heads * rows, 64)]
    assert out.transpose(1, 2).reshape(2, rows, -1).shape == (2, rows, heads * 64)      # as transformers goes on


# -- the cache -------------------------------------------------------------------------------------------------------


def test_truncate_is_subtraction_and_advance_makes_rows_real():
    cache = TorchCache(2, 1, 4, capacity=8)
    rows = torch.randn(1, 1, 4, 4)
    cache.write_at(cache.positions(0, 4)[0])
    keys, _ = cache.update(rows, rows, 0)
    assert cache.lengths == [0, 0] and torch.equal(keys[:, :, :4], rows)
    cache.advance(range(2), 3)
    cache.truncate(2)
    assert cache.lengths == [2, 2]
    assert cache.positions(0, 2).tolist() == [[2, 3]]
    assert cache.mask(cache.positions(0, 2)).int().tolist() == [[[[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]]]


def test_a_full_cache_says_how_much_it_holds():
    cache = TorchCache(1, 1, 4, capacity=4)
    cache.advance(range(1), 3)
    with pytest.raises(ValueError, match="holds 4 positions, 3 are used and 2 more"):
        cache.positions(0, 2)


# -- packed weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_packed_linear_is_the_linear_it_replaces(dtype, tolerance):
    linear = torch.nn.Linear(48, 96, dtype=dtype)
    if not can_pack(linear.weight):
        pytest.skip(f"no packed kernels for {dtype} on this CPU")
    packed, x = frozen_linear(linear.weight, linear.bias), torch.randn(1, 4, 48, dtype=dtype)
    assert isinstance(packed, PackedLinear)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), linear(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_rows_agree_bitwise_across_row_buckets(dtype):
    weight = torch.randn(1536, 576, dtype=dtype)
    if not can_pack(weight):
        pytest.skip(f"no packed kernels for {dtype} on this CPU")
    packed, x = PackedLinear(weight), torch.randn(32, 576, dtype=dtype)
    with torch.inference_mode():
        reference = packed(x[:4])
        for rows in range(8, 33, 4):
            assert torch.equal(packed(x[:rows])[:4], reference), rows
