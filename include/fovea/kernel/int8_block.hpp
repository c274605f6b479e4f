// SPDX-License-Identifier: MIT
#pragma once
/// @file  One block of keys and one tile of queries of attention in int8: what is seen, scores, p, and what p adds to the denominator.
///
///   look -> scores (-> modify) -> heights -> weigh -> drop        of kernel/int8_softmax.hpp, whose base this is
///
/// Contract   a part is 16 keys. Where all rows of a vector see all keys of a part its denominator is counted in integers; elsewhere,
///            and where p is too coarse for it, in f32: so that a row depends on nothing that it does not see.

#include <fovea/kernel/int8_panels.hpp>
#include <fovea/kernel/query_tiles.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

namespace detail {
template <class Arch, int8_recipe R>
struct int8_query_tile {
  static constexpr isize rows = int8_tile<Arch>::rows, W = int8_tile<Arch>::W, keys = R.keys;
};

template <class Arch, int8_recipe R>
class int8_block {
 protected:
  using T = int8_tile<Arch>;
  using P = simd::pack<float, Arch>;
  using word = simd::words<Arch>;
  using tiles = query_tiles<Arch, float, int8_query_tile<Arch, R>>;
  static constexpr isize W = T::W, K = R.keys, parts = K / int8_part;
  static constexpr int F = simd::float_packs<Arch>;
  static constexpr float none = std::numeric_limits<float>::infinity();
  static_assert(K % int8_part == 0 && K <= 512);

  /// Groups of four keys, of 16 keys: those that some row of the tile needs of a vector, and those that all its rows see.
  struct view_of_part {
    std::uint8_t needed, full;
  };
  struct tile_of_block {
    const int8_head& head;
    isize x, t;  // of block and tile
    int vectors;
    bool whole;  // everything is seen
    isize runs;
  };

  int8_block(arena& memory, isize all, isize d) : dp_(int8_width(d)) {
    q_ = memory.take<std::uint8_t>(all * dp_), q_scale_ = memory.take<float>(all);
    l_ = memory.take<float>(all), lost_ = memory.take<float>(all);
    run_max_ = memory.take<std::int16_t>(R.running_max ? 2 * all : 0);
    s_ = memory.take<std::int16_t>(K * T::rows), p_ = memory.take<std::uint8_t>(K * T::rows);
    f_ = memory.take<float>(K * T::rows), mass_ = memory.take<float>(parts * T::rows);
    lanes_ = memory.take<std::uint64_t>(K);
    runs_ = memory.take<int8_run>(K / 4), kept_ = memory.take<int8_run>(K / 4 * 2);
  }

  /// What tile t sees of block x; `own`: its keys in the set. No runs: nothing.
  tile_of_block look(const key_set<float>& set, const int8_head& head, isize x, isize t, range own) noexcept {
    const isize j0 = x * K;
    range seen;
    const tile_kind kind = at_.see(set, t, own.first, own.last, lanes_ + (own.first - j0), seen);
    tile_of_block at{head, x, t, static_cast<int>(ceil_div(at_.count(t), W)), false, 0};
    if (kind == tile_kind::empty) return at;
    at.whole = kind == tile_kind::full && seen.last - seen.first == K;
    at.runs = 1;
    runs_[0] = {0, static_cast<std::int16_t>(K / 4), 0, static_cast<std::int8_t>(at.vectors), false};
    if (at.whole) return at;
    for (isize j = 0; j < own.first - j0; ++j) lanes_[j] = 0;
    for (isize j = own.last - j0; j < K; ++j) lanes_[j] = 0;
    at.runs = cut(at_.live(t));
    return at;
  }

  /// Runs of groups that the same vectors need, out of the bits of `lanes_`.
  isize cut(std::uint64_t live) noexcept {
    constexpr std::uint64_t all_lanes = ~std::uint64_t{0} >> (64 - W);
    const int last = (63 - std::countl_zero(live)) / static_cast<int>(W) + 1;
    for (isize y = 0; y < parts * T::NR; ++y) view_[y] = {0, 0};
    isize count = 0;
    const auto add = [&](isize g, int groups, int v0, int v1, bool masked) {
      int8_run* back = runs_ + count - 1;
      if (count > 0 && back->first + back->count == g && back->v0 == v0 && back->v1 == v1 && back->masked == masked)
        back->count = static_cast<std::int16_t>(back->count + groups);
      else
        runs_[count++] = {static_cast<std::int16_t>(g), static_cast<std::int16_t>(groups), static_cast<std::int8_t>(v0),
                          static_cast<std::int8_t>(v1), masked};
    };
    for (isize y = 0; y < parts; ++y) {
      std::uint64_t some = 0, each = ~std::uint64_t{0};
      for (isize j = y * int8_part; j < (y + 1) * int8_part; ++j) some |= lanes_[j], each &= lanes_[j];
      if (some == 0) continue;
      if (each == live) {
        for (int v = 0; v < last; ++v) view_[y * T::NR + v] = {15, 15};
        add(4 * y, 4, 0, last, false);
        continue;
      }
      for (isize g = 4 * y; g < 4 * y + 4; ++g) {
        const std::uint64_t* bits = lanes_ + 4 * g;
        const std::uint64_t any = bits[0] | bits[1] | bits[2] | bits[3], all = bits[0] & bits[1] & bits[2] & bits[3];
        if (any == 0) continue;
        const int v0 = std::countr_zero(any) / static_cast<int>(W),
                  v1 = (63 - std::countl_zero(any)) / static_cast<int>(W) + 1;
        bool masked = false;
        for (int v = v0; v < v1; ++v) {
          view_of_part& own = view_[y * T::NR + v];
          const auto bit = static_cast<std::uint8_t>(1U << (g % 4));
          const bool full = (((all ^ live) >> (v * W)) & all_lanes) == 0;
          own.needed |= bit, own.full |= full ? bit : std::uint8_t{0};
          masked = masked || !full;
        }
        add(g, 1, v0, v1, masked);
      }
    }
    return count;
  }

  void scores(const tile_of_block& at, bool loose, std::int16_t* top) noexcept {
    using kind = int8_scoring;
    const isize j0 = at.x * K;
    for (isize n = 0; n < at.runs; ++n) {
      const int8_run& run = runs_[n];
      const isize lane = run.v0 * W;
      const int8_operands x{at.head.k + j0 * dp_,
                            at.head.offset + j0,
                            at.head.k_scale + j0,
                            at.head.k_shift + j0,
                            at.head.fold + j0,
                            q_ + at.t * T::rows * dp_ + lane * 4,
                            q_scale_ + at.t * T::rows + lane,
                            lanes_,
                            static_cast<int>(lane)};
      tile::with_constant<T::NR>(run.v1 - run.v0, [&](auto nv) {
        std::int16_t *s = s_ + 2 * lane, *most = top + 2 * lane;
        if (loose)
          int8_scores<Arch, nv, kind::loose>(x, run.first, run.count, dp_, s, most, f_ + lane);
        else if (run.masked && dp_ == 64)
          int8_scores<Arch, nv, kind::masked, 64>(x, run.first, run.count, dp_, s, most, nullptr);
        else if (run.masked)
          int8_scores<Arch, nv, kind::masked>(x, run.first, run.count, dp_, s, most, nullptr);
        else if (nv == T::NR && dp_ == 64)
          int8_scores<Arch, T::NR, kind::plain, 64>(x, run.first, run.count, dp_, s, most, nullptr);
        else if (nv == T::NR && dp_ == 128)
          int8_scores<Arch, T::NR, kind::plain, 128>(x, run.first, run.count, dp_, s, most, nullptr);
        else
          int8_scores<Arch, nv, kind::plain>(x, run.first, run.count, dp_, s, most, nullptr);
      });
    }
  }

  /// Scores as floats: bias and score modification, then the grid. Keys of the block are `own` of the head.
  void modify(const key_set<float>& set, const tile_of_block& at, range own, std::int16_t* top,
              float* height) noexcept {
    const auto log2e = static_cast<float>(1.4426950408889634074);
    const isize j0 = at.x * K;
    for (isize n = 0; n < at.runs; ++n) {
      const range keys = meet(own, {j0 + 4 * runs_[n].first, j0 + 4 * (runs_[n].first + runs_[n].count)});
      float* f = f_ + (keys.first - j0) * T::rows;
      for (isize j = keys.first; set.bias != nullptr && j < keys.last; ++j)
        for (isize r = 0; r < T::rows; ++r) f[(j - keys.first) * T::rows + r] += set.bias[j] * log2e;
      if (set.modify != nullptr && !keys.empty())
        at_.for_segments(at.t, [&](const typename tiles::segment& g) {
          set.modify->template apply<float>(tiles::site(set, g), g.i, g.count, keys.first, keys.last, f + g.lane,
                                            T::rows);
        });
    }
    for (int v = 0; v < at.vectors; ++v) {
      isize first = K / 4, last = 0;
      for (isize n = 0; n < at.runs; ++n) {
        const int8_run& run = runs_[n];
        if (v < run.v0 || v >= run.v1) continue;
        first = run.first < first ? run.first : first;
        last = run.first + run.count > last ? run.first + run.count : last;
      }
      for (isize l = v * W; l < (v + 1) * W; ++l) height[l] = -none, top[2 * l] = top[2 * l + 1] = 0;
      if (first < last)
        int8_from_floats<Arch>(first, last - first, f_ + v * W, at.head.fold + j0, lanes_, v * W, s_ + 2 * v * W,
                               height + v * W);
      for (isize l = v * W; l < (v + 1) * W; ++l) height[l] *= 1.0F / int8_grid;
    }
  }

  /// The maximum of a vector's rows: on both keys of a pair, and in octaves.
  void heights(isize t, int v, std::int16_t* top, float* height) noexcept {
    word most = word::load(top + 2 * W * v);
    most = simd::max_i16(most, simd::swap_i16(most));
    if constexpr (R.running_max) {
      std::int16_t* past = run_max_ + 2 * (t * T::rows + v * W);
      most = simd::max_i16(most, word::load(past));
      most.store(past);
    }
    most.store(top + 2 * W * v);
    const word level = simd::high_i16(most);
    tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
      const P h = simd::to_float(level, z);
      simd::select_greater(h, P(-32767.5F), h * P(1.0F / int8_grid), P(-none)).store(height + v * W + z * P::size);
    });
  }

  /// p of one vector, and what it adds to the denominator, in `sum` and for each 16 keys in `mass_`.
  FOVEA_NOINLINE void weigh(const tile_of_block& at, int v, const std::int16_t* top, float* sum) noexcept {
    const isize lane = (at.t * T::rows + v * W) % int8_part;
    const std::int16_t* s = s_ + 2 * v * W;
    const std::uint8_t* weight = at.head.weight + at.x * K * 2;
    const int8_head::part* part = at.head.parts + at.x * parts;
    const word most = word::load(top);
    float coarsest = 0;
    P all[F];
    tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { all[z] = P(0.0F); });
    for (isize y = 0; y < parts; ++y) {
      float* mass = mass_ + y * T::rows + v * W;
      const view_of_part own = at.whole ? view_of_part{15, 15} : view_[y * T::NR + v];
      word low = word::splat(0), high = low;
      if (own.needed == 15)
        int8_part_weights<Arch, R>(4 * y, 4, s, most, weight, lane, p_ + 4 * v * W, low, high);
      else
        for (isize g = 0; g < 4; ++g)
          if ((own.needed >> g & 1) != 0)
            int8_part_weights<Arch, R>(4 * y + g, 1, s, most, weight, lane, p_ + 4 * v * W, low, high);
      const bool counts = own.full == 15 && part[y].step > 0;
      const P step(counts ? part[y].step : 0);
      if (counts && part[y].coarsest > coarsest) coarsest = part[y].coarsest;
      tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
        const P share = simd::fma(simd::to_float(high, z), P(256.0F), simd::to_float(low, z)) * step;
        share.store(mass + z * P::size);
      });
      if (!counts && own.needed != 0) exact(at, y, own.needed, s, top, mass);
      tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA { all[z] = all[z] + P::load(mass + z * P::size); });
    }
    P coarse(0.0F);
    tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
      all[z].store(sum + z * P::size);
      coarse = simd::max(coarse, simd::select_greater(P(coarsest * int8_least_sum), all[z], P(1.0F), P(0.0F)));
    });
    if (simd::highest(coarse) > 0) count_exactly(at, v, coarsest * int8_least_sum, s, top, sum);
  }

  /// The denominators of 16 keys in f32.
  void exact(const tile_of_block& at, isize y, unsigned groups, const std::int16_t* s, const std::int16_t* top,
             float* mass) const noexcept {
    for (isize l = 0; l < W; ++l) mass[l] = 0;
    const float* inverse = at.head.inverse + at.x * K;
    if (groups == 15) return exact_sum<Arch>(4 * y, 4, s, top, inverse, mass);
    for (isize g = 0; g < 4; ++g)
      if ((groups >> g & 1) != 0) exact_sum<Arch>(4 * y + g, 1, s, top, inverse, mass);
  }
  /// Rows whose sum is below `least`, a few steps of p of a key with tiny values: p has lost too much of them.
  FOVEA_NOINLINE void count_exactly(const tile_of_block& at, int v, float least, const std::int16_t* s,
                                    const std::int16_t* top, float* sum) noexcept {
    alignas(64) float mass[W], all[W] = {};
    for (isize y = 0; y < parts; ++y) {
      const unsigned needed = at.whole ? 15U : view_[y * T::NR + v].needed;
      if (needed == 0) continue;
      exact(at, y, needed, s, top, mass);
      for (isize l = 0; l < W; ++l) {
        all[l] += mass[l];
        if (sum[l] < least) mass_[y * T::rows + v * W + l] = mass[l];
      }
    }
    for (isize l = 0; l < W; ++l)
      if (sum[l] < least) sum[l] = all[l];
  }

  /// Leaves out the tiles of 16 x 16 whose share is below `skip_` in every row; counts all masses. Returns the runs that are left.
  FOVEA_NOINLINE isize drop(const tile_of_block& at, const float* beta, const float* sum) noexcept {
    constexpr int side = static_cast<int>(int8_part / W);  // vectors of 16 rows
    std::uint32_t keep[parts] = {};                        // bits: vectors
    const auto each = [&](const auto& f) {                 // (vector, first row of the tile, share of a part)
      for (isize r = 0; r < at.vectors * W; r += P::size) {
        const auto live = static_cast<simd::lane_bits>(at_.live(at.t) >> r);
        f(static_cast<int>(r / W), r, [&, r](isize y) FOVEA_INLINE_LAMBDA {
          return simd::select(live, P::load(mass_ + y * T::rows + r) * P::load(beta + r), P(0.0F));
        });
      }
    };
    each([&](int v, isize r, const auto& share) {
      const P total = simd::fma(P::load(sum + r), P::load(beta + r), P::load(l_ + at.t * T::rows + r));
      const std::uint32_t rows = ((1U << side) - 1U) << (v / side * side);
      for (isize y = 0; y < parts; ++y)
        if (simd::highest(share(y) - total * P(skip_)) > 0) keep[y] |= rows;
    });
    each([&](int v, isize r, const auto& share) {
      P l = P::load(l_ + at.t * T::rows + r), lost = P::load(lost_ + at.t * T::rows + r);
      const P all = P::load(sum + r) * P::load(beta + r);
      l = l + (all - all);  // NaN stays
      for (isize y = 0; y < parts; ++y)
        ((keep[y] >> v & 1) != 0 ? l : lost) = ((keep[y] >> v & 1) != 0 ? l : lost) + share(y);
      l.store(l_ + at.t * T::rows + r), lost.store(lost_ + at.t * T::rows + r);
    });
    return left_runs(at, keep);
  }
  /// Runs without what is left out, in kept_.
  isize left_runs(const tile_of_block& at, const std::uint32_t* keep) noexcept {
    isize left = 0;
    const auto add = [&](isize g, isize stop, int v0, int v1) {
      int8_run* back = kept_ + left - 1;
      if (left > 0 && back->first + back->count == g && back->v0 == v0 && back->v1 == v1)
        back->count = static_cast<std::int16_t>(back->count + stop - g);
      else
        kept_[left++] = {static_cast<std::int16_t>(g), static_cast<std::int16_t>(stop - g),
                         static_cast<std::int8_t>(v0), static_cast<std::int8_t>(v1), false};
    };
    for (isize n = 0; n < at.runs; ++n)
      for (isize g = runs_[n].first, end = g + runs_[n].count; g < end;) {
        const isize stop = (g / 4 + 1) * 4 < end ? (g / 4 + 1) * 4 : end;
        for (int v = runs_[n].v0, v1 = v; v < runs_[n].v1; v = v1 + 1) {
          for (v1 = v; v1 < runs_[n].v1 && (keep[g / 4] >> v1 & 1) != 0;) ++v1;
          if (v1 > v) add(g, stop, v, v1);
        }
        g = stop;
      }
    return left;
  }

  isize dp_;
  tiles at_;
  float skip_ = 0;
  std::uint8_t *q_, *p_;
  float *q_scale_, *l_, *lost_, *f_, *mass_;
  std::int16_t *run_max_, *s_;
  std::uint64_t* lanes_;
  int8_run *runs_, *kept_;
  view_of_part view_[parts * T::NR];
};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
