// SPDX-License-Identifier: MIT
#pragma once
/// @file  Gradients of hybrid attention from their definition, in double: plain loops, the selection taken as it is.
///
///   dS_ix = p_ix (do_i . v_x - sum_x p_ix do_i . v_x) for the candidates x of row i: keys, and means of keys, k_x = (1 / n_x) sum_j k_j
///
/// Contract   slow on purpose; makes its own probabilities. With compensation none and zeroth.

#include <fovea/hybrid/reference.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace reference {

/// Dense row-major: dq [B, H, n, d], dk [B, G, m, d], dv [B, G, m, e].
struct hybrid_gradients {
  std::vector<double> dq, dk, dv;
};

inline hybrid_gradients backward(const hybrid_attention& m, const problem& p, const tensor_ref& dout) {
  const shape s = p.shape();
  const auto room = [](isize count) { return std::vector<double>(static_cast<std::size_t>(count), 0.0); };
  hybrid_gradients out{room(s.B * s.H * s.n * s.d), room(s.B * s.G * s.m * s.d), room(s.B * s.G * s.m * s.e)};
  const auto at = [](std::vector<double>& x, isize index) -> double& { return x[static_cast<std::size_t>(index)]; };
  const double scale = m.scale_for(s);
  for (isize b = 0; b < s.B; ++b)
    for (isize h = 0; h < s.H; ++h) {
      const isize g = h / s.group();
      const auto kept = hybrid_detail::kept_keys_of(m, p, b, g);
      const auto pools = hybrid_detail::blocks_of(m.block_k / m.parts, p, b, g, kept);
      const auto fates =
          m.select == block_selector::pattern ? std::vector<std::vector<int>>{} : block_fates(m, p, b, h);
      for (isize i = 0; i < s.n; ++i) {
        const auto all = hybrid_detail::row_candidates(m, p, fates, pools, kept, b, h, i);
        if (all.empty()) continue;
        double top = all[0].logit, sum = 0, mean = 0;
        for (const auto& x : all) top = std::max(top, x.logit);
        for (const auto& x : all) sum += std::exp(x.logit - top);
        std::vector<double> p_of, dp;
        for (const auto& x : all) {
          double dot = 0;
          for (isize c = 0; c < s.e; ++c)
            dot += dout.get(b, h, i, c) *
                   (x.block == nullptr ? p.v.get(b, g, x.j, c) : x.block->mean_v[static_cast<std::size_t>(c)]);
          p_of.push_back(std::exp(x.logit - top) / sum), dp.push_back(dot);
          mean += p_of.back() * dot;
        }
        for (std::size_t y = 0; y < all.size(); ++y) {
          const auto& x = all[y];
          const double ds = scale * p_of[y] * (dp[y] - mean);
          const isize first = x.block == nullptr ? x.j : x.block->first,
                      last = x.block == nullptr ? x.j + 1 : x.block->last;
          const double share = x.block == nullptr ? 1.0 : 1.0 / static_cast<double>(x.block->count);
          for (isize c = 0; c < s.d; ++c)
            at(out.dq, ((b * s.H + h) * s.n + i) * s.d + c) +=
                ds * (x.block == nullptr ? p.k.get(b, g, x.j, c) : x.block->mean_k[static_cast<std::size_t>(c)]);
          for (isize j = first; j < last; ++j) {
            if (x.block != nullptr && kept[static_cast<std::size_t>(j)]) continue;
            const isize key = (b * s.G + g) * s.m + j;
            for (isize c = 0; c < s.d; ++c) at(out.dk, key * s.d + c) += share * ds * p.q.get(b, h, i, c);
            for (isize c = 0; c < s.e; ++c) at(out.dv, key * s.e + c) += share * p_of[y] * dout.get(b, h, i, c);
          }
        }
      }
    }
  return out;
}

}  // namespace reference
}  // namespace FOVEA_ABI
}  // namespace fovea
