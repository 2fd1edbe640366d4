// y = x W^T + bias for many rows of x and weights in the GGML block formats, on the tensor cores of
// warpgroups: what a step of many sequences does, or of a short prompt. A byte of W is read and
// decoded once for X rows of x.
//
// linear_FORMAT_tX, X in 64, 128: rows of x [m][k] in bf16, up to three matrices of one format (see
//   outputs.cuh). W is [n][k] by rows, k a multiple of the block. x and the matrices begin at 16
//   bytes, and the last 16 bytes that a matrix begins are all readable, as they are in device
//   memory. Weights are multiplied as bf16, sums are f32.
//   A block has 128 rows of one matrix and X of x; `splits` blocks share k: grid (B, splits, T), B
//   the sum of n_i / 128, T m / X, each rounded up; block 256; dynamic shared memory
//   1024 + 2 (512 X + 128 SLOT) + 16384 bytes (of q4_k and q5_k + 8192), SLOT: 112 for q2_k; 144
//   for q3_k, q4_k and iq4_xs; 176 for q4_0, q4_1, q5_k, iq4_nl and mxfp4; 208 for q5_0 and q5_1;
//   240 for q6_k; 304 for q8_0.
//   Every block has a step of 256 elements of k: splits - 1 times ceil(steps / splits) are less
//   than all. If splits > 1, `parts` takes [splits][m][B 128] sums in f32, which linear_sum adds up
//   to the outputs; else it may be null.
//   The bits of an output depend on its row of x, its row of W, k and `splits` alone: not on m, X
//   or what else is in the launch.
//
// linear_sum: such parts of blocks of `rows` rows (64 or 128) of W to outputs, always in the same
//   order. grid (B rows / 128, rounded up, m / 8, rounded up), block 256.
//
// Two warpgroups have 64 rows of W each: a lane decodes the weights that are its operands out of
// shared memory into registers, while the tensor cores multiply those of the chunk before, and x
// comes to them from shared memory as it lies. A step of 256 elements of k is four chunks of 64.
// When a chunk is multiplied, the same chunk of the next step takes the place of the one before, so
// a step's time passes between sending for bytes and using them.
#include "tensor_blocks.cuh"

constexpr int CHUNKS = 4;
constexpr int CHUNK = STEP / CHUNKS;
constexpr int THREADS = 256;
// Rows of W of a block; of a warp.
constexpr int ROWS = 128;
constexpr int WARP_ROWS = 16;

// The four weights of each group of a piece that are one lane's: elements 2 i, 2 i + 1 and the same
// of the second eight, i in 0 to 3. Here as any piece, of which most is dropped.
template <typename F> struct Quarter {
    static __device__ __forceinline__ void codes(const uint8_t *block, int part, int i,
                                                 uint32_t (&words)[2]) {
        Piece piece;
        F::read(block, part, piece);
        uint32_t two = 0x10u + 0x22u * i;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            uint32_t low = __byte_perm(piece.codes[group][0], piece.codes[group][1], two);
            uint32_t high = __byte_perm(piece.codes[group][2], piece.codes[group][3], two);
            words[group] = __byte_perm(low, high, 0x5410u);
        }
    }
};

// Those of 16 bytes, which begin at an even address.
__device__ __forceinline__ uint32_t quarter(const uint8_t *at, int i) {
    uint32_t low = *reinterpret_cast<const uint16_t *>(at + 2 * i);
    uint32_t high = *reinterpret_cast<const uint16_t *>(at + 2 * i + 8);
    return low | high << 16;
}
// Low nibbles are of one group, high nibbles of the other.
__device__ __forceinline__ void nibbles(uint32_t four, uint32_t (&words)[2]) {
    words[0] = four & 0x0f0f0f0fu, words[1] = four >> 4 & 0x0f0f0f0fu;
}

template <> struct Quarter<Q4_0> {
    static __device__ __forceinline__ void codes(const uint8_t *block, int, int i,
                                                 uint32_t (&words)[2]) {
        nibbles(quarter(block + 2, i), words);
    }
};

template <> struct Quarter<Q8_0> {
    static __device__ __forceinline__ void codes(const uint8_t *block, int, int i,
                                                 uint32_t (&words)[2]) {
        words[0] = quarter(block + 2, i), words[1] = quarter(block + 18, i);
    }
};

template <> struct Quarter<Q4_K> {
    static __device__ __forceinline__ void codes(const uint8_t *block, int part, int i,
                                                 uint32_t (&words)[2]) {
        nibbles(quarter(block + 16 + 16 * part, i), words);
    }
};

template <> struct Quarter<Q5_K> {
    static __device__ __forceinline__ void codes(const uint8_t *block, int part, int i,
                                                 uint32_t (&words)[2]) {
        nibbles(quarter(block + 48 + 16 * part, i), words);
        uint32_t bits = quarter(block + 16 + 16 * (part % 2), i) >> (2 * (part / 2));
        words[0] |= bits << 4 & 0x10101010u;
        words[1] |= bits << 3 & 0x10101010u;
    }
};

template <> struct Quarter<Q6_K> {
    static __device__ __forceinline__ void codes(const uint8_t *block, int part, int i,
                                                 uint32_t (&words)[2]) {
        nibbles(quarter(block + 16 * part, i), words);
        const uint8_t *high = block + 128 + 32 * (part / 4) + 16 * (part % 2);
        uint32_t bits = quarter(high, i) >> (part / 2 % 2 * 2);
        words[0] |= bits << 4 & 0x30303030u;
        words[1] |= bits & 0x30303030u;
    }
};

template <typename F, int X> struct TallProduct {
    using Bytes = StepBytes<F>;
    static constexpr int PARTS = Bytes::PARTS;
    // 16 bytes more than a multiple of 32: what eight rows have at one place lies in all banks.
    static constexpr int SLOT = (16 * Bytes::COPIES + 15) / 32 * 32 + 16;
    // A stage is x, chunk by chunk, and then W.
    static constexpr int X_CHUNK = 2 * CHUNK * X;
    static constexpr int X_BYTES = CHUNKS * X_CHUNK;
    static constexpr int STAGE = X_BYTES + ROWS * SLOT;
    static constexpr int TILES = X / 8;
    // Groups of a piece that are so far apart are of two neighbouring chunks of x.
    static constexpr int AHEAD = F::NEXT < CHUNK ? 0 : 1;
    // Pieces of a step that have scales of their own.
    static constexpr int SCALES = ONE_PAIR<F> ? CHUNKS : 2 * CHUNKS;
    // Rows of x that are copied at once.
    static constexpr int ROUND = THREADS / 8;

    int lane, first_row;
    // Copies: two threads have a row of W, eight a row of x.
    RowCopies<F, 2> w_copies;
    const bf16 *x_source;
    int w_to, x_to, x_left, x_rows;
    long long x_pitch;
    // Products: where this lane's two rows of W begin in a stage, and how far after 16 bytes; the
    // row whose scales it reads, and where it puts them for the other lanes of the warp.
    int w_at, w_odd[2], scale_at, scale_odd;
    float4 *scales;

    __device__ __forceinline__ void begin(const bf16 *x, int m, int k, int first_step,
                                          int first_input, int block_row, const Matrices &matrix,
                                          float4 *all_scales) {
        int thread = threadIdx.x, warp = thread / 32, row_bytes = k / F::WEIGHTS * F::BYTES;
        lane = thread % 32, first_row = warp * WARP_ROWS;
        w_copies.begin(matrix.row(block_row + thread / 2, row_bytes), row_bytes, first_step);
        w_to = X_BYTES + thread / 2 * SLOT + 16 * (thread % 2);
        int at = first_step * STEP + thread % 8 * 8;
        x_source = x + static_cast<long long>(first_input + thread / 8) * k + at;
        x_to = swizzled(thread / 8, thread % 8), x_left = k - at;
        x_rows = m - first_input - thread / 8;
        x_pitch = static_cast<long long>(ROUND) * k;
        // Matrices begin at 16 bytes; so does every eighth row, and with odd rows every sixteenth.
        w_at = X_BYTES + (first_row + lane / 4) * SLOT;
        w_odd[0] = lane / 4 * row_bytes & 15, w_odd[1] = (lane / 4 + 8) * row_bytes & 15;
        scale_at = X_BYTES + (first_row + lane % 16) * SLOT;
        scale_odd = lane % 16 * row_bytes & 15;
        scales = all_scales + warp * SCALES * WARP_ROWS;
    }

    // Sends for a chunk of x; what is beyond k becomes zeros.
    __device__ __forceinline__ void fetch_x(uint8_t *to) {
        const bf16 *from = x_source;
#pragma unroll
        for (int round = 0; round < X / ROUND; ++round) {
            if (round * ROUND < x_rows) {
                cp_async16(to + x_to + 128 * round * ROUND, from, x_left > 0);
            }
            from += x_pitch;
        }
        x_source += CHUNK;
        x_left -= CHUNK;
    }

    // Rows of x that there are not are zeros.
    __device__ __forceinline__ void clear_x(uint8_t *shared) const {
        for (int chunk = 0; chunk < 2 * CHUNKS; ++chunk) {
            uint8_t *to = shared + chunk / CHUNKS * STAGE + chunk % CHUNKS * X_CHUNK + x_to;
#pragma unroll
            for (int round = 0; round < X / ROUND; ++round) {
                if (round * ROUND < x_rows) continue;
                uint4 zero = make_uint4(0, 0, 0, 0);
                *reinterpret_cast<uint4 *>(to + 128 * round * ROUND) = zero;
            }
        }
    }

    // Scales of all pieces of a step; each half of the warp has every second of them.
    __device__ __forceinline__ void put_scales(const uint8_t *stage, int step, int left) const {
        const uint8_t *row = stage + scale_at + Bytes::odd(scale_odd, step);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < SCALES; i += 2) {
            int at = i + lane / 16;
            scales[at * WARP_ROWS + lane % 16] =
                Bytes::scales(row, ONE_PAIR<F> ? 2 * at : at, left);
        }
        __syncwarp();
    }

    // This lane's codes of a chunk: of two rows, two pieces and two groups.
    __device__ __forceinline__ void read(const uint8_t *stage, int chunk, int step,
                                         uint32_t (&words)[2][2][2]) const {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const uint8_t *from = stage + w_at + 8 * row * SLOT + Bytes::odd(w_odd[row], step);
#pragma unroll
            for (int piece = 0; piece < 2; ++piece) {
                int part = 2 * chunk + piece;
                Quarter<F>::codes(from + Bytes::block_of(part), part % PARTS, lane % 4,
                                  words[row][piece]);
            }
        }
    }

    // The weights that they are, as operands of four products, one for each group.
    __device__ __forceinline__ void decode(int chunk, const uint32_t (&words)[2][2][2],
                                           uint32_t (&a)[4][4]) const {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
#pragma unroll
            for (int piece = 0; piece < 2; ++piece) {
                int at = ONE_PAIR<F> ? chunk : 2 * chunk + piece;
                float4 scale = scales[at * WARP_ROWS + lane / 4 + 8 * row];
#pragma unroll
                for (int group = 0; group < 2; ++group) {
                    uint32_t pairs[2];
                    weights_of<F>(words[row][piece][group], group ? scale.z : scale.x,
                                  group ? scale.w : scale.y, pairs);
                    uint32_t(&operand)[4] = a[2 * piece + group];
                    operand[row] = pairs[0], operand[row + 2] = pairs[1];
                }
            }
        }
    }

    // Sends a chunk to the tensor cores. The first of all has no sums before it.
    __device__ __forceinline__ void multiply(const uint8_t *stage, int chunk, bool first,
                                             const uint32_t (&a)[4][4],
                                             float (&sum)[TILES][4]) const {
        warpgroup_begin();
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            int part = 2 * chunk + group / 2;
            int at = part / PARTS * F::WEIGHTS + F::start(part % PARTS) + group % 2 * F::NEXT;
            warpgroup_mma(sum, a[group], stage + at / CHUNK * X_CHUNK, at % CHUNK,
                          !first || group > 0);
        }
        warpgroup_commit();
    }

    // Multiplies steps first.. of k, one at least.
    __device__ __forceinline__ void run(uint8_t *shared, int first, int steps, int k,
                                        float (&sum)[TILES][4]) {
        uint8_t *full = shared, *next = shared + STAGE;
        // Weights are on their way before x is there.
        w_copies.fetch(full + w_to);
        grid_wait();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            fetch_x(full + chunk * X_CHUNK);
            cp_async_commit();
        }
        int step = first;
        uint32_t words[2][2][2];
        do {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                cp_async_wait<CHUNKS - 1 - AHEAD>();
                warpgroup_written();
                // The chunk is there for all, and all are done with the one before the last.
                __syncthreads();
                if (steps > 1) {
                    if (chunk == 0) w_copies.fetch(next + w_to);
                    fetch_x(next + chunk * X_CHUNK);
                }
                cp_async_commit();
                if (chunk == 0) {
                    put_scales(full, step, k - step * STEP);
                    read(full, 0, step, words);
                }
                uint32_t a[4][4];
                decode(chunk, words, a);
                multiply(full, chunk, chunk == 0 && step == first, a, sum);
                if (chunk + 1 < CHUNKS) read(full, chunk + 1, step, words);
                // What the chunk before was multiplied from may be written behind the barrier.
                warpgroup_wait<1>();
            }
            uint8_t *empty = full;
            full = next, next = empty;
            ++step;
        } while (--steps > 0);
        cp_async_wait<0>();
        warpgroup_wait<0>();
        __syncthreads();
    }

    // Puts the sums of this thread where the others of the block find them.
    __device__ __forceinline__ void share(const BlockSums<1, X> &all,
                                          const float (&sum)[TILES][4]) const {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int input = 8 * tile + 2 * (lane % 4) + i % 2;
                all.at(0, input, first_row + lane / 4 + 8 * (i / 2)) = sum[tile][i];
            }
        }
        __syncthreads();
    }
};

template <typename F, int X>
__device__ __forceinline__ void linear_tall(const bf16 *x, int m, int k, float *parts,
                                            const Matrices &matrices) {
    using Product = TallProduct<F, X>;
    DYNAMIC_SHARED(uint8_t, room);
    uint8_t *shared = room + (-reinterpret_cast<uintptr_t>(room) & 1023);
    int block = blockIdx.x, first_input = blockIdx.z * X;
    Matrices matrix = matrix_of(matrices, ROWS, block);
    int all_steps = (k + STEP - 1) / STEP, each = (all_steps + gridDim.y - 1) / gridDim.y;
    int first = blockIdx.y * each;
    float4 *scales = reinterpret_cast<float4 *>(shared + 2 * Product::STAGE);
    Product product;
    product.begin(x, m, k, first, first_input, block * ROWS, matrix, scales);
    product.clear_x(shared);
    float sum[Product::TILES][4];
    product.run(shared, first, min(each, all_steps - first), k, sum);
    BlockSums<1, X> all = {reinterpret_cast<float *>(shared), ROWS, first_input, m};
    product.share(all, sum);
    all.finish(matrix, block * ROWS, parts);
}

extern "C" __global__ void linear_sum(const float *parts, int splits, int rows, int m,
                                      MATRICES_ARGUMENTS) {
    grid_begin();
    sum_parts(parts, splits, rows, m, MATRICES);
}

#define LINEAR_TALL(NAME, FORMAT, X, BLOCKS)                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                 \
        linear_##NAME##_t##X(const bf16 *x, int m, int k, float *parts,                           \
                             MATRICES_ARGUMENTS) {                                                \
        grid_go();                                                                                \
        linear_tall<FORMAT, X>(x, m, k, parts, MATRICES);                                         \
    }
#define LINEAR(NAME, FORMAT)                                                                      \
    LINEAR_TALL(NAME, FORMAT, 64, 2)                                                              \
    LINEAR_TALL(NAME, FORMAT, 128, 1)
LINEAR(q4_0, Q4_0)
LINEAR(q4_1, Q4_1)
LINEAR(q5_0, Q5_0)
LINEAR(q5_1, Q5_1)
LINEAR(q8_0, Q8_0)
LINEAR(q2_k, Q2_K)
LINEAR(q3_k, Q3_K)
LINEAR(q4_k, Q4_K)
LINEAR(q5_k, Q5_K)
LINEAR(q6_k, Q6_K)
LINEAR(iq4_nl, IQ4_NL)
LINEAR(iq4_xs, IQ4_XS)
LINEAR(mxfp4, MXFP4)
