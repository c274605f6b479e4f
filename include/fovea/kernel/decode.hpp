// SPDX-License-Identifier: MIT
#pragma once
/// @file  Exact softmax attention of a few query rows that share one KV head: decoding, where reading K and V is the work.
///
/// Vectors lie along d and e; keys come in blocks of 64. Rows of K are read in address order (the hardware prefetcher gives up
/// otherwise), W dot products end in one transposing reduction, and all rows of the query group use a block while it is in L1.
///
/// Contract   up to `most_rows` rows; the result is a partial (m in log2 units, l, o) per row over keys [j0, j1).
/// Numerics   as kernel/online_softmax.hpp.

#include <limits>

#include <fovea/kernel/online_softmax.hpp>
#include <fovea/simd/reduce.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, class Acc>
class decode_rows {
  using P = simd::pack<Acc, Arch>;
  static constexpr isize W = P::size, keys = 64;
  static constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074);

 public:
  static constexpr isize most_rows = 8;

  decode_rows(arena& memory, isize d, isize e)
      : d_(d), e_(e), q_ld_(static_cast<isize>(round_up(static_cast<std::size_t>(d), static_cast<std::size_t>(W)))) {
    q_ = memory.take<Acc>(most_rows * q_ld_);
    s_ = memory.take<Acc>(most_rows * keys);
  }

  /// Loads the rows, times scale * log2(e).
  void begin(const query_rows& rows, double scale) noexcept {
    rows_ = rows;
    count_ = rows.last - rows.first;
    const Acc factor = static_cast<Acc>(scale * 1.4426950408889634074);
    for (isize r = 0; r < count_; ++r) {
      simd::load_row<Arch, Acc>(rows.q.type, rows.q.row(rows.b, head(r), query(r)), d_, q_ + r * q_ld_);
      for (isize c = 0; c < d_; ++c) q_[r * q_ld_ + c] *= factor;
    }
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
    for (isize j = seen.first; j < seen.last; j += keys)
      block(set, j, j + keys < seen.last ? j + keys : seen.last, m, l, o);
  }

 private:
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
      if (set.type == dtype::bf16) return block_of<bf16>(set, j0, j1 - j0, seen, all, m, l, o);
      if (set.type == dtype::f16) return block_of<f16>(set, j0, j1 - j0, seen, all, m, l, o);
    }
    block_of<Acc>(set, j0, j1 - j0, seen, all, m, l, o);
  }

  /// The block's rows are read where they lie, stored as S, and widened in registers.
  template <class S>
  void block_of(const key_set<Acc>& set, isize j0, isize count, const std::uint64_t* seen, bool all, Acc* m, Acc* l,
                Acc* o) noexcept {
    const isize k_ld = set.k_stride, v_ld = set.v_stride;
    const S* k = static_cast<const S*>(set.k) + j0 * k_ld;
    const S* v = static_cast<const S*>(set.v) + j0 * v_ld;
    // While this block's keys are scored its values are on their way, and with the values the next block's keys.
    const S* const next = k + count * k_ld;
    isize r = 0;
    if constexpr (W >= 4)
      for (; r + 4 <= count_; r += 4) scores<4>(k, k_ld, count, r, r == 0 ? v : nullptr, v_ld);
    if constexpr (W >= 2)
      for (; r + 2 <= count_; r += 2) scores<2>(k, k_ld, count, r, r == 0 ? v : nullptr, v_ld);
    for (; r < count_; ++r) scores<1>(k, k_ld, count, r, r == 0 ? v : nullptr, v_ld);

    Acc alpha[most_rows];
    for (r = 0; r < count_; ++r) soften(set, j0, count, r, seen[r], m[r], l[r], alpha[r]);
    if (!all) return masked_values(v, v_ld, count, seen, alpha, o);
    for (r = 0; r + 4 <= count_; r += 4) values<4>(v, v_ld, count, alpha, r, o, r == 0 ? next : nullptr, k_ld);
    for (; r + 2 <= count_; r += 2) values<2>(v, v_ld, count, alpha, r, o, r == 0 ? next : nullptr, k_ld);
    for (; r < count_; ++r) values<1>(v, v_ld, count, alpha, r, o, r == 0 ? next : nullptr, k_ld);
  }

  /// s_[r + y][x] = q[r + y] . K[x] for R rows: W accumulators are W / R keys times R rows, reduced together.
  template <int R, class S>
  FOVEA_NOINLINE void scores(const S* k, isize k_ld, isize count, isize r, const S* ahead, isize ahead_ld) noexcept {
    constexpr int per = static_cast<int>(W) / R;
    const Acc* q = q_ + r * q_ld_;
    for (isize x = 0; x < count; x += per) {
      P acc[W];
      const isize last = count - 1 - x;  // rows behind the end are replaced by the last one; their scores are not used
      tile::unroll<per>([&](auto y) FOVEA_INLINE_LAMBDA {
        const S* row = k + (x + (y < last ? y : last)) * k_ld;
        P sum[R];
        tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA { sum[z] = P(Acc(0)); });
        isize c = 0;
        for (; c + W <= d_; c += W) {
          const P t = simd::load_as<P>(row + c);
          tile::unroll<R>([&](auto z)
                              FOVEA_INLINE_LAMBDA { sum[z] = simd::fma(t, P::load(q + z * q_ld_ + c), sum[z]); });
        }
        if (c < d_) {
          const P t = simd::load_as_n<P>(row + c, d_ - c);
          tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
            sum[z] = simd::fma(t, simd::load_n<P>(q + z * q_ld_ + c, d_ - c), sum[z]);
          });
        }
        tile::unroll<R>([&](auto z) FOVEA_INLINE_LAMBDA {
          simd::keep_order(sum[z]);
          acc[z * per + y] = sum[z];
        });
      });
      if (ahead != nullptr)
        for (isize y = 0; y < per; ++y) simd::prefetch(ahead + (x + y) * ahead_ld, e_ * static_cast<isize>(sizeof(S)));
      Acc lanes[W];
      simd::sum_each(acc).store(lanes);
      const isize real = count - x < per ? count - x : per;
      for (isize z = 0; z < R; ++z)
        for (isize y = 0; y < real; ++y) s_[(r + z) * keys + x + y] = lanes[z * per + y];
    }
  }

  /// Score modification, mask, running maximum and exponentials of one row of a block: s_ becomes P.
  void soften(const key_set<Acc>& set, isize j0, isize count, isize r, std::uint64_t seen, Acc& m, Acc& l,
              Acc& alpha) noexcept {
    Acc* s = s_ + r * keys;
    constexpr Acc none = -std::numeric_limits<Acc>::infinity();
    for (isize x = 0; set.bias != nullptr && x < count; ++x) s[x] += set.bias[j0 + x] * log2e;
    if (set.modify != nullptr) set.modify->template apply<Acc>(site(set, r), query(r), 1, j0, j0 + count, s, 1);
    for (isize x = 0; x < keys; ++x)
      if (x >= count || ((seen >> x) & 1U) == 0) s[x] = none;
    P top(none);
    for (isize x = 0; x < keys; x += W) top = simd::max(top, P::load(s + x));
    const Acc block_top = simd::reduce_max(top), next = m > block_top ? m : block_top;
    const Acc shift = next > static_cast<Acc>(-3e38) ? next : Acc(0);
    Acc a[W];
    simd::exp2(P(m - shift)).store(a);
    alpha = a[0];
    m = next;
    P sum(Acc(0));
    for (isize x = 0; x < keys; x += W) {
      const P p = simd::exp2(P::load(s + x) - P(shift));
      p.store(s + x);
      sum = sum + p;
    }
    l = l * alpha + simd::reduce_add(sum);
  }

  template <int R, class S>
  void values(const S* v, isize v_ld, isize count, const Acc* alpha, isize r, Acc* o, const S* ahead,
              isize ahead_ld) noexcept {
    constexpr int most = R == 1 ? 8 : 4;
    isize c = 0;
    for (; c + most * W <= e_; c += most * W, ahead = nullptr)
      value_columns<R, most>(v + c, v_ld, count, alpha, r, o + c, ahead, ahead_ld);
    for (; c + 4 * W <= e_; c += 4 * W, ahead = nullptr)
      value_columns<R, 4>(v + c, v_ld, count, alpha, r, o + c, ahead, ahead_ld);
    for (; c + W <= e_; c += W, ahead = nullptr)
      value_columns<R, 1>(v + c, v_ld, count, alpha, r, o + c, ahead, ahead_ld);
    if (c < e_) value_edge<R>(v + c, v_ld, count, alpha, r, o + c, e_ - c);
  }

  template <int R, int N, class S>
  FOVEA_NOINLINE void value_columns(const S* v, isize v_ld, isize count, const Acc* alpha, isize r, Acc* o,
                                    const S* ahead, isize ahead_ld) noexcept {
    P acc[R][N];
    tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA {
      tile::unroll<N>([&](auto z)
                          FOVEA_INLINE_LAMBDA { acc[y][z] = P::load(o + (r + y) * e_ + z * W) * P(alpha[r + y]); });
    });
    const Acc* p = s_ + r * keys;
    for (isize x = 0; x < count; ++x, v += v_ld) {
      if (ahead != nullptr) simd::prefetch(ahead + x * ahead_ld, d_ * static_cast<isize>(sizeof(S)));
      tile::unroll<N>([&](auto z) FOVEA_INLINE_LAMBDA {
        const P t = simd::load_as<P>(v + z * W);
        tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA { acc[y][z] = simd::fma(P(p[y * keys + x]), t, acc[y][z]); });
      });
    }
    tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA {
      tile::unroll<N>([&](auto z) FOVEA_INLINE_LAMBDA { acc[y][z].store(o + (r + y) * e_ + z * W); });
    });
  }

  template <int R, class S>
  FOVEA_NOINLINE void value_edge(const S* v, isize v_ld, isize count, const Acc* alpha, isize r, Acc* o,
                                 isize columns) noexcept {
    P acc[R];
    tile::unroll<R>([&](auto y)
                        FOVEA_INLINE_LAMBDA { acc[y] = simd::load_n<P>(o + (r + y) * e_, columns) * P(alpha[r + y]); });
    for (isize x = 0; x < count; ++x) {
      const P t = simd::load_as_n<P>(v + x * v_ld, columns);
      tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA { acc[y] = simd::fma(P(s_[(r + y) * keys + x]), t, acc[y]); });
    }
    tile::unroll<R>([&](auto y) FOVEA_INLINE_LAMBDA { simd::store_n(o + (r + y) * e_, acc[y], columns); });
  }

  /// The edge of a mask: a value is touched only for the rows that see its key, so that NaN stays where it is.
  template <class S>
  void masked_values(const S* v, isize v_ld, isize count, const std::uint64_t* seen, const Acc* alpha,
                     Acc* o) noexcept {
    for (isize r = 0; r < count_; ++r) {
      Acc* to = o + r * e_;
      for (isize c = 0; c < e_; ++c) to[c] *= alpha[r];
      for (isize x = 0; x < count; ++x) {
        if (((seen[r] >> x) & 1U) == 0) continue;
        const Acc p = s_[r * keys + x];
        for (isize c = 0; c < e_; ++c) to[c] += p * static_cast<Acc>(v[x * v_ld + c]);
      }
    }
  }

  isize d_, e_, q_ld_, count_ = 0;
  query_rows rows_;
  Acc *q_, *s_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
