// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention: what it checks of a call, and the keys, mask and score of one KV head as its loops take them.

#include <limits>

#include <fovea/kernel/online_softmax.hpp>
#include <fovea/softmax/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline void softmax_attention::check_items(const shape& s, isize first, isize last) const {
  if (scale) {
    require_finite("scale", *scale);
    require(*scale > 0, "scale is ", *scale, "; it must be positive");
  }
  const mask_site at = site(s, first);
  require(sinks == nullptr || sink_count == 0 || sink_count == at.H, "sinks holds ", sink_count,
          " logits; wanted one for each of ", at.H, " heads");
  for (isize h = 0; sinks != nullptr && h < at.H; ++h)
    require(sinks[h] < std::numeric_limits<float>::infinity(), "sinks[", h, "] is ", sinks[h],
            "; it must be a number below infinity");
  for (isize b = first; b < last; ++b) mask.check(site(s, b));
  score.check(at);
}

namespace detail {

/// The positions that a call turns to, of B items of n tokens: those given, or `first` and those behind it.
inline void check_turn(const rope& turn, isize d, const std::int32_t* positions, isize count, isize first, isize n) {
  isize low = first, high = first + n - 1;
  if (positions != nullptr && count > 0) low = high = positions[0];
  for (isize i = 0; positions != nullptr && i < count; ++i) {
    low = positions[i] < low ? positions[i] : low;
    high = positions[i] > high ? positions[i] : high;
  }
  require(low >= 0, "turn: a token's position is ", low, "; positions must not be negative");
  turn.check(d, high);
}

}  // namespace detail

inline void softmax_attention::check(const problem& p) const {
  detail::check_problem(p);
  check_values(p.shape());
  if (turn == nullptr || p.q.batch * p.q.length == 0) return;
  const isize n = p.q.length, m = p.k.length;
  require(n <= m, "turn: q has ", n, " tokens and k has ", m, "; the last of them are the same tokens");
  detail::check_turn(*turn, p.q.width, p.positions, p.q.batch * n, m - n, n);
  if (p.positions != nullptr) turn->check(p.q.width, m - n - 1);
}

namespace detail {

/// Keys and values of KV head g of batch item b.
template <class Acc>
kernel::key_set<Acc> softmax_keys(const softmax_attention& m, const problem& p, isize b, isize g) {
  kernel::key_set<Acc> keys;
  keys.k = rows_of(p.k, b, g), keys.v = rows_of(p.v, b, g), keys.count = p.k.length;
  keys.visible = m.mask.is_none() ? nullptr : &m.mask;
  keys.modify = m.score ? &m.score : nullptr;
  keys.site = m.site(p.shape(), b);
  return keys;
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
