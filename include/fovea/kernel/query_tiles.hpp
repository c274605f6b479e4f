// SPDX-License-Identifier: MIT
#pragma once
/// @file  A superblock of query rows cut into tiles of the vector lanes: where rows lie, what they see, and rows turned into columns.
///
///   row r = h * n + i of the query group that shares one KV head; tile t holds R = NR * W rows, lane l of it row first + t * R + l
///
/// Contract   bits of lanes without a row are never set. A run of keys that is not masked is seen by every row of the tile.

#include <bit>
#include <limits>

#include <fovea/core/workspace.hpp>
#include <fovea/kernel/online_softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

namespace detail {
/// Register tile and key block of loops that keep scores for a while: the shape of the online softmax, which see.
template <class Arch, class Acc>
struct gradient_tile {
  static constexpr bool wide = std::is_same_v<Acc, float> && Arch::registers >= 32 && simd::pack<Acc, Arch>::size <= 16;
  static constexpr int MR = wide ? 6 : tile::tile_shape<Arch, Acc>::MR, NR = wide ? 4 : tile::tile_shape<Arch, Acc>::NR;
  static constexpr isize W = simd::pack<Acc, Arch>::size, rows = NR * W;  // query rows of a tile
  static constexpr isize keys = 96;                                       // of a block
  static_assert(rows <= 64);
};
}  // namespace detail

/// Keys [first, first + count) of a block, of which some row of a tile sees each: vectors [vector, vector + vectors) are computed.
struct key_run {
  std::int16_t first, count;
  std::int8_t vector, vectors;
  bool masked;
};

/// T: the rows of a tile, the lanes of a vector, the keys of a block at most.
template <class Arch, class Acc, class T = detail::gradient_tile<Arch, Acc>>
class query_tiles {
 public:
  static constexpr isize R = T::rows, W = T::W;
  struct segment {  // lanes [lane, lane + count) of a tile: rows i ... of head h
    isize lane, count, h, i;
  };

  void place(const query_rows& rows) noexcept {
    rows_ = rows;
    used_ = ceil_div(rows.last - rows.first, R);
  }
  isize used() const noexcept { return used_; }
  const query_rows& rows() const noexcept { return rows_; }
  isize count(isize t) const noexcept {
    const isize left = rows_.last - rows_.first - t * R;
    return left < R ? left : R;
  }
  std::uint64_t live(isize t) const noexcept { return ~std::uint64_t{0} >> (64 - count(t)); }
  isize head(isize r) const noexcept { return rows_.first_head + (rows_.first + r) / rows_.q.length; }
  isize row(isize r) const noexcept { return (rows_.first + r) % rows_.q.length; }

  template <class F>
  void for_segments(isize t, F&& f) const noexcept {
    const isize n = rows_.q.length, first = rows_.first + t * R, last = first + count(t);
    for (isize r = first; r < last;) {
      const isize i = r % n, number = n - i < last - r ? n - i : last - r;
      f(segment{r - first, number, rows_.first_head + r / n, i});
      r += number;
    }
  }

  /// What tile t sees of keys [j0, j1): bits in lanes [j1 - j0], and one answer for the keys of `own`, outside of which it sees none.
  template <class Set>
  tile_kind see(const Set& set, isize t, isize j0, isize j1, std::uint64_t* lanes, range& own) const noexcept {
    own = {j0, j1};
    tile_kind kind = tile_kind::full;
    if (set.visible != nullptr) {
      own = hull(set, t, j0, j1);
      kind = own.empty() ? tile_kind::empty : ask(set, t, own, lanes + (own.first - j0));
    }
    const auto fill = [&](isize first, isize last, std::uint64_t bits) {
      for (isize j = first; j < last; ++j) lanes[j - j0] = bits;
    };
    if (kind == tile_kind::empty) return fill(j0, j1, 0), kind;
    fill(j0, own.first, 0), fill(own.last, j1, 0);
    if (kind == tile_kind::full) fill(own.first, own.last, live(t));
    return kind;
  }

  /// The same, and the runs of keys in `runs`. Returns how many runs there are.
  template <class Set>
  isize look(const Set& set, isize t, isize j0, isize j1, std::uint64_t* lanes, key_run* runs) const noexcept {
    const std::uint64_t all = live(t);
    range own;
    const tile_kind kind = see(set, t, j0, j1, lanes, own);
    if (kind == tile_kind::empty) return 0;
    if (kind == tile_kind::full) {
      runs[0] = {static_cast<std::int16_t>(own.first - j0), static_cast<std::int16_t>(own.last - own.first), 0,
                 vectors_of(all), false};
      return 1;
    }
    return cut(own.first - j0, own.last - j0, lanes, all, set.modify == nullptr, runs);
  }

 private:
  template <class Set>
  range hull(const Set& set, isize t, isize j0, isize j1) const noexcept {
    range all{j1, j0};
    for_segments(t, [&](const segment& g) {
      const range r = meet(set.visible->keys(site(set, g), g.i, g.i + g.count), {j0, j1});
      if (!r.empty()) all = {r.first < all.first ? r.first : all.first, r.last > all.last ? r.last : all.last};
    });
    return all;
  }

  template <class Set>
  tile_kind ask(const Set& set, isize t, range keys, std::uint64_t* lanes) const noexcept {
    bool any = false, all = true;
    for_segments(t, [&](const segment& g) {
      const tile_kind kind = set.visible->tile(site(set, g), g.i, g.i + g.count, keys.first, keys.last);
      any = any || kind != tile_kind::empty, all = all && kind == tile_kind::full;
    });
    if (!any) return tile_kind::empty;
    if (all) return tile_kind::full;
    const isize count = keys.last - keys.first;
    for (isize y = 0; y < count; ++y) lanes[y] = 0;
    for_segments(t, [&](const segment& g) {
      std::uint64_t bits[T::keys];
      set.visible->lanes(site(set, g), g.i, g.count, keys.first, keys.last, bits);
      for (isize y = 0; y < count; ++y) lanes[y] |= bits[y] << g.lane;
    });
    return tile_kind::partial;
  }

  /// Vectors up to the last one that has a bit.
  static std::int8_t vectors_of(std::uint64_t bits) noexcept {
    return static_cast<std::int8_t>((63 - std::countl_zero(bits)) / static_cast<int>(W) + 1);
  }
  /// Runs of keys with the same kind of bits. `by_vector`: leave out the vectors of which no lane sees a key.
  static isize cut(isize first, isize last, const std::uint64_t* lanes, std::uint64_t all, bool by_vector,
                   key_run* runs) noexcept {
    isize count = 0;
    for (isize k = first; k < last; ++k) {
      const std::uint64_t bits = lanes[k];
      if (bits == 0) continue;
      const bool masked = bits != all, part = by_vector && masked;
      const int low = part ? std::countr_zero(bits) / static_cast<int>(W) : 0, high = vectors_of(part ? bits : all);
      const key_run next{static_cast<std::int16_t>(k), 1, static_cast<std::int8_t>(low),
                         static_cast<std::int8_t>(high - low), masked};
      key_run* back = runs + count - 1;
      if (count > 0 && back->first + back->count == k && back->masked == masked && back->vector == next.vector &&
          back->vectors == next.vectors)
        ++back->count;
      else
        runs[count++] = next;
    }
    return count;
  }

 public:
  template <class Set>
  static mask_site site(const Set& set, const segment& g) noexcept {
    mask_site at = set.site;
    at.h = g.h;
    return at;
  }

 private:
  query_rows rows_;
  isize used_ = 0;
};

/// Rows of a superblock twice: in panels of up to NR vectors of columns [panel][rows][columns] (padded with zeros to whole vectors),
/// and turned [tile][width][R].
template <class Arch, class Acc>
class turned_rows {
  using tiles = query_tiles<Arch, Acc>;
  static constexpr isize R = tiles::R, W = tiles::W;

 public:
  turned_rows(arena& memory, isize rows, isize width)
      : width_(width), padded_(ceil_div(width, W) * W), most_(rows), split_(padded_ / W, R / W) {
    panels_ = memory.take<Acc>(rows * padded_);
    columns_ = memory.take<Acc>(rows * width);
    rows_ = memory.take<Acc>(W * padded_);
  }

  /// `shift` [rows]: rows where it is infinite count as zeros. Columns are multiplied by `factor`. Queries are
  /// turned to their positions, if the superblock says so.
  void load(const tiles& at, const tensor_ref& from, Acc factor, const Acc* shift, bool queries) noexcept {
    for (isize r = 0; r < at.used() * R; r += W) {
      const Acc* row[W];
      for (isize l = 0; l < W; ++l) {
        Acc* to = rows_ + l * padded_;
        const bool real = shift[r + l] != std::numeric_limits<Acc>::infinity();
        if (real) {
          const isize i = at.row(r + l);
          simd::load_row<Arch, Acc>(from.type, from.row(at.rows().b, at.head(r + l), i), width_, to);
          if (queries && at.rows().turn != nullptr) rotate(*at.rows().turn, at.rows().position(i), to);
        }
        for (isize c = real ? width_ : 0; c < padded_; ++c) to[c] = Acc(0);
        row[l] = to;
        isize first = 0;
        for (isize x = 0; x < split_.groups; first += columns_of(x), ++x)
          for (isize c = 0; c < columns_of(x); c += W)
            simd::pack<Acc, Arch>::load(to + first + c).store(panels_ + first * most_ + (r + l) * columns_of(x) + c);
      }
      simd::rows_to_columns<Acc, Arch>(row, width_, factor, columns_ + r / R * width_ * R + r % R, R);
    }
  }
  isize padded() const noexcept { return padded_; }
  isize panels() const noexcept { return split_.groups; }
  isize columns_of(isize x) const noexcept { return split_.size(x) * W; }  ///< of panel x
  /// The panel that begins with column `first`, from tile t on.
  const Acc* panel(isize x, isize first, isize t) const noexcept {
    return panels_ + first * most_ + t * R * columns_of(x);
  }
  const Acc* columns(isize t) const noexcept { return columns_ + t * width_ * R; }

 private:
  isize width_, padded_, most_;
  tile::balanced split_;
  Acc *panels_, *columns_, *rows_;
};

/// The log-sum-exp of each row in units of log2; plus infinity where a row sees nothing and in lanes without a row: then P = 0.
template <class Arch, class Acc>
void load_shift(const query_tiles<Arch, Acc>& at, const tensor_ref& lse, Acc* shift) noexcept {
  constexpr Acc none = std::numeric_limits<Acc>::infinity();
  const isize rows = at.rows().last - at.rows().first;
  for (isize r = 0; r < at.used() * query_tiles<Arch, Acc>::R; ++r) {
    const Acc x = r < rows ? *static_cast<const Acc*>(lse.row(at.rows().b, at.head(r), at.row(r))) : none;
    shift[r] = x == -none ? none : x * static_cast<Acc>(1.4426950408889634074);
  }
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
