// Exits: their adapters, the estimators of their confidence, and the drafter.
//
// Letters: D hidden size. `carried` is the hidden state that produced the newest token.
#pragma once

#include "norm.h"
#include "softmax.h"

namespace {

// x (rows, in) for an adapter: h, and behind it `carried` unless that is null, times the column scales. sum: h in fp32.
inline void gather_inputs(const Adapter& exit, const bf16* h, const bf16* carried, int rows, Number* x, float* sum) {
    const int D = exit.up.out, in = exit.gate_down.in;
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < D; j++) sum[size_t(r) * D + j] = widen(h[size_t(r) * D + j]);
        for (int part = 0; part < (carried ? 2 : 1); part++) {
            const bf16* from = (part ? carried : h) + size_t(r) * D;
            const float* scale = exit.column_scale ? exit.column_scale + part * D : nullptr;
            Number* to = x + size_t(r) * in + part * D;
            for (int j = 0; j < D; j++) round_to(to[j], scale ? widen(from[j]) * scale[j] : widen(from[j]));
        }
    }
}

// The adapter of an exit: h and carried (rows, D) bf16 -> out (rows, D) bf16. `carried` is null where it is not read.
void adapt(const Adapter& exit, const bf16* h, const bf16* carried, bf16* out, int rows, int threads) {
    const int D = exit.up.out, width = exit.up.in, in = exit.gate_down.in;
    Number* x = scratch<Number, struct AdapterInputs>(size_t(rows) * in);
    Number* act = scratch<Number, struct Act>(size_t(rows) * width);
    float* sum = scratch<float, struct Sum>(size_t(rows) * D);
    gather_inputs(exit, h, carried, rows, x, sum);
    run_team(threads, [&](Team& team) {
        if (exit.linear.weight)
            multiply(team, exit.linear, x, in, rows, [&](int r, int o, const float* sums) {
                for (int j = 0; j < BLOCK && o + j < D; j++) sum[size_t(r) * D + o + j] = sums[j];
            });
        team.barrier();
        multiply_gated(team, exit.gate_down, x, rows, width, act);
        team.barrier();
        multiply(team, exit.up, act, width, rows, [&](int r, int o, const float* sums) {
            for (int j = 0; j < BLOCK && o + j < D; j++) sum[size_t(r) * D + o + j] += sums[j];
        });
        team.barrier();
        for (int r = team.begin(rows); r < team.end(rows); r++)
            norm_row(sum + size_t(r) * D, exit.norm, D, exit.eps, out + size_t(r) * D);
    });
}

// Confidence of an exit (rows): an estimator's probability that its choice is right. Inputs are those of softmax_facts.
void confidence(const Matrix& m, const Estimator& estimator, const bf16* x, const float* copied, const bf16* before,
                float* probabilities, int rows, int threads) {
    const int in = estimator.in;
    float* facts = scratch<float, struct Facts>(size_t(rows) * in);
    softmax_facts(m, x, copied, before, facts, rows, threads);
    for (int r = 0; r < rows; r++) {
        float logit = estimator.outer_bias;
        for (int w = 0; w < estimator.width; w++) {
            float sum = estimator.inner_bias[w];
            for (int j = 0; j < in; j++) sum += estimator.inner[w * in + j] * facts[r * in + j];
            logit += estimator.outer[w] * silu(sum);
        }
        probabilities[r] = 1 / (1 + fast_exp(-logit));
    }
}

// A matrix times one row -> out. The row is given as `parts` parts of equal length; each input is multiplied by its
// column scale.
void linear_of_parts(const Matrix& m, const float* column_scale, const bf16* const* row, int parts, float* out,
                     int threads) {
    bf16* x = scratch<bf16, struct Row>(m.in);
    const int each = m.in / parts;
    for (int i = 0; i < m.in; i++) x[i] = narrow(widen(row[i / each][i % each]) * column_scale[i]);
    linear(m, x, out, 1, threads);
}

// Drafts after each of `tokens` (rows), by an adapter that reads their rows of `embedding`, and the k likeliest
// outputs of `words`, as from `likeliest`. carried: rows of D, or null; context (D) is added to them, or null. hidden:
// (rows, D).
void draft(const Matrix& embedding, const Adapter& exit, const Matrix& words, const int64_t* tokens,
           const bf16* const* carried, const float* context, bf16* hidden, float temperature, int k, int32_t* outputs,
           float* probs, int rows, int threads) {
    const int D = embedding.in;
    bf16 *h = scratch<bf16, struct Embedded>(size_t(rows) * D), *sums = scratch<bf16, struct Carried>(size_t(rows) * D);
    unpack_rows_16(embedding, tokens, rows, h);
    for (int r = 0; carried && r < rows; r++)
        for (int j = 0; j < D; j++)
            sums[size_t(r) * D + j] = context ? narrow(widen(carried[r][j]) + context[j]) : carried[r][j];
    adapt(exit, h, carried ? sums : nullptr, hidden, rows, threads);
    likeliest(words, hidden, temperature, k, outputs, probs, rows, threads);
}

}  // namespace
