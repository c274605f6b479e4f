// SPDX-License-Identifier: MIT
#pragma once
/// @file  Where DiJiang's radii t_j and signs come from: Monte Carlo, stratified, or quasi-Monte Carlo points through a quantile.
///
///   monte_carlo   independent uniform numbers                                     (the released code)
///   stratified    (pi(i) + 1/2) / r, pi a random permutation                      one point in each of r equal intervals
///   sobol         d points in `blocks` dimensions, shifted by one random vector modulo 1
///   halton        the same
///
/// Contract   the seed decides everything; the same seed gives the same tables on every platform (integers exactly, radii to the
///            rounding of `float`). Weighted quasi-Monte Carlo is any of these with weights D, given or fitted (dijiang/weights.hpp).
/// Source     docs/mechanisms/dijiang.md

#include <vector>

#include <fovea/feature/point_set.hpp>
#include <fovea/feature/quantile.hpp>
#include <fovea/feature/random.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

enum class dijiang_sampling : unsigned char { monte_carlo, stratified, sobol, halton };

namespace detail {

/// [blocks][d] numbers inside (0, 1).
inline std::vector<double> dijiang_points(dijiang_sampling how, isize blocks, isize d, feature::random_source& rng) {
  const isize r = blocks * d;
  std::vector<double> u(static_cast<std::size_t>(r));
  if (how == dijiang_sampling::monte_carlo) {
    for (auto& x : u) x = rng.uniform();
  } else if (how == dijiang_sampling::stratified) {
    const auto order = rng.permutation(r);
    for (std::size_t i = 0; i < u.size(); ++i) u[i] = (static_cast<double>(order[i]) + 0.5) / static_cast<double>(r);
  } else {
    require(blocks <= feature::point_set_dimensions, "dijiang: ", blocks,
            " blocks of features with a Sobol or Halton set; wanted at most ", feature::point_set_dimensions,
            ", or stratified sampling");
    const auto points = how == dijiang_sampling::sobol ? feature::sobol(d, blocks) : feature::halton(d, blocks);
    for (isize b = 0; b < blocks; ++b) {
      const double shift = rng.uniform();
      for (isize j = 0; j < d; ++j) {
        const double x = points[static_cast<std::size_t>(j * blocks + b)] + shift;
        const double inside = x - std::floor(x);
        u[static_cast<std::size_t>(b * d + j)] = inside < 0x1p-40       ? 0x1p-40
                                                 : inside > 1 - 0x1p-40 ? 1 - 0x1p-40
                                                                        : inside;
      }
    }
  }
  return u;
}

/// t of the paper and of the released code: standard normal quantiles.
inline std::vector<float> normal_radii(dijiang_sampling how, isize blocks, isize d, feature::random_source& rng) {
  const auto u = dijiang_points(how, blocks, d, rng);
  std::vector<float> t(u.size());
  for (std::size_t i = 0; i < u.size(); ++i) t[i] = static_cast<float>(feature::normal_quantile(u[i]));
  return t;
}
/// Radii of the corrected form: the length of a d-dimensional Gaussian vector, with a random sign.
inline std::vector<float> chi_radii(dijiang_sampling how, isize blocks, isize d, feature::random_source& rng) {
  const auto u = dijiang_points(how, blocks, d, rng);
  std::vector<float> t(u.size());
  for (std::size_t i = 0; i < u.size(); ++i) t[i] = static_cast<float>(rng.sign() * feature::chi_quantile(d, u[i]));
  return t;
}

}  // namespace detail

}  // namespace FOVEA_ABI
}  // namespace fovea
