// SPDX-License-Identifier: MIT
#pragma once
/// @file  tanh in registers: what a soft-cap costs.
///
///   |x| < 0.625   x + x^3 poly(x^2)                else   sign(x) (1 - t) / (1 + t),   t = e^(-2 |x|)
///
/// Contract   NaN stays NaN; +-infinity gives +-1.
/// Numerics   float: 3 ulp everywhere. double: the C library's, lane by lane.
/// Source     coefficients: Moshier, Cephes, tanhf.

#include <fovea/simd/exp.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

template <class T, class A>
FOVEA_INLINE pack<T, A> tanh(pack<T, A> x) {
  using P = pack<T, A>;
  if constexpr (std::is_same_v<T, double>) {
    double lanes[P::size];
    x.store(lanes);
    for (isize l = 0; l < P::size; ++l) lanes[l] = std::tanh(lanes[l]);
    return P::load(lanes);
  } else {
    const P size = max(x, P(T(0)) - x), square = x * x;
    P near(-5.70498872745e-3F);
    for (const float c : {2.06390887954e-2F, -5.37397155531e-2F, 1.33314422036e-1F, -3.33332819422e-1F})
      near = fma(near, square, P(c));
    near = fma(near * square, x, x);
    const P t = exp(P(-2.0F) * size), far = (P(1.0F) - t) / (P(1.0F) + t);
    const P with_sign = select_greater(P(0.0F), x, P(0.0F) - far, far);
    return select_greater(P(0.625F), size, near, with_sign);
  }
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
