// SPDX-License-Identifier: MIT
#pragma once
/// @file  How a score policy meets a tile of scores: whole tiles, whole registers, or one element at a time.
///
///   tile[(j - j0) * stride + l] is the score of row i0 + l and key j, in units of log2, as kernels keep them
///
/// The first form that the policy offers is taken:
///   template <class Acc> void lanes(site, i0, count, j0, j1, Acc* tile, isize stride) const      a whole tile, in units of log2
///   template <class P> P wide(site, P i, P j, P s) const                                         a register: rows i, keys j, s in nats
///   T operator()(site, i, j, T s) const                                                          one element, s in nats
///
/// Contract   kernels call with rows along the lanes (count rows, stride >= count), or one row with keys along them (count = 1, stride = 1).
///            The three forms of a policy are the same function. i and j are exact up to 2^24 in registers of float.

#include <fovea/mask/mask.hpp>
#include <fovea/simd/pack.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

template <class Acc>
using score_pack = simd::pack<Acc, simd::native>;
template <class Acc>
inline constexpr Acc nats_to_log2 = static_cast<Acc>(1.4426950408889634074);
template <class Acc>
inline constexpr Acc log2_to_nats = static_cast<Acc>(0.69314718055994530942);

template <class P, class Acc>
concept tile_score = requires(const P& p, const mask_site& at, isize i, Acc* s) {
  p.lanes(at, i, i, i, i, s, i);
};
template <class P, class Acc>
concept wide_score = requires(const P& p, const mask_site& at, score_pack<Acc> x) {
  { p.wide(at, x, x, x) } -> std::same_as<score_pack<Acc>>;
};

template <class P>
constexpr bool positionless_score() {
  if constexpr (requires { P::positionless; })
    return P::positionless;
  else
    return false;
}

/// first, first + 1, ...
template <class Acc>
FOVEA_INLINE score_pack<Acc> ascending(isize first) {
  Acc x[score_pack<Acc>::size];
  for (isize l = 0; l < score_pack<Acc>::size; ++l) x[l] = static_cast<Acc>(first + l);
  return score_pack<Acc>::load(x);
}

/// s[x] = f(s[x], x) for x < count, a register at a time.
template <class Acc, class F>
FOVEA_INLINE void each_register(isize count, Acc* s, F&& f) {
  using P = score_pack<Acc>;
  for (isize x = 0; x < count; x += P::size) {
    const isize left = count - x;
    simd::store_n(s + x, f(simd::load_n<P>(s + x, left), x), left);
  }
}

template <class P, class Acc>
void score_registers(const P& p, const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile,
                     isize stride) {
  using V = score_pack<Acc>;
  const V to_nats(log2_to_nats<Acc>), to_log2(nats_to_log2<Acc>);
  if (count == 1 && stride == 1) {
    const V row(static_cast<Acc>(i0));
    return each_register(j1 - j0, tile, [&](V s, isize x) FOVEA_INLINE_LAMBDA {
      return p.wide(at, row, ascending<Acc>(j0 + x), s * to_nats) * to_log2;
    });
  }
  for (isize l = 0; l < count; l += V::size) {
    const V rows = ascending<Acc>(i0 + l);
    const isize left = count - l;
    Acc* s = tile + l;
    for (isize j = j0; j < j1; ++j, s += stride)
      simd::store_n(s, p.wide(at, rows, V(static_cast<Acc>(j)), simd::load_n<V>(s, left) * to_nats) * to_log2, left);
  }
}

template <class P, class Acc>
void score_lanes(const P& p, const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile, isize stride) {
  if constexpr (tile_score<P, Acc>)
    p.lanes(at, i0, count, j0, j1, tile, stride);
  else if constexpr (wide_score<P, Acc>)
    score_registers(p, at, i0, count, j0, j1, tile, stride);
  else
    for (isize j = j0; j < j1; ++j, tile += stride)
      for (isize l = 0; l < count; ++l)
        tile[l] = static_cast<Acc>(p(at, i0 + l, j, tile[l] * log2_to_nats<Acc>)) * nats_to_log2<Acc>;
}

/// Adds values[x] for x < count.
template <class Acc>
FOVEA_INLINE void add_row(isize count, const Acc* values, Acc* s) {
  using V = score_pack<Acc>;
  each_register(count, s,
                [&](V x, isize at) FOVEA_INLINE_LAMBDA { return x + simd::load_n<V>(values + at, count - at); });
}
template <class Acc>
FOVEA_INLINE void add_constant(isize count, Acc value, Acc* s) {
  each_register(count, s, [&](score_pack<Acc> x, isize) FOVEA_INLINE_LAMBDA { return x + score_pack<Acc>(value); });
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
