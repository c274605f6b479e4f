// SPDX-License-Identifier: MIT
#pragma once
/// @file  The rows of a block of keys as they are stored, in runs that lie one behind the other.
///
/// Contract   at most `Keys` rows. Short pages and packed rows are copied, as they are stored, into the caller's memory.

#include <cstring>
#include <type_traits>

#include <fovea/core/rows.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// Rows that lie one behind the other: keys [first, first + count) of the block.
template <class S>
struct row_piece {
  const S* rows;
  const float* scales;
  isize ld, first, count;
  isize reach;  // rows of the stretch, of which the block may have fewer
};

template <class S, isize Keys>
struct row_pieces {
  static constexpr isize short_stretch = 16;  // shorter ones are not worth a loop of their own

  row_piece<S> list[Keys / short_stretch + 4];  // pages, cut at both ends; a ring's seams
  isize count = 0;

  /// Rows [j0, j0 + rows) of a source; `gathered` [rows][width] and `scales` take what is copied.
  row_pieces(const row_source& from, isize j0, isize rows, isize width, std::byte* gathered, float* scales) noexcept {
    const isize row = width * static_cast<isize>(sizeof(S));
    if constexpr (std::is_same_v<S, std::int8_t>)
      if (from.form != row_form::plain) {
        gather_codes(from, j0, rows, width, reinterpret_cast<S*>(gathered), width, scales);
        list[count++] = {reinterpret_cast<const S*>(gathered), scales, width, 0, rows, rows};
        return;
      }
    if (from.table != nullptr && from.page < short_stretch && from.page < rows) {
      for (isize x = 0; x < rows; ++x) {
        const stretch s = from.at(j0 + x);
        std::memcpy(gathered + x * row, s.data, static_cast<std::size_t>(row));
        for (isize y = 0; y < from.scale_row; ++y) scales[x * from.scale_row + y] = s.scales[y];
      }
      list[count++] = {reinterpret_cast<const S*>(gathered), scales, width, 0, rows, rows};
      return;
    }
    const isize ld = from.row_bytes / static_cast<isize>(sizeof(S));
    for (isize x = 0; x < rows;) {
      const stretch s = from.at(j0 + x);
      const isize here = s.count < rows - x ? s.count : rows - x;
      list[count++] = {reinterpret_cast<const S*>(s.data), s.scales, ld, x, here, s.count};
      x += here;
    }
  }
};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
