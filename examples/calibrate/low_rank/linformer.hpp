// SPDX-License-Identifier: MIT
#pragma once
/// @file  calibrate --mechanism linformer: E and F of each file's layer, and how many slots an error asks for.

#include <nlohmann/json.hpp>
#include <string>

#include <fovea/train/projection_fit.hpp>

#include "compare/input.hpp"

namespace calibrate {

struct linformer_options {
  fovea::train::projection_fit_options how;
  fovea::isize slots = 0;  ///< 0: a quarter of the positions
  double error = 0;        ///< wanted mean held-out error; 0: take `slots`
  int threads = 1;
  std::string folder;
};

/// Prints the spectrum and what each number of slots reaches, writes the weights of the one chosen, and adds it to `settings`.
void fit_linformer(const compare::input& in, const linformer_options& o, nlohmann::json& settings);

}  // namespace calibrate
