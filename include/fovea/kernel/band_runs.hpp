// SPDX-License-Identifier: MIT
#pragma once
/// @file  What the rows of a tile see where each sees one stretch of keys, a key further on than the row before: found without asking the mask.
///
///   lane l sees keys [first + l, last + l):   key  first ... first + R    seen by a vector more every W keys   (falling)
///                                             ... last - 1                seen by all                          (whole)
///                                             ... last + R - 1            seen by a vector less every W keys   (rising)
///
/// Contract   `parted`: no key lies on both sides. Lanes without a row count as rows.

#include <fovea/kernel/softmax_panels.hpp>
#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

template <class T>
struct tile_band {
  isize first, last;  ///< keys of lane 0
  isize vectors;      ///< that hold rows

  bool parted() const noexcept { return last - first >= vectors * T::W; }

  /// Runs of keys [j0, j1) in `list`, numbered from j0 on, and the lanes of those not seen by all. Returns how many runs there are.
  isize cut(isize j0, isize j1, std::uint64_t* lanes, panel* list) const noexcept {
    const isize falls = first + vectors * T::W - 1, rises = last - 1;
    isize runs = 0;
    for (isize j = j0; j < j1;) {
      isize end = rises, edge = 0;
      seen kind = seen::whole;
      if (j < falls) {
        edge = (j - first) / T::W, kind = seen::falling;
        end = edge + 1 < vectors ? first + (edge + 1) * T::W : falls;
      } else if (j >= rises) {
        edge = (j - rises) / T::W, kind = seen::rising;
        end = rises + (edge + 1) * T::W;
      }
      end = end < j1 ? end : j1;
      list[runs++] = {static_cast<std::int16_t>(j - j0), static_cast<std::int16_t>(end - j), kind,
                      static_cast<std::int8_t>(edge)};
      if (kind == seen::falling)
        for (isize y = j; y < end; ++y) lanes[y - j0] = ~std::uint64_t{0} >> (63 - (y - first));
      if (kind == seen::rising)
        for (isize y = j; y < end; ++y) lanes[y - j0] = ~std::uint64_t{0} << (y - rises);
      j = end;
    }
    return runs;
  }
};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
