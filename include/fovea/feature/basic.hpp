// SPDX-License-Identifier: MIT
#pragma once
/// @file  The two feature maps without parameters: the identity and elu + 1.
///
///   identity   phi(x) = x                                       recurrent rules (retention, GLA, delta rules), signed
///   elu1       phi(x) = x + 1 where x > 0, e^x elsewhere        r = d, positive
///
/// Source  elu + 1: Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236.

#include <cmath>

#include <fovea/feature/feature_map.hpp>
#include <fovea/simd/exp.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct identity_map {
  static constexpr bool log_scaled = false, identity = true;
  isize features(isize d) const { return d; }
  isize scratch(isize) const { return 0; }
  void check(const shape&) const {}
  void fingerprint(detail::fingerprint& f) const { f.text("identity"); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    using P = simd::pack<Acc, Arch>;
    for (isize t = 0; t < b.rows; ++t) {
      const Acc* x = b.x + t * b.x_stride;
      Acc* out = b.out + t * b.out_stride;
      for (isize c = 0; c < b.width; c += P::size)
        simd::store_n(out + c, simd::load_n<P>(x + c, b.width - c), b.width - c);
    }
  }
  isize derive_scratch(isize) const { return 0; }
  isize weights(isize) const { return 0; }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc*) const noexcept {
    using P = simd::pack<Acc, Arch>;
    for (isize t = 0; t < b.rows; ++t)
      for (isize c = 0; c < b.width; c += P::size)
        simd::store_n(g.dx + t * g.dx_stride + c, simd::load_n<P>(g.dphi + t * g.dphi_stride + c, b.width - c),
                      b.width - c);
  }
  double define(const feature_site&, const double* x, isize d, double* out) const {
    for (isize c = 0; c < d; ++c) out[c] = x[c];
    return 0.0;
  }
};

struct elu1 {
  static constexpr bool log_scaled = false;
  isize features(isize d) const { return d; }
  isize scratch(isize) const { return 0; }
  void check(const shape&) const {}
  void fingerprint(detail::fingerprint& f) const { f.text("elu1"); }

  template <class Arch, class Acc>
  void apply(const feature_block<Acc>& b, Acc*) const noexcept {
    using P = simd::pack<Acc, Arch>;
    const isize whole = b.width / P::size * P::size, left = b.width - whole;
    for (isize t = 0; t < b.rows; ++t) {
      const Acc* x = b.x + t * b.x_stride;
      Acc* out = b.out + t * b.out_stride;
      const Acc* next = t + 4 < b.rows ? x + 4 * b.x_stride : x;
      for (isize c = 0; c < whole; c += P::size) {
        simd::prefetch_line(next + c);
        simd::exp_then_line(P::load(x + c)).store(out + c);
      }
      if (left > 0) simd::store_n(out + whole, simd::exp_then_line(simd::load_n<P>(x + whole, left)), left);
    }
  }
  isize derive_scratch(isize) const { return 0; }
  isize weights(isize) const { return 0; }
  template <class Arch, class Acc>
  void derive(const feature_block<Acc>& b, const feature_gradient<Acc>& g, Acc*) const noexcept {
    using P = simd::pack<Acc, Arch>;
    const P one(Acc(1));
    for (isize t = 0; t < b.rows; ++t)
      for (isize c = 0; c < b.width; c += P::size) {  // the slope is e^x = phi below 0, 1 above, where phi > 1
        const P slope = simd::min(simd::load_n<P>(b.out + t * b.out_stride + c, b.width - c), one);
        simd::store_n(g.dx + t * g.dx_stride + c, slope * simd::load_n<P>(g.dphi + t * g.dphi_stride + c, b.width - c),
                      b.width - c);
      }
  }
  double define(const feature_site&, const double* x, isize d, double* out) const {
    for (isize c = 0; c < d; ++c) out[c] = x[c] > 0.0 ? x[c] + 1.0 : std::exp(x[c]);
    return 0.0;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
