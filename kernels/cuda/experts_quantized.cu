// Products of rows with the matrices of their experts (experts.cuh), weights in the GGML block
// formats: as quantized.cu, whose outputs have the same bits.
//
// experts_FORMAT: up to three matrices of every expert, of one format (outputs.cuh), that read the
//   same input as codes and scales (quantize_rows). Other conditions are those of linear_FORMAT_mM.
//   grid ((n0 + n1 + n2) / 8 rounded up, tiles of 8 rows), block 128, no dynamic shared memory.
#include "experts.cuh"
#include "long_products.cuh"

// Rows of W of a warp, whatever the number of rows of x.
constexpr int W_ROWS = 2;

// Rows of x as warp_products.cuh asks for them. The last stands for those beyond it.
struct ListedRows {
    ExpertRows of;

    __device__ __forceinline__ int count() const { return of.count; }
    __device__ __forceinline__ int row(int i) const {
        return of.pairs[min(i, of.count - 1)] / of.each;
    }
    __device__ __forceinline__ int output(int i) const { return of.pairs[i]; }
};
// The same, M at most, looked up once.
template <int M> struct KeptRows : ListedRows {
    int rows[M];

    KeptRows() = default;
    __device__ __forceinline__ explicit KeptRows(const ExpertRows &of) : ListedRows{of} {
#pragma unroll
        for (int i = 0; i < M; ++i) rows[i] = ListedRows::row(i);
    }
    __device__ __forceinline__ int row(int i) const { return rows[i]; }
};

// How a format is multiplied by M rows, in shared memory of MEMORY bytes.
template <typename FORMAT> struct Blocks {
    static constexpr int BYTES = FORMAT::BYTES, WEIGHTS = FORMAT::WEIGHTS;
    template <int M> using Product = WarpProduct<FORMAT, M, W_ROWS, KeptRows<M>>;
    static constexpr size_t MEMORY = WARPS * SLOTS * Product<8>::SLOT_BYTES;

    template <int M>
    static __device__ __forceinline__ void multiply(uint8_t *memory, const int8_t *codes,
                                                    const uint2 *scales, const ExpertRows &rows,
                                                    int k, const Matrices &matrices) {
        linear_blocks<FORMAT, M, W_ROWS>(memory, codes, scales, KeptRows<M>(rows), k, matrices);
    }
};
template <typename FORMAT> struct LongBlocks {
    static constexpr int BYTES = FORMAT::BYTES, WEIGHTS = 256;
    template <int M> using Shared = typename LongProduct<FORMAT, M, ListedRows>::Shared;
    static constexpr size_t MEMORY = sizeof(Shared<8>);

    template <int M>
    static __device__ __forceinline__ void multiply(uint8_t *memory, const int8_t *codes,
                                                    const uint2 *scales, const ExpertRows &rows,
                                                    int k, const Matrices &matrices) {
        static_assert(sizeof(Shared<M>) <= MEMORY, "eight rows take most");
        linear_long<FORMAT, M>(*reinterpret_cast<Shared<M> *>(memory), codes, scales,
                               ListedRows{rows}, k, matrices);
    }
};

template <typename F>
__device__ __forceinline__ void product(uint8_t *memory, const int8_t *codes, const uint2 *scales,
                                        int k, const ExpertRows &rows, const Matrices &all) {
    if (rows.count == 0) return;
    Matrices matrices = matrices_of(all, rows.expert, k / F::WEIGHTS * F::BYTES);
    if (rows.count == 1) {
        F::template multiply<1>(memory, codes, scales, rows, k, matrices);
    } else if (rows.count == 2) {
        F::template multiply<2>(memory, codes, scales, rows, k, matrices);
    } else if (rows.count <= 4) {
        F::template multiply<4>(memory, codes, scales, rows, k, matrices);
    } else {
        F::template multiply<8>(memory, codes, scales, rows, k, matrices);
    }
}

#define EXPERTS(NAME, FORMAT, BLOCKS)                                                              \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                               \
        experts_##NAME(const int8_t *codes, const uint2 *scales, int k, EXPERTS_ARGUMENTS,         \
                       MATRICES_ARGUMENTS) {                                                       \
        grid_begin();                                                                              \
        __shared__ __align__(16) uint8_t memory[FORMAT::MEMORY];                                   \
        ExpertRows rows = expert_rows<8>(starts, order, experts, each, blockIdx.y);                \
        product<FORMAT>(memory, codes, scales, k, rows, MATRICES);                                 \
    }
EXPERTS(q4_0, Blocks<Q4_0>, 4)
EXPERTS(q4_1, Blocks<Q4_1>, 4)
EXPERTS(q5_0, Blocks<Q5_0>, 4)
EXPERTS(q5_1, Blocks<Q5_1>, 4)
EXPERTS(q8_0, Blocks<Q8_0>, 4)
EXPERTS(q2_k, Blocks<Q2_K>, 4)
EXPERTS(q3_k, Blocks<Q3_K>, 4)
EXPERTS(q4_k, LongBlocks<LongQ4_K>, 3)
EXPERTS(q5_k, Blocks<Q5_K>, 4)
EXPERTS(q6_k, LongBlocks<LongQ6_K>, 3)
EXPERTS(iq4_nl, Blocks<IQ4_NL>, 4)
EXPERTS(iq4_xs, Blocks<IQ4_XS>, 4)
EXPERTS(mxfp4, Blocks<MXFP4>, 4)
