// The products of some rows with up to three matrices (outputs.cuh), for the tests of the kernels
// that compute them: inputs, truth and comparison.
#pragma once

#include "check.h"

// A matrix as a kernel reads it, and its values by rows. The last 16 bytes are whole.
struct Weights {
    std::vector<uint8_t> bytes;
    std::vector<float> values;

    const void *data() const { return bytes.empty() ? nullptr : bytes.data(); }
};

inline Weights bf16_weights(int n, int k) {
    std::vector<bf16> numbers = randoms<bf16>(size_t(n) * k);
    Weights w;
    for (bf16 x : numbers) w.values.push_back(to_f32(x));
    w.bytes.resize(2 * numbers.size());
    if (n) memcpy(w.bytes.data(), numbers.data(), w.bytes.size());
    return w;
}

struct Product {
    int m, k, n[3];
    // [m][k], as the numbers that are multiplied.
    std::vector<float> x;
    Weights w[3];
    // Empty: there is none.
    std::vector<float> bias[3];
    Outputs y[3];

    // `make(n, k)` makes the matrices; x is to be set. Matrix i has a bias if bit i is set.
    template <typename Make>
    Product(int m, int k, const int (&rows)[3], int biases, bool f32, Make make) : m(m), k(k) {
        for (int i = 0; i < 3; i++) {
            n[i] = rows[i], w[i] = make(n[i], k), y[i] = Outputs(size_t(m) * n[i], f32);
            if (biases >> i & 1) bias[i] = randoms<float>(n[i], 3);
        }
    }

    int rows() const { return n[0] + n[1] + n[2]; }
    // A kernel may read them before its input is there.
    void weights_are_constant() const {
        for (const Weights &matrix : w) emulate::constant(matrix.bytes);
    }
    const float *bias_of(int i) const { return bias[i].empty() ? nullptr : bias[i].data(); }

    std::vector<double> truth(int i) const {
        std::vector<double> all;
        for (int input = 0; input < m; input++) {
            for (int row = 0; row < n[i]; row++) {
                const float *a = &x[size_t(input) * k], *b = &w[i].values[size_t(row) * k];
                double sum = bias[i].empty() ? 0 : bias[i][row];
                for (int at = 0; at < k; at++) sum += double(a[at]) * b[at];
                all.push_back(sum);
            }
        }
        return all;
    }

    // `limit` is of f32; rounding to bf16 is half a unit in the last place.
    void check(const std::string &name, double limit) const {
        std::string kernel = name + (y[0].f32 ? ", f32" : ", bf16");
        if (!y[0].f32) limit = 0x1p-8 * 1.01;
        for (int i = 0; i < 3; i++) {
            std::string detail =
                text("m %d k %d, matrix %d of %d %d %d", m, k, i, n[0], n[1], n[2]);
            check_near(kernel, detail, truth(i), limit, [&](size_t at) { return y[i][at]; });
            y[i].check_edge(kernel + ", " + detail);
        }
    }
};

// The arguments of a kernel that come from its MATRICES_ARGUMENTS.
#define ARGUMENTS_OF(p)                                                                           \
    (p).w[0].data(), (p).w[1].data(), (p).w[2].data(), (p).n[0], (p).n[1], (p).n[2],              \
        (p).y[0].data(), (p).y[1].data(), (p).y[2].data(), (p).bias_of(0), (p).bias_of(1),        \
        (p).bias_of(2), (p).y[0].f32
