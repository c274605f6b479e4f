// SPDX-License-Identifier: MIT
/// @file  Rows in every type, NaN in int8, what a ring's mask and score see, saved bytes that are damaged.

#include "cache/model.hpp"

namespace {

using namespace cache_test;

constexpr dtype store_types[] = {dtype::f32, dtype::f64, dtype::bf16, dtype::f16, dtype::i8};

/// A store of every kind, saved.
std::vector<std::vector<std::byte>> saved_stores() {
  test::random r(4);
  const kv_shape s{.heads = 2, .d = 8, .e = 5, .type = dtype::i8};
  const tensor k = random_rows(r, dtype::f32, 2, 9, 8), v = random_rows(r, dtype::f32, 2, 9, 5);
  contiguous_store a(s, 20);
  ring_store b(s, {4, 1, 2});
  paged_pool c(s, 2, 8);
  page_table t;
  a.append(k, v), b.append(k, v), c.append(t, k, v);
  const page_table* tables[] = {&t};
  return {a.save(), b.save(), c.save(tables)};
}
std::string restore(std::size_t kind, std::span<const std::byte> bytes) {
  return test::refusal([&] {
    if (kind == 0) contiguous_store::restore(bytes);
    if (kind == 1) ring_store::restore(bytes);
    if (kind == 2) paged_pool::restore(bytes);
  });
}

}  // namespace

TEST_CASE("rows: an int8 scale is max |x| / 127, and the error half a step") {
  test::random r(1);
  for (const isize width : {1, 31, 32, 33, 64, 100, 576})
    for (const scale_per scale : {scale_per::row, scale_per::group}) {
      const kv_shape s{.heads = 1, .d = width, .e = width, .type = dtype::i8, .scale = scale};
      CHECK(s.scales_of(width) == (scale == scale_per::row ? 1 : ceil_div(width, 32)));
      contiguous_store store(s, 6);
      tensor k = random_rows(r, dtype::f32, 1, 6, width), v = random_rows(r, dtype::f32, 1, 6, width);
      for (isize c = 0; c < width; ++c) {
        k.set(0, 0, 1, c, 0.0);                        // a row of zeros
        k.set(0, 0, 2, c, k.get(0, 0, 2, c) * 1e-38);  // too small for a scale: zeros
        k.set(0, 0, 3, c, k.get(0, 0, 3, c) * 1e30);
        k.set(0, 0, 4, c, c % 2 == 0 ? 1.0 : -1.0);  // exact
      }
      store.append(k, v);
      const kv_sequence x = store.view();
      CHECK(x.k.scale_row == s.scales_of(width));
      for (isize j = 0; j < 6; ++j) {
        const auto got = read_row(x.keys(0), j, width);
        std::vector<double> row;
        for (isize c = 0; c < width; ++c) row.push_back(k.get(0, 0, j, c));
        for (isize c = 0; c < width; ++c) {
          const double error = std::fabs(got[static_cast<std::size_t>(c)] - row[static_cast<std::size_t>(c)]);
          CHECK(error <= allowed(s, row, c, false) + 2e-36);
          if (j == 1 || j == 4) CHECK(error <= 1e-7);
        }
      }
    }
}

TEST_CASE("rows: a NaN or infinity in an int8 row is seen by those who read the row, and by nobody else") {
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL, 1e300})
    for (const scale_per scale : {scale_per::row, scale_per::group})
      for (const bool in_key : {true, false})
        for (const isize n : {1, 12}) {
          test::random r(2);
          const dtype type = bad == 1e300 ? dtype::f32 : dtype::bf16;
          const kv_shape s{.heads = 2, .d = 70, .e = 40, .type = dtype::i8, .scale = scale};
          contiguous_store clean(s, 60), poisoned(s, 60);
          tensor k = random_rows(r, type, 2, 60, 70), v = random_rows(r, type, 2, 60, 40);
          clean.append(k, v);
          const isize at = 55;
          (in_key ? k : v).set(0, 1, at, 35, bad);
          poisoned.append(k, v);
          const tensor q = random_rows(r, dtype::f32, 4, n, 70);
          tensor a = test::unwritten(dtype::f32, 1, 4, n, 40), b = test::unwritten(dtype::f32, 1, 4, n, 40);
          const softmax_attention m{.mask = causal{}};
          const kv_sequence x = clean.view(), y = poisoned.view();
          prefill(serial, m, q, {&x, 1}, a);
          prefill(serial, m, q, {&y, 1}, b);
          CAPTURE(bad, in_key, n, scale == scale_per::row);
          for (isize h = 0; h < 4; ++h)
            for (isize i = 0; i < n; ++i) {
              const bool sees = h >= 2 && 60 - n + i >= at;  // heads 2 and 3 read KV head 1
              for (isize c = 0; c < 40; ++c) {
                const bool hit = sees && (in_key || scale == scale_per::row || c >= 32);
                if (hit)
                  CHECK(std::isnan(b.get(0, h, i, c)));
                else
                  CHECK(b.get(0, h, i, c) == a.get(0, h, i, c));
              }
            }
        }
}

TEST_CASE("rows: the first rows of a ring keep their token numbers in masks and scores") {
  std::vector<float> bias(400);
  test::random r(6);
  for (float& x : bias) x = static_cast<float>(r.normal());
  for (const dtype type : store_types)
    for (const isize n : {1, 3, 25}) {
      const kv_shape s{.heads = 2, .d = 24, .e = 16, .type = type};
      ring_store store(s, {50, 7, 25});
      model m{s, {}, {}};
      const dtype in = type == dtype::f64 ? dtype::f64 : dtype::f32;
      for (int part = 0; part < 12; ++part) {
        const tensor k = random_rows(r, in, 2, 25, 24), v = random_rows(r, in, 2, 25, 16);
        store.append(k, v);
        append_like(m, store.view(), k, v, {nullptr, 0, nullptr});
      }
      CHECK(store.dropped() > 0);
      CAPTURE(n, fovea::name_of(type));
      const window w{50, 7};
      const additive_bias line{.table = bias.data(), .key_stride = 1};
      attends({.mask = w, .score = line}, store.view(), m, n, r);
      const std::vector<float> many(16, 0.07F);
      attends({.mask = w, .score = chain{softcap{4.0}, alibi{many.data()}}}, store.view(), m, n, r);
      std::vector<std::uint8_t> seen(300);
      for (auto& x : seen) x = r.coin(0.8);
      attends({.mask = both{w, boolean_mask{seen.data(), 0, 0, 0}}}, store.view(), m, n, r);
      attends({.mask = chunked_local{40}}, store.view(), m, n, r);
    }
}

TEST_CASE("rows: saved stores that are cut, damaged or of another kind are refused") {
  const auto all = saved_stores();
  test::random r(8);
  for (std::size_t kind = 0; kind < all.size(); ++kind) {
    const auto& bytes = all[kind];
    CHECK(restore(kind, bytes) == "accepted");
    for (std::size_t other = 0; other < all.size(); ++other)
      if (other != kind) CHECK_SAYS(restore(other, bytes), "wrong magic");
    for (int round = 0; round < 60; ++round) {
      auto damaged = bytes;
      damaged[static_cast<std::size_t>(r.integer(0, static_cast<isize>(bytes.size()) - 1))] ^= std::byte{16};
      CHECK(restore(kind, damaged) != "accepted");
      CHECK(restore(kind, std::span(bytes).first(static_cast<std::size_t>(
                              r.integer(0, static_cast<isize>(bytes.size()) - 1)))) != "accepted");
    }
  }
}

TEST_CASE("rows: a state in a ring does not grow, and costs what state_bytes says") {
  const softmax_attention all{.mask = window{100, 4}},
      ring{.mask = window{100, 4}, .store = {.kind = state_store::form::ring, .chunk = 32}};
  const shape small{1, 4, 2, 1, 50, 64, 32, dtype::bf16}, large{1, 4, 2, 1, 1 << 20, 64, 32, dtype::bf16};
  CHECK(ring.state_bytes(small) == ring.state_bytes(large));
  CHECK(ring.state_bytes(large) == ring.make_state(large).bytes());
  CHECK(ring.state_bytes(large) == 2 * (4 + 100 + 31) * (64 + 32) * 2 + 8);
  CHECK(all.state_bytes(large) == std::size_t{2} * (1 << 20) * (64 + 32) * 2);
  softmax_attention bytes = ring;
  bytes.store.type = dtype::i8;
  CHECK(bytes.state_bytes(large) == 2 * 135 * (64 + 32) + 2 * 135 * 4 * 2 + 8);
  CHECK(ring.tag() != bytes.tag());
  CHECK(ring.tag() != all.tag());
}
