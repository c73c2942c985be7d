"""Training: losses have the reduction they name, splits never leak, and a run resumes where it was stopped."""

import math

import pytest
import torch

import training.data
from training.confidence import auroc, expected_calibration_error
from training.data import ChatTemplate, Document, Row, Sources, Split, load_documents, save_shard
from training.distill import exit_loss, frequent_tokens


def test_loss_is_summed_over_words_and_averaged_over_tokens():
    target = torch.tensor([[0.5, 0.25, 0.25]]).log()
    logits = torch.zeros(1, 3)
    kl, ce = exit_loss(logits, target, torch.tensor([0]), hard=1.0)
    assert kl.item() == pytest.approx(math.log(3) - 1.5 * math.log(2), abs=1e-6)
    assert ce.item() == pytest.approx(math.log(3), abs=1e-6)
    repeated = exit_loss(logits.expand(8, 3), target.expand(8, 3), torch.zeros(8, dtype=torch.long), hard=1.0)
    assert [t.item() for t in repeated] == pytest.approx([kl.item(), ce.item()])


def test_choices_outside_the_head_do_not_pull_on_the_hard_loss():
    logits = torch.randn(2, 3)
    target = torch.randn(2, 3).log_softmax(-1)
    with_unknown = exit_loss(logits, target, torch.tensor([1, -1]), hard=1.0)[1]
    alone = exit_loss(logits[:1], target[:1], torch.tensor([1]), hard=1.0)[1]
    torch.testing.assert_close(with_unknown, alone)


def test_the_trimmed_head_keeps_the_most_chosen_words_and_the_end():
    choices = torch.tensor([5, 5, 5, 9, 9, 2])
    assert frequent_tokens(choices, 12, 3, frozenset([11])).tolist() == [5, 9, 11]


def test_shards_come_back_and_equal_documents_count_once(tmp_path):
    documents = [Document([1, 2, 3], [0, 1, 1], 7), Document([4, 5], [0, 1], 25), Document([1, 2, 3], [0, 1, 1], 7)]
    save_shard(tmp_path / "shard-00000.safetensors", documents)
    assert load_documents([tmp_path]) == documents[:2]
    with pytest.raises(FileNotFoundError, match="training.data"):
        load_documents([tmp_path / "elsewhere"])


def test_splits_hold_one_two_and_twenty_two_of_twenty_five():
    splits = [Document(key=key).split for key in range(2500)]
    assert [splits.count(s) for s in Split] == [2200, 200, 100]


class Template:
    """Stands for a chat template: opening 1, closing 2 (the end of a turn) and 3."""

    opening, closing = [1], [2, 3]

    def encode(self, text: str) -> list[int]:
        return list(map(int, text.split()))

    def prompt(self, turn: str) -> list[int]:
        return [1, *self.encode(turn), 2, 3]


def lane(prompts: list[str] = (), texts: list[str] = (), plain_share: float = 0.0) -> Row:
    return Row(Sources(Template(), list(prompts), list(texts), own_share=0.0, plain_share=plain_share, seed="0"))


def speak(row: Row, said: list[int]) -> list[int]:
    return [row.next_token(token, token, frozenset([2]), slot) for slot, token in enumerate(said)]


def test_a_lane_given_a_prompt_speaks_it_and_then_its_own_words():
    row = lane(prompts=["40"])
    assert speak(row, [0, 0, 0, 0, 50, 51, 2]) == [1, 40, 2, 3, 50, 51, 2]


def test_a_lane_without_prompts_invents_the_users_turn_too(monkeypatch):
    monkeypatch.setattr(training.data, "MIN_TOKENS", 1)
    row = lane()
    assert speak(row, [0, 41, 2, 0, 50, 2, 0, 42]) == [1, 41, 2, 3, 50, 2, 1, 42]
    (document,) = row.finished
    assert document.ids == [1, 41, 2, 3, 50, 2] and document.chosen == [0, 1, 1, 0, 1, 1]
    assert row.start == 6


def test_a_lane_given_a_passage_reads_its_first_words_and_goes_on_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(training.data, "MIN_TOKENS", 1)
    monkeypatch.setattr(training.data, "MAX_CONTINUATION", 3)
    row = lane(texts=[" ".join(["30"] * 60)], plain_share=1.0)
    read = len(row.forced)
    assert 8 <= read <= 48
    assert speak(row, [0] * read + [50, 51, 52, 0]) == [30] * read + [50, 51, 52, 1]
    assert row.finished[0].key == training.data.key_of(" ".join(["30"] * 60))


def test_the_template_is_split_around_the_users_turn():
    class Tokenizer:
        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return f"<{messages[0]['content']}>reply:"

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) for c in text]}

    template = ChatTemplate(Tokenizer())
    assert "".join(map(chr, template.prompt("hi"))) == "<hi>reply:"


def test_calibration_error_and_auroc_on_cases_done_by_hand():
    right = torch.tensor([True] * 50 + [False] * 50)
    assert expected_calibration_error(torch.full((100,), 0.5), torch.tensor([True, False] * 50), bins=1) == 0
    assert expected_calibration_error(torch.ones(100), right, bins=1) == pytest.approx(0.5)
    assert auroc(torch.cat([torch.ones(50), torch.zeros(50)]), right) == 1.0
    assert auroc(torch.zeros(100), right) == 0.5
    assert auroc(torch.tensor([0.9, 0.2, 0.5]), torch.tensor([True, True, False])) == 0.5
