"""Whole tiny models through the Triton layers: what transformers and `torch` compute, and rows that stand alone."""

import pytest
import torch

from cascadeexit.config import DecodeConfig
from cascadeexit.inspection import inspect
from tests.interpreted.models import FAMILIES, engines, model_of
from tests.tiny_models import IDS, base_of, decoded, last_states, logits_of, states

OURS = dict(adapter="carry", confidence="sketch", sketch_size=40, drafter_width=8)


@pytest.mark.parametrize("family, dtype", [*((family, torch.bfloat16) for family in FAMILIES),
                                           ("qwen3", torch.float16)], ids=str)
def test_layers_are_those_of_transformers(family, dtype):
    with torch.inference_mode():
        exact = base_of(FAMILIES[family], dtype).float()(torch.tensor([IDS])).logits[0]
        rounded = base_of(FAMILIES[family], dtype)(torch.tensor([IDS])).logits[0].float()
    ours = decoded(model_of(family, dtype=dtype), [len(IDS)])
    # As near to the fp32 model with these weights as transformers' own layers in this dtype are.
    assert (ours - exact).abs().mean() <= 1.1 * (rounded - exact).abs().mean()
    assert (ours - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow), "qwen3"])
def test_a_row_does_not_depend_on_how_a_text_is_cut_nor_on_capacity(family):
    model = model_of(family)
    together = decoded(model, [len(IDS)])
    for chunks in ([1] * 3 + [18], [16, 5]):
        assert torch.equal(decoded(model, chunks, capacity=64 * len(chunks)), together), chunks


def test_segments_at_once_are_segments_one_by_one():
    model = model_of("llama", exits=(0, 1))
    layers, caches = model.layers, [model.layers.new_cache(16) for _ in range(2)]
    with torch.inference_mode():
        rows = layers.embed(IDS[:8])
        for s, expected in enumerate(layers.run(range(3), rows, caches[0])):
            rows, = layers.run(range(s, s + 1), rows, caches[1])
            assert torch.equal(expected, rows), s
    assert torch.equal(caches[0].keys, caches[1].keys) and caches[0].lengths == caches[1].lengths


@pytest.mark.parametrize("family, before", [("llama", 3), ("qwen3", 60),
                                            pytest.param("llama", 250, marks=pytest.mark.slow)])
def test_each_path_of_a_tree_is_bitwise_the_text_that_it_says(family, before):
    """Wherever blocks and splits begin; and the cache after `keep` is that of the path's text."""
    model, parents = model_of(family), [-1, 0, 1, 2, 0, 4, 1, 5]
    tree, text = [3, 50, 7, 21, 9, 9, 33, 4], (IDS * 12)[:before]
    cache = model.layers.new_cache(before + 16)
    states(model, cache, text)
    rows = states(model, cache, tree, parents)
    for path in ([0, 1, 2, 3], [0, 4, 5, 7], [0, 1, 6]):
        alone = model.layers.new_cache(before + 16)
        alone.copy_from(cache)
        alone.truncate(before)
        expected = torch.cat([states(model, alone, [tree[i]]) for i in path])
        assert torch.equal(expected, rows[path]), path
    model.layers.keep(cache, before, path)
    assert cache.lengths == alone.lengths
    assert torch.equal(states(model, cache, [5, 6]), states(model, alone, [5, 6]))


def test_texts_of_a_batch_see_themselves_alone():
    model, begins = model_of("llama"), [0, 3, 11]
    texts = [text[:13] for text in (IDS, IDS[::-1], [7, *IDS[1:]])]
    rows, layers = last_states(model, texts, begins), model.layers
    for lane, (begin, text) in enumerate(zip(begins, texts)):
        alone = states(model, layers.new_cache(len(text)), text[begin:])[-1]        # rotary angles tell distances
        assert (rows[lane] - alone).abs().mean() < 0.03 * alone.abs().mean()


def test_a_cache_or_a_model_that_is_full_says_so():
    model = model_of("llama")
    with pytest.raises(ValueError, match="holds 128 positions, 0 are used and 129 more"):
        model.layers.run(range(2), model.layers.embed([3] * 129), model.layers.new_cache(16))
    cache = model.layers.new_cache(2048)
    with pytest.raises(ValueError, match="has 1024 positions, 1025 were asked for"):
        model.layers.run(range(2), model.layers.embed([3] * 1025), cache)
    assert cache.lengths == [0, 0], "nothing was claimed"


@pytest.mark.parametrize("shape", [dict(confidence="mlp"), OURS], ids=["published", "ours"])
def test_exits_are_those_of_torch(shape):
    """Adapters, confidences, choices, context and drafts; inspection of a text puts them all to use."""
    ours, theirs = engines("llama", dtype=torch.float16, **shape)
    run = theirs.run(IDS[:9], DecodeConfig(max_new_tokens=5, thresholds=0.5))
    seen, wanted = (inspect(engine, IDS[:9], run.events) for engine in (ours, theirs))
    torch.testing.assert_close(seen.confidences, wanted.confidences, atol=0.02, rtol=0.02)
    torch.testing.assert_close(seen.probabilities, wanted.probabilities, atol=0.02, rtol=0.02)
    with torch.inference_mode():
        carried, rows = (ours.model.layers.embed(IDS[a:a + 2])[0] for a in (2, 5))
        contexts = [engine.exits.context([rows[None]], 1) for engine in (ours, theirs)]
        if contexts[1] is not None:
            torch.testing.assert_close(contexts[0], contexts[1], atol=0.02, rtol=0.02)
        drafts = [engine.exits.drafts(IDS[:2], list(carried[:, None]), 4, 1.0, context)
                  for engine, context in zip((ours, theirs), contexts)]
        for (hidden, probs, _), (expected, wanted_probs, _) in zip(*drafts):
            torch.testing.assert_close(hidden, expected, atol=0.02, rtol=0.02)
            torch.testing.assert_close(probs, wanted_probs, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family, options", [("llama", dict(thresholds=0.2, max_draft=3)), ("llama", dict(max_draft=7)),
                                             ("qwen3", dict(max_draft=7))], ids=["chain", "tree", "qwen3-tree"])
def test_verified_is_bitwise_full(family, options):
    engine, torchs = engines(family, **OURS)
    prompt = [9, 3, 9, 3, 41, 9, 3]
    full = engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=8, ignore_eos=True))
    run = engine.run(prompt, DecodeConfig(mode="verified", max_new_tokens=8, ignore_eos=True, **options))
    assert run.token_ids == full.token_ids and run.stats.drafted
    text, logits = [*prompt, *full.token_ids[:-1]], []
    for model in (engine.model, torchs.model):
        rows = model.layers.run(range(3), model.layers.embed(text), model.layers.new_cache(64))[-1]
        logits.append(logits_of(model, rows)[0].float())
    assert (logits[0] - logits[1]).abs().mean() < 0.03 * logits[1].abs().mean()
    assert logits[0][len(prompt) - 1:].argmax(-1).tolist() == full.token_ids, "prefill chooses what decoding chose"


@pytest.mark.parametrize("rows", [1, 5])
def test_a_pass_reads_little_but_weights_and_the_cache_in_use(read, rows):
    """Each byte once: at most 1.05 of what it must. Capacity and rows that are not there are not read."""
    model, shape = model_of("llama", exits=()), FAMILIES["llama"]
    cache = model.layers.new_cache(700)
    states(model, cache, IDS * 3)
    read()
    with torch.inference_mode():
        top, = model.layers.run(range(1), model.layers.embed(IDS[:rows]), cache)
        model.head.argmax(model.layers.norm(top))
    context = len(IDS) * 3 + rows
    needed = (sum(model.layers.segment_bytes) + model.head.nbytes
              + 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * context)
    found = read()
    print(f"{found:,} bytes read, {needed:,} needed")
    assert needed <= found <= 1.05 * needed + 1500 * (rows - 1)         # rows of this narrow model count as well
