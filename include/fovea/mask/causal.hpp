// SPDX-License-Identifier: MIT
#pragma once
/// @file  Masks by position: causal, sliding window, first keys + window, window on both sides, prefix-LM, chunks, key lengths.
///
///   query row i of n sits at position p = i + offset;   bottom-right: offset = m - n,   top-left: offset = 0
///   causal            j <= p
///   window            p - width < j <= p         (the query's own key counts)   or  j < first and j <= p
///   two_sided         p - left <= j <= p + right
///   prefix_lm         j <= p  or  j < prefix
///   chunked_local     j <= p  and  j / chunk = p / chunk                        (Llama 4)
///   key_lengths       j < lengths[b]                                            (padded batches)
///
/// Contract   rows that see nothing (p < 0, but for a prefix or keys to the right) give zeros, LSE = -inf. All answers are exact: a
///            tile without a visible pair is `empty`, one without a hidden pair is `full`.

#include <cstdint>

#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// What a mask may look back or ahead, and how far rows may be placed: sums with positions stay numbers.
inline constexpr isize most_keys = PTRDIFF_MAX / 4;

/// How query rows are placed among the keys.
struct alignment_of_rows {
  enum class kind : unsigned char { bottom_right, top_left, offset, offsets } how = kind::bottom_right;
  isize offset = 0;                       ///< position of row 0, for kind::offset
  const std::int32_t* offsets = nullptr;  ///< [B] the same for each item of the batch, for kind::offsets
  void check() const {
    require(how != kind::offset || (offset >= -most_keys && offset <= most_keys), "align: the offset of row 0 is ",
            offset, "; wanted -2^61 to 2^61");
    require(how != kind::offsets || offsets != nullptr, "align: at_offsets has null offsets; wanted one an item");
  }
  FOVEA_HD isize position(const mask_site& at, isize i) const {
    switch (how) {
      case kind::bottom_right: return i + at.m - at.n;
      case kind::top_left: return i;
      case kind::offset: return i + offset;
      case kind::offsets: return i + offsets[at.b];
    }
    return i;
  }
};
inline constexpr alignment_of_rows bottom_right{}, top_left{alignment_of_rows::kind::top_left, 0, nullptr};
constexpr alignment_of_rows at_offset(isize first_row) { return {alignment_of_rows::kind::offset, first_row, nullptr}; }
constexpr alignment_of_rows at_offsets(const std::int32_t* first_rows) {
  return {alignment_of_rows::kind::offsets, 0, first_rows};
}

struct causal {
  alignment_of_rows align = bottom_right;

  void check(const mask_site&) const { align.check(); }
  FOVEA_HD bool is_causal() const { return align.how == alignment_of_rows::kind::bottom_right; }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const { return j <= align.position(at, i); }
  FOVEA_HD range keys(const mask_site& at, isize, isize i1) const { return {0, align.position(at, i1 - 1) + 1}; }
  FOVEA_HD range queries(const mask_site& at, isize j) const { return {j - align.position(at, 0), at.n}; }
  FOVEA_HD key_band band(const mask_site& at) const { return {-most_keys, align.position(at, 0) + 1}; }
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
    align.check();
    require(width >= 1, "window width is ", width, "; it counts the query's own key and must be at least 1");
    require(first >= 0, "window first is ", first, "; it must not be negative");
    require(width <= most_keys && first <= most_keys, "window width, first are ", width, ", ", first,
            "; wanted at most 2^61 (causal{} has no end)");
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
  FOVEA_HD key_band band(const mask_site& at) const {
    const isize last = align.position(at, 0) + 1;
    return first > 0 ? key_band{} : key_band{last - width, last};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const isize p0 = align.position(at, i0), p1 = align.position(at, i1 - 1);
    if (j0 > p1 || (j1 - 1 <= p0 - width && j0 >= first)) return tile_kind::empty;
    return j1 - 1 <= p0 && ((j0 > first ? j0 : first) > p1 - width || j1 <= first) ? tile_kind::full
                                                                                   : tile_kind::partial;
  }
};

/// `left` keys before and `right` keys after the query's position, its own key besides.
struct two_sided {
  isize left = 0, right = 0;
  alignment_of_rows align = bottom_right;

  void check(const mask_site&) const {
    align.check();
    require(left >= 0 && right >= 0, "two_sided left, right are ", left, ", ", right, "; they must not be negative");
    require(left <= most_keys && right <= most_keys, "two_sided left, right are ", left, ", ", right,
            "; wanted at most 2^61");
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
  FOVEA_HD key_band band(const mask_site& at) const {
    const isize own = align.position(at, 0);
    return {own - left, own + right + 1};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const isize p0 = align.position(at, i0), p1 = align.position(at, i1 - 1);
    if (j0 > p1 + right || j1 - 1 < p0 - left) return tile_kind::empty;
    return j1 - 1 <= p0 + right && j0 >= p1 - left ? tile_kind::full : tile_kind::partial;
  }
};

/// Keys before `prefix` (of item b: prefixes[b]) are seen by every row, the others causally.
struct prefix_lm {
  isize prefix = 0;
  const std::int32_t* prefixes = nullptr;  ///< [B]; null: `prefix` for all
  alignment_of_rows align = bottom_right;

  void check(const mask_site& at) const {
    align.check();
    require(length(at) >= 0, "prefix_lm prefix is ", length(at), "; it must not be negative");
  }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const { return j < end(at, i); }
  FOVEA_HD range keys(const mask_site& at, isize, isize i1) const { return {0, end(at, i1 - 1)}; }
  FOVEA_HD range queries(const mask_site& at, isize j) const {
    return {j < length(at) ? 0 : j - align.position(at, 0), at.n};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    if (j0 >= end(at, i1 - 1)) return tile_kind::empty;
    return j1 <= end(at, i0) ? tile_kind::full : tile_kind::partial;
  }

 private:
  FOVEA_HD isize length(const mask_site& at) const { return prefixes != nullptr ? prefixes[at.b] : prefix; }
  FOVEA_HD isize end(const mask_site& at, isize i) const {  // one past the last key that row i sees
    const isize own = align.position(at, i) + 1, shared = length(at);
    return own > shared ? own : shared;
  }
};

/// Causal inside stretches of `chunk` positions.
struct chunked_local {
  isize chunk = 8192;
  alignment_of_rows align = bottom_right;

  void check(const mask_site&) const {
    align.check();
    require(chunk >= 1, "chunked_local chunk is ", chunk, "; it must be at least 1");
  }
  FOVEA_HD bool is_causal() const { return align.how == alignment_of_rows::kind::bottom_right; }
  FOVEA_HD kept_keys kept() const { return is_causal() ? kept_keys{chunk, 0} : kept_keys{}; }
  FOVEA_HD bool visible(const mask_site& at, isize i, isize j) const {
    const isize p = align.position(at, i);
    return j <= p && j >= start(p);
  }
  FOVEA_HD range keys(const mask_site& at, isize i0, isize i1) const {
    return {start(align.position(at, i0)), align.position(at, i1 - 1) + 1};
  }
  FOVEA_HD range queries(const mask_site& at, isize j) const {
    const isize offset = align.position(at, 0);
    return {j - offset, start(j) + chunk - offset};
  }
  FOVEA_HD tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    const isize p0 = align.position(at, i0), p1 = align.position(at, i1 - 1);
    if (j0 > p1 || j1 <= start(p0)) return tile_kind::empty;
    return j1 - 1 <= p0 && j0 >= start(p1) ? tile_kind::full : tile_kind::partial;
  }

 private:
  FOVEA_HD isize start(isize p) const { return p < 0 ? 0 : p / chunk * chunk; }
};

/// The first lengths[b] keys of item b: what a batch that is padded to the longest sequence may see.
struct key_lengths {
  const std::int32_t* lengths = nullptr;  ///< [B]

  void check(const mask_site& at) const {
    require(lengths != nullptr, "key_lengths has no lengths; wanted one for each of ", at.B, " items");
    require(lengths[at.b] >= 0 && lengths[at.b] <= at.m, "key_lengths[", at.b, "] is ", lengths[at.b],
            "; wanted 0 to m = ", at.m);
  }
  FOVEA_HD bool visible(const mask_site& at, isize, isize j) const { return j < lengths[at.b]; }
  FOVEA_HD range keys(const mask_site& at, isize, isize) const { return {0, lengths[at.b]}; }
  FOVEA_HD range queries(const mask_site& at, isize j) const { return {0, j < lengths[at.b] ? at.n : 0}; }
  FOVEA_HD tile_kind tile(const mask_site& at, isize, isize, isize j0, isize j1) const {
    return j0 >= lengths[at.b] ? tile_kind::empty : j1 <= lengths[at.b] ? tile_kind::full : tile_kind::partial;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
