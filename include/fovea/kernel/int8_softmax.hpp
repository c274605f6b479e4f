// SPDX-License-Identifier: MIT
#pragma once
/// @file  Exact attention of a superblock of query rows in int8: the loop of online_softmax.hpp with integer products.
///
///   S = round(64 (s + log2 vscale)),  p = u8(255 2^((S - M) / 64)),  O = O + 2^(M - m) sum p v8,  l = l + 2^(M - m) sum p / vscale
///
/// M is the largest S of a row in a block of keys, m a running maximum that may lie int8_lag octaves behind: O is rescaled only then.
///
/// Contract   as online_softmax: begin, absorb, finish; masks, scores, biases and sinks alike. Rows that see a key with a number that
///            is not finite, or whose scores might leave 16 bits, are named by `in_floats`: the caller computes them in f32 and finish
///            leaves them alone. What a row gets depends on nothing that it does not see. `skip`: a tile of 16 x 16 whose share of the
///            denominator is below it in every row is left out, and counted; blocks then come first, last, last but one, ...
/// Cost       a quarter of the multiplications' time in f32. Scratch independent of m.
/// Reference  softmax/reference_int8.hpp.       Source  docs/mechanisms/int8.md

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
}  // namespace detail

template <class Arch, int8_recipe R = int8_recipe{}>
class int8_softmax {
  using T = detail::int8_tile<Arch>;
  using P = simd::pack<float, Arch>;
  using word = simd::words<Arch>;
  using tiles = query_tiles<Arch, float, detail::int8_query_tile<Arch, R>>;
  static constexpr isize W = T::W, K = R.keys, parts = K / detail::int8_part;
  static constexpr int F = simd::float_packs<Arch>;
  static constexpr float none = std::numeric_limits<float>::infinity();
  static_assert(K % detail::int8_part == 0 && K <= 512);

 public:
  /// Rows of a superblock: those of the loop in f32, which computes what this one leaves.
  static isize superblock(isize rows, isize d, isize e) { return online_softmax<Arch, float>::superblock(rows, d, e); }

  int8_softmax(arena& memory, isize rows, isize d, isize e)
      : d_(d), e_(e), dp_(detail::int8_width(d)), count_(ceil_div(superblock(rows, d, e), T::rows)) {
    const isize all = count_ * T::rows;
    q_ = memory.take<std::uint8_t>(all * dp_);
    o_ = memory.take<float>(all * e);
    q_scale_ = memory.take<float>(all), length_ = memory.take<float>(all);
    m_ = memory.take<float>(all), l_ = memory.take<float>(all), lost_ = memory.take<float>(all);
    run_max_ = memory.take<std::int16_t>(R.running_max ? 2 * all : 0);
    s_ = memory.take<std::int16_t>(K * T::rows), p_ = memory.take<std::uint8_t>(K * T::rows);
    f_ = memory.take<float>(K * T::rows), mass_ = memory.take<float>(parts * T::rows);
    lanes_ = memory.take<std::uint64_t>(K);
    runs_ = memory.take<detail::int8_run>(K / 4), kept_ = memory.take<detail::int8_run>(K / 4 * 2);
    seen_ = memory.take<key_run>(K);
    wide_ = dp_ > e ? dp_ : e;
    rows_of_ = memory.take<float>(W * wide_), bytes_ = memory.take<std::uint8_t>(W * dp_);
  }

  void begin(query_rows rows, double scale, const float* sinks, float skip = 0) noexcept {
    rows.rotated = rows.rotated || R.rotate;
    at_.place(rows), skip_ = skip, longest_ = 0;
    const auto log2e = static_cast<float>(1.4426950408889634074), factor = static_cast<float>(scale) * log2e;
    const isize all = at_.used() * T::rows, count = rows.last - rows.first;
    std::memset(o_, 0, static_cast<std::size_t>(all * e_) * sizeof(float));
    for (isize x = 0; R.running_max && x < 2 * all; ++x) run_max_[x] = -32768;
    detail::row_extents<Arch> x;
    for (isize r = 0; r < all; r += W) {
      load(r < count ? (count - r < W ? count - r : W) : 0, r);
      detail::measure_rows<Arch>(rows_of_, wide_, dp_, x);
      for (isize l = 0; l < W; ++l) {
        const isize y = r + l;
        const bool sound = x.length[l] < none;
        m_[y] = -none, l_[y] = 0, lost_[y] = 0;
        length_[y] = x.length[l] * factor * factor, q_scale_[y] = x.most[l] * (factor * detail::int8_grid / 127.0F);
        if (sinks != nullptr && y < count) m_[y] = sinks[at_.head(y)] * log2e, l_[y] = 255;
        if (!(length_[y] <= longest_)) longest_ = sound ? length_[y] : none;
        float* row = rows_of_ + l * wide_;
        if (!sound) std::memset(row, 0, static_cast<std::size_t>(dp_) * sizeof(float));
        for (isize c = 0; c < dp_; c += W)
          simd::store_low_bytes(detail::rounded_words<Arch>(row + c, P(x.factor[l]), 128.0F), bytes_ + l * dp_ + c);
      }
      turn(q_ + r / T::rows * T::rows * dp_ + r % T::rows * 4);
    }
  }

  /// Which rows of the superblock have to be computed in f32: `rows` [row], when it returns true; else none.
  bool in_floats(const key_set<float>& set, const int8_head& head, std::uint8_t* rows) const noexcept {
    const auto limit =
        static_cast<float>(detail::int8_most_score(d_) * detail::int8_most_score(d_));  // lengths: squared
    float longest = 0;
    const range all = hull(set);
    for (isize x = all.first / K; x < ceil_div(all.last, K); ++x)
      longest = longest > head.longest[x] ? longest : head.longest[x];
    if (longest_ * longest <= limit) return false;  // no: for NaN, too
    bool any = false;
    const isize count = at_.rows().last - at_.rows().first;
    for (isize r = 0; r < count; ++r) {
      mask_site at = set.site;
      at.h = at_.head(r);
      const isize i = at_.row(r);
      range own{set.first, set.count};
      if (set.visible != nullptr) own = meet(own, set.visible->keys(at, i, i + 1));
      rows[r] = 0;
      for (isize j = own.first; j < own.last && rows[r] == 0; ++j)
        if (!(length_[r] * head.length[j] <= limit) && (set.visible == nullptr || set.visible->visible(at, i, j)))
          rows[r] = 1, any = true;
    }
    return any;
  }

  void absorb(const key_set<float>& set, const int8_head& head) noexcept {
    const range all = hull(set);
    const isize first = all.first / K, last = ceil_div(all.last, K);
    const auto block = [&](isize x) {
      for (isize t = 0; t < at_.used(); ++t) absorb_tile(set, head, x, t);
    };
    if (skip_ == 0)
      for (isize x = first; x < last; ++x) block(x);
    else if (first < last) {
      block(first);
      for (isize x = last - 1; x > first; --x) block(x);
    }
  }

  /// `left`: null, or a byte a row: those that are 1 are not written. `skipped` may be null.
  void finish(const tensor_mut& out, const tensor_mut& lse, const tensor_mut& skipped,
              const std::uint8_t* left) noexcept {
    constexpr isize L = P::size;
    const bool direct = out.type == dtype::f32;
    const isize count = at_.rows().last - at_.rows().first, n = at_.rows().q.length, b = at_.rows().b;
    isize h = at_.head(0), i = at_.row(0);
    for (isize r = 0; r < count; r += L) {
      float inverse[L];
      float* to[L];
      void* row[L];
      for (isize x = 0; x < L; ++x) {
        const float l = l_[r + x];
        inverse[x] = l > 0 ? 1.0F / l : l * 0.0F, to[x] = rows_of_ + x * wide_;
        const bool here = r + x < count && (left == nullptr || left[r + x] == 0);
        row[x] = here ? out.row(b, h, i) : nullptr;
        if (here && direct) to[x] = static_cast<float*>(row[x]);
        if (here && lse)
          *static_cast<float*>(lse.row(b, h, i)) = m_[r + x] * 0.69314718055994530942F + std::log(l / 255.0F);
        if (skipped && r + x < count)
          *static_cast<float*>(skipped.row(b, h, i)) =
              here && lost_[r + x] > 0 ? lost_[r + x] / (lost_[r + x] + l) : 0.0F;
        if (++i == n) ++h, i = 0;
      }
      simd::columns_to_rows<float, Arch>(o_ + r / T::rows * T::rows * e_ + r % T::rows, T::rows, e_, inverse, to);
      for (isize x = 0; x < L && !direct; ++x)
        if (row[x] != nullptr) simd::store_row<Arch, float>(out.type, to[x], e_, row[x]);
    }
  }

 private:
  /// Rows [r, r + count) of the superblock, turned, and zeros up to W of them.
  void load(isize count, isize r) noexcept {
    const isize before = r < at_.rows().last - at_.rows().first ? r : 0;
    isize h = at_.head(before), i = at_.row(before);
    for (isize l = 0; l < W; ++l) {
      float* row = rows_of_ + l * wide_;
      isize c = 0;
      if (l < count) {
        const float* q = load_query<Arch, float>(at_.rows(), h, i, d_, row);
        if (q != row) std::memcpy(row, q, static_cast<std::size_t>(d_) * sizeof(float));
        c = d_;
        if (++i == at_.rows().q.length) ++h, i = 0;
      }
      for (; c < dp_; ++c) row[c] = 0;
    }
  }
  /// W rows of bytes -> [dp / 4][rows][4] from one vector on.
  void turn(std::uint8_t* to) const noexcept {
    isize c = 0;
    if constexpr (P::size == W && W > 4)
      for (; c + 4 * W <= dp_; c += 4 * W) {
        P x[W];
        for (isize l = 0; l < W; ++l) x[l] = P::load(reinterpret_cast<const float*>(bytes_ + l * dp_ + c));
        simd::transpose(x);
        for (isize l = 0; l < W; ++l) x[l].store(reinterpret_cast<float*>(to + (c / 4 + l) * 4 * T::rows));
      }
    for (; c < dp_; c += 4)
      for (isize l = 0; l < W; ++l) std::memcpy(to + c * T::rows + 4 * l, bytes_ + l * dp_ + c, 4);
  }

  range hull(const key_set<float>& set) const noexcept {
    if (set.visible == nullptr) return {set.first, set.count};
    range all{set.count, 0};
    for (isize t = 0; t < at_.used(); ++t)
      at_.for_segments(t, [&](const typename tiles::segment& g) {
        const range r = meet(set.visible->keys(tiles::site(set, g), g.i, g.i + g.count), {set.first, set.count});
        if (!r.empty()) all = {r.first < all.first ? r.first : all.first, r.last > all.last ? r.last : all.last};
      });
    return all;
  }

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

  void absorb_tile(const key_set<float>& set, const int8_head& head, isize x, isize t) noexcept {
    const isize j0 = x * K, a = j0 > set.first ? j0 : set.first, b = j0 + K < set.count ? j0 + K : set.count;
    const isize found = at_.look(set, t, a, b, lanes_ + (a - j0), seen_);
    if (found == 0) return;
    tile_of_block at{head, x, t, static_cast<int>(ceil_div(at_.count(t), W)), false, 1};
    at.whole = found == 1 && !seen_[0].masked && seen_[0].count == K;
    if (at.whole) {
      runs_[0] = {0, static_cast<std::int16_t>(K / 4), 0, static_cast<std::int8_t>(at.vectors), false};
    } else {
      for (isize j = 0; j < a - j0; ++j) lanes_[j] = 0;
      for (isize j = b - j0; j < K; ++j) lanes_[j] = 0;
      at.runs = cut(at_.live(t));
    }
    alignas(64) std::int16_t top[2 * T::rows];
    alignas(64) float height[T::rows], beta[T::rows], sum[T::rows];
    for (isize r = 0; r < 2 * T::rows; ++r) top[r] = -32768;
    const bool loose = set.modify != nullptr || set.bias != nullptr || dp_ > detail::int8_most_width;
    scores(at, loose, top);
    if (loose) modify(set, at, {a, b}, top, height);
    for (int v = 0; v < at.vectors; ++v) {
      if (!loose) heights(t, v, top, height);
      weigh(at, v, top + 2 * W * v, sum + v * W);
      settle(t, v, height, beta);
    }
    if (skip_ > 0)
      at.runs = drop(at, beta, sum);
    else
      for (isize r = 0; r < at.vectors * W; r += P::size) {
        float* l = l_ + t * T::rows + r;
        simd::fma(P::load(sum + r), P::load(beta + r), P::load(l)).store(l);
      }
    if (at.runs > 0) add_values(at, beta);
  }

  /// Runs of groups that the same vectors need, out of the bits of `lanes_`.
  isize cut(std::uint64_t live) noexcept {
    constexpr std::uint64_t all_lanes = ~std::uint64_t{0} >> (64 - W);
    for (isize y = 0; y < parts * T::NR; ++y) view_[y] = {0, 0};
    isize count = 0;
    for (isize g = 0; g < K / 4; ++g) {
      const std::uint64_t* bits = lanes_ + 4 * g;
      const std::uint64_t any = bits[0] | bits[1] | bits[2] | bits[3], all = bits[0] & bits[1] & bits[2] & bits[3];
      if (any == 0) continue;
      const auto v0 = static_cast<std::int8_t>(std::countr_zero(any) / W),
                 v1 = static_cast<std::int8_t>((63 - std::countl_zero(any)) / W + 1);
      bool masked = false;
      for (int v = v0; v < v1; ++v) {
        view_of_part& own = view_[g / 4 * T::NR + v];
        const auto bit = static_cast<std::uint8_t>(1U << (g % 4));
        const bool full = (((all ^ live) >> (v * W)) & all_lanes) == 0;
        own.needed |= bit, own.full |= full ? bit : std::uint8_t{0};
        masked = masked || !full;
      }
      detail::int8_run* back = runs_ + count - 1;
      if (count > 0 && back->first + back->count == g && back->v0 == v0 && back->v1 == v1 && back->masked == masked)
        ++back->count;
      else
        runs_[count++] = {static_cast<std::int16_t>(g), 1, v0, v1, masked};
    }
    return count;
  }

  void scores(const tile_of_block& at, bool loose, std::int16_t* top) noexcept {
    using kind = detail::int8_scoring;
    const isize j0 = at.x * K;
    for (isize n = 0; n < at.runs; ++n) {
      const detail::int8_run& run = runs_[n];
      const isize lane = run.v0 * W;
      const detail::int8_operands x{at.head.k + j0 * dp_,
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
          detail::int8_scores<Arch, nv, kind::loose>(x, run.first, run.count, dp_, s, most, f_ + lane);
        else if (run.masked)
          detail::int8_scores<Arch, nv, kind::masked>(x, run.first, run.count, dp_, s, most, nullptr);
        else if (nv == T::NR && dp_ == 64)
          detail::int8_scores<Arch, T::NR, kind::plain, 64>(x, run.first, run.count, dp_, s, most, nullptr);
        else if (nv == T::NR && dp_ == 128)
          detail::int8_scores<Arch, T::NR, kind::plain, 128>(x, run.first, run.count, dp_, s, most, nullptr);
        else
          detail::int8_scores<Arch, nv, kind::plain>(x, run.first, run.count, dp_, s, most, nullptr);
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
        const detail::int8_run& run = runs_[n];
        if (v < run.v0 || v >= run.v1) continue;
        first = run.first < first ? run.first : first;
        last = run.first + run.count > last ? run.first + run.count : last;
      }
      for (isize l = v * W; l < (v + 1) * W; ++l) height[l] = -none, top[2 * l] = top[2 * l + 1] = 0;
      if (first < last)
        detail::int8_from_floats<Arch>(first, last - first, f_ + v * W, at.head.fold + j0, lanes_, v * W,
                                       s_ + 2 * v * W, height + v * W);
      for (isize l = v * W; l < (v + 1) * W; ++l) height[l] *= 1.0F / detail::int8_grid;
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
      simd::select_greater(h, P(-32767.5F), h * P(1.0F / detail::int8_grid), P(-none))
          .store(height + v * W + z * P::size);
    });
  }

  /// p of one vector, and what it adds to the denominator, in `sum` and for each 16 keys in `mass_`.
  FOVEA_NOINLINE void weigh(const tile_of_block& at, int v, const std::int16_t* top, float* sum) noexcept {
    const isize lane = (at.t * T::rows + v * W) % detail::int8_part;
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
        detail::int8_part_weights<Arch, R>(4 * y, 4, s, most, weight, lane, p_ + 4 * v * W, low, high);
      else
        for (isize g = 0; g < 4; ++g)
          if ((own.needed >> g & 1) != 0)
            detail::int8_part_weights<Arch, R>(4 * y + g, 1, s, most, weight, lane, p_ + 4 * v * W, low, high);
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
      coarse = simd::max(coarse, simd::select_greater(P(coarsest * detail::int8_least_sum), all[z], P(1.0F), P(0.0F)));
    });
    if (simd::highest(coarse) > 0) count_exactly(at, v, coarsest * detail::int8_least_sum, s, top, sum);
  }

  /// The denominators of 16 keys in f32.
  void exact(const tile_of_block& at, isize y, unsigned groups, const std::int16_t* s, const std::int16_t* top,
             float* mass) const noexcept {
    for (isize l = 0; l < W; ++l) mass[l] = 0;
    for (isize g = 0; g < 4; ++g)
      if ((groups >> g & 1) != 0) detail::exact_sum<Arch>(4 * y + g, 1, s, top, at.head.inverse + at.x * K, mass);
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

  /// The running maximum takes in the block's where that lies far above it; beta is what the block is multiplied by.
  void settle(isize t, int v, const float* height, float* beta) noexcept {
    const isize r = t * T::rows + v * W;
    alignas(64) float alpha[W];
    P moved(0.0F), started(-none);
    tile::unroll<F>([&](auto z) FOVEA_INLINE_LAMBDA {
      const isize lane = z * P::size;
      const P old = P::load(m_ + r + lane), h = P::load(height + v * W + lane), far = old + P(detail::int8_lag);
      const P next = simd::select_greater(h, far, h, old);
      const P shift = simd::select_greater(next, P(-3e38F), next, P(0.0F));
      simd::exp2(h - shift).store(beta + v * W + lane), simd::exp2(old - shift).store(alpha + lane);
      next.store(m_ + r + lane);
      moved = simd::max(moved, simd::select_greater(h, far, P(1.0F), P(0.0F))), started = simd::max(started, old);
    });
    if (!(simd::highest(moved) > 0)) return;
    for (isize l = 0; l < W; ++l) l_[r + l] *= alpha[l], lost_[r + l] *= alpha[l];
    if (!(simd::highest(started) > -none)) return;
    float* o = o_ + t * T::rows * e_ + v * W;
    for (isize c = 0; c < e_; ++c, o += T::rows)
      for (isize lane = 0; lane < W; lane += P::size) (P::load(o + lane) * P::load(alpha + lane)).store(o + lane);
  }

  /// Leaves out the tiles of 16 x 16 whose share is below `skip_` in every row; counts all masses. Returns the runs that are left.
  isize drop(const tile_of_block& at, const float* beta, const float* sum) noexcept {
    constexpr isize Q = detail::int8_part;
    const isize r0 = at.t * T::rows, count = at_.count(at.t);
    isize left = 0;
    std::uint32_t keep[parts] = {};  // bits: vectors
    for (isize r = 0; r < count; r += Q)
      for (isize y = 0; y < parts; ++y) {
        bool below = true;
        const isize last = r + Q < count ? r + Q : count;
        for (isize x = r; x < last; ++x) {
          const float share = mass_[y * T::rows + x] * beta[x];
          below = below && (share == 0 || share < skip_ * (l_[r0 + x] + sum[x] * beta[x]));
        }
        for (isize v = r / W; !below && v < (r + Q) / W && v < T::NR; ++v) keep[y] |= 1U << v;
        for (isize x = r; x < last; ++x) mass_[y * T::rows + x] *= below ? -beta[x] : beta[x];
      }
    for (isize x = 0; x < count; ++x)
      for (isize y = 0; y < parts; ++y) {
        const float share = mass_[y * T::rows + x];
        (std::signbit(share) ? lost_ : l_)[r0 + x] += std::abs(share);
      }
    for (isize n = 0; n < at.runs; ++n)
      for (isize g = runs_[n].first, end = g + runs_[n].count; g < end;) {
        const isize stop = (g / 4 + 1) * 4 < end ? (g / 4 + 1) * 4 : end;
        for (int v = runs_[n].v0; v < runs_[n].v1; ++v) {
          if ((keep[g / 4] >> v & 1) == 0) continue;
          int v1 = v + 1;
          while (v1 < runs_[n].v1 && (keep[g / 4] >> v1 & 1) != 0) ++v1;
          kept_[left++] = {static_cast<std::int16_t>(g), static_cast<std::int16_t>(stop - g),
                           static_cast<std::int8_t>(v), static_cast<std::int8_t>(v1), false};
          v = v1;
        }
        g = stop;
      }
    return left;
  }

  void add_values(const tile_of_block& at, const float* beta) noexcept {
    const isize ep = at.head.ep;
    const std::int8_t* v = at.head.v + at.x * K * ep;
    const float* channel = R.fold ? nullptr : at.head.channel + at.x * ep;
    const detail::int8_run* runs = skip_ > 0 ? kept_ : runs_;
    const tile::balanced columns(e_, T::MR);
    isize c = 0;
    for (isize g = 0; g < columns.groups; ++g) {
      const isize count = columns.size(g);
      float* o = o_ + (at.t * e_ + c) * T::rows;
      tile::with_constant<T::MR>(count, [&](auto m) {
        const auto run = [&](auto nv) {
          const float* own = R.fold ? nullptr : channel + c;
          if (nv == T::NR && at.runs == 1 && runs[0].v0 == 0 && runs[0].v1 == T::NR)
            detail::int8_values<Arch, m, T::NR, R.fold, true>(runs, 1, v + 4 * c, 4 * ep, p_, beta, own, o);
          else
            detail::int8_values<Arch, m, nv, R.fold, false>(runs, at.runs, v + 4 * c, 4 * ep, p_, beta, own, o);
        };
        if (at.vectors == 1)
          run(tile::constant<1>{});
        else if (at.vectors <= 2)
          run(tile::constant<2>{});
        else
          run(tile::constant<T::NR>{});
      });
      c += count;
    }
  }

  isize d_, e_, dp_, count_, wide_;
  tiles at_;
  float skip_ = 0, longest_ = 0;
  std::uint8_t *q_, *p_, *bytes_;
  float *o_, *q_scale_, *length_, *m_, *l_, *lost_, *f_, *mass_, *rows_of_;
  std::int16_t *run_max_, *s_;
  std::uint64_t* lanes_;
  detail::int8_run *runs_, *kept_;
  key_run* seen_;
  view_of_part view_[parts * T::NR];
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
