// Mixture of experts: the rows of an expert and its matrices. Routing is in experts.cu; products
// are in experts_linear.cu (bf16) and experts_quantized.cu (blocks).
//
// Every row goes to `used` experts. Pair row * used + i is the row with the i-th of them, experts
// ascending. `order`, [pairs], lists the pairs by expert and ascending within one; those of expert
// e are order[starts[e]] to order[starts[e + 1] - 1], starts [experts + 1].
//
// In a product with the experts, a block has up to ROWS pairs of one of them. The grid is as large
// as any routing of so many rows wants it, so it is a matter of shapes alone and the host knows no
// routing: pairs of E experts are at most E + (pairs - E) / ROWS such tiles. The input of a pair is
// row pair / each of x: `each` is `used` where a row is the input of all its experts, and 1 where
// every pair has a row of its own. Outputs are one row for each pair. Matrices of all experts lie
// one after the other, each at a multiple of 16 bytes; a bias is [experts][n].
#pragma once

#include "outputs.cuh"

#define EXPERTS_ARGUMENTS const int *starts, const int *order, int experts, int each

// Pairs of one expert; none where a block has nothing to do.
struct ExpertRows {
    int expert, count, each;
    const int *pairs;
};

// The tile with the number `tile` of all experts in turn. All lanes of a warp find it together.
template <int ROWS>
__device__ __forceinline__ ExpertRows expert_rows(const int *starts, const int *order, int experts,
                                                  int each, int tile) {
    const unsigned all = 0xffffffffu;
    int lane = threadIdx.x % 32, before = 0;
    for (int first = 0; first < experts; first += 32) {
        int expert = first + lane;
        int begin = starts[min(expert, experts)], end = starts[min(expert + 1, experts)];
        int own = (end - begin + ROWS - 1) / ROWS, through = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int lower = __shfl_up_sync(all, through, step);
            if (lane >= step) through += lower;
        }
        unsigned beyond = __ballot_sync(all, before + through > tile);
        if (beyond != 0) {
            int found = __ffs(beyond) - 1;
            begin = __shfl_sync(all, begin, found), end = __shfl_sync(all, end, found);
            before += __shfl_sync(all, through - own, found);
            begin += (tile - before) * ROWS;
            return {first + found, min(end - begin, ROWS), each, order + begin};
        }
        before += __shfl_sync(all, through, 31);
    }
    return {0, 0, each, order};
}

// The matrices of one expert; `row_bytes` are those of a row of W.
__device__ __forceinline__ Matrices matrices_of(Matrices m, int expert, long long row_bytes) {
    auto of = [&](const void *w, int n) -> const void * {
        return static_cast<const uint8_t *>(w) + expert * ((n * row_bytes + 15) / 16 * 16);
    };
    auto bias_of = [&](const float *bias, int n) {
        return bias != nullptr ? bias + static_cast<long long>(expert) * n : nullptr;
    };
    m.w0 = of(m.w0, m.n0), m.w1 = of(m.w1, m.n1), m.w2 = of(m.w2, m.n2);
    m.bias0 = bias_of(m.bias0, m.n0), m.bias1 = bias_of(m.bias1, m.n1);
    m.bias2 = bias_of(m.bias2, m.n2);
    return m;
}
