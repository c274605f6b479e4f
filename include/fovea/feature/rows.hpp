// SPDX-License-Identifier: MIT
#pragma once
/// @file  Row operations that feature maps share: largest element, affine maps with ReLU, exponentials with their sum.
///
/// Contract   any length n >= 0, no alignment; `bias` may be null. A NaN in the row reaches every result of that row.

#include <limits>

#include <fovea/simd/exp.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace feature {

/// The largest of scale * x[c]; -inf for an empty row.
template <class Arch, class Acc>
FOVEA_INLINE Acc row_max(const Acc* x, isize n, Acc scale = Acc(1)) {
  using P = simd::pack<Acc, Arch>;
  const P least(-std::numeric_limits<Acc>::infinity()), s(scale);
  P top = least;
  isize c = 0;
  for (; c + P::size <= n; c += P::size) {
    const P y = P::load(x + c) * s;
    top = simd::max(y, top);
  }
  if (c < n) top = simd::max(simd::select((1U << (n - c)) - 1U, simd::load_n<P>(x + c, n - c) * s, least), top);
  return simd::reduce_max(top);
}

/// The largest of x and of -x, in one pass.
template <class Arch, class Acc>
FOVEA_INLINE void row_range(const Acc* x, isize n, Acc& top, Acc& low) {
  using P = simd::pack<Acc, Arch>;
  const P least(-std::numeric_limits<Acc>::infinity()), most(std::numeric_limits<Acc>::infinity());
  P up = least, down = most;
  isize c = 0;
  for (; c + P::size <= n; c += P::size) {
    const P y = P::load(x + c);
    up = simd::max(y, up), down = simd::min(y, down);
  }
  if (c < n) {
    const simd::lane_bits real = (1U << (n - c)) - 1U;
    const P y = simd::load_n<P>(x + c, n - c);
    up = simd::max(simd::select(real, y, least), up), down = simd::min(simd::select(real, y, most), down);
  }
  top = simd::reduce_max(up), low = simd::reduce_max(P(Acc(0)) - down);
}

/// out = max(scale * x + bias, 0)
template <class Arch, class Acc>
FOVEA_INLINE void row_relu(const Acc* x, const Acc* bias, isize n, Acc scale, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  const P zero(Acc(0)), s(scale);
  for (isize c = 0; c < n; c += P::size) {
    P y = simd::load_n<P>(x + c, n - c) * s;
    if (bias != nullptr) y = y + simd::load_n<P>(bias + c, n - c);
    simd::store_n(out + c, simd::max(zero, y), n - c);
  }
}

/// out = scale * (x + bias)
template <class Arch, class Acc>
FOVEA_INLINE void row_affine(const Acc* x, const Acc* bias, isize n, Acc scale, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  const P s(scale);
  for (isize c = 0; c < n; c += P::size) {
    P y = simd::load_n<P>(x + c, n - c);
    if (bias != nullptr) y = y + simd::load_n<P>(bias + c, n - c);
    simd::store_n(out + c, y * s, n - c);
  }
}

template <class Arch, class Acc>
FOVEA_INLINE void row_scale(Acc* x, isize n, Acc scale) {
  row_affine<Arch, Acc>(x, nullptr, n, scale, x);
}

/// x += by
template <class Arch, class Acc>
FOVEA_INLINE void row_shift(Acc* x, isize n, Acc by) {
  using P = simd::pack<Acc, Arch>;
  const P s(by);
  for (isize c = 0; c < n; c += P::size) simd::store_n(x + c, simd::load_n<P>(x + c, n - c) + s, n - c);
}

/// out = e^(scale * x - shift); returns the sum. Exponents below the range of Acc give 0.
template <class Arch, class Acc>
FOVEA_INLINE Acc row_exp(const Acc* x, isize n, Acc scale, Acc shift, Acc* out) {
  using P = simd::pack<Acc, Arch>;
  const P s(scale), m(shift), zero(Acc(0));
  P sum = zero;
  for (isize c = 0; c < n; c += P::size) {
    const P e = simd::exp(simd::load_n<P>(x + c, n - c) * s - m);
    simd::store_n(out + c, e, n - c);
    sum = sum + (n - c >= P::size ? e : simd::select((1U << (n - c)) - 1U, e, zero));
  }
  return simd::reduce_add(sum);
}

/// The sum of e^(x - shift).
template <class Arch, class Acc>
FOVEA_INLINE Acc row_sum_exp(const Acc* x, isize n, Acc shift) {
  using P = simd::pack<Acc, Arch>;
  const P m(shift), zero(Acc(0));
  P sum = zero;
  for (isize c = 0; c < n; c += P::size) {
    const P e = simd::exp(simd::load_n<P>(x + c, n - c) - m);
    sum = sum + (n - c >= P::size ? e : simd::select((1U << (n - c)) - 1U, e, zero));
  }
  return simd::reduce_add(sum);
}

/// sum of x^2
template <class Arch, class Acc>
FOVEA_INLINE Acc row_square(const Acc* x, isize n) {
  using P = simd::pack<Acc, Arch>;
  P sum(Acc(0));
  for (isize c = 0; c < n; c += P::size) {
    const P y = simd::load_n<P>(x + c, n - c);
    sum = simd::fma(y, y, sum);
  }
  return simd::reduce_add(sum);
}

/// sum of a_c b_c
template <class Arch, class Acc>
FOVEA_INLINE Acc row_dot(const Acc* a, const Acc* b, isize n) {
  using P = simd::pack<Acc, Arch>;
  P sum(Acc(0));
  for (isize c = 0; c < n; c += P::size)
    sum = simd::fma(simd::load_n<P>(a + c, n - c), simd::load_n<P>(b + c, n - c), sum);
  return simd::reduce_add(sum);
}

}  // namespace feature
}  // namespace FOVEA_ABI
}  // namespace fovea
