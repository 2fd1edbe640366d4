// What the tests of the kernels have in common: random numbers, poison, comparison and the report.
// A test includes the kernels it is about and this, calls its parts in main and returns `finish()`.
// Numbers are the same in every run; kernels/tests/emulated.rs compiles and runs all tests.
#pragma once

#include "common.cuh"

#include <stdarg.h>

typedef unsigned long long u64;

// ---- random numbers

inline std::mt19937 rng(1);

inline int below(int limit) { return static_cast<int>(rng() % static_cast<unsigned>(limit)); }
inline float between(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(rng);
}
inline float normal() {
    static std::normal_distribution<float> distribution;
    return distribution(rng);
}
template <typename T> std::vector<T> randoms(size_t count, float scale = 1, float shift = 0) {
    std::vector<T> x(count);
    for (T &number : x) number = from_f32<T>(normal() * scale + shift);
    return x;
}
// 0 to count - 1, in any order.
inline std::vector<int> shuffled(int count) {
    std::vector<int> order(count);
    for (int i = 0; i < count; i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), rng);
    return order;
}

// ---- checks

inline long checks, failures;
// The worst error of each kernel, as a part of what is allowed.
inline std::map<std::string, double> worst;

__attribute__((format(printf, 1, 2))) inline std::string text(const char *format, ...) {
    char line[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

// The first failures are shown.
inline void fail(const std::string &what) {
    if (failures++ < 30) printf("FAILED %s\n", what.c_str());
}
#define CHECK(good, ...) (checks++, (good) ? static_cast<void>(0) : fail(text(__VA_ARGS__)))

// `got` is at most `limit` off; returns whether it is.
inline bool within(const std::string &kernel, double got, double want, double limit) {
    if (got == want || (std::isnan(got) && std::isnan(want))) return true;
    double off = fabs(got - want);
    bool good = off <= limit;
    if (limit > 0 && !std::isnan(off)) worst[kernel] = std::max(worst[kernel], off / limit);
    return good;
}

// The numbers got(i) against want[i], each relative to itself or, if it is small, to the mean of
// all. One failure stands for all of a case.
template <typename Got>
void check_near(const std::string &kernel, const std::string &detail,
                const std::vector<double> &want, double limit, Got got) {
    double squares = 0;
    for (double x : want) squares += x * x;
    double mean = sqrt(squares / std::max<size_t>(want.size(), 1));
    size_t wrong = 0, first = 0;
    for (size_t i = want.size(); i-- > 0;) {
        if (within(kernel, got(i), want[i], limit * std::max(fabs(want[i]), mean))) continue;
        wrong++, first = i;
    }
    CHECK(wrong == 0, "%s, %s: %zu of %zu numbers, [%zu] is %g for %g", kernel.c_str(),
          detail.c_str(), wrong, want.size(), first, double(got(first)), want[first]);
}

// Says what was found; what main returns.
inline int finish() {
    for (auto &kernel : worst) {
        printf("%-28s %4.1f%% of the error allowed\n", kernel.first.c_str(), 100 * kernel.second);
    }
    printf("%ld checks, %ld failed\n", checks, failures);
    return failures != 0;
}

// ---- poison: what no kernel has written is NaN, in every type

template <typename T> std::vector<T> poison(size_t count) {
    std::vector<T> x(count);
    if (count) memset(static_cast<void *>(x.data()), 0xff, count * sizeof(T));
    return x;
}
template <typename T> bool poisoned(const T &x) {
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(&x);
    return std::all_of(bytes, bytes + sizeof(T), [](unsigned char byte) { return byte == 0xff; });
}
// Nobody wrote the numbers from `first` on.
template <typename T>
void check_poisoned(const std::string &what, const std::vector<T> &x, size_t first) {
    bool good = std::all_of(x.begin() + first, x.end(), [](const T &e) { return poisoned(e); });
    CHECK(good, "%s: wrote what is not its own", what.c_str());
}

// Outputs of a kernel in f32 or bf16, poison until written, and some more that are nobody's.
struct Outputs {
    bool f32 = false;
    size_t count = 0;
    std::vector<uint8_t> bytes;

    Outputs() {}
    Outputs(size_t count, bool f32)
        : f32(f32), count(count), bytes(poison<uint8_t>((count + 3) * (f32 ? 4 : 2))) {}

    void *data() { return bytes.data(); }
    float operator[](size_t i) const {
        if (f32) return reinterpret_cast<const float *>(bytes.data())[i];
        return to_f32(reinterpret_cast<const bf16 *>(bytes.data())[i]);
    }
    void set(size_t i, float x) {
        if (f32) {
            reinterpret_cast<float *>(bytes.data())[i] = x;
        } else {
            reinterpret_cast<bf16 *>(bytes.data())[i] = from_f32<bf16>(x);
        }
    }
    void check_edge(const std::string &what) const {
        check_poisoned(what, bytes, count * (f32 ? 4 : 2));
    }
};
