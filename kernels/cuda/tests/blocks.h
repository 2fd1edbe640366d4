// The GGML block formats, decoded one weight after the other by the definitions in src/quant, and
// matrices of random blocks.
#pragma once

#include "products.h"

// `decode` writes the values of one block. An f16 scale stands at `scale_at`, another at
// `least_at`; negative: there is none.
struct Format {
    const char *name;
    int weights, bytes, scale_at, least_at;
    void (*decode)(const uint8_t *, float *);
};

inline float half_at(const uint8_t *from, int at) {
    __half x;
    memcpy(&x, from + at, 2);
    return to_f32(x);
}
inline void put_half(uint8_t *to, int at, float x) {
    __half half = from_f32<__half>(x);
    memcpy(to + at, &half, 2);
}

// Code i of 32 in 16 bytes: the first half has the low nibbles.
inline int nibble(const uint8_t *from, int i) { return i < 16 ? from[i] & 15 : from[i - 16] >> 4; }
inline int bit(const uint8_t *from, int i) { return from[i / 8] >> (i % 8) & 1; }

inline void decode_q4_0(const uint8_t *b, float *out) {
    for (int i = 0; i < 32; i++) out[i] = (nibble(b + 2, i) - 8) * half_at(b, 0);
}
inline void decode_q4_1(const uint8_t *b, float *out) {
    for (int i = 0; i < 32; i++) out[i] = nibble(b + 4, i) * half_at(b, 0) + half_at(b, 2);
}
inline void decode_q5_0(const uint8_t *b, float *out) {
    for (int i = 0; i < 32; i++) {
        out[i] = ((nibble(b + 6, i) | bit(b + 2, i) << 4) - 16) * half_at(b, 0);
    }
}
inline void decode_q5_1(const uint8_t *b, float *out) {
    for (int i = 0; i < 32; i++) {
        out[i] = (nibble(b + 8, i) | bit(b + 4, i) << 4) * half_at(b, 0) + half_at(b, 2);
    }
}
inline void decode_q8_0(const uint8_t *b, float *out) {
    for (int i = 0; i < 32; i++) out[i] = int8_t(b[2 + i]) * half_at(b, 0);
}
inline void decode_q8_k(const uint8_t *b, float *out) {
    float scale;
    memcpy(&scale, b, 4);
    for (int i = 0; i < 256; i++) out[i] = int8_t(b[4 + i]) * scale;
}

inline int iq4_level(int code) {
    const int levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                            1,    13,   25,  38,  53,  69,  89,  113};
    return levels[code];
}
inline void decode_iq4_nl(const uint8_t *b, float *out) {
    for (int i = 0; i < 32; i++) out[i] = iq4_level(nibble(b + 2, i)) * half_at(b, 0);
}
inline void decode_iq4_xs(const uint8_t *b, float *out) {
    for (int i = 0; i < 256; i++) {
        int sub = i / 32, high = (b[2] | b[3] << 8) >> (2 * sub) & 3;
        int low = b[4 + sub / 2] >> (sub % 2 * 4) & 15;
        float scale = half_at(b, 0) * ((low | high << 4) - 32);
        out[i] = scale * iq4_level(nibble(b + 8 + 16 * sub, i % 32));
    }
}
inline void decode_mxfp4(const uint8_t *b, float *out) {
    const int levels[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    for (int i = 0; i < 32; i++) {
        int code = nibble(b + 1, i), level = levels[code & 7];
        out[i] = (code & 8 ? -level : level) * float(ldexp(1.0, b[0] - 128));
    }
}

inline void decode_q2_k(const uint8_t *b, float *out) {
    for (int i = 0; i < 256; i++) {
        int code = b[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        float scale = half_at(b, 80) * (b[i / 16] & 15), least = half_at(b, 82) * (b[i / 16] >> 4);
        out[i] = scale * code - least;
    }
}
inline void decode_q3_k(const uint8_t *b, float *out) {
    for (int i = 0; i < 256; i++) {
        int code = b[32 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        code |= (b[i % 32] >> (i / 32) & 1) << 2;
        int sub = i / 16, low = b[96 + sub % 8] >> (sub / 8 * 4) & 15;
        int high = b[104 + sub % 4] >> (sub / 4 * 2) & 3;
        out[i] = half_at(b, 108) * ((low | high << 4) - 32) * (code - 4);
    }
}
// Scale and minimum of 32 weights in the 12 bytes of q4_k and q5_k, six bits each.
inline void sixes(const uint8_t *from, int sub, int &scale, int &least) {
    if (sub < 4) {
        scale = from[sub] & 63, least = from[sub + 4] & 63;
    } else {
        scale = (from[sub + 4] & 15) | from[sub - 4] >> 6 << 4;
        least = from[sub + 4] >> 4 | from[sub] >> 6 << 4;
    }
}
inline void decode_q45_k(const uint8_t *b, bool five, float *out) {
    for (int i = 0; i < 256; i++) {
        int sub = i / 32, scale, least;
        int code = b[(five ? 48 : 16) + i / 64 * 32 + i % 32] >> (sub % 2 * 4) & 15;
        if (five) code |= (b[16 + i % 32] >> sub & 1) << 4;
        sixes(b + 4, sub, scale, least);
        out[i] = half_at(b, 0) * scale * code - half_at(b, 2) * least;
    }
}
inline void decode_q4_k(const uint8_t *b, float *out) { decode_q45_k(b, false, out); }
inline void decode_q5_k(const uint8_t *b, float *out) { decode_q45_k(b, true, out); }
inline void decode_q6_k(const uint8_t *b, float *out) {
    for (int i = 0; i < 256; i++) {
        int code = b[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
        code |= (b[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3) << 4;
        out[i] = half_at(b, 208) * int8_t(b[192 + i / 16]) * (code - 32);
    }
}

inline const Format Q4_0_BLOCKS = {"q4_0", 32, 18, 0, -1, decode_q4_0};
inline const Format Q4_1_BLOCKS = {"q4_1", 32, 20, 0, 2, decode_q4_1};
inline const Format Q5_0_BLOCKS = {"q5_0", 32, 22, 0, -1, decode_q5_0};
inline const Format Q5_1_BLOCKS = {"q5_1", 32, 24, 0, 2, decode_q5_1};
inline const Format Q8_0_BLOCKS = {"q8_0", 32, 34, 0, -1, decode_q8_0};
inline const Format Q2_K_BLOCKS = {"q2_k", 256, 84, 80, 82, decode_q2_k};
inline const Format Q3_K_BLOCKS = {"q3_k", 256, 110, 108, -1, decode_q3_k};
inline const Format Q4_K_BLOCKS = {"q4_k", 256, 144, 0, 2, decode_q4_k};
inline const Format Q5_K_BLOCKS = {"q5_k", 256, 176, 0, 2, decode_q5_k};
inline const Format Q6_K_BLOCKS = {"q6_k", 256, 210, 208, -1, decode_q6_k};
inline const Format Q8_K_BLOCKS = {"q8_k", 256, 292, -1, -1, decode_q8_k};
inline const Format IQ4_NL_BLOCKS = {"iq4_nl", 32, 18, 0, -1, decode_iq4_nl};
inline const Format IQ4_XS_BLOCKS = {"iq4_xs", 256, 136, 0, -1, decode_iq4_xs};
inline const Format MXFP4_BLOCKS = {"mxfp4", 32, 17, -1, -1, decode_mxfp4};

// Calls test(format, NAME) for the formats that products take.
#define EACH_FORMAT(test)                                                                         \
    test(Q4_0_BLOCKS, q4_0) test(Q4_1_BLOCKS, q4_1) test(Q5_0_BLOCKS, q5_0)                       \
    test(Q5_1_BLOCKS, q5_1) test(Q8_0_BLOCKS, q8_0) test(Q2_K_BLOCKS, q2_k)                       \
    test(Q3_K_BLOCKS, q3_k) test(Q4_K_BLOCKS, q4_k) test(Q5_K_BLOCKS, q5_k)                       \
    test(Q6_K_BLOCKS, q6_k) test(IQ4_NL_BLOCKS, iq4_nl) test(IQ4_XS_BLOCKS, iq4_xs)               \
    test(MXFP4_BLOCKS, mxfp4)

// Any codes, with scales of a size that weights have.
inline void random_block(const Format &format, uint8_t *to) {
    for (int i = 0; i < format.bytes; i++) to[i] = uint8_t(rng());
    float scale = between(0.002f, 0.02f) * (below(2) ? 1 : -1);
    if (format.scale_at >= 0) put_half(to, format.scale_at, scale);
    if (format.least_at >= 0) put_half(to, format.least_at, between(-0.02f, 0.02f));
    if (format.decode == decode_q8_k) memcpy(to, &scale, 4);
    if (format.decode == decode_mxfp4) to[0] = uint8_t(below(10) ? 115 + below(12) : below(4));
}

inline Weights random_blocks(const Format &format, int n, int k) {
    size_t blocks = size_t(n) * (k / format.weights);
    Weights w;
    w.values.resize(size_t(n) * k);
    w.bytes.assign((blocks * format.bytes + 15) / 16 * 16, 0xff);
    for (size_t i = 0; i < blocks; i++) {
        random_block(format, &w.bytes[i * format.bytes]);
        format.decode(&w.bytes[i * format.bytes], &w.values[i * format.weights]);
    }
    return w;
}
