// SPDX-License-Identifier: MIT
#pragma once
/// @file  Products of 8-bit rows with a panel of 8-bit queries, exact integers as floats; with AVX512-VNNI only.
///
///   s[x][lane] = sum_c code[x][c] * query[c][lane]
///
/// Contract   `lanes` a multiple of 16, up to 64. The panel holds query + 128 in u8, [ceil(d / 4)][64][4], zeros behind d; up to 3 bytes
///            behind the last code row are read and do not count. Exact for d <= 512: the instruction adds four products without saturation.

#include <cstring>

#include <fovea/core/workspace.hpp>
#include <fovea/simd/dot8.hpp>
#include <fovea/tile/unroll.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace tile {

/// Does this build have the product for Arch and Acc?
template <class Arch, class Acc>
#if defined(FOVEA_HAS_AVX512) && defined(__AVX512VNNI__)
inline constexpr bool has_code_panel = std::is_same_v<Arch, simd::avx512>&& std::is_same_v<Acc, float>;
#else
inline constexpr bool has_code_panel = false;
#endif

/// Puts a row of codes into lane `lane` of the panel.
inline void load_code_lane(const std::int8_t* row, isize d, isize lane, std::uint8_t* panel) noexcept {
  for (isize c = 0; c < ceil_div(d, 4) * 4; ++c)
    panel[c / 4 * 256 + lane * 4 + c % 4] = c < d ? static_cast<std::uint8_t>(row[c] + 128) : std::uint8_t{0};
}

#if defined(FOVEA_HAS_AVX512) && defined(__AVX512VNNI__)
namespace detail {
template <int M, int NV>
FOVEA_NOINLINE void code_tile(isize d, const std::int8_t* code, const std::int8_t* ones, const std::uint8_t* panel,
                              float* s, isize s_ld) noexcept {
  __m512i acc[M][NV];
  unroll<M>([&](auto x) FOVEA_INLINE_LAMBDA {  // takes the + 128 out again
    const __m512i start = _mm512_set1_epi32(-128 * simd::dot8<simd::avx512>(code + x * d, ones, d));
    unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[x][v] = start; });
  });
  for (isize c = 0; c < d; c += 4, panel += 256) {
    __m512i q[NV];
    unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { q[v] = _mm512_loadu_si512(panel + v * 64); });
    unroll<M>([&](auto x) FOVEA_INLINE_LAMBDA {
      std::int32_t four;
      std::memcpy(&four, code + x * d + c, 4);
      const __m512i k = _mm512_set1_epi32(four);
      unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[x][v] = _mm512_dpbusd_epi32(acc[x][v], q[v], k); });
    });
  }
  unroll<M>([&](auto x) FOVEA_INLINE_LAMBDA {
    unroll<NV>([&](auto v)
                   FOVEA_INLINE_LAMBDA { _mm512_storeu_ps(s + x * s_ld + v * 16, _mm512_cvtepi32_ps(acc[x][v])); });
  });
}
}  // namespace detail

/// `ones`: d bytes of 1.
inline void code_panel(isize count, isize lanes, isize d, const std::int8_t* code, const std::int8_t* ones,
                       const std::uint8_t* panel, float* s, isize s_ld) noexcept {
  with_constant<4>(lanes / 16, [&](auto v) {
    isize x = 0;
    for (; x + 4 <= count; x += 4) detail::code_tile<4, v>(d, code + x * d, ones, panel, s + x * s_ld, s_ld);
    for (; x < count; ++x) detail::code_tile<1, v>(d, code + x * d, ones, panel, s + x * s_ld, s_ld);
  });
}
#else
inline void code_panel(isize, isize, isize, const std::int8_t*, const std::int8_t*, const std::uint8_t*, float*,
                       isize) noexcept {}
#endif

}  // namespace tile
}  // namespace FOVEA_ABI
}  // namespace fovea
