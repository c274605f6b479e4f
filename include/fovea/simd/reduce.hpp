// SPDX-License-Identifier: MIT
#pragma once
/// @file  W registers to one: lane i of the result is the sum of the lanes of x[i]. Dot products of W rows end here.

#include <fovea/simd/transpose.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

/// An empty statement that the compiler may not move memory reads across: streaming loops keep their address order with it.
template <class T, class A>
FOVEA_INLINE void keep_order(pack<T, A>& x) {
#if (defined(__GNUC__) || defined(__clang__)) && defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512> && std::is_same_v<T, float>) {
    __m512 r = x.v;
    __asm__ volatile("" : "+v"(r)::"memory");
    x = pack<T, A>(typename pack<T, A>::batch(r));
  } else
#endif
  {
#if defined(__GNUC__) || defined(__clang__)
    __asm__ volatile("" ::: "memory");
#endif
    (void)x;
  }
}

/// Asks for the cache lines of [p, p + bytes) in L2; memory that does not exist does no harm.
FOVEA_INLINE void prefetch(const void* p, isize bytes) {
#if defined(__GNUC__) || defined(__clang__)
  for (isize x = 0; x < bytes; x += 64) __builtin_prefetch(static_cast<const char*>(p) + x, 0, 2);
#else
  (void)p, (void)bytes;
#endif
}

/// The same for memory that will be written.
FOVEA_INLINE void prefetch_to_write(const void* p, isize bytes) {
#if defined(__GNUC__) || defined(__clang__)
  for (isize x = 0; x < bytes; x += 64) __builtin_prefetch(static_cast<const char*>(p) + x, 1, 2);
#else
  (void)p, (void)bytes;
#endif
}

/// Asks for one line in L1.
FOVEA_INLINE void prefetch_line(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

/// An address offset that is to stay in a register instead of being worked out again.
FOVEA_INLINE void keep_in_register(isize& x) {
#if defined(__GNUC__) || defined(__clang__)
  __asm__("" : "+r"(x));
#else
  (void)x;
#endif
}

template <class T, class A>
FOVEA_INLINE pack<T, A> sum_each(const pack<T, A> (&x)[pack<T, A>::size]) {
  using P = pack<T, A>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<P, pack<float, avx512>>) {
    __m512 t[8], u[4];  // 15 additions: within 128-bit quarters, then across them
    for (int i = 0; i < 8; ++i)
      t[i] =
          _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v), _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
      u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return P(typename P::batch(_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))));
  } else
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
      if constexpr (std::is_same_v<P, pack<float, avx2>>) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
    return P(typename P::batch(_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))));
  } else
#endif
  {
    T lanes[P::size];
    for (isize i = 0; i < P::size; ++i) lanes[i] = reduce_add(x[i]);
    return P::load(lanes);
  }
}

/// Lane i of the result is the maximum of the lanes of x[i].
template <class T, class A>
FOVEA_INLINE pack<T, A> max_each(const pack<T, A> (&x)[pack<T, A>::size]) {
  using P = pack<T, A>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<P, pack<float, avx512>>) {
    __m512 t[8], u[4];
    for (int i = 0; i < 8; ++i)
      t[i] =
          _mm512_max_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v), _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
      u[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 a = _mm512_max_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    const __m512 b = _mm512_max_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return P(typename P::batch(_mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))));
  } else
#endif
  {
    P turned[P::size];
    for (isize l = 0; l < P::size; ++l) turned[l] = x[l];
    transpose(turned);
    for (isize l = 1; l < P::size; ++l) turned[0] = max(turned[0], turned[l]);
    return turned[0];
  }
}

/// The larger of |a| and |b|; of NaN nothing is said.
template <class T, class A>
FOVEA_INLINE pack<T, A> most_magnitude(pack<T, A> a, pack<T, A> b) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<pack<T, A>, pack<float, avx512>>)
    return pack<T, A>(typename pack<T, A>::batch(_mm512_range_ps(a.v, b.v, 0x0b)));
#endif
  if constexpr (!std::is_same_v<A, scalar>) {
    using batch = typename pack<T, A>::batch;
    return max(pack<T, A>(batch(xsimd::abs(a.v))), pack<T, A>(batch(xsimd::abs(b.v))));
  } else {
    const pack<T, A> zero(T(0));
    return max(max(a, zero - a), max(b, zero - b));
  }
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
