// emulate.h itself: numbers, indices, warp operations, tensor cores and copies, and the mistakes in
// a kernel that it must find.
#include "check.h"

#include <sys/wait.h>
#include <unistd.h>

using std::vector;

// ---- numbers

static double f16_value(uint32_t bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double size = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
}

static void every_short_float() {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        unsigned short h = static_cast<unsigned short>(bits);
        float x = __half2float(__ushort_as_half(h)), y = __bfloat162float(__ushort_as_bfloat16(h));
        double want = f16_value(bits);
        CHECK((std::isnan(want) && std::isnan(x)) || x == float(want), "f16 %04x is %g", bits, x);
        CHECK(__half_as_ushort(__float2half(x)) == (std::isnan(x) ? 0x7fff : bits), "f16 %g", x);
        CHECK(__float_as_uint(y) == bits << 16, "bf16 %04x is %g", bits, y);
        unsigned back = __bfloat16_as_ushort(__float2bfloat16(y));
        CHECK(back == (std::isnan(y) ? 0x7fff : bits), "bf16 %g", y);
    }
}

// The number nearest to |x| of those that value(0), value(1).. value(most) are, ties to even.
template <typename Value> unsigned nearest(float x, unsigned most, double overflow, Value value) {
    double size = fabs(double(x));
    if (size >= overflow) return most + 1;
    unsigned low = 0, high = most;
    while (high - low > 1) {
        unsigned middle = (low + high) / 2;
        (value(middle) <= size ? low : high) = middle;
    }
    double under = size - value(low), over = value(high) - size;
    if (under == over) return low & 1 ? high : low;
    return under < over ? low : high;
}

static void roundings() {
    for (int i = 0; i < 60000; i++) {
        uint32_t bits = rng();
        if (i % 2) bits = (bits & 0x80ffffffu) | uint32_t(0x33 + below(0x15)) << 24;  // f16 has it
        if (i % 5 == 0) bits &= 0xfffff000u;                                          // ties
        float x = __uint_as_float(bits);
        if (std::isnan(x)) continue;
        uint32_t sign = bits >> 16 & 0x8000;
        unsigned half = nearest(x, 0x7bff, 65520.0, [](unsigned h) { return f16_value(h); });
        CHECK(__half_as_ushort(__float2half(x)) == (half | sign), "%g as f16", x);
        unsigned bf = nearest(x, 0x7f7f, ldexp(511, 119),
                              [](unsigned h) { return double(__uint_as_float(h << 16)); });
        CHECK(__bfloat16_as_ushort(__float2bfloat16(x)) == (bf | sign), "%g as bf16", x);
    }
}

#define HOLDS(expression) CHECK(expression, "%s", #expression)

static void integers() {
    HOLDS(__dp4a(int(0x80ff7f01), int(0x8002ff03), 5) == 128 * 128 - 2 - 127 + 3 + 5);
    HOLDS(__dp4a(0x80ff7f01u, 0x8002ff03u, 5u) == 128u * 128 + 255 * 2 + 127 * 255 + 3 + 5);
    HOLDS(__popc(0xf0f0u) == 8 && __clz(1) == 31 && __clz(0) == 32);
    HOLDS(__ffs(8) == 4 && __ffs(0) == 0 && __brev(1) == 0x80000000u);
    HOLDS(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu);
    HOLDS(__byte_perm(0x33221100u, 0x77665544u, 0x7531) == 0x77553311u);
    HOLDS(__funnelshift_r(0x33221100u, 0x77665544u, 8) == 0x44332211u);
    HOLDS(__funnelshift_l(0x33221100u, 0x77665544u, 8) == 0x66554433u);
    HOLDS(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 && __float2int_rn(NAN) == 0);
    HOLDS(__float2int_rn(1e20f) == INT32_MAX && __float2int_rn(-1e20f) == INT32_MIN);
    HOLDS(__float2uint_rz(3.9f) == 3 && __float2uint_rz(-2.0f) == 0);
    HOLDS(__float2uint_rz(5e9f) == 0xffffffffu);
    HOLDS(min(1, 2u) == 1u && max(5ll, 7) == 7 && min(3, 2.5f) == 2.5f);
    HOLDS(max(1.0f, NAN) == 1.0f && max(NAN, 1.0f) == 1.0f);
}

static void other_numbers() {
    HOLDS(rsqrtf(4.0f) == 0.5f && __fdividef(1.0f, 4.0f) == 0.25f);
    HOLDS(__expf(0.0f) == 1.0f && exp2f(3.0f) == 8.0f);
    HOLDS(alignof(uint4) == 16 && alignof(int2) == 8 && alignof(uchar4) == 4);
    HOLDS(alignof(ushort4) == 8 && alignof(float3) == 4 && sizeof(float3) == 12);
    HOLDS(sizeof(bf16) == 2 && sizeof(__half2) == 4 && alignof(__half2) == 4);
    HOLDS(pack2<bf16>(1.0f, 2.0f) == 0x40003f80u && pack2<__half>(1.0f, 2.0f) == 0x40003c00u);
    float2 p = __bfloat1622float2(__floats2bfloat162_rn(1.5f, -3.0f));
    float2 q = __half22float2(__floats2half2_rn(1.5f, -3.0f));
    HOLDS(p.x == 1.5f && p.y == -3.0f && q.x == 1.5f && q.y == -3.0f);
    int i = 3;
    unsigned u = 7;
    float f = 1;
    double d = 1;
    HOLDS(atomicAdd(&i, 2) == 3 && atomicMax(&i, 9) == 5 && atomicMin(&i, -1) == 9);
    HOLDS(atomicCAS(&i, -1, 4) == -1 && i == 4 && atomicAdd(&u, 1u) == 7 && u == 8);
    HOLDS(atomicAdd(&f, 2.0f) == 1 && f == 3 && atomicAdd(&d, 2.0) == 1 && d == 3);
}

// ---- threads and warps

__global__ void count_threads(int *out) {
    size_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    size_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    __syncthreads();
    atomicAdd(&out[block * blockDim.x * blockDim.y * blockDim.z + thread], 1);
}
static void indices() {
    vector<int> out(2 * 3 * 4 * 5 * 3 * 2, 0);
    EMULATE(count_threads, dim3(2, 3, 4), dim3(5, 3, 2), 0, out.data());
    CHECK(std::count(out.begin(), out.end(), 1) == long(out.size()), "indices");
}

__global__ void shuffle(int *out, int width, int n) {
    int lane = threadIdx.x, *own = out + lane * 6;
    own[0] = __shfl_sync(0xffffffffu, lane * 10, n, width);
    own[1] = __shfl_up_sync(0xffffffffu, lane * 10, n, width);
    own[2] = __shfl_down_sync(0xffffffffu, lane * 10, n, width);
    own[3] = __shfl_xor_sync(0xffffffffu, lane * 10, n, width);
    own[4] = __ballot_sync(0xffffffffu, lane % 3 == 0);
    own[5] = __any_sync(0xffffffffu, lane == 31) + 2 * __all_sync(0xffffffffu, lane < 32) +
             4 * __all_sync(0xffffffffu, lane < 31);
}
static void shuffles() {
    for (int width : {1, 2, 4, 8, 16, 32}) {
        for (int n = 0; n < 32; n++) {
            vector<int> out(32 * 6, -1);
            EMULATE(shuffle, 1, 32, 0, out.data(), width, n);
            for (int lane = 0; lane < 32; lane++) {
                int first = lane / width * width, end = first + width, *own = &out[lane * 6];
                int up = lane - n >= first ? lane - n : lane;
                int down = lane + n < end ? lane + n : lane;
                int other = (lane ^ n) < end ? lane ^ n : lane;
                bool good = own[0] == (first + n % width) * 10 && own[1] == up * 10 &&
                            own[2] == down * 10 && own[3] == other * 10;
                CHECK(good, "shuffles of lane %d by %d in %d", lane, n, width);
                CHECK(own[4] == 0x49249249 && own[5] == 3, "votes of lane %d", lane);
            }
        }
    }
}

// Lanes 8 to 12 of warp 1 return, then parts of warps go separate ways.
__global__ void diverge(int *out, u64 *next) {
    int lane = threadIdx.x % 32;
    if (threadIdx.x >= 40 && threadIdx.x < 45) return;
    out[threadIdx.x] = __ballot_sync(0xffffffffu, lane & 1);
    if (lane < 8) {
        int sum = lane;
        for (int other = 4; other; other /= 2) sum += __shfl_xor_sync(0xffu, sum, other);
        out[threadIdx.x] += sum;
    } else if (lane >= 16) {
        out[threadIdx.x] += __shfl_sync(0xffff0000u, lane, 31);
    }
    __syncthreads();
    next[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1ull << lane, 1);
    if (threadIdx.x % 2) return;
    __syncthreads();
    if (threadIdx.x == 0) out[64] = 77;
}
static void divergence() {
    vector<int> out(65, -1);
    vector<u64> next(64, 1);
    EMULATE(diverge, 1, 64, 0, out.data(), next.data());
    for (int i = 0; i < 64; i++) {
        int lane = i % 32;
        if (i >= 40 && i < 45) {
            CHECK(out[i] == -1 && next[i] == 1, "thread %d returned", i);
            continue;
        }
        unsigned votes = 0xaaaaaaaau & (i < 32 ? 0xffffffffu : 0xffffe0ffu);
        unsigned want = votes + (lane < 8 ? 28 : lane >= 16 ? 31 : 0);
        CHECK(unsigned(out[i]) == want, "thread %d has %x", i, out[i]);
        if (lane < 31 && i != 39) CHECK(next[i] == 2ull << lane, "thread %d has %llx", i, next[i]);
    }
    CHECK(out[64] == 77, "the last barrier");
    CHECK(next[39] == ~0ull, "what comes from a lane that returned is no number");
}

// ---- tensor cores, by the tables of the PTX ISA

template <typename T> __global__ void one_mma(const T *a, const T *b, float *c) {
    int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
    union {
        T parts[8];
        uint32_t words[4];
    } of_a;
    union {
        T parts[4];
        uint32_t words[2];
    } of_b;
    float d[4];
    for (int i = 0; i < 8; i++) {
        of_a.parts[i] = a[(group + i / 2 % 2 * 8) * 16 + pair + i % 2 + i / 4 * 8];
    }
    for (int i = 0; i < 4; i++) of_b.parts[i] = b[(pair + i % 2 + i / 2 * 8) * 8 + group];
    for (int i = 0; i < 4; i++) d[i] = c[(group + i / 2 * 8) * 8 + pair + i % 2];
    mma_16816(d, of_a.words, of_b.words, T());
    for (int i = 0; i < 4; i++) c[(group + i / 2 * 8) * 8 + pair + i % 2] = d[i];
}
template <typename T> void mma() {
    vector<T> a = randoms<T>(256), b = randoms<T>(128);
    vector<float> c = randoms<float>(128);
    vector<double> want;
    for (int i = 0; i < 128; i++) {
        double sum = c[i];
        for (int l = 0; l < 16; l++) {
            sum += double(to_f32(a[i / 8 * 16 + l])) * to_f32(b[l * 8 + i % 8]);
        }
        want.push_back(sum);
    }
    EMULATE(one_mma<T>, 1, 32, 0, a.data(), b.data(), c.data());
    check_near("mma", "", want, 1e-6, [&](size_t i) { return c[i]; });
}

__global__ void one_ldmatrix(const uint16_t *in, uint32_t *plain, uint32_t *turned) {
    __shared__ __align__(16) uint16_t rows[32 * 8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) rows[i] = in[i];
    __syncwarp();
    uint32_t words[4];
    ldmatrix_x4(words, rows + lane * 8);
    for (int i = 0; i < 4; i++) plain[lane * 4 + i] = words[i];
    ldmatrix_x4_trans(words, rows + lane * 8);
    for (int i = 0; i < 4; i++) turned[lane * 4 + i] = words[i];
}
static void ldmatrix() {
    vector<uint16_t> in;
    for (int i = 0; i < 256; i++) in.push_back(uint16_t(rng()));
    vector<uint32_t> plain(128), turned(128);
    EMULATE(one_ldmatrix, 1, 32, 0, in.data(), plain.data(), turned.data());
    for (int i = 0; i < 128; i++) {
        int row = i / 4 / 4, pair = 2 * (i / 4 % 4);
        auto at = [&](int r, int c) { return uint32_t(in[(8 * (i % 4) + r) * 8 + c]); };
        CHECK(plain[i] == (at(row, pair) | at(row, pair + 1) << 16), "ldmatrix %d", i);
        CHECK(turned[i] == (at(pair, row) | at(pair + 1, row) << 16), "ldmatrix trans %d", i);
    }
}

// ---- a product in tiles with copies under way, correct or with one thing missing

enum Missing { NOTHING, WAIT, BARRIER };
constexpr int ROWS = 64, COLUMNS = 32, DEPTH = 32, TILES = 3, A_PITCH = DEPTH + 8;

// c [m][n] = a [m][k] times b, which is [k][n] if BY_ROWS, else [n][k].
template <typename T, bool BY_ROWS> struct Tiles {
    static constexpr int B_ROWS = BY_ROWS ? DEPTH : COLUMNS;
    static constexpr int B_WIDTH = BY_ROWS ? COLUMNS : DEPTH, B_PITCH = B_WIDTH + 8;
    static constexpr int TILE = ROWS * A_PITCH + B_ROWS * B_PITCH;

    const T *a, *b;
    int m, n, k, row, column;

    // Some of a matrix whose rows and columns end at `rows` and `columns`.
    void copy(T *to, int pitch, const T *from, int first_row, int first_column, int rows,
              int columns, int tile_rows, int tile_columns) const {
        int pieces = tile_columns / 8;
        for (int i = threadIdx.x; i < tile_rows * pieces; i += blockDim.x) {
            int r = i / pieces, c = i % pieces * 8;
            bool inside = first_row + r < rows && first_column + c < columns;
            const T *at = from + size_t(first_row + r) * columns + first_column + c;
            cp_async16(to + r * pitch + c, inside ? at : from, inside);
        }
    }
    void fetch(T *tile, int depth) const {
        T *of_b = tile + ROWS * A_PITCH;
        if (depth < k) {
            copy(tile, A_PITCH, a, row, depth, m, k, ROWS, DEPTH);
            int b_row = BY_ROWS ? depth : column, b_column = BY_ROWS ? column : depth;
            copy(of_b, B_PITCH, b, b_row, b_column, BY_ROWS ? k : n, BY_ROWS ? n : k, B_ROWS,
                 B_WIDTH);
        }
        cp_async_commit();
    }
    void multiply(const T *tile, float (&sum)[COLUMNS / 8][4]) const {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const T *of_b = tile + ROWS * A_PITCH;
        for (int depth = 0; depth < DEPTH; depth += 16) {
            uint32_t a_words[4], b_words[4];
            ldmatrix_x4(a_words, tile + (warp * 16 + lane % 16) * A_PITCH + depth + lane / 16 * 8);
            for (int at = 0; at < COLUMNS; at += 16) {
                if (BY_ROWS) {
                    ldmatrix_x4_trans(b_words,
                                      of_b + (depth + lane % 16) * B_PITCH + at + lane / 16 * 8);
                } else {
                    ldmatrix_x4(b_words, of_b + (at + lane % 8 + lane / 16 * 8) * B_PITCH + depth +
                                             lane / 8 % 2 * 8);
                }
                uint32_t low[2] = {b_words[0], b_words[1]}, high[2] = {b_words[2], b_words[3]};
                mma_16816(sum[at / 8], a_words, low, T());
                mma_16816(sum[at / 8 + 1], a_words, high, T());
            }
        }
    }
};

template <typename T, bool BY_ROWS, int MISSING>
__global__ void product(const T *a, const T *b, float *c, int m, int n, int k) {
    DYNAMIC_SHARED(T, shared);
    typedef Tiles<T, BY_ROWS> Own;
    int first_row = blockIdx.y * ROWS, first_column = blockIdx.x * COLUMNS;
    Own tiles = {a, b, m, n, k, first_row, first_column};
    float sum[COLUMNS / 8][4] = {};
    for (int i = 0; i < TILES - 1; i++) tiles.fetch(shared + i * Own::TILE, i * DEPTH);
    for (int i = 0; i * DEPTH < k; i++) {
        if (MISSING != WAIT) cp_async_wait<TILES - 2>();
        if (MISSING != BARRIER) __syncthreads();
        int next = i + TILES - 1;
        tiles.fetch(shared + next % TILES * Own::TILE, next * DEPTH);
        tiles.multiply(shared + i % TILES * Own::TILE, sum);
    }
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < COLUMNS / 2; i++) {
        int row = first_row + warp * 16 + lane / 4 + i / 2 % 2 * 8;
        int column = first_column + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < m && column < n) c[row * n + column] = sum[i / 4][i % 4];
    }
}

// Whether the product is right.
template <typename T, bool BY_ROWS, int MISSING = NOTHING> bool multiplies(int m, int n, int k) {
    vector<T> a = randoms<T>(m * k), b = randoms<T>(n * k);
    vector<float> c = poison<float>(m * n);
    dim3 grid((n + COLUMNS - 1) / COLUMNS, (m + ROWS - 1) / ROWS);
    size_t shared = TILES * sizeof(T) * Tiles<T, BY_ROWS>::TILE;
    EMULATE((product<T, BY_ROWS, MISSING>), grid, dim3(128), shared, a.data(), b.data(), c.data(),
            m, n, k);
    for (int i = 0; i < m * n; i++) {
        double sum = 0;
        for (int l = 0; l < k; l++) {
            T other = BY_ROWS ? b[l * n + i % n] : b[i % n * k + l];
            sum += double(to_f32(a[i / n * k + l])) * to_f32(other);
        }
        if (!(fabs(sum - c[i]) < 1e-3)) return false;
    }
    return true;
}
static void products() {
    for (int m : {1, 17, 64, 130}) {
        for (int n : {8, 72}) {
            for (int k : {8, 32, 136, 256}) {
                CHECK((multiplies<bf16, false>(m, n, k)), "bf16, %d %d %d", m, n, k);
                CHECK((multiplies<bf16, true>(m, n, k)), "bf16 by rows, %d %d %d", m, n, k);
                CHECK((multiplies<__half, false>(m, n, k)), "f16, %d %d %d", m, n, k);
                CHECK((multiplies<__half, true>(m, n, k)), "f16 by rows, %d %d %d", m, n, k);
            }
        }
    }
}

// ---- mistakes that end a run, and what is said of them

__global__ void half_at_shuffle(int *out) {
    if (threadIdx.x % 32 < 16) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
    } else {
        __syncthreads();
    }
}
__global__ void two_barriers(int *out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        out[threadIdx.x] = 1;
        __syncthreads();
    }
}
__global__ void barrier_and_warp(int *) {
    if (threadIdx.x != 5) __syncthreads();
    __syncwarp();
}
__global__ void two_shuffles(int *out) {
    if (threadIdx.x < 16) {
        out[0] = __shfl_sync(0xffffffffu, 1, 1);
    } else {
        out[1] = __shfl_sync(0xffffffffu, 1, 2);
    }
}
__global__ void not_in_mask(int *out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1, 1); }
__global__ void odd_copy(int *in) {
    DYNAMIC_SHARED(char, shared);
    cp_async16(shared + 8, in, true);
}
__global__ void copy_of_odd(int *in) {
    DYNAMIC_SHARED(char, shared);
    cp_async16(shared, in + 1, true);
}
__global__ void odd_row(int *) {
    DYNAMIC_SHARED(char, shared);
    uint32_t words[4];
    ldmatrix_x4(words, shared + threadIdx.x * 4);
}
__global__ void past_shared(int *) {
    DYNAMIC_SHARED(float, shared);
    shared[64 + threadIdx.x] = 1;
}
__global__ void lane_gone(int *) {
    if (threadIdx.x == 3) return;
    float d[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    mma_16816(d, a, b, bf16());
}

// Does something in another process, which must end and say `message`.
static void must_stop(const char *message, const std::function<void()> &work) {
    int ends[2];
    if (pipe(ends)) abort();
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        work();
        _exit(0);
    }
    close(ends[1]);
    std::string said;
    char some[4096];
    for (ssize_t got; (got = read(ends[0], some, sizeof some)) > 0;) said.append(some, got);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    bool found = status != 0 && said.find(message) != std::string::npos;
    CHECK(found, "not found: %s, but %s", message, said.c_str());
}
static void must_stop(void (*kernel)(int *), const char *message, dim3 grid, dim3 block,
                      size_t shared) {
    must_stop(message, [&] {
        vector<int> numbers(64);
        EMULATE(kernel, grid, block, shared, numbers.data());
    });
}
#ifdef __SANITIZE_ADDRESS__
constexpr const char *PAST_SHARED = "heap-buffer-overflow";
#else
constexpr const char *PAST_SHARED = "past the end of dynamic";
#endif

static void mistakes() {
    must_stop(half_at_shuffle, "deadlock", 1, 64, 0);
    must_stop(two_barriers, "different __syncthreads", 1, 64, 0);
    must_stop(barrier_and_warp, "deadlock", 1, 32, 0);
    must_stop(two_shuffles, "different warp operations", 1, 32, 0);
    must_stop(not_in_mask, "not in its mask", 1, 32, 0);
    must_stop(odd_copy, "not aligned", 1, 32, 64);
    must_stop(copy_of_odd, "not aligned", 1, 32, 64);
    must_stop(odd_row, "not aligned", 1, 32, 2048);
    must_stop(lane_gone, "have returned", 1, 32, 0);
    must_stop(past_shared, PAST_SHARED, 1, 32, 256);
    must_stop(count_threads, "a grid has", dim3(1, 70000), 1, 0);
    must_stop(count_threads, "a block has", 1, dim3(64, 32), 0);
    must_stop(count_threads, "more shared", 1, 1, 1 << 20);
}

// ---- what is watched: mistakes that may well give the right numbers

enum class Between { nothing, warp, block };

// Each thread reads what its neighbour in the warp, or in the block, has written.
template <Between BETWEEN, int NEIGHBOURS> __global__ void neighbours(int *out) {
    __shared__ int numbers[64];
    numbers[threadIdx.x] = int(threadIdx.x);
    if (BETWEEN == Between::warp) __syncwarp();
    if (BETWEEN == Between::block) __syncthreads();
    int first = int(threadIdx.x) / NEIGHBOURS * NEIGHBOURS;
    out[threadIdx.x] = numbers[first + (int(threadIdx.x) + 1) % NEIGHBOURS];
    if (BETWEEN == Between::block) __syncthreads();
    if (BETWEEN == Between::warp) __syncwarp();
    numbers[first + (int(threadIdx.x) + 1) % NEIGHBOURS] = 0;
}
__global__ void shuffled_only(int *out) {
    __shared__ int numbers[32];
    numbers[threadIdx.x] = 1;
    int from = __shfl_xor_sync(0xffffffffu, int(threadIdx.x), 1);
    out[threadIdx.x] = numbers[from];
}
__global__ void written_again(int *out) {
    __shared__ int numbers[64];
    out[threadIdx.x] = numbers[threadIdx.x];
    if (threadIdx.x == 7) numbers[8] = 1;
}
__global__ void same_output(int *out) { out[threadIdx.x] = 1; }

// The block that ends last adds up what all have written.
template <bool FENCE, bool BARRIER> __global__ void last_adds(int *out) {
    int *parts = out + 1 + 32 * blockIdx.x;
    parts[threadIdx.x] = 1;
    if (FENCE) __threadfence();
    if (BARRIER) __syncthreads();
    __shared__ bool last;
    if (threadIdx.x == 0) last = atomicAdd(out, 1) + 1 == int(gridDim.x);
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) out[0] = 0;
    for (unsigned i = 1; i < gridDim.x; i++)
        parts[threadIdx.x] += out[1 + 32 * (i - 1) + threadIdx.x];
}

__global__ void odd_vector(int *in) {
    uint2 two = *reinterpret_cast<uint2 *>(in + 1);
    in[0] = int(two.x + two.y);
}
__global__ void writes_early(int *out) {
    out[threadIdx.x] = 1;
    grid_begin();
}
__global__ void reads_early(int *in) {
    int x = in[threadIdx.x];
    grid_begin();
    in[threadIdx.x] = x + 1;
}
__global__ void never_waits(int *) { grid_go(); }
__global__ void never_goes(int *) { grid_wait(); }
__global__ void leftover(int *out) {
    __shared__ int number;
    out[blockIdx.x] = number;
    number = 5;
}

static void watched() {
    vector<int> out(64);
    const char *unordered = "nothing orders them";
    for (const char *order : {"forward", "reverse", "alternate", "1", "2"}) {
        emulate::set_order(order);
        must_stop(neighbours<Between::nothing, 32>, unordered, 1, 64, 0);
        must_stop(neighbours<Between::warp, 64>, unordered, 1, 64, 0);
        must_stop(shuffled_only, unordered, 1, 32, 0);
        must_stop(written_again, unordered, 1, 64, 0);
        must_stop(same_output, unordered, 2, 32, 0);
        must_stop(last_adds<false, true>, unordered, 2, 32, 0);
        must_stop(last_adds<true, false>, unordered, 2, 32, 0);
        EMULATE((neighbours<Between::warp, 32>), 1, 64, 0, out.data());
        EMULATE((neighbours<Between::block, 64>), 1, 64, 0, out.data());
        vector<int> parts(1 + 32 * 4);
        EMULATE((last_adds<true, true>), 4, 32, 0, parts.data());
        CHECK(parts[0] == 0 && std::count(parts.begin(), parts.end(), 4) == 32, "last_adds");
        CHECK((multiplies<bf16, true>(70, 40, 136)), "a product, order %s", order);
        CHECK((!multiplies<bf16, true, WAIT>(64, 32, 128)), "no wait, order %s", order);
        must_stop(unordered, [] { multiplies<bf16, true, BARRIER>(64, 32, 256); });
    }
    must_stop(odd_vector, "not aligned", 1, 1, 0);
    EMULATE(leftover, 3, 1, 0, out.data());
    CHECK(out[1] == -1 && out[2] == -1, "shared memory has what a block before left there");
    emulate::overlapping = true;
    must_stop(writes_early, "before grid_wait", 1, 32, 0);
    must_stop(reads_early, "before grid_wait", 1, 32, 0);
    must_stop(never_waits, "no thread has called grid_wait", 1, 32, 0);
    must_stop(never_goes, "no thread has called grid_go", 1, 32, 0);
    emulate::constant(out);
    EMULATE(reads_early, 1, 32, 0, out.data());
}

int main() {
    emulate::overlapping = false; // those below that begin at once have nothing to wait for
    every_short_float();
    roundings();
    integers();
    other_numbers();
    indices();
    shuffles();
    divergence();
    mma<bf16>(), mma<__half>();
    ldmatrix();
    products();
    mistakes();
#ifndef __SANITIZE_ADDRESS__  // then nothing is watched
    watched();
#endif
    return finish();
}
