// One row of logits to one token, with the meaning of src/sampling: temperature, weights relative
// to the best token, top_k, top_p over what top_k left, min_p, and one draw in order of id. Tokens
// of equal weight rank by id, the lowest first; NaN counts as minus infinity. The number behind a
// draw is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3",
// SC11) of seed and position. Weights have the bits of the processor's; sums of them are in f64,
// in an order that the launch does not change, and may differ from the processor's in the last bit.
//
// Nothing sorts a row. A first pass finds the largest logit, and with it the largest of every
// thread's own: the k-th largest of those 1,024 is reached by at least k tokens, so the tokens that
// reach it, mostly a few more than k, are all that top_k needs. They are listed in shared memory.
// Where a list does not suffice (flat rows), the same code reads the row instead. The cut itself is
// a radix selection: weights in [0, 1] have bits that order as they do, and three histograms of ten
// bits each lead to the weight at which the count or the mass is reached. The mass of a bucket is
// summed in integers and therefore exact.
//
// sample: grid (rows), block 1024. Parameters are arrays with one number a row. A row whose
//   temperature is NaN is left out (-2); -1 where every token is ruled out. `mask` says which of
//   the masks a row has, -1: none. A mask is ceil(vocab / 32) words: bit i % 32 of word i / 32 is
//   token i, and a token whose bit is 0 counts as minus infinity.
// edit_logits: grid (ceil(count / 256)), block 256. At most one edit for a token of a row.
// take_chosen: grid (ceil(rows / 256)), block 256. A token below 0 is a row of `chosen`, its highest
//   bit aside: what was chosen there takes its place, or 0 where nothing was.
// No dynamic shared memory. Rows may start anywhere: `stride` counts floats. A vocabulary has at
// most 2^20 tokens.
#include "common.cuh"

namespace {

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int BUCKETS = 1024;
// Tokens that a list can have, and the largest top_k for which one is tried.
constexpr int LIST = 2048;
constexpr int LISTED_TOP_K = 768;
// Threads' maxima that a list for top_p goes down to.
constexpr int LISTED_TOP_P = 512;
// Room for rounding, in units of the exponent, where a bound on weights becomes one on logits.
constexpr float ROOM = 2e-4f;
// Temperatures beyond these count as these: quotients stay clear of the ends of f32.
constexpr float COLDEST = 1e-18f, HOTTEST = 1e18f;
constexpr uint32_t ALL = 0xffffffffu;
// The bits of 1.0f.
constexpr uint32_t ONE = 0x3f800000u;
constexpr int NO_TOKEN = 0x7fffffff;

// ---- weights

// e^x for x <= 0 with the bits of `exp` in src/simd/math.rs; 0 below -87.3 and for NaN.
__device__ __forceinline__ float exp_of_negative(float x) {
    const float round = 12582912.0f;
    if (!(x >= -87.3f)) return 0.0f;
    float shifted = fmaf(x, 1.44269504088896340736f, round);
    float n = shifted - round;
    float r = fmaf(n, -0.6933594f, x);
    r = fmaf(n, 2.1219444e-4f, r);
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 1.0f / 2.0f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    return p * __uint_as_float((__float_as_uint(shifted) << 23) + ONE);
}

// ---- a row, and what is left of it

struct Row {
    const float *logits;
    // Or null: any token.
    const uint32_t *mask;
    int vocab;
    // Groups of four logits that lie on 16 bytes; the first one begins `lead` logits too early.
    int lead, groups;
    float largest, temperature, inverse;
    // Tokens in the list, or -1: the row itself is read.
    int listed;
    // Kept are tokens of a larger weight than `least` (its bits), and of equal ones those whose id
    // is at most `last`. No logit of theirs is further below the largest than `low`.
    uint32_t least;
    int last;
    float low;

    // The weight of a token whose logit is the largest plus `below`; the best one has 1. The
    // quotient, refined twice by its remainder, is the correctly rounded one (Markstein,
    // "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
    __device__ __forceinline__ float weight(float below) const {
        float x = below * inverse;
        x = fmaf(fmaf(-x, temperature, below), inverse, x);
        x = fmaf(fmaf(-x, temperature, below), inverse, x);
        return exp_of_negative(x);
    }

    __device__ __forceinline__ bool keeps(int id, float weight) const {
        uint32_t bits = __float_as_uint(weight);
        return bits > least || (bits == least && id <= last);
    }
};

// What the threads of a block share.
struct Shared {
    Row row;
    // The list: id in the high half, bits of the weight in the low half.
    unsigned long long keys[LIST];
    // Of every bucket the count, or its mass in two parts.
    uint32_t bins[2][BUCKETS];
    double ranges[WARPS];
    double scan[WARPS];
    float maxima[WARPS];
    int ids[WARPS];
    uint32_t votes[WARPS];
    double before, amount;
    int count;
};

__device__ Row row_at(const float *logits, const uint32_t *mask, int vocab) {
    Row row;
    row.logits = logits, row.mask = mask, row.vocab = vocab;
    row.lead = static_cast<int>(reinterpret_cast<unsigned long long>(logits) / 4 % 4);
    row.groups = (vocab + row.lead + 3) / 4;
    row.largest = 0.0f, row.temperature = 1.0f, row.inverse = 1.0f;
    row.listed = -1, row.least = 1, row.last = NO_TOKEN, row.low = -INFINITY;
    return row;
}

// Units that a thread visits: groups of the row, or entries of the list.
struct Span {
    int first, end, step;
};

__device__ __forceinline__ int units(const Row &row) {
    return row.listed >= 0 ? row.listed : row.groups;
}

// The whole, thread after thread.
__device__ __forceinline__ Span whole(int count) {
    return Span{static_cast<int>(threadIdx.x), count, THREADS};
}

// ---- visits

// The bits of the four tokens from `id` on, which may begin before the first.
__device__ __forceinline__ uint32_t bits_of(const Row &row, int id) {
    int first = max(id, 0), word = first / 32, shift = first % 32;
    uint32_t bits = row.mask[word] >> shift;
    if (shift > 28 && 32 * (word + 1) < row.vocab) bits |= row.mask[word + 1] << (32 - shift);
    return bits << (first - id);
}

__device__ __forceinline__ float4 group_of(const Row &row, int group) {
    int id = 4 * group - row.lead;
    uint32_t bits = row.mask == nullptr ? 15 : bits_of(row, id);
    if (id >= 0 && id + 4 <= row.vocab) {
        float4 x = *reinterpret_cast<const float4 *>(row.logits + id);
        if ((bits & 15) == 15) return x;
        return make_float4(bits & 1 ? x.x : -INFINITY, bits & 2 ? x.y : -INFINITY,
                           bits & 4 ? x.z : -INFINITY, bits & 8 ? x.w : -INFINITY);
    }
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        bool inside = id + i >= 0 && id + i < row.vocab && (bits >> i & 1);
        x[i] = inside ? row.logits[id + i] : -INFINITY;
    }
    return make_float4(x[0], x[1], x[2], x[3]);
}

// visit(id, logit); minus infinity beside the ends of the row.
template <int AHEAD, class Visit>
__device__ __forceinline__ void each_logit(const Row &row, Span span, Visit visit) {
    auto four = [&](int group, float4 x) {
        int id = 4 * group - row.lead;
        visit(id, x.x), visit(id + 1, x.y), visit(id + 2, x.z), visit(id + 3, x.w);
    };
    int group = span.first;
    for (; group + (AHEAD - 1) * span.step < span.end; group += AHEAD * span.step) {
        float4 x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) x[i] = group_of(row, group + i * span.step);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) four(group + i * span.step, x[i]);
    }
    for (; group < span.end; group += span.step) four(group, group_of(row, group));
}

// visit(id, weight) for tokens of the list, or those of the row whose logits are between `low` and
// `high` relative to the largest.
template <int AHEAD, class Visit>
__device__ __forceinline__ void each_weight(const Shared &s, const Row &row, Span span, float low,
                                            float high, Visit visit) {
    if (row.listed >= 0) {
        for (int i = span.first; i < span.end; i += span.step) {
            unsigned long long key = s.keys[i];
            visit(static_cast<int>(key >> 32), __uint_as_float(static_cast<uint32_t>(key)));
        }
        return;
    }
    each_logit<AHEAD>(row, span, [&](int id, float logit) {
        float below = logit - row.largest;
        if (below >= low && below <= high) visit(id, row.weight(below));
    });
}

// How far below the largest logit a token of this weight can be.
__device__ __forceinline__ float lowest(const Row &row, uint32_t weight) {
    return row.temperature * (logf(__uint_as_float(weight)) - ROOM);
}
// How near to it.
__device__ __forceinline__ float highest(const Row &row, uint32_t weight) {
    return row.temperature * (logf(__uint_as_float(weight)) + ROOM);
}

// ---- the block together

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// The sum over this thread and those before it.
__device__ __forceinline__ double block_scan(Shared &s, double x) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        double other = __shfl_up_sync(ALL, x, distance);
        if (lane() >= distance) x += other;
    }
    if (lane() == 31) s.scan[warp()] = x;
    __syncthreads();
    double before = 0.0;
    for (int i = 0; i < warp(); i++) before += s.scan[i];
    __syncthreads();
    return before + x;
}

__device__ __forceinline__ double block_sum(Shared &s, double x) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(ALL, x, other);
    if (lane() == 0) s.scan[warp()] = x;
    __syncthreads();
    double sum = 0.0;
    for (int i = 0; i < WARPS; i++) sum += s.scan[i];
    __syncthreads();
    return sum;
}

// The first thread, or the last, for which `yes` holds; -1 where there is none.
template <bool LAST> __device__ __forceinline__ int thread_with(Shared &s, bool yes) {
    uint32_t votes = __ballot_sync(ALL, yes);
    if (lane() == 0) s.votes[warp()] = votes;
    __syncthreads();
    int at = -1;
    for (int i = 0; i < WARPS && (LAST || at < 0); i++) {
        int x = static_cast<int>(s.votes[i]);
        if (x != 0) at = 32 * i + (LAST ? 31 - __clz(x) : __ffs(x) - 1);
    }
    __syncthreads();
    return at;
}

// The largest `x` of all threads, and the lowest id that has it.
__device__ __forceinline__ void block_best(Shared &s, float &x, int &id) {
    auto take = [&](float other, int other_id) {
        bool better = other > x || (other == x && other_id < id);
        x = better ? other : x, id = better ? other_id : id;
    };
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
        float other_x = __shfl_xor_sync(ALL, x, other);
        int other_id = __shfl_xor_sync(ALL, id, other);
        take(other_x, other_id);
    }
    if (lane() == 0) s.maxima[warp()] = x, s.ids[warp()] = id;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) take(s.maxima[i], s.ids[i]);
    __syncthreads();
}

// Sorts the first `count` keys, a power of two, ascending: Batcher's bitonic sort. Up to a distance
// of 32 a warp has its 64 keys for itself.
__device__ __noinline__ void sort_keys(Shared &s, int count) {
    int thread = threadIdx.x;
    for (int size = 2; size <= count; size *= 2) {
        for (int distance = size / 2; distance > 0; distance /= 2) {
            if (thread < count / 2) {
                int a = 2 * thread - (thread & (distance - 1)), b = a + distance;
                unsigned long long first = s.keys[a], second = s.keys[b];
                if ((first > second) == ((a & size) == 0)) s.keys[a] = second, s.keys[b] = first;
            }
            if (distance > 32 || (distance == 1 && size >= 64)) {
                __syncthreads();
            } else {
                __syncwarp();
            }
        }
    }
    __syncthreads();
}

// ---- the list

// A logit that at least `count` tokens reach (or minus infinity): the count-th largest of `own`.
__device__ __noinline__ float reached_by(Shared &s, float own, int count) {
    uint32_t bits = __float_as_uint(own);
    s.keys[threadIdx.x] = bits >> 31 ? ~bits : bits | 0x80000000u;
    __syncthreads();
    sort_keys(s, THREADS);
    uint32_t key = static_cast<uint32_t>(s.keys[THREADS - count]);
    __syncthreads();
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Lists the tokens whose logits are at least `low` relative to the largest, in order of id; where
// there are too many, nothing is listed. With TOTAL the sum of the weights of all tokens.
template <bool TOTAL> __device__ __noinline__ double list_tokens(Shared &s, float low) {
    Row row = s.row;
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    double sum = 0.0;
    each_logit<2>(row, whole(row.groups), [&](int id, float logit) {
        float below = logit - row.largest;
        bool listed = below >= low;
        if (!TOTAL && !listed) return;
        float weight = row.weight(below);
        if (TOTAL) sum += static_cast<double>(weight);
        if (!listed || !(weight > 0.0f)) return;
        int at = atomicAdd(&s.count, 1);
        unsigned long long high = static_cast<unsigned long long>(id) << 32;
        if (at < LIST) s.keys[at] = high | __float_as_uint(weight);
    });
    __syncthreads();
    int count = s.count;
    if (count <= LIST) {
        int padded = 1;
        while (padded < count) padded *= 2;
        for (int i = count + threadIdx.x; i < padded; i += THREADS) s.keys[i] = ~0ull;
        __syncthreads();
        sort_keys(s, padded);
        if (threadIdx.x == 0) s.row.listed = count;
        __syncthreads();
    }
    return TOTAL ? block_sum(s, sum) : 0.0;
}

// ---- places in order of id

// With only == 0 the kept tokens lie side by side in order of id, each as wide as its weight, and
// the one at `place` (in [0, 1)) of the whole is returned. Else only kept tokens of that weight
// count, as 1 each, and the one at `place`, counted from 0, is returned. First a sum of each warp's
// range of the row; then the range that has the place is gone through.
__device__ __noinline__ int token_at(Shared &s, uint32_t only, double place, float low,
                                     float high) {
    Row row = s.row;
    auto width = [&](int id, float weight) {
        bool in = row.keeps(id, weight) && (only == 0 || __float_as_uint(weight) == only);
        return in ? (only == 0 ? static_cast<double>(weight) : 1.0) : 0.0;
    };
    int share = (units(row) + WARPS - 1) / WARPS;
    int end = min((warp() + 1) * share, units(row));
    double sum = 0.0;
    each_weight<2>(s, row, Span{warp() * share + lane(), end, 32}, low, high,
                   [&](int id, float weight) { sum += width(id, weight); });
#pragma unroll
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(ALL, sum, other);
    if (lane() == 0) s.ranges[warp()] = sum;
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < WARPS; i++) total += s.ranges[i];
    double target = only == 0 ? place * total : place + 0.5;
    // Rounding may leave every sum at the target: then the last range that has a token.
    int range = 0;
    double before = 0.0, sum_before = 0.0;
    for (int i = 0; i < WARPS && !(sum_before > target); i++) {
        if (!(s.ranges[i] > 0.0)) continue;
        range = i, before = sum_before;
        sum_before += s.ranges[i];
    }
    int first = range * share;
    end = min(first + share, units(row));
    int each = (end - first + THREADS - 1) / THREADS;
    first += each * static_cast<int>(threadIdx.x);
    Span own = {first, min(first + each, end), 1};
    sum = 0.0;
    each_weight<1>(s, row, own, low, high,
                   [&](int id, float weight) { sum += width(id, weight); });
    double reach = before + block_scan(s, sum);
    int finder = thread_with<false>(s, sum > 0.0 && reach > target);
    if (finder < 0) finder = thread_with<true>(s, sum > 0.0);
    if (static_cast<int>(threadIdx.x) == finder) {
        double at = reach - sum;
        int found = NO_TOKEN, last = NO_TOKEN;
        each_weight<1>(s, row, own, low, high, [&](int id, float weight) {
            double more = width(id, weight);
            if (!(more > 0.0)) return;
            at += more, last = id;
            if (at > target && found == NO_TOKEN) found = id;
        });
        s.count = found != NO_TOKEN ? found : last;
    }
    __syncthreads();
    int token = s.count;
    __syncthreads();
    return token;
}

// ---- cuts

// The buckets that keys of one value of `key >> 20` belong to have weights of one exponent, but for
// a power of two at their upper end. This is that exponent.
__device__ __forceinline__ uint32_t exponent_of(uint32_t key) {
    return (ONE - (key >> 20 << 20) - 1) >> 23;
}

// A token into its bucket: 1, or its weight as an integer of 25 bits, in two parts so that 2^20
// tokens cannot overflow 32 bits.
template <bool MASS>
__device__ __forceinline__ void count_in(Shared &s, int bucket, uint32_t key) {
    if (!MASS) {
        atomicAdd(&s.bins[0][bucket], 1u);
        return;
    }
    uint32_t bits = ONE - key;
    uint32_t weight = ((bits & 0x7fffffu) | 0x800000u) << ((bits >> 23) - exponent_of(key));
    atomicAdd(&s.bins[0][bucket], weight & 4095u);
    atomicAdd(&s.bins[1][bucket], weight >> 12);
}

// What a bucket has, whose smallest key is `key`.
template <bool MASS> __device__ __forceinline__ double amount_in(const Shared &s, uint32_t key) {
    uint32_t low = s.bins[0][threadIdx.x], high = s.bins[1][threadIdx.x];
    if (!MASS || (low | high) == 0) return static_cast<double>(low);
    double unit = static_cast<double>(__uint_as_float(exponent_of(key) << 23)) / 8388608.0;
    return (4096.0 * high + low) * unit;
}

// Keeps the best of the kept tokens up to the first at which their count, or with MASS their
// weights together, reach a goal: `share`, with MASS that share of `total` (0: of the weights of
// the kept tokens). False where all of them do not reach it: then nothing changes.
template <bool MASS>
__device__ __noinline__ bool keep_until(Shared &s, double share, double total) {
    Row row = s.row;
    int thread = threadIdx.x;
    uint32_t path = 0;
    double goal = share * total, before = 0.0, amount = 0.0;
    float low = row.low, high = INFINITY;
    for (int shift = 20; shift >= 0; shift -= 10) {
        s.bins[0][thread] = 0, s.bins[1][thread] = 0;
        __syncthreads();
        each_weight<2>(s, row, whole(units(row)), low, high, [&](int id, float weight) {
            uint32_t key = ONE - __float_as_uint(weight);
            if (!row.keeps(id, weight) || key >> shift >> 10 != path) return;
            count_in<MASS>(s, key >> shift & (BUCKETS - 1), key);
        });
        __syncthreads();
        double own = amount_in<MASS>(s, (path << 10 | thread) << shift);
        double reach = before + block_scan(s, own);
        if (shift == 20 && total == 0.0) {
            if (thread == BUCKETS - 1) s.amount = reach;
            __syncthreads();
            goal = MASS ? share * s.amount : share;
        }
        int crossing = thread_with<false>(s, own > 0.0 && reach >= goal);
        if (crossing < 0 && shift == 20) return false;
        // The same weights in another order may sum to a little less: then all of the bucket.
        if (crossing < 0) crossing = thread_with<true>(s, own > 0.0);
        if (thread == crossing) s.before = reach - own, s.amount = own;
        __syncthreads();
        before = s.before, amount = s.amount;
        path = path << 10 | crossing;
        uint32_t heaviest = ONE - (path << shift);
        low = fmaxf(row.low, lowest(row, heaviest - (1u << shift) + 1));
        high = highest(row, heaviest);
        __syncthreads();
    }
    uint32_t least = ONE - path;
    double each = MASS ? static_cast<double>(__uint_as_float(least)) : 1.0;
    double wanted = fmax(ceil((goal - before) / each), 1.0);
    int last = least == row.least ? row.last : NO_TOKEN;
    if (wanted * each < amount) last = token_at(s, least, wanted - 1.0, low, high);
    if (thread == 0) s.row.least = least, s.row.last = last, s.row.low = low;
    __syncthreads();
    return true;
}

// Keeps the tokens that have at least this weight.
__device__ void keep_weight(Shared &s, float weight) {
    uint32_t least = __float_as_uint(fminf(weight, 1.0f));
    if (threadIdx.x == 0 && least > s.row.least) {
        s.row.least = least, s.row.last = NO_TOKEN;
        s.row.low = fmaxf(s.row.low, lowest(s.row, least));
    }
    __syncthreads();
}

// ---- the draw

// Ten rounds of Philox on four words; the first two of them as one number.
__device__ unsigned long long philox(unsigned long long key, unsigned long long counter) {
    uint32_t key_low = static_cast<uint32_t>(key), key_high = static_cast<uint32_t>(key >> 32);
    uint32_t x[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned long long a = static_cast<unsigned long long>(x[0]) * 0xd2511f53u;
        unsigned long long b = static_cast<unsigned long long>(x[2]) * 0xcd9e8d57u;
        x[0] = static_cast<uint32_t>(b >> 32) ^ x[1] ^ key_low;
        x[1] = static_cast<uint32_t>(b);
        x[2] = static_cast<uint32_t>(a >> 32) ^ x[3] ^ key_high;
        x[3] = static_cast<uint32_t>(a);
        key_low += 0x9e3779b9u, key_high += 0xbb67ae85u;
    }
    return static_cast<unsigned long long>(x[1]) << 32 | x[0];
}

// A number in [0, 1) with 53 random bits.
__device__ double uniform(unsigned long long seed, unsigned long long position) {
    return static_cast<double>(philox(seed, position) >> 11) / 9007199254740992.0;
}

// Lists what the cuts to come need, where that can be known: see the head of this file. Returns the
// total of all weights where top_p is of the whole row, else 0.
__device__ double list_candidates(Shared &s, float own, int top_k, float top_p, float min_p) {
    auto reach = [&](int count) {
        return reached_by(s, own, count) - s.row.largest - ROOM * s.row.temperature;
    };
    if (top_k > 0) {
        if (top_k <= LISTED_TOP_K) list_tokens<false>(s, reach(top_k));
    } else if (top_p < 1.0f) {
        return list_tokens<true>(s, reach(LISTED_TOP_P));
    } else if (min_p > 0.0f) {
        list_tokens<false>(s, lowest(s.row, __float_as_uint(fminf(min_p, 1.0f))));
    }
    return 0.0;
}

// One token by the parameters of s.row, whose largest logit is finite. `own` is the thread's.
__device__ int draw(Shared &s, float own, int top_k, float top_p, float min_p, double place) {
    if (top_k < 0 || top_k >= s.row.vocab) top_k = 0;
    double total = list_candidates(s, own, top_k, top_p, min_p);
    if (top_k > 0) keep_until<false>(s, top_k, 0.0);
    // The list may have too little of the whole mass.
    if (top_p < 1.0f && !keep_until<true>(s, top_p, total) && total > 0.0) {
        if (threadIdx.x == 0) s.row.listed = -1;
        __syncthreads();
        keep_until<true>(s, top_p, total);
    }
    if (min_p > 0.0f) keep_weight(s, min_p);
    return token_at(s, 0, place, s.row.low, INFINITY);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(1024)
sample(const float *logits, int vocab, int stride, const float *temperature, const int *top_k,
       const float *top_p, const float *min_p, const unsigned long long *seed,
       const unsigned long long *position, const int *mask, const uint32_t *masks, int *out) {
    grid_begin();
    __shared__ Shared s;
    int at = blockIdx.x;
    float heat = temperature[at];
    if (!(heat == heat)) {
        if (threadIdx.x == 0) out[at] = -2;
        return;
    }
    const uint32_t *own_mask =
        mask[at] < 0 ? nullptr : masks + static_cast<long long>(mask[at]) * ((vocab + 31) / 32);
    Row row = row_at(logits + static_cast<long long>(at) * stride, own_mask, vocab);
    float own = -INFINITY;
    int best = NO_TOKEN;
    each_logit<4>(row, whole(row.groups), [&](int id, float logit) {
        if (logit > own) own = logit, best = id;
    });
    float largest = own;
    block_best(s, largest, best);
    if (heat <= 0.0f || top_k[at] == 1 || !(largest > -INFINITY && largest < INFINITY)) {
        if (threadIdx.x == 0) out[at] = largest == -INFINITY ? -1 : best;
        return;
    }
    if (threadIdx.x == 0) {
        row.largest = largest;
        row.temperature = fminf(fmaxf(heat, COLDEST), HOTTEST);
        row.inverse = 1.0f / row.temperature;
        s.row = row;
    }
    __syncthreads();
    double place = uniform(seed[at], position[at]);
    int token = draw(s, own, top_k[at], top_p[at], min_p[at], place);
    if (threadIdx.x == 0) out[at] = token;
}

extern "C" __global__ void edit_logits(float *logits, int stride, const int *row, const int *token,
                                       const float *divide, const float *subtract,
                                       const float *add, int count) {
    grid_begin();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float *logit = logits + static_cast<long long>(row[i]) * stride + token[i];
    float x = *logit;
    if (divide[i] != 1.0f) {
        // A product in f64 is exact: this rounds once, and is not fused with the difference.
        float product = static_cast<float>(static_cast<double>(x) * divide[i]);
        x = x > 0.0f ? x / divide[i] : product;
    }
    *logit = x - subtract[i] + add[i];
}

extern "C" __global__ void take_chosen(int *tokens, const int *chosen, int rows, int count) {
    grid_begin();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows || tokens[i] >= 0) return;
    int from = tokens[i] & 0x7fffffff;
    tokens[i] = from < count && chosen[from] > 0 ? chosen[from] : 0;
}
