// Products of rows with the matrices of their experts (experts.cuh), weights in bf16: as linear.cu,
// whose outputs have the same bits.
//
// experts_bf16: up to three matrices of every expert (outputs.cuh) that read the same input, in
//   bf16. k is a multiple of 8; x and the matrices begin at 16 bytes.
//   grid ((n0 + n1 + n2) / 16 rounded up, tiles of 16 rows), block 256, no dynamic shared memory.
#include "experts.cuh"
#include "tensor_rows.cuh"

template <bool WIDE>
__device__ __forceinline__ void product(uint8_t *memory, const bf16 *x, int k,
                                        const ExpertRows &rows, const Matrices &matrices) {
    using Rows = TensorRows<2, WIDE>;
    Rows &tile = *reinterpret_cast<Rows *>(memory);
    int lane = threadIdx.x % 32, first = blockIdx.x * Rows::W_ROWS;
    const bf16 *w[2], *inputs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = first + 8 * half + lane / 4;
        w[half] = reinterpret_cast<const bf16 *>(matrices.row(row, 2ll * k));
        int pair = rows.pairs[min(8 * half + lane / 4, rows.count - 1)];
        inputs[half] = x + static_cast<long long>(pair / rows.each) * k;
    }
    float sum[2][2][4] = {};
    tile.multiply(w, inputs[0], inputs[1], k, sum);
    tile.finish(sum, [&](int x_row, int w_row, float value) {
        if (x_row < rows.count && first + w_row < matrices.rows()) {
            matrices.store(rows.pairs[x_row], first + w_row, value);
        }
    });
}

extern "C" __global__ void __launch_bounds__(TENSOR_THREADS, 4)
    experts_bf16(const bf16 *x, int k, EXPERTS_ARGUMENTS, MATRICES_ARGUMENTS) {
    grid_begin();
    using Wide = TensorRows<2, true>;
    __shared__ __align__(16) uint8_t memory[sizeof(Wide)];
    ExpertRows rows = expert_rows<Wide::X_ROWS>(starts, order, experts, each, blockIdx.y);
    if (rows.count == 0) return;
    Matrices matrices = matrices_of(MATRICES, rows.expert, 2ll * k);
    if (rows.count <= 8) {
        product<false>(memory, x, k, rows, matrices);
    } else {
        product<true>(memory, x, k, rows, matrices);
    }
}
