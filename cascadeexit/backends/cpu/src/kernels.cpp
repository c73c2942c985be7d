// CascadeExit's CPU kernels: decoder layers, exits and vocabulary heads, at nearly the memory bandwidth.
//
// This is the only translation unit: the headers are included here, so that everything can be inlined. It exports the C
// functions that Python calls through ctypes.
//
// Weights are bf16, the same in 12 bits without loss, or 8-bit integers; keys and values are in 12 bits with a shared
// exponent. Sums are fp32 and run over inputs in order (with 8-bit weights: exact sums of integers, of inputs rounded
// to 16 bits), each row by itself. So a row's result is bitwise the same whatever other rows are in the pass; that is
// what makes verification exact.
//
//   processor.h, numbers.h, simd.h         what the processor offers, bf16, vectors
//   scratch.h, team.h                      memory and threads of a call
//   structs.h, packing.h                   what Python passes, layouts of weights
//   dot_bf16.h or dot_fp32.h, dot_int8.h   dot products of a block of weights with a tile of rows
//   matrix.h                               matrix products by a team of threads
//   kv_cache.h, kv_dot.h, attention.h      the KV cache and attention over it
//   norm.h, layers.h                       decoder layers
//   argmax.h, softmax.h, exits.h           vocabulary heads and exits

#include "argmax.h"
#include "exits.h"
#include "layers.h"

extern "C" {

// -- shapes and costs -------------------------------------------------------------------------------------------------

// Outputs of a weight block, and positions of a block of the KV cache.
int32_t ce_block() { return BLOCK; }

// Bytes of one position in a head's cache: its key and both exponents; its value. The capacity of a cache is a multiple
// of ce_block.
int32_t ce_key_bytes(int32_t d) { return int32_t(key_block_bytes(d) / KEYS); }
int32_t ce_value_bytes(int32_t d) { return int32_t(value_block_bytes(d) / KEYS); }

// Cost of adding a row to a pass of `rows` rows, as a multiple of the time of a pass of one row; measured.
float ce_row_cost(int32_t rows) {
    if (HAS_BF16_DOT) return rows < MAX_TILE ? 0.05f : 0.1f;
    // Beside 1, 2, ... 8 and more rows.
    constexpr float costs_12_bits[] = {0.04f, 0.05f, 0.06f, 0.22f, 0.1f, 0.3f, 0.1f, 0.25f};
    constexpr float costs_16_bits[] = {0.05f, 0.05f, 0.05f, 0.08f, 0.1f, 0.15f, 0.15f, 0.25f};
    return (READS_12_BITS ? costs_12_bits : costs_16_bits)[std::min(rows, MAX_TILE) - 1];
}

// -- packing ----------------------------------------------------------------------------------------------------------

// Bytes that ce_pack writes for a weight of this shape.
int64_t ce_packed_bytes(int32_t out, int32_t in) { return packed_bytes_16(out, in); }

// Pack a row-major weight (out, in) bf16 into blocks first, first + step, ... With step 2, the blocks of two weights
// alternate.
void ce_pack(const bf16* weight, int32_t out, int32_t in, uint32_t* packed, int32_t first, int32_t step) {
    pack_16(weight, out, in, packed, first, step);
}

// Bytes that ce_code writes for a weight of this shape; 0 where this processor or shape does not use 12 bits.
int64_t ce_coded_bytes(int32_t out, int32_t in) {
    return READS_12_BITS && in % 4 == 0 ? int64_t((out + BLOCK - 1) / BLOCK) * block_bytes_12(in / 2) : 0;
}

// Pack a row-major weight (out, in) bf16 into 12 bits: blocks first, first + step, ... of memory that holds zeros.
// `outliers` has room for so many and holds `count` of this matrix already. Returns the new count; -1 where there are
// more than the room.
int32_t ce_code(const bf16* weight, int32_t out, int32_t in, uint8_t* packed, Outlier* outliers, int32_t room,
                int32_t count, int32_t first, int32_t step) {
    return pack_12(weight, out, in, packed, outliers, room, count, first, step);
}

// Unpack outputs ids[0..n-1] of a 16-bit weight -> out (n, in) bf16.
void ce_rows(const Matrix* m, const int64_t* ids, int32_t n, bf16* out) { unpack_rows_16(*m, ids, n, out); }

// -- products, layers -------------------------------------------------------------------------------------------------

// x (rows, in) bf16 -> out (rows, out) fp32. `in` must be even.
void ce_linear(const Matrix* m, const bf16* x, float* out, int32_t rows, int32_t threads) {
    linear(*m, x, out, rows, threads);
}

// x (rows, in) bf16 -> for each row the number of its largest output, the first of equal ones. `in` must be even. The
// screen may be null; it makes the call faster for a 16-bit weight without bias.
void ce_argmax(const Matrix* m, const Screen* screen, const bf16* x, int32_t* numbers, int32_t rows, int32_t threads) {
    argmax(*m, screen, x, numbers, rows, threads);
}

// Rows in (rows, D) bf16 through layers first..last-1; their keys and values go into the cache. The rows before each
// of the layers `stops`, ascending up to `last`, go to out (stops, rows, D) bf16. D, H * d and the inner size must be
// even, d a multiple of 16. `parents` and `begins`, which may be null, describe how the rows are related (RowPlaces in
// layers.h).
void ce_layers(const Stack* stack, int32_t first, int32_t last, const int32_t* stops, const bf16* in, bf16* out,
               int32_t rows, const Cache* cache, int32_t start, const int32_t* parents, const int32_t* begins,
               int32_t threads) {
    run_layers(*stack, first, last, stops, in, out, *cache, RowPlaces(rows, start, parents, begins), threads);
}

// After a tree whose first row is in slot `start`, keep the rows of one path, ascending: move slot start + path[i] to
// slot start + i in all layers.
void ce_keep(const Cache* cache, int32_t layers, int32_t kv_heads, int32_t d, int32_t start, const int32_t* path,
             int32_t n) {
    keep_path(*cache, layers, kv_heads, d, start, path, n);
}

// RMSNorm of x (rows, D) bf16 -> out (rows, D) bf16.
void ce_norm(const float* weight, float eps, const bf16* x, bf16* out, int32_t rows, int32_t D) {
    float* row = scratch<float, struct NormRow>(D);
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < D; j++) row[j] = widen(x[size_t(r) * D + j]);
        norm_row(row, weight, D, eps, out + size_t(r) * D);
    }
}

// -- vocabulary heads and exits ---------------------------------------------------------------------------------------

// The k likeliest outputs for rows x, best first: their numbers and probabilities (rows, k) in the softmax at a
// temperature. Of equal ones, the lower number comes first.
void ce_likeliest(const Matrix* m, const bf16* x, float temperature, int32_t k, int32_t* numbers, float* probs,
                  int32_t rows, int32_t threads) {
    likeliest(*m, x, temperature, k, numbers, probs, rows, threads);
}

// Adapter of an exit: h and carried (rows, D) bf16 -> out (rows, D) bf16. `carried` is null where it is not read.
void ce_exit(const Adapter* exit, const bf16* h, const bf16* carried, bf16* out, int32_t rows, int32_t threads) {
    adapt(*exit, h, carried, out, rows, threads);
}

// A matrix times one row of `parts` parts of equal length, each input times its column scale -> out.
void ce_gathered(const Matrix* m, const float* column_scale, const bf16* const* row, int32_t parts, float* out,
                 int32_t threads) {
    linear_of_parts(*m, column_scale, row, parts, out, threads);
}

// Drafts after `tokens`: rows `hidden` (rows, D), and the k likeliest of the outputs of `words` as from ce_likeliest.
// carried: pointers to (D), or null; context (D), added to each of them, or null.
void ce_draft(const Matrix* embedding, const Adapter* exit, const Matrix* words, const int64_t* tokens,
              const bf16* const* carried, const float* context, bf16* hidden, float temperature, int32_t k,
              int32_t* numbers, float* probs, int32_t rows, int32_t threads) {
    draft(*embedding, *exit, *words, tokens, carried, context, hidden, temperature, k, numbers, probs, rows, threads);
}

// Facts of the softmax over a matrix's outputs -> (rows, 5), or (rows, 12) with `before`; softmax.h lists them.
void ce_softmax_facts(const Matrix* m, const bf16* x, const float* copied, const bf16* before, float* facts,
                      int32_t rows, int32_t threads) {
    softmax_facts(*m, x, copied, before, facts, rows, threads);
}

// Confidence of an exit (rows): an estimator's probability that its choice is right, from these inputs.
void ce_confidence(const Matrix* m, const Estimator* estimator, const bf16* x, const float* copied, const bf16* before,
                   float* chances, int32_t rows, int32_t threads) {
    confidence(*m, *estimator, x, copied, before, chances, rows, threads);
}

}
