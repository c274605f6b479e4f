// SPDX-License-Identifier: MIT
#pragma once
/// @file  Threshold skipping inside the online softmax: which keys of a block a tile of rows would not miss, and the sums over the others.
///
///   key j is left out of a tile if p_ij <= epsilon l_i in every row i;     lost_i += p_ij;     l_i counts it all the same
///   O^T = O^T 2^(m - m') + sum of v_j p_ij over the keys that are left
///
/// One key by all rows of the register tile: at equal mass it leaves out more than tiles of 16 rows by 16 keys (docs/mechanisms/softmax.md), and
/// the tile of products stays whole: the keys that are left are gone through by a list.
///
/// Contract   after `exponentials`: l counts the block. A row that is NaN, or sees a key whose weight is, keeps its keys. Vectors of
///            rows that a run leaves out hold anything, and lanes without a row have no say.
/// Reference  softmax/reference_skip.hpp.

#include <fovea/kernel/softmax_panels.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// What is left of the runs of a block: keys of whole runs one by one, the others as runs again.
template <class Arch, class Acc>
struct chosen_keys {
  static constexpr isize most = softmax_tile<Arch, Acc>::keys;
  std::int16_t keys[most];
  panel runs[most];
  isize count = 0, panels = 0;
  bool all = true;
};

/// What p and l of a tile say about its keys; `alpha` is what `lost` was scaled by since. Fewer vectors than the tile's come as runs.
template <class Arch, class Acc, int NV>
FOVEA_NOINLINE void choose_keys(const panel* list, isize panels, const Acc* p, const Acc* l, const Acc* alpha,
                                std::uint64_t live, Acc epsilon, Acc* lost, chosen_keys<Arch, Acc>& to) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = softmax_tile<Arch, Acc>::rows;
  constexpr bool by_key = NV == softmax_tile<Arch, Acc>::NR;
  P limit[NV], sum[NV];
  simd::lane_bits rows[NV];
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    rows[x] = static_cast<simd::lane_bits>(live >> (x * P::size));
    limit[x] = P::load(l + x * P::size) * P(epsilon);
    sum[x] = P::load(lost + x * P::size) * P::load(alpha + x * P::size);
  });
  isize count = 0;
  for (isize n = 0; n < panels; ++n) {
    const isize first = list[n].first, last = first + list[n].count;
    if (by_key && list[n].kind == seen::whole) {
      for (isize k = first; k < last; ++k) {
        P w[NV];
        simd::lane_bits above = 0;
        tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
          w[x] = P::load(p + k * ld + x * P::size);
          above |= simd::lanes_above(w[x], limit[x]) & rows[x];
        });
        const bool keep = above != 0;
        to.keys[count] = static_cast<std::int16_t>(k), count += keep ? 1 : 0;
        to.all = to.all && keep;
        const P left(keep ? Acc(0) : Acc(1));  // no branch: nobody could guess it
        tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { sum[x] = simd::fma(w[x], left, sum[x]); });
      }
      continue;
    }
    bool open = false;
    for (isize k = first; k < last; ++k) {
      P w[NV];
      simd::lane_bits above = 0;
      tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
        w[x] = list[n].leaves_out(x) ? P(Acc(0)) : P::load(p + k * ld + x * P::size);
        above |= simd::lanes_above(w[x], limit[x]) & rows[x];
      });
      if (above == 0) {
        tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { sum[x] = sum[x] + w[x]; });
        to.all = open = false;
      } else if (open) {
        ++to.runs[to.panels - 1].count;
      } else {
        to.runs[to.panels] = list[n];
        to.runs[to.panels].first = static_cast<std::int16_t>(k), to.runs[to.panels++].count = 1;
        open = true;
      }
    }
  }
  to.count = count;
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { sum[x].store(lost + x * P::size); });
}

/// O^T[columns] = O^T * alpha + V^T P over the listed keys of a block. No alpha: O is not read.
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void chosen_values(const std::int16_t* keys, isize count, const Acc* v, isize v_stride, const Acc* p,
                                  const Acc* alpha, Acc* o) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = softmax_tile<Arch, Acc>::rows;
  P acc[M][NV];
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    const P a = alpha != nullptr ? P::load(alpha + x * P::size) : P(Acc(0));
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      acc[i][x] = alpha != nullptr ? P::load(o + i * ld + x * P::size) * a : P(Acc(0));
    });
  });
  for (isize n = 0; n < count; ++n) {
    const isize k = keys[n];
    tile::accumulate<Arch, Acc, M, NV>(1, v + k * v_stride, 1, v_stride, p + k * ld, ld, acc);
  }
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { acc[i][x].store(o + i * ld + x * P::size); });
  });
}

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
