// SPDX-License-Identifier: MIT
#pragma once
/// @file  RoPE of a configured softmax_attention: the keys rope_* and the tensor rope_factors. Names and defaults are those of the
///        `rope_parameters` of Hugging Face models.

#include <fovea/softmax/configure_tables.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace detail {

inline rope_scaling configure_scaling(configuration_reader& c) {
  enum class kind { none, linear, ntk, yarn, llama3, factors };
  const array* listed = c.tensor("rope_factors");
  const kind how = c.choice("rope_scaling",
                            {{"none", kind::none},
                             {"linear", kind::linear},
                             {"ntk", kind::ntk},
                             {"yarn", kind::yarn},
                             {"llama3", kind::llama3},
                             {"factors", kind::factors}},
                            listed != nullptr ? kind::factors : kind::none);
  require((how == kind::factors) == (listed != nullptr),
          "rope_scaling \"factors\" and the tensor rope_factors go together");
  switch (how) {
    case kind::none: return {};
    case kind::linear: return rope_linear{c.number("rope_factor", 1.0)};
    case kind::ntk:
      return rope_ntk{c.number("rope_factor", 1.0), c.integer("rope_original", 0), c.integer("rope_length", 0)};
    case kind::yarn: {
      rope_yarn s{.factor = c.number("rope_factor", 1.0), .original = c.integer("rope_original", 0)};
      s.beta_fast = c.number("rope_beta_fast", s.beta_fast), s.beta_slow = c.number("rope_beta_slow", s.beta_slow);
      s.truncate = c.flag("rope_truncate", s.truncate);
      s.attention_factor = c.number("rope_attention_factor", s.attention_factor);
      s.mscale = c.number("rope_mscale", s.mscale),
      s.mscale_all_dim = c.number("rope_mscale_all_dim", s.mscale_all_dim);
      return s;
    }
    case kind::llama3: {
      rope_llama3 s;
      s.factor = c.number("rope_factor", s.factor), s.original = c.integer("rope_original", s.original);
      s.low = c.number("rope_low", s.low), s.high = c.number("rope_high", s.high);
      return s;
    }
    case kind::factors: return rope_factors{listed->doubles(), c.number("rope_attention_factor", 1.0)};
  }
  return {};
}

/// The turn of q and k, or null where no key asks for it.
inline const rope* configure_rope(configuration_reader& c, softmax_tables& keep) {
  c.call_input("positions");
  const bool asked = c.has("rope_theta");
  require(asked || (!c.has("rope_width") && !c.has("rope_positions") && !c.has("rope_scaling") &&
                    !c.has("rope_pairing") && c.tensor("rope_factors") == nullptr),
          "rope_width, rope_positions, rope_scaling, rope_pairing and rope_factors go with rope_theta (10000 in many "
          "models)");
  if (!asked) return nullptr;
  rope_options o;
  o.base = c.number("rope_theta", o.base);
  require(c.has("rope_width") && c.has("rope_positions"),
          "rope_theta was given; wanted rope_width, the rotated elements of a head, and rope_positions, the most "
          "positions, as well");
  o.width = c.integer("rope_width", 0), o.positions = c.integer("rope_positions", 0);
  o.pair = c.choice("rope_pairing", {{"neox", rope::pairing::neox}, {"gptj", rope::pairing::gptj}}, o.pair);
  o.scaling = configure_scaling(c);
  o.f64 = true;
  keep.turn = rope_table(o);
  keep.turn_view = keep.turn;
  return &keep.turn_view;
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
