// SPDX-License-Identifier: MIT
#pragma once
/// @file  Which layers a policy may change: each layer (and each three neighbours) swapped in alone, ranked by mean KL to exact.
///
/// Contract   the score of a swap is the mean over texts of its mean KL, each text counting once: a retrieval text weighs as much as
///            a long plain one. The loss of a swap is told as well; it is the noisier figure.

#include <nlohmann/json_fwd.hpp>

#include "comparison.hpp"
#include "judging.hpp"
#include "policy.hpp"

namespace engine {

struct swapped {
  isize first = 0, last = 0;  ///< layers
  std::vector<text_summary> texts;
  double score = 0;  ///< mean KL, nats
};
struct ranking {
  std::vector<std::string> texts;
  std::vector<isize> predictions;
  std::vector<swapped> layers, triples;  ///< quietest first
};

ranking rank_layers(const model& net, fovea::exec_ref exec, const policy& p, const std::vector<judged_text>& texts,
                    const sensitivity_options& o);

nlohmann::ordered_json to_json(const ranking& r);
/// Layers, quietest first, out of what to_json wrote. `path` is named in errors.
std::vector<isize> quietest_first(const nlohmann::json& j, const std::string& path, isize model_layers);

}  // namespace engine
