// Attention of a ragged batch over paged keys and values: what single new rows
// (attention_decode.cu) and runs of new rows (attention_prefill.cu, attention_any.cu) have in
// common.
//
// q and out are bf16 [rows][n_heads][dim]. The keys and the values of a layer are two buffers
// [slot][kv_heads][dim] of bf16, f16, e4m3 or q8 (bytes.cuh), slot = block * block_len + offset;
// k_scales and v_scales, [slot / 16][kv_heads][16] in f32, are those of q8 and are not read
// otherwise. `tables` holds the block tables one after the other. Query head h reads KV head
// h / (n_heads / kv_heads). A row at position p sees the keys j <= p, with a window those of
// p - window < j <= p (0: no window). Keys and values of the new rows are in the store already. A
// slot that no row of a tile or item sees is never read. scale > 0. With softcap > 0 a score is
// softcap * tanh(scale * q k / softcap), else scale * q k.
//
// `sinks`, [n_heads] in f32 or null, are one more score for each head, neither scaled nor bounded,
// that takes part in the softmax and brings no value (Xiao et al., "Efficient Streaming Language
// Models with Attention Sinks", 2023; learned in gpt-oss). It joins the sum of a row once, where
// that is complete, and no maximum: weights of keys are rounded as they are without it.
//
// Weights are powers of two: log2(e) is folded into the scores. Scores, maxima, sums and
// accumulators are f32; tensor cores multiply q (in the type of the keys) by the keys and the
// weights (rounded to that type) by the values. Bytes are widened without loss to the type that
// they meet (Meets<S>); a scale of q8 multiplies the score, or the weight before it is rounded.
// Keys are reduced in chunks and tiles that begin at multiples of their length from position 0, so
// a row's result does not depend on its neighbours, nor on how a prompt was cut.
#pragma once

#include "bytes.cuh"

namespace {

const unsigned ALL = 0xffffffffu;
const float LOG2_E = 1.4426950408889634f;

// Keys and values of a layer. `k` and `v` begin at some head.
template <typename S> struct Layer {
    const S *k, *v;
    const float *k_scales, *v_scales;
};

// How the product of a query and a key becomes the exponent of its weight: `outer` times itself, or
// times the hyperbolic tangent of `inner` times itself.
struct Curve {
    float inner, outer;

    __device__ __forceinline__ Curve(float scale, float softcap)
        : inner(softcap > 0 ? scale / softcap : 0),
          outer((softcap > 0 ? softcap : scale) * LOG2_E) {}

    __device__ __forceinline__ bool bends() const { return inner > 0; }
    // To 5e-7 of 1, and 1 or -1 far away.
    __device__ __forceinline__ float bent(float product) const {
        return 1 - __fdividef(2, exp2_fast(product * (inner * 2 * LOG2_E)) + 1);
    }
};

// The sink of a head in the log2 domain, minus infinity where there are none. To the sum of the
// weights of a row, which are relative to 2^largest, it adds 2^(sink - largest): infinity where
// they are nothing beside it.
__device__ __forceinline__ float load_sink(const float *sinks, int head) {
    return sinks != nullptr ? sinks[head] * LOG2_E : -INFINITY;
}

// Two bf16 in one register, as two numbers of the type of the keys.
__device__ __forceinline__ uint32_t query_pair(uint32_t pair, bf16) { return pair; }
__device__ __forceinline__ uint32_t query_pair(uint32_t pair, __half) {
    return pack2<__half>(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Eight numbers of a query.
template <typename KV> __device__ __forceinline__ uint4 load_query(const bf16 *q) {
    uint4 x = *reinterpret_cast<const uint4 *>(q);
    return make_uint4(query_pair(x.x, KV()), query_pair(x.y, KV()), query_pair(x.z, KV()),
                      query_pair(x.w, KV()));
}

__device__ __forceinline__ int slot_of(const int *tables, int table, int block_len, int key) {
    if (tables == nullptr) return table + key;
    int block = key / block_len;
    return tables[table + block] * block_len + (key - block * block_len);
}

// Where the KV head 0 of a slot is in the store, `width` = kv_heads * dim.
__device__ __forceinline__ long long store_row(int slot, int width) {
    return static_cast<long long>(slot) * width;
}

// Where 16 bytes of a row are in shared memory. Rows have D numbers; the low bits of the row are
// mixed into the place, so that eight rows of one column lie in different banks.
template <int D> __device__ __forceinline__ int swizzled(int row, int column16) {
    return row * D + (column16 ^ (row & 7)) * 8;
}
// The same of rows as they are stored. Of bytes, eight even rows (or odd ones) of one column lie in
// different banks, or four of them where a row is short.
template <typename S, int D> __device__ __forceinline__ int stored_at(int row, int column16) {
    if (sizeof(S) == 2) return swizzled<D>(row, column16);
    return row * D + (column16 ^ (D >= 128 ? row & 7 : row / 2 & 3)) * 16;
}

const int FAR = 1 << 30; // further than any key

// A tile is 1..128 consecutive rows of one sequence, and the keys that any of them sees.
// causal = 0: every row sees all tile_keys keys and `window` is not read. tables = null: the slot
// of key j is tile_table + j.
struct Tile {
    int row, rows, position, table; // first row in q, how many, position of the first
    int first, end;                 // keys
    int before, after;              // a row at p sees the keys p - before < j < p + after of these
};

__device__ __forceinline__ Tile load_tile(const int *tile_row, const int *tile_rows,
                                          const int *tile_position, const int *tile_table,
                                          const int *tile_keys, int tile, int window, int causal) {
    Tile t;
    t.row = tile_row[tile], t.rows = tile_rows[tile];
    t.position = tile_position[tile], t.table = tile_table[tile];
    t.before = causal && window > 0 ? window : FAR, t.after = causal ? 1 : FAR;
    t.first = max(0, t.position - t.before + 1);
    t.end = min(tile_keys[tile], t.position + t.rows - 1 + t.after);
    return t;
}

} // namespace
