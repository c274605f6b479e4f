// SPDX-License-Identifier: MIT
#pragma once
/// @file  Dot products of signed 8-bit integers: two rows, exact in 32 bits for up to 2^17 elements; or four bytes a lane.
///
///   dot4_signed(acc, a, b)    lane l: acc[l] + sum of s8 a[4 l + i] * s8 b[4 l + i], i = 0..3; no byte is -128
///   low_halves, high_halves   bits 0..3, 4..7 of each byte
///
/// Cost       dot4_signed: 4 instructions with plain AVX2, where words.hpp's dot4 takes 9; 1 with NEON's dot product.

#include <fovea/simd/words.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

template <class Arch>
FOVEA_INLINE std::int32_t dot8(const std::int8_t* a, const std::int8_t* b, isize n) noexcept {
  std::int32_t sum = 0;
  isize c = 0;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<Arch, avx512>) {
    __m512i acc = _mm512_setzero_si512();
    for (; c + 32 <= n; c += 32) {
      const __m512i x = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + c)));
      const __m512i y = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + c)));
      acc = _mm512_add_epi32(acc, _mm512_madd_epi16(x, y));
    }
    sum = _mm512_reduce_add_epi32(acc);
  }
#endif
#if defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<Arch, avx2>) {
    __m256i acc = _mm256_setzero_si256();
    for (; c + 16 <= n; c += 16) {
      const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + c)));
      const __m256i y = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + c)));
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x, y));
    }
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
    const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    sum = _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
  }
#endif
  for (; c < n; ++c) sum += static_cast<std::int32_t>(a[c]) * static_cast<std::int32_t>(b[c]);
  return sum;
}

/// Is dot4_signed the shorter way on Arch? Elsewhere a is kept as u8, + 128, for dot4.
template <class Arch>
inline constexpr bool has_dot4_signed = std::is_same_v<Arch, neon64> || (std::is_same_v<Arch, avx2> && !has_dot4<avx2>);

template <class A>
FOVEA_INLINE words<A> dot4_signed(words<A> acc, words<A> a, words<A> b) {
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>) {  // |a| |b| <= 127^2: two products stay inside 16 bits
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(b.v), _mm256_sign_epi8(a.v, b.v));
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
  }
#endif
#if defined(FOVEA_HAS_NEON64)
  if constexpr (std::is_same_v<A, neon64>) {
    const int8x16_t x = vreinterpretq_s8_s32(a.v), y = vreinterpretq_s8_s32(b.v);
#if defined(__ARM_FEATURE_DOTPROD)
    return {vdotq_s32(acc.v, x, y)};
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)));
    return {vaddq_s32(acc.v, vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(x, y))))};
#endif
  }
#endif
  std::int8_t x[4 * words<A>::size], y[4 * words<A>::size];
  std::int32_t z[words<A>::size];
  a.store(x), b.store(y), acc.store(z);
  for (isize l = 0; l < 4 * words<A>::size; ++l) z[l / 4] += int{x[l]} * int{y[l]};
  return words<A>::load(z);
}

template <class A>
FOVEA_INLINE words<A> low_halves(words<A> x) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))};
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>) return {_mm256_and_si256(x.v, _mm256_set1_epi8(15))};
#endif
#if defined(FOVEA_HAS_NEON64)
  if constexpr (std::is_same_v<A, neon64>)
    return {vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x.v), vdupq_n_u8(15)))};
#endif
  std::uint32_t y[words<A>::size];
  x.store(y);
  for (std::uint32_t& z : y) z &= 0x0f0f0f0fU;
  return words<A>::load(y);
}
template <class A>
FOVEA_INLINE words<A> high_halves(words<A> x) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) return low_halves(words<A>{_mm512_srli_epi16(x.v, 4)});
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>) return low_halves(words<A>{_mm256_srli_epi16(x.v, 4)});
#endif
#if defined(FOVEA_HAS_NEON64)
  if constexpr (std::is_same_v<A, neon64>) return {vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x.v), 4))};
#endif
  std::uint32_t y[words<A>::size];
  x.store(y);
  for (std::uint32_t& z : y) z = z >> 4 & 0x0f0f0f0fU;
  return words<A>::load(y);
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
