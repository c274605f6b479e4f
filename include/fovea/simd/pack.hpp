// SPDX-License-Identifier: MIT
#pragma once
/// @file  pack<T, Arch>: one vector register of float or double, and the few operations that the kernels are written in.
///
/// Contract   loads and stores need no alignment. `max(a, b)` returns b when either is NaN (the x86 rule), so put the value whose
///            NaN must survive second. Lane masks are plain bits: bit l speaks of lane l.
/// Numerics   `fma` is one rounding wherever the instruction set has it (everywhere but sse2).

#include <bit>
#include <cmath>
#include <cstring>

#include <fovea/simd/arch.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

using lane_bits = std::uint32_t;

template <class T, class Arch>
struct pack {
  using value_type = T;
  using batch = xsimd::batch<T, typename detail::xsimd_of<Arch>::type>;
  static constexpr isize size = static_cast<isize>(batch::size);
  batch v;

  pack() = default;
  FOVEA_INLINE pack(batch x) : v(x) {}              // NOLINT(google-explicit-constructor)
  FOVEA_INLINE explicit pack(T x) : v(batch(x)) {}  // every lane x
  static FOVEA_INLINE pack load(const T* p) { return batch::load_unaligned(p); }
  FOVEA_INLINE void store(T* p) const { v.store_unaligned(p); }
};

template <class T>
struct pack<T, scalar> {
  using value_type = T;
  static constexpr isize size = 1;
  T v;

  pack() = default;
  FOVEA_INLINE explicit pack(T x) : v(x) {}
  static FOVEA_INLINE pack load(const T* p) { return pack(*p); }
  FOVEA_INLINE void store(T* p) const { *p = v; }
};

template <class T, class A>
FOVEA_INLINE pack<T, A> operator+(pack<T, A> a, pack<T, A> b) {
  return pack<T, A>(a.v + b.v);
}
template <class T, class A>
FOVEA_INLINE pack<T, A> operator-(pack<T, A> a, pack<T, A> b) {
  return pack<T, A>(a.v - b.v);
}
template <class T, class A>
FOVEA_INLINE pack<T, A> operator*(pack<T, A> a, pack<T, A> b) {
  return pack<T, A>(a.v * b.v);
}
template <class T, class A>
FOVEA_INLINE pack<T, A> operator/(pack<T, A> a, pack<T, A> b) {
  return pack<T, A>(a.v / b.v);
}

namespace detail {
#if defined(__SSE2__)
template <class T, class A, class R>
FOVEA_INLINE auto x86_max(R a, R b) {
  constexpr bool single = std::is_same_v<T, float>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512> && single)
    return _mm512_max_ps(a, b);
  else if constexpr (std::is_same_v<A, avx512>)
    return _mm512_max_pd(a, b);
  else
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
      if constexpr (std::is_same_v<A, avx2> && single)
    return _mm256_max_ps(a, b);
  else if constexpr (std::is_same_v<A, avx2>)
    return _mm256_max_pd(a, b);
  else
#endif
      if constexpr (single)
    return _mm_max_ps(a, b);
  else
    return _mm_max_pd(a, b);
}
template <class T, class A, class R>
FOVEA_INLINE auto x86_min(R a, R b) {
  constexpr bool single = std::is_same_v<T, float>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512> && single)
    return _mm512_min_ps(a, b);
  else if constexpr (std::is_same_v<A, avx512>)
    return _mm512_min_pd(a, b);
  else
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
      if constexpr (std::is_same_v<A, avx2> && single)
    return _mm256_min_ps(a, b);
  else if constexpr (std::is_same_v<A, avx2>)
    return _mm256_min_pd(a, b);
  else
#endif
      if constexpr (single)
    return _mm_min_ps(a, b);
  else
    return _mm_min_pd(a, b);
}
#endif
}  // namespace detail

template <class T, class A>
FOVEA_INLINE pack<T, A> max(pack<T, A> a, pack<T, A> b) {
  if constexpr (std::is_same_v<A, scalar>) return pack<T, A>(a.v > b.v ? a.v : b.v);
#if defined(FOVEA_HAS_NEON64)
  else if constexpr (std::is_same_v<A, neon64>)  // the NEON maximum returns NaN if either is NaN; keep the x86 rule
    return pack<T, A>(xsimd::select(a.v > b.v, a.v, b.v));
#endif
#if defined(__SSE2__)
  else  // not xsimd's: releases differ in which operand they hand to the instruction first
    return pack<T, A>(typename pack<T, A>::batch(detail::x86_max<T, A>(a.v, b.v)));
#endif
}
template <class T, class A>
FOVEA_INLINE pack<T, A> min(pack<T, A> a, pack<T, A> b) {
  if constexpr (std::is_same_v<A, scalar>) return pack<T, A>(a.v < b.v ? a.v : b.v);
#if defined(FOVEA_HAS_NEON64)
  else if constexpr (std::is_same_v<A, neon64>)
    return pack<T, A>(xsimd::select(a.v < b.v, a.v, b.v));
#endif
#if defined(__SSE2__)
  else  // not xsimd's: releases differ in which operand they hand to the instruction first
    return pack<T, A>(typename pack<T, A>::batch(detail::x86_min<T, A>(a.v, b.v)));
#endif
}

/// a * b + c
template <class T, class A>
FOVEA_INLINE pack<T, A> fma(pack<T, A> a, pack<T, A> b, pack<T, A> c) {
  if constexpr (std::is_same_v<A, scalar>) {
#if defined(__FMA__) || defined(__aarch64__)
    return pack<T, A>(std::fma(a.v, b.v, c.v));
#else
    return pack<T, A>(a.v * b.v + c.v);
#endif
  }
#if defined(FOVEA_HAS_AVX512)
  else if constexpr (std::is_same_v<A, avx512>) {  // xsimd 8.1 multiplies, then adds
    if constexpr (std::is_same_v<T, float>)
      return pack<T, A>(typename pack<T, A>::batch(_mm512_fmadd_ps(a.v, b.v, c.v)));
    else
      return pack<T, A>(typename pack<T, A>::batch(_mm512_fmadd_pd(a.v, b.v, c.v)));
  }
#endif
#if defined(FOVEA_HAS_NEON64)
  else if constexpr (std::is_same_v<A, neon64>) {
    if constexpr (std::is_same_v<T, float>)
      return pack<T, A>(typename pack<T, A>::batch(vfmaq_f32(c.v, a.v, b.v)));
    else
      return pack<T, A>(typename pack<T, A>::batch(vfmaq_f64(c.v, a.v, b.v)));
  }
#endif
  else
    return pack<T, A>(xsimd::fma(a.v, b.v, c.v));
}

/// c - a * b, rounded as fma is
template <class T, class A>
FOVEA_INLINE pack<T, A> fnma(pack<T, A> a, pack<T, A> b, pack<T, A> c) {
  using P = pack<T, A>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<P, pack<float, avx512>>) return P(typename P::batch(_mm512_fnmadd_ps(a.v, b.v, c.v)));
#endif
#if defined(__FMA__) && (defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2))
  if constexpr (std::is_same_v<P, pack<float, avx2>>) return P(typename P::batch(_mm256_fnmadd_ps(a.v, b.v, c.v)));
#endif
  return fma(P(T(0)) - a, b, c);
}

/// 1 / a within 1 unit in the last place, for a whose reciprocal is an ordinary number.
template <class T, class A>
FOVEA_INLINE pack<T, A> reciprocal(pack<T, A> a) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<
                    pack<T, A>,
                    pack<float, avx512>>) {  // an estimate and a Newton step: a division takes four times as long
    const __m512 x = _mm512_rcp14_ps(a.v);
    return pack<T, A>(
        typename pack<T, A>::batch(_mm512_fmadd_ps(_mm512_fnmadd_ps(a.v, x, _mm512_set1_ps(1.0F)), x, x)));
  } else
#endif
    return pack<T, A>(T(1)) / a;
}

namespace detail {
/// Lane masks of narrow registers by table: all ones where the bit is set.
template <class Word, int W>
struct mask_table {
  alignas(16) Word row[1 << W][W];
  constexpr mask_table() : row() {
    for (int bits = 0; bits < (1 << W); ++bits)
      for (int l = 0; l < W; ++l) row[bits][l] = ((bits >> l) & 1) != 0 ? static_cast<Word>(~Word{0}) : Word{0};
  }
};
template <class Word, int W>
inline constexpr mask_table<Word, W> masks{};

template <class T, class A>
FOVEA_INLINE auto lane_mask(lane_bits bits) {  // a register of T whose selected lanes are all ones
  using P = pack<T, A>;
  using word = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>) {
    if constexpr (sizeof(T) == 4) {
      const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
      return P(typename P::batch(_mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane))));
    } else {
      const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
      const __m256i hit = _mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(bits)), lane);
      return P(typename P::batch(_mm256_castsi256_pd(_mm256_cmpeq_epi64(hit, lane))));
    }
  } else
#endif
  {
    T lanes[P::size];
    std::memcpy(lanes, masks<word, static_cast<int>(P::size)>.row[bits & ((1U << P::size) - 1U)], sizeof lanes);
    return P::load(lanes);
  }
}
}  // namespace detail

/// Lane l: bit l of `bits` ? a : b.
template <class T, class A>
FOVEA_INLINE pack<T, A> select(lane_bits bits, pack<T, A> a, pack<T, A> b) {
  if constexpr (std::is_same_v<A, scalar>) return (bits & 1U) != 0 ? a : b;
#if defined(FOVEA_HAS_AVX512)
  else if constexpr (std::is_same_v<A, avx512>) {
    if constexpr (std::is_same_v<T, float>)
      return pack<T, A>(typename pack<T, A>::batch(_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)));
    else
      return pack<T, A>(typename pack<T, A>::batch(_mm512_mask_blend_pd(static_cast<__mmask8>(bits), b.v, a.v)));
  }
#endif
  else {
    const auto mask = detail::lane_mask<T, A>(bits);
    return pack<T, A>((a.v & mask.v) | (b.v & ~mask.v));
  }
}

/// Lane l: bit l of `bits` ? a * b + c : c. A dead lane stays clean whatever b holds there (NaN, infinity); a must be finite or 0.
template <class T, class A>
FOVEA_INLINE pack<T, A> fma_where(lane_bits bits, pack<T, A> a, pack<T, A> b, pack<T, A> c) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) {
    if constexpr (std::is_same_v<T, float>)
      return pack<T, A>(typename pack<T, A>::batch(_mm512_mask3_fmadd_ps(a.v, b.v, c.v, static_cast<__mmask16>(bits))));
    else
      return pack<T, A>(typename pack<T, A>::batch(_mm512_mask3_fmadd_pd(a.v, b.v, c.v, static_cast<__mmask8>(bits))));
  } else
#endif
    return select(bits, fma(a, b, c), c);
}

/// Lane by lane: a > b ? x : y (y where a or b is NaN).
template <class T, class A>
FOVEA_INLINE pack<T, A> select_greater(pack<T, A> a, pack<T, A> b, pack<T, A> x, pack<T, A> y) {
  if constexpr (std::is_same_v<A, scalar>)
    return a.v > b.v ? x : y;
  else
    return pack<T, A>(xsimd::select(a.v > b.v, x.v, y.v));
}

/// Bit l: lane l of a is above that of b, or one of them is NaN.
template <class T, class A>
FOVEA_INLINE lane_bits lanes_above(pack<T, A> a, pack<T, A> b) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<pack<T, A>, pack<float, avx512>>) return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
  if constexpr (std::is_same_v<pack<T, A>, pack<double, avx512>>) return _mm512_cmp_pd_mask(a.v, b.v, _CMP_NLE_UQ);
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<pack<T, A>, pack<float, avx2>>)
    return static_cast<lane_bits>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
  if constexpr (std::is_same_v<pack<T, A>, pack<double, avx2>>)
    return static_cast<lane_bits>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_NLE_UQ)));
#endif
  T x[pack<T, A>::size], y[pack<T, A>::size];
  a.store(x), b.store(y);
  lane_bits bits = 0;
  for (isize l = 0; l < pack<T, A>::size; ++l) bits |= static_cast<lane_bits>(!(x[l] <= y[l])) << l;
  return bits;
}

/// The first `count` lanes, the rest 0; memory behind them is not touched.
template <class P>
FOVEA_INLINE P load_n(const typename P::value_type* p, isize count) {
  using T = typename P::value_type;
  if (count >= P::size) return P::load(p);
#if defined(FOVEA_HAS_AVX512)
  if constexpr (P::size * static_cast<isize>(sizeof(T)) == 64) {
    const unsigned k = (1U << count) - 1U;
    if constexpr (std::is_same_v<T, float>)
      return P(typename P::batch(_mm512_maskz_loadu_ps(static_cast<__mmask16>(k), p)));
    else
      return P(typename P::batch(_mm512_maskz_loadu_pd(static_cast<__mmask8>(k), p)));
  } else
#endif
  {
    T lanes[P::size] = {};
    for (isize l = 0; l < count; ++l) lanes[l] = p[l];
    return P::load(lanes);
  }
}
template <class P>
FOVEA_INLINE void store_n(typename P::value_type* p, P x, isize count) {
  using T = typename P::value_type;
  if (count >= P::size) return x.store(p);
#if defined(FOVEA_HAS_AVX512)
  if constexpr (P::size * static_cast<isize>(sizeof(T)) == 64) {
    const unsigned k = (1U << count) - 1U;
    if constexpr (std::is_same_v<T, float>)
      _mm512_mask_storeu_ps(p, static_cast<__mmask16>(k), x.v);
    else
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>(k), x.v);
  } else
#endif
  {
    T lanes[P::size];
    x.store(lanes);
    for (isize l = 0; l < count; ++l) p[l] = lanes[l];
  }
}

template <class T, class A>
FOVEA_INLINE T reduce_add(pack<T, A> x) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) {
    if constexpr (std::is_same_v<T, float>)
      return _mm512_reduce_add_ps(x.v);
    else
      return _mm512_reduce_add_pd(x.v);
  } else
#endif
  {
    T lanes[pack<T, A>::size];
    x.store(lanes);
    for (isize step = pack<T, A>::size / 2; step > 0; step /= 2)
      for (isize l = 0; l < step; ++l) lanes[l] += lanes[l + step];
    return lanes[0];
  }
}
template <class T, class A>
FOVEA_INLINE T first(pack<T, A> x) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<pack<T, A>, pack<float, avx512>>) return _mm512_cvtss_f32(x.v);
#endif
  T lanes[pack<T, A>::size];
  x.store(lanes);
  return lanes[0];
}
/// The largest lane that is a number (where lanes are NaN: one of the numbers, or NaN).
template <class T, class A>
FOVEA_INLINE T highest(pack<T, A> x) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<pack<T, A>, pack<float, avx512>>) return _mm512_reduce_max_ps(x.v);
#endif
  T lanes[pack<T, A>::size];
  x.store(lanes);
  for (isize step = pack<T, A>::size / 2; step > 0; step /= 2)
    for (isize l = 0; l < step; ++l) lanes[l] = lanes[l] > lanes[l + step] ? lanes[l] : lanes[l + step];
  return lanes[0];
}
/// The largest lane; NaN if any lane is NaN.
template <class T, class A>
FOVEA_INLINE T reduce_max(pack<T, A> x) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<pack<T, A>, pack<float, avx512>>) {
    const __mmask16 broken = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    return broken != 0 ? _mm512_mask_reduce_add_ps(broken, x.v) : _mm512_reduce_max_ps(x.v);
  }
#endif
  T lanes[pack<T, A>::size];
  x.store(lanes);
  T top = lanes[0];
  for (isize l = 1; l < pack<T, A>::size; ++l) top = (top > lanes[l] || top != top) ? top : lanes[l];
  return top;
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
