// quantized_wide.cu: products of many rows with weights of every block format.
#include "quantized_wide.cu"

#include "blocks.h"

typedef void (*Kernel)(const bf16 *, int, int, float *, MATRICES_ARGUMENTS);

// How a kernel is launched: most rows of x, warps' rows of W in a block, blocks that share k.
struct Launch {
    int most, r, splits;
};

static size_t shared_bytes(const Format &format, const Launch &launch) {
    std::string name = format.name;
    size_t slot = 160;
    if (name == "q2_k") slot = 96;
    if (name == "q8_0") slot = 288;
    for (const char *wide : {"q4_1", "q5_0", "q5_1", "q5_k", "q6_k"}) {
        if (name == wide) slot = 224;
    }
    return 3 * (32 * launch.r * slot + 512 * launch.most) + 4096 * launch.r;
}

// As in quantized_tall.cu.
static void linear_sum(const float *parts, int splits, int rows, int m, MATRICES_ARGUMENTS) {
    grid_begin();
    sum_parts(parts, splits, rows, m, MATRICES);
}
static void sum(Product &p, const std::vector<float> &parts, int splits, int rows, int blocks) {
    dim3 grid(unsigned(blocks * rows + 127) / 128, unsigned(p.m + 7) / 8);
    EMULATE(linear_sum, grid, dim3(256), 0, parts.data(), splits, rows, p.m, ARGUMENTS_OF(p));
}

static Product run(const Format &format, const Kernel (&kernels)[2], const Launch &launch,
                   Product p) {
    Kernel kernel = kernels[launch.most / 32];
    std::vector<bf16> x;
    for (float number : p.x) x.push_back(from_f32<bf16>(number));
    int tile = 32 * launch.r, blocks = 0;
    for (int n : p.n) blocks += (n + tile - 1) / tile;
    std::vector<float> parts = poison<float>(size_t(launch.splits) * p.m * blocks * tile);
    bool alone = launch.splits == 1;
    p.weights_are_constant();
    EMULATE(kernel, dim3(unsigned(blocks), unsigned(launch.splits)),
            dim3(128 * unsigned(launch.r)), shared_bytes(format, launch), x.data(), p.m, p.k,
            alone ? nullptr : parts.data(), ARGUMENTS_OF(p));
    if (!alone) sum(p, parts, launch.splits, tile, blocks);
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
              "linear_%s_w%d: bits of matrix %d", format.name, launch.most, i);
    }
}

// Of every kernel and size of block some shapes, alone and with k shared.
static void products(const Format &format, const Kernel (&kernels)[2]) {
    // Weights are multiplied as bf16.
    auto make = [&](int n, int k) {
        Weights w = random_blocks(format, n, k);
        for (float &x : w.values) x = to_f32(from_f32<bf16>(x));
        return w;
    };
    const int small[8] = {1, 9, 24, 67, 8, 19, 33, 40}, large[8] = {1, 2, 5, 9, 3, 4, 8, 7};
    const int sizes[4] = {1, 2, 4, 3};
    for (int trial = 0; trial < 8; trial++) {
        int k = format.weights * (format.weights == 32 ? small : large)[trial];
        Launch launch = {16 << trial % 2, sizes[trial / 2], 1};
        if (trial == 3 || trial >= 5) launch.splits = trial == 5 ? 5 : trial - 1;
        int m = trial == 1 ? 1 : launch.most - (trial % 4 ? below(launch.most / 2) : 0);
        const int n[3] = {trial == 0 ? 7 : trial == 5 || trial == 7 ? 131 : 13, trial % 2 ? 45 : 0,
                          trial % 3 == 2 ? 6 : 0};
        bool f32 = trial % 4 != 3;
        Product p(m, k, n, trial == 1 ? 2 : 3, f32, make);
        p.x.clear();
        for (bf16 x : randoms<bf16>(size_t(m) * k)) p.x.push_back(to_f32(x));
        p = run(format, kernels, launch, p);
        // What has a minimum may round to a neighbour in bf16.
        p.check(text("linear_%s", format.name), format.least_at < 0 ? 2e-6 : 3e-3);
        if (trial < 4 || !f32) continue;
        Launch other = {launch.most == 16 ? 32 : 16, launch.r == 1 ? 2 : 1, launch.splits};
        int rows = std::max(1, std::min(m, other.most) - 3);
        same_bits(format, kernels, other, p, m - rows, rows);
    }
}

#define PRODUCTS(format, name)                                                                    \
    products(format, {linear_##name##_w16, linear_##name##_w32});

int main() {
    EACH_FORMAT(PRODUCTS)
    return finish();
}
