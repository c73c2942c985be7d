// Decoder layers: one call takes rows through many layers with one team of threads and without allocation.
//
// Letters: D hidden size, H query heads on G key-value heads of size d, I inner size of the MLP.
#pragma once

#include "attention.h"
#include "norm.h"

namespace {

// Where the rows of a pass are in the cache. There are three cases:
//   one text    positions start..start+rows-1 of a text;
//   a tree      `parents`: after `start` positions of a text, row r continues row parents[r] < r, and row 0
//               (parents[0] = -1) continues the text. Row r is in slot start + r of the cache;
//   a batch     `begins`: row r is position `start` of text r, which sees its own positions from begins[r] on.
struct RowPlaces {
    int rows, start;
    const int32_t *parents, *begins;        // null where they do not apply
    int *positions, *paths;                 // (rows); in a tree, (rows, rows): the slots of r's positions from start on

    RowPlaces(int rows, int start, const int32_t* parents, const int32_t* begins)
        : rows(rows), start(start), parents(parents), begins(begins) {
        positions = scratch<int, struct Positions>(rows);
        paths = scratch<int, struct Paths>(parents ? rows * rows : 0);
        for (int r = 0; r < rows; r++)
            positions[r] = begins ? start : !parents ? start + r : r ? positions[parents[r]] + 1 : start;
        for (int r = 0; parents && r < rows; r++)
            for (int at = r, t = positions[r] - start; t >= 0; at = parents[at], t--) paths[r * rows + t] = start + at;
    }

    int texts() const { return begins ? rows : 1; }
    int text(int r) const { return begins ? r : 0; }
    int first_visible(int text) const { return begins ? begins[text] : 0; }
    int slot(int r) const { return begins ? start : start + r; }
    int slots() const { return start + (begins ? 1 : rows); }
    const int* path(int r) const { return parents ? paths + r * rows : nullptr; }
};

// How the attention of a pass is cut into work: tiles of queries of one text and head, times spans of positions. A
// round is as many tiles as are worked on between two barriers.
struct AttentionPlan {
    int rows_per_text, queries_per_text;    // queries: of one key-value head
    int tiles_per_text, tiles;
    int first_span, spans, tiles_per_round;

    AttentionPlan(const RowPlaces& places, int group, int kv_heads, int threads) {
        rows_per_text = places.rows / places.texts();
        queries_per_text = rows_per_text * group;
        tiles_per_text = (queries_per_text + MAX_QUERIES - 1) / MAX_QUERIES;
        tiles = kv_heads * places.texts() * tiles_per_text;
        int first = places.first_visible(0);
        for (int text = 1; text < places.texts(); text++) first = std::min(first, places.first_visible(text));
        first_span = first / SPAN;
        spans = (places.slots() + SPAN - 1) / SPAN - first_span;
        tiles_per_round = std::min(tiles, (SPANS_PER_THREAD * threads + spans - 1) / spans);
    }
};

// Results of a round's spans (tiles, spans), and the scratch memory of each thread.
struct AttentionBuffers {
    int stride;                             // of scores: a span and the rows of a tree, whole blocks
    size_t path_bytes;                      // of a path's values, and of up to 3 positions before
    SpanResult* results;
    float *scores, *value_powers;
    Number* probs;
    uint8_t* path_values;

    AttentionBuffers(const RowPlaces& places, const AttentionPlan& plan, int d, int threads) {
        const size_t count = size_t(plan.tiles_per_round) * plan.spans, sums = size_t(MAX_QUERIES) * padded(d);
        stride = SPAN + (places.rows + 2 * KEYS) / KEYS * KEYS;
        path_bytes = places.parents ? (places.rows / KEYS + 2) * value_block_bytes(d) : 0;
        results = scratch<SpanResult, struct Results>(count);
        float* all_sums = scratch<float, struct ResultSums>(count * sums);
        for (size_t i = 0; i < count; i++) results[i].sums = all_sums + i * sums;
        scores = scratch<float, struct Scores>(size_t(threads) * MAX_QUERIES * stride);
        value_powers = scratch<float, struct ValuePowers>(size_t(threads) * stride);
        probs = scratch<Number, struct Probs>(size_t(threads) * MAX_QUERIES * stride);
        path_values = scratch<uint8_t, struct PathValues>(threads * path_bytes);
    }

    SpanScratch of_thread(int rank) const {
        const size_t queries = size_t(rank) * MAX_QUERIES * stride;
        return {scores + queries, probs + queries, value_powers + size_t(rank) * stride, stride,
                path_values + rank * path_bytes};
    }
};

// One pass of rows through layers: its shapes, its buffers and its phases, which all threads of a team go through.
struct LayerPass {
    const Stack& stack;
    const Cache& cache;
    const RowPlaces places;
    const int rows, D, H, G, d, I, group, qkv_width;
    const AttentionPlan plan;
    const AttentionBuffers buffers;
    float *h, *qkv;                         // (rows, D), the residual stream; (rows, qkv_width)
    Number *x, *act;                        // (rows, D), (rows, I): what products read
    Number *queries, *attended;             // (G, rows, group, d); (rows, H, d)

    LayerPass(const Stack& stack, const Cache& cache, const RowPlaces& places, int threads)
        : stack(stack), cache(cache), places(places), rows(places.rows), D(stack.hidden), H(stack.heads),
          G(stack.kv_heads), d(stack.head_dim), I(stack.inner), group(H / G), qkv_width((H + 2 * G) * d),
          plan(places, group, G, threads), buffers(places, plan, d, threads) {
        h = scratch<float, struct Residual>(size_t(rows) * D);
        qkv = scratch<float, struct Qkv>(size_t(rows) * qkv_width);
        x = scratch<Number, struct Normed>(size_t(rows) * D);
        act = scratch<Number, struct Activations>(size_t(rows) * I);
        queries = scratch<Number, struct Queries>(size_t(rows) * H * d);
        attended = scratch<Number, struct Attended>(size_t(rows) * H * d);
    }

    void run_layer(Team& team, int l) const {
        const Layer& layer = stack.layers[l];
        norm(team, layer.attention_norm);
        prefetch_slots(team, l);
        project_qkv(team, layer.qkv);
        team.barrier();
        rotate_and_store(team, l);
        team.barrier();
        attend(team, l);
        add_product(team, layer.o, attended);
        team.barrier();
        norm(team, layer.mlp_norm);
        multiply_gated(team, layer.gate_up, x, rows, I, act);
        team.barrier();
        add_product(team, layer.down, act);
        team.barrier();
    }

    // Round this thread's rows to bf16, in place and as output -> out (rows, D). The same thread norms them next.
    void round_rows(Team& team, bf16* out) const {
        for (size_t i = size_t(team.begin(rows)) * D; i < size_t(team.end(rows)) * D; i++) {
            bf16 rounded = narrow(h[i]);
            out[i] = rounded, h[i] = widen(rounded);
        }
    }

private:
    HeadCache head_cache(int l, int text, int g) const {
        return HeadCache(cache, (size_t(l) * places.texts() + text) * G + g, d);
    }

    void norm(Team& team, const float* weight) const {
        for (int r = team.begin(rows); r < team.end(rows); r++)
            norm_row(h + size_t(r) * D, weight, D, stack.eps, x + size_t(r) * D);
        team.barrier();
    }

    // Prefetch where the first row's keys and values will be written.
    void prefetch_slots(Team& team, int l) const {
        for (int part = team.begin(H + 2 * G); part < team.end(H + 2 * G); part++) {
            const int g = part / (group + 2), head = part % (group + 2);
            if (head < group) continue;
            const HeadCache slots = head_cache(l, 0, g);
            if (head == group)
                for (size_t line = 0; line < key_block_bytes(d); line += 64)
                    __builtin_prefetch(slots.key_block(places.start) + line, 1);
            else
                for (size_t line = 0; line < slots.value_step(); line += 64)
                    __builtin_prefetch(slots.value_unit(places.start, 0) + line, 1);
        }
    }

    void project_qkv(Team& team, const Matrix& m) const {
        multiply(team, m, x, D, rows, [&](int r, int first, const float* sums) {
            const int n = std::min(qkv_width - first, BLOCK);
            float* to = qkv + size_t(r) * qkv_width + first;
            for (int j = 0; j < n; j++) to[j] = sums[j] + bias_of(m, first + j);
        });
    }

    // Norms of heads and rotary embedding; queries get their own buffer, keys and values go into the cache.
    void rotate_and_store(Team& team, int l) const {
        const Layer& layer = stack.layers[l];
        for (int i = team.begin(rows * (H + 2 * G)); i < team.end(rows * (H + 2 * G)); i++) {
            int r = i % rows, part = i / rows;                      // rows of a head share cache lines of the cache
            const int g = part / (group + 2), head = part % (group + 2);    // a group's queries, its key, its value
            float* row = qkv + size_t(r) * qkv_width + part * d;
            const float* cosine = stack.cosines + size_t(places.positions[r]) * (d / 2);
            const float* sine = stack.sines + size_t(places.positions[r]) * (d / 2);
            if (head < group) {
                rotate(row, layer.q_norm, stack.eps, cosine, sine, d);
                Number* to = queries + ((size_t(g) * rows + r) * group + head) * d;
                for (int j = 0; j < d; j++) round_to(to[j], row[j]);
            } else if (head == group) {
                rotate(row, layer.k_norm, stack.eps, cosine, sine, d);
                head_cache(l, places.text(r), g).write_key(places.slot(r), row);
            } else if (r == 0) {                                    // values share even bytes: one thread writes all
                for (; r < rows; r++, row += qkv_width)
                    head_cache(l, places.text(r), g).write_value(places.slot(r), row);
            }
        }
    }

    QueryTile query_tile(int l, int number) const {
        const int g = number / (places.texts() * plan.tiles_per_text);
        const int text = number / plan.tiles_per_text % places.texts();
        const int from = number % plan.tiles_per_text * MAX_QUERIES;
        QueryTile tile;
        tile.cache = head_cache(l, text, g);
        tile.first = places.first_visible(text), tile.fork = places.start, tile.end = places.start + rows;
        tile.queries = queries + (size_t(g) * rows * group + text * plan.queries_per_text + from) * d;
        tile.n = std::min(plan.queries_per_text - from, MAX_QUERIES);
        tile.longest = 0;
        for (int q = 0; q < tile.n; q++) {
            const int r = text * plan.rows_per_text + (from + q) / group, head = g * group + (from + q) % group;
            tile.visible[q] = places.positions[r] + 1;
            tile.paths[q] = places.path(r);
            tile.out[q] = attended + (size_t(r) * H + head) * d;
            tile.longest = std::max(tile.longest, tile.visible[q]);
        }
        return tile;
    }

    // Attention -> attended. Threads share tiles and spans; a barrier comes before several spans are combined.
    void attend(Team& team, int l) const {
        const SpanScratch scratch = buffers.of_thread(team.rank);
        const int spans = plan.spans;
        SpanResult* results = buffers.results;
        for (int begin = 0, count; begin < plan.tiles; begin += count) {
            count = std::min(plan.tiles - begin, plan.tiles_per_round);
            for (int i = team.begin(count * spans); i < team.end(count * spans); i++) {
                const QueryTile tile = query_tile(l, begin + i / spans);
                attend_span(tile, plan.first_span + i % spans, stack.scale, scratch, results[i]);
                for (int q = 0; spans == 1 && q < tile.n; q++)
                    combine_spans(results + i, 1, q, d, stack.scale, scratch.scores, tile.out[q]);
            }
            team.barrier();
            if (spans == 1) continue;
            for (int i = team.begin(count * MAX_QUERIES); i < team.end(count * MAX_QUERIES); i++) {
                const QueryTile tile = query_tile(l, begin + i / MAX_QUERIES);
                if (int q = i % MAX_QUERIES; q < tile.n)
                    combine_spans(results + size_t(i / MAX_QUERIES) * spans, spans, q, d, stack.scale, scratch.scores,
                                  tile.out[q]);
            }
            team.barrier();
        }
    }

    // h += m from, from (rows, in).
    void add_product(Team& team, const Matrix& m, const Number* from) const {
        multiply(team, m, from, m.in, rows, [&](int r, int first, const float* sums) {
            const int n = width_of(m, first);
            float* to = h + size_t(r) * D + first;
            for (int j = 0; j < n; j++) to[j] += sums[j] + bias_of(m, first + j);
        });
    }
};

// Rows in (rows, D) bf16 through layers first..last-1. The rows before each of the layers `stops`, ascending up to
// `last`, go to out (stops, rows, D), rounded to bf16, and the layer reads them as rounded.
void run_layers(const Stack& stack, int first, int last, const int32_t* stops, const bf16* in, bf16* out,
                const Cache& cache, const RowPlaces& places, int threads) {
    const LayerPass pass(stack, cache, places, threads);
    const size_t numbers = size_t(pass.rows) * pass.D;
    for (size_t i = 0; i < numbers; i++) pass.h[i] = widen(in[i]);
    run_team(threads, [&](Team& team) {
        for (int l = first, stop = 0; l < last; l++) {
            pass.run_layer(team, l);
            if (l + 1 == stops[stop]) pass.round_rows(team, out + stop++ * numbers);
        }
    });
}

// After a tree whose first row is in slot `start`, keep the rows of one path, ascending: move slot start + path[i] to
// slot start + i in all layers.
void keep_path(const Cache& cache, int layers, int kv_heads, int d, int start, const int32_t* path, int n) {
    for (int head = 0; head < layers * kv_heads; head++)
        for (int i = 0; i < n; i++)
            if (path[i] != i) HeadCache(cache, head, d).copy(start + path[i], start + i);
}

}  // namespace
