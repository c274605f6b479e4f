// SPDX-License-Identifier: MIT
#pragma once
/// @file  Gradients of softmax attention from their definition, in double: plain loops over rows and the keys that they see.
///
///   p_ij = e^(s_ij - lse_i),   dp_ij = do_i . v_j,   ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)
///   dv_j += p_ij do_i,   dq_i += scale slope_ij ds_ij k_j,   dk_j += scale slope_ij ds_ij q_i,   dbias += ds_ij,   dsink_h -= p_sink sum_j p_ij dp_ij
///
/// Contract   makes its own probabilities: needs neither out nor lse. The slope of a score is the difference quotient of the score
///            policy itself, and dbias belongs to an additive_bias that is the last policy. Slow on purpose.

#include <cmath>
#include <limits>
#include <vector>

#include <fovea/softmax.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

/// Dense row-major: dq [B, H, n, d], dk [B, G, m, d], dv [B, G, m, e], ds [B, H, n, m] (by the modified score), dsinks [H].
struct softmax_gradients {
  std::vector<double> dq, dk, dv, ds, dsinks;
};

/// Difference quotient of fourth order: exact to about 1e-11.
template <class F>
double slope_of(F&& f, double x) {
  const double step = 5e-4, near = (f(x + step) - f(x - step)) / (2 * step),
               far = (f(x + 2 * step) - f(x - 2 * step)) / (4 * step);
  return (4 * near - far) / 3;
}

inline softmax_gradients backward(const softmax_attention& m, const tensor_ref& q, const tensor_ref& k,
                                  const tensor_ref& v, const tensor_ref& dout) {
  const shape s{q.batch, q.heads, v.heads, q.length, k.length, q.width, v.width, q.type};
  const auto room = [](isize count) { return std::vector<double>(static_cast<std::size_t>(count), 0.0); };
  softmax_gradients out{room(s.B * s.H * s.n * s.d), room(s.B * s.G * s.m * s.d), room(s.B * s.G * s.m * s.e),
                        room(s.B * s.H * s.n * s.m), room(s.H)};
  const double scale = m.scale_for(s), none = -std::numeric_limits<double>::infinity();
  const auto at = [](std::vector<double>& x, isize index) -> double& { return x[static_cast<std::size_t>(index)]; };
  std::vector<double> score = room(s.m), slope = room(s.m), dp = room(s.m);
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < s.n; ++i) {
        const isize g = h / s.group();
        mask_site site = m.site(s, b);
        site.h = h;
        const double sink = m.sinks != nullptr ? static_cast<double>(m.sinks[h]) : none;
        double top = sink;
        for (isize j = 0; j < s.m; ++j) {
          at(score, j) = none;
          if (!m.mask.visible(site, i, j)) continue;
          double dot = 0;
          for (isize c = 0; c < s.d; ++c) dot += q.get(b, h, i, c) * k.get(b, g, j, c);
          const auto modified = [&](double x) { return m.score(site, i, j, x); };
          at(score, j) = modified(scale * dot);
          at(slope, j) = !m.score.unit_slope() ? slope_of(modified, scale * dot) : 1;
          if (at(score, j) > top) top = at(score, j);
        }
        if (top == none) continue;
        double sum = std::exp(sink - top), mean = 0;
        for (isize j = 0; j < s.m; ++j) sum += std::exp(at(score, j) - top);
        for (isize j = 0; j < s.m; ++j) {
          if (at(score, j) == none) continue;
          at(dp, j) = 0;
          for (isize c = 0; c < s.e; ++c) at(dp, j) += dout.get(b, h, i, c) * v.get(b, g, j, c);
          mean += std::exp(at(score, j) - top) / sum * at(dp, j);
        }
        at(out.dsinks, h) -= std::exp(sink - top) / sum * mean;
        for (isize j = 0; j < s.m; ++j) {
          if (at(score, j) == none) continue;
          const double p = std::exp(at(score, j) - top) / sum, ds = p * (at(dp, j) - mean);
          at(out.ds, ((b * s.H + h) * s.n + i) * s.m + j) = ds;
          const isize key = (b * s.G + g) * s.m + j;
          for (isize c = 0; c < s.e; ++c) at(out.dv, key * s.e + c) += p * dout.get(b, h, i, c);
          for (isize c = 0; c < s.d; ++c) {
            at(out.dq, ((b * s.H + h) * s.n + i) * s.d + c) += scale * at(slope, j) * ds * k.get(b, g, j, c);
            at(out.dk, key * s.d + c) += scale * at(slope, j) * ds * q.get(b, h, i, c);
          }
        }
      }
  return out;
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
