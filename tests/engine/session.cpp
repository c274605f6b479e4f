// SPDX-License-Identifier: MIT
/// @file  The engine on a small random model: against plain loops, cut in every way, in batches, with mixed heads, on threads.
#include "catch.hpp"

#include <fovea/hybrid.hpp>
#include <fovea/softmax.hpp>

#include "engine/error.hpp"
#include "engine/pool.hpp"
#include "engine/sampler.hpp"
#include "engine/session.hpp"
#include "tiny.hpp"

namespace {

using namespace engine;
using ids = std::vector<std::uint32_t>;
using rows = std::vector<std::vector<float>>;

ids some(std::size_t count, std::uint32_t seed = 1) {
  ids out;
  for (std::size_t i = 0; i < count; ++i) out.push_back((seed * 31 + static_cast<std::uint32_t>(i) * 37 % 83) % 97);
  return out;
}

void append(rows& to, const logits& l) {
  for (isize i = 0; i < l.rows; ++i) to.emplace_back(l.row(i).begin(), l.row(i).end());
}

/// The sequence in calls of these lengths.
rows run(session& s, const ids& text, const std::vector<std::size_t>& cuts) {
  sequence to = s.make_sequence();
  rows out;
  std::size_t at = 0;
  for (const std::size_t n : cuts) {
    append(out, s.forward({{to, std::span(text).subspan(at, n)}}, logits_of::all));
    at += n;
  }
  REQUIRE(at == text.size());
  return out;
}

template <class Want>
void check_close(const rows& got, const Want& want, double bound) {
  REQUIRE(got.size() == want.size());
  double scale = 0, worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i)
    for (std::size_t c = 0; c < got[i].size(); ++c) {
      const auto g = static_cast<double>(got[i][c]), w = static_cast<double>(want[i][c]);
      scale = std::max(scale, std::abs(w));
      worst = std::isfinite(g) ? std::max(worst, std::abs(g - w)) : INFINITY;
    }
  CHECK(worst <= bound * scale);
}

const session_options exact_cache{.cache = fovea::dtype::f32};

fovea::any_attention ring(isize window) {
  fovea::softmax_attention m{.mask = fovea::window{.width = window, .first = 0}};
  m.store.kind = fovea::state_store::form::ring, m.store.chunk = 8;
  return fovea::any_attention::hold(m);
}

}  // namespace

TEST_CASE("logits are those of plain loops in double") {
  for (const bool tied : {false, true})
    for (const auto type : {fovea::element::f32, fovea::element::f16, fovea::element::bf16}) {
      const tiny::folder f({.tied = tied, .type = type});
      const model m(f.path());
      session s(m, exact_plan(m.config()), fovea::serial, exact_cache);
      check_close(run(s, some(40), {40}), f.logits(some(40)), 1e-5);
    }
}

TEST_CASE("other geometries: one KV head, every head its own, odd sizes, a scaled rope that changes something") {
  for (const auto& g : {tiny::geometry{.heads = 4, .kv_heads = 1, .head_dim = 10, .width = 17, .mlp_width = 33},
                        tiny::geometry{.heads = 3, .kv_heads = 3, .head_dim = 32, .width = 64, .vocabulary = 101}}) {
    const tiny::folder f(g);
    const model m(f.path());
    session s(m, exact_plan(m.config()), fovea::serial, exact_cache);
    check_close(run(s, some(30), {30}), f.logits(some(30)), 1e-5);
  }
  const tiny::folder scaled({.more = ", \"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 4}"});
  const model m(scaled.path());
  session s(m, exact_plan(m.config()), fovea::serial, exact_cache);
  const auto plain = scaled.logits(some(30));
  const rows got = run(s, some(30), {30});
  CHECK(std::abs(static_cast<double>(got[29][5]) - plain[29][5]) > 1e-3);
}

TEST_CASE("however a sequence is cut into calls and parts, its logits are the same") {
  const tiny::folder f({});
  const model m(f.path());
  for (const isize part : {512, 7}) {
    session s(m, exact_plan(m.config()), fovea::serial, {.rows = part, .cache = fovea::dtype::f32});
    const auto want = f.logits(some(33));
    const std::vector<std::size_t> one_by_one(33, 1);
    for (const auto& cuts : {std::vector<std::size_t>{33}, {1, 32}, {9, 8, 16}, {32, 1}, one_by_one})
      check_close(run(s, some(33), cuts), want, 1e-5);
  }
}

TEST_CASE("sequences of different lengths in one call, prefill and decoding mixed") {
  const tiny::folder f({});
  const model m(f.path());
  session s(m, exact_plan(m.config()), fovea::serial, {.rows = 16, .cache = fovea::dtype::f32});
  const ids a = some(25, 1), b = some(18, 2), c = some(3, 3);
  sequence x = s.make_sequence(), y = s.make_sequence(), z = s.make_sequence();
  s.forward({{x, std::span(a).first(24)}, {y, std::span(b).first(4)}}, logits_of::none);
  rows got;
  append(got, s.forward({{x, std::span(a).subspan(24)}, {z, c}, {y, std::span(b).subspan(4)}}, logits_of::last));
  check_close(got, std::vector{f.logits(a).back(), f.logits(c).back(), f.logits(b).back()}, 1e-5);
  CHECK((x.tokens() == 25 && y.tokens() == 18 && z.tokens() == 3));
}

TEST_CASE("the same bits for any number of threads") {
  const tiny::folder f({.type = fovea::element::f16});
  const model m(f.path());
  const std::vector<std::size_t> cuts{20, 1, 1, 5, 9};
  session alone(m, exact_plan(m.config()), fovea::serial);
  const rows want = run(alone, some(36), cuts);
  for (const int count : {1, 2, 3}) {
    pool threads(count);
    session s(m, exact_plan(m.config()), threads);
    CHECK(run(s, some(36), cuts) == want);
  }
}

TEST_CASE("mixed heads: groups of one mechanism give what the whole layer gives") {
  const tiny::folder f({});
  const model m(f.path());
  const auto exact = exact_plan(m.config()).layers[0][0].mechanism;
  attention_plan p = exact_plan(m.config());
  p.layers[0] = {{exact, {0, 3}}, {exact, {1, 2, 4, 5}}};     // views with steps 3; a gathered group
  p.layers[1] = {{ring(64), {0, 1, 2}}, {exact, {3, 4, 5}}};  // a state beside a store
  p.layers[2] = {{ring(64), {0, 2, 4, 5}}, {exact, {1, 3}}};  // gathered, with a state
  session s(m, p, fovea::serial, exact_cache);
  const auto want = f.logits(some(30));
  for (const auto& cuts : {std::vector<std::size_t>{30}, {11, 1, 1, 17}})
    check_close(run(s, some(30), cuts), want, 1e-5);
}

TEST_CASE("groups of heads read their KV heads equally often") {
  const tiny::folder f({});
  const model m(f.path());
  using groups = std::vector<std::vector<isize>>;
  CHECK(uniform_groups(m.config(), {5, 0, 1, 2, 3, 4}) == groups{{0, 1, 2, 3, 4, 5}});
  CHECK(uniform_groups(m.config(), {0, 1, 2, 4}) == groups{{0, 1, 2}, {4}});
  const tiny::folder wide({.heads = 12, .kv_heads = 6});
  const model w(wide.path());
  CHECK(uniform_groups(w.config(), {0, 1, 4, 5, 8, 9}) == groups{{0, 1, 4, 5, 8, 9}});
  CHECK(uniform_groups(w.config(), {0, 1, 4, 5, 6, 7}) == groups{{0, 1, 4, 5}, {6, 7}});
}

TEST_CASE("groups whose rows are stored alike share a KV store") {
  const tiny::folder f({.heads = 12, .kv_heads = 6});
  const model m(f.path());
  const auto exact = exact_plan(m.config()).layers[0][0].mechanism;
  const auto hybrid = fovea::any_attention::hold(
      fovea::hybrid_attention{.block_q = 4, .block_k = 4, .is_causal = true, .budget = 1, .at_least = 1 << 20});
  const auto int8 = fovea::any_attention::hold(fovea::softmax_attention{
      .mask = fovea::causal{}, .store = {.kind = fovea::state_store::form::contiguous, .type = fovea::dtype::i8}});
  attention_plan p = exact_plan(m.config());
  // KV heads 0, 2, 4 beside 3: not in equal steps among {0, 2, 3, 4}.
  p.layers[0] = {{exact, {0, 1, 4, 5, 8, 9}}, {exact, {6, 7}}, {ring(64), {2, 3, 10, 11}}};
  p.layers[1] = {{exact, {0, 2, 4}}, {hybrid, {1, 3, 5}}, {exact, {6, 7, 8, 9, 10, 11}}};
  session s(m, p, fovea::serial, exact_cache), plain(m, exact_plan(m.config()), fovea::serial, exact_cache);
  const auto want = f.logits(some(30));
  for (const auto& cuts : {std::vector<std::size_t>{30}, {11, 1, 1, 17}})
    check_close(run(s, some(30), cuts), want, 1e-5);
  attention_plan apart = exact_plan(m.config()), mixed = apart;
  apart.layers[1] = {{exact, {0, 2, 4, 6, 8, 10}}, {exact, {1, 3, 5, 7, 9, 11}}};
  mixed.layers[1] = {{int8, {0, 2, 4, 6, 8, 10}}, {exact, {1, 3, 5, 7, 9, 11}}};
  session two(m, apart, fovea::serial, exact_cache), types(m, mixed, fovea::serial, exact_cache);
  CHECK(two.make_sequence().bytes() == plain.make_sequence().bytes());
  CHECK(types.make_sequence().bytes() > plain.make_sequence().bytes());
}

TEST_CASE("a window changes the logits, and only behind the window") {
  const tiny::folder f({});
  const model m(f.path());
  attention_plan p = exact_plan(m.config());
  p.layers[1] = {{ring(10), {0, 1, 2, 3, 4, 5}}};
  session s(m, p, fovea::serial, exact_cache);
  const rows got = run(s, some(30), {30});
  const auto want = f.logits(some(30));
  check_close(rows(got.begin(), got.begin() + 10), std::vector(want.begin(), want.begin() + 10), 1e-5);
  CHECK(std::abs(static_cast<double>(got[25][3]) - want[25][3]) > 1e-4);
}

TEST_CASE("a copy of a sequence is a fork") {
  const tiny::folder f({});
  const model m(f.path());
  attention_plan p = exact_plan(m.config());
  p.layers[1] = {{ring(10), {0, 1, 2, 3, 4, 5}}};
  session s(m, p, fovea::serial);
  const ids text = some(20), other = some(5, 9);
  sequence a = s.make_sequence();
  s.forward({{a, std::span(text).first(15)}}, logits_of::none);
  sequence b = a;
  s.forward({{b, other}}, logits_of::none);
  rows got, want;
  append(got, s.forward({{a, std::span(text).subspan(15)}}, logits_of::all));
  sequence fresh = s.make_sequence();
  s.forward({{fresh, std::span(text).first(15)}}, logits_of::none);
  append(want, s.forward({{fresh, std::span(text).subspan(15)}}, logits_of::all));
  CHECK(got == want);
}

TEST_CASE("captured q, k, v are turned, of every layer and row") {
  const tiny::folder f({});
  const model m(f.path());
  session s(m, exact_plan(m.config()), fovea::serial, {.rows = 8, .cache = fovea::dtype::f32});
  const rows plain = run(s, some(20), {20});
  std::vector<float> last_key;
  std::vector<isize> first;
  s.on_attention = [&](const attention_inputs& in) {
    CHECK((in.q.heads == 6 && in.k.heads == 2 && in.v.length == in.q.length));
    if (in.layer == 2) first.push_back(in.first);
    if (in.layer == 2 && in.first == 16)
      for (isize c = 0; c < 16; ++c) last_key.push_back(in.k(0, 1, 3, c));
  };
  check_close(run(s, some(20), {20}), plain, 1e-5);
  CHECK(first == std::vector<isize>{0, 8, 16});
  // A key is the same wherever the calls are cut.
  REQUIRE(last_key.size() == 16);
  const std::vector<float> in_parts = last_key;
  last_key.clear();
  s.on_attention = [&](const attention_inputs& in) {
    for (isize c = 0; c < 16 && in.layer == 2 && in.first == 19; ++c) last_key.push_back(in.k(0, 1, 0, c));
  };
  run(s, some(20), {19, 1});
  check_close({last_key}, rows{in_parts}, 1e-5);
}

TEST_CASE("sampling: greedy, reproducible, inside the nucleus") {
  const std::vector<float> l{0.0F, 3.0F, 1.0F, 2.9F, -5.0F};
  CHECK(sampler(0, 1, 1).next(l) == 1);
  sampler a(1, 0.6, 7), b(1, 0.6, 7), c(1, 1, 7);
  bool other = false, outside = false;
  for (int i = 0; i < 200; ++i) {
    const std::uint32_t x = a.next(l);
    CHECK(x == b.next(l));
    CHECK((x == 1 || x == 3));
    other = other || x == 3;
    const std::uint32_t y = c.next(l);
    outside = outside || (y != 1 && y != 3);
  }
  CHECK((other && outside));
  CHECK_THROWS_AS(sampler(-1, 1, 1), engine::error);
  CHECK_THROWS_AS(sampler(1, 0, 1), engine::error);
}
