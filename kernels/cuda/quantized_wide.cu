// y = x W^T + bias for 9 to 32 rows of x and weights in the GGML block formats, on the tensor
// cores: what a decode step of many sequences does. Every byte of W is read and decoded once.
//
// linear_FORMAT_wX, X in 16, 32: up to X rows of x [m][k] in bf16, up to three matrices of one
//   format (see outputs.cuh). W is [n][k] by rows, k a multiple of the block. x and the matrices
//   begin at 16 bytes, and the last 16 bytes that a matrix begins are all readable, as they are in
//   device memory. Weights are multiplied as bf16, sums are f32.
//   A block of 128 r threads, r in 1 to 4, has 32 r rows of one matrix; `splits` blocks share k:
//   grid (B, splits), B the sum of n_i / (32 r), each rounded up; block 128 r; dynamic shared
//   memory 3 (32 r SLOT + 512 X) + 4096 r bytes, SLOT: 96 for q2_k; 160 for q3_k, q4_0, q4_k,
//   iq4_nl, iq4_xs and mxfp4; 224 for q4_1, q5_0, q5_1, q5_k and q6_k; 288 for q8_0.
//   If splits > 1, `parts` takes [splits][m][B 32 r] sums in f32, which linear_sum
//   (quantized_tall.cu) adds up to the outputs; else it may be null.
//   The bits of an output depend on its row of x, its row of W, k and `splits` alone: not on m, X,
//   r or what else is in the launch.
//
// A block goes through k in steps of 256. The bytes of W and the elements of x for the next two
// steps are on their way into shared memory by asynchronous copies while one is multiplied; the
// first ones of W are sent for before x is there. Of a
// step a warp has two pieces (quant.cuh) of each of 32 rows of W, so four warps share k; they add
// their sums at the end, always in the same order. 16 rows of W are the rows of an mma, 8 rows of x
// its columns. The order in which an mma takes the elements of k is free as long as both sides
// agree: a lane decodes half a piece, 8 weights in a row of each group, and the 16 bytes of x that
// belong to them are its operands of two mmas as they lie.
#include "tensor_blocks.cuh"

// Warps that share the elements of k in a step, steps that are there or on their way.
constexpr int K_WARPS = 4;
constexpr int STAGES = 3;
// Rows of W of a warp: four for each lane, eight apart.
constexpr int WARP_ROWS = 32;
constexpr int LANE_ROWS = 4;
constexpr int X_ROW_BYTES = 2 * STEP;
// Room for the scales of a warp's rows in a step.
constexpr int SCALE_BYTES = 2 * 16 * WARP_ROWS;

// What a lane takes of a row in a step: half of each group of a piece.
struct Codes {
    uint32_t words[2][2];
};

// How a lane reads its part of a block in shared memory. `at` is `offset` after the multiple of 16
// that is `odd` bytes before the block. Here as any piece, of which half is dropped.
template <typename F> struct Reader {
    static __device__ __forceinline__ int offset(int, bool) { return 0; }
    static __device__ __forceinline__ Codes codes(const uint8_t *at, int odd, int part,
                                                  bool second) {
        Piece piece;
        F::read(at + odd, part, piece);
        Codes codes;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t low = piece.codes[group][i], high = piece.codes[group][2 + i];
                codes.words[group][i] = second ? high : low;
            }
        }
        return codes;
    }
};

// 8 bytes from a multiple of 8; from a multiple of 4; from `odd` bytes after a multiple of 4.
__device__ __forceinline__ uint2 pair8(const uint8_t *at) {
    return *reinterpret_cast<const uint2 *>(at);
}
__device__ __forceinline__ uint2 pair4(const uint8_t *at) {
    const uint32_t *words = reinterpret_cast<const uint32_t *>(at);
    return make_uint2(words[0], words[1]);
}
__device__ __forceinline__ uint2 pair1(const uint8_t *at, int odd) {
    const uint32_t *words = reinterpret_cast<const uint32_t *>(at + (odd & ~3));
    int bits = 8 * (odd & 3);
    return make_uint2(__funnelshift_r(words[0], words[1], bits),
                      __funnelshift_r(words[1], words[2], bits));
}

// Low nibbles are of one group, high nibbles of the other.
__device__ __forceinline__ Codes nibbles_of(uint2 words) {
    const uint32_t low = 0x0f0f0f0fu;
    return {{{words.x & low, words.y & low}, {words.x >> 4 & low, words.y >> 4 & low}}};
}

template <> struct Reader<Q4_0> {
    static __device__ __forceinline__ int offset(int, bool second) { return 8 * second; }
    static __device__ __forceinline__ Codes codes(const uint8_t *at, int odd, int, bool) {
        return nibbles_of(pair1(at, odd + 2));
    }
};

template <> struct Reader<Q4_1> {
    static __device__ __forceinline__ int offset(int, bool second) { return 4 + 8 * second; }
    static __device__ __forceinline__ Codes codes(const uint8_t *at, int odd, int, bool) {
        return nibbles_of(pair4(at + odd));
    }
};

template <> struct Reader<Q8_0> {
    static __device__ __forceinline__ int offset(int, bool second) { return 8 * second; }
    static __device__ __forceinline__ Codes codes(const uint8_t *at, int odd, int, bool) {
        uint2 a = pair1(at, odd + 2), b = pair1(at + 16, odd + 2);
        return {{{a.x, a.y}, {b.x, b.y}}};
    }
};

template <> struct Reader<Q4_K> {
    static __device__ __forceinline__ int offset(int part, bool second) {
        return 16 + 16 * part + 8 * second;
    }
    static __device__ __forceinline__ Codes codes(const uint8_t *at, int, int, bool) {
        return nibbles_of(pair8(at));
    }
};

template <> struct Reader<Q5_K> {
    static __device__ __forceinline__ int offset(int part, bool second) {
        return 16 + 16 * (part % 2) + 8 * second;
    }
    static __device__ __forceinline__ Codes codes(const uint8_t *at, int, int part, bool) {
        int run = part / 2;
        uint2 fifths = pair8(at);
        Codes codes = nibbles_of(pair8(at + 32 + 32 * run));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t bits = (i ? fifths.y : fifths.x) >> (2 * run);
            codes.words[0][i] |= bits << 4 & 0x10101010u;
            codes.words[1][i] |= bits << 3 & 0x10101010u;
        }
        return codes;
    }
};

template <> struct Reader<Q6_K> {
    static __device__ __forceinline__ int offset(int part, bool second) {
        return 16 * (part % 2) + 8 * second;
    }
    static __device__ __forceinline__ Codes codes(const uint8_t *at, int odd, int part, bool) {
        Codes codes = nibbles_of(pair1(at + part / 2 * 32, odd));
        uint2 high = pair1(at + 128 + part / 4 * 32, odd);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t bits = (i ? high.y : high.x) >> (part / 2 % 2 * 2);
            codes.words[0][i] |= bits << 4 & 0x30303030u;
            codes.words[1][i] |= bits & 0x30303030u;
        }
        return codes;
    }
};

template <typename F, int X> struct WideProduct {
    using Bytes = StepBytes<F>;
    static constexpr int PARTS = Bytes::PARTS;
    // The room of a row: 32 bytes more than a multiple of 64, for banks that differ.
    static constexpr int SLOT = (16 * Bytes::COPIES + 31) / 64 * 64 + 32;
    // A stage is x and then W.
    static constexpr int X_BYTES = X * X_ROW_BYTES;
    static constexpr int X_TILES = X / 8;
    // Tiles of x that are multiplied in turn, so that no mma waits for the one before it.
    static constexpr int TURN = X_TILES == 4 ? 4 : 2;

    int lane, k_warp, first_row, rows;
    uint8_t *shared;
    int stage_bytes;
    // Copies: four threads have a row of W, and a thread 8 elements of x of every so many rows; what
    // is left of the rows from there on.
    RowCopies<F, 4> w_copies;
    const uint8_t *x_source;
    int w_to, x_left, x_rows, x_to, x_pitch;
    // Products: the piece that this lane decodes a half of, and where it finds its operands.
    int part, w_at, w_odd, odd_rows, x_at[2];
    bool second;
    // Row `lane`, whose scales this lane reads, and scales of all.
    int scale_at, scale_odd, put_at, get_at;

    // Where 8 elements of x lie in their row, so that lanes that read at once meet all banks.
    static __device__ __forceinline__ int spread(int row, int eight) {
        return 16 * (eight ^ (row % 2 * 6));
    }
    __device__ __forceinline__ void begin_copies(const bf16 *x, int m, int k, int first,
                                                 int block_row, const Matrices &matrix) {
        int thread = threadIdx.x, warp = thread / 32, warps = blockDim.x / 32, fourth = thread % 4;
        int row_bytes = k / F::WEIGHTS * F::BYTES;
        w_copies.begin(matrix.row(block_row + thread / 4, row_bytes), row_bytes, first);
        w_to = kept(X_BYTES + thread / 4 * SLOT + 16 * fourth);
        int at = first * STEP + 8 * lane;
        x_source = reinterpret_cast<const uint8_t *>(x + static_cast<long long>(warp) * k + at);
        x_left = k - at;
        x_rows = of_first_lane((m - warp + warps - 1) / warps);
        x_pitch = kept(2 * warps * k);
        x_to = kept(warp * X_ROW_BYTES + spread(warp, lane));
    }

    __device__ __forceinline__ void begin_products(int k) {
        int row_bytes = k / F::WEIGHTS * F::BYTES, g = lane / 4, fourth = lane % 4;
        part = kept(2 * k_warp + fourth / 2);
        second = fourth % 2;
        w_at = X_BYTES + (first_row + g) * SLOT + Reader<F>::offset(part % PARTS, second);
        w_at = kept(w_at);
        // Matrices begin at 16 bytes; so does every eighth row, and with odd rows every sixteenth.
        w_odd = kept(g * row_bytes & 15);
        odd_rows = Bytes::UNIT == 1 ? 8 * row_bytes & 15 : 0;
        int first = (part / PARTS * F::WEIGHTS + F::start(part % PARTS)) / 8 + second;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            int at = g * X_ROW_BYTES + spread(g, first + group * F::NEXT / 8);
            x_at[group] = kept(at);
        }
        scale_at = kept(X_BYTES + (first_row + lane) * SLOT);
        scale_odd = kept(lane * row_bytes & 15);
        int scales = STAGES * stage_bytes + static_cast<int>(threadIdx.x / 32) * SCALE_BYTES;
        put_at = kept(scales + 16 * lane);
        get_at = kept(scales + 16 * (g + (ONE_PAIR<F> ? 0 : fourth / 2 * WARP_ROWS)));
    }

    // Sends for the bytes of W in the next step.
    __device__ __forceinline__ void fetch_w(uint8_t *stage) { w_copies.fetch(stage + w_to); }

    // The same for x; what is beyond k becomes zeros.
    __device__ __forceinline__ void fetch_x(uint8_t *stage) {
        const uint8_t *from = x_source;
        uint8_t *to = stage + x_to;
        for (int row = 0; row < x_rows; ++row) {
            cp_async16(to, from, x_left > 0);
            from += x_pitch;
            to += blockDim.x / 32 * X_ROW_BYTES;
        }
        x_source += 2 * STEP;
        x_left -= STEP;
    }

    __device__ __forceinline__ void fetch(uint8_t *stage, bool valid) {
        if (valid) {
            fetch_w(stage);
            fetch_x(stage);
        }
        cp_async_commit();
    }

    // Rows of x that there are not are zeros.
    __device__ __forceinline__ void clear_x(int m) {
        for (int stage = 0; stage < STAGES; ++stage) {
            uint4 *all = reinterpret_cast<uint4 *>(shared + stage * stage_bytes);
            for (int i = m * X_ROW_BYTES / 16 + threadIdx.x; i < X_BYTES / 16; i += blockDim.x) {
                all[i] = make_uint4(0, 0, 0, 0);
            }
        }
    }

    // Scales of the two pieces of row `lane`.
    __device__ __forceinline__ void put_scales(const uint8_t *stage, int step, int left) const {
        const uint8_t *row = stage + scale_at + Bytes::odd(scale_odd, step);
        float4 *put = reinterpret_cast<float4 *>(shared + put_at);
#pragma unroll
        for (int i = 0; i < (ONE_PAIR<F> ? 1 : 2); ++i) {
            put[i * WARP_ROWS] = Bytes::scales(row, 2 * k_warp + i, left);
        }
        __syncwarp();
    }

    __device__ __forceinline__ void take(const uint8_t *stage, int step, int left,
                                         float (&sum)[2][X_TILES][4]) const {
        put_scales(stage, step, left);
        const float4 *scales = reinterpret_cast<const float4 *>(shared + get_at);
        Codes codes[LANE_ROWS];
        float4 scale[LANE_ROWS];
#pragma unroll
        for (int row = 0; row < LANE_ROWS; ++row) {
            int odd_at = Bytes::odd(w_odd + odd_rows * row, step) + Bytes::block_of(part);
            const uint8_t *at = stage + w_at + 8 * row * SLOT;
            codes[row] = Reader<F>::codes(at, odd_at, part % PARTS, second);
            scale[row] = scales[8 * row];
        }
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            uint32_t a[2][2][4];
#pragma unroll
            for (int row = 0; row < LANE_ROWS; ++row) {
                float times = group ? scale[row].z : scale[row].x;
                float rest = group ? scale[row].w : scale[row].y;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t pairs[2];
                    weights_of<F>(codes[row].words[group][half], times, rest, pairs);
                    a[row / 2][half][row % 2] = pairs[0], a[row / 2][half][row % 2 + 2] = pairs[1];
                }
            }
            multiply(stage + x_at[group], a, sum);
        }
    }

    // 32 rows of W times all rows of x, for the 32 elements of k of one group.
    static __device__ __forceinline__ void multiply(const uint8_t *x, const uint32_t (&a)[2][2][4],
                                                    float (&sum)[2][X_TILES][4]) {
#pragma unroll
        for (int tile = 0; tile < X_TILES; tile += TURN) {
            uint4 v[TURN];
#pragma unroll
            for (int i = 0; i < TURN; ++i) {
                v[i] = *reinterpret_cast<const uint4 *>(x + 8 * (tile + i) * X_ROW_BYTES);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < TURN; ++i) {
                    uint32_t b[2] = {half ? v[i].z : v[i].x, half ? v[i].w : v[i].y};
                    mma_16816(sum[0][tile + i], a[0][half], b, bf16());
                    mma_16816(sum[1][tile + i], a[1][half], b, bf16());
                }
            }
        }
    }

    // Puts the sums of this warp where the others of the block find them.
    __device__ __forceinline__ void share(const BlockSums<K_WARPS, X> &all,
                                          const float (&sum)[2][X_TILES][4]) const {
#pragma unroll
        for (int tile = 0; tile < X_TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                int input = 8 * tile + 2 * (lane % 4) + i % 2;
                int row = first_row + 8 * (i / 2) + lane / 4;
                all.at(k_warp, input, row) = sum[i / 4][tile][i % 4];
            }
        }
        __syncthreads();
    }

    // Multiplies steps first.. of k.
    __device__ __forceinline__ void multiply_steps(int first, int steps, int k,
                                                   float (&sum)[2][X_TILES][4]) {
        uint8_t *full = shared, *last = shared + (STAGES - 1) * stage_bytes, *empty = last;
        // Weights are on their way before x is there.
        if (steps > 0) fetch_w(full);
        if (steps > 1) fetch_w(full + stage_bytes);
        grid_wait();
        if (steps > 0) fetch_x(full);
        cp_async_commit();
        if (steps > 1) fetch_x(full + stage_bytes);
        cp_async_commit();
        for (int step = first; steps > 0; ++step, --steps) {
            cp_async_wait<STAGES - 2>();
            // All warps are done with what was in the stage to fill.
            __syncthreads();
            fetch(empty, steps > STAGES - 1);
            take(full, step, k - step * STEP, sum);
            empty = full;
            full = full == last ? shared : full + stage_bytes;
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    __device__ __forceinline__ void run(const bf16 *x, int m, int k, float *parts, int block_row, const Matrices &matrix) {
        int warp = of_first_lane(threadIdx.x / 32);
        lane = threadIdx.x % 32, k_warp = warp % K_WARPS, first_row = warp / K_WARPS * WARP_ROWS;
        rows = blockDim.x / K_WARPS;
        stage_bytes = X_BYTES + rows * SLOT;
        int splits = gridDim.y, all_steps = (k + STEP - 1) / STEP;
        int steps = (all_steps + splits - 1) / splits, first = blockIdx.y * steps;
        begin_copies(x, m, k, first, block_row, matrix);
        begin_products(k);
        clear_x(m);
        float sum[2][X_TILES][4] = {};
        multiply_steps(first, min(steps, all_steps - first), k, sum);
        BlockSums<K_WARPS, X> all = {reinterpret_cast<float *>(shared), rows, 0, m};
        share(all, sum);
        all.finish(matrix, block_row, parts);
    }
};

template <typename F, int X>
__device__ __forceinline__ void linear_wide(const bf16 *x, int m, int k, float *parts,
                                            const Matrices &matrices) {
    DYNAMIC_SHARED(uint8_t, shared);
    WideProduct<F, X> product;
    product.shared = shared;
    int rows = blockDim.x / K_WARPS, block = blockIdx.x;
    Matrices matrix = matrix_of(matrices, rows, block);
    product.run(x, m, k, parts, block * rows, matrix);
}

#define LINEAR_WIDE(NAME, FORMAT, X)                                                              \
    extern "C" __global__ void __launch_bounds__(512, 1)                                          \
        linear_##NAME##_w##X(const bf16 *x, int m, int k, float *parts,                           \
                             MATRICES_ARGUMENTS) {                                                \
        grid_go();                                                                                \
        linear_wide<FORMAT, X>(x, m, k, parts, MATRICES);                                         \
    }
#define LINEAR(NAME, FORMAT)                                                                      \
    LINEAR_WIDE(NAME, FORMAT, 16)                                                                 \
    LINEAR_WIDE(NAME, FORMAT, 32)
LINEAR(q4_0, Q4_0)
LINEAR(q4_1, Q4_1)
LINEAR(q5_0, Q5_0)
LINEAR(q5_1, Q5_1)
LINEAR(q8_0, Q8_0)
LINEAR(q2_k, Q2_K)
LINEAR(q3_k, Q3_K)
LINEAR(q4_k, Q4_K)
LINEAR(q5_k, Q5_K)
LINEAR(q6_k, Q6_K)
LINEAR(iq4_nl, IQ4_NL)
LINEAR(iq4_xs, IQ4_XS)
LINEAR(mxfp4, MXFP4)
