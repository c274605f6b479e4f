// SPDX-License-Identifier: MIT
/// @file  Backward of hybrid_attention: the twin against central differences of the forward twin, the vector path against the twin.

#include <fovea/core/exec.hpp>
#include <fovea/hybrid.hpp>
#include <fovea/hybrid/reference_backward.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::dtype;
using test::tensor;

struct call {
  shape s;
  tensor q, k, v, dout, out, lse, dq, dk, dv;
  std::vector<std::uint8_t> table;
  call(test::random& r, const shape& sizes) : s(sizes) {
    q = test::normal(r, s.type, s.B, s.H, s.n, s.d), k = test::normal(r, s.type, s.B, s.G, s.m, s.d);
    v = test::normal(r, s.type, s.B, s.G, s.m, s.e), dout = test::normal(r, s.type, s.B, s.H, s.n, s.e);
    out = test::unwritten(s.type, s.B, s.H, s.n, s.e);
    lse = test::unwritten(s.type == dtype::f64 ? dtype::f64 : dtype::f32, s.B, s.H, s.n, 1);
    dq = test::unwritten(s.type, s.B, s.H, s.n, s.d), dk = test::unwritten(s.type, s.B, s.G, s.m, s.d);
    dv = test::unwritten(s.type, s.B, s.G, s.m, s.e);
  }
  problem forward() { return {q, k, v, out, lse, {}, {}}; }
  template <class Exec>
  void backward(const Exec& exec, const hybrid_attention& m) {
    fovea::prefill(exec, m, q, k, v, out, {.lse = lse});
    fovea::backward(exec, m, q, k, v, out, lse, dout, {.dq = dq, .dk = dk, .dv = dv});
  }
};

hybrid_attention recipe(test::random& r, call& x) {
  hybrid_attention m;
  m.select = static_cast<block_selector>(r.integer(0, 7));
  m.block_q = r.integer(1, 9), m.parts = r.integer(1, 2), m.block_k = m.parts * r.integer(1, 6);
  m.is_causal = r.coin(0.7) || m.select == block_selector::pattern;
  m.budget = r.uniform(0, 0.6), m.at_least = r.integer(0, 6), m.first = r.integer(0, 4), m.window = r.integer(0, 6);
  m.compensate = m.select == block_selector::pattern || r.coin(0.3) ? compensation::none : compensation::zeroth;
  m.keep_small = r.coin() ? 0 : r.uniform(0.05, 0.3), m.share_group = r.coin(0.3), m.stride = r.integer(1, 9);
  if (m.select == block_selector::given) {
    const isize rows = ceil_div(x.s.n, m.block_q), columns = ceil_div(x.s.m, m.block_k);
    x.table.resize(static_cast<std::size_t>(x.s.H * rows * columns));
    for (auto& y : x.table) y = r.coin(0.4);
    m.blocks = bhnd<const std::uint8_t>(x.table.data(), 1, x.s.H, rows, columns);
  }
  return m;
}

test::array shaped(const tensor& like, const std::vector<double>& x) {
  test::array y = like.values();
  y.data = x;
  return y;
}

}  // namespace

TEST_CASE("hybrid backward twin: central differences of the forward twin") {
  for (std::uint64_t seed = 1; seed <= 24; ++seed) {
    test::random r(seed);
    call x(r, {1, 2, r.integer(1, 2), r.integer(1, 6), r.integer(1, 12), r.integer(1, 3), r.integer(1, 3), dtype::f64});
    const hybrid_attention m = recipe(r, x);
    const auto loss = [&] {
      reference::prefill(m, x.forward());
      const test::array o = x.out.values(), g = x.dout.values();
      double sum = 0;
      for (std::size_t i = 0; i < o.data.size(); ++i) sum += o.data[i] * g.data[i];
      return sum;
    };
    const auto differences = [&](tensor& t) {
      std::vector<double> all;
      for (isize h = 0; h < t.heads(); ++h)
        for (isize i = 0; i < t.length(); ++i)
          for (isize c = 0; c < t.width(); ++c) {
            const double y = t.get(0, h, i, c), step = 1e-6;
            t.set(0, h, i, c, y + step);
            const double up = loss();
            t.set(0, h, i, c, y - step);
            const double down = loss();
            t.set(0, h, i, c, y);
            all.push_back((up - down) / (2 * step));
          }
      return all;
    };
    const auto twin = reference::backward(m, x.forward(), x.dout);
    const test::tolerance close{.c = 1e8, .acc = dtype::f64, .scale = 1};
    CAPTURE(seed, static_cast<int>(m.select), m.block_q, m.block_k, m.parts, m.keep_small);
    CHECK_CLOSE(shaped(x.q, twin.dq), shaped(x.q, differences(x.q)), close);
    CHECK_CLOSE(shaped(x.k, twin.dk), shaped(x.k, differences(x.k)), close);
    CHECK_CLOSE(shaped(x.v, twin.dv), shaped(x.v, differences(x.v)), close);
  }
}

TEST_CASE("hybrid backward: against the twin, with any number of threads") {
  for (std::uint64_t seed = 100; seed < 160; ++seed) {
    test::random r(seed);
    const isize G = r.integer(1, 2);
    const dtype types[] = {dtype::f32, dtype::f64, dtype::f32};
    call x(r, {r.integer(1, 2), G * r.integer(1, 3), G, r.integer(1, 70), r.integer(1, 90), r.integer(1, 20),
               r.integer(1, 20), types[seed % 3]});
    hybrid_attention m = recipe(r, x);
    if (r.coin() && m.select != block_selector::given) m.block_q = 16, m.block_k = 16;
    CAPTURE(seed, static_cast<int>(m.select), m.block_q, m.block_k, m.parts, m.keep_small, x.s.n, x.s.m);
    x.backward(serial, m);
    const auto twin = reference::backward(m, x.forward(), x.dout);
    const test::tolerance close{.c = 256, .acc = x.s.type, .scale = 4};
    CHECK_CLOSE(x.dq.values(), shaped(x.dq, twin.dq), close);
    CHECK_CLOSE(x.dk.values(), shaped(x.dk, twin.dk), close);
    CHECK_CLOSE(x.dv.values(), shaped(x.dv, twin.dv), close);
    const auto dq = x.dq.bytes(), dk = x.dk.bytes();
    fovea::threads three(3);
    x.backward(three, m);
    CHECK(x.dq.bytes() == dq);
    CHECK(x.dk.bytes() == dk);
  }
}

TEST_CASE("hybrid backward: what it refuses") {
  test::random r(3);
  call x(r, {1, 2, 1, 20, 20, 4, 4, dtype::f32});
  hybrid_attention m{.is_causal = true, .compensate = compensation::cumulant};
  CHECK(test::refusal([&] { x.backward(serial, m); }).find("cumulant") != std::string::npos);
  for (const auto rest : {compensation::sampled, compensation::linear}) {
    m.compensate = rest;
    CHECK(test::refusal([&] { x.backward(serial, m); }).find(name_of(rest)) != std::string::npos);
  }
  m.compensate = compensation::zeroth, m.arithmetic = precision::int8;
  CHECK(test::refusal([&] { x.backward(serial, m); }).find("int8") != std::string::npos);
  m.arithmetic = precision::f32;
  float sink[2];
  CHECK(test::refusal([&] {
          fovea::backward(serial, m, x.q, x.k, x.v, x.out, x.lse, x.dout, {.dsinks = sink});
        }).find("dsinks") != std::string::npos);
}
