// SPDX-License-Identifier: MIT
#pragma once
/// @file  One block of keys against one tile of a superblock: its scores, what a mask or a score changes of them, and the step of (m, l, O).
///
/// Contract   the arithmetic of online_softmax.hpp, which says in which order tiles and blocks meet. No allocation, no threads.

#include <bit>
#include <limits>

#include <fovea/kernel/band_values.hpp>
#include <fovea/kernel/softmax_rows.hpp>
#include <fovea/kernel/threshold_skip.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

template <class Arch, class Acc>
class softmax_block : public softmax_rows<Arch, Acc> {
  using held = softmax_rows<Arch, Acc>;

 protected:
  using held::d_, held::e_, held::used_, held::rows_, held::qt_, held::ot_, held::m_, held::l_, held::lost_,
      held::fresh_, held::by_rows_;
  using T = softmax_tile<Arch, Acc>;
  using P = simd::pack<Acc, Arch>;
  static constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074);

  softmax_block(arena& memory, isize rows, isize d, isize e) : held(memory, rows, d, e) {
    s_ = memory.take<Acc>(T::keys * T::rows);
    k_ = memory.take<Acc>(T::keys * d);
    v_ = memory.take<Acc>(T::keys * e);
    lanes_ = memory.take<std::uint64_t>(T::keys);
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

  void fetch(const key_set<Acc>& set, block& x) noexcept {
    x.k = block_of_rows<Arch, Acc>(set.k, x.j0, x.j1, d_, k_, x.k_stride);
    x.v = block_of_rows<Arch, Acc>(set.v, x.j0, x.j1, e_, v_, x.v_stride);
  }

  /// Exponentials and values of the panels: (m, l, O) of tile t takes them in.
  void join(const panel* list, isize panels, isize t, const block& x, const Acc* top, Acc* alpha) noexcept {
    if (vectors(t) == 1)
      join<1>(list, panels, t, x, top, alpha);
    else if (vectors(t) <= few)
      join<few>(list, panels, t, x, top, alpha);
    else
      join<T::NR>(list, panels, t, x, top, alpha);
  }

  /// The same for rows that see a band, where O is kept as rows. own: the keys of the tile's first row, numbered as those of the block.
  void join_rows(const panel* list, isize panels, isize t, const block& x, const Acc* top, Acc* alpha,
                 range own) noexcept {
    const isize at = t * T::rows, used = rows_.last - rows_.first - at, count = used < T::rows ? used : T::rows;
    if (vectors(t) == 1)
      exponentials<Arch, Acc, 1>(list, panels, s_, top, m_ + at, l_ + at, alpha);
    else if (vectors(t) <= few)
      exponentials<Arch, Acc, few>(list, panels, s_, top, m_ + at, l_ + at, alpha);
    else
      exponentials<Arch, Acc, T::NR>(list, panels, s_, top, m_ + at, l_ + at, alpha);
    const range block_keys{0, x.j1 - x.j0};
    const tile::balanced groups(count, T::MR);
    for (isize c = 0; c < e_; c += T::NR * T::W)
      for (isize g = 0, r = 0; g < groups.groups; r += groups.size(g), ++g) {
        const isize rows = groups.size(g);
        const range keys{own.first + r, own.last + r};
        if (!fresh_[t] && (keys.first >= block_keys.last || keys.last + rows - 1 <= 0)) continue;
        tile::with_constant<T::MR>(rows, [&](auto m) {
          band_values<Arch, Acc, m>(block_keys, keys, x.v + c, x.v_stride, s_ + r, fresh_[t] ? nullptr : alpha + r,
                                    ot_ + (at + r) * e_ + c, e_);
        });
      }
    fresh_[t] = false;
  }

  /// NV: the vectors of the tile that hold rows.
  template <int NV>
  void join(const panel* list, isize panels, isize t, const block& x, const Acc* top, Acc* alpha) noexcept {
    exponentials<Arch, Acc, NV>(list, panels, s_, top, m_ + t * T::rows, l_ + t * T::rows, alpha);
    if (skip_ > Acc(0)) return join_chosen<NV>(list, panels, t, x, alpha);
    for_columns<NV>([&](auto m, isize c) {
      value_panels<Arch, Acc, m, NV>(list, panels, x.v + c, x.v_stride, s_, lanes_, fresh_[t] ? nullptr : alpha,
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
  void join_chosen(const panel* list, isize panels, isize t, const block& x, Acc* alpha) noexcept {
    chosen_keys<Arch, Acc> left;
    choose_keys<Arch, Acc, NV>(list, panels, s_, l_ + t * T::rows, alpha, live_lanes(t), skip_, lost_ + t * T::rows,
                               left);
    if (!left.all) list = left.runs, panels = left.panels;
    const isize count = left.all ? 0 : left.count;
    bool moved = false;
    for (isize r = 0; r < NV * T::W; ++r) moved = moved || alpha[r] != Acc(1);
    if (panels > 0 || (count == 0 && moved && !fresh_[t])) {
      for_columns<NV>([&](auto m, isize c) {
        value_panels<Arch, Acc, m, NV>(list, panels, x.v + c, x.v_stride, s_, lanes_, fresh_[t] ? nullptr : alpha,
                                       ot_ + (t * e_ + c) * T::rows, k_ahead_);
      });
      for (isize r = 0; r < NV * T::W; ++r) alpha[r] = Acc(1);
      fresh_[t] = false;
    }
    if constexpr (NV == T::NR) {
      if (count == 0) return;
      for_columns<NV>([&](auto m, isize c) {
        chosen_values<Arch, Acc, m, NV>(left.keys, count, x.v + c, x.v_stride, s_, fresh_[t] ? nullptr : alpha,
                                        ot_ + (t * e_ + c) * T::rows);
      });
      fresh_[t] = false;
    }
  }

  /// What no row sees is left out, what is modified or partly seen is masked. Returns the runs of keys in `list`.
  isize modified_scores(const key_set<Acc>& set, isize t, const block& x, isize first, isize last, bool partial,
                        Acc* top, panel* list) noexcept {
    const bool changed = set.modify != nullptr || set.bias != nullptr;
    const std::uint64_t every = live_lanes(t);
    for (isize y = first; !partial && y < last; ++y) lanes_[y] = every;
    isize runs = 0;
    for (isize k = first; k < last;) {
      if (lanes_[k] == 0) {
        ++k;
        continue;
      }
      const keys_alike part = alike<T>(lanes_, k, last, every);
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
          mask_vector<Arch, Acc>(part.first, part.last, v, lanes_, s_, top);
      }
    }
    return runs;
  }

  /// Key y, which some row sees, joins the last run, if that ends before y and is seen alike; else it begins a run of its own.
  bool extend(panel* list, isize& runs, isize y, std::uint64_t every) const noexcept {
    const std::uint64_t bits = lanes_[y], hidden = every & ~bits;
    seen kind = seen::whole;
    isize edge = 0;
    if (hidden != 0) {
      // Lanes without a row count as seen or not, as it suits.
      const auto first = static_cast<isize>(std::countr_zero(bits)) / T::W,
                 last = static_cast<isize>(63 - std::countl_zero(bits)) / T::W;
      const std::uint64_t behind = first + 1 < T::NR ? ~std::uint64_t{0} << ((first + 1) * T::W) : 0,
                          before = last > 0 ? ~std::uint64_t{0} >> (64 - last * T::W) : 0;
      const bool rising = (hidden & behind) == 0, falling = (hidden & before) == 0;
      kind = rising ? seen::rising : falling ? seen::falling : seen::ragged;
      edge = rising ? first : falling ? last : 0;
    }
    if (runs > 0 && list[runs - 1].first + list[runs - 1].count == y &&
        list[runs - 1].same(kind, static_cast<int>(edge)))
      ++list[runs - 1].count;
    else
      list[runs++] = {static_cast<std::int16_t>(y), 1, kind, static_cast<std::int8_t>(edge)};
    return kind == seen::ragged;
  }

  /// Scores of keys [first, last) of the block and vectors [v0, v1) of the tile into s_, their maximum folded into `top`.
  void scores(isize t, const block& x, isize first, isize last, isize v0, isize v1, Acc* top) noexcept {
    const Acc* qt = qt_ + t * d_ * T::rows + v0 * T::W;
    tile::with_constant<T::NR>(v1 - v0, [&](auto vectors) {
      constexpr int most = T::panel_keys(vectors);
      const tile::balanced split(last - first, most);
      const auto run = [&](isize size, isize k, isize panels) {
        tile::with_constant<most>(size, [&](auto m) {
          score_panels<Arch, Acc, m, vectors>(panels, d_, x.k + k * x.k_stride, x.k_stride, qt, T::rows,
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
  paced_requests k_ahead_, v_ahead_;
  later next_;
  Acc skip_ = 0;
  Acc *s_, *k_, *v_;
  std::uint64_t* lanes_;
};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
