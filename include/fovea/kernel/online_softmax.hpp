// SPDX-License-Identifier: MIT
#pragma once
/// @file  Exact softmax attention of a superblock of query rows over sets of keys: one loop, one running (m, l, O).
///
///   S^T = K Q^T [keys x queries],  m' = max(m, S),  P = 2^(S - m'),  l = l 2^(m-m') + sum P,  O^T = O^T 2^(m-m') + V^T P
///
/// Queries lie along the vector lanes: maxima, sums, rescaling and masks are vertical, P^T leaves the first product in the layout
/// that the second reads, and K and V rows are read in place as broadcast scalars. Scores are kept in units of log2.
///
/// Contract   begin, any number of absorbs (their order changes rounding only), finish. Rows that see nothing give zeros and -inf. A NaN
///            or infinity in a key or value reaches only the rows that see that key: partly visible panels take a masked product.
/// Cost       2 (d + e) flops for each visible (row, key); scratch independent of n and m; no allocation, no threads.
/// Reference  softmax/reference.hpp.       Source  Milakov & Gimelshein, online normalizer calculation for softmax (2018).

#include <bit>
#include <cmath>
#include <limits>

#include <fovea/core/rows.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/kernel/softmax_panels.hpp>
#include <fovea/mask/mask.hpp>
#include <fovea/position/rope.hpp>
#include <fovea/score/score.hpp>
#include <fovea/simd/convert.hpp>
#include <fovea/simd/rotate_row.hpp>
#include <fovea/simd/transpose.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

/// Keys and values of one KV head, and what may be seen of them.
template <class Acc>
struct key_set {
  row_source k, v;  ///< rows of d, rows of e
  isize count = 0;
  isize first = 0;                       ///< keys before it are left out by online_softmax: a part of a split
  const fovea::mask* visible = nullptr;  ///< null: everything
  const fovea::score* modify = nullptr;  ///< null: nothing
  const Acc* bias = nullptr;             ///< [count] added to the score of each key, nats; null: nothing
  mask_site site;                        ///< b, n, m, H, G; h is filled in per row
};

/// Rows r = h * n + i of the query group that shares one KV head.
struct query_rows {
  tensor_ref q;
  isize b = 0, first_head = 0;
  isize first = 0, last = 0;                ///< [first, last) of group * n
  const rope* turn = nullptr;               ///< rows are turned to their positions as they are loaded; null: they stay
  const std::int32_t* positions = nullptr;  ///< [n] position of query i; null: first_position + i
  isize first_position = 0;
  bool rotated = false;  ///< the keys are (row_source::rotated): so are the rows, after they were turned

  isize position(isize i) const noexcept { return positions != nullptr ? positions[i] : first_position + i; }
};

/// Query i of head h as Acc, turned to its position: where it lies if nothing has to be done, else in `scratch` [d].
template <class Arch, class Acc>
const Acc* load_query(const query_rows& rows, isize h, isize i, isize d, Acc* scratch) noexcept {
  const void* from = rows.q.row(rows.b, h, i);
  if (rows.turn == nullptr && !rows.rotated) return simd::row_as<Arch, Acc>(rows.q.type, from, d, scratch);
  if constexpr (std::is_same_v<Acc, float>)
    if (rows.turn == nullptr && rows.q.type == dtype::f32)
      return simd::rotate_row<Arch>(static_cast<const float*>(from), scratch, d), scratch;
  simd::load_row<Arch, Acc>(rows.q.type, from, d, scratch);
  if (rows.turn != nullptr) rotate(*rows.turn, rows.position(i), scratch);
  if constexpr (std::is_same_v<Acc, float>)  // rotated keys are int8, and those never meet doubles
    if (rows.rotated) simd::rotate_row<Arch>(scratch, d);
  return scratch;
}

/// Rows [j0, j1) of a source as Acc: where they lie, if they are stored so in one stretch; else converted into `scratch` [rows][width].
template <class Arch, class Acc>
FOVEA_NOINLINE const Acc* block_of_rows(const row_source& from, isize j0, isize j1, isize width, Acc* scratch,
                                        isize& stride) noexcept {
  if (from.form != row_form::plain) {
    stride = width;
    for (isize j = j0; j < j1; ++j) simd::load_packed_row<Arch, Acc>(from, j, width, scratch + (j - j0) * width);
    return scratch;
  }
  stretch s = from.at(j0);
  // A row stride of a multiple of 4 KB would put all rows of a panel into one set of the L1 cache: copy those too.
  if (from.type == dtype_of<Acc> && s.count >= j1 - j0 && from.row_bytes % 4096 != 0) {
    stride = from.row_bytes / static_cast<isize>(sizeof(Acc));
    return reinterpret_cast<const Acc*>(s.data);
  }
  stride = width;
  Acc* to = scratch;
  for (isize j = j0; j < j1;) {
    const isize last = s.count < j1 - j ? j + s.count : j1;
    for (; j < last; ++j, to += width, s.data += from.row_bytes, s.scales += from.scale_row) {
      if (from.type == dtype::i8)
        simd::load_scaled_row<Arch, Acc>(s.data, s.scales, from.scale_row, width, to);
      else
        simd::load_row<Arch, Acc>(from.type, s.data, width, to);
    }
    if (j < j1) s = from.at(j);
  }
  return scratch;
}

template <class Arch, class Acc>
class online_softmax {
  using T = detail::softmax_tile<Arch, Acc>;
  static constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074), ln2 = static_cast<Acc>(0.69314718055994530942);

 public:
  /// Rows of a superblock: K and V are read (and converted) once for each. 512 for long inputs, while Q and O fit half of L2.
  static isize superblock(isize rows, isize d, isize e) {
    isize most = rows > 512 ? 512 : 256;
    while (most > T::rows && most * (d + e) * static_cast<isize>(sizeof(Acc)) > (512 << 10)) most /= 2;
    return most < T::rows ? T::rows : most;
  }

  /// Scratch of one superblock.
  online_softmax(arena& memory, isize rows, isize d, isize e)
      : d_(d), e_(e), tiles_(ceil_div(superblock(rows, d, e), T::rows)) {
    qt_ = memory.take<Acc>(tiles_ * d * T::rows);
    ot_ = memory.take<Acc>(tiles_ * e * T::rows);
    m_ = memory.take<Acc>(tiles_ * T::rows);
    l_ = memory.take<Acc>(tiles_ * T::rows);
    s_ = memory.take<Acc>(T::keys * T::rows);
    k_ = memory.take<Acc>(T::keys * d);
    v_ = memory.take<Acc>(T::keys * e);
    wide_ = d > e ? d : e;
    rows_of_ = memory.take<Acc>(T::W * wide_);
    zeros_ = memory.take<Acc>(d);
    lanes_ = memory.take<std::uint64_t>(T::keys);
  }

  /// `sinks` [H], nats: a logit a head that joins the denominator with no value; null: none.
  void begin(const query_rows& rows, double scale, const float* sinks) noexcept {
    rows_ = rows;
    used_ = ceil_div(rows.last - rows.first, T::rows);
    for (isize c = 0; c < d_; ++c) zeros_[c] = Acc(0);
    const Acc factor = static_cast<Acc>(scale * 1.4426950408889634074);
    const isize n = rows.q.length;
    isize r = rows.first, h = rows.first_head + r / n, i = r % n;
    for (isize t = 0; t < used_; ++t) {
      Acc* o = ot_ + t * e_ * T::rows;
      for (isize x = 0; x < e_ * T::rows; ++x) o[x] = Acc(0);
      for (isize lane = 0; lane < T::rows; lane += T::W) {
        const Acc* from[T::W];
        for (isize l = 0; l < T::W; ++l, ++r) {
          const isize at = t * T::rows + lane + l;
          m_[at] = -std::numeric_limits<Acc>::infinity(), l_[at] = Acc(0);
          from[l] = zeros_;  // lanes without a row
          if (r >= rows.last) continue;
          from[l] = load_query<Arch, Acc>(rows, h, i, d_, rows_of_ + l * wide_);
          if (sinks != nullptr) m_[at] = static_cast<Acc>(sinks[h]) * log2e, l_[at] = Acc(1);
          if (++i == n) ++h, i = 0;
        }
        simd::rows_to_columns<Acc, Arch>(from, d_, factor, qt_ + t * d_ * T::rows + lane, T::rows);
      }
    }
  }

  void absorb(const key_set<Acc>& set) noexcept {
    range hull{set.count, 0};
    for (isize t = 0; t < used_; ++t) {
      const range r = keys_of_tile(set, t);
      if (r.empty()) continue;
      hull = {r.first < hull.first ? r.first : hull.first, r.last > hull.last ? r.last : hull.last};
    }
    for (isize j0 = hull.first / T::keys * T::keys; j0 < hull.last; j0 += T::keys) {
      const isize j1 = j0 + T::keys < hull.last ? j0 + T::keys : hull.last;
      block rows{j0, j1, nullptr, nullptr, 0, 0};
      if (used_ == 1 && vectors(0) <= few) look_ahead(set, j0, j1);
      bool any = false;
      for (isize t = 0; t < used_; ++t) any = absorb_tile(set, t, rows) || any;
      if (!any) j0 += unseen(set, j1, hull.last);
    }
  }

  /// Writes out (and lse, where it is not null) of the rows that `begin` named.
  void finish(const tensor_mut& out, const tensor_mut& lse) noexcept {
    const bool direct = out.type == dtype_of<Acc>;
    const isize n = rows_.q.length;
    isize r = rows_.first, h = rows_.first_head + r / n, i = r % n;
    for (isize t = 0; t < used_; ++t)
      for (isize lane = 0; lane < T::rows && r < rows_.last; lane += T::W) {
        const Acc *l = l_ + t * T::rows + lane, *m = m_ + t * T::rows + lane;
        Acc inverse[T::W];
        Acc* to[T::W];
        void* rows[T::W];
        const isize count = rows_.last - r < T::W ? rows_.last - r : T::W;
        r += count;
        for (isize x = 0; x < T::W; ++x) {
          inverse[x] = l[x] > Acc(0) ? Acc(1) / l[x] : l[x] * Acc(0);  // keeps NaN, gives 0 for a row that sees nothing
          to[x] = rows_of_ + x * wide_;
          if (x >= count) continue;
          rows[x] = out.row(rows_.b, h, i);
          if (direct) to[x] = static_cast<Acc*>(rows[x]);
          if (lse) *static_cast<Acc*>(lse.row(rows_.b, h, i)) = m[x] * ln2 + std::log(l[x]);
          if (++i == n) ++h, i = 0;
        }
        simd::columns_to_rows<Acc, Arch>(ot_ + t * e_ * T::rows + lane, T::rows, e_, inverse, to);
        for (isize x = 0; !direct && x < count; ++x) simd::store_row<Arch, Acc>(out.type, to[x], e_, rows[x]);
      }
  }

 private:
  /// With few rows of queries the block's values, then the next block's keys, are asked for before they are needed.
  void look_ahead(const key_set<Acc>& set, isize j0, isize j1) noexcept {
    v_ahead_ = k_ahead_ = {};
    if (set.count * (set.k.row_bytes + set.v.row_bytes) <= (1 << 20)) return;  // in the L2 cache
    const auto find = [](const row_source& from, isize first, isize last, isize width) {
      detail::rows_ahead<Acc> x;
      if (first >= last || from.type != dtype_of<Acc>) return x;
      const stretch s = from.at(first);
      x.rows = reinterpret_cast<const Acc*>(s.data), x.stride = from.row_bytes / static_cast<isize>(sizeof(Acc));
      x.width = width, x.count = s.count < last - first ? s.count : last - first;
      return x;
    };
    v_ahead_ = find(set.v, j0, j1, e_);
    k_ahead_ = find(set.k, j1, j1 + T::keys < set.count ? j1 + T::keys : set.count, d_);
  }

  struct block {  // keys [j0, j1) of a set, converted when the first tile needs them
    isize j0, j1;
    const Acc *k, *v;
    isize k_stride, v_stride;
  };
  struct segment {  // lanes [lane, lane + count) of a tile: rows i ... of head h
    isize lane, count, h, i;
  };

  template <class F>
  void for_segments(isize t, F&& f) const noexcept {
    const isize n = rows_.q.length, first = rows_.first + t * T::rows;
    const isize last = first + T::rows < rows_.last ? first + T::rows : rows_.last;
    for (isize r = first; r < last;) {
      const isize i = r % n, count = n - i < last - r ? n - i : last - r;
      f(segment{r - first, count, rows_.first_head + r / n, i});
      r += count;
    }
  }

  range keys_of_tile(const key_set<Acc>& set, isize t) const noexcept {
    if (set.visible == nullptr) return {set.first, set.count};
    range all{set.count, 0};
    for_segments(t, [&](const segment& g) {
      mask_site at = set.site;
      at.h = g.h;
      const range r = meet(set.visible->keys(at, g.i, g.i + g.count), {set.first, set.count});
      if (!r.empty()) all = {r.first < all.first ? r.first : all.first, r.last > all.last ? r.last : all.last};
    });
    return all;
  }

  /// What tile t sees of keys [j0, j1): one answer, or bits in lanes_ [j - block.j0].
  tile_kind look(const key_set<Acc>& set, isize t, isize j0, isize j1, isize base) noexcept {
    if (set.visible == nullptr) return tile_kind::full;
    bool any = false, all = true;
    for_segments(t, [&](const segment& g) {
      mask_site at = set.site;
      at.h = g.h;
      const tile_kind kind = set.visible->tile(at, g.i, g.i + g.count, j0, j1);
      any = any || kind != tile_kind::empty, all = all && kind == tile_kind::full;
    });
    if (!any) return tile_kind::empty;
    if (all) return tile_kind::full;
    for (isize j = j0; j < j1; ++j) lanes_[j - base] = 0;
    for_segments(t, [&](const segment& g) {
      mask_site at = set.site;
      at.h = g.h;
      std::uint64_t bits[T::keys];
      set.visible->lanes(at, g.i, g.count, j0, j1, bits);
      for (isize j = j0; j < j1; ++j) lanes_[j - base] |= bits[j - j0] << g.lane;
    });
    return tile_kind::partial;
  }

  void fetch(const key_set<Acc>& set, block& x) noexcept {
    x.k = block_of_rows<Arch, Acc>(set.k, x.j0, x.j1, d_, k_, x.k_stride);
    x.v = block_of_rows<Arch, Acc>(set.v, x.j0, x.j1, e_, v_, x.v_stride);
  }

  isize unseen(const key_set<Acc>& set, isize j, isize last) const noexcept {
    return unseen_keys(j, last, T::keys, [&](isize j0, isize j1) {
      bool any = false;
      for (isize t = 0; t < used_; ++t)
        for_segments(t, [&](const segment& g) {
          mask_site at = set.site;
          at.h = g.h;
          any = any || set.visible->tile(at, g.i, g.i + g.count, j0, j1) != tile_kind::empty;
        });
      return any;
    });
  }

  /// False: no row sees a key of the block.
  bool absorb_tile(const key_set<Acc>& set, isize t, block& x) noexcept {
    const range own = meet(keys_of_tile(set, t), {x.j0, x.j1});
    if (own.empty()) return false;
    const tile_kind kind = look(set, t, own.first, own.last, x.j0);
    if (kind == tile_kind::empty) return false;
    if (x.k == nullptr) fetch(set, x);

    detail::panel list[T::most_panels];
    alignas(64) Acc top[T::rows], alpha[T::rows];
    for (isize r = 0; r < T::rows; ++r) top[r] = -std::numeric_limits<Acc>::infinity();
    const isize first = own.first - x.j0, last = own.last - x.j0;
    isize panels = 1;
    if (kind == tile_kind::full && set.modify == nullptr && set.bias == nullptr) {
      scores(t, x, first, last, 0, vectors(t), top);
      list[0] = {static_cast<std::int16_t>(first), static_cast<std::int16_t>(last - first)};
    } else {
      panels = modified_scores(set, t, x, first, last, kind == tile_kind::partial, top, list);
      if (panels == 0) return true;
    }
    if (vectors(t) == 1)
      join<1>(list, panels, t, x, top, alpha);
    else if (vectors(t) <= few)
      join<few>(list, panels, t, x, top, alpha);
    else
      join<T::NR>(list, panels, t, x, top, alpha);
    return true;
  }

  /// Exponentials and values of the panels: (m, l, O) of tile t takes them in. NV: the vectors of the tile that hold rows.
  template <int NV>
  void join(const detail::panel* list, isize panels, isize t, const block& x, const Acc* top, Acc* alpha) noexcept {
    detail::exponentials<Arch, Acc, NV>(list, panels, s_, top, m_ + t * T::rows, l_ + t * T::rows, alpha);
    const tile::balanced columns(e_, T::MR);
    isize c = 0;
    for (isize g = 0; g < columns.groups; ++g) {
      const isize count = columns.size(g);
      tile::with_constant<T::MR>(count, [&](auto m) {
        detail::value_panels<Arch, Acc, m, NV>(list, panels, x.v + c, x.v_stride, s_, lanes_, alpha,
                                               ot_ + (t * e_ + c) * T::rows, g, k_ahead_);
      });
      c += count;
    }
  }

  /// Panel by panel: what no row sees is left out, what is modified or partly seen is masked. Returns the runs of keys in `list`.
  isize modified_scores(const key_set<Acc>& set, isize t, const block& x, isize first, isize last, bool partial,
                        Acc* top, detail::panel* list) noexcept {
    const bool changed = set.modify != nullptr || set.bias != nullptr;
    const std::uint64_t every = live_lanes(t);
    const tile::balanced split(last - first, T::MR);
    isize runs = 0, k = first;
    for (isize g = 0, count = 0; g < split.groups; ++g, k += count) {
      count = T::wide ? (last - k < T::MR ? last - k : T::MR) : split.size(g);
      if (!partial)
        for (isize y = k; y < k + count; ++y) lanes_[y] = every;
      std::uint64_t any = 0, all = every;
      for (isize y = k; y < k + count; ++y) any |= lanes_[y], all &= lanes_[y];
      if (any == 0) continue;
      const bool masked = all != every;
      alignas(64) Acc unused[T::rows] = {};
      // Vectors of the tile that no row of this panel needs are left out (the causal diagonal, the far edge of a window).
      isize v0 = 0, v1 = vectors(t);
      while ((any >> (v0 * T::W) & whole) == 0) ++v0;
      while ((any >> ((v1 - 1) * T::W) & whole) == 0) --v1;
      scores(t, x, k, k + count, v0, v1, masked || changed ? unused : top);
      if (changed) modify(set, t, x.j0 + k, count, s_ + k * T::rows);
      if (masked || changed) detail::mask_panel<Arch, Acc>(k, k + count, lanes_, s_, top);
      for (isize y = k; y < k + count; ++y) extend(list, runs, y, every);
    }
    return runs;
  }

  /// Key y joins the last run, if that ends before y and is seen alike; else it begins a run of its own.
  void extend(detail::panel* list, isize& runs, isize y, std::uint64_t every) const noexcept {
    const std::uint64_t bits = lanes_[y], hidden = every & ~bits;
    if (bits == 0) return;
    detail::seen kind = detail::seen::whole;
    isize edge = 0;
    if (hidden != 0) {
      // Lanes without a row count as seen or not, as it suits.
      const auto first = static_cast<isize>(std::countr_zero(bits)) / T::W,
                 last = static_cast<isize>(63 - std::countl_zero(bits)) / T::W;
      const std::uint64_t behind = first + 1 < T::NR ? ~std::uint64_t{0} << ((first + 1) * T::W) : 0,
                          before = last > 0 ? ~std::uint64_t{0} >> (64 - last * T::W) : 0;
      const bool rising = (hidden & behind) == 0, falling = (hidden & before) == 0;
      kind = rising ? detail::seen::rising : falling ? detail::seen::falling : detail::seen::ragged;
      edge = rising ? first : falling ? last : 0;
    }
    if (runs > 0 && list[runs - 1].first + list[runs - 1].count == y &&
        list[runs - 1].same(kind, static_cast<int>(edge)))
      ++list[runs - 1].count;
    else
      list[runs++] = {static_cast<std::int16_t>(y), 1, kind, static_cast<std::int8_t>(edge)};
  }

  /// Scores of keys [first, last) of the block and vectors [v0, v1) of the tile into s_, their maximum folded into `top`.
  void scores(isize t, const block& x, isize first, isize last, isize v0, isize v1, Acc* top) noexcept {
    const Acc* qt = qt_ + t * d_ * T::rows + v0 * T::W;
    const tile::balanced split(last - first, T::MR);
    tile::with_constant<T::NR>(v1 - v0, [&](auto vectors) {
      const auto run = [&](auto m, isize k, isize panels) FOVEA_INLINE_LAMBDA {
        detail::score_panels<Arch, Acc, m, vectors>(panels, d_, x.k + k * x.k_stride, x.k_stride, qt, T::rows,
                                                    s_ + k * T::rows + v0 * T::W, top + v0 * T::W, v_ahead_);
      };
      // 5 x 4 runs at half the speed of 6 x 4 (g++ 12 reads its vectors of queries from the stack), so that one panel takes what is left.
      const isize size = T::wide ? T::MR : split.small + 1, large = T::wide ? (last - first) / T::MR : split.extra;
      const isize rest = T::wide ? (last - first) % T::MR : split.small;
      const isize others = T::wide ? (rest > 0 ? 1 : 0) : split.groups - split.extra;
      if (large > 0) tile::with_constant<T::MR>(size, [&](auto m) { run(m, first, large); });
      if (others > 0) tile::with_constant<T::MR>(rest, [&](auto m) { run(m, first + large * size, others); });
    });
  }

  void modify(const key_set<Acc>& set, isize t, isize j, isize count, Acc* s) noexcept {
    for (isize y = 0; set.bias != nullptr && y < count; ++y)
      for (isize r = 0; r < T::rows; ++r) s[y * T::rows + r] += set.bias[j + y] * log2e;
    if (set.modify != nullptr)
      for_segments(t, [&](const segment& g) {
        mask_site at = set.site;
        at.h = g.h;
        set.modify->template apply<Acc>(at, g.i, g.count, j, j + count, s + g.lane, T::rows);
      });
  }

  static constexpr std::uint64_t whole = ~std::uint64_t{0} >> (64 - T::W);  // all lanes of a vector
  static constexpr int few = T::NR > 2 ? 2 : T::NR;

  /// Vectors of tile t that hold rows.
  isize vectors(isize t) const noexcept {
    const isize count = ceil_div(rows_.last - rows_.first - t * T::rows, T::W);
    return count < T::NR ? count : T::NR;
  }
  std::uint64_t live_lanes(isize t) const noexcept {
    const isize count = rows_.last - rows_.first - t * T::rows;
    return ~std::uint64_t{0} >> (64 - (count < T::rows ? count : T::rows));
  }

  isize d_, e_, tiles_, used_ = 0;
  detail::rows_ahead<Acc> k_ahead_, v_ahead_;
  query_rows rows_;
  isize wide_;
  Acc *qt_, *ot_, *m_, *l_, *s_, *k_, *v_;
  Acc *rows_of_, *zeros_;  // W rows in Acc, on their way in or out; a row of zeros
  std::uint64_t* lanes_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
