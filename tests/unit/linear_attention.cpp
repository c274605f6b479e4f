// SPDX-License-Identifier: MIT
/// @file  linear_attention beyond the laws: planted NaNs, extreme gates, grouped values, states as arrays, and every refusal.

#include <array>
#include <cmath>
#include <cstring>

#include <fovea/feature/favor.hpp>
#include <fovea/feature/learned.hpp>
#include <fovea/feature/merge_map.hpp>
#include <fovea/linear.hpp>
#include <fovea/linear/reference.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;

/// Inputs of any rule; gates that a rule does not take stay out of `gates`.
struct inputs {
  test::tensor q, k, v, g1, gr, beta, b, w;
  inputs(isize H, isize G, isize HV, isize n, isize d, isize e, dtype type = dtype::f32, std::uint64_t seed = 1) {
    test::random r(seed);
    q = test::normal(r, type, 1, H, n, d, test::layout::bhnd, 0.3),
    k = test::normal(r, type, 1, G, n, d, test::layout::bhnd, 0.3), v = test::normal(r, type, 1, HV, n, e);
    const auto uniform = [&](isize width, double low, double high) {
      test::tensor t(type, 1, HV, n, width);
      return t.fill([&] { return r.uniform(low, high); });
    };
    g1 = uniform(1, -1, 0), gr = uniform(d, -1, 0), beta = uniform(1, 0, 1), b = uniform(d, 0, 1), w = uniform(e, 0, 1);
  }
  fovea::gates gates(rule u) const {
    fovea::gates out;
    if (u == rule::decay || u == rule::gated_delta) out.log_decay = g1;
    if (u == rule::gla || u == rule::kda || u == rule::gdn2) out.log_decay = gr;
    if (u == rule::delta || u == rule::gated_delta || u == rule::kda) out.beta = beta;
    if (u == rule::gdn2) out.erase = b, out.write = w;
    return out;
  }
  problem call(rule u, test::tensor& out) const { return {q, k, v, out, {}, gates(u)}; }
};

test::tensor run(const linear_attention& m, const inputs& x, exec_ref exec = serial) {
  test::tensor out = test::unwritten(x.q.type(), 1, std::max(x.q.heads(), x.v.heads()), x.q.length(), x.v.width());
  prefill(exec, m, x.q, x.k, x.v, out, {.gates = x.gates(m.rule)});
  return out;
}
test::tensor twin(const linear_attention& m, const inputs& x) {
  test::tensor out = test::unwritten(dtype::f64, 1, std::max(x.q.heads(), x.v.heads()), x.q.length(), x.v.width());
  problem p = x.call(m.rule, out);
  reference::prefill(m, p);
  return out;
}

constexpr rule rules[] = {rule::none, rule::decay, rule::gla, rule::delta, rule::gated_delta, rule::kda, rule::gdn2};

}  // namespace

TEST_CASE("linear: a NaN in any input of token t reaches no earlier token") {
  const isize n = 75, t0 = 37;
  for (const rule u : rules)
    for (isize t = t0; t < t0 + 5; ++t) {
      inputs x(1, 1, 1, n, 20, 40);
      const linear_attention m{.rule = u};
      const test::tensor clean = run(m, x);
      for (test::tensor* in : {&x.q, &x.k, &x.v, &x.g1, &x.gr, &x.beta, &x.b, &x.w}) in->set(0, 0, t, 0, std::nan(""));
      const test::tensor out = run(m, x);
      CAPTURE(name_of(u), t);
      CHECK_SAME_BITS(test::rows_of(out, 0, t), test::rows_of(clean, 0, t));
      CHECK(std::isnan(out.get(0, 0, t, 0)));
    }
}

TEST_CASE("linear: gates down to e^-100 and 0 stay exact") {
  for (const rule u : {rule::decay, rule::gla, rule::gated_delta, rule::kda, rule::gdn2}) {
    inputs x(2, 2, 2, 150, 24, 40);
    test::random r(7);
    for (test::tensor* g : {&x.g1, &x.gr})
      g->fill([&] {
        const double c = r.uniform();
        return c < 0.1 ? -std::numeric_limits<double>::infinity() : c < 0.3 ? -100.0 : c < 0.5 ? -20.0 : -0.01 * c;
      });
    CAPTURE(name_of(u));
    const linear_attention m{.rule = u};
    CHECK_CLOSE(run(m, x).values(), twin(m, x).values(), {.c = 64});
  }
}

TEST_CASE("linear: steady decay over a long sequence") {
  inputs x(1, 1, 1, 6000, 16, 33);
  const double gamma[] = {31.0 / 32.0};
  for (const bool norm : {false, true}) {
    const linear_attention m{.map = elu1{}, .rule = rule::decay, .normalise = norm, .gamma = gamma};
    test::tensor out = test::unwritten(dtype::f32, 1, 1, 6000, 33), want = test::unwritten(dtype::f64, 1, 1, 6000, 33);
    prefill(serial, m, x.q, x.k, x.v, out);
    reference::prefill(m, {x.q, x.k, x.v, want, {}, {}});
    CHECK_CLOSE(out.values(), want.values(), {.c = 64});
  }
}

TEST_CASE("linear: grouped values, grouped queries, many query heads") {
  struct {
    isize H, G, HV;
  } const heads[] = {{2, 2, 6}, {6, 2, 2}, {7, 1, 1}, {1, 1, 5}};
  for (const auto& h : heads)
    for (const rule u : rules) {
      const inputs x(h.H, h.G, h.HV, 70, 32, 48);
      const linear_attention m{.rule = u};
      CAPTURE(name_of(u), h.H, h.G, h.HV);
      const test::tensor out = run(m, x);
      CHECK_CLOSE(out.values(), twin(m, x).values(), {.c = 64});
      const threads three(3);
      CHECK_SAME_BITS(run(m, x, three), out);
      // token by token
      test::tensor steps = test::unwritten(dtype::f32, 1, out.heads(), 70, 48);
      const fovea::gates g = x.gates(u);
      state s = m.make_state(x.call(u, steps).shape());
      const auto at = [](const tensor_ref& t, isize i) { return t ? t.slice(i, 1) : t; };
      for (isize i = 0; i < 70; ++i)
        step(three, m, at(x.q, i), at(x.k, i), at(x.v, i), steps.ref().slice(i, 1), s,
             {.gates = {at(g.log_decay, i), at(g.beta, i), at(g.erase, i), at(g.write, i)}});
      CHECK_CLOSE(steps.values(), twin(m, x).values(), {.c = 64});
      CHECK(s.tokens() == 70);
    }
}

TEST_CASE("linear: heads left over by the threads are cut in columns, the bits are those of one thread") {
  const isize d = 16, e = 96, n = 260;
  const auto w = feature::orthogonal_directions(24, d, 3);
  const projection directions(w.data(), 1, 24, d);
  const struct {
    int count;
    isize heads;
  } cases[] = {{2, 3}, {2, 1}, {3, 4}, {4, 5}};  // 2 + 1 heads, and so on: the last ones in two or three ranges
  for (const auto& c : cases)
    for (const rule u : rules)
      for (const bool maps : {false, true}) {
        linear_attention m{.rule = u};
        if (maps && is_delta(u)) continue;
        if (maps) m.map = u == rule::gla ? feature_map(relu_map{}) : feature_map(favor_plain{directions.ref()});
        if (maps && u == rule::none) m.map = hedgehog{directions.ref(), directions.ref()};
        const inputs x(2 * c.heads, c.heads, c.heads, n, d, e);
        CAPTURE(c.count, c.heads, name_of(u), maps);
        const threads pool(c.count);
        CHECK_SAME_BITS(run(m, x, pool), run(m, x));
        test::tensor one = test::unwritten(dtype::f32, 1, 2 * c.heads, n, e), many = one;
        state s = m.make_state(x.call(u, one).shape()), t = s;
        for (const isize first : {isize{0}, isize{130}}) {
          const auto rows = [&](const tensor_ref& part) { return part ? part.slice(first, 130) : part; };
          const fovea::gates g = x.gates(u);
          const call_options o{.gates = {rows(g.log_decay), rows(g.beta), rows(g.erase), rows(g.write)}};
          prefill(serial, m, rows(x.q), rows(x.k), rows(x.v), one.ref().slice(first, 130), s, o);
          prefill(pool, m, rows(x.q), rows(x.k), rows(x.v), many.ref().slice(first, 130), t, o);
        }
        CHECK_SAME_BITS(many, one);
        CHECK(std::memcmp(s.as<std::byte>(), t.as<std::byte>(), s.bytes()) == 0);
      }
}

TEST_CASE("linear: a copy of the state is a snapshot") {
  const inputs x(2, 1, 1, 40, 16, 16);
  const linear_attention m{};
  test::tensor out = test::unwritten(dtype::f32, 1, 2, 40, 16), again = test::unwritten(dtype::f32, 1, 2, 40, 16);
  state s = m.make_state(x.call(rule::none, out).shape());
  const auto part = [&](test::tensor& to, isize first, isize count) {
    prefill(serial, m, x.q.ref().slice(first, count), x.k.ref().slice(first, count), x.v.ref().slice(first, count),
            to.ref().slice(first, count), s);
  };
  part(out, 0, 30);
  const state before = s;
  part(out, 30, 10);
  s = before;
  part(again, 0, 10);  // other tokens, then rolled back
  s = before;
  part(again, 30, 10);
  CHECK_SAME_BITS(test::rows_of(again, 30, 10), test::rows_of(out, 30, 10));
}

TEST_CASE("linear: the state does not grow, nor does the workspace") {
  const linear_attention m{};
  shape s{1, 4, 2, 1000, 1000, 64, 64, dtype::f32};
  const std::size_t bytes = m.state_bytes(s), scratch = m.workspace_size(s, 2);
  s.n = s.m = 1000000;
  CHECK(m.state_bytes(s) == bytes);
  CHECK(m.workspace_size(s, 2) == scratch);
  CHECK(bytes < 2 * (64 * 64 + 200) * sizeof(float));
  CHECK(linear_attention{.is_causal = false}.workspace_size(s, 2) < 400000);
}

TEST_CASE("linear: a denominator of 0 gives 0") {
  inputs x(1, 1, 1, 9, 8, 8);
  x.q.fill([] { return -200.0; }), x.k.fill([] { return -200.0; });  // elu + 1 underflows to 0
  const test::tensor out = run({}, x);
  for (const double y : out.values().data) CHECK(y == 0.0);
}

TEST_CASE("linear: refusals name the argument, the value and what was wanted") {
  const inputs x(2, 2, 2, 8, 4, 6);
  test::tensor out = test::unwritten(dtype::f32, 1, 2, 8, 6);
  const auto before = out.bytes();
  const auto said = [&](const linear_attention& m, const gates& g) {
    return test::refusal([&] { prefill(serial, m, x.q, x.k, x.v, out, {.gates = g}); });
  };
  CHECK_SAYS(said({.rule = rule::gla}, {}), "log_decay (g) is missing; rule gla needs it");
  CHECK_SAYS(said({.rule = rule::gla}, {.log_decay = x.g1}), "wanted [1, 2, 8, 4]");
  CHECK_SAYS(said({.rule = rule::decay}, {.log_decay = x.gr}), "wanted [1, 2, 8, 1]");
  CHECK_SAYS(said({.rule = rule::decay}, {}), "log_decay (g) is missing; rule decay needs it, or gamma");
  CHECK_SAYS(said({.rule = rule::delta}, {}), "beta is missing");
  CHECK_SAYS(said({}, {.beta = x.beta}), "beta was given; rule none has none");
  CHECK_SAYS(said({.rule = rule::gdn2}, {.log_decay = x.gr, .erase = x.b}), "write (w) is missing");
  CHECK_SAYS(said({.rule = rule::delta, .normalise = true}, {.beta = x.beta}), "has no denominator");
  CHECK_SAYS(said({.rule = rule::delta, .is_causal = false}, {.beta = x.beta}), "needs true");
  CHECK_SAYS(said({.scale = std::nan("")}, {}), "scale is nan");
  CHECK_SAYS(said({.eps = -1.0}, {}), "must not be negative");
  const std::array<double, 3> three{0.5, 0.5, 0.5};
  CHECK_SAYS(said({.rule = rule::decay, .gamma = three}, {}),
             "gamma holds 3 numbers; wanted one, or one for each of 2");
  const std::array<double, 1> much{1.5};
  CHECK_SAYS(said({.rule = rule::decay, .gamma = much}, {}), "a decay lies in [0, 1]");
  CHECK_SAYS(said({.gamma = much}, {}), "takes no constant decay");
  CHECK(out.bytes() == before);

  test::tensor lse(dtype::f32, 1, 2, 8, 1);
  CHECK_SAYS(test::refusal([&] { prefill(serial, linear_attention{}, x.q, x.k, x.v, out, {.lse = lse}); }),
             "no log-sum-exp");
  CHECK_SAYS(
      test::refusal([&] { prefill(serial, linear_attention{}, x.q, x.k, x.v, const_cast<test::tensor&>(x.v).ref()); }),
      "out");
  const inputs odd(2, 2, 3, 8, 4, 6);
  test::tensor out3 = test::unwritten(dtype::f32, 1, 3, 8, 6);
  CHECK_SAYS(test::refusal([&] { prefill(serial, linear_attention{}, odd.q, odd.k, odd.v, out3); }),
             "v has 3 heads and q has 2");
  CHECK_SAYS(test::refusal([&] {
               (void)linear_attention{.is_causal = false}.make_state(shape{1, 1, 1, 1, 1, 4, 4, dtype::f32});
             }),
             "is_causal is false");

  const linear_attention delta{.rule = rule::delta}, other{.eps = 1e-3}, one{};
  const shape s = x.call(rule::none, out).shape();
  state a = delta.make_state(s), b = delta.make_state(s), c = one.make_state(s), d = other.make_state(s);
  CHECK_SAYS(test::refusal([&] { delta.merge(a, b); }), "r x r matrix");
  CHECK_SAYS(test::refusal([&] { one.merge(c, d); }), "not made by this linear");
  CHECK_SAYS(test::refusal([&] { prefill(serial, one, x.q, x.k, x.v, out, d); }), "not made by this linear");
  CHECK_SAYS(test::refusal([&] {
               one.load_state(c, {{"S0", array({2, 3}, std::vector<float>(6))}});
             }),
             "S0 is [2, 3] f32");
}
