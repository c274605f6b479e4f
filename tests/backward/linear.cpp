// SPDX-License-Identifier: MIT
/// @file  Backward of linear attention: the twin against central differences of the forward twin, the kernel against the twin.

#include "backward/linear_problems.hpp"
#include "support/errors.hpp"
#include "support/golden.hpp"

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

namespace {

/// Weights of a map, in the order of its gradients: one row a head of queries, one a head of keys.
struct weights_of {
  std::vector<float> query, key;
};
weights_of moved(const weights_of& w, const weights_of& by, double step) {
  weights_of out = w;
  for (std::size_t i = 0; i < w.query.size(); ++i) out.query[i] += static_cast<float>(step) * by.query[i];
  for (std::size_t i = 0; i < w.key.size(); ++i) out.key[i] += static_cast<float>(step) * by.key[i];
  return out;
}

}  // namespace

TEST_CASE("linear backward: gradients by map weights, along a random direction") {
  for (int kind = 0; kind < 5; ++kind) {
    test::random r(40 + static_cast<std::uint64_t>(kind));
    const shape s{2, 4, 2, 70, 70, 4, 3, dtype::f64};
    linear_run x(r, rule::none, 1, s, false);
    x.m.normalise = true, x.m.eps = 0.5, x.m.clamp = 0, x.m.key_sum_eps = 0;
    const isize f = 5, h = 6;
    std::deque<projection> kept;
    std::deque<std::shared_ptr<const dijiang_tables>> tables;
    const auto cut = [&](const std::vector<float>& w, isize heads, isize offset, isize rows, isize width) {
      const isize each = static_cast<isize>(w.size()) / heads;
      std::vector<float> W, b;
      for (isize i = 0; i < heads; ++i) {
        const auto at = w.begin() + i * each + offset;
        W.insert(W.end(), at, at + rows * width), b.insert(b.end(), at + rows * width, at + rows * (width + 1));
      }
      kept.emplace_back(W.data(), heads, rows, width, b.data());
      return kept.back().ref();
    };
    const auto make = [&](const weights_of& w) -> feature_map {
      if (kind == 4) {
        dijiang_options o{.head_dim = 4, .features = 8};
        o.signs = std::vector<float>(8, 1.0F);
        for (isize g = 0; g < 2; ++g)
          for (isize i = 0; i < 16; ++i) (i < 8 ? o.D : o.t).push_back(w.key[static_cast<std::size_t>(g * 16 + i)]);
        tables.push_back(make_dijiang_tables(o));
        return dijiang_map{tables.back().get()};
      }
      if (kind == 0) return t2r{cut(w.query, 4, 0, f, 4), cut(w.key, 2, 0, f, 4), 0.7};
      if (kind == 1)
        return mlp_map{cut(w.query, 4, 0, h, 4), cut(w.query, 4, h * 5, f, h), cut(w.key, 2, 0, h, 4),
                       cut(w.key, 2, h * 5, f, h), 0.7};
      return hedgehog{cut(w.query, 4, 0, f, 4), cut(w.key, 2, 0, f, 4),
                      kind == 2 ? hedgehog_form::joint : hedgehog_form::separate};
    };
    const isize size = kind == 4 ? 16 : kind == 1 ? h * 5 + f * (h + 1) : f * 5;
    weights_of w, by;
    const auto draw = [&](std::vector<float>& to, isize count, double deviation, double mean, double grain) {
      for (isize i = 0; i < count; ++i)  // never 0: a bias of 0 behind dead features stands on a kink
        to.push_back(static_cast<float>((std::floor(grain * (mean + deviation * r.normal())) + 0.5) / grain));
    };
    const double mean = kind <= 1 ? 0.3 : kind == 4 ? 1.0 : 0.0;
    draw(w.query, 4 * size, 0.3, mean, 64), draw(w.key, 2 * size, 0.3, mean, 64);
    draw(by.query, 4 * size, 1.0, 0.0, 4), draw(by.key, 2 * size, 1.0, 0.0, 4);
    x.m.map = make(w);
    x.dwq = test::unwritten(dtype::f64, 1, 4, 1, size), x.dwk = test::unwritten(dtype::f64, 1, 2, 1, size);
    x.forward();
    x.backward();
    double got = 0;
    for (isize i = 0; i < size; ++i) {
      for (isize head = 0; head < 2; ++head)
        got += x.dwk.get(0, head, 0, i) * static_cast<double>(by.key[static_cast<std::size_t>(head * size + i)]);
      for (isize head = 0; head < 4; ++head)  // DiJiang's are shared by both sides of a group
        got += x.dwq.get(0, head, 0, i) *
               static_cast<double>(kind == 4 ? by.key[static_cast<std::size_t>(head / 2 * size + i)]
                                             : by.query[static_cast<std::size_t>(head * size + i)]);
    }
    const double step = 0x1p-18;  // exact in float, and past few kinks of ReLU
    x.m.map = make(moved(w, by, step));
    const double up = x.loss();
    x.m.map = make(moved(w, by, -step));
    const double want = (up - x.loss()) / (2 * step);
    CAPTURE(kind, got, want);
    CHECK(std::fabs(got - want) < 2e-4 * (std::fabs(want) + 1));
  }
}

TEST_CASE("linear backward: two stretches hand the gradient of the state over") {
  for (const rule u : rules) {
    test::random r(5);
    linear_run x(r, u, is_delta(u) ? 0 : 1, {1, 2, 1, 100, 100, 6, 5, dtype::f64}, true);
    CAPTURE(name_of(u));
    x.forward();
    x.backward();
    const tensor dq = x.dq, dS = x.dS;
    const isize cut = 37;
    reference::linear_state middle{x.S.values().data, x.z.values().data};
    const auto gates = [&](isize first, isize count) {
      fovea::gates g = x.gates();
      for (tensor_ref* t : {&g.log_decay, &g.beta, &g.erase, &g.write})
        if (*t) *t = t->slice(first, count);
      return g;
    };
    const auto rows = [](const tensor& t, isize first, isize count) { return t.ref().slice(first, count); };
    tensor scratch = test::unwritten(dtype::f64, 1, 2, cut, 5);
    reference::prefill(
        x.m, {rows(x.q, 0, cut), rows(x.k, 0, cut), rows(x.v, 0, cut), scratch, {}, gates(0, cut), nullptr}, &middle);
    const isize width = x.r;
    tensor S(dtype::f64, 1, 1, width, 5), z(dtype::f64, 1, 1, width, 1), dM = S, dz = z, dS0 = S;
    std::size_t at = 0, z_at = 0;
    S.fill([&] { return middle.S[at++]; }), z.fill([&] { return middle.z[z_at++]; });
    tensor later = test::unwritten(dtype::f64, 1, 2, 100 - cut, 6), earlier = test::unwritten(dtype::f64, 1, 2, cut, 6);
    gradients to{.dq = later};
    to.dS = dM, to.dz = x.m.normalised() ? dz.ref() : tensor_mut{};
    fovea::backward(serial, x.m, rows(x.q, cut, 63), rows(x.k, cut, 63), rows(x.v, cut, 63), rows(x.out, cut, 63), {},
                    rows(x.dout, cut, 63), to,
                    {.gates = gates(cut, 63),
                     .from = {S, z, cut},
                     .dS_end = linear_run::ref(x.dS_end),
                     .dz_end = linear_run::ref(x.dz_end)});
    gradients first{.dq = earlier};
    first.dS = dS0;
    fovea::backward(serial, x.m, rows(x.q, 0, cut), rows(x.k, 0, cut), rows(x.v, 0, cut), rows(x.out, 0, cut), {},
                    rows(x.dout, 0, cut), first,
                    {.gates = gates(0, cut),
                     .from = x.from(),
                     .dS_end = dM,
                     .dz_end = x.m.normalised() ? tensor_ref(dz.ref()) : tensor_ref{}});
    const test::tolerance close{.c = 1e4, .acc = dtype::f64, .scale = 1};
    CHECK_CLOSE(later.values(), test::rows_of(dq, cut, 63).values(), close);
    CHECK_CLOSE(earlier.values(), test::rows_of(dq, 0, cut).values(), close);
    CHECK_CLOSE(dS0.values(), dS.values(), close);
  }
}

TEST_CASE("linear backward: what is refused") {
  test::random r(3);
  linear_run x(r, rule::decay, 1, {1, 2, 1, 9, 9, 4, 3, dtype::f32}, false);
  x.forward();
  const auto says = [&](auto&& change) {
    return test::refusal([&] {
      gradients to{.dq = x.dq};
      backward_options o{.gates = x.gates()};
      change(to, o);
      fovea::backward(serial, x.m, x.q, x.k, x.v, x.out, {}, x.dout, to, o);
    });
  };
  CHECK(says([](auto&, auto&) {}) == "accepted");
  float number = 0;
  CHECK_SAYS(says([&](auto& to, auto&) { to.dbias = &number; }), "linear attention has none");
  CHECK_SAYS(says([&](auto& to, auto&) { to.dbeta = x.dv; }), "this call has no beta");
  CHECK_SAYS(says([&](auto& to, auto&) { to.dquery_map = x.dq; }), "no learned numbers");
  CHECK_SAYS(says([&](auto&, auto& o) { o.from.S = x.v; }), "from.S is");
  x.m.is_causal = false, x.m.rule = rule::none, x.m.gamma = {};
  CHECK_SAYS(says([&](auto&, auto& o) { o.gates = {}, o.from.tokens = 3; }), "keeps no state");
}

TEST_CASE("linear backward: golden gradients") {
  isize cases = 0;
  for (const golden::test_case& c : golden::family("linear")) {
    if (!c.has("do")) continue;
    ++cases;
    CAPTURE(c.name);
    for (const dtype type : {dtype::f64, dtype::f32}) {
      const tensor q = c.tensor("q", type), k = c.tensor("k", type), v = c.tensor("v", type), g = c.tensor("do", type);
      const auto like = [&](const tensor& t) {
        return test::unwritten(type, t.batch(), t.heads(), t.length(), t.width());
      };
      tensor out = like(g), dq = like(q), dk = like(k), dv = like(v), beta, decay, dbeta, dg, S, dS;
      linear_attention m{.rule = c.has("g") ? rule::gated_delta : rule::none};
      m.scale = c.number("scale", 1.0), m.eps = c.number("eps", 0.0);
      backward_options o;
      gradients to{.dq = dq, .dk = dk, .dv = dv};
      if (c.has("g")) {
        beta = c.tensor("beta", type), decay = c.tensor("g", type), S = c.tensor("S0", type);
        dbeta = like(beta), dg = like(decay), dS = like(S);
        o.gates = {decay, beta, {}, {}}, o.from.S = S;
        to.dbeta = dbeta, to.dlog_decay = dg, to.dS = dS;
      }
      reference::linear_state state;
      if (c.has("g")) state.S = S.values().data;
      reference::prefill(m, {q, k, v, out, {}, o.gates, nullptr}, c.has("g") ? &state : nullptr);
      fovea::backward(serial, m, q, k, v, out, {}, g, to, o);
      const test::tolerance close{.c = 64, .acc = type};
      CHECK_CLOSE(dq.values(), c.at("dq"), close);
      CHECK_CLOSE(dk.values(), c.at("dk"), close);
      CHECK_CLOSE(dv.values(), c.at("dv"), close);
      if (!c.has("g")) continue;
      CHECK_CLOSE({c.at("dbeta").dims, dbeta.values().data}, c.at("dbeta"), close);
      CHECK_CLOSE({c.at("dg").dims, dg.values().data}, c.at("dg"), close);
      CHECK_CLOSE(dS.values(), c.at("dS0"), close);
    }
  }
  CHECK(cases == 2);
}
