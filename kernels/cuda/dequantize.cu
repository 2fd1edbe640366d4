// Weights of every format as numbers: rows of a matrix in bf16, for a product of many rows, and
// rows of a table by id in f32, for embeddings. Values are exactly those that src/quant defines.
//
// dequantize_FORMAT(w, out, first_row, rows, k): rows first_row.. of W [.][k] to out [rows][k],
//   each value rounded to bf16. k is a multiple of the block; W and out begin at 16 bytes. A lane
//   decodes 32 weights (quant.cuh) and exchanges half of them with its neighbour, so that what a
//   warp writes at once is whole 32 bytes.
// dequantize_f16, dequantize_f32: the same for floats, any k.
//   grid any, block any multiple of 32 (256).
//
// gather_FORMAT(table, ids, out, k, rows): row ids[i] of the table [.][k] to out [rows][k] in f32,
//   for block formats, bf16, f16 and f32. An id is within the table. For floats any k.
//   grid any, block any multiple of 32 (256).
#include "quant.cuh"

__device__ __forceinline__ unsigned long long first_thread() {
    return blockIdx.x * static_cast<unsigned long long>(blockDim.x) + threadIdx.x;
}
__device__ __forceinline__ unsigned long long all_threads() {
    return static_cast<unsigned long long>(gridDim.x) * blockDim.x;
}

// Weight i of a group, by the formulas and with the roundings of src/quant.
template <typename F> __device__ __forceinline__ float value(const Piece &w, int group, int i) {
    int code = static_cast<int8_t>(w.codes[group][i / 4] >> (8 * (i % 4)));
    float product = __fmul_rn(w.scale[group], static_cast<float>(code - F::OFFSET));
    return F::HAS_LEAST ? __fsub_rn(product, w.least[group]) : product;
}

// Weights 8 half.. of a group.
template <typename F>
__device__ __forceinline__ uint4 eight(const Piece &w, int group, int half) {
    uint32_t two[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int at = 8 * half + 2 * i;
        two[i] = pack2<bf16>(value<F>(w, group, at), value<F>(w, group, at + 1));
    }
    return make_uint4(two[0], two[1], two[2], two[3]);
}

__device__ __forceinline__ uint4 from_neighbour(const uint4 &given) {
    return make_uint4(__shfl_xor_sync(0xffffffffu, given.x, 1),
                      __shfl_xor_sync(0xffffffffu, given.y, 1),
                      __shfl_xor_sync(0xffffffffu, given.z, 1),
                      __shfl_xor_sync(0xffffffffu, given.w, 1));
}

// Where a group of a piece begins, counted from the first weight of the first block.
template <typename F>
__device__ __forceinline__ unsigned long long begin_of(unsigned long long piece, int group) {
    constexpr int PARTS = F::WEIGHTS / 32;
    int part = static_cast<int>(piece % PARTS);
    return piece / PARTS * F::WEIGHTS + F::start(part) + F::NEXT * group;
}

template <typename F>
__device__ __forceinline__ void read_piece(const uint8_t *w, unsigned long long piece,
                                           Piece &out) {
    constexpr int PARTS = F::WEIGHTS / 32;
    F::read(w + piece / PARTS * F::BYTES, static_cast<int>(piece % PARTS), out);
}

template <typename F>
__device__ __forceinline__ void dequantize(const void *w, bf16 *out, unsigned long long first_row,
                                           unsigned long long rows, int k) {
    const uint8_t *bytes = static_cast<const uint8_t *>(w);
    bytes += first_row * (k / F::WEIGHTS) * F::BYTES;
    unsigned long long pieces = rows * (k / 32);
    int lane = threadIdx.x % 32;
    bool second = lane % 2;
    // Lanes stay together; those beyond the end repeat the last piece.
    for (unsigned long long mine = first_thread(); mine - lane < pieces; mine += all_threads()) {
        Piece piece;
        read_piece<F>(bytes, min(mine, pieces - 1), piece);
        unsigned long long pair[2] = {mine - second, mine - second + 1};
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            uint4 first_half = eight<F>(piece, group, 0), second_half = eight<F>(piece, group, 1);
            uint4 other = from_neighbour(second ? first_half : second_half);
            uint4 of_first = second ? other : first_half, of_second = second ? second_half : other;
            bf16 *to = out + 8 * second;
            if (pair[0] < pieces) {
                *reinterpret_cast<uint4 *>(to + begin_of<F>(pair[0], group)) = of_first;
            }
            if (pair[1] < pieces) {
                *reinterpret_cast<uint4 *>(to + begin_of<F>(pair[1], group)) = of_second;
            }
        }
    }
}

template <typename F>
__device__ __forceinline__ void gather(const void *table, const int *ids, float *out, int k,
                                       int rows) {
    const uint8_t *bytes = static_cast<const uint8_t *>(table);
    unsigned pieces = k / 32;
    for (unsigned long long i = first_thread(); i < static_cast<unsigned long long>(rows) * pieces;
         i += all_threads()) {
        unsigned long long row = i / pieces, piece = i % pieces;
        unsigned long long row_bytes = static_cast<unsigned long long>(k / F::WEIGHTS) * F::BYTES;
        Piece w;
        read_piece<F>(bytes + ids[row] * row_bytes, piece, w);
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            float *to = out + row * k + begin_of<F>(piece, group);
#pragma unroll
            for (int at = 0; at < 16; at += 4) {
                *reinterpret_cast<float4 *>(to + at) =
                    make_float4(value<F>(w, group, at), value<F>(w, group, at + 1),
                                value<F>(w, group, at + 2), value<F>(w, group, at + 3));
            }
        }
    }
}

#define BLOCK_FORMAT(NAME, FORMAT)                                                                \
    extern "C" __global__ void dequantize_##NAME(const void *w, bf16 *out,                        \
                                                 unsigned long long first_row,                    \
                                                 unsigned long long rows, int k) {                \
        grid_begin();                                                                             \
        dequantize<FORMAT>(w, out, first_row, rows, k);                                           \
    }                                                                                             \
    extern "C" __global__ void gather_##NAME(const void *table, const int *ids, float *out, int k, \
                                             int rows) {                                          \
        grid_begin();                                                                             \
        gather<FORMAT>(table, ids, out, k, rows);                                                 \
    }
BLOCK_FORMAT(q4_0, Q4_0)
BLOCK_FORMAT(q4_1, Q4_1)
BLOCK_FORMAT(q5_0, Q5_0)
BLOCK_FORMAT(q5_1, Q5_1)
BLOCK_FORMAT(q8_0, Q8_0)
BLOCK_FORMAT(q2_k, Q2_K)
BLOCK_FORMAT(q3_k, Q3_K)
BLOCK_FORMAT(q4_k, Q4_K)
BLOCK_FORMAT(q5_k, Q5_K)
BLOCK_FORMAT(q6_k, Q6_K)
BLOCK_FORMAT(q8_k, Q8_K)
BLOCK_FORMAT(iq4_nl, IQ4_NL)
BLOCK_FORMAT(iq4_xs, IQ4_XS)
BLOCK_FORMAT(mxfp4, MXFP4)

template <typename T> struct alignas(8 * sizeof(T) < 16 ? 8 * sizeof(T) : 16) Eight {
    T values[8];
};

// Eight at a time where all rows begin at eight, else one.
template <typename T>
__device__ __forceinline__ void dequantize_floats(const void *w, bf16 *out,
                                                  unsigned long long first_row,
                                                  unsigned long long rows, int k) {
    const T *from = static_cast<const T *>(w) + first_row * k;
    unsigned long long count = rows * k;
    if (k % 8 == 0) {
        const Eight<T> *eights = reinterpret_cast<const Eight<T> *>(from);
        for (unsigned long long i = first_thread(); i < count / 8; i += all_threads()) {
            Eight<T> v = eights[i];
            uint32_t two[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                two[j] = pack2<bf16>(to_f32(v.values[2 * j]), to_f32(v.values[2 * j + 1]));
            }
            reinterpret_cast<uint4 *>(out)[i] = make_uint4(two[0], two[1], two[2], two[3]);
        }
    } else {
        for (unsigned long long i = first_thread(); i < count; i += all_threads()) {
            out[i] = from_f32<bf16>(to_f32(from[i]));
        }
    }
}

template <typename T>
__device__ __forceinline__ void gather_floats(const void *table, const int *ids, float *out, int k,
                                              int rows) {
    const T *from = static_cast<const T *>(table);
    for (unsigned long long i = first_thread(); i < static_cast<unsigned long long>(rows) * k;
         i += all_threads()) {
        out[i] = to_f32(from[static_cast<unsigned long long>(ids[i / k]) * k + i % k]);
    }
}

extern "C" __global__ void dequantize_f16(const void *w, bf16 *out, unsigned long long first_row,
                                          unsigned long long rows, int k) {
    grid_begin();
    dequantize_floats<__half>(w, out, first_row, rows, k);
}
extern "C" __global__ void dequantize_f32(const void *w, bf16 *out, unsigned long long first_row,
                                          unsigned long long rows, int k) {
    grid_begin();
    dequantize_floats<float>(w, out, first_row, rows, k);
}
extern "C" __global__ void gather_bf16(const void *table, const int *ids, float *out, int k,
                                       int rows) {
    grid_begin();
    gather_floats<bf16>(table, ids, out, k, rows);
}
extern "C" __global__ void gather_f16(const void *table, const int *ids, float *out, int k,
                                      int rows) {
    grid_begin();
    gather_floats<__half>(table, ids, out, k, rows);
}
extern "C" __global__ void gather_f32(const void *table, const int *ids, float *out, int k,
                                      int rows) {
    grid_begin();
    gather_floats<float>(table, ids, out, k, rows);
}
