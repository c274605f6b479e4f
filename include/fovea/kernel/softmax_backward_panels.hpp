// SPDX-License-Identifier: MIT
#pragma once
/// @file  The three inner loops of the backward pass that are no plain products, over runs of keys and rows of one block.
///
///   score_gradients   P = 2^(S - lse), dS = P (dP - delta) [slope], in place of S and dP
///   query_gradient    dQ^T += K^T dS        vectors along rows, sums over keys
///   key_gradient      dV += P dO, dK += dS Q   vectors along columns, sums over rows
///
/// Contract   S, dP [keys][R]; lanes[k] bit l: row l sees key k. What a row may not see takes part in no product: masked runs
///            take masked products, so that NaN or infinity in a key, a value or a row stays with those that see each other.

#include <fovea/kernel/query_tiles.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// Rows [first, first + count) of tile `tile`, that all (or, masked, some) keys of a panel are seen by.
struct row_run {
  std::int16_t tile, first, count;
  bool masked;
};

/// p, ds, slope: at the run's first key and vector; shift, delta likewise. Slope: null, or factors [keys][R].
template <class Arch, class Acc, int NV, bool Masked>
FOVEA_NOINLINE void score_gradients(isize count, isize ld, Acc* p, Acc* ds, const Acc* slope, const Acc* shift,
                                    const Acc* delta, const std::uint64_t* lanes, int lane) noexcept {
  using P = simd::pack<Acc, Arch>;
  P minus[NV], less[NV];
  tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
    minus[v] = P::load(shift + v * P::size), less[v] = P::load(delta + v * P::size);
  });
  for (isize k = 0; k < count; ++k, p += ld, ds += ld) {
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA {
      P x = simd::exp2(P::load(p + v * P::size) - minus[v]);
      P g = x * (P::load(ds + v * P::size) - less[v]);
      if (slope != nullptr) g = g * P::load(slope + k * ld + v * P::size);
      if constexpr (Masked) {
        const auto bits = static_cast<simd::lane_bits>(lanes[k] >> (lane + v * static_cast<int>(P::size)));
        x = simd::select(bits, x, P(Acc(0))), g = simd::select(bits, g, P(Acc(0)));
      }
      x.store(p + v * P::size), g.store(ds + v * P::size);
    });
  }
}

/// o [M][NR * W] += sum over the runs' keys of K[key][column] dS[key][row]; k at the first of M columns.
template <class Arch, class Acc, int M, int NR>
FOVEA_NOINLINE void query_gradient(const key_run* list, isize runs, const Acc* k, isize k_stride, const Acc* ds,
                                   const std::uint64_t* lanes, Acc* o) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = NR * P::size;
  P acc[M][NR];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P::load(o + i * ld + v * P::size); });
  });
  for (isize n = 0; n < runs; ++n) {
    const isize first = list[n].first, count = list[n].count;
    if (!list[n].masked) {
      tile::accumulate<Arch, Acc, M, NR>(count, k + first * k_stride, 1, k_stride, ds + first * ld, ld, acc);
      continue;
    }
    for (isize y = first; y < first + count; ++y)
      tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA {
        constexpr std::uint64_t vector = ~std::uint64_t{0} >> (64 - P::size);
        const auto bits = static_cast<simd::lane_bits>((lanes[y] >> (v * P::size)) & vector);
        if (bits == 0) return;
        const P x = P::load(ds + y * ld + v * P::size);
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          acc[i][v] = simd::fma_where(bits, x, P(k[y * k_stride + i]), acc[i][v]);
        });
      });
  }
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v].store(o + i * ld + v * P::size); });
  });
}

/// to [M][NV * W] += sum over the runs' rows of p[key][row] rows[row][columns]. p: the panel's first key in tile 0, tiles
/// `p_tile` apart; x [rows][ld]: the rows of tile 0 at the first column; lanes: of the first key in tile 0, tiles `lane_tile` apart.
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void key_gradient(const row_run* list, isize runs, const Acc* p, isize p_tile, const Acc* x, isize ld,
                                 const std::uint64_t* lanes, isize lane_tile, Acc* to, isize to_ld) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize R = softmax_tile<Arch, Acc>::rows;
  P acc[M][NV];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P::load(to + i * to_ld + v * P::size); });
  });
  for (isize n = 0; n < runs; ++n) {
    const row_run& run = list[n];
    const Acc* a = p + run.tile * p_tile + run.first;
    const Acc* b = x + (run.tile * R + run.first) * ld;
    if (!run.masked) {
      tile::accumulate<Arch, Acc, M, NV>(run.count, a, R, 1, b, ld, acc);
      continue;
    }
    const std::uint64_t* bits = lanes + run.tile * lane_tile;
    for (isize r = 0; r < run.count; ++r, ++a, b += ld) {
      P row[NV];
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { row[v] = P::load(b + v * P::size); });
      tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
        const auto seen = static_cast<simd::lane_bits>(-static_cast<std::int64_t>((bits[i] >> (run.first + r)) & 1U));
        tile::unroll<NV>(
            [&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = simd::fma_where(seen, P(a[i * R]), row[v], acc[i][v]); });
      });
    }
  }
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v].store(to + i * to_ld + v * P::size); });
  });
}

/// The runs of rows of one tile for a panel of `count` keys. Returns how many there are.
inline isize rows_of_panel(const std::uint64_t* lanes, isize count, isize t, row_run* to) noexcept {
  std::uint64_t all = ~std::uint64_t{0}, any = 0;
  for (isize k = 0; k < count; ++k) all &= lanes[k], any |= lanes[k];
  isize runs = 0;
  while (any != 0) {
    const int first = std::countr_zero(any);
    const bool full = ((all >> first) & 1U) != 0;
    const int length = std::countr_one((full ? all : any & ~all) >> first);
    to[runs++] = {static_cast<std::int16_t>(t), static_cast<std::int16_t>(first), static_cast<std::int16_t>(length),
                  !full};
    any &= length == 64 ? 0 : ~(((std::uint64_t{1} << length) - 1) << first);
  }
  return runs;
}

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
