// SPDX-License-Identifier: MIT
#pragma once
/// @file  Masks by position: causal, sliding window, first keys + window, window on both sides.
///
///   query row i of n sits at position p = i + offset;   bottom-right: offset = m - n,   top-left: offset = 0
///   causal            j <= p
///   window            p - width < j <= p         (the query's own key counts)   or  j < first and j <= p
///   two_sided         p - left <= j <= p + right
///
/// Contract   rows with p < 0 see nothing: zeros, LSE = -inf.

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// How query rows are placed among the keys.
struct alignment_of_rows {
  enum class kind : unsigned char { bottom_right, top_left, offset } how = kind::bottom_right;
  isize offset = 0;  ///< position of row 0, for kind::offset
  FOVEA_HD isize position(const mask_site& at, isize i) const {
    return i + (how == kind::bottom_right ? at.m - at.n : how == kind::top_left ? 0 : offset);
  }
};
inline constexpr alignment_of_rows bottom_right{}, top_left{alignment_of_rows::kind::top_left, 0};
constexpr alignment_of_rows at_offset(isize first_row) { return {alignment_of_rows::kind::offset, first_row}; }

struct causal {
  alignment_of_rows align = bottom_right;

  FOVEA_HD bool is_causal() const { return align.how == alignment_of_rows::kind::bottom_right; }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const { return j <= align.position(at, i); }
  FOVEA_HD range keys(const mask_site& at, isize, isize i1) const { return {0, align.position(at, i1 - 1) + 1}; }
  FOVEA_HD range queries(const mask_site& at, isize j) const { return {j - align.position(at, 0), at.n}; }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    if (j0 > align.position(at, i1 - 1)) return tile_kind::empty;
    return j1 - 1 <= align.position(at, i0) ? tile_kind::full : tile_kind::partial;
  }
};

/// Causal, the last `width` keys up to and with the query's own, and the first `first` keys (attention sinks).
struct window {
  isize width = 0;
  isize first = 0;
  alignment_of_rows align = bottom_right;

  void check(const mask_site&) const {
    require(width >= 1, "window width is ", width, "; it counts the query's own key and must be at least 1");
    require(first >= 0, "window first is ", first, "; it must not be negative");
  }
  FOVEA_HD bool is_causal() const { return align.how == alignment_of_rows::kind::bottom_right; }
  FOVEA_HD kept_keys kept() const { return is_causal() ? kept_keys{width, first} : kept_keys{}; }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    const isize p = align.position(at, i);
    return j <= p && (j > p - width || j < first);
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    const isize low = align.position(at, i0) - width + 1;
    return {first > 0 || low < 0 ? 0 : low, align.position(at, i1 - 1) + 1};
  }
  FOVEA_HD range queries(const mask_site& at, isize j) const {
    const isize i = j - align.position(at, 0);
    return {i, j < first ? at.n : i + width};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const isize p0 = align.position(at, i0), p1 = align.position(at, i1 - 1);
    if (j0 > p1 || (j1 - 1 <= p0 - width && j0 >= first)) return tile_kind::empty;
    return j1 - 1 <= p0 && (j0 > p1 - width || j1 <= first) ? tile_kind::full : tile_kind::partial;
  }
};

/// `left` keys before and `right` keys after the query's position, its own key besides.
struct two_sided {
  isize left = 0, right = 0;
  alignment_of_rows align = bottom_right;

  void check(const mask_site&) const {
    require(left >= 0 && right >= 0, "two_sided left, right are ", left, ", ", right, "; they must not be negative");
  }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    const isize p = align.position(at, i);
    return j >= p - left && j <= p + right;
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    const isize low = align.position(at, i0) - left;
    return {low < 0 ? 0 : low, align.position(at, i1 - 1) + right + 1};
  }
  FOVEA_HD range queries(const mask_site& at, isize j) const {
    const isize i = j - align.position(at, 0);
    return {i - right, i + left + 1};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const isize p0 = align.position(at, i0), p1 = align.position(at, i1 - 1);
    if (j0 > p1 + right || j1 - 1 < p0 - left) return tile_kind::empty;
    return j1 - 1 <= p0 + right && j0 >= p1 - left ? tile_kind::full : tile_kind::partial;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
