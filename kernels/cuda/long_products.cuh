// Products as in warp_products.cuh, of the two formats that most weights are in.
//
// Q4_K and Q6_K are read faster than a multiprocessor issues those for them. They go another way: a
// lane has 64 weights of a block, so that scales are unpacked once for all of them; x, with what is
// made of its sums, lies in shared memory for all warps of a block; and integers become numbers by
// way of their bits, which is a sum at full speed.
#pragma once

#include "warp_products.cuh"

constexpr int LONG_TURN = 2048;
constexpr int LONG_ROWS = 2;
// Turns of rows in shared memory or on their way.
constexpr int LONG_TURNS = 2;

// 1.5 2^23 as a number and as bits: added to the bits, an integer below 2^22 adds to the number.
constexpr float WHOLE = 12582912.0f;
constexpr int WHOLE_BITS = 0x4b400000;

// A sum that began with WHOLE_BITS.
__device__ __forceinline__ float whole(int sum) {
    return __uint_as_float(static_cast<uint32_t>(sum)) - WHOLE;
}

// What the compiler must not know: it would take a choice of bits apart into two instructions.
__constant__ uint32_t LOW_NIBBLES = 0x0f0f0f0fu;
__constant__ uint32_t HIGH_NIBBLES = 0xf0f0f0f0u;
__constant__ uint32_t TWO_PAIRS = 0x33333333u;

// Lane `lane` of a turn has 64 weights of block lane / 4 in four chunks of 16. `first_chunk` is the
// place of the first in the turn, CHUNK_STEP the way to the next; `first_scale` is the first of its
// scales of x. Chunks of x change places within 128 (`moved`), so that eight lanes read all banks
// of shared memory at once.
//
// A format says how its bytes are read from the slots (`read`), what becomes of them once new ones
// may take their place (`unpack`), what is kept of the scale and sums of 32 of x (`prepare`), what
// of it a lane needs (`input`), and how a lane's 64 products are added to a sum (`add`).

// Chunks 0 and 1 are the low nibbles of 32 bytes, 2 and 3 the high ones.
struct LongQ4_K {
    static constexpr int BYTES = 144;
    static constexpr int CHUNK_STEP = 1;
    static __device__ __forceinline__ int first_chunk(int lane) { return 4 * lane; }
    static __device__ __forceinline__ int first_scale(int lane) { return 2 * lane; }

    struct Bytes {
        uint32_t head[4], words[2][4];
    };
    struct Weights {
        // High codes are 16 (code - 8).
        uint32_t codes[4][4];
        float scale[2], least[2];
    };
    struct Input {
        float scale, scale16, sum[2], eight;
    };

    // Of 32 of x: the scale and the sum of all.
    static __device__ __forceinline__ uint2 prepare(uint2 x) {
        int ones = static_cast<int16_t>(x.y) + static_cast<int16_t>(x.y >> 16);
        float sum = __uint_as_float(x.x) * static_cast<float>(ones);
        return make_uint2(x.x, __float_as_uint(sum));
    }
    static __device__ __forceinline__ Input input(const uint2 *scales, int) {
        uint4 both = *reinterpret_cast<const uint4 *>(scales);
        Input x;
        x.scale = __uint_as_float(both.x), x.sum[0] = __uint_as_float(both.y);
        x.scale16 = __uint_as_float(both.z) * 0.0625f, x.sum[1] = __uint_as_float(both.w);
        x.eight = x.sum[1] * 8.0f;
        return x;
    }

    static __device__ __forceinline__ void read(const uint8_t *block, int lane, Bytes &bytes) {
        const uint8_t *own = block + 16 + 32 * (lane % 4);
        read_vector(block, bytes.head);
        read_vector(own, bytes.words[0]);
        read_vector(own + 16, bytes.words[1]);
    }
    static __device__ __forceinline__ void unpack(const Bytes &bytes, int lane, Weights &w) {
        const uint32_t(&head)[4] = bytes.head;
        int run = lane % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                w.codes[i][j] = bytes.words[i][j] & 0x0f0f0f0fu;
                w.codes[i + 2][j] = (bytes.words[i][j] & HIGH_NIBBLES) ^ 0x80808080u;
            }
        }
        // Two scales and two minima, a byte each. Those of the last two runs have their low bits
        // in the last word, their high bits above those of the first two.
        bool early = run < 2;
        uint32_t own = early ? 0x3f3f3f3fu : 0x0f0f0f0fu, above = early ? 0 : 0x30303030u;
        uint32_t two = run % 2 == 0 ? 0x5410u : 0x7632u;
        uint32_t first = __byte_perm(head[1], head[2], two);
        uint32_t last = __byte_perm(head[3], head[3] >> 4, two);
        uint32_t six = ((early ? first : last) & own) | (first >> 2 & above);
        float d = half_of(head[0]), dmin = half_of(head[0] >> 16);
        // 2^23 and a byte as a number; both products are exact.
        float more = d * -8388608.0f, more_min = dmin * 8388608.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float scale = __uint_as_float(__byte_perm(six, 0x4b000000u, 0x7440u + i));
            float least = __uint_as_float(__byte_perm(six, 0x4b000000u, 0x7442u + i));
            w.scale[i] = fmaf(d, scale, more);
            w.least[i] = fmaf(-dmin, least, more_min);
        }
    }

    static __device__ __forceinline__ float add(const Weights &w, const uint4 (&codes)[4],
                                                const Input &x, float sum) {
        int low = add_dot16(w.codes[1], codes[1], add_dot16(w.codes[0], codes[0], WHOLE_BITS));
        int high = add_dot16(w.codes[3], codes[3], add_dot16(w.codes[2], codes[2], WHOLE_BITS));
        sum = fmaf(w.least[0], x.sum[0], sum);
        sum = fmaf(w.least[1], x.sum[1], sum);
        sum = fmaf(w.scale[0], whole(low) * x.scale, sum);
        return fmaf(w.scale[1], fmaf(whole(high), x.scale16, x.eight), sum);
    }
};

// Chunk i is of quarter i of a half of the block: the low nibbles of 16 bytes and of 16 others,
// then their high nibbles. 16 bytes have the two high bits of all four.
struct LongQ6_K {
    static constexpr int BYTES = 210;
    static constexpr int CHUNK_STEP = 2;
    static __device__ __forceinline__ int first_chunk(int lane) {
        return lane / 2 * 8 + lane % 2;
    }
    static __device__ __forceinline__ int first_scale(int lane) { return lane / 2 * 4; }

    struct Bytes {
        // From the multiple of 4 that the 16 bytes begin in.
        uint32_t first[5], second[5], high[5];
        int shift, scale[4];
        float d;
    };
    struct Weights {
        uint32_t codes[4][4];
        float scale[4];
    };
    struct Input {
        float scale[4];
        int begin[4];
    };

    static __device__ __forceinline__ uint2 prepare(uint2 x) { return x; }
    static __device__ __forceinline__ Input input(const uint2 *scales, int lane) {
        const uint4 *from = reinterpret_cast<const uint4 *>(scales);
        uint4 first = from[0], last = from[1];
        const uint32_t scale[4] = {first.x, first.z, last.x, last.z};
        const uint32_t ones[4] = {first.y, first.w, last.y, last.w};
        Input x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x.scale[i] = __uint_as_float(scale[i]);
            // The sum of this lane's 16; codes are 32 too large.
            int sum = static_cast<int>(ones[i] << (lane % 2 == 0 ? 16 : 0)) >> 16;
            x.begin[i] = WHOLE_BITS - 32 * sum;
        }
        return x;
    }

    static __device__ __forceinline__ void read(const uint8_t *block, int lane, Bytes &bytes) {
        int half = lane / 2 % 2, side = lane % 2;
        int odd = static_cast<int>(reinterpret_cast<uintptr_t>(block)) & 3;
        const uint8_t *even = block - odd + 16 * side + 32 * half;
        read_aligned(even + 32 * half, bytes.first);
        read_aligned(even + 32 * half + 32, bytes.second);
        read_aligned(even + 128, bytes.high);
        bytes.shift = 8 * odd;
        bytes.d = half_at(block + 208);
        const int8_t *scales = reinterpret_cast<const int8_t *>(block) + 192 + 8 * half + side;
#pragma unroll
        for (int i = 0; i < 4; ++i) bytes.scale[i] = scales[2 * i];
    }
    static __device__ __forceinline__ void unpack(const Bytes &bytes, int, Weights &w) {
        int shift = bytes.shift;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            auto words = [&](const uint32_t(&all)[5], int more) {
                return __funnelshift_r(all[i], all[i + 1], shift + more);
            };
            // Bits 0, 1 and 4, 5 of each byte belong to chunks 0 and 2, the others to 1 and 3.
            uint32_t evens = words(bytes.high, 0) & TWO_PAIRS;
            uint32_t odds = words(bytes.high, 2) & TWO_PAIRS;
            w.codes[0][i] = merge(words(bytes.first, 0), evens << 4);
            w.codes[1][i] = merge(words(bytes.second, 0), odds << 4);
            w.codes[2][i] = merge(words(bytes.first, 4), evens);
            w.codes[3][i] = merge(words(bytes.second, 4), odds);
        }
        float more = bytes.d * -WHOLE;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // An exact product.
            uint32_t bits = static_cast<uint32_t>(WHOLE_BITS + bytes.scale[i]);
            w.scale[i] = fmaf(bytes.d, __uint_as_float(bits), more);
        }
    }

    // The low nibbles of one, the high ones of the other.
    static __device__ __forceinline__ uint32_t merge(uint32_t low, uint32_t high) {
        return (low & LOW_NIBBLES) | (high & ~LOW_NIBBLES);
    }

    static __device__ __forceinline__ float add(const Weights &w, const uint4 (&codes)[4],
                                                const Input &x, float sum) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float dot = whole(add_dot16(w.codes[i], codes[i], x.begin[i]));
            sum = fmaf(w.scale[i], dot * x.scale[i], sum);
        }
        return sum;
    }
};

template <typename F, int M, typename X> struct LongProduct {
    static constexpr int BLOCKS = LONG_TURN / 256;
    static constexpr int TURN_BYTES = BLOCKS * F::BYTES;
    static constexpr bool ALIGNED = F::BYTES % 16 == 0;
    static constexpr int SLOT_BYTES = ALIGNED ? TURN_BYTES : (TURN_BYTES + 30) / 16 * 16;
    static constexpr int STEP = LONG_ROWS * SLOT_BYTES;
    // Turns of x that are in shared memory at once.
    static constexpr int STAGE = M < 4 ? 4 / M : 1;

    struct Shared {
        uint4 codes[M][STAGE * LONG_TURN / 16];
        uint2 scales[M][STAGE * LONG_TURN / 32];
        uint8_t slots[WARPS][LONG_TURNS * STEP];
    };

    Shared &shared;
    X x_rows;
    int lane, k;
    // Where the next copies of this lane come from, and what of the row is left from there on.
    // Sources are multiples of 16.
    const uint8_t *source[LONG_ROWS];
    int left[ALIGNED ? 1 : LONG_ROWS];
    // This lane's place and blocks in the slots of the turn, and the way to the next turn's.
    uint8_t *place;
    const uint8_t *block[LONG_ROWS];
    int step;
    // Its chunks and scales of x.
    const uint4 *chunk[4];
    const uint2 *scale;

    static __device__ __forceinline__ int moved(int chunk) {
        return chunk ^ chunk / 8 % 4 * F::CHUNK_STEP;
    }

    __device__ __forceinline__ void begin(const Matrices &matrices, int first_row,
                                          uint8_t *slots) {
        int row_bytes = k / 256 * F::BYTES;
        place = slots + 16 * lane;
#pragma unroll
        for (int row = 0; row < LONG_ROWS; ++row) {
            const uint8_t *from = matrices.row(first_row + row, row_bytes);
            int before = ALIGNED ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(from)) & 15;
            source[row] = from - before + 16 * lane;
            block[row] = slots + row * SLOT_BYTES + before + lane / 4 * F::BYTES;
            left[ALIGNED ? 0 : row] = row_bytes + before - 16 * lane;
        }
        step = STEP;
    }

    // Sends for the bytes of the next turn, if there is one.
    __device__ __forceinline__ void fetch(uint8_t *to) {
#pragma unroll
        for (int row = 0; row < LONG_ROWS; ++row) {
#pragma unroll
            for (int at = 0; at < SLOT_BYTES; at += 512) {
                bool inside = at + 512 <= SLOT_BYTES || 16 * lane < SLOT_BYTES - at;
                if (inside && at < left[ALIGNED ? 0 : row]) {
                    cp_async16(to + row * SLOT_BYTES + at, source[row] + at, true);
                }
            }
            source[row] += TURN_BYTES;
        }
#pragma unroll
        for (int &bytes : left) bytes -= TURN_BYTES;
        cp_async_commit();
    }

    // x from weight `from` on.
    __device__ __forceinline__ void stage(const int8_t *codes, const uint2 *scales, int from) {
        int chunks = min(STAGE * LONG_TURN, k - from) / 16;
#pragma unroll
        for (int row = 0; row < M; ++row) {
            long long at = static_cast<long long>(x_rows.row(row)) * k + from;
            const uint4 *these = reinterpret_cast<const uint4 *>(codes + at);
#pragma unroll
            for (int first = 0; first < STAGE * LONG_TURN / 16; first += 32 * WARPS) {
                int i = first + threadIdx.x;
                if (i < chunks) shared.codes[row][first + moved(threadIdx.x)] = these[i];
            }
#pragma unroll
            for (int first = 0; first < STAGE * LONG_TURN / 32; first += 32 * WARPS) {
                int i = first + threadIdx.x;
                if (i < chunks / 2) shared.scales[row][i] = F::prepare(scales[at / 32 + i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            chunk[i] = shared.codes[0] + F::first_chunk(lane) + (i ^ lane / 2 % 4) * F::CHUNK_STEP;
        }
        scale = shared.scales[0] + F::first_scale(lane);
    }

    __device__ __forceinline__ void multiply(const typename F::Bytes (&bytes)[LONG_ROWS],
                                             float (&sums)[M * LONG_ROWS]) const {
        typename F::Weights w[LONG_ROWS];
#pragma unroll
        for (int row = 0; row < LONG_ROWS; ++row) F::unpack(bytes[row], lane, w[row]);
#pragma unroll
        for (int i = 0; i < M; ++i) {
            uint4 codes[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) codes[j] = chunk[j][i * (STAGE * LONG_TURN / 16)];
            typename F::Input x = F::input(scale + i * (STAGE * LONG_TURN / 32), lane);
#pragma unroll
            for (int row = 0; row < LONG_ROWS; ++row) {
                float &sum = sums[i * LONG_ROWS + row];
                sum = F::add(w[row], codes, x, sum);
            }
        }
    }

    // Multiplies a turn, of which this lane has a block if `valid`, and goes on to the next.
    __device__ __forceinline__ void take(bool valid, float (&sums)[M * LONG_ROWS]) {
        cp_async_wait<LONG_TURNS - 1>();
        __syncwarp();
        typename F::Bytes bytes[LONG_ROWS];
        if (valid) {
#pragma unroll
            for (int row = 0; row < LONG_ROWS; ++row) F::read(block[row], lane, bytes[row]);
        }
        // All lanes are done with what was in the slots to fill.
        __syncwarp();
        fetch(place);
        if (valid) multiply(bytes, sums);
        place += step;
#pragma unroll
        for (int row = 0; row < LONG_ROWS; ++row) block[row] += step;
        step = -step;
#pragma unroll
        for (int i = 0; i < 4; ++i) chunk[i] += LONG_TURN / 16;
        scale += LONG_TURN / 32;
    }

    // Output i % LONG_ROWS of row i / LONG_ROWS of x is in the lanes from
    // 32 / (M * LONG_ROWS) * i on.
    __device__ __forceinline__ float run(const int8_t *codes, const uint2 *scales) {
        float sums[M * LONG_ROWS] = {};
#pragma unroll
        for (int turn = 0; turn < LONG_TURNS; ++turn) fetch(place + turn * STEP);
        grid_wait(); // weights are on their way before x is there
        for (int from = 0; from < k; from += STAGE * LONG_TURN) {
            if (from > 0) __syncthreads();
            stage(codes, scales, from);
            __syncthreads();
            int end = min(k, from + STAGE * LONG_TURN);
#pragma unroll 1
            for (int weight = from; weight < end; weight += LONG_TURN) {
                take(weight + lane / 4 * 256 < k, sums);
            }
        }
        return sum_each(sums, lane);
    }
};

template <typename F, int M, typename X>
__device__ __forceinline__ void linear_long(typename LongProduct<F, M, X>::Shared &shared,
                                            const int8_t *codes, const uint2 *scales,
                                            const X &x_rows, int k, const Matrices &matrices) {
    using Product = LongProduct<F, M, X>;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = (blockIdx.x * WARPS + warp) * LONG_ROWS;
    Product product{shared, x_rows, lane, k};
    product.begin(matrices, first, shared.slots[warp]);
    float sum = product.run(codes, scales);
    constexpr int LANES = 32 / (M * LONG_ROWS);
    int input = lane / LANES / LONG_ROWS, row = first + lane / LANES % LONG_ROWS;
    if (lane % LANES == 0 && input < x_rows.count() && row < matrices.rows()) {
        matrices.store(x_rows.output(input), row, sum);
    }
}
