"""Exits: a small adapter and a confidence estimator behind each exit layer, and the artifact that holds them.

An adapter turns a hidden state into one that the frozen, shared head can read; it never sees the vocabulary. The
estimator says how likely that head's choice equals the full model's, from the hidden state alone, or from a sketch of
the head and what the text said before, so that the one vocabulary projection of a token is paid by the exit that is
taken. Artifact: config.json + exits.safetensors.

Two kinds of adapter. `swiglu`, the published one, reads the hidden state at its layer. `carry` reads beside it the
hidden state that named the newest token: the full model's, or the adapted one of the exit that token left by. It is
at hand in every decoder, and it holds what the deep layers understood of the text one token ago.

Letters: N rows, D hidden size, V vocabulary, K words of a trimmed head.
"""

import ctypes
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascadeexit.calibration import Calibration
from cascadeexit.graphs import Replayed
from cascadeexit.kernels import (
    NativeAdapter,
    NativeConfidence,
    NativeContext,
    NativeDrafter,
    NativeLinear,
    NativeScreen,
)
from cascadeexit.linear import PackedLinear, pack
from cascadeexit.model import SegmentedModel
from cascadeexit.sampling import argmax
from cascadeexit.states import Hidden, tensor_of

Context = Tensor | ctypes.Array     # of a drafter: (1, D), or as our own kernels hand it on, D numbers in fp32

log = logging.getLogger(__name__)
CONFIG_FILE, WEIGHTS_FILE = "config.json", "exits.safetensors"
_FORMAT = 3


@dataclass(frozen=True)
class ExitConfig:
    """What is saved beside the weights: the shape of the exits and the model they belong to."""

    base_model: str
    """Short name of the base model."""
    hidden_size: int
    num_layers: int
    """Layers of the base model."""
    vocab_size: int
    layers: tuple[int, ...]
    """Layers after which an exit sits; 0 is before the first."""
    adapter: str = "swiglu"
    """'swiglu', as published, or 'carry'."""
    width: int = 512
    """Inner width of the adapter's SwiGLU; 512 as published."""
    confidence_width: int = 256
    """Inner width of the estimator; 256 as published, 48 for a sketch."""
    confidence: str = "mlp"
    """'mlp': the published estimator. 'sketch': from the exit's probabilities of its most frequent words, and what the
    text said before. 'softmax': the largest probability of the exit's whole head, for untrained exits."""
    sketch_size: int = 0
    """'sketch': how many words."""
    head_size: int = 0
    """Words in the exits' trimmed head, the most frequent first; 0 = the whole vocabulary."""
    head_sizes: tuple[int, ...] = ()
    """How many of these, the first ones, each exit reads; () = all. Deep exits know rare words, shallow ones do not."""
    draft_size: int = 0
    """The first words of the trimmed head, its most frequent ones, from which trees of drafts are made; 0 = those of
    the first exit, which makes them."""
    drafter_width: int = 0
    """Inner width of a `Drafter`; 0 = the exit before the first layer makes the drafts."""
    norm_eps: float = 1e-5
    head_fingerprint: str = ""
    """SHA-256 of the base model's head, or '' when unknown."""
    trained: bool = False
    format: int = _FORMAT

    def __post_init__(self):
        for name in ("layers", "head_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter must be one of {', '.join(ADAPTERS)}, got '{self.adapter}'")
        if self.confidence not in ("mlp", "sketch", "softmax"):
            raise ValueError(f"confidence must be 'mlp', 'sketch' or 'softmax', got '{self.confidence}'")
        if (self.confidence == "sketch") != (self.sketch_size > 0):
            raise ValueError(f"sketch_size goes with confidence 'sketch', got {self.sketch_size} with "
                             f"'{self.confidence}'")
        if self.head_size > self.vocab_size:
            raise ValueError(f"head_size is at most the vocabulary, {self.vocab_size}; got {self.head_size}")
        if self.head_sizes and (len(self.head_sizes) != len(self.layers) or max(self.head_sizes) != self.head_size
                                or any(n < 1 or n % 32 and n != self.head_size for n in self.head_sizes)):
            raise ValueError(f"head_sizes are one for each of {len(self.layers)} exits, multiples of 32 up to "
                             f"head_size, {self.head_size}; got {self.head_sizes}")
        if not 0 <= self.draft_size <= self.head_size or self.draft_size % 32 or self.draft_size > self.words(0):
            raise ValueError("draft_size is a multiple of 32 within a trimmed head and the first exit's part of it, "
                             f"{self.words(0) if self.head_size else 0}; got {self.draft_size}")
        if self.drafter_width and (self.layers[:1] != (0,) or len(self.layers) < 2):
            raise ValueError(f"a drafter wants an exit before the first layer and one deeper, got {self.layers}")
        if not all(a < b for a, b in zip((-1, *self.layers), (*self.layers, self.num_layers), strict=True)):
            raise ValueError(f"exit layers must ascend within 0..{self.num_layers - 1}, got {self.layers}")
        if self.format != _FORMAT:
            raise ValueError(f"these exits have format {self.format}; this version reads format {_FORMAT}: train them "
                             "anew with training/run.sh, or use the version that made them")

    def words(self, s: int) -> int:
        """How many words exit s chooses from."""
        return self.head_sizes[s] if self.head_sizes else self.head_size or self.vocab_size


class ExitAdapter(nn.Module):
    """h + up(silu(gate h) * down h), then a norm of its own: (..., D) -> (..., D), ready for the shared head."""

    def __init__(self, hidden_size: int, width: int, norm_eps: float):
        super().__init__()
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        # Identity at the start: training begins at the logit lens, and decay pulls towards it, not towards zero.
        nn.init.zeros_(self.up.weight)

    straight = None         # its linear part is the identity

    def forward(self, h: Tensor, said: Tensor) -> Tensor:
        return self.norm(h + self.up(nn.functional.silu(self.gate(h)) * self.down(h)))

    @torch.no_grad()
    def rescale(self, h: float, said: float) -> None:
        """Make it do for h * x what it does for x now; its norm cancels the scale of the sum."""
        for weight, factor in ((self.gate, 1 / h), (self.down, 1 / h), (self.up, h)):
            weight.weight.mul_(factor)


class CarryAdapter(nn.Module):
    """linear x + up(silu(gate x) * down x) of x = [h, said], then a norm: (..., D), (..., D) -> (..., D).

    `said` is the hidden state that named the newest token, ready for the head as this adapter's own output is. The
    idea of handing the last deep state on is EAGLE's (Li et al. 2024); here it meets the newest token's own layers.
    """

    def __init__(self, hidden_size: int, width: int, norm_eps: float):
        super().__init__()
        self.linear = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(2 * hidden_size, width, bias=False)
        self.down = nn.Linear(2 * hidden_size, width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        nn.init.zeros_(self.up.weight)                                          # the logit lens at the start
        self.linear.weight.data.copy_(torch.eye(hidden_size, 2 * hidden_size))

    @property
    def straight(self) -> Tensor:
        return self.linear.weight

    def forward(self, h: Tensor, said: Tensor) -> Tensor:
        x = torch.cat([h, said], dim=-1)
        return self.norm(self.linear(x) + self.up(nn.functional.silu(self.gate(x)) * self.down(x)))

    @torch.no_grad()
    def rescale(self, h: float, said: float) -> None:
        """Make it do for h * x and said * y what it does for x and y now."""
        for projection in (self.linear, self.gate, self.down):
            left, right = projection.weight.chunk(2, dim=1)
            left.div_(h)
            right.div_(said)


ADAPTERS = {"swiglu": ExitAdapter, "carry": CarryAdapter}


class Drafter(nn.Module):
    """Drafts whole chains from one reading of the deep layers: (..., D) embeddings, (..., D), (..., D) -> (..., D).

    A `carry` adapter before the first layer that also reads a context: what the layers at the other exits made of the
    newest token that is certain, (..., E D) of E such exits, one for all drafts of a pass. That several depths tell
    more of the tokens after the next one than the last does is EAGLE-3's finding (Li et al. 2025).
    """

    def __init__(self, hidden_size: int, width: int, states: int, norm_eps: float):
        super().__init__()
        self.adapter = CarryAdapter(hidden_size, width, norm_eps)
        self.context = nn.Linear(states * hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.context.weight)

    def forward(self, h: Tensor, said: Tensor, context: Tensor) -> Tensor:
        return self.adapter(h, said + context)


class ConfidenceHead(nn.Module):
    """Will this exit's choice equal the full model's? Adapted hidden (..., D) -> logit (...,), always in fp32."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = nn.functional.silu(self.inner(hidden.to(self.inner.weight.dtype)))
        return self.outer(inner).squeeze(-1).float()

    def chance(self, hidden: Tensor) -> Tensor:
        """The same as a probability."""
        return self(hidden).sigmoid()


class SketchConfidence(nn.Module):
    """The same question, answered from the exit's softmax over a few frequent words (`softmax_facts`).

    What followed where the text said the same before is read, too, and what the exit before it thought, where that
    was asked about the same token: those that agree are more often right. (..., 5), or (..., 12) with the exit before
    -> logit (...,).
    """

    def __init__(self, width: int):
        super().__init__()
        self.alone, self.after = (nn.Sequential(nn.Linear(n, width), nn.SiLU(), nn.Linear(width, 1)) for n in (5, 12))

    def forward(self, facts: Tensor) -> Tensor:
        return (self.alone if facts.shape[-1] == 5 else self.after)(facts).squeeze(-1)


def softmax_facts(head: nn.Module) -> Callable[..., Tensor]:
    """What `SketchConfidence` reads, from rows for this head (..., D) and copies (..., 2): (..., 5), or (..., 12).

    Of the softmax: log p of the likeliest word, of the second, the entropy in nats. With the rows of the exit before:
    these three of both; 1 where the likeliest word is the same, else 0; log p that the exit before gives to this one's
    word, and the other way round, at least -15; the cosine between the two rows. Of the copy: log(1 + its length)
    where the likeliest word is the one copied, else 0; the same where it is another.
    """
    if isinstance(head, NativeLinear):
        return head.softmax_facts

    def of(hidden: Tensor) -> tuple[Tensor, Tensor]:
        log_p = head(hidden).float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
        return log_p, torch.cat([log_p.topk(2, dim=-1).values, entropy], dim=-1)

    def facts(hidden: Tensor, copied: Tensor, before: Tensor | None = None) -> Tensor:
        log_p, mine = of(hidden)
        best, (word, reach) = log_p.argmax(-1, keepdim=True), copied.split(1, dim=-1)
        copy = torch.cat([reach * (best == word), reach * (best != word)], dim=-1)
        if before is None:
            return torch.cat([mine, copy], dim=-1)
        other, theirs = of(before)
        their_best = other.argmax(-1, keepdim=True)
        cosine = nn.functional.cosine_similarity(hidden.float(), before.float(), dim=-1)[..., None]
        return torch.cat([mine, theirs, (best == their_best).float(), other.gather(-1, best).clamp(min=-15),
                          log_p.gather(-1, their_best).clamp(min=-15), cosine, copy], dim=-1)
    return facts


def sketch_confidence(head: nn.Module, estimator: SketchConfidence) -> Callable[..., Tensor] | NativeConfidence:
    """Of rows for this head (..., D), copies (..., 2), rows of the exit before if it was asked: chances (...,)."""
    if isinstance(head, NativeLinear):
        return NativeConfidence(head, estimator.alone, estimator.after)
    facts = softmax_facts(head)
    return lambda *rows: estimator(facts(*rows)).sigmoid()


def likeliest(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int, float], tuple[Tensor, Tensor]]:
    """Of rows for this head (..., D), k and a temperature: the k likeliest of its words (..., k).

    As many as there are when there are fewer. Best first: their probabilities in the softmax over those words, and
    their numbers.
    """
    if isinstance(head, NativeLinear):
        return head.likeliest

    def ranked(hidden: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float() / temperature
        probs, numbers = logits.softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
        return probs, numbers
    return ranked


def _row_bytes(head: nn.Module, weight: Tensor) -> int:
    """Bytes that one word of this head reads; `weight` is what it was made from."""
    return head.row_bytes if isinstance(head, NativeLinear) else weight[0].nbytes


class ExitBank(nn.Module):
    """All exits of one model. `attach` it to the model before asking it for logits."""

    def __init__(self, config: ExitConfig):
        super().__init__()
        self.config = config
        self.adapters = nn.ModuleList(
            ADAPTERS[config.adapter](config.hidden_size, config.width, config.norm_eps) for _ in config.layers)
        self.confidence_heads = None
        if config.confidence != "softmax":
            self.confidence_heads = nn.ModuleList(
                ConfidenceHead(config.hidden_size, config.confidence_width) if config.confidence == "mlp"
                else SketchConfidence(config.confidence_width) for _ in config.layers)
        self.drafter = None
        if config.drafter_width:
            self.drafter = Drafter(config.hidden_size, config.drafter_width, len(config.layers) - 1, config.norm_eps)
        self.register_buffer("head_ids", torch.arange(config.head_size) if config.head_size else None)
        self.register_buffer("sketch_ids", torch.arange(config.sketch_size) if config.sketch_size else None)
        self._adapt: list[Callable[[Tensor, Tensor], Tensor]] = list(self.adapters)
        self._project: list[Callable[[Tensor], Tensor]] = []
        self._confidence: list[Callable[..., Tensor]] = [head.chance for head in self.confidence_heads or ()
                                                         if config.confidence == "mlp"]
        self._embed: Callable[[Sequence[int]], Tensor] | None = None
        self._likeliest: Callable[[Tensor, int, float], tuple[Tensor, Tensor]] | None = None
        self._draft: Callable[[Tensor, Tensor], Tensor] | None = None
        self._context: Callable[[Tensor], Tensor] | None = None
        self._native_context: NativeContext | None = None
        self._native_drafts: NativeDrafter | None = None
        self.screen: NativeScreen | None = None             # of the full model's head, where an exit has all its words
        self.choice_bytes = 0               # weight bytes read to find the full model's likeliest token
        self.calibration: Calibration | None = None         # how far these very exits may be trusted, where measured
        self._places: dict[int, int] = {}                   # of the sketch's words
        self._device = torch.device("cpu")
        self._word_bytes = self._sketch_bytes = self._own_sketch_bytes = self._own_head_bytes = 0

    @classmethod
    def untrained(cls, model: SegmentedModel, *, confidence: str = "softmax", **shape) -> Self:
        """Exits that start as the logit lens of this model: identity adapters with the model's final norm."""
        config = ExitConfig(base_model=model.name, hidden_size=model.hidden_size, num_layers=model.num_layers,
                            vocab_size=model.vocab_size, layers=model.exit_layers, confidence=confidence,
                            norm_eps=getattr(model.config, "rms_norm_eps", 1e-5),
                            head_fingerprint=model.head_fingerprint, **shape)
        bank = cls(config)
        for adapter in bank.adapters:
            adapter.norm.weight.data.copy_(model.norm_weight)
        return bank

    def attach(self, model: SegmentedModel, *, trainable: bool = False) -> Self:
        """Move to the model's device and dtype and share its head.

        trainable: gradients pass through the adapters, which our own kernels do not allow.

        Raises ValueError when the exits belong to another architecture; warns when only the weights differ.
        """
        c = self.config
        theirs = (c.hidden_size, c.num_layers, c.vocab_size, c.layers)
        ours = (model.hidden_size, model.num_layers, model.vocab_size, model.exit_layers)
        if theirs != ours:
            raise ValueError(f"these exits were made for {c.base_model} (hidden, layers, vocabulary, exits = "
                             f"{theirs}); {model.name} has {ours}. Use exits of this model, or none.")
        if c.head_fingerprint and c.head_fingerprint != model.head_fingerprint:
            log.warning("The exits were trained on other weights of %s than the ones loaded (the heads differ): "
                        "verified stays lossless, but confidences may be wrong.", c.base_model)
        self.to(model.device).eval().requires_grad_(trainable)
        self.adapters.to(model.dtype)           # the estimators stay in fp32
        if self.drafter:
            self.drafter.to(model.dtype)
        # Bound methods, not modules: the head belongs to the base model and must not be saved with the exits.
        weight = model.head_weight.detach()
        head, whole = model.head, c.head_size or c.vocab_size
        if self.head_ids is not None:
            trimmed = weight[self.head_ids]
            head = pack(trimmed, eight_bits=True)               # as good as in bf16, and half as much to read
        self._word_bytes = _row_bytes(head, weight)
        self.screen = None
        all_words = self.head_ids is not None and len(self.head_ids.unique()) == c.vocab_size
        if all_words and isinstance(model.head, NativeLinear) and not model.head.has_bias:
            self.screen = NativeScreen(head, trimmed, self.head_ids)
        self.choice_bytes = self.screen.bytes if self.screen else model.head_bytes

        def first(words: int) -> nn.Module:
            if words == whole:
                return head
            return head.first(words) if isinstance(head, NativeLinear) else pack(trimmed[:words])

        sizes, drafts = [c.words(s) for s in range(len(c.layers))], self._draft_words
        heads = {n: first(n) for n in (*sizes, drafts)}
        self._heads, self._project = [heads[n] for n in sizes], [heads[n].forward for n in sizes]
        self._ids = None if self.head_ids is None else self.head_ids.tolist()
        self._embed, self._likeliest, self._native_drafts = model.embed, likeliest(heads[drafts]), None
        drafter = self.drafter.adapter if self.drafter else self.adapters[0]
        self._draft = drafter.forward
        self._context, self._native_context = self.drafter and self.drafter.context.forward, None
        # Packed by torch, each part is a copy of its own; else they share the memory of the whole.
        held = sum({whole, *heads}) if isinstance(head, PackedLinear) else whole
        self._own_head_bytes = held * self._word_bytes if self.head_ids is not None else 0
        if c.confidence == "mlp":
            self._confidence = [head.chance for head in self.confidence_heads]
        self._device = model.device
        self.sketch(self.sketch_ids)
        if self.sketch_ids is not None:
            words = len(self.sketch_ids)
            # The same memory where it can be, still near when the exit's whole head is read.
            shared = (isinstance(head, NativeLinear) and words % 32 == 0 and self.head_ids is not None
                      and torch.equal(self.head_ids[:words], self.sketch_ids))
            sketch = head.first(words) if shared else pack(weight[self.sketch_ids], eight_bits=True)
            self._sketch_bytes = words * _row_bytes(sketch, weight)
            self._own_sketch_bytes = 0 if shared else self._sketch_bytes
            self._confidence = [sketch_confidence(sketch, estimator) for estimator in self.confidence_heads]
        self._try_bytes = [self._bytes_to_try(s) for s in range(len(sizes))]
        if model.native and not trainable:
            def native(a: nn.Module, **how) -> NativeAdapter:
                return NativeAdapter(a.gate.weight, a.down.weight, a.up.weight, a.norm.weight, a.norm.eps, a.straight,
                                     **how)

            self._adapt = [native(a) for a in self.adapters]
            self._draft = self._adapt[0]
            if self.drafter:                    # what it says decides nothing but speed
                self._draft = native(drafter, eight_bits=True)
                self._native_context = NativeContext(self.drafter.context.weight)
            if c.layers[:1] == (0,) and model.embeds_by_head:
                self._native_drafts = NativeDrafter(model.head, self._draft, heads[drafts], self._ids)
        if model.replays and not trainable:
            def replayed(function: Callable) -> Replayed:
                return Replayed(function, rows=1)

            self._adapt, self._confidence = ([replayed(f) for f in part] for part in (self.adapters, self._confidence))
            self._draft = replayed(drafter) if self.drafter else self._adapt[0]
            self._context = self._context and replayed(self._context)
            projections = {n: replayed(of.forward) for n, of in heads.items()}
            self._project, self._likeliest = [projections[n] for n in sizes], likeliest(projections[drafts])
        return self

    # -- one exit, hidden rows in --------------------------------------------------------------------------------

    def hidden(self, s: int, h: Hidden, said: Hidden) -> Hidden:
        """Hidden rows after segment s, and for each the adapted or normed hidden that named its token: (..., D)."""
        return self._adapt[s](h, said)

    def logits(self, s: int, hidden: Hidden) -> Tensor:
        """Adapted hidden (..., D) of exit s -> logits (..., V), or (..., K) over the first K of `head_ids`."""
        return self._project[s](hidden)

    def choice(self, s: int, hidden: Hidden) -> int:
        """The likeliest word of exit s for one adapted row (1, D)."""
        head = self._heads[s]
        best, = head.argmax(hidden) if isinstance(head, NativeLinear) else argmax(self.logits(s, hidden))
        return best if self._ids is None else self._ids[best]

    def context(self, states: Sequence[Hidden], row: int) -> Context | None:
        """What a drafter draws from a row of the states at all exits but the first, E times (1, N, D): for `drafts`.

        None where the exit before the first layer drafts by itself.
        """
        if self._native_context:
            return self._native_context(states, row)
        if self._context is None:
            return None
        each = [tensor_of(rows)[0, row:row + 1].to(self._device) for rows in states]
        return self._context(torch.cat(each, dim=-1)).float()

    def drafts(self, tokens: Sequence[int], said: Sequence[Hidden], k: int, temperature: float,
               context: Context | None = None) -> list[tuple[Hidden, list[float], list[int]]]:
        """What the drafter, or else the exit before the first layer, drafts after each of these tokens.

        Args:
            said: the hidden states that named them, (1, D) each, or as they came from here.
            context: where there is a drafter, from `context`.

        Returns for each its own hidden state, and the k likeliest tokens, best first: probabilities at this temperature
        among the words that it drafts from, and token ids.
        """
        if self._native_drafts:
            return self._native_drafts(tokens, said, k, temperature, context)
        states = [tensor_of(state) for state in said]
        carried = torch.cat(states) if len(states) > 1 else states[0]
        if context is not None:
            told = context if isinstance(context, Tensor) else torch.frombuffer(context, dtype=torch.float32)
            carried = (carried + told).to(carried.dtype)
        hidden = self._draft(self._embed(tokens)[0], carried)
        probs, words = self._likeliest(hidden, k, temperature)
        ids = words if self.head_ids is None else self.head_ids[words]
        return list(zip(hidden[:, None], probs.tolist(), ids.tolist()))

    def sketch(self, words: Tensor | None) -> None:
        """Let estimators look at these words (N,), or at none."""
        self.sketch_ids = words
        self._places = {} if words is None else {token: place for place, token in enumerate(words.tolist())}

    def copies(self, copied: Sequence[tuple[int, int]]) -> Tensor:
        """What estimators read of copies, tokens and lengths as from `Lookup.copied`: (N, 2).

        Each token's place in the sketch, -1 outside of it, and log(1 + length).
        """
        return torch.tensor(self._told(copied), device=self._device)

    def _told(self, copied: Sequence[tuple[int, int]]) -> list[tuple[int, float]]:
        """The same as plain numbers."""
        return [(self._places.get(token, -1), math.log1p(length)) for token, length in copied]

    def confidence(self, s: int, hidden: Hidden, copied: Sequence[tuple[int, int]],
                   before: Hidden | None = None) -> list[float]:
        """Probability that exit s chooses what the full model would: adapted hidden (N, D) -> N in [0, 1].

        Args:
            copied: for each row what the text said before, from `Lookup.copied`.
            before: adapted hidden of the exit before it for the same tokens (N, D), where that exit was asked.
        """
        if self.confidence_heads is None:
            return self.logits(s, hidden).float().softmax(-1).amax(-1).tolist()
        estimator = self._confidence[s]
        if self.sketch_ids is None:
            return estimator(tensor_of(hidden)).tolist()
        if isinstance(estimator, NativeConfidence):
            return estimator(hidden, self._told(copied), before)
        rows = [tensor_of(hidden), self.copies(copied), *([] if before is None else [tensor_of(before)])]
        return estimator(*rows).tolist()

    # -- bytes, for the cost metric ------------------------------------------------------------------------------

    def adapter_bytes(self, s: int) -> int:
        """Weight bytes that the adapter of exit s reads."""
        return sum(p.nbytes for p in self.adapters[s].parameters())

    def head_bytes(self, s: int) -> int:
        """Weight bytes that the vocabulary projection of exit s reads."""
        return self.config.words(s) * self._word_bytes

    @property
    def draft_bytes(self) -> int:
        """Weight bytes read to ask for drafts once."""
        adapter = self._bytes_of(self.drafter.adapter) if self.drafter else self.adapter_bytes(0)
        return adapter + self._draft_words * self._word_bytes

    @property
    def context_bytes(self) -> int:
        """Weight bytes that `context` reads."""
        return self._bytes_of(self.drafter.context) if self.drafter else 0

    def _bytes_of(self, part: nn.Module) -> int:
        """Weight bytes that a part of the drafter reads: our own kernels have it in 8 bits."""
        return sum(p.numel() if self._native_context else p.nbytes for p in part.parameters())

    @property
    def _draft_words(self) -> int:
        return self.config.draft_size or self.config.words(0)

    def try_bytes(self, s: int) -> int:
        """Weight bytes read to ask exit s how sure it is."""
        return self._try_bytes[s]

    def _bytes_to_try(self, s: int) -> int:
        read = self.adapter_bytes(s)
        if self.confidence_heads is None:
            return read + self.head_bytes(s)
        read += self._sketch_bytes
        return read + sum(p.nbytes for p in self.confidence_heads[s].parameters())

    @property
    def memory_bytes(self) -> int:
        """What attached exits hold beside the model: adapters, estimators, their own head and sketch."""
        return self._own_head_bytes + self._own_sketch_bytes + sum(p.nbytes for p in self.parameters())

    def fingerprint(self) -> str:
        """SHA-256 over the exits' weights, in fp32, and their parts of the head: tells which exits made a result.

        A drafter is not one of them: what they say, and how sure they are, is the same with any.
        """
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("drafter.")}
        return _digest(state, repr(self.config.head_sizes) if self.config.head_sizes else "")

    def drafter_fingerprint(self) -> str | None:
        """The same of the drafter, on which the speed of `verified` depends; None where there is none."""
        return _digest(self.drafter.state_dict()) if self.drafter else None

    # -- artifact -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write config.json and exits.safetensors; a reader never sees half a file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = folder / (WEIGHTS_FILE + ".tmp"), folder / (CONFIG_FILE + ".tmp")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, weights)
        config.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(config, folder / CONFIG_FILE)

    def _check_words(self) -> None:
        """Raise ValueError where a word of a trimmed head or a sketch is none of the vocabulary."""
        for name in ("head_ids", "sketch_ids"):
            ids = getattr(self, name)
            bad = [] if ids is None else ids[(ids < 0) | (ids >= self.config.vocab_size)].tolist()
            if bad:
                raise ValueError(f"{name} must be token ids in 0..{self.config.vocab_size - 1}, got {bad[:5]}: "
                                 "the file is damaged, or belongs to another model")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read an artifact written by `save`.

        Raises FileNotFoundError when a file is missing, ValueError when the two files do not fit together.
        """
        folder = Path(folder)
        try:
            bank = cls(read_config(folder))
            bank.load_state_dict(load_file(folder / WEIGHTS_FILE))
            bank._check_words()
            bank.calibration = Calibration.load(folder)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no exits that this version can read: {error}") from error
        if bank.calibration and bank.calibration.exits != bank.fingerprint():
            log.warning("The calibration in %s is that of other exits and is left aside: run python -m "
                        "training.calibrate", folder)
            bank.calibration = None
        return bank


def _digest(state: dict[str, Tensor], begin: str = "") -> str:
    """SHA-256 over named tensors in fp32, its first 16 digits."""
    digest = hashlib.sha256(begin.encode())
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_config(folder: str | Path) -> ExitConfig:
    """What an artifact says of itself, without its weights. Raises FileNotFoundError, ValueError and TypeError."""
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; exits are two files: {CONFIG_FILE}, {WEIGHTS_FILE}")
    return ExitConfig(**json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
