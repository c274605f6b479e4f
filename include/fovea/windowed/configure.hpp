// SPDX-License-Identifier: MIT
#pragma once
/// @file  windowed_attention from a configuration.
///
/// Keys       window, first, scale, level ("absolute" | "window_maximum"), map and its keys (feature/configure.hpp).
/// Tensors    the map's weights; log_weight [H], query_gate [H, d].
/// Defaults   window 64, first 4, level absolute, map elu1, no weight and no gate.

#include <fovea/core/any.hpp>
#include <fovea/feature/configure.hpp>
#include <fovea/windowed.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

struct windowed_weights {
  std::vector<float> log_weight, query_gate;
  std::shared_ptr<const void> map;
};

}  // namespace detail

inline any_attention configure_windowed(configuration_reader& c) {
  auto keep = std::make_shared<detail::windowed_weights>();
  windowed_attention m;
  m.window = c.integer("window", m.window), m.first = c.integer("first", m.first);
  if (c.has("scale")) m.scale = c.number("scale", 1.0);
  m.level = c.choice("level", {{"absolute", rest_level::absolute}, {"window_maximum", rest_level::window_maximum}},
                     rest_level::absolute);
  if (const auto map = configure_map(c, keep->map)) m.map = *map;
  if (const array* w = c.tensor("log_weight"); w != nullptr) {
    keep->log_weight = w->floats();
    m.log_weight = bhnd<const float>(keep->log_weight.data(), 1, w->size(), 1, 1);
  }
  if (const array* w = c.tensor("query_gate"); w != nullptr) {
    require(w->rank() >= 2, "tensor query_gate is ", w->describe(), "; wanted [H, d]");
    keep->query_gate = w->floats();
    m.query_gate = bhnd<const float>(keep->query_gate.data(), 1, w->size() / w->dim(-1), 1, w->dim(-1));
  }
  return any_attention::hold(m, keep);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
