// What every kernel here is written in: types, warp reductions, and the few instructions that have
// no name in C++. Built for a device this file includes CUDA's own headers; built for the
// processor (HEARTH_EMULATE) it includes emulate.h, which runs the same kernels thread by thread.
#pragma once

#ifdef HEARTH_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// `extern __shared__` under a name that the emulator can give memory to.
#define DYNAMIC_SHARED(type, name)                     \
    extern __shared__ __align__(128) char name##_raw[]; \
    type *name = reinterpret_cast<type *>(name##_raw)

// d += a b, a [16, 16] by rows, b [16, 8] by columns, sums in f32 (PTX ISA, mma.m16n8k16).
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2], __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2], __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements out of shared memory; each lane names one row of 16 bytes.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at));
}

// 16 bytes from device to shared memory, not waited for; zeros where `valid` is false.
__device__ __forceinline__ void cp_async16(void *shared, const void *global, bool valid) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes));
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N));
}

// Kernels overlap: one begins while those before it end. What was computed before may be read, and
// what others read be written, behind this; weights do not change and need not wait for it.
__device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel behind this one may begin.
__device__ __forceinline__ void grid_go() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 2^x to about 22 bits; 0 for minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

typedef __nv_bfloat16 bf16;

// The first line of a kernel that does nothing ahead of its inputs.
__device__ __forceinline__ void grid_begin() {
    grid_go();
    grid_wait();
}

// A warpgroup is four warps, the first a multiple of four. `warpgroup_mma` adds to the N columns of d
// (puts there, where `add` is 0) the product of 64 rows of a, 16 for each warp as for mma_16816, and of 16 elements from k on of N
// rows b, in shared memory from a multiple of 1024 bytes on: 64 elements of bf16 each, of which eight
// in a row are `swizzled`. Nothing waits for it: d may be read, and b be written, behind
// `warpgroup_wait`, which leaves the last N groups of products that were committed under way.
__device__ __forceinline__ int swizzled(int row, int eight) {
    return 128 * row + 16 * (eight ^ row % 8);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Where the rows lie (PTX ISA, matrix descriptor): swizzled by 128 bytes, eight rows in 1024 bytes.
__device__ __forceinline__ uint64_t warpgroup_rows(const uint8_t *b, int k) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(b)) + 2 * k;
    return 1ull << 62 | 64ull << 32 | 1ull << 16 | (at & 0x3ffff) >> 4;
}
#define WARPGROUP_SUM(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
__device__ __forceinline__ void warpgroup_mma(float (&d)[8][4], const uint32_t (&a)[4],
                                              const uint8_t *b, int k, int add) {
    uint64_t rows = warpgroup_rows(b, k);
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 " %8, %9, %10, %11, %12, %13, %14, %15, "
                 " %16, %17, %18, %19, %20, %21, %22, %23, "
                 " %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
                 : WARPGROUP_SUM(0), WARPGROUP_SUM(1), WARPGROUP_SUM(2), WARPGROUP_SUM(3),
                   WARPGROUP_SUM(4), WARPGROUP_SUM(5), WARPGROUP_SUM(6), WARPGROUP_SUM(7)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(add));
}
__device__ __forceinline__ void warpgroup_mma(float (&d)[16][4], const uint32_t (&a)[4],
                                              const uint8_t *b, int k, int add) {
    uint64_t rows = warpgroup_rows(b, k);
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; "
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, "
                 " %8, %9, %10, %11, %12, %13, %14, %15, "
                 " %16, %17, %18, %19, %20, %21, %22, %23, "
                 " %24, %25, %26, %27, %28, %29, %30, %31, "
                 " %32, %33, %34, %35, %36, %37, %38, %39, "
                 " %40, %41, %42, %43, %44, %45, %46, %47, "
                 " %48, %49, %50, %51, %52, %53, %54, %55, "
                 " %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, 0;}"
                 : WARPGROUP_SUM(0), WARPGROUP_SUM(1), WARPGROUP_SUM(2), WARPGROUP_SUM(3),
                   WARPGROUP_SUM(4), WARPGROUP_SUM(5), WARPGROUP_SUM(6), WARPGROUP_SUM(7),
                   WARPGROUP_SUM(8), WARPGROUP_SUM(9), WARPGROUP_SUM(10), WARPGROUP_SUM(11),
                   WARPGROUP_SUM(12), WARPGROUP_SUM(13), WARPGROUP_SUM(14), WARPGROUP_SUM(15)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows), "r"(add));
}
#undef WARPGROUP_SUM
// Before products of registers that were written since the last.
__device__ __forceinline__ void warpgroup_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// What this thread wrote to shared memory is there for the products behind the next barrier.
__device__ __forceinline__ void warpgroup_written() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#elif !defined(HEARTH_EMULATE)
// Devices that have no such products, by those of a warp.
template <int TILES>
__device__ __forceinline__ void warpgroup_mma(float (&d)[TILES][4], const uint32_t (&a)[4],
                                              const uint8_t *b, int k, int add) {
    int row = threadIdx.x % 32 / 4, at = threadIdx.x % 4 * 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        uint32_t both[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t *from = b + swizzled(8 * tile + row, k / 8 + half) + at;
            both[half] = *reinterpret_cast<const uint32_t *>(from);
        }
        if (!add) d[tile][0] = d[tile][1] = d[tile][2] = d[tile][3] = 0.0f;
        mma_16816(d[tile], a, both, bf16());
    }
}
__device__ __forceinline__ void warpgroup_begin() {}
__device__ __forceinline__ void warpgroup_commit() {}
template <int N> __device__ __forceinline__ void warpgroup_wait() {}
__device__ __forceinline__ void warpgroup_written() {}
#endif

// f32 to and from the 16-bit types, to nearest even.
template <typename T> __device__ __forceinline__ float to_f32(T x);
template <> __device__ __forceinline__ float to_f32(float x) { return x; }
template <> __device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }
template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32(float x) { return __float2bfloat16(x); }
template <> __device__ __forceinline__ __half from_f32(float x) { return __float2half_rn(x); }

// Two 16-bit numbers in one register, `low` in the low half.
template <typename T> __device__ __forceinline__ uint32_t pack2(float low, float high) {
    union {
        T half[2];
        uint32_t both;
    } u;
    u.half[0] = from_f32<T>(low), u.half[1] = from_f32<T>(high);
    return u.both;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, other));
    return x;
}
