// SPDX-License-Identifier: MIT
#pragma once
/// @file  Scores of a panel of query rows against the mean keys of blocks: S = K Q^T, as exact attention multiplies whole tiles.
///
/// Contract   k [blocks][d], q [d][64] with `width` rows in whole vectors, s [blocks][64].
/// Cost       blocks * width * d multiply-adds; panels of 64 rows at the speed of exact attention's scores, where tile::gemm had half of it.

#include <fovea/kernel/softmax_panels.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace kernel {

template <class Arch, class Acc>
void mean_scores(isize blocks, isize width, isize d, const Acc* k, const Acc* q, Acc* s) noexcept {
  using T = detail::softmax_tile<Arch, Acc>;
  constexpr isize rows = 64;
  isize done = 0;
  if constexpr (T::wide && T::rows == rows) {
    alignas(64) Acc top[rows] = {};  // nobody asks
    detail::paced_requests nothing;
    detail::later none;
    const isize panels = width == rows ? blocks / T::MR : 0;
    if (panels > 0) detail::score_panels<Arch, Acc, T::MR, T::NR>(panels, d, k, d, q, rows, s, top, nothing, none);
    done = panels * T::MR;
  }
  tile::gemm<Arch, Acc>(blocks - done, width, d, k + done * d, d, 1, q, rows, s + done * rows, rows, false);
}

}  // namespace kernel
}  // namespace FOVEA_ABI
}  // namespace fovea
