// experts.cu: routing by a sort, lists by loops, sums in f64.
#include "experts.cu"

#include "check.h"

using std::vector;

// Scores of which many are equal and some are no numbers.
template <typename T> static vector<T> scores_of(int count) {
    const float strange[5] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f};
    vector<T> scores;
    int few = below(3);
    for (int i = 0; i < count; i++) {
        float x = few == 0 ? float(below(4)) - 2 : normal() * 3;
        scores.push_back(from_f32<T>(few == 2 && below(6) == 0 ? strange[below(5)] : x));
    }
    return scores;
}

// The places of the scores of a row, best first.
static vector<int> ranked(const vector<double> &scores) {
    vector<int> order;
    for (size_t i = 0; i < scores.size(); i++) order.push_back(int(i));
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        return scores[a] > scores[b] || (std::isnan(scores[b]) && !std::isnan(scores[a]));
    });
    return order;
}

template <typename T, typename Kernel>
static void route_rows(const char *name, Kernel kernel, int m, int experts, int used,
                       bool normalized) {
    vector<T> scores;
    for (int row = 0; row < m; row++) {
        for (T x : scores_of<T>(experts)) scores.push_back(x);
    }
    vector<int> chosen = poison<int>(size_t(m) * used + 3);
    vector<float> weights = poison<float>(size_t(m) * used + 3);
    unsigned warps = 1 + below(4);
    EMULATE(kernel, dim3((m + warps - 1) / warps), dim3(32 * warps), 0, scores.data(),
            chosen.data(), weights.data(), m, experts, used, int(normalized));
    check_poisoned(name, chosen, size_t(m) * used), check_poisoned(name, weights, size_t(m) * used);
    for (int row = 0; row < m; row++) {
        vector<double> own;
        for (int e = 0; e < experts; e++) own.push_back(to_f32(scores[size_t(row) * experts + e]));
        vector<int> best = ranked(own);
        double top = own[best[0]], total = 0;
        if (normalized) best.resize(used);
        for (int e : best) total += exp(own[e] - top);
        best.resize(used), std::sort(best.begin(), best.end());
        for (int i = 0; i < used; i++) {
            int got = chosen[row * used + i];
            CHECK(got == best[i], "%s, row %d of %d: expert %d for %d of %d", name, row, m, got,
                  best[i], experts);
            double want = exp(own[best[i]] - top) / total;
            CHECK(within(name, weights[row * used + i], want, 1.3e-7 * want + 1e-45),
                  "%s, row %d: weight %g for %g", name, row, weights[row * used + i], want);
        }
    }
}

static void routes() {
    for (int experts : {1, 3, 8, 31, 32, 33, 60, 128, 200}) {
        for (int used : {1, 2, 4, 8, 32}) {
            if (used > experts) continue;
            for (int m : {1, 5, 13}) {
                bool normalized = (experts + m) % 2;
                route_rows<float>("expert_route_f32", expert_route_f32, m, experts, used,
                                  normalized);
                route_rows<bf16>("expert_route_bf16", expert_route_bf16, m, experts, used,
                                 !normalized);
            }
        }
    }
}

// `only`: all rows go to a few of the experts.
static void orders(int m, int experts, int used, int only) {
    vector<int> chosen, want, first(1);
    for (int row = 0; row < m; row++) {
        vector<int> some = shuffled(only);
        some.resize(used), std::sort(some.begin(), some.end());
        for (int e : some) chosen.push_back(e + experts - only);
    }
    int pairs = int(chosen.size());
    for (int e = 0; e < experts; e++) {
        for (int pair = 0; pair < pairs; pair++) {
            if (chosen[pair] == e) want.push_back(pair);
        }
        first.push_back(int(want.size()));
    }
    vector<int> starts = poison<int>(experts + 3), order = poison<int>(pairs + 2);
    unsigned warps = 1 + below(4);
    EMULATE(expert_order, dim3((experts + warps - 1) / warps), dim3(32 * warps), 0, chosen.data(),
            starts.data(), order.data(), pairs, experts);
    bool good = std::equal(first.begin(), first.end(), starts.begin()) &&
                std::equal(want.begin(), want.end(), order.begin());
    CHECK(good, "expert_order: %d rows to %d of %d experts", m, used, experts);
    check_poisoned("expert_order", starts, experts + 1);
    check_poisoned("expert_order", order, pairs);
}

static void sums(int m, int used, int n) {
    vector<bf16> y = randoms<bf16>(size_t(m) * used * n), out = poison<bf16>(size_t(m) * n + 8);
    vector<float> weights;
    for (int i = 0; i < m * used; i++) weights.push_back(between(0, 1));
    EMULATE(expert_sum, dim3(1 + below(3)), dim3(64), 0, y.data(), weights.data(), out.data(), n,
            used, u64(m) * n / 8);
    for (size_t i = 0; i < size_t(m) * n; i++) {
        double want = 0, size = 0;
        for (int j = 0; j < used; j++) {
            size_t pair = i / n * used + j;
            double part = double(weights[pair]) * to_f32(y[pair * n + i % n]);
            want += part, size += fabs(part);
        }
        CHECK(within("expert_sum", to_f32(out[i]), want, 0x1.01p-8 * fabs(want) + 1e-6 * size),
              "expert_sum, %d of %d, width %d: [%zu] is %g for %g", used, m, n, i, to_f32(out[i]),
              want);
    }
    check_poisoned("expert_sum", out, size_t(m) * n);
}

int main() {
    routes();
    for (int m : {1, 2, 9, 40}) {
        orders(m, 8, 2, 8), orders(m, 40, 8, 8), orders(m, 128, 8, 128), orders(m, 5, 1, 2);
        sums(m, 1, 8), sums(m, 2, 40), sums(m, 8, 136);
    }
    return finish();
}
