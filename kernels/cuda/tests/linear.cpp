// linear.cu against loops in f64.
#include "linear.cu"

#include "products.h"

typedef void (*Kernel)(const bf16 *, int, int, MATRICES_ARGUMENTS);

// `tile` is the rows of W of a block.
static Product run(Kernel kernel, int tile, Product product) {
    std::vector<bf16> x;
    for (float number : product.x) x.push_back(from_f32<bf16>(number));
    unsigned blocks = unsigned(product.rows() + tile - 1) / tile;
    product.weights_are_constant();
    EMULATE(kernel, dim3(blocks), dim3(256), 0, x.data(), product.m, product.k,
            ARGUMENTS_OF(product));
    return product;
}

static std::vector<float> inputs(int m, int k) {
    std::vector<float> x;
    for (bf16 number : randoms<bf16>(size_t(m) * k)) x.push_back(to_f32(number));
    return x;
}

static void one(const char *name, Kernel kernel, int tile, int m, int k, const int (&n)[3],
                bool f32) {
    Product product(m, k, n, 5, f32, bf16_weights);
    product.x = inputs(m, k);
    run(kernel, tile, product).check(name, 2e-6);
}

static void shapes(const char *name, Kernel kernel, int tile, int most) {
    for (int m = 1; m <= most; m += most > 8 ? 3 : most > 4 ? 2 : 1) {
        for (int k : {8, 40, 64, 520, 1032}) {
            one(name, kernel, tile, m, k, {17, 0, 0}, (m + k / 8) % 2);
            one(name, kernel, tile, m, k, {5, 9, 3}, (m + k / 8) % 2 == 0);
        }
    }
    one(name, kernel, tile, most, 4104, {33, 1, 8}, true);
    one(name, kernel, tile, most, 8, {0, 5, 0}, true);
}

// A row alone has the bits that it has among others.
static void same_bits() {
    int m = 16, k = 1032, n = 21;
    Product all(m, k, {n, 0, 0}, 0, true, bf16_weights);
    all.x = inputs(m, k);
    Product together = run(linear_bf16_m16, 16, all);
    for (int i = 0; i < m; i++) {
        Product one = all;
        one.m = 1, one.x.assign(&all.x[i * k], &all.x[i * k] + k);
        one = run(linear_bf16_m1, 8, one);
        const void *among = together.y[0].bytes.data() + 4 * i * n;
        CHECK(!memcmp(one.y[0].data(), among, 4 * n), "bits of row %d", i);
    }
}

int main() {
    shapes("linear_bf16_m1", linear_bf16_m1, 8, 1);
    shapes("linear_bf16_m2", linear_bf16_m2, 8, 2);
    shapes("linear_bf16_m4", linear_bf16_m4, 16, 4);
    shapes("linear_bf16_m8", linear_bf16_m8, 16, 8);
    shapes("linear_bf16_m16", linear_bf16_m16, 16, 16);
    same_bits();
    return finish();
}
