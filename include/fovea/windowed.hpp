// SPDX-License-Identifier: MIT
#pragma once
/// @file  Exact softmax over a recent window and the first keys, a linear rest over all keys between them, one denominator.
///
///   windowed_attention m{.window = 64, .first = 4, .map = hedgehog{wq, wk}, .query_gate = gate};
///   state s = m.make_state(shape);   step(serial, m, q1, k1, v1, out1, s);       constant memory, whatever the length
///
/// The formula and the contract: windowed/mechanism.hpp. Reference: windowed/reference.hpp. What it is worth, and how the map is
/// learned: docs/mechanisms/windowed.md.

#include <fovea/windowed/backward.hpp>
#include <fovea/windowed/mechanism.hpp>
#include <fovea/windowed/prefill.hpp>
#include <fovea/windowed/state.hpp>
