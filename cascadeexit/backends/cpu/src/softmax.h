// Softmax over the outputs of a matrix: the likeliest outputs, and the inputs of a confidence estimator.
#pragma once

#include <cmath>

#include "matrix.h"

namespace {

// Numbers of the k largest of row (n), best first; of equal ones, the lower number first.
void largest_outputs(const float* row, int n, int k, int32_t* outputs) {
    int found = 0;
    for (int from = 0; from < n; from += BLOCK) {
        const int to = std::min(n, from + BLOCK);
        if (found == k) {                                   // nearly all blocks have nothing larger
            float bound = row[outputs[k - 1]];
            bool any = false;
            for (int j = from; j < to; j++) any |= row[j] > bound;
            if (!any) continue;
        }
        for (int j = from; j < to; j++) {
            if (found == k && !(row[j] > row[outputs[k - 1]])) continue;
            int at = found < k ? found++ : k - 1;
            for (; at > 0 && row[j] > row[outputs[at - 1]]; at--) outputs[at] = outputs[at - 1];
            outputs[at] = j;
        }
    }
}

// The k likeliest outputs for rows x, best first, and their probabilities in the softmax at a temperature: (rows, k).
void likeliest(const Matrix& m, const bf16* x, float temperature, int k, int32_t* outputs, float* probs, int rows,
               int threads) {
    float* logits = scratch<float, struct Logits>(size_t(rows) * m.out);
    linear(m, x, logits, rows, threads);
    for (int r = 0; r < rows; r++, outputs += k, probs += k) {
        const float* row = logits + size_t(r) * m.out;
        largest_outputs(row, m.out, k, outputs);
        const float top = row[outputs[0]], scale = 1 / temperature;
        Floats masses = {};
        each_vector(row, m.out, [&](Floats logits) { masses += fast_exp((logits - top) * scale); });
        const float mass = sum_of(masses);
        for (int i = 0; i < k; i++) probs[i] = fast_exp((row[outputs[i]] - top) * scale) / mass;
    }
}

// One row's log-softmax, in part: log p of output j is logits[j] - top - log_mass.
struct LogSoftmax {
    const float* logits;
    int best;
    float top, log_mass;
    float log_p(int j) const { return std::fmax(-15.0f, logits[j] - top - log_mass); }      // not below -15
};

// Facts of one row: log p of the likeliest output, log p of the second, entropy in nats.
LogSoftmax softmax_row(const float* row, int n, float* facts) {
    float first = -INFINITY, second = -INFINITY;
    Floats firsts = broadcast(first), seconds = firsts, masses = {}, means = {};
    auto rank = [](auto v, auto& first, auto& second) {
        auto least = v < first ? v : first;
        second = least > second ? least : second;
        first = v > first ? v : first;
    };
    each_vector(row, n, [&](Floats v) { rank(v, firsts, seconds); });
    for (int l = 0; l < LANES; l++) rank(float(firsts[l]), first, second);
    for (int l = 0; l < LANES; l++) second = seconds[l] > second ? seconds[l] : second;
    each_vector(row, n, [&](Floats v) {
        Floats e = fast_exp(v - first);
        masses += e;
        means += e * (v - first);
    });
    const float mass = sum_of(masses), mean = sum_of(means), log_mass = std::log(mass);
    LogSoftmax softmax{row, 0, first, log_mass};
    while (row[softmax.best] != first && softmax.best + 1 < n) softmax.best++;
    facts[0] = -log_mass, facts[1] = second - first - log_mass, facts[2] = log_mass - mean / mass;
    return softmax;
}

inline float cosine(const bf16* x, const bf16* y, int n) {
    float dot = 0, xx = 0, yy = 0;
    for (int j = 0; j < n; j++) {
        float a = widen(x[j]), b = widen(y[j]);
        dot += a * b, xx += a * a, yy += b * b;
    }
    return dot / std::fmax(1e-8f, std::sqrt(xx) * std::sqrt(yy));
}

// Facts of rows x (rows, in) bf16 -> (rows, 5), or (rows, 12) with rows `before` (rows, in), the exit before. By
// column:
//   0-2    log p of the likeliest output, log p of the second, entropy in nats
//   3-5    the same of `before`
//   6      whether both have the same likeliest output
//   7, 8   log p by `before` of x's likeliest output, and the other way round, not below -15
//   9      cosine of x and before
//   last 2 of `copied` (rows, 2), an output and a number: the number where that output is x's likeliest one, else 0;
//          and the number where it is not, else 0
void softmax_facts(const Matrix& m, const bf16* x, const float* copied, const bf16* before, float* facts, int rows,
                   int threads) {
    const int in = m.in, n = m.out, all = before ? 2 * rows : rows;
    float* logits = scratch<float, struct Logits>(size_t(all) * n);
    bf16* both = scratch<bf16, struct Both>(size_t(all) * in);
    std::memcpy(both, x, 2 * size_t(rows) * in);
    if (before) std::memcpy(both + size_t(rows) * in, before, 2 * size_t(rows) * in);
    linear(m, both, logits, all, threads);
    for (int r = 0; r < rows; r++) {
        float *to = facts + size_t(r) * (before ? 12 : 5), *copy = to + (before ? 10 : 3);
        const LogSoftmax now = softmax_row(logits + size_t(r) * n, n, to);
        const bool same = copied[2 * r] == now.best;
        copy[0] = same ? copied[2 * r + 1] : 0, copy[1] = same ? 0 : copied[2 * r + 1];
        if (!before) continue;
        const LogSoftmax then = softmax_row(logits + size_t(rows + r) * n, n, to + 3);
        to[6] = now.best == then.best;
        to[7] = then.log_p(now.best);
        to[8] = now.log_p(then.best);
        to[9] = cosine(x + size_t(r) * in, before + size_t(r) * in, in);
    }
}

}  // namespace
