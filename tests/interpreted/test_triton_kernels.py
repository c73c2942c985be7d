"""Each Triton kernel against PyTorch, and rows that do not depend on each other, bitwise."""

import pytest
import torch
from torch.nn import functional as F

from cascadeexit.backends.gpu import kernels, places
from cascadeexit.backends.gpu.heads import GpuHead
from cascadeexit.backends.gpu.launches import KEYS, SPLIT, Counts, launch, power_of_2, tiles
from cascadeexit.backends.gpu.layers import gated, linear, rms_norm

counts = Counts(torch.device("cpu"))
DTYPES = [torch.bfloat16, torch.float16]


def near(found: torch.Tensor, exact: torch.Tensor, digits: torch.dtype) -> None:
    """Assert that numbers are exact but for the rounding of the result and of one intermediate."""
    limit = 3 * torch.finfo(digits).eps
    torch.testing.assert_close(found.float(), exact.float(), atol=limit * float(exact.abs().max()), rtol=limit)


def stands_alone(function, *rows: torch.Tensor) -> None:
    """Assert that a row's result is bitwise the same with 1 to 16 rows, in another place, and in a second tile."""
    whole, n = function(*rows), len(rows[0])
    order = torch.randperm(n)
    assert torch.equal(function(*(part[order] for part in rows)), whole[order]), "place"
    for count in (1, 2, 7, 15, 16):
        assert torch.equal(function(*(part[:count] for part in rows)), whole[:count]), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs, outputs, extras", [(48, 40, ""), (300, 33, "bias residual")])
def test_linear(inputs, outputs, extras, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(19, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype) / inputs ** 0.5
    bias = torch.randn(outputs, dtype=dtype) if extras else None
    residual = torch.randn(19, outputs, dtype=dtype) if extras else torch.zeros(19, outputs, dtype=dtype)

    def ours(x, residual):
        out = residual.clone()
        return linear(x, w, counts(len(x)), out, bias=bias, residual=out if extras else None)      # in place

    near(ours(x, residual), F.linear(x.float(), w.float(), bias if bias is None else bias.float()) + residual, dtype)
    stands_alone(ours, x, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_gated(normed, dtype):
    torch.manual_seed(0)
    x, gate, up = torch.randn(19, 160, dtype=dtype), *(torch.randn(2, 24, 160, dtype=dtype) / 160 ** 0.5)
    gain = torch.rand(160, dtype=dtype) + 0.5 if normed else None

    def ours(x):
        return gated(x, gate, up, counts(len(x)), x.new_empty(len(x), 24), gain=gain, eps=1e-5)

    wide = F.rms_norm(x.float(), (160,), gain.float(), 1e-5) if normed else x.float()
    near(ours(x), F.silu(wide @ gate.float().T) * (wide @ up.float().T), dtype)
    stands_alone(ours, x)


def test_large_fp16_rows_do_not_overflow():
    x, gain = torch.full((1, 64), 3e4, dtype=torch.float16), torch.full((64,), 9.0, dtype=torch.float16)
    weight = torch.full((16, 64), 1 / 64, dtype=torch.float16)
    out = gated(x, weight, weight, counts(1), x.new_empty(1, 16), gain=gain, eps=1e-5)
    near(out, F.silu(torch.full((1, 16), 9.0)) * 9, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 1100])
def test_rms_norm(width, dtype):
    torch.manual_seed(0)
    x, gain = torch.randn(19, width, dtype=dtype), torch.rand(width, dtype=dtype)
    near(rms_norm(x, gain, 1e-5, counts(19)), F.rms_norm(x.float(), (width,), gain.float(), 1e-5), dtype)
    stands_alone(lambda x: rms_norm(x, gain, 1e-5, counts(len(x))), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [97, 200])
def test_head_and_argmax(words, dtype):
    torch.manual_seed(0)
    head = GpuHead(torch.randn(words, 48, dtype=dtype), torch.randn(words, dtype=dtype), counts=counts)
    x = torch.randn(19, 48, dtype=dtype)
    logits = head.logits(x)
    torch.testing.assert_close(logits, F.linear(x.float(), head.weight.float(), head._bias.float()))
    assert head.argmax(x) == logits.argmax(-1).tolist()
    assert [choice[5] for choice in head.choices(x)] == logits[:, 5].tolist()
    stands_alone(head.logits, x)
    first = head.first(64)
    assert torch.equal(first.logits(x), logits[:, :64]) and first.weight.data_ptr() == head.weight.data_ptr()
    probs, numbers = head.likeliest(x[None], 3, 0.7)
    expected = (logits / 0.7).softmax(-1).topk(3)
    assert torch.equal(numbers[0], expected.indices) and torch.equal(probs[0], expected.values)


def test_the_first_of_equal_words_is_chosen():
    """Wherever their blocks are: 3,000 blocks of words are more than one step of the argmax."""
    head = GpuHead(torch.zeros(200, 16, dtype=torch.bfloat16), counts=counts)
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0] = 1
    for equal in ((0,), (199,), (63, 64), (3, 7, 150), (70, 130)):
        head.weight.zero_()
        head.weight[list(equal), 0] = 1
        assert head.argmax(x) == [equal[0]]
    logits, best = torch.zeros(1, 3000), torch.arange(3000, dtype=torch.int32)[None]
    for equal in ((2999,), (1023, 1024), (5, 1029, 2500)):
        logits.zero_()[0, list(equal)] = 1
        token = torch.empty(1, dtype=torch.int32)
        launch(kernels.argmax, (1,), logits, best, token, counts(1), 3000, 3000, BLOCK=1024)
        assert token.tolist() == [equal[0]]


# -- attention --------------------------------------------------------------------------------------------------------

TREE = [-1, 0, 1, 2, 0, 4, 1, 5, 7, 8, 3]


class Attention:
    """Random queries of 16 rows, and keys and values of a context, for attention alone."""

    def __init__(self, group: int = 3, d: int = 16, kv_heads: int = 2, slots: int = 700, dtype=torch.bfloat16):
        torch.manual_seed(0)
        self.heads, self.group, self.kv_heads, self.d = group * kv_heads, group, kv_heads, d
        self.keys, self.values = (torch.randn(1, kv_heads, slots, d, dtype=dtype) for _ in range(2))
        self.queries = torch.randn(slots, self.heads, d, dtype=dtype)           # those of each slot

    def __call__(self, at: places.Places, spare_splits: int = 0) -> torch.Tensor:
        """Attention of the rows at these places (N, H, d), with room for more splits than are in use."""
        n, splits = int(at.count), int(at.positions.max()) // SPLIT + 1 + spare_splits
        parts, keys = tiles(at.tile * self.group), self.keys
        at.cache.copy_(torch.tensor([keys.data_ptr(), self.values.data_ptr(), keys.shape[2], keys.numel()]))
        queries = self.queries[at.slots[:n]].contiguous()
        of = (len(at.firsts), self.kv_heads, parts, splits, 16)
        partial, sums, out = torch.full((*of, self.d), torch.nan), torch.full((*of, 2), torch.nan), queries.clone()
        sizes = dict(TILE=at.tile, SPLIT=SPLIT, WIDTH=power_of_2(self.d))
        launch(kernels.attend, (self.kv_heads * parts, splits, len(at.firsts)), queries, at.cache, 0,
               partial, sums, at.count, at.positions, at.lanes, at.paths, at.firsts, at.begins, self.d ** -0.5,
               self.heads, self.kv_heads, self.d, BLOCK=KEYS, **sizes)
        launch(kernels.combine, (tiles(n), self.heads), partial, sums, out, at.count, at.positions, self.heads,
               self.kv_heads, splits, parts, self.d, **sizes)
        return out

    def exact(self, slot: int, seen: list[int]) -> torch.Tensor:
        """Attention in fp32 of the row in a slot over these slots: (H, d)."""
        q = self.queries[slot].float().view(self.kv_heads, self.group, self.d)
        k, v = self.keys[0, :, seen].float(), self.values[0, :, seen].float()
        return F.scaled_dot_product_attention(q, k, v).reshape(self.heads, self.d)


@pytest.mark.parametrize("group, d, dtype", [(1, 16, torch.bfloat16), (3, 64, torch.bfloat16), (4, 80, torch.float16),
                                             (7, 96, torch.bfloat16), (8, 128, torch.float16)], ids=str)
def test_attention_of_any_group_and_head_size(group, d, dtype):
    attention = Attention(group, d, 2, 90, dtype)
    found = attention(places.chain(60, 7))
    near(found, torch.stack([attention.exact(60 + i, list(range(61 + i))) for i in range(7)]), dtype)
    for i in (0, 6):
        assert torch.equal(attention(places.chain(60 + i, 1))[0], found[i])


@pytest.mark.parametrize("start", [0, 1, 50, 63, 64, 250, 255, 256, 257, 511])
def test_rows_beside_each_other_are_rows_alone(start):
    """Wherever blocks and splits begin, and for any room beyond the context."""
    attention = Attention()
    for n in (1, 2, 16):
        found = attention(places.chain(start, n))
        near(found, torch.stack([attention.exact(start + i, list(range(start + i + 1))) for i in range(n)]),
             torch.bfloat16)
        for i in sorted({0, n // 2, n - 1}):
            assert torch.equal(attention(places.chain(start + i, 1), 1)[0], found[i]), (n, i)


@pytest.mark.parametrize("start", [0, 60, 250, 256])
def test_each_path_of_a_tree_is_its_text(start):
    attention = Attention()
    found, (keys, values, queries) = attention(places.tree(start, TREE)), (attention.keys, attention.values,
                                                                           attention.queries)
    for row in range(len(TREE)):
        path = [row]
        while path[0]:
            path.insert(0, TREE[path[0]])
        taken = [start + i for i in path]
        near(found[row], attention.exact(start + row, [*range(start), *taken]), torch.bfloat16)
        slots = slice(start, start + len(path))
        attention.keys, attention.values, attention.queries = keys.clone(), values.clone(), queries.clone()
        attention.keys[:, :, slots], attention.values[:, :, slots] = keys[:, :, taken], values[:, :, taken]
        attention.queries[slots] = queries[taken]
        assert torch.equal(attention(places.chain(start + len(path) - 1, 1))[0], found[row]), row
        attention.keys, attention.values, attention.queries = keys, values, queries


def test_many_rows_of_a_prompt_are_tiles():
    attention = Attention(slots=350)
    found = attention(places.chain(240, 53))
    for i in (0, 15, 16, 40, 52):
        assert torch.equal(attention(places.chain(240 + i, 1))[0], found[i]), i


def test_rows_beyond_the_count_change_nothing():
    """As in a recording for 16 rows, of which fewer are in use."""
    attention = Attention()
    found = attention(places.chain(250, 5))
    recorded = places.chain(250, 5, rows=16)
    assert len(recorded.positions) == 16 and torch.equal(attention(recorded, 1), found)


def test_texts_of_a_batch_read_from_where_they_begin():
    attention = Attention(group=1, slots=300)
    lanes = [Attention(group=1, slots=300) for _ in range(3)]
    for seed, lane in enumerate(lanes):
        torch.manual_seed(seed)
        lane.keys, lane.values = torch.randn_like(lane.keys), torch.randn_like(lane.values)
    attention.keys = torch.cat([lane.keys for lane in lanes])
    attention.values = torch.cat([lane.values for lane in lanes])
    begins = [0, 270, 3]
    found = attention(places.batch(280, begins))
    for row, (lane, begin) in enumerate(zip(lanes, begins)):
        near(found[row], lane.exact(280, list(range(begin, 281))), torch.bfloat16)
