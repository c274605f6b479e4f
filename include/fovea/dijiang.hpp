// SPDX-License-Identifier: MIT
#pragma once
/// @file  DiJiang: linear attention whose feature map is the exponential of a weighted cosine transform.
///
///   auto m = dijiang_attention::make({.head_dim = 64, .features = 128, .seed = 1});     phi(x) = D exp(T C x), and corrected
///   auto state = m.make_state(shape);                                                   r (e + 2) numbers a head, whatever the length
///   prefill(serial, m, q, k, v, out, state);   step(serial, m, q1, k1, v1, out1, state);
///
/// Options and forms: dijiang/tables.hpp. The contract and the mechanism itself: dijiang/mechanism.hpp. Weights fitted to data:
/// dijiang/weights.hpp. As a map of linear_attention: dijiang/features.hpp. Reference: dijiang/reference.hpp.
/// Limits     untrained it approximates nothing: docs/mechanisms/dijiang.md.

#include <fovea/dijiang/backward.hpp>
#include <fovea/dijiang/mechanism.hpp>
#include <fovea/dijiang/merge.hpp>
#include <fovea/dijiang/prefill.hpp>
