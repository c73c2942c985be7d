// Products with the KV cache for a few queries of one head: scores from keys, and sums of weighted values.
#pragma once

#include <algorithm>

#include "kv_cache.h"
#include "matrix.h"

namespace {

// dot_keys<M>: scores (M, KEYS) of queries (M, d) with a block of keys -> out. Meanwhile prefetches around `next`.
// add_value_block<M, B>: sum[m][j] += values of up to KEYS positions, a multiple of 4, times probs[m][t], for M queries
// and B blocks of dimensions; units of four positions follow every `step` bytes.
#ifdef BF16_DOT
template <int M>
inline void dot_keys(const uint8_t* block, const uint8_t* next, const Number* queries, int d, float* out,
                     size_t out_stride) {
    __m512 sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    prefetch<M, 2 * KEYS>(next - PREFETCH_12_BITS);
    add_units<M, 1>(block + 2 * KEYS, UNIT, next + 2 * KEYS - PREFETCH_12_BITS, SharedExponent(), queries, d, d / 2,
                    sum);
    for (int v = 0; v < 2; v++) {
        const Floats powers = powers_of_two(block + LANES * v);
        for (int m = 0; m < M; m++) store(out + m * out_stride + LANES * v, (Floats)sum[m][v] * powers);
    }
}

template <int M, int B>
inline void add_value_block(const uint8_t* values, const uint8_t* next, size_t step, int positions, const Number* probs,
                            size_t probs_stride, float* sum, size_t stride) {
    __m512 sums[M][2 * B];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2 * B; v++) sums[m][v] = _mm512_loadu_ps(sum + m * stride + LANES * v);
    add_units<M, B>(values, step, next - PREFETCH_12_BITS, SharedExponent(), probs, probs_stride, positions / 2, sums);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2 * B; v++) _mm512_storeu_ps(sum + m * stride + LANES * v, sums[m][v]);
}
#else
template <int M>
inline void dot_keys(const uint8_t* block, const uint8_t* next, const Number* queries, int d, float* out,
                     size_t out_stride) {
    alignas(64) uint32_t piece[L1_PAIRS * BLOCK];
    clear<M>(out, out_stride, KEYS);
    for (int p = 0, n; p < d / 2; p += n) {
        n = std::min(d / 2 - p, L1_PAIRS);
        const size_t at = 2 * KEYS + p / 2 * UNIT;
        decode_units<1>(block + at, UNIT, next + at, SharedExponent(), n, piece);
        add_products<M, 0>(piece, BLOCK, BLOCK, queries + 2 * p, d, n, out, out_stride);
    }
    for (int v = 0; v < 2; v++) {
        const Floats powers = powers_of_two(block + LANES * v);
        for (int m = 0; m < M; m++) {
            float* to = out + m * out_stride + LANES * v;
            store(to, load<Floats>(to) * powers);
        }
    }
}

template <int M, int B>
inline void add_value_block(const uint8_t* values, const uint8_t* next, size_t step, int positions, const Number* probs,
                            size_t probs_stride, float* sum, size_t stride) {
    alignas(64) uint32_t piece[KEYS / 2 * B * BLOCK];
    decode_units<B>(values, step, next, SharedExponent(), positions / 2, piece);
    add_products<M, 0>(piece, B * BLOCK, B * BLOCK, probs, probs_stride, positions / 2, sum, stride);
}
#endif

// sum (queries, padded(d)) += values of slots begin..end-1, both multiples of 4, times probs[i][t - begin], in order of
// slots. next(t) is what to prefetch while the block from slot t on is added.
template <class Next>
void add_values(int queries, const HeadCache& cache, int begin, int end, const Number* probs, size_t probs_stride,
                float* sum, Next next) {
    const int columns = padded(cache.d);
    with_constant<MAX_QUERIES>(queries, [&](auto m) {
        constexpr bool two_blocks = m() < COMPUTE_BOUND_ROWS;       // hides the latency of a few queries' sums
        for (int t = begin; t < end; t += KEYS) {
            const uint8_t* later = next(t);
            auto add = [&](int c, auto blocks) {
                add_value_block<m(), blocks()>(cache.value_unit(t, c), later + c / BLOCK * UNIT, cache.value_step(),
                                               std::min(KEYS, end - t), probs + t - begin, probs_stride, sum + c,
                                               columns);
            };
            int c = 0;
            if constexpr (two_blocks)
                for (; c + 2 * BLOCK <= columns; c += 2 * BLOCK) add(c, std::integral_constant<int, 2>());
            for (; c < columns; c += BLOCK) add(c, std::integral_constant<int, 1>());
        }
    });
}

}  // namespace
