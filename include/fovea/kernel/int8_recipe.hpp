// SPDX-License-Identifier: MIT
#pragma once
/// @file  What exact attention in int8 rounds, and how: the recipe, its sizes and its limits. docs/mechanisms/int8.md derives it.
///
///   q, k   turned by a Hadamard matrix, s8 with a scale a row (q kept as u8, + 128);  v   s8 with a scale a row
///   t      = score + log2(scale of v), rounded to 1/64;  p = u8(255 2^(t - max of t over the row's keys of a block), dithered)
///   o      = sum p v8 / sum p (1 / scale of v), integers within a block of keys, f32 across blocks
///
/// Contract   each step can be left out at compile time, so that its worth can be measured; `int8_recipe{}` is what attention uses.

#include <cmath>

#include <fovea/core/types.hpp>
#include <fovea/core/workspace.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

struct int8_recipe {
  int keys = 128;      ///< of a block: p is scaled by the maximum of a row in it
  bool rotate = true;  ///< q and k by a Hadamard matrix before they are rounded
  bool fold = true;    ///< v with a scale a row, which joins the score; false: a scale a channel and block
  bool dither = true;  ///< p rounded up or down in turns, so that many small ones keep their sum; false: to nearest
  bool running_max = false;  ///< p scaled by the maximum of all keys so far
};

namespace detail {

inline constexpr float int8_magic = 12582912;  // 1.5 * 2^23: added to a number, it leaves its integer in the low bits
inline constexpr isize int8_most_width =
    256;                              // of q and k, so that |q8 . k8| < 2^22; beyond it scores go through floats
inline constexpr int int8_grid = 64;  // steps of a score per octave
inline constexpr double int8_most_fold = 40;    // |log2| of a value's scale
inline constexpr double int8_most_spread = 16;  // largest over smallest scale of 16 keys, for the integer denominator
inline constexpr float int8_least_sum = 32;     // a denominator that is less than so many steps of p is counted in f32
inline constexpr float int8_lag = 16;           // octaves that the running maximum may lie behind
inline constexpr isize int8_part = 16;          // keys (and query rows) of a tile that is skipped or not

/// Rows are padded with zeros to it.
inline isize int8_width(isize d) { return ceil_div(d, 16) * 16; }
/// |q| |k| scale log2(e) above which scores might leave 16 bits: 511 octaves, less the scale of v, less what rounding to 8 bits adds
/// to the length of both rows (at most half a step a channel, of a row whose largest channel is 127 steps).
inline double int8_most_score(isize d) {
  const double longer = 1 + 0.5 * std::sqrt(static_cast<double>(int8_width(d))) / 127;
  return (511 - int8_most_fold) / (longer * longer);
}

/// 0 .. 127: for key `key` of a block and query row `row`, both mod 16 in the second. Neighbours are far apart.
constexpr int int8_dither(int key, int row) {
  const std::uint32_t x = static_cast<std::uint32_t>(key) * 0x9e3779b9U + static_cast<std::uint32_t>(row) * 0xc13fa9a9U;
  return static_cast<int>(x >> 25);
}
/// As it is added: [four keys][first or second][row][key, and the key two behind it].
template <int Keys>
struct int8_dither_table {
  alignas(64) std::int16_t at[Keys / 4][2][16][2];
  constexpr int8_dither_table() : at() {
    for (int k = 0; k < Keys; ++k)
      for (int r = 0; r < 16; ++r) at[k / 4][k % 2][r][k / 2 % 2] = static_cast<std::int16_t>(int8_dither(k, r));
  }
};
template <int Keys>
inline constexpr int8_dither_table<Keys> int8_dithers{};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
