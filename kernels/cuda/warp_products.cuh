// Products of weights in the GGML block formats, as they lie in the file, with a few rows of x in
// bytes (quantized.cu): by warps.
//
// A warp has two or four rows of W and takes them 1024 weights at a time, 32 a lane (quant.cuh).
// Blocks of most formats are not aligned to anything wide. So the bytes come by asynchronous copies
// of 16, in order and several turns ahead, and lanes read the parts of their blocks from shared
// memory, where that costs little.
#pragma once

#include "outputs.cuh"
#include "quant.cuh"

constexpr int WARPS = 4;
// Weights of a row that a warp takes in one turn, a piece for each lane.
constexpr int TURN = 1024;
// Turns of rows that are in shared memory or on their way, for each warp.
constexpr int SLOTS = 8;

// The rows of x of a product and where their outputs go: the first m.
struct FirstRows {
    int m;

    __device__ __forceinline__ int count() const { return m; }
    // The last stands for those beyond it.
    __device__ __forceinline__ int row(int i) const { return min(i, m - 1); }
    __device__ __forceinline__ int output(int i) const { return i; }
};

// 16 codes of x for each group of a piece, and scale and sums of the 32 that they belong to.
struct Input {
    uint4 codes[2];
    uint2 scale[2];
};

__device__ __forceinline__ int add_dot16(const uint32_t (&w)[4], const uint4 &x, int sum) {
    sum = __dp4a(static_cast<int>(w[0]), static_cast<int>(x.x), sum);
    sum = __dp4a(static_cast<int>(w[1]), static_cast<int>(x.y), sum);
    sum = __dp4a(static_cast<int>(w[2]), static_cast<int>(x.z), sum);
    return __dp4a(static_cast<int>(w[3]), static_cast<int>(x.w), sum);
}

// Adds up N numbers over the lanes of a warp, each in the order of warp_sum: number i ends in the
// lanes from 32 / N * i on. A step halves the numbers a lane has, so it takes N - 1 exchanges and
// not 5 N.
template <int N, int STEP = 16> __device__ __forceinline__ float sum_each(float (&v)[N], int lane) {
    if constexpr (N == 1) {
        float x = v[0];
#pragma unroll
        for (int other = STEP; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
        return x;
    } else {
        float half[N / 2];
        bool upper = lane & STEP;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            float kept = upper ? v[i + N / 2] : v[i], given = upper ? v[i] : v[i + N / 2];
            half[i] = kept + __shfl_xor_sync(0xffffffffu, given, STEP);
        }
        return sum_each<N / 2, STEP / 2>(half, lane);
    }
}

// ROWS rows of W of one warp against M rows of x, as one lane sees it.
template <typename F, int M, int ROWS, typename X> struct WarpProduct {
    static constexpr int PARTS = F::WEIGHTS / 32;
    static constexpr int TURN_BYTES = TURN / F::WEIGHTS * F::BYTES;
    // Rows of blocks of whole 16 bytes begin at 16 bytes, others anywhere.
    static constexpr bool ALIGNED = F::BYTES % 16 == 0;
    static constexpr int SLOT_BYTES = ALIGNED ? TURN_BYTES : (TURN_BYTES + 30) / 16 * 16;
    // Turns in shared memory, and their bytes.
    static constexpr int TURNS = SLOTS / ROWS;
    static constexpr int STEP = ROWS * SLOT_BYTES;

    X x_rows;
    int lane, k;
    // Where the next copies of this lane come from, and what of the row is left from there on.
    const uint8_t *source[ROWS];
    int left;
    // The part of x that belongs to this lane's piece of the turn.
    const int8_t *codes;
    const uint2 *scales;

    __device__ __forceinline__ void begin(const Matrices &matrices, int first_row,
                                          const int8_t *all_codes, const uint2 *all_scales) {
        int row_bytes = k / F::WEIGHTS * F::BYTES;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            source[row] = matrices.row(first_row + row, row_bytes) + 16 * lane;
        }
        left = row_bytes - 16 * lane;
        int at = lane / PARTS * F::WEIGHTS + F::start(lane % PARTS);
        codes = all_codes + at;
        scales = all_scales + at / 32;
    }

    // How far a row was after a multiple of 16, `turns` turns before its source.
    __device__ __forceinline__ int odd(int row, int turns) const {
        if (ALIGNED) return 0;
        uint32_t low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(source[row]));
        return (low - turns * TURN_BYTES) & 15;
    }

    // Sends for the bytes of the next turn, if there is one.
    __device__ __forceinline__ void fetch(uint8_t *slots) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            int before = odd(row, 0);
            const uint8_t *from = source[row] - before;
            uint8_t *to = slots + row * SLOT_BYTES + 16 * lane;
#pragma unroll
            for (int at = 0; at < SLOT_BYTES; at += 512) {
                bool inside = at + 512 <= SLOT_BYTES || 16 * lane < SLOT_BYTES - at;
                if (inside && at - before < left) cp_async16(to + at, from + at, true);
            }
            source[row] += TURN_BYTES;
        }
        left -= TURN_BYTES;
        cp_async_commit();
    }

    __device__ __forceinline__ Input input(int i) const {
        int row = x_rows.row(i);
        const int8_t *from = codes + static_cast<long long>(row) * k;
        const uint2 *scale = scales + static_cast<long long>(row) * (k / 32);
        Input x;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            x.codes[group] = *reinterpret_cast<const uint4 *>(from + group * F::NEXT);
            x.scale[group] = scale[group * F::NEXT / 32];
        }
        return x;
    }

    __device__ __forceinline__ float add(const Piece &w, const Input &x, float sum) const {
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            int half = (F::start(lane % PARTS) + group * F::NEXT) / 16 % 2;
            int ones = static_cast<int16_t>(x.scale[group].y >> (16 * half));
            int dot = add_dot16(w.codes[group], x.codes[group], 0);
            if (F::OFFSET != 0) dot -= F::OFFSET * ones;
            float product = w.scale[group] * static_cast<float>(dot);
            if (F::HAS_LEAST) product = fmaf(-w.least[group], static_cast<float>(ones), product);
            sum = fmaf(product, __uint_as_float(x.scale[group].x), sum);
        }
        return sum;
    }

    // Multiplies this lane's piece of a turn, once the bytes are there.
    __device__ __forceinline__ void take(const uint8_t *slots, bool valid,
                                         float (&sums)[M * ROWS]) const {
        Input next = {};
        if (valid) next = input(0);
        cp_async_wait<TURNS - 1>();
        __syncwarp();
        if (!valid) return;
        Piece pieces[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const uint8_t *begin = slots + row * SLOT_BYTES + odd(row, TURNS);
            F::read(begin + lane / PARTS * F::BYTES, lane % PARTS, pieces[row]);
        }
#pragma unroll
        for (int i = 0; i < M; ++i) {
            Input x = next;
            if (i + 1 < M) next = input(i + 1);
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                sums[i * ROWS + row] = add(pieces[row], x, sums[i * ROWS + row]);
            }
        }
    }

    // Output i % ROWS of row i / ROWS of x is in the lanes from 32 / (M * ROWS) * i on.
    __device__ __forceinline__ float run(uint8_t *slots) {
        float sums[M * ROWS] = {};
#pragma unroll
        for (int turn = 0; turn + 1 < TURNS; ++turn) fetch(slots + turn * STEP);
        grid_wait(); // weights are on their way before x is there
        uint8_t *full = slots, *empty = slots + (TURNS - 1) * STEP;
        int turn = 0;
        for (int piece = lane; piece - lane < k / 32; piece += 32) {
            // All lanes are done with what was in the slots to fill.
            __syncwarp();
            fetch(empty);
            take(full, piece < k / 32, sums);
            codes += TURN;
            scales += TURN / 32;
            empty = full;
            turn = (turn + 1) % TURNS;
            full += turn == 0 ? -(TURNS - 1) * STEP : STEP;
        }
        return sum_each(sums, lane);
    }
};

template <typename F, int M, int ROWS, typename X>
__device__ __forceinline__ void linear_blocks(uint8_t *slots, const int8_t *codes,
                                              const uint2 *scales, const X &x_rows, int k,
                                              const Matrices &matrices) {
    using Product = WarpProduct<F, M, ROWS, X>;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = (blockIdx.x * WARPS + warp) * ROWS;
    if (first >= matrices.rows()) return;
    Product product;
    product.x_rows = x_rows, product.lane = lane, product.k = k;
    product.begin(matrices, first, codes, scales);
    float sum = product.run(slots + warp * SLOTS * Product::SLOT_BYTES);
    constexpr int LANES = 32 / (M * ROWS);
    int input = lane / LANES / ROWS, row = first + lane / LANES % ROWS;
    if (lane % LANES == 0 && input < x_rows.count() && row < matrices.rows()) {
        matrices.store(x_rows.output(input), row, sum);
    }
}
