// SPDX-License-Identifier: MIT
#pragma once
/// @file  Mass recall: how much of the exact softmax mass of a row lies on the keys that a hybrid_attention computes.
///
///   recall_i = sum_{j computed} e^(s_ij) / sum_{j allowed} e^(s_ij) = e^(lse of the computed keys - lse of exact attention)

#include <vector>

#include <fovea/hybrid/prefill.hpp>
#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline void mass_recall(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k, tensor_ref v,
                        tensor_mut out) {
  hybrid_attention computed = m;
  computed.compensate = compensation::none;
  softmax_attention exact{.scale = m.scale};
  if (m.is_causal) exact.mask = causal{.align = m.align};

  const bool wide = q.type == dtype::f64;
  const std::size_t element = wide ? 8 : 4, rows = static_cast<std::size_t>(q.batch * q.heads * q.length);
  buffer o(rows * static_cast<std::size_t>(v.width) * size_of(q.type)), sums(rows * element);
  const tensor_mut values{o.data(),           q.type, q.batch, q.heads, q.length, v.width, q.heads * q.length * v.width,
                          q.length * v.width, v.width};
  const tensor_mut lse{
      sums.data(), wide ? dtype::f64 : dtype::f32, q.batch, q.heads, q.length, 1, q.heads * q.length, q.length, 1};
  require(
      out.type == lse.type && out.batch == q.batch && out.heads == q.heads && out.length == q.length && out.width == 1,
      "out is ", detail::describe(out), "; mass_recall wants ", detail::describe(lse));
  fovea::prefill(exec, computed, q, k, v, values, {.lse = out});
  fovea::prefill(exec, exact, q, k, v, values, {.lse = lse});
  for (isize b = 0; b < q.batch; ++b)
    for (isize h = 0; h < q.heads; ++h)
      for (isize i = 0; i < q.length; ++i) {
        const double all = lse.get(b, h, i, 0), some = out.get(b, h, i, 0);
        out.set(b, h, i, 0,
                std::isinf(all) && all < 0 ? 1.0 : std::exp(some - all));  // a row with no key misses nothing
      }
}

}  // namespace FOVEA_ABI
}  // namespace fovea
