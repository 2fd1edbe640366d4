// quantized.cu: rows of x as codes, and their products with weights of every block format.
#include "quantized.cu"

#include "blocks.h"

typedef void (*Kernel)(const int8_t *, const uint2 *, int, int, MATRICES_ARGUMENTS);

// x as the kernels have it, and the numbers that it then means.
struct Quantized {
    std::vector<int8_t> codes;
    std::vector<uint2> scales;
    std::vector<float> values;
};

// The 32 of one scale.
static void check_scale(const Quantized &x, const std::vector<float> &in, size_t at) {
    float largest = 0, scale = __uint_as_float(x.scales[at].x);
    int sums[2] = {};
    for (size_t i = 32 * at; i < 32 * at + 32; i++) {
        largest = fmaxf(largest, fabsf(in[i]));
        sums[i / 16 % 2] += x.codes[i];
        float off = fabsf(x.values[i] - in[i]);
        CHECK(off <= 0.5001f * scale, "code %zu: %g for %g", i, x.values[i], in[i]);
    }
    CHECK(fabsf(scale - largest / 127) <= 1e-6f * largest, "scale %zu: %g", at, scale);
    int16_t first = int16_t(x.scales[at].y), last = int16_t(x.scales[at].y >> 16);
    CHECK(first == sums[0] && last == sums[1], "sums %zu: %d %d", at, first, last);
}

// Rows of which some stretches are small and some are zero.
static Quantized quantized(size_t count, bool f32) {
    std::vector<float> in = randoms<float>(count);
    for (size_t i = 0; i < count; i++) in[i] *= i / 32 % 7 == 3 ? 0 : 1 + i / 32 % 5;
    std::vector<bf16> narrow;
    for (float x : in) narrow.push_back(from_f32<bf16>(x));
    Quantized x = {poison<int8_t>(count + 32), poison<uint2>(count / 32 + 1), {}};
    if (f32) {
        EMULATE(quantize_rows_f32, dim3(2), dim3(64), 0, in.data(), x.codes.data(),
                x.scales.data(), u64(count));
    } else {
        EMULATE(quantize_rows_bf16, dim3(2), dim3(64), 0, narrow.data(), x.codes.data(),
                x.scales.data(), u64(count));
        for (size_t i = 0; i < count; i++) in[i] = to_f32(narrow[i]);
    }
    for (size_t i = 0; i < count; i++) {
        x.values.push_back(x.codes[i] * __uint_as_float(x.scales[i / 32].x));
    }
    for (size_t i = 0; i < count / 32; i++) check_scale(x, in, i);
    check_poisoned("codes", x.codes, count);
    check_poisoned("scales", x.scales, count / 32);
    return x;
}

static void not_finite() {
    std::vector<float> x(64, 1.0f);
    x[3] = NAN, x[40] = INFINITY;
    std::vector<int8_t> codes(64);
    std::vector<uint2> scales(2);
    EMULATE(quantize_rows_f32, dim3(1), dim3(32), 0, x.data(), codes.data(), scales.data(), 64ull);
    CHECK(std::isnan(__uint_as_float(scales[0].x)), "the scale of a NaN");
    CHECK(std::isinf(__uint_as_float(scales[1].x)), "the scale of an infinity");
}

// The rows of W of a block of the kernel for `most` rows of x.
static int tile_of(const Format &format, int most) {
    bool long_turns = format.decode == decode_q4_k || format.decode == decode_q6_k;
    return most <= 2 || long_turns ? 8 : 16;
}

// Rows of x from `row` on.
static void run(const Format &format, Kernel kernel, int most, const Quantized &x, int row,
                Product &p) {
    int tile = tile_of(format, most);
    unsigned blocks = unsigned(p.rows() + tile - 1) / tile;
    const int8_t *codes = x.codes.data() + size_t(row) * p.k;
    const uint2 *scales = x.scales.data() + size_t(row) * (p.k / 32);
    p.weights_are_constant();
    EMULATE(kernel, dim3(blocks), dim3(128), 0, codes, scales, p.m, p.k, ARGUMENTS_OF(p));
}

static void shapes(const Format &format, Kernel kernel, int most) {
    auto make = [&](int n, int k) { return random_blocks(format, n, k); };
    const int small[5] = {1, 35, 67, 64, 130}, large[5] = {1, 5, 9, 16, 25};
    const int n[5][3] = {{7, 9, 0}, {13, 0, 6}, {33, 9, 6}, {0, 1, 0}, {8, 8, 16}};
    for (int trial = 0; trial < 5; trial++) {
        int m = trial == 0 ? most : trial == 1 ? (most + 1) / 2 : 1 + below(most);
        int k = format.weights * (format.weights == 32 ? small : large)[trial];
        Product product(m, k, n[trial], trial == 1 ? 2 : 3, (trial + most) % 2, make);
        Quantized x = quantized(size_t(m) * k, below(2));
        product.x = x.values;
        run(format, kernel, most, x, 0, product);
        product.check(text("linear_%s", format.name), 2e-6);
    }
}

// A row alone has the bits that it has among others.
static void same_bits(const Format &format, const Kernel (&kernels)[4]) {
    auto make = [&](int n, int k) { return random_blocks(format, n, k); };
    int k = format.weights == 32 ? 32 * 233 : 256 * 27, m = 8, n = 11;
    Product all(m, k, {n, 0, 0}, 0, true, make);
    Quantized x = quantized(size_t(m) * k, false);
    all.x = x.values;
    Product together = all;
    run(format, kernels[3], 8, x, 0, together);
    together.check(text("linear_%s", format.name), 2e-6);
    // Rows 0 and 1 alone, then 2 and 3, then 4 to 7.
    const int first[4] = {0, 1, 2, 4}, rows[4] = {1, 1, 2, 4}, kernel[4] = {0, 0, 1, 2};
    for (int part = 0; part < 4; part++) {
        Product few = all;
        few.m = rows[part];
        run(format, kernels[kernel[part]], 1 << kernel[part], x, first[part], few);
        const void *among = together.y[0].bytes.data() + 4 * first[part] * n;
        CHECK(!memcmp(few.y[0].bytes.data(), among, size_t(4) * few.m * n),
              "linear_%s: bits of rows %d.. of m%d", format.name, first[part], few.m);
    }
}

static void products(const Format &format, const Kernel (&kernels)[4]) {
    for (int i = 0; i < 4; i++) shapes(format, kernels[i], 1 << i);
    same_bits(format, kernels);
}

#define PRODUCTS(format, name)                                                                    \
    products(format, {linear_##name##_m1, linear_##name##_m2, linear_##name##_m4,                 \
                      linear_##name##_m8});

int main() {
    not_finite();
    EACH_FORMAT(PRODUCTS)
    return finish();
}
