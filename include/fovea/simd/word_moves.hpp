// SPDX-License-Identifier: MIT
#pragma once
/// @file  Moves inside words<Arch> (simd/words.hpp) that rounded rows and scores of 16 bits need.
///
///   bits_of(x), as_floats(w)   registers of floats as words, and back, bit by bit
///   join_i16(a, b)             lane l: the low 16 bits of a[l], then those of b[l]
///   swap_i16(w)                the two 16-bit halves of every lane change places
///   low_i16(w), high_i16(w)    each lane's low or high 16 bits, widened with their sign
///   join_u8(a, b)              a, b of 16-bit numbers below 2^15: lane l holds the bytes a0 >> 7, b0 >> 7, a1 >> 7, b1 >> 7
///   join_low_bytes(x)          lane l: the low bytes of x[0][l], x[1][l], x[2][l], x[3][l]
///   join_bytes<Unsigned>(x)    the 32-bit lanes of x[0], then x[1], x[2], x[3] as bytes, u8 or s8; they are numbers that fit
///   keep(w)                    w stays in one register
///
/// Contract   the same numbers on every instruction set.

#include <fovea/simd/word_ops.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

/// Keeps an accumulator in one register: across several loops g++ would move it from register to register.
template <class A>
FOVEA_INLINE void keep(words<A>& w) noexcept {
#if defined(FOVEA_HAS_AVX512) && defined(__GNUC__)
  if constexpr (std::is_same_v<A, avx512>) asm("" : "+v"(w.v));
#endif
#if (defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)) && defined(__GNUC__)
  if constexpr (std::is_same_v<A, avx2>) asm("" : "+x"(w.v));
#endif
  (void)w;
}

template <class A>
FOVEA_INLINE words<A> bits_of(const pack<float, A> (&x)[float_packs<A>]) {
  words<A> w;
  if constexpr (std::is_same_v<A, scalar>) {
    float lanes[4];
    for (int l = 0; l < 4; ++l) lanes[l] = x[l].v;
    return words<A>::load(lanes);
  } else {
    static_assert(sizeof w == sizeof x[0].v);
    std::memcpy(static_cast<void*>(&w), &x[0].v, sizeof w);
    return w;
  }
}
template <class A>
FOVEA_INLINE pack<float, A> as_floats(const words<A>& w, [[maybe_unused]] int part = 0) {
  pack<float, A> x;
  if constexpr (std::is_same_v<A, scalar>)
    x.v = std::bit_cast<float>(w.v[part]);
  else
    std::memcpy(static_cast<void*>(&x.v), &w, sizeof w);
  return x;
}

namespace detail {
/// Lane by lane in 32 bits, through memory.
template <class A, class F>
FOVEA_INLINE words<A> each_word(words<A> a, words<A> b, F f) {
  std::uint32_t x[words<A>::size], y[words<A>::size];
  a.store(x), b.store(y);
  for (isize l = 0; l < words<A>::size; ++l) x[l] = f(x[l], y[l]);
  return words<A>::load(x);
}
}  // namespace detail

template <class A>
FOVEA_INLINE words<A> join_i16(words<A> a, words<A> b) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) {  // one instruction: b's low halves go into a's high ones
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
    return {_mm512_mask_shuffle_epi8(a.v, 0xccccccccccccccccULL, b.v, order)};
  }
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>) return {_mm256_blend_epi16(a.v, _mm256_slli_epi32(b.v, 16), 0xaa)};
#endif
  return detail::each_word(a, b, [](std::uint32_t x, std::uint32_t y) { return (x & 0xffffU) | y << 16; });
}
template <class A>
FOVEA_INLINE words<A> swap_i16(words<A> w) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) return {_mm512_rol_epi32(w.v, 16)};
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>)
    return {_mm256_or_si256(_mm256_slli_epi32(w.v, 16), _mm256_srli_epi32(w.v, 16))};
#endif
  return detail::each_word(w, w, [](std::uint32_t x, std::uint32_t) { return x << 16 | x >> 16; });
}
template <class A>
FOVEA_INLINE words<A> high_i16(words<A> w) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) return {_mm512_srai_epi32(w.v, 16)};
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>) return {_mm256_srai_epi32(w.v, 16)};
#endif
  return detail::each_word(
      w, w, [](std::uint32_t x, std::uint32_t) { return x >> 16 | ((x >> 31) != 0 ? 0xffff0000U : 0U); });
}
template <class A>
FOVEA_INLINE words<A> low_i16(words<A> w) {
  return high_i16(swap_i16(w));
}
template <class A>
FOVEA_INLINE words<A> join_u8(words<A> a, words<A> b) {
  constexpr std::uint32_t even = 0x00ff00ffU;
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>)  // even ? a : b, bit by bit
    return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(even)), _mm512_srli_epi32(a.v, 7),
                                      _mm512_slli_epi32(b.v, 1), 0xca)};
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>)
    return {_mm256_blendv_epi8(_mm256_slli_epi32(b.v, 1), _mm256_srli_epi32(a.v, 7),
                               _mm256_set1_epi32(static_cast<int>(even)))};
#endif
  return detail::each_word(a, b, [](std::uint32_t x, std::uint32_t y) { return (x >> 7 & even) | (y << 1 & ~even); });
}

namespace detail {
/// The low 16 bits of lane l: the low bytes of a[l] and b[l].
template <class A>
FOVEA_INLINE words<A> join_i8(words<A> a, words<A> b) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>)
    return {_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaULL, a.v, _mm512_slli_epi32(b.v, 8))};
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>)
    return {_mm256_blendv_epi8(a.v, _mm256_slli_epi32(b.v, 8), _mm256_set1_epi16(-256))};
#endif
  return each_word(a, b, [](std::uint32_t x, std::uint32_t y) { return (x & 0xffU) | (y & 0xffU) << 8; });
}
}  // namespace detail
template <class A>
FOVEA_INLINE words<A> join_low_bytes(const words<A> (&x)[4]) {
  return join_i16(detail::join_i8(x[0], x[1]), detail::join_i8(x[2], x[3]));
}

template <bool Unsigned, class A>
FOVEA_INLINE words<A> join_bytes(const words<A> (&x)[4]) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) {
    const __m512i low = _mm512_packs_epi32(x[0].v, x[1].v), high = _mm512_packs_epi32(x[2].v, x[3].v);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_permutexvar_epi32(order, Unsigned ? _mm512_packus_epi16(low, high) : _mm512_packs_epi16(low, high))};
  }
#endif
  std::uint8_t bytes[4 * words<A>::size];
  for (isize i = 0; i < 4; ++i) store_low_bytes(x[i], bytes + i * words<A>::size);
  return words<A>::load(bytes);
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
