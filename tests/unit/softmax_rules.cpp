// SPDX-License-Identifier: MIT
/// @file  softmax_attention under masks and scores of every kind: a user's own (the examples of docs/mechanisms/softmax.md) and each score
///        against the twin, and what is left out under masks: pairs are counted, NaN is planted.

#include <fovea/mask/function.hpp>
#include <fovea/mask/tree.hpp>
#include <fovea/softmax.hpp>
#include <fovea/softmax/reference.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"
#include "unit/mask_check.hpp"

namespace {

using namespace fovea;
using test::tensor;

// A dilated window: every second key of the last 64.
struct dilated {
  isize width = 64, step = 2;

  bool is_causal() const { return true; }
  bool visible(const mask_site& at, isize i, isize j) const {
    const isize p = bottom_right.position(at, i);
    return j <= p && p - j < width && (p - j) % step == 0;
  }
  range keys(const mask_site& at, isize i0, isize i1) const {  // what no row of [i0, i1) needs is not read
    const isize low = bottom_right.position(at, i0) - width + 1;
    return {low < 0 ? 0 : low, bottom_right.position(at, i1 - 1) + 1};
  }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    return meet(keys(at, i0, i1), {j0, j1}).empty() ? tile_kind::empty : tile_kind::partial;
  }
};

// Logits fall with the logarithm of the distance; a register of rows or keys at a time, and one by one for double and the twin.
struct log_distance {
  float strength = 0.5F;

  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T s) const {
    const isize away = bottom_right.position(at, i) - j;
    return s - static_cast<T>(strength) * std::log1p(static_cast<T>(away < 0 ? -away : away));
  }
};
struct linear_distance {
  float strength = 0.01F;

  template <class T>
  T operator()(const mask_site&, isize i, isize j, T s) const {
    return s + static_cast<T>(strength) * static_cast<T>(i - j);
  }
  template <class P>  // the same for simd::pack<float> and simd::pack<double>
  P wide(const mask_site&, P i, P j, P s) const {
    return simd::fma(P(static_cast<typename P::value_type>(strength)), i - j, s);
  }
};

void agrees(const softmax_attention& m, isize n) {
  test::random r(1);
  for (const dtype type : {dtype::f32, dtype::f64}) {
    const tensor q = test::normal(r, type, 2, 4, n, 32), k = test::normal(r, type, 2, 2, 300, 32),
                 v = test::normal(r, type, 2, 2, 300, 32);
    tensor want = test::unwritten(dtype::f64, 2, 4, n, 32), got = test::unwritten(type, 2, 4, n, 32);
    reference::prefill(m, {q, k, v, want, {}, {}});
    prefill(serial, m, q, k, v, got);
    CHECK_CLOSE(got.values(), want.values(), {.c = 128, .acc = type, .stored = type});
  }
}

}  // namespace

TEST_CASE("softmax: functions as mask and score") {
  const isize documents[] = {0, 90, 170, 300};
  const auto same_document = [&documents](const mask_site& at, isize i, isize j) {
    const isize p = bottom_right.position(at, i);
    int a = 0, b = 0;
    while (documents[a + 1] <= p) ++a;
    while (documents[b + 1] <= j) ++b;
    return a == b && j <= p;
  };
  const auto stronger_first_head = [](const mask_site& at, isize, isize, auto s) {
    return at.h == 0 ? s + s : s;  // auto: float in kernels, double in the twin
  };
  for (const isize n : {1, 100, 300}) {
    const softmax_attention m{.mask = mask_function{same_document, true}, .score = stronger_first_head};
    agrees(m, n);
    const mask_blocks known(m.mask, {.n = n, .m = 300}, 64, 64);
    CHECK(known.density() < 0.7);
    agrees({.mask = mask_blocks_of{&known, mask_function{same_document}}, .score = stronger_first_head}, n);
    agrees({.mask = dilated{}}, n);
    agrees({.mask = both{dilated{.width = 200, .step = 3}, chunked_local{100}}, .score = log_distance{}}, n);
    agrees({.mask = causal{}, .score = chain{softcap{4}, linear_distance{}}}, n);
  }
}

TEST_CASE("softmax: a causal function may be used with a state") {
  test::random r(2);
  const softmax_attention m{.mask = dilated{}};
  const tensor q = test::normal(r, dtype::f32, 1, 4, 150, 16), k = test::normal(r, dtype::f32, 1, 2, 150, 16),
               v = test::normal(r, dtype::f32, 1, 2, 150, 16);
  tensor whole = test::unwritten(dtype::f32, 1, 4, 150, 16), steps = whole;
  prefill(serial, m, q, k, v, whole);
  state s = m.make_state({1, 4, 2, 150, 150, 16, 16, dtype::f32});
  for (isize t = 0; t < 150; ++t)
    step(serial, m, q.ref().slice(t, 1), k.ref().slice(t, 1), v.ref().slice(t, 1), steps.ref().slice(t, 1), s);
  CHECK_CLOSE(steps.values(), whole.values(), {.c = 64});
}

TEST_CASE("score: softmax with each policy agrees with the twin") {
  std::vector<float> slopes(4), weights, table, bias;
  test::random r(11);
  for (const auto type : {dtype::f32, dtype::f64}) {
    for (const isize n : {1, 70}) {
      const shape s{1, 4, 2, n, 150, 24, 24, type};
      slopes = {0.5F, 0.25F, 0.125F, 0.0625F}, weights = test::numbers(r, 32 * 4), bias = test::numbers(r, s.n * s.m);
      table = t5_distances(weights.data(), 4, 32, 64, true);
      const std::pair<const char*, score> cases[] = {
          {"softcap", softcap{5}},
          {"alibi", alibi{slopes.data(), 4}},
          {"bias", additive_bias{bias.data(), 0, 0, s.m}},
          {"t5", relative_bias{table.data(), 64, 64, 4}},
          {"softcap, bias, t5",
           chain{chain{softcap{5}, additive_bias{bias.data(), 0, 0, s.m}}, relative_bias{table.data(), 64, 64, 4}}},
          {"a function", [](const mask_site& at, isize i, isize j, auto x) {
             return x + static_cast<decltype(x)>(at.h == 1 ? (i + j) % 3 : 0);
           }}};
      const test::tensor q = test::normal(r, type, 1, 4, s.n, s.d), k = test::normal(r, type, 1, 2, s.m, s.d),
                         v = test::normal(r, type, 1, 2, s.m, s.e);
      for (const auto& [name, modify] : cases) {
        const softmax_attention a{.mask = causal{}, .score = modify};
        test::tensor want = test::unwritten(dtype::f64, 1, 4, s.n, s.e), got = test::unwritten(type, 1, 4, s.n, s.e);
        reference::prefill(a, {q, k, v, want, {}, {}});
        prefill(serial, a, q, k, v, got);
        CAPTURE(name, n, fovea::name_of(type));
        CHECK_CLOSE(got.values(), want.values(), {.c = 128, .acc = type, .stored = type});
      }
    }
  }
}

namespace {

/// Masks of 1024 rows and keys that show little, and the tables that they point to.
struct sparse_masks {
  static constexpr isize n = 1024;
  std::vector<std::int32_t> cu{0, 300, 301, 700, 1024}, parents;
  std::vector<std::uint8_t> blocks, bits;
  draft_tree drafts;
  mask_blocks known;
  std::vector<std::pair<const char*, mask>> all;

  sparse_masks() : blocks(16 * 16, 0), bits(static_cast<std::size_t>(n * n), 0) {
    test::random r(5);
    parents = test::random_tree(r, n), drafts = draft_tree(parents.data(), n);
    for (std::size_t i = 0; i < 16; ++i) blocks[i * 16 + (i * 5) % 16] = 1;
    for (isize i = 0; i < n; ++i)
      for (isize j = 0; j < 40; ++j) bits[static_cast<std::size_t>(i * n + (i / 64 * 64 + j) % n)] = 1;
    const mask_function diagonal{[](const mask_site&, isize i, isize j) { return i / 100 == j / 100; }};
    known = mask_blocks(diagonal, {0, 0, n, n});
    const packed sequences{cu.data(), cu.data(), 4};
    all = {{"window", window{.width = 64}},
           {"window, sinks", window{.width = 64, .first = 4}},
           {"two sided", two_sided{30, 30}},
           {"prefix", prefix_lm{100}},
           {"chunks", chunked_local{128}},
           {"packed", packed{cu.data(), cu.data(), 4, true}},
           {"documents", documents{sequences, window{.width = 50}}},
           {"blocks", block_mask{blocks.data(), 64, 64, 0, 0, 16}},
           {"table", boolean_mask{bits.data(), 0, 0, n}},
           {"both", both{causal{}, two_sided{64, 0}}},
           {"function", diagonal},
           {"known blocks", mask_blocks_of{&known, diagonal}},
           {"tree", tree{&drafts}}};
  }
};

}  // namespace

TEST_CASE("mask: softmax computes what a mask shows, and about no more") {
  const sparse_masks masks;
  const isize n = sparse_masks::n;
  test::random r(6);
  const test::tensor q = test::normal(r, dtype::f32, 1, 1, n, 8), k = test::normal(r, dtype::f32, 1, 1, n, 8),
                     v = test::normal(r, dtype::f32, 1, 1, n, 8);
  isize asked = 0;  // pairs that reach the score modification: those of panels that are not wholly masked
  const auto counter = [count = &asked](const mask_site&, isize, isize, auto x) {
    ++*count;
    return x;
  };
  for (const auto& [name, m] : masks.all) {
    CAPTURE(name);
    const softmax_attention a{.mask = m, .score = counter};
    test::tensor out = test::unwritten(dtype::f32, 1, 1, n, 8);
    asked = 0;
    prefill(serial, a, q, k, v, out);
    isize shown = 0;
    for (isize i = 0; i < n; ++i)
      for (isize j = 0; j < n; ++j) shown += m.visible(a.site({1, 1, 1, n, n, 8, 8}, 0), i, j);
    CHECK(asked >= shown);
    // Panels of keys by a tile of up to 64 rows are asked as a whole: a rim of up to one tile. A tree's ancestors lie scattered.
    if (std::string(name) != "tree") CHECK(asked - shown <= 72 * n);
  }
}

TEST_CASE("mask: NaN in a key reaches only the rows that see it, in prefill and in decoding") {
  const sparse_masks masks;
  const isize n = sparse_masks::n;
  test::random r(7);
  const test::tensor q = test::normal(r, dtype::f32, 1, 1, n, 8), clean = test::normal(r, dtype::f32, 1, 1, n, 8);
  std::vector<bool> bad(static_cast<std::size_t>(n));
  test::tensor dirty = clean;
  for (isize j = 0; j < n; ++j) {
    bad[static_cast<std::size_t>(j)] = r.coin(0.02) || j / 64 == 9;  // scattered, and a whole block
    for (isize c = 0; c < 8 && bad[static_cast<std::size_t>(j)]; ++c) dirty.set(0, 0, j, c, std::nan(""));
  }
  for (const auto& [name, m] : masks.all) {
    const softmax_attention a{.mask = m};
    test::tensor want = test::unwritten(dtype::f32, 1, 1, n, 8), got = test::unwritten(dtype::f32, 1, 1, n, 8);
    prefill(serial, a, q, clean, clean, want);
    prefill(serial, a, q, dirty, dirty, got);
    isize wrong = 0;
    for (isize i = 0; i < n; ++i) {
      bool reached = false;
      for (isize j = 0; j < n; ++j)
        reached = reached || (bad[static_cast<std::size_t>(j)] && m.visible(a.site({1, 1, 1, n, n, 8, 8}, 0), i, j));
      for (isize c = 0; c < 8; ++c)
        wrong += reached ? !std::isnan(got.get(0, 0, i, c)) : got.get(0, 0, i, c) != want.get(0, 0, i, c);
    }
    CAPTURE(name);
    CHECK(wrong == 0);
  }
  const std::int32_t length[] = {333};
  for (const mask& m : {mask(window{.width = 64, .first = 4}), mask(chunked_local{100}), mask(key_lengths{length})}) {
    const test::tensor one = test::rows_of(q, n - 1, 1);
    test::tensor want = test::unwritten(dtype::f32, 1, 1, 1, 8), got = want, hidden = clean;
    for (isize j = 0; j < n; ++j)
      for (isize c = 0; c < 8 && !m.visible({0, 0, 1, n}, 0, j); ++c) hidden.set(0, 0, j, c, std::nan(""));
    prefill(serial, softmax_attention{.mask = m}, one, clean, clean, want);
    prefill(serial, softmax_attention{.mask = m}, one, hidden, hidden, got);
    CHECK_SAME_BITS(want, got);
  }
}
