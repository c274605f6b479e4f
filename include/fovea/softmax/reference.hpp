// SPDX-License-Identifier: MIT
#pragma once
/// @file  Softmax attention from its definition, in double: two passes over the keys of each row and nothing else.
///
///   s_ij = modify(scale q_i . k_j),   p_ij = e^(s_ij - max_j s_ij) where visible,   o_i = sum_j p_ij v_j / (sum_j p_ij + e^(sink - max))
///
/// With a rope q_i and k_j are turned first, in double. Contract   a row that sees nothing gives zeros and LSE = -inf. Slow on purpose.

#include <cmath>
#include <limits>
#include <vector>

#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

/// Head h of item b, row by row in double, each turned to its position where there is a rope.
template <class Position>
std::vector<double> rows_of_head(const tensor_ref& t, isize b, isize h, const rope* turn, Position&& position) {
  std::vector<double> rows(static_cast<std::size_t>(t.length * t.width));
  for (isize i = 0; i < t.length; ++i) {
    double* row = rows.data() + i * t.width;
    for (isize c = 0; c < t.width; ++c) row[c] = t.get(b, h, i, c);
    if (turn != nullptr) rotate(*turn, position(i), row);
  }
  return rows;
}

/// The scores of row i, -inf where it sees nothing; returns the largest of them and of its sink.
inline double scores_of_row(const softmax_attention& m, const shape& s, const mask_site& at, isize i, const double* q,
                            const std::vector<double>& k, double* score) {
  const double scale = m.scale_for(s), none = -std::numeric_limits<double>::infinity();
  double top = m.sinks != nullptr ? static_cast<double>(m.sinks[at.h]) : none;
  for (isize j = 0; j < s.m; ++j) {
    double& x = score[j];
    x = none;
    if (!m.mask.visible(at, i, j)) continue;
    double dot = 0;
    for (isize c = 0; c < s.d; ++c) dot += q[c] * k[static_cast<std::size_t>(j * s.d + c)];
    x = m.score(at, i, j, scale * dot);
    if (!(x <= top)) top = x;
  }
  return top;
}

inline void prefill(const softmax_attention& m, const problem& p) {
  const shape s = p.shape();
  const double none = -std::numeric_limits<double>::infinity();
  std::vector<double> score(static_cast<std::size_t>(s.m));
  const auto position = [&](isize b, isize j) {
    return p.positions != nullptr && j >= s.m - s.n ? p.positions[b * s.n + j - (s.m - s.n)] : j;
  };
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h) {
      const isize g = h / s.group();
      const auto q = rows_of_head(p.q, b, h, m.turn, [&](isize i) { return position(b, s.m - s.n + i); });
      const auto k = rows_of_head(p.k, b, g, m.turn, [&](isize j) { return position(b, j); });
      for (isize i = 0; i < s.n; ++i) {
        mask_site at = m.site(s, b);
        at.h = h;
        const double top = scores_of_row(m, s, at, i, q.data() + i * s.d, k, score.data());
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
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
