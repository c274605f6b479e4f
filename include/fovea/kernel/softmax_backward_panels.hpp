// SPDX-License-Identifier: MIT
#pragma once
/// @file  The three inner loops of the backward pass that are no plain products, over runs of keys and rows of one block.
///
///   score_gradients   P = 2^(S - lse), dS = P (dP - delta) [slope], in place of S and dP
///   query_gradient    dQ^T += K^T dS        vectors along rows, sums over keys
///   key_gradient      dV += P dO, dK += dS Q   vectors along columns, sums over rows
///
/// Contract   S, dP [keys][ld], the tiles of a chunk side by side; lanes[k] bit l: row l sees key k. What a row may not see takes part in no product: masked runs
///            take masked products, so that NaN or infinity in a key, a value or a row stays with those that see each other.

#include <fovea/kernel/query_tiles.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// Rows [first, first + count) of a chunk, that all (or, masked: in one tile, some) keys of a panel are seen by.
struct row_run {
  std::int16_t first, count;
  bool masked;
};

/// C [rows][NV vectors] = A B for up to NR vectors: S = K Q^T, dP = V dO^T.
template <class Arch, class Acc>
void score_product(isize rows, isize vectors, isize width, const Acc* a, isize a_ld, const Acc* b, Acc* c,
                   isize c_ld) noexcept {
  using T = gradient_tile<Arch, Acc>;
  const tile::balanced panels(rows, T::MR);
  for (isize g = 0; g < panels.groups; ++g) {
    const isize count = panels.size(g);
    tile::with_constant<T::NR>(vectors, [&](auto v) {
      tile::with_constant<T::MR>(count, [&](auto m) {
        tile::detail::gemm_tile<Arch, Acc, m, v, true>(width, a, a_ld, 1, b, T::rows, c, c_ld, false);
      });
    });
    a += count * a_ld, c += count * c_ld;
  }
}

/// p, ds, slope: at the run's first key and vector; shift, delta likewise. Slope: null, or factors [keys][ld].
template <class Arch, class Acc, bool Masked>
FOVEA_NOINLINE void score_gradients(isize count, isize vectors, isize ld, Acc* p, Acc* ds, const Acc* slope,
                                    const Acc* shift, const Acc* delta, const std::uint64_t* lanes,
                                    isize lane) noexcept {
  using P = simd::pack<Acc, Arch>;
  for (isize v = 0; v < vectors; ++v) {
    const P minus = P::load(shift + v * P::size), less = P::load(delta + v * P::size);
    Acc *x = p + v * P::size, *y = ds + v * P::size;
    for (isize k = 0; k < count; ++k, x += ld, y += ld) {
      P e = simd::exp2(P::load(x) - minus);
      P g = e * (P::load(y) - less);
      if (slope != nullptr) g = g * P::load(slope + k * ld + v * P::size);
      if constexpr (Masked) {
        const auto bits = static_cast<simd::lane_bits>(lanes[k] >> (lane + v * P::size));
        e = simd::select(bits, e, P(Acc(0))), g = simd::select(bits, g, P(Acc(0)));
      }
      e.store(x), g.store(y);
    }
  }
}

/// o [M][NR * W] += sum over the runs' keys of K[key][column] dS[key][row]; k at the first of M columns.
template <class Arch, class Acc, int M, int NR>
FOVEA_NOINLINE void query_gradient(const key_run* list, isize runs, const Acc* k, isize k_stride, const Acc* ds,
                                   isize ds_ld, const std::uint64_t* lanes, Acc* o) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize ld = NR * P::size;
  P acc[M][NR];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P::load(o + i * ld + v * P::size); });
  });
  for (isize n = 0; n < runs; ++n) {
    const isize first = list[n].first, count = list[n].count;
    if (!list[n].masked) {
      tile::accumulate<Arch, Acc, M, NR>(count, k + first * k_stride, 1, k_stride, ds + first * ds_ld, ds_ld, acc);
      continue;
    }
    for (isize y = first; y < first + count; ++y)
      tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA {
        constexpr std::uint64_t vector = ~std::uint64_t{0} >> (64 - P::size);
        const auto bits = static_cast<simd::lane_bits>((lanes[y] >> (v * P::size)) & vector);
        if (bits == 0) return;
        const P x = P::load(ds + y * ds_ld + v * P::size);
        tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
          acc[i][v] = simd::fma_where(bits, x, P(k[y * k_stride + i]), acc[i][v]);
        });
      });
  }
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v].store(o + i * ld + v * P::size); });
  });
}

/// to [M][NV * W] += sum over the runs' rows of p[key][row] x[row][column], for M keys. x [rows][NV * W]: a panel of columns of the
/// chunk's rows; lanes: of the first key in the chunk's first tile, tiles `lane_tile` apart.
template <class Arch, class Acc, int M, int NV>
FOVEA_NOINLINE void key_gradient(const row_run* list, isize runs, const Acc* p, isize p_ld, const Acc* x,
                                 const std::uint64_t* lanes, isize lane_tile, Acc* to, isize to_ld) noexcept {
  using P = simd::pack<Acc, Arch>;
  constexpr isize R = gradient_tile<Arch, Acc>::rows, ld = NV * P::size;
  P acc[M][NV];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P::load(to + i * to_ld + v * P::size); });
  });
  for (isize n = 0; n < runs; ++n) {
    const isize first = list[n].first, count = list[n].count;
    const Acc *a = p + first, *b = x + first * ld;
    if (!list[n].masked) {
      tile::accumulate<Arch, Acc, M, NV>(count, a, p_ld, 1, b, ld, acc);
      continue;
    }
    const std::uint64_t* bits = lanes + first / R * lane_tile;
    for (isize r = first; r < first + count; ++r, ++a, b += ld) {
      P row[NV];
      tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { row[v] = P::load(b + v * P::size); });
      tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
        const auto seen = static_cast<simd::lane_bits>(-static_cast<std::int64_t>((bits[i] >> (r % R)) & 1U));
        tile::unroll<NV>(
            [&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = simd::fma_where(seen, P(a[i * p_ld]), row[v], acc[i][v]); });
      });
    }
  }
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NV>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v].store(to + i * to_ld + v * P::size); });
  });
}

/// The runs of rows of a panel of `count` keys over `tiles` tiles of R rows; lanes as above. Returns how many there are.
inline isize rows_of_panel(const std::uint64_t* lanes, isize lane_tile, isize count, isize tiles, isize R,
                           row_run* to) noexcept {
  isize runs = 0;
  for (isize t = 0; t < tiles; ++t, lanes += lane_tile) {
    std::uint64_t all = ~std::uint64_t{0}, any = 0;
    for (isize k = 0; k < count; ++k) all &= lanes[k], any |= lanes[k];
    while (any != 0) {
      const int first = std::countr_zero(any);
      const bool full = ((all >> first) & 1U) != 0;
      const int length = std::countr_one((full ? all : any & ~all) >> first);
      const isize at = t * R + first;
      if (full && runs > 0 && !to[runs - 1].masked && to[runs - 1].first + to[runs - 1].count == at)
        to[runs - 1].count = static_cast<std::int16_t>(to[runs - 1].count + length);
      else
        to[runs++] = {static_cast<std::int16_t>(at), static_cast<std::int16_t>(length), !full};
      any &= length == 64 ? 0 : ~(((std::uint64_t{1} << length) - 1) << first);
    }
  }
  return runs;
}

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
