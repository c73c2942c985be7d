"""Training: losses have the reduction they name, splits never leak, and interrupted work is continued."""

import argparse
import dataclasses
import importlib
import json
import math
import runpy
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm import tqdm

import training.data
import training.policy
from cascadeexit.carry import carried_states
from cascadeexit.exits import ADAPTERS, ExitBank
from cascadeexit.hub import exit_layers
from tests.helpers import tiny_store
from tests.tiny_models import tiny_engine
from training.batches import batches, micro_batches
from training.checkpoint import RunFolder
from training.data import check_settings
from training.documents import Document, Split, key_of, load_documents, save_shard
from training.features import FeatureStore
from training.forward import mixed_carried_states
from training.inputs import AdapterInputs
from training.join import join
from training.json_files import ResumableRows, save_json
from training.loop import train
from training.loss import exit_loss
from training.policy import ChatTemplate, Lane, Sources, write_round
from training.provenance import provenance
from training.reliability import auroc, expected_calibration_error, platt
from training.vocabulary import SampledHead, frequent_tokens


def test_loss_is_summed_over_words_and_over_rows():
    target, logits = torch.tensor([[0.5, 0.25, 0.25]]), torch.zeros(1, 3)
    expected = math.log(3) - 1.5 * math.log(2)
    loss, kl, ce = exit_loss(logits, target, torch.tensor([0]), hard=0.25)
    assert kl.item() == pytest.approx(expected, abs=1e-6) and ce.item() == pytest.approx(math.log(3), abs=1e-6)
    assert loss.item() == pytest.approx(0.75 * expected + 0.25 * math.log(3), abs=1e-6)
    many = exit_loss(logits.expand(8, 3), target.expand(8, 3), torch.zeros(8, dtype=torch.long), hard=0.25)
    assert [t.item() / 8 for t in many] == pytest.approx([loss.item(), kl.item(), ce.item()])


def test_temperature_softens_both_sides_and_the_loss_is_scaled_by_its_square():
    full, logits = torch.randn(4, 9), torch.randn(4, 9)
    soft = exit_loss(logits, (full / 2).softmax(-1), torch.full((4,), -1), hard=0.0, temperature=2.0)
    expected = 4 * torch.nn.functional.kl_div((logits / 2).log_softmax(-1), (full / 2).log_softmax(-1),
                                              log_target=True, reduction="sum")
    torch.testing.assert_close(soft[0], expected)


def test_total_variation_is_one_minus_the_acceptance_rate():
    full, logits = torch.randn(4, 9).softmax(-1), torch.randn(4, 9)
    tv = exit_loss(logits, full, torch.full((4,), -1), hard=0.0, loss="tv")[0]
    acceptance = torch.minimum(logits.softmax(-1), full).sum(-1)
    torch.testing.assert_close(tv, (1 - acceptance).sum())


@pytest.mark.parametrize("loss", ["kl", "tv", "hybrid"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_closed_form_gradient_equals_that_of_autograd(loss, temperature):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 9, dtype=torch.float64), torch.tensor([3, -1, 0, 8, 5])
    p = torch.randn(5, 9, dtype=torch.float64).softmax(-1)
    weight = torch.ones(5, dtype=torch.float64)
    if loss == "hybrid":        # its weights count as constants: they are no part of the gradient
        tv = 0.5 * ((logits / temperature).softmax(-1) - p).abs().sum(-1)
        weight = torch.exp(-3 * (1 - tv))

    def plain(x):
        log_q = (x / temperature).log_softmax(-1)
        kl = temperature ** 2 * (p * (p.log() - log_q)).sum(-1)
        tv = 0.5 * (p - log_q.exp()).abs().sum(-1)
        distance = kl if loss == "kl" else tv if loss == "tv" else weight * kl + (1 - weight) * tv
        return 0.7 * distance.sum() + 0.3 * torch.nn.functional.cross_entropy(x, labels, ignore_index=-1,
                                                                              reduction="sum")

    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    result = exit_loss(ours, p, labels, hard=0.3, temperature=temperature, loss=loss)[0]
    expected = plain(theirs)
    (2 * result).backward()
    (2 * expected).backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_labels_outside_the_head_have_no_cross_entropy():
    logits, full = torch.randn(2, 3), torch.randn(2, 3).softmax(-1)
    with_unknown = exit_loss(logits, full, torch.tensor([1, -1]), hard=1.0)[2]
    alone = exit_loss(logits[:1], full[:1], torch.tensor([1]), hard=1.0)[2]
    torch.testing.assert_close(with_unknown, alone)


def test_frequent_tokens_come_first_after_those_that_always_do():
    choices = torch.tensor([5, 5, 5, 9, 9, 2])
    assert frequent_tokens(choices, 12, frozenset([11])).tolist() == [11, 5, 9, 2, 0, 1, 3, 4, 6, 7, 8, 10]


def test_sampled_words_represent_all_remaining_words():
    """The normalizer over head and sample has the expected value of that over the whole vocabulary."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(500, 8) / 3, torch.randn(1, 8)
    words = SampledHead(weight, torch.arange(100), tail=100)
    assert words.local[99] == 99 and words.local[100] == -1

    def total(seed: int) -> float:
        rows, added = words.sample(seed)
        return (hidden @ rows.T + added).exp().sum().item()

    mean = sum(map(total, range(300))) / 300
    assert mean == pytest.approx((hidden @ weight.T).exp().sum().item(), rel=0.02)


def bank_and_store(adapter: str, tmp_path, budget_gb: float = 1.0) -> tuple[ExitBank, FeatureStore]:
    engine = tiny_engine(adapter=adapter)
    return engine.bank, tiny_store(engine, tmp_path / "features", 50, budget_gb)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_folded_adapters_give_on_plain_rows_what_they_gave_on_mapped_ones(tmp_path, adapter):
    bank, store = bank_and_store(adapter, tmp_path)
    inputs = AdapterInputs(bank, store, range(20), torch.ones(32))
    h, carried = torch.randn(5, 32), torch.randn(5, 32)
    before = [bank.adapters[s](*inputs(s, h, carried)) for s in range(3)]
    inputs.fold(bank)
    for s in range(3):
        torch.testing.assert_close(bank.adapters[s](h, carried), before[s], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_training_continues_from_exits_trained_before(tmp_path, adapter):
    bank, store = bank_and_store(adapter, tmp_path)
    before = tiny_engine(seed=7, adapter=adapter).bank
    before.config = dataclasses.replace(before.config, layers=(1, 3, 5))
    inputs = AdapterInputs(bank, store, range(20), torch.ones(32))
    assert inputs.adopt(bank, before) == [3, 5]
    h, carried = torch.randn(2, 6, 32)
    for s in (1, 2):
        torch.testing.assert_close(bank.adapters[s](*inputs(s, h, carried)), before.adapters[s](h, carried), atol=2e-3,
                                   rtol=2e-3)
    with pytest.raises(ValueError, match="another shape"):
        inputs.adopt(bank, tiny_engine(adapter=adapter, width=9).bank)


def test_exits_trained_separately_are_joined_by_layer():
    deep = tiny_engine(adapter="carry", head_size=20).bank
    shallow = tiny_engine(adapter="carry", layers=(0, 3)).bank
    torch.nn.init.normal_(shallow.adapters[1].up.weight)        # another exit after the same layer
    whole = join([deep, shallow])
    assert whole.config.layers == (0, 2, 3, 5) and torch.equal(whole.head_ids, deep.head_ids)
    assert [whole.config.words(s) for s in range(4)] == [20] * 4
    mixed = join([tiny_engine(adapter="carry", head_size=90, head_sizes=(32, 64, 90)).bank, shallow])
    assert mixed.config.head_sizes == (90, 32, 64, 90)
    h, carried = torch.randn(2, 4, 32)
    for bank, layer in ((shallow, 0), (deep, 2), (deep, 3), (deep, 5)):
        ours, theirs = (b.adapters[b.config.layers.index(layer)] for b in (whole, bank))
        torch.testing.assert_close(ours(h, carried), theirs(h, carried))
    with pytest.raises(ValueError, match="width is 8 in the first folder, 9 in another"):
        join([deep, tiny_engine(adapter="carry", width=9).bank])
    with pytest.raises(ValueError, match="cannot be joined: head_fingerprint"):
        join([deep, tiny_engine(seed=3, adapter="carry").bank])


def test_a_carry_adapter_starts_from_the_ridge_regression(tmp_path):
    """On plain rows its linear part is the least-squares map from [h, carried] to the full model's last state."""
    bank, store = bank_and_store("carry", tmp_path)
    inputs = AdapterInputs(bank, store, range(50), torch.ones(32))
    features = [store[i] for i in range(50)]
    rows = [(torch.cat([f.exits[:, 0], carried_states(f.top)], -1)[f.wanted], f.top[f.wanted]) for f in features]
    x, y = (torch.cat(column) for column in zip(*rows))
    inputs.fold(bank)
    error = (bank.adapters[0].linear(x) - y).pow(2).mean()
    best = (x @ torch.linalg.lstsq(x, y).solution - y).pow(2).mean()
    assert best <= error < 1.05 * best


def test_features_beyond_the_budget_are_computed_again_with_equal_values(tmp_path):
    _, kept = bank_and_store("carry", tmp_path)
    _, made = bank_and_store("carry", tmp_path, budget_gb=0)
    assert kept.kept == 50 and made.kept == 0
    for name, value in vars(kept[7]).items():
        assert torch.equal(value, vars(made[7])[name]), name


def test_every_epoch_sees_every_document_once_in_its_own_order():
    rows = {i: 10 for i in range(30)}
    plan = batches(rows, batch=25, epochs=2.0, seed=0)
    flat = [i for step in plan for i in step]
    assert sorted(flat[:30]) == sorted(flat[30:]) == list(range(30)) and flat[:30] != flat[30:]
    assert {len(step) for step in plan} == {3}


def test_an_epoch_repeats_the_documents_it_is_told_to():
    steps = batches({i: 10 for i in range(9)}, batch=20, epochs=2, seed=0, repeats={4: 3})
    seen = [i for step in steps for i in step]
    assert seen.count(4) == 6 and all(seen.count(i) == 2 for i in range(9) if i != 4)


def test_micro_batches_hold_every_document_within_the_limit():
    lengths = {i: 5 + i for i in range(12)}
    parts = micro_batches(list(lengths), lengths, tokens=40)
    assert sorted(i for part in parts for i in part) == list(range(12))
    assert all(sum(lengths[i] for i in part) <= 40 for part in parts)
    assert micro_batches([3], {3: 99}, tokens=40) == [[3]]


class Line:
    """A learner for the loop (`training.loop.Learner`) that fits a line to noisy points."""

    name = "line"

    def __init__(self):
        torch.manual_seed(0)
        self.module = torch.nn.Linear(3, 1)
        self.weights = list(self.module.parameters())
        self.steps: list[int] = []

    def gradients(self, step: int, parts: list[list[int]], rows: int) -> torch.Tensor:
        self.steps.append(step)
        generator = torch.Generator().manual_seed(step)
        sums = torch.zeros(1)
        for _ in parts:
            x = torch.randn(8, 3, generator=generator)
            loss = (self.module(x)[:, 0] - x.sum(1)).pow(2).sum()
            (loss / rows).backward()
            sums += loss.detach()
        return sums

    def record(self, means: torch.Tensor) -> dict:
        return {"loss": means.item()}

    def progress(self, record: dict) -> str:
        return f"loss {record['loss']:.2f}"

    def check(self) -> list[float]:
        return [0.5]


@pytest.fixture
def accelerator():
    """An Accelerator of this test alone: its state is global, and commands set it otherwise."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def train_line(folder, store, accelerator, steps: int, stop_after: int | None = None) -> tuple[Line, RunFolder]:
    """Train for `steps` steps. With stop_after, training is interrupted in the step after so many."""
    folder.mkdir(exist_ok=True)
    learner, run = Line(), RunFolder(folder, {"steps": steps}, resume=True, main=True)
    gradients = learner.gradients

    def interrupted(step: int, *rest) -> torch.Tensor:
        if step == stop_after:
            raise KeyboardInterrupt
        return gradients(step, *rest)

    learner.gradients = interrupted
    plan = [[2 * i, 2 * i + 1] for i in range(steps)]
    train(learner, store, plan, run, accelerator, learning_rate=0.1, micro_batch=20, save_every=3)
    return learner, run


def test_an_interrupted_loop_continues_from_its_checkpoint_to_the_same_weights(tmp_path, accelerator):
    _, store = bank_and_store("carry", tmp_path)
    whole, run = train_line(tmp_path / "whole", store, accelerator, steps=10)
    with pytest.raises(KeyboardInterrupt):
        train_line(tmp_path / "torn", store, accelerator, steps=10, stop_after=8)
    continued, again = train_line(tmp_path / "torn", store, accelerator, steps=10)
    assert whole.steps == list(range(10)) and continued.steps == [6, 7, 8, 9], "after step 6 there is a checkpoint"
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, continued.weights))
    assert run.records() == again.records(), "the log is that of one run"
    losses = [record["loss"] for record in run.records() if "loss" in record]
    assert len(losses) == 10 and losses[-1] < 0.5 * losses[0]
    assert [record["step"] for record in run.records() if "held_out_agreement" in record] == [3, 6, 9, 10]


def test_the_loop_stops_with_a_checkpoint_when_its_time_is_over(tmp_path, accelerator):
    _, store = bank_and_store("carry", tmp_path)
    learner, run = Line(), RunFolder(tmp_path, {}, resume=True, main=True)
    steps = train(learner, store, [[0], [1]], run, accelerator, learning_rate=0.1, micro_batch=20,
                  save_every=9, minutes=0)
    assert steps == 0 and learner.steps == []
    assert RunFolder(tmp_path, {}, resume=True, main=True).restore({"line": Line().module}) == 0
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_plan_is_cut_to_the_steps_that_fit_and_stays_cut_after_a_kill(tmp_path, accelerator):
    _, store = bank_and_store("carry", tmp_path)

    def fit(folder, steps: int, minutes: float, save_every: int = 3) -> tuple[Line, RunFolder, int]:
        folder.mkdir(exist_ok=True)
        learner, run = Line(), RunFolder(folder, {}, resume=True, main=True)
        plan = [[i % 20] for i in range(steps)]
        return learner, run, train(learner, store, plan, run, accelerator, learning_rate=0.1, micro_batch=20,
                                   save_every=save_every, fit_minutes=minutes)

    learner, run, steps = fit(tmp_path / "short", 500, minutes=1e-9)
    assert steps == 6 and learner.steps == list(range(6)), "the first five were timed; then one more, at least"
    rates = [record["lr"] for record in run.records() if "lr" in record]
    assert rates[-1] == pytest.approx(0, abs=1e-9) and "held_out_agreement" in run.records()[-1]
    again, _, steps = fit(tmp_path / "short", 500, minutes=60)
    assert steps == 6 and again.steps == [], "the checkpoint knows that these steps were all"
    assert fit(tmp_path / "long", 8, minutes=60)[2] == 8, "never more than planned"


def test_a_checkpoint_of_other_settings_is_refused_unless_the_run_starts_again(tmp_path):
    RunFolder(tmp_path, {"lr": 1}, resume=True, main=True).save(3, {"line": Line().module})
    with pytest.raises(SystemExit, match=r"other settings, \(old, new\): {'lr': \(1, 2\)}"):
        RunFolder(tmp_path, {"lr": 2}, resume=True, main=True)
    assert RunFolder(tmp_path, {"lr": 2}, resume=False, main=True).restore({"line": Line().module}) == 0


def test_rows_of_an_interrupted_measurement_count_if_they_have_the_same_key(tmp_path):
    path, key = tmp_path / "new" / "rows.jsonl", {"exits": "a", "thresholds": [0.5, None]}
    first = ResumableRows(path, key)
    first.append({"prompt": 1})
    first.append({"prompt": 2})
    path.write_text(path.read_text() + '{"key": {"exits": "a"')          # cut off by a kill
    again = ResumableRows(path, key)
    assert again.rows == first.rows == [{"prompt": 1}, {"prompt": 2}]
    again.append({"prompt": 3})
    assert ResumableRows(path, key).rows == [{"prompt": 1}, {"prompt": 2}, {"prompt": 3}]
    assert ResumableRows(path, key | {"exits": "b"}).rows == []
    again.finish()
    assert not path.exists()


@pytest.mark.parametrize("text, layers", [("8,16,22", (8, 16, 22)), ("0.3,0.57,0.8", (9, 17, 24)),
                                          (None, (0, 9, 17, 24))])
def test_exits_are_given_as_layers_or_shares_of_the_depth(text, layers):
    assert exit_layers(text, 30) == layers
    with pytest.raises(ValueError, match="--exits takes"):
        exit_layers("deep", 30)


def test_shards_are_read_as_written_and_equal_documents_count_once(tmp_path):
    documents = [Document([1, 2, 3], [0, 1, 1], 7), Document([4, 5], [0, 1], 25), Document([1, 2, 3], [0, 1, 1], 7)]
    save_shard(tmp_path / "shard-00000.safetensors", documents)
    assert load_documents([tmp_path]) == documents[:2]
    with pytest.raises(FileNotFoundError, match="training.data"):
        load_documents([tmp_path / "elsewhere"])


def test_a_folder_with_shards_of_other_settings_is_refused(tmp_path):
    save_json(tmp_path / "provenance.json", {"settings": {"seed": 1, "batch": 8}})
    check_settings(tmp_path, {"seed": 2, "batch": 8})               # no shard was written yet
    (tmp_path / "shard-00000.safetensors").touch()
    check_settings(tmp_path, {"seed": 1, "batch": 8})
    with pytest.raises(ValueError, match=r"other settings, \(old, new\): {'seed': \(1, 2\)}"):
        check_settings(tmp_path, {"seed": 2, "batch": 8})


def test_of_25_documents_one_tests_two_calibrate_and_22_train():
    splits = [Document(key=key).split for key in range(2500)]
    assert [splits.count(s) for s in Split] == [2200, 200, 100]


class Template:
    """A stand-in for a chat template: opening 1, closing 2 (the end of a turn) and 3."""

    opening, closing = [1], [2, 3]

    def encode(self, text: str) -> list[int]:
        return list(map(int, text.split()))

    def prompt(self, turn: str) -> list[int]:
        return [1, *self.encode(turn), 2, 3]


def new_lane(prompts: list[str] = (), texts: list[str] = (), plain_share: float = 0.0) -> Lane:
    return Lane(Sources(Template(), list(prompts), list(texts), own_share=0.0, plain_share=plain_share, seed="0"))


def write(lane: Lane, choices: list[int]) -> list[int]:
    """Tokens of a lane when the model makes these choices, one a slot."""
    return [lane.next_token(token, token, frozenset([2]), slot) for slot, token in enumerate(choices)]


def test_a_lane_writes_its_prompt_and_then_the_models_choices():
    lane = new_lane(prompts=["40"])
    assert write(lane, [0, 0, 0, 0, 50, 51, 2]) == [1, 40, 2, 3, 50, 51, 2]


def test_a_lane_without_prompts_invents_the_users_turn_too(monkeypatch):
    monkeypatch.setattr(training.policy, "MIN_TOKENS", 1)
    lane = new_lane()
    assert write(lane, [0, 41, 2, 0, 50, 2, 0, 42]) == [1, 41, 2, 3, 50, 2, 1, 42]
    ((start, document),) = lane.finished
    assert start == 0 and document.ids == [1, 41, 2, 3, 50, 2] and document.chosen == [0, 1, 1, 0, 1, 1]
    assert lane.start == 6


def test_a_lane_continues_the_first_words_of_a_passage_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(training.policy, "MIN_TOKENS", 1)
    monkeypatch.setattr(training.policy, "MAX_CONTINUATION", 3)
    lane = new_lane(texts=[" ".join(["30"] * 60)], plain_share=1.0)
    read = len(lane.forced)
    assert 8 <= read <= 48
    assert write(lane, [0] * read + [50, 51, 52, 0]) == [30] * read + [50, 51, 52, 1]
    assert lane.finished[0][1].key == key_of(" ".join(["30"] * 60))


@pytest.mark.parametrize("native", [True, False])
def test_features_kept_while_writing_are_those_of_reading_the_text_again(tmp_path, monkeypatch, native):
    monkeypatch.setattr(training.policy, "MIN_TOKENS", 4)
    engine = tiny_engine("qwen3", dtype=torch.bfloat16 if native else torch.float32)
    torch.manual_seed(0)
    lanes = [new_lane(prompts=["40 5", "7"]), new_lane(prompts=["9 9 9"]), new_lane()]
    documents, features = write_round(engine.model, lanes, 40, 1.0, tqdm(disable=True), keep=True)
    assert len(documents) == len(features) >= 3
    again = FeatureStore(engine.model, documents, tmp_path / "again", 1.0)
    kept = FeatureStore(engine.model, documents, tmp_path / "kept", 1.0)
    again.prepare()
    kept.put(features)
    again.open()
    kept.open()
    for i, document in enumerate(documents):
        a, b = kept[i], again[i]
        assert torch.equal(a.ids, b.ids) and a.ids.tolist() == document.ids and torch.equal(a.wanted, b.wanted)
        for name in ("exits", "top"):
            ours, theirs = getattr(a, name).float(), getattr(b, name).float()
            assert (ours - theirs).abs().mean() < (0.03 if native else 1e-5) * theirs.abs().mean()
        assert (a.choices == b.choices).float().mean() > (0.8 if native else 0.99)


@pytest.mark.parametrize("max_chain", [1, 3])
def test_carried_states_in_training_are_those_of_chains_of_an_exit(tmp_path, max_chain):
    """Each carried state is the full model's, or that of 1 to `max_chain` tokens of the exit in a row; all occur."""
    bank, store = bank_and_store("carry", tmp_path)
    bank.prepare(store.model)
    f, found = store[0], set()
    h, full, rows = f.exits.float(), carried_states(f.top).float(), f.wanted.nonzero()[:, 0]
    inputs = AdapterInputs(bank, store, range(20), torch.ones(32))
    for seed in range(6):
        carried = mixed_carried_states(bank, inputs, h, full, torch.arange(len(f.ids)), rows, 0.8, [1],
                                       torch.Generator().manual_seed(seed), max_chain)
        for row, got in zip(rows.tolist(), carried):
            chains = [full[row]]
            for length in range(1, min(max_chain, row) + 1):
                state = full[row - length]
                for at in range(row - length, row):
                    state = bank.adapters[1](*inputs(1, h[at:at + 1, 1], state.view(1, -1)))
                chains.append(state.view(-1))
            near = [n for n, state in enumerate(chains) if torch.allclose(got, state, atol=1e-4)]
            assert near, row
            found.add(near[0])
    assert found == set(range(max_chain + 1))


def test_a_chat_template_is_split_around_the_users_turn():
    class Tokenizer:
        chat_template = "<turn>reply:"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"<{messages[0]['content']}>reply:"

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) for c in text]}

    template = ChatTemplate(Tokenizer())
    assert "".join(map(chr, template.prompt("hi"))) == "<hi>reply:"


def test_calibration_error_and_auroc_equal_values_computed_by_hand():
    right = torch.tensor([True] * 50 + [False] * 50)
    assert expected_calibration_error(torch.full((100,), 0.5), torch.tensor([True, False] * 50), bins=1) == 0
    assert expected_calibration_error(torch.ones(100), right, bins=1) == pytest.approx(0.5)
    assert auroc(torch.cat([torch.ones(50), torch.zeros(50)]), right) == 1.0
    assert auroc(torch.zeros(100), right) == 0.5
    assert auroc(torch.tensor([0.9, 0.2, 0.5]), torch.tensor([True, True, False])) == 0.5


def test_platt_scaling_finds_the_slope_and_shift_that_made_the_labels():
    torch.manual_seed(0)
    score = torch.randn(20_000)
    right = torch.rand(20_000) < (2.0 * score - 1.0).sigmoid()
    assert platt(score, right) == pytest.approx((2.0, -1.0), abs=0.1)


def test_rows_of_wikitext_are_joined_to_articles_and_other_rows_are_documents(tmp_path):
    pytest.importorskip("datasets")
    lines = [" = First = ", " One . ", " = = Part = = ", " Two . ", " = Second = ", " Three . "]
    for name in ("wikitext-tiny", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    args = argparse.Namespace(dataset_config=None, dataset_split="train")
    args.dataset = str(tmp_path / "wikitext-tiny")
    assert list(training.data.read_dataset(args)) == ["".join(lines[:4]), "".join(lines[4:])]
    args.dataset = str(tmp_path / "notes")
    assert list(training.data.read_dataset(args)) == lines


@pytest.mark.parametrize("argument, shown", [
    ("../elsewhere/texts/test.txt", "texts/test.txt"), ("/home/me/run", "me/run"), ("data/policy", "data/policy"),
    ("--epochs", "--epochs"), ("a note / of words", "'a note / of words'")])
def test_provenance_shortens_private_paths(argument, shown, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", argument])
    assert provenance()["command"].split(" ", 1)[1].endswith(shown)
    assert "/home" not in provenance()["command"] and "elsewhere" not in provenance()["command"]


@pytest.mark.parametrize("command", ["distill", "drafter", "data policy", "data text", "confidence", "calibrate",
                                     "defaults", "join", "evaluate exits", "evaluate decode", "evaluate lossless",
                                     "baselines", "benchmark", "gpu", "quick", "visitors"])
def test_every_option_is_explained(command, monkeypatch, capsys):
    declared, add = {}, argparse.ArgumentParser.add_argument

    def add_and_note(parser, *names, **options):
        declared[names[-1]] = options.get("help")
        return add(parser, *names, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add_and_note)
    module, *rest = command.split()
    monkeypatch.setattr(sys, "argv", [module, *rest, "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"training.{module}").main()
    assert stopped.value.code == 0 and f"usage: {command}" in capsys.readouterr().out
    assert len(declared) > 1 and all(declared.values()), declared


@pytest.mark.filterwarnings("ignore:'training:RuntimeWarning")       # runpy: the module was imported before
@pytest.mark.parametrize("line, message", [
    ("benchmark --model {empty}", "config.json"),
    ("benchmark --dtype float16", "float16 is for GPUs"),
    ("evaluate decode --exits {empty}", "give --out FILE"),
    ("baselines --model {empty}", "give --out FILE"),
    ("defaults --exits {empty}", "give --out FILE"),
    ("evaluate decode --model {empty} --out {empty}/d.json", "config.json"),
    ("evaluate exits --data {empty}", "no shard-*.safetensors"),
    ("data policy --model {empty} --out {empty}", "config.json"),
    ("distill --preset smollm2-135m-instruct --data {empty} --out {empty}", "no shard-*.safetensors"),
    ("confidence --exits {empty} --data {empty}", "no config.json"),
    ("drafter --exits assets/exits/smollm2-135m-instruct-swiglu --data {empty} --out {empty}", "from a 'carry' exit"),
    ("join {empty} --out {empty}", "no config.json"),
    ("baselines --exits {empty} --out {empty}/b.json", "config.json and exits.safetensors missing"),
])
def test_wrong_input_gives_a_message_of_one_line(line, message, tmp_path, monkeypatch):
    if torch.cuda.is_available() and "float16" in line:
        pytest.skip("GPUs take float16")
    module, *arguments = line.format(empty=tmp_path).split()
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"training.{module}", run_name="__main__")
    assert stopped.value.code.startswith(f"{module}: ") and message in stopped.value.code
    assert "\n" not in stopped.value.code
