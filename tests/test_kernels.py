"""CPU kernels: results equal those of transformers and torch, and a row does not depend on other rows."""

import ctypes
import os
from ctypes import byref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cascadeexit.backends.cpu import build
from cascadeexit.backends.cpu.exits import CpuAdapter, CpuConfidence
from cascadeexit.backends.cpu.heads import CpuHead
from cascadeexit.backends.cpu.packing import Store
from cascadeexit.backends.torch.heads import TorchHead
from cascadeexit.engine import Engine
from cascadeexit.exits import ADAPTERS, ExitBank, SketchConfidence
from cascadeexit.exits.confidence import softmax_facts
from cascadeexit.model import SegmentedModel
from tests.tiny_models import IDS, SHAPE, base_of, decoded, last_states, logits_of, states

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler here")
WIDE = SHAPE | dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=1280)
FAMILIES = {
    "llama": LlamaConfig(**WIDE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**WIDE, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**WIDE, attention_bias=True),
    "mistral": MistralConfig(**WIDE, sliding_window=None),
    "qwen2": Qwen2Config(**WIDE),
    "qwen3": Qwen3Config(**WIDE, head_dim=32),
}


@pytest.fixture(autouse=True)
def two_threads():
    """Teams of two, wherever the tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["", "avx512_bf16", "avx512f", "avx2"], ids=lambda gone: f"without {gone or 'nothing'}")
def processor(request, monkeypatch):
    """Kernels for this processor, and for older ones without AVX-512 BF16, AVX-512 or AVX2."""
    gone = {"avx512_bf16": ["-mno-avx512bf16"], "avx512f": ["-mno-avx512f"], "avx2": ["-mno-avx512f", "-mno-avx2"]}
    if request.param in gone:
        facts = Path("/proc/cpuinfo")
        if not facts.exists() or request.param not in facts.read_text():
            pytest.skip("this processor has none")
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *gone[request.param]))
        other = build.library.__wrapped__()           # past its cache
        monkeypatch.setattr(build, "library", lambda: other)


@pytest.fixture
def in_12_bits():
    """A store for weights in 12 bits, where this processor reads such."""
    if not build.library().ce_coded_bytes(16, 16):
        pytest.skip("weights are not kept in 12 bits on this processor")
    return Store([], in_12_bits=True)


def product(matrix, x: torch.Tensor) -> torch.Tensor:
    """x (N, I) bf16 -> (N, O) fp32."""
    out = torch.empty(len(x), matrix.outputs)
    build.library().ce_linear(byref(matrix), x.data_ptr(), out.data_ptr(), len(x), 2)
    return out


@pytest.mark.parametrize("shape", [(64, 256), (40, 600), (16, 4)])
@pytest.mark.parametrize("outliers", [0, 1, 100])
def test_weights_in_12_bits_are_those_of_16(in_12_bits, shape, outliers):
    """Each weight, also an outlier, is read alone: by an input that is 1 where the others are 0."""
    torch.manual_seed(outliers)
    weight = torch.randn(shape).bfloat16()
    values = torch.tensor([1e-38, -3e38, 2e-20, -0.0, 0.0, 1e-41, 7e9], dtype=torch.bfloat16)
    places = torch.randperm(weight.numel())[:outliers]
    weight.view(-1)[places] = values.repeat(20)[:outliers][:len(places)]
    matrix = in_12_bits.matrix(weight)
    assert matrix.outliers or outliers == 100
    ones = torch.eye(shape[1]).bfloat16()
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 100):
        alone = torch.cat([product(matrix, part.contiguous()) for part in ones.split(rows)])
        if not matrix.outliers:          # in 16 bits after all: dot products of bf16 read the smallest numbers as 0
            weight[(weight.abs() < torch.finfo(torch.bfloat16).tiny) & (alone.T == 0)] = 0
        assert torch.equal(alone.T.bfloat16(), weight) and torch.equal(alone, alone.bfloat16().float()), rows


def test_products_of_weights_in_12_bits_are_those_of_16(in_12_bits):
    """Products are bitwise equal without outliers, for any number of rows. Blocks of two weights may alternate."""
    torch.manual_seed(0)
    first, second = (torch.randn(48, 600).clamp(-2, 2).bfloat16() for _ in range(2))
    first[first.abs() < 0.01] = 0.5
    second[second.abs() < 0.01] = 0
    plain, x = Store([first, second]), torch.randn(40, 600).bfloat16()
    for parts in ((first,), (second,), (first, second)):
        coded, exact = in_12_bits.matrix(*parts), plain.matrix(*parts)
        assert coded.outliers and not exact.outliers
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 40):
            assert torch.equal(product(coded, x[:rows].contiguous()), product(exact, x[:rows].contiguous())), rows


def test_weights_of_all_sizes_stay_in_16_bits(in_12_bits):
    torch.manual_seed(0)
    weight = (torch.randn(32, 64) * torch.randint(-60, 60, (32, 64)).float().exp2()).bfloat16()
    matrix = in_12_bits.matrix(weight)
    assert not matrix.outliers
    assert torch.equal(product(matrix, torch.eye(64).bfloat16()).T.bfloat16(), weight)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("processor")
def test_layers_are_those_of_transformers(family):
    model = SegmentedModel(base_of(FAMILIES[family]), (3,))
    assert model.backend.name == "cpu"
    with torch.inference_mode():
        exact = base_of(FAMILIES[family]).float()(torch.tensor([IDS])).logits[0]
        rounded = base_of(FAMILIES[family])(torch.tensor([IDS])).logits[0].float()
    ours = decoded(model, [len(IDS)])
    # As near to the fp32 model with these weights as transformers' own bf16 layers are.
    assert (ours - exact).abs().mean() <= 1.1 * (rounded - exact).abs().mean()
    assert (ours - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("processor")
def test_a_row_does_not_depend_on_the_rows_beside_it(family):
    model = SegmentedModel(base_of(FAMILIES[family]), (3,))
    alone = decoded(model, [1] * len(IDS))
    for size in (2, 3, 5, 8, 11):
        chunks = [size] * (len(IDS) // size) + [len(IDS) % size] * (len(IDS) % size > 0)
        assert torch.equal(decoded(model, chunks), alone), size


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("exits", [(), (0, 3), (1, 2, 3)])
def test_segments_at_once_are_segments_one_by_one(backend, exits):
    model = SegmentedModel(base_of(FAMILIES["llama"]), exits, backend=backend)
    layers, tensor = model.layers, model.layers.tensor
    with torch.inference_mode():
        rows, caches = layers.embed(IDS[:8]), [layers.new_cache(16), layers.new_cache(16)]
        at_once = layers.run(range(model.num_segments), rows, caches[0])
        for s, expected in enumerate(at_once):
            rows, = layers.run(range(s, s + 1), rows, caches[1])
            assert torch.equal(tensor(expected), tensor(rows)), s
    assert torch.equal(caches[0].keys, caches[1].keys) and caches[0].lengths == caches[1].lengths


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("before", [1, 9, 15, 16, 17, 505, 511, 512, 1020])
@pytest.mark.usefixtures("processor")
def test_each_path_of_a_tree_is_bitwise_equal_to_its_text(family, before):
    """This holds wherever blocks and spans begin. After `keep` the cache is that of the path's text."""
    model, parents = SegmentedModel(base_of(FAMILIES[family]), (3,)), [-1, 0, 1, 2, 0, 4, 1, 5, 7, 8, 3]
    tree, text = [3, 50, 7, 21, 9, 9, 33, 4, 18, 60, 2], (IDS * 49)[:before]
    cache = model.layers.new_cache(before + 16)
    states(model, cache, text)
    rows = states(model, cache, tree, parents)
    for row in range(len(tree)):
        path = [row]
        while path[0]:
            path.insert(0, parents[path[0]])
        alone = model.layers.new_cache(before + 16)
        states(model, alone, text)
        assert torch.equal(states(model, alone, [tree[i] for i in path])[-1], rows[row]), row
        if row == 9:
            longest, expected = path, alone
    model.layers.keep(cache, before, longest)
    assert cache.lengths == expected.lengths
    assert torch.equal(states(model, cache, [5, 6]), states(model, expected, [5, 6]))


@torch.inference_mode()
@pytest.mark.usefixtures("processor")
def test_long_texts_are_attended_to_as_transformers_does():
    """Attention works in spans of 512 positions: rows that see several, on their own and many in a pass."""
    model, text = SegmentedModel(base_of(FAMILIES["llama"]), (3,)), IDS * 53
    exact, rounded = (base(torch.tensor([text])).logits[0, -300:].float()
                      for base in (base_of(FAMILIES["llama"]).float(), base_of(FAMILIES["llama"])))
    cache = model.layers.new_cache(len(text))
    many = torch.cat([states(model, cache, text[:700]), states(model, cache, text[700:])])
    ours = logits_of(model, many[None])[0, -300:]
    assert (ours - exact).abs().mean() <= 1.1 * (rounded - exact).abs().mean()
    cache.truncate(len(text) - 1)
    assert torch.equal(states(model, cache, text[-1:])[0], many[-1])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("repeats", [1, 30])
def test_texts_of_a_batch_do_not_see_each_other(backend, repeats):
    base = base_of(FAMILIES["llama"]) if backend == "cpu" else base_of(FAMILIES["llama"]).float()
    model, begins = SegmentedModel(base, (3,), backend=backend), [0, 3, 11] if repeats == 1 else [0, 500, 515]
    texts = [text * repeats for text in (IDS, IDS[::-1], [7, *IDS[1:]])]
    rows, layers = last_states(model, texts, begins), model.layers
    for lane, (begin, text) in enumerate(zip(begins, texts)):
        alone = states(model, layers.new_cache(len(text)), text[begin:])[-1]        # rotary angles tell distances
        difference = (rows[lane] - alone).abs().mean()
        assert difference < (0.03 if backend == "cpu" else 1e-5) * alone.abs().mean()


@pytest.mark.parametrize("head_dim", [16, 48, 64])
@pytest.mark.usefixtures("processor")
def test_what_is_kept_in_12_bits_has_all_digits_of_bf16(head_dim):
    """A lone position attends to its own value. Below 2^-15 of the largest, numbers are off by less than that."""
    config = WIDE | dict(hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1, head_dim=head_dim,
                         num_hidden_layers=1, rms_norm_eps=1e-36)
    base, numbers = AutoModelForCausalLM.from_config(LlamaConfig(**config)), torch.arange(head_dim)
    layer, sizes = base.model.layers[0], 2.0 ** -numbers * (1 + numbers / head_dim)
    for parameter in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.down_proj):
        parameter.weight.data.zero_()
    layer.self_attn.v_proj.weight.data = sizes.diag()
    layer.self_attn.o_proj.weight.data = torch.eye(head_dim)
    model = SegmentedModel(base.to(torch.bfloat16).eval(), ())
    signs = torch.randint(0, 2, (1, 1, head_dim)) * 2.0 - 1
    with torch.inference_mode():        # its norm is the signs; beside the values it is nothing
        found, = model.layers.run(range(1), (signs * 1e-15).bfloat16(), model.layers.new_cache(16))
    found = found.tensor()[0, 0].float()
    values = sizes.bfloat16().float() * signs[0, 0]
    assert torch.equal(found[:16], values[:16])
    assert (found - values).abs().max() <= 2.0 ** -15


def test_a_cut_back_cache_is_as_if_the_rows_had_never_been():
    model = SegmentedModel(base_of(FAMILIES["llama"]), ())
    caches = [model.layers.new_cache(64), model.layers.new_cache(64)]
    for cache in caches:
        states(model, cache, IDS[:5])
    states(model, caches[1], IDS[9:20])
    caches[1].truncate(5)
    rows = [states(model, cache, IDS[5:8]) for cache in caches]
    assert torch.equal(*rows)


def test_positions_that_the_model_does_not_have_are_refused():
    model = SegmentedModel(base_of(FAMILIES["llama"]), ())
    cache = model.layers.new_cache(model.max_positions + 16)
    with pytest.raises(ValueError, match=f"has {model.max_positions} positions, .* asked for"):
        states(model, cache, [3] * (model.max_positions + 1))


def test_a_full_cache_says_how_much_it_holds():
    model = SegmentedModel(base_of(FAMILIES["llama"]), ())
    cache = model.layers.new_cache(16)
    expected = f"holds {cache.capacity} positions, 0 are used and 63 more"
    with pytest.raises(ValueError, match=expected):
        states(model, cache, IDS * 3)


@pytest.mark.parametrize("outputs, inputs", [(96, 48), (97, 30), (5, 2), (40, 258)])
@pytest.mark.usefixtures("processor")
def test_linear_is_the_linear_it_replaces(outputs, inputs):
    linear = torch.nn.Linear(inputs, outputs, dtype=torch.bfloat16)
    packed = CpuHead(linear.weight, linear.bias).logits
    x = torch.randn(1, 9, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), linear.float()(x.float()), atol=1e-4, rtol=1e-4)
        for n in range(1, 9):
            assert torch.equal(packed(x[:, :n]), packed(x)[:, :n]), "a row stands alone"


@pytest.mark.parametrize("outputs, inputs", [(96, 48), (97, 30), (5, 2), (4000, 16)])
@pytest.mark.usefixtures("processor")
def test_the_largest_output_is_that_of_the_linear(outputs, inputs):
    packed = CpuHead(torch.randn(outputs, inputs, dtype=torch.bfloat16), -20 - torch.rand(outputs))
    x = torch.randn(1, 9, inputs, dtype=torch.bfloat16)
    for n in (1, 2, 9):
        assert packed.argmax(x[:, :n]) == packed.logits(x[:, :n])[0].argmax(-1).tolist()
    equal = CpuHead(torch.ones(outputs, inputs, dtype=torch.bfloat16))
    assert equal.argmax(x) == [0] * 9, "not the first of equal ones"


@pytest.mark.parametrize("outputs, inputs", [(96, 48), (97, 30), (5, 2), (4000, 16), (3000, 576)])
@pytest.mark.parametrize("close", [0, 1e-2], ids=["far-apart", "close"])
@pytest.mark.usefixtures("processor")
def test_a_screen_finds_the_same_largest_output(outputs, inputs, close):
    """The first largest output is found, also among outputs closer than the rounding error and among equal ones."""
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1).exp()
    weight = (torch.randn(1, inputs) + close * weight if close else weight).bfloat16()
    weight[outputs // 2:] = weight[:outputs - outputs // 2].clone()     # each largest one is there twice
    ids = torch.randperm(outputs)
    packed, rough = CpuHead(weight), CpuHead(weight[ids], eight_bits=True)
    x = torch.randn(1, 9, inputs).bfloat16() * torch.logspace(-6, 6, 9)[:, None].bfloat16()
    x[0, 4, 0], x[0, 5] = 1e4, 0                                        # one input alone, and nothing to tell by
    for screened in (packed.screened(rough, weight[ids], ids),
                     packed.screened(CpuHead(weight, eight_bits=True), weight)):
        assert screened.nbytes == outputs * (inputs + 4)
        for n in (1, 2, 6, 9):
            assert screened.argmax(x[:, :n]) == packed.logits(x[:, :n])[0].argmax(-1).tolist()


@pytest.mark.parametrize("outputs, inputs", [(96, 48), (97, 30), (5, 2)])
@pytest.mark.usefixtures("processor")
def test_one_output_alone_is_bitwise_that_of_all(outputs, inputs):
    packed = CpuHead(torch.randn(outputs, inputs).bfloat16(), torch.rand(outputs))
    x = torch.randn(1, 7, inputs).bfloat16()
    together = packed.logits(x)[0].tolist()
    assert all(packed.logit(x, row, number) == together[row][number]
               for row in range(7) for number in {0, 1, outputs // 2, outputs - 1})


@pytest.mark.parametrize("outputs, inputs", [(96, 48), (97, 30), (5, 2), (40, 258), (40, 2050)])
@pytest.mark.usefixtures("processor")
def test_a_linear_in_8_bits_is_the_one_with_its_weights_rounded(outputs, inputs):
    weight, x = torch.randn(outputs, inputs, dtype=torch.bfloat16), torch.randn(1, 9, inputs, dtype=torch.bfloat16)
    head, scale = CpuHead(weight, eight_bits=True), weight.float().abs().amax(1, keepdim=True) / 127
    rounded, packed = (weight.float() / scale).round() * scale, head.logits
    assert head.nbytes == outputs * (inputs + 4)
    with torch.inference_mode():
        # Each input is off by at most half of a step, of which its row has so many.
        step = x.float().abs().amax(-1, keepdim=True) / min(32767, 2**24 / inputs)
        off = (packed(x).double() - x.double() @ rounded.double().T).abs()
        assert (off <= 0.51 * step * rounded.abs().sum(1) + 1e-4).all()
        assert torch.equal(torch.cat([packed(x[:, i:i + 1]) for i in range(9)], dim=1), packed(x)), "a row stands alone"
        most = CpuHead(torch.ones_like(weight), eight_bits=True).logits(torch.ones_like(x))
        torch.testing.assert_close(most, torch.full_like(most, inputs), msg="sums of the largest integers overflow")
        assert not packed(torch.zeros_like(x)).any()
        if outputs > 32:
            torch.testing.assert_close(head.first(32).logits(x), packed(x)[..., :32], atol=0, rtol=0)
    with pytest.raises(ValueError, match="8 bits"):
        head.rows([0])


def copies_of(logits: torch.Tensor) -> torch.Tensor:
    """Copies for 7 rows of these logits: three of their likeliest word, three of another, one of none."""
    best = logits.argmax(-1).float()
    return torch.stack([torch.cat([best[:3], 199 - best[3:6], best.new_tensor([-1])]), torch.arange(6, -1, -1) / 2], 1)


@pytest.mark.parametrize("paired", [False, True])
def test_softmax_facts_are_those_of_torch(paired):
    weight, x, before = (torch.randn(n, 64, dtype=torch.bfloat16) for n in (200, 7, 7))
    before = torch.cat([x[:3] * 0.9, before[3:]]) if paired else None           # a few agree
    stock = torch.nn.Linear(64, 200, bias=False)
    stock.weight.data.copy_(weight)
    with torch.inference_mode():
        copied = copies_of(stock(x.float()))
        ours = CpuHead(weight).softmax_facts(x, copied, before)
        theirs = softmax_facts(stock, x.float(), copied, before.float() if paired else None)
    assert ours.shape == (7, 12 if paired else 5) and ours[:, -2:].count_nonzero() == 6
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("paired", [False, True])
def test_confidence_is_that_of_torch(paired):
    weight, x, before = (torch.randn(n, 64, dtype=torch.bfloat16) for n in (200, 7, 7))
    estimator, stock = SketchConfidence(48), torch.nn.Linear(64, 200, bias=False)
    stock.weight.data.copy_(weight)
    with torch.inference_mode():
        rows = (x, copies_of(stock(x.float())), *([before] if paired else []))
        ours = CpuConfidence(CpuHead(weight), estimator.alone, estimator.after)(x, rows[1].tolist(), *rows[2:])
        theirs = estimator(softmax_facts(stock, *(r.float() for r in rows))).sigmoid()
    torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("words", [200, 64])
def test_the_likeliest_words_are_those_of_torch(words):
    weight, x = torch.randn(200, 64, dtype=torch.bfloat16), torch.randn(7, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        ours, numbers = CpuHead(weight[:words]).likeliest(x, 5, 4.0)
        theirs, expected = TorchHead(torch.randn(words, 64)).likeliest(x.float(), 5, 4.0)
        probs = (x.float() @ weight.float().T / 4)[:, :words].softmax(-1).topk(5, dim=-1)
    assert torch.equal(numbers.long(), probs.indices) and theirs.shape == expected.shape == (7, 5)
    torch.testing.assert_close(ours, probs.values, atol=1e-4, rtol=1e-3)
    assert CpuHead(weight[:3]).likeliest(x, 5, 1.0)[1].shape == (7, 3), "no more than there are"


def test_norms_are_those_of_transformers():
    base, x = base_of(FAMILIES["llama"]), torch.randn(2, 5, 96, dtype=torch.bfloat16) * 30
    base.model.norm.weight.data.normal_()
    with torch.inference_mode():
        torch.testing.assert_close(SegmentedModel(base, ()).layers.norm(x).float(), base.model.norm.float()(x.float()),
                                   atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["swiglu", "carry"])
def test_adapters_are_those_that_were_trained(kind):
    model = SegmentedModel(base_of(FAMILIES["llama"]), (2, 4))
    bank = ExitBank.untrained(model, adapter=kind, width=24)
    for adapter in bank.adapters:
        torch.nn.init.normal_(adapter.up.weight, std=0.2)
    exits = Engine(model, bank).exits
    h, carried = torch.randn(2, 5, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        for s in range(2):
            torch.testing.assert_close(exits.hidden(s, h, carried).float(), bank.adapters[s](h, carried).float(),
                                       atol=0.05, rtol=0.05)


def test_without_a_compiler_pytorch_does_the_work(monkeypatch, caplog):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.library.__wrapped__() is None and "No C++ compiler" in caplog.text
    monkeypatch.setattr(build, "library", lambda: None)
    with torch.inference_mode():
        exact = base_of(FAMILIES["llama"]).float()(torch.tensor([IDS])).logits[0]
    model = SegmentedModel(base_of(FAMILIES["llama"]), (3,))
    assert model.backend.name == "torch"
    with pytest.raises(ValueError, match="'cpu' cannot run this model here"):
        SegmentedModel(base_of(FAMILIES["llama"]), (3,), backend="cpu")
    assert (decoded(model, [len(IDS)]) - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_failing_compiler_is_logged(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CASCADEEXIT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("--no-such-flag",))
    assert build.library.__wrapped__() is None and "could not be built" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"",
                                    lambda content: content[:-9], lambda content: content[:9] + b"x" + content[10:]],
                         ids=["half", "empty", "end", "byte"])
def test_a_damaged_library_is_built_again_before_it_is_loaded(monkeypatch, tmp_path, damage):
    """A library that is cut off kills the process that loads it, at every start."""
    compiler = build.find_compiler()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "kernels.cpp").write_text('extern "C" int ce_answer() { return 42; }')
    monkeypatch.setattr(build, "SOURCES", tmp_path / "src")
    monkeypatch.setenv("CASCADEEXIT_CACHE", str(tmp_path / "cache"))
    left = tmp_path / "cache" / "kernels-work-old"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    path = build._build(compiler)
    whole, date = path.read_bytes(), path.stat().st_mtime_ns
    assert build._build(compiler) == path and path.stat().st_mtime_ns == date, "built once"
    path.unlink()           # a new file, since this process may still run the old one
    path.write_bytes(damage(whole))
    assert ctypes.CDLL(str(build._build(compiler))).ce_answer() == 42
    assert [found.name for found in path.parent.iterdir()] == [path.name], "what killed compilers left is deleted"


def test_fp32_stays_with_pytorch():
    assert SegmentedModel(base_of(FAMILIES["llama"]).float(), (3,)).backend.name == "torch"


@pytest.mark.parametrize("shape", [{}, dict(head_size=64, draft_size=32)], ids=["all words", "few words"])
def test_drafts_in_one_call_are_those_of_the_parts(adapter, shape):
    model = SegmentedModel(base_of(FAMILIES["llama-tied"]), (0, 3))
    bank = ExitBank.untrained(model, adapter=adapter, width=8, **shape)
    for weight in bank.adapters[0].parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    exits = Engine(model, bank).exits
    tokens, carried = [7, 3, 60], torch.randn(3, 96, dtype=torch.bfloat16).split(1)
    with torch.inference_mode():
        ours, parts = exits.drafts(tokens, carried, 4, 0.7), exits.drafts_by_parts(tokens, carried, 4, 0.7)
    for (hidden, *rest), (hidden2, *rest2) in zip(ours, parts, strict=True):
        assert torch.equal(hidden.tensor(), hidden2.tensor()) and rest == rest2


def test_a_drafter_in_8_bits_drafts_nearly_the_same():
    model = SegmentedModel(base_of(FAMILIES["llama-tied"]), (0, 2, 3))
    bank = ExitBank.untrained(model, adapter="carry", width=8, drafter_width=8)
    for weight in bank.drafter.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    exits = Engine(model, bank).exits
    tokens, carried = [7, 3, 60], torch.randn(3, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        states = [torch.randn(1, 5, 96).bfloat16() * size for size in (100, 1)]
        context = exits.context(states, 3)
        whole = bank.drafter.context(torch.cat([rows[0, 3:4] for rows in states], -1)).float()
        drawn = torch.tensor(context[:])
        assert (drawn - whole).norm() < 0.02 * whole.norm()
        ours, alone = (exits.drafts(tokens, carried.split(1), 4, 0.7, read) for read in (context, None))
        exact = bank.drafter(model.layers.embed(tokens).tensor()[0], carried, drawn.bfloat16()).float()
        parts = exits.drafts_by_parts(tokens, carried.split(1), 4, 0.7, context)
    for (hidden, *rest), (hidden2, *rest2), right in zip(ours, parts, exact, strict=True):
        assert torch.equal(hidden.tensor(), hidden2.tensor()) and rest == rest2
        assert (hidden2.tensor()[0].float() - right).norm() < 0.05 * right.norm()
    assert (alone[0][0].tensor()[0].float() - exact[0]).norm() > 0.2 * exact[0].norm(), "its context says nothing"


def test_columns_of_any_size_keep_their_weights_in_8_bits(adapter):
    """Without column scales, rounding would lose the small weights of strong inputs."""
    torch.manual_seed(2)
    size = torch.logspace(-3, 3, 64)[torch.randperm(64)]
    layer = ADAPTERS[adapter](64, 32, 1e-5)
    layer.up.weight.data.normal_(std=0.1)
    for part in (layer.gate, layer.down, *([layer.linear] if adapter == "carry" else [])):
        part.weight.data[:, :64].div_(size)
    h, carried = (torch.randn(5, 64) * size).bfloat16(), torch.randn(5, 64).bfloat16()
    ours = CpuAdapter(layer, eight_bits=True)(h, carried)
    exact = layer(h.float(), carried.float())
    assert (ours.float() - exact).norm() < 0.05 * exact.norm()
