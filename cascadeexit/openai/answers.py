"""Answers: written texts in the JSON shapes of OpenAI's API, whole or in chunks.

Each answer also has `timings`, in the shape of llama.cpp's server, with the share of the tokens that each exit wrote.
"""

import time
import uuid
from collections.abc import Sequence

from cascadeexit import metrics
from cascadeexit.events import Status
from cascadeexit.openai.requests import ChatRequest, CompletionRequest, Request
from cascadeexit.openai.writing import Written
from cascadeexit.text import TextDecoder, token_bytes


class Answer:
    """Makes the JSON objects of one answer, as dicts: `whole`, or the chunks of a stream.

    The shapes are OpenAI's. A stream has, for each text, `opening`, `piece` many times and `ending`. `totals` is last.

    Args:
        request: the request that is answered.
        num_segments: number of exits, plus one for the full model.
    """

    prefix = kind = chunk_kind = ""

    def __init__(self, request: Request, tokenizer, num_segments: int):
        self.request, self._tokenizer, self._num_segments = request, tokenizer, num_segments
        self._head = dict(id=f"{self.prefix}-{uuid.uuid4().hex}", created=int(time.time()), model=request.model)

    def whole(self, texts: Sequence[Written]) -> dict:
        """Return the whole answer, with all texts of the request."""
        return self._head | dict(object=self.kind, choices=[self._choice(i, text) for i, text in enumerate(texts)],
                                 usage=usage(texts), timings=timings(texts, self._num_segments))

    def opening(self, i: int, echo: str) -> dict:
        """Return the chunk before the pieces of text number i.

        echo: the prompt, if the answer repeats it; else "".
        """
        return self._chunk(self._part(i, echo, first=True))

    def piece(self, i: int, piece: str) -> dict:
        """Return the chunk with one piece of text i."""
        return self._chunk(self._part(i, piece))

    def ending(self, i: int, text: Written) -> dict:
        """Return the chunk after the last piece of text i. It has the log probabilities of all its tokens."""
        return self._chunk(self._part(i, "") | self._end(text)) | dict(timings=timings([text], self._num_segments))

    def totals(self, texts: Sequence[Written]) -> dict:
        """Return the last chunk of a stream, with the token counts. It is sent if the request has `include_usage`."""
        return self._head | dict(object=self.chunk_kind, choices=[], usage=usage(texts),
                                 timings=timings(texts, self._num_segments))

    def _chunk(self, choice: dict) -> dict:
        empty = dict(usage=None) if self.request.stream_options.include_usage else {}
        return self._head | dict(object=self.chunk_kind, choices=[choice]) | empty

    def _end(self, text: Written) -> dict:
        return dict(logprobs=self._logprobs(text) if text.scores else None, finish_reason=text.finish)

    def _choice(self, i: int, text: Written) -> dict:
        raise NotImplementedError

    def _part(self, i: int, piece: str, first: bool = False) -> dict:
        raise NotImplementedError

    def _logprobs(self, text: Written) -> dict:
        raise NotImplementedError


class ChatAnswer(Answer):
    """Answer of /v1/chat/completions."""

    request: ChatRequest
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, i: int, text: Written) -> dict:
        return dict(index=i, message=dict(role="assistant", content=text.text, refusal=None)) | self._end(text)

    def _part(self, i: int, piece: str, first: bool = False) -> dict:
        delta = dict(role="assistant", content="") if first else dict(content=piece) if piece else {}
        return dict(index=i, delta=delta, logprobs=None, finish_reason=None)

    def _logprobs(self, text: Written) -> dict:
        scores, most = text.scores, self.request.top_logprobs
        rows = zip(text.token_ids, scores.logprobs, scores.top_ids, scores.top_logprobs, strict=True)
        return dict(content=[
            self._token(token, logprob) | dict(top_logprobs=list(map(self._token, ids[:most], logprobs)))
            for token, logprob, ids, logprobs in rows], refusal=None)

    def _token(self, token_id: int, logprob: float) -> dict:
        return dict(token=self._tokenizer.decode([token_id]), logprob=logprob,
                    bytes=list(token_bytes(self._tokenizer, token_id)))


class CompletionAnswer(Answer):
    """Answer of /v1/completions."""

    request: CompletionRequest
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, i: int, text: Written) -> dict:
        return dict(index=i, text=(text.job.echo or "") + text.text) | self._end(text)

    def _part(self, i: int, piece: str, first: bool = False) -> dict:
        return dict(index=i, text=piece, logprobs=None, finish_reason=None)

    def _logprobs(self, text: Written) -> dict:
        echoed = [] if text.job.echo is None else list(text.job.ids)
        scores, unscored = text.scores, [None] * bool(echoed)       # nothing comes before the first token of a prompt
        token_ids, logprobs = [*echoed, *text.token_ids], [*unscored, *scores.logprobs]
        tops = [*unscored, *map(self._top, token_ids[len(unscored):], scores.logprobs, scores.top_ids,
                                scores.top_logprobs)]
        return dict(tokens=[self._tokenizer.decode([token]) for token in token_ids], token_logprobs=logprobs,
                    top_logprobs=tops, text_offset=self._offsets(text, echoed))

    def _top(self, token_id: int, logprob: float, ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, float]:
        """Return {a token's text: its log probability} for the likeliest tokens and for the token in the text."""
        found = {}
        for token, value in [*list(zip(ids, logprobs))[:self.request.logprobs], (token_id, logprob)]:
            found.setdefault(self._tokenizer.decode([token]), value)    # of two tokens with one text, the likelier
        return found

    def _offsets(self, text: Written, echoed: Sequence[int]) -> list[int]:
        """Return for each token the index of its first character in the text of the answer."""
        special, decoder, ends = set(self._tokenizer.all_special_ids), TextDecoder(self._tokenizer), [0]
        for token in echoed:
            ends.append(ends[-1] + len(decoder.push(token)))
        # The tokenizer may put a token before a prompt that is sent as text.
        shift = len(text.job.echo or "") - ends[-1]
        ends, decoder = [max(0, end + shift) for end in ends], TextDecoder(self._tokenizer)
        for token in text.token_ids:
            ends.append(ends[-1] + (0 if token in special else len(decoder.push(token))))
        return ends[:-1]


def usage(texts: Sequence[Written]) -> dict:
    """Count the tokens of an answer. Returns the dict `usage` of OpenAI's API.

    Drafts that the full model accepted or rejected count as predictions.
    """
    read, written = (sum(map(len, parts)) for parts in ([t.job.ids for t in texts], [t.token_ids for t in texts]))
    return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written,
                completion_tokens_details=dict(accepted_prediction_tokens=_count(texts, Status.ACCEPTED),
                                               rejected_prediction_tokens=_count(texts, Status.REJECTED)))


def timings(texts: Sequence[Written], num_segments: int) -> dict:
    """Return the speed of an answer, as the dict `timings` of llama.cpp's server.

    The dict has two more entries, which are shares of the tokens. `routing_share` lists the share of each exit and,
    last, of the full model. `copied_share` is the share of n-gram lookup. Times are engine time; names that end in
    `_ms` are in milliseconds. The time of the prompt includes the first token, so `predicted_per_second` is the speed
    of the tokens after the first one, as in `metrics.tokens_per_second`.
    """
    finals = [final for text in texts if (final := [e for e in text.events if e.final])]
    prompt_n, predicted_n = sum(len(text.job.ids) for text in texts), sum(map(len, finals))
    prompt = sum(final[0].seconds for final in finals)
    decoding = sum(final[-1].seconds for final in finals) - prompt
    later, events = predicted_n - len(finals), [e for final in finals for e in final]
    return dict(prompt_n=prompt_n, prompt_ms=1000 * prompt, prompt_per_second=prompt_n / prompt if prompt else None,
                predicted_n=predicted_n, predicted_ms=1000 * decoding,
                predicted_per_token_ms=1000 * decoding / later if later else None,
                predicted_per_second=later / decoding if decoding else None,
                draft_n=_count(texts, Status.DRAFT), draft_n_accepted=_count(texts, Status.ACCEPTED),
                routing_share=metrics.routing_share(events, num_segments), copied_share=metrics.copied_share(events))


def _count(texts: Sequence[Written], status: Status) -> int:
    return sum(event.status is status for text in texts for event in text.events)
