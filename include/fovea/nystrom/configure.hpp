// SPDX-License-Identifier: MIT
#pragma once
/// @file  nystrom_attention from a configuration: landmarks, iterations, scale; tensor skip.
///
/// Contract   skip is [taps], for all heads, or [H, taps].

#include <vector>

#include <fovea/core/any.hpp>
#include <fovea/nystrom.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline any_attention configure_nystrom(configuration_reader& r) {
  auto weights = std::make_shared<std::vector<float>>();
  nystrom_attention m;
  m.landmarks = r.integer("landmarks", 64);
  m.iterations = r.integer("iterations", 6);
  m.scale = r.number("scale");
  if (const array* a = r.tensor("skip")) {
    require((a->rank() == 1 || a->rank() == 2) && is_float(a->type()) && a->size() > 0, "tensor skip is ",
            a->describe(), "; wanted [taps] or [H, taps] of a floating-point type");
    *weights = a->floats();
    m.skip = bhnd<const float>(weights->data(), 1, a->rank() == 2 ? a->dim(0) : 1, 1, a->dim(-1));
  }
  m.check_settings();
  return any_attention::hold(m, weights);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
