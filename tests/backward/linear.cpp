// SPDX-License-Identifier: MIT
/// @file  Backward of linear attention: the twin against central differences of the forward twin, the kernel against the twin.

#include "backward/linear_problems.hpp"

using namespace backward_tests;

namespace {

constexpr rule rules[] = {rule::none, rule::decay, rule::gla, rule::delta, rule::gated_delta, rule::kda, rule::gdn2};

/// One of grouped queries, grouped values, or neither.
shape draw_shape(test::random& r, isize most, dtype type) {
  const isize K = r.integer(1, 2), n = r.integer(1, most), m = r.coin(0.6) ? n : r.integer(1, most);
  const int group = static_cast<int>(r.integer(0, 2));
  return {
      r.integer(1, 2), group == 1 ? 2 * K : K, group == 2 ? 2 * K : K, n, m, r.integer(1, 5), r.integer(1, 5), type};
}

std::vector<double> differences(linear_run& x, tensor& t) {
  std::vector<double> out;
  const double step = 1e-5;
  for (isize b = 0; b < t.batch(); ++b)
    for (isize h = 0; h < t.heads(); ++h)
      for (isize i = 0; i < t.length(); ++i)
        for (isize c = 0; c < t.width(); ++c) {
          const double y = t.get(b, h, i, c);
          if (!std::isfinite(y)) {  // a gate of -inf: nothing passes, nothing changes
            out.push_back(0.0);
            continue;
          }
          t.set(b, h, i, c, y + step);
          const double up = x.loss();
          t.set(b, h, i, c, y - step);
          out.push_back((up - x.loss()) / (2 * step));
          t.set(b, h, i, c, y);
        }
  return out;
}

/// The twin's derivative of a map is a quotient, with `through_maps` roundings.
void compare_with_twin(linear_run& x, const test::tolerance& close, double through_maps) {
  test::tolerance loose = close;
  loose.c = through_maps;
  const auto twin = reference::backward(x.m, x.problem_of());
  const auto check = [&](const char* name, const tensor& got, const std::vector<double>& want,
                         const test::tolerance& within) {
    if (got.size() == 0) return;
    CAPTURE(name);
    CHECK_CLOSE(got.values(), shaped_as(got, want), within);
    CHECK(got.guards_intact());
  };
  check("dq", x.dq, twin.dq, loose), check("dk", x.dk, twin.dk, loose);
  check("dv", x.dv, twin.dv, close), check("dg", x.dg, twin.dlog_decay, close),
      check("dbeta", x.dbeta, twin.dbeta, close);
  check("derase", x.derase, twin.derase, close), check("dwrite", x.dwrite, twin.dwrite, close);
  check("dS", x.dS, twin.dS, close);
  if (x.m.normalised()) check("dz", x.dz, twin.dz, close);
}

bool allowed(rule u, int map) {
  const bool log_scaled = map == 11 || map >= 13;
  return !(log_scaled && u != rule::none && u != rule::decay) && !(is_delta(u) && map != 0 && map != 9);
}

}  // namespace

TEST_CASE("linear backward twin: central differences of the forward twin, every rule and map") {
  std::uint64_t seed = 1;
  for (const rule u : rules)
    for (int map = 0; map < map_store::kinds; ++map)
      for (const bool state : {false, true}) {
        if (!allowed(u, map) || (map == 12 && state)) continue;
        test::random r(++seed);
        shape s = draw_shape(r, 5, dtype::f64);
        if (state) s.n = s.m;
        const bool causal = state || u != rule::none || r.coin();
        if (map == 12) continue;  // its survey is held fixed: below
        linear_run x(r, u, map, s, state, causal);
        CAPTURE(name_of(u), map, state, causal, seed, s.B, s.H, s.G, s.n, s.m, s.d, s.e, x.m.normalised());
        const auto twin = reference::backward(x.m, x.problem_of());
        const test::tolerance close{.c = 1e9, .acc = dtype::f64, .scale = 1};  // 1e-7: quotients of quotients
        const auto check = [&](const char* name, tensor& t, const std::vector<double>& got) {
          if (t.size() == 0) return;
          CAPTURE(name);
          CHECK_CLOSE(shaped_as(t, got), shaped_as(t, differences(x, t)), close);
        };
        check("dq", x.q, twin.dq), check("dk", x.k, twin.dk), check("dv", x.v, twin.dv),
            check("dg", x.g, twin.dlog_decay);
        check("dbeta", x.beta, twin.dbeta), check("derase", x.erase, twin.derase);
        check("dwrite", x.write, twin.dwrite), check("dS", x.S, twin.dS);
        if (x.m.normalised()) check("dz", x.z, twin.dz);
      }
}

TEST_CASE("linear backward: f64 and f32 against the twin, every rule and map, over several spans") {
  std::uint64_t seed = 1000;
  for (const rule u : rules)
    for (int map = 0; map < map_store::kinds; ++map)
      for (const dtype type : {dtype::f64, dtype::f32}) {
        if (!allowed(u, map)) continue;
        test::random r(++seed);
        const bool state = map != 12 && r.coin();
        shape s = draw_shape(r, 150, type);
        if (state) s.n = s.m;
        const bool causal = state || u != rule::none || r.coin(0.7);
        linear_run x(r, u, map, s, state, causal);
        CAPTURE(name_of(u), map, state, causal, seed, s.B, s.H, s.G, s.n, s.m, s.d, s.e, x.m.normalised(),
                name_of(type));
        x.forward();
        x.backward();
        if (type == dtype::f64)
          compare_with_twin(x, {.c = 1e5, .acc = type, .scale = 1}, 1e9);
        else
          compare_with_twin(x, {.c = 256, .acc = type, .scale = 1}, 256);
      }
}

TEST_CASE("linear backward: wider than a vector, same bits for any number of threads, bf16 storage") {
  for (const rule u : rules) {
    test::random r(77);
    const shape s{2, 4, 2, 130, 130, 37, 45, dtype::f32};
    linear_run x(r, u, is_delta(u) ? 0 : 1, s, u != rule::none);
    CAPTURE(name_of(u));
    if (is_delta(u)) x.k.fill_normal(r, 0.1);
    x.forward();
    x.backward();
    compare_with_twin(x, {.c = 256, .acc = dtype::f32}, 256);
    const tensor dq = x.dq, dk = x.dk, dv = x.dv;
    const threads pool(3);
    x.backward(pool);
    CHECK_SAME_BITS(dq, x.dq);
    CHECK_SAME_BITS(dk, x.dk);
    CHECK_SAME_BITS(dv, x.dv);
    linear_run y(r, u, is_delta(u) ? 0 : 1, {1, 2, 1, 70, 70, 20, 24, dtype::bf16}, false);
    y.forward();
    y.backward();
    compare_with_twin(y, {.c = 64, .acc = dtype::bf16}, 64);
  }
}
