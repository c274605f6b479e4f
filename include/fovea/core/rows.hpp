// SPDX-License-Identifier: MIT
#pragma once
/// @file  Where the rows of one head's keys (or values) lie: one stretch, the pages of a table, or a ring; stored in any type.
///
///   one stretch   row j at data + j * row_bytes
///   pages         row j at data + table[j / page] * page_bytes + (j % page) * row_bytes
///   ring          rows [0, fixed) as in a stretch; row j >= fixed in slot fixed + (start + j - fixed) % ring
///
///   packed      slots of 16 rows of int8 keys, or of 4 rows of int8 values, interleaved as products of four bytes read them (below)
///
/// Contract   a row_source never owns. Rows of int8 are q * scale: one scale a row (scale_row = 1), or one for each 32 elements
///            (scale_row = ceil(width / 32)); scales follow the same pages and slots as the rows. Packed rows have one.
/// Layout     packed keys    [slots / 16][ceil(width / 4)][16 rows][4 elements], code + 128 as u8; elements behind `width` are 128
///            packed values  [slots / 4][width][4 rows], code as s8

#include <cstring>

#include <fovea/core/view.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// How rows lie among each other. Packed is for int8 with a scale a row.
enum class row_form : unsigned char { plain, packed_keys, packed_values };
inline constexpr isize packed_rows = 16;  ///< a page, a ring and a store of packed rows are multiples of it

inline constexpr isize scale_group = 32;  ///< elements that share a scale, where a row has more than one

/// Rows that lie one behind the other.
struct stretch {
  const std::byte* data = nullptr;
  const float* scales = nullptr;
  isize count = 0;
};

/// A slot of a stretch: where its page (or the whole memory) begins, and the slots that follow in a row, its own included.
struct slot_place {
  const std::byte* data = nullptr;
  const float* scales = nullptr;
  isize slot = 0, count = 0;
};

struct row_source {
  const std::byte* data = nullptr;
  dtype type = dtype::f32;
  isize row_bytes = 0;  ///< packed: the bytes of a row, filled up
  row_form form = row_form::plain;
  bool rotated = false;  ///< keys went through simd::rotate_row before they were rounded: queries must as well

  const float* scales = nullptr;  ///< int8 only
  isize scale_row = 0;            ///< scales of a row: 1, or ceil(width / 32)

  const std::int32_t* table = nullptr;  ///< null: no pages
  isize page = 0;                       ///< rows of a page
  isize page_bytes = 0;                 ///< from a page to the next
  isize page_scales = 0;                ///< the same for the scales, in floats

  isize fixed = 0, ring = 0, start = 0;  ///< ring = 0: no ring

  /// Where row j is, in any form; the slots that follow may reach behind the last row that there is.
  slot_place place(isize j) const noexcept {
    isize slot = j, count = PTRDIFF_MAX;
    if (table != nullptr) {
      slot = j % page, count = page - slot;
      const isize where = table[j / page];
      return {data + where * page_bytes, scales != nullptr ? scales + where * page_scales : nullptr, slot, count};
    }
    if (ring > 0) {
      if (j < fixed) {
        count = fixed - j;
      } else {
        const isize turn = (start + j - fixed) % ring;
        slot = fixed + turn, count = ring - turn;
      }
    }
    return {data, scales, slot, count};
  }
  /// The longest stretch of plain rows that begins with row j; it may reach behind the last row that there is.
  stretch at(isize j) const noexcept {
    const slot_place p = place(j);
    return {p.data + p.slot * row_bytes, p.scales != nullptr ? p.scales + p.slot * scale_row : nullptr, p.count};
  }
};

/// Where element c of the packed row in slot `slot` lies; `row_bytes` as in row_source.
inline isize packed_key_at(isize slot, isize c, isize row_bytes) {
  return slot / 16 * 16 * row_bytes + c / 4 * 64 + slot % 16 * 4 + c % 4;
}
inline isize packed_value_at(isize slot, isize c, isize row_bytes) {
  return slot / 4 * 4 * row_bytes + c * 4 + slot % 4;
}

/// The codes of the int8 row in a slot of [data ...), of any form, one after the other.
inline void load_codes(row_form form, const std::byte* data, isize row_bytes, isize slot, isize width,
                       std::int8_t* codes) noexcept {
  if (form == row_form::plain) {
    std::memcpy(codes, data + slot * row_bytes, static_cast<std::size_t>(width));
  } else if (form == row_form::packed_keys) {
    const std::byte* from = data + packed_key_at(slot, 0, row_bytes);
    for (isize c = 0; c < width; c += 4, from += 64) {
      std::uint32_t four;
      std::memcpy(&four, from, 4);
      four ^= 0x80808080U;
      std::memcpy(codes + c, &four, static_cast<std::size_t>(width - c < 4 ? width - c : 4));
    }
  } else {
    const std::byte* from = data + packed_value_at(slot, 0, row_bytes);
    for (isize c = 0; c < width; ++c) codes[c] = static_cast<std::int8_t>(from[4 * c]);
  }
}
/// The other way.
inline void store_codes(row_form form, std::byte* data, isize row_bytes, isize slot, isize width,
                        const std::int8_t* codes) noexcept {
  if (form == row_form::plain) {
    std::memcpy(data + slot * row_bytes, codes, static_cast<std::size_t>(width));
  } else if (form == row_form::packed_keys) {
    std::byte* to = data + packed_key_at(slot, 0, row_bytes);
    for (isize c = 0; c < width; c += 4, to += 64) {
      std::uint32_t four = 0;
      std::memcpy(&four, codes + c, static_cast<std::size_t>(width - c < 4 ? width - c : 4));
      four ^= 0x80808080U;
      std::memcpy(to, &four, 4);
    }
  } else {
    std::byte* to = data + packed_value_at(slot, 0, row_bytes);
    for (isize c = 0; c < width; ++c) to[4 * c] = static_cast<std::byte>(codes[c]);
  }
}

/// Rows [j0, j0 + count) of an int8 source with a scale a row, as plain codes [count][ld] and scales [count]: what kernels that want
/// rows read, whatever the form, pages and rings.
inline void gather_codes(const row_source& from, isize j0, isize count, isize width, std::int8_t* codes, isize ld,
                         float* scales) noexcept {
  for (isize x = 0; x < count;) {
    slot_place p = from.place(j0 + x);
    for (isize left = p.count < count - x ? p.count : count - x; left > 0; --left, ++x, ++p.slot) {
      load_codes(from.form, p.data, from.row_bytes, p.slot, width, codes + x * ld);
      scales[x] = p.scales[p.slot];
    }
  }
}

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
