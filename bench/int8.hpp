// SPDX-License-Identifier: MIT
#pragma once
namespace bench {
/// int8/<full or causal>/D<d>/N<n>[/H<h>/G<g>]: `over_f32`, the time of f32 over the time of int8, in turns, rounding included.
/// int8_recipe/<recipe>: the same on built-in Q, K, V (SmolLM2, layer 14), and the error of a row against double, in per cent.
void register_int8();
}  // namespace bench
