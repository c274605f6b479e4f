// SPDX-License-Identifier: MIT
#pragma once
/// @file  A score policy inside packed sequences: positions and [B] tables counted as the masks of mask/packed.hpp count them.
///
///   row cu_q[s] <= i < cu_q[s + 1], key cu_k[s] <= j < cu_k[s + 1]:   inner(site of s, i - cu_q[s], j - cu_k[s], score)
///
/// Contract   the mask of the call hides what lies between sequences (packed, documents); such scores stay as they are. Where rows and
///            keys are the same tokens, alibi and relative_bias need no wrapper: distances do not change.

#include <fovea/mask/packed.hpp>
#include <fovea/score/score.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

template <score_policy Inner>
struct documents_score {
  packed sequences;
  Inner inner;

  void check(const mask_site& at) const {
    sequences.check(at);
    for (isize s = 0; s < sequences.sequences; ++s)
      if constexpr (requires { inner.check(at); }) inner.check(sequences.site(at, s));
  }
  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T x) const {
    const isize s = sequences.sequence_of(i), q = sequences.cu_q[s], k = sequences.cu_k[s];
    if (j < k || j >= sequences.cu_k[s + 1]) return x;
    return static_cast<T>(inner(sequences.site(at, s), i - q, j - k, x));
  }
  template <class Acc>
  void lanes(const mask_site& at, isize i0, isize count, isize j0, isize j1, Acc* tile, isize stride) const {
    for (isize s = sequences.sequence_of(i0); s <= sequences.sequence_of(i0 + count - 1); ++s) {
      const isize q = sequences.cu_q[s], k = sequences.cu_k[s];
      const range rows = meet({i0, i0 + count}, {q, sequences.cu_q[s + 1]});
      const range keys = meet({j0, j1}, {k, sequences.cu_k[s + 1]});
      if (rows.empty() || keys.empty()) continue;
      detail::score_lanes<Inner, Acc>(inner, sequences.site(at, s), rows.first - q, rows.last - rows.first,
                                      keys.first - k, keys.last - k,
                                      tile + (keys.first - j0) * stride + (rows.first - i0), stride);
    }
  }
  static constexpr bool unit_slope = detail::unit_sloped<Inner>();
  template <class T>
    requires detail::sloped<Inner> T slope(const mask_site& at, isize i, isize j, T x)
  const {
    const isize s = sequences.sequence_of(i), q = sequences.cu_q[s], k = sequences.cu_k[s];
    if (j < k || j >= sequences.cu_k[s + 1]) return T(1);
    return static_cast<T>(inner.slope(sequences.site(at, s), i - q, j - k, x));
  }
};
template <class Inner>
documents_score(packed, Inner) -> documents_score<Inner>;

}  // namespace FOVEA_ABI
}  // namespace fovea
