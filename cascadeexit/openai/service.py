"""Service: answers requests in the shape of OpenAI's API with the models of a runner, without the web server.

A model has four names: its own, which means mode `verified`, and its own with ":full", ":cascade" or ":verified".
"""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from pydantic import ValidationError

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.openai.answers import Answer, ChatAnswer, CompletionAnswer
from cascadeexit.openai.errors import ApiError, wrong_request
from cascadeexit.openai.requests import DEFAULT_TOKENS, ChatRequest, CompletionRequest, Request
from cascadeexit.openai.writing import Job, Written, write
from cascadeexit.prompts import conversation_ids
from cascadeexit.runner import Runner
from cascadeexit.text import TextDecoder
from cascadeexit.values import shown

MAX_OPEN = 20           # requests that run or wait
ANSWERS: dict[type[Request], type[Answer]] = {ChatRequest: ChatAnswer, CompletionRequest: CompletionAnswer}

Moment = None | Answer | tuple[int, Job | str | Written]


class Service:
    """Answers requests with the models of a runner. Its requests and the page's runs wait for each other."""

    def __init__(self, runner: Runner):
        self._runner, self._places = runner, threading.BoundedSemaphore(MAX_OPEN)
        self._began = int(time.time())
        self._names = {name: (label, mode) for label in runner.library.labels
                       for name, mode in [(label, Mode.VERIFIED), *((f"{label}:{mode}", mode) for mode in Mode)]}

    def models(self) -> dict:
        """List all names of models. Returns a dict {object: "list", data: [result of `model`]}."""
        return dict(object="list", data=list(map(self.model, self._names)))

    def model(self, name: str) -> dict:
        """Describe one model. Returns a dict {id, object, created, owned_by, root, mode}.

        `root` is the model's own name, and `mode` is the mode that `name` selects. Raises ApiError for an unknown name.
        """
        label, mode = self._named(name)
        return dict(id=name, object="model", created=self._began, owned_by="cascadeexit", root=label, mode=mode)

    def answer(self, kind: type[Request], body: bytes) -> Iterator[Moment]:
        """Answer a request. Closing this generator ends the run.

        Yields, in this order:
        - None several times, while the request waits and its model is loaded.
        - The `Answer`, when the request was checked.
        - For each prompt: (index of the prompt, its `Job`), then many times (index, piece of the text), then (index,
          `Written`).

        Args:
            kind: the shape of the request.
            body: the request as JSON.

        If the request cannot be answered, raises ApiError before the `Answer`. Later, raises the errors of `write`.
        """
        with self._place():
            try:
                request = kind.model_validate_json(body)
            except ValidationError as error:
                raise wrong_request(error) from None
            label, mode = self._named(request.model)
            if request.mode not in (None, mode) and request.model != label:
                raise ApiError(f"mode: expected {mode}, which the model's name {request.model} asks for, got "
                               f"{request.mode}", param="mode")
            yield None
            for _ in self._runner.load(label):
                yield None
            try:
                jobs = self._jobs(label, request.mode or mode, request)
            except ValueError as error:
                raise ApiError(str(error)) from None
            engine, tokenizer = self._runner.library.get(label)
            yield ANSWERS[kind](request, tokenizer, engine.num_exits + 1)
            for i, job in enumerate(jobs):
                yield i, job
                with closing(write(self._runner, label, job)) as moments:
                    for moment in moments:
                        yield i, moment

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Take one of the places for requests, for a `with` block. Raises ApiError if none is free."""
        if not self._places.acquire(blocking=False):
            raise ApiError(f"{MAX_OPEN} requests already run or wait here: try again later", 429,
                           kind="rate_limit_error", code="rate_limit_exceeded")
        try:
            yield
        finally:
            self._places.release()

    def _named(self, name: str) -> tuple[str, Mode]:
        """Return the library's label of a model, and the mode that its name stands for."""
        if name not in self._names:
            raise ApiError(f"model: expected a name that /v1/models lists, got {shown(name)}", 404, param="model",
                           code="model_not_found")
        return self._names[name]

    def _jobs(self, label: str, mode: Mode, request: Request) -> list[Job]:
        """Make a job for each prompt of a request. Raises ValueError if one cannot be done."""
        engine, tokenizer = self._runner.library.get(label)
        seed, jobs = secrets.randbelow(2**31), []
        for prompt in _prompts_of(request, tokenizer):
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            engine.model.check_prompt(ids)
            room = engine.model.max_positions - len(ids)
            if room < 1:
                raise ValueError(f"this prompt has {len(ids):,} tokens; {label} reads at most "
                                 f"{engine.model.max_positions - 1:,}")
            length = min(DEFAULT_TOKENS, room) if request.length is None else request.length
            config = request.config(mode, length, seed) if length else None
            engine.check(ids, config or DecodeConfig(mode=Mode.FULL, max_new_tokens=1))
            echo = None if not request.echo else prompt if isinstance(prompt, str) else _text_of(tokenizer, ids)
            jobs.append(Job(ids, config, request.stop, echo, request.scored))
        return jobs


def _prompts_of(request: Request, tokenizer) -> list[str | list[int]]:
    """Return the prompts of a request; each is a text or a list of token ids."""
    if isinstance(request, CompletionRequest):
        return request.prompt
    if not tokenizer.chat_template:
        raise ValueError(f"{request.model} has no chat template: use /v1/completions")
    return [conversation_ids(tokenizer, request.turns)]


def _text_of(tokenizer, ids: list[int]) -> str:
    decoder = TextDecoder(tokenizer)
    return "".join([*map(decoder.push, ids), decoder.flush()])
