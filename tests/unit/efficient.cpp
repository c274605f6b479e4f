// SPDX-License-Identifier: MIT
/// @file  efficient_attention and kfree_reconstruction: long inputs, prefix form, states, padding, hostile numbers, contracts.

#include <fovea/efficient.hpp>
#include <fovea/efficient/configure.hpp>
#include <fovea/efficient/reference.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::refusal;
using test::tensor;

constexpr efficient_attention both_ways{}, prefix{.causal = true};
constexpr efficient_attention scaling{.normalisation = efficient_normalisation::scaling},
    scaling_prefix{.normalisation = efficient_normalisation::scaling, .causal = true};

struct sample {
  tensor q, k, v;
  sample(isize B, isize H, isize G, isize n, isize m, isize d, isize e, dtype type = dtype::f32, double deviation = 1) {
    test::random r(static_cast<std::uint64_t>(n * 1000 + m));
    q = test::normal(r, type, B, H, n, d, test::layout::bhnd, deviation),
    k = test::normal(r, type, B, G, m, d, test::layout::bhnd, deviation);
    v = test::normal(r, type, B, G, m, e);
  }
  shape sizes() const {
    return {q.batch(), q.heads(), k.heads(), q.length(), k.length(), q.width(), v.width(), q.type()};
  }
};
template <class M>
tensor run(const M& m, const sample& x, exec_ref exec = serial) {
  tensor out = test::unwritten(x.q.type(), x.q.batch(), x.q.heads(), x.q.length(), x.v.width());
  prefill(exec, m, x.q, x.k, x.v, out);
  return out;
}
template <class M>
tensor twin(const M& m, const sample& x) {
  tensor out = test::unwritten(dtype::f64, x.q.batch(), x.q.heads(), x.q.length(), x.v.width());
  problem p;
  p.q = x.q, p.k = x.k, p.v = x.v, p.out = out;
  fovea::reference::prefill(m, p);
  return out;
}
tensor rows_from_state(const efficient_attention& m, const sample& x, const std::vector<isize>& cuts) {
  state s = m.make_state(x.sizes());
  tensor out = test::unwritten(x.q.type(), x.q.batch(), x.q.heads(), x.q.length(), x.v.width());
  isize t = 0;
  for (const isize count : cuts) {
    prefill(serial, m, x.q.ref().slice(t, count), x.k.ref().slice(t, count), x.v.ref().slice(t, count),
            out.ref().slice(t, count), s);
    t += count;
  }
  return out;
}

}  // namespace

TEST_CASE("efficient: long inputs are cut into stretches by their length alone") {
  const sample x(1, 2, 1, 3, 9001, 17, 40);
  CHECK_CLOSE(run(both_ways, x).values(), twin(both_ways, x).values(), {.c = 64});
  CHECK_CLOSE(run(scaling, x).values(), twin(scaling, x).values(), {.c = 64});
  const threads three(3);
  CHECK_SAME_BITS(run(both_ways, x), run(both_ways, x, three));
  const shape s{1, 8, 8, 1 << 20, 1 << 20, 64, 64, dtype::f32};
  CHECK(both_ways.workspace_size(s, 1) < (8U << 20));
  CHECK(prefix.workspace_size(s, 1) < (1U << 20));
}

TEST_CASE("efficient: the prefix form, chunks of any size give the same bits") {
  for (const efficient_attention& m : {prefix, scaling_prefix})
    for (const dtype type : {dtype::f32, dtype::f64, dtype::bf16}) {
      const sample x(2, 6, 2, 45, 45, 24, 70, type);
      const tensor whole = run(m, x);
      CHECK_CLOSE(whole.values(), twin(m, x).values(),
                  {.c = 32, .acc = type == dtype::f64 ? type : dtype::f32, .stored = type});
      CHECK_SAME_BITS(whole, rows_from_state(m, x, {45}));
      CHECK_SAME_BITS(whole, rows_from_state(m, x, {1, 1, 17, 3, 23}));
      CHECK_SAME_BITS(whole, rows_from_state(m, x, std::vector<isize>(45, 1)));
    }
  for (const auto& [n, m] : {std::pair<isize, isize>{5, 30}, {30, 5}, {1, 33}, {7, 0}}) {
    const sample x(1, 2, 1, n, m, 16, 33);
    CHECK_CLOSE(run(prefix, x).values(), twin(prefix, x).values(), {.c = 32});
  }
}

TEST_CASE("efficient: rising maxima, huge keys, channels of -inf, keys that are not finite") {
  sample x(1, 1, 1, 40, 40, 8, 16);
  for (isize j = 0; j < 40; ++j) {
    x.k.set(0, 0, j, 0, 5.0 * static_cast<double>(j));  // rises at each token
    x.k.set(0, 0, j, 1, j == 20 ? 1e4 : -1e4);          // one outlier takes the channel
    x.k.set(0, 0, j, 2, j < 30 ? -HUGE_VAL : 0.5);      // nothing seen for 30 tokens
    x.k.set(0, 0, j, 3, -HUGE_VAL);                     // nothing ever
  }
  CHECK_CLOSE(run(prefix, x).values(), twin(prefix, x).values(), {.c = 64});
  CHECK_CLOSE(run(both_ways, x).values(), twin(both_ways, x).values(), {.c = 64});
  const tensor before = run(prefix, x);
  for (const double plant : {double(NAN), HUGE_VAL}) {
    sample y = x;
    for (isize c = 0; c < 8; ++c) y.k.set(0, 0, 33, c, plant);
    for (isize c = 0; c < 16; ++c) y.v.set(0, 0, 33, c, plant);
    const tensor after = run(prefix, y);
    CHECK_SAME_BITS(test::rows_of(before, 0, 33), test::rows_of(after, 0, 33));
    CHECK(std::isnan(after.get(0, 0, 33, 0)));
  }
  const sample wild(1, 2, 1, 50, 300, 64, 64, dtype::f32, 1e4);
  CHECK_CLOSE(run(both_ways, wild).values(), twin(both_ways, wild).values(), {.c = 64});
}

TEST_CASE("efficient: states merge in any grouping, the empty state is the identity") {
  for (const efficient_attention& m : {prefix, scaling_prefix}) {
    const sample x(1, 2, 1, 60, 60, 16, 24);
    const auto part = [&](isize t, isize count) {
      state s = m.make_state(x.sizes());
      tensor out = test::unwritten(dtype::f32, 1, 2, count, 24);
      prefill(serial, m, x.q.ref().slice(t, count), x.k.ref().slice(t, count), x.v.ref().slice(t, count), out, s);
      return s;
    };
    state left = part(0, 20), right = part(20, 25);
    m.merge(left, right);
    state empty = m.make_state(x.sizes());
    m.merge(empty, left);
    m.merge(empty, m.make_state(x.sizes()));
    CHECK(empty.tokens() == 45);
    tensor out = test::unwritten(dtype::f32, 1, 2, 15, 24);
    prefill(serial, m, x.q.ref().slice(45, 15), x.k.ref().slice(45, 15), x.v.ref().slice(45, 15), out, empty);
    CHECK_CLOSE(out.values(), test::rows_of(twin(m, x), 45, 15).values(), {.c = 32});
  }
}

TEST_CASE("efficient: absorb and attend") {
  for (const efficient_attention& m : {both_ways, scaling})
    for (const dtype type : {dtype::f32, dtype::f64, dtype::f16}) {
      const sample x(2, 4, 2, 9, 200, 17, 24, type);
      state a = m.make_state(x.sizes()), b = m.make_state(x.sizes());
      const auto feed = [&](state& s, isize t, isize count) {
        absorb(serial, m, x.k.ref().slice(t, count), x.v.ref().slice(t, count), s);
      };
      feed(a, 0, 1), feed(a, 1, 150), feed(b, 151, 49);
      m.merge(a, b);
      CHECK(a.tokens() == 200);
      tensor out = test::unwritten(type, 2, 4, 9, 24);
      attend(serial, m, x.q, out, a);
      CHECK_CLOSE(out.values(), twin(m, x).values(),
                  {.c = 64, .acc = type == dtype::f64 ? type : dtype::f32, .stored = type});
      out.fill_nan();
      attend(serial, m, x.q, out, m.make_state(x.sizes()));
      for (const double y : out.values().data) CHECK(y == 0);
    }
}

TEST_CASE("efficient: a padded item gives what it gives alone") {
  sample x(2, 2, 1, 5, 4500, 16, 12);
  const std::vector<std::int32_t> lengths{2100, 0};
  x.k.set(0, 0, 2100, 3, NAN), x.v.set(1, 0, 0, 0, NAN);
  efficient_attention padded;
  padded.lengths = lengths;
  const tensor out = run(padded, x);
  tensor alone = test::unwritten(dtype::f32, 1, 2, 5, 12);
  prefill(serial, both_ways, x.q.ref().part(0, 0, 2), x.k.ref().part(0, 0, 1).slice(0, 2100),
          x.v.ref().part(0, 0, 1).slice(0, 2100), alone);
  for (isize h = 0; h < 2; ++h)
    for (isize i = 0; i < 5; ++i)
      for (isize c = 0; c < 12; ++c) {
        REQUIRE(out.get(0, h, i, c) == alone.get(0, h, i, c));
        REQUIRE(out.get(1, h, i, c) == 0);
      }
}

TEST_CASE("kfree_reconstruction: three forms against the twin") {
  using form = kfree_reconstruction::form_type;
  for (const form f : {form::efficient, form::context, form::channel})
    for (const dtype type : {dtype::f32, dtype::f64}) {
      CAPTURE(static_cast<int>(f));
      const kfree_reconstruction m{.form = f, .scale = 0.3};
      const sample x(2, 4, 2, 33, 33, 24, 24, type);
      CHECK_CLOSE(run(m, x).values(), twin(m, x).values(), {.c = 128, .acc = type});
    }
  const sample cross(1, 2, 1, 4, 70, 16, 40);
  CHECK_CLOSE(run(kfree_reconstruction{.form = form::context}, cross).values(),
              twin(kfree_reconstruction{.form = form::context}, cross).values(), {.c = 128});
  CHECK_SAYS(refusal([&] { run(kfree_reconstruction{.form = form::channel}, cross); }), "q has 4 rows and k has 70");
  CHECK_SAYS(refusal([&] { run(kfree_reconstruction{.form = form::channel}, sample(1, 1, 1, 8, 8, 16, 12)); }),
             "v is 12 wide");
}

TEST_CASE("efficient: what is refused, in sentences") {
  const sample x(1, 2, 1, 6, 6, 8, 8);
  CHECK_SAYS(refusal([&] { run(efficient_attention{.scale = 0.0}, x); }), "scale is 0");
  CHECK_SAYS(refusal([&] { run(efficient_attention{.scale = double(NAN)}, x); }), "scale is nan");
  const std::vector<std::int32_t> negative{-1}, many{1, 2};
  CHECK_SAYS(refusal([&] { run(efficient_attention{.lengths = negative}, x); }), "lengths[0] is -1");
  CHECK_SAYS(refusal([&] { run(efficient_attention{.lengths = many}, x); }), "lengths has 2 entries");
  CHECK_SAYS(refusal([&] { run(efficient_attention{.causal = true, .lengths = negative}, x); }), "causal = true");
  tensor out = test::unwritten(dtype::f32, 1, 2, 6, 8), lse = test::unwritten(dtype::f32, 1, 2, 6, 1);
  CHECK_SAYS(refusal([&] { prefill(serial, both_ways, x.q, x.k, x.v, out, {.lse = lse}); }), "no log-sum-exp");
  state s = both_ways.make_state(x.sizes()), other = scaling_prefix.make_state(x.sizes());
  CHECK_SAYS(refusal([&] { prefill(serial, both_ways, x.q, x.k, x.v, out, s); }), "use absorb and attend");
  CHECK_SAYS(refusal([&] { prefill(serial, prefix, x.q, x.k, x.v, out, other); }), "not made by this efficient");
  CHECK_SAYS(refusal([&] { both_ways.merge(s, other); }), "not made by this efficient");
  CHECK_SAYS(refusal([&] { absorb(serial, both_ways, x.k, x.v.ref().slice(0, 5), s); }), "must be equal");
  CHECK_SAYS(refusal([&] { attend(serial, both_ways, x.q.ref().slice(0, 5), out, s); }), "out is [1, 2, 6, 8]");
  for (const double value : out.values().data) CHECK(std::isnan(value));
}

TEST_CASE("efficient: configuration") {
  const auto make = [](const configuration& c, const arrays& tensors) {
    configuration_reader r(c, tensors);
    const any_attention a = c.mechanism == "efficient" ? configure_efficient(r) : configure_kfree_reconstruction(r);
    r.finish();
    return a;
  };
  CHECK(make({"efficient", {{"causal", true}}}, {}).streaming());
  CHECK_FALSE(make({"efficient", {{"normalisation", std::string("scaling")}}}, {}).streaming());
  CHECK_SAYS(refusal([&] {
               make({"efficient", {{"normalisation", std::string("none")}}}, {});
             }),
             "normalisation is \"none\"");
  CHECK_SAYS(refusal([&] { make({"efficient", {{"scale", -2.0}}}, {}); }), "scale is -2");
  CHECK(make({"kfree_reconstruction", {{"form", std::string("channel")}}}, {}).as<kfree_reconstruction>()->form ==
        kfree_reconstruction::form_type::channel);
}
