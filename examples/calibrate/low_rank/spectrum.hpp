// SPDX-License-Identifier: MIT
#pragma once
/// @file  What rank k can do for a layer's attention matrices, and where E and F start from. Dense W x W matrices, in double, with Eigen.
///
///   P_w [W x W] = softmax(scale Q K^T) of window w of one head;    each text's own subspace: eigenvectors of P_w^T P_w
///   the subspace that a fixed projection has for all texts: the first k eigenvectors of sum_w P_w^T P_w over the windows learned from

#include <string>
#include <vector>

#include <fovea/train/projection_fit.hpp>

#include "compare/input.hpp"

namespace calibrate {

using fovea::isize;

struct spectrum_row {
  isize k = 0;
  double own_energy =
      0;  ///< share of |P|^2 in each held-out window's own first k singular directions; mean over heads and windows
  double fixed_energy = 0;  ///< share of the same windows' |P|^2 in the k directions of the windows learned from
  double own_error = 0;     ///< |P_k V - P V| / |P V| of both
  double fixed_error = 0;
};
std::vector<spectrum_row> spectrum(const compare::input& in, const fovea::train::projection_fit& fit,
                                   const std::vector<isize>& ks);

enum class start_kind { means, singular };
const char* name_of(start_kind k);

struct projections {
  std::vector<float> E, F;  // [maps, W, slots]
};
/// E: segment means, or the fixed subspace's directions, each scaled to an absolute sum of 1. F: least squares with a ridge,
/// min |P~ F^T - P|^2 over the windows learned from, P~ = softmax(scale Q (E^T K)^T); with key_value sharing F = E.
projections start_of(start_kind kind, const compare::input& in, const fovea::train::projection_fit& fit, isize slots,
                     fovea::train::projection_sharing share);
/// E = F = segment means: what needs no data.
projections segment_means(const fovea::train::projection_fit& fit, isize slots);

}  // namespace calibrate
