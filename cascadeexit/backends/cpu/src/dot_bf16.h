// Dot products on processors that multiply and add pairs of bf16 in one instruction (AVX-512 BF16).
//
// Supplies the same functions as dot_fp32.h: dot_16_bits, dot_block_16 and dot_12_bits. In templates, M is the number
// of rows of a tile and B the number of blocks side by side. Each row's sum runs over its inputs in order.
#pragma once

#include "packing.h"

namespace {

const bool SMALL_L1 = sysconf(_SC_LEVEL1_DCACHE_SIZE) <= 32 * 1024;

// Prefetch BYTES bytes that are needed later, from PREFETCH_12_BITS after w on, into L1 only: they are used once. This
// long distance gives the highest bandwidth. With a small L1, tiles of many rows, which also compute, are faster
// with two distances: far ahead into L2, then a short one into L1.
template <int M, int BYTES>
inline void prefetch(const void* w) {
    const char* from = (const char*)w;
    for (int line = 0; line < BYTES; line += 64)
        if (!SMALL_L1) {
            _mm_prefetch(from + line + PREFETCH_12_BITS, _MM_HINT_NTA);
        } else if (M < COMPUTE_BOUND_ROWS) {
            _mm_prefetch(from + line + PREFETCH_12_BITS, _MM_HINT_T0);
        } else {
            _mm_prefetch(from + line + 2048, _MM_HINT_T0);
            _mm_prefetch(from + line + 32768, _MM_HINT_T1);
        }
}

// out[m][j] = sum over p of w[p][j] . x[m][p], for M rows and a 16-bit block (pairs, BLOCK).
template <int M>
inline void dot_block_16(const uint32_t* w, const bf16* x, size_t stride, int pairs, float* out, size_t out_stride) {
    constexpr int V = BLOCK / LANES;
    __m512 sum[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sum[m][v] = _mm512_setzero_ps();
    for (int p = 0; p < pairs; p++, w += BLOCK) {
        __m512bh weights[V];
        for (int v = 0; v < V; v++) weights[v] = (__m512bh)_mm512_loadu_si512(w + 16 * v);
        prefetch<M, 4 * BLOCK>(w);
        for (int m = 0; m < M; m++) {
            __m512bh inputs = (__m512bh)_mm512_set1_epi32(load<int>(x + m * stride + 2 * p));
            for (int v = 0; v < V; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], weights[v], inputs);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(out + m * out_stride + 16 * v, sum[m][v]);
}

// sum[m] += products of M rows with `pairs` pairs of inputs, an even number, of B blocks in 12 bits. Units of two pairs
// follow every `step` bytes, with the units of B blocks side by side. Prefetch distances count from `next`.
template <int M, int B, class Decoder>
inline void add_units(const uint8_t* w, size_t step, const uint8_t* next, const Decoder& decoder, const bf16* x,
                      size_t stride, int pairs, __m512 (&sum)[M][2 * B]) {
    for (int p = 0; p < pairs; p += 2, w += step, next += step, x += 4)
        for (int b = 0; b < B; b++) {
            prefetch<M, UNIT>(next + b * UNIT);
            decode(w + b * UNIT, decoder, [&](int q, UInts low, UInts high) __attribute__((always_inline)) {
                for (int m = 0; m < M; m++) {
                    const __m512bh inputs = (__m512bh)_mm512_set1_epi32(load<int>(x + m * stride + 2 * q));
                    sum[m][2 * b] = _mm512_dpbf16_ps(sum[m][2 * b], (__m512bh)low, inputs);
                    sum[m][2 * b + 1] = _mm512_dpbf16_ps(sum[m][2 * b + 1], (__m512bh)high, inputs);
                }
            });
        }
}

// As dot_block_16, for a block in 12 bits.
template <int M>
inline void dot_block_12(const uint8_t* block, const bf16* x, size_t stride, int pairs, float* out, size_t out_stride) {
    __m512 sum[M][2];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) sum[m][v] = _mm512_setzero_ps();
    const uint8_t* w = block + sizeof(BlockHeader);
    add_units<M, 1>(w, UNIT, w, CodeBook(block), x, stride, pairs, sum);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(out + m * out_stride + 16 * v, sum[m][v]);
}

// `count` blocks of a 16-bit matrix, from block b on, for a tile of rows x -> out, BLOCK sums for each block.
// Always inlined, like dot_12_bits: with GCC 12 that is up to 2% faster for 4 to 8 rows.
inline __attribute__((always_inline))
void dot_16_bits(const Matrix& m, int b, int count, const bf16* x, size_t stride, int tile, float* out,
                 size_t out_stride) {
    for (int i = 0; i < count; i++)
        with_constant<MAX_TILE>(tile, [&](auto rows) {
            dot_block_16<rows()>(block_16(m, b + i), x, stride, pairs(m), out + i * BLOCK, out_stride);
        });
}

// As dot_16_bits, for a matrix in 12 bits, without its outliers.
inline __attribute__((always_inline))
void dot_12_bits(const Matrix& m, int b, int count, const bf16* x, size_t stride, int tile, float* out,
                 size_t out_stride) {
    for (int i = 0; i < count; i++)
        with_constant<MAX_TILE>(tile, [&](auto rows) {
            dot_block_12<rows()>(block_12(m, b + i), x, stride, pairs(m), out + i * BLOCK, out_stride);
        });
}

}  // namespace
