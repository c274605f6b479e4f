// SPDX-License-Identifier: MIT
#pragma once
/// @file  The dense layers: y = x W^T on mapped weights, RMSNorm, SwiGLU.
///
/// A few rows (decoding) read W as it is stored, once, and are limited by memory; many rows convert panels of W to float in cache and
/// multiply with Eigen.
///
/// Contract   products of one call are independent; bits depend on the number of rows, not on threads.

#include <span>
#include <vector>

#include <fovea/core/exec.hpp>

#include "weights.hpp"

namespace engine {

struct product {
  const matrix* w;
  float* out;        ///< [rows, w->rows]
  bool add = false;  ///< out += instead of out =
};

/// x [rows, columns]; all products of one x at once.
void multiply(fovea::exec_ref exec, const float* x, isize rows, std::span<const product> products);

/// out = x / sqrt(mean(x^2) + eps) * weight, row by row.
void rms_norm(fovea::exec_ref exec, const float* x, isize rows, const std::vector<float>& weight, double eps,
              float* out);

/// gate = silu(gate) * up, [rows, width] both.
void swiglu(fovea::exec_ref exec, float* gate, const float* up, isize rows, isize width);

/// One row of W as float.
void widen_row(const matrix& w, isize row, float* out);

/// log(sum(exp(x))), the sum in double over stretches of floats.
double log_sum_exp(std::span<const float> x);

}  // namespace engine
