// SPDX-License-Identifier: MIT
#pragma once
/// @file  The product of tile/gemm.hpp over data that streams through: while it multiplies, it asks for the rows of the next block.
///
///   C[M x N] = A[M x K] B[K x N],   A(i, k) = a[i * a_row + k * a_col],   B and C row-major;   one cache line asked for each step of k
///
/// Asked for in one burst, lines hold up the product: prefetches fill the line buffers and wait for them in order. Asked for step by step
/// they arrive beside it.
///
/// Contract   as tile::gemm with add = false, and the same bits. The rows asked for may lie outside any array.
/// Cost       as tile::gemm, and one load slot in each MR * NR + NR.

#include <cstdint>

#include <fovea/tile/gemm.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace tile {

/// Rows that will be read next, and which of their lines have been asked for already.
class rows_ahead {
 public:
  static constexpr isize line = 64;

  rows_ahead() = default;
  rows_ahead(const void* first, isize row_bytes, isize stride_bytes, isize rows)
      : base_(reinterpret_cast<std::uintptr_t>(first)),
        stride_(stride_bytes),
        rows_(rows),
        lines_((row_bytes + line - 1) / line) {}

  bool done() const { return rows_ <= 0 || at_ >= lines_; }
  /// The address whose line comes first, and the step from row to row; then on to the rows after the first `steps`, or the next line.
  std::uintptr_t take(isize steps, isize& stride) {
    stride = stride_;
    const std::uintptr_t from = base_ + static_cast<std::uintptr_t>(at_ * line + row_ * stride_);
    row_ += steps;
    if (row_ >= rows_) row_ = 0, ++at_;
    return from;
  }

 private:
  std::uintptr_t base_ = 0;
  isize stride_ = 0, rows_ = 0, lines_ = 0, at_ = 0, row_ = 0;
};

namespace detail {

template <class Arch, class T, int MR, int NR>
FOVEA_NOINLINE void gemm_tile_ahead(isize K, const T* a, isize a_row, isize a_col, const T* b, isize ldb, T* c,
                                    isize ldc, std::uintptr_t next, isize next_step) {
  using P = simd::pack<T, Arch>;
  P acc[MR][NR];
  unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA { unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = P(T(0)); }); });
  for (isize k = 0; k < K; ++k, a += a_col, b += ldb, next += static_cast<std::uintptr_t>(next_step)) {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(reinterpret_cast<const void*>(next), 0, 2);
#endif
    P x[NR];
    unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { x[v] = P::load(b + v * P::size); });
    unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA {
      const P y(a[i * a_row]);
      unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v] = simd::fma(y, x[v], acc[i][v]); });
    });
  }
  unroll<MR>([&](auto i) FOVEA_INLINE_LAMBDA {
    unroll<NR>([&](auto v) FOVEA_INLINE_LAMBDA { acc[i][v].store(c + i * ldc + v * P::size); });
  });
}

}  // namespace detail

/// See the head of this file. `ahead` is taken from front to back; what is left of it after the product is nobody's loss.
template <class Arch, class T, std::size_t Count>
void gemm_ahead(isize M, isize N, isize K, const T* a, isize a_row, isize a_col, const T* b, isize ldb, T* c, isize ldc,
                rows_ahead (&ahead)[Count]) noexcept {
  constexpr int MR = tile_shape<Arch, T>::MR, NR = tile_shape<Arch, T>::NR;
  constexpr isize wide = NR * simd::pack<T, Arch>::size;
  const balanced rows(M, MR);
  isize j = 0;
  for (; j + wide <= N; j += wide)
    for (isize g = 0, i = 0; g < rows.groups; i += rows.size(g), ++g) {
      rows_ahead* from = ahead;
      while (from + 1 < ahead + Count && from->done()) ++from;
      isize step = 0;
      const std::uintptr_t next = from->done() ? reinterpret_cast<std::uintptr_t>(b) : from->take(K, step);
      with_constant<MR>(rows.size(g), [&](auto m) {
        if (a_row == 1)
          detail::gemm_tile_ahead<Arch, T, m, NR>(K, a + i, 1, a_col, b + j, ldb, c + i * ldc + j, ldc, next, step);
        else
          detail::gemm_tile_ahead<Arch, T, m, NR>(K, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc,
                                                  next, step);
      });
    }
  if (j < N) gemm<Arch, T>(M, N - j, K, a, a_row, a_col, b + j, ldb, c + j, ldc, false);
}

}  // namespace tile
}  // namespace FOVEA_ABI
}  // namespace fovea
