"""Let the model write training text: conversations, and continuations of passages.

Many documents are written at once, in a batch. Each row of the batch is called a lane. A lane writes one document after
another. The first tokens of a document are given; they are called its opening. The model chooses the other tokens.

Letters: B lanes, K likeliest tokens, E exits, D hidden size.
"""

import random
from dataclasses import dataclass

import torch
from tqdm import tqdm

from cascadeexit.model import SegmentedModel
from training.documents import Document, key_of
from training.features import Features, wanted

MIN_TOKENS = 16             # a document is dropped when the model chose fewer tokens of it
MAX_CONTINUATION = 160      # tokens after a passage of plain text, because the model rarely ends it
TOP_K = 50                  # replies are sampled from so many of the likeliest tokens


class ChatTemplate:
    """The chat template for a conversation with one user turn, as token ids.

    A prompt is `opening`, then the user's text, then `closing`. After the prompt, the model writes its reply. If the
    tokenizer has no chat template, `opening` is one start token and `closing` is empty: the model continues the user's
    text.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        if tokenizer.chat_template is None:
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            self.opening, self.closing = [start], []
            return
        sentinel = "\u241f"
        text = tokenizer.apply_chat_template([{"role": "user", "content": sentinel}], tokenize=False,
                                             add_generation_prompt=True)
        opening, closing = text.split(sentinel)
        self.opening, self.closing = self.encode(opening), self.encode(closing)

    def encode(self, text: str) -> list[int]:
        """Tokenize text, without adding special tokens."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, turn: str) -> list[int]:
        """Return the token ids of a prompt: a conversation with this user turn, up to where the reply begins."""
        return self.opening + self.encode(turn) + self.closing


class Sources:
    """Supplies the openings of documents: a user turn to answer, a passage to continue, or an empty conversation.

    In an empty conversation, the model invents the user turn, too.

    Args:
        template: the chat template of the model.
        prompts: user turns.
        texts: passages.
        own_share: share of the conversations in which the model invents the user turn.
        plain_share: share of the documents that continue a passage.
        seed: decides all random choices.
    """

    def __init__(self, template: ChatTemplate | None, prompts: list[str], texts: list[str], own_share: float,
                 plain_share: float, seed: str):
        self.template, self.rng = template, random.Random(seed)
        self._turns = self.rng.sample(prompts, len(prompts))
        self._texts = self.rng.sample(texts, len(texts))
        plain = plain_share if texts else 0.0
        self._shares = (plain, (1 - plain) * (own_share if prompts else 1.0))

    def begin(self) -> "Opening":
        """Choose the opening of a new document at random, and return it.

        Each user turn and each passage is used once. When none are left, the model invents whole conversations.
        """
        draw = self.rng.random()
        if draw < self._shares[0] and self._texts:
            text = self._texts.pop()
            words = self.template.encode(text)[:self.rng.randint(8, 48)]
            return Opening(words, key_of(text), limit=len(words) + MAX_CONTINUATION)
        if draw < sum(self._shares) or not self._turns:
            return Opening(list(self.template.opening), 0, invents_user=bool(self.template.closing))
        turn = self._turns.pop()
        return Opening(self.template.prompt(turn), key_of(turn), greedy=self.rng.random() < 0.5)


@dataclass
class Opening:
    """The first tokens of a document, and how the model continues them."""

    forced: list[int]               # these tokens are given, not chosen by the model
    key: int                        # decides the split; 0: computed from the finished document
    invents_user: bool = False      # the model writes the user's turn, then the reply
    greedy: bool = False            # else tokens are sampled
    limit: int = 1 << 30            # tokens of the whole document, at most


class Lane:
    """One row of the batch in which the model writes documents, one after another.

    It holds the unfinished document and the finished ones. The constructor starts the first document.

    Args:
        sources: supplies the first tokens of each document, its opening.
    """

    def __init__(self, sources: Sources):
        self.sources = sources
        self.finished: list[tuple[int, Document]] = []          # each with the cache slot of its first token
        self.begin(0)

    def begin(self, slot: int) -> None:
        """Start a new document. Its first token gets position `slot` of the KV cache.

        Call `close` before, so that the old document is not lost.
        """
        self.opening = self.sources.begin()
        self.start, self.document, self.forced = slot, Document(key=self.opening.key), self.opening.forced

    def next_token(self, sampled: int, best: int, eos: frozenset[int], slot: int) -> int:
        """Choose the next token of this lane, add it to the document, and return it.

        If given tokens are left, the next of them is chosen. Else the choice is `best` if `Opening.greedy` is True, and
        `sampled` if it is False. When the document is complete, it is closed and a new document starts.

        Args:
            sampled: the token that was sampled from the model's softmax.
            best: the model's first choice.
            eos: ids of the tokens that end a text.
            slot: position of the token in the KV cache.
        """
        forced, document = bool(self.forced), self.document
        token = self.forced.pop(0) if forced else best if self.opening.greedy else sampled
        document.ids.append(token)
        document.chosen.append(0 if forced else 1)
        if not forced and token in eos and self.opening.invents_user:
            self.opening.invents_user, self.opening.greedy = False, self.sources.rng.random() < 0.5
            closing = self.sources.template.closing
            self.forced = closing[1:] if closing[:1] == [token] else list(closing)
        elif not forced and (token in eos or len(document.ids) >= self.opening.limit):
            self.close()
            self.begin(slot + 1)
        return token

    def close(self) -> None:
        """Add the document to `finished`, unless the model chose fewer than MIN_TOKENS of its tokens."""
        if sum(self.document.chosen) >= MIN_TOKENS:
            self.document.key = self.document.key or key_of(str(self.document.ids))
            self.finished.append((self.start, self.document))


@torch.inference_mode()
def write_round(model: SegmentedModel, lanes: list[Lane], steps: int, temperature: float, bar: tqdm,
                keep: bool = False) -> tuple[list[Document], list[Features]]:
    """Let all lanes write text at the same time, until a static KV cache is full.

    The text may differ in single tokens from text that decoding would give, because the passes have other shapes.

    Args:
        steps: capacity of the KV cache, in tokens per lane. Each lane writes one token per step.
        temperature: temperature of sampled tokens.
        bar: progress bar, which counts tokens.
        keep: also return features, from the same passes.

    Returns the finished documents, and a list with the features of each document. This list is empty if `keep` is
    False.
    """
    layers = model.layers
    cache, best = layers.new_cache(steps, batch=len(lanes)), [0] * len(lanes)
    sampled, seen, choices = best, [], []
    for slot in range(steps):
        begins = [lane.start for lane in lanes]     # a lane reads only its own document, up to this slot
        tokens = [lane.next_token(s, b, model.eos_ids, slot) for lane, s, b in zip(lanes, sampled, best, strict=True)]
        h, at_exit = layers.embed(tokens), []                                                   # (1, B, D)
        for s in range(model.num_segments):
            h = layers.run_batch(s, h, begins, cache)
            at_exit.append(layers.tensor(h)[0])
        normed = layers.norm(h)
        top, ids = model.head.logits(normed)[0].float().topk(TOP_K)                             # (B, K)
        pick = torch.multinomial((top / temperature).softmax(-1), 1)
        best, sampled = ids[:, 0].tolist(), ids.gather(1, pick)[:, 0].tolist()
        if keep:
            seen.append(torch.stack([*at_exit[:-1], layers.tensor(normed)[0].to(at_exit[0].device)], 1))
            choices.append(ids[:, 0].int())
        bar.update(len(lanes))
    for lane in lanes:
        lane.close()
    documents, features = [d for lane in lanes for _, d in lane.finished], []
    if keep:
        seen, choices = torch.stack(seen, 1), torch.stack(choices, 1)                           # (B, steps, E + 1, D)
        for i, lane in enumerate(lanes):
            for start, d in lane.finished:
                part = slice(start, start + len(d.ids))
                features.append(Features(torch.tensor(d.ids, dtype=torch.int32, device=seen.device),
                                         seen[i, part, :-1], seen[i, part, -1], choices[i, part],
                                         wanted(d).to(seen.device)))
    return documents, features
