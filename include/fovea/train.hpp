// SPDX-License-Identifier: MIT
#pragma once
/// @file  Learning feature maps from captured queries, keys and values: attention transfer, AdamW, checkpoints.
///
/// Not part of fovea.hpp: an engine that runs learned maps does not need it. What it reaches: docs/mechanisms/learning.md.

#include <fovea/train/calibration.hpp>
