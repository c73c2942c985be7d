// Matrix products by a team of threads, for weights in 16, 12 or 8 bits.
//
// A thread takes a few blocks of outputs at a time and computes them for all rows, a tile of rows at a time. Each row's
// result is bitwise the same whatever other rows are in the pass.
#pragma once

#include <algorithm>

#include "dot_int8.h"
#include "team.h"
#ifdef BF16_DOT
#include "dot_bf16.h"
#else
#include "dot_fp32.h"
#endif

namespace {

// Add a block's outliers to its sums, a row every out_stride.
inline void add_outliers(const Matrix& m, int b, const Number* x, size_t stride, int rows, float* out,
                         size_t out_stride) {
    const BlockHeader header = load<BlockHeader>(block_12(m, b));
    __builtin_prefetch(m.outliers + header.outliers_end);       // the next block's
    for (int i = header.outliers_begin; i < header.outliers_end; i++) {
        const int input = m.outliers[i].position / BLOCK, output = m.outliers[i].position % BLOCK;
        for (int r = 0; r < rows; r++)
            out[r * out_stride + output] += m.outliers[i].value * as_float(x[r * stride + input]);
    }
}

// One or two blocks, from block b on, for a tile of rows from row r on -> out, BLOCK sums for each block.
inline void dot_blocks(const Matrix& m, int b, int count, const Inputs& rows, int r, int tile, float* out,
                       size_t out_stride) {
    const Number* x = rows.x + r * rows.stride;
    if (m.scale) return dot_8_bits(m, b, count, rows, r, tile, out, out_stride);
    if constexpr (READS_12_BITS)
        if (m.outliers) {
            dot_12_bits(m, b, count, x, rows.stride, tile, out, out_stride);
            for (int i = 0; i < count; i++) add_outliers(m, b + i, x, rows.stride, tile, out + i * BLOCK, out_stride);
            return;
        }
    dot_16_bits(m, b, count, x, rows.stride, tile, out, out_stride);
}

// One or two blocks for all rows: use(first row, rows, sums (rows, 2 BLOCK)) for some rows at a time.
template <class Use>
inline void dot_all_rows(const Matrix& m, int b, int count, const Inputs& inputs, int rows, Use use) {
#ifndef BF16_DOT
    if (READS_12_BITS && m.outliers && rows > MAX_TILE) {
        float* sums = dot_many_12_bits(m, b, count, inputs.x, inputs.stride, rows);
        for (int i = 0; i < count; i++)
            add_outliers(m, b + i, inputs.x, inputs.stride, rows, sums + i * BLOCK, 2 * BLOCK);
        return use(0, rows, sums);
    }
#endif
    float sums[MAX_TILE][2 * BLOCK];
    each_tile(rows, [&](int r, int tile) {
        dot_blocks(m, b, count, inputs, r, tile, sums[0], 2 * BLOCK);
        use(r, tile, sums[0]);
    });
}

// x (rows, in) times the matrix: done(row, first output, BLOCK sums) for each block that this thread takes.
template <class Done>
inline void multiply(Team& team, const Matrix& m, const Number* x, size_t stride, int rows, Done done) {
    const Inputs inputs = inputs_for(m, x, stride, rows);
    const int together = LANES == 8 && rows < FEW_ROWS ? 2 : 1;         // blocks
    team.share((blocks(m) + together - 1) / together, [&](int item) {
        const int b = item * together, count = blocks(m) - b < together ? 1 : together;
        dot_all_rows(m, b, count, inputs, rows, [&](int r, int some, const float* sums) {
            for (int i = 0; i < some; i++, sums += 2 * BLOCK)
                for (int k = 0; k < count; k++) done(r + i, (b + k) * BLOCK, sums + k * BLOCK);
        });
    });
}

// silu(gate x) * (other x) -> out (rows, n), for a matrix with blocks of gate and other in turn.
inline void multiply_gated(Team& team, const Matrix& both, const Number* x, int rows, int n, Number* out) {
    const Inputs inputs = inputs_for(both, x, both.in, rows);
    team.share(blocks(both) / 2, [&](int b) {
        const int width = std::min(n - b * BLOCK, BLOCK);
        dot_all_rows(both, 2 * b, 2, inputs, rows, [&](int r, int some, const float* sums) {
            for (int i = 0; i < some; i++, sums += 2 * BLOCK)
                for (int j = 0; j < width; j++)
                    round_to(out[size_t(r + i) * n + b * BLOCK + j], silu(sums[j]) * sums[BLOCK + j]);
        });
    });
}

// How many outputs of a block that begins at `first` exist.
inline int width_of(const Matrix& m, int first) { return std::min(m.out - first, BLOCK); }
inline float bias_of(const Matrix& m, int output) { return m.bias ? m.bias[output] : 0; }

// bf16 rows as products read them: the rows themselves, or a copy in fp32 that is valid until this thread calls again.
template <class To = Number>
inline const To* numbers_of(const bf16* x, size_t n) {
    if constexpr (std::is_same_v<To, bf16>) {
        return x;
    } else {
        To* out = scratch<To, struct WidenedRows>(n);
        for (size_t i = 0; i < n; i++) out[i] = widen(x[i]);
        return out;
    }
}

// x (rows, in) bf16 -> out (rows, out) fp32.
void linear(const Matrix& m, const bf16* x, float* out, int rows, int threads) {
    const Number* read = numbers_of(x, size_t(rows) * m.in);
    run_team(threads, [&](Team& team) {
        multiply(team, m, read, m.in, rows, [&](int r, int first, const float* sums) {
            const int n = width_of(m, first);
            float* to = out + size_t(r) * m.out + first;
            for (int j = 0; j < n; j++) to[j] = sums[j] + bias_of(m, first + j);
        });
    });
}

}  // namespace
