// SPDX-License-Identifier: MIT
/// @file  linear_attention as a partial result: numerators and sums with a lag and behind sinks, in one call and with a state.

#include <cmath>

#include <fovea/feature/favor.hpp>
#include <fovea/linear.hpp>
#include <fovea/linear/partial.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;

constexpr isize H = 4, G = 2, n = 171, d = 24, e = 40, lag = 37, skip = 4;

struct call {
  test::tensor q, k, v, o, l, m;
  call() {
    test::random r(3);
    q = test::normal(r, dtype::f32, 1, H, n, d), k = test::normal(r, dtype::f32, 1, G, n, d),
    v = test::normal(r, dtype::f32, 1, G, n, e);
    o = test::unwritten(dtype::f32, 1, H, n, e), l = test::unwritten(dtype::f32, 1, H, n, 1);
    m = test::unwritten(dtype::f32, 1, H, n, 1);
  }
  void part(const linear_attention& a, exec_ref exec, state* s, isize i, isize rows, isize first, isize last) {
    const problem p{q.ref().slice(i, rows),
                    k.ref().slice(skip + first, last - first),
                    v.ref().slice(skip + first, last - first),
                    o.ref().slice(i, rows),
                    {},
                    {}};
    buffer memory(a.workspace_size(p.shape(), exec.concurrency()) + 64);
    a.prefill_partial(exec, p, {l.ref().slice(i, rows), m.ref().slice(i, rows)}, s, arena(memory.span()));
  }
  /// The largest error of numerators and sums, against plain sums over keys skip <= j <= i - lag.
  double error(const linear_attention& a) const {
    const feature_map phi = a.phi();
    const isize r = phi.features(d);
    std::vector<double> x(d), fq(static_cast<std::size_t>(r)), fk(fq), num(e);
    const auto row = [&](const test::tensor& t, isize h, isize i) {
      for (isize c = 0; c < d; ++c) x[static_cast<std::size_t>(c)] = t.get(0, h, i, c);
    };
    double worst = 0;
    for (isize h = 0; h < H; ++h)
      for (isize i = 0; i < n; ++i) {
        row(q, h, i);
        const double log_q = phi.define({h, h / 2, i, false, 0}, x.data(), d, fq.data());
        double den = 0;
        std::fill(num.begin(), num.end(), 0.0);
        for (isize j = skip; j <= i - lag; ++j) {
          row(k, h / 2, j);
          const double log_k = phi.define({h, h / 2, j, true, 0}, x.data(), d, fk.data());
          double w = 0;
          for (std::size_t f = 0; f < fq.size(); ++f) w += fq[f] * fk[f];
          w *= std::exp(log_q + log_k), den += w;
          for (isize c = 0; c < e; ++c) num[static_cast<std::size_t>(c)] += w * v.get(0, h / 2, j, c);
        }
        const double factor = std::exp(m.get(0, h, i, 0)), bound = den + 1e-3;
        worst = std::fmax(worst, std::fabs(factor * l.get(0, h, i, 0) - den) / bound);
        for (isize c = 0; c < e; ++c) {
          const double gap = std::fabs(factor * o.get(0, h, i, c) - num[static_cast<std::size_t>(c)]) / bound;
          worst = gap <= worst ? worst : gap;
        }
      }
    return worst;
  }
};

}  // namespace

TEST_CASE("linear: partial results with a lag, behind sinks") {
  const auto w = feature::orthogonal_directions(32, d, 7);
  const projection directions(w.data(), 1, 32, d);
  const threads three(3);
  for (const feature_map& map : {feature_map(elu1{}), feature_map(favor_plain{directions.ref()})})
    for (const bool pieces : {false, true})
      for (const bool alone : {true, false}) {
        const linear_attention a{.map = map};
        const exec_ref exec = alone ? exec_ref(serial) : exec_ref(three);
        CAPTURE(map.log_scaled(), pieces, alone);
        call x;
        if (!pieces) {
          x.part(a, exec, nullptr, 0, n, 0, n - lag - skip);
        } else {
          state s = a.make_state({1, H, G, n, n, d, e, dtype::f32});
          for (isize i = 0, seen = 0, rows = 0; i < n; i += rows) {
            rows = std::min<isize>(n - i, 50 + i % 7);
            const isize last = std::max<isize>(0, i + rows - lag - skip);
            x.part(a, exec, &s, i, rows, seen, last);
            seen = last;
          }
        }
        CHECK(x.error(a) < 1e-5);
        CHECK(std::isinf(x.m.get(0, 0, 0, 0)) == (!pieces || map.log_scaled()));  // nothing seen yet
      }
}
