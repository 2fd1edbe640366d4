// y = x W^T + bias for 9 to 64 rows of x and weights in the GGML block formats, on the tensor
// cores: what a decode step of many sequences does. Every byte of W is read and decoded once.
//
// linear_FORMAT_wX, X in 16, 32, 64: up to X rows of x [m][k] in bf16, up to three matrices of one
//   format (see outputs.cuh). W is [n][k] by rows, k a multiple of the block. x and the matrices
//   begin at 16 bytes, and the last 16 bytes that a matrix begins are all readable, as they are in
//   device memory. Weights are multiplied as bf16, sums are f32. The bits of an output depend on
//   its row of x, its row of W and k alone: not on m, X or the size of the block.
//   A block of 128 r threads, r in 1, 2, 4, has 32 r rows of W:
//   grid (n0 + n1 + n2) / (32 r), rounded up; block 128 r; dynamic shared memory
//   3 (32 r SLOT + 512 X) + 4096 r bytes, SLOT: 96 for q2_k; 160 for q3_k, q4_0, q4_k, iq4_nl,
//   iq4_xs and mxfp4; 224 for q4_1, q5_0, q5_1, q5_k and q6_k; 288 for q8_0.
//
// A block goes through k in steps of 256. The bytes of W and the elements of x for the next two
// steps are on their way into shared memory by asynchronous copies while one is multiplied. Of a
// step a warp has two pieces (quant.cuh) of each of 32 rows of W, so four warps share k; they add
// their sums at the end, always in the same order. 16 rows of W are the rows of an mma, 8 rows of x
// its columns. The order in which an mma takes the elements of k is free as long as both sides
// agree: a lane decodes half a piece, 8 weights in a row of each group, and the 16 bytes of x that
// belong to them are its operands of two mmas as they lie.
//
// A code becomes a number by putting its bits into the mantissa of a power of two; the product with
// the scale then takes that power away again (W. Kahan's and others' old trick for conversions).
#include "outputs.cuh"
#include "quant.cuh"

// Elements of k in a step, warps that share them, steps that are there or on their way.
constexpr int STEP = 256;
constexpr int K_WARPS = 4;
constexpr int STAGES = 3;
// Rows of W of a warp: four for each lane, eight apart.
constexpr int WARP_ROWS = 32;
constexpr int LANE_ROWS = 4;
constexpr int X_ROW_BYTES = 2 * STEP;

// What a lane takes of a row in a step: half of each group of a piece.
struct Codes {
    uint32_t words[2][2];
};

// How a lane reads its part of a block. For most formats: as any piece, of which half is dropped.
template <typename F> struct Reader {
    // Whether the two pieces of a warp have scales of their own.
    static constexpr bool TWO_SCALES = true;

    static __device__ __forceinline__ Codes codes(const uint8_t *block, int part, bool second) {
        Piece piece;
        F::read(block, part, piece);
        Codes codes;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            codes.words[group][0] = piece.codes[group][second ? 2 : 0];
            codes.words[group][1] = piece.codes[group][second ? 3 : 1];
        }
        return codes;
    }
};

// Formats whose codes are signed bytes; codes of the others are below 128.
template <typename F> struct Signed {
    static constexpr bool value = false;
};
template <> struct Signed<Q8_0> {
    static constexpr bool value = true;
};
template <> struct Signed<IQ4_NL> {
    static constexpr bool value = true;
};
template <> struct Signed<IQ4_XS> {
    static constexpr bool value = true;
};
template <> struct Signed<MXFP4> {
    static constexpr bool value = true;
};

// Eight codes to four pairs of weights. Unsigned: `bias` takes the power of two away.
template <typename F>
__device__ __forceinline__ void weights_of(const uint32_t (&words)[2], float scale, float bias,
                                           uint32_t (&pairs)[4]) {
    float w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (Signed<F>::value) {
            // 32768 + (code + 128).
            uint32_t word = words[i / 4] ^ 0x80808080u;
            uint32_t bits = __byte_perm(word, 0x47000000u, 0x7404u | (i % 4) << 4);
            w[i] = __fmul_rn(__uint_as_float(bits) - 32896.0f, scale);
        } else {
            // 128 + code.
            uint32_t bits = __byte_perm(words[i / 4], 0x43000000u, 0x7044u | (i % 4) << 8);
            w[i] = fmaf(__uint_as_float(bits), scale, bias);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        union {
            __nv_bfloat162 pair;
            uint32_t bits;
        } both;
        both.pair = __floats2bfloat162_rn(w[2 * i], w[2 * i + 1]);
        pairs[i] = both.bits;
    }
}

template <typename F, int X> struct WideProduct {
    static constexpr int PARTS = F::WEIGHTS / 32;
    static constexpr int STEP_BYTES = STEP / F::WEIGHTS * F::BYTES;
    // Blocks begin at a multiple of this, so far after a multiple of 16 at most.
    static constexpr int UNIT = F::BYTES % 16 == 0 ? 16 : F::BYTES & -F::BYTES;
    static constexpr int COPIES = (STEP_BYTES + 16 - UNIT + 15) / 16;
    // The room of a row: 32 bytes more than a multiple of 64, for banks that differ.
    static constexpr int SLOT = (16 * COPIES + 31) / 64 * 64 + 32;
    static constexpr int X_TILES = X / 8;
    // Tiles of x that are multiplied in turn, so that no mma waits for the one before it.
    static constexpr int TURN = X_TILES < 4 ? X_TILES : 4;

    int lane, warp, row_warps, k, m;
    uint8_t *shared;
    // Where this thread's copies of W come from: every fourth 16 bytes of a row.
    const uint8_t *source;
    int left;
    const bf16 *x;
    // Low bits of where this lane's rows begin.
    int begin[LANE_ROWS], scale_begin;

    __device__ __forceinline__ int k_warp() const { return warp % K_WARPS; }
    __device__ __forceinline__ int first_row() const { return warp / K_WARPS * WARP_ROWS; }
    __device__ __forceinline__ int rows() const { return WARP_ROWS * row_warps; }
    __device__ __forceinline__ int stage_bytes() const { return rows() * SLOT + X * X_ROW_BYTES; }
    __device__ __forceinline__ uint8_t *w_stage(int stage) const {
        return shared + stage * stage_bytes();
    }
    __device__ __forceinline__ uint8_t *x_stage(int stage) const {
        return w_stage(stage) + rows() * SLOT;
    }
    __device__ __forceinline__ float4 *scales() const {
        return reinterpret_cast<float4 *>(w_stage(STAGES)) + warp * 2 * WARP_ROWS;
    }

    // How far a row that begins at `from` is after a multiple of 16 in a step.
    static __device__ __forceinline__ int odd(int from, int step) {
        if (UNIT == 16) return 0;
        return STEP_BYTES % 16 == 0 ? from : (from + step * STEP_BYTES) & 15;
    }

    __device__ __forceinline__ void start(const Matrices &matrices, int block_row) {
        long long row_bytes = static_cast<long long>(k / F::WEIGHTS) * F::BYTES;
        auto low = [&](int row) {
            const uint8_t *at = matrices.row(block_row + row, row_bytes);
            return static_cast<int>(reinterpret_cast<uintptr_t>(at) & 15);
        };
        source = matrices.row(block_row + threadIdx.x / 4, row_bytes);
        left = static_cast<int>(row_bytes);
#pragma unroll
        for (int row = 0; row < LANE_ROWS; ++row) {
            begin[row] = low(first_row() + 8 * row + lane / 4);
        }
        scale_begin = low(first_row() + lane);
    }

    // Sends for the bytes of W in the next step.
    __device__ __forceinline__ void fetch_w(int stage) {
        int before = 0;
        if (UNIT < 16) before = static_cast<int>(reinterpret_cast<uintptr_t>(source) & 15);
        int first = threadIdx.x % 4;
        uint8_t *to = w_stage(stage) + threadIdx.x / 4 * SLOT + 16 * first;
        const uint8_t *from = source - before + 16 * first;
        int end = left + before - 16 * first;
#pragma unroll
        for (int copy = 0; copy < COPIES; copy += 4) {
            bool inside = copy + 4 <= COPIES || first < COPIES - copy;
            if (inside && 16 * copy < end) cp_async16(to + 16 * copy, from + 16 * copy, true);
        }
        source += STEP_BYTES;
        left -= STEP_BYTES;
    }

    // The same for x: a lane has 8 elements of every so many rows; those beyond m or k are zeros.
    __device__ __forceinline__ void fetch_x(int stage, int step) {
        int at = step * STEP + 8 * lane, warps = row_warps * K_WARPS;
        uint8_t *to = x_stage(stage);
        for (int row = warp; row < X; row += warps) {
            bool valid = at < k && row < m;
            const bf16 *from = x + (valid ? static_cast<long long>(row) * k + at : 0);
            cp_async16(to + row * X_ROW_BYTES + 16 * swizzled(row, lane), from, valid);
        }
    }

    __device__ __forceinline__ void fetch(int stage, int step) {
        if (step * STEP < k) {
            fetch_w(stage);
            fetch_x(stage, step);
        }
        cp_async_commit();
    }

    // Where 8 elements of x lie in their row, so that lanes that read at once meet all banks.
    static __device__ __forceinline__ int swizzled(int row, int eight) {
        return eight ^ (row % 2 * 6);
    }

    // Scales of the two pieces of row `lane`, each with what remains to be added to a product;
    // zeros beyond k.
    __device__ __forceinline__ void put_scales(const uint8_t *w, int step) const {
        const uint8_t *row = w + (first_row() + lane) * SLOT + odd(scale_begin, step);
#pragma unroll
        for (int i = 0; i < (Reader<F>::TWO_SCALES ? 2 : 1); ++i) {
            int part = 2 * k_warp() + i;
            float4 scale = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (step * STEP + part / PARTS * F::WEIGHTS < k) {
                Piece piece;
                F::read(row + part / PARTS * F::BYTES, part % PARTS, piece);
                float a = piece.scale[0], b = piece.scale[1];
                const float away = -128.0f - F::OFFSET;
                scale = make_float4(a, fmaf(a, away, -piece.least[0]),  //
                                    b, fmaf(b, away, -piece.least[1]));
            }
            scales()[i * WARP_ROWS + lane] = scale;
        }
        __syncwarp();
    }

    __device__ __forceinline__ void take(int stage, int step, float (&sum)[2][X_TILES][4]) const {
        const uint8_t *w = w_stage(stage);
        put_scales(w, step);
        int third = lane % 4, part = 2 * k_warp() + third / 2, g = lane / 4;
        Codes codes[LANE_ROWS];
        float4 scale[LANE_ROWS];
#pragma unroll
        for (int row = 0; row < LANE_ROWS; ++row) {
            const uint8_t *at = w + (first_row() + 8 * row + g) * SLOT + odd(begin[row], step);
            codes[row] = Reader<F>::codes(at + part / PARTS * F::BYTES, part % PARTS, third % 2);
            int piece = Reader<F>::TWO_SCALES ? third / 2 : 0;
            scale[row] = scales()[piece * WARP_ROWS + 8 * row + g];
        }
        int first = (part / PARTS * F::WEIGHTS + F::start(part % PARTS)) / 8 + third % 2;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            uint32_t a[2][2][4];
#pragma unroll
            for (int row = 0; row < LANE_ROWS; ++row) {
                float times = group ? scale[row].z : scale[row].x;
                float plus = group ? scale[row].w : scale[row].y;
                uint32_t pairs[4];
                weights_of<F>(codes[row].words[group], times, plus, pairs);
#pragma unroll
                for (int i = 0; i < 4; ++i) a[row / 2][i / 2][row % 2 + i % 2 * 2] = pairs[i];
            }
            int eight = swizzled(g, first + group * F::NEXT / 8);
            multiply(x_stage(stage) + g * X_ROW_BYTES + 16 * eight, a, sum);
        }
    }

    // 32 rows of W times all rows of x, for the 32 elements of k of one group.
    static __device__ __forceinline__ void multiply(const uint8_t *from,
                                                    const uint32_t (&a)[2][2][4],
                                                    float (&sum)[2][X_TILES][4]) {
#pragma unroll
        for (int tile = 0; tile < X_TILES; tile += TURN) {
            uint4 v[TURN];
#pragma unroll
            for (int i = 0; i < TURN; ++i) {
                v[i] = *reinterpret_cast<const uint4 *>(from + 8 * (tile + i) * X_ROW_BYTES);
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

    // Adds the sums of the warps that shared k, and stores.
    __device__ __forceinline__ void finish(const float (&sum)[2][X_TILES][4], int block_row,
                                           const Matrices &matrices) const {
        float *part = reinterpret_cast<float *>(shared);
        // Four more than a multiple of 32, again for the banks.
        int stride = rows() + 4;
#pragma unroll
        for (int tile = 0; tile < X_TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                int input = 8 * tile + 2 * (lane % 4) + i % 2;
                int row = first_row() + 8 * (i / 2) + lane / 4;
                part[(k_warp() * X + input) * stride + row] = sum[i / 4][tile][i % 4];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rows() * m; i += blockDim.x) {
            int row = i % rows(), input = i / rows();
            float total = 0.0f;
#pragma unroll
            for (int other = 0; other < K_WARPS; ++other) {
                total += part[(other * X + input) * stride + row];
            }
            if (block_row + row < matrices.rows()) {
                matrices.store(input, block_row + row, total);
            }
        }
    }

    __device__ __forceinline__ void run(const Matrices &matrices) {
        int block_row = blockIdx.x * rows();
        start(matrices, block_row);
        float sum[2][X_TILES][4] = {};
        fetch(0, 0);
        fetch(1, 1);
        int full = 0, empty = STAGES - 1;
        for (int step = 0; step * STEP < k; ++step) {
            cp_async_wait<STAGES - 2>();
            // All warps are done with what was in the stage to fill.
            __syncthreads();
            fetch(empty, step + STAGES - 1);
            take(full, step, sum);
            empty = full;
            full = full + 1 < STAGES ? full + 1 : 0;
        }
        cp_async_wait<0>();
        __syncthreads();
        finish(sum, block_row, matrices);
    }
};

template <typename F, int X>
__device__ __forceinline__ void linear_wide(const bf16 *x, int m, int k, const Matrices &matrices) {
    DYNAMIC_SHARED(uint8_t, shared);
    WideProduct<F, X> product;
    product.lane = threadIdx.x % 32, product.warp = threadIdx.x / 32;
    product.row_warps = blockDim.x / (32 * K_WARPS);
    product.k = k, product.m = m, product.x = x, product.shared = shared;
    product.run(matrices);
}

#define LINEAR_WIDE(NAME, FORMAT, X)                                                              \
    extern "C" __global__ void __launch_bounds__(512, 1)                                          \
        linear_##NAME##_w##X(const bf16 *x, int m, int k, MATRICES_ARGUMENTS) {                   \
        linear_wide<FORMAT, X>(x, m, k, MATRICES);                                                \
    }
#define LINEAR(NAME, FORMAT)                                                                      \
    LINEAR_WIDE(NAME, FORMAT, 16)                                                                 \
    LINEAR_WIDE(NAME, FORMAT, 32)                                                                 \
    LINEAR_WIDE(NAME, FORMAT, 64)
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
