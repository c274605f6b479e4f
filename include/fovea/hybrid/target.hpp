// SPDX-License-Identifier: MIT
#pragma once
/// @file  Hybrid attention to an error target: blocks are computed, best first, until every row's certificate is under it.
///
///   done_i:  bound_i <= max(absolute, relative |o_i|)
///
/// From the selection of the mechanism on, in rounds: the certificate of every row (hybrid/certificate.hpp); then each query block with a
/// row that is not done adds key blocks in the order of what they contribute to the bounds of such rows, until what would remain is under the target.
///
/// Contract   when it returns, bound holds and is under the target, or all blocks of the row are computed and bound is the rounding alone.
/// Cost       each round is a prefill and a pass over the rounded keys; two or three rounds are the rule. Memory as error_bound.
/// Numerics   the bound that is reported is that of the output that is returned.

#include <algorithm>
#include <numeric>

#include <fovea/hybrid/certificate.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
struct hybrid_target {
  using bounds = typename hybrid_certificate<Acc>::bounds;
  static constexpr isize lanes = bounds::rows;

  const hybrid_certificate<Acc>& of;
  error_target target;
  std::uint8_t* fates;
  isize width;  ///< of a row of fates: the key blocks
  bool all;     ///< everything that contributes, at once

  /// Blocks for the query block of rows [i0, i1) of head h; true if any was added. Rows go by in panels of 64.
  bool add(bounds& sum, const kernel::block_summary<Acc>& summary, isize b, isize h, isize i0, isize i1, Acc* row,
           const tensor_mut& bound) const {
    std::vector<Acc> worth(static_cast<std::size_t>(width), Acc(0)), part(static_cast<std::size_t>(width * lanes));
    const isize line = (b * of.s.H + h) * ceil_div(of.s.n, of.rule.block_q) + i0 / of.rule.block_q;
    std::uint8_t* const fate = fates + line * width;
    std::vector<double> over;  // of each row that is not done: its bound over its target
    std::vector<Acc> parts;    // [such rows][width], over its target
    for (isize p0 = i0; p0 < i1; p0 += lanes) {
      const isize p1 = std::min(p0 + lanes, i1);
      bool open = false;
      for (isize i = p0; i < p1; ++i) open = open || !done(b, h, i, bound);
      if (!open) continue;
      of.contributions(sum, summary, b, h, p0, p1, row, part.data());
      for (isize i = p0; i < p1; ++i) {
        if (done(b, h, i, bound)) continue;
        const double wanted = wanted_of(b, h, i);
        double sum_of = 0;
        for (isize J = 0; J < width; ++J) {
          const double x = static_cast<double>(part[static_cast<std::size_t>(J * lanes + i - p0)]) / wanted;
          parts.push_back(static_cast<Acc>(x < 1e30 ? x : 1e30));  // NaN is not below
          worth[static_cast<std::size_t>(J)] += parts.back(), sum_of += static_cast<double>(parts.back());
        }
        over.push_back(std::max(bound.get(b, h, i, 0) / wanted, sum_of));
      }
    }
    return !over.empty() && pick(fate, worth, over, parts);
  }

 private:
  double wanted_of(isize b, isize h, isize i) const {
    double square = 0;
    for (isize c = 0; c < of.s.e; ++c) square += std::pow(of.p.out.get(b, h, i, c), 2);
    return std::max({target.absolute, target.relative * std::sqrt(square), 1e-300});
  }
  bool done(isize b, isize h, isize i, const tensor_mut& bound) const {
    return bound.get(b, h, i, 0) <= wanted_of(b, h, i);
  }
  /// The most worthy blocks, until every row would be under .9 of its target.
  bool pick(std::uint8_t* fate, const std::vector<Acc>& worth, std::vector<double>& over,
            const std::vector<Acc>& parts) const {
    std::vector<isize> order;
    for (isize J = 0; J < width; ++J)
      if (fate[J] != kernel::computed && worth[static_cast<std::size_t>(J)] > 0) order.push_back(J);
    std::stable_sort(order.begin(), order.end(), [&](isize x, isize y) {
      return worth[static_cast<std::size_t>(x)] > worth[static_cast<std::size_t>(y)];
    });
    bool any = false;
    for (const isize J : order) {
      if (!all && std::all_of(over.begin(), over.end(), [](double x) { return x <= 0.9; })) break;
      fate[J] = kernel::computed, any = true;
      for (std::size_t r = 0; r < over.size(); ++r)
        over[r] -= static_cast<double>(parts[r * static_cast<std::size_t>(width) + static_cast<std::size_t>(J)]);
    }
    return any;
  }
};

/// Of the block pairs that hold a visible (row, key), the share that is computed.
inline double computed_share(const kernel::block_rule& rule, isize heads, const std::vector<std::uint8_t>& table) {
  isize computed = 0, visible = 0;
  const isize rows = ceil_div(rule.n, rule.block_q), width = rule.blocks();
  for (isize line = 0; line < heads * rows; ++line)
    for (isize J = 0; J < rule.reach_of(line % rows).seen; ++J)
      ++visible, computed += table[static_cast<std::size_t>(line * width + J)] != 0 ? 1 : 0;
  return visible == 0 ? 1.0 : static_cast<double>(computed) / static_cast<double>(visible);
}

template <class Acc>
double prefill_to_target(exec_ref exec, const hybrid_attention& m, const problem& p, const tensor_mut& bound,
                         const error_target& target) {
  constexpr int rounds = 6;
  const shape s = p.shape();
  const isize rows = ceil_div(s.n, m.block_q), width = ceil_div(s.m, m.block_k);
  hybrid_attention now = m;
  now.keep_small = 0;
  std::vector<std::uint8_t> table;
  for (int round = 0;; ++round) {
    certified_prefill<Acc> x(exec, now, p);
    x.bound(exec, bound);
    table = x.fates;
    std::vector<std::uint8_t> added(static_cast<std::size_t>(s.B * s.H), 0);
    x.each_head(exec, [&](const hybrid_certificate<Acc>& of, typename hybrid_certificate<Acc>::bounds& sum,
                          const kernel::block_summary<Acc>& summary, isize b, isize h, Acc* row) {
      const hybrid_target<Acc> more{of, target, table.data(), width, round >= rounds};
      for (isize i = 0; i < s.n; i += m.block_q)
        if (more.add(sum, summary, b, h, i, std::min(i + m.block_q, s.n), row, bound))
          added[static_cast<std::size_t>(b * s.H + h)] = 1;
    });
    for (std::uint8_t& y : table) y = y == kernel::computed;
    if (std::none_of(added.begin(), added.end(), [](std::uint8_t y) { return y != 0; })) break;
    now.select = block_selector::given;
    now.blocks = bhnd<const std::uint8_t>(table.data(), s.B, s.H, rows, width);
  }
  return computed_share(hybrid_run<Acc>(m, s, 0).rule, s.B * s.H, table);
}

}  // namespace detail

#if FOVEA_DEFINES_LOOPS
FOVEA_DEFINITION double prefill_within(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k,
                                       tensor_ref v, tensor_mut out, tensor_mut bound, const error_target& target) {
  const problem p{q, k, v, out, {}, {}, {}};
  detail::check_certificate(m, p, bound);
  require(target.relative >= 0 && target.absolute >= 0 && target.relative + target.absolute > 0 &&
              std::isfinite(target.relative + target.absolute),
          "the error target is ", target.relative, " relative, ", target.absolute,
          " absolute; wanted numbers that are not negative, and one above 0");
  return q.type == dtype::f64 ? detail::prefill_to_target<double>(exec, m, p, bound, target)
                              : detail::prefill_to_target<float>(exec, m, p, bound, target);
}
#endif

}  // namespace FOVEA_ABI
}  // namespace fovea
