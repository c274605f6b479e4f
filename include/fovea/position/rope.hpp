// SPDX-License-Identifier: MIT
#pragma once
/// @file  Rotary position embedding (RoPE): pairs of elements of q and k turned by angles that grow with the position.
///
///   (x, y) -> (x cos a - y sin a, y cos a + x sin a),   a = position * f_i,   f_i = base^(-2 i / width),   i < width / 2
///   neox    pairs (x_i, x_{i + width/2})      LLaMA, Qwen, GPT-NeoX          gptj    pairs (x_{2i}, x_{2i+1})
///
/// Contract   the first `width` elements of a row turn, the rest stays (partial rotary). Positions lie in [0, positions).
/// Cost       one row of the table and 2 width multiply-adds a row; the table is 4 width bytes a position (12 with f64 tables).
/// Numerics   angles are made in double, so position 10^6 is as exact as position 1; tables hold cos, sin (times the magnitude of
///            YaRN and LongRoPE) rounded to float. Rows of double use the f64 tables where there are any.
/// Source     Su et al., RoFormer, arXiv 2104.09864; the scalings: position/rope_table.hpp.

#include <fovea/core/contract.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct rope {
  enum class pairing : unsigned char { neox, gptj };

  const float* cos = nullptr;  ///< [positions][width / 2]
  const float* sin = nullptr;
  isize positions = 0;
  isize width = 0;  ///< rotated elements of a row: even, at most d
  pairing pair = pairing::neox;
  const double* cos_f64 = nullptr;  ///< the same for rows of double; null: they use the float tables
  const double* sin_f64 = nullptr;

  /// Throws unless rows of d elements can be turned at positions up to and with `last_position`.
  void check(isize d, isize last_position) const {
    require(cos != nullptr && sin != nullptr, "rope has a null table; wanted cos and sin, [positions][width / 2]");
    require(width >= 2 && width % 2 == 0 && width <= d, "rope width is ", width,
            "; it must be even, from 2 to d = ", d);
    require(last_position < positions, "rope has a table of ", positions, " positions; the call needs position ",
            last_position);
    require((cos_f64 == nullptr) == (sin_f64 == nullptr), "rope has one f64 table; wanted both or none");
  }
};

namespace detail {

// One copy of each loop, never inlined: a row turns to the same bits wherever it is asked for.
template <int Sign, class T, class Table>
FOVEA_NOINLINE void rotate_halves(const Table* FOVEA_RESTRICT c, const Table* FOVEA_RESTRICT s, isize half,
                                  T* FOVEA_RESTRICT low, T* FOVEA_RESTRICT high) noexcept {
  for (isize i = 0; i < half; ++i) {
    const T x = low[i], y = high[i], a = static_cast<T>(c[i]), b = T(Sign) * static_cast<T>(s[i]);
    low[i] = x * a - y * b;
    high[i] = y * a + x * b;
  }
}
template <int Sign, class T, class Table>
FOVEA_NOINLINE void rotate_neighbours(const Table* FOVEA_RESTRICT c, const Table* FOVEA_RESTRICT s, isize half,
                                      T* FOVEA_RESTRICT row) noexcept {
  for (isize i = 0; i < half; ++i) {
    const T x = row[2 * i], y = row[2 * i + 1], a = static_cast<T>(c[i]), b = T(Sign) * static_cast<T>(s[i]);
    row[2 * i] = x * a - y * b;
    row[2 * i + 1] = y * a + x * b;
  }
}
template <int Sign, class T, class Table>
void rotate_row(const rope& r, const Table* cos, const Table* sin, isize position, T* row) noexcept {
  const isize half = r.width / 2;
  if (r.pair == rope::pairing::neox)
    rotate_halves<Sign>(cos + position * half, sin + position * half, half, row, row + half);
  else
    rotate_neighbours<Sign>(cos + position * half, sin + position * half, half, row);
}
template <int Sign, class T>
void rotate_by_table(const rope& r, isize position, T* row) noexcept {
  if constexpr (sizeof(T) == sizeof(double))
    if (r.cos_f64 != nullptr) return rotate_row<Sign>(r, r.cos_f64, r.sin_f64, position, row);
  rotate_row<Sign>(r, r.cos, r.sin, position, row);
}

}  // namespace detail

/// Turns one row in place. T is float or double; 0 <= position < r.positions.
template <class T>
void rotate(const rope& r, isize position, T* row) noexcept {
  detail::rotate_by_table<1>(r, position, row);
}
/// The transpose: turns back (and multiplies by the magnitude once more); the gradient of a row from that of the turned row.
template <class T>
void rotate_back(const rope& r, isize position, T* row) noexcept {
  detail::rotate_by_table<-1>(r, position, row);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
