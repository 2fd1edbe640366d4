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
//
// A warp has two or four rows of W and takes them 1024 weights at a time, 32 a lane (quant.cuh).
// Blocks of most formats are not aligned to anything wide. So the bytes come by asynchronous copies
// of 16, in order and several turns ahead, and lanes read the parts of their blocks from shared
// memory, where that costs little.
#include "outputs.cuh"
#include "quant.cuh"

constexpr int WARPS = 4;
// Weights of a row that a warp takes in one turn, a piece for each lane.
constexpr int TURN = 1024;
// Turns of rows that are in shared memory or on their way, for each warp.
constexpr int SLOTS = 8;

// 16 codes of x for each group of a piece, and scale and sums of the 32 that they belong to.
struct Input {
    uint4 codes[2];
    uint2 scale[2];
};

__device__ __forceinline__ int add_dot16(const uint32_t (&w)[4], const uint4 &x, int sum) {
    sum = __dp4a(static_cast<int>(w[0]), static_cast<int>(x.x), sum);
    sum = __dp4a(static_cast<int>(w[1]), static_cast<int>(x.y), sum);
    sum = __dp4a(static_cast<int>(w[2]), static_cast<int>(x.z), sum);
    return __dp4a(static_cast<int>(w[3]), static_cast<int>(x.w), sum);
}

// Adds up N numbers over the lanes of a warp, each in the order of warp_sum: number i ends in the
// lanes from 32 / N * i on. A step halves the numbers a lane has, so it takes N - 1 exchanges and
// not 5 N.
template <int N, int STEP = 16> __device__ __forceinline__ float sum_each(float (&v)[N], int lane) {
    if constexpr (N == 1) {
        float x = v[0];
#pragma unroll
        for (int other = STEP; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
        return x;
    } else {
        float half[N / 2];
        bool upper = lane & STEP;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            float kept = upper ? v[i + N / 2] : v[i], given = upper ? v[i] : v[i + N / 2];
            half[i] = kept + __shfl_xor_sync(0xffffffffu, given, STEP);
        }
        return sum_each<N / 2, STEP / 2>(half, lane);
    }
}

// ROWS rows of W of one warp against M rows of x, as one lane sees it.
template <typename F, int M, int ROWS> struct WarpProduct {
    static constexpr int PARTS = F::WEIGHTS / 32;
    static constexpr int TURN_BYTES = TURN / F::WEIGHTS * F::BYTES;
    // Rows of blocks of whole 16 bytes begin at 16 bytes, others anywhere.
    static constexpr bool ALIGNED = F::BYTES % 16 == 0;
    static constexpr int SLOT_BYTES = ALIGNED ? TURN_BYTES : (TURN_BYTES + 30) / 16 * 16;
    // Turns in shared memory, and their bytes.
    static constexpr int TURNS = SLOTS / ROWS;
    static constexpr int STEP = ROWS * SLOT_BYTES;

    int lane, m, k;
    // Where the next copies of this lane come from, and what of the row is left from there on.
    const uint8_t *source[ROWS];
    int left;
    // The part of x that belongs to this lane's piece of the turn.
    const int8_t *codes;
    const uint2 *scales;

    __device__ __forceinline__ void begin(const Matrices &matrices, int first_row,
                                          const int8_t *all_codes, const uint2 *all_scales) {
        int row_bytes = k / F::WEIGHTS * F::BYTES;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            source[row] = matrices.row(first_row + row, row_bytes) + 16 * lane;
        }
        left = row_bytes - 16 * lane;
        int at = lane / PARTS * F::WEIGHTS + F::start(lane % PARTS);
        codes = all_codes + at;
        scales = all_scales + at / 32;
    }

    // How far a row was after a multiple of 16, `turns` turns before its source.
    __device__ __forceinline__ int odd(int row, int turns) const {
        if (ALIGNED) return 0;
        uint32_t low = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(source[row]));
        return (low - turns * TURN_BYTES) & 15;
    }

    // Sends for the bytes of the next turn, if there is one.
    __device__ __forceinline__ void fetch(uint8_t *slots) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            int before = odd(row, 0);
            const uint8_t *from = source[row] - before;
            uint8_t *to = slots + row * SLOT_BYTES + 16 * lane;
#pragma unroll
            for (int at = 0; at < SLOT_BYTES; at += 512) {
                bool inside = at + 512 <= SLOT_BYTES || 16 * lane < SLOT_BYTES - at;
                if (inside && at - before < left) cp_async16(to + at, from + at, true);
            }
            source[row] += TURN_BYTES;
        }
        left -= TURN_BYTES;
        cp_async_commit();
    }

    __device__ __forceinline__ Input input(int row) const {
        row = min(row, m - 1);
        const int8_t *from = codes + static_cast<long long>(row) * k;
        const uint2 *scale = scales + static_cast<long long>(row) * (k / 32);
        Input x;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            x.codes[group] = *reinterpret_cast<const uint4 *>(from + group * F::NEXT);
            x.scale[group] = scale[group * F::NEXT / 32];
        }
        return x;
    }

    __device__ __forceinline__ float add(const Piece &w, const Input &x, float sum) const {
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            int half = (F::start(lane % PARTS) + group * F::NEXT) / 16 % 2;
            int ones = static_cast<int16_t>(x.scale[group].y >> (16 * half));
            int dot = add_dot16(w.codes[group], x.codes[group], 0);
            if (F::OFFSET != 0) dot -= F::OFFSET * ones;
            float product = w.scale[group] * static_cast<float>(dot);
            if (F::HAS_LEAST) product = fmaf(-w.least[group], static_cast<float>(ones), product);
            sum = fmaf(product, __uint_as_float(x.scale[group].x), sum);
        }
        return sum;
    }

    // Multiplies this lane's piece of a turn, once the bytes are there.
    __device__ __forceinline__ void take(const uint8_t *slots, bool valid,
                                         float (&sums)[M * ROWS]) const {
        Input next = {};
        if (valid) next = input(0);
        cp_async_wait<TURNS - 1>();
        __syncwarp();
        if (!valid) return;
        Piece pieces[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const uint8_t *begin = slots + row * SLOT_BYTES + odd(row, TURNS);
            F::read(begin + lane / PARTS * F::BYTES, lane % PARTS, pieces[row]);
        }
#pragma unroll
        for (int i = 0; i < M; ++i) {
            Input x = next;
            if (i + 1 < M) next = input(i + 1);
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                sums[i * ROWS + row] = add(pieces[row], x, sums[i * ROWS + row]);
            }
        }
    }

    // Output i % ROWS of row i / ROWS of x is in the lanes from 32 / (M * ROWS) * i on.
    __device__ __forceinline__ float run(uint8_t *slots) {
        float sums[M * ROWS] = {};
#pragma unroll
        for (int turn = 0; turn + 1 < TURNS; ++turn) fetch(slots + turn * STEP);
        grid_wait(); // weights are on their way before x is there
        uint8_t *full = slots, *empty = slots + (TURNS - 1) * STEP;
        int turn = 0;
        for (int piece = lane; piece - lane < k / 32; piece += 32) {
            // All lanes are done with what was in the slots to fill.
            __syncwarp();
            fetch(empty);
            take(full, piece < k / 32, sums);
            codes += TURN;
            scales += TURN / 32;
            empty = full;
            turn = (turn + 1) % TURNS;
            full += turn == 0 ? -(TURNS - 1) * STEP : STEP;
        }
        return sum_each(sums, lane);
    }
};

template <typename F, int M, int ROWS>
__device__ __forceinline__ void linear_blocks(const int8_t *codes, const uint2 *scales, int m,
                                              int k, const Matrices &matrices) {
    using Product = WarpProduct<F, M, ROWS>;
    __shared__ __align__(16) uint8_t slots[WARPS][SLOTS * Product::SLOT_BYTES];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = (blockIdx.x * WARPS + warp) * ROWS;
    if (first >= matrices.rows()) return;
    Product product;
    product.lane = lane, product.m = m, product.k = k;
    product.begin(matrices, first, codes, scales);
    float sum = product.run(slots[warp]);
    constexpr int LANES = 32 / (M * ROWS);
    int input = lane / LANES / ROWS, row = first + lane / LANES % ROWS;
    if (lane % LANES == 0 && input < m && row < matrices.rows()) matrices.store(input, row, sum);
}

// Q4_K and Q6_K, which most weights are in, are read faster than a multiprocessor issues the above
// for them. They go another way: a lane has 64 weights of a block, so that scales are unpacked once
// for all of them; x, with what is made of its sums, lies in shared memory for all warps of a
// block; and integers become numbers by way of their bits, which is a sum at full speed.
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

template <typename F, int M> struct LongProduct {
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
    int lane, m, k;
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

    // x from weight `from` on; the last row stands for those beyond it.
    __device__ __forceinline__ void stage(const int8_t *codes, const uint2 *scales, int from) {
        int chunks = min(STAGE * LONG_TURN, k - from) / 16;
#pragma unroll
        for (int row = 0; row < M; ++row) {
            long long at = static_cast<long long>(min(row, m - 1)) * k + from;
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

template <typename F, int M>
__device__ __forceinline__ void linear_long(const int8_t *codes, const uint2 *scales, int m, int k,
                                            const Matrices &matrices) {
    using Product = LongProduct<F, M>;
    __shared__ __align__(16) typename Product::Shared shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = (blockIdx.x * WARPS + warp) * LONG_ROWS;
    Product product{shared, lane, m, k};
    product.begin(matrices, first, shared.slots[warp]);
    float sum = product.run(codes, scales);
    constexpr int LANES = 32 / (M * LONG_ROWS);
    int input = lane / LANES / LONG_ROWS, row = first + lane / LANES % LONG_ROWS;
    if (lane % LANES == 0 && input < m && row < matrices.rows()) matrices.store(input, row, sum);
}

#define LINEAR_LONG_M(NAME, FORMAT, M, BLOCKS)                                                    \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                              \
        linear_##NAME##_m##M(const int8_t *codes, const uint2 *scales, int m, int k,              \
                             MATRICES_ARGUMENTS) {                                                \
        grid_go();                                                                                \
        linear_long<FORMAT, M>(codes, scales, m, k, MATRICES);                                    \
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
        linear_blocks<FORMAT, M, ROWS>(codes, scales, m, k, MATRICES);                            \
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
