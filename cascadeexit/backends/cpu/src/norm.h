// RMSNorm and the rotary embedding of one row.
#pragma once

#include <cmath>

#include "numbers.h"

namespace {

// 1 / root mean square of x (n), in a fixed order of additions.
inline float inverse_rms(const float* x, int n, float eps) {
    float sums[16] = {};
    int j = 0;
    for (; j + 16 <= n; j += 16)
        for (int l = 0; l < 16; l++) sums[l] = __builtin_fmaf(x[j + l], x[j + l], sums[l]);
    for (; j < n; j++) sums[0] = __builtin_fmaf(x[j], x[j], sums[0]);
    float sum = 0;
    for (float s : sums) sum += s;
    return 1.0f / std::sqrt(sum / n + eps);
}

template <class To>
inline void norm_row(const float* x, const float* weight, int n, float eps, To* out) {
    float scale = inverse_rms(x, n, eps);
    for (int j = 0; j < n; j++) round_to(out[j], x[j] * scale * weight[j]);
}

// One head x (d), in place: its norm, unless that is null, and then the rotary embedding.
inline void rotate(float* x, const float* norm, float eps, const float* cosine, const float* sine, int d) {
    if (norm) {
        float scale = inverse_rms(x, d, eps);
        for (int j = 0; j < d; j++) x[j] *= scale * norm[j];
    }
    for (int j = 0; j < d / 2; j++) {
        float a = x[j], b = x[j + d / 2];
        x[j] = __builtin_fmaf(a, cosine[j], -(b * sine[j]));
        x[j + d / 2] = __builtin_fmaf(b, cosine[j], a * sine[j]);
    }
}

}  // namespace
