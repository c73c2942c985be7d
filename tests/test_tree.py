"""Draft trees: each row is worth its cost, a place may have several drafts, the text equals that of `full`."""

import pytest
import torch

from cascadeexit.config import DecodeConfig
from cascadeexit.events import Status
from cascadeexit.metrics import summarize
from cascadeexit.sides import CASCADE, Side
from cascadeexit.stream import TokenStream
from cascadeexit.tree import DraftTree
from cascadeexit.wire import expand
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer

PROMPTS = ([5], [5, 6, 7], [9, 3] * 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [(0,), (0, 3), (2, 4)], ids=str)
def test_verified_with_a_draft_tree_equals_full(family, dtype, layers):
    engine = tiny_engine(family, dtype=dtype, adapter="carry", layers=layers)
    for prompt in PROMPTS:
        full = engine.run(prompt, DecodeConfig(mode="full", max_new_tokens=60)).token_ids
        for max_draft in (1, 4, 16):
            run = engine.run(prompt, DecodeConfig(mode="verified", max_new_tokens=60, max_draft=max_draft))
            assert run.token_ids == full, max_draft


def eager_engine():
    """Engine with an exit before the first layer whose sharp head makes a few tokens likely, so that it drafts.

    On a machine without a C++ compiler trees are chains.
    """
    engine = tiny_engine("qwen3", dtype=torch.bfloat16, adapter="carry", layers=(0, 3))
    drafts = engine.exits.drafts
    engine.exits.drafts = lambda tokens, carried, k, temperature, context: drafts(
        tokens, carried, k, temperature / 3, context)
    return engine


def test_a_tree_keeps_order_and_limits_and_never_drafts_a_token_twice_at_a_place():
    engine, seen = eager_engine(), 0
    for limit in (1, 5, 12):
        tree = DraftTree(engine.model, engine.exits, [5, 6, 7, 5, 6], 0.0)
        with torch.inference_mode():
            drafts = tree.grow([5, 6, 7, 5, 6], torch.randn(1, 32).bfloat16(), limit, 4)
        assert len(drafts) <= limit and all(d.depth < 4 for d in drafts)
        for i, d in enumerate(drafts):
            assert d.parent < i and d.depth == (drafts[d.parent].depth + 1 if d.parent >= 0 else 0)
        assert len({(d.parent, d.token) for d in drafts}) == len(drafts)
        seen = max(seen, sum(d.parent == -1 for d in drafts))
    assert seen > 1 or not engine.model.layers.supports_trees, "no place had several drafts"


def test_no_confidence_exceeds_one():
    """Confidences stay at most 1 when far more drafts were accepted than the softmax predicted."""
    engine, text, sure = eager_engine(), [5, 6, 7], []
    tree = DraftTree(engine.model, engine.exits, text, 0.0)
    for _ in range(30):
        with torch.inference_mode():
            drafts = tree.grow(text, torch.randn(1, 32).bfloat16(), 8, 4)
        path = []
        for i, draft in enumerate(drafts):
            if draft.parent == (path[-1] if path else -1):
                path.append(i)
        sure += [draft.confidences[0] for draft in drafts if draft.confidences[0] is not None]
        confirmed = [*(drafts[i].token for i in path), 1]
        tree.judged(drafts, path, confirmed)
        text += confirmed
    assert sure and all(0 <= c <= 1 for c in sure) and max(sure) > 0.5


def test_nothing_is_drafted_after_the_end_of_a_text():
    engine = eager_engine()
    tree = DraftTree(engine.model, engine.exits, [5, 6, 7, 5, 6], 0.0, eos_ids=frozenset(range(97)))
    with torch.inference_mode():
        drafts = tree.grow([5, 6, 7, 5, 6], torch.randn(1, 32).bfloat16(), 8, 4)
    assert drafts and all(d.depth == 0 for d in drafts)


def test_an_exit_whose_drafts_are_rejected_drafts_fewer_tokens():
    engine = eager_engine()
    tree, carried = DraftTree(engine.model, engine.exits, [5], 0.0), torch.randn(1, 32).bfloat16()
    sizes = []
    with torch.inference_mode():
        for _ in range(200):
            drafts = tree.grow([5], carried, 8, 4)
            sizes.append(len(drafts))
            tree.judged(drafts, [], [96])
    assert sizes[0] > 1 and sizes[-1] < sizes[0]


def test_events_tell_the_tree_of_drafts():
    """Numbers of drafts count from the last verdict on; a draft stands one position after its parent."""
    engine, tree, seen = eager_engine(), [], 0
    run = engine.run([5, 6, 7] * 4, DecodeConfig(mode="verified", max_new_tokens=60, max_draft=12))
    for event in run.events:
        if event.status is Status.DRAFT:
            assert -1 <= event.parent < len(tree) and 0 < event.probability <= 1
            first = tree[0].index if tree else event.index
            assert event.index == (tree[event.parent].index + 1 if event.parent >= 0 else first)
            tree.append(event)
            seen = max(seen, event.parent + 1)
        else:
            assert event.parent == -1 and event.probability is None
            tree = []
    assert seen > 1


def test_every_draft_is_judged_and_the_page_sees_one_path():
    """Each draft gets one verdict; records show no place twice at a time, and end with the text."""
    engine, prompt = eager_engine(), [5, 6, 7]
    config = DecodeConfig(mode="verified", max_new_tokens=60, max_draft=12)
    run = engine.run(prompt, config)
    kinds = [e.status for e in run.events]
    assert kinds.count(Status.DRAFT) == kinds.count(Status.ACCEPTED) + kinds.count(Status.REJECTED) > 0
    assert summarize(run.events, engine.costs).drafted == kinds.count(Status.DRAFT)
    stream, written, pending = TokenStream(engine, tiny_tokenizer(), [Side(CASCADE, "", config)], prompt), [], {}
    for event in run.events:
        before = len(stream.text)
        stream.add(CASCADE, event)
        if "token" not in [expand(line)["type"] for line in stream.text[before:].splitlines()]:
            continue
        if event.status is Status.DRAFT:
            assert event.index == len(written) + len(pending)
            pending[event.index] = event.token_id
        elif event.status is Status.REJECTED:
            assert pending.pop(event.index) == event.token_id
        else:
            pending.pop(event.index, None)
            written.append(event.token_id)
    assert written == run.token_ids and not pending
