// Products of rows with the matrices of their experts (experts.cuh), for the tests of the kernels
// that compute them: routing, inputs, truth and comparison.
#pragma once

#include "experts.cuh"

#include "products.h"

struct ExpertProduct {
    int m, experts, used, k, n[3];
    // Rows of x for each row: all experts of a row read it, or every pair has its own.
    bool own_rows;
    std::vector<int> chosen, starts, order;
    // By rows, as the numbers that are multiplied.
    std::vector<float> x;
    // Of each expert, and all of them as the kernels have them.
    std::vector<Weights> w[3];
    std::vector<uint8_t> bytes[3];
    std::vector<float> bias[3]; // [experts][n], empty: there is none
    Outputs y[3];

    // Rows go to `among` of the experts alone. Matrix i has a bias if bit i is set.
    template <typename Make>
    ExpertProduct(int m, int experts, int used, int among, int k, const int (&rows)[3],
                  bool own_rows, int biases, bool f32, Make make)
        : m(m), experts(experts), used(used), k(k), own_rows(own_rows), starts(1) {
        std::vector<int> open = shuffled(experts);
        open.resize(among);
        for (int row = 0; row < m; row++) {
            std::shuffle(open.begin(), open.end(), rng);
            std::vector<int> some(open.begin(), open.begin() + used);
            std::sort(some.begin(), some.end());
            chosen.insert(chosen.end(), some.begin(), some.end());
        }
        for (int e = 0; e < experts; e++) {
            for (int pair = 0; pair < pairs(); pair++) {
                if (chosen[pair] == e) order.push_back(pair);
            }
            starts.push_back(int(order.size()));
        }
        for (int i = 0; i < 3; i++) {
            n[i] = rows[i], y[i] = Outputs(size_t(pairs()) * n[i], f32);
            for (int e = 0; e < experts && n[i]; e++) {
                w[i].push_back(make(n[i], k));
                size_t end = (bytes[i].size() + 15) / 16 * 16;
                bytes[i].resize(end, 0xff);
                bytes[i].insert(bytes[i].end(), w[i][e].bytes.begin(), w[i][e].bytes.end());
            }
            if (biases >> i & 1) bias[i] = randoms<float>(size_t(experts) * n[i], 3);
        }
    }

    int pairs() const { return m * used; }
    int each() const { return own_rows ? 1 : used; }
    int x_rows() const { return own_rows ? pairs() : m; }
    int rows() const { return n[0] + n[1] + n[2]; }
    const void *data(int i) const { return bytes[i].empty() ? nullptr : bytes[i].data(); }
    const float *bias_of(int i) const { return bias[i].empty() ? nullptr : bias[i].data(); }
    void weights_are_constant() const {
        for (const std::vector<uint8_t> &all : bytes) emulate::constant(all);
    }
    // As many tiles of so many rows as any routing can want.
    unsigned tiles(int rows) const {
        int some = std::min(pairs(), experts);
        return unsigned(some + (pairs() - some) / rows);
    }
    const float *input(int pair) const { return &x[size_t(pair / each()) * k]; }

    std::vector<double> truth(int i) const {
        std::vector<double> all;
        for (int pair = 0; pair < pairs(); pair++) {
            int e = chosen[pair];
            for (int row = 0; row < n[i]; row++) {
                const float *b = &w[i][e].values[size_t(row) * k];
                double sum = bias[i].empty() ? 0 : bias[i][size_t(e) * n[i] + row];
                for (int at = 0; at < k; at++) sum += double(input(pair)[at]) * b[at];
                all.push_back(sum);
            }
        }
        return all;
    }
    void check(const std::string &name, double limit) const {
        std::string kernel = name + (y[0].f32 ? ", f32" : ", bf16");
        if (!y[0].f32) limit = 0x1p-8 * 1.01;
        for (int i = 0; i < 3; i++) {
            std::string detail = text("m %d, %d of %d experts, k %d, matrix %d of %d %d %d", m,
                                      used, experts, k, i, n[0], n[1], n[2]);
            check_near(kernel, detail, truth(i), limit, [&](size_t at) { return y[i][at]; });
            y[i].check_edge(kernel + ", " + detail);
        }
    }
};

// The arguments of a kernel that come from its EXPERTS_ARGUMENTS and MATRICES_ARGUMENTS.
#define ARGUMENTS_OF_EXPERTS(p)                                                                   \
    (p).starts.data(), (p).order.data(), (p).experts, (p).each(), (p).data(0), (p).data(1),       \
        (p).data(2), (p).n[0], (p).n[1], (p).n[2], (p).y[0].data(), (p).y[1].data(),              \
        (p).y[2].data(), (p).bias_of(0), (p).bias_of(1), (p).bias_of(2), (p).y[0].f32
