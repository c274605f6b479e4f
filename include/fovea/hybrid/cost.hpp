// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention: multiply-adds and bytes, counted from the same rule that selects.

#include <fovea/hybrid/prefill.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Multiply-adds of one row of attention: `keys` computed, `pools` pooled tokens.
inline double hybrid_row_macs(const hybrid_attention& m, const shape& s, double keys, double pools) {
  const double both = static_cast<double>(s.d + s.e),
               extra = m.compensate == compensation::cumulant ? static_cast<double>(s.d) : 0.0;
  if (m.compensate == compensation::linear) {
    const double r = static_cast<double>(m.map.features(s.d)), e = static_cast<double>(s.e) + 1;
    return keys * both + m.map.macs(s.d) +
           std::min(pools * static_cast<double>(m.block_k) * (r + e), keys * (r + e) + r * e);
  }
  return keys * both + pools * (both + extra);
}

/// Multiply-adds of the scores of `past` blocks for one row.
inline double hybrid_selection_macs(const hybrid_attention& m, const shape& s, isize past) {
  const double blocks = static_cast<double>(past), d = static_cast<double>(s.d);
  switch (m.select) {
    case block_selector::mean: return blocks * d;
    case block_selector::variance:
    case block_selector::bound: return 2 * blocks * d;
    case block_selector::int8:
    case block_selector::int4:
    case block_selector::exact: return blocks * static_cast<double>(m.block_k) * d;
    default: return 0;
  }
}

/// Keys that one row computes, and blocks pooled for it, where they are the same for every batch item and head.
struct hybrid_row_count {
  double keys = 0, pools = 0;
};
inline hybrid_row_count hybrid_selected(const hybrid_attention& m, const kernel::block_rule& rule, isize block,
                                        isize i) {
  const auto reach = rule.reach_of(block);
  isize candidates = 0;
  for (isize J = 0; J < reach.past; ++J) candidates += rule.always(block, J) ? 0 : 1;
  const isize count = rule.count(candidates, reach.seen - reach.past),
              own = std::min(rule.causal ? i + rule.offset + 1 : rule.m, rule.m) - reach.past * rule.block_k;
  // Kept keys lie anywhere: of those of the past, the share that blocks are skipped by.
  const isize over =
      rule.stretch == 0 ? 0 : (rule.causal ? std::max<isize>(rule.start(block), 0) : rule.m) / rule.stretch;
  const double kept = static_cast<double>(over * rule.kept) * static_cast<double>(candidates - count) /
                      static_cast<double>(std::max<isize>(reach.past, 1));
  return {kept + static_cast<double>((reach.past - candidates + count) * rule.block_k + std::max<isize>(own, 0)),
          rule.pool ? static_cast<double>((candidates - count) * m.parts) : 0.0};
}

/// All rows of one head, given a row's block mask of the caller.
inline double hybrid_given_macs(const hybrid_attention& m, const shape& s, const kernel::block_rule& rule, isize b,
                                isize h) {
  const auto& t = m.blocks;
  const isize head = t.heads == s.H ? h : t.heads == 1 ? 0 : h / s.group();
  double sum = 0;
  for (isize i = 0; i < s.n; ++i) {
    const isize block = (i + rule.origin) / rule.block_q, end = std::min(rule.causal ? i + rule.offset + 1 : s.m, s.m),
                open = rule.start(block);
    double keys = 0, pools = 0;
    for (isize J = 0; J < rule.blocks(); ++J) {
      const isize last = std::min((J + 1) * rule.block_k, s.m);
      if (t.row(t.batch == 1 ? 0 : b, head, block)[J] != 0)
        keys += static_cast<double>(std::max<isize>(std::min(last, end) - J * rule.block_k, 0));
      else if (rule.pool && (!rule.causal || (J + 1) * rule.block_k - 1 <= open))
        pools += static_cast<double>(m.parts);
    }
    sum += hybrid_row_macs(m, s, keys, pools);
  }
  return sum;
}

inline double hybrid_macs(const hybrid_attention& m, const shape& s) {
  const kernel::block_rule rule = hybrid_run<float>(m, s, 0).rule;
  double sum = 0;
  if (m.select == block_selector::given) {
    if (m.blocks.data == nullptr) return 0;
    for (isize b = 0; b < s.B; ++b)
      for (isize h = 0; h < s.H; ++h) sum += hybrid_given_macs(m, s, rule, b, h);
    return sum;
  }
  for (isize i = 0; i < s.n; ++i) {
    if (m.select == block_selector::pattern) {
      const hsa_pattern mask{m.pattern, m.stride, m.align};
      const mask_site at{0, 0, s.n, s.m, s.H, s.G};
      const range keys = meet(mask.keys(at, i, i + 1), {0, s.m});
      double seen = 0;
      for (isize j = keys.first; j < keys.last; ++j) seen += mask.visible(at, i, j) ? 1 : 0;
      sum += hybrid_row_macs(m, s, seen, 0);
      continue;
    }
    const isize block = (i + rule.origin) / rule.block_q;
    const auto count = hybrid_selected(m, rule, block, i);
    sum += hybrid_row_macs(m, s, count.keys, count.pools) + hybrid_selection_macs(m, s, rule.reach_of(block).past);
  }
  sum *= static_cast<double>(s.B * s.H);
  if (m.compensate == compensation::linear)  // features and states
    sum +=
        static_cast<double>(s.B * s.G * s.m) * (m.map.macs(s.d) + static_cast<double>(m.map.features(s.d) * (s.e + 1)));
  return sum;
}

}  // namespace detail

inline double hybrid_attention::macs(const shape& s) const { return detail::hybrid_macs(*this, s); }

inline double hybrid_attention::step_macs(const shape& s) const {
  shape one = s;
  one.n = 1;
  if (select != block_selector::given) return detail::hybrid_macs(*this, one);
  // A given mask is asked for its last row that covers m tokens.
  hybrid_attention last = *this;
  const isize row = s.m > 0 ? (s.m - 1) / block_q : 0;
  if (blocks.data == nullptr || row >= blocks.length || ceil_div(s.m, block_k) > blocks.width)
    return static_cast<double>(s.B * s.H * s.m * (s.d + s.e));
  last.blocks.data = blocks.row(0, 0, row), last.blocks.length = 1, last.block_q = 1;
  return detail::hybrid_macs(last, one);
}

inline std::size_t hybrid_attention::state_bytes(const shape& s) const { return detail::hybrid_state_bytes(*this, s); }

}  // namespace FOVEA_ABI
}  // namespace fovea
