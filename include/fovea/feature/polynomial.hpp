// SPDX-License-Identifier: MIT
#pragma once
/// @file  Polynomial feature maps: Based's second-order Taylor expansion of the softmax kernel, and ReBased's square.
///
///   taylor2   phi(q).phi(k) = 1 + s + s^2 / 2,   s = q.k / sqrt d       phi(x) = [1; x d^-1/4; vec(x x^T) / sqrt(2 d)]
///   square    phi(q).phi(k) = s^2                                      phi(x) = vec(x x^T) / sqrt d
///
/// `packed` keeps x_i x_j for i <= j only, the products i < j times sqrt 2: the same kernel with d (d + 1) / 2 instead of d^2
/// second-order features (d = 16: 153 instead of 273 in all).
///
/// Contract   any d, but r grows with d^2: made for q, k projected to width 16. taylor2 is positive (>= 1/2 in exact arithmetic);
///            square may be 0, so it needs an epsilon.
/// Source     Arora et al., Simple linear attention language models balance the recall-throughput tradeoff (Based), arXiv
///            2402.18668; ReBased as in the flash-linear-attention repository (without its learned affine map of x).

#include <cmath>

#include <fovea/feature/feature_map.hpp>
#include <fovea/feature/rows.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

namespace detail {
/// out[0 ...] = scale * x_i x_j; the number written.
template <class Arch, class Acc>
FOVEA_INLINE isize outer_square(const Acc* x, isize d, bool packed, Acc scale, Acc* out) {
  isize at = 0;
  const Acc root2 = static_cast<Acc>(1.41421356237309504880);
  for (isize i = 0; i < d; ++i) {
    const isize first = packed ? i : 0;
    feature::row_affine<Arch, Acc>(x + first, nullptr, d - first, scale * x[i] * (packed ? root2 : Acc(1)), out + at);
    if (packed) out[at] = scale * x[i] * x[i];
    at += d - first;
  }
  return at;
}
/// dx = (or +=) scale * by x of sum_ij d_ij x_i x_j.
template <class Arch, class Acc>
FOVEA_INLINE void derive_outer_square(const Acc* x, isize d, bool packed, Acc scale, const Acc* g, Acc* dx) {
  const Acc root2 = static_cast<Acc>(1.41421356237309504880);
  for (isize i = 0; i < d; ++i) {
    const isize first = packed ? i : 0;
    const Acc own = scale * (packed ? root2 : Acc(1)), twin = own * x[i];
    Acc sum(0);
    for (isize j = first; j < d; ++j) {
      sum += g[j - first] * x[j];
      dx[j] += twin * g[j - first];
    }
    dx[i] += own * sum;
    if (packed) dx[i] += Acc(2) * (scale - own) * g[0] * x[i];  // x_i^2 carries no root
    g += d - first;
  }
}
inline isize define_outer_square(const double* x, isize d, bool packed, double scale, double* out) {
  isize at = 0;
  for (isize i = 0; i < d; ++i)
    for (isize j = packed ? i : 0; j < d; ++j)
      out[at++] = scale * x[i] * x[j] * (packed && j > i ? std::sqrt(2.0) : 1.0);
  return at;
}
constexpr isize outer_size(isize d, bool packed) { return packed ? d * (d + 1) / 2 : d * d; }
}  // namespace detail

struct taylor2 {
  bool packed = false;

  static constexpr bool log_scaled = false;
  isize features(isize d) const { return 1 + d + detail::outer_size(d, packed); }
  double macs(isize d) const { return static_cast<double>(features(d)); }
  isize scratch(isize) const { return 0; }
  void check(const shape& s) const {
    require(s.d <= 256, "taylor2 makes 1 + d + d^2 features and q, k are ", s.d,
            " wide; wanted d <= 256 (Based projects to 16)");
  }
  void fingerprint(detail::fingerprint& f) const { f.text("taylor2").number(packed ? 1.0 : 0.0); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    const double d = static_cast<double>(b.width);
    const Acc linear = static_cast<Acc>(std::pow(d, -0.25)), square = static_cast<Acc>(1 / std::sqrt(2 * d));
    for (isize t = 0; t < b.rows; ++t) {
      const Acc* x = b.x + t * b.x_stride;
      Acc* out = b.out + t * b.out_stride;
      out[0] = Acc(1);
      feature::row_affine<Arch, Acc>(x, nullptr, b.width, linear, out + 1);
      detail::outer_square<Arch, Acc>(x, b.width, packed, square, out + 1 + b.width);
    }
  }
  isize derive_scratch(isize) const { return 0; }
  isize weights(isize) const { return 0; }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc*) const noexcept {
    const double d = static_cast<double>(b.width);
    const Acc linear = static_cast<Acc>(std::pow(d, -0.25)), square = static_cast<Acc>(1 / std::sqrt(2 * d));
    for (isize t = 0; t < b.rows; ++t) {
      const Acc* up = g.dphi + t * g.dphi_stride + 1;
      Acc* dx = g.dx + t * g.dx_stride;
      for (isize c = 0; c < b.width; ++c) dx[c] = linear * up[c];
      detail::derive_outer_square<Arch, Acc>(b.x + t * b.x_stride, b.width, packed, square, up + b.width, dx);
    }
  }
  double define(const feature_site&, const double* x, isize d, double* out) const {
    const double width = static_cast<double>(d);
    out[0] = 1.0;
    for (isize c = 0; c < d; ++c) out[1 + c] = x[c] * std::pow(width, -0.25);
    detail::define_outer_square(x, d, packed, 1 / std::sqrt(2 * width), out + 1 + d);
    return 0.0;
  }
};

struct square_map {
  bool packed = false;

  static constexpr bool log_scaled = false;
  isize features(isize d) const { return detail::outer_size(d, packed); }
  double macs(isize d) const { return static_cast<double>(features(d)); }
  isize scratch(isize) const { return 0; }
  void check(const shape& s) const {
    require(s.d <= 256, "square_map makes d^2 features and q, k are ", s.d, " wide; wanted d <= 256");
  }
  void fingerprint(detail::fingerprint& f) const { f.text("square").number(packed ? 1.0 : 0.0); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    const Acc scale = static_cast<Acc>(1 / std::sqrt(static_cast<double>(b.width)));
    for (isize t = 0; t < b.rows; ++t)
      detail::outer_square<Arch, Acc>(b.x + t * b.x_stride, b.width, packed, scale, b.out + t * b.out_stride);
  }
  isize derive_scratch(isize) const { return 0; }
  isize weights(isize) const { return 0; }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc*) const noexcept {
    const Acc scale = static_cast<Acc>(1 / std::sqrt(static_cast<double>(b.width)));
    for (isize t = 0; t < b.rows; ++t) {
      Acc* dx = g.dx + t * g.dx_stride;
      for (isize c = 0; c < b.width; ++c) dx[c] = Acc(0);
      detail::derive_outer_square<Arch, Acc>(b.x + t * b.x_stride, b.width, packed, scale, g.dphi + t * g.dphi_stride,
                                             dx);
    }
  }
  double define(const feature_site&, const double* x, isize d, double* out) const {
    detail::define_outer_square(x, d, packed, 1 / std::sqrt(static_cast<double>(d)), out);
    return 0.0;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
