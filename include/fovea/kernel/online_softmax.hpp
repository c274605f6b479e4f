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
///            `skip`: a key whose share of a row's denominator so far is at most that in every row of a tile is left out of O; blocks then
///            come first, last, last but one, ...; what is left out is counted, and the log-sum-exp is that of all keys.
/// Cost       2 (d + e) flops for each visible (row, key); scratch independent of n and m; no allocation, no threads.
/// Reference  softmax/reference.hpp.       Source  Milakov & Gimelshein, online normalizer calculation for softmax (2018).

#include <bit>
#include <limits>

#include <fovea/kernel/softmax_rows.hpp>
#include <fovea/kernel/threshold_skip.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, class Acc>
class online_softmax : detail::softmax_rows<Arch, Acc> {
  using held = detail::softmax_rows<Arch, Acc>;
  using held::d_, held::e_, held::used_, held::rows_, held::qt_, held::ot_, held::m_, held::l_, held::lost_,
      held::fresh_;
  using T = detail::softmax_tile<Arch, Acc>;
  using P = simd::pack<Acc, Arch>;
  static constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074);

 public:
  static constexpr isize tile_rows = T::rows, block_keys = T::keys;  ///< what `skip` decides by: reference_skip.hpp
  using held::superblock, held::resume, held::finish;

  /// Scratch of one superblock.
  online_softmax(arena& memory, isize rows, isize d, isize e) : held(memory, rows, d, e) {
    s_ = memory.take<Acc>(T::keys * T::rows);
    k_ = memory.take<Acc>(T::keys * d);
    v_ = memory.take<Acc>(T::keys * e);
    lanes_ = memory.take<std::uint64_t>(T::keys);
  }

  /// `sinks` [H], nats: a logit a head that joins the denominator with no value; null: none. `out`, where given, is what `finish`
  /// will write: its lines are asked for ahead. `skip`: see the head of this file; 0: every key counts.
  void begin(const query_rows& rows, double scale, const float* sinks, const tensor_mut& out = {},
             float skip = 0) noexcept {
    out_ = out, skip_ = static_cast<Acc>(skip), next_ = {}, k_ahead_ = v_ahead_ = {};
    held::load(rows, scale, sinks);
  }

  void absorb(const key_set<Acc>& set) noexcept {
    range hull{set.count, 0};
    for (isize t = 0; t < used_; ++t) {
      const range r = keys_of_tile(set, t);
      if (r.empty()) continue;
      hull = {r.first < hull.first ? r.first : hull.first, r.last > hull.last ? r.last : hull.last};
    }
    if (skip_ > Acc(0)) return absorb_outwards(set, hull);
    for (isize j0 = hull.first / T::keys * T::keys; j0 < hull.last; j0 += T::keys) {
      const isize j1 = j0 + T::keys < hull.last ? j0 + T::keys : hull.last;
      block rows{j0, j1, nullptr, nullptr, 0, 0};
      if (used_ == 1 && vectors(0) <= few)
        look_ahead(set, j0, j1);
      else
        next_block(set, j1, hull.last);
      bool any = false;
      for (isize t = 0; t < used_; ++t) any = absorb_tile(set, t, rows) || any;
      if (!any) j0 += unseen(set, j1, hull.last);
    }
  }

 private:
  /// Block 0, where it is seen, then from the last one back.
  void absorb_outwards(const key_set<Acc>& set, range hull) noexcept {
    if (hull.empty()) return;
    const isize low = hull.first / T::keys * T::keys, high = (hull.last - 1) / T::keys * T::keys;
    const auto one = [&](isize j0, isize next) {
      block rows{j0, j0 + T::keys < hull.last ? j0 + T::keys : hull.last, nullptr, nullptr, 0, 0};
      next_block(set, next, hull.last);
      for (isize t = 0; t < used_; ++t) absorb_tile(set, t, rows);
    };
    if (low == 0) one(0, high);
    for (isize j0 = high; j0 > 0 && j0 >= low; j0 -= T::keys) one(j0, j0 - T::keys);
  }

  /// Few rows: the block's values, then the next block's keys, are asked for. Values that will be copied come with the keys.
  void look_ahead(const key_set<Acc>& set, isize j0, isize j1) noexcept {
    v_ahead_ = k_ahead_ = {};
    if (set.count * (set.k.row_bytes + set.v.row_bytes) <= (1 << 20)) return;  // in the L2 cache
    const isize keys = j1 - j0, panel = T::panel_keys(static_cast<int>(vectors(0)));
    const isize j2 = j1 + T::keys < set.count ? j1 + T::keys : set.count;
    const range v = read_in_place<Acc>(set.v, j0, j1) ? range{j0, j1} : range{j1, j2};
    v_ahead_ = {set.v, v.first, v.last, e_, ceil_div(keys, panel) * ceil_div(d_, detail::score_step)};
    if (j1 < j2) k_ahead_ = {set.k, j1, j2, d_, ceil_div(keys, detail::value_step) * ceil_div(e_, panel)};
  }

  struct block {  // keys [j0, j1) of a set, converted when the first tile needs them
    isize j0, j1;
    const Acc *k, *v;
    isize k_stride, v_stride;
  };
  /// Keys and values of the block that begins with key j will be asked for by all tiles together.
  void next_block(const key_set<Acc>& set, isize j, isize last) noexcept {
    next_.k = next_.v = {};
    // What the L2 cache holds anyway needs no asking; rows a multiple of 4 KB apart would drive each other out.
    if (j >= last || set.count * (set.k.row_bytes + set.v.row_bytes) <= (512 << 10)) return;
    const auto find = [&](const row_source& from, isize width) {
      const stretch s = from.at(j);
      const isize most = last - j < T::keys ? last - j : T::keys;
      return detail::rows_at(s.data, from.row_bytes, width * static_cast<isize>(size_of(from.type)),
                             s.count < most ? s.count : most);
    };
    if (set.k.form != row_form::plain) return;
    next_.k = find(set.k, d_), next_.v = find(set.v, e_);
    next_.read = ceil_div(next_.k.lines() + next_.v.lines(), used_ * (T::keys / T::MR));
  }

  /// A quarter of tile t's rows of the output is asked for with each of its last four blocks; `keys`: all of the tile.
  void next_outputs(isize t, range keys, const block& x) noexcept {
    next_.out = {};
    isize behind = keys.last > x.j1 ? ceil_div(keys.last - x.j1, T::keys) : 0;
    if (skip_ > Acc(0) && x.j0 > 0) behind = (x.j0 - 1 - (keys.first < T::keys ? T::keys - 1 : keys.first)) / T::keys;
    constexpr isize quarter = T::rows / 4;
    if (out_.data == nullptr || behind >= 4) return;
    const isize skipped = keys.first >= x.j0 ? 0 : (3 - behind) * quarter;
    const isize n = rows_.q.length, r = rows_.first + t * T::rows + skipped, i = r % n;
    isize count = (4 - behind) * quarter - skipped;
    count = rows_.last - r < count ? rows_.last - r : count;
    if (count <= 0) return;
    const isize size = static_cast<isize>(size_of(out_.type));
    next_.out = detail::rows_at(out_.row(rows_.b, rows_.first_head + r / n, i), out_.row_stride * size, e_ * size,
                                n - i < count ? n - i : count);
    next_.write = ceil_div(next_.out.lines(), T::keys / T::MR / 2);
  }

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
    const range all = keys_of_tile(set, t), own = meet(all, {x.j0, x.j1});
    if (own.empty()) return false;
    const tile_kind kind = look(set, t, own.first, own.last, x.j0);
    if (kind == tile_kind::empty) return false;
    if (x.k == nullptr) fetch(set, x);
    next_outputs(t, all, x);

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
    if (skip_ > Acc(0)) return join_chosen<NV>(list, panels, t, x, alpha);
    for_columns<NV>([&](auto m, isize c) {
      detail::value_panels<Arch, Acc, m, NV>(list, panels, x.v + c, x.v_stride, s_, lanes_, fresh_[t] ? nullptr : alpha,
                                             ot_ + (t * e_ + c) * T::rows, k_ahead_);
    });
    fresh_[t] = false;
  }

  /// f(constant<M>, first column) for groups of as many columns as hide each other's latency.
  template <int NV, class F>
  void for_columns(F&& f) const noexcept {
    const tile::balanced columns(e_, T::panel_keys(NV));
    isize c = 0;
    for (isize g = 0; g < columns.groups; ++g) {
      const isize count = columns.size(g);
      tile::with_constant<T::panel_keys(NV)>(count, [&](auto m) { f(m, c); });
      c += count;
    }
  }

  /// The values of the keys that some row of tile t would miss.
  template <int NV>
  void join_chosen(const detail::panel* list, isize panels, isize t, const block& x, Acc* alpha) noexcept {
    detail::chosen_keys<Arch, Acc> left;
    detail::choose_keys<Arch, Acc, NV>(list, panels, s_, l_ + t * T::rows, alpha, live_lanes(t), skip_,
                                       lost_ + t * T::rows, left);
    if (!left.all) list = left.runs, panels = left.panels;
    const isize count = left.all ? 0 : left.count;
    bool moved = false;
    for (isize r = 0; r < NV * T::W; ++r) moved = moved || alpha[r] != Acc(1);
    if (panels > 0 || (count == 0 && moved && !fresh_[t])) {
      for_columns<NV>([&](auto m, isize c) {
        detail::value_panels<Arch, Acc, m, NV>(list, panels, x.v + c, x.v_stride, s_, lanes_,
                                               fresh_[t] ? nullptr : alpha, ot_ + (t * e_ + c) * T::rows, k_ahead_);
      });
      for (isize r = 0; r < NV * T::W; ++r) alpha[r] = Acc(1);
      fresh_[t] = false;
    }
    if constexpr (NV == T::NR) {
      if (count == 0) return;
      for_columns<NV>([&](auto m, isize c) {
        detail::chosen_values<Arch, Acc, m, NV>(left.keys, count, x.v + c, x.v_stride, s_, fresh_[t] ? nullptr : alpha,
                                                ot_ + (t * e_ + c) * T::rows);
      });
      fresh_[t] = false;
    }
  }

  /// What no row sees is left out, what is modified or partly seen is masked. Returns the runs of keys in `list`.
  isize modified_scores(const key_set<Acc>& set, isize t, const block& x, isize first, isize last, bool partial,
                        Acc* top, detail::panel* list) noexcept {
    const bool changed = set.modify != nullptr || set.bias != nullptr;
    const std::uint64_t every = live_lanes(t);
    for (isize y = first; !partial && y < last; ++y) lanes_[y] = every;
    isize runs = 0;
    for (isize k = first; k < last;) {
      if (lanes_[k] == 0) {
        ++k;
        continue;
      }
      const detail::keys_alike part = detail::alike<T>(lanes_, k, last, every);
      bool ragged = false;
      if (part.all == every && (runs == 0 || list[runs - 1].first + list[runs - 1].count < k)) {
        list[runs++] = {static_cast<std::int16_t>(k), static_cast<std::int16_t>(part.last - k)};
        k = part.last;
      }
      for (; k < part.last; ++k) ragged = extend(list, runs, k, every) || ragged;
      const isize v0 = part.v0, v1 = part.v1;
      if (part.all == every && !changed) {
        scores(t, x, part.first, part.last, v0, v1, top);
        continue;
      }
      alignas(64) Acc own[T::rows];
      for (isize r = 0; r < T::rows; ++r) own[r] = -std::numeric_limits<Acc>::infinity();
      scores(t, x, part.first, part.last, v0, v1, own);
      if (changed) modify(set, t, x.j0 + part.first, part.last - part.first, s_ + part.first * T::rows);
      for (isize v = 0; v < T::NR; ++v) {
        // Vectors outside are computed with a ragged run: they must hold numbers.
        if ((v < v0 || v >= v1) && !ragged) continue;
        const bool plain = !changed && v >= v0 && v < v1 && ((every & ~part.all) >> (v * T::W) & whole) == 0;
        if (plain)
          simd::max(P::load(top + v * T::W), P::load(own + v * T::W)).store(top + v * T::W);
        else
          detail::mask_vector<Arch, Acc>(part.first, part.last, v, lanes_, s_, top);
      }
    }
    return runs;
  }

  /// Key y, which some row sees, joins the last run, if that ends before y and is seen alike; else it begins a run of its own.
  bool extend(detail::panel* list, isize& runs, isize y, std::uint64_t every) const noexcept {
    const std::uint64_t bits = lanes_[y], hidden = every & ~bits;
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
    return kind == detail::seen::ragged;
  }

  /// Scores of keys [first, last) of the block and vectors [v0, v1) of the tile into s_, their maximum folded into `top`.
  void scores(isize t, const block& x, isize first, isize last, isize v0, isize v1, Acc* top) noexcept {
    const Acc* qt = qt_ + t * d_ * T::rows + v0 * T::W;
    tile::with_constant<T::NR>(v1 - v0, [&](auto vectors) {
      constexpr int most = T::panel_keys(vectors);
      const tile::balanced split(last - first, most);
      const auto run = [&](isize size, isize k, isize panels) {
        tile::with_constant<most>(size, [&](auto m) {
          detail::score_panels<Arch, Acc, m, vectors>(panels, d_, x.k + k * x.k_stride, x.k_stride, qt, T::rows,
                                                      s_ + k * T::rows + v0 * T::W, top + v0 * T::W, v_ahead_, next_);
        });
      };
      if (split.extra > 0) run(split.small + 1, first, split.extra);
      if (split.groups > split.extra)
        run(split.small, first + split.extra * (split.small + 1), split.groups - split.extra);
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

  detail::paced_requests k_ahead_, v_ahead_;
  tensor_mut out_;
  detail::later next_;
  Acc skip_ = 0;
  Acc *s_, *k_, *v_;
  std::uint64_t* lanes_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
