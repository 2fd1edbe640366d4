// Keys and values as bytes: how the numbers of a head are rounded to them, and how they meet
// tensor cores. Both kinds are exact in the type that they meet.
#pragma once

#include "common.cuh"

// scale * raw: a head of a token has a scale, its largest number is 127 (src/kv/ints.rs).
struct q8 {
    int8_t raw;
};
// Four bits of exponent, three of mantissa, no infinity, no scale (Micikevicius et al., "FP8
// Formats for Deep Learning", 2022; src/kv/fp8.rs).
struct e4m3 {
    uint8_t raw;
};

// The type in which tensor cores multiply what is stored. With a scale the weights of the values
// need the range of bf16; without, three more digits are better.
template <typename S> struct Meets {
    typedef S type;
};
template <> struct Meets<q8> {
    typedef bf16 type;
};
template <> struct Meets<e4m3> {
    typedef __half type;
};
template <typename S> constexpr bool has_scales = false;
template <> constexpr bool has_scales<q8> = true;

// Where the scale of a head is: 16 slots stand beside each other, then those of the next head.
__device__ __forceinline__ long long scale_at(int slot, int kv_heads, int head) {
    return (static_cast<long long>(slot / 16) * kv_heads + head) * 16 + slot % 16;
}

template <> __device__ __forceinline__ float to_f32(q8 x) { return static_cast<float>(x.raw); }
template <> __device__ __forceinline__ float to_f32(e4m3 x) {
    uint32_t size = x.raw & 0x7fu, sign = (x.raw & 0x80u) << 24;
    if (size == 0x7f) return __uint_as_float(0x7fffffffu);
    // The exponent of f32 begins 120 lower; the smallest numbers come out right too.
    float x32 = __uint_as_float(size << 20) * 1.329227995784916e36f;
    return __uint_as_float(__float_as_uint(x32) | sign);
}

// To nearest even; what is finite stays so, what is not becomes NaN.
template <> __device__ __forceinline__ e4m3 from_f32(float x) {
    uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80u;
    uint32_t size = bits & 0x7fffffffu;
    if (size >= 0x7f800000u) return e4m3{0x7f};
    float within = fminf(__uint_as_float(size), 448.0f);
    if (within < 0.015625f) {
        // Multiples of 2^-9; eight of them are the first with an exponent.
        return e4m3{static_cast<uint8_t>(sign | __float2uint_rn(within * 512.0f))};
    }
    size = __float_as_uint(within);
    size += 0x7ffffu + (size >> 20 & 1);
    return e4m3{static_cast<uint8_t>(sign | (size - (120u << 23)) >> 20)};
}

// Four numbers as two pairs in the type that they meet.
__device__ __forceinline__ void widen(uint32_t bytes, uint32_t &low, uint32_t &high, q8) {
    bytes ^= 0x80808080u; // now from 0 to 255
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        // 2^23 + byte, by its bits.
        x[i] = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440u + i)) - 8388736.0f;
    }
    low = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x7632);
    high = __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x7632);
}
__device__ __forceinline__ uint32_t half_pair(uint32_t two) {
#if __CUDA_ARCH__ >= 890
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<unsigned short>(two)));
    return pair;
#else
    return pack2<__half>(to_f32(e4m3{static_cast<uint8_t>(two & 0xff)}),
                         to_f32(e4m3{static_cast<uint8_t>(two >> 8 & 0xff)}));
#endif
}
__device__ __forceinline__ void widen(uint32_t bytes, uint32_t &low, uint32_t &high, e4m3) {
    low = half_pair(bytes & 0xffff), high = half_pair(bytes >> 16);
}

// Eight numbers, two words.
template <typename S> __device__ __forceinline__ uint4 widen8(uint32_t first, uint32_t second) {
    uint4 out;
    widen(first, out.x, out.y, S());
    widen(second, out.z, out.w, S());
    return out;
}
