// SPDX-License-Identifier: MIT
#pragma once
/// @file  What is tried on every input: named configurations, each with the weights it needs.

#include <functional>
#include <string>
#include <vector>

#include <fovea/any_attention.hpp>

#include "input.hpp"

namespace compare {

struct setting {
  int id = 0;
  std::string label, family, trained, note;
  /// The configuration for an input, or a reason why there is none. Weights are drawn with a fixed seed.
  std::function<fovea::configuration(const input&)> configure;
  std::function<fovea::arrays(const input&)> weights = [](const input&) { return fovea::arrays{}; };
  std::string weights_file = {};  ///< where they were read from, if they were
};

/// A mechanism that does not apply to an input says why.
struct not_applicable {
  std::string why;
};

std::vector<setting> built_in_settings();

}  // namespace compare
