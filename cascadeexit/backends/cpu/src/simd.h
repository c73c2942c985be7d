// Vectors and what is done to them lane by lane.
//
// They are vector extensions of GCC and Clang, LANES (16 or 8) elements of 32 bits, and compile to this processor's own
// instructions. Intrinsics appear only where the compiler does not find an instruction by itself.
#pragma once

#include <type_traits>

#include "numbers.h"

namespace {

using Floats = float __attribute__((vector_size(4 * LANES)));
using UInts = uint32_t __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Shorts = int16_t __attribute__((vector_size(4 * LANES)));         // two to a lane
using HalfUShorts = uint16_t __attribute__((vector_size(2 * LANES)));   // half a vector
using QuarterBytes = uint8_t __attribute__((vector_size(LANES)));       // a quarter of a vector

template <class To, class From>
inline To load(const From* from) {
    To out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline Floats broadcast(float x) { return x - Floats{}; }

// 0, 1, 2, ... LANES - 1.
inline Ints lane_numbers() {
    Ints lanes;
    for (int l = 0; l < LANES; l++) lanes[l] = l;
    return lanes;
}

inline float sum_of(Floats x) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += x[l];
    return sum;
}

// Bits of fp32 whose upper halves are the bf16 that is nearest.
inline UInts rounded(Floats x) { return (UInts)x + 0x7FFFu + ((UInts)x >> 16 & 1u); }

inline void store_rounded(bf16* to, Floats x) {
#ifdef BF16_DOT
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
    const HalfUShorts halves = __builtin_convertvector(rounded(x) >> 16, HalfUShorts);
#endif
    std::memcpy(to, &halves, sizeof halves);
}
inline void store_rounded(float* to, Floats x) { store(to, (Floats)(rounded(x) & 0xFFFF0000u)); }

// Call f with all n numbers, a vector at a time. The last vector is filled up with numbers so low that exp gives 0.
template <class F>
inline void each_vector(const float* numbers, int n, F f) {
    int j = 0;
    for (; j + LANES <= n; j += LANES) f(load<Floats>(numbers + j));
    if (j == n) return;
    Floats last = broadcast(-1e30f);
    std::memcpy(&last, numbers + j, sizeof(float) * (n - j));
    f(last);
}

// Call f with n, which is between 1 and MOST, as a compile-time constant.
template <int MOST, class F>
inline void with_constant(int n, F f) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_constant<MOST - 1>(n, f);
    f(std::integral_constant<int, MOST>{});
}

// Cut rows into tiles, as even as can be, and call use(first row, rows) for each. One tile may have MAX_TILE rows;
// several have up to REGISTER_TILE each, because many rows are bound by the processor and not by memory.
template <class Use>
inline void each_tile(int rows, Use use) {
    const int tiles = rows <= MAX_TILE ? 1 : (rows + REGISTER_TILE - 1) / REGISTER_TILE;
    for (int r = 0, left = tiles, tile; left; r += tile, left--) {
        tile = (rows - r + left - 1) / left;
        use(r, tile);
    }
}

// -- exp --------------------------------------------------------------------------------------------------------------

// exp of a float or of Floats, 0 for very low numbers. The relative error is below 1e-5; bf16 rounds by up to 2e-3.
// 2^y is 2^whole times a polynomial of the fraction. To round y, which is below 2^22, 3 * 2^22 is added; the last bits
// of that sum are the whole number.
template <class F>
inline F fast_exp(F x) {
    using Bits = std::conditional_t<sizeof(F) == sizeof(float), uint32_t, UInts>;
    const F least = F{} - 126.0f, most = F{} + 127.0f;
    F y = x * 1.44269504f;
    y = y < least ? least : y;
    y = y > most ? most : y;
    const F shifted = y + 12582912.0f, rest = y - (shifted - 12582912.0f);
    F power = F{} + 9.5828446e-3f;
    power = power * rest + 5.5906437e-2f;
    power = power * rest + 2.4024099e-1f;
    power = power * rest + 6.9312418e-1f;
    power = power * rest + 1.0f;
    const Bits bits = load<Bits>(&power) + (load<Bits>(&shifted) << 23);
    return load<F>(&bits);
}

inline float silu(float x) { return x / (1.0f + fast_exp(-x)); }

// -- bytes and 16-bit integers ----------------------------------------------------------------------------------------
//
// Byte instructions of AVX2 and AVX-512 work within quarters (of 16 bytes) of a vector; the portable versions do the
// same. Here they are:
//   pack_shorts(a, b)       two vectors of numbers below 2^16 into one: a's quarter, b's quarter, and so on
//   interleave_low(a, b)    bytes of a and b in turn, from the first half of each quarter
//   interleave_high(a, b)   the same from the second half of each quarter
//   Table16                 a table of 16 bytes, looked up with four bits for each byte of a vector
//   keep_in_registers(a, b) stops the compiler from reading a and b again at each use
// and `byte_position` gives the places where interleaving expects the bytes of a weight.

// Place in a vector of bytes of input 0 or 1 of a pair for an output of a block.
constexpr int byte_position(int output, int input) {
    constexpr int quarters = LANES / 4;
    return output / 4 % quarters * 16 + output / 4 / quarters * 8 + output % 4 * 2 + input;
}

#if defined(__AVX512BW__)
inline UInts pack_shorts(UInts a, UInts b) { return (UInts)_mm512_packus_epi32((__m512i)a, (__m512i)b); }
inline UInts interleave_low(UInts a, UInts b) { return (UInts)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
inline UInts interleave_high(UInts a, UInts b) { return (UInts)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }
struct Table16 {
    UInts bytes;
    explicit Table16(const uint8_t* table) : bytes((UInts)_mm512_broadcast_i32x4(load<__m128i>(table))) {}
    UInts operator[](UInts at) const { return (UInts)_mm512_shuffle_epi8((__m512i)bytes, (__m512i)at); }
};
inline void keep_in_registers(Floats&, Floats&) {}
#elif defined(__AVX2__) && !defined(__AVX512F__)
inline UInts pack_shorts(UInts a, UInts b) { return (UInts)_mm256_packus_epi32((__m256i)a, (__m256i)b); }
inline UInts interleave_low(UInts a, UInts b) { return (UInts)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b); }
inline UInts interleave_high(UInts a, UInts b) { return (UInts)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b); }
struct Table16 {
    UInts bytes;
    explicit Table16(const uint8_t* table) : bytes((UInts)_mm256_broadcastsi128_si256(load<__m128i>(table))) {}
    UInts operator[](UInts at) const { return (UInts)_mm256_shuffle_epi8((__m256i)bytes, (__m256i)at); }
};
inline void keep_in_registers(Floats& a, Floats& b) { asm("" : "+x"(a), "+x"(b)); }
#else
inline UInts pack_shorts(UInts a, UInts b) {
    uint16_t to[2 * LANES];
    for (int j = 0; j < 2 * LANES; j++) to[byte_position(j, 0) / 2] = uint16_t(j < LANES ? a[j] : b[j - LANES]);
    return load<UInts>(to);
}
inline UInts interleave(UInts a, UInts b, int half) {
    uint8_t from[2][4 * LANES], to[4 * LANES];
    std::memcpy(from[0], &a, sizeof a);
    std::memcpy(from[1], &b, sizeof b);
    for (int quarter = 0; quarter < 4 * LANES; quarter += 16)
        for (int k = 0; k < 8; k++)
            for (int i = 0; i < 2; i++) to[quarter + 2 * k + i] = from[i][quarter + half * 8 + k];
    return load<UInts>(to);
}
inline UInts interleave_low(UInts a, UInts b) { return interleave(a, b, 0); }
inline UInts interleave_high(UInts a, UInts b) { return interleave(a, b, 1); }
struct Table16 {
    const uint8_t* table;
    explicit Table16(const uint8_t* table) : table(table) {}
    UInts operator[](UInts at) const {
        uint8_t bytes[4 * LANES];
        std::memcpy(bytes, &at, sizeof at);
        for (uint8_t& byte : bytes) byte = table[byte & 15];
        return load<UInts>(bytes);
    }
};
inline void keep_in_registers(Floats&, Floats&) {}
#endif

// sum + a . b in each lane, for two 16-bit integers to a lane.
inline Ints add_int16_products(Ints sum, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

}  // namespace
