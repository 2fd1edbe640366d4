// Up to three weight matrices that read the same input in one launch (q, k and v; gate and up):
// their rows are counted through, and each knows where its outputs go.
#pragma once

#include "common.cuh"

// w_i is [n_i][k], y_i [m][n_i] in f32 or bf16, bias_i [n_i] in f32 or null. A matrix that is
// absent has n_i = 0.
struct Matrices {
    const void *w0, *w1, *w2;
    int n0, n1, n2;
    void *y0, *y1, *y2;
    const float *bias0, *bias1, *bias2;
    int f32_out;

    __device__ __forceinline__ int rows() const { return n0 + n1 + n2; }

    // The bytes of row `row` of all; the last row stands for those beyond it.
    __device__ __forceinline__ const uint8_t *row(int row, long long row_bytes) const {
        row = min(row, rows() - 1);
        const void *w = w0;
        if (row >= n0) {
            row -= n0;
            w = w1;
            if (row >= n1) {
                row -= n1;
                w = w2;
            }
        }
        return static_cast<const uint8_t *>(w) + row * row_bytes;
    }

    // Output `row` for row `input` of x.
    __device__ __forceinline__ void store(int input, int row, float value) const {
        void *y = y0;
        const float *bias = bias0;
        int n = n0;
        if (row >= n0) {
            row -= n0;
            y = y1, bias = bias1, n = n1;
            if (row >= n1) {
                row -= n1;
                y = y2, bias = bias2, n = n2;
            }
        }
        if (bias != nullptr) value += bias[row];
        long long at = static_cast<long long>(input) * n + row;
        if (f32_out) {
            static_cast<float *>(y)[at] = value;
        } else {
            static_cast<bf16 *>(y)[at] = from_f32<bf16>(value);
        }
    }

    // Outputs of four rows of the first matrix, of which only those that there are.
    __device__ __forceinline__ void store4(int input, int row, float4 values) const {
        if (row + 4 > n0 || n0 % 4 != 0) {
            const float each[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (row + i < n0) store(input, row + i, each[i]);
            }
            return;
        }
        if (bias0 != nullptr) {
            float4 bias = *reinterpret_cast<const float4 *>(bias0 + row);
            values.x += bias.x, values.y += bias.y, values.z += bias.z, values.w += bias.w;
        }
        long long at = static_cast<long long>(input) * n0 + row;
        if (f32_out) {
            *reinterpret_cast<float4 *>(static_cast<float *>(y0) + at) = values;
        } else {
            *reinterpret_cast<uint2 *>(static_cast<bf16 *>(y0) + at) =
                make_uint2(pack2<bf16>(values.x, values.y), pack2<bf16>(values.z, values.w));
        }
    }
};

// The same for every kernel of this kind: what follows the input in its arguments.
#define MATRICES_ARGUMENTS                                                                        \
    const void *w0, const void *w1, const void *w2, int n0, int n1, int n2, void *y0, void *y1,   \
        void *y2, const float *bias0, const float *bias1, const float *bias2, int f32_out
#define MATRICES                                                                                  \
    Matrices { w0, w1, w2, n0, n1, n2, y0, y1, y2, bias0, bias1, bias2, f32_out }
