// experts_linear.cu against loops in f64, and against linear.cu by bits.
#include "experts_linear.cu"
#include "linear.cu"

#include "experts.h"

static ExpertProduct made(int m, int experts, int used, int among, int k, const int (&n)[3],
                          bool own_rows, int biases, bool f32) {
    ExpertProduct p(m, experts, used, among, k, n, own_rows, biases, f32, bf16_weights);
    for (bf16 number : randoms<bf16>(size_t(p.x_rows()) * k)) p.x.push_back(to_f32(number));
    return p;
}

static std::vector<bf16> narrow(const float *x, size_t count) {
    std::vector<bf16> all;
    for (size_t i = 0; i < count; i++) all.push_back(from_f32<bf16>(x[i]));
    return all;
}

static void run(ExpertProduct &p) {
    std::vector<bf16> x = narrow(p.x.data(), p.x.size());
    p.weights_are_constant();
    EMULATE(experts_bf16, dim3(unsigned(p.rows() + 15) / 16, p.tiles(16)), dim3(256), 0, x.data(),
            p.k, ARGUMENTS_OF_EXPERTS(p));
}

static void one(int m, int experts, int used, int among, int k, const int (&n)[3], bool own_rows) {
    ExpertProduct p = made(m, experts, used, among, k, n, own_rows, m % 4, k % 16 != 0);
    run(p);
    p.check("experts_bf16", 2e-6);
}

// A pair has the bits of its row and its expert alone.
static void same_bits() {
    int m = 21, k = 520, n = 19, experts = 6;
    ExpertProduct p = made(m, experts, 2, experts, k, {n, 0, 0}, false, 1, true);
    run(p);
    for (int pair = 0; pair < p.pairs(); pair++) {
        int e = p.chosen[pair];
        std::vector<bf16> x = narrow(p.input(pair), k);
        Outputs y(n, true);
        const Weights &own = p.w[0][e];
        const void *w = own.data();
        emulate::constant(own.bytes);
        EMULATE(linear_bf16_m1, dim3(3), dim3(256), 0, x.data(), 1, k, w, nullptr, nullptr, n, 0, 0,
                y.data(), nullptr, nullptr, p.bias_of(0) + e * n, nullptr, nullptr, 1);
        CHECK(!memcmp(y.data(), p.y[0].bytes.data() + size_t(4) * pair * n, size_t(4) * n),
              "experts_bf16: bits of pair %d", pair);
    }
}

int main() {
    for (int m : {1, 3, 8, 40}) {
        one(m, 8, 2, 8, 40, {24, 24, 0}, false), one(m, 8, 2, 8, 24, {17, 0, 0}, true);
        one(m, 33, 8, 33, 64, {9, 5, 3}, false), one(m, 70, 4, 4, 520, {16, 16, 0}, false);
        one(m, 1, 1, 1, 1032, {33, 0, 0}, true);
    }
    one(90, 3, 1, 1, 136, {8, 8, 0}, false);
    same_bits();
    return finish();
}
