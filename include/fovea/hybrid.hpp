// SPDX-License-Identifier: MIT
#pragma once
/// @file  Hybrid sparse attention: exact over the keys that matter, one pooled token for each block that is skipped, one denominator.
///
///   hybrid_attention m{.is_causal = true};                                       int8 selection, a quarter of the blocks, pooled rest
///   hybrid_attention::hsa(hsa_mode::sparse, 128), ::over(blocks, 64, 64, true), ::moba(64, 3)
///
/// The formula, the options and the contract: hybrid/mechanism.hpp. Reference: hybrid/reference.hpp. What it is worth, the proof of its
/// error bound, and what it costs: docs/mechanisms/hybrid.md. Beside the caller's own KV stores: hybrid/stores.hpp.

#include <fovea/hybrid/backward.hpp>
#include <fovea/hybrid/certificate.hpp>
#include <fovea/hybrid/check.hpp>
#include <fovea/hybrid/cost.hpp>
#include <fovea/hybrid/mechanism.hpp>
#include <fovea/hybrid/prefill.hpp>
#include <fovea/hybrid/recall.hpp>
#include <fovea/hybrid/step.hpp>
#include <fovea/hybrid/target.hpp>
