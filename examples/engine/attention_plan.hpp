// SPDX-License-Identifier: MIT
#pragma once
/// @file  Which mechanism each query head of each layer uses: plain data, made by hand, by exact_plan or from a policy file.
///
///   attention_plan p = exact_plan(model.config());
///   p.layers[5] = {{softmax, {0, 1, 2, 3, 4, 5}}, {dijiang, {6, 7, 8}}};      heads 6 to 8 read KV head 2
///
/// Contract   a group is one call of fovea: its mechanism sees the query heads `heads` (ascending) as heads 0, 1, ... and the KV heads
///            that they read as 0, 1, ..., these lie in equal steps, and every one of them is read by equally many query heads.
///            `uniform_groups` cuts any set of heads into such groups; per-head weights of a mechanism are those of its group. Every head of a layer belongs to
///            exactly one group. q and k come turned by RoPE: mechanisms turn nothing themselves.

#include <span>
#include <vector>

#include <fovea/core/any.hpp>

#include "model.hpp"

namespace engine {

struct head_group {
  fovea::any_attention mechanism;
  std::vector<isize> heads;
};
using layer_plan = std::vector<head_group>;
struct attention_plan {
  std::vector<layer_plan> layers;
};

/// Causal softmax everywhere.
attention_plan exact_plan(const model_config& c);

/// `heads` (any order, no duplicates) as groups whose KV heads lie in equal steps and serve equally many query heads each.
std::vector<std::vector<isize>> uniform_groups(const model_config& c, std::vector<isize> heads);

/// The KV heads that a group of query heads reads, ascending.
std::vector<isize> kv_heads_of(const model_config& c, std::span<const isize> heads);

/// Refuses a plan that does not fit the model: layers, heads, groups, mechanisms without a state or with a rope of their own.
void check_plan(const attention_plan& p, const model_config& c);

}  // namespace engine
