// SPDX-License-Identifier: MIT
#pragma once
/// @file  The four inner loops of the online softmax, each over panels of keys of one block and a tile of queries in the lanes.
///
///   score_panel    S = K Q^T for up to MR keys, and the running maximum
///   mask_panel     S = visible ? S : -inf, and the maximum of what is left
///   exponentials   P = 2^(S - m) in place, the new (m, l), and the factor of the old O
///   value_panels   O^T = O^T 2^(m - m') + V^T P
///
/// Contract   S [keys][NR * W]; lanes[k] bit l: query l sees key k of the block. A masked panel takes masked products, so that NaN
///            or infinity in a value reaches only the rows that see its key.

#include <limits>

#include <fovea/simd/exp.hpp>
#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

template <class Arch, class Acc>
struct softmax_tile {
  static constexpr int MR = tile::tile_shape<Arch, Acc>::MR, NR = tile::tile_shape<Arch, Acc>::NR;
  static constexpr isize W = simd::pack<Acc, Arch>::size, rows = NR * W;  // queries of a tile
  static constexpr isize keys = 128;                                      // keys of a block: S stays in L1
  static constexpr isize most_panels = keys;
  static_assert(rows <= 64);
};

/// A run of keys inside a block: [first, first + count) of the block.
struct panel {
  std::int16_t first, count;
  bool masked;
};

/// S = K Q^T for one panel, all or some of the tile's vectors; returns nothing, folds the maximum into `top` [vectors].
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void score_panel(isize d, const Acc* k, isize k_stride, const Acc* qt, isize q_ld, Acc* s,
                                Acc* top) noexcept {
  using P = simd::pack<Acc, Arch>;
  P acc[M][NV];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P(Acc(0)); });
  });
  tile::accumulate<Arch, Acc, M, NV>(d, k, k_stride, 1, qt, q_ld, acc);
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
    P m = P::load(top + v * P::size);
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      acc[i][v].store(s + i * q_ld + v * P::size);
      m = simd::max(m, acc[i][v]);
    });
    m.store(top + v * P::size);
  });
}

/// O^T[columns] = O^T * alpha + V^T P over the panels of a block.
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void value_panels(const panel* list, isize panels, const Acc* v, isize v_stride, const Acc* p,
                                 const std::uint64_t* lanes, const Acc* alpha, Acc* o) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = NV * P::size;
  P acc[M][NV];
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    const P a = P::load(alpha + x * P::size);
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i][x] = P::load(o + i * ld + x * P::size) * a; });
  });
  for (isize n = 0; n < panels; ++n) {
    const isize first = list[n].first, count = list[n].count;
    if (!list[n].masked) {
      tile::accumulate<Arch, Acc, M, NV>(count, v + first * v_stride, 1, v_stride, p + first * ld, ld, acc);
      continue;
    }
    for (isize k = first; k < first + count; ++k) {
      const std::uint64_t bits = lanes[k];
      if (bits == 0) continue;
      tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
        const P w = P::load(p + k * ld + x * P::size);
        const auto live = static_cast<simd::lane_bits>(bits >> (x * P::size));
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          acc[i][x] = simd::fma_where(live, w, P(v[k * v_stride + i]), acc[i][x]);
        });
      });
    }
  }
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { acc[i][x].store(o + i * ld + x * P::size); });
  });
}

/// s = visible ? s : -inf for a partly visible panel; the maximum over what is left goes into `top`.
template <class Arch, class Acc, int NV>
FOVEA_NOINLINE void mask_panel(isize first, isize last, const std::uint64_t* lanes, Acc* s, Acc* top) noexcept {
  using P = simd::pack<Acc, Arch>;
  const P none(-std::numeric_limits<Acc>::infinity());
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    P m = P::load(top + x * P::size);
    for (isize k = first; k < last; ++k) {
      Acc* at = s + k * NV * P::size + x * P::size;
      const P y = simd::select(static_cast<simd::lane_bits>(lanes[k] >> (x * P::size)), P::load(at), none);
      y.store(at);
      m = simd::max(m, y);
    }
    m.store(top + x * P::size);
  });
}

/// P = 2^(S - m) in place, and the new (m, l); alpha is what the old O has to be multiplied by.
template <class Arch, class Acc, int NV>
FOVEA_NOINLINE void exponentials(const panel* list, isize panels, Acc* s, const Acc* top, Acc* m, Acc* l,
                                 Acc* alpha) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = NV * P::size;
  P shift[NV], sum[NV], other[NV];
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
    const P old = P::load(m + x * P::size), next = simd::max(old, P::load(top + x * P::size));
    shift[x] =
        simd::select_greater(next, P(static_cast<Acc>(-3e38)), next, P(Acc(0)));  // nothing visible yet, or NaN: 0
    const P a = simd::exp2(old - shift[x]);
    next.store(m + x * P::size);
    a.store(alpha + x * P::size);
    sum[x] = P::load(l + x * P::size) * a;
    other[x] = P(Acc(0));
  });
  for (isize n = 0; n < panels; ++n) {
    Acc* at = s + list[n].first * ld;
    const isize count = list[n].count;
    isize k = 0;
    for (; k + 2 <= count; k += 2, at += 2 * ld)
      tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
        const P p = simd::exp2(P::load(at + x * P::size) - shift[x]),
                q = simd::exp2(P::load(at + ld + x * P::size) - shift[x]);
        p.store(at + x * P::size), q.store(at + ld + x * P::size);
        sum[x] = sum[x] + p, other[x] = other[x] + q;
      });
    for (; k < count; ++k, at += ld)
      tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA {
        const P p = simd::exp2(P::load(at + x * P::size) - shift[x]);
        p.store(at + x * P::size);
        sum[x] = sum[x] + p;
      });
  }
  tile::unroll<NV>([&](auto x) FOVEA_INLINE_LAMBDA { (sum[x] + other[x]).store(l + x * P::size); });
}

}  // namespace detail

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
