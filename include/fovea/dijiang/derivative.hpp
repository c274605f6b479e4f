// SPDX-License-Identifier: MIT
#pragma once
/// @file  Derivatives of DiJiang's features by the row, by D and by t. Included by dijiang/features.hpp.
///
///   l = ln phi,  dl = dphi * phi:   dD_f = sum dl_f / D_f,   dt_f = sum dl_f (C s x)_f,   dx = s C^T (t * dl)   ( - |.|^2 term )
///
/// Contract   a feature that is switched off (D_f = 0) gives and takes nothing. The transform's transpose is the other type.

#include <fovea/dijiang/features.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <class Arch, class Acc>
void dijiang_map::derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept {
  const dijiang_tables& m = *tables;
  const auto& table = m.transform.template table<Acc>();
  const auto& c = m.constants<Acc>();
  const isize d = m.d, head = m.pick(b.kv_head);
  const bool released = m.form == dijiang_form::released;
  const Acc* after = c.after.data() + head * m.r;
  const float* D = m.D.data() + (m.D_heads == 1 ? 0 : b.kv_head) * m.r;
  Acc sums[feature_rows];
  for (isize t = 0; t < b.rows; ++t) {  // dphi becomes the gradient by the logarithms before any softmax
    Acc* dy = g.dphi + t * g.dphi_stride;
    const Acc* phi = b.out + t * b.out_stride;
    sums[t] = Acc(0);
    for (isize f = 0; f < m.r; ++f) sums[t] += dy[f] *= phi[f];
    for (isize f = 0; released && f < m.r; ++f) dy[f] -= phi[f] * sums[t];
  }
  Acc *x = scratch, *y = x + feature_rows * d, *dx = y + feature_rows * d, *work = dx + feature_rows * d;
  for (isize t = 0; t < b.rows; ++t)
    for (isize n = 0; n < d; ++n)
      dx[t * d + n] = m.form == dijiang_form::unbiased
                          ? -sums[t] * b.x[t * b.x_stride + n] / static_cast<Acc>(std::sqrt(static_cast<double>(d)))
                          : Acc(0);
  for (isize first = 0; first < m.r; first += d) {
    const Acc* before = c.before.data() + first;
    for (isize t = 0; t < b.rows; ++t) {
      const Acc* dy = g.dphi + t * g.dphi_stride + first;
      for (isize f = 0; f < d; ++f) work[t * d + f] = after[first + f] * dy[f];
      detail::dijiang_row<Arch, Acc>(b.x + t * b.x_stride, before, nullptr, d, Acc(0), x + t * d);
      for (isize f = 0; g.dweights != nullptr && f < d; ++f)
        if (D[first + f] != 0.0F) g.dweights[first + f] += released ? Acc(0) : dy[f] / static_cast<Acc>(D[first + f]);
    }
    if (g.dweights != nullptr) {
      released ? feature::cosine_type3<Arch, Acc>(table, b.rows, x, y)
               : feature::cosine_type2<Arch, Acc>(table, b.rows, x, y);
      for (isize t = 0; t < b.rows; ++t)
        for (isize f = 0; f < d; ++f)
          g.dweights[m.r + first + f] += g.dphi[t * g.dphi_stride + first + f] * y[t * d + f] *
                                         (released ? Acc(1) : static_cast<Acc>(m.transform.scale(f)));
    }
    released ? feature::cosine_type2<Arch, Acc>(table, b.rows, work, y)
             : feature::cosine_type3<Arch, Acc>(table, b.rows, work, y);
    for (isize t = 0; t < b.rows; ++t)
      for (isize n = 0; n < d; ++n) dx[t * d + n] += before[n] * y[t * d + n];
  }
  for (isize t = 0; g.dx != nullptr && t < b.rows; ++t)
    for (isize n = 0; n < d; ++n) g.dx[t * g.dx_stride + n] = dx[t * d + n];
}

}  // namespace FOVEA_ABI
}  // namespace fovea
