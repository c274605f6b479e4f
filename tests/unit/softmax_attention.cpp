// SPDX-License-Identifier: MIT
/// @file  softmax_attention beyond the laws' sizes: random problems against the twin, long splits, many blocks, poison behind masks.

#include <algorithm>
#include <cmath>

#include <fovea/mask/tree.hpp>
#include <fovea/softmax.hpp>
#include <fovea/softmax/reference.hpp>
#include <fovea/softmax/reference_skip.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

struct setting {
  softmax_attention m;
  std::vector<std::uint8_t> table;
  std::vector<float> bias, sinks, slopes;
  std::vector<std::int32_t> cu_q, cu_k, lengths;
  draft_tree drafts;
};

std::vector<std::int32_t> cuts(test::random& r, isize sequences, isize total) {
  std::vector<std::int32_t> c{0};
  for (isize s = 1; s < sequences; ++s) c.push_back(static_cast<std::int32_t>(r.integer(c.back(), total)));
  c.push_back(static_cast<std::int32_t>(total));
  return c;
}

mask random_mask(test::random& r, const shape& s, setting& x) {
  const auto table = [&](isize rows, isize columns) {
    x.table.resize(static_cast<std::size_t>(s.H * rows * columns));
    const double density = r.uniform();
    for (auto& y : x.table) y = r.coin(density);
    return x.table.data();
  };
  const alignment_of_rows align = r.coin() ? bottom_right : r.coin() ? top_left : at_offset(r.integer(-20, 60));
  switch (r.integer(0, 12)) {
    case 0: return no_mask{};
    case 1: return causal{align};
    case 2: return window{r.integer(1, 90), r.coin() ? r.integer(0, 20) : 0, align};
    case 3: return two_sided{r.integer(0, 60), r.integer(0, 60), align};
    case 4: return boolean_mask{table(s.n, s.m), 0, r.coin() ? 0 : s.n * s.m, s.m};
    case 5: {
      block_mask b{.block_q = r.integer(1, 40), .block_k = r.integer(1, 40), .per_kv_head = r.coin()};
      const isize rows = ceil_div(s.n, b.block_q), columns = ceil_div(s.m, b.block_k);
      b.table = table(rows, columns), b.row_stride = columns, b.head_stride = rows * columns;
      return b;
    }
    case 6:
      x.cu_q = cuts(r, 4, s.n), x.cu_k = cuts(r, 4, s.m);
      return packed{x.cu_q.data(), x.cu_k.data(), 4, r.coin()};
    case 7: return prefix_lm{r.integer(0, s.m), nullptr, align};
    case 8: return chunked_local{r.integer(1, 90), align};
    case 9:
      x.cu_q = cuts(r, 3, s.n), x.cu_k = cuts(r, 3, s.m);
      return documents{packed{x.cu_q.data(), x.cu_k.data(), 3}, window{r.integer(1, 60), r.integer(0, 3), align}};
    case 10: {
      if (s.n > s.m) return causal{};
      std::vector<std::int32_t> parents;
      for (isize i = 0; i < s.n; ++i) parents.push_back(static_cast<std::int32_t>(r.integer(-1, i - 1)));
      x.drafts = draft_tree(parents.data(), s.n);
      return tree{&x.drafts};
    }
    case 11:
      for (isize b = 0; b < s.B; ++b) x.lengths.push_back(static_cast<std::int32_t>(r.integer(0, s.m)));
      return both{key_lengths{x.lengths.data()}, two_sided{r.integer(0, 90), r.integer(0, 90), align}};
    default: return both{causal{}, boolean_mask{table(s.n, s.m), 0, 0, s.m}};
  }
}

void random_scores(test::random& r, const shape& s, setting& x) {
  const auto fill = [&](std::vector<float>& to, isize count, double deviation) {
    to.resize(static_cast<std::size_t>(count));
    for (float& y : to) y = static_cast<float>(deviation * r.normal());
  };
  if (r.coin(0.3)) fill(x.sinks, s.H, 2.0), x.m.sinks = x.sinks.data();
  if (r.coin(0.3)) x.m.scale = r.uniform(0.05, 0.4);
  const isize which = r.integer(0, 7);
  if (which == 0) x.m.score = softcap{r.uniform(1.0, 20.0)};
  if (which == 1) fill(x.slopes, s.H, 0.1), x.m.score = alibi{x.slopes.data()};
  if (which == 3) fill(x.bias, s.H * 41, 1.0), x.m.score = relative_bias{x.bias.data(), 30, 10, s.H};
  if (which == 4)
    fill(x.slopes, s.H, 0.1),
        x.m.score = chain{softcap{r.uniform(1.0, 20.0)}, alibi{x.slopes.data(), s.H, at_offset(r.integer(0, 90))}};
  if (which == 2) {
    fill(x.bias, s.n * s.m, 1.0);
    for (float& y : x.bias)
      if (r.coin(0.1)) y = -std::numeric_limits<float>::infinity();
    x.m.score = additive_bias{x.bias.data(), 0, 0, s.m};
  }
}

struct answer {
  tensor out, lse;
  answer(const shape& s, dtype out_type, dtype lse_type, test::layout l)
      : out(test::unwritten(out_type, s.B, s.H, s.n, s.e, l)), lse(test::unwritten(lse_type, s.B, s.H, s.n, 1, l)) {}
};

/// Runs the problem both ways and compares.
void agrees(const softmax_attention& m, const shape& s, std::uint64_t seed, exec_ref exec = serial) {
  test::random r(seed);
  const auto layout = [&] { return test::layouts[r.integer(0, 3)]; };
  const tensor q = test::normal(r, s.type, s.B, s.H, s.n, s.d, layout()),
               k = test::normal(r, s.type, s.B, s.G, s.m, s.d, layout()),
               v = test::normal(r, s.type, s.B, s.G, s.m, s.e, layout());
  answer want(s, dtype::f64, dtype::f64, test::layout::bhnd),
      got(s, s.type, s.type == dtype::f64 ? dtype::f64 : dtype::f32, layout());
  reference::prefill(m, {q, k, v, want.out, want.lse, {}});
  prefill(exec, m, q, k, v, got.out, {.lse = got.lse, .gates = {}});
  CAPTURE(seed, s.B, s.H, s.G, s.n, s.m, s.d, s.e, fovea::name_of(s.type));
  const dtype acc = s.type == dtype::f64 ? dtype::f64 : dtype::f32;
  CHECK_CLOSE(got.out.values(), want.out.values(), {.c = 128, .acc = acc, .stored = s.type});
  CHECK_CLOSE(got.lse.values(), want.lse.values(), {.c = 128, .acc = acc, .scale = 4});
  CHECK(got.out.guards_intact());
  CHECK(got.lse.guards_intact());
}

shape random_shape(test::random& r) {
  shape s;
  s.B = r.integer(1, 2), s.G = r.integer(1, 3), s.H = s.G * r.integer(1, 4);
  s.n = r.coin(0.3) ? r.integer(1, 3) : r.integer(1, 200), s.m = r.integer(1, 300), s.d = r.integer(1, 100),
  s.e = r.integer(1, 100);
  s.type = static_cast<dtype>(r.integer(0, 3));
  return s;
}

/// How many numbers change of rows that see none of some keys when those are NaN and infinite.
isize reached_by_poison(const softmax_attention& m, const shape& s, test::random& r) {
  const tensor q = test::normal(r, s.type, s.B, s.H, s.n, s.d);
  tensor k = test::normal(r, s.type, s.B, s.G, s.m, s.d), v = test::normal(r, s.type, s.B, s.G, s.m, s.e);
  const dtype lse_type = s.type == dtype::f64 ? dtype::f64 : dtype::f32;
  answer clean(s, s.type, lse_type, test::layout::bhnd), poisoned(s, s.type, lse_type, test::layout::bhnd);
  prefill(serial, m, q, k, v, clean.out, {.lse = clean.lse, .gates = {}});
  std::vector<bool> bad(static_cast<std::size_t>(s.m));
  for (isize j = 0; j < s.m; ++j) {
    if (!r.coin(0.03)) continue;
    bad[static_cast<std::size_t>(j)] = true;
    for (isize g = 0; g < s.G; ++g) {
      for (isize c = 0; c < s.d; ++c) k.set(0, g, j, c, r.coin() ? HUGE_VAL : std::nan(""));
      for (isize c = 0; c < s.e; ++c) v.set(0, g, j, c, r.coin() ? -HUGE_VAL : std::nan(""));
    }
  }
  prefill(serial, m, q, k, v, poisoned.out, {.lse = poisoned.lse, .gates = {}});
  isize wrong = 0;
  for (isize h = 0; h < s.H; ++h)
    for (isize i = 0; i < s.n; ++i) {
      mask_site at = m.site(s, 0);
      at.h = h;
      bool reached = false;
      for (isize j = 0; j < s.m; ++j)
        reached = reached || (bad[static_cast<std::size_t>(j)] && m.mask.visible(at, i, j));
      if (reached) continue;
      for (isize c = 0; c < s.e; ++c) wrong += clean.out.get(0, h, i, c) != poisoned.out.get(0, h, i, c);
      wrong += clean.lse.get(0, h, i, 0) != poisoned.lse.get(0, h, i, 0);
    }
  return wrong;
}

}  // namespace

TEST_CASE("softmax: random problems agree with the twin") {
  const threads two(2);
  for (std::uint64_t seed = 1; seed <= 160; ++seed) {
    test::random r(seed);
    const shape s = random_shape(r);
    setting x;
    x.m.mask = random_mask(r, s, x);
    random_scores(r, s, x);
    if (seed % 2 == 0)
      agrees(x.m, s, seed, two);
    else
      agrees(x.m, s, seed);
  }
}

TEST_CASE("softmax: a NaN or infinity behind any mask reaches no row that cannot see it") {
  for (std::uint64_t seed = 200; seed < 280; ++seed) {
    test::random r(seed);
    shape s = random_shape(r);
    s.B = 1;
    setting x;
    x.m.mask = random_mask(r, s, x);
    CAPTURE(seed, s.H, s.G, s.n, s.m, s.d, s.e, fovea::name_of(s.type));
    CHECK(reached_by_poison(x.m, s, r) == 0);
  }
}

TEST_CASE("softmax: rows that see a band of keys agree with the twin, and what lies beside it reaches none") {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    test::random r(seed);
    shape s = random_shape(r);
    s.B = 1, s.n = r.integer(17, 300), s.m = r.integer(17, 400), s.type = seed % 3 == 0 ? dtype::f64 : dtype::f32;
    if (r.coin(0.7)) s.e = r.coin(0.8) ? 64 : 128;  // outputs that are kept as rows
    if (r.coin(0.3)) s.n = r.coin() ? 128 : 192;    // heads that end with a tile
    const alignment_of_rows align = r.coin() ? bottom_right : at_offset(r.integer(-80, 200));
    const softmax_attention m{.mask = r.coin(0.2)   ? mask(causal{align})
                                      : r.coin(0.6) ? mask(window{r.integer(14, 220), 0, align})
                                                    : mask(two_sided{r.integer(0, 150), r.integer(0, 90), align})};
    CAPTURE(seed, s.H, s.G, s.n, s.m, s.d, s.e);
    agrees(m, s, seed);
    CHECK(reached_by_poison(m, s, r) == 0);
  }
}

TEST_CASE("softmax: a NaN that a row sees is not hidden from it") {
  for (const isize n : {1, 40}) {
    test::random r(3);
    const tensor q = test::normal(r, dtype::f32, 1, 2, n, 24), k = test::normal(r, dtype::f32, 1, 2, 50, 24);
    tensor v = test::normal(r, dtype::f32, 1, 2, 50, 24), out = test::unwritten(dtype::f32, 1, 2, n, 24);
    v.set(0, 1, 7, 5, std::nan(""));
    prefill(serial, softmax_attention{}, q, k, v, out);
    for (isize i = 0; i < n; ++i) {
      CHECK(std::isnan(out.get(0, 1, i, 5)));
      CHECK_FALSE(std::isnan(out.get(0, 0, i, 5)));
    }
  }
}

TEST_CASE("softmax: keys beyond one piece of a decode step, and beyond one block of a prefill") {
  std::vector<float> sinks{0.5F, -1.0F, 8.0F, 2.0F};
  agrees({}, {1, 4, 1, 1, 9001, 64, 64, dtype::f32}, 1);
  agrees({.mask = causal{}, .sinks = sinks.data()}, {1, 4, 2, 2, 8300, 40, 80, dtype::f16}, 2);
  agrees({.mask = window{.width = 5000, .first = 4}}, {1, 2, 2, 1, 12289, 32, 32, dtype::f64}, 3);
  agrees({.mask = window{.width = 64, .first = 4}}, {1, 2, 1, 2, 20000, 16, 16, dtype::bf16}, 4);
  agrees({.mask = causal{}}, {1, 6, 2, 700, 700, 64, 64, dtype::f32}, 5);
  agrees({}, {1, 2, 1, 257, 1500, 80, 96, dtype::bf16}, 6);
  agrees({.mask = causal{}, .sinks = sinks.data()}, {1, 4, 4, 300, 1100, 128, 128, dtype::f32}, 7);
  agrees({.mask = window{.width = 200, .first = 3}}, {1, 1, 1, 1500, 1500, 24, 24, dtype::f32}, 8);
}

TEST_CASE("softmax: a sink of -infinity is none, also for rows that see nothing") {
  std::vector<float> sinks{-std::numeric_limits<float>::infinity(), 0.5F};
  for (const dtype type : {dtype::f32, dtype::f64})
    for (const isize n : {2, 40}) agrees({.mask = causal{}, .sinks = sinks.data()}, {1, 2, 2, n, 1, 8, 8, type}, 9);
  agrees({.mask = causal{}, .sinks = sinks.data()}, {1, 2, 1, 60, 300, 16, 16, dtype::f32}, 10);
  agrees({.mask = causal{}, .sinks = sinks.data()}, {1, 2, 1, 1, 5000, 16, 16, dtype::f32}, 11);
}

TEST_CASE("softmax: pieces of a decode step are cut by the keys alone: any number of threads gives the same bits") {
  test::random r(5);
  const shape s{2, 4, 2, 1, 9500, 48, 48, dtype::f32};
  const tensor q = test::normal(r, s.type, s.B, s.H, s.n, s.d), k = test::normal(r, s.type, s.B, s.G, s.m, s.d),
               v = test::normal(r, s.type, s.B, s.G, s.m, s.e);
  answer one(s, dtype::f32, dtype::f32, test::layout::bhnd), many(s, dtype::f32, dtype::f32, test::layout::bhnd);
  prefill(serial, softmax_attention{}, q, k, v, one.out, {.lse = one.lse, .gates = {}});
  for (const int count : {2, 3, 7}) {
    const threads pool(count);
    prefill(pool, softmax_attention{}, q, k, v, many.out, {.lse = many.lse, .gates = {}});
    CHECK_SAME_BITS(one.out, many.out);
    CHECK_SAME_BITS(one.lse, many.lse);
  }
}

namespace {

/// Sharp scores: a first key that many look for, and neighbours that look for each other.
void sharpen(tensor& q, tensor& k) {
  const auto wave = [](isize i, isize c) { return std::sin(static_cast<double>(i) / 40 + static_cast<double>(c)); };
  for (isize h = 0; h < q.heads(); ++h)
    for (isize i = 0; i < q.length(); ++i)
      for (isize c = 0; c < q.width(); ++c) q.set(0, h, i, c, 2.5 * q.get(0, h, i, c) + (c == 0 ? 6 : 3 * wave(i, c)));
  for (isize g = 0; g < k.heads(); ++g)
    for (isize j = 0; j < k.length(); ++j)
      for (isize c = 0; c < k.width(); ++c)
        k.set(0, g, j, c, k.get(0, g, j, c) + (c == 0 ? (j == 0 ? 4 : -1) : 2 * wave(j, c)));
}

struct skipping {
  tensor out, lse, skipped;
  explicit skipping(const shape& s)
      : out(test::unwritten(s.type, s.B, s.H, s.n, s.e)),
        lse(test::unwritten(s.type == dtype::f64 ? dtype::f64 : dtype::f32, s.B, s.H, s.n, 1)),
        skipped(test::unwritten(dtype::f32, s.B, s.H, s.n, 1)) {}
};

struct skip_case {
  const char* name;
  softmax_attention m;
  shape s;
};

/// Against its twin, against the plain call, and the share that it names as a bound. Returns the mean share.
double skips(const skip_case& x, float skip) {
  const shape& s = x.s;
  test::random r(77);
  tensor q = test::normal(r, s.type, s.B, s.H, s.n, s.d), k = test::normal(r, s.type, s.B, s.G, s.m, s.d);
  const tensor v = test::normal(r, s.type, s.B, s.G, s.m, s.e);
  sharpen(q, k);
  softmax_attention m = x.m;
  skipping plain(s), got(s), again(s), want({s.B, s.H, s.G, s.n, s.m, s.d, s.e, dtype::f64});
  prefill(serial, m, q, k, v, plain.out, {.lse = plain.lse});
  m.skip = skip;
  prefill(serial, m, q, k, v, got.out, {.lse = got.lse, .skipped = got.skipped});
  prefill(threads(2), m, q, k, v, again.out, {.lse = again.lse, .skipped = again.skipped});
  CHECK((test::same_bits(got.out, again.out) && test::same_bits(got.lse, again.lse) &&
         test::same_bits(got.skipped, again.skipped)));
  const bool wide = s.type == dtype::f64;
  problem p{q, k, v, want.out, want.lse, {}, nullptr, want.skipped};
  if (wide)
    reference::skip_twin(m, p, kernel::online_softmax<simd::native, double>::tile_rows,
                         kernel::online_softmax<simd::native, double>::block_keys)
        .prefill();
  else
    reference::skip_twin(m, p, kernel::online_softmax<simd::native, float>::tile_rows,
                         kernel::online_softmax<simd::native, float>::block_keys)
        .prefill();
  double most = 0, mean = 0, same = 0;
  for (isize g = 0; g < s.G; ++g)
    for (isize j = 0; j < s.m; ++j) {
      double size = 0;
      for (isize c = 0; c < s.e; ++c) size += std::pow(v.get(0, g, j, c), 2);
      most = std::max(most, std::sqrt(size));
    }
  const double eps = wide ? 1e-11 : s.type == dtype::f32 ? 2e-5 : 2e-2;
  for (isize h = 0; h < s.H; ++h)
    for (isize i = 0; i < s.n; ++i) {
      double off = 0, apart = 0;
      for (isize c = 0; c < s.e; ++c)
        off += std::pow(got.out.get(0, h, i, c) - want.out.get(0, h, i, c), 2),
            apart += std::pow(got.out.get(0, h, i, c) - plain.out.get(0, h, i, c), 2);
      const double mass = got.skipped.get(0, h, i, 0), twin = want.skipped.get(0, h, i, 0),
                   lse = want.lse.get(0, h, i, 0), flips = 4 * static_cast<double>(skip);
      INFO(x.name << ", skip " << skip << ", head " << h << " row " << i << ": " << mass << ", twin " << twin);
      REQUIRE(std::sqrt(off) <= (2 * flips + eps) * most);
      REQUIRE(std::fabs(mass - twin) <= flips + eps);
      REQUIRE(std::sqrt(apart) <= (2 * mass + eps) * most);
      const double all = got.lse.get(0, h, i, 0);
      REQUIRE((all == lse || std::fabs(all - lse) <= std::max(eps, 1e-11) * (1 + std::fabs(lse))));
      mean += mass / static_cast<double>(s.H * s.n);
      same += std::sqrt(off) <= eps * most && std::fabs(mass - twin) <= 2e-5 ? 1 : 0;
    }
  INFO(x.name << ", skip " << skip);
  CHECK(same >= 0.97 * static_cast<double>(s.H * s.n));  // a share may fall on the other side of `skip` by rounding
  return mean;
}

}  // namespace

TEST_CASE("softmax: skipping leaves out what its twin does, says how much, and is no farther off") {
  std::vector<std::uint8_t> table(400 * 400);
  test::random r(5);
  for (auto& x : table) x = r.coin(0.6);
  const float sinks[] = {3.0F, -1.0F}, slopes[] = {0.05F, 0.01F};
  const std::int32_t cu[] = {0, 130, 400};
  const shape s{1, 2, 1, 400, 400, 32, 24, dtype::f32}, two{1, 2, 2, 150, 400, 32, 24, dtype::f32};
  const auto as = [](shape x, dtype type) { return x.type = type, x; };
  for (const skip_case& x : std::vector<skip_case>{{"full", {}, two},
                                                   {"causal", {.mask = causal{}}, s},
                                                   {"causal, f64", {.mask = causal{}}, as(two, dtype::f64)},
                                                   {"causal, bf16", {.mask = causal{}}, as(two, dtype::bf16)},
                                                   {"window", {.mask = window{150, 4}}, s},
                                                   {"table", {.mask = boolean_mask{table.data(), 0, 0, 400}}, two},
                                                   {"packed", {.mask = packed{cu, cu, 2, true}}, s},
                                                   {"sinks", {.mask = causal{}, .sinks = sinks}, two},
                                                   {"alibi", {.mask = causal{}, .score = alibi{slopes}}, s},
                                                   {"20 rows", {.mask = causal{}}, {1, 2, 1, 10, 400, 32, 24}}}) {
    const double little = skips(x, 1e-4F), much = skips(x, 4e-3F);
    INFO(x.name << ": " << little << ", " << much);
    CHECK((little > 0 && little < much));
  }
  CHECK(skips({"few rows", {.mask = causal{}}, {1, 2, 1, 4, 400, 32, 24}}, 0.004F) == 0);
}

TEST_CASE("softmax: scratch does not grow with the sequence") {
  const softmax_attention m{.mask = causal{}};
  CHECK(m.workspace_size({1, 8, 2, 4096, 4096, 64, 64, dtype::f32}, 2) ==
        m.workspace_size({1, 8, 2, 65536, 65536, 64, 64, dtype::f32}, 2));
  CHECK(m.workspace_size({1, 8, 2, 1, 4096, 64, 64, dtype::f32}, 2) ==
        m.workspace_size({1, 8, 2, 1, 1 << 20, 64, 64, dtype::f32}, 2));
}
