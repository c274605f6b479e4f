// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention: what it checks of a call, and the keys, mask and score of one KV head as its loops take them.

#include <limits>

#include <fovea/core/kv_cache.hpp>
#include <fovea/kernel/online_softmax.hpp>
#include <fovea/softmax/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline void softmax_attention::check_values(const shape& s) const {
  if (scale) {
    require_finite("scale", *scale);
    require(*scale > 0, "scale is ", *scale, "; it must be positive");
  }
  const mask_site at = site(s, 0);
  require(sinks == nullptr || sink_count == 0 || sink_count == at.H, "sinks holds ", sink_count,
          " logits; wanted one for each of ", at.H, " heads");
  for (isize h = 0; sinks != nullptr && h < at.H; ++h)
    require(sinks[h] < std::numeric_limits<float>::infinity(), "sinks[", h, "] is ", sinks[h],
            "; it must be a number below infinity");
  mask.check(at);
  score.check(at);
}

inline void softmax_attention::check(const problem& p) const {
  detail::check_problem(p);
  check_values(p.shape());
}

inline void softmax_attention::check(const problem& p, const state& s) const {
  detail::check_problem(p);
  s.check(tag(), p.shape(), name);
  require(mask.is_causal(),
          "the mask of a softmax_attention with a state must be causal (causal or window, bottom-right); a row cannot "
          "see keys that have not come");
  kv_cache::check_room(p, s);
  shape all = p.shape();
  all.m += s.tokens();  // masks and biases span the tokens held, too
  check_values(all);
}

inline std::uint64_t softmax_attention::tag() const { return detail::fingerprint{}.text(name).value; }

inline state softmax_attention::make_state(const shape& s) const {
  require(s.B >= 0 && s.G >= 1 && s.m >= 0 && s.d >= 1 && s.e >= 1, "make_state: B, G, m, d, e are ", s.B, ", ", s.G,
          ", ", s.m, ", ", s.d, ", ", s.e, "; wanted sizes of a problem, m tokens of room");
  return {tag(), s, kv_cache::bytes(s)};
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
