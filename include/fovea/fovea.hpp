// SPDX-License-Identifier: MIT
#pragma once
/// @file  Everything for the CPU: all mechanisms, their masks, scores and feature maps, any_attention. No third-party library but xsimd.

#include <fovea/any_attention.hpp>
#include <fovea/core/chunks.hpp>
#include <fovea/core/exec.hpp>
#include <fovea/core/mechanism.hpp>
#include <fovea/core/packed.hpp>
#include <fovea/core/partial.hpp>
#include <fovea/dijiang.hpp>
#include <fovea/efficient.hpp>
#include <fovea/hybrid.hpp>
#include <fovea/hybrid/stores.hpp>
#include <fovea/linear.hpp>
#include <fovea/linformer.hpp>
#include <fovea/mask/causal.hpp>
#include <fovea/mask/function.hpp>
#include <fovea/mask/patterns.hpp>
#include <fovea/mask/table.hpp>
#include <fovea/mask/tree.hpp>
#include <fovea/nystrom.hpp>
#include <fovea/position/rope_table.hpp>
#include <fovea/position/rotate.hpp>
#include <fovea/score/packed.hpp>
#include <fovea/score/score.hpp>
#include <fovea/softmax.hpp>
#include <fovea/softmax/cascade.hpp>
#include <fovea/version.hpp>
#include <fovea/windowed.hpp>
