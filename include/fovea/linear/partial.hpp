// SPDX-License-Identifier: MIT
#pragma once
/// @file  Linear attention as a partial result: numerators and sums, to be joined with others under one denominator.
///
///   out_i = e^{-m_i} phi(q_i) S     [e]        l_i = e^{-m_i} phi(q_i) . z        m_i = 0, or the log-scale of a log-scaled map
///
///   const linear_partial to{l, m};  linear.prefill_partial(exec, p, to, nullptr, scratch);        p.out holds the numerators
///
/// With a lag, row i sees keys j <= i - lag, and behind `skip` keys that others answer for (sinks): hand over the keys that are seen,
///   p.q = q,   p.k = k.slice(skip, n - lag - skip),   p.v = v.slice(skip, n - lag - skip)
/// since query i sees keys up to i + m - n. Rows that see nothing get out = 0, l = 0, m = -inf, the identity of merge (core/partial.hpp).
/// With a state, a call takes the keys that leave the window: as many as there are queries, or fewer: the first n - m rows then see the
/// state as it was, row i of the rest the state after key i - (n - m) of the call.
///
/// Contract   the problem has passed check() of a mechanism that is causal; scale, eps, clamp, key_sum_eps and normalise do not
///            apply. l and m [B, H, n, 1] are f32, f64 where q is; m may be null. A call may hold some heads only (`first_head`). Cosine maps count positions of keys from p.k's first.
/// Cost       that of the normalised call.

#include <limits>

#include <fovea/linear/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct linear_partial {
  tensor_mut l, m;
  isize first_head = 0;  ///< KV heads of the tensors before those of this call: a map may have weights by head

  template <class Acc>
  Acc& row(const tensor_mut& t, isize b, isize h, isize i) const {
    return *static_cast<Acc*>(t.row(b, h, i));
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
