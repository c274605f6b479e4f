// SPDX-License-Identifier: MIT
#pragma once
/// @file  Exact softmax attention of query rows to lists of key blocks: narrow tiles of rows that share a list, one running (m, l, O).
///
///   O_t = sum over blocks J of list t, keys j of J that row i sees, of e^(s_ij + bias_j) v_j, with the denominator beside it
///
/// A tile is up to `rows` (`wide_rows`, where query blocks fill them) neighbouring rows of one head that attend to the same blocks (part
/// of a query block). Up to `most` tiles are worked on together: they pass over the keys in windows that stay in L2, so a block is read
/// from memory once for all that chose it.
///
/// Contract   begin, any number of absorbs (several lists, pooled tokens and other sets of keys, rounds), finish. Lists rise and name no
///            block twice. Rows that see nothing give zeros and LSE = -inf. A NaN or infinity in a key or value reaches only the rows
///            that see that key. A row's bits depend on its tile's lists and on the keys that it sees, not on the other tiles.
/// Cost       2 (d + e) flops a row and key of its list, at the speed of dense attention within about a tenth; scratch independent of
///            n and m; no allocation, no threads.
/// Reference  tests/unit/sparse_tiles.cpp has the plain loops.       Source  kernel/online_softmax.hpp, whose numerics these are.

#include <cmath>

#include <fovea/core/rows.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/kernel/online_softmax.hpp>
#include <fovea/kernel/sparse_panels.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Rows first, first + 1, ... of a head.
struct tile_rows {
  isize head = 0, first = 0, count = 0;
};
/// Key blocks of a tile, rising.
struct block_list {
  const std::int32_t* at = nullptr;
  isize count = 0;
};
/// How blocks cut the keys of a set: block J is keys [J size, (J + 1) size). Causal: row i sees keys up to i + offset.
struct block_cut {
  isize size = 1;
  bool causal = false;
  isize offset = 0;
};

template <class Arch, class Acc>
class sparse_tiles {
  using T = detail::sparse_tile<Arch, Acc>;
  using P = simd::pack<Acc, Arch>;
  static constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074), ln2 = static_cast<Acc>(0.69314718055994530942);
  static constexpr isize granule = 16;  // keys that are converted at a time

 public:
  static constexpr isize rows = T::rows, wide_rows = T::wide_rows;
  /// Rows of a tile for query blocks of `block` rows.
  static constexpr isize rows_for(isize block) {
    return block % T::wide_rows == 0 || block >= 3 * T::wide_rows ? T::wide_rows : T::rows;
  }

  /// Tiles that are worked on together: their q and o fill half a megabyte at most.
  static isize most(isize d, isize e, isize rows_each = rows) {
    isize all = 512;
    while (all > rows_each && all * (d + e) * static_cast<isize>(sizeof(Acc)) > (512 << 10)) all /= 2;
    return all < rows_each ? 1 : all / rows_each;
  }

  /// Scratch of `tiles` tiles of `rows_each` rows (`rows` or `wide_rows`), at most `most`.
  sparse_tiles(arena& memory, isize tiles, isize d, isize e, isize rows_each = rows)
      : d_(d), e_(e), tiles_(tiles), R_(rows_each), window_(window(d, e)) {
    qt_ = memory.take<Acc>(tiles * d * R_), ot_ = memory.take<Acc>(tiles * e * R_);
    m_ = memory.take<Acc>(tiles * R_), l_ = memory.take<Acc>(tiles * R_);
    at_ = memory.take<tile_rows>(tiles), cursor_ = memory.take<isize>(tiles);
    s_ = memory.take<Acc>(T::keys * R_);
    lanes_ = memory.take<std::uint64_t>(T::keys), runs_ = memory.take<detail::sparse_run<Acc>>(T::keys);
    k_.rows = memory.take<Acc>(window_ * d), v_.rows = memory.take<Acc>(window_ * e);
    wide_ = d > e ? d : e;
    rows_of_ = memory.take<Acc>(T::W * wide_), zeros_ = memory.take<Acc>(d);
  }

  void begin(const tensor_ref& q, isize b, const tile_rows* tiles, isize count, double scale) noexcept {
    FOVEA_ASSERT(count <= tiles_);
    used_ = count, b_ = b;
    for (isize c = 0; c < d_; ++c) zeros_[c] = Acc(0);
    const Acc factor = static_cast<Acc>(scale * 1.4426950408889634074);
    for (isize t = 0; t < count; ++t) {
      at_[t] = tiles[t];
      Acc* o = ot_ + t * e_ * R_;
      for (isize x = 0; x < e_ * R_; ++x) o[x] = Acc(0);
      for (isize lane = 0; lane < R_; lane += T::W) {
        const Acc* from[T::W];
        for (isize l = 0; l < T::W; ++l) {
          const isize x = lane + l;
          m_[t * R_ + x] = -std::numeric_limits<Acc>::infinity(), l_[t * R_ + x] = Acc(0);
          from[l] = x < tiles[t].count ? simd::row_as<Arch, Acc>(q.type, q.row(b, tiles[t].head, tiles[t].first + x),
                                                                 d_, rows_of_ + l * wide_)
                                       : zeros_;
        }
        simd::rows_to_columns<Acc, Arch>(from, d_, factor, qt_ + t * d_ * R_ + lane, R_);
      }
    }
  }

  /// After begin: the rows of tile t have sums already, in the form of the accessors below; o [e][height], of which they are rows [row, ..).
  void start(isize t, const Acc* o, const Acc* m, const Acc* l, isize height, isize row) noexcept {
    const isize count = std::min(R_, height - row);
    for (isize c = 0; c < e_; ++c) std::copy_n(o + c * height + row, count, ot_ + (t * e_ + c) * R_);
    std::copy_n(m + row, count, m_ + t * R_), std::copy_n(l + row, count, l_ + t * R_);
  }

  /// Takes over tiles [first, last) of `from`, which was made for the same sizes, and what they have so far: a branch, to absorb more into.
  void follow(const sparse_tiles& from, isize first, isize last) noexcept {
    used_ = last - first, b_ = from.b_;
    for (isize c = 0; c < d_; ++c) zeros_[c] = Acc(0);
    const isize q = d_ * R_, o = e_ * R_;
    std::copy_n(from.at_ + first, used_, at_);
    std::copy_n(from.qt_ + first * q, used_ * q, qt_), std::copy_n(from.ot_ + first * o, used_ * o, ot_);
    std::copy_n(from.m_ + first * R_, used_ * R_, m_);
    std::copy_n(from.l_ + first * R_, used_ * R_, l_);
  }

  /// lists [count of begin]: the blocks of each tile.
  void absorb(const key_set<Acc>& set, const block_list* lists, const block_cut& cut) noexcept {
    for (Acc& x : bias_) x = Acc(0);
    isize first = set.count, last = 0, listed = 0;
    for (isize t = 0; t < used_; ++t) {
      cursor_[t] = 0, listed += lists[t].count * cut.size;
      if (lists[t].count == 0) continue;
      first = std::min<isize>(first, lists[t].at[0] * cut.size);
      last = std::max<isize>(last, (lists[t].at[lists[t].count - 1] + isize{1}) * cut.size);
    }
    last = std::min(last, set.count);
    const bool far = used_ >= 4 && set.count * (set.k.row_bytes + set.v.row_bytes) > (1 << 20);
    const isize pace = pace_of(listed * window_ / (last > first ? last - first : 1));
    for (isize j0 = first / window_ * window_; j0 < last; j0 += window_) {
      k_.open(set.k), v_.open(set.v);
      const isize j1 = std::min(j0 + window_, last);
      const range ahead{j1, far ? std::min(j1 + window_, last) : j1};
      feed_[0] = k_.feed(set.k, ahead, d_, pace), feed_[1] = v_.feed(set.v, ahead, e_, pace);
      for (isize t = 0; t < used_; ++t) absorb_window(set, lists[t], cut, t, j0, j1);
    }
  }

  /// The same for lists of single tokens of `set` that leave out only a few: all tokens up to the last one, in whole panels. A token that
  /// is left out counts nothing, but what is not finite in it reaches the rows.
  void absorb_dense(const key_set<Acc>& set, const block_list* lists) noexcept {
    isize last = 0;
    for (isize t = 0; t < used_; ++t) {
      cursor_[t] = 0;
      if (lists[t].count > 0) last = std::max<isize>(last, lists[t].at[lists[t].count - 1] + isize{1});
    }
    FOVEA_ASSERT(last == 0 || (set.bias != nullptr && set.modify == nullptr));
    for (isize j0 = 0; j0 < last; j0 += window_) {
      k_.open(set.k), v_.open(set.v);
      feed_[0] = feed_[1] = {}, coming_ = -1, base_ = j0;
      for (isize t = 0; t < used_; ++t)
        if (lists[t].count > 0) absorb_panels(set, lists[t], t, j0, std::min(j0 + window_, last));
    }
  }

  // ---- what the rows of tile t have so far, [rows]: scores in log2; the numerator is o 2^m, the denominator l 2^m ----

  const tile_rows& tile(isize t) const noexcept { return at_[t]; }
  const Acc* maxima(isize t) const noexcept { return m_ + t * R_; }
  const Acc* sums(isize t) const noexcept { return l_ + t * R_; }
  /// |o / l|^2 of the rows: the squared length of their output if it ended here.
  void squared_lengths(isize t, Acc* to) const noexcept {
    for (isize x = 0; x < R_; x += T::W) {
      const P l = P::load(l_ + t * R_ + x);
      P sum(Acc(0));
      for (isize c = 0; c < e_; ++c) {
        const P o = P::load(ot_ + (t * e_ + c) * R_ + x) / l;
        sum = simd::fma(o, o, sum);
      }
      simd::select_greater(l, P(Acc(0)), sum, l * P(Acc(0))).store(to + x);
    }
  }

  /// Row `row` of tile t takes in what others have summed: a denominator of e^m, an output of o [e].
  void join(isize t, isize row, Acc m, const Acc* o) noexcept {
    const isize x = t * R_ + row;
    const Acc z = m * log2e, top = m_[x] > z ? m_[x] : z;
    if (top == -std::numeric_limits<Acc>::infinity()) return;
    const Acc own = std::exp2(m_[x] - top), other = std::exp2(z - top);
    Acc* const to = ot_ + t * e_ * R_ + row;
    for (isize c = 0; c < e_; ++c) to[c * R_] = to[c * R_] * own + o[c] * other;
    l_[x] = l_[x] * own + other, m_[x] = top;
  }

  /// Writes out (and lse, where it is not null) of the rows that `begin` named.
  void finish(const tensor_mut& out, const tensor_mut& lse) noexcept {
    const bool direct = out.type == dtype_of<Acc>;
    for (isize t = 0; t < used_; ++t)
      for (isize lane = 0; lane < at_[t].count; lane += T::W) {
        const Acc *l = l_ + t * R_ + lane, *m = m_ + t * R_ + lane;
        const isize count = std::min(at_[t].count - lane, T::W);
        Acc inverse[T::W];
        Acc* to[T::W];
        void* row[T::W];
        for (isize x = 0; x < T::W; ++x) {
          inverse[x] = l[x] > Acc(0) ? Acc(1) / l[x] : l[x] * Acc(0);  // keeps NaN, gives 0 for a row that sees nothing
          to[x] = rows_of_ + x * wide_;
          if (x >= count) continue;
          row[x] = out.row(b_, at_[t].head, at_[t].first + lane + x);
          if (direct) to[x] = static_cast<Acc*>(row[x]);
          if (lse) *static_cast<Acc*>(lse.row(b_, at_[t].head, at_[t].first + lane + x)) = m[x] * ln2 + std::log(l[x]);
        }
        simd::columns_to_rows<Acc, Arch>(ot_ + t * e_ * R_ + lane, R_, e_, inverse, to);
        for (isize x = 0; !direct && x < count; ++x) simd::store_row<Arch, Acc>(out.type, to[x], e_, row[x]);
      }
  }

 private:
  /// Keys of a window: a quarter of a megabyte of rows, so that the tiles find them, and the next ones, in L2.
  static isize window(isize d, isize e) {
    const isize fit = (256 << 10) / ((d + e) * static_cast<isize>(sizeof(Acc))) / T::keys * T::keys;
    return fit < T::keys ? T::keys : fit > 1024 ? 1024 : fit;
  }

  /// Rows of a window: where they lie if they are stored as Acc in one stretch, else converted when a tile first needs them.
  struct row_window {
    Acc* rows = nullptr;
    bool in_place = false;
    std::uint64_t done = 0;  // granules

    void open(const row_source& from) noexcept {
      // A row stride of a multiple of 4 KB would put all rows of a panel into one set of the L1 cache: copy those too.
      in_place = from.type == dtype_of<Acc> && from.form == row_form::plain && from.table == nullptr &&
                 from.ring == 0 && from.row_bytes % 4096 != 0;
      done = 0;
    }
    isize stride(const row_source& from, isize width) const noexcept {
      return in_place ? from.row_bytes / static_cast<isize>(sizeof(Acc)) : width;
    }
    /// Row j of the window that begins with row `base`.
    const Acc* where(const row_source& from, isize j, isize base, isize width) const noexcept {
      return in_place ? reinterpret_cast<const Acc*>(from.data + j * from.row_bytes) : rows + (j - base) * width;
    }
    /// Rows `next`, to be asked for.
    detail::line_feed feed(const row_source& from, range next, isize width, isize every) const noexcept {
      if (!in_place || next.empty()) return {};
      const isize bytes = width * static_cast<isize>(sizeof(Acc)), count = next.last - next.first;
      const std::byte* at = from.data + next.first * from.row_bytes;
      if (bytes == from.row_bytes) return {at, at + count * bytes, count * bytes, 0, 1, every};
      return {at, at + bytes, bytes, from.row_bytes, count, every};
    }
    /// Rows [j0, j1) of the window that begins with row `base` and ends before `end`.
    const Acc* get(const row_source& from, isize j0, isize j1, isize base, isize end, isize width) noexcept {
      if (in_place) return reinterpret_cast<const Acc*>(from.data + j0 * from.row_bytes);
      for (isize g = (j0 - base) / granule; g <= (j1 - 1 - base) / granule; ++g) {
        if ((done >> g & 1) != 0) continue;
        done |= std::uint64_t{1} << g;
        for (isize j = base + g * granule; j < std::min(base + (g + 1) * granule, end); ++j)
          load(from, j, width, rows + (j - base) * width);
      }
      return rows + (j0 - base) * width;
    }
    static void load(const row_source& from, isize j, isize width, Acc* to) noexcept {
      if (from.form != row_form::plain) return simd::load_packed_row<Arch, Acc>(from, j, width, to);
      const stretch s = from.at(j);
      if (from.type == dtype::i8)
        simd::load_scaled_row<Arch, Acc>(s.data, s.scales, from.scale_row, width, to);
      else
        simd::load_row<Arch, Acc>(from.type, s.data, width, to);
    }
  };

  /// Steps of the values in a window, in which its tiles meet `keys` keys, for each line of the next window's rows.
  isize pace_of(isize keys) const noexcept {
    const isize lines = window_ * (ceil_div(d_, T::line) + ceil_div(e_, T::line));
    const isize steps = keys * ceil_div(e_, T::MR(R_ == T::rows ? T::narrow : T::wide));
    isize every = 2;
    while (every < 16 && lines * every * 3 < steps) every *= 2;
    return every;
  }
  detail::line_feed& feed() noexcept { return feed_[feed_[0].rows > 0 ? 0 : 1]; }

  /// Keys [base, end) of the blocks of a list, for tile t.
  void absorb_window(const key_set<Acc>& set, const block_list& list, const block_cut& cut, isize t, isize base,
                     isize end) noexcept {
    const tile_rows& at = at_[t];
    const isize seen = cut.causal ? std::min(end, at.first + at.count + cut.offset) : end;  // by any row
    const isize whole = cut.causal ? std::min(end, at.first + 1 + cut.offset) : end;        // by every row
    slots_ = used_runs_ = 0;
    isize& x = cursor_[t];
    // Blocks of few keys: a panel of scores bridges short gaps between them, what lies there is hidden.
    const isize gap = cut.size < 8 ? 8 : 0;
    while (x < list.count && list.at[x] * cut.size < end) {
      isize last = x + 1;
      while (last < list.count && (list.at[last] - list.at[last - 1] - 1) * cut.size <= gap &&
             list.at[last] * cut.size < end)
        ++last;
      const range keys{list.at[x] * cut.size, (list.at[last - 1] + isize{1}) * cut.size};
      coming_ = last < list.count && list.at[last] * cut.size < end ? list.at[last] * cut.size : -1, base_ = base;
      stretch_of_list from{set, list, cut.size, t, base, end, x};
      add(from, meet(keys, {base, whole}), false, 0);
      if (keys.last > whole) add(from, meet(keys, {whole > base ? whole : base, seen}), true, at.first + cut.offset);
      x = keys.last > end ? last - 1 : last;
      if (keys.last > end) break;  // the rest of the block in the next window
    }
    flush(t);
  }

  /// Tokens [base, end), up to the last one of the list, for tile t.
  void absorb_panels(const key_set<Acc>& set, const block_list& list, isize t, isize base, isize end) noexcept {
    const isize stop = std::min<isize>(end, list.at[list.count - 1] + isize{1}), stride = k_.stride(set.k, d_);
    v_stride_ = v_.stride(set.v, e_);
    isize& x = cursor_[t];
    for (isize j0 = base; j0 < stop; j0 += T::keys) {
      slots_ = std::min(T::keys, stop - j0), used_runs_ = 1;
      for (isize r = 0; r < R_; ++r) top_[r] = -std::numeric_limits<Acc>::infinity();
      const Acc* k = k_.get(set.k, j0, j0 + slots_, base, end, d_);
      runs_[0] = {v_.get(set.v, j0, j0 + slots_, base, end, e_), 0, static_cast<std::int16_t>(slots_), false};
      for_shape([&](auto vectors) {
        detail::in_panels<T::MR(vectors)>(slots_, [&](auto m, isize first) {
          for (isize i = 0; i < m; ++i) {
            const bool here = list.at[x] == j0 + first + i;
            bias_[i] = here ? set.bias[j0 + first + i] * log2e : -std::numeric_limits<Acc>::infinity();
            x += here && x + 1 < list.count ? 1 : 0;
          }
          detail::sparse_scores<Arch, Acc, m, vectors>(d_, k + first * stride, stride, qt_ + t * d_ * R_, bias_,
                                                       s_ + first * R_, top_, k + (first + m) * stride);
        });
      });
      flush(t);
    }
  }

  /// Keys of a list that are taken in, from list.at[x] on, in the window [base, end).
  struct stretch_of_list {
    const key_set<Acc>& set;
    const block_list& list;
    isize size, t, base, end, x;
  };
  /// Scores of `keys` into the next slots. masked: row l of the tile sees key j if j <= shift + l.
  void add(stretch_of_list& from, range keys, bool masked, isize shift) noexcept {
    const isize t = from.t;
    for (isize j0 = keys.first, count = 0; j0 < keys.last; j0 += count) {
      if (slots_ == 0)
        for (isize r = 0; r < R_; ++r) top_[r] = -std::numeric_limits<Acc>::infinity();
      count = std::min(keys.last - j0, T::keys - slots_);
      const Acc* k = k_.get(from.set.k, j0, j0 + count, from.base, from.end, d_);
      const Acc* v = v_.get(from.set.v, j0, j0 + count, from.base, from.end, e_);
      v_stride_ = v_.stride(from.set.v, e_);
      const bool gaps = from.size < 8 ? name_runs(from, j0, count, v, masked) : one_run(count, v, masked);
      score(from.set, t, j0, count, k, masked, shift, gaps);
      slots_ += count;
      if (slots_ == T::keys) flush(t);
    }
  }
  bool one_run(isize count, const Acc* v, bool masked) noexcept {
    runs_[used_runs_++] = {v, static_cast<std::int16_t>(slots_), static_cast<std::int16_t>(count), masked};
    return false;
  }
  /// The runs of keys [j0, j0 + count) that are listed; true if some are not.
  bool name_runs(stretch_of_list& from, isize j0, isize count, const Acc* v, bool masked) noexcept {
    const isize before = used_runs_, j1 = j0 + count;
    isize listed = 0;
    for (; from.x < from.list.count; ++from.x) {
      const range all{from.list.at[from.x] * from.size, (from.list.at[from.x] + isize{1}) * from.size};
      const range own = meet(all, {j0, j1});
      if (all.first >= j1) break;
      if (!own.empty()) {
        const isize slot = slots_ + own.first - j0, here = own.last - own.first;
        listed += here;
        if (used_runs_ > before && runs_[used_runs_ - 1].slot + runs_[used_runs_ - 1].count == slot)
          runs_[used_runs_ - 1].count = static_cast<std::int16_t>(runs_[used_runs_ - 1].count + here);
        else
          runs_[used_runs_++] = {v + (own.first - j0) * v_stride_, static_cast<std::int16_t>(slot),
                                 static_cast<std::int16_t>(here), masked};
      }
      if (all.last > j1) break;
    }
    first_run_ = before;
    return listed < count;
  }

  void score(const key_set<Acc>& set, isize t, isize j0, isize count, const Acc* k, bool masked, isize shift,
             bool gaps) noexcept {
    const bool changed = masked || gaps || set.modify != nullptr;
    const isize stride = k_.stride(set.k, d_);
    const Acc* coming = coming_ < 0 ? k : k_.where(set.k, coming_, base_, d_);
    Acc *s = s_ + slots_ * R_, *top = changed ? unused_ : top_;
    for_shape([&](auto vectors) {
      detail::in_panels<T::MR(vectors)>(count, [&](auto m, isize first) {
        for (isize i = 0; set.bias != nullptr && i < m; ++i) bias_[i] = set.bias[j0 + first + i] * log2e;
        detail::sparse_scores<Arch, Acc, m, vectors>(d_, k + first * stride, stride, qt_ + t * d_ * R_, bias_,
                                                     s + first * R_, top,
                                                     first + m < count ? k + (first + m) * stride : coming);
      });
    });
    if (!changed) return;
    if (set.modify != nullptr) {
      mask_site at = set.site;
      at.h = at_[t].head;
      set.modify->template apply<Acc>(at, at_[t].first, at_[t].count, j0, j0 + count, s, R_);
    }
    for (isize n = first_run_, j = 0; gaps && n <= used_runs_; ++n) {  // what lies between the runs
      const isize next = n < used_runs_ ? runs_[n].slot - slots_ : count;
      for (; j < next; ++j)
        for (isize r = 0; r < R_; ++r) s[j * R_ + r] = -std::numeric_limits<Acc>::infinity();
      if (n < used_runs_) j = next + runs_[n].count;
    }
    std::uint64_t* lanes = masked ? lanes_ + slots_ : nullptr;
    for (isize j = 0; masked && j < count; ++j) {
      const isize hidden = j0 + j - shift;  // rows before this one do not see key j0 + j
      lanes[j] = hidden <= 0 ? ~std::uint64_t{0} : hidden >= 64 ? 0 : ~std::uint64_t{0} << hidden;
    }
    detail::sparse_mask<Arch, Acc>(R_, count, lanes, s, top_);
  }

  /// The scores that are kept become weights, and (m, l, O) of tile t takes them in.
  void flush(isize t) noexcept {
    if (slots_ == 0) return;
    alignas(64) Acc alpha[T::wide_rows];
    for (isize k = 0; k < runs_[0].count && k < 16; ++k) simd::prefetch_line(runs_[0].v + k * v_stride_);
    detail::sparse_exponentials<Arch, Acc>(R_, slots_, s_, top_, m_ + t * R_, l_ + t * R_, alpha);
    for_shape([&](auto vectors) {
      detail::in_panels<T::MR(vectors)>(e_, [&](auto m, isize c) {
        detail::sparse_values<Arch, Acc, m, vectors>(runs_, used_runs_, c, v_stride_, s_, lanes_, alpha,
                                                     ot_ + (t * e_ + c) * R_, feed());
      });
    });
    slots_ = used_runs_ = 0;
  }

  /// f(constant of the vectors of a tile).
  template <class F>
  FOVEA_INLINE void for_shape(F&& f) const {
    if (T::wide != T::narrow && R_ == T::wide_rows) return f(tile::constant<T::wide>{});
    f(tile::constant<T::narrow>{});
  }

  isize d_, e_, tiles_, R_, window_, wide_, used_ = 0, b_ = 0;
  isize slots_ = 0, used_runs_ = 0, first_run_ = 0, v_stride_ = 0;
  isize coming_ = -1, base_ = 0;  // the stretch of keys behind this one in the window; none: -1
  detail::line_feed feed_[2];     // rows of the next window that are still to be asked for
  alignas(64) Acc top_[T::wide_rows], unused_[T::wide_rows] = {}, bias_[16];
  row_window k_, v_;
  Acc *qt_, *ot_, *m_, *l_, *s_, *rows_of_, *zeros_;
  tile_rows* at_;
  isize* cursor_;
  std::uint64_t* lanes_;
  detail::sparse_run<Acc>* runs_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
