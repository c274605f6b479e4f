// SPDX-License-Identifier: MIT
#pragma once
/// @file  Operations on words<Arch> (simd/words.hpp) beside the dot product.
///
///   add_i32 sub_i32 xor_bits                        32-bit lanes
///   add_i16 sub_i16 max_i16 min_i16 mulhrs_i16      16-bit lanes; sums saturate, mulhrs is (a b + 2^14) >> 15
///   narrow_i16(a, b)    i32 -> i16, saturated: quarter z of the result holds a's quarter z, then b's
///   group4(ab, cd)      i16 -> u8, saturated: where ab = narrow_i16(a, b), cd = narrow_i16(c, d), lane l is the bytes a[l] b[l] c[l] d[l]
///   zip4(x)             bytes of four rows: lane 4 z + y of x'[i] is the bytes of x[0..3] at column 16 z + 4 i + y
///   exp2_i16(d)         32640 * 2^(-d / 64), d >= 0 in 16-bit lanes: a table of 64 (one product of two of 8), shifted down by d / 64
///   sum_each(x)         lane i: the sum of the lanes of x[i]
///   to_float, to_nearest   i32 <-> f32, ties to even, |x| < 2^31; a register of words is `float_packs` packs
///
/// Contract   as words.hpp: equal integers on every instruction set.

#include <fovea/simd/words.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {
namespace detail {
/// Lane by lane in plain C++, `T` the type of a lane.
template <class T, class A, class F>
FOVEA_INLINE words<A> each_lane(words<A> a, words<A> b, F f) {
  constexpr std::size_t n = sizeof(words<A>) / sizeof(T);
  T x[n], y[n];
  std::memcpy(x, a.v, sizeof x), std::memcpy(y, b.v, sizeof y);
  for (std::size_t l = 0; l < n; ++l) x[l] = static_cast<T>(f(x[l], y[l]));
  std::memcpy(a.v, x, sizeof x);
  return a;
}
FOVEA_INLINE int clamp_to(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

/// 2^(-8 a / 64) and 2^(-b / 64) for a, b = 0..7; their rounded product is the table of exp2_i16: within 1.1 of 32640 * 2^(-f / 64).
inline constexpr std::int16_t exp2_high[8] = {32641, 29932, 27448, 25170, 23081, 21165, 19408, 17798};
inline constexpr std::int16_t exp2_low[8] = {32767, 32414, 32065, 31719, 31378, 31040, 30705, 30375};
FOVEA_INLINE int exp2_entry(int f) { return (exp2_high[f >> 3] * exp2_low[f & 7] + 16384) >> 15; }
}  // namespace detail

// Portable: one quarter. The forms below are preferred to it.
template <class A>
FOVEA_INLINE words<A> add_i32(words<A> a, words<A> b) {
  return detail::each_lane<std::uint32_t>(a, b, [](auto x, auto y) { return x + y; });
}
template <class A>
FOVEA_INLINE words<A> sub_i32(words<A> a, words<A> b) {
  return detail::each_lane<std::uint32_t>(a, b, [](auto x, auto y) { return x - y; });
}
template <class A>
FOVEA_INLINE words<A> xor_bits(words<A> a, words<A> b) {
  return detail::each_lane<std::uint32_t>(a, b, [](auto x, auto y) { return x ^ y; });
}
template <class A>
FOVEA_INLINE words<A> add_i16(words<A> a, words<A> b) {
  return detail::each_lane<std::int16_t>(a, b, [](int x, int y) { return detail::clamp_to(x + y, -32768, 32767); });
}
template <class A>
FOVEA_INLINE words<A> sub_i16(words<A> a, words<A> b) {
  return detail::each_lane<std::int16_t>(a, b, [](int x, int y) { return detail::clamp_to(x - y, -32768, 32767); });
}
template <class A>
FOVEA_INLINE words<A> max_i16(words<A> a, words<A> b) {
  return detail::each_lane<std::int16_t>(a, b, [](int x, int y) { return x > y ? x : y; });
}
template <class A>
FOVEA_INLINE words<A> min_i16(words<A> a, words<A> b) {
  return detail::each_lane<std::int16_t>(a, b, [](int x, int y) { return x < y ? x : y; });
}
template <class A>
FOVEA_INLINE words<A> mulhrs_i16(words<A> a, words<A> b) {
  return detail::each_lane<std::int16_t>(a, b, [](int x, int y) { return (x * y + 16384) >> 15; });
}
template <class A>
FOVEA_INLINE words<A> narrow_i16(words<A> a, words<A> b) {
  std::int16_t x[8];
  for (int l = 0; l < 4; ++l) {
    x[l] = static_cast<std::int16_t>(detail::clamp_to(a.v[l], -32768, 32767));
    x[4 + l] = static_cast<std::int16_t>(detail::clamp_to(b.v[l], -32768, 32767));
  }
  return words<A>::load(x);
}
template <class A>
FOVEA_INLINE words<A> group4(words<A> ab, words<A> cd) {
  std::int16_t x[16];
  std::uint8_t y[16];
  ab.store(x), cd.store(x + 8);
  for (int l = 0; l < 4; ++l)
    for (int i = 0; i < 4; ++i) y[4 * l + i] = static_cast<std::uint8_t>(detail::clamp_to(x[4 * i + l], 0, 255));
  return words<A>::load(y);
}
template <class A>
FOVEA_INLINE void zip4(words<A> (&x)[4]) {
  std::uint8_t rows[4][16], y[4][16];
  for (int i = 0; i < 4; ++i) x[i].store(rows[i]);
  for (int c = 0; c < 16; ++c)
    for (int i = 0; i < 4; ++i) y[c / 4][c % 4 * 4 + i] = rows[i][c];
  for (int i = 0; i < 4; ++i) x[i] = words<A>::load(y[i]);
}
template <class A>
FOVEA_INLINE words<A> exp2_i16(words<A> d) {
  return detail::each_lane<std::int16_t>(
      d, d, [](int x, int) { return x >> 6 > 15 ? 0 : detail::exp2_entry(x & 63) >> (x >> 6); });
}
/// Lane i of the result is the sum of the lanes of x[i], in 32 bits.
template <class A>
FOVEA_INLINE words<A> sum_each(const words<A> (&x)[words<A>::size]) {
  constexpr isize n = words<A>::size;
  std::uint32_t lanes[n], sums[n];
  for (isize i = 0; i < n; ++i) {
    x[i].store(lanes);
    sums[i] = 0;
    for (isize l = 0; l < n; ++l) sums[i] += lanes[l];
  }
  return words<A>::load(sums);
}

#if defined(FOVEA_HAS_AVX512)
FOVEA_INLINE words<avx512> add_i32(words<avx512> a, words<avx512> b) { return {_mm512_add_epi32(a.v, b.v)}; }
FOVEA_INLINE words<avx512> sub_i32(words<avx512> a, words<avx512> b) { return {_mm512_sub_epi32(a.v, b.v)}; }
FOVEA_INLINE words<avx512> xor_bits(words<avx512> a, words<avx512> b) { return {_mm512_xor_si512(a.v, b.v)}; }
FOVEA_INLINE words<avx512> add_i16(words<avx512> a, words<avx512> b) { return {_mm512_adds_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx512> sub_i16(words<avx512> a, words<avx512> b) { return {_mm512_subs_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx512> max_i16(words<avx512> a, words<avx512> b) { return {_mm512_max_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx512> min_i16(words<avx512> a, words<avx512> b) { return {_mm512_min_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx512> mulhrs_i16(words<avx512> a, words<avx512> b) { return {_mm512_mulhrs_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx512> narrow_i16(words<avx512> a, words<avx512> b) { return {_mm512_packs_epi32(a.v, b.v)}; }
FOVEA_INLINE words<avx512> group4(words<avx512> ab, words<avx512> cd) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return {_mm512_shuffle_epi8(_mm512_packus_epi16(ab.v, cd.v), order)};
}
FOVEA_INLINE void zip4(words<avx512> (&x)[4]) {
  const __m512i a = _mm512_unpacklo_epi8(x[0].v, x[1].v), b = _mm512_unpackhi_epi8(x[0].v, x[1].v);
  const __m512i c = _mm512_unpacklo_epi8(x[2].v, x[3].v), d = _mm512_unpackhi_epi8(x[2].v, x[3].v);
  x[0].v = _mm512_unpacklo_epi16(a, c), x[1].v = _mm512_unpackhi_epi16(a, c);
  x[2].v = _mm512_unpacklo_epi16(b, d), x[3].v = _mm512_unpackhi_epi16(b, d);
}
FOVEA_INLINE words<avx512> sum_each(const words<avx512> (&x)[16]) {
  __m512i t[8], u[4];
  for (int i = 0; i < 8; ++i) {
    const __m512i a = x[2 * i].v, b = x[2 * i + 1].v;
    t[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = t[2 * i], b = t[2 * i + 1];
    u[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const __m512i a = _mm512_add_epi32(_mm512_shuffle_i32x4(u[0], u[1], 0x88), _mm512_shuffle_i32x4(u[0], u[1], 0xdd));
  const __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(u[2], u[3], 0x88), _mm512_shuffle_i32x4(u[2], u[3], 0xdd));
  return {_mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd))};
}
/// The 64 entries in two registers: one permutation, one variable shift.
FOVEA_INLINE words<avx512> exp2_i16(words<avx512> d) {
  struct table {
    std::int16_t entry[64];
    constexpr table() : entry() {
      for (int f = 0; f < 64; ++f)
        entry[f] = static_cast<std::int16_t>((detail::exp2_high[f >> 3] * detail::exp2_low[f & 7] + 16384) >> 15);
    }
  };
  static constexpr table t;
  const __m512i low = _mm512_loadu_si512(t.entry), high = _mm512_loadu_si512(t.entry + 32);
  return {_mm512_srlv_epi16(_mm512_permutex2var_epi16(low, d.v, high), _mm512_srli_epi16(d.v, 6))};
}
#endif

#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
FOVEA_INLINE words<avx2> add_i32(words<avx2> a, words<avx2> b) { return {_mm256_add_epi32(a.v, b.v)}; }
FOVEA_INLINE words<avx2> sub_i32(words<avx2> a, words<avx2> b) { return {_mm256_sub_epi32(a.v, b.v)}; }
FOVEA_INLINE words<avx2> xor_bits(words<avx2> a, words<avx2> b) { return {_mm256_xor_si256(a.v, b.v)}; }
FOVEA_INLINE words<avx2> add_i16(words<avx2> a, words<avx2> b) { return {_mm256_adds_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx2> sub_i16(words<avx2> a, words<avx2> b) { return {_mm256_subs_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx2> max_i16(words<avx2> a, words<avx2> b) { return {_mm256_max_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx2> min_i16(words<avx2> a, words<avx2> b) { return {_mm256_min_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx2> mulhrs_i16(words<avx2> a, words<avx2> b) { return {_mm256_mulhrs_epi16(a.v, b.v)}; }
FOVEA_INLINE words<avx2> narrow_i16(words<avx2> a, words<avx2> b) { return {_mm256_packs_epi32(a.v, b.v)}; }
FOVEA_INLINE words<avx2> group4(words<avx2> ab, words<avx2> cd) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm256_shuffle_epi8(_mm256_packus_epi16(ab.v, cd.v), _mm256_broadcastsi128_si256(order))};
}
FOVEA_INLINE void zip4(words<avx2> (&x)[4]) {
  const __m256i a = _mm256_unpacklo_epi8(x[0].v, x[1].v), b = _mm256_unpackhi_epi8(x[0].v, x[1].v);
  const __m256i c = _mm256_unpacklo_epi8(x[2].v, x[3].v), d = _mm256_unpackhi_epi8(x[2].v, x[3].v);
  x[0].v = _mm256_unpacklo_epi16(a, c), x[1].v = _mm256_unpackhi_epi16(a, c);
  x[2].v = _mm256_unpacklo_epi16(b, d), x[3].v = _mm256_unpackhi_epi16(b, d);
}
FOVEA_INLINE words<avx2> sum_each(const words<avx2> (&x)[8]) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0].v, x[1].v), _mm256_hadd_epi32(x[2].v, x[3].v));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(x[4].v, x[5].v), _mm256_hadd_epi32(x[6].v, x[7].v));
  return {_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31))};
}
/// Both tables of 8 are one byte shuffle each, and so are the bytes of 2^(15 - n), which stands for a shift down by n.
FOVEA_INLINE words<avx2> exp2_i16(words<avx2> d) {
  const auto table = [](const std::int16_t* p) FOVEA_INLINE_LAMBDA {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  };
  const __m256i seven = _mm256_set1_epi16(7), twice = _mm256_set1_epi16(0x0202), both = _mm256_set1_epi16(0x0100);
  const auto entry = [&](__m256i t, __m256i index) FOVEA_INLINE_LAMBDA {  // bytes 2 i and 2 i + 1
    return _mm256_shuffle_epi8(t, _mm256_add_epi16(_mm256_mullo_epi16(index, twice), both));
  };
  const __m256i high = entry(table(detail::exp2_high), _mm256_and_si256(_mm256_srli_epi16(d.v, 3), seven));
  const __m256i low = entry(table(detail::exp2_low), _mm256_and_si256(d.v, seven));
  const __m256i p = _mm256_mulhrs_epi16(high, low);
  const __m256i n = _mm256_min_epu16(_mm256_srli_epi16(d.v, 6), _mm256_set1_epi16(15));
  const __m256i power =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(-128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0));
  const __m256i rest = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, -128, 64, 32, 16, 8, 4, 2, 1));
  const __m256i upper = _mm256_slli_epi16(_mm256_shuffle_epi8(power, _mm256_or_si256(n, _mm256_set1_epi16(-32768))), 8);
  const __m256i lower = _mm256_shuffle_epi8(rest, _mm256_or_si256(n, _mm256_set1_epi16(-32768)));
  return {_mm256_mulhi_epu16(_mm256_add_epi16(p, p), _mm256_or_si256(upper, lower))};
}
#endif

#if defined(FOVEA_HAS_NEON64)
namespace detail {
FOVEA_INLINE int16x8_t i16(words<neon64> x) { return vreinterpretq_s16_s32(x.v); }
FOVEA_INLINE words<neon64> i16(int16x8_t x) { return {vreinterpretq_s32_s16(x)}; }
FOVEA_INLINE uint8x16_t u8(words<neon64> x) { return vreinterpretq_u8_s32(x.v); }
FOVEA_INLINE words<neon64> u8(uint8x16_t x) { return {vreinterpretq_s32_u8(x)}; }
}  // namespace detail
FOVEA_INLINE words<neon64> add_i32(words<neon64> a, words<neon64> b) { return {vaddq_s32(a.v, b.v)}; }
FOVEA_INLINE words<neon64> sub_i32(words<neon64> a, words<neon64> b) { return {vsubq_s32(a.v, b.v)}; }
FOVEA_INLINE words<neon64> xor_bits(words<neon64> a, words<neon64> b) { return {veorq_s32(a.v, b.v)}; }
FOVEA_INLINE words<neon64> add_i16(words<neon64> a, words<neon64> b) {
  return detail::i16(vqaddq_s16(detail::i16(a), detail::i16(b)));
}
FOVEA_INLINE words<neon64> sub_i16(words<neon64> a, words<neon64> b) {
  return detail::i16(vqsubq_s16(detail::i16(a), detail::i16(b)));
}
FOVEA_INLINE words<neon64> max_i16(words<neon64> a, words<neon64> b) {
  return detail::i16(vmaxq_s16(detail::i16(a), detail::i16(b)));
}
FOVEA_INLINE words<neon64> min_i16(words<neon64> a, words<neon64> b) {
  return detail::i16(vminq_s16(detail::i16(a), detail::i16(b)));
}
FOVEA_INLINE words<neon64> mulhrs_i16(words<neon64> a, words<neon64> b) {
  const int16x8_t x = detail::i16(a), y = detail::i16(b);  // vqrdmulhq saturates -1 * -1, x86 does not
  return detail::i16(vcombine_s16(vrshrn_n_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), 15),
                                  vrshrn_n_s32(vmull_high_s16(x, y), 15)));
}
FOVEA_INLINE words<neon64> narrow_i16(words<neon64> a, words<neon64> b) {
  return detail::i16(vcombine_s16(vqmovn_s32(a.v), vqmovn_s32(b.v)));
}
FOVEA_INLINE words<neon64> group4(words<neon64> ab, words<neon64> cd) {
  constexpr std::uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const uint8x16_t bytes = vcombine_u8(vqmovun_s16(detail::i16(ab)), vqmovun_s16(detail::i16(cd)));
  return detail::u8(vqtbl1q_u8(bytes, vld1q_u8(order)));
}
FOVEA_INLINE void zip4(words<neon64> (&x)[4]) {
  const uint8x16_t a = vzip1q_u8(detail::u8(x[0]), detail::u8(x[1])), b = vzip2q_u8(detail::u8(x[0]), detail::u8(x[1]));
  const uint8x16_t c = vzip1q_u8(detail::u8(x[2]), detail::u8(x[3])), d = vzip2q_u8(detail::u8(x[2]), detail::u8(x[3]));
  const auto half = [](uint8x16_t y) FOVEA_INLINE_LAMBDA { return vreinterpretq_s16_u8(y); };
  x[0] = detail::i16(vzip1q_s16(half(a), half(c))), x[1] = detail::i16(vzip2q_s16(half(a), half(c)));
  x[2] = detail::i16(vzip1q_s16(half(b), half(d))), x[3] = detail::i16(vzip2q_s16(half(b), half(d)));
}
FOVEA_INLINE words<neon64> exp2_i16(words<neon64> d) {
  const auto entry = [](const std::int16_t* t, uint16x8_t i) FOVEA_INLINE_LAMBDA {  // bytes 2 i and 2 i + 1
    const uint16x8_t bytes = vaddq_u16(vmulq_n_u16(i, 0x0202), vdupq_n_u16(0x0100));
    return words<neon64>{vreinterpretq_s32_u8(
        vqtbl1q_u8(vld1q_u8(reinterpret_cast<const std::uint8_t*>(t)), vreinterpretq_u8_u16(bytes)))};
  };
  const uint16x8_t x = vreinterpretq_u16_s32(d.v), seven = vdupq_n_u16(7);
  const words<neon64> p = mulhrs_i16(entry(detail::exp2_high, vandq_u16(vshrq_n_u16(x, 3), seven)),
                                     entry(detail::exp2_low, vandq_u16(x, seven)));
  const int16x8_t n = vreinterpretq_s16_u16(vminq_u16(vshrq_n_u16(x, 6), vdupq_n_u16(15)));
  return detail::i16(vshlq_s16(detail::i16(p), vnegq_s16(n)));
}
#endif

/// Packs of float that a register of words makes: 1, and 4 of one lane where there are no vectors.
template <class A>
inline constexpr int float_packs = static_cast<int>(words<A>::size / pack<float, A>::size);

template <class A>
FOVEA_INLINE pack<float, A> to_float(words<A> w, [[maybe_unused]] int part = 0) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>)
    return pack<float, A>(typename pack<float, A>::batch(_mm512_cvtepi32_ps(w.v)));
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>) return pack<float, A>(typename pack<float, A>::batch(_mm256_cvtepi32_ps(w.v)));
#endif
  if constexpr (words<A>::size == 4) {
    std::int32_t lanes[4];
    float out[4];
    w.store(lanes);
    for (int l = 0; l < 4; ++l) out[l] = static_cast<float>(lanes[l]);
    return pack<float, A>::load(out + part * pack<float, A>::size);
  }
}
/// The low byte of each 32-bit lane, in lane order.
template <class A>
FOVEA_INLINE void store_low_bytes(words<A> w, std::uint8_t* p) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(w.v));
#endif
  std::uint8_t bytes[4 * words<A>::size];
  w.store(bytes);
  for (isize l = 0; l < words<A>::size; ++l) p[l] = bytes[4 * l];
}
template <class A>
FOVEA_INLINE words<A> to_nearest(const pack<float, A> (&x)[float_packs<A>]) {
#if defined(FOVEA_HAS_AVX512)
  if constexpr (std::is_same_v<A, avx512>) return {_mm512_cvtps_epi32(x[0].v)};
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
  if constexpr (std::is_same_v<A, avx2>) return {_mm256_cvtps_epi32(x[0].v)};
#endif
  if constexpr (words<A>::size == 4) {
    float in[4];
    std::int32_t lanes[4];
    for (int i = 0; i < float_packs<A>; ++i) x[i].store(in + i * pack<float, A>::size);
    for (int l = 0; l < 4; ++l) lanes[l] = static_cast<std::int32_t>(std::nearbyint(in[l]));
    return words<A>::load(lanes);
  }
}

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
