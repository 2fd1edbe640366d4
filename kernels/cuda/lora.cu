// Low-rank updates of some rows of a projection: y[row] += scale * ratio * (B (A x[row])), the
// updates of all adapters and of all projections of one input in a launch. See src/lora for what an
// update is; the order is lora_gain, then for each part of the groups lora_shrink (or
// lora_shrink_ids) and lora_expand.
//
// A job is the rows of one group, one of its parts and one projection. `rows` lists `count` rows of
// x and y, each once; h is [count][rank] in f32. Jobs of one launch write different elements.
//
// lora_shrink: h = A x[row], A [rank][k], k a multiple of 8, x and A begin at 16 bytes. The rows
//   are gathered 16 at a time for the tensor cores.
//   grid (largest rank / 16, largest count / 16, jobs), rounded up; block 256.
// lora_shrink_ids: h = column ids[row] of A, which is [rank][k]: x is the unit vector of an id.
//   grid (any, 1, jobs), block any (256).
// lora_expand: y[row] += scale * ratio * (B h), B [n][rank], rank at most 512, y [.][n] in f32 or
//   bf16, ratio [n] or null.
//   grid (largest n / 128, largest count / 8, jobs), rounded up; block 128.
// lora_gain: y[row] += gain * y[row], gain [n].
//   grid any, block any (256).
#include "tensor_rows.cuh"

struct LoraJob {
    const bf16 *a, *b;
    const float *ratio;
    const int *rows;
    float *h;
    void *y;
    int count, rank, n;
    float scale;
};

// As many as fit into the arguments of a kernel with room to spare.
constexpr int MAX_JOBS = 32;
struct LoraJobs {
    LoraJob of[MAX_JOBS];
};

extern "C" __global__ void __launch_bounds__(TENSOR_THREADS, 4)
    lora_shrink(const bf16 *x, int k, const __grid_constant__ LoraJobs jobs) {
    grid_go();
    using Rows = TensorRows<2, true>;
    __shared__ Rows tile;
    const LoraJob &job = jobs.of[blockIdx.z];
    int lane = threadIdx.x % 32, count = job.count, rank = job.rank;
    int first_rank = blockIdx.x * Rows::W_ROWS, first = blockIdx.y * Rows::X_ROWS;
    if (first_rank >= rank || first >= count) return;
    const bf16 *w[2], *inputs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int of_rank = min(first_rank + 8 * half + lane / 4, rank - 1);
        int listed = min(first + 8 * half + lane / 4, count - 1);
        w[half] = job.a + static_cast<long long>(of_rank) * k;
        inputs[half] = x + static_cast<long long>(job.rows[listed]) * k;
    }
    float sum[2][2][4] = {};
    tile.multiply(w, inputs[0], inputs[1], k, sum);
    tile.finish(sum, [&](int row, int of_rank, float value) {
        if (first + row < count && first_rank + of_rank < rank) {
            job.h[static_cast<long long>(first + row) * rank + first_rank + of_rank] = value;
        }
    });
}

extern "C" __global__ void lora_shrink_ids(const int *ids, int k,
                                           const __grid_constant__ LoraJobs jobs) {
    grid_begin();
    const LoraJob &job = jobs.of[blockIdx.z];
    int rank = job.rank;
    long long all = static_cast<long long>(job.count) * rank;
    long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; i < all;
         i += stride) {
        int id = ids[job.rows[i / rank]];
        job.h[i] = to_f32(job.a[(i % rank) * k + id]);
    }
}

constexpr int EXPAND_ROWS = 8;
constexpr int EXPAND_THREADS = 128;
constexpr int MAX_RANK = 512;

// 8 (or, at the end, fewer) elements of one row of B from `at` on, as f32.
__device__ __forceinline__ void read_factors(const bf16 *b, int at, int rank, float (&out)[8]) {
    if (rank % 8 == 0) {
        uint4 all = __ldg(reinterpret_cast<const uint4 *>(b + at));
        const uint32_t words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = __uint_as_float(words[i] << 16);
            out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = at + i < rank ? to_f32(b[at + i]) : 0.0f;
    }
}

template <typename T>
__device__ __forceinline__ void add_to(void *y, long long at, float update) {
    T *element = static_cast<T *>(y) + at;
    *element = from_f32<T>(to_f32(*element) + update);
}

extern "C" __global__ void __launch_bounds__(EXPAND_THREADS)
    lora_expand(const __grid_constant__ LoraJobs jobs, int f32_out) {
    grid_begin();
    __shared__ __align__(16) float inputs[EXPAND_ROWS][MAX_RANK];
    const LoraJob &job = jobs.of[blockIdx.z];
    int count = job.count, rank = job.rank, n = job.n;
    int first = blockIdx.y * EXPAND_ROWS, padded = (rank + 7) / 8 * 8;
    int output = blockIdx.x * EXPAND_THREADS + threadIdx.x;
    if (first >= count || output - static_cast<int>(threadIdx.x) >= n) return;
    for (int i = threadIdx.x; i < EXPAND_ROWS * padded; i += EXPAND_THREADS) {
        int row = i / padded, of_rank = i % padded;
        bool valid = first + row < count && of_rank < rank;
        long long at = static_cast<long long>(first + row) * rank + of_rank;
        inputs[row][of_rank] = valid ? job.h[at] : 0.0f;
    }
    __syncthreads();
    if (output >= n) return;
    float sum[EXPAND_ROWS] = {};
    for (int at = 0; at < rank; at += 8) {
        float factors[8];
        read_factors(job.b + static_cast<long long>(output) * rank, at, rank, factors);
#pragma unroll
        for (int row = 0; row < EXPAND_ROWS; ++row) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sum[row] = fmaf(inputs[row][at + i], factors[i], sum[row]);
            }
        }
    }
    float scale = job.scale;
    if (job.ratio != nullptr) scale *= job.ratio[output];
#pragma unroll
    for (int row = 0; row < EXPAND_ROWS; ++row) {
        if (first + row >= count) break;
        long long at = static_cast<long long>(job.rows[first + row]) * n + output;
        if (f32_out) {
            add_to<float>(job.y, at, scale * sum[row]);
        } else {
            add_to<bf16>(job.y, at, scale * sum[row]);
        }
    }
}

extern "C" __global__ void lora_gain(void *y, const int *rows, int count, int n, const float *gain,
                                     int f32_out) {
    grid_begin();
    long long all = static_cast<long long>(count) * n;
    long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; i < all;
         i += stride) {
        int output = static_cast<int>(i % n);
        long long at = static_cast<long long>(rows[i / n]) * n + output;
        if (f32_out) {
            float *element = static_cast<float *>(y) + at;
            *element = fmaf(gain[output], *element, *element);
        } else {
            bf16 *element = static_cast<bf16 *>(y) + at;
            float value = to_f32(*element);
            *element = from_f32<bf16>(fmaf(gain[output], value, value));
        }
    }
}
