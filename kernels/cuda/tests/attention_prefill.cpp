// attention_prefill.cu: tiles of rows on tensor cores.
#include "attention_prefill.cu"

#include "attention_tiles.h"

#define LAUNCH(S, NAME)                                                                           \
    static void launch(Tiles<S> &p) {                                                             \
        dim3 grid = dim3(p.h.heads(), unsigned(p.tile_row.size()), p.h.dim == 256 ? 2 : 1);       \
        size_t shared = std::min(768 * p.h.dim, 98304) + (sizeof(S) == 1 ? 512 : 0);              \
        CHECK(shared <= SHARED_LEAST, "prefill takes too much shared memory");                    \
        auto kernel = p.h.dim == 64    ? attention_prefill_##NAME##_d64                           \
                      : p.h.dim == 128 ? attention_prefill_##NAME##_d128                          \
                                       : attention_prefill_##NAME##_d256;                         \
        EMULATE(kernel, grid, dim3(128), shared, TILES_ARGUMENTS(p));                             \
    }
LAUNCH(bf16, bf16)
LAUNCH(__half, f16)
LAUNCH(e4m3, e4m3)
LAUNCH(q8, q8)

template <typename KV>
void prefill(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences, int tile) {
    Tiles<KV> p(h, keys, sight, sequences);
    p.cut(tile);
    launch(p);
    p.check("attention_prefill");
}

template <typename KV> void prefills(int turn) {
    const vector<Sequence> ragged = {{1, 1},   {5, 5},     {64, 64}, {63, 63}, {130, 65},
                                     {300, 5}, {257, 129}, {200, 1}, {100, 36}};
    for (int dim : {64, 128, 256}) {
        for (int window : {0, 1, 16, 100}) {
            bool wide = turn++ % 2;
            float softcap = SOFTCAPS[turn % 3];
            Sinks sinks = SINKS[(turn + dim / 64) % 5];
            Heads h = {dim,    wide ? 3 : 2, window ? 1 : 2, wide ? 32 : 16,
                       window, softcap,      sinks};
            prefill<KV>(h, Keys::paged, Sight::causal, ragged, 128);
        }
        turn++;
        for (int group : {1, 4, 7, 8, 12}) {
            if (dim == 256 && group > 4) continue;
            Heads h = {dim, group, 1, 16, 0, 0, SINKS[(group + turn) % 5]};
            prefill<KV>(h, Keys::paged, Sight::causal, {{70, 5}, {64, 64}}, 64);
        }
        absent_sinks<KV>("attention_prefill", dim, launch);
        if (sizeof(KV) == 1) continue; // bytes are always paged
        prefill<KV>({dim, 1, 2, 16, 0}, Keys::plain, Sight::all,
                    {{1, 1}, {63, 63}, {64, 64}, {65, 65}, {200, 200}, {150, 7}}, 128);
        prefill<KV>({dim, 2, 1, 24, 9}, Keys::paged, Sight::all, {{1, 1}, {150, 150}}, 128);
        prefill<KV>({dim, 2, 1, 16, 20}, Keys::plain, Sight::causal, {{1, 1}, {150, 100}}, 128);
    }
}

// The same rows, cut into other tiles, have the same bits.
template <typename KV> void cuts() {
    for (int dim : {64, 128, 256}) {
        for (int window : {0, 50}) {
            Heads h = {dim, 2, 1, 16, window, 0, window ? Sinks::among : Sinks::none};
            Tiles<KV> p(h, Keys::paged, Sight::causal, {{300, 180}});
            p.cut(128), launch(p);
            vector<bf16> whole = p.out;
            for (int rows : {7, 32, 50}) {
                p.out = poison<bf16>(whole.size());
                p.cut(rows), launch(p);
                CHECK(!memcmp(p.out.data(), whole.data(), 2 * whole.size()),
                      "attention_prefill, %s: other bits in tiles of %d", p.h.text().c_str(), rows);
            }
        }
    }
}

int main() {
    prefills<bf16>(0), prefills<__half>(1), prefills<e4m3>(1), prefills<q8>(0);
    cuts<bf16>(), cuts<q8>();
    return finish();
}
