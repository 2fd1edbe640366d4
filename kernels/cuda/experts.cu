// Routing of a mixture of experts, and the sum of what they bring (experts.cuh; src/experts has the
// contract: a row's choice and weights follow from its scores alone).
//
// Shazeer et al., "Outrageously Large Neural Networks" (2017); Fedus et al., "Switch Transformers"
// (2022).
//
// expert_route_f32, _bf16: scores [m][experts] to chosen [m][used], experts ascending, and their
//   weights [m][used] in f32. The highest scores are chosen, the first of equals, what is no number
//   last; weights are their softmax, over the chosen if `normalized`, else over all. used <= 32.
//   grid m / 8 rounded up, block 256 (a warp for a row).
// expert_order: chosen [pairs] to starts [experts + 1] and order [pairs].
//   grid experts / 8 rounded up, block 256 (a warp for an expert).
// expert_sum: out [m][n] = sum of weight * y over the pairs of a row, experts ascending;
//   y [pairs][n] and out in bf16, sums in f32, n a multiple of 8, both at 16 bytes. `count` is
//   m n / 8.
//   grid any, block any.
#include "common.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
typedef unsigned long long u64;

// A number that is larger the better a score is: the same order as that of numbers, both zeros
// equal, then NaN; of equals the first.
__device__ __forceinline__ u64 rank_of(float score, int expert) {
    uint32_t bits = __float_as_uint(score + 0.0f);
    uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    if (score != score) ordered = 0;
    return static_cast<u64>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}
__device__ __forceinline__ int expert_of(u64 rank) {
    return static_cast<int>(0xffffffffu - static_cast<uint32_t>(rank));
}

template <typename T>
__device__ __forceinline__ void route(const T *scores, int *chosen, float *weights, int m,
                                      int experts, int used, int normalized) {
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= m) return;
    scores += static_cast<long long>(row) * experts;
    // The lane with a place has the expert that came in there.
    u64 own = 0, last = ~0ull;
    for (int place = 0; place < used; ++place) {
        u64 best = 0;
        for (int expert = lane; expert < experts; expert += 32) {
            u64 rank = rank_of(to_f32(scores[expert]), expert);
            if (rank < last) best = max(best, rank);
        }
#pragma unroll
        for (int other = 16; other > 0; other /= 2) {
            u64 theirs = __shfl_xor_sync(ALL_LANES, best, other);
            best = max(best, theirs);
        }
        if (lane == place) own = best;
        last = best;
    }
    bool mine = lane < used;
    int expert = mine ? expert_of(own) : 0;
    double top = to_f32(scores[__shfl_sync(ALL_LANES, expert, 0)]);
    double weight = mine ? exp(to_f32(scores[expert]) - top) : 0, total = 0;
    if (!normalized) {
        for (int other = lane; other < experts; other += 32) {
            total += exp(to_f32(scores[other]) - top);
        }
#pragma unroll
        for (int other = 16; other > 0; other /= 2) {
            total += __shfl_xor_sync(ALL_LANES, total, other);
        }
    }
    int place = 0; // among the experts in ascending order
    for (int i = 0; i < used; ++i) {
        double theirs = __shfl_sync(ALL_LANES, weight, i);
        int other = __shfl_sync(ALL_LANES, expert, i);
        if (normalized) total += theirs;
        place += other < expert;
    }
    if (!mine) return;
    chosen[row * used + place] = expert;
    weights[row * used + place] = static_cast<float>(weight / total);
}

extern "C" __global__ void expert_route_f32(const float *scores, int *chosen, float *weights, int m,
                                            int experts, int used, int normalized) {
    grid_begin();
    route(scores, chosen, weights, m, experts, used, normalized);
}
extern "C" __global__ void expert_route_bf16(const bf16 *scores, int *chosen, float *weights, int m,
                                             int experts, int used, int normalized) {
    grid_begin();
    route(scores, chosen, weights, m, experts, used, normalized);
}

extern "C" __global__ void expert_order(const int *chosen, int *starts, int *order, int pairs,
                                        int experts) {
    grid_begin();
    int expert = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (expert >= experts) return;
    int next = 0;
    for (int pair = lane; pair < pairs; pair += 32) next += chosen[pair] < expert;
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        next += __shfl_xor_sync(ALL_LANES, next, other);
    }
    if (lane == 0) {
        starts[expert] = next;
        if (expert == 0) starts[experts] = pairs;
    }
    for (int first = 0; first < pairs; first += 32) {
        int pair = first + lane;
        bool own = pair < pairs && chosen[pair] == expert;
        unsigned all = __ballot_sync(ALL_LANES, own);
        if (own) order[next + __popc(all & ((1u << lane) - 1))] = pair;
        next += __popc(all);
    }
}

extern "C" __global__ void expert_sum(const bf16 *y, const float *weights, bf16 *out, int n,
                                      int used, u64 count) {
    grid_begin();
    u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
    unsigned eights = n / 8;
    for (u64 i = blockIdx.x * static_cast<u64>(blockDim.x) + threadIdx.x; i < count; i += stride) {
        u64 row = i / eights, column = i % eights;
        float sum[8] = {};
        for (int j = 0; j < used; ++j) {
            u64 pair = row * used + j;
            uint4 v = reinterpret_cast<const uint4 *>(y)[pair * eights + column];
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
            float weight = weights[pair];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                sum[2 * k] = fmaf(weight, __uint_as_float(words[k] << 16), sum[2 * k]);
                sum[2 * k + 1] =
                    fmaf(weight, __uint_as_float(words[k] & 0xffff0000u), sum[2 * k + 1]);
            }
        }
        reinterpret_cast<uint4 *>(out)[i] =
            make_uint4(pack2<bf16>(sum[0], sum[1]), pack2<bf16>(sum[2], sum[3]),
                       pack2<bf16>(sum[4], sum[5]), pack2<bf16>(sum[6], sum[7]));
    }
}
