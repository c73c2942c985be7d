"""Requests: the bodies that /v1/chat/completions and /v1/completions accept, checked by pydantic.

A field that is null counts as not sent. Fields that no class here names are ignored, such as `user`, `metadata` and
`store`. A field that asks for an unsupported change of the text is refused (`_UNSUPPORTED`).
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cascadeexit.config import DecodeConfig, Mode
from cascadeexit.prompts import MAX_PROMPT_CHARACTERS, MAX_PROMPTS
from cascadeexit.scoring import TOP
from cascadeexit.values import shown

DEFAULT_TOKENS, MAX_TOKENS = 1024, 4096     # new tokens of one text: of a chat that names no number, and of any
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000
MAX_MESSAGES = 1000

# Features that are not offered, and the values that do not ask for them.
_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "best_of": lambda value: value == 1,
    "tools": lambda value: value == [],
    "functions": lambda value: value == [],
    "response_format": lambda value: value == {"type": "text"},
    "modalities": lambda value: value == ["text"],
    "audio": lambda value: False,
    "suffix": lambda value: value == "",
    "logit_bias": lambda value: value == {},
    "presence_penalty": lambda value: value == 0,
    "frequency_penalty": lambda value: value == 0,
    "repetition_penalty": lambda value: value == 1,
    "top_k": lambda value: value in (0, -1),
    "min_p": lambda value: value == 0,
}


def _stops(value: Any) -> Any:
    """Turn the field `stop` into a list of texts."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"expected a text or a list of texts, none of them empty, got {shown(value)}")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"expected at most {MAX_STOPS} texts of at most {MAX_STOP_CHARACTERS:,} characters each, got "
                         "more or longer texts")
    return stops


def _content(value: Any) -> Any:
    """Turn the content of a message, a text or a list of text parts, into one text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"expected a text or a list of text parts, got {shown(value)}")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"expected only parts of the form {{'type': 'text', 'text': '...'}}, got {shown(kind)}: "
                             "this model reads text alone")
    return "".join(part["text"] for part in value)


def _prompts(value: Any) -> Any:
    """Turn the field `prompt` into a list of prompts; each is a text or a list of token ids."""
    prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not prompts or not all(isinstance(prompt, str) or _is_ids(prompt) for prompt in prompts):
        raise ValueError("expected a text, a list of token ids, or a list of these, none of them empty, got "
                         f"{shown(value)}")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"expected at most {MAX_PROMPTS} prompts, got {len(prompts):,}")
    longest = max(map(len, prompts))
    if longest > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"expected at most {MAX_PROMPT_CHARACTERS:,} characters or tokens, got {longest:,}")
    return prompts


def _is_ids(value: Any) -> bool:
    """Return True for a list of at least one token id. Integers beyond 64 bits are not accepted as token ids."""
    return isinstance(value, list) and bool(value) and all(type(i) is int and abs(i) < 2**63 for i in value)


class _Body(BaseModel):
    """A JSON object in which null means not sent, and no value is converted to another type."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class StreamOptions(_Body):
    """Options of a streamed answer. `include_usage`: send the token counts in a last chunk."""

    include_usage: bool = False


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]


class Request(_Body):
    """Fields that a `ChatRequest` and a `CompletionRequest` share. Most have the same meaning as in OpenAI's API.

    Five fields are our own: `mode`, `threshold`, `target_disagreement`, `tolerance` and `max_draft`. `DecodeConfig`
    explains these five. A client sends them beside the other fields (`extra_body` of the client `openai`).
    """

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    mode: Mode | None = None
    threshold: float | None = Field(None, ge=0, le=1)
    target_disagreement: float | None = Field(None, gt=0, lt=1)
    tolerance: float = Field(0.0, ge=0, lt=1)
    max_draft: int = Field(DecodeConfig.max_draft, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name, harmless in _UNSUPPORTED.items():
                value = values.get(name)
                if value is not None and not harmless(value):
                    raise ValueError(f"{name}: this server does not offer it, got {shown(value)}; leave it out")
        return values

    def config(self, mode: Mode, max_new_tokens: int, seed: int) -> DecodeConfig:
        """Return the settings for decoding. Raises ValueError for settings that contradict each other.

        Args:
            mode: mode of the run. The field `mode` of the request is not read here.
            max_new_tokens: largest number of new tokens.
            seed: seed that is used if the request has none.
        """
        if mode is not Mode.CASCADE and self.threshold is not None:
            raise ValueError(f"threshold goes with mode cascade, got mode {mode}")
        return DecodeConfig(mode=mode, max_new_tokens=max_new_tokens, max_draft=self.max_draft,
                            thresholds=self.threshold, target_disagreement=self.target_disagreement,
                            tolerance=self.tolerance, temperature=self.temperature, top_p=self.top_p,
                            seed=(seed if self.seed is None else self.seed) % 2**63)


class ChatRequest(Request):
    """Body of /v1/chat/completions."""

    echo: ClassVar[bool] = False
    messages: list[Message]
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=TOP)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise ValueError(f"messages: expected 1 to {MAX_MESSAGES:,} messages, got {len(self.messages):,}")
        characters = sum(len(message.content) for message in self.messages)
        if characters > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"messages: expected at most {MAX_PROMPT_CHARACTERS:,} characters in all, got "
                             f"{characters:,}")
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs: expected logprobs to be true as well, got top_logprobs "
                             f"{self.top_logprobs} without logprobs")
        return self

    @property
    def length(self) -> int | None:
        """Largest number of new tokens; None if the request does not limit it."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def scored(self) -> bool:
        """True if the answer has log probabilities."""
        return self.logprobs

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages as a chat template reads them, [{role, content}]. The role `developer` becomes `system`."""
        return [{"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in self.messages]


class CompletionRequest(Request):
    """Body of /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: int = Field(16, ge=0, le=MAX_TOKENS)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=TOP)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens: expected at least 1 unless echo is true, got 0")
        return self

    @property
    def length(self) -> int:
        """Largest number of new tokens."""
        return self.max_tokens

    @property
    def scored(self) -> bool:
        """True if the answer has log probabilities."""
        return self.logprobs is not None
