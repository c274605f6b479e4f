// SPDX-License-Identifier: MIT
#pragma once
/// @file  Up to 16 rows of a matrix read side by side, one element each at a step, without a register for each.
///
/// Contract   rows at k, k + stride, ...; `next` goes on by one column. Offsets are 1, 3, 5 and 7 strides, scaled by the address.

#include <fovea/simd/reduce.hpp>
#include <fovea/tile/unroll.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace tile {

template <class T>
struct panel_rows {
  const char *low, *high;
  isize one, three, five, seven;
  FOVEA_INLINE panel_rows(const T* k, isize stride)
      : low(reinterpret_cast<const char*>(k)), one(stride * static_cast<isize>(sizeof(T))) {
    high = low + 8 * one, three = 3 * one, five = 5 * one, seven = 7 * one;
    for (isize* x : {&one, &three, &five, &seven}) simd::keep_in_register(*x);
  }
  template <int I>
  FOVEA_INLINE T at(constant<I>) const {
    constexpr int r = I % 8;
    const isize step = r == 0   ? 0
                       : r == 1 ? one
                       : r == 2 ? 2 * one
                       : r == 3 ? three
                       : r == 4 ? 4 * one
                       : r == 5 ? five
                       : r == 6 ? 2 * three
                                : seven;
    return *reinterpret_cast<const T*>((I < 8 ? low : high) + step);
  }
  FOVEA_INLINE void next() { low += sizeof(T), high += sizeof(T); }
};

}  // namespace tile
}  // namespace FOVEA_ABI
}  // namespace fovea
