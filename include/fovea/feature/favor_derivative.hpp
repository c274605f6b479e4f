// SPDX-License-Identifier: MIT
#pragma once
/// @file  Derivatives of FAVOR+ features by the row. Included by feature/favor.hpp.
///
///   favor_plain   u_j = s w_j.x - s^2 |x|^2 / 2:    dx = s W^T (dphi * phi) - s^2 x sum(dphi * phi),   s = d^-1/4
///   favor         the same of phi - eps, and for a query less the derivative of its own maximum
///
/// Contract   the maximum over all keys in `favor` counts as a constant, as in the published code.

#include <fovea/feature/favor.hpp>
#include <fovea/feature/learned_derivative.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace feature {

/// dphi holds dphi * e^u of each row; `sums` its row sums before the correction for a maximum.
template <class Arch, class Acc>
FOVEA_INLINE void derive_directions(const projection_ref& w, const feature_block<Acc>& b,
                                    const feature_gradient<Acc>& g, const Acc* sums, Acc* scratch) {
  if (g.dx == nullptr) return;
  const Acc shrink = static_cast<Acc>(std::pow(static_cast<double>(b.width), -0.25));
  derive_projection<Arch, Acc>(w, b.kv_head, b.rows, b.x, b.x_stride, shrink, g.dphi, g.dphi_stride, g.dx, g.dx_stride,
                               nullptr, scratch);
  for (isize t = 0; t < b.rows; ++t)
    for (isize c = 0; c < b.width; ++c)
      g.dx[t * g.dx_stride + c] -= shrink * shrink * sums[t] * b.x[t * b.x_stride + c];
}

}  // namespace feature

template <class Arch, class Acc>
void favor_plain::derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept {
  Acc sums[feature_rows];
  for (isize t = 0; t < b.rows; ++t) {
    Acc* dy = g.dphi + t * g.dphi_stride;
    sums[t] = Acc(0);
    for (isize j = 0; j < directions.rows(); ++j) sums[t] += dy[j] *= b.out[t * b.out_stride + j];
  }
  feature::derive_directions<Arch, Acc>(directions, b, g, sums, scratch);
}

template <class Arch, class Acc>
void favor::derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc* scratch) const noexcept {
  Acc sums[feature_rows];
  const isize r = directions.rows();
  const Acc eps = static_cast<Acc>(feature_eps / std::sqrt(static_cast<double>(r)));
  for (isize t = 0; t < b.rows; ++t) {
    Acc* dy = g.dphi + t * g.dphi_stride;
    const Acc* phi = b.out + t * b.out_stride;
    isize top = 0;
    sums[t] = Acc(0);
    for (isize j = 0; j < r; ++j) {
      sums[t] += dy[j] *= phi[j] - eps;
      top = phi[j] > phi[top] ? j : top;
    }
    if (!b.key) dy[top] -= sums[t];
  }
  feature::derive_directions<Arch, Acc>(directions, b, g, sums, scratch);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
