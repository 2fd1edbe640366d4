// What goes wrong on a device alone: this watches every access of a kernel to memory while it runs
// on the processor. emulate.h includes it; the compiler calls the functions at its end.
//
//     g++ -std=c++17 -O2 -fsanitize=thread,alignment -fno-threadsafe-statics -DHEARTH_EMULATE
//         -I kernels/cuda -c test.cpp                                        (one line)
//     g++ test.o -o test          # without these: their libraries are not wanted
//
// Every byte remembers who wrote it last and who has read it since, and when: in which turn, which
// is what lies between two __syncthreads of a block, and after how many __syncwarp of its warp. A
// run ends, and says which threads it is about, where
//
// - two threads use a byte, one of them writes it, and nothing orders them: a barrier of the block,
//   a __syncwarp of all lanes (shuffles order no memory), or between blocks an atomic operation
//   that one made behind a __threadfence and a barrier and the other found made;
// - an access is not aligned to its size, or is past dynamic shared memory;
// - a kernel writes before grid_wait, or reads what is not `constant`: kernels before it may still
//   be at work on that. A kernel that never waits, or never lets the next one begin, is wrong too.
//
// Static shared memory is filled with 0xff bytes before each block, as far as a kernel is known to
// write it. What is not seen: of several blocks that read a byte, or threads that write bytes of
// one word, all but the last; a barrier of a part of a warp orders nothing here. `code at` is for
// addr2line, of a program that was compiled with -g.
#pragma once

extern "C" char __bss_start, _end;

namespace emulate {
constexpr uint16_t MANY = 0xffff;
constexpr uint16_t LANES = 0x8000;  // and a warp: several of its lanes
constexpr size_t WORD = 4, SHADOW_BYTES = 4096;

// What is known of four bytes, a bit of the masks for each of them: who used them last. Turns are
// counted through all blocks and launches, from 1.
struct Cell {
    uint32_t write_turn, write_sync, read_turn, read_sync;
    uint16_t writer, reader, fences;
    uint8_t written, read;
};
constexpr uint8_t ATOMIC = 0x80;  // in `written`

// A block that made an atomic operation: what its threads had written before so many fences.
struct Release {
    uint32_t first_turn, last_turn;
    std::vector<uint16_t> fences;
};
// What a block found made, from which turn on all of its threads know, and who knows before.
struct Acquired {
    Release release;
    uint32_t turn;
    uint16_t thread;
};

struct Watch {
    std::map<uintptr_t, Cell *> shadows;
    uintptr_t near_page[64] = {};
    Cell *near_cells[64] = {};
    uint32_t turn = 1, block_turn = 1, launch_turn = 1;
    uint16_t fences[1024] = {}, published[1024] = {};
    std::map<const void *, std::vector<Release>> releases;
    std::map<uint32_t, Acquired> acquired;
    std::vector<std::pair<uintptr_t, size_t>> constants;
    // Bytes of static memory that a kernel has written, and runs of them.
    std::vector<bool> known;
    std::vector<std::pair<size_t, size_t>> runs;
    bool learned = false;
    uintptr_t frame = 0, stacks = 0;
    size_t stacks_bytes = 0;
    bool waited = false, gone = false;
};
inline Watch watch;
// Whether kernels are launched so that they overlap.
inline bool overlapping = true;

struct Quiet {
    EMULATE_OWN Quiet() { machine.quiet++; }
    EMULATE_OWN ~Quiet() { machine.quiet--; }
};

// Memory that no kernel changes, such as weights: the next launch may read it at once.
EMULATE_OWN inline void constant(const void *at, size_t bytes) {
    watch.constants.push_back({uintptr_t(at), bytes});
}
template <typename T> inline void constant(const std::vector<T> &all) {
    constant(all.data(), all.size() * sizeof(T));
}

EMULATE_OWN inline Cell *cells_of(uintptr_t page) {
    size_t slot = page % 64;
    if (watch.near_page[slot] == page && watch.near_cells[slot]) return watch.near_cells[slot];
    Cell *&cells = watch.shadows[page];
    if (!cells) {
        cells = static_cast<Cell *>(calloc(SHADOW_BYTES / WORD, sizeof(Cell)));
    }
    watch.near_page[slot] = page, watch.near_cells[slot] = cells;
    return cells;
}

EMULATE_OWN inline uint16_t number_of(const Thread &t) {
    return uint16_t(&t - machine.threads.data());
}

// Whether this block has found made what another one did in that turn; with `fences`, behind one
// fence more than so many of that thread.
EMULATE_OWN inline bool found_made(uint32_t turn, const Cell *write) {
    auto after = watch.acquired.upper_bound(turn);
    if (after == watch.acquired.begin()) return false;
    const Acquired &a = std::prev(after)->second;
    if (turn > a.release.last_turn) return false;
    if (a.turn >= watch.turn && a.thread != number_of(*current)) return false;
    return !write || write->written & ATOMIC || a.release.fences[write->writer] > write->fences;
}

EMULATE_OWN inline bool in_order(uint32_t turn, uint32_t sync, uint16_t who) {
    const Thread &self = *current;
    if (turn < watch.turn || who == number_of(self)) return true;
    if (who == MANY) return false;
    unsigned warp = who & LANES ? who & ~LANES : who / 32;
    return warp == number_of(self) / 32u && sync < self.syncs;
}

EMULATE_OWN inline bool write_in_order(const Cell &cell, bool shared) {
    if (cell.write_turn < watch.launch_turn) return true;
    if (cell.write_turn < watch.block_turn) return shared || found_made(cell.write_turn, &cell);
    return in_order(cell.write_turn, cell.write_sync, cell.writer);
}
EMULATE_OWN inline bool reads_in_order(const Cell &cell, bool shared) {
    if (cell.read_turn < watch.launch_turn) return true;
    if (cell.read_turn < watch.block_turn) return shared || found_made(cell.read_turn, nullptr);
    return in_order(cell.read_turn, cell.read_sync, cell.reader);
}

[[noreturn]] EMULATE_OWN inline void race(const char *mine, const char *other, uint16_t who,
                                          uintptr_t at, const void *pc) {
    char text[256], whose[64];
    if (who == MANY) snprintf(whose, sizeof whose, "several threads");
    else if (who & LANES) snprintf(whose, sizeof whose, "lanes of warp %d", who & ~LANES);
    else snprintf(whose, sizeof whose, "thread %d", who);
    snprintf(text, sizeof text, "%s what %s %s (at %p), and nothing orders them (code at %p)",
             mine, whose, other, reinterpret_cast<void *>(at), pc);
    fail(Site(), text);
}

EMULATE_OWN inline void note_read(Cell &cell, uint8_t bytes) {
    const Thread &self = *current;
    uint16_t me = number_of(self), warp = me / 32;
    bool newer = cell.read_turn < watch.turn || !(cell.read & bytes);
    unsigned its_warp = cell.reader & LANES ? cell.reader & ~LANES : cell.reader / 32;
    if (newer || cell.reader == me) {
        cell.reader = me;
    } else if (cell.reader == MANY || its_warp != warp) {
        cell.reader = MANY;
    } else {
        cell.reader = cell.read_sync < self.syncs ? me : uint16_t(LANES | warp);
    }
    cell.read = newer ? bytes : cell.read | bytes;
    cell.read_turn = watch.turn, cell.read_sync = self.syncs;
}

EMULATE_OWN inline void note_write(Cell &cell, uint8_t bytes) {
    const Thread &self = *current;
    uint16_t me = number_of(self);
    bool again = cell.writer == me && cell.write_turn == watch.turn;
    cell.written = again ? cell.written | bytes : bytes;
    cell.writer = me, cell.write_turn = watch.turn, cell.write_sync = self.syncs;
    cell.fences = watch.fences[me];
}

// What a kernel writes in static memory is shared memory.
EMULATE_OWN inline void know_static(uintptr_t at, size_t bytes) {
    for (; bytes > 0; at++, bytes--) {
        size_t place = at - uintptr_t(&__bss_start);
        if (watch.known.size() <= place) watch.known.resize(place + 1);
        if (!watch.known[place]) watch.known[place] = watch.learned = true;
    }
}
EMULATE_OWN inline void fill_static() {
    if (watch.learned) {
        watch.learned = false, watch.runs.clear();
        for (size_t i = 0; i < watch.known.size(); i++) {
            if (!watch.known[i]) continue;
            bool next = !watch.runs.empty() && watch.runs.back().second == i;
            if (next) watch.runs.back().second++;
            else watch.runs.push_back({i, i + 1});
        }
    }
    for (auto &run : watch.runs) memset(&__bss_start + run.first, 0xff, run.second - run.first);
}

enum class Access { read, write, atomic };

// Some of the four bytes at a multiple of four.
EMULATE_OWN inline void touch_word(uintptr_t at, uint8_t bytes, Access how, bool shared,
                                   const void *pc) {
    Cell &cell = cells_of(at / SHADOW_BYTES)[at % SHADOW_BYTES / WORD];
    bool changes = how != Access::read;
    bool both_atomic = how == Access::atomic && cell.written & ATOMIC;
    const char *mine = changes ? "writes" : "reads";
    if (cell.written & bytes && !both_atomic && !write_in_order(cell, shared))
        race(mine, "wrote", cell.writer, at, pc);
    if (changes && cell.read & bytes && !reads_in_order(cell, shared))
        race(mine, "read", cell.reader, at, pc);
    if (changes) note_write(cell, how == Access::atomic ? bytes | ATOMIC : bytes);
    else note_read(cell, bytes);
}

EMULATE_OWN inline bool within(uintptr_t at, const void *first, size_t bytes) {
    return at - uintptr_t(first) < bytes;
}
EMULATE_OWN inline bool is_static(uintptr_t at) {
    return within(at, &__bss_start, size_t(&_end - &__bss_start));
}
// The emulator's, a thread's own, or an argument of the kernel.
EMULATE_OWN inline bool is_own(uintptr_t at) {
    return at - watch.stacks < watch.stacks_bytes || at - watch.frame < (8u << 20) ||
           within(at, &machine, sizeof machine) || within(at, &current, sizeof current) ||
           within(at, &watch, sizeof watch) || within(at, &overlapping, sizeof overlapping) ||
           within(at, machine.threads.data(), machine.threads.size() * sizeof(Thread)) ||
           within(at, machine.warps.data(), machine.warps.size() * sizeof(Warp));
}

// Before grid_wait only what no kernel changes may be read.
EMULATE_OWN inline void check_waited(uintptr_t at, size_t bytes, Access how) {
    if (!overlapping || current->waited) return;
    if (how != Access::read) fail(Site(), "writes to memory before grid_wait");
    for (auto &all : watch.constants)
        if (at - all.first < all.second && at + bytes <= all.first + all.second) return;
    fail(Site(), "reads before grid_wait what is not said to be constant");
}

EMULATE_OWN inline void touch(const void *place, size_t bytes, Access how, const void *pc) {
    if (!current || machine.quiet) return;
    Quiet quiet;
    uintptr_t at = uintptr_t(place);
    if (is_own(at)) return;
    if (!within(at, machine.shared, machine.shared_bytes + 1 - bytes) &&
        within(at, machine.shared, machine.shared_bytes + guard_bytes))
        fail(Site(), "an access past the end of dynamic shared memory");
    bool bss = is_static(at), shared = bss || within(at, machine.shared, machine.shared_bytes);
    if (!shared) check_waited(at, bytes, how);
    if (bss && how != Access::read) know_static(at, bytes);
    for (uintptr_t end = at + bytes; at < end;) {
        uintptr_t word = at & ~(WORD - 1), next = std::min(word + WORD, end);
        uint8_t mask = uint8_t(((1u << (next - word)) - 1) & ~((1u << (at - word)) - 1));
        touch_word(word, mask, how, shared, pc);
        at = next;
    }
}

// A vector of so many bytes: devices refuse those that are not aligned.
EMULATE_OWN inline void touch_aligned(const void *at, size_t bytes, bool write, const void *pc) {
    if (!current || machine.quiet) return;
    if (uintptr_t(at) % bytes && !is_own(uintptr_t(at))) {
        Quiet quiet;
        fail(Site(), "an access of " + std::to_string(bytes) + " bytes that is not aligned");
    }
    touch(at, bytes, write ? Access::write : Access::read, pc);
}

// An atomic operation: what the block wrote behind fences can be found by who comes after it.
EMULATE_OWN inline void touch_atomic(const void *at, size_t bytes) {
    if (!current || machine.quiet) return;
    touch(at, bytes, Access::atomic, __builtin_return_address(0));
    Quiet quiet;
    if (within(uintptr_t(at), machine.shared, machine.shared_bytes) || is_static(uintptr_t(at)))
        return;
    uint16_t me = number_of(*current);
    std::vector<Release> &made = watch.releases[at];
    for (const Release &release : made)
        watch.acquired[release.first_turn] = Acquired{release, watch.turn, me};
    size_t threads = thread_count();
    Release own{watch.block_turn, watch.turn, {watch.published, watch.published + threads}};
    own.fences[me] = watch.fences[me];
    made.push_back(own);
}

EMULATE_OWN inline void next_turn() {
    watch.turn++;
    memcpy(watch.published, watch.fences, sizeof watch.fences);
}

EMULATE_OWN inline void watch_block() {
    Quiet quiet;
    watch.block_turn = ++watch.turn;
    watch.acquired.clear();
    memset(watch.fences, 0, sizeof watch.fences);
    memset(watch.published, 0, sizeof watch.published);
    fill_static();
}

EMULATE_OWN inline void watch_launch(const void *frame) {
    watch.launch_turn = ++watch.turn;
    watch.frame = uintptr_t(frame) - 4096;  // with what is local there
    watch.releases.clear();
    watch.waited = watch.gone = false;
}
EMULATE_OWN inline void end_watch() {
    watch.constants.clear();
    if (!overlapping) return;
    if (!watch.waited) fail(Site(), "no thread has called grid_wait");
    if (!watch.gone) fail(Site(), "no thread has called grid_go");
}
}  // namespace emulate

// ---------------------------------------------------------------------------------------------
// What the compiler calls.

#define EMULATE_HOOK extern "C" __attribute__((used)) EMULATE_OWN inline void
#define EMULATE_ACCESS(bytes)                                                                     \
    EMULATE_HOOK __tsan_read##bytes(void *at) {                                                   \
        emulate::touch_aligned(at, bytes, false, __builtin_return_address(0));                    \
    }                                                                                             \
    EMULATE_HOOK __tsan_write##bytes(void *at) {                                                  \
        emulate::touch_aligned(at, bytes, true, __builtin_return_address(0));                     \
    }
EMULATE_ACCESS(1)
EMULATE_ACCESS(2)
EMULATE_ACCESS(4)
EMULATE_ACCESS(8)
EMULATE_ACCESS(16)
#define EMULATE_UNALIGNED(bytes)                                                                  \
    EMULATE_HOOK __tsan_unaligned_read##bytes(void *at) {                                         \
        emulate::touch(at, bytes, emulate::Access::read, __builtin_return_address(0));            \
    }                                                                                             \
    EMULATE_HOOK __tsan_unaligned_write##bytes(void *at) {                                        \
        emulate::touch(at, bytes, emulate::Access::write, __builtin_return_address(0));           \
    }
EMULATE_UNALIGNED(2)
EMULATE_UNALIGNED(4)
EMULATE_UNALIGNED(8)
EMULATE_UNALIGNED(16)
EMULATE_HOOK __tsan_read_range(void *at, size_t bytes) {
    emulate::touch(at, bytes, emulate::Access::read, __builtin_return_address(0));
}
EMULATE_HOOK __tsan_write_range(void *at, size_t bytes) {
    emulate::touch(at, bytes, emulate::Access::write, __builtin_return_address(0));
}
#define EMULATE_COPY extern "C" __attribute__((used)) EMULATE_OWN inline void *
EMULATE_COPY __tsan_memcpy(void *to, const void *from, size_t bytes) {
    emulate::touch(from, bytes, emulate::Access::read, __builtin_return_address(0));
    emulate::touch(to, bytes, emulate::Access::write, __builtin_return_address(0));
    return memcpy(to, from, bytes);
}
EMULATE_COPY __tsan_memmove(void *to, const void *from, size_t bytes) {
    emulate::touch(from, bytes, emulate::Access::read, __builtin_return_address(0));
    emulate::touch(to, bytes, emulate::Access::write, __builtin_return_address(0));
    return memmove(to, from, bytes);
}
EMULATE_COPY __tsan_memset(void *to, int byte, size_t bytes) {
    emulate::touch(to, bytes, emulate::Access::write, __builtin_return_address(0));
    return memset(to, byte, bytes);
}
EMULATE_HOOK __tsan_vptr_update(void **, void *) {}
EMULATE_HOOK __tsan_vptr_read(void **) {}
EMULATE_HOOK __tsan_func_entry(void *) {}
EMULATE_HOOK __tsan_func_exit() {}
EMULATE_HOOK __tsan_init() {}

// Of -fsanitize=alignment: a vector may be taken apart before the functions above see it.
struct EmulateMismatch {
    const char *file;
    uint32_t line, column;
};
EMULATE_HOOK __ubsan_handle_type_mismatch_v1(EmulateMismatch *where, uintptr_t) {
    if (!emulate::current) return;
    emulate::fail(emulate::Site{where->file, int(where->line)}, "an access that is not aligned");
}
