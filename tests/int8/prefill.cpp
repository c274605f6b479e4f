// SPDX-License-Identifier: MIT
/// @file  Exact attention in int8 over views: against the twin with the same integers, and against exact attention in double within what
///        the scales of the rounded numbers predict; what a row may not see, numbers that are not finite, scores out of range, skipping.

#include <cmath>
#include <limits>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

#include <fovea/cache/contiguous_store.hpp>
#include <fovea/cache/paged_pool.hpp>
#include <fovea/softmax/reference_int8.hpp>

namespace {

using namespace fovea;
using test::tensor;

struct inputs {
  tensor q, k, v;
  inputs(isize B, isize H, isize G, isize n, isize m, isize d, isize e, std::uint64_t seed, dtype type = dtype::f32)
      : q(type, B, H, n, d), k(type, B, G, m, d), v(type, B, G, m, e) {
    test::random r(seed);
    for (tensor* t : {&q, &k, &v}) t->fill([&] { return r.normal(); });
  }
};
struct outputs {
  tensor out, lse, skipped;
  outputs(const inputs& x, dtype type = dtype::f32)
      : out(type, x.q.batch(), x.q.heads(), x.q.length(), x.v.width()),
        lse(type == dtype::f64 ? type : dtype::f32, x.q.batch(), x.q.heads(), x.q.length(), 1),
        skipped(dtype::f32, x.q.batch(), x.q.heads(), x.q.length(), 1) {}
};

softmax_attention in_int8(softmax_attention m, float skip = 0) {
  m.arithmetic = precision::int8, m.skip = skip;
  return m;
}
outputs run(const softmax_attention& m, const inputs& x, exec_ref exec = serial) {
  outputs y(x);
  call_options o;
  o.lse = y.lse.ref();
  if (m.skip > 0) o.skipped = y.skipped.ref();
  prefill(exec, m, x.q, x.k, x.v, y.out.ref(), o);
  return y;
}

/// Relative to the predicted error: the largest row, and the mean.
struct against {
  double worst = 0, mean = 0, twin = 0, lse = 0;
};
against compare(const softmax_attention& f, const inputs& x) {
  const softmax_attention m = in_int8(f);
  const outputs got = run(m, x);
  outputs exact(x, dtype::f64), twin(x, dtype::f64);
  reference::prefill(f, {x.q, x.k, x.v, exact.out.ref(), exact.lse.ref(), {}});
  const problem p{x.q, x.k, x.v, twin.out.ref(), twin.lse.ref(), {}};
  const std::vector<double> predicted = reference::int8_twin(m, p).prefill(true);
  against a;
  std::size_t row = 0;
  isize count = 0;
  for (isize b = 0; b < x.q.batch(); ++b)
    for (isize h = 0; h < x.q.heads(); ++h)
      for (isize i = 0; i < x.q.length(); ++i, ++row) {
        double from_exact = 0, from_twin = 0;
        for (isize c = 0; c < x.v.width(); ++c) {
          const double y = got.out.get(b, h, i, c);
          REQUIRE(std::isfinite(y));
          from_exact += std::pow(y - exact.out.get(b, h, i, c), 2),
              from_twin += std::pow(y - twin.out.get(b, h, i, c), 2);
        }
        const double lse = exact.lse.get(b, h, i, 0);
        if (lse == -std::numeric_limits<double>::infinity()) {
          CHECK(got.lse.get(b, h, i, 0) == lse);
          CHECK(from_exact == 0);
          continue;
        }
        const double scale = std::sqrt(predicted[row]) + 1e-6;
        a.worst = std::fmax(a.worst, std::sqrt(from_exact) / scale), a.mean += std::sqrt(from_exact) / scale;
        a.twin = std::fmax(a.twin, std::sqrt(from_twin) / scale);
        a.lse = std::fmax(a.lse, std::fabs(got.lse.get(b, h, i, 0) - twin.lse.get(b, h, i, 0)));
        ++count;
      }
  a.mean /= count > 0 ? static_cast<double>(count) : 1.0;
  return a;
}
/// Independent roundings of variance s^2: no row beyond 5 s, 1.3 s on average. The twin has the same integers; a score on the edge
/// between two steps moves one key by 1 % of its weight, far inside a row's own error.
void check_within(const against& a) {
  INFO("worst " << a.worst << " mean " << a.mean << " twin " << a.twin << " lse " << a.lse);
  CHECK(a.worst < 5);
  CHECK(a.mean < 1.3);
  CHECK(a.twin < 1);
  CHECK(a.lse < 0.011);  // one step of one key: ln(2) / 64
}

TEST_CASE("int8: masks, groups, widths, types, against the twin and what the scales predict") {
  const float slopes[] = {0.5F, 0.25F, 0.125F, 0.0625F}, sinks[] = {0.5F, -1.0F, 2.0F, 0.0F};
  softmax_attention full, after, local, tilted, capped, sunk;
  after.mask = causal{}, local.mask = window{40}, tilted.mask = causal{};
  tilted.score = alibi{slopes, 4}, capped.score = softcap{5.0}, sunk.mask = causal{}, sunk.sinks = sinks;
  SECTION("full, ragged") { check_within(compare(full, inputs(1, 2, 1, 67, 131, 64, 64, 1))); }
  SECTION("causal, several blocks") { check_within(compare(after, inputs(1, 2, 1, 150, 300, 64, 32, 2))); }
  SECTION("window") { check_within(compare(local, inputs(2, 2, 2, 140, 140, 32, 24, 3))); }
  SECTION("odd widths") { check_within(compare(after, inputs(1, 3, 1, 45, 77, 33, 19, 4))); }
  SECTION("80, 96") {
    check_within(compare(after, inputs(1, 1, 1, 40, 70, 80, 80, 5)));
    check_within(compare(full, inputs(1, 1, 1, 33, 40, 96, 48, 6)));
  }
  SECTION("wide: scores by floats") { check_within(compare(after, inputs(1, 1, 1, 20, 40, 272, 16, 7))); }
  SECTION("ALiBi, soft-cap, sinks") {
    check_within(compare(tilted, inputs(1, 4, 2, 50, 140, 32, 16, 8)));
    check_within(compare(capped, inputs(1, 2, 1, 40, 140, 32, 16, 9)));
    check_within(compare(sunk, inputs(1, 4, 2, 60, 60, 32, 16, 10)));
  }
  SECTION("rows that see nothing") { check_within(compare(after, inputs(1, 1, 1, 60, 30, 16, 16, 11))); }
  SECTION("one key") { check_within(compare(full, inputs(1, 1, 1, 30, 1, 16, 16, 12))); }
  SECTION("bf16, f16") {
    check_within(compare(after, inputs(1, 1, 1, 70, 90, 64, 32, 13, dtype::bf16)));
    check_within(compare(after, inputs(1, 1, 1, 70, 90, 64, 32, 14, dtype::f16)));
  }
  SECTION("values of very different size, and zeros") {
    inputs x(1, 1, 1, 80, 200, 32, 32, 15);
    for (isize j = 0; j < 200; ++j)
      for (isize c = 0; c < 32; ++c)
        x.v.set(0, 0, j, c, j % 7 == 3 ? 0.0 : x.v.get(0, 0, j, c) * (j < 5 ? 1e-3 : j % 11 == 0 ? 30.0 : 1.0));
    check_within(compare(after, x));
  }
}

void check_same_bits(const outputs& a, const outputs& b, isize b_item, isize item, isize h, isize i) {
  for (isize c = 0; c < a.out.width(); ++c) {
    INFO("head " << h << " row " << i << " column " << c);
    REQUIRE(a.out.get(item, h, i, c) == b.out.get(b_item, h, i, c));
  }
  REQUIRE(a.lse.get(item, h, i, 0) == b.lse.get(b_item, h, i, 0));
}

TEST_CASE("int8: the same bits for any number of threads and any batch") {
  softmax_attention f;
  f.mask = causal{};
  const softmax_attention m = in_int8(f);
  const inputs x(3, 4, 2, 150, 290, 48, 40, 21);
  const outputs one = run(m, x);
  for (int count = 2; count <= 3; ++count) {
    threads pool(count);
    const outputs many = run(m, x, pool);
    for (isize b = 0; b < 3; ++b)
      for (isize h = 0; h < 4; ++h)
        for (isize i = 0; i < 150; ++i) check_same_bits(one, many, b, b, h, i);
  }
  outputs alone(x);
  call_options o;
  o.lse = alone.lse.ref().part(1, 0, 4);
  prefill(serial, m, x.q.ref().part(1, 0, 4), x.k.ref().part(1, 0, 2), x.v.ref().part(1, 0, 2),
          alone.out.ref().part(1, 0, 4), o);
  for (isize h = 0; h < 4; ++h)
    for (isize i = 0; i < 150; ++i) check_same_bits(one, alone, 1, 1, h, i);
}

TEST_CASE("int8: a row depends on nothing that it does not see, what is not finite behaves as in f32") {
  softmax_attention f;
  f.mask = causal{};
  const softmax_attention m = in_int8(f);
  const isize n = 140, key = 83;
  const inputs x(1, 2, 1, n, n, 32, 24, 31);
  const outputs clean = run(m, x);
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  struct change {
    bool value;
    double to;
    bool in_floats;  // rows that see it leave the integers
  };
  for (const change& what : {change{false, nan, true},
                             {false, inf, true},
                             {true, nan, true},
                             {true, inf, true},
                             {false, 1e6, true},
                             {true, 1e-20, false},
                             {false, 3.0, false},
                             {true, 500.0, false}}) {
    INFO((what.value ? "value " : "key ") << what.to);
    inputs y = x;
    tensor& t = what.value ? y.v : y.k;
    for (isize c = 0; c < t.width(); ++c) t.set(0, 0, key, c, what.to);
    if (what.value && what.to == inf) t.set(0, 0, key, 3, 0.5);
    const outputs got = run(m, y), wanted = run(f, y);
    for (isize h = 0; h < 2; ++h)
      for (isize i = 0; i < n; ++i) {
        if (i < key) {
          check_same_bits(clean, got, 0, 0, h, i);
        } else if (what.in_floats) {
          for (isize c = 0; c < 24; ++c) {
            const double a = got.out.get(0, h, i, c), b = wanted.out.get(0, h, i, c);
            INFO("row " << i << " column " << c << ": " << a << ", f32 " << b);
            REQUIRE(((a == b) || (std::isnan(a) && std::isnan(b))));
          }
        }
      }
  }
  inputs y = x;  // and a query: its own row alone
  y.q.set(0, 1, 100, 5, nan);
  const outputs got = run(m, y);
  for (isize h = 0; h < 2; ++h)
    for (isize i = 0; i < n; ++i)
      if (h == 1 && i == 100)
        CHECK(std::isnan(got.out.get(0, h, i, 0)));
      else
        check_same_bits(clean, got, 0, 0, h, i);
}

TEST_CASE("int8: the same over views, pages and stores, an int8 store's own integers in either form") {
  softmax_attention f;
  f.mask = causal{};
  const softmax_attention m = in_int8(f);
  const isize n = 70, keys = 210;
  const inputs x(1, 4, 2, n, keys, 64, 48, 61);
  const outputs views = run(m, x), exact = run(f, x);
  const auto over = [&](const softmax_attention& a, const kv_sequence& kv) {
    outputs y(x);
    sequence_options o;
    o.lse = y.lse.ref();
    prefill(serial, a, x.q, {&kv, 1}, y.out.ref(), o);
    return y;
  };
  const auto same = [&](const outputs& a, const outputs& b) {
    for (isize h = 0; h < 4; ++h)
      for (isize i = 0; i < n; ++i) check_same_bits(a, b, 0, 0, h, i);
  };
  kv_shape rows{.heads = 2, .d = 64, .e = 48};
  contiguous_store plain(rows, keys);
  plain.append(x.k, x.v);
  same(views, over(m, plain.view()));
  paged_pool pool(rows, 16, 40);
  page_table table, other;
  for (isize j = 0; j < keys; j += 30) {  // pages of two sequences, mixed
    pool.append(table, x.k.ref().slice(j, 30), x.v.ref().slice(j, 30));
    pool.append(other, x.k.ref().slice(j, 30), x.v.ref().slice(j, 30));
  }
  same(views, over(m, pool.view(table)));

  rows.type = dtype::i8, rows.rotated = true;
  contiguous_store turned(rows, keys);
  turned.append(x.k, x.v);
  rows.form = kv_form::packed;
  contiguous_store packed(rows, keys);
  packed.append(x.k, x.v);
  const outputs codes = over(m, turned.view());
  same(codes, over(m, packed.view()));
  rows.form = kv_form::rows, rows.rotated = false;
  contiguous_store natural(rows, keys);
  natural.append(x.k, x.v);
  // Each element of q, k, v is off by at most half a step of a row, 1/127 of its largest: 3 % of a normal row's rms, in three places.
  for (const outputs& y : {codes, over(m, natural.view())}) {
    double apart = 0, size = 0;
    for (isize h = 0; h < 4; ++h)
      for (isize i = 0; i < n; ++i)
        for (isize c = 0; c < 48; ++c)
          apart += std::pow(y.out.get(0, h, i, c) - exact.out.get(0, h, i, c), 2),
              size += std::pow(exact.out.get(0, h, i, c), 2);
    CHECK(std::sqrt(apart / size) < 0.03);
    CHECK(std::sqrt(apart / size) > 0.002);
  }
}

double wave(isize i, isize c) { return std::sin(static_cast<double>(i) / 40 + static_cast<double>(c)); }

TEST_CASE("int8: skipping leaves out what it says") {
  softmax_attention f;
  f.mask = causal{};
  inputs x(1, 2, 1, 400, 400, 32, 24, 41);
  for (isize i = 0; i < 400; ++i)
    for (isize c = 0; c < 32; ++c) {  // sharper scores, a sink, and neighbours that look for each other
      x.q.set(0, 0, i, c, 2.5 * x.q.get(0, 0, i, c) + (c == 0 ? 6 : 3 * wave(i, c)));
      x.k.set(0, 0, i, c, x.k.get(0, 0, i, c) + (c == 0 ? (i == 0 ? 4 : -1) : 2 * wave(i, c)));
    }
  double largest = 0;
  for (isize i = 0; i < 400; ++i) {
    double size = 0;
    for (isize c = 0; c < 24; ++c) size += std::pow(x.v.get(0, 0, i, c), 2);
    largest = std::fmax(largest, std::sqrt(size));
  }
  const outputs all = run(in_int8(f), x);
  double before = 0;
  for (const float skip : {1e-4F, 1e-2F}) {
    const outputs some = run(in_int8(f, skip), x);
    double mean = 0;
    for (isize h = 0; h < 2; ++h)
      for (isize i = 0; i < 400; ++i) {
        const double mass = some.skipped.get(0, h, i, 0);
        double apart = 0;
        for (isize c = 0; c < 24; ++c) apart += std::pow(some.out.get(0, h, i, c) - all.out.get(0, h, i, c), 2);
        INFO("head " << h << " row " << i << " mass " << mass);
        REQUIRE(mass >= 0);
        REQUIRE(mass <= static_cast<double>(skip) * 25);  // 25 tiles of 16 keys
        // o - o' = mass (mean of what was skipped - o'); the order of blocks moves roundings of f32 alone.
        REQUIRE(std::sqrt(apart) <= 2 * mass * largest + 1e-4);
        mean += mass / 800;
      }
    CHECK(mean > before);
    before = mean;
  }
}

TEST_CASE("int8: what is refused, and empty calls") {
  softmax_attention m = in_int8({});
  const inputs x(1, 1, 1, 3, 3, 8, 8, 51);
  outputs y(x);
  const inputs wide(1, 1, 1, 3, 3, 8, 8, 51, dtype::f64);
  outputs z(wide, dtype::f64);
  CHECK_SAYS(test::refusal([&] { prefill(serial, m, wide.q, wide.k, wide.v, z.out.ref()); }),
             "arithmetic is int8 and q is f64");
  m.arithmetic = precision::bf16;
  CHECK_SAYS(test::refusal([&] { prefill(serial, m, x.q, x.k, x.v, y.out.ref()); }), "arithmetic is bf16");
  m.arithmetic = precision::f32, m.skip = 0;
  call_options o;
  o.skipped = y.skipped.ref();
  CHECK_SAYS(test::refusal([&] { prefill(serial, m, x.q, x.k, x.v, y.out.ref(), o); }), "skips nothing");
  m = in_int8({});
  prefill(serial, m, x.q.ref().slice(0, 0), x.k, x.v, y.out.ref().slice(0, 0));
  const inputs none(1, 1, 1, 20, 0, 8, 8, 52);
  const outputs nothing = run(m, none);
  CHECK(nothing.out.get(0, 0, 19, 7) == 0);
  CHECK(nothing.lse.get(0, 0, 19, 0) == -std::numeric_limits<double>::infinity());
}

}  // namespace
