// The GGML block formats as a thread reads them: 32 weights at a time. What the bytes mean is
// defined in src/quant; the formulas and the order of their rounding are the same here.
//
// A *piece* is 32 weights of one block, two *groups* of 16 that follow one another within their
// group. A weight is `scale * (code - OFFSET)`, minus `least` where the format has a minimum; codes
// are signed bytes, four to a word. Levels of a book (IQ4_NL, MXFP4) are codes without an offset.
//
// A format says how many weights (WEIGHTS) and bytes (BYTES) a block has, where in its block the
// first group of a piece begins (`start`), how many weights further on the second does (NEXT), and
// how a piece is read from the bytes of a block (`read`).
// Blocks may lie at any address that their own size and an aligned matrix lead to, in device or in
// shared memory. Reading touches no aligned 4 bytes that hold none of the block's own.
#pragma once

#include "common.cuh"

struct Piece {
    uint32_t codes[2][4];
    float scale[2];
    float least[2];
};

// N words from any address.
template <int N>
__device__ __forceinline__ void read_words(const uint8_t *from, uint32_t (&words)[N]) {
    uintptr_t address = reinterpret_cast<uintptr_t>(from);
    uint32_t odd = static_cast<uint32_t>(address & 3);
    const uint32_t *aligned = reinterpret_cast<const uint32_t *>(from - odd);
    uint32_t low = aligned[0];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        // The word after the last is read only if some of it is wanted.
        uint32_t high = aligned[i + 1 < N || odd != 0 ? i + 1 : i];
        words[i] = __funnelshift_r(low, high, 8 * odd);
        low = high;
    }
}

// N words from an address that is a multiple of 4.
template <int N>
__device__ __forceinline__ void read_aligned(const uint8_t *from, uint32_t (&words)[N]) {
    const uint32_t *aligned = reinterpret_cast<const uint32_t *>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) words[i] = aligned[i];
}

// Four words from an address that is a multiple of 16.
__device__ __forceinline__ void read_vector(const uint8_t *from, uint32_t (&words)[4]) {
    uint4 all = *reinterpret_cast<const uint4 *>(from);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
}

__device__ __forceinline__ float half_of(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ __forceinline__ float half_at(const uint8_t *at) {
    return __half2float(*reinterpret_cast<const __half *>(at));
}

// 16 bytes: low nibbles are one group, high nibbles the other.
__device__ __forceinline__ void nibbles(const uint32_t *words, Piece &piece) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        piece.codes[0][i] = words[i] & 0x0f0f0f0fu;
        piece.codes[1][i] = words[i] >> 4 & 0x0f0f0f0fu;
    }
}

// Bit i of `bits` becomes bit 4 of code i.
__device__ __forceinline__ void fifth_bits(uint32_t bits, Piece &piece) {
#pragma unroll
    for (int word = 0; word < 8; ++word) {
        // Four copies, each 7 bits further on, have one of the four bits where it belongs.
        uint32_t four = bits >> (4 * word) & 15;
        piece.codes[word / 4][word % 4] |= four * 0x02040810u & 0x10101010u;
    }
}

// 16 bytes of nibbles through a book of 16 signed levels, four to a word.
__device__ __forceinline__ void levels(const uint32_t *words, const uint32_t (&book)[4],
                                       Piece &piece) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t level[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t four = words[i] >> (16 * half);
            uint32_t low = __byte_perm(book[0], book[1], four & 0x7777u);
            uint32_t high = __byte_perm(book[2], book[3], four & 0x7777u);
            level[half] = __byte_perm(low, high, 0x3210u | (four & 0x8888u) >> 1);
        }
        piece.codes[0][i] = __byte_perm(level[0], level[1], 0x6420u);
        piece.codes[1][i] = __byte_perm(level[0], level[1], 0x7531u);
    }
}
// Levels as the formats have them: -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113
// and 0 1 2 3 | 4 6 8 12 | 0 -1 -2 -3 | -4 -6 -8 -12.
#define IQ4_BOOK {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u}
#define FP4_BOOK {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu}

__device__ __forceinline__ void same_scale(Piece &piece, float scale, float least) {
    piece.scale[0] = piece.scale[1] = scale;
    piece.least[0] = piece.least[1] = least;
}

// Formats whose piece is 32 weights in a row.
template <int BLOCK_WEIGHTS, int BLOCK_BYTES> struct Straight {
    static constexpr int WEIGHTS = BLOCK_WEIGHTS;
    static constexpr int BYTES = BLOCK_BYTES;
    static constexpr int OFFSET = 0;
    static constexpr int NEXT = 16;
    static constexpr bool HAS_LEAST = false;
    static __device__ __forceinline__ int start(int part) { return 32 * part; }
};

// Formats whose piece is half of each of two neighbouring 32 weights.
template <int BLOCK_BYTES> struct Paired {
    static constexpr int WEIGHTS = 256;
    static constexpr int BYTES = BLOCK_BYTES;
    static constexpr int OFFSET = 0;
    static constexpr int NEXT = 32;
    static constexpr bool HAS_LEAST = false;
    static __device__ __forceinline__ int start(int part) {
        return 64 * (part / 2) + 16 * (part % 2);
    }
};

struct Q4_0 : Straight<32, 18> {
    static constexpr int OFFSET = 8;
    static __device__ __forceinline__ void read(const uint8_t *block, int, Piece &piece) {
        uint32_t words[4];
        read_words(block + 2, words);
        nibbles(words, piece);
        same_scale(piece, half_at(block), 0.0f);
    }
};

struct Q4_1 : Straight<32, 20> {
    static constexpr bool HAS_LEAST = true;
    static __device__ __forceinline__ void read(const uint8_t *block, int, Piece &piece) {
        uint32_t words[5];
        read_aligned(block, words);
        nibbles(words + 1, piece);
        same_scale(piece, half_of(words[0]), -half_of(words[0] >> 16));
    }
};

struct Q5_0 : Straight<32, 22> {
    static constexpr int OFFSET = 16;
    static __device__ __forceinline__ void read(const uint8_t *block, int, Piece &piece) {
        uint32_t words[5];
        read_words(block + 2, words);
        nibbles(words + 1, piece);
        fifth_bits(words[0], piece);
        same_scale(piece, half_at(block), 0.0f);
    }
};

struct Q5_1 : Straight<32, 24> {
    static constexpr bool HAS_LEAST = true;
    static __device__ __forceinline__ void read(const uint8_t *block, int, Piece &piece) {
        uint32_t words[6];
        read_aligned(block, words);
        nibbles(words + 2, piece);
        fifth_bits(words[1], piece);
        same_scale(piece, half_of(words[0]), -half_of(words[0] >> 16));
    }
};

struct Q8_0 : Straight<32, 34> {
    static __device__ __forceinline__ void read(const uint8_t *block, int, Piece &piece) {
        uint32_t words[8];
        read_words(block + 2, words);
#pragma unroll
        for (int i = 0; i < 8; ++i) piece.codes[i / 4][i % 4] = words[i];
        same_scale(piece, half_at(block), 0.0f);
    }
};

struct Q8_K : Straight<256, 292> {
    static __device__ __forceinline__ void read(const uint8_t *block, int part, Piece &piece) {
        uint32_t scale[1], words[8];
        read_aligned(block, scale);
        read_aligned(block + 4 + 32 * part, words);
#pragma unroll
        for (int i = 0; i < 8; ++i) piece.codes[i / 4][i % 4] = words[i];
        same_scale(piece, __uint_as_float(scale[0]), 0.0f);
    }
};

struct IQ4_NL : Straight<32, 18> {
    static __device__ __forceinline__ void read(const uint8_t *block, int, Piece &piece) {
        const uint32_t book[4] = IQ4_BOOK;
        uint32_t words[4];
        read_words(block + 2, words);
        levels(words, book, piece);
        same_scale(piece, half_at(block), 0.0f);
    }
};

struct IQ4_XS : Straight<256, 136> {
    static __device__ __forceinline__ void read(const uint8_t *block, int part, Piece &piece) {
        const uint32_t book[4] = IQ4_BOOK;
        uint32_t head[2], words[4];
        read_aligned(block, head);
        read_aligned(block + 8 + 16 * part, words);
        levels(words, book, piece);
        uint32_t low = head[1] >> (4 * part) & 15;
        uint32_t high = head[0] >> (16 + 2 * part) & 3;
        float sub = static_cast<float>(static_cast<int>(low | high << 4) - 32);
        same_scale(piece, __fmul_rn(half_of(head[0]), sub), 0.0f);
    }
};

struct MXFP4 : Straight<32, 17> {
    static __device__ __forceinline__ void read(const uint8_t *block, int, Piece &piece) {
        const uint32_t book[4] = FP4_BOOK;
        uint32_t words[4];
        read_words(block + 1, words);
        levels(words, book, piece);
        // 2^(e - 128): half of what the exponent stands for, as the levels are twice theirs.
        uint32_t e = block[0];
        same_scale(piece, __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0.0f);
    }
};

// scales[16] (low nibble scale, high nibble minimum), codes[64], d, dmin.
struct Q2_K : Paired<84> {
    static constexpr bool HAS_LEAST = true;
    static __device__ __forceinline__ void read(const uint8_t *block, int part, Piece &piece) {
        int run = part / 4, pair = part / 2 % 2, half = part % 2;
        uint32_t words[4], d[1];
        read_aligned(block + 16 + 32 * run + 16 * half, words);
        read_aligned(block + 80, d);
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            int shift = 2 * (2 * pair + group);
#pragma unroll
            for (int i = 0; i < 4; ++i) piece.codes[group][i] = words[i] >> shift & 0x03030303u;
            uint32_t sub = block[8 * run + shift + half];
            piece.scale[group] = __fmul_rn(half_of(d[0]), static_cast<float>(sub & 15));
            piece.least[group] = __fmul_rn(half_of(d[0] >> 16), static_cast<float>(sub >> 4));
        }
    }
};

// third bits[32], codes[64], scales[12] (six bits each, minus 32), d.
struct Q3_K : Paired<110> {
    static constexpr int OFFSET = 4;
    static __device__ __forceinline__ void read(const uint8_t *block, int part, Piece &piece) {
        int run = part / 4, pair = part / 2 % 2, half = part % 2;
        uint32_t words[4], thirds[4];
        read_words(block + 32 + 32 * run + 16 * half, words);
        read_words(block + 16 * half, thirds);
        float d = half_at(block + 108);
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            int of_run = 2 * pair + group, of_block = 4 * run + of_run;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t third = thirds[i] >> of_block & 0x01010101u;
                piece.codes[group][i] = (words[i] >> (2 * of_run) & 0x03030303u) | third << 2;
            }
            int sub = 2 * of_block + half;
            uint32_t low = block[96 + sub % 8] >> (4 * (sub / 8)) & 15;
            uint32_t high = block[104 + sub % 4] >> (2 * (sub / 4)) & 3;
            float scale = static_cast<float>(static_cast<int>(low | high << 4) - 32);
            piece.scale[group] = __fmul_rn(d, scale);
            piece.least[group] = 0.0f;
        }
    }
};

// d, dmin and twelve bytes with six bits for each of eight scales and eight minima.
__device__ __forceinline__ void six_bit_scales(const uint32_t (&head)[4], int run, Piece &piece) {
    // The two of a run are neighbours: both are unpacked at once, a byte each. Those of the last
    // two runs have their low bits in the last word, their high bits above those of the first.
    bool early = run < 2;
    uint32_t own = early ? 0x3f3fu : 0x0f0fu, above = early ? 0 : 0x3030u;
    int shift = 16 * (run % 2);
    uint32_t first = head[1] >> shift, second = head[2] >> shift, third = head[3] >> shift;
    uint32_t scales = ((early ? first : third) & own) | (first >> 2 & above);
    uint32_t mins = ((early ? second : third >> 4) & own) | (second >> 2 & above);
    float d = half_of(head[0]), dmin = half_of(head[0] >> 16);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
        uint32_t scale = scales >> (8 * group) & 0xff, min = mins >> (8 * group) & 0xff;
        piece.scale[group] = __fmul_rn(d, static_cast<float>(scale));
        piece.least[group] = __fmul_rn(dmin, static_cast<float>(min));
    }
}

// d, dmin, scales[12], codes[128].
struct Q4_K : Paired<144> {
    static constexpr bool HAS_LEAST = true;
    static __device__ __forceinline__ void read(const uint8_t *block, int part, Piece &piece) {
        uint32_t head[4], words[4];
        read_vector(block, head);
        read_vector(block + 16 + 16 * part, words);
        nibbles(words, piece);
        six_bit_scales(head, part / 2, piece);
    }
};

// d, dmin, scales[12], fifth bits[32], codes[128].
struct Q5_K : Paired<176> {
    static constexpr bool HAS_LEAST = true;
    static __device__ __forceinline__ void read(const uint8_t *block, int part, Piece &piece) {
        int run = part / 2;
        uint32_t head[4], fifths[4], words[4];
        read_vector(block, head);
        read_vector(block + 16 + 16 * (part % 2), fifths);
        read_vector(block + 48 + 16 * part, words);
        nibbles(words, piece);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t bits = fifths[i] >> (2 * run);
            piece.codes[0][i] |= bits << 4 & 0x10101010u;
            piece.codes[1][i] |= bits << 3 & 0x10101010u;
        }
        six_bit_scales(head, run, piece);
    }
};

// low bits[128], high bits[64], scales[16] (signed), d.
struct Q6_K {
    static constexpr int WEIGHTS = 256;
    static constexpr int BYTES = 210;
    static constexpr int OFFSET = 32;
    static constexpr int NEXT = 64;
    static constexpr bool HAS_LEAST = false;
    static __device__ __forceinline__ int start(int part) {
        return 128 * (part / 4) + 16 * (part % 4);
    }
    static __device__ __forceinline__ void read(const uint8_t *block, int part, Piece &piece) {
        int half = part / 4, quarter = part % 4;
        uint32_t low[4], high[4];
        read_words(block + 16 * part, low);
        read_words(block + 128 + 32 * half + 16 * (quarter % 2), high);
        nibbles(low, piece);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t bits = high[i] >> (2 * (quarter / 2));
            piece.codes[0][i] |= bits << 4 & 0x30303030u;
            piece.codes[1][i] |= bits & 0x30303030u;
        }
        float d = half_at(block + 208);
        const int8_t *scales = reinterpret_cast<const int8_t *>(block) + 192 + 8 * half + quarter;
        piece.scale[0] = __fmul_rn(d, static_cast<float>(scales[0]));
        piece.scale[1] = __fmul_rn(d, static_cast<float>(scales[4]));
        piece.least[0] = piece.least[1] = 0.0f;
    }
};
