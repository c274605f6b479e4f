// SPDX-License-Identifier: MIT
#pragma once
/// @file  words<Arch>: one register of integers, seen as 32-bit lanes, 16-bit lanes or bytes, for attention computed in int8.
///
///   dot4(acc, u, s)       lane l: acc[l] + sum of u8 u[4 l + i] * s8 s[4 l + i], i = 0..3
///
/// The other operations are in simd/word_ops.hpp.
///
/// Contract   every operation gives the same integers on every instruction set, for all inputs: dot4 never saturates. Loads and stores
///            need no alignment. A register is a multiple of quarters of four 32-bit lanes (16 bytes).
/// Cost       dot4: 1 instruction with VNNI (AVX-512 or AVX), 9 with plain AVX2; dot4_small, for u <= 127, 3 there.

#include <bit>
#include <cstring>

#include <fovea/simd/pack.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

/// Portable: one quarter, as plain numbers.
template <class Arch>
struct words {
  static constexpr isize size = 4;
  std::int32_t v[4];

  static FOVEA_INLINE words load(const void* p) {
    words x;
    std::memcpy(x.v, p, sizeof x.v);
    return x;
  }
  FOVEA_INLINE void store(void* p) const { std::memcpy(p, v, sizeof v); }
  static FOVEA_INLINE words splat(std::int32_t x) { return {{x, x, x, x}}; }
};

#if defined(FOVEA_HAS_AVX512)
template <>
struct words<avx512> {
  static constexpr isize size = 16;
  __m512i v;
  static FOVEA_INLINE words load(const void* p) { return {_mm512_loadu_si512(p)}; }
  FOVEA_INLINE void store(void* p) const { _mm512_storeu_si512(p, v); }
  static FOVEA_INLINE words splat(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
};
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
template <>
struct words<avx2> {
  static constexpr isize size = 8;
  __m256i v;
  static FOVEA_INLINE words load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  FOVEA_INLINE void store(void* p) const { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static FOVEA_INLINE words splat(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
};
#endif
#if defined(FOVEA_HAS_NEON64)
template <>
struct words<neon64> {
  static constexpr isize size = 4;
  int32x4_t v;
  static FOVEA_INLINE words load(const void* p) {
    return {vreinterpretq_s32_u8(vld1q_u8(static_cast<const std::uint8_t*>(p)))};
  }
  FOVEA_INLINE void store(void* p) const { vst1q_u8(static_cast<std::uint8_t*>(p), vreinterpretq_u8_s32(v)); }
  static FOVEA_INLINE words splat(std::int32_t x) { return {vdupq_n_s32(x)}; }
};
#endif

template <class A>
FOVEA_INLINE words<A> splat_i16(int x) {
  const auto h = static_cast<std::uint32_t>(x) & 0xffffU;
  return words<A>::splat(std::bit_cast<std::int32_t>(h << 16 | h));
}
template <class A>
FOVEA_INLINE words<A> splat_i8(int x) {
  return words<A>::splat(std::bit_cast<std::int32_t>((static_cast<std::uint32_t>(x) & 0xffU) * 0x01010101U));
}
/// The four bytes at p, in every lane.
template <class A>
FOVEA_INLINE words<A> splat4(const void* p) {
  std::int32_t four;
  std::memcpy(&four, p, 4);
  return words<A>::splat(four);
}

namespace detail {
template <class A>
FOVEA_INLINE words<A> dot4_portable(words<A> acc, words<A> u, words<A> s) {
  constexpr std::size_t n = sizeof(words<A>) / 4;
  std::uint8_t x[4 * n];
  std::int8_t y[4 * n];
  std::uint32_t z[n];
  std::memcpy(x, &u, sizeof x), std::memcpy(y, &s, sizeof y), std::memcpy(z, &acc, sizeof z);
  for (std::size_t l = 0; l < n; ++l)
    for (std::size_t i = 4 * l; i < 4 * l + 4; ++i) z[l] += static_cast<std::uint32_t>(int{x[i]} * int{y[i]});
  std::memcpy(static_cast<void*>(&acc), z, sizeof z);
  return acc;
}

/// Without an instruction for it.
template <class A>
FOVEA_INLINE words<A> dot4_plain(words<A> acc, words<A> u, words<A> s) {
  return dot4_portable(acc, u, s);
}
template <class A>
FOVEA_INLINE words<A> dot4_small_plain(words<A> acc, words<A> u, words<A> s) {
  return dot4_portable(acc, u, s);
}
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
/// Bytes 0 and 2 of a lane apart from 1 and 3, in 16 bits: no sum of two products can saturate 32 bits.
FOVEA_INLINE words<avx2> dot4_plain(words<avx2> acc, words<avx2> u, words<avx2> s) {
  const __m256i low = _mm256_set1_epi16(255);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u.v, low), _mm256_srai_epi16(_mm256_slli_epi16(s.v, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u.v, 8), _mm256_srai_epi16(s.v, 8));
  return {_mm256_add_epi32(acc.v, _mm256_add_epi32(even, odd))};
}
/// u <= 127: two products are at most 2 * 127 * 128 = 32512 in size, and stay inside 16 bits.
FOVEA_INLINE words<avx2> dot4_small_plain(words<avx2> acc, words<avx2> u, words<avx2> s) {
  const __m256i pairs = _mm256_maddubs_epi16(u.v, s.v);
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
#endif
#if defined(FOVEA_HAS_AVX512)
FOVEA_INLINE words<avx512> dot4_plain(words<avx512> acc, words<avx512> u, words<avx512> s) {
  const __m512i low = _mm512_set1_epi16(255);
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(u.v, low), _mm512_srai_epi16(_mm512_slli_epi16(s.v, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(u.v, 8), _mm512_srai_epi16(s.v, 8));
  return {_mm512_add_epi32(acc.v, _mm512_add_epi32(even, odd))};
}
FOVEA_INLINE words<avx512> dot4_small_plain(words<avx512> acc, words<avx512> u, words<avx512> s) {
  const __m512i pairs = _mm512_maddubs_epi16(u.v, s.v);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
#endif
#if defined(FOVEA_HAS_NEON64)
/// u = (u - 128) + 128: two signed products.
FOVEA_INLINE words<neon64> dot4_plain(words<neon64> acc, words<neon64> u, words<neon64> s) {
  const int8x16_t x = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(u.v), vdupq_n_u8(128)));
  const int8x16_t y = vreinterpretq_s8_s32(s.v);
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y))), high = vpaddlq_s16(vmull_high_s8(x, y));
  const int32x4_t sums = vpaddlq_s16(vpaddlq_s8(y));
  return {vaddq_s32(acc.v, vaddq_s32(vpaddq_s32(low, high), vshlq_n_s32(sums, 7)))};
}
FOVEA_INLINE words<neon64> dot4_small_plain(words<neon64> acc, words<neon64> u, words<neon64> s) {
  const int8x16_t x = vreinterpretq_s8_s32(u.v), y = vreinterpretq_s8_s32(s.v);
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y))), high = vpaddlq_s16(vmull_high_s8(x, y));
  return {vaddq_s32(acc.v, vpaddq_s32(low, high))};
}
#endif
}  // namespace detail

/// Does this build have one instruction for dot4 on Arch?
template <class Arch>
inline constexpr bool has_dot4 = false;
#if defined(FOVEA_HAS_AVX512) && defined(__AVX512VNNI__)
template <>
inline constexpr bool has_dot4<avx512> = true;
#endif
#if (defined(FOVEA_HAS_AVX512) && defined(__AVX512VNNI__)) || \
    ((defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)) && defined(__AVXVNNI__))
template <>
inline constexpr bool has_dot4<avx2> = true;
#endif
#if defined(FOVEA_HAS_NEON64) && (defined(__ARM_FEATURE_MATMUL_INT8) || defined(__ARM_FEATURE_DOTPROD))
template <>
inline constexpr bool has_dot4<neon64> = true;
#endif

/// The portable form; those below are preferred to it.
template <class A>
FOVEA_INLINE words<A> dot4(words<A> acc, words<A> u, words<A> s) {
  return detail::dot4_portable(acc, u, s);
}
/// The same for u <= 127 in every byte.
template <class A>
FOVEA_INLINE words<A> dot4_small(words<A> acc, words<A> u, words<A> s) {
  return detail::dot4_portable(acc, u, s);
}
#if defined(FOVEA_HAS_AVX512)
FOVEA_INLINE words<avx512> dot4(words<avx512> acc, words<avx512> u, words<avx512> s) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(acc.v, u.v, s.v)};
#else
  return detail::dot4_plain(acc, u, s);
#endif
}
FOVEA_INLINE words<avx512> dot4_small(words<avx512> acc, words<avx512> u, words<avx512> s) {
  return has_dot4<avx512> ? dot4(acc, u, s) : detail::dot4_small_plain(acc, u, s);
}
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
FOVEA_INLINE words<avx2> dot4(words<avx2> acc, words<avx2> u, words<avx2> s) {
#if defined(__AVXVNNI__)
  return {_mm256_dpbusd_avx_epi32(acc.v, u.v, s.v)};
#elif defined(__AVX512VNNI__) && defined(FOVEA_HAS_AVX512)
  return {_mm256_dpbusd_epi32(acc.v, u.v, s.v)};
#else
  return detail::dot4_plain(acc, u, s);
#endif
}
FOVEA_INLINE words<avx2> dot4_small(words<avx2> acc, words<avx2> u, words<avx2> s) {
  return has_dot4<avx2> ? dot4(acc, u, s) : detail::dot4_small_plain(acc, u, s);
}
#endif
#if defined(FOVEA_HAS_NEON64)
FOVEA_INLINE words<neon64> dot4(words<neon64> acc, words<neon64> u, words<neon64> s) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return {vusdotq_s32(acc.v, vreinterpretq_u8_s32(u.v), vreinterpretq_s8_s32(s.v))};
#elif defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t x = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(u.v), vdupq_n_u8(128)));
  const int8x16_t y = vreinterpretq_s8_s32(s.v);
  const int32x4_t less = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(-128), y);  // +128 is no signed byte
  return {vsubq_s32(vdotq_s32(acc.v, x, y), less)};
#else
  return detail::dot4_plain(acc, u, s);
#endif
}
FOVEA_INLINE words<neon64> dot4_small(words<neon64> acc, words<neon64> u, words<neon64> s) {
#if defined(__ARM_FEATURE_DOTPROD)
  return {vdotq_s32(acc.v, vreinterpretq_s8_s32(u.v), vreinterpretq_s8_s32(s.v))};
#else
  return detail::dot4_small_plain(acc, u, s);
#endif
}
#endif

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
