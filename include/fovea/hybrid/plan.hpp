// SPDX-License-Identifier: MIT
#pragma once
/// @file  The plan of a superblock: the fate of every key block for every query block in it, as a mask and as a score term.
///
/// Contract   trivially copyable views of scratch; a plan lives as long as its superblock. Table row of head h, query row i:
///            first_row[h - first_head] + (i + origin) / block_q.

#include <fovea/kernel/block_select.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

/// Keys of the blocks whose fate is `wanted`. For pooled tokens a key is a block: block_k = 1, not causal.
struct planned_blocks {
  const std::uint8_t* fate = nullptr;
  const range* hull = nullptr;  ///< of each table row: blocks that hold all of the wanted fate
  const isize* first_row = nullptr;
  isize first_head = 0, blocks = 0, block_q = 1, block_k = 1, origin = 0, offset = 0;
  std::uint8_t wanted = kernel::computed;
  bool causal = false;

  /// Hulls are widened to the key blocks of kernel/online_softmax.hpp: its panels then start at the same keys whatever is selected
  /// for other rows of a tile, and a row's bits depend on nothing that the row may not see.
  static constexpr isize unit = 128;

  isize row(const mask_site& at, isize i) const { return first_row[at.h - first_head] + (i + origin) / block_q; }

  bool visible(const mask_site& at, isize i, isize j) const {
    return fate[row(at, i) * blocks + j / block_k] == wanted && (!causal || j <= i + offset);
  }
  range keys(const mask_site& at, isize i0, isize i1) const {
    range all{blocks, 0};
    for (isize r = row(at, i0); r <= row(at, i1 - 1); ++r)
      if (!hull[r].empty()) all = {std::min(all.first, hull[r].first), std::max(all.last, hull[r].last)};
    if (all.empty()) return {0, 0};
    const range wide{all.first * block_k / unit * unit, ceil_div(all.last * block_k, unit) * unit};
    return meet(wide, {0, causal ? i1 + offset : at.m});
  }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    if (causal && j0 > i1 - 1 + offset) return tile_kind::empty;
    bool any = false, all = !causal || j1 - 1 <= i0 + offset;
    for (isize r = row(at, i0); r <= row(at, i1 - 1); ++r)
      for (isize c = j0 / block_k; c <= (j1 - 1) / block_k; ++c) {
        const bool on = fate[r * blocks + c] == wanted;
        any = any || on, all = all && on;
      }
    return all ? tile_kind::full : any ? tile_kind::partial : tile_kind::empty;
  }
  /// Whole blocks at once; then the causal edge, one shift a key.
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, std::uint64_t* out) const {
    for (isize c = j0 / block_k; c <= (j1 - 1) / block_k; ++c) {
      std::uint64_t bits = 0;
      for (isize i = i0; i < i0 + count;) {
        const isize end = std::min(i0 + count, ((i + origin) / block_q + 1) * block_q - origin);
        if (fate[row(at, i) * blocks + c] == wanted) bits |= (~std::uint64_t{0} >> (64 - (end - i))) << (i - i0);
        i = end;
      }
      for (isize j = std::max(j0, c * block_k); j < std::min(j1, (c + 1) * block_k); ++j) {
        const isize hidden = causal ? j - offset - i0 : 0;  // rows before this one do not see key j
        out[j - j0] = hidden <= 0 ? bits : hidden >= 64 ? 0 : bits & (~std::uint64_t{0} << hidden);
      }
    }
  }
};

/// The cumulant's variance term of pooled token j for row i, from a table [blocks x rows] of nats.
template <class Acc>
struct variance_term {
  const Acc* table = nullptr;
  isize ld = 0, first_head = 0, first = 0;  ///< rows r = (h - first_head) * n + i, from `first` on

  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T s) const {
    return s + static_cast<T>(table[j * ld + (at.h - first_head) * at.n + i - first]);
  }
};

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
