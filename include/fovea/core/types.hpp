// SPDX-License-Identifier: MIT
#pragma once
/// @file  Element types: f32 and f64 are the language's own, bf16 and f16 are 16-bit storage types, dtype names them at run time.
///
/// Contract   float -> bf16 and float -> f16 round to nearest even; NaN stays NaN (quiet), infinities and signed zeros stay.
/// Numerics   storage only: every kernel computes in float or double. Bulk conversion is in simd/convert.hpp.
/// Source     IEEE 754-2019 binary16; bfloat16 is the upper half of binary32.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <fovea/core/config.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

using isize = std::ptrdiff_t;

struct bf16 {
  std::uint16_t bits = 0;
  bf16() = default;
  FOVEA_HD explicit bf16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const bool nan = (u & 0x7fffffffU) > 0x7f800000U;
    bits = static_cast<std::uint16_t>(nan ? (u >> 16) | 0x40U : (u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
  }
  FOVEA_HD explicit operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
};

struct f16 {
  std::uint16_t bits = 0;
  f16() = default;
  FOVEA_HD explicit f16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = (u >> 16) & 0x8000U, magnitude = u & 0x7fffffffU;
    std::uint32_t h = 0;
    if (magnitude > 0x7f800000U)
      h = 0x7e00U | ((magnitude >> 13) & 0x3ffU);  // NaN, made quiet
    else if (magnitude >= 0x477ff000U)
      h = 0x7c00U;  // 65520 and above round to infinity
    else if (magnitude >= 0x38800000U)
      h = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
    else  // subnormal: the addition makes the unit in the last place 2^-24 and rounds
      h = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3f000000U;
    bits = static_cast<std::uint16_t>(sign | h);
  }
  FOVEA_HD explicit operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16, magnitude = bits & 0x7fffU;
    if (magnitude >= 0x7c00U) return std::bit_cast<float>(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13));
    if (magnitude >= 0x400U) return std::bit_cast<float>(sign | ((magnitude + 0x1c000U) << 13));
    const float tiny = static_cast<float>(magnitude) * 0x1p-24F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(tiny) | sign);
  }
};

static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2 && std::is_trivially_copyable_v<bf16> &&
              std::is_trivially_copyable_v<f16>);

/// i8 stands in KV stores only, with scales beside it (core/rows.hpp); a view is never of it.
enum class dtype : std::uint8_t { f32, f64, bf16, f16, i8 };

FOVEA_HD constexpr std::size_t size_of(dtype t) {
  return t == dtype::f64 ? 8 : t == dtype::f32 ? 4 : t == dtype::i8 ? 1 : 2;
}
constexpr const char* name_of(dtype t) {
  constexpr const char* names[] = {"f32", "f64", "bf16", "f16", "i8"};
  return names[static_cast<int>(t)];
}

/// What the products of exact attention are computed in. Storage is a matter of its own (dtype).
enum class precision : std::uint8_t { f32, bf16, int8 };
constexpr const char* name_of(precision p) {
  constexpr const char* names[] = {"f32", "bf16", "int8"};
  return names[static_cast<int>(p)];
}

namespace detail {
template <class T>
inline constexpr bool is_storage = false;
template <>
inline constexpr bool is_storage<float> = true;
template <>
inline constexpr bool is_storage<double> = true;
template <>
inline constexpr bool is_storage<bf16> = true;
template <>
inline constexpr bool is_storage<f16> = true;
}  // namespace detail

/// float, double, fovea::bf16 or fovea::f16, possibly const.
template <class T>
concept storage_type = detail::is_storage<std::remove_const_t<T>>;

template <storage_type T>
inline constexpr dtype dtype_of = std::is_same_v<std::remove_const_t<T>, double>  ? dtype::f64
                                  : std::is_same_v<std::remove_const_t<T>, float> ? dtype::f32
                                  : std::is_same_v<std::remove_const_t<T>, bf16>  ? dtype::bf16
                                                                                  : dtype::f16;

/// One stored element as a double: for references, checks and cold paths.
inline double load_as_double(dtype t, const void* p, isize i) {
  switch (t) {
    case dtype::f64: return static_cast<const double*>(p)[i];
    case dtype::f32: return static_cast<double>(static_cast<const float*>(p)[i]);
    case dtype::bf16: return static_cast<double>(static_cast<float>(static_cast<const bf16*>(p)[i]));
    case dtype::f16: return static_cast<double>(static_cast<float>(static_cast<const f16*>(p)[i]));
    case dtype::i8: return static_cast<double>(static_cast<const std::int8_t*>(p)[i]);
  }
  return 0.0;
}
inline void store_from_double(dtype t, void* p, isize i, double x) {
  switch (t) {
    case dtype::f64: static_cast<double*>(p)[i] = x; break;
    case dtype::f32: static_cast<float*>(p)[i] = static_cast<float>(x); break;
    case dtype::bf16: static_cast<bf16*>(p)[i] = bf16(static_cast<float>(x)); break;
    case dtype::f16: static_cast<f16*>(p)[i] = f16(static_cast<float>(x)); break;
    case dtype::i8: static_cast<std::int8_t*>(p)[i] = static_cast<std::int8_t>(x); break;
  }
}

}  // namespace FOVEA_ABI
}  // namespace fovea
