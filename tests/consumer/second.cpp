// SPDX-License-Identifier: MIT
/// @file  A second translation unit of the same program, with one mechanism's header only: everything must link once.

#include <fovea/core/exec.hpp>
#include <fovea/softmax.hpp>

float second_unit(const float* q, const float* k, const float* v) {
  float o = 0;
  fovea::softmax_attention exact;
  exact.scale = 1;
  fovea::prefill(fovea::serial, exact, fovea::bhnd(q, 1, 1, 1, 2), fovea::bhnd(k, 1, 1, 2, 2),
                 fovea::bhnd(v, 1, 1, 2, 1), fovea::bhnd(&o, 1, 1, 1, 1));
  return o;
}
