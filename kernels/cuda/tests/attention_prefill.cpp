// attention_prefill.cu: tiles of rows, on tensor cores and without.
#include "attention_prefill.cu"

#include "attention.h"

// `rows` new rows, the last of so many keys.
struct Sequence {
    int context, rows;
};

enum class Keys { paged, plain };
enum class Sight { causal, all };

// A batch of sequences, cut into tiles. Between the rows of two sequences is one of nobody.
template <typename KV> struct Prefill {
    Heads h;
    Keys keys;
    Sight sight;
    vector<Sequence> sequences;
    Store<KV> store;
    // Of every sequence; a table is the first slot where keys are plain.
    vector<int> table, start;
    vector<int> tile_row, tile_rows, tile_position, tile_table, tile_keys;
    int rows = 2, tile_most = 0;
    vector<bf16> q, out;

    Prefill(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences)
        : h(h), keys(keys), sight(sight), sequences(sequences),
          store(blocks_of(h, sequences), h.block_len, h.kv_heads, h.dim) {
        for (const Sequence &s : sequences) {
            table.push_back(store.add(s.context, first_key(s.context - s.rows)));
            start.push_back(rows), rows += s.rows + 1;
        }
        if (keys == Keys::plain) lay_out();
        q = randoms<bf16>(size_t(rows) * h.heads() * h.dim), out = poison<bf16>(q.size());
    }

    static int blocks_of(const Heads &h, const vector<Sequence> &sequences) {
        int blocks = 4;
        for (const Sequence &s : sequences) blocks += s.context / h.block_len + 2;
        return blocks;
    }
    int first_key(int position) const {
        return sight == Sight::causal ? h.first_key(position) : 0;
    }

    // Moves the keys of every sequence into rows of their own, with NaN between sequences.
    void lay_out() {
        vector<KV> k, v;
        auto gap = [&] { k.resize(k.size() + store.width, poison<KV>(1)[0]); };
        for (size_t i = 0; i < sequences.size(); i++) {
            gap();
            int first = int(k.size() / store.width);
            for (int key = 0; key < sequences[i].context; key++) {
                if (key < first_key(sequences[i].context - sequences[i].rows)) {
                    gap();
                    continue;
                }
                size_t from = size_t(store.slot(table[i], key)) * store.width;
                k.insert(k.end(), &store.k[from], &store.k[from] + store.width);
                v.resize(k.size() - store.width, poison<KV>(1)[0]);
                v.insert(v.end(), &store.v[from], &store.v[from] + store.width);
            }
            table[i] = first;
        }
        gap(), v.resize(k.size(), poison<KV>(1)[0]);
        store.k = k, store.v = v;
    }

    void cut(int most) {
        tile_row.clear(), tile_rows.clear(), tile_position.clear(), tile_table.clear();
        tile_keys.clear(), tile_most = most;
        for (size_t i = 0; i < sequences.size(); i++) {
            const Sequence &s = sequences[i];
            for (int row = 0; row < s.rows; row += most) {
                tile_row.push_back(start[i] + row);
                tile_rows.push_back(std::min(most, s.rows - row));
                tile_position.push_back(s.context - s.rows + row);
                tile_table.push_back(table[i]), tile_keys.push_back(s.context);
            }
        }
    }

    void check(const std::string &kernel) const {
        vector<char> written(rows);
        for (size_t i = 0; i < sequences.size(); i++) {
            for (int row = 0; row < sequences[i].rows; row++) {
                written[start[i] + row] = 1;
                check_row(kernel, int(i), row);
            }
        }
        check_others(kernel, out, written);
    }
    void check_row(const std::string &kernel, int sequence, int row) const {
        const Sequence &s = sequences[sequence];
        int position = s.context - s.rows + row, first = table[sequence];
        auto slots = seen(first_key(position), sight == Sight::causal ? position + 1 : s.context,
                          [&](int key) {
                              return keys == Keys::paged ? store.slot(first, key) : first + key;
                          });
        for (int head = 0; head < h.heads(); head++) {
            size_t at = (size_t(start[sequence] + row) * h.heads() + head) * h.dim;
            compare(kernel,
                    h.text() + ::text(", row %d of %d of %d keys, head %d", row, s.rows, s.context,
                                      head),
                    &out[at],
                    truth(&q[at], store, slots, head / h.group, h.softcap));
        }
    }
};

// The arguments that prefill and any share.
#define PREFILL_ARGUMENTS(p)                                                                      \
    (p).out.data(), (p).q.data(), (p).store.k.data(), (p).store.v.data(),                         \
        (p).store.k_scales.data(), (p).store.v_scales.data(), (p).tile_row.data(),                \
        (p).tile_rows.data(), (p).tile_position.data(), (p).tile_table.data(),                    \
        (p).tile_keys.data(), (p).keys == Keys::paged ? (p).store.tables.data() : nullptr,        \
        (p).h.heads(), (p).h.kv_heads, (p).h.block_len, (p).h.scale(), (p).h.softcap,             \
        (p).h.window, (p).sight == Sight::causal

#define LAUNCHES(S, NAME)                                                                         \
    static void launch_prefill(Prefill<S> &p) {                                                   \
        dim3 grid = dim3(p.h.heads(), unsigned(p.tile_row.size()), p.h.dim == 256 ? 2 : 1);       \
        size_t shared = std::min(768 * p.h.dim, 98304) + (sizeof(S) == 1 ? 512 : 0);              \
        CHECK(shared <= SHARED_LEAST, "prefill takes too much shared memory");                    \
        auto kernel = p.h.dim == 64    ? attention_prefill_##NAME##_d64                           \
                      : p.h.dim == 128 ? attention_prefill_##NAME##_d128                          \
                                       : attention_prefill_##NAME##_d256;                         \
        EMULATE(kernel, grid, dim3(128), shared, PREFILL_ARGUMENTS(p));                           \
    }                                                                                             \
    static void launch_any(Prefill<S> &p) {                                                       \
        dim3 grid = dim3(p.tile_most, unsigned(p.h.heads()), unsigned(p.tile_row.size()));        \
        EMULATE(attention_any_##NAME, grid, dim3(32), 0, PREFILL_ARGUMENTS(p), p.h.dim);          \
    }
LAUNCHES(bf16, bf16)
LAUNCHES(__half, f16)
LAUNCHES(e4m3, e4m3)
LAUNCHES(q8, q8)

template <typename KV>
void prefill(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences, int tile) {
    Prefill<KV> p(h, keys, sight, sequences);
    p.cut(tile);
    launch_prefill(p);
    p.check("attention_prefill");
}
template <typename KV>
void any(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences) {
    Prefill<KV> p(h, keys, sight, sequences);
    p.cut(64);
    launch_any(p);
    p.check("attention_any");
}

template <typename KV> void prefills(int turn) {
    const vector<Sequence> ragged = {{1, 1},   {5, 5},     {64, 64}, {63, 63}, {130, 65},
                                     {300, 5}, {257, 129}, {200, 1}, {100, 36}};
    for (int dim : {64, 128, 256}) {
        for (int window : {0, 1, 16, 100}) {
            bool wide = turn++ % 2;
            float softcap = SOFTCAPS[turn % 3];
            Heads h = {dim, wide ? 3 : 2, window ? 1 : 2, wide ? 32 : 16, window, softcap};
            prefill<KV>(h, Keys::paged, Sight::causal, ragged, 128);
        }
        turn++;
        for (int group : {1, 4, 7, 8, 12}) {
            if (dim == 256 && group > 4) continue;
            prefill<KV>({dim, group, 1, 16, 0}, Keys::paged, Sight::causal, {{70, 5}, {64, 64}},
                        64);
        }
        if (sizeof(KV) == 1) continue; // bytes are always paged
        prefill<KV>({dim, 1, 2, 16, 0}, Keys::plain, Sight::all,
                    {{1, 1}, {63, 63}, {64, 64}, {65, 65}, {200, 200}, {150, 7}}, 128);
        prefill<KV>({dim, 2, 1, 24, 9}, Keys::paged, Sight::all, {{1, 1}, {150, 150}}, 128);
        prefill<KV>({dim, 2, 1, 16, 20}, Keys::plain, Sight::causal, {{1, 1}, {150, 100}}, 128);
    }
}

template <typename KV> void anys(int turn) {
    const int windows[4] = {0, 1, 16, 100};
    for (int dim : {40, 64, 80, 96, 128, 256, 33}) {
        int window = windows[turn++ % 4], other = windows[turn % 4];
        any<KV>({dim, 2, 1, window ? 16 : 24, window, SOFTCAPS[turn % 3]}, Keys::paged,
                Sight::causal,
                {{1, 1}, {5, 5}, {33, 33}, {130, 9}, {257, 3}});
        if (sizeof(KV) == 1) continue;
        any<KV>({dim, 1, 2, 16, other}, Keys::plain, Sight::all, {{1, 1}, {33, 33}, {130, 3}});
    }
}

// The same rows, cut into other tiles, have the same bits.
template <typename KV> void cuts() {
    for (int dim : {64, 128, 256}) {
        for (int window : {0, 50}) {
            Prefill<KV> p({dim, 2, 1, 16, window}, Keys::paged, Sight::causal, {{300, 180}});
            p.cut(128), launch_prefill(p);
            vector<bf16> whole = p.out;
            for (int rows : {7, 32, 50}) {
                p.out = poison<bf16>(whole.size());
                p.cut(rows), launch_prefill(p);
                CHECK(!memcmp(p.out.data(), whole.data(), 2 * whole.size()),
                      "attention_prefill, %s: other bits in tiles of %d", p.h.text().c_str(), rows);
            }
        }
    }
}

int main() {
    prefills<bf16>(0), prefills<__half>(1), prefills<e4m3>(1), prefills<q8>(0);
    anys<bf16>(0), anys<__half>(2), anys<e4m3>(1), anys<q8>(3);
    cuts<bf16>(), cuts<q8>();
    return finish();
}
