// SPDX-License-Identifier: MIT
#pragma once
/// @file  DiJiang attention from its definition, in double, all pairs: the twin that the vector path is tested against.
///
///   w_ij = e^{a_i + b_j} gamma^{i-j} sum_f phi_f(q_i) phi_f(k_j)          o_i = sum_j w_ij v_j  ( / sum_j w_ij )

#include <algorithm>

#include <fovea/dijiang.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

/// ln w of query i against key j; `first` is the position of query 0 among the keys.
inline double dijiang_log_weight(const dijiang_tables& t, const double* log_q, const double* log_k, isize h, isize g,
                                 isize i, isize j) {
  double top = -INFINITY, sum = 0;
  for (isize f = 0; f < t.r; ++f) top = std::max(top, log_q[f] + log_k[f]);
  if (top == -INFINITY) return top;
  for (isize f = 0; f < t.r; ++f) sum += std::exp(log_q[f] + log_k[f] - top);
  double w = top + std::log(sum);
  if (!t.gamma.empty())
    w += static_cast<double>(i - j) * std::log(t.gamma[t.gamma.size() == 1 ? 0 : static_cast<std::size_t>(g)]);
  if (t.gains())
    w += static_cast<double>(t.log_d1[static_cast<std::size_t>(h * t.positions + i)]) +
         static_cast<double>(t.log_d2[static_cast<std::size_t>(g * t.positions + j)]);
  return w;
}

inline void prefill(const dijiang_attention& mechanism, const problem& p) {
  const dijiang_tables& t = *mechanism.tables;
  const isize n = p.q.length, m = p.k.length, d = p.q.width, e = p.v.width,
              group = p.k.heads > 0 ? p.q.heads / p.k.heads : 0;
  std::vector<double> x(static_cast<std::size_t>(d)), log_k(static_cast<std::size_t>(m * t.r)),
      log_q(static_cast<std::size_t>(t.r)), w(static_cast<std::size_t>(m));
  for (isize b = 0; b < p.q.batch; ++b)
    for (isize g = 0; g < p.k.heads; ++g) {
      for (isize j = 0; j < m; ++j) {
        for (isize c = 0; c < d; ++c) x[static_cast<std::size_t>(c)] = p.k.get(b, g, j, c);
        t.define(g, x.data(), log_k.data() + j * t.r);
      }
      for (isize h = g * group; h < (g + 1) * group; ++h)
        for (isize i = 0; i < n; ++i) {
          for (isize c = 0; c < d; ++c) x[static_cast<std::size_t>(c)] = p.q.get(b, h, i, c);
          t.define(g, x.data(), log_q.data());
          const isize at = i + m - n, seen = mechanism.is_causal ? std::clamp(at + 1, isize{0}, m) : m;
          double top = -INFINITY, sum = 0;
          for (isize j = 0; j < seen; ++j) {
            w[static_cast<std::size_t>(j)] = dijiang_log_weight(t, log_q.data(), log_k.data() + j * t.r, h, g, at, j);
            top = std::max(top, w[static_cast<std::size_t>(j)]);
          }
          if (!mechanism.normalise || top == -INFINITY) top = 0;
          for (isize j = 0; j < seen; ++j)
            sum += w[static_cast<std::size_t>(j)] = std::exp(w[static_cast<std::size_t>(j)] - top);
          for (isize c = 0; c < e; ++c) {
            double o = 0;
            for (isize j = 0; j < seen; ++j) o += w[static_cast<std::size_t>(j)] * p.v.get(b, g, j, c);
            p.out.set(b, h, i, c, mechanism.normalise ? (sum > 0 ? o / sum : 0.0) : o);
          }
        }
    }
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
