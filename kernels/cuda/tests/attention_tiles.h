// What the tests of the kernels for tiles of rows have in common: a batch of sequences, and its
// truth.
#pragma once

#include "attention.h"

// `rows` new rows, the last of so many keys.
struct Sequence {
    int context, rows;
};

enum class Keys { paged, plain };
enum class Sight { causal, all };

// A batch of sequences, cut into tiles. Between the rows of two sequences is one of nobody.
template <typename KV> struct Tiles {
    Heads h;
    Keys keys;
    Sight sight;
    vector<Sequence> sequences;
    Store<KV> store;
    vector<float> sinks;
    // Of every sequence; a table is the first slot where keys are plain.
    vector<int> table, start;
    vector<int> tile_row, tile_rows, tile_position, tile_table, tile_keys;
    int rows = 2, tile_most = 0;
    vector<bf16> q, out;

    Tiles(const Heads &h, Keys keys, Sight sight, const vector<Sequence> &sequences)
        : h(h), keys(keys), sight(sight), sequences(sequences),
          store(blocks_of(h, sequences), h.block_len, h.kv_heads, h.dim), sinks(sinks_of(h)) {
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
                    truth(&q[at], store, slots, head / h.group, h.softcap,
                          sink_of(sinks, head)));
        }
    }
};

// The arguments that both kernels share.
#define TILES_ARGUMENTS(p)                                                                        \
    (p).out.data(), (p).q.data(), (p).store.k.data(), (p).store.v.data(),                         \
        (p).store.k_scales.data(), (p).store.v_scales.data(), (p).tile_row.data(),                \
        (p).tile_rows.data(), (p).tile_position.data(), (p).tile_table.data(),                    \
        (p).tile_keys.data(), (p).keys == Keys::paged ? (p).store.tables.data() : nullptr,        \
        pointer_to((p).sinks), (p).h.heads(), (p).h.kv_heads, (p).h.block_len, (p).h.scale(),     \
        (p).h.softcap, (p).h.window, (p).sight == Sight::causal

// The same rows with sinks of minus infinity have the bits that they have without.
template <typename KV>
void absent_sinks(const std::string &kernel, int dim, void (*launch)(Tiles<KV> &)) {
    Tiles<KV> p({dim, 2, 1, 16, 50}, Keys::paged, Sight::causal, {{1, 1}, {90, 70}});
    p.cut(64), launch(p);
    vector<bf16> without = p.out;
    p.out = poison<bf16>(without.size()), p.sinks.assign(p.h.heads(), -INFINITY);
    launch(p);
    CHECK(!memcmp(p.out.data(), without.data(), 2 * without.size()),
          "%s, %s: other bits with sinks of minus infinity", kernel.c_str(), p.h.text().c_str());
}
