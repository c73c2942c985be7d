// Structures that Python fills in. structures.py declares the same fields in the same order with ctypes; `in` and `out`
// are `inputs` and `outputs` there.
#pragma once

#include <cstdint>

struct Outlier {                    // a weight that the code book of its block does not have
    int32_t position;               // input * BLOCK + output, within the block
    float value;
};

struct Matrix {                     // (out, in); layouts are in packing.h
    const void* weight;
    const float *scale, *bias;      // scale: of 8-bit weights, one for each output of whole blocks; both may be null
    int32_t in, out;
    const Outlier* outliers;        // null unless the weights are in 12 bits
};

// A weight rounded to 8 bits. Its sums tell which few outputs of the exact weight can be the largest.
struct Screen {
    Matrix rounded;
    const int32_t* ids;             // for each of its outputs the output of the exact weight; null: the same number
    float error, norm;              // largest norms over outputs, in units of scale: of the rounding error, of integers
};

struct Layer {
    // qkv: for each key-value head its queries, its key, its value; gate_up: blocks of gate and up in turn.
    Matrix qkv, o, gate_up, down;
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;       // q_norm and k_norm may be null
};

struct Stack {
    const Layer* layers;
    const float *cosines, *sines;   // (positions, head_dim / 2)
    int32_t hidden, heads, kv_heads, head_dim, inner;
    float eps, scale;               // scale: of attention scores
};

// Adapter of an exit: norm(linear x + up(silu(gate x) * down x)). Without `linear`, h replaces linear x.
struct Adapter {
    Matrix linear, gate_down, up;   // linear.weight may be null; gate_down: blocks of gate and down in turn
    const float* norm;
    float eps;
    const float* column_scale;      // x is multiplied by it before linear and gate_down; may be null
};

struct Estimator {                  // sigmoid(outer . silu(inner x + inner_bias) + outer_bias)
    const float *inner, *inner_bias, *outer;        // (width, in), (width), (width)
    float outer_bias;
    int32_t in, width;
};

struct Cache {                      // keys and values (layers, texts, kv_heads); layout in kv_cache.h
    uint8_t *keys, *values;
    int32_t capacity;               // positions, a multiple of KEYS
};
