// SPDX-License-Identifier: MIT
/// @file  Cascade: a shared prefix attended to once agrees with every sequence on its own, in the double twin.

#include <fovea/position/rope_table.hpp>
#include <fovea/softmax/cascade.hpp>
#include <fovea/softmax/reference.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

/// prefix + own of one sequence, [1, G, m, .].
tensor joined(const tensor& prefix, const tensor& own) {
  tensor all(own.type(), 1, own.heads(), prefix.length() + own.length(), own.width());
  for (isize h = 0; h < own.heads(); ++h)
    for (isize j = 0; j < all.length(); ++j)
      for (isize c = 0; c < own.width(); ++c)
        all.set(0, h, j, c, j < prefix.length() ? prefix.get(0, h, j, c) : own.get(0, h, j - prefix.length(), c));
  return all;
}

struct sequences {
  tensor prefix_k, prefix_v;
  std::vector<tensor> k, v;
  std::vector<kv_sequence> kv;
  std::vector<std::int32_t> cu{0};
};

}  // namespace

TEST_CASE("cascade: random prefixes, sequences, layouts and scores agree with each sequence on its own") {
  const threads two(2);
  for (std::uint64_t seed = 1; seed <= 80; ++seed) {
    test::random r(seed);
    const isize G = r.integer(1, 2), H = G * r.integer(1, 4), d = 2 * r.integer(1, 30), e = r.integer(1, 40),
                count = r.integer(1, 5), P = r.coin(0.1) ? 0 : r.integer(1, 200);
    const auto type = static_cast<dtype>(r.integer(0, 3));
    const bool packed = r.coin();
    const isize n = r.coin(0.4) ? 1 : r.integer(1, 40);
    sequences x;
    x.prefix_k = test::normal(r, type, 1, G, P, d), x.prefix_v = test::normal(r, type, 1, G, P, e);
    for (isize s = 0; s < count; ++s) {
      const isize rows = packed ? r.integer(0, 30) : n;
      x.cu.push_back(static_cast<std::int32_t>(x.cu.back() + rows));
      const isize own = rows + r.integer(0, 60);
      x.k.push_back(test::normal(r, type, 1, G, own, d)), x.v.push_back(test::normal(r, type, 1, G, own, e));
    }
    for (std::size_t s = 0; s < x.k.size(); ++s) x.kv.push_back(sequence_of(x.k[s], x.v[s]));
    const isize B = packed ? 1 : count, rows = packed ? x.cu.back() : n;
    const test::layout l = test::layouts[r.integer(0, 3)];
    const tensor q = test::normal(r, type, B, H, rows, d, l);
    tensor out = test::unwritten(type, B, H, rows, e, test::layouts[seed % 4]),
           lse = test::unwritten(type == dtype::f64 ? dtype::f64 : dtype::f32, B, H, rows, 1);

    softmax_attention m{.mask = causal{}};
    std::vector<float> sinks(static_cast<std::size_t>(H), 0.7F), slopes(static_cast<std::size_t>(H), 0.1F);
    if (r.coin(0.3)) m.sinks = sinks.data(), m.sink_count = H;
    const isize which = r.integer(0, 3);
    if (which == 1) m.score = softcap{3};
    if (which == 2) m.score = alibi{slopes.data(), H};
    const rope_table turn({.width = d, .positions = 400, .f64 = true});
    const rope view = turn;
    std::vector<std::int32_t> positions;
    if (r.coin(0.3)) m.turn = &view;
    if (m.turn != nullptr && r.coin())
      for (isize i = 0; i < B * rows; ++i) positions.push_back(static_cast<std::int32_t>(r.integer(0, 399)));
    CAPTURE(seed, packed, count, P, G, H, d, e, which, fovea::name_of(type), m.turn != nullptr, positions.empty());
    sequence_options o;
    o.lse = lse;
    if (packed) o.cu_q = x.cu;
    o.positions = positions;
    const kv_sequence prefix = sequence_of(x.prefix_k, x.prefix_v);
    cascade(seed % 2 == 0 ? exec_ref(two) : exec_ref(serial), m, q, prefix, x.kv, out, o);

    for (isize s = 0; s < count; ++s) {
      const isize first = packed ? x.cu[static_cast<std::size_t>(s)] : 0,
                  own = packed ? x.cu[static_cast<std::size_t>(s) + 1] - first : n, b = packed ? 0 : s;
      if (own == 0) continue;
      const tensor k = joined(x.prefix_k, x.k[static_cast<std::size_t>(s)]),
                   v = joined(x.prefix_v, x.v[static_cast<std::size_t>(s)]);
      tensor rows_q(dtype::f64, 1, H, own, d), want = test::unwritten(dtype::f64, 1, H, own, e),
                                               want_lse = test::unwritten(dtype::f64, 1, H, own, 1);
      for (isize h = 0; h < H; ++h)
        for (isize i = 0; i < own; ++i) {
          std::vector<double> row(static_cast<std::size_t>(d));
          for (isize c = 0; c < d; ++c) row[static_cast<std::size_t>(c)] = q.get(b, h, first + i, c);
          if (m.turn != nullptr) {
            const isize at = (packed ? 0 : s * n) + first + i;
            rotate(view, positions.empty() ? k.length() - own + i : positions[static_cast<std::size_t>(at)],
                   row.data());
          }
          for (isize c = 0; c < d; ++c) rows_q.set(0, h, i, c, row[static_cast<std::size_t>(c)]);
        }
      softmax_attention plain = m;  // the twin takes rows that are turned
      plain.turn = nullptr;
      reference::prefill(plain, {rows_q, k, v, want, want_lse, {}});
      const dtype acc = type == dtype::f64 ? dtype::f64 : dtype::f32;
      tensor got(out.type(), 1, H, own, e), got_lse(lse.type(), 1, H, own, 1);
      for (isize h = 0; h < H; ++h)
        for (isize i = 0; i < own; ++i) {
          for (isize c = 0; c < e; ++c) got.set(0, h, i, c, out.get(b, h, first + i, c));
          got_lse.set(0, h, i, 0, lse.get(b, h, first + i, 0));
        }
      CHECK_CLOSE(got.values(), want.values(), {.c = 256, .acc = acc, .stored = type});
      CHECK_CLOSE(got_lse.values(), want_lse.values(), {.c = 256, .acc = acc, .scale = 4});
    }
    CHECK(out.guards_intact());
  }
}

TEST_CASE("cascade: pages for the prefix, a store for each sequence, scratch of the caller's") {
  test::random r(3);
  const kv_shape shape{.heads = 2, .d = 16, .e = 16, .type = dtype::f32};
  paged_pool pool(shape, 8, 64);
  page_table prefix, own[3];
  const tensor pk = test::normal(r, dtype::f32, 1, 2, 100, 16), pv = test::normal(r, dtype::f32, 1, 2, 100, 16);
  pool.append(prefix, pk, pv);
  std::vector<kv_sequence> kv;
  for (page_table& t : own) {
    pool.append(t, test::normal(r, dtype::f32, 1, 2, 20, 16), test::normal(r, dtype::f32, 1, 2, 20, 16));
    kv.push_back(pool.view(t));
  }
  const tensor q = test::normal(r, dtype::f32, 3, 4, 1, 16);
  tensor once = test::unwritten(dtype::f32, 3, 4, 1, 16), again = once;
  const softmax_attention m{.mask = causal{}};
  cascade(serial, m, q, pool.view(prefix), kv, once);
  buffer memory(cascade_workspace_size(m, q, pool.view(prefix), kv, again, 1));
  cascade(serial, m, q, pool.view(prefix), kv, again, {.workspace = memory.span()});
  CHECK_SAME_BITS(once, again);
  CHECK_SAYS(test::refusal(
                 [&] { cascade(serial, m, q, pool.view(prefix), kv, again, {.workspace = memory.span().first(9)}); }),
             "workspace holds 9 bytes");
}

TEST_CASE("cascade: what does not fit is refused with a sentence") {
  test::random r(4);
  const tensor pk = test::normal(r, dtype::f32, 1, 2, 50, 8), k = test::normal(r, dtype::f32, 1, 2, 10, 8),
               three = test::normal(r, dtype::f32, 1, 3, 50, 8), q = test::normal(r, dtype::f32, 1, 2, 4, 8);
  tensor out = test::unwritten(dtype::f32, 1, 2, 4, 8);
  std::vector<kv_sequence> kv{sequence_of(k, k)};
  const auto said = [&](const softmax_attention& m, const kv_sequence& prefix) {
    return test::refusal([&] { cascade(serial, m, q, prefix, kv, out); });
  };
  const kv_sequence prefix = sequence_of(pk, pk);
  CHECK_SAYS(said({.mask = window{.width = 20}}, prefix), "hides part of the prefix");
  CHECK_SAYS(said({.mask = causal{top_left}}, prefix), "hides part of the prefix");
  CHECK_SAYS(said({.mask = causal{}}, sequence_of(three, three)), "the prefix has 3 KV heads");
  const tensor wide = test::normal(r, dtype::f32, 1, 2, 50, 9);
  CHECK_SAYS(said({.mask = causal{}}, sequence_of(pk, wide)), "the prefix has keys 8 and values 9 wide");
  kv_sequence cut = prefix;
  cut.dropped = 3;
  CHECK_SAYS(said({.mask = causal{}}, cut), "has dropped 3 tokens");
  const rope_table small({.width = 8, .positions = 20});
  const rope view = small;
  CHECK_SAYS(said({.mask = causal{}, .turn = &view}, prefix), "table of 20 positions");
  CHECK(said({.mask = causal{}}, prefix) == "accepted");
}
