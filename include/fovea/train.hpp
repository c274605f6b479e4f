// SPDX-License-Identifier: MIT
#pragma once
/// @file  Learning feature maps, and the projections of Linformer, from captured queries, keys and values: AdamW, checkpoints.
///
/// Not part of fovea.hpp: an engine that runs learned maps does not need it. What it reaches: docs/mechanisms/learning.md.

#include <fovea/train/calibration.hpp>
#include <fovea/train/projection_fit.hpp>
