// Attention of single new rows: each reads all keys that it sees, which several blocks share.
// What it computes is in attention.cuh.
//
// Sources: Dao et al., Flash-Decoding (2023), for the split of one row's keys over blocks; Milakov
// and Gimelshein (2018) for the softmax in one pass.
//
// attention_decode_{bf16,f16,e4m3,q8}_d{64,128,256}_g{1,2,4,8}: chunks of CHUNK = 256 keys, joined
//   by the block that ends last.
//   grid (chunks of the longest item or more, kv_heads * ceil(group / g), items), where group =
//   n_heads / kv_heads; block 2 * dim; shared min(512 * dim, 65536) + 1024 +
//   1040 * g bytes, of keys in bytes 256 * dim + 3072 + 1040 * g.
//   partial [item][head][gridDim.x][dim], stats [item][head][gridDim.x] = (largest score in the
//   log2 domain, sum of weights), (-inf, 0) where the chunk has no key that the row sees; `partial`
//   is not written there. ended [item][gridDim.y] is 0 before and after. An item of context 0 is
//   padding: its row of `out` is not written.
#include "attention.cuh"

namespace {

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
    const int KEYS = CHUNK / (D / 16), WHOLE = 256 / D / sizeof(S), TILES = WHOLE ? WHOLE : 1;
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
                                                 int end, const Curve &curve) {
    typedef typename Meets<S>::type KV;
    int lane = threadIdx.x % 32;
    float x[CHUNK / 32], largest = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNK / 32; i++) {
        int key = i * 32 + lane;
        float score = curve.bends() ? curve.bent(scores[key]) : scores[key];
        x[i] = key >= first && key < end ? score * curve.outer : -INFINITY;
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

// Keys whose values are in shared memory at once: as many as 64 KiB hold.
template <typename S, int D>
constexpr int values_at_once = CHUNK * D * sizeof(S) > 65536 ? 65536 / (D * sizeof(S)) : CHUNK;

// Starts the copy of the values of some keys, from `first` on.
template <typename S, int D>
__device__ __forceinline__ void copy_values(S *values, const S *v, const int *slots, int first,
                                            int kv_heads) {
    const int THREADS = 2 * D, WIDE = 16 / sizeof(S), COLUMNS = D / WIDE;
    int row = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
#pragma unroll
    for (int i = 0; i < values_at_once<S, D>; i += THREADS / COLUMNS) {
        int slot = slots[first + i + row];
        const S *from = v + store_row(max(slot, 0), kv_heads * D) + column * WIDE;
        cp_async16(values + stored_at<S, D>(i + row, column), from, slot >= 0);
    }
    cp_async_commit();
}

// Weighted sums of those values, V^T by the weights: a warp has 16 of the numbers of the head as
// rows of the product, heads are the columns.
template <typename S, int D>
__device__ __forceinline__ void add_values(float (&sum)[2][4], const S *values,
                                           const float *scores, int first, int heads) {
    typedef typename Meets<S>::type KV;
    int lane = threadIdx.x % 32, quad = lane / 4;
    bool used = quad < heads;
    const uint32_t *weights =
        reinterpret_cast<const uint32_t *>(scores + (used ? quad : 0) * SCORE_STRIDE) + lane % 4;
#pragma unroll
    for (int key = 0; key < values_at_once<S, D>; key += 16) {
        uint32_t a[4];
        load_values<S, D>(a, values, key);
        uint32_t low = weights[(first + key) / 2], high = weights[(first + key) / 2 + 4];
        uint32_t b[2] = {used ? low : 0, used ? high : 0};
        mma_16816(sum[key / 16 % 2], a, b, KV());
    }
}

// Chunks whose weights are in shared memory at once.
const int JOINED = 512;

// Joins the chunks of the heads of a block: out = sum(weight * partial) / sum(weight * sum), where
// a chunk weighs 2^(its largest score - the largest of all), and the sink joins the sum below.
template <int D, int G>
__device__ __forceinline__ void join(char *shared, bf16 *out, const float *partial,
                                     const float2 *stats, const float *sinks, int first_head,
                                     int heads, int used) {
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
        if (lane == 0) {
            largest[head] = most;
            total[head] = all + exp2_fast(load_sink(sinks, first_head + head) - most);
        }
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
                                             int kv_heads, int block_len, const Curve &curve,
                                             const DecodeBlock &b) {
    const int THREADS = 2 * D, WARPS = D / 16, AT_ONCE = values_at_once<S, D>;
    S *values = reinterpret_cast<S *>(shared);                  // [AT_ONCE][D], stored_at
    int *slots = reinterpret_cast<int *>(values + AT_ONCE * D); // [CHUNK], -1: not seen
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
    for (int i = 0; i < (CHUNK + THREADS - 1) / THREADS; i++) {
        int key = i * THREADS + thread;
        if (CHUNK < THREADS && key >= CHUNK) break;
        int position = blockIdx.x * CHUNK + key;
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

    const S *v_head = layer.v + b.kv_head * D;
    copy_values<S, D>(values, v_head, slots, 0, kv_heads);
    const bf16 *q_head = q + (static_cast<long long>(row) * n_heads + b.head) * D;
    decode_scores<S, D, G>(scores, slots, scales, q_head, layer.k + b.kv_head * D, b.heads,
                           kv_heads);
    __syncthreads();
    for (int head = warp; head < b.heads; head += WARPS) {
        float *of_head = scores + head * SCORE_STRIDE;
        float2 stat = decode_softmax<S>(of_head, scales + CHUNK, b.first, b.end, curve);
        if (lane == 0) stats[place + static_cast<long long>(head) * gridDim.x] = stat;
    }
    float sum[2][4] = {};
#pragma unroll
    for (int first = 0; first < CHUNK; first += AT_ONCE) {
        cp_async_wait<0>();
        __syncthreads();
        add_values<S, D>(sum, values, scores, first, b.heads);
        if (first + AT_ONCE == CHUNK) break;
        __syncthreads();
        copy_values<S, D>(values, v_head, slots, first + AT_ONCE, kv_heads);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int head = lane % 4 * 2 + i % 2;
        int dim = warp * 16 + number_of_row<S>(i / 2 * 8 + lane / 4);
        if (head < b.heads)
            partial[(place + static_cast<long long>(head) * gridDim.x) * D + dim] =
                sum[0][i] + sum[1][i];
    }
}

template <typename S, int D, int G>
__device__ __forceinline__ void decode(bf16 *out, float *partial, float2 *stats, int *ended,
                                       const bf16 *q, const Layer<S> &layer,
                                       const int *item_row, const int *item_table,
                                       const int *item_context, const int *tables,
                                       const float *sinks, int n_heads, int kv_heads,
                                       int block_len, const Curve &curve, int window) {
    DYNAMIC_SHARED(char, shared);
    int item = blockIdx.z, context = item_context[item], row = item_row[item];
    DecodeBlock b = decode_block<G>(context, n_heads, kv_heads, window);
    long long place = (static_cast<long long>(item) * n_heads + b.head) * gridDim.x;
    stats += place, partial += place * D;
    decode_chunk<S, D, G>(shared, partial, stats, q, layer, row, item_table[item], tables, n_heads,
                          kv_heads, block_len, curve, b);
    if (context == 0 || !is_last(ended + item * gridDim.y + blockIdx.y)) return;
    out += (static_cast<long long>(row) * n_heads + b.head) * D;
    int used = (context + CHUNK - 1) / CHUNK;
    join<D, G>(shared, out, partial, stats, sinks, b.head, b.heads, used);
}

} // namespace

#define DECODE(NAME, S, D, G, BLOCKS)                                                              \
    extern "C" __global__ void __launch_bounds__(2 * D, BLOCKS)                                    \
        attention_decode_##NAME##_d##D##_g##G(                                                     \
            bf16 *out, float *partial, float2 *stats, int *ended, const bf16 *q, const S *k,       \
            const S *v, const float *k_scales, const float *v_scales, const int *item_row,         \
            const int *item_table, const int *item_context, const int *tables, const float *sinks, \
            int n_heads, int kv_heads, int block_len, float scale, float softcap, int window) {    \
        grid_begin();                                                                              \
        Layer<S> layer = {k, v, k_scales, v_scales};                                               \
        decode<S, D, G>(out, partial, stats, ended, q, layer, item_row, item_table, item_context,  \
                        tables, sinks, n_heads, kv_heads, block_len, Curve(scale, softcap),        \
                        window);                                                                   \
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
DECODE_GROUPS(bf16, bf16, 256, 1)
DECODE_GROUPS(f16, __half, 256, 1)
DECODE_GROUPS(e4m3, e4m3, 256, 1)
DECODE_GROUPS(q8, q8, 256, 1)
