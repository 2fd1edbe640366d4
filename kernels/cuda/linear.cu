// y = x W^T + bias for few rows of x and weights in bf16: what a decode step does. W is [n][k] by
// rows, read once, so the time is that of the memory; see tensor_rows.cuh for how.
//
// linear_bf16_m1, _m2, _m4, _m8, _m16: up to that many rows of x, up to three matrices (see
// outputs.cuh). k is a multiple of 8; x and the matrices begin at 16 bytes. The bits of an output
// are the same whichever of these computes it and whatever the other rows are.
//   grid (n0 + n1 + n2) / 8 for m1 and m2, / 16 for the others, rounded up; block 256; no dynamic
//   shared memory.
#include "outputs.cuh"
#include "tensor_rows.cuh"

template <int TILES, bool WIDE>
__device__ __forceinline__ void linear_bf16(const bf16 *x, int m, int k, const Matrices &matrices) {
    using Rows = TensorRows<TILES, WIDE>;
    __shared__ Rows rows;
    int lane = threadIdx.x % 32, first = blockIdx.x * Rows::W_ROWS;
    const bf16 *w[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        int row = first + 8 * tile + lane / 4;
        w[tile] = reinterpret_cast<const bf16 *>(matrices.row(row, 2ll * k));
    }
    const bf16 *x_low = x + static_cast<long long>(min(lane / 4, m - 1)) * k;
    const bf16 *x_high = x + static_cast<long long>(min(lane / 4 + 8, m - 1)) * k;
    float sum[TILES][2][4] = {};
    rows.multiply(w, x_low, x_high, k, sum);
    rows.finish(sum, [&](int x_row, int w_row, float value) {
        if (x_row < m && first + w_row < matrices.rows()) {
            matrices.store(x_row, first + w_row, value);
        }
    });
}

#define LINEAR_BF16(M, TILES, WIDE)                                                               \
    extern "C" __global__ void __launch_bounds__(TENSOR_THREADS, 4)                               \
        linear_bf16_m##M(const bf16 *x, int m, int k, MATRICES_ARGUMENTS) {                       \
        grid_go();                                                                                \
        linear_bf16<TILES, WIDE>(x, m, k, MATRICES);                                              \
    }
LINEAR_BF16(1, 1, false)
LINEAR_BF16(2, 1, false)
LINEAR_BF16(4, 2, false)
LINEAR_BF16(8, 2, false)
LINEAR_BF16(16, 2, true)
