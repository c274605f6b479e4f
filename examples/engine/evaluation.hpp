// SPDX-License-Identifier: MIT
#pragma once
/// @file  What `evaluate` has measured, and how it is written: table, evaluate.json, evaluate.html.
///
/// evaluate.json: {"fovea", "created", "command", "machine": {"cpu", "isa", "threads"}, "model": {...}, "how": {...}, "texts": [...],
/// "policies": [{"label", "file", "layers", "policy", "texts": [figures], "all": figures, "speed": {...}}]}. The first policy is exact
/// attention. figures: "perplexity", "exact_perplexity", "loss" (perplexity over exact's, minus 1), "low", "high" (95 %), "error" (one
/// standard error), "kl" (nats), "kl_error", "kl_p99", "top1", "absolute" (nats), "predictions", "blocks". Not finite: null.

#include <nlohmann/json.hpp>

#include "comparison.hpp"
#include "judging.hpp"
#include "policy.hpp"

namespace engine {

struct evaluated_policy {
  policy what;
  isize layers = 0;  ///< that are not exact
  std::vector<text_summary> texts;
  text_summary all;
  speed cost;
  double prefill_ratio = 1, step_ratio = 1;  ///< exact over this, medians of runs in turns
};
struct evaluation {
  std::string command, model;
  model_config config;
  std::vector<judged_text> texts;
  std::vector<evaluated_policy> policies;
};

void print_table(const evaluation& e);
nlohmann::ordered_json to_json(const evaluation& e, const evaluate_options& o);
/// evaluate.json and evaluate.html in `folder`; whole or not at all.
void write_report(const nlohmann::ordered_json& j, const std::string& folder);

}  // namespace engine
