// SPDX-License-Identifier: MIT
#pragma once
/// @file  linear_attention from a configuration.
///
/// Keys       rule ("none" | "decay" | "gla" | "delta" | "gated_delta" | "kda" | "gdn2"), causal, normalise, scale, eps, clamp, key_sum_eps,
///            gamma (one number, or one per KV head; rule decay), map and its keys (feature/configure.hpp).
/// Tensors    the map's weights, gamma. With each call: g, beta, b, w as the rule needs them, S0 and z0.
/// Defaults   causal, scale 1, no epsilon; normalise for rule none only; map elu1 for rule none, identity for the others.

#include <fovea/core/any.hpp>
#include <fovea/feature/configure.hpp>
#include <fovea/linear.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

struct linear_weights {
  std::vector<double> gamma;
  std::shared_ptr<const void> map;
};

inline void configure_gates(configuration_reader& c, const linear_attention& m) {
  const auto u = m.rule;
  if ((u == rule::decay && m.gamma.empty()) || u == rule::gla || u == rule::gated_delta || u == rule::kda ||
      u == rule::gdn2)
    c.call_input("g");
  if (is_delta(u) && u != rule::gdn2) c.call_input("beta");
  if (u == rule::gdn2) c.call_input("b"), c.call_input("w");
  if (m.streaming()) c.call_input("S0"), c.call_input("z0");
}

}  // namespace detail

inline any_attention configure_linear(configuration_reader& c) {
  auto keep = std::make_shared<detail::linear_weights>();
  linear_attention m;
  m.rule = c.choice("rule",
                    {{"none", rule::none},
                     {"decay", rule::decay},
                     {"gla", rule::gla},
                     {"delta", rule::delta},
                     {"gated_delta", rule::gated_delta},
                     {"kda", rule::kda},
                     {"gdn2", rule::gdn2}},
                    rule::none);
  m.map = configure_map(c, keep->map);
  m.scale = c.number("scale", 1.0);
  m.is_causal = c.flag("causal", true);
  if (c.has("normalise")) m.normalise = c.flag("normalise", true);
  m.eps = c.number("eps", 0.0), m.clamp = c.number("clamp", 0.0), m.key_sum_eps = c.number("key_sum_eps", 0.0);
  keep->gamma = c.numbers("gamma");
  if (const array* gamma = c.tensor("gamma"); gamma != nullptr) {
    require(keep->gamma.empty(), "gamma was given as a key and as a tensor; wanted one of them");
    keep->gamma = gamma->doubles();
  }
  m.gamma = keep->gamma;
  detail::check_own_values(m);
  detail::configure_gates(c, m);
  return any_attention::hold(m, keep);
}

}  // namespace FOVEA_ABI
}  // namespace fovea
