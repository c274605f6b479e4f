// SPDX-License-Identifier: MIT
#pragma once
/// @file  AdamW over a plain vector of floats, with a learning rate that falls along a cosine.
///
///   m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  x -= rate (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay x)
///
/// Contract   the moments are the caller's to save: with them, x and the step, a run continues with the same bits.
/// Source     Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.

#include <cmath>
#include <vector>

#include <fovea/core/types.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace train {

struct adamw {
  double rate = 1e-2, decay = 0.0, b1 = 0.9, b2 = 0.95, eps = 1e-8;

  /// `step` counts from 1.
  void update(isize step, double rate_now, const std::vector<float>& gradient, std::vector<float>& m,
              std::vector<float>& v, std::vector<float>& x) const {
    const double first = 1 - std::pow(b1, static_cast<double>(step)),
                 second = 1 - std::pow(b2, static_cast<double>(step));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double g = static_cast<double>(gradient[i]);
      const double a = b1 * static_cast<double>(m[i]) + (1 - b1) * g,
                   b = b2 * static_cast<double>(v[i]) + (1 - b2) * g * g;
      m[i] = static_cast<float>(a), v[i] = static_cast<float>(b);
      const double before = static_cast<double>(x[i]);
      x[i] = static_cast<float>(before - rate_now * (a / first / (std::sqrt(b / second) + eps) + decay * before));
    }
  }
};

/// From the full rate at step 1 to `floor` times it at `steps`, after a short rise.
inline double cosine_rate(double rate, isize step, isize steps, isize warm = 10, double floor = 0.02) {
  const double rise = step < warm ? static_cast<double>(step) / static_cast<double>(warm) : 1.0;
  const double at = steps > 1 ? static_cast<double>(step - 1) / static_cast<double>(steps - 1) : 1.0;
  return rate * rise * (floor + (1 - floor) * 0.5 * (1 + std::cos(3.14159265358979323846 * at)));
}

}  // namespace train
}  // namespace FOVEA_ABI
}  // namespace fovea
