// Attention of a few queries over the KV cache, one span of SPAN positions at a time.
//
// Spans begin at multiples of SPAN and each is summed in order, so a row's result does not depend on the rows beside
// it or on which thread works on it. `attend_span` gives the partial softmax of one span, `combine_spans` the result
// of all.
//
// Rows of a tree share the positions before the fork. From there on, the positions of a row are the slots of its own
// path.
#pragma once

#include <algorithm>
#include <cmath>

#include "kv_dot.h"

namespace {

// Up to MAX_QUERIES queries of one key-value head, which share each reading of keys and values.
struct QueryTile {
    HeadCache cache;
    int first, fork, end;           // first visible position; first slot of the tree; end of the slots in use
    const Number* queries;          // (n, d)
    int n, longest;                 // longest: the largest of `visible`
    int visible[MAX_QUERIES];       // end of the positions that each query sees
    const int* paths[MAX_QUERIES];  // in a tree, the slots of positions from `fork` on, ascending; in a text, null
    Number* out[MAX_QUERIES];       // where the d results go
};

// Partial softmax of a tile's queries over one span.
struct SpanResult {
    float max_score[MAX_QUERIES], total[MAX_QUERIES];       // total: the sum of exp(scale (score - max_score))
    float* sums;                                            // values weighted by these exponentials (n, padded(d))
};

// One thread's memory for a span.
struct SpanScratch {
    float* scores;                  // (MAX_QUERIES, stride)
    Number* probs;                  // (MAX_QUERIES, stride)
    float* value_powers;            // (stride), each value's power of two
    int stride;                     // at least a span and the rows of a tree
    uint8_t* path_values;           // copies of the values of a path
};

// Which positions and slots of a span a tile reads.
struct Span {
    int first, start, end;          // first visible position; the same down to a whole block; end of positions
    int keys_end, values_end;       // ends of the blocks of keys and of values
    int next_key;                   // the next span's first slot
    int longest, distance;          // distance: slots from what is read to what is prefetched

    Span(const QueryTile& tile, int number) {
        const int begin = number * SPAN;
        const bool tree = tile.paths[0];
        first = std::max(tile.first, begin);
        start = first / KEYS * KEYS;
        end = std::min(begin + SPAN, tile.longest);
        // In a tree, the keys of all its slots are scored, also those past the last position.
        keys_end = ((tree && end > tile.fork ? tile.end : end) + KEYS - 1) / KEYS * KEYS;
        values_end = (end + KEYS - 1) / KEYS * KEYS;
        next_key = begin + SPAN;
        longest = tile.longest;
        distance = int(PREFETCH_12_BITS / key_block_bytes(tile.cache.d) + 1) * KEYS;
    }

    // Prefetch address while the block from slot t on is read: a later block; values follow keys, then the next span.
    const uint8_t* after_keys(const HeadCache& cache, int t) const {
        const int later = t + distance, value = later - keys_end + start;
        return later < keys_end ? cache.key_block(later)
               : value < values_end ? cache.value_unit(value, 0) : cache.key_block(t);
    }
    const uint8_t* after_values(const HeadCache& cache, int t) const {
        const int later = t + distance, key = later - values_end + next_key;
        return later < values_end ? cache.value_unit(later, 0)
               : key < longest ? cache.key_block(key) : cache.value_unit(t, 0);
    }
};

// Scores of all queries with all keys of a span -> scratch.scores; powers of two of its values -> scratch.value_powers.
inline void score_keys(const QueryTile& tile, const Span& span, const SpanScratch& scratch) {
    const HeadCache& cache = tile.cache;
    with_constant<MAX_QUERIES>(tile.n, [&](auto m) {
        for (int t = span.start; t < span.keys_end; t += KEYS)
            dot_keys<m()>(cache.key_block(t), span.after_keys(cache, t), tile.queries, cache.d,
                          scratch.scores + t - span.start, scratch.stride);
    });
    const uint8_t* exponents = cache.key_block(span.start) + KEYS;
    for (int t = span.start; t < span.values_end; t += KEYS, exponents += key_block_bytes(cache.d))
        for (int v = 0; v < KEYS; v += LANES)
            store(scratch.value_powers + t - span.start + v, powers_of_two(exponents + v));
}

// Softmax of scores row[first..visible-1], all indexed by position: max_score is the largest score. probs[t] is
// exp(scale (score - max_score)) times the power of two of value t, and 0 in the rest of the blocks. Returns the sum of
// the exponentials. Without visible positions, max_score is -infinity and the sum 0.
float softmax_span(const float* row, int first, int visible, float scale, const float* value_powers, Number* probs,
                   float& max_score) {
    const Ints lane = lane_numbers();
    const int start = first / KEYS * KEYS, whole = (visible + KEYS - 1) / KEYS * KEYS;
    const int middle = (first + LANES - 1) / LANES * LANES, last = visible / LANES * LANES;
    // Calls f(t, masked) for each vector of positions from t on: masked(x, other) is x where a position is visible, and
    // `other` elsewhere. In the middle, everything is visible.
    auto each = [&](auto f) __attribute__((always_inline)) {
        auto edge = [&](int t) __attribute__((always_inline)) {
            f(t, [&](Floats x, Floats other) { return (lane + t >= first) & (lane + t < visible) ? x : other; });
        };
        int t = start;
        for (; t < middle && t < whole; t += LANES) edge(t);
        for (; t < last; t += LANES) f(t, [](Floats x, Floats) { return x; });
        for (; t < whole; t += LANES) edge(t);
    };
    Floats most = broadcast(-INFINITY), sums = {};
    each([&](int t, auto masked) __attribute__((always_inline)) {
        const Floats score = masked(load<Floats>(row + t), most);
        most = score > most ? score : most;
    });
    max_score = most[0];
    for (int l = 1; l < LANES; l++) max_score = most[l] > max_score ? most[l] : max_score;
    each([&](int t, auto masked) __attribute__((always_inline)) {
        const Floats power = masked(fast_exp((load<Floats>(row + t) - max_score) * scale), Floats{});
        sums += power;
        store_rounded(probs + t, power * load<Floats>(value_powers + t));
    });
    return sum_of(sums);
}

// Turn a tile's scores into weights of values. Rows of a tree first bring the scores of their path into order.
inline void weigh_values(const QueryTile& tile, const Span& span, float scale, const SpanScratch& scratch,
                         SpanResult& result) {
    float* powers = scratch.value_powers - span.start;          // by position, as row and probs are
    for (int i = 0; i < tile.n; i++) {
        float* row = scratch.scores + size_t(i) * scratch.stride - span.start;
        Number* probs = scratch.probs + size_t(i) * scratch.stride - span.start;
        const int visible = std::max(std::min(tile.visible[i], span.end), span.start);
        const int whole = (visible + KEYS - 1) / KEYS * KEYS;
        for (int t = std::max(tile.fork, span.first); tile.paths[0] && t < visible; t++) {
            const int slot = tile.paths[i][t - tile.fork];      // ascending, none before its position
            row[t] = row[slot];
            powers[t] = power_of_two(tile.cache.value_exponent(slot));
        }
        result.total[i] = softmax_span(row, span.first, visible, scale, powers, probs, result.max_score[i]);
        for (int t = whole; t < span.values_end; t++) probs[t] = 0;
    }
}

// Add the values of a tree's paths from position `begin` on. Neighbouring queries of one row share a path.
inline void add_path_values(const QueryTile& tile, const Span& span, int begin, const SpanScratch& scratch,
                            float* sums) {
    const HeadCache& cache = tile.cache;
    const HeadCache path(nullptr, scratch.path_values, cache.d);
    for (int i = 0, same; i < tile.n; i += same) {
        for (same = 1; i + same < tile.n && tile.paths[i + same] == tile.paths[i];) same++;
        const int visible = std::min(tile.visible[i], span.end);
        if (visible <= begin) continue;
        for (int t = begin; t < visible; t++)
            cache.copy_value(t < tile.fork ? t : tile.paths[i][t - tile.fork], path, t - begin);
        add_values(same, path, 0, (visible + 3 - begin) / 4 * 4,
                   scratch.probs + size_t(i) * scratch.stride + begin - span.start, scratch.stride,
                   sums + size_t(i) * padded(cache.d), [&](int t) { return path.value_unit(t, 0); });
    }
}

// One span of a tile -> result.
void attend_span(const QueryTile& tile, int number, float scale, const SpanScratch& scratch, SpanResult& result) {
    const Span span(tile, number);
    score_keys(tile, span, scratch);
    weigh_values(tile, span, scale, scratch, result);
    // Values lie in units of four positions; from the fork's unit on, each path has its own.
    const int own = std::max(tile.fork / 4 * 4, span.start);
    const int shared_end = tile.paths[0] && own < span.values_end ? own : span.values_end;
    std::memset(result.sums, 0, sizeof(float) * tile.n * padded(tile.cache.d));
    add_values(tile.n, tile.cache, span.start, shared_end, scratch.probs, scratch.stride, result.sums,
               [&](int t) { return span.after_values(tile.cache, t); });
    if (shared_end < span.values_end) add_path_values(tile, span, shared_end, scratch, result.sums);
}

// Softmax of query i over `spans` spans, in order -> out (d). `sum` is room for d floats.
void combine_spans(const SpanResult* results, int spans, int i, int d, float scale, float* sum, Number* out) {
    float top = -INFINITY, total = 0;
    for (int s = 0; s < spans; s++) top = std::max(top, results[s].max_score[i]);
    std::memset(sum, 0, 4 * size_t(d));
    for (int s = 0; s < spans; s++) {
        const SpanResult& span = results[s];
        if (span.total[i] == 0) continue;
        float weight = span.max_score[i] == top ? 1.0f : fast_exp((span.max_score[i] - top) * scale);
        const float* part = span.sums + size_t(i) * padded(d);
        total = __builtin_fmaf(weight, span.total[i], total);
        for (int j = 0; j < d; j++) sum[j] = __builtin_fmaf(weight, part[j], sum[j]);
    }
    for (int j = 0; j < d; j++) round_to(out[j], sum[j] / total);
}

}  // namespace
