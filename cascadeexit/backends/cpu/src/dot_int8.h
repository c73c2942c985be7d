// Dot products of 8-bit weights with inputs rounded to 16-bit integers; sums are exact, in 32-bit integers.
#pragma once

#include <cmath>

#include "packing.h"
#include "scratch.h"

namespace {

// Rows (rows, in) as a matrix reads them. The integers and their scales exist for 8-bit matrices only.
struct Inputs {
    const Number* x;                // a row every `stride` numbers
    size_t stride;
    const int16_t* integers;        // (rows, 2 pairs)
    const float* scale;             // (rows)
};

// The scale of a row's integers. The largest integer is as large as 32-bit sums allow.
inline float integer_scale(const Number* x, int in) {
    float sizes[16] = {}, size = 1e-30f;
    for (int j = 0; j < in; j++) {
        const float here = std::fabs(as_float(x[j])), before = sizes[j % 16];
        sizes[j % 16] = here > before ? here : before;
    }
    for (float here : sizes) size = here > size ? here : size;
    return size / std::fmin(32767.0f, 16777215.0f / float((in + 1) / 2 * 2));        // 2^31 / 128
}

// Rows as matrix m reads them. The integers are valid until this thread calls again.
inline Inputs inputs_for(const Matrix& m, const Number* x, size_t stride, int rows) {
    if (!m.scale) return {x, stride, nullptr, nullptr};
    const int in = 2 * pairs(m);
    int16_t* integers = scratch<int16_t, struct Integers>(size_t(rows) * in);
    float* scale = scratch<float, struct Scales>(rows);
    for (int r = 0; r < rows; r++) {
        const Number* from = x + r * stride;
        scale[r] = integer_scale(from, m.in);
        const float times = 1 / scale[r];
        for (int j = 0; j < m.in; j++)
            integers[size_t(r) * in + j] = int16_t(std::nearbyint(as_float(from[j]) * times));
    }
    return {x, stride, integers, scale};
}

// out[m][j] = (sum over p of w[p][j] . x[m][p]) * x_scale[m] * w_scale[j], for M rows and a block. Outputs of the
// first half and the second half of a block alternate, so that shifts are enough to widen them.
template <int M>
inline void dot_block_8(const int8_t* w, const float* w_scale, const int16_t* x, const float* x_scale, size_t stride,
                        int pairs, float* out, size_t out_stride) {
    Ints sum[M][2] = {};
#pragma GCC unroll 4                // otherwise the loop itself is a quarter of the work for one row
    for (int p = 0; p < pairs; p++, w += 2 * BLOCK) {
        const Shorts both = load<Shorts>(w), first = both << 8 >> 8, second = both >> 8;
        __builtin_prefetch(w + PREFETCH);
        for (int m = 0; m < M; m++) {
            const Shorts inputs = (Shorts)(load<int32_t>(x + m * stride + 2 * p) - Ints{});
            sum[m][0] = add_int16_products(sum[m][0], first, inputs);
            sum[m][1] = add_int16_products(sum[m][1], second, inputs);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++)
            store(out + m * out_stride + LANES * v,
                  __builtin_convertvector(sum[m][v], Floats) * x_scale[m] * load<Floats>(w_scale + LANES * v));
}

// `count` blocks of an 8-bit matrix, from block b on, for a tile of rows from row r on -> out, BLOCK sums for each
// block.
inline __attribute__((always_inline))
void dot_8_bits(const Matrix& m, int b, int count, const Inputs& rows, int r, int tile, float* out, size_t out_stride) {
    const int n = pairs(m);
    for (int i = 0; i < count; i++)
        for (int at = 0; at < tile; at += REGISTER_TILE)
            with_constant<REGISTER_TILE>(tile - at < REGISTER_TILE ? tile - at : REGISTER_TILE, [&](auto some) {
                dot_block_8<some()>((const int8_t*)m.weight + size_t(b + i) * n * 2 * BLOCK, m.scale + (b + i) * BLOCK,
                                    rows.integers + size_t(r + at) * 2 * n, rows.scale + r + at, 2 * n, n,
                                    out + at * out_stride + i * BLOCK, out_stride);
            });
}

}  // namespace
