// Runs the .cu files of this folder on the processor, so that their arithmetic and indexing can be
// tested where there is no GPU: tests/*.cpp do that, and kernels/tests/emulated.rs runs them. One
// header, no CUDA headers, no library.
//
//     #include "rms_norm.cu"     // its common.cuh includes this file under HEARTH_EMULATE
//     int main() {
//         std::vector<float> x(rows * n), y(rows * n, NAN);
//         EMULATE(rms_norm_f32, dim3(rows), dim3(256), /*shared bytes*/ 0, x.data(), y.data(), n);
//     }
//     g++ -std=c++17 -O2 -DHEARTH_EMULATE -I kernels/cuda -x c++ rms_norm_test.cpp -o rms_norm_test
//
// (A template with a comma in its name is written in brackets: EMULATE((kernel<1, 2>), ...). With
// no macro: emulate::launch(grid, block, shared, [&] { kernel(x, y); }).) Compiled as watch.h says,
// and as kernels/tests/emulated.rs does it, every access of a kernel is watched: races, alignment,
// what is touched before grid_wait. Add -fsanitize=address,undefined in its place to find accesses
// outside a heap array (give it its exact size) and outside static or dynamic shared memory.
//
// Blocks run one after another. The threads of a block are fibers: each runs until it returns or
// meets a barrier, namely __syncthreads() for the block's threads that have not returned, or a warp
// operation (__shfl_*_sync, __ballot_sync, __syncwarp, mma, ldmatrix...) for the lanes its mask
// names. The last to arrive performs the operation for all. Where the rest can never arrive, or
// arrives at another line, the run aborts and says which threads stand where.
//
// What helps to find mistakes: dynamic shared memory is filled with 0xff bytes (NaN in every
// floating-point type) before each block, and the bytes after it are checked; the target of
// cp_async16 is filled so too when the copy is issued, and gets its data only when the same thread
// waits for the copy's group; lanes run first to last in even blocks and last to first in odd ones,
// and HEARTH_EMULATE_ORDER=forward, reverse or a number (the seed of random orders) in the
// environment, or emulate::set_order, says otherwise: a missing barrier seldom survives all three.
//
// What it does not do: run blocks side by side, or threads that spin on memory until another thread
// writes it (such a loop never ends here); know the timing, registers or bank conflicts of a
// device. Fast functions (__expf) are
// precise ones here, and mma sums in f32 in the order of k.
#pragma once

// The standard headers come before the macros below, which could break them.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && !defined(HEARTH_EMULATE_UCONTEXT)
#define EMULATE_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

// What is the emulator's own is not watched (watch.h).
#define EMULATE_OWN __attribute__((no_sanitize("thread")))

// ---------------------------------------------------------------------------------------------
// Vector types, with CUDA's alignment.

#define EMULATE_VECTOR(T, name, align2, align4)                                               \
    struct name##1 { T x; };                                                                  \
    struct __align__(align2) name##2 { T x, y; };                                             \
    struct name##3 { T x, y, z; };                                                            \
    struct __align__(align4) name##4 { T x, y, z, w; };                                       \
    inline name##1 make_##name##1(T x) { return name##1{x}; }                                 \
    inline name##2 make_##name##2(T x, T y) { return name##2{x, y}; }                         \
    inline name##3 make_##name##3(T x, T y, T z) { return name##3{x, y, z}; }                 \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return name##4{x, y, z, w}; }
EMULATE_VECTOR(signed char, char, 2, 4)
EMULATE_VECTOR(unsigned char, uchar, 2, 4)
EMULATE_VECTOR(short, short, 4, 8)
EMULATE_VECTOR(unsigned short, ushort, 4, 8)
EMULATE_VECTOR(int, int, 8, 16)
EMULATE_VECTOR(unsigned int, uint, 8, 16)
EMULATE_VECTOR(long long, longlong, 16, 16)
EMULATE_VECTOR(unsigned long long, ulonglong, 16, 16)
EMULATE_VECTOR(float, float, 8, 16)
EMULATE_VECTOR(double, double, 16, 16)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---------------------------------------------------------------------------------------------
// Bits of numbers, and the two 16-bit floating-point types.

namespace emulate {
template <typename To, typename From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits: the sizes differ");
    To to;
    memcpy(static_cast<void *>(&to), &from, sizeof to);
    return to;
}
inline float bf16_to_f32(uint16_t x) { return bits<float>(uint32_t(x) << 16); }
inline uint16_t f32_to_bf16(float x) {
    uint32_t u = bits<uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline float half_to_f32(uint16_t x) {
    uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
    if (rest >= 0x0f800000u) return bits<float>(sign | rest | 0x7f800000u);
    return bits<float>(sign | bits<uint32_t>(bits<float>(rest) * 0x1p112f));
}
inline uint16_t f32_to_half(float x) {
    uint32_t u = bits<uint32_t>(x), rest = u & 0x7fffffffu;
    uint16_t sign = uint16_t((u >> 16) & 0x8000);
    if (rest > 0x7f800000u) return 0x7fff;
    if (rest >= 0x477ff000u) return sign | 0x7c00;
    if (rest < 0x38800000u) return sign | uint16_t(lrintf(bits<float>(rest) * 0x1p24f));
    rest += 0xfff + ((rest >> 13) & 1);
    return sign | uint16_t((rest - 0x38000000u) >> 13);
}
}  // namespace emulate

#define EMULATE_SHORT_FLOAT(type, type2, to, from)                                            \
    struct __align__(2) type {                                                                \
        uint16_t raw;                                                                         \
        type() = default;                                                                     \
        type(float x) : raw(emulate::from(x)) {}                                              \
        operator float() const { return emulate::to(raw); }                                   \
    };                                                                                        \
    struct __align__(4) type2 {                                                               \
        type x, y;                                                                            \
        type2() = default;                                                                    \
        type2(type x, type y) : x(x), y(y) {}                                                 \
    };                                                                                        \
    inline type operator+(type a, type b) { return type(float(a) + float(b)); }               \
    inline type operator-(type a, type b) { return type(float(a) - float(b)); }               \
    inline type operator*(type a, type b) { return type(float(a) * float(b)); }               \
    inline type operator/(type a, type b) { return type(float(a) / float(b)); }               \
    inline type operator-(type a) { return type(-float(a)); }                                 \
    inline float __low2float(type2 a) { return float(a.x); }                                  \
    inline float __high2float(type2 a) { return float(a.y); }                                 \
    inline type __hadd(type a, type b) { return a + b; }                                      \
    inline type __hmul(type a, type b) { return a * b; }
EMULATE_SHORT_FLOAT(__nv_bfloat16, __nv_bfloat162, bf16_to_f32, f32_to_bf16)
EMULATE_SHORT_FLOAT(__half, __half2, half_to_f32, f32_to_half)
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half half;
typedef __half2 half2;

inline float __bfloat162float(__nv_bfloat16 x) { return float(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
    return emulate::bits<__nv_bfloat16>(x);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.raw; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return __floats2bfloat162_rn(x.x, x.y); }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return __floats2bfloat162_rn(x, x); }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return float2{float(x.x), float(x.y)}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 x) { return x.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 x) { return x.y; }

inline float __half2float(__half x) { return float(x); }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __ushort_as_half(unsigned short x) { return emulate::bits<__half>(x); }
inline unsigned short __half_as_ushort(__half x) { return x.raw; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 x) { return __floats2half2_rn(x.x, x.y); }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline float2 __half22float2(__half2 x) { return float2{float(x.x), float(x.y)}; }
inline __half __low2half(__half2 x) { return x.x; }
inline __half __high2half(__half2 x) { return x.y; }

// ---------------------------------------------------------------------------------------------
// Fibers: a stack and where it was left.

namespace emulate {
#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_bytes = 512 << 10;
#else
constexpr size_t stack_bytes = 128 << 10;
#endif
constexpr size_t page_bytes = 4096;
constexpr size_t shared_limit = 232448;  // sm_90; sm_80 has 166912
constexpr size_t guard_bytes = 256;

struct Stack {  // `lowest` is null for the stack of the process itself, until ASan says it
    const void *lowest = nullptr;
    size_t bytes = 0;
#ifdef EMULATE_OWN_SWITCH
    void *top_now = nullptr;
#else
    ucontext_t context;
#endif
    void *fake = nullptr;
};

#ifdef EMULATE_OWN_SWITCH
#ifdef __clang__
#define EMULATE_APART naked, noinline, no_sanitize("thread")
#else
#define EMULATE_APART naked, noinline, noipa, no_sanitize("thread")
#endif
// Keeps the registers that a call must keep on the stack, and goes on where `to` was left.
__attribute__((EMULATE_APART)) static void switch_stack(void ** /*save*/, void * /*to*/) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
        "popq %rcx\n jmp *%rcx\n");  // a `ret` would always be predicted wrongly
}
#endif

EMULATE_OWN inline void prepare(Stack &stack, void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack.lowest, stack.bytes);
    stack.fake = nullptr;
#endif
#ifdef EMULATE_OWN_SWITCH
    void **top = reinterpret_cast<void **>(uintptr_t(stack.lowest) + stack.bytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    stack.top_now = top;
#else
    getcontext(&stack.context);
    stack.context.uc_stack.ss_sp = const_cast<void *>(stack.lowest);
    stack.context.uc_stack.ss_size = stack.bytes;
    stack.context.uc_link = nullptr;
    makecontext(&stack.context, entry, 0);
#endif
}

EMULATE_OWN inline void switch_fiber(Stack &from, Stack &to, bool for_ever = false) {
    (void)for_ever;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake, to.lowest, to.bytes);
#endif
#ifdef EMULATE_OWN_SWITCH
    switch_stack(&from.top_now, to.top_now);
#else
    swapcontext(&from.context, &to.context);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// ---------------------------------------------------------------------------------------------
// Threads, warps and the block that runs.

struct Warp;
typedef void (*Operation)(Warp &, uint32_t members);

struct Site {
    const char *file = "";
    int line = 0;
    bool operator!=(const Site &o) const {
        return line != o.line || (file != o.file && strcmp(file, o.file) != 0);
    }
};

struct Copy {
    void *shared;
    const void *global;
    bool valid;
    uint64_t group;
};

// A product of a warpgroup that is under way.
struct Multiplication {
    float (*d)[4];
    int tiles;
    uint32_t a[4];
    const unsigned char *b;
    int k, add;
    uint64_t group;
    // What this lane's part of the rows was when the product was asked for.
    std::vector<uint32_t> rows;
};

struct Thread {
    uint3 index;
    unsigned lane;
    Warp *warp;
    Stack stack;
    // What it waits for, if it does.
    const char *what;
    Site site;
    uint32_t mask;
    void *arguments;
    Operation operation;
    // cp.async: `group` counts the groups committed so far.
    std::vector<Copy> copies;
    size_t copied = 0;
    uint64_t group = 0;
    // warpgroup_mma: the same for products that nobody has waited for.
    std::vector<Multiplication> products;
    size_t multiplied = 0;
    uint64_t product_group = 0;
    // For watch.h: __syncwarp of all lanes, and whether it has called grid_wait.
    uint32_t syncs = 0;
    bool waited = false;
};

struct Warp {  // sets of lanes, one bit each
    Thread *threads;
    uint32_t alive, ready, waiting, at_barrier;
};

enum class Order { alternate, forward, reverse, random };

struct Machine {
    const char *kernel = "";
    dim3 grid, block;
    uint3 block_index;
    std::vector<Thread> threads;  // one for each stack ever needed
    std::vector<Warp> warps;
    unsigned alive, at_barrier;
    unsigned char *shared = nullptr;
    size_t shared_bytes = 0;
    Stack home;
    void (*call)(void *) = nullptr;
    void *body = nullptr;
    Order order = Order::alternate, block_order = Order::forward;
    uint32_t random = 1;
    bool order_known = false, running = false;
    int quiet = 0;  // accesses are the emulator's
};
inline Machine machine;
inline Thread *current = nullptr;

EMULATE_OWN inline unsigned thread_count() {
    return machine.block.x * machine.block.y * machine.block.z;
}

// Which threads stand where, those with the same place on one line.
EMULATE_OWN inline void print_places() {
    std::map<std::string, std::vector<unsigned>> places;
    for (unsigned i = 0; i < thread_count(); i++) {
        Thread &t = machine.threads[i];
        uint32_t bit = 1u << t.lane;
        char text[512];
        if (!(t.warp->alive & bit)) {
            snprintf(text, sizeof text, "returned");
        } else if (&t == current) {
            snprintf(text, sizeof text, "running");
        } else if (t.warp->at_barrier & bit) {
            snprintf(text, sizeof text, "at __syncthreads, %s:%d", t.site.file, t.site.line);
        } else if (t.warp->waiting & bit) {
            snprintf(text, sizeof text, "at %s, mask %08x, %s:%d", t.what, t.mask, t.site.file,
                     t.site.line);
        } else {
            snprintf(text, sizeof text, "ready to run");
        }
        places[text].push_back(i);
    }
    for (auto &place : places) {
        fprintf(stderr, "  %s: threads", place.first.c_str());
        const std::vector<unsigned> &list = place.second;
        unsigned printed = 0;
        for (size_t i = 0; i < list.size(); printed++) {
            size_t j = i;
            while (j + 1 < list.size() && list[j + 1] == list[j] + 1) j++;
            if (printed == 8) {
                fprintf(stderr, " ... (%zu in all)", list.size());
                break;
            }
            if (j == i) fprintf(stderr, " %u", list[i]);
            else fprintf(stderr, " %u-%u", list[i], list[j]);
            i = j + 1;
        }
        fprintf(stderr, "\n");
    }
}

[[noreturn]] EMULATE_OWN inline void fail(Site site, const std::string &message) {
    machine.quiet++;
    fflush(stdout);
    fprintf(stderr, "emulate: kernel %s", machine.kernel);
    if (machine.running) {
        const uint3 &b = machine.block_index;
        fprintf(stderr, ", block (%u,%u,%u)", b.x, b.y, b.z);
    }
    if (current) {
        const uint3 &t = current->index;
        fprintf(stderr, ", thread (%u,%u,%u) lane %u", t.x, t.y, t.z, current->lane);
    }
    if (site.line) fprintf(stderr, ", %s:%d", site.file, site.line);
    fprintf(stderr, ": %s\n", message.c_str());
    if (machine.running) print_places();
    abort();
}

}  // namespace emulate

#include "watch.h"

namespace emulate {
EMULATE_OWN inline uint32_t next_random() {
    uint32_t &x = machine.random;
    x ^= x << 13, x ^= x >> 17, x ^= x << 5;
    return x;
}

// Takes one lane of those that are ready.
EMULATE_OWN inline Thread *take_ready(Warp &warp) {
    uint32_t ready = warp.ready;
    unsigned lane = __builtin_ctz(ready);
    if (machine.block_order == Order::reverse) lane = 31 - __builtin_clz(ready);
    if (machine.block_order == Order::random) {
        unsigned skip = next_random() % __builtin_popcount(ready);
        while (skip--) ready &= ready - 1;
        lane = __builtin_ctz(ready);
    }
    warp.ready &= ~(1u << lane);
    return &warp.threads[lane];
}

// Lets another lane of the warp go on, or the scheduler, until this thread is ready and taken.
EMULATE_OWN inline void yield(bool for_ever = false) {
    Thread &self = *current;
    current = self.warp->ready ? take_ready(*self.warp) : nullptr;
    if (current == &self) return;
    switch_fiber(self.stack, current ? current->stack : machine.home, for_ever);
}

// Performs the warp operation that `thread` waits for if the rest of its mask waits too.
EMULATE_OWN inline bool complete_operation(Warp &warp, Thread &thread) {
    uint32_t members = thread.mask & warp.alive;
    if (members & ~warp.waiting) return false;
    for (uint32_t left = members; left; left &= left - 1) {
        Thread &other = warp.threads[__builtin_ctz(left)];
        if (other.mask != thread.mask) return false;
        if (other.operation != thread.operation || other.site != thread.site)
            fail(thread.site, "the lanes of one mask are at different warp operations");
    }
    thread.operation(warp, members);
    warp.waiting &= ~members;
    warp.ready |= members;
    return true;
}

EMULATE_OWN inline void complete_barrier() {
    if (machine.at_barrier == 0 || machine.at_barrier < machine.alive) return;
    Thread *first = nullptr;
    for (Warp &warp : machine.warps) {
        for (uint32_t left = warp.at_barrier; left; left &= left - 1) {
            Thread &thread = warp.threads[__builtin_ctz(left)];
            if (!first) first = &thread;
            else if (thread.site != first->site)
                fail(thread.site, "the threads of the block are at different __syncthreads");
        }
    }
    for (Warp &warp : machine.warps) warp.ready |= warp.at_barrier, warp.at_barrier = 0;
    machine.at_barrier = 0;
    next_turn();
}

EMULATE_OWN inline void warp_operation(const char *what, uint32_t mask, Operation operation,
                                       void *arguments, Site site) {
    Thread &self = *current;
    Warp &warp = *self.warp;
    self.what = what, self.site = site, self.mask = mask;
    self.arguments = arguments, self.operation = operation;
    if (!((mask >> self.lane) & 1)) fail(site, std::string(what) + ": the lane is not in its mask");
    warp.waiting |= 1u << self.lane;
    complete_operation(warp, self);
    yield();
}

EMULATE_OWN inline void barrier(Site site) {
    current->site = site;
    current->warp->at_barrier |= 1u << current->lane;
    machine.at_barrier++;
    complete_barrier();
    yield();
}

// Where a fiber starts. What the thread leaves behind may be what others waited for.
EMULATE_OWN inline void thread_main() {
#ifdef __SANITIZE_ADDRESS__
    const void *lowest;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &lowest, &bytes);
    if (!machine.home.lowest) machine.home.lowest = lowest, machine.home.bytes = bytes;
#endif
    machine.call(machine.body);
    Thread &self = *current;
    Warp &warp = *self.warp;
    warp.alive &= ~(1u << self.lane);
    machine.alive--;
    for (uint32_t left = warp.waiting; left; left &= left - 1) {
        unsigned lane = __builtin_ctz(left);
        if ((warp.waiting >> lane) & 1) complete_operation(warp, warp.threads[lane]);
    }
    complete_barrier();
    yield(true);
}

// ---------------------------------------------------------------------------------------------
// The scheduler.

// "forward", "reverse", "alternate" (by block), or a number: random orders from that seed.
EMULATE_OWN inline void set_order(const char *order) {
    machine.order_known = true;
    std::string name = order;
    if (name == "forward") machine.order = Order::forward;
    else if (name == "reverse") machine.order = Order::reverse;
    else if (name == "alternate") machine.order = Order::alternate;
    else machine.order = Order::random, machine.random = uint32_t(atoi(order)) * 2 + 1;
}

EMULATE_OWN inline void run_warp(Warp &warp) {
    while (warp.ready) {
        current = take_ready(warp);
        switch_fiber(machine.home, current->stack);
    }
}

EMULATE_OWN inline void start_block() {
    unsigned threads = thread_count();
    machine.alive = threads, machine.at_barrier = 0;
    for (unsigned i = 0; i < machine.warps.size(); i++) {
        Warp &warp = machine.warps[i];
        unsigned lanes = std::min(32u, threads - i * 32);
        warp.alive = warp.ready = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        warp.waiting = warp.at_barrier = 0;
    }
    for (unsigned i = 0; i < threads; i++) {
        Thread &t = machine.threads[i];
        t.copies.clear(), t.copied = 0, t.group = 0, t.syncs = 0, t.waited = false;
        t.products.clear(), t.multiplied = 0, t.product_group = 0;
        prepare(t.stack, thread_main);
    }
    memset(machine.shared, 0xff, machine.shared_bytes);
    watch_block();
}

EMULATE_OWN inline void run_block(Order order) {
    machine.block_order = order;
    start_block();
    size_t count = machine.warps.size();
    while (machine.alive) {
        bool any = false;
        size_t skip = order == Order::random ? next_random() % count : 0;
        for (size_t i = 0; i < count; i++) {
            size_t at = order == Order::reverse ? count - 1 - i : (i + skip) % count;
            any |= machine.warps[at].ready != 0;
            run_warp(machine.warps[at]);
        }
        if (!any) fail(Site(), "deadlock: no thread of the block can go on");
    }
#ifndef __SANITIZE_ADDRESS__
    for (size_t i = 0; i < guard_bytes; i++) {
        if (machine.shared[machine.shared_bytes + i] != 0xa5)
            fail(Site(), "written past the end of dynamic shared memory");
    }
#endif
}

EMULATE_OWN inline void need_threads(unsigned threads) {
    size_t have = machine.threads.size(), bytes = stack_bytes + page_bytes;
    if (have < threads) machine.threads.resize(threads);
    if (!watch.stacks) {
        void *all = mmap(nullptr, 1024 * bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED) fail(Site(), "no memory for the threads' stacks");
        watch.stacks = uintptr_t(all), watch.stacks_bytes = 1024 * bytes;
    }
    for (size_t i = have; i < threads; i++) {
        char *at = reinterpret_cast<char *>(watch.stacks + i * bytes);
        mprotect(at, page_bytes, PROT_NONE);  // a stack that overflows stops here
        machine.threads[i].stack.lowest = at + page_bytes;
        // Tops at unlike offsets within a page, or all would want the same lines of the cache.
        machine.threads[i].stack.bytes = stack_bytes - i % 64 * 320;
    }
    machine.warps.resize((threads + 31) / 32);
    for (unsigned i = 0; i < threads; i++) {
        Thread &t = machine.threads[i];
        unsigned x = machine.block.x, y = machine.block.y;
        t.index = uint3{i % x, i / x % y, i / x / y};
        t.lane = i % 32;
        t.warp = &machine.warps[i / 32];
        t.warp->threads = &machine.threads[i / 32 * 32];
    }
}

EMULATE_OWN inline void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
    uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64)
        fail(Site(), "a block has 1 to 1024 threads, 64 at most in z");
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        fail(Site(), "a grid has 1 to 2^31-1 blocks in x and 1 to 65535 in y and z");
    if (shared_bytes > shared_limit) fail(Site(), "more shared memory than a device has");
    if (machine.running) fail(Site(), "a kernel cannot launch a kernel");
}

template <typename F>
EMULATE_OWN inline void launch(dim3 grid, dim3 block, size_t shared_bytes, F body,
                   const char *kernel = "(no name)") {
    machine.kernel = kernel;
    check_launch(grid, block, shared_bytes);
    if (!machine.order_known) {
        const char *order = getenv("HEARTH_EMULATE_ORDER");
        set_order(order && *order ? order : "alternate");
    }
    machine.grid = grid, machine.block = block;
    need_threads(block.x * block.y * block.z);
    void *shared = nullptr;
#ifdef __SANITIZE_ADDRESS__
    size_t guard = 0;  // the sanitizer has its own
#else
    size_t guard = guard_bytes;
#endif
    if (posix_memalign(&shared, 128, shared_bytes + guard)) fail(Site(), "no memory");
    machine.shared = static_cast<unsigned char *>(shared), machine.shared_bytes = shared_bytes;
    if (guard) memset(machine.shared + shared_bytes, 0xa5, guard);
    machine.body = &body;
    machine.call = [](void *f) { (*static_cast<F *>(f))(); };
    machine.running = true;
    watch_launch(__builtin_frame_address(0));
    uint64_t blocks = 0;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++, blocks++) {
                machine.block_index = uint3{x, y, z};
                Order order = machine.order;
                if (order == Order::alternate) order = blocks % 2 ? Order::reverse : Order::forward;
                run_block(order);
            }
        }
    }
    machine.running = false;
    current = nullptr;
    end_watch();
    free(shared);
    machine.shared = nullptr;
}
}  // namespace emulate

#define EMULATE(kernel, grid, block, shared, ...) \
    emulate::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); }, #kernel)

#define threadIdx (emulate::current->index)
#define blockIdx (emulate::machine.block_index)
#define blockDim (emulate::machine.block)
#define gridDim (emulate::machine.grid)
#define warpSize 32
#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(emulate::machine.shared)

// The place of the call, as the last parameters of a function.
#define EMULATE_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define EMULATE_SITE (emulate::Site{file, line})

// ---------------------------------------------------------------------------------------------
// Barriers and warp operations.

EMULATE_OWN inline void __syncthreads(EMULATE_HERE) { emulate::barrier(EMULATE_SITE); }

namespace emulate {
// Narrow integers go as int, as C++ would convert them for CUDA's functions.
template <typename T>
using Shuffled = std::conditional_t<std::is_integral<T>::value && (sizeof(T) < 4), int, T>;

template <typename T> struct Shuffle {
    T value;
    int source;
    T result;
};

template <typename T> EMULATE_OWN inline void shuffle_all(Warp &warp, uint32_t members) {
    for (uint32_t left = members; left; left &= left - 1) {
        auto *to = static_cast<Shuffle<T> *>(warp.threads[__builtin_ctz(left)].arguments);
        if ((members >> to->source) & 1)
            to->result = static_cast<Shuffle<T> *>(warp.threads[to->source].arguments)->value;
        else
            memset(static_cast<void *>(&to->result), 0xff, sizeof(T));
    }
}

template <typename T>
EMULATE_OWN inline T shuffle(const char *what, uint32_t mask, T value, int source, Site site) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "not a number");
    Shuffle<T> arguments{value, source, value};
    warp_operation(what, mask, shuffle_all<T>, &arguments, site);
    return arguments.result;
}

EMULATE_OWN inline int lane_now() { return int(current->lane); }
inline int check_width(int width, Site site) {
    if (width < 1 || width > 32 || (width & (width - 1))) fail(site, "shuffle: not a valid width");
    return width;
}
}  // namespace emulate

template <typename T>
inline emulate::Shuffled<T> __shfl_sync(unsigned mask, T value, int source, int width = 32,
                                        EMULATE_HERE) {
    emulate::check_width(width, EMULATE_SITE);
    int from = (emulate::lane_now() & ~(width - 1)) | (source & (width - 1));
    return emulate::shuffle<emulate::Shuffled<T>>("__shfl_sync", mask, value, from, EMULATE_SITE);
}
template <typename T>
inline emulate::Shuffled<T> __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                           EMULATE_HERE) {
    emulate::check_width(width, EMULATE_SITE);
    int lane = emulate::lane_now();
    int from = unsigned(lane & (width - 1)) < delta ? lane : lane - int(delta);
    return emulate::shuffle<emulate::Shuffled<T>>("__shfl_up_sync", mask, value, from,
                                                  EMULATE_SITE);
}
template <typename T>
inline emulate::Shuffled<T> __shfl_down_sync(unsigned mask, T value, unsigned delta,
                                             int width = 32, EMULATE_HERE) {
    emulate::check_width(width, EMULATE_SITE);
    int lane = emulate::lane_now();
    int from = uint64_t(lane & (width - 1)) + delta >= uint64_t(width) ? lane : lane + int(delta);
    return emulate::shuffle<emulate::Shuffled<T>>("__shfl_down_sync", mask, value, from,
                                                  EMULATE_SITE);
}
template <typename T>
inline emulate::Shuffled<T> __shfl_xor_sync(unsigned mask, T value, int other, int width = 32,
                                            EMULATE_HERE) {
    emulate::check_width(width, EMULATE_SITE);
    int lane = emulate::lane_now(), last = lane | (width - 1), from = lane ^ (other & 31);
    return emulate::shuffle<emulate::Shuffled<T>>("__shfl_xor_sync", mask, value,
                                                  from > last ? lane : from, EMULATE_SITE);
}

namespace emulate {
struct Vote {
    bool yes;
    uint32_t voters, ballot;
};
EMULATE_OWN inline void vote_all(Warp &warp, uint32_t members) {
    uint32_t ballot = 0;
    for (uint32_t left = members; left; left &= left - 1) {
        unsigned lane = __builtin_ctz(left);
        ballot |= uint32_t(static_cast<Vote *>(warp.threads[lane].arguments)->yes) << lane;
    }
    for (uint32_t left = members; left; left &= left - 1) {
        auto *vote = static_cast<Vote *>(warp.threads[__builtin_ctz(left)].arguments);
        vote->voters = members, vote->ballot = ballot;
    }
}
EMULATE_OWN inline Vote vote(const char *what, uint32_t mask, bool yes, Site site) {
    Vote arguments{yes, 0, 0};
    warp_operation(what, mask, vote_all, &arguments, site);
    return arguments;
}
EMULATE_OWN inline void nothing(Warp &, uint32_t) {}
}  // namespace emulate

inline unsigned __ballot_sync(unsigned mask, int yes, EMULATE_HERE) {
    return emulate::vote("__ballot_sync", mask, yes != 0, EMULATE_SITE).ballot;
}
inline int __any_sync(unsigned mask, int yes, EMULATE_HERE) {
    return emulate::vote("__any_sync", mask, yes != 0, EMULATE_SITE).ballot != 0;
}
inline int __all_sync(unsigned mask, int yes, EMULATE_HERE) {
    emulate::Vote vote = emulate::vote("__all_sync", mask, yes != 0, EMULATE_SITE);
    return vote.ballot == vote.voters;
}
EMULATE_OWN inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATE_HERE) {
    emulate::warp_operation("__syncwarp", mask, emulate::nothing, nullptr, EMULATE_SITE);
    emulate::Thread &self = *emulate::current;
    if ((mask & self.warp->alive) == self.warp->alive) self.syncs++;
}

// ---------------------------------------------------------------------------------------------
// mma, ldmatrix and cp.async: the wrappers that common.cuh defines on a device.

namespace emulate {
EMULATE_OWN inline void need_whole_warp(Warp &warp, uint32_t members) {
    Thread &any = warp.threads[__builtin_ctz(members)];
    if (members != 0xffffffffu)
        fail(any.site, std::string(any.what) + ": some lanes of the warp have returned");
}
inline void need_aligned(const void *at, const char *what, Site site) {
    if (uintptr_t(at) % 16) fail(site, std::string(what) + ": not aligned to 16 bytes");
}

struct Mma {
    float *d;
    const uint32_t *a, *b;
};

template <typename T> EMULATE_OWN inline void unpack(uint32_t both, float &low, float &high) {
    low = float(bits<T>(uint16_t(both))), high = float(bits<T>(uint16_t(both >> 16)));
}

// The layout of the fragments is that of the PTX ISA, mma.m16n8k16, 16-bit floating point.
template <typename T> EMULATE_OWN inline void mma_all(Warp &warp, uint32_t members) {
    need_whole_warp(warp, members);
    float a[16][16], b[16][8], d[16][8];
    for (unsigned lane = 0; lane < 32; lane++) {
        const Mma &m = *static_cast<Mma *>(warp.threads[lane].arguments);
        unsigned g = lane / 4, t = lane % 4 * 2;
        for (unsigned i = 0; i < 4; i++) {
            float *at = &a[g + i % 2 * 8][t + i / 2 * 8];
            unpack<T>(m.a[i], at[0], at[1]);
            d[g + i / 2 * 8][t + i % 2] = m.d[i];
        }
        for (unsigned i = 0; i < 2; i++) unpack<T>(m.b[i], b[t + i * 8][g], b[t + i * 8 + 1][g]);
    }
    for (unsigned row = 0; row < 16; row++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned column = 0; column < 8; column++)
                d[row][column] += a[row][k] * b[k][column];
    for (unsigned lane = 0; lane < 32; lane++) {
        const Mma &m = *static_cast<Mma *>(warp.threads[lane].arguments);
        unsigned g = lane / 4, t = lane % 4 * 2;
        for (unsigned i = 0; i < 4; i++) m.d[i] = d[g + i / 2 * 8][t + i % 2];
    }
}

struct LoadMatrix {
    uint32_t *r;
    const unsigned char *row;
};

template <bool transposed> EMULATE_OWN inline void ldmatrix_all(Warp &warp, uint32_t members) {
    need_whole_warp(warp, members);
    auto arguments = [&](unsigned lane) {
        return static_cast<LoadMatrix *>(warp.threads[lane].arguments);
    };
    uint16_t matrix[32][8];
    Thread *last = current;
    for (unsigned lane = 0; lane < 32; lane++) {
        current = &warp.threads[lane];
        touch(arguments(lane)->row, 16, Access::read, current->site.file);
        memcpy(matrix[lane], arguments(lane)->row, 16);
    }
    current = last;
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned g = lane / 4, t = lane % 4 * 2;
        for (unsigned i = 0; i < 4; i++) {
            uint16_t(*rows)[8] = &matrix[i * 8];
            uint32_t low = transposed ? rows[t][g] : rows[g][t];
            uint32_t high = transposed ? rows[t + 1][g] : rows[g][t + 1];
            arguments(lane)->r[i] = low | high << 16;
        }
    }
}

template <bool transposed>
inline void ldmatrix(const char *what, uint32_t (&r)[4], const void *row, Site site) {
    need_aligned(row, what, site);
    LoadMatrix arguments{r, static_cast<const unsigned char *>(row)};
    warp_operation(what, 0xffffffffu, ldmatrix_all<transposed>, &arguments, site);
}

EMULATE_OWN inline void perform(const Copy &copy) {
    const void *here = __builtin_return_address(0);
    if (copy.valid) touch(copy.global, 16, Access::read, here);
    touch(copy.shared, 16, Access::write, here);
    if (copy.valid) memcpy(copy.shared, copy.global, 16);
    else memset(copy.shared, 0, 16);
}
}  // namespace emulate

inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16,
                      EMULATE_HERE) {
    emulate::Mma arguments{d, a, b};
    emulate::warp_operation("mma_16816", 0xffffffffu, emulate::mma_all<__nv_bfloat16>, &arguments,
                            EMULATE_SITE);
}
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                      EMULATE_HERE) {
    emulate::Mma arguments{d, a, b};
    emulate::warp_operation("mma_16816", 0xffffffffu, emulate::mma_all<__half>, &arguments,
                            EMULATE_SITE);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void *row, EMULATE_HERE) {
    emulate::ldmatrix<false>("ldmatrix_x4", r, row, EMULATE_SITE);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, EMULATE_HERE) {
    emulate::ldmatrix<true>("ldmatrix_x4_trans", r, row, EMULATE_SITE);
}

EMULATE_OWN inline void cp_async16(void *shared, const void *global, bool valid,
                                   EMULATE_HERE) {
    emulate::need_aligned(shared, "cp_async16, shared address", EMULATE_SITE);
    emulate::need_aligned(global, "cp_async16, global address", EMULATE_SITE);
    emulate::Thread &self = *emulate::current;
    const void *here = __builtin_return_address(0);
    if (valid) emulate::touch(global, 16, emulate::Access::read, here);
    emulate::touch(shared, 16, emulate::Access::write, here);
    emulate::Quiet quiet;
    memset(shared, 0xff, 16);
    self.copies.push_back({shared, global, valid, self.group});
}
inline void cp_async_commit() { emulate::current->group++; }
template <int N> EMULATE_OWN inline void cp_async_wait() {
    emulate::Thread &self = *emulate::current;
    while (self.copied < self.copies.size() && self.copies[self.copied].group + N < self.group)
        emulate::perform(self.copies[self.copied++]);
    emulate::Quiet quiet;
    if (self.copied == self.copies.size()) self.copies.clear(), self.copied = 0;
}

// Products are computed when they are waited for, from rows that were there when they were asked for
// and have not changed since.
namespace emulate {
// Where a lane finds two numbers of a row: a row is 128 bytes; of its pieces of 16 bytes, bits 0 to
// 2 of the row say which.
inline const uint32_t *row_pair(const Multiplication &product, int tile, int half) {
    unsigned row = current->lane / 4, piece = (unsigned(product.k) / 8 + half) ^ row;
    const unsigned char *from = product.b + (8 * tile + row) * 128 + 16 * piece;
    return reinterpret_cast<const uint32_t *>(from + current->lane % 4 * 4);
}
inline void perform(const Multiplication &product) {
    for (int tile = 0; tile < product.tiles; tile++) {
        uint32_t both[2] = {*row_pair(product, tile, 0), *row_pair(product, tile, 1)};
        if (memcmp(both, &product.rows[2 * tile], sizeof both))
            fail(Site(), "warpgroup_mma: its rows have changed while it was under way");
        float(&d)[4] = product.d[tile];
        if (!product.add) d[0] = d[1] = d[2] = d[3] = 0.0f;
        mma_16816(d, product.a, both, __nv_bfloat16());
    }
}
}  // namespace emulate
template <int TILES>
EMULATE_OWN inline void warpgroup_mma(float (&d)[TILES][4], const uint32_t (&a)[4],
                                      const unsigned char *b, int k, int add, EMULATE_HERE) {
    if (uintptr_t(b) % 1024) emulate::fail(EMULATE_SITE, "warpgroup_mma: rows not on 1024 bytes");
    emulate::Thread &self = *emulate::current;
    emulate::Quiet quiet;
    emulate::Multiplication product = {d, TILES, {a[0], a[1], a[2], a[3]}, b, k, add,
                                       self.product_group, {}};
    for (int i = 0; i < 2 * TILES; i++)
        product.rows.push_back(*emulate::row_pair(product, i / 2, i % 2));
    self.products.push_back(product);
}
inline void warpgroup_begin() {}
inline void warpgroup_written() {}
EMULATE_OWN inline void warpgroup_commit() { emulate::current->product_group++; }
template <int N> EMULATE_OWN inline void warpgroup_wait() {
    emulate::Thread &self = *emulate::current;
    while (self.multiplied < self.products.size() &&
           self.products[self.multiplied].group + N < self.product_group) {
        emulate::perform(self.products[self.multiplied++]);
    }
    emulate::Quiet quiet;
    if (self.multiplied == self.products.size()) self.products.clear(), self.multiplied = 0;
}

// ---------------------------------------------------------------------------------------------
// Functions of one thread.

EMULATE_OWN inline void grid_wait() { emulate::current->waited = emulate::watch.waited = true; }
EMULATE_OWN inline void grid_go() { emulate::watch.gone = true; }
inline float exp2_fast(float x) { return exp2f(x); }
template <typename T> inline T __ldg(const T *at) { return *at; }
template <typename T> inline T __ldcg(const T *at) { return *at; }
template <typename T> inline T __ldcs(const T *at) { return *at; }
template <typename T> inline void __stcg(T *at, T value) { *at = value; }
template <typename T> inline void __stcs(T *at, T value) { *at = value; }
EMULATE_OWN inline void __threadfence() {
    emulate::watch.fences[emulate::number_of(*emulate::current)]++;
}
inline void __threadfence_block() {}
inline void __trap() { emulate::fail(emulate::Site(), "__trap()"); }

#define EMULATE_ATOMIC(name, T, change)                  \
    EMULATE_OWN inline T name(T *at, std::common_type_t<T> value) { \
        emulate::touch_atomic(at, sizeof(T));            \
        T old = *at;                                     \
        *at = change;                                    \
        return old;                                      \
    }
typedef unsigned long long emulate_u64;
#define EMULATE_ATOMICS(T)                                      \
    EMULATE_ATOMIC(atomicAdd, T, T(old + value))                \
    EMULATE_ATOMIC(atomicMax, T, old < value ? value : old)     \
    EMULATE_ATOMIC(atomicMin, T, value < old ? value : old)     \
    EMULATE_ATOMIC(atomicExch, T, value)                        \
    EMULATE_ATOMIC(atomicOr, T, T(old | value))                 \
    EMULATE_ATOMIC(atomicAnd, T, T(old & value))                \
    EMULATE_ATOMIC(atomicXor, T, T(old ^ value))                \
    EMULATE_OWN inline T atomicCAS(T *at, T compare, T value) { \
        emulate::touch_atomic(at, sizeof(T));                   \
        T old = *at;                                            \
        if (old == compare) *at = value;                        \
        return old;                                             \
    }
EMULATE_ATOMICS(int)
EMULATE_ATOMICS(unsigned)
EMULATE_ATOMICS(emulate_u64)
EMULATE_ATOMIC(atomicAdd, float, old + value)
EMULATE_ATOMIC(atomicAdd, double, old + value)
EMULATE_ATOMIC(atomicExch, float, value)
EMULATE_ATOMIC(atomicSub, int, old - value)
EMULATE_ATOMIC(atomicSub, unsigned, old - value)
EMULATE_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMULATE_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)

inline int __dp4a(int a, int b, int c) {
    unsigned sum = unsigned(c);
    for (int i = 0; i < 32; i += 8) sum += unsigned(int(int8_t(a >> i)) * int(int8_t(b >> i)));
    return int(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
    return c;
}
inline int __dp4a(char4 a, char4 b, int c) {
    return __dp4a(emulate::bits<int>(a), emulate::bits<int>(b), c);
}
inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
    return __dp4a(emulate::bits<unsigned>(a), emulate::bits<unsigned>(b), c);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t both = uint64_t(b) << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = selector >> (4 * i), byte = unsigned(both >> (8 * (pick & 7))) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= byte << (8 * i);
    }
    return out;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}

inline int __float_as_int(float x) { return emulate::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulate::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulate::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulate::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulate::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulate::bits<double>(x); }

namespace emulate {
// To an integer as the device does it: NaN is 0, what is too large is the nearest that fits.
template <typename T> inline T to_integer(float rounded) {
    if (std::isnan(rounded)) return 0;
    double low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
    return T(std::min(std::max(double(rounded), low), high));
}
}  // namespace emulate
inline int __float2int_rn(float x) { return emulate::to_integer<int>(rintf(x)); }
inline int __float2int_rz(float x) { return emulate::to_integer<int>(truncf(x)); }
inline int __float2int_rd(float x) { return emulate::to_integer<int>(floorf(x)); }
inline int __float2int_ru(float x) { return emulate::to_integer<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return emulate::to_integer<unsigned>(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return emulate::to_integer<unsigned>(truncf(x)); }
inline unsigned __float2uint_rd(float x) { return emulate::to_integer<unsigned>(floorf(x)); }
inline unsigned __float2uint_ru(float x) { return emulate::to_integer<unsigned>(ceilf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

// glibc declares some of these names, hence macros.
#define __expf(x) (expf(x))
#define __exp10f(x) (powf(10.0f, x))
#define __logf(x) (logf(x))
#define __log2f(x) (log2f(x))
#define __log10f(x) (log10f(x))
#define __powf(x, y) (powf(x, y))
#define __sinf(x) (sinf(x))
#define __cosf(x) (cosf(x))
#define __tanf(x) (tanf(x))
#define __sincosf(x, s, c) (sincosf(x, s, c))
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1.0 / sqrt(double(x))); }
inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x >= 0.0f ? fminf(x, 1.0f) : 0.0f; }

// For numbers of one or of two types, NaN losing as in fminf and fmaxf.
template <typename A, typename B,
          typename = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
inline std::common_type_t<A, B> min(A a, B b) {
    typedef std::common_type_t<A, B> T;
    return T(a) != T(a) || T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B,
          typename = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
inline std::common_type_t<A, B> max(A a, B b) {
    typedef std::common_type_t<A, B> T;
    return T(a) != T(a) || T(a) < T(b) ? T(b) : T(a);
}

#define CUDART_INF_F (__builtin_inff())
#define CUDART_NAN_F (__builtin_nanf(""))
