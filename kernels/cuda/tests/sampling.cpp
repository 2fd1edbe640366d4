// sampling.cu against the way of src/sampling, step by step: which tokens a cut keeps, which of
// them a draw takes; and edits.
#include "sampling.cu"

#include "check.h"

using std::vector;

// e^x as src/simd/math.rs computes it.
static float exp_of(float x) {
    const float round = 12582912.0f;
    float clamped = std::min(std::max(x, -87.3f), 88.37f);
    float shifted = fmaf(clamped, 1.44269504088896340736f, round), n = shifted - round;
    float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, clamped));
    float sum = 1.0f / 5040.0f;
    for (float divisor : {720.0f, 120.0f, 24.0f, 6.0f, 2.0f, 1.0f, 1.0f}) {
        sum = fmaf(sum, r, 1.0f / divisor);
    }
    float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
    return x < -87.3f ? 0.0f : sum * power;
}

struct Settings {
    float temperature;
    int top_k;
    float top_p, min_p;

    std::string text() const {
        return ::text("T %g k %d p %g m %g", temperature, top_k, top_p, min_p);
    }
};

// What is left of a row of logits.
struct Left {
    vector<float> weights;
    // In order of id.
    vector<int> kept;
    // Without a draw, the token; -1: none.
    bool drawn = true;
    int greedy = -1;

    Left(const vector<float> &x, const Settings &s) {
        float largest = -INFINITY;
        for (float logit : x) largest = logit > largest ? logit : largest;
        if (s.temperature <= 0 || s.top_k == 1 || !std::isfinite(largest)) {
            auto first = std::find(x.begin(), x.end(), largest);
            drawn = false, greedy = largest > -INFINITY ? int(first - x.begin()) : -1;
            return;
        }
        for (float logit : x) {
            float exponent = (logit - largest) / s.temperature;
            weights.push_back(exp_of(std::isnan(exponent) ? -INFINITY : exponent));
            if (weights.back() > 0) kept.push_back(int(weights.size()) - 1);
        }
        if (s.top_k > 0) cut([&](int tokens, double) { return tokens >= s.top_k; });
        double goal = double(s.top_p) * total();
        if (s.top_p < 1) cut([&](int, double mass) { return mass >= goal; });
        float least = std::min(s.min_p, 1.0f);
        auto light = [&](int id) { return weights[id] < least; };
        kept.erase(std::remove_if(kept.begin(), kept.end(), light), kept.end());
    }

    double total() const {
        double sum = 0;
        for (int id : kept) sum += weights[id];
        return sum;
    }

    // Keeps the best tokens up to the one at which enough(tokens, mass) first holds.
    template <typename Enough> void cut(Enough enough) {
        vector<int> ranked = kept;
        std::stable_sort(ranked.begin(), ranked.end(),
                         [&](int a, int b) { return weights[a] > weights[b]; });
        double mass = 0;
        for (size_t i = 0; i < ranked.size(); i++) {
            mass += weights[ranked[i]];
            if (!enough(int(i) + 1, mass)) continue;
            ranked.resize(i + 1);
        }
        std::sort(ranked.begin(), ranked.end());
        kept = ranked;
    }

    int draw(double place) const {
        double target = place * total(), sum = 0;
        for (int id : kept) {
            sum += weights[id];
            if (sum > target) return id;
        }
        return kept.empty() ? -1 : kept.back();
    }
};

// ---- the random number of a draw

static void philox_reference(uint32_t (&x)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        u64 a = u64(x[0]) * 0xd2511f53u, b = u64(x[2]) * 0xcd9e8d57u;
        uint32_t next[4] = {uint32_t(b >> 32) ^ x[1] ^ key0, uint32_t(b),
                            uint32_t(a >> 32) ^ x[3] ^ key1, uint32_t(a)};
        memcpy(x, next, sizeof x);
        key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
}
static double place_of(u64 seed, u64 position) {
    uint32_t x[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0};
    philox_reference(x, uint32_t(seed), uint32_t(seed >> 32));
    return double((u64(x[1]) << 32 | x[0]) >> 11) / 9007199254740992.0;
}
static u64 random_u64() { return u64(rng()) << 32 | rng(); }

static void random_numbers() {
    // A known answer of the authors (Random123, kat_vectors).
    uint32_t x[4] = {};
    philox_reference(x, 0, 0);
    CHECK(x[0] == 0x6627e8d5 && x[1] == 0xe169c58d, "philox of zeros");
    for (int i = 0; i < 10000; i++) {
        u64 seed = random_u64(), position = random_u64();
        CHECK(uniform(seed, position) == place_of(seed, position), "philox of %llx", seed);
    }
}

// ---- weights: the bits of a plain division

static float temperature_of(int trial) {
    if (trial < 10) return 0.1f * float(trial + 1);
    if (trial == 10) return __uint_as_float(0x3fffffff);
    if (trial < 50) return 2 * between(0, 1) + 1e-6f;
    return __uint_as_float(uint32_t(67 + below(120)) << 23 | (rng() & 0x7fffff));
}
static void weights() {
    for (int trial = 0; trial < 100; trial++) {
        Row row = row_at(nullptr, nullptr, 0);
        row.temperature = temperature_of(trial), row.inverse = 1.0f / row.temperature;
        auto check = [&](float x) {
            float exponent = x / row.temperature, got = row.weight(x);
            float want = exp_of(std::isnan(exponent) ? -INFINITY : exponent);
            CHECK(got == want, "weight of %g / %g: %g for %g", x, row.temperature, got, want);
        };
        for (int i = 0; i < 5000; i++) {
            float near = i % 7 ? 1 : between(0, 1) * between(0, 1) * between(0, 1);
            check(-between(0, 1) * 88 * row.temperature * near);
        }
        for (float x : {0.0f, -0.0f, -INFINITY, NAN, -1e-45f, -3e38f}) check(x);
    }
}

// ---- cuts and draws

// What the kernel knows at the end of a draw.
struct Cut {
    int token = -7, last = -7, listed = -7;
    uint32_t least = 0;
};
static void cut_and_draw(const float *logits, const uint32_t *mask, int vocab, Settings settings,
                         double place, Cut *out) {
    grid_begin();
    __shared__ Shared s;
    Row row = row_at(logits, mask, vocab);
    float own = -INFINITY;
    int best = NO_TOKEN;
    each_logit<4>(row, whole(row.groups), [&](int id, float x) {
        if (x > own) own = x, best = id;
    });
    float largest = own;
    block_best(s, largest, best);
    if (threadIdx.x == 0) {
        row.largest = largest, row.temperature = settings.temperature;
        row.inverse = 1.0f / settings.temperature;
        s.row = row;
    }
    __syncthreads();
    int token = draw(s, own, settings.top_k, settings.top_p, settings.min_p, place);
    if (threadIdx.x == 0) *out = {token, s.row.last, s.row.listed, s.row.least};
}

// Of draws, some by a list and some by the row.
static long listed_cuts, other_cuts, masked_draws;

static void check_cut(const std::string &name, const float *logits, const uint32_t *mask,
                      int vocab, const Settings &settings, const Left &want) {
    double places[3] = {0.0, 1.0 - 0x1p-53, between(0, 1)};
    double place = places[below(3)];
    Cut cut;
    Settings own = settings;
    EMULATE(cut_and_draw, dim3(1), dim3(1024), 0, logits, mask, vocab, own, place, &cut);
    (cut.listed >= 0 ? listed_cuts : other_cuts)++;
    vector<int> kept;
    for (int id = 0; id < vocab; id++) {
        uint32_t bits = __float_as_uint(want.weights[id]);
        if (bits > cut.least || (bits == cut.least && id <= cut.last)) kept.push_back(id);
    }
    CHECK(kept == want.kept, "%s: kept %zu for %zu", name.c_str(), kept.size(), want.kept.size());
    CHECK(cut.token == want.draw(place), "%s: token %d for %d at %g", name.c_str(), cut.token,
          want.draw(place), place);
}

// Rows of one kind and several seeds; the last one is left out. With a mask it is the second of
// two, and the first row has none: that one is not compared.
static void check_sample(const std::string &name, const float *logits, const vector<uint32_t> &mask,
                         int vocab, const Settings &settings, const Left &want) {
    const int rows = 3;
    vector<float> heat(rows, settings.temperature), p(rows, settings.top_p);
    vector<float> m(rows, settings.min_p);
    vector<int> k(rows, settings.top_k), out(rows, -99);
    vector<u64> seed, position;
    for (int i = 0; i < rows; i++) {
        seed.push_back(random_u64()), position.push_back(i % 2 ? rng() : random_u64());
    }
    heat[rows - 1] = NAN;
    vector<int> which(rows, mask.empty() ? -1 : 1);
    if (!mask.empty()) which[0] = -1;
    vector<uint32_t> masks(mask.size(), 0);
    masks.insert(masks.end(), mask.begin(), mask.end());
    EMULATE(sample, dim3(rows), dim3(1024), 0, logits, vocab, 0, heat.data(), k.data(), p.data(),
            m.data(), seed.data(), position.data(), which.data(), masks.data(), out.data());
    for (int i = mask.empty() ? 0 : 1; i < rows - 1; i++) {
        int token = want.drawn ? want.draw(place_of(seed[i], position[i])) : want.greedy;
        CHECK(out[i] == token, "%s: sampled %d for %d", name.c_str(), out[i], token);
    }
    CHECK(out[rows - 1] == -2, "%s: a row was not left out", name.c_str());
}

static vector<float> row_of(const std::string &kind, int vocab) {
    vector<float> x = randoms<float>(vocab, kind == "flat" ? 0.1f : kind == "wide" ? 60 : 3);
    for (int i = 0; i < vocab; i++) {
        if (kind == "ties") x[i] = float(below(5));
        if (kind == "equal") x[i] = 2.5f;
        if (kind == "one" || kind == "none") x[i] = -INFINITY;
        if (kind == "holes" && below(3) == 0) x[i] = below(2) ? NAN : -INFINITY;
        if (kind == "nothing") x[i] = NAN;
        if (kind == "bf16") x[i] = to_f32(from_f32<bf16>(x[i]));
        if (kind == "zipf") x[i] = -1.2f * logf(float(1 + i)) + normal();
        if (kind == "huge") x[i] *= 1e30f;
    }
    if (kind == "one") x[below(vocab)] = -3;
    if (kind == "infinite") x[below(vocab)] = x[below(vocab)] = INFINITY;
    return x;
}

// Some of all combinations, then some whose top_k is at the limits of lists and of the row.
static vector<Settings> settings_of(int vocab) {
    vector<Settings> all;
    for (float t : {0.0f, 0.3f, 1.0f, 2.0f}) {
        for (int k : {0, 1, 40, vocab + 1}) {
            for (float p : {0.0f, 0.1f, 0.9f, 1.0f}) {
                for (float m : {0.0f, 0.05f, 1.0f}) all.push_back({t, k, p, m});
            }
        }
    }
    std::shuffle(all.begin(), all.end(), rng);
    all.resize(vocab > 1000 ? 8 : 24);
    for (int k : {2, 3, 700, 768, 769, 2000, vocab - 2, vocab - 1}) {
        if (k < vocab && k > 1 && (vocab <= 1000 || below(2))) {
            all.push_back({0.8f, k, below(2) ? 1.0f : 0.95f, below(2) ? 0.0f : 0.01f});
        }
    }
    return all;
}

// What a grammar may allow: every token, none, one, some, and of whole words all or none; a word
// beyond the vocabulary has all bits.
static vector<uint32_t> mask_of(int vocab) {
    int words = (vocab + 31) / 32, kind = below(6);
    vector<uint32_t> mask(words, kind == 0 ? 0xffffffffu : 0);
    for (uint32_t &word : mask) {
        if (kind == 3) word = uint32_t(rng());
        if (kind == 4) word = below(2) ? 0xffffffffu : 0;
        if (kind == 5) word = uint32_t(rng() & rng() & rng() & rng() & rng());
    }
    int only = below(vocab);
    if (kind == 2) mask[only / 32] = 1u << only % 32;
    if (vocab % 32) mask[words - 1] |= 0xffffffffu << vocab % 32;
    return mask;
}

static void draws(const std::string &kind, int vocab) {
    // Rows begin anywhere and end where their memory does.
    int odd = below(4);
    vector<float> x = row_of(kind, vocab), memory(odd, 0.0f);
    memory.insert(memory.end(), x.begin(), x.end());
    memory.shrink_to_fit();
    int turn = 0;
    for (const Settings &settings : settings_of(vocab)) {
        std::string name = text("%s, vocabulary %d, ", kind.c_str(), vocab) + settings.text();
        vector<uint32_t> mask;
        vector<float> allowed = x;
        if (turn++ % 3 == 2) {
            mask = mask_of(vocab), name += ", masked", masked_draws++;
            for (int i = 0; i < vocab; i++) {
                if (!(mask[i / 32] >> i % 32 & 1)) allowed[i] = -INFINITY;
            }
        }
        const uint32_t *bits = mask.empty() ? nullptr : mask.data();
        Left want(allowed, settings);
        if (want.drawn) check_cut(name, memory.data() + odd, bits, vocab, settings, want);
        bool often = !want.drawn || below(2);
        if (often) check_sample(name, memory.data() + odd, mask, vocab, settings, want);
    }
}

// ---- edits

static void edits() {
    int rows = 5, vocab = 1003, stride = 1007;
    vector<float> x = randoms<float>(size_t(rows) * stride, 4);
    vector<int> row = {0, 0, 2, 4}, token = {0, vocab - 1, 5, 9};
    vector<float> divide = {1, 1.3f, 1.3f, 0.7f}, subtract = {0.5f, 0, 1.25f, 0};
    vector<float> add = {0, 2, -100, 0}, want = x;
    for (int i = 0; i < 4; i++) {
        float &logit = want[row[i] * stride + token[i]];
        if (divide[i] != 1) logit = logit > 0 ? logit / divide[i] : logit * divide[i];
        logit = logit - subtract[i] + add[i];
    }
    EMULATE(edit_logits, dim3(1), dim3(256), 0, x.data(), stride, row.data(), token.data(),
            divide.data(), subtract.data(), add.data(), 4);
    CHECK(x == want, "edit_logits");
}

void chosen_tokens() {
    const int none = -1, left_out = -2, held = static_cast<int>(0x80000000u);
    std::vector<int> chosen = {70, none, 80, left_out, 0}, tokens(300, 5);
    std::vector<int> want = tokens;
    for (int from = 0; from < 5; from++) {
        tokens[from * 60] = held | from, want[from * 60] = std::max(chosen[from], 0);
    }
    tokens[299] = held | 2, want[299] = 80;
    EMULATE(take_chosen, dim3(2), dim3(256), 0, tokens.data(), chosen.data(), 300, 5);
    CHECK(tokens == want, "take_chosen");
}

int main() {
    random_numbers();
    weights();
    const char *kinds[] = {"plain",   "flat",     "ties", "equal", "one",  "none", "holes",
                           "nothing", "infinite", "bf16", "zipf",  "huge", "wide"};
    for (int vocab : {1, 31, 1000, 5003}) {
        for (const char *kind : kinds) draws(kind, vocab);
    }
    CHECK(listed_cuts > 0 && other_cuts > 0, "%ld cuts by a list, %ld by the row", listed_cuts,
          other_cuts);
    CHECK(masked_draws > 50, "%ld draws under a mask", masked_draws);
    edits();
    chosen_tokens();
    return finish();
}
