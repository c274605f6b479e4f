// SPDX-License-Identifier: MIT
#pragma once
/// @file  Dot product of two rows of signed 8-bit integers, exact in 32 bits for up to 2^17 elements.

#include <fovea/simd/arch.hpp>

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

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
