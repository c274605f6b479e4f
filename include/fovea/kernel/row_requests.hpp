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
/// Rows [j, last) of a source as they are stored, in address order and in even portions, for loops whose products take no longer than
/// reading: a line asked for too early waits for memory and everything behind it with it, one asked for too late is waited for.
class paced_requests {
 public:
  /// Where the next lines are; a loop keeps it in registers and writes it back.
  struct cursor {
    const std::byte *at = nullptr, *end = nullptr;
  };
  paced_requests() = default;
  paced_requests(const row_source& from, isize j, isize last, isize width, isize steps = 0) noexcept {
    bytes_ = width * static_cast<isize>(size_of(from.type)), stride_ = from.row_bytes;
    if (from.form != row_form::plain || j >= last) return;
    if (steps > 0) portion_ = ceil_div((last - j) * ceil_div(bytes_, 64), steps);
    while (j < last && count_ < most) {  // of shorter pages only the first ones
      const stretch s = from.at(j);
      const isize here = s.count < last - j ? s.count : last - j;
      const bool joined = stride_ == bytes_;  // one long row
      list_[count_++] = {s.data, joined ? 1 : here, joined ? here * bytes_ : bytes_};
      j += here;
    }
  }
  bool any() const noexcept { return portion_ > 0; }
  FOVEA_INLINE void ask() {
    for (isize n = portion_; n > 0; --n, now.at += 64) {
      if (now.at >= now.end && !next_row(now)) return;
      simd::prefetch(now.at, 64);
    }
  }
  /// So many lines, however many steps there are.
  template <int Lines>
  FOVEA_INLINE void ask(cursor& c) {
    if (c.end - c.at < Lines * 64) {
      c = further(c, Lines);
      return;
    }
    simd::prefetch(c.at, Lines * 64);
    c.at += Lines * 64;
  }

  cursor now;

 private:
  static constexpr isize most = 8;  // a block of 96 keys in pages of 16
  struct part {
    const std::byte* row;
    isize rows, bytes;
  };
  /// A portion that reaches into the next row.
  FOVEA_NOINLINE cursor further(cursor c, int lines) noexcept {
    for (; lines > 0; --lines, c.at += 64) {
      if (c.at >= c.end && !next_row(c)) return c;
      simd::prefetch(c.at, 64);
    }
    return c;
  }
  bool next_row(cursor& c) noexcept {
    while (turn_ < count_ && list_[turn_].rows == 0) ++turn_;
    if (turn_ == count_) return false;
    part& x = list_[turn_];
    c.at = x.row, c.end = x.row + x.bytes;
    x.row += stride_, --x.rows;
    return true;
  }
  part list_[most];
  isize bytes_ = 0, stride_ = 0, portion_ = 0, count_ = 0, turn_ = 0;
};
/// Asks for one line of each 4 KB of rows [j, last). To read or ask for a line of a page that was not used for long, its entries must be
/// fetched from the memory's page tables first; loads and other requests wait behind that: so this comes a block before the requests.
/// Inline: g++ takes a function that does nothing but ask for one that does nothing.
FOVEA_INLINE void touch_pages(const row_source& from, isize j, isize last) noexcept {
  constexpr isize memory_page = 4096;
  while (j < last) {
    const stretch s = from.at(j);
    const isize here = s.count < last - j ? s.count : last - j, bytes = here * from.row_bytes;
    for (isize x = 0; x < bytes; x += memory_page) simd::prefetch(s.data + x, 64);
    j += here;
  }
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
