// SPDX-License-Identifier: MIT
#pragma once
/// @file  cosFormer: ReLU features with a cosine weight that prefers near keys.
///
///   phi(x_i) = [ReLU(x) cos(pi i / 2 M); ReLU(x) sin(pi i / 2 M)]      i = position + 1,   r = 2 d
///   phi(q_i).phi(k_j) = ReLU(q).ReLU(k) cos(pi (i - j) / 2 M)
///
/// Contract   M is fixed when the mechanism is made, because features of stored keys cannot be changed when a sequence grows (the
///            published code takes M from the length). Positions up to M: beyond, the weight of keys more than M away is negative.
///            Features may all be 0: clamp the denominator (1e-6 in the published code).
/// Source     Qin et al., cosFormer: Rethinking Softmax in Attention, arXiv 2202.08791.

#include <cmath>

#include <fovea/feature/feature_map.hpp>
#include <fovea/feature/rows.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct cosformer {
  isize M = 0;

  static constexpr bool log_scaled = false, positional = true;
  isize features(isize d) const { return 2 * d; }
  double macs(isize d) const { return static_cast<double>(2 * d); }
  isize scratch(isize) const { return 0; }
  void check(const shape& s) const {
    require(M >= 1, "cosformer M is ", M, "; it is the longest sequence and must be at least 1");
    require(s.n <= M && s.m <= M, "cosformer M is ", M, " and the call has n, m = ", s.n, ", ", s.m,
            "; M must be the longest sequence");
  }
  void fingerprint(detail::fingerprint& f) const { f.text("cosformer").number(static_cast<double>(M)); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    for (isize t = 0; t < b.rows; ++t) {
      const double angle = turn(b.position + t);
      Acc* out = b.out + t * b.out_stride;
      feature::row_relu<Arch, Acc>(b.x + t * b.x_stride, nullptr, b.width, Acc(1), out);
      feature::row_affine<Arch, Acc>(out, nullptr, b.width, static_cast<Acc>(std::sin(angle)), out + b.width);
      feature::row_scale<Arch, Acc>(out, b.width, static_cast<Acc>(std::cos(angle)));
    }
  }
  isize derive_scratch(isize) const { return 0; }
  isize weights(isize) const { return 0; }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc*) const noexcept {
    for (isize t = 0; t < b.rows; ++t) {
      const double angle = turn(b.position + t);
      const Acc near = static_cast<Acc>(std::cos(angle)), far = static_cast<Acc>(std::sin(angle));
      const Acc *x = b.x + t * b.x_stride, *up = g.dphi + t * g.dphi_stride;
      Acc* dx = g.dx + t * g.dx_stride;
      for (isize c = 0; c < b.width; ++c) dx[c] = x[c] > Acc(0) ? near * up[c] + far * up[b.width + c] : Acc(0);
    }
  }
  double define(const feature_site& at, const double* x, isize d, double* out) const {
    for (isize c = 0; c < d; ++c) {
      const double y = x[c] > 0 ? x[c] : 0.0;
      out[c] = y * std::cos(turn(at.position));
      out[d + c] = y * std::sin(turn(at.position));
    }
    return 0.0;
  }

 private:
  double turn(isize position) const {
    return 3.14159265358979323846 * static_cast<double>(position + 1) / (2.0 * static_cast<double>(M));
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
