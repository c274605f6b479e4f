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
#include <fovea/hybrid/row_bound.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct hybrid_certificate {
  using bounds = kernel::mass_bounds<simd::native, Acc>;

  const hybrid_attention& m;
  const problem& p;           ///< out and lse: of the prefill that is certified; lse of the computed keys alone
  const std::uint8_t* fates;  ///< [B, H, query blocks, key blocks]
  kernel::block_rule rule;
  shape s;

  /// Sizes of what the rows of a KV head may see: of keys and values before each position.
  using reach = std::vector<largest_sizes<Acc>>;
  static reach reach_of(const kernel::block_summary<Acc>& of, isize tokens) {
    reach all(1);
    for (isize j = 0; j < tokens; ++j) all.push_back(all.back()), all.back().extend(of, j, j + 1);
    return all;
  }

  /// Rows [i0, i1), at most 64, of head h.
  void panel(bounds& sum, const kernel::block_summary<Acc>& of, const reach& seen, isize b, isize h, isize i0, isize i1,
             Acc* row, const tensor_mut& to) const {
    open(sum, b, h, i0, i1, row);
    isize counted[bounds::rows] = {};
    for (isize J = 0; J < rule.blocks(); ++J) block(sum, of, b, h, i0, i1, J, counted);
    for (isize i = i0; i < i1; ++i)
      to.set(b, h, i, 0, upward(of_row(sum, seen, b, h, i, i - i0, counted[i - i0], row), to.type));
  }

 private:
  void open(bounds& sum, isize b, isize h, isize i0, isize i1, Acc* row) const {
    const Acc none = -std::numeric_limits<Acc>::infinity(), log2e = static_cast<Acc>(1.4426950408889634074);
    for (isize i = i0; i < i1; ++i) {
      const Acc lse = *static_cast<const Acc*>(p.lse.row(b, h, i));
      const Acc* q = simd::row_as<simd::native, Acc>(p.q.type, p.q.row(b, h, i), s.d, row);
      sum.load(i - i0, q, rule.scale, lse == none ? Acc(0) : lse * log2e);
    }
    for (isize lane = i1 - i0; lane < bounds::rows; ++lane) sum.clear(lane);
  }
  const std::uint8_t* fate(isize b, isize h, isize i) const {
    return fates + ((b * s.H + h) * ceil_div(s.n, rule.block_q) + i / rule.block_q) * rule.blocks();
  }
  isize visible(isize i) const {  // keys before it
    const isize end = rule.causal ? i + rule.offset + 1 : s.m;
    return end < 0 ? 0 : end < s.m ? end : s.m;
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
        left_out[x - j] = is_kept(of, s.m, x) ? 0 : open;
        for (isize i = i0; rule.causal && x >= visible(i0) && i < i1; ++i)
          if (x >= visible(i)) left_out[x - j] &= ~(std::uint64_t{1} << (i - i0));
      }
      sum.absorb(of, j, end, i1 - i0, left_out, pooled, part);
    }
  }

  Acc of_row(const bounds& sum, const reach& seen, isize b, isize h, isize i, isize lane, isize counted,
             Acc* row) const {
    row_facts<Acc> x;
    x.seen = visible(i), x.terms = counted + (rule.stretch > 0 ? x.seen / rule.stretch * rule.kept : 0);
    x.key = seen[static_cast<std::size_t>(x.seen)].key, x.value = seen[static_cast<std::size_t>(x.seen)].value;
    const Acc* q = simd::row_as<simd::native, Acc>(p.q.type, p.q.row(b, h, i), s.d, row);
    x.length = kernel::norm_above<simd::native, Acc>(q, s.d);
    const Acc* o = simd::row_as<simd::native, Acc>(p.out.type, p.out.row(b, h, i), s.e, row);
    x.size = kernel::norm_above<simd::native, Acc>(o, s.e);
    x.lse = x.reference = *static_cast<const Acc*>(p.lse.row(b, h, i));
    return row_bound(rule, s.d, x, sum.so_far(lane), x.seen);
  }
};

/// The prefills of a certificate, and the summaries that it looks at.
template <class Acc>
class certified_prefill {
 public:
  certified_prefill(exec_ref exec, const hybrid_attention& m, const problem& p)
      : m_(m), s_(p.shape()), rule_(hybrid_run<Acc>(m, s_, 0).rule), dropped_(p) {
    fates.resize(static_cast<std::size_t>(s_.B * s_.H * ceil_div(s_.n, m.block_q) * rule_.blocks()));
    buffer work(m.workspace_size(s_, exec.concurrency()) + alignment);
    sums_ = buffer(static_cast<std::size_t>(s_.B * s_.H * s_.n) * sizeof(Acc));
    dropped_.lse = {sums_.data(), dtype_of<Acc>, s_.B, s_.H, s_.n, 1, s_.H * s_.n, s_.n, 1};
    hybrid_attention computed = m;
    computed.compensate = compensation::none;
    hybrid_run<Acc>::prefill(computed, exec, dropped_, arena(work.span()), fates.data());
    if (m.compensate != compensation::none) hybrid_run<Acc>::prefill(m, exec, p, arena(work.span()), fates.data());
  }
  /// f(certificate, sums, summary, b, h, row of scratch) for every head; summaries are made once for both calls of a round.
  template <class F>
  void each_head(exec_ref exec, F&& f) {
    kernel::summary_needs needs = hybrid_needs(m_);
    needs.means = m_.compensate != compensation::none, needs.spread = needs.range = false, needs.levels = 127,
    needs.bounds = true;
    hybrid_summaries<Acc> all(needs, m_.block_k, s_, s_.m);
    const isize wide = s_.d > s_.e ? s_.d : s_.e;
    buffer memory(all.bytes(s_.B * s_.G) + alignment);
    all.base = memory.data();
    std::vector<Acc> fold(static_cast<std::size_t>(wide * exec.concurrency()));
    all.append(exec, dropped_.k, dropped_.v, 0, fold.data());
    const hybrid_certificate<Acc> x{m_, dropped_, fates.data(), rule_, s_};
    exec.for_tasks(s_.B * s_.H, [&](isize task, isize) {
      arena measure;
      typename hybrid_certificate<Acc>::bounds(measure, s_.d);
      buffer own(measure.bytes() + alignment);
      arena room(own.span());
      typename hybrid_certificate<Acc>::bounds sum(room, s_.d);
      std::vector<Acc> row(static_cast<std::size_t>(wide));
      f(x, sum, all.head(task / s_.H * s_.G + task % s_.H / s_.group()), task / s_.H, task % s_.H, row.data());
    });
  }
  void bound(exec_ref exec, const tensor_mut& to) {
    using certificate = hybrid_certificate<Acc>;
    each_head(exec, [&](const certificate& x, typename certificate::bounds& sum, const kernel::block_summary<Acc>& of,
                        isize b, isize h, Acc* row) {
      const auto seen = certificate::reach_of(of, s_.m);
      for (isize i = 0; i < s_.n; i += certificate::bounds::rows)
        x.panel(sum, of, seen, b, h, i, std::min(i + certificate::bounds::rows, s_.n), row, to);
    });
  }

  std::vector<std::uint8_t> fates;  ///< [B, H, query blocks, key blocks]

 private:
  hybrid_attention m_;
  shape s_;
  kernel::block_rule rule_;
  problem dropped_;
  buffer sums_;
};

/// Of the block pairs that hold a visible (row, key), the share that is computed.
inline double computed_share(const kernel::block_rule& rule, isize heads, const std::vector<std::uint8_t>& fates) {
  isize computed = 0, visible = 0;
  const isize rows = ceil_div(rule.n, rule.block_q), width = rule.blocks();
  for (isize line = 0; line < heads * rows; ++line)
    for (isize J = 0; J < rule.reach_of(line % rows).seen; ++J)
      ++visible, computed += fates[static_cast<std::size_t>(line * width + J)] == kernel::computed ? 1 : 0;
  return visible == 0 ? 1.0 : static_cast<double>(computed) / static_cast<double>(visible);
}

template <class Acc>
double prefill_to_target(exec_ref exec, const hybrid_attention& m, const problem& p, const tensor_mut& bound) {
  const shape s = p.shape();
  const kernel::block_rule rule = hybrid_run<Acc>(m, s, 0).rule;
  std::vector<std::uint8_t> fates(static_cast<std::size_t>(s.B * s.H * ceil_div(s.n, m.block_q) * rule.blocks()));
  buffer work(m.workspace_size(s, exec.concurrency()) + alignment);
  hybrid_run<Acc>::prefill(m, exec, p, arena(work.span()), fates.data(), bound);
  return computed_share(rule, s.B * s.H, fates);
}

/// What error_bound and prefill_within want of their arguments.
inline void check_certificate(const hybrid_attention& m, const problem& p, const tensor_mut& bound) {
  require(m.select != block_selector::pattern,
          "a certificate of a pattern was asked for; it skips single tokens, and the certificate is of blocks");
  require(m.compensate == compensation::none || m.compensate == compensation::zeroth,
          "a certificate with compensation::", name_of(m.compensate),
          " was asked for; there is none for it: wanted none or zeroth");
  require(m.arithmetic == precision::f32, "a certificate with arithmetic ", name_of(m.arithmetic),
          " was asked for; bounds are those of f32: set precision::f32");
  m.check(p);
  require(p.out.type == (p.q.type == dtype::f64 ? dtype::f64 : dtype::f32), "out is ", name_of(p.out.type),
          "; a certificate is of outputs in f32, or f64 when q is f64");
  require(bound.type == p.out.type && bound.batch == p.q.batch && bound.heads == p.q.heads &&
              bound.length == p.q.length && bound.width == 1,
          "bound is ", describe(bound), "; wanted [", p.q.batch, ", ", p.q.heads, ", ", p.q.length, ", 1] ",
          name_of(p.out.type));
}

}  // namespace detail

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION void error_bound(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k, tensor_ref v,
                                  tensor_mut bound, tensor_mut out) {
  const bool wide = q.type == dtype::f64;
  const isize head = q.length * v.width;
  const buffer values(out ? 0 : static_cast<std::size_t>(q.batch * q.heads * head) * (wide ? 8 : 4));
  tensor_mut own{const_cast<std::byte*>(values.data()),
                 wide ? dtype::f64 : dtype::f32,
                 q.batch,
                 q.heads,
                 q.length,
                 v.width,
                 q.heads * head,
                 head,
                 v.width};
  const problem p{q, k, v, out ? out : own, {}, {}, {}};
  detail::check_certificate(m, p, bound);
  require(!m.target.on(), "error_bound of a mechanism with an error target; prefill_within tells its bounds");
  if (wide)
    detail::certified_prefill<double>(exec, m, p).bound(exec, bound);
  else
    detail::certified_prefill<float>(exec, m, p).bound(exec, bound);
}

FOVEA_DEFINITION double prefill_within(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k,
                                       tensor_ref v, tensor_mut out, tensor_mut bound, const error_target& target) {
  const problem p{q, k, v, out, {}, {}, {}};
  hybrid_attention own = m;
  own.target = target;
  detail::check_certificate(own, p, bound);
  require(target.on(), "the error target is 0 relative, 0 absolute; wanted one above 0");
  return q.type == dtype::f64 ? detail::prefill_to_target<double>(exec, own, p, bound)
                              : detail::prefill_to_target<float>(exec, own, p, bound);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
