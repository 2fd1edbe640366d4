// y = x W^T + bias for few rows of x and weights in the GGML block formats, multiplied as they lie
// in the file: what a decode step does. The time is that of reading W, so x becomes bytes (codes of
// 8 bits with a scale for each 32), four products are one instruction, and the arithmetic keeps up.
//
// quantize_rows_bf16, quantize_rows_f32: x [m][k], k a multiple of 32, to codes int8 [m][k] and
//   scales uint2 [m][k / 32]: x is scale: f32, then the sums of the codes of the first and of the
//   last 16, int16 each (formats with a minimum and with an offset need them). The scale is
//   max|x| / 127; codes are rounded to nearest. A NaN makes the scale NaN. `count` is m k.
//   grid any, block any multiple of 32 (256).
//
// linear_FORMAT_mM, M in 1, 2, 4, 8: up to M rows of x, up to three matrices of one format (see
//   outputs.cuh). W is [n][k] by rows, k a multiple of the block. Codes and matrices begin at 16
//   bytes, and the last 16 bytes that a matrix begins are all readable, as they are in device
//   memory. The bits of an output are the same for every M and whatever the other rows are.
//   grid (n0 + n1 + n2) / 8 for m1 and m2 and for every M of q4_k and q6_k, / 16 for m4 and m8 of
//   the others, rounded up; block 128; no dynamic shared memory.
#include "long_products.cuh"

#define LINEAR_LONG_M(NAME, FORMAT, M, BLOCKS)                                                    \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                              \
        linear_##NAME##_m##M(const int8_t *codes, const uint2 *scales, int m, int k,              \
                             MATRICES_ARGUMENTS) {                                                \
        grid_go();                                                                                \
        __shared__ __align__(16) typename LongProduct<FORMAT, M, FirstRows>::Shared shared;       \
        linear_long<FORMAT, M>(shared, codes, scales, FirstRows{m}, k, MATRICES);                 \
    }
#define LINEAR_LONG(NAME, FORMAT, B1, B2, B4, B8)                                                 \
    LINEAR_LONG_M(NAME, FORMAT, 1, B1)                                                            \
    LINEAR_LONG_M(NAME, FORMAT, 2, B2)                                                            \
    LINEAR_LONG_M(NAME, FORMAT, 4, B4)                                                            \
    LINEAR_LONG_M(NAME, FORMAT, 8, B8)
LINEAR_LONG(q4_k, LongQ4_K, 6, 4, 4, 3)
LINEAR_LONG(q6_k, LongQ6_K, 5, 3, 3, 3)

#define LINEAR_M(NAME, FORMAT, M, ROWS, BLOCKS)                                                   \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                              \
        linear_##NAME##_m##M(const int8_t *codes, const uint2 *scales, int m, int k,              \
                             MATRICES_ARGUMENTS) {                                                \
        grid_go();                                                                                \
        using Product = WarpProduct<FORMAT, M, ROWS, FirstRows>;                                  \
        __shared__ __align__(16) uint8_t slots[WARPS * SLOTS * Product::SLOT_BYTES];              \
        linear_blocks<FORMAT, M, ROWS>(slots, codes, scales, FirstRows{m}, k, MATRICES);          \
    }
#define LINEAR(NAME, FORMAT)                                                                      \
    LINEAR_M(NAME, FORMAT, 1, 2, 8)                                                               \
    LINEAR_M(NAME, FORMAT, 2, 2, 6)                                                               \
    LINEAR_M(NAME, FORMAT, 4, 4, 4)                                                               \
    LINEAR_M(NAME, FORMAT, 8, 4, 3)
LINEAR(q4_0, Q4_0)
LINEAR(q4_1, Q4_1)
LINEAR(q5_0, Q5_0)
LINEAR(q5_1, Q5_1)
LINEAR(q8_0, Q8_0)
LINEAR(q2_k, Q2_K)
LINEAR(q3_k, Q3_K)
LINEAR(q5_k, Q5_K)
LINEAR(iq4_nl, IQ4_NL)
LINEAR(iq4_xs, IQ4_XS)
LINEAR(mxfp4, MXFP4)

// Four elements a thread, so eight threads have the 32 of a scale.
template <typename T>
__device__ __forceinline__ void quantize_rows(const T *x, int8_t *codes, uint2 *scales,
                                              unsigned long long count) {
    unsigned long long stride = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
    unsigned long long thread = blockIdx.x * static_cast<unsigned long long>(blockDim.x);
    // Lanes stay together; those beyond the end have zeros.
    for (thread += threadIdx.x; (thread - threadIdx.x % 32) * 4 < count; thread += stride) {
        bool valid = thread * 4 < count;
        float values[4] = {};
        // As bits, a NaN is the largest.
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (valid) values[i] = to_f32(x[thread * 4 + i]);
            largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
        }
#pragma unroll
        for (int other = 1; other < 8; other *= 2) {
            largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, other));
        }
        float most = __uint_as_float(largest), inverse = most > 0.0f ? 127.0f / most : 0.0f;
        uint32_t four = 0;
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int code = __float2int_rn(fminf(fmaxf(values[i] * inverse, -127.0f), 127.0f));
            four |= static_cast<uint32_t>(code & 255) << (8 * i);
            sum += code;
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        int last = __shfl_down_sync(0xffffffffu, sum, 4);
        if (!valid) continue;
        reinterpret_cast<uint32_t *>(codes)[thread] = four;
        if (thread % 8 == 0) {
            uint32_t sums = static_cast<uint32_t>(sum & 0xffff) | static_cast<uint32_t>(last) << 16;
            scales[thread / 8] = make_uint2(__float_as_uint(most / 127.0f), sums);
        }
    }
}

extern "C" __global__ void quantize_rows_bf16(const bf16 *x, int8_t *codes, uint2 *scales,
                                              unsigned long long count) {
    grid_begin();
    quantize_rows(x, codes, scales, count);
}
extern "C" __global__ void quantize_rows_f32(const float *x, int8_t *codes, uint2 *scales,
                                             unsigned long long count) {
    grid_begin();
    quantize_rows(x, codes, scales, count);
}
