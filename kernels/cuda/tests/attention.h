// What the tests of attention have in common: keys and values in pages, and the truth in f64.
// Blocks that a kernel must not read are full of NaN, rows that it must not write are poison.
#pragma once

#include "attention.cuh"

#include "check.h"

using std::vector;

// What a block may have on the smallest of the devices, sm_86 and sm_89.
constexpr size_t SHARED_LEAST = 99 << 10;

// Paged keys and values, NaN where no sequence has any.
template <typename S> struct Store {
    static constexpr int NOWHERE = 1 << 28;

    int block_len, kv_heads, width, dim;
    vector<S> k, v;
    vector<float> k_scales, v_scales;
    vector<int> tables, unused;

    Store(int blocks, int block_len, int kv_heads, int dim)
        : block_len(block_len), kv_heads(kv_heads), width(kv_heads * dim), dim(dim),
          k(poison<S>(size_t(blocks) * block_len * width)), v(k), unused(shuffled(blocks)) {
        int slots = (blocks * block_len + 15) / 16 * 16;
        if (has_scales<S>) k_scales = v_scales = poison<float>(size_t(slots) * kv_heads);
    }

    // A sequence of so many keys of which the first `freed` are gone: where its table begins.
    int add(int keys, int freed) {
        tables.push_back(NOWHERE);
        int table = int(tables.size());
        for (int first = 0; first < keys; first += block_len) {
            bool gone = first + block_len <= freed;
            tables.push_back(gone ? NOWHERE : unused.back());
            if (!gone) unused.pop_back();
        }
        for (int key = freed; key < keys; key++) {
            fill(k, k_scales, slot(table, key), 2), fill(v, v_scales, slot(table, key), 1);
        }
        return table;
    }
    int slot(int table, int key) const {
        return tables[table + key / block_len] * block_len + key % block_len;
    }
    // Random numbers up to `most`; of those with a scale some heads are larger, some zeros.
    void fill(vector<S> &x, vector<float> &scales, int slot, float most) {
        for (int i = 0; i < width; i++) {
            S &number = x[size_t(slot) * width + i];
            if constexpr (has_scales<S>) {
                number = S{int8_t(below(255) - 127)};
                float factor = between(0, 1) * (below(20) ? 1 : 3);
                if (i % dim == 0)
                    scales[scale_at(slot, kv_heads, i / dim)] = most * factor / 127;
            } else {
                number = from_f32<S>(between(-most, most));
            }
        }
    }
    // One of a head of a slot.
    double number(const vector<S> &x, const vector<float> &scales, int slot, int head,
                  int i) const {
        double raw = to_f32(x[size_t(slot) * width + head * dim + i]);
        return has_scales<S> ? raw * scales[scale_at(slot, kv_heads, head)] : raw;
    }
    double key(int slot, int head, int i) const { return number(k, k_scales, slot, head, i); }
    double value(int slot, int head, int i) const { return number(v, v_scales, slot, head, i); }
};

// The slots of the keys that a row sees.
static vector<int> seen(int first, int end, const std::function<int(int)> &slot) {
    vector<int> slots;
    for (int key = first; key < end; key++) slots.push_back(slot(key));
    return slots;
}

// What a head of a row is, and how far off each of its numbers may be.
struct Truth {
    vector<double> out, limit;
};

// `head` is that of the store; a sink of minus infinity is none. Weights are rounded to 8 bits,
// each in its own direction, and so is the result; beside a large sink they are below all numbers.
template <typename S>
Truth truth(const bf16 *q, const Store<S> &store, const vector<int> &slots, int head,
            double softcap, double sink) {
    int dim = store.dim;
    vector<double> scores, out(dim), squares(dim);
    double largest = sink;
    for (int slot : slots) {
        double dot = 0;
        for (int i = 0; i < dim; i++) dot += double(to_f32(q[i])) * store.key(slot, head, i);
        double score = dot / sqrt(double(dim));
        scores.push_back(softcap > 0 ? softcap * tanh(score / softcap) : score);
        largest = std::max(largest, scores.back());
    }
    double total = sink > -INFINITY ? exp(sink - largest) : 0;
    for (size_t i = 0; i < slots.size(); i++) {
        double weight = exp(scores[i] - largest);
        total += weight;
        for (int j = 0; j < dim; j++) {
            double part = weight * store.value(slots[i], head, j);
            out[j] += part, squares[j] += part * part;
        }
    }
    vector<double> limit;
    for (int j = 0; j < dim; j++) {
        out[j] /= total;
        double rounded = 1.01 * fabs(out[j]) + 3 * sqrt(squares[j]) / total;
        limit.push_back(0x1p-8 * rounded + 0x1p-120);
    }
    return {out, limit};
}

static void compare(const std::string &kernel, const std::string &detail, const bf16 *got,
                    const Truth &want) {
    int wrong = 0;
    for (size_t i = 0; i < want.out.size(); i++) {
        wrong += !within(kernel, to_f32(got[i]), want.out[i], want.limit[i]);
    }
    CHECK(wrong == 0, "%s, %s: %d numbers", kernel.c_str(), detail.c_str(), wrong);
}

// Rows of which `written` is false are as they were.
static void check_others(const std::string &kernel, const vector<bf16> &out,
                         const vector<char> &written) {
    size_t width = out.size() / written.size();
    for (size_t row = 0; row < written.size(); row++) {
        auto first = out.begin() + row * width;
        bool good = written[row] || std::all_of(first, first + width, poisoned<bf16>);
        CHECK(good, "%s wrote row %zu", kernel.c_str(), row);
    }
}

// Sinks of the heads of a call. Scores are between -10 and 10 or so.
enum class Sinks { none, among, above, below, mixed, absent };
static const Sinks SINKS[5] = {Sinks::none, Sinks::among, Sinks::above, Sinks::below, Sinks::mixed};

// What all kernels of a call agree about.
struct Heads {
    int dim, group, kv_heads, block_len, window;
    float softcap = 0;
    Sinks sinks = Sinks::none;

    int heads() const { return group * kv_heads; }
    float scale() const { return 1 / sqrtf(float(dim)); }
    std::string text() const {
        return ::text("dim %d, group %d, blocks of %d, window %d, softcap %g, sinks %d", dim, group,
                      block_len, window, softcap, int(sinks));
    }
    // The first key that a row at a position sees.
    int first_key(int position) const { return window ? std::max(0, position - window + 1) : 0; }
};

// One for each head, or an empty list. Beside some of those above the keys weigh less than the
// smallest number.
static vector<float> sinks_of(const Heads &h) {
    vector<float> sinks;
    for (int head = 0; head < h.heads() && h.sinks != Sinks::none; head++) {
        Sinks kind = h.sinks == Sinks::mixed ? SINKS[1 + head % 3] : h.sinks;
        sinks.push_back(kind == Sinks::among   ? normal() * 2
                        : kind == Sinks::above ? (head % 4 == 3 ? 200 : between(15, 60))
                        : kind == Sinks::below ? between(-200, -15)
                                               : -INFINITY);
    }
    return sinks;
}
static double sink_of(const vector<float> &sinks, int head) {
    return sinks.empty() ? -INFINITY : double(sinks[head]);
}
static const float *pointer_to(const vector<float> &sinks) {
    return sinks.empty() ? nullptr : sinks.data();
}

// None, one that bends most scores, one that bends few.
static const float SOFTCAPS[3] = {0, 1.5f, 50};
