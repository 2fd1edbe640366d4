// Attention of a ragged batch over paged keys and values: single new rows (decode) and runs of new
// rows (prefill, encoders).
//
// q and out are bf16 [rows][n_heads][dim]. The keys and the values of a layer are two buffers
// [slot][kv_heads][dim] of bf16, f16, e4m3 or q8 (bytes.cuh), slot = block * block_len + offset;
// k_scales and v_scales, [slot / 16][kv_heads][16] in f32, are those of q8 and are not read
// otherwise. `tables` holds the block tables one after the other. Query head h reads KV head
// h / (n_heads / kv_heads). A row at
// position p sees the keys j <= p, with a window those of p - window < j <= p (0: no window). Keys
// and values of the new rows are in the store already. A slot that no row of a tile or item sees is
// never read. scale > 0.
//
// Weights are powers of two: scale * log2(e) is folded into the scores. Scores, maxima, sums and
// accumulators are f32; tensor cores multiply q (in the type of the keys) by the keys and the
// weights (rounded to that type) by the values. Bytes are widened without loss to the type that
// they meet (Meets<S>); a scale of q8 multiplies the score, or the weight before it is rounded.
// Keys are reduced in chunks and tiles that begin at
// multiples of their length from position 0, so a row's result does not depend on its neighbours,
// nor on how a prompt was cut.
//
// Sources: Dao, FlashAttention-2 (2023), for the tiles; Dao et al., Flash-Decoding (2023), for the
// split of one row's keys over blocks; Milakov and Gimelshein (2018) for the softmax in one pass.
//
// attention_decode_{bf16,f16,e4m3,q8}_d{64,128}_g{1,2,4,8}: chunks of CHUNK = 256 keys, joined by
//   the block that ends last.
//   grid (chunks of the longest item or more, kv_heads * ceil(group / g), items), where group =
//   n_heads / kv_heads; block 2 * dim; shared 512 * dim + 1024 + 1040 * g bytes, of keys in bytes
//   256 * dim + 3072 + 1040 * g.
//   partial [item][head][gridDim.x][dim], stats [item][head][gridDim.x] = (largest score in the
//   log2 domain, sum of weights), (-inf, 0) where the chunk has no key that the row sees; `partial`
//   is not written there. ended [item][gridDim.y] is 0 before and after. An item of context 0 is
//   padding: its row of `out` is not written.
// attention_prefill_{bf16,f16,e4m3,q8}_d{64,128}: TILE_ROWS = 128 rows of one head against 64 keys
//   at once.
//   grid (n_heads, tiles), block 128, shared 768 * dim bytes (98304 for 128, 49152 for 64), of keys
//   in bytes 512 more.
//   A tile is 1..128 consecutive rows of one sequence. causal = 0: every row sees all tile_keys
//   keys and `window` is not read. tables = null: the slot of key j is tile_table + j.
// attention_any_{bf16,f16,e4m3,q8}: the same for any dim up to 256, without tensor cores.
//   grid (rows of the largest tile, n_heads, tiles), block 32, no dynamic shared memory.
#include "bytes.cuh"

namespace {

const unsigned ALL = 0xffffffffu;
const float LOG2_E = 1.4426950408889634f;

// Keys and values of a layer. `k` and `v` begin at some head.
template <typename S> struct Layer {
    const S *k, *v;
    const float *k_scales, *v_scales;
};

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
    return row * D + (column16 ^ (D == 128 ? row & 7 : row / 2 & 3)) * 16;
}

// ---------------------------------------------------------------------------------- decode

const int CHUNK = 256;
const int SCORE_STRIDE = CHUNK + 4; // floats of one head; heads begin 4 banks apart

struct DecodeBlock {
    int kv_head, head, heads; // `heads` query heads from `head` on
    int first, end;           // the keys of this chunk that the row sees, in the chunk
};

template <int G>
__device__ __forceinline__ DecodeBlock decode_block(int context, int n_heads, int kv_heads,
                                                    int window) {
    int group = n_heads / kv_heads, parts = (group + G - 1) / G;
    int part = blockIdx.y % parts, base = blockIdx.x * CHUNK;
    DecodeBlock b;
    b.kv_head = blockIdx.y / parts;
    b.head = b.kv_head * group + part * G;
    b.heads = min(G, group - part * G);
    b.first = max(0, window > 0 ? context - window - base : 0);
    b.end = min(CHUNK, context - base);
    return b;
}

// Eight numbers of a key, out of what a lane loaded of it.
template <typename S, int LOADS>
__device__ __forceinline__ uint4 eight(const uint4 (&loads)[LOADS], int i) {
    if constexpr (sizeof(S) == 2) {
        return loads[i];
    } else {
        uint4 x = loads[i / 2];
        return i % 2 ? widen8<S>(x.z, x.w) : widen8<S>(x.x, x.y);
    }
}

// Scores of the chunk, K by q: keys are the rows of the product and heads its columns. A lane loads
// 16 bytes of a key, which are its share of two steps of the product, or of four: the order of the
// numbers of a head is another one than in memory, the same for K and q.
template <typename S, int D, int G>
__device__ __forceinline__ void decode_scores(float *scores, const int *slots, const float *scales,
                                              const bf16 *q, const S *k, int heads, int kv_heads) {
    typedef typename Meets<S>::type KV;
    const int WIDE = 16 / sizeof(S), LOADS = D / (4 * WIDE), STEPS = D / 32;
    const int KEYS = CHUNK / (D / 16), TILES = 128 / D * 2 / sizeof(S);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, part = lane % 4;
    uint4 query[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        int at = i / (WIDE / 8) * 4 * WIDE + part * WIDE + i % (WIDE / 8) * 8;
        query[i] = quad < heads ? load_query<KV>(q + quad * D + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (int base = 0; base < KEYS; base += 16 * TILES) {
        int key = warp * KEYS + base + quad;
        uint4 keys[2 * TILES][LOADS]; // of the keys key, key + 8, key + 16...
#pragma unroll
        for (int row = 0; row < 2 * TILES; row++) {
            int slot = slots[key + row * 8];
            const S *from = k + store_row(slot, kv_heads * D) + part * WIDE;
#pragma unroll
            for (int i = 0; i < LOADS; i++)
                keys[row][i] = slot >= 0 ? *reinterpret_cast<const uint4 *>(from + i * 4 * WIDE)
                                         : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            float sum[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                uint4 low = eight<S>(keys[tile * 2], i), high = eight<S>(keys[tile * 2 + 1], i);
                uint32_t a0[4] = {low.x, high.x, low.y, high.y}, b0[2] = {query[i].x, query[i].y};
                uint32_t a1[4] = {low.z, high.z, low.w, high.w}, b1[2] = {query[i].z, query[i].w};
                mma_16816(sum, a0, b0, KV());
                mma_16816(sum, a1, b1, KV());
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int head = part * 2 + i % 2, at = key + tile * 16 + i / 2 * 8;
                float score = has_scales<S> ? sum[i] * scales[at] : sum[i];
                if (head < G) scores[head * SCORE_STRIDE + at] = score;
            }
        }
    }
}

// One warp turns the scores of one head into weights, which take the place of the scores; each
// times the scale of its value where there are any.
template <typename S>
__device__ __forceinline__ float2 decode_softmax(float *scores, const float *v_scales, int first,
                                                 int end, float scale) {
    typedef typename Meets<S>::type KV;
    int lane = threadIdx.x % 32;
    float x[CHUNK / 32], largest = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++) {
        int key = i * 32 + lane;
        x[i] = key >= first && key < end ? scores[key] * scale : -INFINITY;
        largest = fmaxf(largest, x[i]);
    }
    largest = warp_max(largest);
    __syncwarp();
    KV *weights = reinterpret_cast<KV *>(scores);
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++) {
        float weight = exp2_fast(x[i] - largest);
        sum += weight;
        if (has_scales<S>) weight *= v_scales[i * 32 + lane];
        weights[i * 32 + lane] = from_f32<KV>(weight);
    }
    return make_float2(largest, warp_sum(sum));
}

// What a lane has of 16 numbers of a head and 16 keys from `key` on, as V^T in a product.
template <typename S, int D>
__device__ __forceinline__ void load_values(uint32_t (&a)[4], const S *values, int key) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if constexpr (sizeof(S) == 2) {
        int row = lane / 16 * 8 + lane % 8, column = warp * 2 + lane / 8 % 2;
        ldmatrix_x4_trans(a, values + swizzled<D>(key + row, column));
    } else {
        // Two neighbours of each of two keys: the first goes to a row of the upper half of the
        // product, the second to one of the lower half.
        uint32_t two[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = key + lane % 4 * 2 + i / 2 * 8 + i % 2;
            const S *at = values + stored_at<S, D>(row, warp) + lane / 4 * 2;
            two[i] = *reinterpret_cast<const uint16_t *>(at);
        }
        widen(__byte_perm(two[0], two[1], 0x5140), a[0], a[1], S());
        widen(__byte_perm(two[2], two[3], 0x5140), a[2], a[3], S());
    }
}

// Which number of a head a row of that product is.
template <typename S> __device__ __forceinline__ int number_of_row(int row) {
    return sizeof(S) == 2 ? row : row % 8 * 2 + row / 8;
}

// Weighted sum of the values, V^T by the weights: a warp has 16 of the numbers of the head as rows
// of the product, heads are the columns.
template <typename S, int D>
__device__ __forceinline__ void decode_values(float (&out)[4], const S *values,
                                              const float *scores, int heads) {
    typedef typename Meets<S>::type KV;
    int lane = threadIdx.x % 32, quad = lane / 4;
    bool used = quad < heads;
    const uint32_t *weights =
        reinterpret_cast<const uint32_t *>(scores + (used ? quad : 0) * SCORE_STRIDE) + lane % 4;
    float sum[2][4] = {};
#pragma unroll
    for (int key = 0; key < CHUNK; key += 16) {
        uint32_t a[4];
        load_values<S, D>(a, values, key);
        uint32_t low = weights[key / 2], high = weights[key / 2 + 4];
        uint32_t b[2] = {used ? low : 0, used ? high : 0};
        mma_16816(sum[key / 16 % 2], a, b, KV());
    }
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = sum[0][i] + sum[1][i];
}

// Chunks whose weights are in shared memory at once.
const int JOINED = 512;

// Joins the chunks of the heads of a block: out = sum(weight * partial) / sum(weight * sum), where
// a chunk weighs 2^(its largest score - the largest of all).
template <int D, int G>
__device__ __forceinline__ void join(char *shared, bf16 *out, const float *partial,
                                     const float2 *stats, int heads, int used) {
    const int WARPS = D / 16, EACH = (G + 1) / 2;
    float *weights = reinterpret_cast<float *>(shared); // [heads][JOINED]
    __shared__ float largest[G], total[G];
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    long long stride = gridDim.x;
    for (int head = warp; head < heads; head += WARPS) {
        const float2 *of_head = stats + head * stride;
        float most = -INFINITY, all = 0;
        for (int chunk = lane; chunk < used; chunk += 32)
            most = fmaxf(most, __ldcg(of_head + chunk).x);
        most = warp_max(most);
        for (int chunk = lane; chunk < used; chunk += 32) {
            float2 stat = __ldcg(of_head + chunk);
            all += stat.y == 0 ? 0 : exp2_fast(stat.x - most) * stat.y;
        }
        all = warp_sum(all);
        if (lane == 0) largest[head] = most, total[head] = all;
    }
    float sum[EACH] = {};
    int dim = thread % D;
    for (int first = 0; first < used; first += JOINED) {
        int count = min(JOINED, used - first);
        __syncthreads();
        for (int i = thread; i < heads * count; i += 2 * D) {
            int head = i / count, chunk = i % count;
            float2 stat = __ldcg(stats + head * stride + first + chunk);
            float weight = stat.y == 0 ? 0 : exp2_fast(stat.x - largest[head]);
            weights[head * JOINED + chunk] = weight;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int head = thread / D + 2 * i;
            if (head >= heads) break;
            const float *of_head = partial + (head * stride + first) * D + dim;
#pragma unroll 16
            for (int chunk = 0; chunk < count; chunk++) {
                float weight = weights[head * JOINED + chunk];
                const float *of_chunk = of_head + static_cast<long long>(chunk) * D;
                if (weight != 0) sum[i] += weight * __ldcg(of_chunk);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int head = thread / D + 2 * i;
        if (head < heads) out[head * D + dim] = from_f32<bf16>(sum[i] / total[head]);
    }
}

// True in all threads of the block that ends last of those of an item and its heads.
__device__ __forceinline__ bool is_last(int *ended) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ended, 1) == static_cast<int>(gridDim.x) - 1;
        if (last) *ended = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

template <typename S, int D, int G>
__device__ __forceinline__ void decode_chunk(char *shared, float *partial, float2 *stats,
                                             const bf16 *q, const Layer<S> &layer, int row,
                                             int table, const int *tables, int n_heads,
                                             int kv_heads, int block_len, float scale,
                                             const DecodeBlock &b) {
    const int THREADS = 2 * D, WARPS = D / 16, WIDE = 16 / sizeof(S), COLUMNS = D / WIDE;
    S *values = reinterpret_cast<S *>(shared);               // [CHUNK][D], stored_at
    int *slots = reinterpret_cast<int *>(values + CHUNK * D); // [CHUNK], -1: not seen
    float *scales = reinterpret_cast<float *>(slots + CHUNK); // of bytes: [CHUNK] of K, then of V
    float *scores = scales + (sizeof(S) == 1 ? 2 * CHUNK : 0); // [G][SCORE_STRIDE]
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    // Of head b.head + i: (place + i * gridDim.x).
    long long place = blockIdx.x;
    if (b.first >= b.end) {
        if (thread < b.heads)
            stats[place + static_cast<long long>(thread) * gridDim.x] = make_float2(-INFINITY, 0);
        return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK / THREADS; i++) {
        int key = i * THREADS + thread, position = blockIdx.x * CHUNK + key;
        bool seen = key >= b.first && key < b.end;
        int slot = seen ? slot_of(tables, table, block_len, position) : -1;
        slots[key] = slot;
        if constexpr (has_scales<S>) {
            long long at = scale_at(max(slot, 0), kv_heads, b.kv_head);
            scales[key] = seen ? layer.k_scales[at] : 0;
            scales[CHUNK + key] = seen ? layer.v_scales[at] : 0;
        }
    }
    __syncthreads();

    const S *v_head = layer.v + b.kv_head * D + thread % COLUMNS * WIDE;
#pragma unroll
    for (int i = 0; i < CHUNK * COLUMNS / THREADS; i++) {
        int key = i * (THREADS / COLUMNS) + thread / COLUMNS, slot = slots[key];
        const S *from = v_head + store_row(max(slot, 0), kv_heads * D);
        cp_async16(values + stored_at<S, D>(key, thread % COLUMNS), from, slot >= 0);
    }
    cp_async_commit();
    const bf16 *q_head = q + (static_cast<long long>(row) * n_heads + b.head) * D;
    decode_scores<S, D, G>(scores, slots, scales, q_head, layer.k + b.kv_head * D, b.heads,
                           kv_heads);
    __syncthreads();
    for (int head = warp; head < b.heads; head += WARPS) {
        float *of_head = scores + head * SCORE_STRIDE;
        float2 stat =
            decode_softmax<S>(of_head, scales + CHUNK, b.first, b.end, scale * LOG2_E);
        if (lane == 0) stats[place + static_cast<long long>(head) * gridDim.x] = stat;
    }
    cp_async_wait<0>();
    __syncthreads();

    float out[4];
    decode_values<S, D>(out, values, scores, b.heads);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int head = lane % 4 * 2 + i % 2;
        int dim = warp * 16 + number_of_row<S>(i / 2 * 8 + lane / 4);
        if (head < b.heads)
            partial[(place + static_cast<long long>(head) * gridDim.x) * D + dim] = out[i];
    }
}

template <typename S, int D, int G>
__device__ __forceinline__ void decode(bf16 *out, float *partial, float2 *stats, int *ended,
                                       const bf16 *q, const Layer<S> &layer,
                                       const int *item_row, const int *item_table,
                                       const int *item_context, const int *tables, int n_heads,
                                       int kv_heads, int block_len, float scale, int window) {
    DYNAMIC_SHARED(char, shared);
    int item = blockIdx.z, context = item_context[item], row = item_row[item];
    DecodeBlock b = decode_block<G>(context, n_heads, kv_heads, window);
    long long place = (static_cast<long long>(item) * n_heads + b.head) * gridDim.x;
    stats += place, partial += place * D;
    decode_chunk<S, D, G>(shared, partial, stats, q, layer, row, item_table[item], tables, n_heads,
                          kv_heads, block_len, scale, b);
    if (context == 0 || !is_last(ended + item * gridDim.y + blockIdx.y)) return;
    out += (static_cast<long long>(row) * n_heads + b.head) * D;
    join<D, G>(shared, out, partial, stats, b.heads, (context + CHUNK - 1) / CHUNK);
}

// --------------------------------------------------------------------------------- prefill

const int TILE_ROWS = 128, WARP_ROWS = 32, TILE_KEYS = 64, PREFILL_THREADS = 128;
const int FAR = 1 << 30; // further than any key

// The rows of a tile and the keys that any of them sees.
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

// The slots of the keys that this warp copies, one in each lane of a half; -1: nothing to copy.
__device__ __forceinline__ int slot_to_copy(const Tile &t, const int *tables, int block_len,
                                            int first_key) {
    int key = first_key + threadIdx.x / 32 * 16 + threadIdx.x % 16;
    return key >= t.first && key < t.end ? slot_of(tables, t.table, block_len, key) : -1;
}

// Which 16 bytes of a tile a thread copies in its turn `i`: a warp copies 16 rows of keys, and the
// same of values, so many at once.
template <typename S, int D> struct Piece {
    static constexpr int WIDE = 16 / sizeof(S), COLUMNS = D / WIDE, AT_ONCE = 32 / COLUMNS;
    int in_warp, row, column;

    __device__ __forceinline__ explicit Piece(int i) {
        int lane = threadIdx.x % 32;
        in_warp = i + lane / COLUMNS, row = threadIdx.x / 32 * 16 + in_warp;
        column = lane % COLUMNS;
    }
};

// Starts the copy of a tile of keys and values.
template <typename S, int D>
__device__ __forceinline__ void copy_keys(S *tile, const Layer<S> &layer, int slot, int kv_heads) {
    typedef Piece<S, D> P;
#pragma unroll
    for (int i = 0; i < 16; i += P::AT_ONCE) {
        P piece(i);
        int from = __shfl_sync(ALL, slot, piece.in_warp);
        long long at = store_row(max(from, 0), kv_heads * D) + piece.column * P::WIDE;
        S *to = tile + stored_at<S, D>(piece.row, piece.column);
        cp_async16(to, layer.k + at, from >= 0);
        cp_async16(to + TILE_KEYS * D, layer.v + at, from >= 0);
    }
    cp_async_commit();
}

// Widens those bytes of a tile that this thread has copied.
template <typename S, int D>
__device__ __forceinline__ void widen_keys(typename Meets<S>::type *wide, const S *tile) {
    typedef Piece<S, D> P;
#pragma unroll
    for (int i = 0; i < 16; i += P::AT_ONCE) {
        P piece(i);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const S *from = tile + which * TILE_KEYS * D + stored_at<S, D>(piece.row, piece.column);
            typename Meets<S>::type *to = wide + which * TILE_KEYS * D;
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
    for (int i = threadIdx.x; i < TILE_ROWS * COLUMNS; i += PREFILL_THREADS) {
        int row = i / COLUMNS, column = i % COLUMNS;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < t.rows)
            x = load_query<KV>(q + row_of<D>(t, row, n_heads) + column * 8);
        *reinterpret_cast<uint4 *>(queries + swizzled<D>(row, column)) = x;
    }
}

// What a warp has of its 32 rows. In the fragments of a product a lane has the rows lane / 4 and
// lane / 4 + 8 of each 16, and of each 8 columns those of lane % 4 * 2 and the next.
template <int D> struct WarpRows {
    float out[2][D / 8][4];
    float largest[2][2], sum[2][2]; // scaled; over the columns of this lane
};

template <int D> __device__ __forceinline__ void clear(WarpRows<D> &rows) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) rows.out[m][n][i] = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) rows.largest[m][i] = -INFINITY, rows.sum[m][i] = 0;
    }
}

template <typename KV, int D>
__device__ __forceinline__ void tile_scores(float (&scores)[2][8][4], const KV *queries,
                                            const KV *keys) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int query_row = warp * WARP_ROWS + lane % 16, key_row = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[m][n][i] = 0;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
            ldmatrix_x4(a[m], queries + swizzled<D>(query_row + m * 16, step * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            uint32_t x[4];
            ldmatrix_x4(x, keys + swizzled<D>(n * 8 + key_row, step * 2 + lane / 8 % 2));
            uint32_t b0[2] = {x[0], x[1]}, b1[2] = {x[2], x[3]};
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_16816(scores[m][n], a[m], b0, KV());
                mma_16816(scores[m][n + 1], a[m], b1, KV());
            }
        }
    }
}

// -inf for the keys that a row does not see.
__device__ __forceinline__ void mask_scores(float (&scores)[2][8][4], const Tile &t,
                                            int first_key) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * WARP_ROWS + lane / 4;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int position = t.position + row + m * 16 + half * 8;
            int first = max(0, position - t.before + 1), end = min(t.end, position + t.after);
            unsigned seen = max(0, end - first), from = first_key + lane % 4 * 2 - first;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &score = scores[m][n][half * 2 + i];
                    score = from + n * 8 + i < seen ? score : -INFINITY;
                }
        }
}

// Each score by the scale of its key, or each weight by that of its value.
__device__ __forceinline__ void scale_scores(float (&scores)[2][8][4], const float *scales) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float2 scale =
            *reinterpret_cast<const float2 *>(scales + n * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                scores[m][n][half * 2] *= scale.x, scores[m][n][half * 2 + 1] *= scale.y;
    }
}

// Scores become weights; what was summed before is brought to the new maximum.
template <int D>
__device__ __forceinline__ void tile_softmax(float (&scores)[2][8][4], WarpRows<D> &rows,
                                             float scale) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float before = rows.largest[m][half], largest = -INFINITY;
#pragma unroll
            for (int n = 0; n < 8; n++)
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
            for (int n = 0; n < 8; n++)
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
__device__ __forceinline__ void tile_values(WarpRows<D> &rows, const float (&weights)[2][8][4],
                                            const KV *values) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < TILE_KEYS / 16; step++) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
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
            for (int m = 0; m < 2; m++) {
                mma_16816(rows.out[m][n], a[m], b0, KV());
                mma_16816(rows.out[m][n + 1], a[m], b1, KV());
            }
        }
    }
}

// Writes the rows of a warp, through the shared memory that its queries were in.
template <int D>
__device__ __forceinline__ void write_rows(bf16 *out, bf16 *stage, WarpRows<D> &rows, const Tile &t,
                                           int n_heads) {
    const int COLUMNS = D / 8;
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 * WARP_ROWS;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = rows.sum[m][half];
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
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
    for (int i = lane; i < WARP_ROWS * COLUMNS; i += 32) {
        int row = first + i / COLUMNS, column = i % COLUMNS;
        if (row < t.rows)
            *reinterpret_cast<uint4 *>(out + row_of<D>(t, row, n_heads) + column * 8) =
                *reinterpret_cast<const uint4 *>(stage + swizzled<D>(row, column));
    }
}

template <typename S, int D>
__device__ __forceinline__ void prefill(bf16 *out, const bf16 *q, Layer<S> layer, const Tile &t,
                                        const int *tables, int n_heads, int kv_heads,
                                        int block_len, float scale) {
    typedef typename Meets<S>::type KV;
    const bool BYTES = sizeof(S) == 1;
    const int STAGE = 2 * TILE_KEYS * D;  // numbers of a tile: [TILE_KEYS][D] keys, then values
    DYNAMIC_SHARED(KV, queries);          // [TILE_ROWS][D]
    KV *wide = queries + TILE_ROWS * D;   // of bytes a tile as it meets the queries
    S *stored = reinterpret_cast<S *>(wide + (BYTES ? STAGE : 0)); // two tiles
    float *scales = reinterpret_cast<float *>(stored + 2 * STAGE); // of q8: [TILE_KEYS] each
    int head = blockIdx.x, kv_head = head / (n_heads / kv_heads);
    layer.k += kv_head * D, layer.v += kv_head * D;
    int first_key = t.first / TILE_KEYS * TILE_KEYS;
    int slot = slot_to_copy(t, tables, block_len, first_key);
    copy_keys<S, D>(stored, layer, slot, kv_heads);
    float own_scale = scale_to_copy(layer, slot, kv_heads, kv_head);
    slot = slot_to_copy(t, tables, block_len, first_key + TILE_KEYS);
    copy_queries<KV, D>(queries, q, t, n_heads);

    int warp_row = threadIdx.x / 32 * WARP_ROWS;
    int low = t.position + warp_row, high = min(low + WARP_ROWS, t.position + t.rows) - 1;
    WarpRows<D> rows;
    clear(rows);
    for (int stage = 0; first_key < t.end; first_key += TILE_KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if constexpr (BYTES) {
            widen_keys<S, D>(wide, stored + stage * STAGE);
            int lane = threadIdx.x % 32, of_values = lane / 16 * TILE_KEYS;
            if (has_scales<S>)
                scales[of_values + threadIdx.x / 32 * 16 + lane % 16] = own_scale;
        }
        if (first_key + TILE_KEYS < t.end) {
            copy_keys<S, D>(stored + (stage ^ 1) * STAGE, layer, slot, kv_heads);
            own_scale = scale_to_copy(layer, slot, kv_heads, kv_head);
            slot = slot_to_copy(t, tables, block_len, first_key + 2 * TILE_KEYS);
        }
        if (BYTES) __syncthreads();
        int last_key = first_key + TILE_KEYS - 1;
        bool none = first_key >= high + t.after || last_key <= low - t.before;
        bool all = last_key < min(t.end, low + t.after) && first_key > high - t.before;
        if (warp_row >= t.rows || none) continue;
        const KV *now = BYTES ? wide : reinterpret_cast<const KV *>(stored + stage * STAGE);
        float scores[2][8][4];
        tile_scores<KV, D>(scores, queries, now);
        if (has_scales<S>) scale_scores(scores, scales);
        if (!all) mask_scores(scores, t, first_key);
        tile_softmax<D>(scores, rows, scale * LOG2_E);
        if (has_scales<S>) scale_scores(scores, scales + TILE_KEYS);
        tile_values<KV, D>(rows, scores, now + TILE_KEYS * D);
    }
    if (warp_row < t.rows)
        write_rows<D>(out, reinterpret_cast<bf16 *>(queries), rows, t, n_heads);
}

// ------------------------------------------------------------------------------- any width

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
                                          const Tile &t, const int *tables, int n_heads,
                                          int kv_heads, int block_len, float scale, int dim) {
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
        query[i] = at < dim ? to_f32(q[place + at]) * scale * LOG2_E : 0, total[i] = 0;
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
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < ANY_EACH; i++) {
        int at = i * 32 + lane;
        if (at < dim) out[place + at] = from_f32<bf16>(sum > 0 ? total[i] / sum : 0);
    }
}

} // namespace

// ------------------------------------------------------------------------------ the kernels

#define DECODE(NAME, S, D, G, BLOCKS)                                                              \
    extern "C" __global__ void __launch_bounds__(2 * D, BLOCKS)                                    \
        attention_decode_##NAME##_d##D##_g##G(                                                     \
            bf16 *out, float *partial, float2 *stats, int *ended, const bf16 *q, const S *k,       \
            const S *v, const float *k_scales, const float *v_scales, const int *item_row,         \
            const int *item_table, const int *item_context, const int *tables, int n_heads,        \
            int kv_heads, int block_len, float scale, int window) {                                \
        grid_begin();                                                                              \
        Layer<S> layer = {k, v, k_scales, v_scales};                                               \
        decode<S, D, G>(out, partial, stats, ended, q, layer, item_row, item_table, item_context,  \
                        tables, n_heads, kv_heads, block_len, scale, window);                      \
    }
#define DECODE_GROUPS(NAME, S, D, BLOCKS)                                                          \
    DECODE(NAME, S, D, 1, BLOCKS)                                                                  \
    DECODE(NAME, S, D, 2, BLOCKS)                                                                  \
    DECODE(NAME, S, D, 4, BLOCKS)                                                                  \
    DECODE(NAME, S, D, 8, BLOCKS)
DECODE_GROUPS(bf16, bf16, 64, 4)
DECODE_GROUPS(f16, __half, 64, 4)
DECODE_GROUPS(e4m3, e4m3, 64, 4)
DECODE_GROUPS(q8, q8, 64, 4)
DECODE_GROUPS(bf16, bf16, 128, 3)
DECODE_GROUPS(f16, __half, 128, 3)
DECODE_GROUPS(e4m3, e4m3, 128, 3)
DECODE_GROUPS(q8, q8, 128, 3)

#define PREFILL(NAME, S, D)                                                                        \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 2)                               \
        attention_prefill_##NAME##_d##D(                                                           \
            bf16 *out, const bf16 *q, const S *k, const S *v, const float *k_scales,               \
            const float *v_scales, const int *tile_row, const int *tile_rows,                      \
            const int *tile_position, const int *tile_table, const int *tile_keys,                 \
            const int *tables, int n_heads, int kv_heads, int block_len, float scale, int window,  \
            int causal) {                                                                          \
        grid_begin();                                                                              \
        Tile tile = load_tile(tile_row, tile_rows, tile_position, tile_table, tile_keys,           \
                              blockIdx.y, window, causal);                                         \
        prefill<S, D>(out, q, Layer<S>{k, v, k_scales, v_scales}, tile, tables, n_heads, kv_heads, \
                      block_len, scale);                                                           \
    }
PREFILL(bf16, bf16, 64)
PREFILL(f16, __half, 64)
PREFILL(e4m3, e4m3, 64)
PREFILL(q8, q8, 64)
PREFILL(bf16, bf16, 128)
PREFILL(f16, __half, 128)
PREFILL(e4m3, e4m3, 128)
PREFILL(q8, q8, 128)

#define ANY(NAME, S)                                                                               \
    extern "C" __global__ void __launch_bounds__(32) attention_any_##NAME(                         \
        bf16 *out, const bf16 *q, const S *k, const S *v, const float *k_scales,                   \
        const float *v_scales, const int *tile_row, const int *tile_rows,                          \
        const int *tile_position, const int *tile_table, const int *tile_keys, const int *tables,  \
        int n_heads, int kv_heads, int block_len, float scale, int window, int causal, int dim) {  \
        grid_begin();                                                                              \
        Tile tile = load_tile(tile_row, tile_rows, tile_position, tile_table, tile_keys,           \
                              blockIdx.z, window, causal);                                         \
        any_width(out, q, Layer<S>{k, v, k_scales, v_scales}, tile, tables, n_heads, kv_heads,     \
                  block_len, scale, dim);                                                          \
    }
ANY(bf16, bf16)
ANY(f16, __half)
ANY(e4m3, e4m3)
ANY(q8, q8)
