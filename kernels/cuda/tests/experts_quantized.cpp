// experts_quantized.cu against loops in f64, and against quantized.cu by bits.
#include "experts_quantized.cu"
#include "quantized.cu"

#include "blocks.h"
#include "experts.h"

typedef void (*Experts)(const int8_t *, const uint2 *, int, EXPERTS_ARGUMENTS, MATRICES_ARGUMENTS);
typedef void (*Alone)(const int8_t *, const uint2 *, int, int, MATRICES_ARGUMENTS);

// A product, and its rows of x as the kernels have them.
struct Case {
    ExpertProduct p;
    std::vector<int8_t> codes;
    std::vector<uint2> scales;

    Case(const Format &format, int m, int experts, int used, int among, int k, const int (&n)[3],
         bool own_rows, int biases, bool f32)
        : p(m, experts, used, among, k, n, own_rows, biases, f32,
            [&](int n, int k) { return random_blocks(format, n, k); }) {
        size_t count = size_t(p.x_rows()) * k;
        std::vector<float> x = randoms<float>(count);
        codes = poison<int8_t>(count), scales = poison<uint2>(count / 32);
        EMULATE(quantize_rows_f32, dim3(2), dim3(64), 0, x.data(), codes.data(), scales.data(),
                u64(count));
        for (size_t i = 0; i < count; i++) {
            p.x.push_back(codes[i] * __uint_as_float(scales[i / 32].x));
        }
    }

    void run(Experts kernel) {
        p.weights_are_constant();
        EMULATE(kernel, dim3(unsigned(p.rows() + 7) / 8, p.tiles(8)), dim3(128), 0, codes.data(),
                scales.data(), p.k, ARGUMENTS_OF_EXPERTS(p));
    }
};

static void shapes(const Format &format, Experts kernel) {
    std::string name = text("experts_%s", format.name);
    int block = format.weights;
    for (int m : {1, 3, 9, 30}) {
        bool f32 = m % 2;
        Case a(format, m, 9, 2, 9, block * (block == 32 ? 35 : 5), {13, 8, 0}, false, 3, f32);
        a.run(kernel), a.p.check(name, 2e-6);
        Case b(format, m, 40, 4, 4, block, {9, 0, 0}, true, 0, !f32);
        b.run(kernel), b.p.check(name, 2e-6);
    }
}

// A pair has the bits of its row and its expert alone.
static void same_bits(const Format &format, Experts kernel, Alone alone) {
    int n = 11, k = format.weights == 32 ? 32 * 67 : 256 * 9;
    Case all(format, 13, 3, 2, 3, k, {n, 0, 0}, false, 1, true);
    all.run(kernel);
    ExpertProduct &p = all.p;
    for (int pair = 0; pair < p.pairs(); pair++) {
        int e = p.chosen[pair];
        size_t at = size_t(pair / 2) * k;
        Outputs y(n, true);
        const Weights &own = p.w[0][e];
        const void *w = own.data();
        emulate::constant(own.bytes);
        EMULATE(alone, dim3(2), dim3(128), 0, &all.codes[at], &all.scales[at / 32], 1, k, w,
                nullptr, nullptr, n, 0, 0, y.data(), nullptr, nullptr, p.bias_of(0) + e * n,
                nullptr, nullptr, 1);
        CHECK(!memcmp(y.data(), p.y[0].bytes.data() + size_t(4) * pair * n, size_t(4) * n),
              "experts_%s: bits of pair %d", format.name, pair);
    }
}

#define EXPERTS_OF(format, name)                                                                  \
    shapes(format, experts_##name), same_bits(format, experts_##name, linear_##name##_m1);

int main() {
    EACH_FORMAT(EXPERTS_OF)
    return finish();
}
