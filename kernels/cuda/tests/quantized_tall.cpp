// quantized_tall.cu: products of many rows with weights of every block format.
#include "quantized_tall.cu"

#include "blocks.h"

typedef void (*Kernel)(const bf16 *, int, int, float *, MATRICES_ARGUMENTS);

// How a kernel is launched: rows of x of a block, blocks that share k.
struct Launch {
    int most, splits;
};

static size_t shared_bytes(const Format &format, const Launch &launch) {
    std::string name = format.name;
    size_t slot = 176;
    if (name == "q2_k") slot = 112;
    for (const char *narrow : {"q3_k", "q4_k", "iq4_xs"}) {
        if (name == narrow) slot = 144;
    }
    if (name == "q5_0" || name == "q5_1") slot = 208;
    if (name == "q6_k") slot = 240;
    if (name == "q8_0") slot = 304;
    size_t scales = name == "q4_k" || name == "q5_k" ? 8192 : 16384;
    return 1024 + 2 * (512 * launch.most + 128 * slot) + scales;
}

static void sum(Product &p, const std::vector<float> &parts, int splits, int rows, int blocks) {
    dim3 grid(unsigned(blocks * rows + 127) / 128, unsigned(p.m + 7) / 8);
    EMULATE(linear_sum, grid, dim3(256), 0, parts.data(), splits, rows, p.m, ARGUMENTS_OF(p));
}

static Product run(const Format &format, const Kernel (&kernels)[2], const Launch &launch,
                   Product p) {
    Kernel kernel = kernels[launch.most / 128];
    std::vector<bf16> x;
    for (float number : p.x) x.push_back(from_f32<bf16>(number));
    unsigned blocks = 0, tiles = unsigned((p.m + launch.most - 1) / launch.most);
    for (int n : p.n) blocks += unsigned((n + 127) / 128);
    std::vector<float> parts = poison<float>(size_t(launch.splits) * p.m * blocks * 128);
    bool alone = launch.splits == 1;
    p.weights_are_constant();
    EMULATE(kernel, dim3(blocks, unsigned(launch.splits), tiles), dim3(256),
            shared_bytes(format, launch), x.data(), p.m, p.k, alone ? nullptr : parts.data(),
            ARGUMENTS_OF(p));
    if (!alone) sum(p, parts, launch.splits, 128, int(blocks));
    return p;
}

// Rows first.. of p have the same bits in another launch.
static void same_bits(const Format &format, const Kernel (&kernels)[2], const Launch &launch,
                      const Product &p, int first, int rows) {
    Product few = p;
    few.m = rows, few.x.assign(&p.x[size_t(first) * p.k], &p.x[0] + size_t(first + rows) * p.k);
    for (int i = 0; i < 3; i++) few.y[i] = Outputs(size_t(rows) * p.n[i], true);
    few = run(format, kernels, launch, few);
    for (int i = 0; i < 3; i++) {
        size_t row_bytes = size_t(4) * p.n[i];
        CHECK(!memcmp(few.y[i].bytes.data(), p.y[i].bytes.data() + first * row_bytes,
                      rows * row_bytes),
              "linear_%s_t%d: bits of matrix %d", format.name, launch.most, i);
    }
}

// Of both kernels some shapes, alone and with k shared.
static void products(const Format &format, const Kernel (&kernels)[2]) {
    // Weights are multiplied as bf16.
    auto make = [&](int n, int k) {
        Weights w = random_blocks(format, n, k);
        for (float &x : w.values) x = to_f32(from_f32<bf16>(x));
        return w;
    };
    const int small[4] = {1, 19, 40, 24}, large[4] = {1, 3, 5, 5};
    for (int trial = 0; trial < 4; trial++) {
        int k = format.weights * (format.weights == 32 ? small : large)[trial];
        Launch launch = {trial % 2 ? 128 : 64, trial < 2 ? 1 : trial};
        int m = trial == 0 ? 70 : trial == 1 ? 33 : trial == 2 ? 64 : 131;
        const int n[3] = {trial == 0 ? 7 : trial == 2 ? 131 : 29, trial % 2 ? 45 : 0,
                          trial == 2 ? 6 : 0};
        bool f32 = trial != 3 || format.least_at >= 0;
        Product p(m, k, n, trial == 1 ? 2 : 3, f32, make);
        p.x.clear();
        for (bf16 x : randoms<bf16>(size_t(m) * k)) p.x.push_back(to_f32(x));
        p = run(format, kernels, launch, p);
        // What has a minimum may round to a neighbour in bf16.
        p.check(text("linear_%s_t%d", format.name, launch.most), format.least_at < 0 ? 4e-6 : 3e-3);
        if (trial != 2) continue;
        same_bits(format, kernels, {128, launch.splits}, p, m - 20, 17);
    }
}

#define PRODUCTS(format, name)                                                                    \
    products(format, {linear_##name##_t64, linear_##name##_t128});

int main() {
    EACH_FORMAT(PRODUCTS)
    return finish();
}
