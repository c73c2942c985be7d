"""Triton kernels of a Llama-like decoder: for its layers, its final norm and its vocabulary head.

One layer is six launches: `qkv_heads`, `attend`, `combine`, `linear` (output projection + residual), `gated`, `linear`
(down projection + residual). Two rules make a row's result independent of its index in the pass, of the other rows, of
the cache's capacity and of how a text is cut into passes:

1. Rows are always multiplied in tiles of 16 rows. Missing rows are zeros. The sum over the inputs has a fixed order.
2. Attention reads keys in the order of their positions. Its blocks of positions, and its splits of several blocks,
   begin at fixed positions. A block that holds new rows is computed separately for each of these rows: with the keys of
   that row's own path, and zeros after them. So the same numbers are multiplied in the same tile, whether a row is
   decoded alone or verified in a draft tree.

No kernel uses atomic additions. Counts and positions are read from device memory. So a recorded launch works for every
length of text. The argument `count` (1,) is the number of rows to compute. Later rows of an output are not written.

Letters: N rows, T tiles of rows, D hidden size, I inputs, O outputs, H query heads, K key-value heads, G = H / K, d
head size, C cache capacity, S splits, F inner size of the MLP, V words (entries of the vocabulary).
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(16)         # rows of a tile, and the longest path of a tree


@triton.jit
def cache_of(cache, part: tl.constexpr, layer, dtype: tl.constexpr):
    """Return a pointer to one layer's keys (part 0) or values (part 1), and the cache's capacity C.

    `cache` (4,) in int64 holds the address of the keys, the address of the values, the capacity, and the number of
    elements of one layer's keys. The kernel reads them from device memory, so a recorded launch works for every cache.
    """
    address, capacity = tl.load(cache + part), tl.load(cache + 2).to(tl.int32)
    pointer = address.to(tl.pointer_type(dtype)) + layer * tl.load(cache + 3)
    return tl.multiple_of(pointer, 16), capacity


@triton.jit
def rms_norm(x, gain, y, count, eps, D, BLOCK: tl.constexpr):
    """Apply RMSNorm with the weight `gain` (D,) to rows x (N, D). Writes y (N, D).

    Grid: (N,).
    """
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(x + row * D + at, mask=at < D, other=0.0).to(tl.float32)
        squares += part * part
    scale = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(x + row * D + at, mask=at < D, other=0.0).to(tl.float32) * scale
        part *= tl.load(gain + at, mask=at < D, other=0.0).to(tl.float32)
        tl.store(y + row * D + at, part.to(y.dtype.element_ty), mask=at < D)


@triton.jit
def qkv_heads(x, gain, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, q_norm, k_norm, cosines, sines, queries,
              cache, layer, count, positions, slots, lanes, eps, D, H, K, d, SHRINK: tl.constexpr,
              BIAS: tl.constexpr, HEAD_NORM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Apply RMSNorm to a tile of 16 rows, and compute one query, key or value head of these rows.

    Queries and keys also get their head norm, if there is one, and the rotary embedding. Queries are written to
    `queries` (N, H, d). Keys and values are written to the cache (lanes, K, C, d), at the row's lane and slot. A lane
    is one text of a batch. One program computes both halves of a head, because the rotary embedding mixes them. The
    scale of the RMSNorm is applied after the product. Before the product, rows are multiplied by SHRINK, a power of two
    that keeps fp16 numbers in range.

    Grid: (T, H + 2 K).
    """
    head, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < tl.load(count)
    number, weight, bias, norm = head, q_weight, q_bias, q_norm
    if head >= H:
        number, weight, bias, norm = head - H, k_weight, k_bias, k_norm
    if head >= H + K:
        number, weight, bias = head - H - K, v_weight, v_bias
    j = tl.arange(0, HALF)
    inside, first = j < d // 2, number * d + j
    second = first + d // 2
    squares = tl.zeros((ROWS,), tl.float32)
    left, right = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wanted = inside[:, None] & (at < D)[None]
        a = tl.load(weight + first[:, None] * D + at[None], mask=wanted, other=0.0)
        b = tl.load(weight + second[:, None] * D + at[None], mask=wanted, other=0.0)
        part = tl.load(x + row[:, None] * D + at[None], mask=real[:, None] & (at < D)[None], other=0.0).to(tl.float32)
        squares += tl.sum(part * part, 1)
        part *= tl.load(gain + at, mask=at < D, other=0.0).to(tl.float32)[None] * SHRINK
        left = tl.dot(part.to(a.dtype), tl.trans(a), left)
        right = tl.dot(part.to(b.dtype), tl.trans(b), right)
    scale = tl.rsqrt(squares / D + eps) / SHRINK
    left, right = left * scale[:, None], right * scale[:, None]
    if BIAS:
        left += tl.load(bias + first, mask=inside, other=0.0).to(tl.float32)[None]
        right += tl.load(bias + second, mask=inside, other=0.0).to(tl.float32)[None]
    if head < H + K:
        if HEAD_NORM:
            scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / d + eps)
            left *= scale[:, None] * tl.load(norm + j, mask=inside, other=0.0).to(tl.float32)[None]
            right *= scale[:, None] * tl.load(norm + d // 2 + j, mask=inside, other=0.0).to(tl.float32)[None]
        angle = tl.load(positions + row, mask=real, other=0)[:, None] * (d // 2) + j[None]
        cosine, sine = tl.load(cosines + angle, mask=inside[None]), tl.load(sines + angle, mask=inside[None])
        left, right = left * cosine - right * sine, right * cosine + left * sine
    out, at = queries, (row * H + number) * d
    if head >= H:
        out, C = cache_of(cache, 0, layer, queries.dtype.element_ty)
        if head >= H + K:
            out, C = cache_of(cache, 1, layer, queries.dtype.element_ty)
        lane, slot = tl.load(lanes + row, mask=real, other=0), tl.load(slots + row, mask=real, other=0)
        at = ((lane * K + number) * C + slot) * d
    stored = real[:, None] & inside[None]
    tl.store(out + at[:, None] + j[None], left.to(out.dtype.element_ty), mask=stored)
    tl.store(out + at[:, None] + d // 2 + j[None], right.to(out.dtype.element_ty), mask=stored)


@triton.jit
def attend(queries, cache, layer, partial, sums, count, positions, lanes, paths, firsts, begins, scale, H, K, d,
           TILE: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Compute attention of 16 query rows over one split of the positions, for one key-value head.

    A query row is one query head of one row. A tile of TILE rows has G * TILE query rows for each key-value head, and
    `parts` is the number of groups of 16 that they fill. `paths[r, j]` is the slot of position firsts[tile] + j on the
    path of row r. A position before firsts[tile] is in the slot with the same number.

    A block of positions that ends before firsts[tile] is computed in one step for all rows. Every later block takes one
    step for each row. One loop does all steps. A step for a single row reads only the keys that this row (`one`) sees,
    and only the query rows of this row (`mine`) keep the result.

    Writes the weighted sums of values to `partial` (T, K, parts, S, 16, d). They are not yet divided by the sum of the
    softmax weights. Writes the largest score and the sum of the weights to `sums` (T, K, parts, S, 16, 2).

    Grid: (K * parts, S, T).
    """
    parts = tl.num_programs(0) // K
    kv, part, split, tile = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1), tl.program_id(2)
    group, here = H // K, tl.minimum(TILE, tl.load(count) - tile * TILE)
    query = part * ROWS + tl.arange(0, ROWS)
    row, e = query // group, tl.arange(0, WIDTH)
    position = tl.load(positions + tile * TILE + row, mask=row < here, other=-1)
    low, last = split * SPLIT, tl.max(position, 0)
    if low > last:
        return
    first, begin = tl.load(firsts + tile), tl.load(begins + tile)
    keys, C = cache_of(cache, 0, layer, queries.dtype.element_ty)
    values, C = cache_of(cache, 1, layer, queries.dtype.element_ty)
    base = (tl.load(lanes + tile * TILE) * K + kv) * C * d
    at = ((tile * TILE + row) * H + kv * group + query % group) * d
    q = tl.load(queries + at[:, None] + e[None], mask=(row < here)[:, None] & (e < d)[None], other=0.0)
    high = tl.minimum(low + SPLIT, last + 1)
    whole, blocks = tl.maximum(tl.minimum(high, first) - low, 0) // BLOCK, tl.cdiv(high - low, BLOCK)
    oldest = part * ROWS // group
    seeing = tl.minimum((part * ROWS + ROWS - 1) // group + 1, here) - oldest
    best, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in range(0, whole + (blocks - whole) * seeing):
        later = tl.maximum(step - whole, 0)
        one, block = oldest + later % seeing, tl.minimum(step, whole) + later // seeing
        p = low + block * BLOCK + tl.arange(0, BLOCK)
        seen = (p <= tl.load(positions + tile * TILE + one)) & (p >= begin)
        slot = tl.load(paths + (tile * TILE + one) * ROWS + p - first, mask=seen & (p >= first), other=0)
        slot = tl.where(p < first, p, slot)
        place, wanted = base + slot[:, None] * d + e[None], seen[:, None] & (e < d)[None]
        k = tl.load(keys + place, mask=wanted, other=0.0)
        v = tl.load(values + place, mask=wanted, other=0.0)
        scores = tl.where(seen[None], tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        weight, shrink = tl.exp(scores - finite[:, None]), tl.exp(best - finite)
        mine = (step < whole) | (row == one)
        added = tl.dot(weight.to(v.dtype), v, out * shrink[:, None])
        out = tl.where(mine[:, None], added, out)
        total = tl.where(mine, total * shrink + tl.sum(weight, 1), total)
        best = tl.where(mine, new, best)
    at = ((tile * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + split) * ROWS + tl.arange(0, ROWS)
    tl.store(partial + at[:, None] * d + e[None], out, mask=(e < d)[None])
    tl.store(sums + at * 2, best)
    tl.store(sums + at * 2 + 1, total)


@triton.jit
def combine(partial, sums, out, count, positions, H, K, S, parts, d, TILE: tl.constexpr, SPLIT: tl.constexpr,
            WIDTH: tl.constexpr):
    """Combine the results of `attend` over all splits, in ascending order, for one query head and one tile of 16 rows.

    Writes the attention outputs `out` (N, H, d). This work has a kernel of its own. As a part of the output projection,
    it would be repeated in each program of the projection.

    Grid: (T, H).
    """
    head, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real, e, group = row < tl.load(count), tl.arange(0, WIDTH), H // K
    splits = tl.where(real, tl.load(positions + row, mask=real, other=0) // SPLIT + 1, 0)
    query = row % TILE * group + head % group
    at = ((row // TILE * K + head // group) * parts + query // ROWS) * S * ROWS + query % ROWS
    best, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, WIDTH), tl.float32)
    for split in range(0, tl.max(splits, 0)):
        used, place = split < splits, at + split * ROWS
        most = tl.load(sums + place * 2, mask=used, other=-float("inf"))
        weight = tl.load(sums + place * 2 + 1, mask=used, other=0.0)
        part = tl.load(partial + place[:, None] * d + e[None], mask=used[:, None] & (e < d)[None], other=0.0)
        new = tl.maximum(best, most)
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink, grow = tl.exp(best - finite), tl.exp(most - finite)
        total = total * shrink + weight * grow
        summed = summed * shrink[:, None] + part * grow[:, None]
        best = new
    summed /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + (row[:, None] * H + head) * d + e[None], summed.to(out.dtype.element_ty),
             mask=real[:, None] & (e < d)[None])


@triton.jit
def linear(x, weight, bias, residual, y, count, inputs, outputs, BIAS: tl.constexpr,
           RESIDUAL: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply rows x (N, I) by a weight (O, I), and add a bias (O,) and a residual (N, O). Writes y (N, O).

    No bias is added if BIAS is False, and no residual if RESIDUAL is False. `residual` and `y` may be one tensor.

    Grid: (T, blocks of outputs).
    """
    row, out = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    real = row < tl.load(count)
    total = tl.zeros((ROWS, BLOCK_O), tl.float32)
    for start in range(0, inputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (at < inputs)[None]
        w = tl.load(weight + out[:, None] * inputs + at[None], mask=(out < outputs)[:, None] & inside, other=0.0)
        part = tl.load(x + row[:, None] * inputs + at[None], mask=real[:, None] & inside, other=0.0)
        total = tl.dot(part, tl.trans(w), total)
    place, wanted = row[:, None] * outputs + out[None], real[:, None] & (out < outputs)[None]
    if BIAS:
        total += tl.load(bias + out, mask=out < outputs, other=0.0).to(tl.float32)[None]
    if RESIDUAL:
        total += tl.load(residual + place, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=wanted)


@triton.jit
def gated(x, gain, gate, up, y, count, eps, D, F, NORM: tl.constexpr, SHRINK: tl.constexpr, BLOCK_F: tl.constexpr,
          BLOCK: tl.constexpr):
    """Compute silu(gate x) * (up x) for rows x (N, D). Writes y (N, F).

    With NORM, the rows are first normalized with RMSNorm, as in `qkv_heads`.

    Grid: (T, blocks of outputs).
    """
    row, out = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    real = row < tl.load(count)
    squares = tl.zeros((ROWS,), tl.float32)
    left, right = tl.zeros((ROWS, BLOCK_F), tl.float32), tl.zeros((ROWS, BLOCK_F), tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place, wanted = out[:, None] * D + at[None], (out < F)[:, None] & (at < D)[None]
        a = tl.load(gate + place, mask=wanted, other=0.0)
        b = tl.load(up + place, mask=wanted, other=0.0)
        part = tl.load(x + row[:, None] * D + at[None], mask=real[:, None] & (at < D)[None], other=0.0)
        if NORM:
            wide = part.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            wide *= tl.load(gain + at, mask=at < D, other=0.0).to(tl.float32)[None] * SHRINK
            part = wide.to(a.dtype)
        left = tl.dot(part, tl.trans(a), left)
        right = tl.dot(part, tl.trans(b), right)
    if NORM:
        scale = tl.rsqrt(squares / D + eps) / SHRINK
        left, right = left * scale[:, None], right * scale[:, None]
    product = left * tl.sigmoid(left) * right
    tl.store(y + row[:, None] * F + out[None], product.to(y.dtype.element_ty), mask=real[:, None] & (out < F)[None])


@triton.jit
def head_logits(x, weight, bias, logits, best, count, D, V, BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
                BLOCK: tl.constexpr):
    """Compute the fp32 logits (N, V) of rows x (N, D), and the likeliest word of each block of words.

    Writes the logits to `logits`, and the number of each block's likeliest word to `best` (N, blocks). If several words
    are equally likely, the one with the lowest number is written.

    Grid: (T, blocks of words).
    """
    row, word = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    real, start_of = row < tl.load(count), word.to(tl.int64)[:, None] * D       # weights may have over 2^31 numbers
    total = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(weight + start_of + at[None], mask=(word < V)[:, None] & (at < D)[None], other=0.0)
        part = tl.load(x + row[:, None] * D + at[None], mask=real[:, None] & (at < D)[None], other=0.0)
        total = tl.dot(part, tl.trans(w), total)
    if BIAS:
        total += tl.load(bias + word, mask=word < V, other=0.0).to(tl.float32)[None]
    tl.store(logits + row[:, None] * V + word[None], total, mask=real[:, None] & (word < V)[None])
    total = tl.where((word < V)[None], total, -float("inf"))
    first = tl.min(tl.where(total == tl.max(total, 1)[:, None], word[None], V - 1), 1)
    tl.store(best + row * tl.num_programs(1) + tl.program_id(1), first, mask=real)


@triton.jit
def argmax(logits, best, tokens, count, V, blocks, BLOCK: tl.constexpr):
    """Find the likeliest word of each row, from `logits` (N, V) and `best` (N, blocks) of `head_logits`.

    Writes the word numbers to `tokens` (N,). If several words are equally likely, the one with the lowest number is
    written.

    Grid: (N,).
    """
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    most, token = tl.full((BLOCK,), -float("inf"), tl.float32), tl.full((BLOCK,), V - 1, tl.int32)
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(best + row * blocks + at, mask=at < blocks, other=V - 1)
        logit = tl.load(logits + row * V + word, mask=at < blocks, other=-float("inf"))
        token = tl.where(logit > most, word, token)             # blocks ascend, so an equal one comes later
        most = tl.maximum(most, logit)
    tl.store(tokens + row, tl.min(tl.where(most == tl.max(most, 0), token, V - 1), 0))
