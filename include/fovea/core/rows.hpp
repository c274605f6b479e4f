// SPDX-License-Identifier: MIT
#pragma once
/// @file  Where the rows of one head's keys (or values) lie: one stretch, the pages of a table, or a ring; stored in any type.
///
///   one stretch   row j at data + j * row_bytes
///   pages         row j at data + table[j / page] * page_bytes + (j % page) * row_bytes
///   ring          rows [0, fixed) as in a stretch; row j >= fixed in slot fixed + (start + j - fixed) % ring
///
/// Contract   a row_source never owns. Rows of int8 are q * scale: one scale a row (scale_row = 1), or one for each 32 elements
///            (scale_row = ceil(width / 32)); scales follow the same pages and slots as the rows.

#include <fovea/core/view.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline constexpr isize scale_group = 32;  ///< elements that share a scale, where a row has more than one

/// Rows that lie one behind the other.
struct stretch {
  const std::byte* data = nullptr;
  const float* scales = nullptr;
  isize count = 0;
};

struct row_source {
  const std::byte* data = nullptr;
  dtype type = dtype::f32;
  isize row_bytes = 0;

  const float* scales = nullptr;  ///< int8 only
  isize scale_row = 0;            ///< scales of a row: 1, or ceil(width / 32)

  const std::int32_t* table = nullptr;  ///< null: no pages
  isize page = 0;                       ///< rows of a page
  isize page_bytes = 0;                 ///< from a page to the next
  isize page_scales = 0;                ///< the same for the scales, in floats

  isize fixed = 0, ring = 0, start = 0;  ///< ring = 0: no ring

  /// The longest stretch that begins with row j; it may reach behind the last row that there is.
  stretch at(isize j) const noexcept {
    isize slot = j, count = PTRDIFF_MAX;
    if (table != nullptr) {
      slot = j % page, count = page - slot;
      const isize where = table[j / page];
      return {data + where * page_bytes + slot * row_bytes,
              scales != nullptr ? scales + where * page_scales + slot * scale_row : nullptr, count};
    }
    if (ring > 0) {
      if (j < fixed) {
        count = fixed - j;
      } else {
        const isize turn = (start + j - fixed) % ring;
        slot = fixed + turn, count = ring - turn;
      }
    }
    return {data + slot * row_bytes, scales != nullptr ? scales + slot * scale_row : nullptr, count};
  }
};

/// The rows of head g of batch item b of a view.
inline row_source rows_of(const tensor_ref& t, isize b, isize g) {
  row_source r;
  r.data = static_cast<const std::byte*>(t.row(b, g, 0)), r.type = t.type;
  r.row_bytes = t.row_stride * static_cast<isize>(size_of(t.type));
  return r;
}
/// Dense rows of `width` elements.
template <class T>
row_source dense_rows(const T* data, isize width) {
  row_source r;
  r.data = reinterpret_cast<const std::byte*>(data), r.type = dtype_of<T>;
  r.row_bytes = width * static_cast<isize>(sizeof(T));
  return r;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
