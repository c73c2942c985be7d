// What this processor offers, known at compile time, and the block sizes and tuning constants that follow from it.
//
// Only the bf16 instruction, LANES and SPAN change in which order numbers are added, and so the last bits of results.
// The other constants decide speed and memory alone; they were chosen by measurement.
#pragma once

#include <unistd.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define BF16_DOT 1                      // one instruction multiplies and adds pairs of bf16
#endif

namespace {

#ifdef BF16_DOT
constexpr bool HAS_BF16_DOT = true;
#else
constexpr bool HAS_BF16_DOT = false;
#endif

// Weights in 12 bits are used only where they were measured to be faster than 16 bits.
#if defined(BF16_DOT) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr bool READS_12_BITS = true;
#else
constexpr bool READS_12_BITS = false;
#endif

// Lanes of a vector of fp32: 16 with AVX-512, else 8.
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

constexpr int BLOCK = 2 * LANES;        // outputs of a weight block
constexpr int KEYS = BLOCK;             // positions of a block of the KV cache
constexpr int SPAN = 512;               // positions of an attention span; a multiple of KEYS

constexpr int MAX_TILE = LANES == 16 ? 12 : 8;          // rows that share one reading of a block from L1
constexpr int REGISTER_TILE = LANES == 16 ? 12 : 6;     // rows whose sums for one block fit into registers
constexpr int MAX_QUERIES = LANES == 16 ? 8 : 6;        // queries that share one reading of keys and values
constexpr int FEW_ROWS = 3;             // with 8 lanes, fewer rows take two blocks at once to hide the latency of sums
constexpr int COMPUTE_BOUND_ROWS = 5;   // from here on, a tile computes about as long as it waits for its weights
constexpr int SPANS_PER_THREAD = 64;    // attention spans for each thread between two barriers; bounds the memory

// Prefetch distances in bytes. For 12 bits: also the KV cache and, where there is a bf16 dot product, 16-bit weights.
constexpr int PREFETCH = 12288;
constexpr int PREFETCH_12_BITS = HAS_BF16_DOT ? 8192 : 6144;

}  // namespace
