// Dot products on processors without an instruction for bf16: weights are widened to vectors of fp32.
//
// Supplies the same functions as dot_bf16.h: dot_16_bits, dot_block_16 and dot_12_bits; also dot_many_12_bits. In
// templates, M is the number of rows of a tile and B the number of blocks side by side. Each row's sum runs over its
// inputs in order. With 8 lanes there are only 16 vector registers: most choices below follow from that.
#pragma once

#include <algorithm>

#include "packing.h"
#include "scratch.h"

namespace {

constexpr int L1_PAIRS = 64;            // pairs of weights of a block that are read again while they are in L1
constexpr int L1_WIDE_PAIRS = 96;       // the same for weights decoded to fp32
constexpr int DECODE_IN_REGISTERS = 4;  // most rows to decode in registers; the sums of six rows fill all registers

// The first and the second inputs of a vector of pairs.
inline Floats first_inputs(UInts pairs) { return (Floats)(pairs << 16); }
inline Floats second_inputs(UInts pairs) { return (Floats)(pairs & 0xFFFF0000u); }

// -- 16 bits ----------------------------------------------------------------------------------------------------------

// out[m][j] += sum over p of w[p][j] . x[m][p], for M rows and 16 outputs, or B = 2 times 16 that lie `apart` words.
// Pair p of w begins at p * step. For each pair, PREFETCHED bytes of later weights are prefetched, from `next` on, and
// for B = 2 as many from next + next_apart on. Not inlined: where it is, GCC runs out of registers.
template <int M, int B, int PREFETCHED>
__attribute__((noinline)) void add_columns(const uint32_t* w, size_t step, size_t apart, const char* next,
                                           size_t next_apart, const Number* x, size_t stride, int pairs, float* out,
                                           size_t out_stride) {
    constexpr int each = 16 / LANES, V = B * each;
    Floats sum[M][V], weights[V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sum[m][v] = load<Floats>(out + m * out_stride + LANES * v);
    auto add = [&](const Number* input) __attribute__((always_inline)) {
        if constexpr (M <= FEW_ROWS) {           // registers are left for the inputs: one weight vector after another
            Floats inputs[M];
            for (int m = 0; m < M; m++) inputs[m] = broadcast(input[m * stride]);
            for (int v = 0; v < V; v++)
                for (int m = 0; m < M; m++) sum[m][v] += weights[v] * inputs[m];
        } else {
            for (int m = 0; m < M; m++) {
                Floats one = broadcast(input[m * stride]);
                for (int v = 0; v < V; v++) sum[m][v] += weights[v] * one;
            }
        }
    };
    for (int p = 0; p < pairs; p++, w += step, next += PREFETCHED) {
        for (int b = 0; b < B; b++) __builtin_prefetch(next + b * next_apart);
        auto vector = [&](int v) __attribute__((always_inline)) {
            return load<UInts>(w + v / each * apart + v % each * LANES);
        };
        for (int v = 0; v < V; v++) weights[v] = first_inputs(vector(v));
        add(x + 2 * p);
        for (int v = 0; v < V; v++) weights[v] = second_inputs(vector(v));
        add(x + 2 * p + 1);
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(out + m * out_stride + LANES * v, sum[m][v]);
}

// As add_columns, for `columns` outputs side by side, a multiple of 16. More rows than REGISTER_TILE are computed in
// two parts. Weights that are read more than once are read in pieces that fit into L1.
template <int M, int PREFETCHED = 64>
inline void add_products(const uint32_t* w, size_t step, int columns, const Number* x, size_t stride, int pairs,
                         float* out, size_t out_stride) {
    constexpr bool two_parts = LANES == 8 && M > REGISTER_TILE;
    constexpr int B = LANES == 16 || M <= FEW_ROWS ? 2 : 1;
    const int piece = two_parts || columns > 16 ? L1_PAIRS : pairs;
    for (int p = 0, n; p < pairs; p += n, w += n * step, x += 2 * n) {
        n = std::min(pairs - p, piece);
        const char* next = (const char*)w + (PREFETCHED ? PREFETCH : 0);
        int c = 0;
        for (; c + 16 * B <= columns; c += 16 * B, next += B * n * PREFETCHED) {
            if constexpr (two_parts) {
                add_columns<4, B, PREFETCHED / 2>(w + c, step, 16, next, 0, x, stride, n, out + c, out_stride);
                add_columns<M - 4, B, PREFETCHED / 2>(w + c, step, 16, next + n * PREFETCHED / 2, 0, x + 4 * stride,
                                                      stride, n, out + 4 * out_stride + c, out_stride);
            } else {
                add_columns<M, B, PREFETCHED>(w + c, step, 16, next, size_t(n) * PREFETCHED, x, stride, n, out + c,
                                              out_stride);
            }
        }
        if (c < columns)
            add_columns<M, 1, PREFETCHED>(w + c, step, 16, next, 0, x, stride, n, out + c, out_stride);
    }
}

template <int M>
inline void clear(float* out, size_t out_stride, int columns) {
    for (int m = 0; m < M; m++) std::memset(out + m * out_stride, 0, sizeof(float) * columns);
}

// out[m][j] = sum over p of w[p][j] . x[m][p], for M rows and a 16-bit block (pairs, BLOCK).
template <int M>
inline void dot_block_16(const uint32_t* w, const Number* x, size_t stride, int pairs, float* out, size_t out_stride) {
    clear<M>(out, out_stride, BLOCK);
    add_products<M>(w, BLOCK, BLOCK, x, stride, pairs, out, out_stride);
}

// As dot_block_16, for two neighbouring blocks of 16 outputs at once.
template <int M>
inline void dot_two_blocks_16(const uint32_t* w, size_t apart, const Number* x, size_t stride, int pairs, float* out,
                              size_t out_stride) {
    clear<M>(out, out_stride, 32);
    add_columns<M, 2, 64>(w, 16, apart, (const char*)w + PREFETCH, 4 * apart, x, stride, pairs, out, out_stride);
}

// `count` blocks of a 16-bit matrix, from block b on, for a tile of rows x -> out, BLOCK sums for each block.
inline __attribute__((always_inline))
void dot_16_bits(const Matrix& m, int b, int count, const Number* x, size_t stride, int tile, float* out,
                 size_t out_stride) {
    const int n = pairs(m);
    if (BLOCK == 16 && count == 2 && tile < FEW_ROWS)
        return with_constant<FEW_ROWS - 1>(tile, [&](auto rows) {
            dot_two_blocks_16<rows()>(block_16(m, b), size_t(n) * BLOCK, x, stride, n, out, out_stride);
        });
    for (int i = 0; i < count; i++)
        with_constant<MAX_TILE>(tile, [&](auto rows) {
            dot_block_16<rows()>(block_16(m, b + i), x, stride, n, out + i * BLOCK, out_stride);
        });
}

// -- 12 bits ----------------------------------------------------------------------------------------------------------

// Decode units of B blocks side by side, one unit of each every `step` bytes, into the 16-bit layout (pairs, B, BLOCK).
// With each unit, those at `next` are prefetched.
template <int B, class Decoder>
inline void decode_units(const uint8_t* w, size_t step, const uint8_t* next, const Decoder& decoder, int pairs,
                         uint32_t* to) {
    for (int p = 0; p < pairs; p += 2, w += step, next += step, to += 2 * B * BLOCK) {
        for (int line = 0; line < B * UNIT; line += 64) __builtin_prefetch(next + line);
        for (int b = 0; b < B; b++)
            decode(w + b * UNIT, decoder, [&](int q, UInts low, UInts high) {
                std::memcpy(to + (q * B + b) * BLOCK, &low, sizeof low);
                std::memcpy(to + (q * B + b) * BLOCK + LANES, &high, sizeof high);
            });
    }
}

// Decode units of a block to fp32 (2 pairs, BLOCK): one input of all outputs after the other.
inline void decode_wide(const uint8_t* w, const CodeBook& book, int pairs, float* to) {
    for (int p = 0; p < pairs; p += 2, w += UNIT, to += 4 * BLOCK)
        decode(w, book, [&](int q, UInts low, UInts high) {
            float* pair = to + q * 2 * BLOCK;
            store(pair, first_inputs(low));
            store(pair + LANES, first_inputs(high));
            store(pair + BLOCK, second_inputs(low));
            store(pair + BLOCK + LANES, second_inputs(high));
        });
}

// out[m][j] = sum over p of w[p][j] . x[m][p], for M rows, few enough to decode in registers, and B blocks that lie
// `apart` bytes.
template <int M, int B>
__attribute__((noinline)) void dot_in_registers(const uint8_t* block, size_t apart, const Number* x, size_t stride,
                                                int pairs, float* out, size_t out_stride) {
    Floats sum[M][2 * B] = {};
    const CodeBook book[2] = {CodeBook(block), CodeBook(block + (B - 1) * apart)};
    const uint8_t* w = block + sizeof(BlockHeader);
    const int turn = pairs - PREFETCH_12_BITS / PAIR_BYTES;     // from here on the next blocks are prefetched
    for (int p = 0; p < pairs; p += 2, w += UNIT, x += 4)
        for (int b = 0; b < B; b++) {
            const uint8_t* next = w + b * apart + PREFETCH_12_BITS + (p < turn ? 0 : (B - 1) * apart);
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            decode(w + b * apart, book[b], [&](int q, UInts low, UInts high) __attribute__((always_inline)) {
                for (int i = 0; i < 2; i++) {
                    const Floats first = i ? second_inputs(low) : first_inputs(low);
                    const Floats second = i ? second_inputs(high) : first_inputs(high);
                    for (int m = 0; m < M; m++) {
                        const Floats one = broadcast(x[m * stride + 2 * q + i]);
                        sum[m][2 * b] += first * one;
                        sum[m][2 * b + 1] += second * one;
                    }
                }
            });
        }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2 * B; v++) store(out + m * out_stride + LANES * v, sum[m][v]);
}

// As above, for one block and up to MAX_TILE rows. For more than a few rows, weights are decoded in pieces into L1.
template <int M>
inline void dot_block_12(const uint8_t* block, const Number* x, size_t stride, int pairs, float* out,
                         size_t out_stride) {
    if constexpr (M <= DECODE_IN_REGISTERS)
        return dot_in_registers<M, 1>(block, 0, x, stride, pairs, out, out_stride);
    alignas(64) uint32_t piece[L1_PAIRS * BLOCK];
    const CodeBook book(block);
    const uint8_t* w = block + sizeof(BlockHeader);
    clear<M>(out, out_stride, BLOCK);
    for (int p = 0, n; p < pairs; p += n, w += size_t(n) * PAIR_BYTES, x += 2 * n) {
        n = std::min(pairs - p, L1_PAIRS);
        const char* next = (const char*)w + PREFETCH_12_BITS;
        decode_units<1>(w, UNIT, w, book, n, piece);
        if constexpr (M <= REGISTER_TILE) {
            add_columns<M, 1, PAIR_BYTES>(piece, BLOCK, BLOCK, next, 0, x, stride, n, out, out_stride);
        } else {
            add_columns<4, 1, PAIR_BYTES / 2>(piece, BLOCK, BLOCK, next, 0, x, stride, n, out, out_stride);
            add_columns<M - 4, 1, PAIR_BYTES / 2>(piece, BLOCK, BLOCK, next + n * PAIR_BYTES / 2, 0, x + 4 * stride,
                                                  stride, n, out + 4 * out_stride, out_stride);
        }
    }
}

// As dot_16_bits, for a matrix in 12 bits, without its outliers.
inline __attribute__((always_inline))
void dot_12_bits(const Matrix& m, int b, int count, const Number* x, size_t stride, int tile, float* out,
                 size_t out_stride) {
    const int n = pairs(m);
    if (count == 2 && tile < FEW_ROWS)
        return with_constant<FEW_ROWS - 1>(tile, [&](auto rows) {
            dot_in_registers<rows(), 2>(block_12(m, b), block_bytes_12(n), x, stride, n, out, out_stride);
        });
    for (int i = 0; i < count; i++)
        with_constant<MAX_TILE>(tile, [&](auto rows) {
            dot_block_12<rows()>(block_12(m, b + i), x, stride, n, out + i * BLOCK, out_stride);
        });
}

// -- many rows, 12 bits -----------------------------------------------------------------------------------------------

// out[m][j] += sum over p of w[p][j] . x[m][p], for M rows and a block from `decode_wide`. With each pair, a cache line
// is prefetched; these lines start at `next` and lie `next_step` bytes apart.
template <int M>
__attribute__((noinline)) void add_wide(const float* w, const void* next, int next_step, const Number* x, size_t stride,
                                        int pairs, float* out, size_t out_stride) {
    const char* line = (const char*)next;
    Floats sum[M][2];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) sum[m][v] = load<Floats>(out + m * out_stride + LANES * v);
    for (int p = 0; p < pairs; p++, x += 2, line += next_step) {
        __builtin_prefetch(line);
        for (int i = 0; i < 2; i++, w += BLOCK) {
            Floats first = load<Floats>(w), second = load<Floats>(w + LANES);
            keep_in_registers(first, second);
            for (int m = 0; m < M; m++) {
                const Floats one = broadcast(x[m * stride + i]);
                sum[m][0] += first * one;
                sum[m][1] += second * one;
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) store(out + m * out_stride + LANES * v, sum[m][v]);
}

// Sums of one or two blocks, from block b on, for more than MAX_TILE rows: (rows, 2 BLOCK), without outliers, valid
// until this thread calls again. All rows read a piece of the weights before the next piece is decoded.
inline float* dot_many_12_bits(const Matrix& m, int b, int count, const Number* x, size_t stride, int rows) {
    alignas(64) float piece[L1_WIDE_PAIRS * 2 * BLOCK];
    float* sums = scratch<float, struct ManySums>(size_t(rows) * 2 * BLOCK);
    std::memset(sums, 0, sizeof(float) * rows * 2 * BLOCK);
    for (int i = 0; i < count; i++) {
        const uint8_t* block = block_12(m, b + i);
        for (int p = 0, n; p < pairs(m); p += n) {
            n = std::min(pairs(m) - p, L1_WIDE_PAIRS);
            const uint8_t* w = block + block_bytes_12(p);
            decode_wide(w, CodeBook(block), n, piece);
            each_tile(rows, [&](int r, int tile) {
                with_constant<REGISTER_TILE>(tile, [&](auto some) {
                    float* out = sums + r * 2 * BLOCK + i * BLOCK;
                    if (r == 0)
                        add_wide<some()>(piece, w + PREFETCH_12_BITS, PAIR_BYTES, x + 2 * p, stride, n, out, 2 * BLOCK);
                    else
                        add_wide<some()>(piece, piece, 0, x + r * stride + 2 * p, stride, n, out, 2 * BLOCK);
                });
            });
        }
    }
    return sums;
}

}  // namespace
