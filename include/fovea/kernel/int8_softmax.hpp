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

#include <fovea/kernel/int8_block.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, int8_recipe R = int8_recipe{}>
class int8_softmax : detail::int8_block<Arch, R> {
  using base = detail::int8_block<Arch, R>;
  using base::at_, base::skip_, base::dp_, base::q_, base::q_scale_, base::l_, base::lost_, base::run_max_;
  using base::K, base::W, base::F, base::none;
  using typename base::P;
  using typename base::T;
  using typename base::tile_of_block;
  using typename base::tiles;

 public:
  /// Rows of a superblock: those of the loop in f32, which computes what this one leaves.
  static isize superblock(isize rows, isize d, isize e) { return online_softmax<Arch, float>::superblock(rows, d, e); }

  int8_softmax(arena& memory, isize rows, isize d, isize e) : base(memory, most(rows, d, e), d), d_(d), e_(e) {
    const isize all = most(rows, d, e);
    o_ = memory.take<float>(all * e), length_ = memory.take<float>(all), m_ = memory.take<float>(all);
    wide_ = dp_ > e ? dp_ : e;
    rows_of_ = memory.take<float>(W * wide_), turned_ = memory.take<float>(W * dp_);
  }

  void begin(query_rows rows, double scale, const float* sinks, float skip = 0) noexcept {
    const bool rotate = rows.rotated || R.rotate, across = rotate && d_ == dp_;
    rows.rotated = rotate && !across;  // row by row
    at_.place(rows), skip_ = skip, longest_ = 0;
    const auto log2e = static_cast<float>(1.4426950408889634074), factor = static_cast<float>(scale) * log2e;
    const isize all = at_.used() * T::rows, count = rows.last - rows.first;
    fresh_ = true;
    for (isize x = 0; R.running_max && x < 2 * all; ++x) run_max_[x] = -32768;
    for (isize r = 0; r < all; ++r) m_[r] = -none, l_[r] = 0, lost_[r] = 0;
    for (isize r = 0; sinks != nullptr && r < count; ++r) m_[r] = sinks[at_.head(r)] * log2e, l_[r] = 255;
    detail::row_extents<Arch> x;
    P longest(0.0F);
    for (isize r = 0; r < all; r += W) {
      detail::turn_rows<Arch>(load(r, count), dp_, across, turned_, x);
      for (isize l = 0; l < W; l += P::size) {
        const P length = P::load(x.length + l), none_of(none);
        const P own = simd::select_greater(none_of, length, length * P(factor * factor), none_of);
        own.store(length_ + r + l), longest = simd::max(longest, own);
        (P::load(x.most + l) * P(factor * detail::int8_grid / 127.0F)).store(q_scale_ + r + l);
      }
      detail::round_turned<Arch, true>(turned_, dp_, x, q_ + r / T::rows * T::rows * dp_ + r % T::rows * 4,
                                       4 * T::rows);
    }
    longest_ = simd::highest(longest);
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
    if (skip_ > 0) return absorb_outwards(set, head);
    for (isize t = 0; t < at_.used(); ++t) absorb_rows(set, head, t);
    fresh_ = false;
  }

  /// `left`: null, or a byte a row: those that are 1 are not written. `skipped` may be null.
  void finish(const tensor_mut& out, const tensor_mut& lse, const tensor_mut& skipped,
              const std::uint8_t* left) noexcept {
    for (isize t = 0; fresh_ && t < at_.used(); ++t) clear(t);
    write(0, at_.rows().last - at_.rows().first, out, lse, skipped, left);
  }

  /// Absorbs the only set of keys, and finishes: O of one tile at a time, which stays in the first-level cache.
  void attend(const key_set<float>& set, const int8_head& head, const tensor_mut& out, const tensor_mut& lse,
              const tensor_mut& skipped, const std::uint8_t* left) noexcept {
    if (skip_ > 0) return absorb(set, head), finish(out, lse, skipped, left);
    together_ = false;
    for (isize t = 0; t < at_.used(); ++t) {
      absorb_rows(set, head, t, out);
      write(t * T::rows, t * T::rows + at_.count(t), out, lse, skipped, left);
    }
    together_ = true;
  }

 private:
  /// O^T of tile t.
  float* sums_of(isize t) const noexcept { return o_ + (together_ ? t : 0) * T::rows * e_; }

  /// O stays in the first-level cache, and K and V, a byte an element, come from the second. With each block some rows of `out` are
  /// asked for.
  void absorb_rows(const key_set<float>& set, const int8_head& head, isize t, const tensor_mut& out = {}) noexcept {
    if (fresh_) clear(t);
    const range own = hull(set, t);
    isize asked = out ? 0 : T::rows;
    for (isize x = own.first / K; x < ceil_div(own.last, K); ++x) {
      for (const isize stop = asked + T::rows / 4; asked < T::rows && asked < stop; ++asked) ask_for(t, asked, out);
      if (!absorb_tile(set, head, x, t)) x += unseen(set, t, (x + 1) * K, own.last) / K;
    }
  }
  /// A row's output, and its query in the superblock before this one: the next one, where blocks go from the last to the first.
  void ask_for(isize t, isize r, const tensor_mut& out) const noexcept {
    if (r >= at_.count(t)) return;
    const query_rows& rows = at_.rows();
    const isize row = t * T::rows + r, before = row - (rows.last - rows.first);
    simd::prefetch_to_write(out.row(rows.b, at_.head(row), at_.row(row)), e_ * static_cast<isize>(size_of(out.type)));
    if (rows.first + before >= 0)
      simd::prefetch(rows.q.row(rows.b, at_.head(before), at_.row(before)),
                     d_ * static_cast<isize>(size_of(rows.q.type)));
  }

  /// Rows [r0, count) of the superblock.
  void write(isize r0, isize count, const tensor_mut& out, const tensor_mut& lse, const tensor_mut& skipped,
             const std::uint8_t* left) noexcept {
    if (r0 >= count) return;
    constexpr isize L = P::size;
    const bool direct = out.type == dtype::f32;
    const isize n = at_.rows().q.length, b = at_.rows().b;
    isize h = at_.head(r0), i = at_.row(r0);
    for (isize r = r0; r < count; r += L) {
      if (direct && r + L < count && i + 2 * L <= n)  // the next rows, while these are turned
        for (isize x = 0; x < L; ++x) simd::prefetch_to_write(out.row(b, h, i + L + x), e_ * 4);
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
      simd::columns_to_rows<float, Arch>(sums_of(r / T::rows) + r % T::rows, T::rows, e_, inverse, to);
      for (isize x = 0; x < L && !direct; ++x)
        if (row[x] != nullptr) simd::store_row<Arch, float>(out.type, to[x], e_, row[x]);
    }
  }

  static isize most(isize rows, isize d, isize e) { return ceil_div(superblock(rows, d, e), T::rows) * T::rows; }

  /// Rows r ... r + W of the superblock, turned to their positions, with zeros up to dp and behind the last one: where they lie,
  /// or in rows_of_.
  detail::rows_apart load(isize r, isize count) noexcept {
    const query_rows& rows = at_.rows();
    const isize before = r < count ? r : 0, n = rows.q.length;
    isize h = at_.head(before), i = at_.row(before);
    if (rows.q.type == dtype::f32 && rows.turn == nullptr && !rows.rotated && d_ == dp_ && r + W <= count &&
        i + W <= n) {
      const isize ld = rows.q.row_stride;
      return {static_cast<const float*>(rows.q.row(rows.b, h, i)), ld, i + 2 * W <= n ? W * ld : 0};
    }
    for (isize l = 0; l < W; ++l) {
      float* row = rows_of_ + l * dp_;
      isize c = 0;
      if (r + l < count) {
        const float* q = load_query<Arch, float>(rows, h, i, d_, row);
        if (q != row) std::memcpy(row, q, static_cast<std::size_t>(d_) * sizeof(float));
        c = d_;
        if (++i == n) ++h, i = 0;
      }
      for (; c < dp_; ++c) row[c] = 0;
    }
    return {rows_of_, dp_};
  }

  /// The keys that tile t sees; those that some tile sees.
  range hull(const key_set<float>& set, isize t) const noexcept {
    if (set.visible == nullptr) return {set.first, set.count};
    range all{set.count, 0};
    at_.for_segments(t, [&](const typename tiles::segment& g) {
      all = both(all, meet(set.visible->keys(tiles::site(set, g), g.i, g.i + g.count), {set.first, set.count}));
    });
    return all;
  }
  range hull(const key_set<float>& set) const noexcept {
    range all{set.count, 0};
    for (isize t = 0; t < at_.used(); ++t) all = both(all, hull(set, t));
    return all;
  }
  static range both(range a, range b) noexcept {
    if (b.empty()) return a;
    return {b.first < a.first ? b.first : a.first, b.last > a.last ? b.last : a.last};
  }

  void clear(isize t) noexcept { std::memset(sums_of(t), 0, static_cast<std::size_t>(T::rows * e_) * sizeof(float)); }

  /// Block 0, then from the last one that the superblock sees back to the first.
  void absorb_outwards(const key_set<float>& set, const int8_head& head) noexcept {
    const range all = hull(set);
    const isize first = all.first / K, last = ceil_div(all.last, K);
    const auto block = [&](isize x) {
      for (isize t = 0; t < at_.used(); ++t) absorb_tile(set, head, x, t);
    };
    for (isize t = 0; fresh_ && t < at_.used(); ++t) clear(t);
    fresh_ = false;
    if (first < last) block(first);
    for (isize x = last - 1; x > first; --x) block(x);
  }

  isize unseen(const key_set<float>& set, isize t, isize j, isize last) const noexcept {
    return unseen_keys(j, last, K, [&](isize j0, isize j1) {
      bool any = false;
      at_.for_segments(t, [&](const typename tiles::segment& g) {
        any = any || set.visible->tile(tiles::site(set, g), g.i, g.i + g.count, j0, j1) != tile_kind::empty;
      });
      return any;
    });
  }

  /// False: no row sees a key of the block.
  bool absorb_tile(const key_set<float>& set, const int8_head& head, isize x, isize t) noexcept {
    const isize j0 = x * K;
    const range own{j0 > set.first ? j0 : set.first, j0 + K < set.count ? j0 + K : set.count};
    tile_of_block at = this->look(set, head, x, t, own);
    if (at.runs == 0) return false;
    alignas(64) std::int16_t top[2 * T::rows];
    alignas(64) float height[T::rows], beta[T::rows], sum[T::rows];
    for (isize r = 0; r < 2 * T::rows; ++r) top[r] = -32768;
    const bool loose = set.modify != nullptr || set.bias != nullptr || dp_ > detail::int8_most_width;
    this->scores(at, loose, top);
    if (loose) this->modify(set, at, own, top, height);
    for (int v = 0; v < at.vectors; ++v) {
      if (!loose) this->heights(t, v, top, height);
      this->weigh(at, v, top + 2 * W * v, sum + v * W);
      settle(t, v, height, beta);
    }
    if (skip_ > 0)
      at.runs = this->drop(at, beta, sum);
    else
      for (isize r = 0; r < at.vectors * W; r += P::size) {
        float* l = l_ + t * T::rows + r;
        simd::fma(P::load(sum + r), P::load(beta + r), P::load(l)).store(l);
      }
    if (at.runs > 0) add_values(at, beta);
    return true;
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
    float* o = sums_of(t) + v * W;
    for (isize c = 0; c < e_; ++c, o += T::rows)
      for (isize lane = 0; lane < W; lane += P::size) (P::load(o + lane) * P::load(alpha + lane)).store(o + lane);
  }

  void add_values(const tile_of_block& at, const float* beta) noexcept {
    const isize ep = at.head.ep;
    const std::int8_t* v = at.head.v + at.x * K * ep;
    const float* channel = R.fold ? nullptr : at.head.channel + at.x * ep;
    const detail::int8_run* runs = skip_ > 0 ? this->kept_ : this->runs_;
    const tile::balanced columns(e_, T::MR);
    isize c = 0;
    for (isize g = 0; g < columns.groups; ++g) {
      const isize count = columns.size(g);
      float* o = sums_of(at.t) + c * T::rows;
      tile::with_constant<T::MR>(count, [&](auto m) {
        const auto run = [&](auto nv) {
          const float* own = R.fold ? nullptr : channel + c;
          if (nv == T::NR && at.runs == 1 && runs[0].v0 == 0 && runs[0].v1 == T::NR)
            detail::int8_values<Arch, m, T::NR, R.fold, true>(runs, 1, v + 4 * c, 4 * ep, this->p_, beta, own, o);
          else
            detail::int8_values<Arch, m, nv, R.fold, false>(runs, at.runs, v + 4 * c, 4 * ep, this->p_, beta, own, o);
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

  isize d_, e_, wide_;
  float longest_ = 0;
  bool fresh_ = true;     // O is not yet zeros
  bool together_ = true;  // O of all tiles is held
  float *o_, *length_, *m_, *rows_of_, *turned_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
