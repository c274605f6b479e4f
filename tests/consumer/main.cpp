// SPDX-License-Identifier: MIT
/// @file  A user's first program: one query that sees two keys, checked against the formula; ends with 0 if it agrees.

#include <cmath>
#include <cstdio>
#include <fovea/fovea.hpp>
#if defined(CONSUMER_HAS_JSON)
#include <fovea/interop/json.hpp>
#endif

float second_unit(const float* q, const float* k, const float* v);

int main() {
  const float q[] = {1, 0}, k[] = {1, 0, 0, 1}, v[] = {2, 4};
  float o[] = {NAN};
  fovea::softmax_attention exact;
  exact.scale = 1;
  fovea::prefill(fovea::serial, exact, fovea::bhnd(q, 1, 1, 1, 2), fovea::bhnd(k, 1, 1, 2, 2),
                 fovea::bhnd(v, 1, 1, 2, 1), fovea::bhnd(o, 1, 1, 1, 1));
  const double want = (2 * std::exp(1.0) + 4) / (std::exp(1.0) + 1);
  const float other = second_unit(q, k, v);
  std::printf("fovea %s: %.6f and %.6f, wanted %.6f\n", FOVEA_VERSION_STRING, static_cast<double>(o[0]),
              static_cast<double>(other), want);
  return std::abs(static_cast<double>(o[0]) - want) < 1e-5 && other == o[0] ? 0 : 1;
}
