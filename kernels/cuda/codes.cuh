// A row as the products of few rows with weights in blocks read it (quantized.cu): codes of 8 bits,
// and for each 32 the scale in f32 and the sums of the codes of the first and of the last 16, int16
// each. The scale is max|x| / 127; codes are rounded to nearest. A NaN makes the scale NaN.
//
// Kernels that make such rows write their codes beside them; where nobody wants them, both pointers
// are null. The codes are those of the numbers that are stored.
#pragma once

#include "common.cuh"

struct Codes {
    int8_t *codes;
    uint2 *scales;

    // Eight numbers from `at` on, a multiple of 8. Four lanes in a row have 32.
    __device__ __forceinline__ void put8(unsigned long long at, const float (&x)[8]) const {
        unsigned four = 0xfu << (threadIdx.x % 32 & ~3u);
        // As bits, a NaN is the largest.
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
        largest = max(largest, __shfl_xor_sync(four, largest, 1));
        largest = max(largest, __shfl_xor_sync(four, largest, 2));
        float inverse = inverse_of(largest);
        uint32_t words[2] = {};
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int code = code_of(x[i], inverse);
            words[i / 4] |= static_cast<uint32_t>(code & 255) << (8 * (i % 4));
            sum += code;
        }
        sum += __shfl_xor_sync(four, sum, 1);
        int last = __shfl_xor_sync(four, sum, 2);
        *reinterpret_cast<uint2 *>(codes + at) = make_uint2(words[0], words[1]);
        if (at % 32 == 0) put_scale(at, largest, sum, last);
    }

    // One number, at `at`. A warp has 32 in a row.
    __device__ __forceinline__ void put1(unsigned long long at, float x) const {
        uint32_t largest = __float_as_uint(x) & 0x7fffffffu;
#pragma unroll
        for (int other = 16; other > 0; other /= 2)
            largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, other));
        int code = code_of(x, inverse_of(largest)), sum = code;
#pragma unroll
        for (int other = 8; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        int last = __shfl_xor_sync(0xffffffffu, sum, 16);
        codes[at] = static_cast<int8_t>(code);
        if (at % 32 == 0) put_scale(at, largest, sum, last);
    }

  private:
    static __device__ __forceinline__ float inverse_of(uint32_t largest) {
        return largest > 0 ? 127.0f / __uint_as_float(largest) : 0.0f;
    }
    static __device__ __forceinline__ int code_of(float x, float inverse) {
        return __float2int_rn(fminf(fmaxf(x * inverse, -127.0f), 127.0f));
    }
    __device__ __forceinline__ void put_scale(unsigned long long at, uint32_t largest, int first,
                                              int last) const {
        uint32_t sums = static_cast<uint32_t>(first & 0xffff) | static_cast<uint32_t>(last) << 16;
        float scale = __uint_as_float(largest) / 127.0f;
        scales[at / 32] = make_uint2(__float_as_uint(scale), sums);
    }
};
