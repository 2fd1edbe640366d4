// elementwise.cu: norms, sums, activations, rows, rotary embedding and store, against f64.
#include "elementwise.cu"

#include "check.h"

using std::string;
using std::vector;

template <typename T> const char *name_of();
template <> const char *name_of<float>() { return "f32"; }
template <> const char *name_of<bf16>() { return "bf16"; }
template <> const char *name_of<__half>() { return "f16"; }
template <> const char *name_of<e4m3>() { return "e4m3"; }

// Half a unit in the last place of T.
template <typename T> double half_unit();
template <> double half_unit<float>() { return 0; }
template <> double half_unit<bf16>() { return 0x1p-8; }
template <> double half_unit<__half>() { return 0x1p-11; }
template <> double half_unit<e4m3>() { return 0x1p-4; }

// Every number is rounded to T and else at most `absolute` and `relative` off.
template <typename T>
static void compare(const string &kernel, const vector<T> &got, const vector<double> &want,
                    double absolute = 2e-6, double relative = 2e-6) {
    // The smallest have less bits.
    absolute += std::is_same<T, __half>::value ? 3e-8 : std::is_same<T, e4m3>::value ? 0x1p-10 : 0;
    size_t wrong = 0, first = 0;
    for (size_t i = got.size(); i-- > 0;) {
        double limit = fabs(want[i]) * (half_unit<T>() * 1.001 + relative) + absolute;
        if (!within(kernel, to_f32(got[i]), want[i], limit)) wrong++, first = i;
    }
    CHECK(wrong == 0, "%s: %zu of %zu numbers, [%zu] is %g for %g", kernel.c_str(), wrong,
          got.size(), first, to_f32(got[first]), want[first]);
}
template <typename T>
static void same(const string &kernel, const vector<T> &got, const vector<double> &want) {
    compare(kernel, got, want, 0, 0);
}

template <typename T> vector<double> doubles(const vector<T> &x) {
    vector<double> all;
    for (T number : x) all.push_back(to_f32(number));
    return all;
}
// The nearest numbers of T.
template <typename T> vector<double> rounded(vector<double> x) {
    for (double &number : x) number = to_f32(from_f32<T>(float(number)));
    return x;
}

// ---- norms

// Rows of x, less their mean if `centred`, over the root of their mean square, times the weight.
static vector<double> normed(const vector<double> &x, int dim, bool centred, double eps,
                             const vector<float> &weight, const vector<float> &bias) {
    vector<double> out(x.size());
    for (size_t row = 0; row < x.size(); row += dim) {
        double mean = 0, squares = 0;
        for (int i = 0; i < dim && centred; i++) mean += x[row + i] / dim;
        for (int i = 0; i < dim; i++) squares += (x[row + i] - mean) * (x[row + i] - mean);
        double scale = 1 / sqrt(squares / dim + eps);
        for (int i = 0; i < dim; i++) {
            out[row + i] = (x[row + i] - mean) * scale * weight[i] + (bias.empty() ? 0 : bias[i]);
        }
    }
    return out;
}

// rms_norm has a warp for each narrow row.
static unsigned norm_blocks(int dim, int rows, unsigned block) {
    unsigned warps = block / 32;
    return dim > 256 ? unsigned(rows) : (unsigned(rows) + warps - 1) / warps;
}

template <typename X, typename Rms, typename Layer>
static void norms(int dim, int rows, unsigned block, Rms rms, Layer layer) {
    vector<X> x = randoms<X>(size_t(rows) * dim, 2, 0.7f);
    vector<float> weight = randoms<float>(dim, 0.5f, 1), bias = randoms<float>(dim);
    vector<double> numbers = doubles(x);
    string type = name_of<X>();

    vector<bf16> out = poison<bf16>(x.size());
    EMULATE(rms, dim3(norm_blocks(dim, rows, block)), dim3(block), 0, x.data(), weight.data(),
            out.data(), 1e-5f, dim, rows);
    compare("rms_norm_" + type, out, normed(numbers, dim, false, 1e-5, weight, {}));
    out = poison<bf16>(x.size());
    EMULATE(layer, dim3(rows), dim3(block), 0, x.data(), weight.data(), bias.data(), out.data(),
            1e-5f, dim, rows);
    compare("layer_norm_" + type, out, normed(numbers, dim, true, 1e-5, weight, bias), 6e-6);
    out = poison<bf16>(x.size());
    EMULATE(layer, dim3(rows), dim3(block), 0, x.data(), weight.data(), nullptr, out.data(),
            1e-5f, dim, rows);
    compare("layer_norm_" + type, out, normed(numbers, dim, true, 1e-5, weight, {}), 6e-6);
}

static void add_norm(int dim, int rows, unsigned block) {
    vector<float> x = randoms<float>(size_t(rows) * dim, 2), weight = randoms<float>(dim);
    vector<bf16> y = randoms<bf16>(x.size());
    vector<double> sum;
    for (size_t i = 0; i < x.size(); i++) sum.push_back(x[i] + to_f32(y[i]));
    vector<bf16> out = poison<bf16>(x.size());
    EMULATE(add_rms_norm, dim3(rows), dim3(block), 0, x.data(), y.data(), weight.data(),
            out.data(), 1e-6f, dim, rows);
    compare("add_rms_norm", out, normed(sum, dim, false, 1e-6, weight, {}));
    same("add_rms_norm, sum", x, sum);
}

static void all_norms() {
    for (int dim : {1, 7, 8, 33, 64, 128, 255, 256, 257, 264, 1000, 1003, 4096, 8192, 8200}) {
        int rows = dim > 4096 ? 2 : dim > 256 ? 3 : 19;
        unsigned blocks[2] = {256, 1024};
        for (unsigned block : blocks) {
            norms<float>(dim, rows, block, rms_norm_f32, layer_norm_f32);
            norms<bf16>(dim, rows, block, rms_norm_bf16, layer_norm_bf16);
            add_norm(dim, rows, block);
        }
    }
}

static void norm_in_place() {
    vector<bf16> x = randoms<bf16>(20 * 128), y = x, out = poison<bf16>(x.size());
    vector<float> weight = randoms<float>(128);
    EMULATE(rms_norm_bf16, dim3(3), dim3(256), 0, x.data(), weight.data(), out.data(), 1e-6f, 128,
            20);
    EMULATE(rms_norm_bf16, dim3(3), dim3(256), 0, y.data(), weight.data(), y.data(), 1e-6f, 128,
            20);
    same("rms_norm_bf16 in place", y, doubles(out));
}

// ---- element by element

static dim3 grid_of(size_t count) { return dim3(unsigned((count + 2047) / 2048)); }

// f(x) and f(x, y) for every element.
template <typename F> vector<double> mapped(const vector<double> &x, F f) {
    vector<double> all;
    for (double number : x) all.push_back(f(number));
    return all;
}
template <typename F>
vector<double> mapped(const vector<double> &x, const vector<double> &y, F f) {
    vector<double> all;
    for (size_t i = 0; i < x.size(); i++) all.push_back(f(x[i], y[i]));
    return all;
}
static double sum_of(double x, double y) { return float(x) + float(y); }

static void sums(size_t count) {
    vector<float> x = randoms<float>(count, 3), y = randoms<float>(count);
    vector<bf16> x16 = randoms<bf16>(count, 3), y16 = randoms<bf16>(count);
    vector<double> numbers = doubles(x), numbers16 = doubles(x16), more = doubles(y16);
    vector<float> sum = x;
    EMULATE(add_f32, grid_of(count), dim3(256), 0, sum.data(), y16.data(), count);
    same("add_f32", sum, mapped(numbers, more, sum_of));
    sum = x;
    EMULATE(add_f32_f32, grid_of(count), dim3(256), 0, sum.data(), y.data(), count);
    same("add_f32_f32", sum, mapped(numbers, doubles(y), sum_of));
    vector<bf16> sum16 = x16;
    EMULATE(add_bf16, grid_of(count), dim3(256), 0, sum16.data(), y16.data(), count);
    same("add_bf16", sum16, rounded<bf16>(mapped(numbers16, more, sum_of)));
}

static void biases(size_t most) {
    for (int width : {1, 3, 8, 24, 100, 131}) {
        size_t count = most / width * width;
        if (count == 0) continue;
        vector<float> x = randoms<float>(count, 3), bias = randoms<float>(width);
        vector<bf16> x16 = randoms<bf16>(count, 3);
        vector<double> repeated, numbers = doubles(x), numbers16 = doubles(x16);
        for (size_t i = 0; i < count; i++) repeated.push_back(bias[i % width]);
        EMULATE(add_bias_f32, grid_of(count), dim3(256), 0, x.data(), bias.data(), width, count);
        same("add_bias_f32", x, mapped(numbers, repeated, sum_of));
        EMULATE(add_bias_bf16, grid_of(count), dim3(256), 0, x16.data(), bias.data(), width,
                count);
        same("add_bias_bf16", x16, rounded<bf16>(mapped(numbers16, repeated, sum_of)));
    }
}

static double gelu(double x) { return 0.5 * x * (1 + erf(x / sqrt(2.0))); }
static double gelu_approximate(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

template <typename Kernel>
static void gate(const string &name, Kernel kernel, const vector<bf16> &x, const vector<bf16> &y,
                 const vector<double> &want, double absolute) {
    vector<bf16> out = poison<bf16>(x.size());
    EMULATE(kernel, grid_of(x.size()), dim3(256), 0, x.data(), y.data(), out.data(), x.size());
    compare(name, out, want, absolute, 4e-6);
    out = x;
    EMULATE(kernel, grid_of(x.size()), dim3(256), 0, out.data(), y.data(), out.data(), x.size());
    compare(name + " in place", out, want, absolute, 4e-6);
}

// What Gemma has beside: embeddings that are multiplied, logits with a soft bound.
static void scales(size_t count) {
    vector<float> x = randoms<float>(count, 30);
    vector<double> numbers = doubles(x);
    EMULATE(softcap, grid_of(count), dim3(256), 0, x.data(), 7.5f, count);
    compare("softcap", x, mapped(numbers, [](double x) { return 7.5 * tanh(x / 7.5); }), 0);
    numbers = doubles(x);
    EMULATE(scale, grid_of(count), dim3(256), 0, x.data(), 33.9411255f, count);
    same("scale", x, mapped(numbers, [](double x) { return float(x) * 33.9411255f; }));
}

static void activations(size_t count) {
    vector<bf16> x = randoms<bf16>(count, 3), y = randoms<bf16>(count);
    if (count > 20) {
        x[5] = from_f32<bf16>(200.0f), x[6] = from_f32<bf16>(-200.0f), x[7] = from_f32<bf16>(-0.0f);
    }
    vector<double> numbers = doubles(x);
    auto silu = [](double gate, double up) { return gate / (1 + exp(-gate)) * up; };
    gate("silu_mul", silu_mul, x, y, mapped(numbers, doubles(y), silu), 1e-30);
    auto geglu = [](double gate, double up) { return gelu_approximate(gate) * up; };
    gate("gelu_tanh_mul", gelu_tanh_mul, x, y, mapped(numbers, doubles(y), geglu), 1e-6);
    vector<bf16> wide = randoms<bf16>(count, 6);
    auto clamped = [](double gate, double up) {
        double g = std::min(gate, 7.0), u = std::max(-7.0, std::min(up, 7.0));
        return g / (1 + exp(-1.702 * g)) * (u + 1);
    };
    gate("clamped_swiglu_mul", clamped_swiglu_mul, x, wide,
         mapped(numbers, doubles(wide), clamped), 1e-30);
    vector<bf16> out = poison<bf16>(count);
    EMULATE(gelu_erf, grid_of(count), dim3(256), 0, x.data(), out.data(), count);
    compare("gelu_erf", out, mapped(numbers, gelu), 3e-7, 4e-6);
    out = x;
    EMULATE(gelu_tanh, grid_of(count), dim3(256), 0, out.data(), out.data(), count);
    compare("gelu_tanh", out, mapped(numbers, gelu_approximate), 3e-7, 4e-6);
}

static void conversions(size_t count) {
    vector<bf16> x16 = randoms<bf16>(count), out16 = poison<bf16>(count);
    vector<float> x = randoms<float>(count), out = poison<float>(count);
    EMULATE(bf16_to_f32, grid_of(count), dim3(256), 0, x16.data(), out.data(), count);
    same("bf16_to_f32", out, doubles(x16));
    // More threads than there is work for.
    EMULATE(f32_to_bf16, dim3(unsigned(count + 255) / 256), dim3(256), 0, x.data(), out16.data(),
            count);
    same("f32_to_bf16", out16, rounded<bf16>(doubles(x)));
}

template <typename T, typename Kernel> static void selects(int width, Kernel kernel) {
    vector<T> x = randoms<T>(7 * size_t(width)), out = poison<T>(5 * size_t(width) + 3);
    vector<int> rows = {6, 0, 3, 3, 1};
    EMULATE(kernel, dim3(5), dim3(128), 0, x.data(), rows.data(), out.data(), width, 5);
    string name = string("select_rows_") + name_of<T>();
    check_poisoned(name, out, 5 * size_t(width));
    out.resize(5 * size_t(width));
    vector<double> want;
    for (int row : rows) {
        for (int i = 0; i < width; i++) want.push_back(to_f32(x[size_t(row) * width + i]));
    }
    same(name, out, want);
}

// ---- rotary embedding and store

struct Shape {
    int rows, heads, kv_heads, dim, rot;
};

// The angles of all positions.
struct Turns {
    vector<float> cos, sin;

    Turns(int positions, int rot) {
        for (int i = 0; i < positions * (rot / 2); i++) {
            float angle = float(below(10000)) * 0.01f;
            cos.push_back(cosf(angle)), sin.push_back(sinf(angle));
        }
    }
};

// The heads of every row, each with its norm (if there is a weight), turned by its position.
static vector<double> turned(const vector<bf16> &x, int heads, const Shape &s, const Turns &turns,
                             const vector<int> &positions, const vector<float> &weight) {
    vector<double> out = doubles(x);
    if (!weight.empty()) out = normed(out, s.dim, false, 1e-6, weight, {});
    int half = s.rot / 2;
    for (size_t head = 0; head < x.size() / s.dim; head++) {
        size_t angle = size_t(positions[head / heads]) * half;
        for (int i = 0; i < half; i++) {
            double &first = out[head * s.dim + i], &second = out[head * s.dim + i + half];
            double a = first, b = second, c = turns.cos[angle + i], d = turns.sin[angle + i];
            first = a * c - b * d, second = b * c + a * d;
        }
    }
    return out;
}

// Finite numbers stay finite in the store.
template <typename KV> double in_store(double x) {
    if (std::is_same<KV, double>::value) return x;
    bool byte = sizeof(KV) == 1;
    double top = byte ? 448.0 : std::is_same<KV, bf16>::value ? 3.38953139e38 : 65504.0;
    return std::isfinite(x) ? std::min(std::max(x, -top), top) : byte ? NAN : x;
}

// What a store of so many slots has after the rows came in; NaN where nothing did.
template <typename KV>
vector<double> stored(const vector<double> &x, const vector<int> &slots, size_t count) {
    size_t width = x.size() / slots.size();
    vector<double> out(count * width, NAN);
    for (size_t row = 0; row < slots.size(); row++) {
        for (size_t i = 0; i < width && slots[row] >= 0; i++) {
            out[slots[row] * width + i] = in_store<KV>(x[row * width + i]);
        }
    }
    return out;
}

template <typename KV, typename Kernel>
static void rope_store_case(const Shape &s, bool with_norms, Kernel kernel) {
    vector<bf16> q = randoms<bf16>(size_t(s.rows) * s.heads * s.dim);
    vector<bf16> k = randoms<bf16>(size_t(s.rows) * s.kv_heads * s.dim);
    vector<bf16> v = randoms<bf16>(k.size());
    const float unusual[4] = {1e30f, -INFINITY, NAN, -3e38f};
    for (size_t i = 0; i < 4 && i < v.size(); i++) v[i] = from_f32<bf16>(unusual[i]);
    vector<float> q_norm, k_norm;
    if (with_norms) q_norm = randoms<float>(s.dim), k_norm = randoms<float>(s.dim);
    Turns turns(s.rows + 5, s.rot);
    vector<int> positions, slots = shuffled(s.rows + 3);
    slots.resize(s.rows);
    if (s.rows > 1) slots[s.rows / 2] = -1;
    for (int i = 0; i < s.rows; i++) positions.push_back(below(s.rows + 5));
    size_t store = size_t(s.rows + 3) * s.kv_heads * s.dim;
    vector<KV> k_store = poison<KV>(store), v_store = poison<KV>(store);
    vector<bf16> q_out = q;

    unsigned warps = unsigned(s.rows * (s.heads + s.kv_heads));
    EMULATE(kernel, dim3((warps + 7) / 8), dim3(256), 0, q_out.data(), k.data(), v.data(),
            k_store.data(), v_store.data(), nullptr, nullptr, slots.data(), positions.data(),
            turns.cos.data(),
            turns.sin.data(), with_norms ? q_norm.data() : nullptr,
            with_norms ? k_norm.data() : nullptr, 1e-6f, s.rows, s.heads, s.kv_heads, s.dim,
            s.rot);
    string name = string("rope_store_") + name_of<KV>();
    vector<double> k_turned = turned(k, s.kv_heads, s, turns, positions, k_norm);
    compare(name + " q", q_out, turned(q, s.heads, s, turns, positions, q_norm), 1e-6, 1e-6);
    compare(name + " k", k_store, stored<KV>(k_turned, slots, s.rows + 3), 1e-6, 1e-6);
    vector<double> v_rounded = rounded<KV>(stored<KV>(doubles(v), slots, s.rows + 3));
    same(name + " v", v_store, v_rounded);
}

// Heads as bytes with a scale: as what is computed in f32 (`want`, of one slot after the other,
// NaN where nothing was stored) says.
static void check_scaled(const string &kernel, const vector<q8> &got, const vector<float> &scales,
                         const vector<double> &want, const Shape &s) {
    for (size_t head = 0; head < want.size() / s.dim; head++) {
        const double *x = &want[head * s.dim];
        const q8 *bytes = &got[head * s.dim];
        int slot = int(head) / s.kv_heads;
        float scale = scales[scale_at(slot, s.kv_heads, int(head) % s.kv_heads)];
        double largest = 0;
        bool sound = true;
        for (int i = 0; i < s.dim; i++) {
            sound = sound && std::isfinite(x[i]), largest = std::max(largest, fabs(x[i]));
        }
        CHECK(sound ? fabs(scale - largest / 127) <= 1e-6 * largest / 127 : std::isnan(scale),
              "%s: the scale of head %zu is %g for %g", kernel.c_str(), head, scale,
              largest / 127);
        int wrong = 0;
        for (int i = 0; i < s.dim && sound; i++) {
            double off = fabs(bytes[i].raw * double(scale) - x[i]);
            wrong += off > largest * (0.5001 / 127 + 2e-6);
        }
        CHECK(wrong == 0, "%s: %d numbers of head %zu", kernel.c_str(), wrong, head);
    }
}

// Rows as bytes with scales. One head is zeros, one next to it; one holds what is no number.
static void rope_store_scaled(const Shape &s, bool with_norms) {
    vector<bf16> q = randoms<bf16>(size_t(s.rows) * s.heads * s.dim), q_out = q;
    vector<bf16> k = randoms<bf16>(size_t(s.rows) * s.kv_heads * s.dim, 40), v = k;
    std::shuffle(v.begin(), v.end(), rng);
    size_t heads = v.size() / s.dim;
    for (int i = 0; i < s.dim && heads > 2; i++) {
        v[i] = from_f32<bf16>(0), v[s.dim + i] = from_f32<bf16>(i % 2 ? 1e-31f : -1e-35f);
    }
    if (heads > 4) v[3 * s.dim] = from_f32<bf16>(NAN), v[4 * s.dim] = from_f32<bf16>(INFINITY);
    vector<float> q_norm, k_norm;
    if (with_norms) q_norm = randoms<float>(s.dim), k_norm = randoms<float>(s.dim);
    Turns turns(s.rows + 5, s.rot);
    int count = (s.rows + 3 + 15) / 16 * 16;
    vector<int> positions, slots = shuffled(s.rows + 3);
    slots.resize(s.rows);
    if (s.rows > 1) slots[s.rows / 2] = -1;
    for (int i = 0; i < s.rows; i++) positions.push_back(below(s.rows + 5));
    vector<q8> k_store = poison<q8>(size_t(count) * s.kv_heads * s.dim), v_store = k_store;
    vector<float> k_scales = poison<float>(size_t(count) * s.kv_heads), v_scales = k_scales;
    unsigned warps = unsigned(s.rows * (s.heads + s.kv_heads));
    EMULATE(rope_store_q8, dim3((warps + 7) / 8), dim3(256), 0, q_out.data(), k.data(), v.data(),
            k_store.data(), v_store.data(), k_scales.data(), v_scales.data(), slots.data(),
            positions.data(), turns.cos.data(), turns.sin.data(),
            with_norms ? q_norm.data() : nullptr, with_norms ? k_norm.data() : nullptr, 1e-6f,
            s.rows, s.heads, s.kv_heads, s.dim, s.rot);
    compare("rope_store_q8 q", q_out, turned(q, s.heads, s, turns, positions, q_norm), 1e-6, 1e-6);
    vector<double> k_turned = turned(k, s.kv_heads, s, turns, positions, k_norm);
    check_scaled("rope_store_q8 k", k_store, k_scales, stored<double>(k_turned, slots, count), s);
    vector<double> v_wanted = stored<double>(doubles(v), slots, count);
    for (double &x : v_wanted) x = fabs(x) < 1e-30 ? 0 : x;
    check_scaled("rope_store_q8 v", v_store, v_scales, v_wanted, s);
    for (int slot = 0; slot < count; slot++) {
        if (std::count(slots.begin(), slots.end(), slot)) continue;
        for (int i = 0; i < s.kv_heads * s.dim; i++) {
            bool good = poisoned(k_store[slot * s.kv_heads * s.dim + i]);
            CHECK(good, "rope_store_q8 wrote slot %d", slot);
        }
    }
}

static void rope_stores() {
    const Shape shapes[] = {{1, 1, 1, 5, 0},     {1, 1, 1, 5, 4},     {3, 5, 1, 6, 4},
                            {3, 2, 2, 10, 6},    {4, 8, 2, 64, 64},   {9, 4, 4, 80, 32},
                            {5, 6, 2, 96, 48},   {3, 14, 2, 128, 128}, {2, 3, 1, 255, 254},
                            {2, 4, 2, 256, 256}, {2, 4, 2, 256, 64},  {33, 1, 1, 2, 2},
                            {1, 16, 8, 128, 0}};
    for (const Shape &shape : shapes) {
        for (bool with_norms : {false, true}) {
            rope_store_case<bf16>(shape, with_norms, rope_store_bf16);
            rope_store_case<__half>(shape, with_norms, rope_store_f16);
            rope_store_case<e4m3>(shape, with_norms, rope_store_e4m3);
            rope_store_scaled(shape, with_norms);
        }
    }
}

int main() {
    all_norms();
    norm_in_place();
    for (size_t count : {1, 7, 8, 9, 100, 2047, 2048, 2049, 10001}) {
        sums(count), biases(count), activations(count), conversions(count), scales(count);
    }
    for (int width : {1, 3, 8, 100, 129, 4096}) {
        selects<float>(width, select_rows_f32), selects<bf16>(width, select_rows_bf16);
    }
    rope_stores();
    return finish();
}
