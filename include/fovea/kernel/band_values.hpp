// SPDX-License-Identifier: MIT
#pragma once
/// @file  O += P V with the columns of V in the lanes, for rows that see a band of keys: no row meets a key that it does not see.
///
///   o[i][c] = o[i][c] alpha[i] + sum over keys j of the block, first + i <= j < last + i, of p[j][i] v[j][c]
///
/// Queries in the lanes would compute every key that one of W rows sees. O comes out as rows, which saves turning it.
///
/// Contract   columns are a multiple of NR * W. A row's sum is one chain in the order of keys: it does not depend on the other rows of its group.

#include <fovea/kernel/softmax_panels.hpp>
#include <fovea/mask/mask.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {
namespace detail {

/// M rows, NR vectors of columns. Keys [begin, end) of a block, numbered as those of row 0, [first, last). No alpha: O is not read.
template <class Arch, class Acc, int M>
FOVEA_NOINLINE void band_values(range block, range own, const Acc* v, isize v_stride, const Acc* p, const Acc* alpha,
                                Acc* o, isize ldo) noexcept {
  using P = simd::pack<Acc, Arch>;
  using T = softmax_tile<Arch, Acc>;
  constexpr int NR = T::NR;
  P acc[M][NR];
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    const P a(alpha != nullptr ? alpha[i] : Acc(0));
    tile::unroll<NR>([&](auto x) FOVEA_INLINE_LAMBDA {
      acc[i][x] = alpha != nullptr ? P::load(o + i * ldo + x * P::size) * a : P(Acc(0));
    });
  });
  const auto inside = [&](isize k) { return k < block.first ? block.first : k > block.last ? block.last : k; };
  const isize low = inside(own.first + M - 1), high = inside(own.last), end = inside(own.last + M - 1);
  const auto some = [&](isize k, isize begin, isize behind) FOVEA_INLINE_LAMBDA {  // rows [begin, behind) see key k
    P y[NR];
    tile::unroll<NR>([&](auto x) FOVEA_INLINE_LAMBDA { y[x] = P::load(v + k * v_stride + x * P::size); });
    tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
      if (i < begin || i >= behind) return;
      const P w(p[k * T::rows + i]);
      tile::unroll<NR>([&](auto x) FOVEA_INLINE_LAMBDA { acc[i][x] = simd::fma(w, y[x], acc[i][x]); });
    });
  };
  for (isize k = inside(own.first); k < low; ++k) some(k, 0, k - own.first + 1);
  tile::accumulate<Arch, Acc, M, NR>(high - low, p + low * T::rows, 1, T::rows, v + low * v_stride, v_stride, acc);
  for (isize k = high; k < end; ++k) some(k, k - own.last + 1, M);
  tile::unroll<M>([&](auto i) FOVEA_INLINE_LAMBDA {
    tile::unroll<NR>([&](auto x) FOVEA_INLINE_LAMBDA { acc[i][x].store(o + i * ldo + x * P::size); });
  });
}

}  // namespace detail
}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
