// SPDX-License-Identifier: MIT
#pragma once
/// @file  windowed_attention from its definition, in double: one sum over all keys of a row.

#include <cmath>
#include <limits>
#include <vector>

#include <fovea/windowed.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

inline void prefill(const windowed_attention& m, const problem& p) {
  const shape s = p.shape();
  const isize r = m.map.features(s.d);
  const double scale = m.scale ? *m.scale : 1.0 / std::sqrt(static_cast<double>(s.d));
  const auto size = [](isize x) { return static_cast<std::size_t>(x); };
  const auto row_of = [&](const tensor_ref& t, isize b, isize h, isize i) {
    std::vector<double> row(size(t.width));
    for (isize c = 0; c < t.width; ++c) row[size(c)] = t.get(b, h, i, c);
    return row;
  };
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h) {
      const isize g = h / s.group(), first_head = g * s.group();
      std::vector<double> phi_k(size(s.m * r)), log_k(size(s.m)), phi_q(size(r));
      for (isize j = 0; j < s.m; ++j)
        log_k[size(j)] =
            m.map.define({first_head, g, j, true, 0.0}, row_of(p.k, b, g, j).data(), s.d, phi_k.data() + j * r);
      for (isize i = 0; i < s.n; ++i) {
        const isize at = i + s.m - s.n;
        const std::vector<double> q = row_of(p.q, b, h, i);
        const double log_q = m.map.define({h, g, at, false, 0.0}, q.data(), s.d, phi_q.data());
        std::vector<double> logit(size(s.m), -std::numeric_limits<double>::infinity());
        double level = m.log_weight.data != nullptr ? static_cast<double>(*m.log_weight.row(0, h, 0)) : 0.0;
        for (isize c = 0; c < s.d && m.query_gate.data != nullptr; ++c)
          level += static_cast<double>(m.query_gate.row(0, h, 0)[c]) * q[size(c)];
        double top = -std::numeric_limits<double>::infinity(), window_top = top;
        for (isize j = 0; j <= at; ++j) {
          const bool in_window = j > at - m.window;
          if (!in_window && j >= m.first) continue;
          double dot = 0;
          for (isize c = 0; c < s.d; ++c) dot += q[size(c)] * p.k.get(b, g, j, c);
          logit[size(j)] = scale * dot;
          if (!(scale * dot <= top)) top = scale * dot;
          if (in_window && !(scale * dot <= window_top)) window_top = scale * dot;
        }
        if (m.level == rest_level::window_maximum) level += window_top;
        double sum = 0;
        std::vector<double> o(size(s.e), 0.0);
        for (isize j = 0; j <= at; ++j) {
          double u = 0;
          if (j > at - m.window || j < m.first) {
            u = std::exp(logit[size(j)] - top);
          } else {
            for (isize f = 0; f < r; ++f) u += phi_q[size(f)] * phi_k[size(j * r + f)];
            u *= std::exp(level + log_q + log_k[size(j)] - top);
          }
          sum += u;
          for (isize c = 0; c < s.e; ++c) o[size(c)] += u * p.v.get(b, g, j, c);
        }
        for (isize c = 0; c < s.e; ++c) p.out.set(b, h, i, c, sum == 0 ? 0.0 : o[size(c)] / sum);
        if (p.lse) p.lse.set(b, h, i, 0, at < 0 ? -std::numeric_limits<double>::infinity() : top + std::log(sum));
      }
    }
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
