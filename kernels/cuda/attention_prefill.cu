// Attention of runs of new rows: prompts, and the texts of encoders. What it computes is in
// attention.cuh.
//
// Sources: Dao, FlashAttention-2 (2023), for the tiles; Milakov and Gimelshein (2018) for the
// softmax in one pass.
//
// attention_prefill_{bf16,f16,e4m3,q8}_d{64,128,256}: Shape<D>::ROWS rows of one head against
//   Shape<D>::KEYS keys at once.
//   grid (n_heads, tiles, 128 / Shape<D>::ROWS), block 128, shared 768 * dim bytes, of 256 numbers
//   384 * dim; of keys in bytes 512 more.
#include "attention.cuh"

namespace {

const int PREFILL_THREADS = 128, WARPS = PREFILL_THREADS / 32;

// What a block and its warps have at once of heads of D numbers: what registers and 96 KiB hold.
template <int D> struct Shape {
    static constexpr int WARP_ROWS = D > 128 ? 16 : 32, ROWS = WARPS * WARP_ROWS;
    static constexpr int KEYS = D > 128 ? 32 : 64;
    static constexpr int WARP_KEYS = KEYS / WARPS;          // a warp copies so many
    static constexpr int M = WARP_ROWS / 16, N = KEYS / 8; // fragments of a product
};
// Scores or weights of the rows of a warp.
template <int D> using Scores = float[Shape<D>::M][Shape<D>::N][4];

// The part of a tile that a block has.
template <int D> __device__ __forceinline__ Tile part_of(Tile t) {
    int skipped = blockIdx.z * Shape<D>::ROWS;
    t.row += skipped, t.position += skipped;
    t.rows = min(t.rows - skipped, Shape<D>::ROWS);
    t.first = max(0, t.position - t.before + 1);
    t.end = min(t.end, t.position + t.rows - 1 + t.after);
    return t;
}

// The slots of the keys that this warp copies, in the first lanes of a half, then again; -1:
// nothing to copy.
template <int D>
__device__ __forceinline__ int slot_to_copy(const Tile &t, const int *tables, int block_len,
                                            int first_key) {
    const int EACH = Shape<D>::WARP_KEYS;
    int key = first_key + threadIdx.x / 32 * EACH + threadIdx.x % EACH;
    return key >= t.first && key < t.end ? slot_of(tables, t.table, block_len, key) : -1;
}

// Which 16 bytes of a tile a thread copies in its turn `i`: a warp copies its rows of keys, and the
// same of values, AT_ONCE of them at once.
template <typename S, int D> struct Piece {
    static constexpr int WIDE = 16 / sizeof(S), COLUMNS = D / WIDE, AT_ONCE = 32 / COLUMNS;
    static constexpr int WARP_KEYS = Shape<D>::WARP_KEYS;
    int in_warp, row, column;

    __device__ __forceinline__ explicit Piece(int i) {
        int lane = threadIdx.x % 32;
        in_warp = i + lane / COLUMNS, row = WARP_KEYS * (threadIdx.x / 32) + in_warp;
        column = lane % COLUMNS;
    }
};

// Starts the copy of a tile of keys and values.
template <typename S, int D>
__device__ __forceinline__ void copy_keys(S *tile, const Layer<S> &layer, int slot, int kv_heads) {
    typedef Piece<S, D> P;
#pragma unroll
    for (int i = 0; i < Shape<D>::WARP_KEYS; i += P::AT_ONCE) {
        P piece(i);
        int from = __shfl_sync(ALL, slot, piece.in_warp);
        long long at = store_row(max(from, 0), kv_heads * D) + piece.column * P::WIDE;
        S *to = tile + stored_at<S, D>(piece.row, piece.column);
        cp_async16(to, layer.k + at, from >= 0);
        cp_async16(to + Shape<D>::KEYS * D, layer.v + at, from >= 0);
    }
    cp_async_commit();
}

// Widens those bytes of a tile that this thread has copied.
template <typename S, int D>
__device__ __forceinline__ void widen_keys(typename Meets<S>::type *wide, const S *tile) {
    typedef Piece<S, D> P;
#pragma unroll
    for (int i = 0; i < Shape<D>::WARP_KEYS; i += P::AT_ONCE) {
        P piece(i);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const int OF_VALUES = Shape<D>::KEYS * D;
            const S *from = tile + which * OF_VALUES + stored_at<S, D>(piece.row, piece.column);
            typename Meets<S>::type *to = wide + which * OF_VALUES;
            uint4 x = *reinterpret_cast<const uint4 *>(from);
            *reinterpret_cast<uint4 *>(to + swizzled<D>(piece.row, 2 * piece.column)) =
                widen8<S>(x.x, x.y);
            *reinterpret_cast<uint4 *>(to + swizzled<D>(piece.row, 2 * piece.column + 1)) =
                widen8<S>(x.z, x.w);
        }
    }
}

// The scale of the key in the slots of a lane of the lower half, of its value in one of the upper.
template <typename S>
__device__ __forceinline__ float scale_to_copy(const Layer<S> &layer, int slot, int kv_heads,
                                               int kv_head) {
    if (!has_scales<S> || slot < 0) return 0;
    const float *scales = threadIdx.x % 32 < 16 ? layer.k_scales : layer.v_scales;
    return scales[scale_at(slot, kv_heads, kv_head)];
}

// Where this block's head of a row is, in q and out.
template <int D> __device__ __forceinline__ long long row_of(const Tile &t, int row, int n_heads) {
    return (static_cast<long long>(t.row + row) * n_heads + blockIdx.x) * D;
}

// The queries of a tile, in the type of the keys; zeros after the last row.
template <typename KV, int D>
__device__ __forceinline__ void copy_queries(KV *queries, const bf16 *q, const Tile &t,
                                             int n_heads) {
    const int COLUMNS = D / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < Shape<D>::ROWS * COLUMNS; i += PREFILL_THREADS) {
        int row = i / COLUMNS, column = i % COLUMNS;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < t.rows)
            x = load_query<KV>(q + row_of<D>(t, row, n_heads) + column * 8);
        *reinterpret_cast<uint4 *>(queries + swizzled<D>(row, column)) = x;
    }
}

// What a warp has of its rows. In the fragments of a product a lane has the rows lane / 4 and
// lane / 4 + 8 of each 16, and of each 8 columns those of lane % 4 * 2 and the next.
template <int D> struct WarpRows {
    float out[Shape<D>::M][D / 8][4];
    float largest[Shape<D>::M][2], sum[Shape<D>::M][2]; // scaled; over the columns of this lane
};

template <int D> __device__ __forceinline__ void clear(WarpRows<D> &rows) {
#pragma unroll
    for (int m = 0; m < Shape<D>::M; m++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) rows.out[m][n][i] = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) rows.largest[m][i] = -INFINITY, rows.sum[m][i] = 0;
    }
}

template <typename KV, int D>
__device__ __forceinline__ void tile_scores(Scores<D> &scores, const KV *queries,
                                            const KV *keys) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int query_row = warp * Shape<D>::WARP_ROWS + lane % 16, key_row = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int m = 0; m < Shape<D>::M; m++)
#pragma unroll
        for (int n = 0; n < Shape<D>::N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[m][n][i] = 0;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t a[Shape<D>::M][4];
#pragma unroll
        for (int m = 0; m < Shape<D>::M; m++)
            ldmatrix_x4(a[m], queries + swizzled<D>(query_row + m * 16, step * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < Shape<D>::N; n += 2) {
            uint32_t x[4];
            ldmatrix_x4(x, keys + swizzled<D>(n * 8 + key_row, step * 2 + lane / 8 % 2));
            uint32_t b0[2] = {x[0], x[1]}, b1[2] = {x[2], x[3]};
#pragma unroll
            for (int m = 0; m < Shape<D>::M; m++) {
                mma_16816(scores[m][n], a[m], b0, KV());
                mma_16816(scores[m][n + 1], a[m], b1, KV());
            }
        }
    }
}

// -inf for the keys that a row does not see.
template <int D>
__device__ __forceinline__ void mask_scores(Scores<D> &scores, const Tile &t, int first_key) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * Shape<D>::WARP_ROWS + lane / 4;
#pragma unroll
    for (int m = 0; m < Shape<D>::M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int position = t.position + row + m * 16 + half * 8;
            int first = max(0, position - t.before + 1), end = min(t.end, position + t.after);
            unsigned seen = max(0, end - first), from = first_key + lane % 4 * 2 - first;
#pragma unroll
            for (int n = 0; n < Shape<D>::N; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &score = scores[m][n][half * 2 + i];
                    score = from + n * 8 + i < seen ? score : -INFINITY;
                }
        }
}

// Each score by the scale of its key, or each weight by that of its value.
template <int D>
__device__ __forceinline__ void scale_scores(Scores<D> &scores, const float *scales) {
#pragma unroll
    for (int n = 0; n < Shape<D>::N; n++) {
        float2 scale =
            *reinterpret_cast<const float2 *>(scales + n * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int m = 0; m < Shape<D>::M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                scores[m][n][half * 2] *= scale.x, scores[m][n][half * 2 + 1] *= scale.y;
    }
}

// Products with keys become what a soft bound makes of them.
template <int D>
__device__ __forceinline__ void bend_scores(Scores<D> &scores, const Curve &curve) {
#pragma unroll
    for (int m = 0; m < Shape<D>::M; m++)
#pragma unroll
        for (int n = 0; n < Shape<D>::N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[m][n][i] = curve.bent(scores[m][n][i]);
}

// Scores become weights; what was summed before is brought to the new maximum.
template <int D>
__device__ __forceinline__ void tile_softmax(Scores<D> &scores, WarpRows<D> &rows, float scale) {
#pragma unroll
    for (int m = 0; m < Shape<D>::M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float before = rows.largest[m][half], largest = -INFINITY;
#pragma unroll
            for (int n = 0; n < Shape<D>::N; n++)
                largest = fmaxf(largest,
                                fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
            rows.largest[m][half] = largest = fmaxf(before, largest * scale);
            // A row that has seen no key yet: every weight is 0 whatever the finite base.
            float base = largest == -INFINITY ? 0 : largest;
            float factor = exp2_fast(before - base); // exactly 1 where the maximum stays
            float sum = rows.sum[m][half] * factor;
#pragma unroll
            for (int n = 0; n < Shape<D>::N; n++)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; i++) {
                    scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], scale, -base));
                    sum += scores[m][n][i];
                }
            rows.sum[m][half] = sum;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                rows.out[m][n][half * 2] *= factor, rows.out[m][n][half * 2 + 1] *= factor;
        }
}

template <typename KV, int D>
__device__ __forceinline__ void tile_values(WarpRows<D> &rows, const Scores<D> &weights,
                                            const KV *values) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < Shape<D>::KEYS / 16; step++) {
        uint32_t a[Shape<D>::M][4];
#pragma unroll
        for (int m = 0; m < Shape<D>::M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = &weights[m][step * 2 + i / 2][i % 2 * 2];
                a[m][i] = pack2<KV>(pair[0], pair[1]);
            }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t x[4];
            ldmatrix_x4_trans(x, values + swizzled<D>(step * 16 + lane % 16, n + lane / 16));
            uint32_t b0[2] = {x[0], x[1]}, b1[2] = {x[2], x[3]};
#pragma unroll
            for (int m = 0; m < Shape<D>::M; m++) {
                mma_16816(rows.out[m][n], a[m], b0, KV());
                mma_16816(rows.out[m][n + 1], a[m], b1, KV());
            }
        }
    }
}

// Writes the rows of a warp, through the shared memory that its queries were in.
template <int D>
__device__ __forceinline__ void write_rows(bf16 *out, bf16 *stage, WarpRows<D> &rows, const Tile &t,
                                           const float *sinks, int n_heads) {
    const int COLUMNS = D / 8;
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 * Shape<D>::WARP_ROWS;
    float sink = load_sink(sinks, blockIdx.x);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < Shape<D>::M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = rows.sum[m][half];
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
            sum += exp2_fast(sink - rows.largest[m][half]);
            float factor = sum > 0 ? 1 / sum : 0;
            int row = first + m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                const float *pair = &rows.out[m][n][half * 2];
                *reinterpret_cast<uint32_t *>(stage + swizzled<D>(row, n) + lane % 4 * 2) =
                    pack2<bf16>(pair[0] * factor, pair[1] * factor);
            }
        }
    __syncwarp();
    for (int i = lane; i < Shape<D>::WARP_ROWS * COLUMNS; i += 32) {
        int row = first + i / COLUMNS, column = i % COLUMNS;
        if (row < t.rows)
            *reinterpret_cast<uint4 *>(out + row_of<D>(t, row, n_heads) + column * 8) =
                *reinterpret_cast<const uint4 *>(stage + swizzled<D>(row, column));
    }
}

template <typename S, int D>
__device__ __forceinline__ void prefill(bf16 *out, const bf16 *q, Layer<S> layer, const Tile &t,
                                        const int *tables, const float *sinks, int n_heads,
                                        int kv_heads, int block_len, const Curve &curve) {
    typedef typename Meets<S>::type KV;
    const bool BYTES = sizeof(S) == 1;
    const int ROWS = Shape<D>::ROWS, KEYS = Shape<D>::KEYS, EACH = Shape<D>::WARP_KEYS;
    const int STAGE = 2 * KEYS * D;  // numbers of a tile: [KEYS][D] keys, then values
    DYNAMIC_SHARED(KV, queries);     // [ROWS][D]
    KV *wide = queries + ROWS * D;   // of bytes a tile as it meets the queries
    S *stored = reinterpret_cast<S *>(wide + (BYTES ? STAGE : 0)); // two tiles
    float *scales = reinterpret_cast<float *>(stored + 2 * STAGE); // of q8: [KEYS] each
    int head = blockIdx.x, kv_head = head / (n_heads / kv_heads);
    layer.k += kv_head * D, layer.v += kv_head * D;
    int first_key = t.first / KEYS * KEYS;
    int slot = slot_to_copy<D>(t, tables, block_len, first_key);
    copy_keys<S, D>(stored, layer, slot, kv_heads);
    float own_scale = scale_to_copy(layer, slot, kv_heads, kv_head);
    slot = slot_to_copy<D>(t, tables, block_len, first_key + KEYS);
    copy_queries<KV, D>(queries, q, t, n_heads);

    int warp_row = threadIdx.x / 32 * Shape<D>::WARP_ROWS;
    int low = t.position + warp_row;
    int high = min(low + Shape<D>::WARP_ROWS, t.position + t.rows) - 1;
    WarpRows<D> rows;
    clear(rows);
    for (int stage = 0; first_key < t.end; first_key += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if constexpr (BYTES) {
            widen_keys<S, D>(wide, stored + stage * STAGE);
            int lane = threadIdx.x % 32, of_values = lane / 16 * KEYS;
            if (has_scales<S> && lane % 16 < EACH)
                scales[of_values + threadIdx.x / 32 * EACH + lane % 16] = own_scale;
        }
        if (first_key + KEYS < t.end) {
            copy_keys<S, D>(stored + (stage ^ 1) * STAGE, layer, slot, kv_heads);
            own_scale = scale_to_copy(layer, slot, kv_heads, kv_head);
            slot = slot_to_copy<D>(t, tables, block_len, first_key + 2 * KEYS);
        }
        if (BYTES) __syncthreads();
        int last_key = first_key + KEYS - 1;
        bool none = first_key >= high + t.after || last_key <= low - t.before;
        bool all = last_key < min(t.end, low + t.after) && first_key > high - t.before;
        if (warp_row >= t.rows || none) continue;
        const KV *now = BYTES ? wide : reinterpret_cast<const KV *>(stored + stage * STAGE);
        Scores<D> scores;
        tile_scores<KV, D>(scores, queries, now);
        if (has_scales<S>) scale_scores<D>(scores, scales);
        if (curve.bends()) bend_scores<D>(scores, curve);
        if (!all) mask_scores<D>(scores, t, first_key);
        tile_softmax<D>(scores, rows, curve.outer);
        if (has_scales<S>) scale_scores<D>(scores, scales + KEYS);
        tile_values<KV, D>(rows, scores, now + KEYS * D);
    }
    if (warp_row < t.rows)
        write_rows<D>(out, reinterpret_cast<bf16 *>(queries), rows, t, sinks, n_heads);
}

} // namespace

#define PREFILL(NAME, S, D)                                                                        \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2)                               \
        attention_prefill_##NAME##_d##D(                                                           \
            bf16 *out, const bf16 *q, const S *k, const S *v, const float *k_scales,               \
            const float *v_scales, const int *tile_row, const int *tile_rows,                      \
            const int *tile_position, const int *tile_table, const int *tile_keys,                 \
            const int *tables, const float *sinks, int n_heads, int kv_heads, int block_len,       \
            float scale, float softcap, int window, int causal) {                                  \
        grid_begin();                                                                              \
        Tile tile = load_tile(tile_row, tile_rows, tile_position, tile_table, tile_keys,           \
                              blockIdx.y, window, causal);                                         \
        tile = part_of<D>(tile);                                                                   \
        if (tile.rows <= 0) return;                                                                \
        prefill<S, D>(out, q, Layer<S>{k, v, k_scales, v_scales}, tile, tables, sinks, n_heads,    \
                      kv_heads, block_len, Curve(scale, softcap));                                 \
    }
PREFILL(bf16, bf16, 64)
PREFILL(f16, __half, 64)
PREFILL(e4m3, e4m3, 64)
PREFILL(q8, q8, 64)
PREFILL(bf16, bf16, 128)
PREFILL(f16, __half, 128)
PREFILL(e4m3, e4m3, 128)
PREFILL(q8, q8, 128)
PREFILL(bf16, bf16, 256)
PREFILL(f16, __half, 256)
PREFILL(e4m3, e4m3, 256)
PREFILL(q8, q8, 256)
