"""DraftTree: what may come next, as a tree of drafts that one pass of the full model judges.

Drafts come from two sources that cost next to nothing: the drafter, or else the exit before the first layer, which
reads a token's embedding and the state that named it, and `Lookup`, which copies. Both are often unsure which of a few
tokens is right, and a place in the text may have several drafts: the pass reads its weights once for all of them
(SpecInfer: Miao et al. 2023). A draft is taken in while the tokens it promises are worth its row of the pass; how often
such promises were kept so far in this text says how much to believe of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cascadeexit.events import COPIED
from cascadeexit.exits import Context, ExitBank
from cascadeexit.lookup import LONGEST_MATCH, Guess, Lookup
from cascadeexit.model import SegmentedModel
from cascadeexit.states import Hidden

_BRANCHES = 6               # drafts that may follow one token
_HOPE = 0.5                 # chance that a question brings a right draft, when it is not known yet
_SURE = 0.5                 # copies likelier than this need no other opinion
_KEPT = 0.95                # part of what a drafter promises that holds for each token of its own before, at first
_PRIOR_WEIGHT = 20          # of this first trust, in expected right drafts


@dataclass(frozen=True, slots=True)
class Draft:
    """A token that may come, after the newest one or after another draft."""

    token: int
    exit: int                                       # that drafted it, or COPIED
    confidences: tuple[float | None, ...]           # of each exit, as in a TokenEvent
    parent: int                                     # number of the draft it goes on from; -1: the newest token
    depth: int = 0                                  # drafts before it on its path
    promised: float = 0.0                           # by the exit's softmax alone: the chance that it follows its parent
    matched: int = 0                                # COPIED: tokens before it that stood in the text before


@dataclass(slots=True)
class _Node:
    """A draft that is being considered: its path's end, and what the exit needs to go on from it."""

    survival: float                                 # chance that it and all before it are right
    token: int
    parent: "_Node | None"
    said: Hidden                                    # (1, D), the state that named it
    depth: int
    exit: int
    promised: float = 0.0
    matched: int = 0


class DraftTree:
    """Grows a tree for each pass of one run, and learns from what became of it.

    Args:
        prompt: the run's prompt, for copies.
        temperature: of the run: the exit's softmax is taken at it, 1 when greedy.
    """

    def __init__(self, model: SegmentedModel, bank: ExitBank, prompt: Sequence[int], temperature: float):
        self._model, self._bank, self._lookup = model, bank, Lookup(prompt)
        self._temperature = temperature or 1.0
        self._has_exit = model.exit_layers[:1] == (0,)
        self._ask_bytes, self._context_bytes = bank.draft_bytes if self._has_exit else 0, bank.context_bytes
        full = model.pass_bytes + bank.choice_bytes
        self._ask_cost = self._ask_bytes / full
        self._kept: list[float] = []                # right drafts at each depth, and how many were promised
        self._promised: list[float] = []
        self.weight_bytes = 0                       # read by drafting since somebody set it to 0

    def grow(self, text: Sequence[int], said: Tensor, limit: int, longest: int,
             deep: tuple[Sequence[Tensor], int] | None = None) -> list[Draft]:
        """Drafts of what follows this text, parents first, the likeliest path before its siblings.

        Args:
            said: the state that named the newest token (1, D).
            limit: the most drafts; longest: the most of them on one path.
            deep: for a drafter, the states after all exits but the first (1, N, D) and the row that led to `said`.
        """
        spent = expected = 1.0                      # passes, and the tokens that they bring: speed is their ratio
        context: Context | None = None
        level, kept = [_Node(1.0, text[-1], None, said, -1, COPIED)], []
        for depth in range(longest):
            # Of survival: below it, a row costs too much.
            needed = self._model.row_cost(1 + len(kept)) * expected / spent
            guesses = [self._lookup.guess(_end(text, node)) for node in level]
            asked = [i for i, (node, guess) in enumerate(zip(level, guesses))
                     if node.survival * _HOPE > needed and not (guess and guess.chance > _SURE)]
            hope = _HOPE * sum(level[i].survival for i in asked)
            opinions = {}
            if asked and self._has_exit and hope > self._ask_cost * expected / spent:
                if context is None and deep is not None:
                    context = self._bank.context(*deep)
                    self.weight_bytes += self._context_bytes
                opinions = dict(zip(asked, self._ask([level[i] for i in asked], context)))
                spent += self._ask_cost
            needed, trust = self._model.row_cost(1 + len(kept)) * expected / spent, self._trust(depth)
            candidates = [child for i, (node, guess) in enumerate(zip(level, guesses))
                          for child in self._children(node, trust, guess, opinions.get(i), needed)]
            candidates.sort(key=lambda node: -node.survival)
            level = []
            for node in candidates[:limit - len(kept) if self._model.branches else 1]:
                cost = self._model.row_cost(1 + len(kept) + len(level))
                if node.survival <= cost * expected / spent:
                    break
                level.append(node)
                expected += node.survival
                spent += cost
            kept += level
            level = [node for node in level if node.token not in self._model.eos_ids]
            if not level or len(kept) >= limit:
                break
        return self._in_order(kept)

    def judged(self, drafts: Sequence[Draft], path: Sequence[int], confirmed: Sequence[int]) -> None:
        """What became of a tree: the numbers of the drafts that stand, and all tokens that the text has won by it."""
        for depth, parent in enumerate([-1, *path]):
            right = path[depth] if depth < len(path) else None
            children = [i for i, d in enumerate(drafts) if d.parent == parent]
            if any(drafts[i].promised for i in children):
                while len(self._kept) <= depth:
                    self._kept.append(0.0)
                    self._promised.append(0.0)
                self._promised[depth] += sum(drafts[i].promised for i in children)
                self._kept[depth] += right is not None and drafts[right].promised > 0
            for i in children:
                if drafts[i].matched:
                    self._lookup.judged(drafts[i].matched, i == right)
        self._lookup.extend(confirmed)

    def _ask(self, nodes: Sequence[_Node], context: Context | None) -> list[tuple[Hidden, list[float], list[int]]]:
        """Of each node: the exit's state, and the likeliest tokens with their probabilities."""
        self.weight_bytes += self._ask_bytes
        return self._bank.drafts([node.token for node in nodes], [node.said for node in nodes], _BRANCHES,
                                 self._temperature, context)

    def _children(self, node: _Node, trust: float, guess: Guess | None, opinion, needed: float) -> list[_Node]:
        """What may follow a node and survive oftener than needed. A copy and a draft for the same token are one."""
        said, depth, children = node.said, node.depth + 1, {}
        if opinion:
            said, probs, ids = opinion
            others = node.survival * (1 - guess.chance if guess else 1)         # the chance that it is not the copy
            for p, token in zip(probs, ids):                                    # best first
                survival = others * min(1.0, p * trust)
                if survival <= needed:
                    break
                children[token] = _Node(survival, token, node, said, depth, 0, p)
        if guess:
            copy = children.setdefault(guess.token, _Node(0.0, guess.token, node, said, depth, COPIED))
            copy.survival, copy.matched = max(copy.survival, node.survival * guess.chance), guess.matched
        return list(children.values())

    def _trust(self, depth: int) -> float:
        """How often drafts of the exit at this depth were right, over what its softmax promised."""
        trust = _KEPT ** depth
        if depth < len(self._kept):
            trust = (self._kept[depth] + trust * _PRIOR_WEIGHT) / (self._promised[depth] + _PRIOR_WEIGHT)
        return trust

    def _in_order(self, nodes: Sequence[_Node]) -> list[Draft]:
        """Parents before children, and a whole branch before the next one, the likeliest first."""
        children: dict[int, list[_Node]] = {}
        for node in nodes:                                              # siblings stay by likelihood
            children.setdefault(id(node.parent) if node.depth else 0, []).append(node)
        drafts: list[Draft] = []
        unasked = (None,) * len(self._model.exit_layers)

        def put(node: _Node, parent: int) -> None:
            sure = (min(1.0, node.promised * self._trust(node.depth)), *unasked[1:]) if node.promised else unasked
            drafts.append(Draft(node.token, node.exit, sure, parent, node.depth, node.promised, node.matched))
            number = len(drafts) - 1
            for child in children.get(id(node), []):
                put(child, number)

        for node in children.get(0, []):
            put(node, -1)
        return drafts


def _end(text: Sequence[int], node: _Node) -> list[int]:
    """The last tokens of the text with this node's path."""
    path = []
    while node.parent is not None:
        path.append(node.token)
        node = node.parent
    return [*text[-LONGEST_MATCH:], *reversed(path)][-LONGEST_MATCH:]
