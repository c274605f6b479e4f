// SPDX-License-Identifier: MIT
#pragma once
/// @file  Which slot of a ring a token lies in, and which tokens are still there. Numbers only: stores and states share it.
///
///   tokens [0, first) keep slots [0, first); token t >= first lies in slot first + (origin + t - first) % size
///   held: [0, first) and [low, tokens);   low rises when a slot is used again, and never falls
///
/// A window of w keys and calls of up to `chunk` tokens need size = w + chunk - 1: the oldest new token still finds the w - 1 keys before
/// it when the youngest has been stored.

#include <fovea/core/kv_layout.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct ring_index {
  isize first = 0, size = 0;
  isize origin = 0, tokens = 0, low = 0;

  isize slots() const { return first + size; }
  isize oldest() const { return low > first ? low : first; }  ///< of the tokens behind the first ones
  isize dropped() const { return oldest() - first; }
  isize slot(isize token) const { return token < first ? token : first + (origin + token - first) % size; }

  void append(isize count) {
    tokens += count;
    if (tokens - size > low) low = tokens - size;
  }
  /// May the sequence go on from `count` tokens as if the others had never come, for a window of `window`?
  bool can_truncate(isize count, isize window) const {
    return dropped() == 0 || count <= first || oldest() <= count - window + 1;
  }
  void truncate(isize count) {
    tokens = count;
    if (count <= first) low = 0;
  }
  /// Tokens [first, first + count) are gone; the others are numbered anew.
  void shift(isize count) {
    const isize gone = oldest();
    tokens -= count;
    origin = (origin + count) % size;
    low = gone - count > first ? gone - count : first;
  }
  /// For numbers that were read from somewhere.
  bool sound() const {
    return first >= 0 && size >= 1 && origin >= 0 && origin < size && low >= 0 && low <= tokens &&
           tokens - oldest() <= size;
  }
  /// The rows of a block of slots() rows, as a call sees them.
  kv_sequence view(kv_sequence block) const {
    block.kept = first, block.dropped = dropped();
    block.length = tokens - block.dropped;
    for (row_source* x : {&block.k, &block.v})
      x->fixed = first, x->ring = size, x->start = (origin + block.dropped) % size;
    return block;
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
