// Attention of rows with heads of any width, without tensor cores. What it computes is in
// attention.cuh.
//
// Source: Milakov and Gimelshein (2018) for the softmax in one pass.
//
// attention_any_{bf16,f16,e4m3,q8}: heads of any dim up to 256.
//   grid (rows of the largest tile, n_heads, tiles), block 32, no dynamic shared memory.
#include "attention.cuh"

namespace {

const int ANY_EACH = 8; // numbers of a head in each lane: widths up to 256

template <typename S>
__device__ __forceinline__ float dot(const float (&q)[ANY_EACH], const S *k, int dim) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < ANY_EACH; i++) {
        int at = i * 32 + threadIdx.x;
        if (at < dim) sum = fmaf(q[i], to_f32(k[at]), sum);
    }
    return sum;
}

// One warp has a row of one head: 32 keys at a time, a key's slot, score and weight in one lane.
template <typename S>
__device__ __forceinline__ void any_width(bf16 *out, const bf16 *q, const Layer<S> &layer,
                                          const Tile &t, const int *tables,
                                          const float *sinks, int n_heads, int kv_heads,
                                          int block_len, const Curve &curve, int dim) {
    int lane = threadIdx.x, row = blockIdx.x, head = blockIdx.y;
    if (row >= t.rows) return;
    long long place = (static_cast<long long>(t.row + row) * n_heads + head) * dim;
    int kv_head = head / (n_heads / kv_heads), offset = kv_head * dim;
    int position = t.position + row;
    int first = max(0, position - t.before + 1), end = min(t.end, position + t.after);
    float query[ANY_EACH], total[ANY_EACH], largest = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < ANY_EACH; i++) {
        int at = i * 32 + lane;
        query[i] = at < dim ? to_f32(q[place + at]) : 0, total[i] = 0;
    }
    for (int base = first; base < end; base += 32) {
        int count = min(32, end - base);
        int slot = lane < count ? slot_of(tables, t.table, block_len, base + lane) : 0;
        float score = -INFINITY;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            long long at = store_row(__shfl_sync(ALL, slot, i), kv_heads * dim);
            float x = warp_sum(dot(query, layer.k + at + offset, dim));
            score = lane == i ? x : score;
        }
        long long scale_place = scale_at(slot, kv_heads, kv_head);
        if (has_scales<S> && lane < count) score *= layer.k_scales[scale_place];
        if (lane < count) score = (curve.bends() ? curve.bent(score) : score) * curve.outer;
        float before = largest;
        largest = fmaxf(largest, warp_max(score));
        float factor = exp2_fast(before - largest), weight = exp2_fast(score - largest);
        sum = sum * factor + weight;
        if (has_scales<S> && lane < count) weight *= layer.v_scales[scale_place];
#pragma unroll
        for (int i = 0; i < ANY_EACH; i++) total[i] *= factor;
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            long long at = store_row(__shfl_sync(ALL, slot, i), kv_heads * dim);
            float w = __shfl_sync(ALL, weight, i);
#pragma unroll
            for (int j = 0; j < ANY_EACH; j++) {
                int d = j * 32 + lane;
                if (d < dim) total[j] = fmaf(w, to_f32(layer.v[at + offset + d]), total[j]);
            }
        }
    }
    sum = warp_sum(sum) + exp2_fast(load_sink(sinks, head) - largest);
#pragma unroll
    for (int i = 0; i < ANY_EACH; i++) {
        int at = i * 32 + lane;
        if (at < dim) out[place + at] = from_f32<bf16>(sum > 0 ? total[i] / sum : 0);
    }
}

} // namespace

#define ANY(NAME, S)                                                                               \
    extern "C" __global__ void __launch_bounds__(32) attention_any_##NAME(                         \
        bf16 *out, const bf16 *q, const S *k, const S *v, const float *k_scales,                   \
        const float *v_scales, const int *tile_row, const int *tile_rows,                          \
        const int *tile_position, const int *tile_table, const int *tile_keys, const int *tables,  \
        const float *sinks, int n_heads, int kv_heads, int block_len, float scale, float softcap,  \
        int window, int causal, int dim) {                                                         \
        grid_begin();                                                                              \
        Tile tile = load_tile(tile_row, tile_rows, tile_position, tile_table, tile_keys,           \
                              blockIdx.z, window, causal);                                         \
        any_width(out, q, Layer<S>{k, v, k_scales, v_scales}, tile, tables, sinks, n_heads,        \
                  kv_heads, block_len, Curve(scale, softcap), dim);                                \
    }
ANY(bf16, bf16)
ANY(f16, __half)
ANY(e4m3, e4m3)
ANY(q8, q8)
