// attention_any.cu: tiles of rows without tensor cores.
#include "attention_any.cu"

#include "attention_tiles.h"

#define LAUNCH(S, NAME)                                                                           \
    static void launch(Tiles<S> &p) {                                                             \
        dim3 grid = dim3(p.tile_most, unsigned(p.h.heads()), unsigned(p.tile_row.size()));        \
        EMULATE(attention_any_##NAME, grid, dim3(32), 0, TILES_ARGUMENTS(p), p.h.dim);            \
    }
LAUNCH(bf16, bf16)
LAUNCH(__half, f16)
LAUNCH(e4m3, e4m3)
LAUNCH(q8, q8)

template <typename KV>
void any(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences) {
    Tiles<KV> p(h, keys, sight, sequences);
    p.cut(64);
    launch(p);
    p.check("attention_any");
}

template <typename KV> void anys(int turn) {
    const int windows[4] = {0, 1, 16, 100};
    for (int dim : {40, 64, 80, 96, 128, 256, 33}) {
        int window = windows[turn++ % 4], other = windows[turn % 4];
        Sinks sinks = SINKS[turn % 5];
        any<KV>({dim, 2, 1, window ? 16 : 24, window, SOFTCAPS[turn % 3], sinks}, Keys::paged,
                Sight::causal, {{1, 1}, {5, 5}, {33, 33}, {130, 9}, {257, 3}});
        if (sizeof(KV) == 1) continue;
        any<KV>({dim, 1, 2, 16, other}, Keys::plain, Sight::all, {{1, 1}, {33, 33}, {130, 3}});
    }
    for (Sinks sinks : SINKS) {
        any<KV>({80, 4, 1, 16, 0, 0, sinks}, Keys::paged, Sight::causal, {{1, 1}, {70, 9}});
    }
    absent_sinks<KV>("attention_any", 80, launch);
}

int main() {
    anys<bf16>(0), anys<__half>(2), anys<e4m3>(1), anys<q8>(3);
    return finish();
}
