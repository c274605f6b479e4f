// SPDX-License-Identifier: MIT
#pragma once
/// @file  Exact softmax attention of a few query rows that share one KV head: decoding, where reading K and V is the work.
///
/// Vectors lie along d and e; keys come in blocks of 64. Rows of K are read in address order (the hardware prefetcher gives up
/// otherwise), W dot products end in one transposing reduction, and all rows of the query group use a block while it is in L1.
///
/// Contract   up to `most_rows` rows; the result is a partial (m in log2 units, l, o) per row over keys [j0, j1).
/// Numerics   as kernel/online_softmax.hpp.

#include <cstring>
#include <limits>

#include <fovea/kernel/online_softmax.hpp>
#include <fovea/kernel/row_pieces.hpp>
#include <fovea/kernel/row_requests.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, class Acc>
class decode_rows {
  using P = simd::pack<Acc, Arch>;
  static constexpr isize W = P::size, keys = 64, s_ld = keys + W;  // scores of a block, and room behind them
  static constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074);

 public:
  static constexpr isize most_rows = 8;

  decode_rows(arena& memory, isize d, isize e)
      : d_(d), e_(e), q_ld_(static_cast<isize>(round_up(static_cast<std::size_t>(d), static_cast<std::size_t>(W)))) {
    q_ = memory.take<Acc>(most_rows * q_ld_);
    s_ = memory.take<Acc>(most_rows * s_ld);
    row_ = memory.take<Acc>(d > e ? d : e);
    k_rows_ = memory.take<std::byte>(keys * d * static_cast<isize>(sizeof(Acc)));
    v_rows_ = memory.take<std::byte>(keys * e * static_cast<isize>(sizeof(Acc)));
    const isize groups = ceil_div(d > e ? d : e, scale_group);  // values that lie in keys have the scales of those
    k_scales_ = memory.take<float>(keys * groups);
    v_scales_ = memory.take<float>(keys * groups);
  }

  /// Loads the rows, times scale * log2(e).
  void begin(const query_rows& rows, double scale) noexcept {
    rows_ = rows;
    count_ = rows.last - rows.first;
    const Acc factor = static_cast<Acc>(scale * 1.4426950408889634074);
    for_groups([&](auto R, isize first) {
      for (isize z = 0; z < R; ++z) {
        const Acc* q = load_query<Arch, Acc>(rows, head(first + z), query(first + z), d_, row_);
        Acc* to = q_ + first * q_ld_ + z * W;  // [q_ld / W][R][W]
        for (isize c = 0; c < q_ld_; c += W)
          for (isize x = 0; x < W; ++x) to[c * R + x] = c + x < d_ ? q[c + x] * factor : Acc(0);
      }
    });
  }

  /// (m, l, o) of the rows over keys [j0, j1) of the set; m, l [rows], o [rows][e] are overwritten.
  void run(const key_set<Acc>& set, isize j0, isize j1, Acc* m, Acc* l, Acc* o) noexcept {
    for (isize r = 0; r < count_; ++r) m[r] = -std::numeric_limits<Acc>::infinity(), l[r] = Acc(0);
    for (isize c = 0; c < count_ * e_; ++c) o[c] = Acc(0);
    range seen = set.visible == nullptr ? range{j0, j1} : range{j1, j0};
    for (isize r = 0; set.visible != nullptr && r < count_; ++r) {
      const range x = meet(set.visible->keys(site(set, r), query(r), query(r) + 1), {j0, j1});
      if (!x.empty()) seen = {x.first < seen.first ? x.first : seen.first, x.last > seen.last ? x.last : seen.last};
    }
    if (set.k.form == row_form::plain && !seen.empty()) {
      const isize second = end_of(set, seen.first);
      detail::touch_pages(set.k, seen.first, end_of(set, second));
      detail::touch_pages(set.v, seen.first, second);
    }
    for (isize j = seen.first; j < seen.last; j += keys)
      block(set, j, j + keys < seen.last ? j + keys : seen.last, m, l, o);
  }

 private:
  /// f(constant<R>, r) for rows r ... r + R - 1 that share the reads: by fours, then what is left.
  template <class F>
  void for_groups(F&& f) const {
    isize r = 0;
    if constexpr (W >= 4)
      for (; r + 4 <= count_; r += 4) f(tile::constant<4>{}, r);
    if constexpr (W >= 4)
      if (r + 3 == count_) return f(tile::constant<3>{}, r);
    if constexpr (W >= 2)
      for (; r + 2 <= count_; r += 2) f(tile::constant<2>{}, r);
    for (; r < count_; ++r) f(tile::constant<1>{}, r);
  }

  isize head(isize r) const noexcept { return rows_.first_head + (rows_.first + r) / rows_.q.length; }
  isize query(isize r) const noexcept { return (rows_.first + r) % rows_.q.length; }
  mask_site site(const key_set<Acc>& set, isize r) const noexcept {
    mask_site at = set.site;
    at.h = head(r);
    return at;
  }

  void block(const key_set<Acc>& set, isize j0, isize j1, Acc* m, Acc* l, Acc* o) noexcept {
    std::uint64_t seen[most_rows];  // bit x: the row sees key j0 + x
    const std::uint64_t every = ~std::uint64_t{0} >> (64 - (j1 - j0));
    bool any = set.visible == nullptr, all = true;
    for (isize r = 0; r < count_; ++r) {
      seen[r] = every;
      if (set.visible == nullptr) continue;
      const tile_kind kind = set.visible->tile(site(set, r), query(r), query(r) + 1, j0, j1);
      if (kind == tile_kind::partial) {
        std::uint64_t bit[keys];
        set.visible->lanes(site(set, r), query(r), 1, j0, j1, bit);
        seen[r] = 0;
        for (isize x = 0; x < j1 - j0; ++x) seen[r] |= (bit[x] & 1U) << x;
      } else if (kind == tile_kind::empty) {
        seen[r] = 0;
      }
      any = any || seen[r] != 0, all = all && seen[r] == every;
    }
    if (!any) return;
    if constexpr (std::is_same_v<Acc, float>) {
      if (set.k.type == dtype::bf16) return block_of<bf16>(set, j0, j1 - j0, seen, all, m, l, o);
      if (set.k.type == dtype::f16) return block_of<f16>(set, j0, j1 - j0, seen, all, m, l, o);
      if (set.k.type == dtype::i8) return block_of<std::int8_t>(set, j0, j1 - j0, seen, all, m, l, o);
    }
    block_of<Acc>(set, j0, j1 - j0, seen, all, m, l, o);
  }

  template <class S>
  static constexpr bool is_i8 = std::is_same_v<S, std::int8_t>;

  template <class S>
  using piece = detail::row_piece<S>;
  template <class S>
  using pieces = detail::row_pieces<S, keys>;

  /// The block's rows are read where they lie, stored as S, and widened in registers.
  template <class S>
  void block_of(const key_set<Acc>& set, isize j0, isize count, const std::uint64_t* seen, bool all, Acc* m, Acc* l,
                Acc* o) noexcept {
    constexpr bool scaled = std::is_same_v<S, std::int8_t>;
    const pieces<S> k(set.k, j0, count, d_, k_rows_, k_scales_), v(set.v, j0, count, e_, v_rows_, v_scales_);
    const isize k_groups = scaled ? set.k.scale_row : 0, v_groups = scaled ? set.v.scale_row : 0;
    // However short: between two steps of a model its weights pass through the caches. Rows that are there cost little to ask for.
    const bool far = set.k.form == row_form::plain;
    const isize j1 = j0 + count, j2 = end_of(set, j1), j3 = end_of(set, j2);
    // While this block's keys are scored its values are on their way, and with the values the next block's keys.
    requests ahead;
    if (far) {
      detail::touch_pages(set.v, j1, j2);
      ahead = {set.v, j0, j1, e_};
    }
    for (isize x = 0; x < k.count; ++x)
      for_groups([&](auto R, isize r) { scores<R>(k.list[x], k_groups, r, far && r == 0 ? &ahead : nullptr); });
    Acc alpha[most_rows];
    for (isize r = 0; r < count_; ++r) {
      if (scaled && set.k.scale_row == 1) scale_by(k, s_ + r * s_ld);
      soften(set, j0, count, r, seen[r], m[r], l[r], alpha[r]);
      if (scaled && set.v.scale_row == 1) scale_by(v, s_ + r * s_ld);
    }
    if (!all) return masked_values(set.v, j0, count, seen, alpha, o);
    if (far) {
      detail::touch_pages(set.k, j2, j3);
      ahead = {set.k, j1, j2, d_};
    }
    for (isize x = 0; x < v.count; ++x) {
      for_groups(
          [&](auto R, isize r) { values<R>(v.list[x], v_groups, alpha, r, o, far && r == 0 ? &ahead : nullptr); });
      for (isize r = 0; r < count_; ++r) alpha[r] = Acc(1);
    }
  }

  using requests = detail::paced_requests;
  static isize end_of(const key_set<Acc>& set, isize j) noexcept { return j + keys < set.count ? j + keys : set.count; }
  /// Asks for as many lines as a step of `Bytes` bytes of other rows reads; step x of many.
  template <isize Bytes>
  FOVEA_INLINE static void ask(requests& ahead, requests::cursor& lines, isize x) noexcept {
    if (Bytes >= 64 || x * Bytes % 64 == 0) ahead.ask<static_cast<int>(ceil_div(Bytes, 64))>(lines);
  }
  /// Narrow rows are asked for once more, 1 KB ahead of their use, into the first-level cache; f32 would gain nothing.
  static isize near_rows(isize bytes) noexcept { return bytes > 256 ? 4 : 1024 / bytes; }
  /// int8 rows with a scale for each group are scaled as they are read; those with one scale in their scores and weights.
  template <bool Grouped>
  FOVEA_INLINE static P scaled(P x, [[maybe_unused]] const float* scales, [[maybe_unused]] isize c) noexcept {
    if constexpr (Grouped)
      return x * P(static_cast<Acc>(scales[c / scale_group]));
    else
      return x;
  }

  /// s_[r + z][x] = q[r + z] . K[x] for R rows: W accumulators are W / R keys times R rows, reduced together.
  template <int R, class S>
  void scores(const piece<S>& from, isize groups, isize r, requests* ahead) noexcept {
    if constexpr (is_i8<S>)
      if (groups > 1) return scores<R, true>(from, groups, r, ahead);
    scores<R, false>(from, groups, r, ahead);
  }
  template <int R, bool Grouped, class S>
  FOVEA_NOINLINE void scores(const piece<S>& from, isize groups, isize r, requests* ahead) noexcept {
    constexpr int per = static_cast<int>(W) / R;
    const Acc* const q = q_ + r * q_ld_;
    const isize whole = d_ / W * W;
    constexpr isize size = static_cast<isize>(sizeof(S));
    const isize near = near_rows(from.ld * size);
    requests::cursor lines = ahead != nullptr ? ahead->now : requests::cursor{};
    // A few lines at a time, between products: a burst would fill the core's few line buffers and stop it.
    const auto ask_row = [&](const S* p, isize columns) FOVEA_INLINE_LAMBDA {
      if (ahead == nullptr) return;
      ask<4 * W * size>(*ahead, lines, 0);
      for (isize c = 0; size < 4 && c < columns; c += 64 / size) simd::prefetch_line(p + c);
    };
    for (isize x = 0; x < from.count; x += per) {
      const isize soon = x + per + near <= from.reach ? near * from.ld : 0;  // behind a page lie other heads
      P acc[W];
      const isize last =
          from.count - 1 - x;  // rows behind the end are replaced by the last one; nobody reads their scores
      const auto at = [&](isize y) FOVEA_INLINE_LAMBDA { return x + (y < last ? y : last); };
      if constexpr (R == 1) {
        // One row after the other, in address order: the hardware prefetcher follows, and the reads are what takes the time.
        for (isize y = 0; y < per; ++y) {
          const S* row = from.rows + at(y) * from.ld;
          const float* scales = Grouped ? from.scales + at(y) * groups : nullptr;
          P sum(Acc(0)), other(Acc(0));
          isize c = 0;
          for (; c + 4 * W <= whole; c += 4 * W) {
            ask_row(row + soon + c, 4 * W);
            tile::unroll<4>([&](auto u) FOVEA_INLINE_LAMBDA {
              P& to = u % 2 == 0 ? sum : other;
              to = simd::fma(scaled<Grouped>(simd::load_as<P>(row + c + u * W), scales, c + u * W),
                             P::load(q + c + u * W), to);
            });
          }
          if (c < d_) ask_row(row + soon + c, d_ - c);
          for (; c < whole; c += W)
            sum = simd::fma(scaled<Grouped>(simd::load_as<P>(row + c), scales, c), P::load(q + c), sum);
          if (c < d_)
            sum = simd::fma(scaled<Grouped>(simd::load_as_n<P>(row + c, d_ - c), scales, c), P::load(q + c), sum);
          acc[y] = sum + other;
        }
      } else {
        // The rows are on their way to L2 since the last block: registers come first, W / R keys at a time.
        const S* row[per];
        const float* scales[per];
        tile::unroll<per>([&](auto y) FOVEA_INLINE_LAMBDA {
          row[y] = from.rows + at(y) * from.ld;
          scales[y] = Grouped ? from.scales + at(y) * groups : nullptr;
          tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA { acc[z * per + y] = P(Acc(0)); });
        });
        // Three rows do not fill a register.
        tile::unroll<static_cast<int>(W) - R * per>([&](auto y) FOVEA_INLINE_LAMBDA { acc[R * per + y] = P(Acc(0)); });
        const auto step = [&](isize c, auto edge) FOVEA_INLINE_LAMBDA {
          P k[per];
          tile::unroll<per>([&](auto y) FOVEA_INLINE_LAMBDA {
            k[y] = scaled<Grouped>(edge ? simd::load_as_n<P>(row[y] + c, d_ - c) : simd::load_as<P>(row[y] + c),
                                   scales[y], c);
          });
          tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
            const P y = P::load(q + c * R + z * W);
            tile::unroll<per>([&](auto u)
                                  FOVEA_INLINE_LAMBDA { acc[z * per + u] = simd::fma(k[u], y, acc[z * per + u]); });
          });
          if (ahead == nullptr) return;
          ask<W * size * per>(*ahead, lines, c / W);
          if (size < 4 && c * size % 64 == 0)
            tile::unroll<per>([&](auto y) FOVEA_INLINE_LAMBDA { simd::prefetch_line(row[y] + soon + c); });
        };
        isize c = 0;
        for (; c < whole; c += W) step(c, std::false_type{});
        if (c < d_) step(c, std::true_type{});
      }
      alignas(64) Acc lanes[W];
      simd::sum_each(acc).store(lanes);
      for (isize z = 0; z < R; ++z)
        std::memcpy(s_ + (r + z) * s_ld + from.first + x, lanes + z * per, per * sizeof(Acc));
    }
    if (ahead != nullptr) ahead->now = lines;
  }

  /// Scale, score modification, mask, running maximum and exponentials of one row of a block: s_ becomes P.
  FOVEA_NOINLINE void soften(const key_set<Acc>& set, isize j0, isize count, isize r, std::uint64_t seen, Acc& m,
                             Acc& l, Acc& alpha) noexcept {
    Acc* s = s_ + r * s_ld;
    constexpr Acc none = -std::numeric_limits<Acc>::infinity();
    for (isize x = 0; set.bias != nullptr && x < count; ++x) s[x] += set.bias[j0 + x] * log2e;
    if (set.modify != nullptr) set.modify->template apply<Acc>(site(set, r), query(r), 1, j0, j0 + count, s, 1);
    for (isize x = count; x < keys; ++x) s[x] = none;
    const std::uint64_t every = ~std::uint64_t{0} >> (64 - count);
    for (isize x = 0; seen != every && x < keys; x += W)
      simd::select(static_cast<simd::lane_bits>(seen >> x), P::load(s + x), P(none)).store(s + x);
    P top(none);
    for (isize x = 0; x < keys; x += W) top = simd::max(top, P::load(s + x));
    const Acc block_top = simd::highest(top), next = m > block_top ? m : block_top;
    const Acc shift = next > static_cast<Acc>(-3e38) ? next : Acc(0);
    alpha = simd::first(simd::exp2(P(m - shift)));
    m = next;
    P sum(Acc(0));
    for (isize x = 0; x < keys; x += W) {
      const P p = simd::exp2(P::load(s + x) - P(shift));
      p.store(s + x);
      sum = sum + p;
    }
    l = l * alpha + simd::reduce_add(sum);
  }
  template <class S>
  static void scale_by(const pieces<S>& from, Acc* s) noexcept {
    for (isize x = 0; x < from.count; ++x)
      for (isize y = 0; y < from.list[x].count; ++y)
        s[from.list[x].first + y] *= static_cast<Acc>(from.list[x].scales[y]);
  }

  template <int R, class S>
  void values(const piece<S>& from, isize groups, const Acc* alpha, isize r, Acc* o, requests* ahead) noexcept {
    if constexpr (is_i8<S>)
      if (groups > 1) return values<R, true>(from, groups, alpha, r, o, ahead);
    values<R, false>(from, groups, alpha, r, o, ahead);
  }
  template <int R, bool Grouped, class S>
  void values(const piece<S>& from, isize groups, const Acc* alpha, isize r, Acc* o, requests* ahead) noexcept {
    constexpr int most = R == 1 ? 8 : 4;
    isize c = 0;
    for (; c + most * W <= e_; c += most * W) value_columns<R, most, Grouped>(from, groups, c, alpha, r, o + c, ahead);
    for (; c + 4 * W <= e_; c += 4 * W) value_columns<R, 4, Grouped>(from, groups, c, alpha, r, o + c, ahead);
    for (; c + W <= e_; c += W) value_columns<R, 1, Grouped>(from, groups, c, alpha, r, o + c, ahead);
    if (c < e_) value_edge<R, Grouped>(from, groups, c, alpha, r, o + c, e_ - c, ahead);
  }

  template <int R, int N, bool Grouped, class S>
  FOVEA_NOINLINE void value_columns(const piece<S>& from, isize groups, isize c, const Acc* alpha, isize r, Acc* o,
                                    requests* ahead) noexcept {
    P acc[R][N];
    tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA {
      tile::unroll<N>([&](auto z)
                          FOVEA_INLINE_LAMBDA { acc[y][z] = P::load(o + (r + y) * e_ + z * W) * P(alpha[r + y]); });
    });
    const Acc* p = s_ + r * s_ld + from.first;
    requests::cursor lines = ahead != nullptr ? ahead->now : requests::cursor{};
    const S* v = from.rows + c;
    constexpr isize size = static_cast<isize>(sizeof(S));
    const isize near = near_rows(from.ld * size);
    for (isize x = 0; x < from.count; ++x, v += from.ld) {
      if (ahead != nullptr) {
        const isize soon = x + near < from.reach ? near * from.ld : 0;
        ask<N * W * size>(*ahead, lines, x);
        for (isize y = 0; size < 4 && y < N * W; y += 64 / size) simd::prefetch_line(v + soon + y);
      }
      tile::unroll<N>([&](auto z) FOVEA_INLINE_LAMBDA {
        const P t = scaled<Grouped>(simd::load_as<P>(v + z * W), from.scales + x * groups, c + z * W);
        tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA { acc[y][z] = simd::fma(P(p[y * s_ld + x]), t, acc[y][z]); });
      });
    }
    if (ahead != nullptr) ahead->now = lines;
    tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA {
      tile::unroll<N>([&](auto z) FOVEA_INLINE_LAMBDA { acc[y][z].store(o + (r + y) * e_ + z * W); });
    });
  }

  template <int R, bool Grouped, class S>
  FOVEA_NOINLINE void value_edge(const piece<S>& from, isize groups, isize c, const Acc* alpha, isize r, Acc* o,
                                 isize columns, requests* ahead) noexcept {
    P acc[R];
    tile::unroll<R>([&](auto y)
                        FOVEA_INLINE_LAMBDA { acc[y] = simd::load_n<P>(o + (r + y) * e_, columns) * P(alpha[r + y]); });
    const Acc* p = s_ + r * s_ld + from.first;
    for (isize x = 0; x < from.count; ++x) {
      if (ahead != nullptr) ask<W* static_cast<isize>(sizeof(S))>(*ahead, ahead->now, x);
      const P t =
          scaled<Grouped>(simd::load_as_n<P>(from.rows + x * from.ld + c, columns), from.scales + x * groups, c);
      tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA { acc[y] = simd::fma(P(p[y * s_ld + x]), t, acc[y]); });
    }
    tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA { simd::store_n(o + (r + y) * e_, acc[y], columns); });
  }

  /// The edge of a mask: a value is touched only for the rows that see its key, so that NaN stays where it is.
  FOVEA_NOINLINE void masked_values(const row_source& from, isize j0, isize count, const std::uint64_t* seen,
                                    const Acc* alpha, Acc* o) noexcept {
    const bool scaled = from.type == dtype::i8;
    for (isize r = 0; r < count_; ++r)
      for (isize c = 0; c < e_; ++c) o[r * e_ + c] *= alpha[r];
    for (isize x = 0; x < count; ++x) {
      std::uint64_t any = 0;
      for (isize r = 0; r < count_; ++r) any |= seen[r] >> x;
      if ((any & 1U) == 0) continue;
      const bool packed = from.form != row_form::plain;  // gathered for this block
      const stretch s = packed ? stretch{v_rows_ + x * e_, nullptr, 1} : from.at(j0 + x);
      if (scaled && from.scale_row == 1)  // the scale is in P
        for (isize c = 0; c < e_; ++c) row_[c] = static_cast<Acc>(reinterpret_cast<const std::int8_t*>(s.data)[c]);
      else if (scaled)
        simd::load_scaled_row<Arch, Acc>(s.data, s.scales, from.scale_row, e_, row_);
      else
        simd::load_row<Arch, Acc>(from.type, s.data, e_, row_);
      for (isize r = 0; r < count_; ++r) {
        if (((seen[r] >> x) & 1U) == 0) continue;
        const Acc p = s_[r * s_ld + x];
        Acc* to = o + r * e_;
        for (isize c = 0; c < e_; ++c) to[c] += p * row_[c];
      }
    }
  }

  isize d_, e_, q_ld_, count_ = 0;
  query_rows rows_;
  Acc *q_, *s_, *row_;
  std::byte *k_rows_, *v_rows_;  // short pages, gathered
  float *k_scales_, *v_scales_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
