// SPDX-License-Identifier: MIT
#pragma once
/// @file  Register tiles of a matrix product, and the plain product that is built of them. Nothing is packed or copied.
///
///   C[M x N] (+)= A[M x K] B[K x N],   A(i, k) = a[i * a_row + k * a_col],   B and C row-major, vectors along N
///
/// Contract   any M, N, K >= 0; leading dimensions in elements; C must not overlap A or B; nothing outside the matrices is read.
/// Cost       MR broadcasts and NR loads feed MR * NR fused multiply-adds a step; 8 x 2 with 32 registers, 6 x 2 with 16.
/// Numerics   each element is one chain of fused multiply-adds in the order of k: the result does not depend on M or N.

#include <fovea/simd/pack.hpp>
#include <fovea/tile/unroll.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace tile {

/// Rows and vectors of the register tile. double takes half the rows: as many chains as the adder needs, half the code.
template <class Arch, class T>
struct tile_shape {
  static constexpr int full = std::is_same_v<Arch, simd::scalar> ? 4 : Arch::registers >= 32 ? 8 : 6;
  static constexpr int MR = std::is_same_v<T, double> ? 4 : full, NR = 2;
};

/// Splits `total` into equal groups of at most MR: 64 by 12 gives 11, 11, 11, 11, 10, 10, never a short last one.
struct balanced {
  isize groups, small, extra;
  FOVEA_INLINE balanced(isize total, isize most)
      : groups((total + most - 1) / most),
        small(groups > 0 ? total / groups : 0),
        extra(groups > 0 ? total % groups : 0) {}
  FOVEA_INLINE isize size(isize g) const { return small + (g < extra ? 1 : 0); }
};

/// acc[i][v] += sum_k A(i, k) * b[k * ldb + v * W ...]
template <class Arch, class T, int MR, int NR>
FOVEA_INLINE void accumulate(isize K, const T* a, isize a_row, isize a_col, const T* b, isize ldb,
                             simd::pack<T, Arch> (&acc)[MR][NR]) {
  using P = simd::pack<T, Arch>;
  static_assert(MR * NR + NR + 1 <= Arch::registers, "the tile must fit the registers");
  for (isize k = 0; k < K; ++k, a += a_col, b += ldb) {
    P x[NR];
    unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { x[v] = P::load(b + v * P::size); });
    unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P y(a[i * a_row]);
      unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = simd::fma(y, x[v], acc[i][v]); });
    });
  }
}

namespace detail {

/// One tile of C; `columns` of its NR * W are real.
template <class Arch, class T, int MR, int NR, bool UnitColumn>
FOVEA_NOINLINE void gemm_tile(isize K, const T* a, isize a_row, isize a_col, const T* b, isize ldb, T* c, isize ldc,
                              bool add) {
  using P = simd::pack<T, Arch>;
  P acc[MR][NR];
  unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA {
    unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = add ? P::load(c + i * ldc + v * P::size) : P(T(0)); });
  });
  accumulate<Arch, T, MR, NR>(K, a, a_row, UnitColumn ? 1 : a_col, b, ldb, acc);
  unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA {
    unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v].store(c + i * ldc + v * P::size); });
  });
}

/// The last columns, fewer than a vector: masked loads and stores.
template <class Arch, class T, int MR>
FOVEA_NOINLINE void gemm_edge(isize K, const T* a, isize a_row, isize a_col, const T* b, isize ldb, T* c, isize ldc,
                              bool add, isize columns) {
  using P = simd::pack<T, Arch>;
  P acc[MR];
  unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i] = add ? simd::load_n<P>(c + i * ldc, columns) : P(T(0)); });
  for (isize k = 0; k < K; ++k, a += a_col, b += ldb) {
    const P x = simd::load_n<P>(b, columns);
    unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA { acc[i] = simd::fma(P(a[i * a_row]), x, acc[i]); });
  }
  unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA { simd::store_n(c + i * ldc, acc[i], columns); });
}

}  // namespace detail

/// See the head of this file.
template <class Arch, class T>
void gemm(isize M, isize N, isize K, const T* a, isize a_row, isize a_col, const T* b, isize ldb, T* c, isize ldc,
          bool add) noexcept {
  using P = simd::pack<T, Arch>;
  constexpr int MR = tile_shape<Arch, T>::MR, NR = tile_shape<Arch, T>::NR;
  const balanced rows(M, MR);
  isize j = 0;
  while (j < N) {
    const isize left = N - j, vectors = left >= NR * P::size ? NR : left >= P::size ? 1 : 0;
    isize i = 0;
    for (isize g = 0; g < rows.groups; ++g) {
      const isize mr = rows.size(g);
      const T* ai = a + i * a_row;
      T* ci = c + i * ldc + j;
      with_constant<MR>(mr, [&](auto m) {
        if (vectors == NR && a_col == 1)
          detail::gemm_tile<Arch, T, m, NR, true>(K, ai, a_row, 1, b + j, ldb, ci, ldc, add);
        else if (vectors == NR)
          detail::gemm_tile<Arch, T, m, NR, false>(K, ai, a_row, a_col, b + j, ldb, ci, ldc, add);
        else if (vectors == 1)
          detail::gemm_tile<Arch, T, m, 1, false>(K, ai, a_row, a_col, b + j, ldb, ci, ldc, add);
        else
          detail::gemm_edge<Arch, T, m>(K, ai, a_row, a_col, b + j, ldb, ci, ldc, add, left);
      });
      i += mr;
    }
    j += vectors > 0 ? vectors * P::size : left;
  }
}

}  // namespace tile
}  // namespace FOVEA_ABI
}  // namespace fovea
