// SPDX-License-Identifier: MIT
#pragma once
/// @file  Linear attention and its recurrent relatives: a state of constant size in place of the KV cache.
///
///   linear_attention m{.map = hedgehog{wq, wk}, .eps = 1e-6};                    S_t = S_{t-1} + phi(k_t) v_t^T, normalised
///   linear_attention g{.rule = rule::gated_delta, .scale = 0.125};               with {.gates = {.log_decay = g, .beta = beta}}
///   state s = m.make_state(shape);   step(serial, m, q1, k1, v1, out1, s);       constant memory
///
/// The rules, the contract and the mechanism itself: linear/mechanism.hpp. Feature maps: feature/. Reference: linear/reference.hpp.
/// Source  docs/mechanisms/linear.md

#include <fovea/linear/backward.hpp>
#include <fovea/linear/mechanism.hpp>
#include <fovea/linear/prefill.hpp>
