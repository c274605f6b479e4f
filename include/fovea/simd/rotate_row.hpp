// SPDX-License-Identifier: MIT
#pragma once
/// @file  Walsh-Hadamard rotation of a row of floats, in place: spreads large elements over a block before it is rounded to int8.
///
///   x' = H_b x / sqrt(b)  for each block of b elements,   b = the largest power of two that divides n
///
/// Contract   orthogonal, and its own inverse: q' . k' = q . k. The same bits on every instruction set. An odd n stays as it is.
/// Cost       n log2(b) additions.

#include <fovea/simd/pack.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

/// Elements that are rotated together in rows of `n`.
constexpr isize rotation_block(isize n) { return n & -n; }

namespace detail {
/// Distances 1, 2, ..., while a register holds both elements; returns the first distance left.
template <class Arch>
FOVEA_INLINE isize rotate_inside([[maybe_unused]] float* x, [[maybe_unused]] isize n, [[maybe_unused]] isize block) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<Arch, avx512>) {
    if (block < 16) return 1;
    const auto step = [](__m512 a, __m512 turned, __mmask16 second) FOVEA_INLINE_LAMBDA {
      return _mm512_mask_sub_ps(_mm512_add_ps(a, turned), second, turned, a);
    };
    for (isize c = 0; c < n; c += 16) {
      __m512 a = _mm512_loadu_ps(x + c);
      a = step(a, _mm512_permute_ps(a, 0xb1), 0xaaaa);
      a = step(a, _mm512_permute_ps(a, 0x4e), 0xcccc);
      a = step(a, _mm512_shuffle_f32x4(a, a, 0xb1), 0xf0f0);
      a = step(a, _mm512_shuffle_f32x4(a, a, 0x4e), 0xff00);
      _mm512_storeu_ps(x + c, a);
    }
    return 16;
  }
#endif
#if defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<Arch, avx2>) {
    if (block < 8) return 1;
    for (isize c = 0; c < n; c += 8) {
      __m256 a = _mm256_loadu_ps(x + c), t = _mm256_permute_ps(a, 0xb1);
      a = _mm256_blend_ps(_mm256_add_ps(a, t), _mm256_sub_ps(t, a), 0xaa);
      t = _mm256_permute_ps(a, 0x4e);
      a = _mm256_blend_ps(_mm256_add_ps(a, t), _mm256_sub_ps(t, a), 0xcc);
      t = _mm256_permute2f128_ps(a, a, 1);
      a = _mm256_blend_ps(_mm256_add_ps(a, t), _mm256_sub_ps(t, a), 0xf0);
      _mm256_storeu_ps(x + c, a);
    }
    return 8;
  }
#endif
  return 1;
}
#if defined(FOVEA_HAS_AVX512)
/// 16 * N elements that stay in registers, in the same order of additions.
template <int N>
FOVEA_INLINE void rotate_registers(const float* x, float* to) {
  // a + turned, and turned - a in lanes that are second of their pair: one fma, nothing is rounded that would not be.
  const auto step = [](__m512 a, __m512 turned, int second) FOVEA_INLINE_LAMBDA {
    const __m512 one = _mm512_set1_ps(1.0F);
    return _mm512_fmadd_ps(a, _mm512_mask_sub_ps(one, static_cast<__mmask16>(second), _mm512_setzero_ps(), one),
                           turned);
  };
  __m512 r[N];
  FOVEA_UNROLL
  for (int i = 0; i < N; ++i) {
    __m512 a = _mm512_loadu_ps(x + 16 * i);
    a = step(a, _mm512_permute_ps(a, 0xb1), 0xaaaa);
    a = step(a, _mm512_permute_ps(a, 0x4e), 0xcccc);
    a = step(a, _mm512_shuffle_f32x4(a, a, 0xb1), 0xf0f0);
    r[i] = step(a, _mm512_shuffle_f32x4(a, a, 0x4e), 0xff00);
  }
  const auto apart = [&]<int Distance>(std::integral_constant<int, Distance>) FOVEA_INLINE_LAMBDA {
    FOVEA_UNROLL
    for (int i = 0; i < N; ++i) {
      if ((i & Distance) != 0 || Distance >= N) continue;
      const __m512 a = r[i], b = r[i + Distance];
      r[i] = _mm512_add_ps(a, b), r[i + Distance] = _mm512_sub_ps(a, b);
    }
  };
  apart(std::integral_constant<int, 1>{}), apart(std::integral_constant<int, 2>{});
  if constexpr (N == 8) apart(std::integral_constant<int, 4>{});
  const __m512 size = _mm512_set1_ps(1.0F / std::sqrt(16.0F * N));
  FOVEA_UNROLL
  for (int i = 0; i < N; ++i) _mm512_storeu_ps(to + 16 * i, _mm512_mul_ps(r[i], size));
}
#endif
}  // namespace detail

/// `from` rotated, into x; they may be the same.
template <class Arch>
FOVEA_NOINLINE void rotate_row(const float* from, float* x, isize n) noexcept {
  using P = pack<float, Arch>;
  const isize block = rotation_block(n);
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<Arch, avx512>) {
    if (n == 64) return detail::rotate_registers<4>(from, x);
    if (n == 128) return detail::rotate_registers<8>(from, x);
  }
#endif
  for (isize c = 0; from != x && c < n; ++c) x[c] = from[c];
  if (block < 2) return;
  for (isize apart = detail::rotate_inside<Arch>(x, n, block); apart < block; apart *= 2)
    for (isize first = 0; first < n; first += 2 * apart) {
      float *low = x + first, *high = low + apart;
      isize c = 0;
      for (; c + P::size <= apart; c += P::size) {
        const P a = P::load(low + c), b = P::load(high + c);
        (a + b).store(low + c), (a - b).store(high + c);
      }
      for (; c < apart; ++c) {
        const float a = low[c], b = high[c];
        low[c] = a + b, high[c] = a - b;
      }
    }
  const float size = 1.0F / std::sqrt(static_cast<float>(block));
  isize c = 0;
  for (; c + P::size <= n; c += P::size) (P::load(x + c) * P(size)).store(x + c);
  for (; c < n; ++c) x[c] *= size;
}

template <class Arch>
FOVEA_INLINE void rotate_row(float* x, isize n) noexcept {
  rotate_row<Arch>(x, x, n);
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
