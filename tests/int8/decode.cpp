// SPDX-License-Identifier: MIT
/// @file  Decoding in int8 over int8 stores: against a twin in double that rounds the same numbers to the same integers, against f32
///        arithmetic on the same store within what the recipe predicts, in every form of store.

#include <cmath>
#include <limits>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

#include <fovea/cache/contiguous_store.hpp>
#include <fovea/softmax.hpp>

namespace {

using namespace fovea;
using test::tensor;

/// What the twin says of one row: numbers, how far rounding of float may move them, and what the recipe's own rounding should cost.
struct expected {
  std::vector<double> out, slack;
  double lse = 0, lse_slack = 0;
  double variance = 0;  ///< of an element of out, against f32 arithmetic: q rounded to s8, p to u8
};

/// The codes and scales of one KV head, read row by row.
struct codes {
  std::vector<std::vector<std::int8_t>> k, v;
  std::vector<double> k_scale, v_scale;
  codes(const kv_sequence& x, isize g) {
    const row_source ks = x.keys(g), vs = x.values(g);
    for (isize j = 0; j < x.length; ++j) {
      const slot_place a = ks.place(j), b = vs.place(j);
      k.emplace_back(x.d), v.emplace_back(x.e);
      load_codes(ks.form, a.data, ks.row_bytes, a.slot, x.d, k.back().data());
      load_codes(vs.form, b.data, vs.row_bytes, b.slot, x.e, v.back().data());
      k_scale.push_back(static_cast<double>(a.scales[a.slot])),
          v_scale.push_back(static_cast<double>(b.scales[b.slot]));
    }
  }
};

/// The recipe of kernel/decode_int8.hpp over keys `first` <= j < `last`, the lane of key `first` being `lead`.
template <class Visible>
expected twin(const codes& x, std::vector<float> q, bool rotated, double scale, isize first, isize last, isize lead,
              Visible&& visible) {
  const std::size_t d = q.size(), e = x.v[0].size();
  if (rotated) simd::rotate_row<simd::native>(q.data(), static_cast<isize>(d));
  float most = 0;
  for (const float y : q) most = std::fmax(most, std::fabs(y));
  std::vector<int> q8;
  for (const float y : q) q8.push_back(static_cast<int>(std::nearbyint(y * (127.0F / most))));
  const double unit =
      static_cast<double>(static_cast<float>(static_cast<double>(most) / 127 * scale * 1.4426950408889634));

  struct block {
    std::vector<isize> keys, lanes;
  };
  std::vector<block> blocks;
  for (isize j = first, lane = lead; j < last; ++j, ++lane) {
    if (j == first || lane == 64) blocks.emplace_back(), lane = j == first ? lead : 0;
    if (visible(j)) blocks.back().keys.push_back(j), blocks.back().lanes.push_back(lane);
  }
  std::vector<double> s(x.k.size());
  double m = -std::numeric_limits<double>::infinity(), l = 0, spread = 0;
  for (const block& b : blocks)
    for (const isize j : b.keys) {
      const auto i = static_cast<std::size_t>(j);
      int dot = 0;
      double size = 0;
      for (std::size_t c = 0; c < d; ++c) dot += q8[c] * x.k[i][c], size += x.k[i][c] * x.k[i][c];
      s[i] = dot * x.k_scale[i] * unit, m = std::fmax(m, s[i]);
      spread = std::fmax(spread, std::sqrt(size / 12) * x.k_scale[i] * unit * 0.6931471805599453);
    }
  expected r{std::vector<double>(e), std::vector<double>(e), 0, 0, 0};
  std::vector<double> plain(e), square(e);
  const double sure = 4e-6 * (1 + std::fabs(m));  // of a weight, relative: the scores and exp2 are float
  for (const block& b : blocks) {
    double top = 0;
    for (const isize j : b.keys) {
      const auto i = static_cast<std::size_t>(j);
      l += std::exp2(s[i] - m), top = std::fmax(top, std::exp2(s[i] - m) * x.v_scale[i]);
    }
    for (std::size_t y = 0; y < b.keys.size() && top > 0; ++y) {
      const auto i = static_cast<std::size_t>(b.keys[y]);
      const std::uint32_t turn = 0x80000000U + static_cast<std::uint32_t>(b.lanes[y]) * 0x9e3779b9U;
      const double weight = 255 * std::exp2(s[i] - m) * x.v_scale[i] / top,
                   exact = weight + (turn >> 24) / 258.0 - 0.4942, p = std::nearbyint(exact);
      const bool tie = std::fabs(std::fabs(exact - p) - 0.5) < 255 * sure;
      for (std::size_t c = 0; c < e; ++c) {
        r.out[c] += top / 255 * p * x.v[i][c];
        r.slack[c] += top / 255 * (p * sure + (tie ? 1 : 0)) * std::abs(x.v[i][c]);
        plain[c] += top / 255 * weight * x.v[i][c];
        r.variance += std::pow(top / 255 * x.v[i][c], 2) / 6 / static_cast<double>(e);  // one step, dithered
      }
    }
  }
  for (const block& b : blocks)
    for (const isize j : b.keys) {
      const auto i = static_cast<std::size_t>(j);
      for (std::size_t c = 0; c < e; ++c)
        r.variance += std::pow(spread * std::exp2(s[i] - m) * (x.v[i][c] * x.v_scale[i] - plain[c] / l), 2) /
                      static_cast<double>(e);
    }
  for (std::size_t c = 0; c < e; ++c)
    r.out[c] = l > 0 ? r.out[c] / l : 0, r.slack[c] = l > 0 ? r.slack[c] / l + sure * std::fabs(r.out[c]) + 1e-9 : 0;
  if (l > 0) r.variance /= l * l;
  r.lse = m * 0.6931471805599453 + std::log(l), r.lse_slack = 2 * sure;
  return r;
}

struct answer {
  tensor out, lse;
  answer(isize heads, isize n, isize e)
      : out(test::unwritten(dtype::f32, 1, heads, n, e)), lse(test::unwritten(dtype::f32, 1, heads, n, 1)) {}
};
answer attend(const softmax_attention& m, const tensor& q, const kv_sequence& x, exec_ref exec = serial) {
  answer a(q.heads(), q.length(), x.e);
  prefill(exec, m, q, {&x, 1}, a.out, {.lse = a.lse});
  CHECK((a.out.guards_intact() && a.lse.guards_intact()));
  return a;
}
softmax_attention in_int8(softmax_attention m) {
  m.arithmetic = precision::int8;
  return m;
}
contiguous_store filled(const kv_shape& s, const tensor& k, const tensor& v) {
  contiguous_store store(s, k.length() + 3);
  store.append(k, v);
  return store;
}
kv_shape shape_of(isize heads, isize d, isize e, bool packed, bool rotated) {
  return {.heads = heads,
          .d = d,
          .e = e,
          .type = dtype::i8,
          .form = packed ? kv_form::packed : kv_form::rows,
          .rotated = rotated};
}

}  // namespace

TEST_CASE("decode_int8: the twin that rounds the same numbers, and f32 arithmetic within what rounding costs") {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    test::random r(seed);
    const bool packed = r.coin(), rotated = r.coin();
    const isize G = r.integer(1, 2), group = r.integer(1, 8), n = r.integer(1, 8 / group);
    const isize d = r.coin() ? 16 * r.integer(1, 10) : r.integer(2, 150), e = r.coin() ? 64 : r.integer(1, 150);
    const isize m = r.integer(n, 400);
    const kv_shape s = shape_of(G, d, e, packed, rotated);
    const contiguous_store store =
        filled(s, test::normal(r, dtype::f32, 1, G, m, d), test::normal(r, dtype::f32, 1, G, m, e));
    const tensor q = test::normal(r, dtype::f32, 1, G * group, n, d);
    softmax_attention a;
    const isize width = r.integer(1, 200), first_keys = r.coin() ? r.integer(0, 4) : 0;
    const isize kind = r.integer(0, 2);
    if (kind == 1) a.mask = causal{};
    if (kind == 2) a.mask = window{width, first_keys};
    const kv_sequence x = store.view();
    const answer got = attend(in_int8(a), q, x), plain = attend(a, q, x);
    CAPTURE(seed, packed, rotated, G, group, n, d, e, m, kind, width, first_keys);
    const isize oldest = kind == 2 && first_keys == 0 ? std::max<isize>(0, m - n - width + 1) : 0;
    for (isize g = 0; g < G; ++g) {
      const codes c(x, g);
      double error = 0, predicted = 0;
      for (isize h = g * group; h < (g + 1) * group; ++h)
        for (isize i = 0; i < n; ++i) {
          std::vector<float> row;
          for (isize z = 0; z < d; ++z) row.push_back(static_cast<float>(q.get(0, h, i, z)));
          const isize at = m - n + i;
          const expected want = twin(c, row, rotated, a.scale_for({1, 1, 1, 1, 1, d, e, dtype::f32}), oldest, m,
                                     packed ? oldest % 16 : 0, [&](isize j) {
                                       if (kind == 1) return j <= at;
                                       return kind == 0 || (j <= at && (j > at - width || j < first_keys));
                                     });
          CHECK(std::fabs(got.lse.get(0, h, i, 0) - want.lse) <= want.lse_slack);
          for (isize z = 0; z < e; ++z) {
            const auto y = static_cast<std::size_t>(z);
            INFO("head " << h << ", row " << i << ", column " << z << ": " << got.out.get(0, h, i, z) << " for "
                         << want.out[y]);
            if (!(std::fabs(got.out.get(0, h, i, z) - want.out[y]) <= want.slack[y]))
              FAIL_CHECK("slack " << want.slack[y]);
            error += std::pow(got.out.get(0, h, i, z) - plain.out.get(0, h, i, z), 2);
          }
          predicted += want.variance * static_cast<double>(e);
        }
      // The prediction is an average over what is rounded; few numbers scatter about it.
      const double few = 1 + 4 / std::sqrt(static_cast<double>(group * n * e));
      CHECK(error <= 3 * few * few * predicted + 1e-12);
      if (m >= 20) CHECK(error >= predicted / 20);
    }
  }
}

TEST_CASE("decode_int8: pages, packed or not, and threads give the same bits, a ring is within the recipe of f32") {
  test::random r(3);
  constexpr isize G = 2, H = 8, d = 64, e = 48, m = 9000;
  const tensor k = test::normal(r, dtype::bf16, 1, G, m, d), v = test::normal(r, dtype::bf16, 1, G, m, e);
  const tensor q = test::normal(r, dtype::f32, 1, H, 1, d);
  const softmax_attention a{.mask = causal{}};
  const threads two(2), three(3);
  for (const bool rotated : {false, true}) {
    const contiguous_store rows = filled(shape_of(G, d, e, false, rotated), k, v),
                           packed = filled(shape_of(G, d, e, true, rotated), k, v);
    const answer want = attend(in_int8(a), q, rows.view()), f32 = attend(a, q, rows.view());
    const auto same = [&](const kv_sequence& x) {
      for (const exec_ref exec : {exec_ref(serial), exec_ref(two), exec_ref(three)}) {
        const answer got = attend(in_int8(a), q, x, exec);
        CHECK_SAME_BITS(got.out, want.out);
        CHECK_SAME_BITS(got.lse, want.lse);
      }
      CHECK_CLOSE(attend(a, q, x).out.values(), f32.out.values(), {.c = 64});
    };
    same(rows.view()), same(packed.view());
    for (const isize page : {1, 5, 16, 64, 160}) {
      const bool in_tiles = page % packed_rows == 0;
      paged_pool pool(shape_of(G, d, e, in_tiles, rotated), page, ceil_div(m, page) + 1);
      page_table t;
      pool.append(t, k, v);
      same(pool.view(t));
    }
    for (const bool in_tiles : {false, true})
      for (const isize first : {0, 5, 16}) {
        ring_store ring(shape_of(G, d, e, in_tiles, rotated), {500, first, 4});
        ring.append(k, v);
        const softmax_attention w{.mask = window{500, first}};
        const answer exact = attend(w, q, ring.view()), got = attend(in_int8(w), q, ring.view());
        double error = 0, size = 0, lse = 0;
        for (isize h = 0; h < H; ++h) {
          for (isize c = 0; c < e; ++c)
            error += std::pow(got.out.get(0, h, 0, c) - exact.out.get(0, h, 0, c), 2),
                size += std::pow(exact.out.get(0, h, 0, c), 2);
          lse = std::fmax(lse, std::fabs(got.lse.get(0, h, 0, 0) - exact.lse.get(0, h, 0, 0)));
        }
        CAPTURE(in_tiles, first);
        CHECK(std::sqrt(error / size) < 0.03);  // q to 7 bits: .4 % of a logit of deviation 1; p: half a step of 255
        CHECK(lse < 0.01);
      }
  }
}

TEST_CASE("decode_int8: NaN and infinity reach the rows that see them, as in f32, zeros in V still count") {
  for (const bool packed : {false, true})
    for (const double bad : {std::nan(""), HUGE_VAL})
      for (const int where : {0, 1, 2}) {  // q, k, v
        test::random r(5);
        constexpr isize G = 1, H = 4, n = 2, d = 40, e = 24, m = 70;
        tensor q = test::normal(r, dtype::f32, 1, H, n, d), k = test::normal(r, dtype::f32, 1, G, m, d),
               v = test::normal(r, dtype::f32, 1, G, m, e);
        for (isize c = 0; c < e; ++c) v.set(0, 0, 3, c, 0.0);
        if (where == 0) q.set(0, 2, 1, 7, bad);
        if (where == 1) k.set(0, 0, m - 1, 7, bad);  // seen by the last query only
        if (where == 2) v.set(0, 0, m - 1, 7, bad);
        const softmax_attention a{.mask = causal{}};
        const contiguous_store store = filled(shape_of(G, d, e, packed, false), k, v);
        const answer f32 = attend(a, q, store.view()), got = attend(in_int8(a), q, store.view());
        CAPTURE(packed, bad, where);
        for (isize h = 0; h < H; ++h)
          for (isize i = 0; i < n; ++i) {
            for (isize c = 0; c < e; ++c)
              CHECK(std::isnan(got.out.get(0, h, i, c)) == std::isnan(f32.out.get(0, h, i, c)));
            const double x = got.lse.get(0, h, i, 0), y = f32.lse.get(0, h, i, 0);
            CHECK((std::isnan(x) == std::isnan(y) && (std::isnan(x) || std::fabs(x - y) < 0.02)));
          }
      }
  // All of V is zeros: so is the answer, and the log-sum-exp is that of the scores. No visible key: zeros and -inf.
  test::random r(6);
  const tensor q = test::normal(r, dtype::f32, 1, 2, 4, 16), k = test::normal(r, dtype::f32, 1, 1, 3, 16);
  tensor v(dtype::f32, 1, 1, 3, 8);
  v.fill([] { return 0.0; });
  const contiguous_store store = filled(shape_of(1, 16, 8, true, false), k, v);
  const answer got = attend(in_int8({.mask = causal{}}), q, store.view());
  for (isize h = 0; h < 2; ++h)
    for (isize i = 0; i < 4; ++i) {
      CHECK(got.out.get(0, h, i, 0) == 0);
      CHECK((got.lse.get(0, h, i, 0) == -HUGE_VAL) == (i == 0));
    }
}

TEST_CASE("decode_int8: a state that is packed and rotated gives the bits of a store") {
  test::random r(9);
  constexpr isize G = 2, H = 6, d = 32, e = 40, m = 77;
  const tensor k = test::normal(r, dtype::f32, 1, G, m, d), v = test::normal(r, dtype::f32, 1, G, m, e),
               q = test::normal(r, dtype::f32, 1, H, m, d);
  const contiguous_store store = filled(shape_of(G, d, e, true, true), k, v);
  softmax_attention a{.mask = causal{}};
  const answer want = attend(in_int8(a), test::rows_of(q, m - 1, 1), store.view());
  a.store = {.type = dtype::i8, .layout = kv_form::packed, .rotated = true};
  state held = a.make_state({1, H, G, m, m, d, e, dtype::f32});
  answer past(H, m - 1, e), got(H, 1, e);
  prefill(serial, a, test::rows_of(q, 0, m - 1), test::rows_of(k, 0, m - 1), test::rows_of(v, 0, m - 1), past.out,
          held);
  step(serial, in_int8(a), test::rows_of(q, m - 1, 1), test::rows_of(k, m - 1, 1), test::rows_of(v, m - 1, 1), got.out,
       held, {.lse = got.lse});
  CHECK_SAME_BITS(got.out, want.out);
  CHECK_SAME_BITS(got.lse, want.lse);
  a.store.scale = scale_per::group;
  CHECK_SAYS(test::refusal([&] { a.make_state({1, H, G, m, m, d, e, dtype::f32}); }), "packed rows are int8");
  a.store = {.rotated = true};
  CHECK_SAYS(test::refusal([&] { a.make_state({1, H, G, m, m, d, e, dtype::f32}); }), "rotated keys are int8");
}

TEST_CASE("packed and rotated stores: what they refuse") {
  const auto says = [](const kv_shape& s) { return test::refusal([&] { contiguous_store(s, 4); }); };
  kv_shape s = shape_of(1, 8, 8, true, false);
  CHECK(says(s) == "accepted");
  s.scale = scale_per::group;
  CHECK_SAYS(says(s), "packed rows are int8 with a scale a row");
  s = shape_of(1, 8, 8, true, true);
  s.type = dtype::bf16;
  CHECK_SAYS(says(s), "packed rows are int8 with a scale a row");
  s.form = kv_form::rows;
  CHECK_SAYS(says(s), "rotated keys are int8");
  CHECK_SAYS(test::refusal([&] { paged_pool(shape_of(1, 8, 8, true, false), 24, 4); }), "pages of a multiple of 16");
  s = shape_of(1, 8, 8, true, false);
  test::random r(1);
  const contiguous_store store =
      filled(s, test::normal(r, dtype::f32, 1, 1, 4, 8), test::normal(r, dtype::f32, 1, 1, 4, 8));
  kv_sequence x = store.view();
  x.v.form = row_form::plain;
  const tensor q = test::normal(r, dtype::f32, 1, 1, 1, 8);
  CHECK_SAYS(test::refusal([&] { attend({}, q, x); }),
             "keys and values are both plain, or packed keys and packed values");
}
