// SPDX-License-Identifier: MIT
#pragma once
/// @file  The two masks of block-causal attention: the slots of whole past blocks, and the keys of a row's own block up to itself.
///
///   row i sits at position p = i + offset;   slot j belongs to block j / slots;   key j sits at position first + j
///
/// Contract   rows with p < 0 see nothing.

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Slot j is visible when its whole block lies before the block of the row.
struct past_block_slots {
  isize slots = 1, block = 1, offset = 0;

  FOVEA_HD isize limit(isize i) const { return i + offset < 0 ? 0 : (i + offset) / block * slots; }
  FOVEA_HD bool visible(const mask_site&, isize i, isize j) const { return j < limit(i); }
  FOVEA_HD range keys(const mask_site&, isize, isize i1) const { return {0, limit(i1 - 1)}; }
  FOVEA_HD range queries(const mask_site& at, isize j) const { return {(j / slots + 1) * block - offset, at.n}; }
  FOVEA_HD tile_kind tile(const mask_site&, isize i0, isize i1, isize j0, isize j1) const {
    return j0 >= limit(i1 - 1) ? tile_kind::empty : j1 <= limit(i0) ? tile_kind::full : tile_kind::partial;
  }
};

/// Key j is visible when it stands in the block of the row, not behind it.
struct own_block_keys {
  isize block = 1, offset = 0, first = 0;

  FOVEA_HD isize begin(isize p) const { return p < 0 ? 0 : p / block * block; }
  FOVEA_HD bool visible(const mask_site&, isize i, isize j) const {
    const isize p = i + offset, at = first + j;
    return p >= 0 && at <= p && at >= begin(p);
  }
  FOVEA_HD range keys(const mask_site&, isize i0, isize i1) const {
    const isize low = begin(i0 + offset) - first;
    return {low > 0 ? low : 0, i1 - 1 + offset + 1 - first};
  }
  FOVEA_HD range queries(const mask_site& at, isize j) const {
    const isize p = first + j, last = (p / block + 1) * block - offset;
    return {p - offset, last < at.n ? last : at.n};
  }
  FOVEA_HD tile_kind tile(const mask_site&, isize i0, isize i1, isize j0, isize j1) const {
    const isize p0 = i0 + offset, p1 = i1 - 1 + offset, k0 = first + j0, k1 = first + j1 - 1;
    if (p1 < 0 || k0 > p1 || k1 < begin(p0)) return tile_kind::empty;
    return k1 <= p0 && k0 >= begin(p1) ? tile_kind::full : tile_kind::partial;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
