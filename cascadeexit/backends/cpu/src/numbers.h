// Scalar number formats. bf16 is the upper half of an fp32.
//
// `Number` is what matrix products read: values rounded to bf16, stored as bf16 where the processor multiplies pairs of
// bf16, and as fp32 elsewhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "processor.h"

namespace {

using bf16 = uint16_t;
using Number = std::conditional_t<HAS_BF16_DOT, bf16, float>;

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Round to nearest even.
inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline void round_to(bf16& to, float x) { to = narrow(x); }
inline void round_to(float& to, float x) { to = widen(narrow(x)); }
inline float as_float(bf16 x) { return widen(x); }
inline float as_float(float x) { return x; }

}  // namespace
