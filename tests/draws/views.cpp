// SPDX-License-Identifier: MIT
/// @file  Draws of plain calls, and their backward pass.

#include <array>
#include <fovea/softmax/reference_backward.hpp>

#include "draws/problem.hpp"

namespace draws {
namespace {

std::size_t index(isize x) { return static_cast<std::size_t>(x); }

std::vector<const numbers*> pointers(const std::vector<numbers>& x) {
  std::vector<const numbers*> p;
  for (const numbers& y : x) p.push_back(&y);
  return p;
}
test::array shaped(const test::tensor& like, const std::vector<double>& data) {
  return {{like.batch(), like.heads(), like.length(), like.width()}, data};
}
double largest(const std::vector<double>& x) {
  double top = 0;
  for (double y : x) top = std::max(top, std::fabs(y));
  return top;
}

/// Another call that skips: as far from the first one as it says, and no farther; its log-sum-exp is that of all keys.
void run_skipping(const draw& d, softmax_attention a, const test::tensor& q, const test::tensor& k,
                  const test::tensor& v, const outputs& plain, const std::vector<std::int32_t>& positions) {
  const isize n = q.length();
  a.skip = std::array{1e-4F, 1e-3F, 1e-2F}[d.seed / 3 % 3];
  outputs y(d, d.B, n);
  test::tensor skipped = test::unwritten(dtype::f32, d.B, d.H, n, 1, d.layout);
  prefill(threads_of(d.threads), a, q, k, v, y.out,
          {.lse = y.lse_of(d), .gates = {}, .positions = positions, .skipped = skipped});
  const double eps = d.type == dtype::f64 && d.out == dtype::f64 ? 1e-12 : 1e-4,
               stored = d.out == dtype::bf16  ? 1.0 / 128
                        : d.out == dtype::f16 ? 1.0 / 1024
                                              : 0;
  for (isize b = 0; b < d.B; ++b)
    for (isize h = 0; h < d.H; ++h) {
      double most = 0;
      for (isize j = 0; j < v.length(); ++j) {
        double size = 0;
        for (isize c = 0; c < d.e; ++c) size += std::pow(v.get(b, h / (d.H / d.G), j, c), 2);
        if (std::isfinite(size)) most = std::max(most, std::sqrt(size));
      }
      for (isize i = 0; i < n; ++i) {
        const double mass = skipped.get(b, h, i, 0);
        double apart = 0, size = 0;
        for (isize c = 0; c < d.e; ++c)
          apart += std::pow(y.out.get(b, h, i, c) - plain.out.get(b, h, i, c), 2),
              size += std::pow(plain.out.get(b, h, i, c), 2);
        if (!std::isfinite(size)) continue;
        demand(mass >= 0 && mass <= 1, "row ", i, " of head ", h, " says that ", mass, " of it was skipped");
        demand(std::sqrt(apart) <= 2 * mass * most + (eps + stored) * (most + std::sqrt(size)), "row ", i, " of head ",
               h, " is off by ", std::sqrt(apart), " where ", mass, " was skipped of values up to ", most);
        demand(n * (d.H / d.G) > 8 || mass == 0, "few rows skip nothing");
        const double x = plain.lse.get(b, h, i, 0), z = y.lse.get(b, h, i, 0);
        demand(!d.lse || x == z || std::fabs(x - z) <= eps * (1 + std::fabs(x)), "row ", i, " of head ", h, " has lse ",
               z, " with and ", x, " without skipping");
      }
    }
}

}  // namespace

void run_views(problem_of_draw& p) {
  const draw& d = p.d;
  const isize n = d.calls[0].n[0], m = d.calls[0].m[0];
  softmax_attention a = p.mechanism(0);
  const test::tensor q = p.tensor_of(pointers(p.q[0]), 0, n), k = p.tensor_of(pointers(p.k), 0, m),
                     v = p.tensor_of(pointers(p.v), 0, m);
  std::vector<std::int32_t> positions;
  for (isize b = 0; d.positions && b < d.B; ++b)
    for (isize i = 0; i < n; ++i) positions.push_back(m - n + i < 0 ? 0 : p.at[index(b)][index(m - n + i)]);
  const auto attend = [&](exec_ref exec, outputs& y) {
    const shape s{d.B, d.H, d.G, n, m, d.d, d.e, d.type};
    const scratch memory(d, d.H % d.G == 0 ? a.workspace_size(s, exec.concurrency()) : 0);
    y.call([&] {
      prefill(exec, a, q, k, v, y.out,
              {.lse = y.lse_of(d), .gates = {}, .workspace = memory.span(), .positions = positions});
    });
    memory.check();
  };
  outputs y(d, d.B, n);
  attend(threads_of(d.threads), y);
  if (d.threads > 1) {
    outputs alone(d, d.B, n);
    attend(serial, alone);
    demand(test::same_bits(y.out, alone.out) && (!d.lse || test::same_bits(y.lse, alone.lse)),
           "the bits depend on the threads");
  }
  p.spoil(y);
  for (isize b = 0; b < d.B; ++b) {
    test::tensor keys(dtype::f64, 1, d.G, m, d.d), values(dtype::f64, 1, d.G, m, d.e);
    for (isize g = 0; g < d.G; ++g)
      for (isize j = 0; j < m; ++j) {
        const auto key = p.stored_key(b, g, j, d.type), value = p.stored_value(b, g, j, d.type);
        for (isize c = 0; c < d.d; ++c) keys.set(0, g, j, c, key[index(c)]);
        for (isize c = 0; c < d.e; ++c) values.set(0, g, j, c, value[index(c)]);
      }
    p.judge(0, b, y.out_of(b), y.lse_of(d, b), keys, values, [](isize, isize) { return true; });
  }
  if (d.backward) run_backward(p, a, q, k, v, y);
  if (p.wanted == sabotage::none && d.seed % 3 == 0) run_skipping(d, a, q, k, v, y, positions);
}

void run_backward(problem_of_draw& p, const softmax_attention& m, const test::tensor& q, const test::tensor& k,
                  const test::tensor& v, const outputs& y) {
  const draw& d = p.d;
  const rules& own = *p.of_call[0];
  test::random r(stream(d.seed, 4));
  const test::tensor dout = test::normal(r, d.type, d.B, d.H, q.length(), d.e, d.layout);
  test::tensor dq = test::unwritten(d.type, d.B, d.H, q.length(), d.d, d.layout),
               dk = test::unwritten(d.type, d.B, d.G, k.length(), d.d, d.layout),
               dv = test::unwritten(d.type, d.B, d.G, k.length(), d.e, d.layout);
  std::vector<float> dbias(index(own.table_size) + 1, std::nanf("")), dsinks(index(d.H), std::nanf(""));
  if (d.dbias) dbias.back() = 7;  // a guard
  const exec_ref exec = threads_of(d.threads);
  const scratch memory(
      d, m.workspace_size_backward({d.B, d.H, d.G, q.length(), k.length(), d.d, d.e, d.type}, exec.concurrency()));
  backward(exec, m, q, k, v, y.out, y.lse, dout,
           {dq, dk, dv, d.dbias ? dbias.data() : nullptr, d.sinks ? dsinks.data() : nullptr},
           {.workspace = memory.span()});
  memory.check();
  if (p.wanted == sabotage::gradient_off && dk.size() > 0)
    p.applied = true, dk.set(0, 0, 0, 0, dk.get(0, 0, 0, 0) + 0.01);
  demand(dq.guards_intact() && dk.guards_intact() && dv.guards_intact() && (!d.dbias || dbias.back() == 7),
         "memory beside the gradients was written");

  const plain_mask rule{&own, 0, d.B};
  softmax_attention twin;
  twin.mask = mask_function{rule};
  if (own.unit_slope)
    twin.score = plain_score<true>{rule};
  else
    twin.score = plain_score<false>{rule};
  if (d.scale != 0) twin.scale = d.scale;
  if (d.sinks) twin.sinks = p.sinks.data();
  const auto want = reference::backward(twin, q, k, v, dout);
  const dtype acc = d.type == dtype::f64 ? dtype::f64 : dtype::f32;
  const double c = d.type == dtype::f64 && !own.unit_slope ? 1e6 : 256;  // the twin's slopes are quotients
  const auto close = [&](const char* name, const test::array& got, const test::array& wanted, dtype stored,
                         double factor, double scale, dtype sums) {
    const auto x = test::compare(got, wanted, {.c = factor, .acc = sums, .stored = stored, .scale = scale});
    demand(x.ok, name, ": ", x.text);
  };
  // Where dp and delta cancel, nothing is left to be relative to: errors are then as large as sums of them are.
  const double dp = std::sqrt(static_cast<double>(d.e)), scale = m.scale_for({.d = d.d}),
               rows = std::sqrt(static_cast<double>(d.H / d.G * q.length()));
  close("dq", dq.values(), shaped(dq, want.dq), d.type, c, std::max({largest(want.dq), 2.0, dp * scale}), acc);
  close("dk", dk.values(), shaped(dk, want.dk), d.type, c, std::max({largest(want.dk), 2.0, dp * scale * rows}), acc);
  close("dv", dv.values(), shaped(dv, want.dv), d.type, c, std::max(largest(want.dv), 2.0), acc);
  if (d.sinks)
    close("dsinks", {{d.H}, {dsinks.begin(), dsinks.end()}}, {{d.H}, want.dsinks}, dtype::f32, 256,
          std::max(largest(want.dsinks), 1.0), dtype::f32);
  if (!d.dbias) return;
  std::vector<double> sum(index(own.table_size), 0.0), sizes = sum, pairs = sum;
  std::size_t pair = 0;
  for (isize b = 0; b < d.B; ++b)
    for (isize h = 0; h < d.H; ++h)
      for (isize i = 0; i < q.length(); ++i)
        for (isize j = 0; j < k.length(); ++j, ++pair) {
          const auto slot = index(own.slot({b, h, q.length(), k.length(), d.H, d.G, d.B}, i, j));
          sum[slot] += want.ds[pair], sizes[slot] += std::fabs(want.ds[pair]), pairs[slot] += 1;
        }
  // What no pair reaches is nobody's to write: those elements are as they were.
  std::vector<double> got(dbias.begin(), dbias.end() - 1);
  for (std::size_t x = 0; x < got.size(); ++x)
    if (pairs[x] == 0) got[x] = 0;
  const double cancelled = dp * std::sqrt(largest(pairs));
  close("dbias", {{own.table_size}, got}, {{own.table_size}, sum}, dtype::f32, 64,
        std::max({largest(sizes), cancelled, 2.0}), dtype::f32);
}

}  // namespace draws
