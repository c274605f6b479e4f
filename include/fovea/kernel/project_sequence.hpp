// SPDX-License-Identifier: MIT
#pragma once
/// @file  Projection along the sequence: `slots` rows that are weighted sums (or maxima) of the rows of a head, taken in as they come.
///
///   linear  P_s = sum_i E_is x_i                    E [positions x slots]
///   mean    P_s = mean of x_i over window s         windows cut the length into `slots` parts that differ by at most one row
///   max     P_s = max of x_i over window s, by column
///   conv    P_s = sum_t w_t x_(s taps + t)          kernel = stride = taps
///
/// Contract   a sum over positions: clear, then absorb any stretches in any order. Rows behind the length are not read. A window
///            with no row in it yields no slot: used(length) counts the others, which come first.
/// Cost       linear: slots * width multiply-adds a row, one streamed product; the others: width a row.
/// Numerics   a block of 128 rows is summed by itself before it joins.       Reference  linformer/reference.hpp.

#include <limits>

#include <fovea/core/workspace.hpp>
#include <fovea/mask/mask.hpp>
#include <fovea/simd/convert.hpp>
#include <fovea/tile/gemm_ahead.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

enum class sequence_projection : unsigned char { linear, mean, max, conv };

namespace kernel {

/// The projection of one head.
struct projection {
  sequence_projection kind = sequence_projection::linear;
  isize slots = 0;
  const float* weights = nullptr;  ///< linear: E, row-major; conv: the taps
  isize stride = 0;                ///< linear: elements between rows of E; conv: the number of taps

  /// Slots that hold something after `length` rows.
  isize used(isize length) const {
    if (length <= 0) return 0;
    if (kind == sequence_projection::linear) return slots;
    const isize fed = kind == sequence_projection::conv ? ceil_div(length, stride) : length;
    return fed < slots ? fed : slots;
  }
  /// Positions that feed slot s, for a sequence of `length` rows; every position for a linear projection.
  range window(isize s, isize length) const {
    if (kind == sequence_projection::linear) return {0, length};
    if (kind == sequence_projection::conv) return meet({s * stride, (s + 1) * stride}, {0, length});
    const isize parts = used(length);
    return {s * length / parts, (s + 1) * length / parts};
  }
};

template <class Arch, class Acc>
class sequence_projector {
  using P = simd::pack<Acc, Arch>;
  static constexpr isize block = 128;
  static constexpr isize MR = tile::tile_shape<Arch, Acc>::MR;

 public:
  static constexpr isize panel = 128;  ///< most slots of one call: tasks are cut by slots

  sequence_projector(arena& memory, isize width)
      : rows_(memory.take<Acc>(block * width)),
        partial_(memory.take<Acc>(panel * width)),
        weights_(memory.take<Acc>(groups * stride)) {}

  static void clear(const projection& p, isize width, isize s0, isize s1, Acc* out) noexcept {
    const Acc empty = p.kind == sequence_projection::max ? -std::numeric_limits<Acc>::infinity() : Acc(0);
    for (isize x = s0 * width; x < s1 * width; ++x) out[x] = empty;
  }

  /// Rows [0, count) of x stand at positions `first` on in a sequence of `length`; slots [s0, s1) of out [slots x width] take them in.
  void absorb(const projection& p, const void* x, dtype type, isize x_stride, isize first, isize count, isize length,
              isize width, isize s0, isize s1, Acc* out) noexcept {
    const auto* base = static_cast<const unsigned char*>(x);
    const isize step = x_stride * static_cast<isize>(size_of(type));
    if (p.kind == sequence_projection::linear) return multiply(p, base, type, step, first, count, width, s0, s1, out);
    for (isize s = s0; s < s1; ++s) {
      const range w = p.window(s, length), own = meet(w, {first, first + count});
      for (isize i = own.first; i < own.last; ++i) {
        const Acc* row = simd::row_as<Arch, Acc>(type, base + (i - first) * step, width, rows_);
        const Acc weight = p.kind == sequence_projection::conv ? static_cast<Acc>(p.weights[i - w.first])
                                                               : Acc(1) / static_cast<Acc>(w.last - w.first);
        join(p.kind == sequence_projection::max, weight, row, width, out + s * width);
      }
    }
  }

 private:
  static FOVEA_INLINE void join(bool largest, Acc weight, const Acc* row, isize width, Acc* out) noexcept {
    for (isize c = 0; c < width; c += P::size) {
      const P y = simd::load_n<P>(row + c, width - c), old = simd::load_n<P>(out + c, width - c);
      simd::store_n(out + c, largest ? simd::max(old, y) : simd::fma(P(weight), y, old), width - c);
    }
  }
  /// Rows of E, read once and in order, as strips as wide as the register tile is high. In place the columns of such a strip lie a row
  /// of E apart: with 128 slots all of them fall into an eighth of the cache.
  void pack(const tile::balanced& cut, const float* e, isize e_stride, isize count) noexcept {
    const bool even = cut.extra == 0 && cut.small == MR;
    for (isize i = 0; i < count; ++i, e += e_stride) {
      Acc* to = weights_ + i * MR;
      const float* from = e;
      for (isize g = 0; even && g < cut.groups; ++g, from += MR, to += stride)
        for (isize x = 0; x < MR; ++x) to[x] = static_cast<Acc>(from[x]);
      for (isize g = 0, s = 0; !even && g < cut.groups; s += cut.size(g), ++g)
        for (isize x = 0; x < cut.size(g); ++x) weights_[g * stride + i * cut.size(g) + x] = static_cast<Acc>(e[s + x]);
    }
  }
  void multiply(const projection& p, const unsigned char* x, dtype type, isize step, isize first, isize count,
                isize width, isize s0, isize s1, Acc* out) noexcept {
    const isize some = s1 - s0;
    for (isize i0 = 0; i0 < count; i0 += block) {
      const isize n = count - i0 < block ? count - i0 : block;
      const bool in_place = type == dtype_of<Acc>;
      for (isize i = 0; !in_place && i < n; ++i)
        simd::load_row<Arch, Acc>(type, x + (i0 + i) * step, width, rows_ + i * width);
      const Acc* rows = in_place ? reinterpret_cast<const Acc*>(x + i0 * step) : rows_;
      const isize ld = in_place ? step / static_cast<isize>(sizeof(Acc)) : width;
      const tile::balanced cut(some, MR);
      pack(cut, p.weights + (first + i0) * p.stride + s0, p.stride, n);
      const isize left = count - i0 - n, next = left < block ? left : block;
      tile::rows_ahead ahead[] = {
          {p.weights + (first + i0 + n) * p.stride + s0, some * static_cast<isize>(sizeof(float)),
           p.stride * static_cast<isize>(sizeof(float)), next},
          {x + (i0 + n) * step, width * static_cast<isize>(size_of(type)), step, next}};
      for (isize g = 0, s = 0; g < cut.groups; s += cut.size(g), ++g)
        tile::gemm_ahead<Arch, Acc>(cut.size(g), width, n, weights_ + g * stride, 1, cut.size(g), rows, ld,
                                    partial_ + s * width, width, ahead);
      join(false, Acc(1), partial_, some * width, out + s0 * width);
    }
  }

  static constexpr isize groups = (panel + MR - 1) / MR;
  static constexpr isize stride =
      block * MR + 16;  ///< of a strip; no power of two, or all strips share one set of the cache
  Acc *rows_, *partial_, *weights_;
};

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
