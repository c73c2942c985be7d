// Decoder layers on a CPU, near the speed at which memory delivers their weights.
//
// One call takes a few rows through many layers: one team of threads, no allocation, no dispatch between operations.
// Weights are bf16, the same in 12 bits without loss, or integers of 8 bits, packed so that a pass reads each of them once,
// in order: blocks of outputs, pairs of inputs side by side. Sums are fp32 and run over inputs in order (of 8 bits: integers,
// of inputs rounded to 16), each row by itself, so a row's result is bitwise the same whatever other rows are in the pass:
// that is what makes verification exact.
//
// Keys and values lie in 12 bits, too: with all digits of bf16, and exponents down to 2^-15 of the largest in a vector.
//
// Letters: N rows, D hidden size, H query heads on G key-value heads of size d, C cache capacity.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <sched.h>
#include <type_traits>
#include <unistd.h>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define BF16_DOT 1
#endif
#if defined(BF16_DOT) || (defined(__AVX2__) && !defined(__AVX512F__))
#define CODES 1                 // bf16 in 12 bits is read, too: measured on these
#endif

namespace {

constexpr int MANY = 5;         // rows from which a tile computes about as long as it waits for its weights
constexpr int SPAN = 512;       // positions that are attended to at a time; a multiple of KEYS
constexpr int REACH = 12288;    // bytes from weights in use to those that are asked for, where that is done in one way
constexpr int ROUND = 64;       // spans of tiles for each thread between two meetings: bounds what is kept of them

using bf16 = uint16_t;

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline bf16 narrow(float x) {                                   // round to nearest even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// What products read: numbers rounded to bf16, kept as such where two of them are multiplied at once, else as fp32.
#ifdef BF16_DOT
using Number = bf16;
#else
using Number = float;
#endif
inline void round_to(bf16& to, float x) { to = narrow(x); }
inline void round_to(float& to, float x) { to = widen(narrow(x)); }
inline float as_float(bf16 x) { return widen(x); }
inline float as_float(float x) { return x; }

// Scratch of a call, grown to the largest one seen.
template <class T>
struct Scratch {
    T* data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }                             // threads come and go
    T* get(size_t n) {
        if (n > size) {
            std::free(data);
            size = (n + 63) / 64 * 64;                          // whole cache lines of any T
            data = (T*)std::aligned_alloc(64, size * sizeof(T));
            std::memset((void*)data, 0, size * sizeof(T));
        }
        return data;
    }
};

// Vectors of fp32: what GCC and Clang call vector extensions becomes the processor's own, 16 lanes of AVX-512, else 8.
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int BLOCK = 2 * LANES;        // outputs of a weight block, which is read in order
constexpr int KEYS = BLOCK;             // positions of a block of the cache
constexpr int MAX_TILE = LANES == 16 ? 12 : 8;  // rows that share one reading of a block from the first cache
constexpr int GOOD_TILE = LANES == 16 ? MAX_TILE : 6;   // rows whose sums for a block still leave some registers
constexpr int FEW = 3;          // and for 32 columns with 8 lanes; fewer rows' sums for 16 would wait for each other
constexpr int MAX_QUERIES = LANES == 16 ? 8 : 6;        // queries that share one reading of keys and values
using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Ints = int32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Shorts = int16_t __attribute__((vector_size(4 * LANES)));

template <class To, class From>
inline To load(const From* from) {
    To out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints lanes_in_order() {
    Ints lanes;
    for (int l = 0; l < LANES; l++) lanes[l] = l;
    return lanes;
}
inline float sum_of(Floats x) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += x[l];
    return sum;
}
// Floats rounded to bf16 -> to.
inline Words rounded(Floats x) { return (Words)x + 0x7FFFu + ((Words)x >> 16 & 1u); }
inline void store_rounded(bf16* to, Floats x) {
#ifdef BF16_DOT
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
    const Halves halves = __builtin_convertvector(rounded(x) >> 16, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}
inline void store_rounded(float* to, Floats x) { store(to, (Floats)(rounded(x) & 0xFFFF0000u)); }

// exp of a float or of Floats, 0 far below; relative error below 1e-5, far below bf16's. 2^y is 2^whole times a polynomial of
// the rest: y below 2^22 with 3 * 2^22 added is rounded, and the last bits are the whole number.
template <class F>
inline F fast_exp(F x) {
    using Bits = std::conditional_t<sizeof(F) == sizeof(float), uint32_t, Words>;
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

// What a thread is told by the others, on cache lines that are its own: one that several write travels between cores, and these
// may lie far apart.
struct Desk {
    alignas(64) std::atomic<int> told[16]{};    // in each step of a meeting: the last one that another thread has come to
    alignas(64) std::atomic<int> taken[2]{};    // of its part of the work that is shared out, this time and the next
};

struct Team {
    int rank, size;
    Desk* desks;
    int meetings = 0, shares = 0;
    int from(int items, int who) const { return int(int64_t(items) * who / size); }
    int from(int items) const { return from(items, rank); }
    int to(int items) const { return from(items, rank + 1); }

    // Nobody goes on before all have come: each tells whom is 1, 2, 4, .. further and waits to be told the same (dissemination
    // barrier: Hensgen, Finkel and Manber 1988). Threads arrive within microseconds of each other, so they spin; when another
    // program holds a core they yield to it.
    void meet() {
        meetings++;
        for (int step = 0, far = 1; far < size; step++, far *= 2) {
            desks[(rank + far) % size].told[step].store(meetings, std::memory_order_release);
            for (int spins = 0; desks[rank].told[step].load(std::memory_order_acquire) < meetings; spins++) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
                if (spins > 500) sched_yield();
            }
        }
    }

    // work(i) for i = 0..items-1, by anyone: each goes through a part of its own, and who is through with it helps the others
    // with theirs, since memory does not serve all cores alike. They meet before the next time.
    template <class Work>
    void share(int items, Work work) {
        const int now = shares++ % 2;
        desks[rank].taken[1 - now].store(0, std::memory_order_relaxed);
        for (int k = 0; k < size; k++) {
            const int who = (rank + k) % size, first = from(items, who), count = from(items, who + 1) - first;
            std::atomic<int>& taken = desks[who].taken[now];
            if (k && taken.load(std::memory_order_relaxed) >= count) continue;  // to look is cheaper than to take
            for (int i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < count;) work(first + i);
        }
    }
};

// -- dot products of pairs --------------------------------------------------------------------------------------------

#ifdef BF16_DOT
// Asks memory for BYTES that are needed later, at a long reach from w, which keeps memory busiest: into the first cache alone,
// since nobody reads them again soon. Where that cache is small, many rows, which also compute, had better let what would come
// so early wait in the second one.
const bool SMALL_CACHE = sysconf(_SC_LEVEL1_DCACHE_SIZE) <= 32 * 1024;
constexpr int AHEAD = 8192;
template <int M, int BYTES>
inline void ahead(const void* w) {
    const char* from = (const char*)w;
    for (int line = 0; line < BYTES; line += 64)
        if (!SMALL_CACHE) {
            _mm_prefetch(from + line + AHEAD, _MM_HINT_NTA);
        } else if (M < MANY) {
            _mm_prefetch(from + line + AHEAD, _MM_HINT_T0);
        } else {
            _mm_prefetch(from + line + 2048, _MM_HINT_T0);
            _mm_prefetch(from + line + 32768, _MM_HINT_T1);
        }
}

// out[m][j] = sum over p of w[p][j] . x[m][p], for M rows and W outputs; both hold pairs of bf16.
template <int M, int W>
inline void dot_pairs(const uint32_t* w, const Number* x, size_t stride, int pairs, float* out, size_t out_stride) {
    constexpr int V = W / 16;
    __m512 sum[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sum[m][v] = _mm512_setzero_ps();
    for (int p = 0; p < pairs; p++, w += W) {
        __m512bh weights[V];
        for (int v = 0; v < V; v++) weights[v] = (__m512bh)_mm512_loadu_si512(w + 16 * v);
        ahead<M, 4 * W>(w);
        for (int m = 0; m < M; m++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(load<int>(x + m * stride + 2 * p));
            for (int v = 0; v < V; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], weights[v], both);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(out + m * out_stride + 16 * v, sum[m][v]);
}
#else
// Without such an instruction a pair of weights is widened to two vectors of fp32.
constexpr int PIECE = 64;       // pairs of weights that are read again while they are in the first cache
constexpr int AHEAD = 6144;     // as REACH, of what is kept in 12 bits

// Of a vector of pairs the first or the second ones.
inline Floats firsts(const uint32_t* w) { return (Floats)(load<Words>(w) << 16); }
inline Floats seconds(const uint32_t* w) { return (Floats)(load<Words>(w) & 0xFFFF0000u); }

// out[m][j] += sum over p of w[p][j] . x[m][p], for M rows and 16 columns, or G = 2 times 16 that lie `apart`; pair p of w begins
// at p * step. At each, AHEAD bytes of later weights are asked for, from `next` on, and as many next_apart from there. Not
// inlined: there GCC runs out of registers.
template <int M, int G, int AHEAD>
__attribute__((noinline)) void add_columns(const uint32_t* w, size_t step, size_t apart, const char* next, size_t next_apart,
                                           const Number* x, size_t stride, int pairs, float* out, size_t out_stride) {
    constexpr int each = 16 / LANES, V = G * each;
    Floats sum[M][V], weights[V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sum[m][v] = load<Floats>(out + m * out_stride + LANES * v);
    auto add = [&](const Number* input) __attribute__((always_inline)) {
        if constexpr (M <= FEW) {           // registers are left for the inputs: sums of one vector come soonest
            Floats inputs[M];
            for (int m = 0; m < M; m++) inputs[m] = broadcast(input[m * stride]);
            for (int v = 0; v < V; v++)
                for (int m = 0; m < M; m++) sum[m][v] += weights[v] * inputs[m];
        } else {
            for (int m = 0; m < M; m++) {
                Floats one = broadcast(input[m * stride]);
                for (int v = 0; v < V; v++) sum[m][v] += weights[v] * one;
            }
        }
    };
    for (int p = 0; p < pairs; p++, w += step, next += AHEAD) {
        for (int g = 0; g < G; g++) __builtin_prefetch(next + g * next_apart);
        auto of = [&](int v) __attribute__((always_inline)) { return w + v / each * apart + v % each * LANES; };
        for (int v = 0; v < V; v++) weights[v] = firsts(of(v));
        add(x + 2 * p);
        for (int v = 0; v < V; v++) weights[v] = seconds(of(v));
        add(x + 2 * p + 1);
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(out + m * out_stride + LANES * v, sum[m][v]);
}

// The same for some columns, a multiple of 16; with 8 lanes there are 16 registers, and more than six rows are two parts. Where
// weights are read more than once, that is done with a piece of them that is in the first cache. ahead: bytes asked for.
template <int M, int ahead = 64>
inline void add_dots(const uint32_t* w, size_t step, int columns, const Number* x, size_t stride, int pairs, float* out,
                     size_t out_stride) {
    constexpr bool parts = LANES == 8 && M > GOOD_TILE;
    constexpr int G = LANES == 16 || M <= FEW ? 2 : 1;
    const int piece = parts || columns > 16 ? PIECE : pairs;
    for (int p = 0, n; p < pairs; p += n, w += n * step, x += 2 * n) {
        n = pairs - p < piece ? pairs - p : piece;
        const char* next = (const char*)w + (ahead ? REACH : 0);
        int c = 0;
        for (; c + 16 * G <= columns; c += 16 * G, next += G * n * ahead) {
            if constexpr (parts) {
                add_columns<4, G, ahead / 2>(w + c, step, 16, next, 0, x, stride, n, out + c, out_stride);
                add_columns<M - 4, G, ahead / 2>(w + c, step, 16, next + n * ahead / 2, 0, x + 4 * stride, stride, n,
                                                 out + 4 * out_stride + c, out_stride);
            } else {
                add_columns<M, G, ahead>(w + c, step, 16, next, size_t(n) * ahead, x, stride, n, out + c, out_stride);
            }
        }
        if (c < columns) add_columns<M, 1, ahead>(w + c, step, 16, next, 0, x, stride, n, out + c, out_stride);
    }
}

template <int M, int W>
inline void dot_pairs(const uint32_t* w, const Number* x, size_t stride, int pairs, float* out, size_t out_stride) {
    for (int m = 0; m < M; m++) std::memset(out + m * out_stride, 0, sizeof(float) * W);
    add_dots<M>(w, W, W, x, stride, pairs, out, out_stride);
}

// The same for two blocks of 16 columns at once.
template <int M>
inline void dot_twice(const uint32_t* w, size_t apart, const Number* x, size_t stride, int pairs, float* out,
                      size_t out_stride) {
    for (int m = 0; m < M; m++) std::memset(out + m * out_stride, 0, sizeof(float) * 32);
    add_columns<M, 2, 64>(w, 16, apart, (const char*)w + REACH, 4 * apart, x, stride, pairs, out, out_stride);
}
#endif

// bf16 in 12 bits: of two pairs of inputs and a block of outputs the low bytes of the first pair, of the second, and four bits
// of each for the high byte, which is the sign and the exponent without its last bit; all where instructions that interleave
// bytes find them (`place`).
constexpr int CODED = 3 * BLOCK;    // bytes of a pair of inputs
constexpr int UNIT = 2 * CODED;

// Where in a pair's bytes the i-th number of output j is.
constexpr int place(int j, int i) {
    constexpr int quads = LANES / 4;
    return j / 4 % quads * 16 + j / 4 / quads * 8 + j % 4 * 2 + i;
}

// Of two vectors of bytes those in turn, of the first halves of all quarters (of 16 bytes) or of the second ones; and of two of
// numbers up to 16 bits their quarters in turn, each half as long: where `place` has the bytes of a pair's first numbers.
#if defined(__AVX512BW__)
inline Words quarters_in_turn(Words a, Words b) { return (Words)_mm512_packus_epi32((__m512i)a, (__m512i)b); }
inline Words first_in_turn(Words a, Words b) { return (Words)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
inline Words second_in_turn(Words a, Words b) { return (Words)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
inline Words quarters_in_turn(Words a, Words b) { return (Words)_mm256_packus_epi32((__m256i)a, (__m256i)b); }
inline Words first_in_turn(Words a, Words b) { return (Words)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b); }
inline Words second_in_turn(Words a, Words b) { return (Words)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b); }
#else
inline Words quarters_in_turn(Words a, Words b) {
    uint16_t to[2 * LANES];
    for (int j = 0; j < 2 * LANES; j++) to[place(j, 0) / 2] = uint16_t(j < LANES ? a[j] : b[j - LANES]);
    return load<Words>(to);
}
inline Words in_turn(Words a, Words b, int half) {
    uint8_t from[2][4 * LANES], to[4 * LANES];
    std::memcpy(from[0], &a, sizeof a);
    std::memcpy(from[1], &b, sizeof b);
    for (int quarter = 0; quarter < 4 * LANES; quarter += 16)
        for (int k = 0; k < 8; k++)
            for (int i = 0; i < 2; i++) to[quarter + 2 * k + i] = from[i][quarter + half * 8 + k];
    return load<Words>(to);
}
inline Words first_in_turn(Words a, Words b) { return in_turn(a, b, 0); }
inline Words second_in_turn(Words a, Words b) { return in_turn(a, b, 1); }
#endif

// Two pairs of inputs of a block: use(p, vectors of pairs of its first outputs, of the others) for p = 0 and 1. high(bits, p) are
// their high bytes.
template <class High, class Use>
inline __attribute__((always_inline)) void decode(const uint8_t* w, const High& high, Use use) {
    const Words bits = load<Words>(w + 4 * BLOCK);
    for (int p = 0; p < 2; p++) {
        const Words low = load<Words>(w + 2 * BLOCK * p), top = high(bits, p);
        use(p, first_in_turn(low, top), second_in_turn(low, top));
    }
}

// Pairs of inputs of G blocks side by side as ce_pack lays them, from two every `step` bytes, those of a block after the other's;
// with each two, those at `next` are asked for.
template <int G, class High>
inline void decode_pairs(const uint8_t* w, size_t step, const uint8_t* next, const High& high, int pairs, uint32_t* to) {
    for (int p = 0; p < pairs; p += 2, w += step, next += step, to += 2 * G * BLOCK) {
        for (int line = 0; line < G * UNIT; line += 64) __builtin_prefetch(next + line);
        for (int g = 0; g < G; g++)
            decode(w + g * UNIT, high, [&](int q, Words a, Words b) {
                std::memcpy(to + (q * G + g) * BLOCK, &a, sizeof a);
                std::memcpy(to + (q * G + g) * BLOCK + LANES, &b, sizeof b);
            });
    }
}

#ifdef BF16_DOT
// sum[m] += the products of M rows with some pairs of inputs, an even number, of G blocks in 12 bits: two pairs every `step`
// bytes, those of a block after the other's. What lies AHEAD of `next` is asked for.
template <int M, int G, class High>
inline void add_coded(const uint8_t* w, size_t step, const uint8_t* next, const High& high, const Number* x, size_t stride,
                      int pairs, __m512 (&sum)[M][2 * G]) {
    for (int p = 0; p < pairs; p += 2, w += step, next += step, x += 4)
        for (int g = 0; g < G; g++) {
            ahead<M, UNIT>(next + g * UNIT);
            decode(w + g * UNIT, high, [&](int q, Words a, Words b) __attribute__((always_inline)) {
                for (int m = 0; m < M; m++) {
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(load<int>(x + m * stride + 2 * q));
                    sum[m][2 * g] = _mm512_dpbf16_ps(sum[m][2 * g], (__m512bh)a, both);
                    sum[m][2 * g + 1] = _mm512_dpbf16_ps(sum[m][2 * g + 1], (__m512bh)b, both);
                }
            });
        }
}
#endif

// Weights without loss: four bits tell which of 16 a high byte is. Weights of a block are near enough in size that 7 exponents
// for each sign and two zeros leave out very few; these are zeros here, and are added by themselves. That the exponents of a
// model's weights hold less than three bits of information is DFloat11's finding (Zhang et al. 2025). A block is its Code and
// then its inputs.
struct alignas(2 * BLOCK) Code {    // the size of the vectors in which weights are read
    uint8_t highs[16];              // what four bits stand for
    int32_t from, to;               // the block's odd weights
};
constexpr int ZERO = 7;             // its four bits; 15 for -0

#ifdef CODES
struct Looked {                     // high bytes of a block of weights
    Words highs;
#ifdef __AVX512F__
    explicit Looked(const uint8_t* block) : highs((Words)_mm512_broadcast_i32x4(load<__m128i>(block))) {}
    static Words chosen(Words from, Words bits) { return (Words)_mm512_shuffle_epi8((__m512i)from, (__m512i)bits); }
#else
    explicit Looked(const uint8_t* block) : highs((Words)_mm256_broadcastsi128_si256(load<__m128i>(block))) {}
    static Words chosen(Words from, Words bits) { return (Words)_mm256_shuffle_epi8((__m256i)from, (__m256i)bits); }
#endif
    Words operator()(Words bits, int p) const { return chosen(highs, (p ? bits >> 4 : bits) & 0x0F0F0F0Fu); }
};

#ifdef BF16_DOT
// As dot_pairs, of a block in 12 bits.
template <int M>
inline void dot_coded(const uint8_t* block, const Number* x, size_t stride, int pairs, float* out, size_t out_stride) {
    __m512 sum[M][2];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) sum[m][v] = _mm512_setzero_ps();
    const uint8_t* w = block + sizeof(Code);
    add_coded<M, 1>(w, UNIT, w, Looked(block), x, stride, pairs, sum);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(out + m * out_stride + 16 * v, sum[m][v]);
}
#else
constexpr int FEW_CODED = 4;        // rows for which weights are decoded in registers: six rows' sums leave none for that
constexpr int WIDE_PIECE = 96;      // pairs of weights that many rows read as fp32 from the first cache

// A block's pairs of inputs as fp32, an input of all outputs after the other.
inline void decode_wide(const uint8_t* w, const Looked& high, int pairs, float* to) {
    for (int p = 0; p < pairs; p += 2, w += UNIT, to += 4 * BLOCK)
        decode(w, high, [&](int q, Words a, Words b) {
            float* pair = to + q * 2 * BLOCK;
            store(pair, (Floats)(a << 16));
            store(pair + LANES, (Floats)(b << 16));
            store(pair + BLOCK, (Floats)(a & 0xFFFF0000u));
            store(pair + BLOCK + LANES, (Floats)(b & 0xFFFF0000u));
        });
}

// out[m][j] = sum over p of w[p][j] . x[m][p], for M rows and G blocks that lie `apart` bytes.
template <int M, int G>
__attribute__((noinline)) void dot_few_coded(const uint8_t* block, size_t apart, const Number* x, size_t stride, int pairs,
                                             float* out, size_t out_stride) {
    Floats sum[M][2 * G] = {};
    const Looked high[2] = {Looked(block), Looked(block + (G - 1) * apart)};
    const uint8_t* w = block + sizeof(Code);
    const int turn = pairs - AHEAD / CODED;       // from here on the next blocks are asked for
    for (int p = 0; p < pairs; p += 2, w += UNIT, x += 4)
        for (int g = 0; g < G; g++) {
            const uint8_t* next = w + g * apart + AHEAD + (p < turn ? 0 : (G - 1) * apart);
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            decode(w + g * apart, high[g], [&](int q, Words a, Words b) __attribute__((always_inline)) {
                for (int i = 0; i < 2; i++) {
                    const Floats first = (Floats)(i ? a & 0xFFFF0000u : a << 16);
                    const Floats second = (Floats)(i ? b & 0xFFFF0000u : b << 16);
                    for (int m = 0; m < M; m++) {
                        const Floats one = broadcast(x[m * stride + 2 * q + i]);
                        sum[m][2 * g] += first * one;
                        sum[m][2 * g + 1] += second * one;
                    }
                }
            });
        }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2 * G; v++) store(out + m * out_stride + LANES * v, sum[m][v]);
}

// The same for one block and up to MAX_TILE rows: more than a few read a piece at a time, decoded into the first cache.
template <int M>
inline void dot_coded(const uint8_t* block, const Number* x, size_t stride, int pairs, float* out, size_t out_stride) {
    if constexpr (M <= FEW_CODED) return dot_few_coded<M, 1>(block, 0, x, stride, pairs, out, out_stride);
    alignas(64) uint32_t piece[PIECE * BLOCK];
    const Looked high(block);
    const uint8_t* w = block + sizeof(Code);
    for (int m = 0; m < M; m++) std::memset(out + m * out_stride, 0, sizeof(float) * BLOCK);
    for (int p = 0, n; p < pairs; p += n, w += size_t(n) * CODED, x += 2 * n) {
        n = pairs - p < PIECE ? pairs - p : PIECE;
        const char* next = (const char*)w + AHEAD;
        decode_pairs<1>(w, UNIT, w, high, n, piece);
        if constexpr (M <= GOOD_TILE) {
            add_columns<M, 1, CODED>(piece, BLOCK, BLOCK, next, 0, x, stride, n, out, out_stride);
        } else {
            add_columns<4, 1, CODED / 2>(piece, BLOCK, BLOCK, next, 0, x, stride, n, out, out_stride);
            add_columns<M - 4, 1, CODED / 2>(piece, BLOCK, BLOCK, next + n * CODED / 2, 0, x + 4 * stride, stride, n,
                                             out + 4 * out_stride, out_stride);
        }
    }
}

// out[m][j] += sum over p of w[p][j] . x[m][p], for M rows and the outputs of a block, from `decode_wide`. At each pair
// later weights are asked for, from `next` on, one pair's or none.
template <int M>
__attribute__((noinline)) void add_wide(const float* w, const void* next, int ahead, const Number* x, size_t stride,
                                        int pairs, float* out, size_t out_stride) {
    const char* line = (const char*)next;
    Floats sum[M][2];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) sum[m][v] = load<Floats>(out + m * out_stride + LANES * v);
    for (int p = 0; p < pairs; p++, x += 2, line += ahead) {
        __builtin_prefetch(line);
        for (int i = 0; i < 2; i++, w += BLOCK) {
            Floats first = load<Floats>(w), second = load<Floats>(w + LANES);
            asm("" : "+x"(first), "+x"(second));        // once: else each product reads them
            for (int m = 0; m < M; m++) {
                const Floats one = broadcast(x[m * stride + i]);
                sum[m][0] += first * one;
                sum[m][1] += second * one;
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++) store(out + m * out_stride + LANES * v, sum[m][v]);
}
#endif
#endif

// sum + a . b, pair by pair: of two integers of 16 bits each.
inline Ints add_whole(Ints sum, Shorts a, Shorts b) {
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

// out[m][j] = (sum over p of w[p][j] . x[m][p]) * x_scale[m] * w_scale[j], for M rows and a block of outputs: pairs of weights
// of 8 bits, of inputs of 16. The outputs' first half and second lie byte by byte in turn: shifts alone widen them.
template <int M>
inline void dot_whole(const int8_t* w, const float* w_scale, const int16_t* x, const float* x_scale, size_t stride, int pairs,
                      float* out, size_t out_stride) {
    Ints sum[M][2] = {};
#pragma GCC unroll 4                    // else the loop itself is a quarter of the work for one row
    for (int p = 0; p < pairs; p++, w += 2 * BLOCK) {
        const Shorts both = load<Shorts>(w), first = both << 8 >> 8, second = both >> 8;
        __builtin_prefetch(w + REACH);
        for (int m = 0; m < M; m++) {
            const Shorts inputs = (Shorts)(load<int32_t>(x + m * stride + 2 * p) - Ints{});
            sum[m][0] = add_whole(sum[m][0], first, inputs);
            sum[m][1] = add_whole(sum[m][1], second, inputs);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2; v++)
            store(out + m * out_stride + LANES * v,
                  __builtin_convertvector(sum[m][v], Floats) * x_scale[m] * load<Floats>(w_scale + LANES * v));
}

// f of n, up to MOST, as a constant.
template <int MOST, class F>
inline void with_rows(int n, F f) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_rows<MOST - 1>(n, f);
    f(std::integral_constant<int, MOST>{});
}

template <int W>
void dot_rows(int rows, const uint32_t* w, const Number* x, size_t stride, int pairs, float* out, size_t out_stride) {
    with_rows<MAX_TILE>(rows, [&](auto m) { dot_pairs<m(), W>(w, x, stride, pairs, out, out_stride); });
}

}  // namespace

extern "C" {

struct Odd {                        // a weight that no code of its block stands for
    int32_t at;                     // input * BLOCK + output in its block
    float value;
};

struct Matrix {                     // (out, in), packed by ce_pack or ce_code, or with `scale` in 8 bits; bias may be null
    const void* weight;
    const float *scale, *bias;      // of each output, whole blocks of scales
    int32_t in, out;
    const Odd* odd;                 // of ce_code; null: not in 12 bits
};

// A weight once more, each output rounded to 8 bits: its sums tell which outputs of the exact one may be the largest.
struct Screen {
    Matrix rough;
    const int32_t* ids;             // of each of its outputs, the one in the exact weight; null: the same
    float error, size;              // largest size of what rounding changed in an output, and of what is left, in its scale
};

struct Layer {
    Matrix qkv, o, gate_up, down;   // qkv: of each key-value head its queries, key, value; gate_up: blocks of gate and up in turn
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm;       // q_norm and k_norm may be null
};

struct Stack {
    const Layer* layers;
    const float *cosines, *sines;   // (positions, d / 2)
    int32_t hidden, heads, kv_heads, head_dim, inner;
    float eps, scale;
};

struct Exit {                       // an adapter: norm(straight x + up(silu(gate x) * down x)), or h for straight x
    Matrix straight, gate_down, up; // straight.weight may be null; gate_down: blocks of gate and down in turn
    const float* norm;
    float eps;
    const float* reach;             // what x is multiplied by before straight and gate_down read it; may be null
};

struct Estimator {                  // sigmoid(outer . silu(inner x + inner_bias) + outer_bias)
    const float *inner, *inner_bias, *outer;        // (width, in), (width), (width)
    float outer_bias;
    int32_t in, width;
};

struct Cache {                      // `Slots` of all layers, of each text, of each key-value head
    uint8_t *keys, *values;
    int32_t capacity;               // a multiple of KEYS
};

}

namespace {

inline int blocks(const Matrix& m) { return (m.out + BLOCK - 1) / BLOCK; }
inline int pairs(const Matrix& m) { return (m.in + 1) / 2; }
inline const uint32_t* block(const Matrix& m, int b) { return (const uint32_t*)m.weight + size_t(b) * pairs(m) * BLOCK; }
inline size_t coded_bytes(int pairs) { return sizeof(Code) + size_t(pairs) * CODED; }       // of a block
inline const uint8_t* coded_block(const Matrix& m, int b) { return (const uint8_t*)m.weight + b * coded_bytes(pairs(m)); }

// Tiles of rows, as even as can be: many of them go at the pace of the processor.
inline int tiles(int rows) { return rows <= MAX_TILE ? 1 : (rows + GOOD_TILE - 1) / GOOD_TILE; }

// Rows (n, in) as a matrix reads them, one every `stride` numbers: for weights of 8 bits also as integers and what each row of
// them is to be multiplied by.
struct Rows {
    const Number* x;
    size_t stride;
    const int16_t* whole;
    const float* scale;
};

// What the integers of a row (in) are to be multiplied by: the largest is as large as sums of 32 bits allow.
inline float step_of(const Number* x, int in) {
    float sizes[16] = {}, size = 1e-30f;
    for (int j = 0; j < in; j++) {
        const float here = std::fabs(as_float(x[j])), before = sizes[j % 16];
        sizes[j % 16] = here > before ? here : before;
    }
    for (float here : sizes) size = here > size ? here : size;
    return size / std::fmin(32767.0f, 16777215.0f / float((in + 1) / 2 * 2));        // 2^31 / 128
}

// As `m` reads them. The integers are this thread's, and only until it is asked again; their sums fit into 32 bits.
inline Rows rows_for(const Matrix& m, const Number* x, size_t stride, int n) {
    static thread_local Scratch<int16_t> s_whole;
    static thread_local Scratch<float> f_scale;
    if (!m.scale) return {x, stride, nullptr, nullptr};
    const int in = 2 * pairs(m);
    int16_t* whole = s_whole.get(size_t(n) * in);
    float* scale = f_scale.get(n);
    for (int r = 0; r < n; r++) {
        const Number* from = x + r * stride;
        scale[r] = step_of(from, m.in);
        const float times = 1 / scale[r];
        for (int j = 0; j < m.in; j++) whole[size_t(r) * in + j] = int16_t(std::nearbyint(as_float(from[j]) * times));
    }
    return {x, stride, whole, scale};
}

#ifdef CODES
// What a block's odd weights add to its sums.
inline void add_odd(const Matrix& m, int b, const Number* x, size_t stride, int rows, float* out, size_t out_stride) {
    const Code code = load<Code>(coded_block(m, b));
    __builtin_prefetch(m.odd + code.to);        // the next block's
    for (int i = code.from; i < code.to; i++) {
        const int input = m.odd[i].at / BLOCK, output = m.odd[i].at % BLOCK;
        for (int r = 0; r < rows; r++) out[r * out_stride + output] += m.odd[i].value * as_float(x[r * stride + input]);
    }
}

// As `dot_blocks`, of weights in 12 bits.
inline void dot_coded_blocks(const Matrix& m, int b, int count, const Number* x, size_t stride, int tile, float* out,
                             size_t out_stride) {
    const int n = pairs(m);
#ifndef BF16_DOT
    if (count == 2 && tile < FEW)
        with_rows<FEW - 1>(tile, [&](auto some) {
            dot_few_coded<some(), 2>(coded_block(m, b), coded_bytes(n), x, stride, n, out, out_stride);
        });
    else
#endif
        for (int i = 0; i < count; i++)
            with_rows<MAX_TILE>(tile, [&](auto some) {
                dot_coded<some()>(coded_block(m, b + i), x, stride, n, out + i * BLOCK, out_stride);
            });
    for (int i = 0; i < count; i++) add_odd(m, b + i, x, stride, tile, out + i * BLOCK, out_stride);
}

#ifndef BF16_DOT
// Sums of one or two blocks for many rows, 2 BLOCK for each: this thread's, until it asks again. All rows read a piece of the
// weights before the next one is decoded.
inline const float* dot_many_coded(const Matrix& m, int b, int count, const Number* x, size_t stride, int rows) {
    static thread_local Scratch<float> f_sums;
    alignas(64) float piece[WIDE_PIECE * 2 * BLOCK];
    float* sums = f_sums.get(size_t(rows) * 2 * BLOCK);
    std::memset(sums, 0, sizeof(float) * rows * 2 * BLOCK);
    for (int i = 0; i < count; i++) {
        const uint8_t* code = coded_block(m, b + i);
        for (int p = 0, n; p < pairs(m); p += n) {
            n = pairs(m) - p < WIDE_PIECE ? pairs(m) - p : WIDE_PIECE;
            const uint8_t* w = code + coded_bytes(p);
            decode_wide(w, Looked(code), n, piece);
            for (int r = 0, left = tiles(rows), tile; left; r += tile, left--) {
                tile = (rows - r + left - 1) / left;
                with_rows<GOOD_TILE>(tile, [&](auto some) {
                    float* out = sums + r * 2 * BLOCK + i * BLOCK;
                    if (r == 0)
                        add_wide<some()>(piece, w + AHEAD, CODED, x + 2 * p, stride, n, out, 2 * BLOCK);
                    else
                        add_wide<some()>(piece, piece, 0, x + r * stride + 2 * p, stride, n, out, 2 * BLOCK);
                });
            }
        }
        add_odd(m, b + i, x, stride, rows, sums + i * BLOCK, 2 * BLOCK);
    }
    return sums;
}
#endif
#endif

// One or two blocks of outputs for a tile of rows from the r-th on -> out, with one every out_stride.
inline void dot_blocks(const Matrix& m, int b, int count, const Rows& rows, int r, int tile, float* out, size_t out_stride) {
    const int n = pairs(m);
    const Number* x = rows.x + r * rows.stride;
    if (m.scale) {
        for (int i = 0; i < count; i++)
            for (int at = 0; at < tile; at += GOOD_TILE)
                with_rows<GOOD_TILE>(tile - at < GOOD_TILE ? tile - at : GOOD_TILE, [&](auto some) {
                    dot_whole<some()>((const int8_t*)m.weight + size_t(b + i) * n * 2 * BLOCK, m.scale + (b + i) * BLOCK,
                                      rows.whole + size_t(r + at) * 2 * n, rows.scale + r + at, 2 * n, n,
                                      out + at * out_stride + i * BLOCK, out_stride);
                });
        return;
    }
#ifdef CODES
    if (m.odd) return dot_coded_blocks(m, b, count, x, rows.stride, tile, out, out_stride);
#endif
#ifndef BF16_DOT
    if (BLOCK == 16 && count == 2 && tile < FEW)
        return with_rows<FEW - 1>(tile, [&](auto some) {
            dot_twice<some()>(block(m, b), size_t(n) * BLOCK, x, rows.stride, n, out, out_stride);
        });
#endif
    for (int i = 0; i < count; i++) dot_rows<BLOCK>(tile, block(m, b + i), x, rows.stride, n, out + i * BLOCK, out_stride);
}

// The same for all rows: use(first row, rows, sums with 2 BLOCK for each) for some at a time.
template <class Use>
inline void dot_all(const Matrix& m, int b, int count, const Rows& from, int rows, Use use) {
#if defined(CODES) && !defined(BF16_DOT)
    if (m.odd && rows > MAX_TILE) return use(0, rows, dot_many_coded(m, b, count, from.x, from.stride, rows));
#endif
    float sums[MAX_TILE][2 * BLOCK];
    for (int r = 0, left = tiles(rows), tile; left; r += tile, left--) {
        tile = (rows - r + left - 1) / left;
        dot_blocks(m, b, count, from, r, tile, sums[0], 2 * BLOCK);
        use(r, tile, sums[0]);
    }
}

// x (rows, in) times the matrix: done(row, first output, BLOCK sums) for each block that this thread takes.
template <class Done>
inline void multiply(Team& team, const Matrix& m, const Number* x, size_t stride, int rows, Done done) {
    const Rows from = rows_for(m, x, stride, rows);
    const int together = LANES == 8 && rows < FEW ? 2 : 1;      // blocks
    team.share((blocks(m) + together - 1) / together, [&](int unit) {
        const int b = unit * together, count = blocks(m) - b < together ? 1 : together;
        dot_all(m, b, count, from, rows, [&](int r, int some, const float* sums) {
            for (int i = 0; i < some; i++, sums += 2 * BLOCK)
                for (int k = 0; k < count; k++) done(r + i, (b + k) * BLOCK, sums + k * BLOCK);
        });
    });
}

// silu(gate x) * other x (rows, n), for a matrix with blocks of gate and other in turn.
inline void gated(Team& team, const Matrix& both, const Number* x, int rows, int n, Number* out) {
    const Rows from = rows_for(both, x, both.in, rows);
    team.share(blocks(both) / 2, [&](int b) {
        const int width = n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK;
        dot_all(both, 2 * b, 2, from, rows, [&](int r, int some, const float* sums) {
            for (int i = 0; i < some; i++, sums += 2 * BLOCK)
                for (int j = 0; j < width; j++)
                    round_to(out[size_t(r + i) * n + b * BLOCK + j], silu(sums[j]) * sums[BLOCK + j]);
        });
    });
}

// The largest output so far; of equal ones the first.
struct Best {
    float value;
    int32_t number;
    void take(const Best& other) {
        if (other.value > value || (other.value == value && other.number < number)) *this = other;
    }
};

// An output of a screen that may be the largest for a row, and the most that the exact one can be.
struct Chance {
    int row, number;
    float most;
};

// How far, in the scale of an output, a screen's sum for a row may be from the exact one, whatever the signs (Cauchy and
// Schwarz): by the rounding of weights, by that of inputs, and by eight times what sums in fp32 may lose.
inline float doubt(const Screen& screen, const Number* x) {
    const int in = screen.rough.in;
    double squares = 0;
    for (int j = 0; j < in; j++) squares += double(as_float(x[j])) * as_float(x[j]);
    const double size = std::sqrt(squares), step = 0.5 * step_of(x, in) * std::sqrt(double(in));
    return float(1.001 * (screen.error * size + (screen.size + screen.error) * (step + (in + 16) * 0x1p-21 * size)));
}

// This thread's part of a screen's outputs: those that may be the largest, and in least[row] what the largest at least is.
inline void sift(Team& team, const Screen& screen, const Number* x, int rows, const float* doubts, float* least,
                 std::vector<Chance>& chances) {
    multiply(team, screen.rough, x, screen.rough.in, rows, [&](int r, int first, const float* sums) {
        const int n = screen.rough.out - first < BLOCK ? screen.rough.out - first : BLOCK;
        const float *scale = screen.rough.scale + first, doubt = doubts[r];
        float& bound = least[r];
        bool any = false;
        for (int j = 0; j < n; j++) any |= sums[j] + scale[j] * doubt >= bound;
        for (int j = 0; any && j < n; j++) {
            const float most = sums[j] + scale[j] * doubt, here = sums[j] - scale[j] * doubt;
            if (most >= bound) chances.push_back({r, first + j, most});
            bound = here > bound ? here : bound;
        }
    });
}

inline float row_scale(const float* x, int n, float eps) {      // of RMSNorm
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
    float scale = row_scale(x, n, eps);
    for (int j = 0; j < n; j++) round_to(out[j], x[j] * scale * weight[j]);
}

// A head of size d: its own norm where there is one, then the rotary embedding, in place.
inline void rotate(float* x, const float* norm, float eps, const float* cosine, const float* sine, int d) {
    if (norm) {
        float scale = row_scale(x, d, eps);
        for (int j = 0; j < d; j++) x[j] *= scale * norm[j];
    }
    for (int j = 0; j < d / 2; j++) {
        float a = x[j], b = x[j + d / 2];
        x[j] = __builtin_fmaf(a, cosine[j], -(b * sine[j]));
        x[j + d / 2] = __builtin_fmaf(b, cosine[j], a * sine[j]);
    }
}

// -- the cache --------------------------------------------------------------------------------------------------------

// A key or value is kept as its largest exponent (its size) and, in 12 bits, each number's sign and digits and how far below
// that its exponent is, up to 15; what is smaller yet becomes one of these. That is off by 2^-15 of the largest at most, whose
// own last digit in bf16 is worth 2^-7. So all high bytes are 0x38 with a sign and three bits, and a power of two remains that
// scores and weights are multiplied by.
struct Near {
    Words operator()(Words bits, int p) const {
        return (p ? (bits << 4 & 0x80808080u) | (bits >> 4 & 0x07070707u) : bits & 0x87878787u) | 0x38383838u;
    }
};
constexpr uint32_t HIGH_BITS = 0x87, TWO_HIGH_BITS = 0x00870087;     // what is kept of a high byte, of two 16 bits apart
inline Words exchanged(Words high) { return high << 4 | high >> 4; }        // of one in 16 bits, for a second pair

inline int columns_of(int d) { return (d + BLOCK - 1) / BLOCK * BLOCK; }
inline size_t key_block(int d) { return 2 * KEYS + size_t(d / 4) * UNIT; }
inline size_t value_block(int d) { return size_t(columns_of(d) / BLOCK) * (KEYS / 4) * UNIT; }

// 2^(size - 127) of a vector of sizes; 0 for 0.
inline Floats whole_sizes(const uint8_t* sizes) {
    using Bytes = uint8_t __attribute__((vector_size(LANES)));
    const Halves halves = __builtin_convertvector(load<Bytes>(sizes), Halves);      // at once GCC takes them one by one
    return (Floats)(__builtin_convertvector(halves, Words) << 23);
}
inline float whole_size(uint8_t size) {
    const uint32_t bits = size << 23;
    return load<float>(&bits);
}

inline int size_of(const float* x, int d) {
    int most = 0;
    for (int j = 0; j < d; j++) {
        const int size = narrow(x[j]) & 0x7FFF;
        most = size > most ? size : most;
    }
    return most >> 7;
}

// As they are kept beside such a size: bf16 numbers below 2 of at least 2^-15.
inline Words near(Floats x, int size) {
    const Words bits = rounded(x) >> 16;
    const Ints below = size - (Ints)(bits >> 7 & 255u);
    return (bits & 0x8000u) | (below > 15 ? Words{} + (112 << 7) : (Words)(127 - below) << 7 | (bits & 127u));
}

// Where the keys and values of a head are. Keys of a block of positions: the sizes of all keys, of all values, and then as
// weights lie, dimensions being the inputs and positions the outputs. Values: as weights lie, positions being the inputs, but all
// dimensions of 4 positions beside each other.
struct Slots {
    uint8_t *keys, *values;
    int d;
    Slots() = default;
    Slots(uint8_t* keys, uint8_t* values, int d) : keys(keys), values(values), d(d) {}
    Slots(const Cache& cache, size_t head, int d)
        : keys(cache.keys + head * (cache.capacity / KEYS) * key_block(d)),
          values(cache.values + head * (cache.capacity / KEYS) * value_block(d)), d(d) {}
    uint8_t* key(int t) const { return keys + t / KEYS * key_block(d); }                        // the block of position t
    uint8_t& value_size(int t) const { return key(t)[KEYS + t % KEYS]; }
    size_t step() const { return size_t(columns_of(d) / BLOCK) * UNIT; }                        // values of 4 positions
    uint8_t* value(int t, int column) const { return values + t / 4 * step() + column / BLOCK * UNIT; }

    void put_key(int t, const float* x) const {
        const int j = t % KEYS, size = size_of(x, d);
        key(t)[j] = uint8_t(size);
        uint8_t* unit = key(t) + 2 * KEYS + place(j, 0);
        for (int from = 0; from < d; from += LANES) {
            using Pairs = uint32_t __attribute__((vector_size(2 * LANES)));
            const Halves kept = __builtin_convertvector(near(load<Floats>(x + from), size), Halves);
            auto close = [](Pairs bytes) { return (bytes & 0xFFu) | bytes >> 8; };      // two bytes that lay apart
            const Pairs pairs = load<Pairs>(&kept), high = close(pairs >> 8 & TWO_HIGH_BITS);
            const Pairs low = close(pairs & 0x00FF00FFu), second = (high >> 4 & 0x0808u) | (high << 4 & 0x7070u);
            for (int p = 0; p < LANES / 2; p += 2, unit += UNIT) {
                const uint16_t bytes[3] = {uint16_t(low[p]), uint16_t(low[p + 1]), uint16_t(high[p] | second[p + 1])};
                for (int i = 0; i < 3; i++) std::memcpy(unit + i * 2 * BLOCK, bytes + i, 2);
            }
        }
    }

    void put_value(int t, const float* x) const {
        const int size = size_of(x, d);
        value_size(t) = uint8_t(size);
        for (int from = 0; from < d; from += BLOCK) {
            auto kept = [&](int j) { return j < d ? near(load<Floats>(x + j), size) : Words{}; };
            const Words all = quarters_in_turn(kept(from), kept(from + LANES));
            put(value(t, from), t, all, all >> 8);
        }
    }

    // The value of a slot `from` without its size, into a slot of others.
    void copy_value(int from, const Slots& others, int to) const {
        const int down = from % 2 * 8;
        for (int c = 0; c < d; c += BLOCK) {
            const uint8_t* unit = value(from, c);
            const Words low = load<Words>(unit + from % 4 / 2 * 2 * BLOCK) >> down, high = load<Words>(unit + 4 * BLOCK) >> down;
            put(others.value(to, c), to, low, from % 4 / 2 ? exchanged(high & 0x00FF00FFu) : high);
        }
    }

    // Of a block of columns at a position, in 16 bits each: low bytes, and high ones as a first pair has them, into its unit.
    static void put(uint8_t* unit, int t, Words low, Words high) {
        auto blend = [&](uint8_t* at, Words x, uint32_t byte) {
            const uint32_t up = t % 2 * 8, mask = (byte << 16 | byte) << up;
            const Words both = (load<Words>(at) & ~mask) | (x << up & mask);
            std::memcpy(at, &both, sizeof both);
        };
        const bool second = t % 4 / 2;
        blend(unit + second * 2 * BLOCK, low, 0xFF);
        const Words kept = high & TWO_HIGH_BITS;
        blend(unit + 4 * BLOCK, second ? exchanged(kept) : kept, second ? 0xFF ^ HIGH_BITS : HIGH_BITS);
    }

    // All of a position, from a slot to another.
    void copy(int from, int to) const {
        uint8_t *source = key(from), *target = key(to);
        target[to % KEYS] = source[from % KEYS];
        value_size(to) = value_size(from);
        for (int p = 0; p < 3 * (d / 4); p++)
            std::memcpy(target + 2 * KEYS + p * 2 * BLOCK + place(to % KEYS, 0),
                        source + 2 * KEYS + p * 2 * BLOCK + place(from % KEYS, 0), 2);
        copy_value(from, *this, to);
    }
};

#ifdef BF16_DOT
// Scores (M, KEYS) of queries (M, d) with a block of keys. Meanwhile what is `next` is asked for.
template <int M>
inline void dot_keys(const uint8_t* block, const uint8_t* next, const Number* queries, int d, float* out, size_t out_stride) {
    __m512 sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    ahead<M, 2 * KEYS>(next - AHEAD);
    add_coded<M, 1>(block + 2 * KEYS, UNIT, next + 2 * KEYS - AHEAD, Near(), queries, d, d / 2, sum);
    for (int v = 0; v < 2; v++) {
        const Floats sizes = whole_sizes(block + LANES * v);
        for (int m = 0; m < M; m++) store(out + m * out_stride + LANES * v, (Floats)sum[m][v] * sizes);
    }
}

// sum[m][j] += the values of some positions, a multiple of 4, which lie every `step` bytes, each times probs[m][t], for M queries
// and G blocks of columns.
template <int M, int G>
inline void add_values(const uint8_t* values, const uint8_t* next, size_t step, int positions, const Number* probs, size_t room,
                       float* sum, size_t stride) {
    __m512 sums[M][2 * G];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2 * G; v++) sums[m][v] = _mm512_loadu_ps(sum + m * stride + LANES * v);
    add_coded<M, G>(values, step, next - AHEAD, Near(), probs, room, positions / 2, sums);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 2 * G; v++) _mm512_storeu_ps(sum + m * stride + LANES * v, sums[m][v]);
}
#else
template <int M>
inline void dot_keys(const uint8_t* block, const uint8_t* next, const Number* queries, int d, float* out, size_t out_stride) {
    alignas(64) uint32_t piece[PIECE * BLOCK];
    for (int m = 0; m < M; m++) std::memset(out + m * out_stride, 0, sizeof(float) * KEYS);
    for (int p = 0, n; p < d / 2; p += n) {
        n = d / 2 - p < PIECE ? d / 2 - p : PIECE;
        const size_t at = 2 * KEYS + p / 2 * UNIT;
        decode_pairs<1>(block + at, UNIT, next + at, Near(), n, piece);
        add_dots<M, 0>(piece, BLOCK, BLOCK, queries + 2 * p, d, n, out, out_stride);
    }
    for (int v = 0; v < 2; v++) {
        const Floats sizes = whole_sizes(block + LANES * v);
        for (int m = 0; m < M; m++) {
            float* to = out + m * out_stride + LANES * v;
            store(to, load<Floats>(to) * sizes);
        }
    }
}

template <int M, int G>
inline void add_values(const uint8_t* values, const uint8_t* next, size_t step, int positions, const Number* probs, size_t room,
                       float* sum, size_t stride) {
    alignas(64) uint32_t piece[KEYS / 2 * G * BLOCK];
    decode_pairs<G>(values, step, next, Near(), positions / 2, piece);
    add_dots<M, 0>(piece, G * BLOCK, G * BLOCK, probs, room, positions / 2, sum, stride);
}
#endif

// The values of positions begin..end-1, multiples of 4, each times its weight in probs[i][t - begin], for some queries: added to
// sum (queries, columns_of(d)). Positions in order. next(t): what is asked for while those from t on are added.
template <class Next>
void add_values(int queries, const Slots& slots, int begin, int end, const Number* probs, size_t room, float* sum, Next next) {
    const int columns = columns_of(slots.d);
    with_rows<MAX_QUERIES>(queries, [&](auto m) {
        for (int t = begin; t < end; t += KEYS) {
            const uint8_t* later = next(t);
            auto add = [&](int c, auto g) {
                add_values<m(), g()>(slots.value(t, c), later + c / BLOCK * UNIT, slots.step(), std::min(KEYS, end - t),
                                     probs + t - begin, room, sum + c, columns);
            };
            int c = 0;
            if (m() < MANY)                                     // a few sums would wait for each other
                for (; c + 2 * BLOCK <= columns; c += 2 * BLOCK)
                    add(c, std::integral_constant<int, m() < MANY ? 2 : 1>());
            for (; c < columns; c += BLOCK) add(c, std::integral_constant<int, 1>());
        }
    });
}

// Where a head's keys and values are, and what of them a row sees: positions from `first` on, those before `fork` at their
// own slots, for all rows alike; those of a tree's row from there on at the slots of its path.
struct Past {
    Slots slots;
    int first, fork, end;           // end: of the slots in use
};

// Up to MAX_QUERIES rows of one key-value head, which share each reading of keys and values: queries (n, d),
// query i at position seen[i] - 1 of a row whose path is paths[i], null in a text.
struct Tile {
    Past past;
    const Number* queries;
    int n, longest;                 // longest: of seen
    int seen[MAX_QUERIES];
    const int* paths[MAX_QUERIES];
    Number* to[MAX_QUERIES];        // where the d results go
};

// What the queries of a tile make of one span of positions: the largest score, the sum of exp(scale (score - largest)), and
// the values weighted by these (n, columns_of(d)). Spans begin at multiples of SPAN, so a row's sums do not depend on who else
// computes.
struct Found {
    float top[MAX_QUERIES], total[MAX_QUERIES];
    float* sums;
};

// Scores row[first..seen-1] -> `top`, the largest, and exp(scale (score - top)), of which the sum is returned, and which times
// the size of its value is to[t], 0 in the rest of their blocks. -infinity and 0 where there are none.
float weigh(const float* row, int first, int seen, float scale, const float* sizes, Number* to, float& top) {
    const Ints lane = lanes_in_order();
    const int start = first / KEYS * KEYS, whole = (seen + KEYS - 1) / KEYS * KEYS;
    const int middle = (first + LANES - 1) / LANES * LANES, last = seen / LANES * LANES;
    // f(t, visible): of a vector of positions from t on visible(x, other) is x where that is seen; in the middle everywhere.
    auto each = [&](auto f) __attribute__((always_inline)) {
        auto part = [&](int t) __attribute__((always_inline)) {
            f(t, [&](Floats x, Floats other) { return (lane + t >= first) & (lane + t < seen) ? x : other; });
        };
        int t = start;
        for (; t < middle && t < whole; t += LANES) part(t);
        for (; t < last; t += LANES) f(t, [](Floats x, Floats) { return x; });
        for (; t < whole; t += LANES) part(t);
    };
    Floats most = broadcast(-INFINITY), sums = {};
    each([&](int t, auto visible) __attribute__((always_inline)) {
        const Floats score = visible(load<Floats>(row + t), most);
        most = score > most ? score : most;
    });
    top = most[0];
    for (int l = 1; l < LANES; l++) top = most[l] > top ? most[l] : top;
    each([&](int t, auto visible) __attribute__((always_inline)) {
        const Floats power = visible(fast_exp((load<Floats>(row + t) - top) * scale), Floats{});
        sums += power;
        store_rounded(to + t, power * load<Floats>(sizes + t));
    });
    return sum_of(sums);
}

// One span of a tile. scores: room for (MAX_QUERIES, room) floats, probs for as many numbers, a span and a tree's rows; sizes for
// `room`; tail for a path's values.
void attend(const Tile& tile, int span, float scale, float* scores, Number* probs, float* sizes, int room, uint8_t* tail,
            Found& found) {
    const Past& past = tile.past;
    const Slots& slots = past.slots;
    const bool tree = tile.paths[0];
    const int n = tile.n, begin = span * SPAN, first = past.first > begin ? past.first : begin, columns = columns_of(slots.d);
    const int start = first / KEYS * KEYS, end = begin + SPAN < tile.longest ? begin + SPAN : tile.longest;
    // A tree's slots lie up to its end, wherever its positions are.
    const int blocks_end = ((tree && end > past.fork ? past.end : end) + KEYS - 1) / KEYS * KEYS;
    const int probs_end = (end + KEYS - 1) / KEYS * KEYS;
    // What is asked for while a block of keys or values is read: one that comes later, values after keys, then the next span.
    const int reach = int(AHEAD / key_block(slots.d) + 1) * KEYS;
    auto after_keys = [&](int t) {
        const int later = t + reach, value = later - blocks_end + start;
        return later < blocks_end ? slots.key(later) : value < probs_end ? slots.value(value, 0) : slots.key(t);
    };
    auto after_values = [&](int t) {
        const int later = t + reach, key = later - probs_end + begin + SPAN;
        return later < probs_end ? slots.value(later, 0) : key < tile.longest ? slots.key(key) : slots.value(t, 0);
    };
    with_rows<MAX_QUERIES>(n, [&](auto m) {
        for (int t = start; t < blocks_end; t += KEYS)
            dot_keys<m()>(slots.key(t), after_keys(t), tile.queries, slots.d, scores + t - start, room);
    });
    const uint8_t* of_values = slots.key(start) + KEYS;
    for (int t = start; t < probs_end; t += KEYS, of_values += key_block(slots.d))
        for (int v = 0; v < KEYS; v += LANES) store(sizes + t - start + v, whole_sizes(of_values + v));
    for (int i = 0; i < n; i++) {
        float* row = scores + size_t(i) * room - start;         // by position
        Number* to = probs + size_t(i) * room - start;
        int seen = tile.seen[i] < end ? tile.seen[i] : end;
        seen = seen > start ? seen : start;                     // a row before this span sees none of it
        const int whole = (seen + KEYS - 1) / KEYS * KEYS;
        for (int t = past.fork > first ? past.fork : first; tree && t < seen; t++) {
            const int from = tile.paths[i][t - past.fork];      // ascending slots, none before its position
            row[t] = row[from];
            sizes[t - start] = whole_size(slots.value_size(from));
        }
        found.total[i] = weigh(row, first, seen, scale, sizes - start, to, found.top[i]);
        for (int t = whole; t < probs_end; t++) to[t] = 0;
    }
    const int own = past.fork / 4 * 4 > start ? past.fork / 4 * 4 : start;      // from here on a path's values are its own
    const int shared = tree && own < probs_end ? own : probs_end;
    std::memset(found.sums, 0, sizeof(float) * n * columns);
    add_values(n, slots, start, shared, probs, room, found.sums, after_values);
    for (int i = 0, same; shared < probs_end && i < n; i += same) {
        for (same = 1; i + same < n && tile.paths[i + same] == tile.paths[i];) same++;
        const int seen = tile.seen[i] < end ? tile.seen[i] : end;
        if (seen <= shared) continue;
        const Slots path(nullptr, tail, slots.d);
        for (int t = shared; t < seen; t++)
            slots.copy_value(t < past.fork ? t : tile.paths[i][t - past.fork], path, t - shared);
        add_values(same, path, 0, (seen + 3 - shared) / 4 * 4, probs + size_t(i) * room + shared - start, room,
                   found.sums + size_t(i) * columns, [&](int t) { return path.value(t, 0); });
    }
}

// What query i found in spans 0..n-1, as one softmax: d results. Spans in order.
void combine(const Found* found, int n, int i, int d, float scale, float* sum, Number* to) {
    float top = -INFINITY, total = 0;
    for (int s = 0; s < n; s++) top = found[s].top[i] > top ? found[s].top[i] : top;
    std::memset(sum, 0, 4 * size_t(d));
    for (int s = 0; s < n; s++) {
        if (found[s].total[i] == 0) continue;
        float weight = found[s].top[i] == top ? 1.0f : fast_exp((found[s].top[i] - top) * scale);
        const float* part = found[s].sums + size_t(i) * columns_of(d);
        total = __builtin_fmaf(weight, found[s].total[i], total);
        for (int j = 0; j < d; j++) sum[j] = __builtin_fmaf(weight, part[j], sum[j]);
    }
    for (int j = 0; j < d; j++) round_to(to[j], sum[j] / total);
}

// f of all n numbers, a vector at a time; what is missing in the last one counts as so small that exp gives nothing for it.
template <class F>
inline void each_vector(const float* numbers, int n, F f) {
    int j = 0;
    for (; j + LANES <= n; j += LANES) f(load<Floats>(numbers + j));
    if (j == n) return;
    Floats last = broadcast(-1e30f);
    std::memcpy(&last, numbers + j, sizeof(float) * (n - j));
    f(last);
}

// bf16 as products read them, in this room where that is another way.
inline const bf16* numbers_of(const bf16* x, size_t, Scratch<bf16>&) { return x; }
inline const float* numbers_of(const bf16* x, size_t n, Scratch<float>& room) {
    float* out = room.get(n);
    for (size_t i = 0; i < n; i++) out[i] = widen(x[i]);
    return out;
}

}  // namespace

extern "C" {

int32_t ce_block() { return BLOCK; }

// Bytes of a position's key in the cache, with both sizes, and of its value; a cache has a multiple of ce_block positions.
int32_t ce_key_bytes(int32_t d) { return int32_t(key_block(d) / KEYS); }
int32_t ce_value_bytes(int32_t d) { return int32_t(value_block(d) / KEYS); }

// What one more row beside so many costs, in passes of one row: measured.
float ce_row_cost(int32_t rows) {
#ifdef BF16_DOT
    return rows < MAX_TILE ? 0.05f : 0.1f;
#elif defined(CODES)
    constexpr float costs[] = {0.04f, 0.05f, 0.06f, 0.22f, 0.1f, 0.3f, 0.1f, 0.25f};        // beside 1, 2 ... 8 and more
    return costs[std::min(rows, MAX_TILE) - 1];
#else
    constexpr float costs[] = {0.05f, 0.05f, 0.05f, 0.08f, 0.1f, 0.15f, 0.15f, 0.25f};
    return costs[std::min(rows, MAX_TILE) - 1];
#endif
}

// Bytes that ce_pack writes for a matrix of this shape.
int64_t ce_packed_bytes(int32_t out, int32_t in) {
    return int64_t((out + BLOCK - 1) / BLOCK) * ((in + 1) / 2) * BLOCK * 4;
}

// Row-major (out, in) bf16 into blocks first, first + step, ...: step 2 lays two matrices block by block in turn.
void ce_pack(const bf16* weight, int32_t out, int32_t in, uint32_t* packed, int32_t first, int32_t step) {
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

// Bytes that ce_code writes for a matrix of this shape; 0 where such weights are not read in 12 bits.
int64_t ce_coded_bytes(int32_t out, int32_t in) {
#ifdef CODES
    if (in % 4 == 0) return int64_t((out + BLOCK - 1) / BLOCK) * coded_bytes(in / 2);
#endif
    return 0;
}

// Row-major (out, in) bf16 in 12 bits, `in` a multiple of 4, into blocks first, first + step, ... of zeros. `odd` has room for
// so many weights and holds `count` of this matrix' so far. Returns how many it then holds; -1 where that is too few.
int32_t ce_code(const bf16* weight, int32_t out, int32_t in, uint8_t* packed, Odd* odd, int32_t room, int32_t count,
                int32_t first, int32_t step) {
    for (int b = 0; b * BLOCK < out; b++) {
        const int width = out - b * BLOCK < BLOCK ? out - b * BLOCK : BLOCK;
        const bf16* rows = weight + size_t(b) * BLOCK * in;
        int seen[128] = {}, base = 0, most = -1;                // of weights, by their exponent without its last bit
        for (size_t i = 0; i < size_t(width) * in; i++) seen[rows[i] >> 8 & 127] += (rows[i] & 0x7FFF) != 0;
        for (int from = 0; from + ZERO <= 128; from++) {
            int sum = 0;
            for (int k = 0; k < ZERO; k++) sum += seen[from + k];
            if (sum > most) most = sum, base = from;
        }
        Code code{{}, count, count};
        for (int k = 0; k < 16; k++) code.highs[k] = uint8_t((k & 8) * 16 + (k % 8 == ZERO ? 0 : base + k % 8));
        uint8_t* block = packed + size_t(first + b * step) * coded_bytes(in / 2);
        for (int i = 0; i < in; i++) {
            uint8_t* two = block + sizeof(Code) + size_t(i / 4) * 2 * CODED;    // pairs
            const int pair = i / 2 % 2;
            for (int j = 0; j < BLOCK; j++) {
                const bf16 w = j < width ? rows[size_t(j) * in + i] : 0;
                const int exponent = (w >> 8 & 127) - base, at = place(j, i % 2);
                const bool zero = (w & 0x7FFF) == 0, known = !zero && exponent >= 0 && exponent < ZERO;
                if (!zero && !known) {
                    if (code.to == room) return -1;
                    odd[code.to++] = {i * BLOCK + j, widen(w)};
                }
                two[pair * 2 * BLOCK + at] = known ? w & 255 : 0;
                two[4 * BLOCK + at] |= ((known ? exponent : ZERO) | (zero || known ? w >> 15 << 3 : 0)) << 4 * pair;
            }
        }
        std::memcpy(block, &code, sizeof code);
        count = code.to;
    }
    return count;
}

// Rows of a bf16 weight as they were before packing: outputs ids[0..n-1] -> out (n, in) bf16.
void ce_rows(const Matrix* m, const int64_t* ids, int32_t n, bf16* out) {
    for (int i = 0; i < n; i++) {
        const uint32_t* from = block(*m, int(ids[i] / BLOCK)) + ids[i] % BLOCK;
        for (int p = 0; p < pairs(*m); p++, from += BLOCK) {
            out[size_t(i) * m->in + 2 * p] = bf16(*from);
            if (2 * p + 1 < m->in) out[size_t(i) * m->in + 2 * p + 1] = bf16(*from >> 16);
        }
    }
}

// x (rows, in) bf16 -> out (rows, out) fp32. `in` must be even.
void ce_linear(const Matrix* m, const bf16* x, float* out, int32_t rows, int32_t threads) {
    static thread_local Scratch<Number> n_x;
    const Number* read = numbers_of(x, size_t(rows) * m->in, n_x);
    std::vector<Desk> desks(threads);
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), desks.data()};
        multiply(team, *m, read, m->in, rows, [&](int r, int first, const float* sums) {
            int n = m->out - first < BLOCK ? m->out - first : BLOCK;
            for (int j = 0; j < n; j++) out[size_t(r) * m->out + first + j] = sums[j] + (m->bias ? m->bias[first + j] : 0);
        });
    }
}

// x (rows, in) bf16 -> the output that is largest for each row, the first of equal ones. `in` must be even. With a screen, which
// may be null, and a weight without bias only outputs that may be largest are read as they are: the result is the same.
void ce_argmax(const Matrix* m, const Screen* screen, const bf16* x, int32_t* numbers, int32_t rows, int32_t threads) {
    static thread_local Scratch<Number> n_x;
    static thread_local Scratch<Best> b_best;
    static thread_local Scratch<float> f_doubts, f_least;
    static thread_local Scratch<int> i_many;
    const Number* read = numbers_of(x, size_t(rows) * m->in, n_x);
    const size_t each = (rows + 15) / 16 * 16;                  // of a thread, in cache lines of its own
    Best* best = b_best.get(threads * each);
    float *doubts = f_doubts.get(rows), *least = f_least.get(threads * each);
    int* many = i_many.get(threads);
    for (size_t i = 0; i < threads * each; i++) best[i] = {-INFINITY, 0}, least[i] = -INFINITY;
    for (int r = 0; screen && r < rows; r++) doubts[r] = doubt(*screen, read + size_t(r) * m->in);
    std::vector<Desk> desks(threads);
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), desks.data()};
        Best* own = best + team.rank * each;
        bool all = !screen;
        if (screen) {
            static thread_local std::vector<Chance> chances;
            chances.clear();
            sift(team, *screen, read, rows, doubts, least + team.rank * each, chances);
            team.meet();
            auto lost = [&](const Chance& chance) {
                bool below = false;
                for (int t = 0; t < team.size; t++) below |= chance.most < least[t * each + chance.row];
                return below;
            };
            chances.erase(std::remove_if(chances.begin(), chances.end(), lost), chances.end());
            many[team.rank] = int(chances.size());
            team.meet();
            int left = 0;
            for (int t = 0; t < team.size; t++) left += many[t];
            all = left > rows * blocks(*m) / BLOCK;             // to pick them one by one would take longer
            float sums[BLOCK];
            for (size_t i = 0; !all && i < chances.size(); i++) {
                const Chance& chance = chances[i];
                const int number = screen->ids ? screen->ids[chance.number] : chance.number;
                dot_pairs<1, BLOCK>(block(*m, number / BLOCK), read + size_t(chance.row) * m->in, m->in, pairs(*m), sums, BLOCK);
                own[chance.row].take({sums[number % BLOCK], number});
            }
        }
        if (all)
            multiply(team, *m, read, m->in, rows, [&](int r, int first, const float* sums) {
                const int n = m->out - first < BLOCK ? m->out - first : BLOCK;
                auto value = [&](int j) { return sums[j] + (m->bias ? m->bias[first + j] : 0); };
                const float bound = own[r].value;
                bool any = false;
                for (int j = 0; j < n; j++) any |= value(j) >= bound;   // equal ones, too: these may be earlier
                for (int j = 0; any && j < n; j++) own[r].take({value(j), first + j});
            });
    }
    for (int r = 0; r < rows; r++) {
        Best found = best[r];
        for (int t = 1; t < threads; t++) found.take(best[t * each + r]);
        numbers[r] = found.number;
    }
}

// Rows (rows, D) bf16 through layers first..last-1; their keys and values go into the cache. The rows before each of the layers
// `stops`, ascending up to `last`, go to out (stops, rows, D) bf16, and it is these that the layer reads.
// D, H * d and the inner size must be even, d a multiple of 16. What the rows are to one another:
//   parents and begins null: one text, at positions start..start+rows-1;
//   parents: a tree after `start` positions: row r goes on from row parents[r] < r, row 0 (parents[0] = -1) from the text.
//     Slot start + r of the cache is row r's; ce_keep moves those of a path to where a text has them;
//   begins: row r is position `start` of text r of the cache, which sees from position begins[r] on.
void ce_layers(const Stack* stack, int32_t first, int32_t last, const int32_t* stops, const bf16* in, bf16* out, int32_t rows,
               const Cache* cache, int32_t start, const int32_t* parents, const int32_t* begins, int32_t threads) {
    static thread_local Scratch<float> f_h, f_qkv, f_scores, f_sizes, f_sums;
    static thread_local Scratch<Number> n_x, n_heads, n_act, n_queries, n_probs;
    static thread_local Scratch<Found> found_by_span;
    static thread_local Scratch<uint8_t> u_tails;
    static thread_local Scratch<int> i_positions, i_paths;
    const int D = stack->hidden, H = stack->heads, G = stack->kv_heads, d = stack->head_dim, I = stack->inner;
    const int wide = (H + 2 * G) * d, group = H / G;
    const int together = begins ? 1 : rows;                     // rows whose queries may share a reading of keys
    const int queries_per_unit = together * group, units = rows / together, lanes = begins ? rows : 1;
    const int tiles_per_unit = (queries_per_unit + MAX_QUERIES - 1) / MAX_QUERIES, tiles = G * units * tiles_per_unit;
    int first_span = 0;
    for (int r = 0; begins && r < rows; r++)
        first_span = r == 0 || begins[r] / SPAN < first_span ? begins[r] / SPAN : first_span;
    const int spans = (start + (begins ? 1 : rows) + SPAN - 1) / SPAN - first_span;
    const int most = (ROUND * threads + spans - 1) / spans, round = tiles < most ? tiles : most;    // tiles worked on together
    const int room = SPAN + (rows + 2 * KEYS) / KEYS * KEYS;
    const size_t tail = parents ? (rows / KEYS + 2) * value_block(d) : 0;      // a path's, and those of up to 3 positions before
    int* position = i_positions.get(rows);
    for (int r = 0; r < rows; r++)
        position[r] = begins ? start : !parents ? start + r : r ? position[parents[r]] + 1 : start;
    int* path = i_paths.get(parents ? rows * rows : 0);         // of row r: the slots of its positions from start on
    for (int r = 0; parents && r < rows; r++)
        for (int at = r, t = position[r] - start; t >= 0; at = parents[at], t--) path[r * rows + t] = start + at;
    auto slot = [&](int r) { return begins ? start : start + r; };
    auto slots_of = [&](int l, int r, int g) { return Slots(*cache, (size_t(l) * lanes + (begins ? r : 0)) * G + g, d); };
    uint8_t* tails = u_tails.get(threads * tail);
    float *h = f_h.get(size_t(rows) * D), *qkv = f_qkv.get(size_t(rows) * wide);
    Number *x = n_x.get(size_t(rows) * D), *act = n_act.get(size_t(rows) * I), *attended = n_heads.get(size_t(rows) * H * d);
    Number* queries = n_queries.get(size_t(rows) * H * d);
    float *all_scores = f_scores.get(size_t(threads) * MAX_QUERIES * room), *all_sizes = f_sizes.get(size_t(threads) * room);
    Number* all_probs = n_probs.get(size_t(threads) * MAX_QUERIES * room);
    Found* found = found_by_span.get(size_t(round) * spans);
    float* sums_found = f_sums.get(size_t(round) * spans * MAX_QUERIES * columns_of(d));
    for (int i = 0; i < round * spans; i++) found[i].sums = sums_found + size_t(i) * MAX_QUERIES * columns_of(d);
    auto tile_of = [&](int l, int number) {
        int g = number / (units * tiles_per_unit), unit = number / tiles_per_unit % units;
        int from = number % tiles_per_unit * MAX_QUERIES, left = queries_per_unit - from;
        Tile tile;
        tile.past = {slots_of(l, unit, g), begins ? begins[unit] : 0, start, start + rows};
        tile.queries = queries + (size_t(g) * rows * group + unit * queries_per_unit + from) * d;
        tile.n = left < MAX_QUERIES ? left : MAX_QUERIES;
        tile.longest = 0;
        for (int q = 0; q < tile.n; q++) {
            int r = unit * together + (from + q) / group, head = g * group + (from + q) % group;
            tile.seen[q] = position[r] + 1;
            tile.paths[q] = parents ? path + r * rows : nullptr;
            tile.to[q] = attended + (size_t(r) * H + head) * d;
            tile.longest = tile.seen[q] > tile.longest ? tile.seen[q] : tile.longest;
        }
        return tile;
    };
    for (size_t i = 0; i < size_t(rows) * D; i++) h[i] = widen(in[i]);
    std::vector<Desk> desks(threads);

#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), desks.data()};
        float* scores = all_scores + size_t(team.rank) * MAX_QUERIES * room;
        Number* probs = all_probs + size_t(team.rank) * MAX_QUERIES * room;
        float* sizes = all_sizes + size_t(team.rank) * room;
        auto normed = [&](const float* weight) {
            for (int r = team.from(rows); r < team.to(rows); r++)
                norm_row(h + size_t(r) * D, weight, D, stack->eps, x + size_t(r) * D);
            team.meet();
        };
        auto add_to_h = [&](const Matrix& m) {
            return [&](int r, int o, const float* sums) {
                int n = m.out - o < BLOCK ? m.out - o : BLOCK;
                float* to = h + size_t(r) * D + o;
                for (int j = 0; j < n; j++) to[j] += sums[j] + (m.bias ? m.bias[o + j] : 0);
            };
        };
        for (int l = first, stop = 0; l < last; l++) {
            const Layer& layer = stack->layers[l];
            // 1. queries, keys, values
            normed(layer.attention_norm);
            for (int part = team.from(H + 2 * G); part < team.to(H + 2 * G); part++) {      // where its rows begin
                if (part % (group + 2) < group) continue;
                const Slots slots = slots_of(l, 0, part / (group + 2));
                if (part % (group + 2) == group)
                    for (size_t line = 0; line < key_block(d); line += 64) __builtin_prefetch(slots.key(start) + line, 1);
                else
                    for (size_t line = 0; line < slots.step(); line += 64) __builtin_prefetch(slots.value(start, 0) + line, 1);
            }
            multiply(team, layer.qkv, x, D, rows, [&](int r, int o, const float* sums) {
                int n = wide - o < BLOCK ? wide - o : BLOCK;
                float* to = qkv + size_t(r) * wide + o;
                for (int j = 0; j < n; j++) to[j] = sums[j] + (layer.qkv.bias ? layer.qkv.bias[o + j] : 0);
            });
            team.meet();
            // 2. norms of heads and rotary embedding; keys and values go into the cache
            for (int i = team.from(rows * (H + 2 * G)); i < team.to(rows * (H + 2 * G)); i++) {
                int r = i % rows, part = i / rows;                  // rows of a head lie in the same cache lines
                int g = part / (group + 2), head = part % (group + 2);  // queries of a group, its key, its value
                float* row = qkv + size_t(r) * wide + part * d;
                const float* cosine = stack->cosines + size_t(position[r]) * (d / 2);
                const float* sine = stack->sines + size_t(position[r]) * (d / 2);
                if (head < group) {                             // rows of a group follow each other: (G, rows, group, d)
                    rotate(row, layer.q_norm, stack->eps, cosine, sine, d);
                    Number* to = queries + ((size_t(g) * rows + r) * group + head) * d;
                    for (int j = 0; j < d; j++) round_to(to[j], row[j]);
                } else if (head == group) {
                    rotate(row, layer.k_norm, stack->eps, cosine, sine, d);
                    slots_of(l, r, g).put_key(slot(r), row);
                } else if (r == 0) {                            // values even in the same bytes: one thread for all
                    for (; r < rows; r++, row += wide) slots_of(l, r, g).put_value(slot(r), row);
                }
            }
            team.meet();
            // 3. attention, a span of positions for a few queries of a key-value head at a time
            for (int begin = 0, count; begin < tiles; begin += count) {
                count = tiles - begin < round ? tiles - begin : round;
                for (int i = team.from(count * spans); i < team.to(count * spans); i++) {
                    Tile tile = tile_of(l, begin + i / spans);
                    attend(tile, first_span + i % spans, stack->scale, scores, probs, sizes, room, tails + team.rank * tail,
                           found[i]);
                    for (int q = 0; spans == 1 && q < tile.n; q++)
                        combine(found + i, 1, q, d, stack->scale, scores, tile.to[q]);
                }
                team.meet();
                if (spans == 1) continue;
                for (int i = team.from(count * MAX_QUERIES); i < team.to(count * MAX_QUERIES); i++) {
                    Tile tile = tile_of(l, begin + i / MAX_QUERIES);
                    if (int q = i % MAX_QUERIES; q < tile.n)
                        combine(found + size_t(i / MAX_QUERIES) * spans, spans, q, d, stack->scale, scores, tile.to[q]);
                }
                team.meet();
            }
            multiply(team, layer.o, attended, size_t(H) * d, rows, add_to_h(layer.o));
            team.meet();
            // 4. MLP: a thread holds gate and up of the same outputs
            normed(layer.mlp_norm);
            gated(team, layer.gate_up, x, rows, I, act);
            team.meet();
            multiply(team, layer.down, act, I, rows, add_to_h(layer.down));
            team.meet();
            if (l + 1 != stops[stop]) continue;
            for (size_t i = size_t(team.from(rows)) * D; i < size_t(team.to(rows)) * D; i++) {  // the rows it norms next
                bf16 rounded = narrow(h[i]);
                out[size_t(stop) * rows * D + i] = rounded, h[i] = widen(rounded);
            }
            stop++;
        }
    }
}

// Of the rows that a tree wrote from slot `start` on, keeps those of a path, ascending, as a text has them: slot
// start + path[i] -> start + i, in all layers.
void ce_keep(const Cache* cache, int32_t layers, int32_t kv_heads, int32_t d, int32_t start, const int32_t* path,
             int32_t n) {
    for (int head = 0; head < layers * kv_heads; head++)
        for (int i = 0; i < n; i++)
            if (path[i] != i) Slots(*cache, head, d).copy(start + path[i], start + i);
}

// The adapter of an exit: rows h and said (rows, D) bf16 -> out (rows, D) bf16. said is null where it is not read.
void ce_exit(const Exit* exit, const bf16* h, const bf16* said, bf16* out, int32_t rows, int32_t threads) {
    static thread_local Scratch<float> f_sum;
    static thread_local Scratch<Number> n_x, n_act;
    const int D = exit->up.out, W = exit->up.in, in = exit->gate_down.in;
    Number *x = n_x.get(size_t(rows) * in), *act = n_act.get(size_t(rows) * W);
    float* sum = f_sum.get(size_t(rows) * D);
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < D; j++) sum[size_t(r) * D + j] = widen(h[size_t(r) * D + j]);
        for (int part = 0; part < (said ? 2 : 1); part++) {
            const bf16* from = (part ? said : h) + size_t(r) * D;
            const float* reach = exit->reach ? exit->reach + part * D : nullptr;
            Number* to = x + size_t(r) * in + part * D;
            for (int j = 0; j < D; j++) round_to(to[j], reach ? widen(from[j]) * reach[j] : widen(from[j]));
        }
    }
    std::vector<Desk> desks(threads);
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), desks.data()};
        if (exit->straight.weight)
            multiply(team, exit->straight, x, in, rows, [&](int r, int o, const float* sums) {
                for (int j = 0; j < BLOCK && o + j < D; j++) sum[size_t(r) * D + o + j] = sums[j];
            });
        team.meet();
        gated(team, exit->gate_down, x, rows, W, act);
        team.meet();
        multiply(team, exit->up, act, W, rows, [&](int r, int o, const float* sums) {
            for (int j = 0; j < BLOCK && o + j < D; j++) sum[size_t(r) * D + o + j] += sums[j];
        });
        team.meet();
        for (int r = team.from(rows); r < team.to(rows); r++)
            norm_row(sum + size_t(r) * D, exit->norm, D, exit->eps, out + size_t(r) * D);
    }
}

// RMSNorm of rows (rows, D) bf16 -> out (rows, D) bf16.
void ce_norm(const float* weight, float eps, const bf16* x, bf16* out, int32_t rows, int32_t D) {
    static thread_local Scratch<float> f_row;
    float* row = f_row.get(D);
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < D; j++) row[j] = widen(x[size_t(r) * D + j]);
        norm_row(row, weight, D, eps, out + size_t(r) * D);
    }
}

// The k likeliest outputs of a matrix for rows x, best first: their numbers, and their probabilities in the softmax at a
// temperature. Of equal ones the lower number comes first.
void ce_likeliest(const Matrix* m, const bf16* x, float temperature, int32_t k, int32_t* numbers, float* probs,
                  int32_t rows, int32_t threads) {
    static thread_local Scratch<float> f_logits;
    float* logits = f_logits.get(size_t(rows) * m->out);
    ce_linear(m, x, logits, rows, threads);
    for (int r = 0; r < rows; r++, numbers += k, probs += k) {
        const float* row = logits + size_t(r) * m->out;
        int found = 0;
        for (int from = 0; from < m->out; from += BLOCK) {
            int to = m->out - from < BLOCK ? m->out : from + BLOCK;
            if (found == k) {                                   // nearly all blocks have nothing to offer
                float bound = row[numbers[k - 1]];
                bool any = false;
                for (int j = from; j < to; j++) any |= row[j] > bound;
                if (!any) continue;
            }
            for (int j = from; j < to; j++) {
                if (found == k && !(row[j] > row[numbers[k - 1]])) continue;
                int at = found < k ? found++ : k - 1;
                for (; at > 0 && row[j] > row[numbers[at - 1]]; at--) numbers[at] = numbers[at - 1];
                numbers[at] = j;
            }
        }
        const float top = row[numbers[0]], scale = 1 / temperature;
        Floats masses = {};
        each_vector(row, m->out, [&](Floats logits) { masses += fast_exp((logits - top) * scale); });
        const float mass = sum_of(masses);
        for (int i = 0; i < k; i++) probs[i] = fast_exp((row[numbers[i]] - top) * scale) / mass;
    }
}

// The matrix times one row, which lies in parts of equal length, each input times its reach -> out.
void ce_gathered(const Matrix* m, const float* reach, const bf16* const* row, int32_t parts, float* out, int32_t threads) {
    static thread_local Scratch<bf16> b_x;
    bf16* x = b_x.get(m->in);
    const int each = m->in / parts;
    for (int i = 0; i < m->in; i++) x[i] = narrow(widen(row[i / each][i % each]) * reach[i]);
    ce_linear(m, x, out, 1, threads);
}

// What is drafted before the first layer after tokens (rows), rows of `embedding`, with what is carried to them, rows D each
// or null, and a context (D) that is added to it, or null: rows `hidden` (rows, D), and the k likeliest of the outputs of
// `words`, as from ce_likeliest.
void ce_draft(const Matrix* embedding, const Exit* exit, const Matrix* words, const int64_t* tokens, const bf16* const* said,
              const float* context, bf16* hidden, float temperature, int32_t k, int32_t* numbers, float* probs, int32_t rows,
              int32_t threads) {
    static thread_local Scratch<bf16> b_h, b_said;
    const int D = embedding->in;
    bf16 *h = b_h.get(size_t(rows) * D), *both = b_said.get(size_t(rows) * D);
    ce_rows(embedding, tokens, rows, h);
    for (int r = 0; said && r < rows; r++)
        for (int j = 0; j < D; j++)
            both[size_t(r) * D + j] = context ? narrow(widen(said[r][j]) + context[j]) : said[r][j];
    ce_exit(exit, h, said ? both : nullptr, hidden, rows, threads);
    ce_likeliest(words, hidden, temperature, k, numbers, probs, rows, threads);
}

// Facts of the softmax over a matrix' outputs, for rows x (rows, in) bf16: log p of the likeliest output, of the second, and
// the entropy in nats. With rows `before` (rows, in): these three of both; whether the likeliest is the same; what each thinks
// of the other's, log p but not below -15; and the cosine between x and before. Of `copied` (rows, 2), an output and a number:
// the number where the likeliest is that output, else 0; the same where it is not. 5 or 12 facts a row.
void ce_softmax_facts(const Matrix* m, const bf16* x, const float* copied, const bf16* before, float* facts, int32_t rows,
                      int32_t threads) {
    static thread_local Scratch<float> f_logits;
    static thread_local Scratch<bf16> b_x;
    const int in = m->in, V = m->out, all = before ? 2 * rows : rows;
    float* logits = f_logits.get(size_t(all) * V);
    bf16* both = b_x.get(size_t(all) * in);
    std::memcpy(both, x, 2 * size_t(rows) * in);
    if (before) std::memcpy(both + size_t(rows) * in, before, 2 * size_t(rows) * in);
    ce_linear(m, both, logits, all, threads);
    struct Seen {
        int best;
        float top, log_mass;                                    // log p of output j: logit - top - log_mass
    };
    auto look = [&](int r, float* to) {
        const float* row = logits + size_t(r) * V;
        float first = -INFINITY, second = -INFINITY;
        Floats firsts = broadcast(first), seconds = firsts, masses = {}, means = {};
        auto rank = [](auto v, auto& first, auto& second) {
            auto least = v < first ? v : first;
            second = least > second ? least : second;
            first = v > first ? v : first;
        };
        each_vector(row, V, [&](Floats v) { rank(v, firsts, seconds); });
        for (int l = 0; l < LANES; l++) rank(float(firsts[l]), first, second);
        for (int l = 0; l < LANES; l++) second = seconds[l] > second ? seconds[l] : second;
        each_vector(row, V, [&](Floats v) {
            Floats e = fast_exp(v - first);
            masses += e;
            means += e * (v - first);
        });
        const float mass = sum_of(masses), mean = sum_of(means);
        Seen seen{0, first, std::log(mass)};
        while (row[seen.best] != first && seen.best + 1 < V) seen.best++;
        to[0] = -seen.log_mass, to[1] = second - first - seen.log_mass, to[2] = seen.log_mass - mean / mass;
        return seen;
    };
    for (int r = 0; r < rows; r++) {
        float *to = facts + size_t(r) * (before ? 12 : 5), *copy = to + (before ? 10 : 3);
        Seen now = look(r, to);
        const bool same = copied[2 * r] == now.best;
        copy[0] = same ? copied[2 * r + 1] : 0, copy[1] = same ? 0 : copied[2 * r + 1];
        if (!before) continue;
        Seen then = look(rows + r, to + 3);
        auto log_p = [&](int row, const Seen& seen, int j) {
            return std::fmax(-15.0f, logits[size_t(row) * V + j] - seen.top - seen.log_mass);
        };
        float dot = 0, xx = 0, yy = 0;
        for (int j = 0; j < in; j++) {
            float a = widen(x[size_t(r) * in + j]), b = widen(before[size_t(r) * in + j]);
            dot += a * b, xx += a * a, yy += b * b;
        }
        to[6] = now.best == then.best;
        to[7] = log_p(rows + r, then, now.best);
        to[8] = log_p(r, now, then.best);
        to[9] = dot / std::fmax(1e-8f, std::sqrt(xx) * std::sqrt(yy));
    }
}

// What an estimator makes of these facts: chances (rows) that the exit is right.
void ce_confidence(const Matrix* m, const Estimator* estimator, const bf16* x, const float* copied, const bf16* before,
                   float* chances, int32_t rows, int32_t threads) {
    static thread_local Scratch<float> f_facts;
    const int in = estimator->in;
    float* facts = f_facts.get(size_t(rows) * in);
    ce_softmax_facts(m, x, copied, before, facts, rows, threads);
    for (int r = 0; r < rows; r++) {
        float logit = estimator->outer_bias;
        for (int w = 0; w < estimator->width; w++) {
            float sum = estimator->inner_bias[w];
            for (int j = 0; j < in; j++) sum += estimator->inner[w * in + j] * facts[r * in + j];
            logit += estimator->outer[w] * silu(sum);
        }
        chances[r] = 1 / (1 + fast_exp(-logit));
    }
}

}
