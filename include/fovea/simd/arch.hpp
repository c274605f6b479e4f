// SPDX-License-Identifier: MIT
#pragma once
/// @file  Instruction sets as tags. Every template in simd/, tile/ and kernel/ takes one; `native` is what this unit is compiled for.

#include <fovea/core/types.hpp>

#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2) || defined(FOVEA_HAS_SSE2)
#if defined(__GNUC__) && \
    !defined(__clang__)  // g++ 12 warns of the deliberately undefined registers in its own header (PR 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif
#include <xsimd/xsimd.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace simd {

struct scalar {  ///< width 1: the same templates, no vector instructions
  static constexpr int registers = 16, level1 = 32 << 10;
};
struct sse2 {
  static constexpr int registers = 16, level1 = 32 << 10;
};
struct avx2 {
  static constexpr int registers = 16, level1 = 32 << 10;
};
struct avx512 {
  static constexpr int registers = 32, level1 = 32 << 10;
};
struct neon64 {
  static constexpr int registers = 32, level1 = 32 << 10;
};

#if defined(FOVEA_HAS_AVX512)
using native = avx512;
#elif defined(FOVEA_HAS_AVX2)
using native = avx2;
#elif defined(FOVEA_HAS_SSE2)
using native = sse2;
#elif defined(FOVEA_HAS_NEON64)
using native = neon64;
#else
using native = scalar;
#endif

template <class Arch>
inline constexpr const char* name_of_arch = "scalar";
template <>
inline constexpr const char* name_of_arch<sse2> = "sse2";
template <>
inline constexpr const char* name_of_arch<avx2> = "avx2";
template <>
inline constexpr const char* name_of_arch<avx512> = "avx512";
template <>
inline constexpr const char* name_of_arch<neon64> = "neon64";

namespace detail {
template <class Arch>
struct xsimd_of;
#if defined(FOVEA_HAS_AVX512)
template <>
struct xsimd_of<avx512> {
  using type = xsimd::avx512bw;
};
#endif
#if defined(FOVEA_HAS_AVX512) || defined(FOVEA_HAS_AVX2)
template <>
struct xsimd_of<avx2> {
  using type = xsimd::fma3<xsimd::avx2>;
};
#endif
#if !defined(FOVEA_FORCE_SCALAR) && defined(__SSE2__)
template <>
struct xsimd_of<sse2> {
  using type = xsimd::sse2;
};
#endif
#if defined(FOVEA_HAS_NEON64)
template <>
struct xsimd_of<neon64> {
  using type = xsimd::neon64;
};
#endif
}  // namespace detail

}  // namespace simd
}  // namespace FOVEA_ABI
}  // namespace fovea
