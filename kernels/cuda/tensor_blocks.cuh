// What products with weights in blocks on the tensor cores have in common: how a step of a row of W
// lies in shared memory, how codes become numbers, and how the sums of a block are stored.
//
// A code becomes a number when its bits are put into the mantissa of a power of two. The same
// instruction that multiplies by the scale takes that power, an offset and a minimum away again.
#pragma once

#include "outputs.cuh"
#include "quant.cuh"

// Elements of k in a step.
constexpr int STEP = 256;

// A step of a row of W.
template <typename F> struct StepBytes {
    // Pieces (quant.cuh) of a block.
    static constexpr int PARTS = F::WEIGHTS / 32;
    static constexpr int COUNT = STEP / F::WEIGHTS * F::BYTES;
    // Blocks begin at a multiple of this, so far after a multiple of 16 at most.
    static constexpr int UNIT = F::BYTES % 16 == 0 ? 16 : F::BYTES & -F::BYTES;
    static constexpr int COPIES = (COUNT + 16 - UNIT + 15) / 16;

    // How far after a multiple of 16 a row is in a step, where it begins so far after one.
    static __device__ __forceinline__ int odd(int from, int step) {
        if (UNIT == 16) return 0;
        return COUNT % 16 == 0 ? from : (from + step * COUNT) & 15;
    }
    static __device__ __forceinline__ int block_of(int part) { return part / PARTS * F::BYTES; }

    // The scales of a piece, each with what remains to be added to a product; zeros where the
    // piece is beyond the `left` elements of k. `row` is where the step begins.
    static __device__ __forceinline__ float4 scales(const uint8_t *row, int part, int left);
};

// Copies the steps of one row of W in turn: a thread has every EACH-th 16 bytes.
template <typename F, int EACH> struct RowCopies {
    using Bytes = StepBytes<F>;
    const uint8_t *source;
    // What is left of the row from there on.
    int left;

    __device__ __forceinline__ void begin(const uint8_t *row, int row_bytes, int first_step) {
        int at = first_step * Bytes::COUNT + 16 * (threadIdx.x % EACH);
        source = row + at, left = row_bytes - at;
    }

    // Sends for the bytes of the next step; `to` is this thread's place in it.
    __device__ __forceinline__ void fetch(uint8_t *to) {
        int before = 0;
        if (Bytes::UNIT < 16) before = static_cast<int>(reinterpret_cast<uintptr_t>(source) & 15);
        const uint8_t *from = source - before;
        int end = left + before;
#pragma unroll
        for (int copy = 0; copy < Bytes::COPIES; copy += EACH) {
            bool inside = copy + EACH <= Bytes::COPIES ||
                          static_cast<int>(threadIdx.x % EACH) < Bytes::COPIES - copy;
            if (inside && 16 * copy < end) cp_async16(to + 16 * copy, from + 16 * copy, true);
        }
        source += Bytes::COUNT;
        left -= Bytes::COUNT;
    }
};

// Formats whose codes are signed bytes; those of the others are below 128.
template <typename F> constexpr bool SIGNED = false;
template <> constexpr bool SIGNED<Q8_0> = true;
template <> constexpr bool SIGNED<IQ4_NL> = true;
template <> constexpr bool SIGNED<IQ4_XS> = true;
template <> constexpr bool SIGNED<MXFP4> = true;
// What a weight 0 has become with the power of two. It leaves before the product with the scale
// where its own product would be rounded too far, and else after.
template <typename F> constexpr float ZERO = SIGNED<F> ? 32768.0f + 128.0f : 128.0f + F::OFFSET;
template <typename F> constexpr bool BEFORE = SIGNED<F>;
template <> constexpr bool BEFORE<Q8_0> = false;

// Whether all of the 64 elements of k of two pieces in a row have two scales only.
template <typename F> constexpr bool ONE_PAIR = false;
template <> constexpr bool ONE_PAIR<Q4_K> = true;
template <> constexpr bool ONE_PAIR<Q5_K> = true;

template <typename F>
__device__ __forceinline__ float4 StepBytes<F>::scales(const uint8_t *row, int part, int left) {
    bool inside = PARTS == STEP / 32 || part / PARTS * F::WEIGHTS < left;
    if (!inside) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    Piece piece;
    F::read(row + block_of(part), part % PARTS, piece);
    float a = piece.scale[0], b = piece.scale[1];
    return make_float4(a, fmaf(a, -ZERO<F>, -piece.least[0]),  //
                       b, fmaf(b, -ZERO<F>, -piece.least[1]));
}

// Four codes to two pairs of weights.
template <typename F>
__device__ __forceinline__ void weights_of(uint32_t codes, float scale, float rest,
                                           uint32_t (&pairs)[2]) {
    float w[4];
    if (SIGNED<F>) codes ^= 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t bits = SIGNED<F> ? __byte_perm(codes, 0x47000000u, 0x7404u | i << 4)
                                  : __byte_perm(codes, 0x43000000u, 0x7044u | i << 8);
        float code = __uint_as_float(bits);
        w[i] = BEFORE<F> ? (code - ZERO<F>) * scale : fmaf(code, scale, rest);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        union {
            __nv_bfloat162 pair;
            uint32_t bits;
        } both;
        both.pair = __floats2bfloat162_rn(w[2 * i], w[2 * i + 1]);
        pairs[i] = both.bits;
    }
}

// The compiler computes what is cheap anew wherever it is used. This it must keep: the lane's own
// number, or that of the first lane.
__device__ __forceinline__ int kept(int x) {
    return __shfl_sync(0xffffffffu, x, static_cast<int>(threadIdx.x % 32));
}
__device__ __forceinline__ int of_first_lane(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// The matrix that `block` of blocks of so many rows is of, alone, and which block of it.
__device__ __forceinline__ Matrices matrix_of(const Matrices &all, int rows, int &block) {
    int blocks0 = (all.n0 + rows - 1) / rows, blocks1 = (all.n1 + rows - 1) / rows;
    Matrices one = {all.w0,   nullptr, nullptr,   all.n0,  0,       0,          all.y0,
                    nullptr,  nullptr, all.bias0, nullptr, nullptr, all.f32_out};
    if (block < blocks0) return one;
    block -= blocks0;
    one.w0 = all.w1, one.n0 = all.n1, one.y0 = all.y1, one.bias0 = all.bias1;
    if (block < blocks1) return one;
    block -= blocks1;
    one.w0 = all.w2, one.n0 = all.n2, one.y0 = all.y2, one.bias0 = all.bias2;
    return one;
}

// The sums of a block of `rows` rows of W and up to X rows of x from `first_input` on, in shared
// memory, in PARTS parts that are to be added up, always in the same order.
template <int PARTS, int X> struct BlockSums {
    float *sums;
    int rows, first_input, m;

    // Four more than a multiple of 32, for the banks.
    __device__ __forceinline__ int pitch() const { return rows + 4; }
    __device__ __forceinline__ float &at(int part, int input, int row) const {
        return sums[(part * X + input) * pitch() + row];
    }

    // Those of four rows.
    __device__ __forceinline__ float4 total(int input, int row) const {
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            float4 more = *reinterpret_cast<const float4 *>(&at(part, input, row));
            total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
        }
        return total;
    }

    // Where blocks of one column of the grid share k, `parts` takes the sums of each, and linear_sum
    // adds them up; else they are the outputs.
    __device__ __forceinline__ void finish(const Matrices &matrix, int block_row,
                                           float *parts) const {
        int inputs = min(m - first_input, X), fours = rows / 4;
        long long width = static_cast<long long>(gridDim.x) * rows;
        float *mine = parts + (static_cast<long long>(blockIdx.y) * m + first_input) * width +
                      static_cast<long long>(blockIdx.x) * rows;
        for (int i = threadIdx.x; i < inputs * fours; i += blockDim.x) {
            int input = i / fours, row = i % fours * 4;
            if (gridDim.y > 1) {
                float4 *to = reinterpret_cast<float4 *>(mine + input * width + row);
                __stcg(to, total(input, row));
            } else {
                matrix.store4(first_input + input, block_row + row, total(input, row));
            }
        }
    }
};

// What linear_sum does (quantized_tall.cu).
__device__ __forceinline__ void sum_parts(const float *parts, int splits, int rows, int m,
                                          const Matrices &all) {
    int input = blockIdx.y * 8 + threadIdx.x / 32, row = blockIdx.x * 128 + threadIdx.x % 32 * 4;
    int blocks = (all.n0 + rows - 1) / rows + (all.n1 + rows - 1) / rows + (all.n2 + rows - 1) / rows;
    int block = row / rows;
    if (input >= m || block >= blocks) return;
    long long width = static_cast<long long>(blocks) * rows;
    const float *from = parts + input * width + row;
    // All are on their way before the first is there.
    float4 each[8], total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int part = 0; part < 8; ++part) {
        each[part] = total;
        if (part >= splits) continue;
        each[part] = __ldcg(reinterpret_cast<const float4 *>(from + part * m * width));
    }
#pragma unroll
    for (int part = 0; part < 8; ++part) {
        total.x += each[part].x, total.y += each[part].y;
        total.z += each[part].z, total.w += each[part].w;
    }
    Matrices matrix = matrix_of(all, rows, block);
    matrix.store4(input, block * rows + row % rows, total);
}
