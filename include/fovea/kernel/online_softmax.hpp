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

#include <algorithm>

#include <fovea/kernel/band_runs.hpp>
#include <fovea/kernel/softmax_block.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, class Acc>
class online_softmax : detail::softmax_block<Arch, Acc> {
  using held = detail::softmax_block<Arch, Acc>;
  using held::d_, held::e_, held::used_, held::rows_, held::k_ahead_, held::v_ahead_, held::next_, held::skip_,
      held::s_, held::lanes_;
  using held::fetch, held::for_segments, held::join, held::keys_of_tile, held::live_lanes, held::modified_scores,
      held::scores, held::vectors;
  using typename held::block, typename held::P, typename held::segment, typename held::T;
  static constexpr int few = held::few;

 public:
  static constexpr isize tile_rows = T::rows, block_keys = T::keys;  ///< what `skip` decides by: reference_skip.hpp
  using held::superblock, held::resume, held::suspend, held::finish;

  /// Scratch of one superblock.
  online_softmax(arena& memory, isize rows, isize d, isize e) : held(memory, rows, d, e) {}

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
    if (hull.empty()) return;
    if (const key_band band = band_of(set, hull); band.any()) return absorb_band(set, band);
    held::turn_back();
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
    const isize low = hull.first / T::keys * T::keys, high = (hull.last - 1) / T::keys * T::keys;
    const auto one = [&](isize j0, isize next) {
      block rows{j0, j0 + T::keys < hull.last ? j0 + T::keys : hull.last, nullptr, nullptr, 0, 0};
      next_block(set, next, hull.last);
      for (isize t = 0; t < used_; ++t) absorb_tile(set, t, rows);
    };
    if (low == 0) one(0, high);
    for (isize j0 = high; j0 > 0 && j0 >= low; j0 -= T::keys) one(j0, j0 - T::keys);
  }

  /// The band of keys that rows see, where all keys that a superblock sees stay in the L2 cache.
  key_band band_of(const key_set<Acc>& set, range hull) const noexcept {
    const isize count = hull.last - hull.first;
    if (set.visible == nullptr || set.modify != nullptr || set.bias != nullptr || skip_ > Acc(0)) return {};
    if ((used_ == 1 && vectors(0) <= few) || count * (set.k.row_bytes + set.v.row_bytes) > (1 << 20)) return {};
    if (!read_in_place<Acc>(set.k, hull.first, hull.last) || !read_in_place<Acc>(set.v, hull.first, hull.last))
      return {};
    return set.visible->band(set.site);
  }

  /// O may be kept as rows: every tile is of one head, nothing is kept as columns, and columns fill the vectors.
  bool rows_suit(const key_band& band) noexcept {
    const isize n = rows_.q.length, i = rows_.first % n;
    bool suit = e_ % (T::NR * T::W) == 0 && band.last - band.first >= T::rows &&
                (i + rows_.last - rows_.first <= n || n % T::rows == 0);
    for (isize t = 0; t < used_ && !held::by_rows_; ++t) suit = suit && held::fresh_[t];
    held::by_rows_ = held::by_rows_ || suit;
    return suit;
  }

  /// Each tile takes all of its own keys, cut where its own begin, before the next tile does.
  void absorb_band(const key_set<Acc>& set, const key_band& band) noexcept {
    k_ahead_ = v_ahead_ = {}, next_ = {};
    if (!rows_suit(band)) held::turn_back();
    for (isize t = 0; t < used_; ++t) {
      const range keys = keys_of_tile(set, t);
      if (keys.empty()) continue;
      const isize n = rows_.q.length, r = rows_.first + t * T::rows, i = r % n;
      const bool one_head = i + std::min(T::rows, rows_.last - r) <= n;
      const detail::tile_band<T> own{i + band.first, i + band.last, vectors(t)};
      const bool plain = one_head && own.parted();
      // As if the tile were full, and as if there were keys for its last row: what comes behind a row does not move its blocks.
      const isize end = one_head ? own.last + T::rows - 1 : keys.last;
      const tile::balanced split(end - keys.first, T::keys);
      if (plain) next_tile(set, t, keys);
      isize j = keys.first;
      for (isize g = 0; j < keys.last; j += split.size(g), ++g) {
        block x{j, std::min(j + split.size(g), keys.last), nullptr, nullptr, 0, 0};
        if (plain)
          absorb_runs(set, t, own, x);
        else
          absorb_tile(set, t, x);
      }
    }
  }

  /// Keys behind those of tile t, and its rows of the output, will be asked for with its panels.
  void next_tile(const key_set<Acc>& set, isize t, range keys) noexcept {
    const isize panels = ceil_div(keys.last - keys.first, T::MR), count = std::min(T::rows, set.count - keys.last);
    next_ = {};
    if (set.count * (set.k.row_bytes + set.v.row_bytes) > (512 << 10) && count > 0) {
      next_.k = detail::rows_at(set.k.at(keys.last).data, set.k.row_bytes, d_ * isize{sizeof(Acc)}, count);
      next_.v = detail::rows_at(set.v.at(keys.last).data, set.v.row_bytes, e_ * isize{sizeof(Acc)}, count);
      next_.read = ceil_div(next_.k.lines() + next_.v.lines(), panels);
    }
    if (out_.data == nullptr) return;
    const isize n = rows_.q.length, r = rows_.first + t * T::rows, size = static_cast<isize>(size_of(out_.type));
    next_.out = detail::rows_at(out_.row(rows_.b, rows_.first_head + r / n, r % n), out_.row_stride * size, e_ * size,
                                std::min(T::rows, rows_.last - r));
    next_.write = ceil_div(next_.out.lines(), panels);
  }

  /// absorb_tile, where the rows of the tile see a band.
  void absorb_runs(const key_set<Acc>& set, isize t, const detail::tile_band<T>& band, block& x) noexcept {
    detail::panel list[T::most_panels];
    alignas(64) Acc top[T::rows], alpha[T::rows];
    for (isize r = 0; r < T::rows; ++r) top[r] = -std::numeric_limits<Acc>::infinity();
    fetch(set, x);
    const isize panels = band.cut(x.j0, x.j1, lanes_, list);
    for (isize n = 0; n < panels; ++n) {
      const detail::panel& run = list[n];
      const isize first = run.first, last = first + run.count, edge = run.edge;
      if (run.kind == detail::seen::whole) {
        scores(t, x, first, last, 0, band.vectors, top);
        continue;
      }
      const P before = P::load(top + edge * T::W);
      const bool rising = run.kind == detail::seen::rising;
      scores(t, x, first, last, rising ? edge : 0, rising ? band.vectors : edge + 1, top);
      before.store(top + edge * T::W);
      detail::mask_vector<Arch, Acc>(first, last, edge, lanes_, s_, top);
    }
    if (held::by_rows_)
      held::join_rows(list, panels, t, x, top, alpha, {band.first - x.j0, band.last - x.j0});
    else
      join(list, panels, t, x, top, alpha);
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
    join(list, panels, t, x, top, alpha);
    return true;
  }

  tensor_mut out_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
