// SPDX-License-Identifier: MIT
#pragma once
/// @file  The rows of a superblock in the online softmax: Q turned on its way in, (m, l, O) while keys are absorbed, O on its way out.
///
///   lane x of tile t is row t R + x of the superblock:   Q^T [tiles][d][R],   O^T [tiles][e][R] or O [tiles][R][e],
///                                                         m, l and what was skipped [tiles][R]
///
/// Contract   load, (resume,) finish or suspend; scores in units of log2. Rows that saw nothing give zeros and -inf, NaN stays. No allocation.

#include <cmath>
#include <cstring>
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
    turned_ = memory.take<Acc>(e * T::rows);
  }

  /// Q of the superblock, times scale and log2(e), a row to a lane. `sinks`: online_softmax::begin.
  void load(const query_rows& rows, double scale, const float* sinks) noexcept {
    rows_ = rows, by_rows_ = false;
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

  /// In place of finish: leaves the rows as they are, to be taken up again. o, in Acc; so_far [..., 2] in Acc: (m, l) of each row.
  void suspend(const tensor_mut& o, const tensor_mut& so_far) noexcept {
    for (isize t = 0; t < used_; ++t)
      for (isize x = 0; fresh_[t] && x < e_ * T::rows; ++x) ot_[t * e_ * T::rows + x] = Acc(0);
    turn_to_rows();
    each_row([&](isize at, isize h, isize i, isize next) {
      ask_to_write(o, h, i, next);
      Acc* const ml = static_cast<Acc*>(so_far.row(rows_.b, h, i));
      ml[0] = m_[at], ml[1] = l_[at];
      std::memcpy(o.row(rows_.b, h, i), ot_ + at * e_, static_cast<std::size_t>(e_) * sizeof(Acc));
    });
  }
  /// After begin: the rows as `suspend` left them. `finish` may write to the same place.
  void resume(const tensor_ref& o, const tensor_ref& so_far) noexcept {
    by_rows_ = true;
    for (isize t = 0; t < used_; ++t) fresh_[t] = false;
    each_row([&](isize at, isize h, isize i, isize) {
      const Acc* const ml = static_cast<const Acc*>(so_far.row(rows_.b, h, i));
      m_[at] = ml[0], l_[at] = ml[1];
      std::memcpy(ot_ + at * e_, o.row(rows_.b, h, i), static_cast<std::size_t>(e_) * sizeof(Acc));
    });
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
          ask_to_write(out, h, i, rows_.last - (r - count + x));
          rows[x] = out.row(rows_.b, h, i);
          if (direct) to[x] = static_cast<Acc*>(rows[x]);
          if (lse) *static_cast<Acc*>(lse.row(rows_.b, h, i)) = m[x] * ln2 + std::log(l[x]);
          if (skipped) *static_cast<float*>(skipped.row(rows_.b, h, i)) = share(lost[x], l[x]);
          if (++i == n) ++h, i = 0;
        }
        if (by_rows_)
          for (isize x = 0; x < count; ++x) scale_row(ot_ + (t * T::rows + lane + x) * e_, inverse[x], to[x]);
        else
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

  void scale_row(const Acc* from, Acc factor, Acc* to) const noexcept {
    isize c = 0;
    for (; c + T::W <= e_; c += T::W) (P::load(from + c) * P(factor)).store(to + c);
    if (c < e_) simd::store_n(to + c, simd::load_n<P>(from + c, e_ - c) * P(factor), e_ - c);
  }
  /// O as columns again, and as rows.
  void turn_back() noexcept {
    turn_tiles(by_rows_, [&](const Acc* o, isize lane, Acc* to) {
      const Acc* from[T::W];
      for (isize x = 0; x < T::W; ++x) from[x] = o + (lane + x) * e_;
      simd::rows_to_columns<Acc, Arch>(from, e_, Acc(1), to + lane, T::rows);
    });
    by_rows_ = false;
  }
  void turn_to_rows() noexcept {
    Acc one[T::W];
    for (Acc& x : one) x = Acc(1);
    turn_tiles(!by_rows_, [&](const Acc* o, isize lane, Acc* to) {
      Acc* rows[T::W];
      for (isize x = 0; x < T::W; ++x) rows[x] = to + (lane + x) * e_;
      simd::columns_to_rows<Acc, Arch>(o + lane, T::rows, e_, one, rows);
    });
    by_rows_ = true;
  }
  /// f(O of a tile, lane, the same turned) for each vector of lanes, if `needed`.
  template <class F>
  void turn_tiles(bool needed, F&& f) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(e_ * T::rows) * sizeof(Acc);
    for (isize t = 0; needed && t < used_; ++t) {
      Acc* const o = ot_ + t * e_ * T::rows;
      for (isize lane = 0; !fresh_[t] && lane < T::rows; lane += T::W) f(o, lane, turned_);
      if (!fresh_[t]) std::memcpy(o, turned_, bytes);
    }
  }

  /// f(row of the superblock, head, row of the head, rows from it on)
  template <class F>
  void each_row(F&& f) const noexcept {
    const isize n = rows_.q.length, count = rows_.last - rows_.first;
    isize h = rows_.first_head + rows_.first / n, i = rows_.first % n;
    for (isize at = 0; at < count; ++at) {
      f(at, h, i, count - at);
      if (++i == n) ++h, i = 0;
    }
  }
  /// Rows of the output a multiple of 4 KB apart are not asked for while keys are absorbed: those soon to be written are asked for here.
  void ask_to_write(const tensor_mut& out, isize h, isize i, isize left) const noexcept {
    const isize size = static_cast<isize>(size_of(out.type)), ahead = 16;
    if (out.row_stride * size % 4096 == 0 && left > ahead && i + ahead < rows_.q.length)
      simd::prefetch_to_write(out.row(rows_.b, h, i + ahead), e_ * size);
  }

  isize bytes_of_query() const noexcept { return static_cast<isize>(size_of(rows_.q.type)); }

  isize d_, e_, wide_, used_ = 0;  // used_: tiles
  query_rows rows_;
  Acc *qt_, *ot_, *m_, *l_, *lost_;
  Acc *rows_of_, *zeros_;  // W rows in Acc, on their way in or out; a row of zeros
  std::uint8_t* fresh_;    // [tiles] nothing was absorbed: O holds nothing
  Acc* turned_;            // [e][R] of one tile, on its way from rows to columns
  bool by_rows_ = false;   // O is [tiles][R][e]
};

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
