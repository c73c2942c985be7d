// The KV cache: keys and values in 12 bits with a shared exponent for each vector (block floating point).
//
// A key or value (d) is stored as its largest exponent and, for each number, sign, seven bits of fraction and the
// difference of its exponent to the largest in four bits (0 to 15). Smaller numbers become 2^-15 of the largest power
// of two; that error is far below the last bit of the largest number in bf16, 2^-7. Relative to the shared exponent,
// all numbers are below 2 and at least 2^-15, so every high byte is 0x38 with a sign and three more bits. The power of
// two that remains is multiplied into scores (keys) and attention weights (values).
//
// Layout, for each layer, text and key-value head, in blocks of KEYS positions:
//   keys    the exponents of all keys, the exponents of all values, then units as in the 12-bit layout of packing.h,
//           with dimensions in place of inputs and positions in place of outputs.
//   values  the same units with positions in place of inputs and dimensions in place of outputs; the units of all
//           dimensions for four positions lie side by side.
// A slot is the index of a position in the cache. In a text both are the same; rows of a tree have slots of their own.
#pragma once

#include "packing.h"

namespace {

// Decodes the high bytes of a unit, as CodeBook does for weights.
struct SharedExponent {
    UInts operator()(UInts bits, int p) const {
        return (p ? (bits << 4 & 0x80808080u) | (bits >> 4 & 0x07070707u) : bits & 0x87878787u) | 0x38383838u;
    }
};

constexpr uint32_t HIGH_BITS = 0x87, TWO_HIGH_BITS = 0x00870087;    // stored of a high byte; of two, 16 bits apart

// Move the stored bits of high bytes, 16 bits apart, from their places for a unit's first pair to those for its second
// pair, or back.
inline UInts exchange_pairs(UInts high) { return high << 4 | high >> 4; }

// Dimensions, up to whole blocks.
inline int padded(int d) { return (d + BLOCK - 1) / BLOCK * BLOCK; }

// Bytes of KEYS positions of one head.
inline size_t key_block_bytes(int d) { return 2 * KEYS + size_t(d / 4) * UNIT; }
inline size_t value_block_bytes(int d) { return size_t(padded(d) / BLOCK) * (KEYS / 4) * UNIT; }

// 2^(exponent - 127); 0 for 0.
inline Floats powers_of_two(const uint8_t* exponents) {
    // In two steps; in one, GCC converts them one by one.
    const HalfUShorts shorts = __builtin_convertvector(load<QuarterBytes>(exponents), HalfUShorts);
    return (Floats)(__builtin_convertvector(shorts, UInts) << 23);
}
inline float power_of_two(uint8_t exponent) {
    const uint32_t bits = exponent << 23;
    return load<float>(&bits);
}

// The largest exponent of x (d), rounded to bf16.
inline int largest_exponent(const float* x, int d) {
    int most = 0;
    for (int j = 0; j < d; j++) {
        const int size = narrow(x[j]) & 0x7FFF;
        most = size > most ? size : most;
    }
    return most >> 7;
}

// Numbers relative to a shared exponent, as bf16: below 2 and at least 2^-15.
inline UInts relative_to(Floats x, int exponent) {
    const UInts bits = rounded(x) >> 16;
    const Ints below = exponent - (Ints)(bits >> 7 & 255u);
    return (bits & 0x8000u) | (below > 15 ? UInts{} + (112 << 7) : (UInts)(127 - below) << 7 | (bits & 127u));
}

// Keys and values of one head in one text and layer.
struct HeadCache {
    uint8_t *keys, *values;
    int d;

    HeadCache() = default;
    HeadCache(uint8_t* keys, uint8_t* values, int d) : keys(keys), values(values), d(d) {}
    HeadCache(const Cache& cache, size_t head, int d)
        : keys(cache.keys + head * (cache.capacity / KEYS) * key_block_bytes(d)),
          values(cache.values + head * (cache.capacity / KEYS) * value_block_bytes(d)), d(d) {}

    // The block of keys that has slot t, and the exponent of t's value.
    uint8_t* key_block(int t) const { return keys + t / KEYS * key_block_bytes(d); }
    uint8_t& value_exponent(int t) const { return key_block(t)[KEYS + t % KEYS]; }

    // The unit of values that has slot t and a dimension, and the bytes from there to the next four slots.
    uint8_t* value_unit(int t, int column) const { return values + t / 4 * value_step() + column / BLOCK * UNIT; }
    size_t value_step() const { return size_t(padded(d) / BLOCK) * UNIT; }

    void write_key(int t, const float* x) const {
        const int j = t % KEYS, exponent = largest_exponent(x, d);
        key_block(t)[j] = uint8_t(exponent);
        uint8_t* unit = key_block(t) + 2 * KEYS + byte_position(j, 0);
        for (int from = 0; from < d; from += LANES) {
            using Pairs = uint32_t __attribute__((vector_size(2 * LANES)));
            const auto kept = __builtin_convertvector(relative_to(load<Floats>(x + from), exponent), HalfUShorts);
            auto join = [](Pairs bytes) { return (bytes & 0xFFu) | bytes >> 8; };       // two bytes that lie apart
            const Pairs pairs = load<Pairs>(&kept), high = join(pairs >> 8 & TWO_HIGH_BITS);
            const Pairs low = join(pairs & 0x00FF00FFu), second = (high >> 4 & 0x0808u) | (high << 4 & 0x7070u);
            for (int p = 0; p < LANES / 2; p += 2, unit += UNIT) {
                const uint16_t bytes[3] = {uint16_t(low[p]), uint16_t(low[p + 1]), uint16_t(high[p] | second[p + 1])};
                for (int i = 0; i < 3; i++) std::memcpy(unit + i * 2 * BLOCK, bytes + i, 2);
            }
        }
    }

    void write_value(int t, const float* x) const {
        const int exponent = largest_exponent(x, d);
        value_exponent(t) = uint8_t(exponent);
        for (int from = 0; from < d; from += BLOCK) {
            auto kept = [&](int j) { return j < d ? relative_to(load<Floats>(x + j), exponent) : UInts{}; };
            const UInts all = pack_shorts(kept(from), kept(from + LANES));
            blend_value(value_unit(t, from), t, all, all >> 8);
        }
    }

    // Copy the value of slot `from`, without its exponent, to slot `to` of another head's values.
    void copy_value(int from, const HeadCache& target, int to) const {
        const int shift = from % 2 * 8;
        for (int c = 0; c < d; c += BLOCK) {
            const uint8_t* unit = value_unit(from, c);
            const UInts low = load<UInts>(unit + from % 4 / 2 * 2 * BLOCK) >> shift;
            const UInts high = load<UInts>(unit + 4 * BLOCK) >> shift;
            blend_value(target.value_unit(to, c), to, low, from % 4 / 2 ? exchange_pairs(high & 0x00FF00FFu) : high);
        }
    }

    // Copy key and value from one slot to another.
    void copy(int from, int to) const {
        uint8_t *source = key_block(from), *target = key_block(to);
        target[to % KEYS] = source[from % KEYS];
        value_exponent(to) = value_exponent(from);
        for (int p = 0; p < 3 * (d / 4); p++)
            std::memcpy(target + 2 * KEYS + p * 2 * BLOCK + byte_position(to % KEYS, 0),
                        source + 2 * KEYS + p * 2 * BLOCK + byte_position(from % KEYS, 0), 2);
        copy_value(from, *this, to);
    }

private:
    // Blend one position t of a block of dimensions into its unit. Low and high bytes are given 16 bits apart, high
    // bytes as the first pair of a unit has them.
    static void blend_value(uint8_t* unit, int t, UInts low, UInts high) {
        auto blend = [&](uint8_t* at, UInts x, uint32_t byte) {
            const uint32_t shift = t % 2 * 8, mask = (byte << 16 | byte) << shift;
            const UInts both = (load<UInts>(at) & ~mask) | (x << shift & mask);
            std::memcpy(at, &both, sizeof both);
        };
        const bool second = t % 4 / 2;
        blend(unit + second * 2 * BLOCK, low, 0xFF);
        const UInts kept = high & TWO_HIGH_BITS;
        blend(unit + 4 * BLOCK, second ? exchange_pairs(kept) : kept, second ? 0xFF ^ HIGH_BITS : HIGH_BITS);
    }
};

}  // namespace
