// The product of a few rows of W and up to 16 rows of x on the tensor cores, by a block of 8 warps.
//
// Eight rows of W are the columns of one mma, the rows of x its rows. The order in which an mma
// takes the elements of k is free as long as both sides agree on it, so a lane takes 16 bytes in a
// row of W and 16 of x, and these are its operands of two mmas. The 16 bytes of W come by an
// asynchronous copy that the lane itself ordered a few turns before: memory always has work to do,
// and no registers wait for it. Warps take 64 elements of k in turn and add their sums at the end
// in their order: the bits of an output depend on its row of x, its row of W and k alone.
#pragma once

#include "common.cuh"

constexpr int TENSOR_WARPS = 8;
constexpr int TENSOR_THREADS = 32 * TENSOR_WARPS;

// TILES (1 or 2) times 8 rows of W; 16 rows of x if WIDE, else 8. An object lies in shared memory.
template <int TILES, bool WIDE> struct TensorRows {
    static constexpr int X_ROWS = WIDE ? 16 : 8;
    static constexpr int W_ROWS = 8 * TILES;
    // Copies of a lane in a turn, and turns that are there or on their way.
    static constexpr int COPIES = 2;
    static constexpr int TURNS = 4;
    // A step is 32 elements of k.
    static constexpr int STEPS = COPIES / TILES;

    uint4 copied[TURNS][COPIES][TENSOR_THREADS];
    float part[TENSOR_WARPS][X_ROWS][W_ROWS];

    // Two steps are 64 elements in a row; the next two come after those of the other warps.
    static __device__ __forceinline__ int element(int step) {
        return 64 * TENSOR_WARPS * (step / 2) + 32 * (step % 2) + 64 * (threadIdx.x / 32);
    }

    __device__ __forceinline__ void fetch(const bf16 *const (&w)[TILES], int turn, int k) {
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            int at = element(turn * STEPS + copy / TILES) + 8 * (threadIdx.x % 4);
            cp_async16(&copied[turn % TURNS][copy][threadIdx.x], w[copy % TILES] + at, at < k);
        }
        cp_async_commit();
    }

    static __device__ __forceinline__ uint4 load(const bf16 *from, bool valid) {
        uint4 zero = make_uint4(0, 0, 0, 0);
        return valid ? *reinterpret_cast<const uint4 *>(from) : zero;
    }

    // The sums of this thread's warp. A lane names row lane / 4 of each tile of W, and of x row
    // lane / 4 and, if WIDE, row lane / 4 + 8. k is a multiple of 8, rows begin at 16 bytes.
    __device__ __forceinline__ void multiply(const bf16 *const (&w)[TILES], const bf16 *x_low,
                                             const bf16 *x_high, int k,
                                             float (&sum)[TILES][2][4]) {
#pragma unroll
        for (int turn = 0; turn + 1 < TURNS; ++turn) fetch(w, turn, k);
        grid_wait();
        for (int turn = 0; element(turn * STEPS) < k; ++turn) {
            // A lane reads and fills places of its own, so this only keeps the order in which the
            // compiler has reads and copies.
            __syncwarp();
            fetch(w, turn + TURNS - 1, k);
            uint4 low[STEPS], high[STEPS];
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                int at = element(turn * STEPS + step) + 8 * (threadIdx.x % 4);
                low[step] = load(x_low + at, at < k);
                high[step] = load(x_high + at, WIDE && at < k);
            }
            cp_async_wait<TURNS - 1>();
            __syncwarp();
#pragma unroll
            for (int copy = 0; copy < COPIES; ++copy) {
                uint4 l = low[copy / TILES], h = high[copy / TILES];
                uint4 v = copied[turn % TURNS][copy][threadIdx.x];
                uint32_t a[2][4] = {{l.x, h.x, l.y, h.y}, {l.z, h.z, l.w, h.w}};
                uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
                mma_16816(sum[copy % TILES][0], a[0], b[0], bf16());
                mma_16816(sum[copy % TILES][1], a[1], b[1], bf16());
            }
        }
    }

    // Adds the sums of all warps and calls `store(x row, w row, value)` for each output.
    template <typename Store>
    __device__ __forceinline__ void finish(const float (&sum)[TILES][2][4], Store store) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < (WIDE ? 4 : 2); ++i) {
                int x_row = lane / 4 + i / 2 * 8, w_row = 8 * tile + 2 * (lane % 4) + i % 2;
                part[warp][x_row][w_row] = sum[tile][0][i] + sum[tile][1][i];
            }
        }
        __syncthreads();
        int x_row = threadIdx.x / W_ROWS, w_row = threadIdx.x % W_ROWS;
        if (x_row >= X_ROWS) return;
        float total = 0.0f;
#pragma unroll
        for (int other = 0; other < TENSOR_WARPS; ++other) total += part[other][x_row][w_row];
        store(x_row, w_row, total);
    }
};
