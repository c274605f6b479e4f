// SPDX-License-Identifier: MIT
#pragma once
/// @file  A W x W block of rows turned into columns, in registers where the instruction set has a good way.

#include <fovea/simd/pack.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

/// x[i] lane j  <->  x[j] lane i, for W registers x
template <class T, class A>
FOVEA_INLINE void transpose(pack<T, A>* x) {
  using P = pack<T, A>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<P, pack<float, avx512>>) {
    __m512 t[16], u[16];
    for (int i = 0; i < 8; ++i) {  // pairs of rows, interleaved within 128-bit quarters
      t[2 * i] = _mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v);
      t[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v);
    }
    for (int i = 0; i < 4; ++i) {  // u[4 i + c]: column c of each quarter, rows 4 i .. 4 i + 3
      const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]),
                    c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
      u[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)), u[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      u[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)),
                u[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int c = 0; c < 4; ++c) {  // a 4 x 4 transpose of quarters
      const __m512 a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), b = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd), e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
      x[c] = P(typename P::batch(_mm512_shuffle_f32x4(a, b, 0x88))),
      x[8 + c] = P(typename P::batch(_mm512_shuffle_f32x4(a, b, 0xdd)));
      x[4 + c] = P(typename P::batch(_mm512_shuffle_f32x4(d, e, 0x88))),
            x[12 + c] = P(typename P::batch(_mm512_shuffle_f32x4(d, e, 0xdd)));
    }
    return;
  } else
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
      if constexpr (std::is_same_v<P, pack<float, avx2>>) {
    __m256 t[8], u[8];
    for (int i = 0; i < 4; ++i)
      t[2 * i] = _mm256_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v),
            t[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) {
        u[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0x44);
        u[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + 2 + j], 0xee);
      }
    for (int c = 0; c < 4; ++c) {
      x[c] = P(typename P::batch(_mm256_permute2f128_ps(u[c], u[4 + c], 0x20)));
      x[4 + c] = P(typename P::batch(_mm256_permute2f128_ps(u[c], u[4 + c], 0x31)));
    }
    return;
  } else
#endif
  {
    T lanes[P::size][P::size];
    for (isize i = 0; i < P::size; ++i) x[i].store(lanes[i]);
    for (isize i = 0; i < P::size; ++i) {
      T column[P::size];
      for (isize j = 0; j < P::size; ++j) column[j] = lanes[j][i];
      x[i] = P::load(column);
    }
  }
}

/// x[i] lane l = row(l)[i] for W rows of W elements in memory. With AVX-512 half of the moves are loads that need no shuffle.
template <class T, class A, class Row>
FOVEA_INLINE void load_turned(const Row& row, pack<T, A>* x) {
  using P = pack<T, A>;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<P, pack<float, avx512>>) {
    FOVEA_UNROLL
    for (int q = 0; q < 4; ++q) {  // columns 4 q .. 4 q + 3; r[i]: rows i, 4 + i, 8 + i, 12 + i, a quarter each
      __m512 r[4];
      FOVEA_UNROLL
      for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_castps128_ps512(_mm_loadu_ps(row(i) + 4 * q));
        r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(row(4 + i) + 4 * q), 1);
        r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(row(8 + i) + 4 * q), 2);
        r[i] = _mm512_insertf32x4(r[i], _mm_loadu_ps(row(12 + i) + 4 * q), 3);
      }
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])),
                    b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1])),
                    c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3])),
                    d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
      x[4 * q] = P(typename P::batch(_mm512_castpd_ps(_mm512_unpacklo_pd(a, c))));
      x[4 * q + 1] = P(typename P::batch(_mm512_castpd_ps(_mm512_unpackhi_pd(a, c))));
      x[4 * q + 2] = P(typename P::batch(_mm512_castpd_ps(_mm512_unpacklo_pd(b, d))));
      x[4 * q + 3] = P(typename P::batch(_mm512_castpd_ps(_mm512_unpackhi_pd(b, d))));
    }
    return;
  } else
#endif
  {
    for (isize l = 0; l < P::size; ++l) x[l] = P::load(row(l));
    transpose(x);
  }
}

/// to[c * to_ld + l] = factor * from[l][c] for W rows l and c < width.
template <class T, class A>
FOVEA_NOINLINE void rows_to_columns(const T* const (&from)[pack<T, A>::size], isize width, T factor, T* to,
                                    isize to_ld) {
  using P = pack<T, A>;
  isize c = 0;
  for (; c + P::size <= width; c += P::size) {
    P x[P::size];
    load_turned<T, A>([&](isize l) FOVEA_INLINE_LAMBDA { return from[l] + c; }, x);
    for (isize l = 0; l < P::size; ++l) (x[l] * P(factor)).store(to + (c + l) * to_ld);
  }
  for (; c < width; ++c)
    for (isize l = 0; l < P::size; ++l) to[c * to_ld + l] = from[l][c] * factor;
}

/// to[l][c] = factors[l] * from[c * from_ld + l] for W rows l and c < width.
template <class T, class A>
FOVEA_NOINLINE void columns_to_rows(const T* from, isize from_ld, isize width, const T* factors,
                                    T* const (&to)[pack<T, A>::size]) {
  using P = pack<T, A>;
  isize c = 0;
  for (; c + P::size <= width; c += P::size) {
    P x[P::size];
    load_turned<T, A>([&](isize l) FOVEA_INLINE_LAMBDA { return from + (c + l) * from_ld; }, x);
    for (isize l = 0; l < P::size; ++l) (x[l] * P(factors[l])).store(to[l] + c);
  }
  for (; c < width; ++c)
    for (isize l = 0; l < P::size; ++l) to[l][c] = from[c * from_ld + l] * factors[l];
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
