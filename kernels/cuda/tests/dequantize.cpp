// dequantize.cu: every value, bit by bit, against decoders of one weight at a time.
#include "dequantize.cu"

#include "blocks.h"

typedef void (*Dequantize)(const void *, bf16 *, u64, u64, int);
typedef void (*Gather)(const void *, const int *, float *, int, int);

static bool same(bf16 a, bf16 b) { return !memcmp(&a, &b, 2); }

// Rows first.. of a matrix whose values are `values`.
static void dequantize_rows(const char *name, Dequantize kernel, const void *w,
                            const std::vector<float> &values, int first, int rows, int k,
                            unsigned blocks) {
    size_t count = size_t(rows) * k;
    std::vector<bf16> out = poison<bf16>(count + 8);
    EMULATE(kernel, dim3(blocks), dim3(64), 0, w, out.data(), u64(first), u64(rows), k);
    for (size_t i = 0; i < count; i++) {
        float want = values[size_t(first) * k + i];
        CHECK(same(out[i], from_f32<bf16>(want)), "dequantize_%s, k %d, [%zu]: %g for %g", name, k,
              i, to_f32(out[i]), want);
    }
    check_poisoned(text("dequantize_%s, k %d", name, k), out, count);
}

static void gather_rows(const char *name, Gather kernel, const void *w,
                        const std::vector<float> &values, std::vector<int> ids, int k) {
    std::vector<float> out = poison<float>(ids.size() * k + 4);
    EMULATE(kernel, dim3(1), dim3(32), 0, w, ids.data(), out.data(), k, int(ids.size()));
    for (size_t i = 0; i < ids.size() * k; i++) {
        float want = values[size_t(ids[i / k]) * k + i % k];
        CHECK(out[i] == want, "gather_%s, k %d, [%zu]: %g for %g", name, k, i, out[i], want);
    }
    check_poisoned(text("gather_%s, k %d", name, k), out, ids.size() * k);
}

static void blocks(const Format &format, Dequantize dequantize, Gather gather) {
    for (int trial = 0; trial < 3; trial++) {
        int n = 5 + trial, k = format.weights * (2 * trial + 1);
        Weights w = random_blocks(format, n, k);
        int first = trial, rows = n - first - (trial == 2);
        dequantize_rows(format.name, dequantize, w.data(), w.values, first, rows, k, 1 + trial);
        gather_rows(format.name, gather, w.data(), w.values, {n - 1, 0, 2, 2}, k);
    }
}

template <typename T> void floats(const char *name, Dequantize dequantize, Gather gather) {
    for (int k : {8, 13, 40, 1}) {
        std::vector<T> w = randoms<T>(6 * k);
        std::vector<float> values;
        for (T x : w) values.push_back(to_f32(x));
        if (dequantize) dequantize_rows(name, dequantize, w.data(), values, 1, 4, k, 2);
        gather_rows(name, gather, w.data(), values, {5, 0, 3}, k);
    }
}

#define BLOCKS(format, name) blocks(format, dequantize_##name, gather_##name);

int main() {
    EACH_FORMAT(BLOCKS)
    BLOCKS(Q8_K_BLOCKS, q8_k)
    floats<float>("f32", dequantize_f32, gather_f32);
    floats<__half>("f16", dequantize_f16, gather_f16);
    floats<bf16>("bf16", nullptr, gather_bf16);
    return finish();
}
