// Layouts of weights, and how bf16 weights are packed into them.
//
// A weight (out, in) is cut into blocks of BLOCK outputs, the last one filled up with zeros. A pass reads each block
// once and in order. Within a block, pairs of inputs follow each other:
//   16 bits  (in / 2, BLOCK) words of 32 bits: one output's weights for a pair of inputs, the first in the lower half.
//   12 bits  a BlockHeader, then for every two pairs a unit of (3, 2 BLOCK) bytes: the low bytes of the first pair, the
//            low bytes of the second pair, and four bits for the high byte of each number, the first pair's below the
//            second's. `byte_position` gives the places of an output's bytes.
//   8 bits   (in / 2, BLOCK / 2, 2, 2) bytes: pairs of inputs, outputs of the first half and the second half in turn;
//            packed in Python.
//
// Packing into 12 bits is lossless. Four bits are the index into a code book of 16 high bytes (the sign and the
// exponent without its last bit). A block's weights are so close in size that seven neighbouring exponents for each
// sign and two zeros leave out very few weights. These outliers are zero in the block and listed apart, with their
// fp32 values. DFloat11 (Zhang et al. 2025) found that exponents of
// a model's weights hold less than three bits of information.
#pragma once

#include "simd.h"
#include "structs.h"

namespace {

constexpr int PAIR_BYTES = 3 * BLOCK;       // a pair of inputs of a block, in 12 bits
constexpr int UNIT = 2 * PAIR_BYTES;        // two pairs

struct alignas(2 * BLOCK) BlockHeader {     // as large as the vectors in which weights are read
    uint8_t high_bytes[16];                 // the code book
    int32_t outliers_begin, outliers_end;
};

constexpr int ZERO_CODE = 7;                // the code of 0; 15 is -0

inline int blocks(const Matrix& m) { return (m.out + BLOCK - 1) / BLOCK; }
inline int pairs(const Matrix& m) { return (m.in + 1) / 2; }

inline int64_t packed_bytes_16(int out, int in) {
    return int64_t((out + BLOCK - 1) / BLOCK) * ((in + 1) / 2) * BLOCK * 4;
}
inline const uint32_t* block_16(const Matrix& m, int b) {
    return (const uint32_t*)m.weight + size_t(b) * pairs(m) * BLOCK;
}

inline size_t block_bytes_12(int pairs) { return sizeof(BlockHeader) + size_t(pairs) * PAIR_BYTES; }
inline const uint8_t* block_12(const Matrix& m, int b) {
    return (const uint8_t*)m.weight + b * block_bytes_12(pairs(m));
}

// -- 16 bits ----------------------------------------------------------------------------------------------------------

// Row-major (out, in) bf16 into blocks first, first + step, ...
void pack_16(const bf16* weight, int out, int in, uint32_t* packed, int first, int step) {
    int half = (in + 1) / 2;
    for (int b = 0; b * BLOCK < out; b++)
        for (int p = 0; p < half; p++)
            for (int j = 0; j < BLOCK; j++) {
                int o = b * BLOCK + j;
                uint32_t low = o < out ? weight[size_t(o) * in + 2 * p] : 0;
                uint32_t high = o < out && 2 * p + 1 < in ? weight[size_t(o) * in + 2 * p + 1] : 0;
                packed[(size_t(first + b * step) * half + p) * BLOCK + j] = low | high << 16;
            }
}

// Outputs ids[0..n-1] of a 16-bit weight -> out (n, in) bf16, as they were before packing.
void unpack_rows_16(const Matrix& m, const int64_t* ids, int n, bf16* out) {
    for (int i = 0; i < n; i++) {
        const uint32_t* from = block_16(m, int(ids[i] / BLOCK)) + ids[i] % BLOCK;
        for (int p = 0; p < pairs(m); p++, from += BLOCK) {
            out[size_t(i) * m.in + 2 * p] = bf16(*from);
            if (2 * p + 1 < m.in) out[size_t(i) * m.in + 2 * p + 1] = bf16(*from >> 16);
        }
    }
}

// -- 12 bits ----------------------------------------------------------------------------------------------------------

// The lowest of the ZERO_CODE neighbouring exponents (without their last bits) that cover most of these n weights.
int base_exponent(const bf16* weights, size_t n) {
    int seen[128] = {}, base = 0, most = -1;
    for (size_t i = 0; i < n; i++) seen[weights[i] >> 8 & 127] += (weights[i] & 0x7FFF) != 0;
    for (int from = 0; from + ZERO_CODE <= 128; from++) {
        int sum = 0;
        for (int k = 0; k < ZERO_CODE; k++) sum += seen[from + k];
        if (sum > most) most = sum, base = from;
    }
    return base;
}

// One block of `width` outputs, rows (width, in) bf16, into `packed`, which holds zeros. Appends its outliers to the
// list, which holds `count` and has room for `room`. Returns the new count; -1 where the room is too small.
int pack_block_12(const bf16* rows, int width, int in, uint8_t* packed, Outlier* outliers, int room, int count) {
    const int base = base_exponent(rows, size_t(width) * in);
    BlockHeader header{{}, count, count};
    for (int k = 0; k < 16; k++)
        header.high_bytes[k] = uint8_t((k & 8) * 16 + (k % 8 == ZERO_CODE ? 0 : base + k % 8));
    for (int i = 0; i < in; i++) {
        uint8_t* unit = packed + sizeof(BlockHeader) + size_t(i / 4) * UNIT;
        const int pair = i / 2 % 2;
        for (int j = 0; j < BLOCK; j++) {
            const bf16 w = j < width ? rows[size_t(j) * in + i] : 0;
            const int exponent = (w >> 8 & 127) - base, at = byte_position(j, i % 2);
            const bool zero = (w & 0x7FFF) == 0, has_code = !zero && exponent >= 0 && exponent < ZERO_CODE;
            if (!zero && !has_code) {
                if (header.outliers_end == room) return -1;
                outliers[header.outliers_end++] = {i * BLOCK + j, widen(w)};
            }
            const int sign = zero || has_code ? w >> 15 << 3 : 0;
            unit[pair * 2 * BLOCK + at] = has_code ? w & 255 : 0;
            unit[4 * BLOCK + at] |= ((has_code ? exponent : ZERO_CODE) | sign) << 4 * pair;
        }
    }
    std::memcpy(packed, &header, sizeof header);
    return header.outliers_end;
}

// Row-major (out, in) bf16, `in` a multiple of 4, into blocks first, first + step, ... Outliers as in pack_block_12.
int pack_12(const bf16* weight, int out, int in, uint8_t* packed, Outlier* outliers, int room, int count, int first,
            int step) {
    for (int b = 0; b * BLOCK < out && count >= 0; b++)
        count = pack_block_12(weight + size_t(b) * BLOCK * in, out - b * BLOCK < BLOCK ? out - b * BLOCK : BLOCK, in,
                              packed + size_t(first + b * step) * block_bytes_12(in / 2), outliers, room, count);
    return count;
}

// A code book turns the four bits of each high byte into that byte: book(bits, p) for pair p = 0 or 1 of a unit.
// KV caches use the same units with another rule (SharedExponent in kv_cache.h).
struct CodeBook {
    Table16 high_bytes;
    explicit CodeBook(const uint8_t* block) : high_bytes(block) {}
    UInts operator()(UInts bits, int p) const { return high_bytes[(p ? bits >> 4 : bits) & 0x0F0F0F0Fu]; }
};

// Decode a unit: use(p, low, high) for its pairs p = 0 and 1, with the words of the block's first LANES outputs and of
// the others, as in the 16-bit layout.
template <class Decoder, class Use>
inline __attribute__((always_inline)) void decode(const uint8_t* unit, const Decoder& decoder, Use use) {
    const UInts bits = load<UInts>(unit + 4 * BLOCK);
    for (int p = 0; p < 2; p++) {
        const UInts low_bytes = load<UInts>(unit + 2 * BLOCK * p), high_bytes = decoder(bits, p);
        use(p, interleave_low(low_bytes, high_bytes), interleave_high(low_bytes, high_bytes));
    }
}

}  // namespace
