// SPDX-License-Identifier: MIT
#pragma once
/// @file  dijiang_attention, backward: linear attention with DiJiang's map (dijiang/features.hpp), gamma as its decay.
///
/// Contract   by q, k, v, and by D and t (dquery_map, dkey_map: a row of D, then t, a head; both sides share the map: add them up).
///            Gains are refused. One log-scale a row, where the forward pass has one a feature: features of a row that are e^80 apart
///            lose the smaller ones.
/// Cost       see linear/backward.hpp

#include <fovea/dijiang/mechanism.hpp>
#include <fovea/linear.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline linear_attention as_linear(const dijiang_attention& m) {
  linear_attention l{.map = dijiang_map{m.tables.get()}};
  l.rule = m.tables->gamma.empty() ? rule::none : rule::decay;
  l.is_causal = m.is_causal, l.normalise = m.normalise, l.gamma = m.tables->gamma;
  return l;
}

}  // namespace detail

inline void dijiang_attention::check(const backward_problem& p) const {
  check(p.forward());
  require(!tables->gains(), "backward of dijiang takes no gains log_d1, log_d2: they know absolute positions");
  detail::check_gradients(p);
  require(p.to.dbias == nullptr && p.to.dsinks == nullptr && p.to.dE == nullptr && p.to.dF == nullptr,
          "dbias, dsinks, dE or dF was asked for; dijiang has none of them");
  require(!p.from.given() && !p.dS_end && !p.dz_end && !p.to.dS && !p.to.dz,
          "a state, or a gradient by one, was given; backward of dijiang starts at the first key");
  const isize w = 2 * tables->r;
  detail::check_own_gradient(p, "dquery_map", p.to.dquery_map, true, "", 1, p.q.heads, 1, w);
  detail::check_own_gradient(p, "dkey_map", p.to.dkey_map, true, "", 1, p.k.heads, 1, w);
}

inline std::size_t dijiang_attention::workspace_size_backward(const shape& s, int threads) const {
  return detail::as_linear(*this).workspace_size_backward(s, threads);
}

inline void dijiang_attention::backward(exec_ref exec, const backward_problem& p, arena scratch) const {
  detail::as_linear(*this).backward(exec, p, scratch);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
