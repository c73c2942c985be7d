"""`model.generate(custom_generate=cascadeexit.generate)` gives the text of transformers and honours its options."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, dynamic_module_utils
from transformers.generation import utils

import cascadeexit
from cascadeexit.custom_generate import export
from tests.tiny_models import IDS, tiny_base

PROMPT = torch.tensor([IDS])
GREEDY = dict(do_sample=False, max_new_tokens=16)


def ours(model, prompt=PROMPT, **options):
    return model.generate(prompt, custom_generate=cascadeexit.generate, **GREEDY | options)


class Collected:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        self.ended = True


class StopAt(StoppingCriteria):
    """Stops when the text has this many tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_the_text_is_that_of_transformers(family):
    model = tiny_base(family)
    expected = model.generate(PROMPT, **GREEDY)
    assert len(expected[0]) > len(IDS) + 4, "a text of some length is compared"
    for mode in ("verified", "full"):
        assert torch.equal(ours(model, mode=mode), expected), mode


def test_a_model_keeps_its_engine_between_calls():
    model = tiny_base()
    ours(model)
    kept = model._cascadeexit[1]
    ours(model, mode="cascade", thresholds=0.0)
    assert model._cascadeexit[1] is kept


def test_a_streamer_gets_prompt_and_tokens():
    streamer = Collected()
    sequence = tiny_base().generate(PROMPT, **GREEDY, streamer=streamer,
                                    custom_generate=partial(cascadeexit.generate, streamer=streamer))
    assert streamer.tokens == sequence[0].tolist() and streamer.ended


def test_stopping_criteria_and_end_of_sequence_tokens_end_the_text():
    model = tiny_base()
    whole = ours(model)[0].tolist()
    assert ours(model, stopping_criteria=[StopAt(len(IDS) + 3)])[0].tolist() == whole[:len(IDS) + 3]
    end = whole[len(IDS) + 4]
    expected = model.generate(PROMPT, **GREEDY, eos_token_id=end)
    assert torch.equal(ours(model, eos_token_id=end), expected) and expected[0, -1] == end


def test_a_dictionary_is_returned_on_request():
    model = tiny_base()
    assert torch.equal(ours(model, return_dict_in_generate=True).sequences, ours(model))


def test_sampling_repeats_with_its_seed():
    model, sampling = tiny_base(), dict(do_sample=True, top_k=0, temperature=0.8, top_p=0.9)
    first, again, other = (ours(model, **sampling, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("options, message", [
    (dict(num_return_sequences=2, do_sample=True, top_k=0), "one sequence, got 2"),
    (dict(attention_mask=torch.tensor([[0] + [1] * (len(IDS) - 1)])), "attention_mask must be all ones"),
    (dict(repetition_penalty=1.5), "got RepetitionPenaltyLogitsProcessor"),
    (dict(do_sample=True, top_k=5), "got TopKLogitsWarper"),
    (dict(return_dict_in_generate=True, output_scores=True), "got output_scores=True"),
    (dict(mode="fast"), "mode must be one of"),
])
def test_what_the_engine_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ours(tiny_base(), **options)


def test_a_filled_cache_is_refused():
    model, cache = tiny_base(), DynamicCache()
    model(PROMPT[:, :4], cache=cache)
    with pytest.raises(ValueError, match="cache must be empty, got 4 positions"):
        ours(model, cache=cache)


def test_an_exported_repository_decodes_streams_and_takes_options(tmp_path, monkeypatch):
    export(tmp_path / "repository")
    # transformers copies the code to its own cache of modules, and compares requirements with installed packages.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(utils, "check_python_requirements", lambda *args, **options: None)
    model, streamer = tiny_base(), Collected()
    options = dict(custom_generate=str(tmp_path / "repository"), trust_remote_code=True, **GREEDY)
    assert torch.equal(model.generate(PROMPT, streamer=streamer, **options), ours(model))
    assert streamer.tokens == ours(model)[0].tolist() and streamer.ended
    cascade = dict(mode="cascade", thresholds=0.0)
    assert torch.equal(model.generate(PROMPT, **options, **cascade), ours(model, **cascade))
