// The largest output of a matrix for each row, optionally by way of a screen.
//
// A screen is the same weight rounded to 8 bits: half as much to read. Each of its sums bounds the exact output from
// both sides, so few outputs can be the largest, and only these are computed exactly. The result is the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "matrix.h"

namespace {

// The largest output so far; of equal ones, the one with the lowest number.
struct Best {
    float value;
    int32_t output;
    void update(const Best& other) {
        if (other.value > value || (other.value == value && other.output < output)) *this = other;
    }
};

// An output of a screen that may be the largest for a row, and an upper bound of the exact output.
struct Candidate {
    int row, output;
    float upper_bound;
};

// Memory of one call. Each thread has a part of `row_step` elements, on cache lines of its own.
struct ArgmaxBuffers {
    size_t row_step;
    Best* best;                     // (threads, row_step), by row
    float *errors, *lower_bounds;   // (rows), see error_bound; (threads, row_step), the largest lower bound found
    int* candidates;                // (threads), how many each thread has

    ArgmaxBuffers(int rows, int threads) : row_step((rows + 15) / 16 * 16) {
        const size_t n = threads * row_step;
        best = scratch<Best, struct Bests>(n);
        errors = scratch<float, struct Errors>(rows);
        lower_bounds = scratch<float, struct LowerBounds>(n);
        candidates = scratch<int, struct Candidates>(threads);
        for (size_t i = 0; i < n; i++) best[i] = {-INFINITY, 0}, lower_bounds[i] = -INFINITY;
    }
};

// Upper bound of the difference between a screen's sum for row x and the exact one, in units of an output's scale
// (Cauchy-Schwarz inequality): rounding of weights, rounding of inputs, and eight times the error of fp32 sums.
inline float error_bound(const Screen& screen, const Number* x) {
    const int in = screen.rounded.in;
    double squares = 0;
    for (int j = 0; j < in; j++) squares += double(as_float(x[j])) * as_float(x[j]);
    const double norm = std::sqrt(squares), input_error = 0.5 * integer_scale(x, in) * std::sqrt(double(in));
    const double fp32_error = (in + 16) * 0x1p-21 * norm;
    return float(1.001 * (screen.error * norm + (screen.norm + screen.error) * (input_error + fp32_error)));
}

// Multiply by this thread's part of a screen: candidates, and the largest lower bound of each row.
inline void find_candidates(Team& team, const Screen& screen, const Number* x, int rows, const float* errors,
                            float* lower_bounds, std::vector<Candidate>& candidates) {
    multiply(team, screen.rounded, x, screen.rounded.in, rows, [&](int r, int first, const float* sums) {
        const int n = width_of(screen.rounded, first);
        const float *scale = screen.rounded.scale + first, error = errors[r];
        float& bound = lower_bounds[r];
        bool any = false;
        for (int j = 0; j < n; j++) any |= sums[j] + scale[j] * error >= bound;
        for (int j = 0; any && j < n; j++) {
            const float upper = sums[j] + scale[j] * error, lower = sums[j] - scale[j] * error;
            if (upper >= bound) candidates.push_back({r, first + j, upper});
            bound = lower > bound ? lower : bound;
        }
    });
}

// Compare all outputs of this thread's blocks.
inline void compare_all(Team& team, const Matrix& m, const Number* x, int rows, Best* best) {
    multiply(team, m, x, m.in, rows, [&](int r, int first, const float* sums) {
        const int n = width_of(m, first);
        auto value = [&](int j) { return sums[j] + bias_of(m, first + j); };
        const float bound = best[r].value;
        bool any = false;
        for (int j = 0; j < n; j++) any |= value(j) >= bound;   // equal ones too: they may come earlier
        for (int j = 0; any && j < n; j++) best[r].update({value(j), first + j});
    });
}

// Compute this thread's candidates exactly and compare them. Returns false on all threads, without comparing, if the
// team has so many candidates that computing all outputs is faster.
inline bool compare_candidates(Team& team, const Matrix& m, const Screen& screen, const Number* x, int rows,
                               const ArgmaxBuffers& buffers) {
    static thread_local std::vector<Candidate> candidates;
    candidates.clear();
    find_candidates(team, screen, x, rows, buffers.errors, buffers.lower_bounds + team.rank * buffers.row_step,
                    candidates);
    team.barrier();
    auto ruled_out = [&](const Candidate& candidate) {
        bool below = false;
        for (int t = 0; t < team.size; t++)
            below |= candidate.upper_bound < buffers.lower_bounds[t * buffers.row_step + candidate.row];
        return below;
    };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), ruled_out), candidates.end());
    buffers.candidates[team.rank] = int(candidates.size());
    team.barrier();
    int left = 0;
    for (int t = 0; t < team.size; t++) left += buffers.candidates[t];
    if (left > rows * blocks(m) / BLOCK) return false;
    Best* best = buffers.best + team.rank * buffers.row_step;
    float sums[BLOCK];
    for (const Candidate& candidate : candidates) {
        const int output = screen.ids ? screen.ids[candidate.output] : candidate.output;
        dot_block_16<1>(block_16(m, output / BLOCK), x + size_t(candidate.row) * m.in, m.in, pairs(m), sums, BLOCK);
        best[candidate.row].update({sums[output % BLOCK], output});
    }
    return true;
}

// x (rows, in) bf16 -> outputs (rows). `screen` may be null; with one, the matrix must be in 16 bits and without bias.
void argmax(const Matrix& m, const Screen* screen, const bf16* x, int32_t* outputs, int rows, int threads) {
    const Number* read = numbers_of(x, size_t(rows) * m.in);
    const ArgmaxBuffers buffers(rows, threads);
    for (int r = 0; screen && r < rows; r++) buffers.errors[r] = error_bound(*screen, read + size_t(r) * m.in);
    run_team(threads, [&](Team& team) {
        if (screen && compare_candidates(team, m, *screen, read, rows, buffers)) return;
        compare_all(team, m, read, rows, buffers.best + team.rank * buffers.row_step);
    });
    for (int r = 0; r < rows; r++) {
        Best found = buffers.best[r];
        for (int t = 1; t < threads; t++) found.update(buffers.best[t * buffers.row_step + r]);
        outputs[r] = found.output;
    }
}

}  // namespace
