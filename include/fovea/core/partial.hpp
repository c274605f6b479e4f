// SPDX-License-Identifier: MIT
#pragma once
/// @file  Partial attention results and how they join: the idea that the library is organised around.
///
///   a partial of one query is (m, l, o): the numerator o [e] and the denominator l, both scaled by exp(-m)
///   merge((m1, l1, o1), (m2, l2, o2)) = (m, l1 e^(m1-m) + l2 e^(m2-m), o1 e^(m1-m) + o2 e^(m2-m)),   m = max(m1, m2)
///
/// Contract   (-inf, 0, 0) is the identity; merge is associative and commutative up to rounding. Split keys any way, merge, and
///            the result is that of the whole: split-KV decoding, shared prefixes, several machines.
/// Numerics   exponents are <= 0; two identities give the identity, never NaN.

#include <cmath>
#include <limits>

#include <fovea/core/types.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// m in nats; o points to the caller's [e] numbers.
template <class T>
struct partial {
  T m = -std::numeric_limits<T>::infinity();
  T l = T(0);
  T* o = nullptr;
};

/// into = merge(into, from)
template <class T>
FOVEA_HD void merge(partial<T>& into, const partial<T>& from, isize e) {
  constexpr T none = -std::numeric_limits<T>::infinity();
  const T m = into.m > from.m ? into.m : from.m;
  if (m == none) return;
  const T a = into.m == m ? T(1) : std::exp(into.m - m), b = from.m == m ? T(1) : std::exp(from.m - m);
  into.l = into.l * a + from.l * b;
  for (isize c = 0; c < e; ++c) into.o[c] = into.o[c] * a + from.o[c] * b;
  into.m = m;
}

/// Joins results that are already normalised, each with its log-sum-exp: (o, lse) = merge((o, lse), (other, other_lse)).
template <class T>
FOVEA_HD void merge_normalised(T* o, T& lse, const T* other, T other_lse, isize e) {
  constexpr T none = -std::numeric_limits<T>::infinity();
  if (other_lse == none) return;
  const T m = lse > other_lse ? lse : other_lse;
  const T a = std::exp(lse - m), b = std::exp(other_lse - m), l = a + b;
  for (isize c = 0; c < e; ++c) o[c] = (o[c] * a + other[c] * b) / l;
  lse = m + std::log(l);
}

/// o /= l in place; returns the log-sum-exp. Nothing visible: zeros and -inf.
template <class T>
FOVEA_HD T normalise(partial<T>& p, isize e) {
  const T inverse = p.l > T(0) ? T(1) / p.l : p.l * T(0);  // keeps NaN, gives 0 for an empty row
  for (isize c = 0; c < e; ++c) p.o[c] *= inverse;
  return p.m + std::log(p.l);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
