// The small steps of a transformer: norms, sums, activations, rotary embedding, and the way of keys
// and values into their store. The residual stream is f32, what lies between is bf16; arithmetic is
// f32, and sums are in an order that only the launch's number of threads changes. Formulas are
// those of src/norm, src/activation and src/rope (RMS norm: Zhang, Sennrich 2019; layer norm: Ba
// et al. 2016; GELU: Hendrycks, Gimpel 2016; rotary embedding: Su et al. 2021, half-split pairs).
//
// Pointers to the start of a matrix are on 16 bytes. Rows may have any width; eight elements at a
// time go where it is a multiple of 8. No dynamic shared memory.
//
// rms_norm_{f32,bf16}: x [groups][dim]. block 256; grid (groups) for dim > 256, else
//   (ceil(groups / 8)): a warp for each group. out may be x.
// add_rms_norm: grid (rows), block 256. layer_norm_{f32,bf16}: grid (rows), block 256; bias may be
//   null. Any block of whole warps will do for these; rows of up to 32 elements a thread stay in
//   registers.
// add_{f32,bf16,f32_f32}, add_bias_{f32,bf16}, scale, softcap, silu_mul, clamped_swiglu_mul,
// gelu_tanh_mul, gelu_{erf,tanh}, bf16_to_f32, f32_to_bf16:
//   grid (ceil(count / 8 / 256)), block 256, `count` elements. out may be an input of its type.
// select_rows_{f32,bf16}: grid (count), any block. out[i] = x[rows[i]].
// rope_store_{bf16,f16,e4m3,q8}: grid (ceil(rows * (heads + kv_heads) / 8)), block 256: a warp for
//   each head of a row, of at most 256 elements. q_norm and k_norm (an RMS norm of every head,
//   before it turns) may be null. A row whose slot is negative is not stored; cos and sin are
//   [positions][rot / 2]. k_scales and v_scales are those of q8 (bytes.cuh), null otherwise.
#include "bytes.cuh"

namespace {

// Of eight elements each that a thread keeps between the passes over a row.
constexpr int PIECES = 4;
constexpr float LARGEST_F32 = 3.402823466e38f;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// ---- eight elements

__device__ __forceinline__ void load8(const float *at, float (&x)[8]) {
    float4 low = reinterpret_cast<const float4 *>(at)[0];
    float4 high = reinterpret_cast<const float4 *>(at)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void load2(const bf16 *at, float (&x)[2]) {
    union {
        uint32_t both;
        bf16 half[2];
    } u;
    u.both = *reinterpret_cast<const uint32_t *>(at);
    x[0] = to_f32(u.half[0]), x[1] = to_f32(u.half[1]);
}

__device__ __forceinline__ void load8(const bf16 *at, float (&x)[8]) {
    union {
        uint4 all;
        bf16 half[8];
    } u;
    u.all = *reinterpret_cast<const uint4 *>(at);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = to_f32(u.half[i]);
}

__device__ __forceinline__ void store8(float *at, const float (&x)[8]) {
    reinterpret_cast<float4 *>(at)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4 *>(at)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

template <class T> __device__ __forceinline__ void store8(T *at, const float (&x)[8]) {
    *reinterpret_cast<uint4 *>(at) = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]),
                                                pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}

// A piece of a row: up to eight elements. `wide`: all eight, on 16 bytes. What is missing is 0.
template <class T>
__device__ __forceinline__ void load_piece(const T *at, int left, bool wide, float (&x)[8]) {
    if (wide) {
        load8(at, x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = i < left ? to_f32(at[i]) : 0.0f;
    }
}

template <class T>
__device__ __forceinline__ void store_piece(T *at, int left, bool wide, const float (&x)[8]) {
    if (wide) {
        store8(at, x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < left) at[i] = from_f32<T>(x[i]);
        }
    }
}

// ---- norms

__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[32];
    x = warp_sum(x);
    if (lane() == 0) sums[warp()] = x;
    __syncthreads();
    x = lane() < static_cast<int>(blockDim.x) / 32 ? sums[lane()] : 0.0f;
    __syncthreads();
    return warp_sum(x);
}

// The pieces of a row that belong to one thread of a block, or of a warp. The first KEPT of them
// stay in registers; `first(at, x)` loads a piece for the first time, `again(at, x)` later.
template <bool BLOCK, int KEPT, class Again> struct Pieces {
    float kept[KEPT][8];
    Again again;
    int start, step, dim;

    template <class First>
    __device__ __forceinline__ Pieces(int dim, First first, Again again) : again(again), dim(dim) {
        start = 8 * (BLOCK ? static_cast<int>(threadIdx.x) : lane());
        step = 8 * (BLOCK ? static_cast<int>(blockDim.x) : 32);
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            if (start + i * step < dim) first(start + i * step, kept[i]);
        }
        float more[8];
        for (int at = start + KEPT * step; at < dim; at += step) first(at, more);
    }

    // visit(at, x) for every piece.
    template <class Visit> __device__ __forceinline__ void each(Visit visit) {
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            if (start + i * step < dim) visit(start + i * step, kept[i]);
        }
        for (int at = start + KEPT * step; at < dim; at += step) {
            float more[8];
            again(at, more);
            visit(at, more);
        }
    }

    // The sum of `term(x)` over the elements of the row.
    template <class Term> __device__ __forceinline__ float sum(Term term) {
        float sum = 0.0f;
        each([&](int at, const float(&x)[8]) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum += at + i < dim ? term(x[i]) : 0.0f;
        });
        return BLOCK ? block_sum(sum) : warp_sum(sum);
    }

    // out = (x - shift) * scale * weight + bias
    __device__ __forceinline__ void write(bf16 *out, float shift, float scale, const float *weight,
                                          const float *bias) {
        bool wide = dim % 8 == 0;
        each([&](int at, const float(&x)[8]) {
            float y[8], w[8], b[8];
            load_piece(weight + at, dim - at, wide, w);
#pragma unroll
            for (int i = 0; i < 8; i++) y[i] = (x[i] - shift) * scale * w[i];
            if (bias != nullptr) {
                load_piece(bias + at, dim - at, wide, b);
#pragma unroll
                for (int i = 0; i < 8; i++) y[i] += b[i];
            }
            store_piece(out + at, dim - at, wide, y);
        });
    }
};

template <bool BLOCK, int KEPT, class First, class Again>
__device__ __forceinline__ Pieces<BLOCK, KEPT, Again> pieces(int dim, First first, Again again) {
    return Pieces<BLOCK, KEPT, Again>(dim, first, again);
}

template <bool BLOCK, int KEPT, class First, class Again>
__device__ __forceinline__ void rms_norm_row(int dim, First first, Again again,
                                             const float *weight, bf16 *out, float eps) {
    auto row = pieces<BLOCK, KEPT>(dim, first, again);
    float squares = row.sum([](float x) { return x * x; });
    row.write(out, 0.0f, 1.0f / sqrtf(squares / dim + eps), weight, nullptr);
}

template <class X>
__device__ __forceinline__ void rms_norm(const X *x, const float *weight, bf16 *out, float eps,
                                         int dim, int groups) {
    bool wide = dim % 8 == 0, narrow = dim <= 256;
    int group = narrow ? blockIdx.x * (blockDim.x / 32) + warp() : blockIdx.x;
    if (group >= groups) return;
    x += static_cast<long long>(group) * dim, out += static_cast<long long>(group) * dim;
    auto load = [=](int at, float(&piece)[8]) { load_piece(x + at, dim - at, wide, piece); };
    if (narrow) {
        rms_norm_row<false, 1>(dim, load, load, weight, out, eps);
    } else {
        rms_norm_row<true, PIECES>(dim, load, load, weight, out, eps);
    }
}

template <class X>
__device__ __forceinline__ void layer_norm(const X *x, const float *weight, const float *bias,
                                           bf16 *out, float eps, int dim, int rows) {
    if (static_cast<int>(blockIdx.x) >= rows) return;
    bool wide = dim % 8 == 0;
    x += static_cast<long long>(blockIdx.x) * dim, out += static_cast<long long>(blockIdx.x) * dim;
    auto load = [=](int at, float(&piece)[8]) { load_piece(x + at, dim - at, wide, piece); };
    auto row = pieces<true, PIECES>(dim, load, load);
    float mean = row.sum([](float x) { return x; }) / dim;
    float variance = row.sum([=](float x) { return (x - mean) * (x - mean); }) / dim;
    row.write(out, mean, 1.0f / sqrtf(variance + eps), weight, bias);
}

// ---- element by element

// change(at, x) on eight elements of x from `at` on, which go to out.
template <class X, class Out, class Change>
__device__ __forceinline__ void each_piece(const X *x, Out *out, unsigned long long count,
                                           Change change) {
    unsigned long long at = 8ull * (static_cast<unsigned long long>(blockIdx.x) * blockDim.x +
                                    threadIdx.x);
    if (at >= count) return;
    int left = static_cast<int>(min(count - at, 8ull));
    float piece[8];
    load_piece(x + at, left, left == 8, piece);
    change(at, left, piece);
    store_piece(out + at, left, left == 8, piece);
}

template <class X, class Y>
__device__ __forceinline__ void add(X *x, const Y *y, unsigned long long count) {
    each_piece(x, x, count, [&](unsigned long long at, int left, float(&piece)[8]) {
        float more[8];
        load_piece(y + at, left, left == 8, more);
#pragma unroll
        for (int i = 0; i < 8; i++) piece[i] += more[i];
    });
}

template <class X>
__device__ __forceinline__ void add_bias(X *x, const float *bias, int width,
                                         unsigned long long count) {
    each_piece(x, x, count, [&](unsigned long long at, int left, float(&piece)[8]) {
        int column = static_cast<int>(at % static_cast<unsigned>(width));
        float more[8];
        if (width % 8 == 0) {
            load8(bias + column, more);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                more[i] = bias[column];
                column = column + 1 == width ? 0 : column + 1;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) piece[i] += more[i];
    });
}

template <class From, class To, class F>
__device__ __forceinline__ void map(const From *x, To *out, unsigned long long count, F f) {
    each_piece(x, out, count, [&](unsigned long long, int, float(&piece)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) piece[i] = f(piece[i]);
    });
}

template <class F>
__device__ __forceinline__ void gate_mul(const bf16 *gate, const bf16 *up, bf16 *out,
                                         unsigned long long count, F f) {
    each_piece(gate, out, count, [&](unsigned long long at, int left, float(&x)[8]) {
        float more[8];
        load_piece(up + at, left, left == 8, more);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = f(x[i], more[i]);
    });
}

template <class T>
__device__ __forceinline__ void select_rows(const T *x, const int *rows, T *out, int width,
                                            int count) {
    int i = blockIdx.x;
    if (i >= count) return;
    x += static_cast<long long>(rows[i]) * width, out += static_cast<long long>(i) * width;
    constexpr int WIDE = 16 / sizeof(T);
    if (width % WIDE != 0) {
        for (int at = threadIdx.x; at < width; at += blockDim.x) out[at] = x[at];
        return;
    }
    const uint4 *from = reinterpret_cast<const uint4 *>(x);
    uint4 *to = reinterpret_cast<uint4 *>(out);
    for (int at = threadIdx.x; at < width / WIDE; at += blockDim.x) to[at] = from[at];
}

// ---- heads

// As the type of the store: finite numbers stay finite.
template <class T> __device__ __forceinline__ float largest();
template <> __device__ __forceinline__ float largest<bf16>() { return 3.38953139e38f; }
template <> __device__ __forceinline__ float largest<__half>() { return 65504.0f; }
template <class T> __device__ __forceinline__ float narrow(float x) {
    float within = fminf(fmaxf(x, -largest<T>()), largest<T>());
    return fabsf(x) <= LARGEST_F32 ? within : x;
}

// WIDE neighbours.
__device__ __forceinline__ void load_some(const bf16 *at, float (&x)[1]) { x[0] = to_f32(at[0]); }
__device__ __forceinline__ void load_some(const bf16 *at, float (&x)[2]) { load2(at, x); }
template <class T> __device__ __forceinline__ void store_some(T *at, const float (&x)[1]) {
    at[0] = from_f32<T>(narrow<T>(x[0]));
}
template <class T> __device__ __forceinline__ void store_some(T *at, const float (&x)[2]) {
    *reinterpret_cast<uint32_t *>(at) = pack2<T>(narrow<T>(x[0]), narrow<T>(x[1]));
}
__device__ __forceinline__ void store_bytes(void *at, uint32_t first, uint32_t second) {
    *static_cast<uint16_t *>(at) = static_cast<uint16_t>((first & 0xff) | second << 8);
}
template <> __device__ __forceinline__ void store_some(e4m3 *at, const float (&x)[1]) {
    at[0] = from_f32<e4m3>(x[0]);
}
template <> __device__ __forceinline__ void store_some(e4m3 *at, const float (&x)[2]) {
    store_bytes(at, from_f32<e4m3>(x[0]).raw, from_f32<e4m3>(x[1]).raw);
}
// Whole numbers.
template <> __device__ __forceinline__ void store_some(q8 *at, const float (&x)[1]) {
    at[0] = q8{static_cast<int8_t>(__float2int_rn(x[0]))};
}
template <> __device__ __forceinline__ void store_some(q8 *at, const float (&x)[2]) {
    store_bytes(at, __float2int_rn(x[0]), __float2int_rn(x[1]));
}

// A head in the registers of a warp, as pairs of WIDE neighbours each: first those that turn with
// each other, from both halves of the rotary part, then what does not turn.
template <int WIDE> struct Head {
    static constexpr int UNITS = 4 / WIDE;
    float x[UNITS][2][WIDE];
    int dim, half;

    __device__ __forceinline__ bool turns(int unit) const {
        return (lane() + 32 * unit) * WIDE < half;
    }
    // Where the first or second of a pair is; `dim` or more where there is none.
    __device__ __forceinline__ int place(int unit, int which) const {
        int first = (lane() + 32 * unit) * WIDE;
        return turns(unit) ? first + which * half : 2 * first + which * WIDE;
    }

    template <class Visit> __device__ __forceinline__ void each(Visit visit) {
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
#pragma unroll
            for (int which = 0; which < 2; which++) {
                int at = place(unit, which);
                if (at < dim) visit(at, x[unit][which]);
            }
        }
    }

    __device__ __forceinline__ Head(const bf16 *from, int dim, int rot) : dim(dim), half(rot / 2) {
        each([&](int at, float(&x)[WIDE]) { load_some(from + at, x); });
    }

    __device__ __forceinline__ void norm(const float *weight, float eps) {
        float squares = 0.0f;
        each([&](int, const float(&x)[WIDE]) {
#pragma unroll
            for (int i = 0; i < WIDE; i++) squares += x[i] * x[i];
        });
        float scale = 1.0f / sqrtf(warp_sum(squares) / dim + eps);
        each([&](int at, float(&x)[WIDE]) {
#pragma unroll
            for (int i = 0; i < WIDE; i++) x[i] = x[i] * scale * weight[at + i];
        });
    }

    __device__ __forceinline__ void turn(const float *cos, const float *sin) {
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            if (!turns(unit)) continue;
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
                float a = x[unit][0][i], b = x[unit][1][i];
                float c = cos[place(unit, 0) + i], s = sin[place(unit, 0) + i];
                x[unit][0][i] = a * c - b * s, x[unit][1][i] = b * c + a * s;
            }
        }
    }

    template <class T> __device__ __forceinline__ void write(T *to) {
        each([&](int at, const float(&x)[WIDE]) { store_some(to + at, x); });
    }

    // As multiples of a 127th of the largest, which is the scale, as src/kv/ints.rs does it: a head
    // that holds what is no number is none, one next to zero is zeros.
    __device__ __forceinline__ void write_scaled(q8 *to, float *scale) {
        float largest = 0.0f, poison = 0.0f;
        each([&](int, const float(&x)[WIDE]) {
#pragma unroll
            for (int i = 0; i < WIDE; i++) {
                largest = fmaxf(largest, fabsf(x[i]));
                poison += x[i] - x[i];
            }
        });
        largest = warp_max(largest), poison = warp_sum(poison);
        bool zeros = poison != 0.0f || largest < 1e-30f;
        float inverse = zeros ? 0.0f : 127.0f / largest;
        each([&](int at, float(&x)[WIDE]) {
#pragma unroll
            for (int i = 0; i < WIDE; i++) x[i] *= inverse;
            store_some(to + at, x);
        });
        if (lane() == 0) *scale = poison != 0.0f ? NAN : zeros ? 0.0f : largest / 127.0f;
    }
};

// Whether the heads of a matrix can be read two elements at a time.
__device__ __forceinline__ bool in_twos(int dim, int rot) { return dim % 2 == 0 && rot % 4 == 0; }

// What rope_store is given.
template <class T> struct Heads {
    bf16 *q;
    const bf16 *k, *v;
    T *k_store, *v_store;
    float *k_scales, *v_scales;
    const int *slots, *positions;
    const float *cos, *sin, *q_norm, *k_norm;
    float eps;
    int heads, kv_heads, dim, rot;
};

template <int WIDE, class T>
__device__ __forceinline__ void rope_store_head(const Heads<T> &a, long long row, int head) {
    long long turn = a.positions[row] * static_cast<long long>(a.rot / 2);
    const float *cos = a.cos + turn, *sin = a.sin + turn;
    if (head < a.heads) {
        bf16 *at = a.q + (row * a.heads + head) * a.dim;
        Head<WIDE> q(at, a.dim, a.rot);
        if (a.q_norm != nullptr) q.norm(a.q_norm, a.eps);
        q.turn(cos, sin);
        q.write(at);
        return;
    }
    head -= a.heads;
    if (a.slots[row] < 0) return;
    long long from = (row * a.kv_heads + head) * a.dim;
    long long to = (static_cast<long long>(a.slots[row]) * a.kv_heads + head) * a.dim;
    Head<WIDE> k(a.k + from, a.dim, a.rot), v(a.v + from, a.dim, a.rot);
    if (a.k_norm != nullptr) k.norm(a.k_norm, a.eps);
    k.turn(cos, sin);
    if constexpr (has_scales<T>) {
        long long scale = scale_at(a.slots[row], a.kv_heads, head);
        k.write_scaled(a.k_store + to, a.k_scales + scale);
        v.write_scaled(a.v_store + to, a.v_scales + scale);
    } else {
        k.write(a.k_store + to);
        v.write(a.v_store + to);
    }
}

template <class T> __device__ __forceinline__ void rope_store(const Heads<T> &a, int rows) {
    int at = blockIdx.x * (blockDim.x / 32) + warp();
    int row = at / (a.heads + a.kv_heads), head = at % (a.heads + a.kv_heads);
    if (row >= rows) return;
    if (in_twos(a.dim, a.rot)) {
        rope_store_head<2>(a, row, head);
    } else {
        rope_store_head<1>(a, row, head);
    }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// What is no number stays none.
__device__ __forceinline__ float clamped_swiglu(float gate, float up) {
    gate = gate > 7.0f ? 7.0f : gate;
    up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
    return gate / (1.0f + __expf(-1.702f * gate)) * (up + 1.0f);
}

__device__ __forceinline__ float gelu_by_erf(float x) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f));
}

__device__ __forceinline__ float gelu_by_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
}

}  // namespace

#define KERNEL extern "C" __global__ void __launch_bounds__(1024)

KERNEL rms_norm_f32(const float *x, const float *weight, bf16 *out, float eps, int dim,
                    int groups) {
    grid_begin();
    rms_norm(x, weight, out, eps, dim, groups);
}
KERNEL rms_norm_bf16(const bf16 *x, const float *weight, bf16 *out, float eps, int dim,
                     int groups) {
    grid_begin();
    rms_norm(x, weight, out, eps, dim, groups);
}

// residual += update, and the norm of the sum.
KERNEL add_rms_norm(float *residual, const bf16 *update, const float *weight, bf16 *out, float eps,
                    int dim, int rows) {
    grid_begin();
    if (static_cast<int>(blockIdx.x) >= rows) return;
    bool wide = dim % 8 == 0;
    long long row = static_cast<long long>(blockIdx.x) * dim;
    residual += row, update += row, out += row;
    auto sum = [=](int at, float(&x)[8]) {
        float more[8];
        load_piece(residual + at, dim - at, wide, x);
        load_piece(update + at, dim - at, wide, more);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += more[i];
        store_piece(residual + at, dim - at, wide, x);
    };
    auto load = [=](int at, float(&x)[8]) { load_piece(residual + at, dim - at, wide, x); };
    rms_norm_row<true, PIECES>(dim, sum, load, weight, out, eps);
}

KERNEL layer_norm_f32(const float *x, const float *weight, const float *bias, bf16 *out, float eps,
                      int dim, int rows) {
    grid_begin();
    layer_norm(x, weight, bias, out, eps, dim, rows);
}
KERNEL layer_norm_bf16(const bf16 *x, const float *weight, const float *bias, bf16 *out, float eps,
                       int dim, int rows) {
    grid_begin();
    layer_norm(x, weight, bias, out, eps, dim, rows);
}

KERNEL add_f32(float *x, const bf16 *y, unsigned long long count) {
    grid_begin();
    add(x, y, count);
}
KERNEL add_bf16(bf16 *x, const bf16 *y, unsigned long long count) {
    grid_begin();
    add(x, y, count);
}
KERNEL add_f32_f32(float *x, const float *y, unsigned long long count) {
    grid_begin();
    add(x, y, count);
}

KERNEL add_bias_f32(float *x, const float *bias, int width, unsigned long long count) {
    grid_begin();
    add_bias(x, bias, width, count);
}
KERNEL add_bias_bf16(bf16 *x, const float *bias, int width, unsigned long long count) {
    grid_begin();
    add_bias(x, bias, width, count);
}

// x *= factor
KERNEL scale(float *x, float factor, unsigned long long count) {
    grid_begin();
    map(x, x, count, [=](float x) { return x * factor; });
}
// x = cap * tanh(x / cap)
KERNEL softcap(float *x, float cap, unsigned long long count) {
    grid_begin();
    map(x, x, count, [=](float x) { return cap * tanhf(x / cap); });
}

// out = silu(gate) * up
KERNEL silu_mul(const bf16 *gate, const bf16 *up, bf16 *out, unsigned long long count) {
    grid_begin();
    gate_mul(gate, up, out, count, [](float gate, float up) { return silu(gate) * up; });
}
// out = g sigmoid(1.702 g) (u + 1), g = min(gate, 7) and u = up between -7 and 7 (gpt-oss)
KERNEL clamped_swiglu_mul(const bf16 *gate, const bf16 *up, bf16 *out, unsigned long long count) {
    grid_begin();
    gate_mul(gate, up, out, count, [](float gate, float up) { return clamped_swiglu(gate, up); });
}
// out = gelu_tanh(gate) * up
KERNEL gelu_tanh_mul(const bf16 *gate, const bf16 *up, bf16 *out, unsigned long long count) {
    grid_begin();
    gate_mul(gate, up, out, count, [](float gate, float up) { return gelu_by_tanh(gate) * up; });
}
KERNEL gelu_erf(const bf16 *x, bf16 *out, unsigned long long count) {
    grid_begin();
    map(x, out, count, [](float x) { return gelu_by_erf(x); });
}
KERNEL gelu_tanh(const bf16 *x, bf16 *out, unsigned long long count) {
    grid_begin();
    map(x, out, count, [](float x) { return gelu_by_tanh(x); });
}

KERNEL bf16_to_f32(const bf16 *x, float *out, unsigned long long count) {
    grid_begin();
    map(x, out, count, [](float x) { return x; });
}
KERNEL f32_to_bf16(const float *x, bf16 *out, unsigned long long count) {
    grid_begin();
    map(x, out, count, [](float x) { return x; });
}

KERNEL select_rows_f32(const float *x, const int *rows, float *out, int width, int count) {
    grid_begin();
    select_rows(x, rows, out, width, count);
}
KERNEL select_rows_bf16(const bf16 *x, const int *rows, bf16 *out, int width, int count) {
    grid_begin();
    select_rows(x, rows, out, width, count);
}

#define ROPE_STORE(NAME, T)                                                                        \
    KERNEL rope_store_##NAME(bf16 *q, const bf16 *k, const bf16 *v, T *k_store, T *v_store,        \
                             float *k_scales, float *v_scales, const int *slots,                   \
                             const int *positions, const float *cos, const float *sin,             \
                             const float *q_norm, const float *k_norm, float eps, int rows,        \
                             int heads, int kv_heads, int dim, int rot) {                          \
        grid_begin();                                                                              \
        rope_store(Heads<T>{q, k, v, k_store, v_store, k_scales, v_scales, slots, positions, cos,  \
                            sin, q_norm, k_norm, eps, heads, kv_heads, dim, rot}, rows);           \
    }
ROPE_STORE(bf16, bf16)
ROPE_STORE(f16, __half)
ROPE_STORE(e4m3, e4m3)
ROPE_STORE(q8, q8)
