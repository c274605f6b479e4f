// SPDX-License-Identifier: MIT
#pragma once
/// @file  Exact softmax attention: the yardstick of every other mechanism, and their fallback.
///
///   o_i = sum_j p_ij v_j,   p_ij = e^(s_ij) / (sum_j e^(s_ij) [+ e^(sink_h)]),   s_ij = score(scale q_i . k_j), j visible to i
///
/// Contract   any n, m, d, e >= 1 widths; H a multiple of G; masks and score modifications as policies (mask/, score/). A row
///            that sees nothing gives zeros and LSE = -inf. With a state (a contiguous KV cache of the storage type) the mask must be causal.
/// Cost       2 (d + e) flops for each visible pair; tiles that the mask rules out are skipped; memory beyond inputs and outputs
///            does not depend on n or m.
/// Numerics   f32 accumulation (f64 for f64), exp2 of 1.9 ulp; docs/numerics.md.
/// Reference  softmax/reference.hpp.       Source  Vaswani et al., Attention Is All You Need (2017).

#include <fovea/softmax/backward.hpp>
#include <fovea/softmax/key_mass.hpp>
#include <fovea/softmax/mechanism.hpp>
#include <fovea/softmax/prefill.hpp>
#include <fovea/softmax/state.hpp>
#include <fovea/softmax/step.hpp>
#include <fovea/softmax/stores.hpp>
