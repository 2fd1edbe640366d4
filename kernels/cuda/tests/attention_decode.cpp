// attention_decode.cu, and the bytes of bytes.cuh.
#include "attention_decode.cu"

#include "attention.h"

template <typename S>
using Decode = void (*)(bf16 *, float *, float2 *, int *, const bf16 *, const S *, const S *,
                        const float *, const float *, const int *, const int *, const int *,
                        const int *, const float *, int, int, int, float, float, int);
template <typename S> Decode<S> decode_kernel(int dim, int g);
#define DECODE_KERNELS(S, NAME)                                                                   \
    template <> Decode<S> decode_kernel<S>(int dim, int g) {                                      \
        static const Decode<S> narrow[4] = {                                                      \
            attention_decode_##NAME##_d64_g1, attention_decode_##NAME##_d64_g2,                   \
            attention_decode_##NAME##_d64_g4, attention_decode_##NAME##_d64_g8};                  \
        static const Decode<S> wide[4] = {                                                        \
            attention_decode_##NAME##_d128_g1, attention_decode_##NAME##_d128_g2,                 \
            attention_decode_##NAME##_d128_g4, attention_decode_##NAME##_d128_g8};                \
        static const Decode<S> widest[4] = {                                                      \
            attention_decode_##NAME##_d256_g1, attention_decode_##NAME##_d256_g2,                 \
            attention_decode_##NAME##_d256_g4, attention_decode_##NAME##_d256_g8};                \
        int at = g == 1 ? 0 : g == 2 ? 1 : g == 4 ? 2 : 3;                                        \
        return dim == 64 ? narrow[at] : dim == 128 ? wide[at] : widest[at];                       \
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
    vector<float> sinks;
    vector<bf16> q, out;

    explicit Batch(const Heads &h)
        : store(1600 / h.block_len, h.block_len, h.kv_heads, h.dim), sinks(sinks_of(h)),
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
                        truth(&q[at], store, slots, head / h.group, h.softcap,
                              sink_of(sinks, head)));
            }
        }
        check_others("attention_decode", out, written);
    }
};

// `g` heads of a group in a block, `extra` chunks that no item has.
template <typename KV> void run(Batch<KV> &batch, const Heads &h, int g, int extra) {
    int chunks = (600 + 255) / 256 + extra, blocks = h.kv_heads * ((h.group + g - 1) / g);
    size_t parts = size_t(batch.items) * h.heads() * chunks;
    vector<float> partial = poison<float>(parts * h.dim);
    vector<float2> stats = poison<float2>(parts);
    vector<int> ended(size_t(batch.items) * blocks, 0);
    dim3 grid = dim3(unsigned(chunks), unsigned(blocks), unsigned(batch.items));
    size_t shared = sizeof(KV) == 2 ? std::min(512 * h.dim, 65536) + 1024 : 256 * h.dim + 3072;
    CHECK(shared + 1040 * g <= SHARED_LEAST, "decode takes too much shared memory");
    EMULATE(decode_kernel<KV>(h.dim, g), grid, dim3(2 * unsigned(h.dim)), shared + 1040 * g,
            batch.out.data(), partial.data(), stats.data(), ended.data(), batch.q.data(),
            batch.store.k.data(), batch.store.v.data(), batch.store.k_scales.data(),
            batch.store.v_scales.data(), batch.row.data(), batch.table.data(),
            batch.contexts.data(), batch.store.tables.data(), pointer_to(batch.sinks), h.heads(),
            h.kv_heads, h.block_len, h.scale(), h.softcap, h.window);
    bool all = std::all_of(stats.begin(), stats.end(), [](float2 part) { return part.y >= 0; });
    CHECK(all, "attention_decode, %s: stats are missing", h.text().c_str());
    CHECK(std::count(ended.begin(), ended.end(), 0) == long(ended.size()),
          "attention_decode, %s: a counter is left", h.text().c_str());
}
template <typename KV> void decode(const Heads &h, int g, int extra) {
    Batch<KV> batch(h);
    run(batch, h, g, extra);
    batch.check(h);
}

static int heads_of_block(int group) { return group <= 2 ? group : group <= 4 ? 4 : 8; }

// `turn` chooses which shapes meet which windows and bounds.
template <typename KV> void decodes(int turn) {
    const int windows[5] = {0, 1, 16, 100, 300};
    for (int dim : {64, 128}) {
        for (int group : {1, 2, 3, 4, 7, 8, 12}) {
            int window = windows[turn++ % 5];
            float softcap = SOFTCAPS[turn % 3];
            Sinks sinks = SINKS[(turn + dim / 64) % 5];
            Heads h = {dim,    group,   group > 4 ? 1 : 2, group % 2 ? 32 : 16,
                       window, softcap, sinks};
            decode<KV>(h, heads_of_block(group), window == 16 ? 2 : 0);
        }
    }
    for (int group : {1, 2, 4, 8}) {
        Heads h = {256, group, group > 2 ? 1 : 2, 16, windows[turn++ % 5], SOFTCAPS[turn % 3]};
        h.sinks = SINKS[(turn + 2) % 5];
        decode<KV>(h, group, group == 2);
    }
    for (Sinks sinks : SINKS) decode<KV>({64, 8, 1, 16, 0, 0, sinks}, 8, 1);
    decode<KV>({64, 2, 2, 24, 0}, 2, 0);
    decode<KV>({128, 2, 2, 24, 100, 1.5f}, 2, 0);
    decode<KV>({128, 1, 2, 16, 0}, 8, 0);
    decode<KV>({128, 8, 1, 16, 0}, 4, 0);
    decode<KV>({64, 7, 1, 16, 0}, 2, 0);
}

// Sinks that are not there change no bit.
template <typename KV> void absent_sinks() {
    for (int dim : {64, 128, 256}) {
        Heads h = {dim, 4, 1, 16, 300, 0};
        Batch<KV> batch(h);
        run(batch, h, 4, 0);
        vector<bf16> without = batch.out;
        batch.out = poison<bf16>(without.size()), batch.sinks.assign(h.heads(), -INFINITY);
        run(batch, h, 4, 0);
        CHECK(!memcmp(batch.out.data(), without.data(), 2 * without.size()),
              "attention_decode, %s: other bits with sinks of minus infinity", h.text().c_str());
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
    absent_sinks<bf16>(), absent_sinks<q8>();
    return finish();
}
