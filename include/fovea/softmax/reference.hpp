// SPDX-License-Identifier: MIT
#pragma once
/// @file  Softmax attention from its definition, in double: two passes over the keys of each row and nothing else.
///
///   s_ij = modify(scale q_i . k_j),   p_ij = e^(s_ij - max_j s_ij) where visible,   o_i = sum_j p_ij v_j / (sum_j p_ij + e^(sink - max))
///
/// Contract   a row that sees nothing gives zeros and LSE = -inf. Slow on purpose.

#include <cmath>
#include <limits>
#include <vector>

#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

inline void prefill(const softmax_attention& m, const problem& p) {
  const shape s = p.shape();
  const double scale = m.scale_for(s), none = -std::numeric_limits<double>::infinity();
  std::vector<double> score(static_cast<std::size_t>(s.m));
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i) {
        const isize g = h / s.group();
        mask_site at = m.site(s, b);
        at.h = h;
        double top = m.sinks != nullptr ? static_cast<double>(m.sinks[h]) : none;
        for (isize j = 0; j < s.m; ++j) {
          double& x = score[static_cast<std::size_t>(j)];
          x = none;
          if (!m.mask.visible(at, i, j)) continue;
          double dot = 0;
          for (isize c = 0; c < s.d; ++c) dot += p.q.get(b, h, i, c) * p.k.get(b, g, j, c);
          x = m.score(at, i, j, scale * dot);
          if (!(x <= top)) top = x;
        }
        const double shift = top == none ? 0 : top;
        double sum = m.sinks != nullptr ? std::exp(static_cast<double>(m.sinks[h]) - shift) : 0;
        std::vector<double> o(static_cast<std::size_t>(s.e), 0.0);
        for (isize j = 0; j < s.m; ++j) {
          if (score[static_cast<std::size_t>(j)] == none) continue;
          const double w = std::exp(score[static_cast<std::size_t>(j)] - shift);
          sum += w;
          for (isize c = 0; c < s.e; ++c) o[static_cast<std::size_t>(c)] += w * p.v.get(b, g, j, c);
        }
        for (isize c = 0; c < s.e; ++c) p.out.set(b, h, i, c, sum == 0 ? 0.0 : o[static_cast<std::size_t>(c)] / sum);
        if (p.lse) p.lse.set(b, h, i, 0, sum == 0 ? none : shift + std::log(sum));
      }
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
