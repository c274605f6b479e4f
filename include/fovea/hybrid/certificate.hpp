// SPDX-License-Identifier: MIT
#pragma once
/// @file  The certificate of hybrid_attention: a bound of |o - o*| for every row, that always holds.
///
///   |o* - o| <= sum over skipped keys j of |w_j - t_j| (|v_j| + |o|) / (a + sum w_j) + R        a: weight of the computed keys
///
/// w_j is the true weight of key j, between the bounds of kernel/mass_bounds.hpp; t_j what the pooled token of its block gives to it (0 where
/// blocks are dropped); R the rounding of the computed output itself. Derived in docs/mechanisms/hybrid.md.
///
/// Contract   plans are those of the prefill that it runs: the fates are recorded as they are made.
/// Cost       the prefill (twice where blocks are pooled) and a pass over the rounded keys; memory n m / (block_q block_k) bytes a head.

#include <cmath>
#include <limits>
#include <vector>

#include <fovea/hybrid/prefill.hpp>
#include <fovea/kernel/mass_bounds.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct hybrid_certificate {
  using bounds = kernel::mass_bounds<simd::native, Acc>;
  using limits = std::numeric_limits<Acc>;

  const hybrid_attention& m;
  const problem& p;           ///< out and lse: of the prefill that is certified; lse of the computed keys alone
  const std::uint8_t* fates;  ///< [B, H, query blocks, key blocks]
  kernel::block_rule rule;
  shape s;

  /// Sizes of what the rows of a KV head may see: of keys and values before each position.
  struct reach {
    std::vector<Acc> key, value;
    reach(const kernel::block_summary<Acc>& of, isize tokens) {
      Acc k = 0, v = 0;
      key.push_back(k), value.push_back(v);
      for (isize j = 0; j < tokens; ++j) {
        k = larger(k, of.size[j] + of.residual[j]), v = larger(v, of.norm_v[j]);
        key.push_back(k), value.push_back(v);
      }
    }
    static Acc larger(Acc x, Acc y) { return y > x || y != y ? y : x; }  // NaN stays
  };

  /// Rows [i0, i1), at most 64, of head h.
  void panel(bounds& sum, const kernel::block_summary<Acc>& of, const reach& seen, isize b, isize h, isize i0, isize i1,
             Acc* row, const tensor_mut& to) const {
    const isize lanes = i1 - i0;
    const Acc none = -limits::infinity(), log2e = static_cast<Acc>(1.4426950408889634074);
    for (isize i = i0; i < i1; ++i) {
      const Acc lse = *static_cast<const Acc*>(p.lse.row(b, h, i));
      const Acc* q = simd::row_as<simd::native, Acc>(p.q.type, p.q.row(b, h, i), s.d, row);
      sum.load(i - i0, q, rule.scale, lse == none ? Acc(0) : lse * log2e);
    }
    for (isize lane = lanes; lane < bounds::rows; ++lane) sum.clear(lane);
    isize counted[bounds::rows] = {};
    for (isize J = 0; J < rule.blocks(); ++J) block(sum, of, b, h, i0, i1, J, counted);
    for (isize i = i0; i < i1; ++i)
      to.set(b, h, i, 0, upward(of_row(sum, seen, b, h, i, i - i0, counted[i - i0], row), to.type));
  }

 private:
  const std::uint8_t* fate(isize b, isize h, isize i) const {
    return fates + ((b * s.H + h) * ceil_div(s.n, rule.block_q) + i / rule.block_q) * rule.blocks();
  }
  isize visible(isize i) const {  // keys before it
    const isize end = rule.causal ? i + rule.offset + 1 : s.m;
    return end < 0 ? 0 : end < s.m ? end : s.m;
  }
  bool is_kept(const kernel::block_summary<Acc>& of, isize j) const {
    if (of.kept == 0 || (j / of.stretch + 1) * of.stretch > s.m) return false;
    for (isize x = 0; x < of.kept; ++x)
      if (of.small[j / of.stretch * of.kept + x] == j) return true;
    return false;
  }

  void block(bounds& sum, const kernel::block_summary<Acc>& of, isize b, isize h, isize i0, isize i1, isize J,
             isize* counted) const {
    const isize j0 = J * rule.block_k, j1 = j0 + rule.block_k < s.m ? j0 + rule.block_k : s.m;
    const isize part = rule.block_k / of.parts;
    std::uint64_t open = 0, pooled = 0;
    for (isize i = i0; i < i1; ++i) {
      const std::uint8_t f = fate(b, h, i)[J];
      if (f == kernel::computed) counted[i - i0] += j1 - j0;
      if (f != kernel::computed && j0 < visible(i)) open |= std::uint64_t{1} << (i - i0);
      if (f == kernel::pooled) pooled |= std::uint64_t{1} << (i - i0), counted[i - i0] += of.parts;
    }
    if (open == 0) return;
    std::uint64_t left_out[bounds::chunk];
    for (isize j = j0; j < j1; j += bounds::chunk) {
      const isize end = j + bounds::chunk < j1 ? j + bounds::chunk : j1;
      for (isize x = j; x < end; ++x) {
        left_out[x - j] = is_kept(of, x) ? 0 : open;
        for (isize i = i0; rule.causal && x >= visible(i0) && i < i1; ++i)
          if (x >= visible(i)) left_out[x - j] &= ~(std::uint64_t{1} << (i - i0));
      }
      sum.absorb(of, j, end, i1 - i0, left_out, pooled, part);
    }
  }

  Acc of_row(const bounds& sum, const reach& seen, isize b, isize h, isize i, isize lane, isize counted,
             Acc* row) const {
    const isize end = visible(i);
    if (end == 0) return 0;
    const Acc key = seen.key[static_cast<std::size_t>(end)], value = seen.value[static_cast<std::size_t>(end)];
    const Acc eps = limits::epsilon();
    const Acc* q = simd::row_as<simd::native, Acc>(p.q.type, p.q.row(b, h, i), s.d, row);
    const Acc length = kernel::norm_above<simd::native, Acc>(s.d, [&](isize c) { return q[c]; });
    const Acc* o = simd::row_as<simd::native, Acc>(p.out.type, p.out.row(b, h, i), s.e, row);
    const Acc size = kernel::norm_above<simd::native, Acc>(s.e, [&](isize c) { return o[c]; });
    if (!(key < limits::infinity()) || !(value < limits::infinity()) || !(length < limits::infinity()) ||
        !(size < limits::infinity()))
      return limits::infinity();
    // delta: error of a logit and of its exponential; whole: of a sum of so many terms, relative to the sum of their sizes
    const Acc delta = (static_cast<Acc>(s.d) / 2 + 8) * eps * static_cast<Acc>(rule.scale) * length * key + exp_error;
    const Acc whole = (static_cast<Acc>(counted) * Acc(0.625) + static_cast<Acc>(rule.block_k) + 64) * eps;
    const Acc rounding = (value + size) * (std::expm1(delta) * std::exp(delta) + whole) * (1 + 16 * eps + 4 * whole);
    const Acc lse = *static_cast<const Acc*>(p.lse.row(b, h, i));
    const Acc hull = (size + value) * (1 + 4 * eps);  // o* is a mean of values
    const auto x = sum.bounds(lane, end, value, 2 * std::expm1(delta));
    const Acc least = std::exp(-(delta + whole + 4 * eps * std::abs(lse))) * (1 - 8 * eps) + x.lower;
    const Acc skipped = (x.moved_v + (size + rounding) * x.moved) / least * (1 + 16 * eps);
    const Acc all = skipped + rounding;
    return lse > -limits::infinity() && all < hull ? all * (1 + 4 * eps) : hull;
  }
  static constexpr Acc exp_error = sizeof(Acc) == 4 ? static_cast<Acc>(0x1p-20) : static_cast<Acc>(0x1p-46);

  static double upward(Acc x, dtype type) {
    return type == dtype::f64 || std::isinf(x) ? static_cast<double>(x)
                                               : static_cast<double>(std::nextafter(static_cast<float>(x), HUGE_VALF));
  }
};

template <class Acc>
void certify(exec_ref exec, const hybrid_attention& m, const problem& p, const tensor_mut& bound) {
  const hybrid_run<Acc> run(m, p.shape(), 0);
  const shape s = p.shape();
  const std::size_t plan = static_cast<std::size_t>(s.B * s.H * ceil_div(s.n, m.block_q) * run.rule.blocks());
  std::vector<std::uint8_t> fates(plan);
  buffer work(m.workspace_size(s, exec.concurrency()) + alignment);
  problem dropped = p;
  const std::size_t rows = static_cast<std::size_t>(s.B * s.H * s.n);
  buffer sums(rows * sizeof(Acc));
  dropped.lse = {sums.data(), dtype_of<Acc>, s.B, s.H, s.n, 1, s.H * s.n, s.n, 1};
  hybrid_attention computed = m;
  computed.compensate = compensation::none;
  hybrid_run<Acc>::prefill(computed, exec, dropped, arena(work.span()), fates.data());
  if (m.compensate != compensation::none) hybrid_run<Acc>::prefill(m, exec, p, arena(work.span()), fates.data());

  kernel::summary_needs needs = hybrid_needs(m);
  needs.means = m.compensate != compensation::none, needs.spread = needs.range = false, needs.levels = 127,
  needs.bounds = true;
  hybrid_summaries<Acc> all(needs, m.block_k, s, s.m);
  buffer memory(all.bytes(s.B * s.G) + alignment);
  all.base = memory.data();
  const isize wide = s.d > s.e ? s.d : s.e, lanes = kernel::mass_bounds<simd::native, Acc>::rows;
  std::vector<Acc> fold(static_cast<std::size_t>(wide * exec.concurrency()));
  all.append(exec, p.k, p.v, 0, fold.data());
  const hybrid_certificate<Acc> x{m, dropped, fates.data(), run.rule, s};
  exec.for_tasks(s.B * s.H, [&](isize task, isize) {
    const isize b = task / s.H, h = task % s.H, g = h / s.group();
    arena measure;
    kernel::mass_bounds<simd::native, Acc>(measure, s.d);
    buffer own(measure.bytes() + alignment);
    arena room(own.span());
    kernel::mass_bounds<simd::native, Acc> sum(room, s.d);
    std::vector<Acc> row(static_cast<std::size_t>(wide));
    const kernel::block_summary<Acc> of = all.head(b * s.G + g);
    const typename hybrid_certificate<Acc>::reach seen(of, s.m);
    for (isize i = 0; i < s.n; i += lanes)
      x.panel(sum, of, seen, b, h, i, i + lanes < s.n ? i + lanes : s.n, row.data(), bound);
  });
}

}  // namespace detail

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void error_bound(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k, tensor_ref v,
                                  tensor_mut bound, tensor_mut out) {
  const bool wide = q.type == dtype::f64;
  require(m.select != block_selector::pattern,
          "error_bound of a pattern; it skips single tokens, and the certificate is of blocks");
  require(m.compensate != compensation::cumulant,
          "error_bound with compensation::cumulant; there is no certificate for the variance term");
  const std::size_t rows = static_cast<std::size_t>(q.batch * q.heads * q.length);
  buffer values(rows * static_cast<std::size_t>(v.width) * (wide ? 8 : 4));
  const tensor_mut own{values.data(),
                       wide ? dtype::f64 : dtype::f32,
                       q.batch,
                       q.heads,
                       q.length,
                       v.width,
                       q.heads * q.length * v.width,
                       q.length * v.width,
                       v.width};
  const problem p{q, k, v, own, {}, {}, {}};
  m.check(p);
  const auto same = [&](const char* name, const tensor_mut& t, isize width) {
    require(t.type == own.type && t.batch == q.batch && t.heads == q.heads && t.length == q.length && t.width == width,
            name, " is ", detail::describe(t), "; error_bound wants [", q.batch, ", ", q.heads, ", ", q.length, ", ",
            width, "] ", name_of(own.type));
  };
  same("bound", bound, 1);
  if (out) same("out", out, v.width);
  if (wide)
    detail::certify<double>(exec, m, p, bound);
  else
    detail::certify<float>(exec, m, p, bound);
  for (isize b = 0; out && b < q.batch; ++b)
    for (isize h = 0; h < q.heads; ++h)
      for (isize i = 0; i < q.length; ++i)
        std::memcpy(out.row(b, h, i), own.row(b, h, i), static_cast<std::size_t>(v.width) * (wide ? 8 : 4));
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
