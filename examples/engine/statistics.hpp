// SPDX-License-Identifier: MIT
#pragma once
/// @file  The mean of a paired difference and how well it is known, from series whose neighbours depend on each other.
///
/// Contract   each series is cut into blocks of `block` values (the last one may be shorter; a rest under half a block joins it);
///            blocks count as independent, weighted by their lengths. low, high: 95 % by Student's t. With fewer than two
///            blocks nothing is known: the error is infinite.

#include <span>
#include <vector>

#include <fovea/core/types.hpp>

namespace engine {

using fovea::isize;

struct interval {
  double mean = 0, error = 0;  ///< standard error of the mean
  double low = 0, high = 0;
  isize blocks = 0, values = 0;
};
interval block_mean(std::span<const std::vector<double>> series, isize block);

/// The value below which a share `p` of x lies. Empty: 0.
double quantile(std::vector<double> x, double p);

/// 97.5 % point of Student's t with so many degrees of freedom.
double student(isize degrees);

}  // namespace engine
