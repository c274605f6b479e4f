// SPDX-License-Identifier: MIT
#pragma once
/// @file  Sets of keys that the heads of a group read together in a decode step, each seeing its own: biases as score policies; blocks as pages.
///
/// Contract   what is hidden weighs exactly 0, whatever its key holds; its value must be finite.

#include <limits>

#include <fovea/core/rows.hpp>
#include <fovea/kernel/sparse_tiles.hpp>
#include <fovea/score/score.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Tokens of a set that all heads of a group read: token j weighs 2^table[h][j] more for head h; -infinity hides it.
struct token_bias {
  const float* table = nullptr;
  isize ld = 0, first_head = 0;

  template <class T>
  T operator()(const mask_site& at, isize, isize j, T s) const {
    const float x = table[(at.h - first_head) * ld + j];
    return x == -std::numeric_limits<float>::infinity() ? static_cast<T>(x)
                                                        : s + static_cast<T>(x) / static_cast<T>(1.4426950408889634074);
  }
  template <class Acc>
  void lanes(const mask_site& at, isize, isize, isize j0, isize j1, Acc* tile, isize stride) const {
    const float* from = table + (at.h - first_head) * ld;
    constexpr float none = -std::numeric_limits<float>::infinity();
    if (stride == 1)
      for (isize j = j0; j < j1; ++j)
        tile[j - j0] = from[j] == none ? static_cast<Acc>(none) : tile[j - j0] + static_cast<Acc>(from[j]);
    else
      for (isize j = j0; j < j1; ++j, tile += stride)
        *tile = from[j] == none ? static_cast<Acc>(none) : *tile + static_cast<Acc>(from[j]);
  }
};

/// Keys of listed blocks that a group reads together: block x of the list is hidden from head h where hidden[h][x] is not 0.
struct hidden_blocks {
  const std::uint8_t* hidden = nullptr;
  isize ld = 0, first_head = 0, block = 1, shift = 0;  ///< key j of the set is in block (j + shift) / block of the list

  template <class T>
  T operator()(const mask_site& at, isize, isize j, T s) const {
    return hidden[(at.h - first_head) * ld + (j + shift) / block] != 0 ? -std::numeric_limits<T>::infinity() : s;
  }
  template <class Acc>
  void lanes(const mask_site& at, isize, isize, isize j0, isize j1, Acc* tile, isize stride) const {
    const std::uint8_t* from = hidden + (at.h - first_head) * ld;
    for (isize j = j0, next = 0; j < j1; j = next) {
      const isize x = (j + shift) / block;
      next = std::min(j1, (x + 1) * block - shift);
      for (isize y = j; from[x] != 0 && y < next; ++y) tile[(y - j0) * stride] = -std::numeric_limits<Acc>::infinity();
    }
  }
};

/// Blocks of a source as pages of another. False: they are no pages, gather them.
inline bool blocks_as_pages(const row_source& from, isize block, const kernel::block_list& list, std::int32_t* pages,
                            row_source& to) noexcept {
  to = from;
  if (from.form != row_form::plain || from.ring > 0) return false;
  const isize bytes = block * from.row_bytes, scales = block * from.scale_row;
  to.page = block, to.page_bytes = bytes, to.page_scales = scales, to.table = list.at;
  if (from.table == nullptr) return true;
  if (from.page % block != 0 || from.page_bytes % bytes != 0 || (scales > 0 && from.page_scales % scales != 0))
    return false;
  const isize each = from.page / block, step = from.page_bytes / bytes;
  if (scales > 0 && from.page_scales / scales != step) return false;
  for (isize x = 0; x < list.count; ++x)
    pages[x] = static_cast<std::int32_t>(from.table[list.at[x] / each] * step + list.at[x] % each);
  to.table = pages;
  return true;
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
