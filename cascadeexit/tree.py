"""DraftTree: a draft source that proposes a tree of drafts, which one pass of the full model verifies.

Drafts come from two cheap sources. The first is the drafter or, without a drafter, the exit before the first layer.
Either reads a token's embedding and the carried state. The second is n-gram lookup. Often several tokens are likely, so
a position may have several drafts. The verification pass reads the model's weights once for all drafts (SpecInfer: Miao
et al. 2023). A draft is added if its chance of being accepted is worth the cost of one more row in the pass. The
drafter's probabilities are corrected by how many of its drafts were accepted so far in this text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cascadeexit.backends.base import ExitRuntime, Rows
from cascadeexit.carry import Carry
from cascadeexit.costs import Meter
from cascadeexit.drafting import Draft
from cascadeexit.events import COPIED
from cascadeexit.lookup import LONGEST_MATCH, Copy, Lookup
from cascadeexit.model import SegmentedModel
from cascadeexit.staircase import Staircase

_BRANCHES = 6               # drafts that may follow one token
_HIT_RATE = 0.5             # assumed probability that a drafter call gives an accepted draft, before the call
_LIKELY_COPY = 0.5            # after a copy likelier than this the drafter is not called
_DECAY = 0.95               # prior: factor on the drafter's probabilities for each draft before it on the path
_PRIOR_WEIGHT = 20          # weight of `_DECAY`, as a number of expected accepted drafts


@dataclass(slots=True)
class _Node:
    """A draft that may be added to the tree, with what is needed to draft tokens after it."""

    survival: float                                 # probability that it and all drafts before it are accepted
    token: int
    parent: "_Node | None"
    carried: Rows                                   # (1, D), the state that produced it
    depth: int
    exit: int
    probability: float = 0.0
    matched: int = 0


class DraftTree:
    """Draft source that proposes a tree for each verification pass. It adapts to how many drafts were accepted so far.

    Args:
        model, exits: the model, and its exits ready to run.
        prompt: token ids of the prompt, for n-gram lookup.
        temperature: temperature of the run. The drafter's softmax has the same temperature; in a greedy run it has 1.
        passed: for each segment, the rows (hidden states) that the prefill had after this segment, (1, N, D) each. The
            drafter reads some of them. [] if there was no prefill.
        eos_ids: token ids after which nothing is drafted.
        limit: largest number of drafts in a tree.
        end: largest length of the text in tokens, prompt included. No draft is made beyond it. None: no such limit.
        use_drafter: False if only n-gram lookup drafts.
        row_factor: factor for the backend's `row_cost`, for a machine on which rows cost more than the backend expects.
    """

    def __init__(self, model: SegmentedModel, exits: ExitRuntime, prompt: Sequence[int], temperature: float, *,
                 passed: Sequence[Rows] = (), eos_ids: frozenset[int] = frozenset(), limit: int = 7,
                 end: int | None = None, use_drafter: bool = True, row_factor: float = 1.0):
        self._layers, self._exits, self._lookup = model.layers, exits, Lookup(prompt)
        self._temperature, self._eos_ids = temperature or 1.0, eos_ids
        self._limit, self._end = limit, end
        self._can_ask = use_drafter and model.exit_layers[:1] == (0,)
        self._row_factor = row_factor
        self._ask_cost = exits.draft_bytes / (model.pass_bytes + exits.full_head.nbytes) if self._can_ask else 0.0
        # States after all exits but the first, and the row that produced the newest token.
        self._deep = (passed[1:-1], passed[0].shape[1] - 1) if passed else None
        self._accepted: list[float] = []                # accepted drafts at each depth
        self._expected: list[float] = []                # how many of them were expected
        self.confidences = (None,) * len(model.exit_layers)

    def draft(self, stairs: Staircase, carry: Carry, meter: Meter) -> Iterator[list[Draft]]:
        """Propose a tree of drafts, in one list; see `DraftSource.draft`."""
        longest = self._limit if self._end is None else min(self._limit, self._end - len(stairs.tokens))
        drafts = self.grow(stairs.tokens, carry.state, self._limit, longest, meter)
        stairs.tokens += [draft.token for draft in drafts]
        yield drafts

    def grow(self, text: Sequence[int], carried: Rows, limit: int, longest: int,
             meter: Meter | None = None) -> list[Draft]:
        """Make a tree of drafts that follow this text.

        Returns the drafts: parents before children, likelier branches before others.

        Args:
            text: all tokens so far.
            carried: the state that produced the newest token (1, D).
            limit: largest number of drafts.
            longest: largest number of drafts on one path.
            meter: counts the bytes of weights that the drafter reads.
        """
        meter = meter or Meter()
        spent = expected = 1.0                      # cost in passes, and expected tokens: speed is their ratio
        context: Any = None
        level, kept = [_Node(1.0, text[-1], None, carried, -1, COPIED)], []
        for depth in range(longest):
            # Minimum path probability for which one more row still pays.
            needed = self._row_cost(1 + len(kept)) * expected / spent
            copies = [self._lookup.find(_end(text, node)) for node in level]
            ask = [i for i, (node, copy) in enumerate(zip(level, copies))
                   if node.survival * _HIT_RATE > needed and not (copy and copy.chance > _LIKELY_COPY)]
            gain = _HIT_RATE * sum(level[i].survival for i in ask)
            opinions = {}
            if ask and self._can_ask and gain > self._ask_cost * expected / spent:
                if context is None:
                    context = self._context(meter)
                opinions = dict(zip(ask, self._ask([level[i] for i in ask], context, meter)))
                spent += self._ask_cost
            needed, trust = self._row_cost(1 + len(kept)) * expected / spent, self._trust(depth)
            candidates = [child for i, (node, copy) in enumerate(zip(level, copies))
                          for child in self._children(node, trust, copy, opinions.get(i), needed)]
            candidates.sort(key=lambda node: -node.survival)
            level = []
            for node in candidates[:limit - len(kept) if self._layers.supports_trees else 1]:
                cost = self._row_cost(1 + len(kept) + len(level))
                if node.survival <= cost * expected / spent:
                    break
                level.append(node)
                expected += node.survival
                spent += cost
            kept += level
            level = [node for node in level if node.token not in self._eos_ids]
            if not level or len(kept) >= limit:
                break
        return self._in_order(kept)

    def judged(self, drafts: Sequence[Draft], path: Sequence[int], confirmed: Sequence[int],
               passed: Sequence[Rows] = ()) -> None:
        """Learn from a verification pass which drafts were accepted; see `DraftSource.judged`."""
        for depth, parent in enumerate([-1, *path]):
            right = path[depth] if depth < len(path) else None
            children = [i for i, d in enumerate(drafts) if d.parent == parent]
            if any(drafts[i].probability for i in children):
                while len(self._accepted) <= depth:
                    self._accepted.append(0.0)
                    self._expected.append(0.0)
                self._expected[depth] += sum(drafts[i].probability for i in children)
                self._accepted[depth] += right is not None and drafts[right].probability > 0
            for i in children:
                if drafts[i].matched:
                    self._lookup.judged(drafts[i].matched, i == right)
        self._lookup.extend(confirmed)
        self._deep = (passed[1:-1], (path[-1] if path else -1) + 1) if passed else None

    def _row_cost(self, rows: int) -> float:
        return self._row_factor * self._layers.row_cost(rows)

    def _context(self, meter: Meter) -> Any:
        """Compute the context that the drafter reads in this round.

        Returns None if there was no earlier pass, or if there is no drafter.
        """
        if self._deep is None:
            return None
        meter.add(self._exits.context_bytes)
        return self._exits.context(*self._deep)

    def _ask(self, nodes: Sequence[_Node], context: Any, meter: Meter) -> list[tuple[Rows, list[float], list[int]]]:
        """Call the drafter once for these nodes.

        Returns for each node its hidden state (1, D), and the probabilities and token ids of the next tokens, likeliest
        first.
        """
        meter.add(self._exits.draft_bytes)
        return self._exits.drafts([node.token for node in nodes], [node.carried for node in nodes], _BRANCHES,
                                  self._temperature, context)

    def _children(self, node: _Node, trust: float, copy: Copy | None, opinion, needed: float) -> list[_Node]:
        """Return nodes for the tokens that may follow a node.

        If a drafted token is also the copied token, one node stands for both.

        Args:
            trust: factor for the drafter's probabilities.
            copy: token from n-gram lookup; None if there is none.
            opinion: what `_ask` returned for this node; None if the drafter was not called.
            needed: a drafted token is returned only if its path is accepted with a higher probability than this.
        """
        carried, depth, children = node.carried, node.depth + 1, {}
        if opinion:
            carried, probs, ids = opinion
            others = node.survival * (1 - copy.chance if copy else 1)           # probability that it is not the copy
            for p, token in zip(probs, ids):                                    # best first
                survival = others * min(1.0, p * trust)
                if survival <= needed:
                    break
                children[token] = _Node(survival, token, node, carried, depth, 0, p)
        if copy:
            child = children.setdefault(copy.token, _Node(0.0, copy.token, node, carried, depth, COPIED))
            child.survival, child.matched = max(child.survival, node.survival * copy.chance), copy.matched
        return list(children.values())

    def _trust(self, depth: int) -> float:
        """Return the factor by which the drafter's probabilities at this depth of the tree are multiplied.

        It is the number of accepted drafts at this depth so far in this text, divided by the number that was expected.
        While only few drafts were judged, the factor stays near a prior, which is at most 1.
        """
        trust = _DECAY ** depth
        if depth < len(self._accepted):
            trust = (self._accepted[depth] + trust * _PRIOR_WEIGHT) / (self._expected[depth] + _PRIOR_WEIGHT)
        return trust

    def _in_order(self, nodes: Sequence[_Node]) -> list[Draft]:
        """Convert nodes to a list of drafts: parents before children, branch after branch, likelier ones first."""
        children: dict[int, list[_Node]] = {}
        for node in nodes:                                              # siblings stay by likelihood
            children.setdefault(id(node.parent) if node.depth else 0, []).append(node)
        drafts: list[Draft] = []

        def put(node: _Node, parent: int) -> None:
            confidences = self.confidences
            if node.probability:
                confidences = min(1.0, node.probability * self._trust(node.depth)), *confidences[1:]
            drafts.append(Draft(node.token, node.exit, confidences, parent, node.depth, node.probability, node.matched,
                                node.survival / node.parent.survival))
            number = len(drafts) - 1
            for child in children.get(id(node), []):
                put(child, number)

        for node in children.get(0, []):
            put(node, -1)
        return drafts


def _end(text: Sequence[int], node: _Node) -> list[int]:
    """Return the last `LONGEST_MATCH` tokens of the text and the drafts that follow it, up to this node."""
    path = []
    while node.parent is not None:
        path.append(node.token)
        node = node.parent
    return [*text[-LONGEST_MATCH:], *reversed(path)][-LONGEST_MATCH:]
