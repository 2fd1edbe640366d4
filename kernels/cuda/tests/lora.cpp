// lora.cu against loops in f64: several jobs in a launch, of other ranks and counts of rows.
#include "lora.cu"

#include "check.h"

// One job, what its kernels read and what they are to write.
struct Job {
    int rank, n;
    float scale;
    std::vector<int> rows;
    std::vector<bf16> a, b;
    std::vector<float> ratio, h;
    Outputs y, before;

    // Updates some of m rows; k is the width of A, `scaled`: there is a ratio.
    Job(int m, int k, int count, int rank, int n, bool f32, bool scaled)
        : rank(rank), n(n), scale(between(0.5f, 2)), rows(shuffled(m)),
          a(randoms<bf16>(size_t(rank) * k)), b(randoms<bf16>(size_t(n) * rank)),
          h(poison<float>(size_t(count) * rank + 3)), y(size_t(m) * n, f32) {
        rows.resize(count);
        if (scaled) ratio = randoms<float>(n);
        for (size_t i = 0; i < y.count; i++) y.set(i, normal() * 10);
        before = y;
    }

    int count() const { return int(rows.size()); }
    LoraJob argument() {
        const float *ratios = ratio.empty() ? nullptr : ratio.data();
        return {a.data(), b.data(), ratios,       rows.data(), h.data(),
                y.data(), count(),  rank,         n,           scale};
    }

    std::vector<double> shrunk(const std::vector<bf16> &x, int k) const {
        std::vector<double> all;
        for (int row : rows) {
            for (int r = 0; r < rank; r++) {
                double sum = 0;
                for (int i = 0; i < k; i++) {
                    sum += double(to_f32(x[size_t(row) * k + i])) * to_f32(a[size_t(r) * k + i]);
                }
                all.push_back(sum);
            }
        }
        return all;
    }

    // What B h adds to row i of those that are listed.
    double update(int i, int output) const {
        double sum = 0;
        for (int r = 0; r < rank; r++) {
            sum += double(h[size_t(i) * rank + r]) * to_f32(b[size_t(output) * rank + r]);
        }
        return scale * (ratio.empty() ? 1.0 : double(ratio[output])) * sum;
    }

    // y, where `gain` (which may be empty) came before.
    std::vector<double> expanded(const std::vector<float> &gain) const {
        std::vector<double> all;
        for (size_t i = 0; i < before.count; i++) all.push_back(before[i]);
        for (int i = 0; i < count(); i++) {
            for (int output = 0; output < n; output++) {
                double &number = all[size_t(rows[i]) * n + output];
                if (!gain.empty()) number *= 1.0 + gain[output];
                number += update(i, output);
            }
        }
        return all;
    }

    // Rows that are not listed stay as they are.
    void check_others(const std::string &detail) const {
        size_t row_bytes = size_t(n) * (y.f32 ? 4 : 2);
        for (size_t row = 0; row < y.count / n; row++) {
            if (std::count(rows.begin(), rows.end(), int(row))) continue;
            const uint8_t *now = &y.bytes[row * row_bytes], *was = &before.bytes[row * row_bytes];
            CHECK(!memcmp(now, was, row_bytes), "lora_expand, %s: row %zu", detail.c_str(), row);
        }
    }
};

static LoraJobs arguments(std::vector<Job> &jobs) {
    LoraJobs all = {};
    for (size_t i = 0; i < jobs.size(); i++) all.of[i] = jobs[i].argument();
    return all;
}

static unsigned pieces(int most, int piece) { return unsigned(most + piece - 1) / piece; }

static void shrink(std::vector<Job> &jobs, int m, int k, const std::string &detail) {
    std::vector<bf16> x = randoms<bf16>(size_t(m) * k);
    int rank = 0, count = 0;
    for (Job &job : jobs) rank = std::max(rank, job.rank), count = std::max(count, job.count());
    for (Job &job : jobs) emulate::constant(job.a), emulate::constant(job.rows);
    LoraJobs all = arguments(jobs);
    EMULATE(lora_shrink, dim3(pieces(rank, 16), pieces(count, 16), unsigned(jobs.size())),
            dim3(256), 0, x.data(), k, all);
    for (Job &job : jobs) {
        auto got = [&](size_t i) { return job.h[i]; };
        check_near("lora_shrink", detail, job.shrunk(x, k), 2e-6, got);
        check_poisoned("lora_shrink, " + detail, job.h, size_t(job.count()) * job.rank);
    }
}

static void expand(std::vector<Job> &jobs, const std::string &detail) {
    int n = 0, count = 0;
    for (Job &job : jobs) n = std::max(n, job.n), count = std::max(count, job.count());
    bool f32 = jobs[0].y.f32;
    // The first also has a gain.
    std::vector<float> gain = randoms<float>(jobs[0].n), none;
    Job &first = jobs[0];
    void *y = first.y.data();
    int *rows = first.rows.data(), own = first.count(), width = first.n;
    EMULATE(lora_gain, dim3(3), dim3(64), 0, y, rows, own, width, gain.data(), f32);
    LoraJobs all = arguments(jobs);
    EMULATE(lora_expand, dim3(pieces(n, 128), pieces(count, 8), unsigned(jobs.size())), dim3(128),
            0, all, f32);
    for (Job &job : jobs) {
        auto got = [&](size_t i) { return job.y[i]; };
        bool gained = &job == &jobs[0];
        // bf16 is rounded twice where there is a gain, and what is added may cancel it.
        check_near(f32 ? "lora_expand, f32" : "lora_expand, bf16", detail,
                   job.expanded(gained ? gain : none), f32 ? 1e-5 : 2e-2, got);
        job.check_others(detail);
        job.y.check_edge("lora_expand, " + detail);
    }
}

static void shrink_ids(std::vector<Job> &jobs, int m, int k, const std::string &detail) {
    std::vector<int> ids;
    for (int i = 0; i < m; i++) ids.push_back(below(k));
    for (Job &job : jobs) job.h = poison<float>(job.h.size());
    LoraJobs all = arguments(jobs);
    EMULATE(lora_shrink_ids, dim3(2, 1, unsigned(jobs.size())), dim3(64), 0, ids.data(), k, all);
    for (Job &job : jobs) {
        size_t all = size_t(job.count()) * job.rank;
        for (size_t i = 0; i < all; i++) {
            float want = to_f32(job.a[i % job.rank * k + ids[job.rows[i / job.rank]]]);
            CHECK(job.h[i] == want, "lora_shrink_ids, %s: %g for %g", detail.c_str(), job.h[i],
                  want);
        }
        check_poisoned("lora_shrink_ids, " + detail, job.h, all);
    }
}

int main() {
    const int m = 24;
    for (int rank : {1, 5, 8, 16, 17, 64, 136, 512}) {
        for (int count : {1, 3, 16, 19}) {
            int k = rank % 2 ? 72 : 264, n = rank > 100 ? 40 : 147;
            bool f32 = (rank + count) % 2;
            std::vector<Job> jobs;
            jobs.emplace_back(m, k, count, rank, n, f32, count == 3);
            jobs.emplace_back(m, k, 20 - count, rank > 16 ? 8 : 24, n + 5, f32, count > 3);
            if (rank % 8 == 0) jobs.emplace_back(m, k, 2, 4, 1, f32, false);
            std::string detail = text("rank %d, %d rows", rank, count);
            shrink(jobs, m, k, detail);
            expand(jobs, detail);
            shrink_ids(jobs, m, k, detail);
        }
    }
    return finish();
}
