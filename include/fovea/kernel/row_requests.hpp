// SPDX-License-Identifier: MIT
#pragma once
/// @file  Rows that are asked for ahead of their use, a few cache lines at a time between products.
///
/// Contract   hints only: nothing is read or written. In a burst the core would wait for its few line buffers.

#include <fovea/core/rows.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// Rows that are asked for while others are worked on: where reading them would take longer than the work. Null: nothing.
template <class Acc>
struct rows_ahead {
  const Acc* rows = nullptr;
  isize stride = 0, width = 0, count = 0;
  static constexpr isize line = 64 / static_cast<isize>(sizeof(Acc));
  /// Rows [first, last) of a source, as far as they are one stretch of Acc.
  static rows_ahead of(const row_source& from, isize first, isize last, isize width) noexcept {
    rows_ahead x;
    if (first >= last || from.type != dtype_of<Acc>) return x;
    const stretch s = from.at(first);
    x.rows = reinterpret_cast<const Acc*>(s.data), x.stride = from.row_bytes / static_cast<isize>(sizeof(Acc));
    x.width = width, x.count = s.count < last - first ? s.count : last - first;
    return x;
  }
  /// Line `x` (of 64 bytes) of row k.
  FOVEA_INLINE void ask(isize k, isize x) const {
    if (k < count && x * line < width) simd::prefetch(rows + k * stride + x * line, 64);
  }
};

/// Rows that will be needed later, asked for a few lines at a time between products: in a burst the core would wait for them.
struct row_requests {
  const std::byte* row = nullptr;
  isize stride = 0, bytes = 0, rows = 0;  // from a row to the next; of a row; how many are left
  isize done = 0;                         // bytes of the first row
  isize lines() const { return rows * ceil_div(bytes, 64); }
  template <class Ask>
  FOVEA_INLINE void ask(isize count, const Ask& one) {
    while (count > 0 && rows > 0) {
      for (; count > 0 && done < bytes; --count, done += 64) one(row + done);
      if (done >= bytes) row += stride, done = 0, --rows;
    }
  }
};
/// `rows` rows of `bytes` bytes. Rows a multiple of 4 KB apart would drive each other out of the cache: none.
inline row_requests rows_at(const void* p, isize stride, isize bytes, isize rows) noexcept {
  if (stride % 4096 == 0) return {};
  if (stride == bytes) return {static_cast<const std::byte*>(p), 0, rows * bytes, 1};
  return {static_cast<const std::byte*>(p), stride, bytes, rows};
}
/// With each panel of scores: so many lines of the next block, and of the output.
struct later {
  row_requests k, v, out;
  isize read = 0, write = 0;
  FOVEA_NOINLINE void ask() {  // out of line: its registers are those of the products
    const auto get = [](const std::byte* p) FOVEA_INLINE_LAMBDA { simd::prefetch(p, 64); };
    if (k.rows > 0)
      k.ask(read, get);
    else
      v.ask(read, get);
    out.ask(write, [](const std::byte* p) FOVEA_INLINE_LAMBDA { simd::prefetch_to_write(p, 64); });
  }
};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
