"""litellm and lm-eval call the endpoint. They are large, so no requirement: `pip install litellm lm-eval[api]`."""

import pytest
import torch

from cascadeexit.config import DecodeConfig
from cascadeexit.openai.writing import StoppedText
from cascadeexit.prompts import conversation_ids
from tests.browser.server import serve
from tests.tiny_models import tiny_engine
from tests.tiny_text import tiny_tokenizer

pytestmark = pytest.mark.slow
TOKENIZER = tiny_tokenizer()
NAME = "llama-untied"
TURNS = [{"role": "user", "content": "hi there"}]


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(seed=3)


@pytest.fixture(scope="module")
def url(engine):
    with serve(engine, TOKENIZER) as url:
        yield f"{url}v1"


def written(engine, ids, tokens: int, stops=()) -> str:
    """The full model's text for a prompt, up to a stop text."""
    text = StoppedText(TOKENIZER, stops)
    for token in engine.run(ids, DecodeConfig(mode="full", max_new_tokens=tokens)).token_ids:
        if not text.stopped:
            text.push(token)
    text.flush()
    return text.text


def test_litellm(url, engine):
    litellm = pytest.importorskip("litellm")
    options = dict(model=f"openai/{NAME}", api_base=url, api_key="none", messages=TURNS, temperature=0, max_tokens=12)
    expected = written(engine, conversation_ids(TOKENIZER, TURNS), 12)
    answer = litellm.completion(**options)
    assert answer.choices[0].message.content == expected and answer.usage.completion_tokens == 12
    chunks = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    with pytest.raises(litellm.BadRequestError, match="does not offer it"):
        litellm.completion(**options | dict(tools=[{"type": "function", "function": {"name": "f"}}]))


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
    """lm-eval's models for local servers, by name, and the folder of the tokenizer that they load."""
    models = pytest.importorskip("lm_eval.models.openai_completions")
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return models, str(folder)


def requests(kind: str, *arguments):
    from lm_eval.api.instance import Instance
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


@pytest.mark.parametrize("tokenized", [True, False])
def test_lm_eval_scores_answers(url, engine, lm_eval, tokenized):
    models, folder = lm_eval
    lm = models.LocalCompletionsAPI(base_url=f"{url}/completions", model=NAME, tokenizer=folder,
                                    tokenizer_backend="huggingface", tokenized_requests=tokenized, max_retries=1)
    pairs = [("hi there", " ab"), ("hi there", "zz"), ("who", " yy")]
    for (context, answer), (logprob, greedy) in zip(pairs, lm.loglikelihood(requests("loglikelihood", *pairs))):
        ids, n = TOKENIZER(context + answer).input_ids, len(TOKENIZER(answer).input_ids)
        with torch.inference_mode():
            stairs, _ = engine.begin(ids[:1], len(ids))
            *_, rows = stairs.prefill(ids)
            truth = engine.model.head.logits(engine.model.layers.norm(rows))[0].log_softmax(-1)
        rows, tokens = truth[-n - 1:-1], torch.tensor(ids[-n:])
        assert logprob == pytest.approx(float(rows.gather(1, tokens[:, None]).sum()), abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == tokens).all())


def test_lm_eval_generates(url, engine, lm_eval):
    models, folder = lm_eval
    options = dict(until=["q", "K", "b", "c", "d", "zz"], max_gen_toks=20)
    lm = models.LocalCompletionsAPI(base_url=f"{url}/completions", model=NAME, tokenizer=folder, max_retries=1,
                                    tokenizer_backend="huggingface")
    found, = lm.generate_until(requests("generate_until", ("hi there", dict(options))))
    assert found == written(engine, TOKENIZER("hi there").input_ids, 20, options["until"])
    chat = models.LocalChatCompletion(base_url=f"{url}/chat/completions", model=NAME, max_retries=1)
    context = chat.apply_chat_template(TURNS)
    found, = chat.generate_until(requests("generate_until", (context, dict(options, until=["K"]))))
    assert found == written(engine, conversation_ids(TOKENIZER, TURNS), 20, ["K"])
