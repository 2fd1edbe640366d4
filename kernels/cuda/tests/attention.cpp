// attention.cu against a loop in f64. Blocks that a kernel must not read are full of NaN, rows that
// it must not write are poison.
#include "attention.cu"

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

// `head` is that of the store. Weights are rounded to 8 bits, each in its own direction, and so is
// the result.
template <typename S>
Truth truth(const bf16 *q, const Store<S> &store, const vector<int> &slots, int head) {
    int dim = store.dim;
    vector<double> scores, out(dim), squares(dim);
    double largest = -INFINITY, total = 0;
    for (int slot : slots) {
        double dot = 0;
        for (int i = 0; i < dim; i++) dot += double(to_f32(q[i])) * store.key(slot, head, i);
        scores.push_back(dot / sqrt(double(dim))), largest = std::max(largest, scores.back());
    }
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
        limit.push_back(0x1p-8 * (1.01 * fabs(out[j]) + 3 * sqrt(squares[j]) / total));
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

// What all kernels of a call agree about.
struct Heads {
    int dim, group, kv_heads, block_len, window;

    int heads() const { return group * kv_heads; }
    float scale() const { return 1 / sqrtf(float(dim)); }
    std::string text() const {
        return ::text("dim %d, group %d, blocks of %d, window %d", dim, group, block_len, window);
    }
    // The first key that a row at a position sees.
    int first_key(int position) const { return window ? std::max(0, position - window + 1) : 0; }
};

// ---- decode

template <typename S>
using Decode = void (*)(bf16 *, float *, float2 *, int *, const bf16 *, const S *, const S *,
                        const float *, const float *, const int *, const int *, const int *,
                        const int *, int, int, int, float, int);
template <typename S> Decode<S> decode_kernel(int dim, int g);
#define DECODE_KERNELS(S, NAME)                                                                   \
    template <> Decode<S> decode_kernel<S>(int dim, int g) {                                      \
        static const Decode<S> narrow[4] = {                                                      \
            attention_decode_##NAME##_d64_g1, attention_decode_##NAME##_d64_g2,                   \
            attention_decode_##NAME##_d64_g4, attention_decode_##NAME##_d64_g8};                  \
        static const Decode<S> wide[4] = {                                                        \
            attention_decode_##NAME##_d128_g1, attention_decode_##NAME##_d128_g2,                 \
            attention_decode_##NAME##_d128_g4, attention_decode_##NAME##_d128_g8};                \
        int at = g == 1 ? 0 : g == 2 ? 1 : g == 4 ? 2 : 3;                                        \
        return dim == 64 ? narrow[at] : wide[at];                                                 \
    }
DECODE_KERNELS(bf16, bf16)
DECODE_KERNELS(__half, f16)
DECODE_KERNELS(e4m3, e4m3)
DECODE_KERNELS(q8, q8)

// A batch of single rows. Item 1 is padding.
template <typename KV> struct Batch {
    vector<int> contexts = {1, 0, 15, 16, 17, 255, 256, 257, 600}, row, table;
    int items = int(contexts.size()), rows = items + 3;
    Store<KV> store;
    vector<bf16> q, out;

    explicit Batch(const Heads &h)
        : store(1600 / h.block_len, h.block_len, h.kv_heads, h.dim),
          q(randoms<bf16>(size_t(rows) * h.heads() * h.dim)), out(poison<bf16>(q.size())) {
        vector<int> order = shuffled(rows);
        for (int i = 0; i < items; i++) {
            int freed = h.first_key(contexts[i] - 1);
            row.push_back(contexts[i] ? order[i] : Store<KV>::NOWHERE);
            table.push_back(contexts[i] ? store.add(contexts[i], freed) : Store<KV>::NOWHERE);
        }
    }

    void check(const Heads &h) const {
        vector<char> written(rows);
        for (int i = 0; i < items; i++) {
            if (contexts[i] == 0) continue;
            written[row[i]] = 1;
            auto slots = seen(h.first_key(contexts[i] - 1), contexts[i],
                              [&](int key) { return store.slot(table[i], key); });
            for (int head = 0; head < h.heads(); head++) {
                size_t at = (size_t(row[i]) * h.heads() + head) * h.dim;
                compare("attention_decode",
                        h.text() + ::text(", %d keys, head %d", contexts[i], head), &out[at],
                        truth(&q[at], store, slots, head / h.group));
            }
        }
        check_others("attention_decode", out, written);
    }
};

// `g` heads of a group in a block, `extra` chunks that no item has.
template <typename KV> void decode(const Heads &h, int g, int extra) {
    Batch<KV> batch(h);
    int chunks = (600 + 255) / 256 + extra, blocks = h.kv_heads * ((h.group + g - 1) / g);
    size_t parts = size_t(batch.items) * h.heads() * chunks;
    vector<float> partial = poison<float>(parts * h.dim);
    vector<float2> stats = poison<float2>(parts);
    vector<int> ended(size_t(batch.items) * blocks, 0);
    dim3 grid = dim3(unsigned(chunks), unsigned(blocks), unsigned(batch.items));
    size_t shared = sizeof(KV) == 2 ? 512 * size_t(h.dim) + 1024 : 256 * size_t(h.dim) + 3072;
    CHECK(shared + 1040 * g <= SHARED_LEAST, "decode takes too much shared memory");
    EMULATE(decode_kernel<KV>(h.dim, g), grid, dim3(2 * unsigned(h.dim)), shared + 1040 * g,
            batch.out.data(), partial.data(), stats.data(), ended.data(), batch.q.data(),
            batch.store.k.data(), batch.store.v.data(), batch.store.k_scales.data(),
            batch.store.v_scales.data(), batch.row.data(), batch.table.data(),
            batch.contexts.data(), batch.store.tables.data(), h.heads(), h.kv_heads, h.block_len,
            h.scale(), h.window);
    batch.check(h);
    bool all = std::all_of(stats.begin(), stats.end(), [](float2 part) { return part.y >= 0; });
    CHECK(all, "attention_decode, %s: stats are missing", h.text().c_str());
    CHECK(std::count(ended.begin(), ended.end(), 0) == long(ended.size()),
          "attention_decode, %s: a counter is left", h.text().c_str());
}

static int heads_of_block(int group) { return group <= 2 ? group : group <= 4 ? 4 : 8; }

// `turn` chooses which shapes meet which windows.
template <typename KV> void decodes(int turn) {
    const int windows[5] = {0, 1, 16, 100, 300};
    for (int dim : {64, 128}) {
        for (int group : {1, 2, 3, 4, 7, 8, 12}) {
            int window = windows[turn++ % 5];
            Heads h = {dim, group, group > 4 ? 1 : 2, group % 2 ? 32 : 16, window};
            decode<KV>(h, heads_of_block(group), window == 16 ? 2 : 0);
        }
    }
    decode<KV>({64, 2, 2, 24, 0}, 2, 0);
    decode<KV>({128, 2, 2, 24, 100}, 2, 0);
    decode<KV>({128, 1, 2, 16, 0}, 8, 0);
    decode<KV>({128, 8, 1, 16, 0}, 4, 0);
    decode<KV>({64, 7, 1, 16, 0}, 2, 0);
}

// ---- prefill

// `rows` new rows, the last of so many keys.
struct Sequence {
    int context, rows;
};

enum class Keys { paged, plain };
enum class Sight { causal, all };

// A batch of sequences, cut into tiles. Between the rows of two sequences is one of nobody.
template <typename KV> struct Prefill {
    Heads h;
    Keys keys;
    Sight sight;
    vector<Sequence> sequences;
    Store<KV> store;
    // Of every sequence; a table is the first slot where keys are plain.
    vector<int> table, start;
    vector<int> tile_row, tile_rows, tile_position, tile_table, tile_keys;
    int rows = 2, tile_most = 0;
    vector<bf16> q, out;

    Prefill(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences)
        : h(h), keys(keys), sight(sight), sequences(sequences),
          store(blocks_of(h, sequences), h.block_len, h.kv_heads, h.dim) {
        for (const Sequence &s : sequences) {
            table.push_back(store.add(s.context, first_key(s.context - s.rows)));
            start.push_back(rows), rows += s.rows + 1;
        }
        if (keys == Keys::plain) lay_out();
        q = randoms<bf16>(size_t(rows) * h.heads() * h.dim), out = poison<bf16>(q.size());
    }

    static int blocks_of(const Heads &h, const vector<Sequence> &sequences) {
        int blocks = 4;
        for (const Sequence &s : sequences) blocks += s.context / h.block_len + 2;
        return blocks;
    }
    int first_key(int position) const {
        return sight == Sight::causal ? h.first_key(position) : 0;
    }

    // Moves the keys of every sequence into rows of their own, with NaN between sequences.
    void lay_out() {
        vector<KV> k, v;
        auto gap = [&] { k.resize(k.size() + store.width, poison<KV>(1)[0]); };
        for (size_t i = 0; i < sequences.size(); i++) {
            gap();
            int first = int(k.size() / store.width);
            for (int key = 0; key < sequences[i].context; key++) {
                if (key < first_key(sequences[i].context - sequences[i].rows)) {
                    gap();
                    continue;
                }
                size_t from = size_t(store.slot(table[i], key)) * store.width;
                k.insert(k.end(), &store.k[from], &store.k[from] + store.width);
                v.resize(k.size() - store.width, poison<KV>(1)[0]);
                v.insert(v.end(), &store.v[from], &store.v[from] + store.width);
            }
            table[i] = first;
        }
        gap(), v.resize(k.size(), poison<KV>(1)[0]);
        store.k = k, store.v = v;
    }

    void cut(int most) {
        tile_row.clear(), tile_rows.clear(), tile_position.clear(), tile_table.clear();
        tile_keys.clear(), tile_most = most;
        for (size_t i = 0; i < sequences.size(); i++) {
            const Sequence &s = sequences[i];
            for (int row = 0; row < s.rows; row += most) {
                tile_row.push_back(start[i] + row);
                tile_rows.push_back(std::min(most, s.rows - row));
                tile_position.push_back(s.context - s.rows + row);
                tile_table.push_back(table[i]), tile_keys.push_back(s.context);
            }
        }
    }

    void check(const std::string &kernel) const {
        vector<char> written(rows);
        for (size_t i = 0; i < sequences.size(); i++) {
            for (int row = 0; row < sequences[i].rows; row++) {
                written[start[i] + row] = 1;
                check_row(kernel, int(i), row);
            }
        }
        check_others(kernel, out, written);
    }
    void check_row(const std::string &kernel, int sequence, int row) const {
        const Sequence &s = sequences[sequence];
        int position = s.context - s.rows + row, first = table[sequence];
        auto slots = seen(first_key(position), sight == Sight::causal ? position + 1 : s.context,
                          [&](int key) {
                              return keys == Keys::paged ? store.slot(first, key) : first + key;
                          });
        for (int head = 0; head < h.heads(); head++) {
            size_t at = (size_t(start[sequence] + row) * h.heads() + head) * h.dim;
            compare(kernel,
                    h.text() + ::text(", row %d of %d of %d keys, head %d", row, s.rows, s.context,
                                      head),
                    &out[at],
                    truth(&q[at], store, slots, head / h.group));
        }
    }
};

// The arguments that prefill and any share.
#define PREFILL_ARGUMENTS(p)                                                                      \
    (p).out.data(), (p).q.data(), (p).store.k.data(), (p).store.v.data(),                         \
        (p).store.k_scales.data(), (p).store.v_scales.data(), (p).tile_row.data(),                \
        (p).tile_rows.data(), (p).tile_position.data(), (p).tile_table.data(),                    \
        (p).tile_keys.data(), (p).keys == Keys::paged ? (p).store.tables.data() : nullptr,        \
        (p).h.heads(), (p).h.kv_heads, (p).h.block_len, (p).h.scale(), (p).h.window,              \
        (p).sight == Sight::causal

#define LAUNCHES(S, NAME)                                                                         \
    static void launch_prefill(Prefill<S> &p) {                                                   \
        dim3 grid = dim3(unsigned(p.h.heads()), unsigned(p.tile_row.size()));                     \
        size_t shared = 768 * size_t(p.h.dim) + (sizeof(S) == 1 ? 512 : 0);                       \
        CHECK(shared <= SHARED_LEAST, "prefill takes too much shared memory");                    \
        auto kernel =                                                                             \
            p.h.dim == 64 ? attention_prefill_##NAME##_d64 : attention_prefill_##NAME##_d128;     \
        EMULATE(kernel, grid, dim3(128), shared, PREFILL_ARGUMENTS(p));                           \
    }                                                                                             \
    static void launch_any(Prefill<S> &p) {                                                       \
        dim3 grid = dim3(p.tile_most, unsigned(p.h.heads()), unsigned(p.tile_row.size()));        \
        EMULATE(attention_any_##NAME, grid, dim3(32), 0, PREFILL_ARGUMENTS(p), p.h.dim);          \
    }
LAUNCHES(bf16, bf16)
LAUNCHES(__half, f16)
LAUNCHES(e4m3, e4m3)
LAUNCHES(q8, q8)

template <typename KV>
void prefill(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences, int tile) {
    Prefill<KV> p(h, keys, sight, sequences);
    p.cut(tile);
    launch_prefill(p);
    p.check("attention_prefill");
}
template <typename KV>
void any(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences) {
    Prefill<KV> p(h, keys, sight, sequences);
    p.cut(64);
    launch_any(p);
    p.check("attention_any");
}

template <typename KV> void prefills(int turn) {
    const vector<Sequence> ragged = {{1, 1},   {5, 5},     {64, 64}, {63, 63}, {130, 65},
                                     {300, 5}, {257, 129}, {200, 1}, {100, 36}};
    for (int dim : {64, 128}) {
        for (int window : {0, 1, 16, 100}) {
            bool wide = turn++ % 2;
            Heads h = {dim, wide ? 3 : 2, window ? 1 : 2, wide ? 32 : 16, window};
            prefill<KV>(h, Keys::paged, Sight::causal, ragged, 128);
        }
        turn++;
        for (int group : {1, 4, 7, 8, 12}) {
            prefill<KV>({dim, group, 1, 16, 0}, Keys::paged, Sight::causal, {{70, 5}, {64, 64}},
                        64);
        }
        if (sizeof(KV) == 1) continue; // bytes are always paged
        prefill<KV>({dim, 1, 2, 16, 0}, Keys::plain, Sight::all,
                    {{1, 1}, {63, 63}, {64, 64}, {65, 65}, {200, 200}, {150, 7}}, 128);
        prefill<KV>({dim, 2, 1, 24, 9}, Keys::paged, Sight::all, {{1, 1}, {150, 150}}, 128);
        prefill<KV>({dim, 2, 1, 16, 20}, Keys::plain, Sight::causal, {{1, 1}, {150, 100}}, 128);
    }
}

template <typename KV> void anys(int turn) {
    const int windows[4] = {0, 1, 16, 100};
    for (int dim : {40, 64, 80, 96, 128, 256, 33}) {
        int window = windows[turn++ % 4], other = windows[turn % 4];
        any<KV>({dim, 2, 1, window ? 16 : 24, window}, Keys::paged, Sight::causal,
                {{1, 1}, {5, 5}, {33, 33}, {130, 9}, {257, 3}});
        if (sizeof(KV) == 1) continue;
        any<KV>({dim, 1, 2, 16, other}, Keys::plain, Sight::all, {{1, 1}, {33, 33}, {130, 3}});
    }
}

// The same rows, cut into other tiles, have the same bits.
template <typename KV> void cuts() {
    for (int dim : {64, 128}) {
        for (int window : {0, 50}) {
            Prefill<KV> p({dim, 2, 1, 16, window}, Keys::paged, Sight::causal, {{300, 180}});
            p.cut(128), launch_prefill(p);
            vector<bf16> whole = p.out;
            for (int rows : {7, 32, 50}) {
                p.out = poison<bf16>(whole.size());
                p.cut(rows), launch_prefill(p);
                CHECK(!memcmp(p.out.data(), whole.data(), 2 * whole.size()),
                      "attention_prefill, %s: other bits in tiles of %d", p.h.text().c_str(), rows);
            }
        }
    }
}

// Every byte of both kinds is what it means, alone and in pairs, and e4m3 comes back.
static double meaning(e4m3 x) {
    int exponent = x.raw >> 3 & 15, mantissa = x.raw & 7;
    if ((x.raw & 0x7f) == 0x7f) return NAN;
    double size = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    return x.raw & 0x80 ? -size : size;
}
static double meaning(q8 x) { return x.raw; }
template <typename S> void bytes_of() {
    typedef typename Meets<S>::type KV;
    auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
    for (int byte = 0; byte < 256; byte++) {
        S number;
        memcpy(&number, &byte, 1);
        double want = meaning(number);
        CHECK(same(to_f32(number), want), "byte %d is %g for %g", byte, to_f32(number), want);
        uint32_t words[2];
        widen(uint32_t(byte) * 0x01010101u, words[0], words[1], S());
        KV wide[4];
        memcpy(wide, words, sizeof wide);
        for (KV x : wide) CHECK(same(to_f32(x), want), "byte %d is wide %g", byte, to_f32(x));
        uint32_t lone = uint32_t(byte) << 8 * (byte % 4);
        widen(lone, words[0], words[1], S());
        memcpy(wide, words, sizeof wide);
        CHECK(same(to_f32(wide[byte % 4]), want), "byte %d is in another place", byte);
    }
}
static void bytes() {
    bytes_of<q8>(), bytes_of<e4m3>();
    for (int i = 0; i < 100000; i++) {
        float x = i < 300 ? (i - 150) * 0.00048828125f : normal() * expf(between(-7, 6));
        double got = meaning(from_f32<e4m3>(x)), off = fabs(got - std::min(fabs(x), 448.0f) *
                                                                      (x < 0 ? -1 : 1));
        double least = INFINITY; // the nearest of all
        for (int byte = 0; byte < 256; byte++) {
            double other = meaning(e4m3{uint8_t(byte)});
            double away = fabs(other - std::min(fabs(x), 448.0f) * (x < 0 ? -1 : 1));
            least = std::min(least, std::isnan(other) ? INFINITY : away);
        }
        CHECK(off == least, "%g becomes %g", x, got);
    }
    // Between two the even one.
    for (int byte = 0; byte < 0x7e; byte++) {
        double low = meaning(e4m3{uint8_t(byte)}), high = meaning(e4m3{uint8_t(byte + 1)});
        int got = from_f32<e4m3>(float((low + high) / 2)).raw;
        CHECK(got == byte + byte % 2, "between %d and the next: %d", byte, got);
    }
    for (float x : {INFINITY, -INFINITY, NAN}) {
        CHECK((from_f32<e4m3>(x).raw & 0x7f) == 0x7f, "%g is a number", x);
    }
    CHECK(from_f32<e4m3>(1e30f).raw == 0x7e && from_f32<e4m3>(-1e30f).raw == 0xfe, "too large");
}

int main() {
    bytes();
    decodes<bf16>(0), decodes<__half>(2), decodes<e4m3>(3), decodes<q8>(1);
    prefills<bf16>(0), prefills<__half>(1), prefills<e4m3>(1), prefills<q8>(0);
    anys<bf16>(0), anys<__half>(2), anys<e4m3>(1), anys<q8>(3);
    cuts<bf16>(), cuts<q8>();
    return finish();
}
