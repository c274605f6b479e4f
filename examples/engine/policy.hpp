// SPDX-License-Identifier: MIT
#pragma once
/// @file  Policy files: which attention each layer and head of a model uses. What `compare --budget` writes, and what a hand writes.
///
///   {"fovea_policy": 1,
///    "default":   {"mechanism": "softmax", "causal": true},
///    "overrides": [{"layers": [3, 5], "attention": {"mechanism": "hybrid", "causal": true, "budget": 0.25}},
///                  {"layers": [[0, 1], [9, 13]], "heads": [6, 7, 8], "attention": {...}, "weights": "layer.safetensors"}]}
///
/// Contract   "layers" is a range, ends included, or a list of ranges; without it all layers. "heads" are query heads; without it all.
///            A later override beats an earlier one. "attention" is a configuration (docs/configuration.md); "weights" its tensors,
///            relative to the policy's folder; tensors of all heads [H, ...] or all KV heads [G, ...] are cut to the heads of a
///            group. A mechanism with untrained maps is refused unless its override says "untrained": true. "label", "note",
///            "input", "error", "error_of", "cost_of", "measured" are for readers. Any other key is refused.
/// Errors     file_error: "PATH: overrides[2]: layer 31 does not exist; the model has layers 0 to 29".

#include <set>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include <fovea/core/configuration.hpp>

#include "attention_plan.hpp"

namespace engine {

struct layer_range {
  isize first = 0, last = 0;
};

struct policy_rule {
  std::vector<layer_range> layers = {};  ///< empty: all
  std::vector<isize> heads = {};         ///< empty: all
  fovea::configuration attention = {};
  std::string weights = {};  ///< path as this process opens it; "" for none
  bool untrained = false;
  std::string label = {};

  bool covers(isize layer) const;
  bool covers(isize layer, isize head) const;
};

/// Rules in order; the last one that covers a head decides. The first covers everything.
struct policy {
  std::string path;   ///< named in errors
  std::string label;  ///< "label" of the file, or the file's name without its folder and ending
  std::vector<policy_rule> rules;
};

policy exact_policy();
policy read_policy(const std::string& path);
policy parse_policy(const nlohmann::json& j, const std::string& path);

/// The mechanisms, weights read and cut; what check_plan refuses is refused.
attention_plan make_plan(const policy& p, const model_config& c);
/// Both in one.
attention_plan read_policy(const std::string& path, const model_config& c);

/// Layers in which some head is not exact attention with the engine's own store.
std::set<isize> changed_layers(const policy& p, const model_config& c);

/// Exact attention, but in `layers`, where it is what `p` says.
policy only_in(const policy& p, const std::set<isize>& layers, isize model_layers);

/// What read_policy reads; paths of weights relative to `folder`.
nlohmann::ordered_json to_json(const policy& p, const std::string& folder);

/// A tensor of all heads cut to those of a group: `heads` where its heads' dimension counts query heads, `kv` where it counts KV heads.
fovea::array cut_to_heads(const std::string& name, const fovea::array& a, const model_config& c,
                          const std::vector<isize>& heads, const std::vector<isize>& kv);

}  // namespace engine
