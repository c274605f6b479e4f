// SPDX-License-Identifier: MIT
#pragma once
/// @file  The rows of a superblock in the online softmax: Q turned on its way in, (m, l, O) while keys are absorbed, O turned on its way out.
///
///   lane x of tile t is row t R + x of the superblock:   Q^T [tiles][d][R],   O^T [tiles][e][R],   m, l and what was skipped [tiles][R]
///
/// Contract   load, (resume,) finish; scores in units of log2. Rows that saw nothing give zeros and -inf, NaN stays. No allocation.

#include <cmath>
#include <limits>

#include <fovea/core/workspace.hpp>
#include <fovea/kernel/key_set.hpp>
#include <fovea/kernel/softmax_panels.hpp>
#include <fovea/simd/transpose.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

template <class Arch, class Acc>
class softmax_rows {
  using T = softmax_tile<Arch, Acc>;
  using P = simd::pack<Acc, Arch>;
  static constexpr Acc log2e = static_cast<Acc>(1.4426950408889634074), ln2 = static_cast<Acc>(0.69314718055994530942);

 public:
  /// Rows of a superblock: K and V are read (and converted) once for each. 512 for long inputs, while Q and O fit half of L2.
  static isize superblock(isize rows, isize d, isize e) {
    isize most = rows > 512 ? 512 : 256;
    while (most > T::rows && most * (d + e) * static_cast<isize>(sizeof(Acc)) > (512 << 10)) most /= 2;
    return most < T::rows ? T::rows : most;
  }

  /// Scratch of one superblock.
  softmax_rows(arena& memory, isize rows, isize d, isize e) : d_(d), e_(e), wide_(d > e ? d : e) {
    const isize tiles = ceil_div(superblock(rows, d, e), T::rows);
    qt_ = memory.take<Acc>(tiles * d * T::rows);
    ot_ = memory.take<Acc>(tiles * e * T::rows);
    m_ = memory.take<Acc>(tiles * T::rows);
    l_ = memory.take<Acc>(tiles * T::rows);
    lost_ = memory.take<Acc>(tiles * T::rows);
    rows_of_ = memory.take<Acc>(T::W * wide_);
    zeros_ = memory.take<Acc>(d);
    fresh_ = memory.take<std::uint8_t>(tiles);
  }

  /// Q of the superblock, times scale and log2(e), a row to a lane. `sinks`: online_softmax::begin.
  void load(const query_rows& rows, double scale, const float* sinks) noexcept {
    rows_ = rows;
    used_ = ceil_div(rows.last - rows.first, T::rows);
    for (isize c = 0; c < d_; ++c) zeros_[c] = Acc(0);
    const Acc factor = static_cast<Acc>(scale * 1.4426950408889634074);
    const isize n = rows.q.length;
    isize r = rows.first, h = rows.first_head + r / n, i = r % n;
    for (isize t = 0; t < used_; ++t) {
      fresh_[t] = true;
      for (isize lane = 0; lane < T::rows; lane += T::W) {
        const Acc* from[T::W];
        if (r + T::W < rows.last && i + 2 * T::W <= n)  // the next rows, while these are turned
          for (isize l = 0; l < T::W; ++l) simd::prefetch(rows.q.row(rows.b, h, i + T::W + l), d_ * bytes_of_query());
        for (isize l = 0; l < T::W; ++l, ++r) {
          const isize at = t * T::rows + lane + l;
          m_[at] = -std::numeric_limits<Acc>::infinity(), l_[at] = lost_[at] = Acc(0);
          from[l] = zeros_;  // lanes without a row
          if (r >= rows.last) continue;
          from[l] = load_query<Arch, Acc>(rows, h, i, d_, rows_of_ + l * wide_);
          if (sinks != nullptr && sinks[h] > -std::numeric_limits<float>::infinity()) {
            const Acc sink = static_cast<Acc>(sinks[h]) * log2e;
            m_[at] = std::ceil(sink), l_[at] = std::exp2(sink - m_[at]);
          }
          if (++i == n) ++h, i = 0;
        }
        simd::rows_to_columns<Acc, Arch>(from, d_, factor, qt_ + t * d_ * T::rows + lane, T::rows);
      }
    }
  }

  /// After begin: the rows have taken keys in before. o, lse of them, in Acc, as `finish` wrote them; it may write to the same place.
  void resume(const tensor_ref& o, const tensor_ref& lse) noexcept {
    const isize n = rows_.q.length;
    isize r = rows_.first, h = rows_.first_head + r / n, i = r % n;
    for (isize t = 0; t < used_; ++t) {
      fresh_[t] = false;
      for (isize lane = 0; lane < T::rows && r < rows_.last; lane += T::W) {
        const Acc* from[T::W];
        for (isize x = 0; x < T::W; ++x) {
          from[x] = rows_of_;
          if (r >= rows_.last) continue;
          from[x] = static_cast<const Acc*>(o.row(rows_.b, h, i));
          const Acc all = *static_cast<const Acc*>(lse.row(rows_.b, h, i)) * log2e, above = std::ceil(all);
          m_[t * T::rows + lane + x] = above;
          l_[t * T::rows + lane + x] = all == -std::numeric_limits<Acc>::infinity() ? Acc(0) : std::exp2(all - above);
          ++r;
          if (++i == n) ++h, i = 0;
        }
        Acc* to = ot_ + t * e_ * T::rows + lane;
        simd::rows_to_columns<Acc, Arch>(from, e_, Acc(1), to, T::rows);
        const P weight = P::load(l_ + t * T::rows + lane);
        for (isize c = 0; c < e_; ++c) (P::load(to + c * T::rows) * weight).store(to + c * T::rows);
      }
    }
  }

  /// Writes out (and lse and the share that was skipped, f32, where they are not null) of the rows that `begin` named.
  void finish(const tensor_mut& out, const tensor_mut& lse, const tensor_mut& skipped = {}) noexcept {
    const bool direct = out.type == dtype_of<Acc>;
    const isize n = rows_.q.length;
    isize r = rows_.first, h = rows_.first_head + r / n, i = r % n;
    for (isize t = 0; t < used_; ++t) {
      for (isize x = 0; fresh_[t] && x < e_ * T::rows; ++x) ot_[t * e_ * T::rows + x] = Acc(0);
      for (isize lane = 0; lane < T::rows && r < rows_.last; lane += T::W) {
        const Acc *l = l_ + t * T::rows + lane, *m = m_ + t * T::rows + lane, *lost = lost_ + t * T::rows + lane;
        Acc inverse[T::W];
        Acc* to[T::W];
        void* rows[T::W];
        const isize count = rows_.last - r < T::W ? rows_.last - r : T::W;
        r += count;
        for (isize x = 0; x < T::W; ++x) {
          const Acc sum = l[x] - lost[x];
          inverse[x] = sum > Acc(0) ? Acc(1) / sum : sum * Acc(0);  // keeps NaN, gives 0 for a row that sees nothing
          to[x] = rows_of_ + x * wide_;
          if (x >= count) continue;
          rows[x] = out.row(rows_.b, h, i);
          if (direct) to[x] = static_cast<Acc*>(rows[x]);
          if (lse) *static_cast<Acc*>(lse.row(rows_.b, h, i)) = m[x] * ln2 + std::log(l[x]);
          if (skipped) *static_cast<float*>(skipped.row(rows_.b, h, i)) = share(lost[x], l[x]);
          if (++i == n) ++h, i = 0;
        }
        simd::columns_to_rows<Acc, Arch>(ot_ + t * e_ * T::rows + lane, T::rows, e_, inverse, to);
        for (isize x = 0; !direct && x < count; ++x) simd::store_row<Arch, Acc>(out.type, to[x], e_, rows[x]);
      }
    }
  }

 protected:
  /// The share of a row that was left out, rounded up.
  static float share(Acc lost, Acc all) noexcept {
    return lost > Acc(0) ? static_cast<float>(lost / all) * (1 + 4 * std::numeric_limits<float>::epsilon()) : 0.0F;
  }

  isize bytes_of_query() const noexcept { return static_cast<isize>(size_of(rows_.q.type)); }

  isize d_, e_, wide_, used_ = 0;  // used_: tiles
  query_rows rows_;
  Acc *qt_, *ot_, *m_, *l_, *lost_;
  Acc *rows_of_, *zeros_;  // W rows in Acc, on their way in or out; a row of zeros
  std::uint8_t* fresh_;    // [tiles] nothing was absorbed: O holds nothing
};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
