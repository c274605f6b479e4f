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
  require(arithmetic != precision::bf16, "arithmetic is bf16; there is f32, and int8");
  require(arithmetic == precision::f32 || s.type != dtype::f64, "arithmetic is ", name_of(arithmetic),
          " and q is f64; int8 takes f32, f16 and bf16 (precision::f32 computes f64 in double)");
  require(skip >= 0 && skip < 1, "skip is ", skip, "; it must be at least 0 and below 1");
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

/// The skipped mass of a call: as lse, but f32 always.
inline void check_skipped(const problem& p) {
  if (!p.skipped) return;
  const tensor_mut& x = p.skipped;
  check_tensor("skipped", x);
  require(
      x.type == dtype::f32 && x.batch == p.q.batch && x.heads == p.q.heads && x.length == p.q.length && x.width == 1,
      "skipped is ", describe(x), "; wanted [", p.q.batch, ", ", p.q.heads, ", ", p.q.length, ", 1] f32");
  check_apart("skipped", x, "q", p.q), check_apart("skipped", x, "k", p.k), check_apart("skipped", x, "v", p.v);
  check_apart("skipped", x, "out", p.out);
  if (p.lse) check_apart("skipped", x, "lse", p.lse);
}

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
  detail::check_skipped(p);
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
