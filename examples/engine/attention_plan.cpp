// SPDX-License-Identifier: MIT
#include "attention_plan.hpp"

#include <algorithm>
#include <map>

#include <fovea/softmax.hpp>

#include "error.hpp"

namespace engine {

attention_plan exact_plan(const model_config& c) {
  std::vector<isize> all;
  for (isize h = 0; h < c.heads; ++h) all.push_back(h);
  const auto exact = fovea::any_attention::hold(fovea::softmax_attention{.mask = fovea::causal{}});
  return {std::vector<layer_plan>(static_cast<std::size_t>(c.layers), layer_plan{{exact, all}})};
}

std::vector<std::vector<isize>> uniform_groups(const model_config& c, std::vector<isize> heads) {
  std::sort(heads.begin(), heads.end());
  std::map<isize, std::vector<isize>> readers;  // of each KV head
  for (const isize h : heads) readers[h / c.group()].push_back(h);
  std::map<std::size_t, std::vector<isize>, std::greater<>> by_count;
  for (const auto& [g, of_g] : readers)
    by_count[of_g.size()].insert(by_count[of_g.size()].end(), of_g.begin(), of_g.end());
  std::vector<std::vector<isize>> groups;
  for (const auto& [count, group] : by_count) {
    // KV heads in equal steps: `count` query heads belong to each.
    isize last = -1, step = 0;
    for (std::size_t i = 0; i < group.size(); i += count) {
      const isize g = group[i] / c.group();
      const bool begins = i == 0 || (step != 0 && g - last != step);
      if (begins) groups.emplace_back();
      step = begins ? 0 : g - last, last = g;
      groups.back().insert(groups.back().end(), group.begin() + static_cast<std::ptrdiff_t>(i),
                           group.begin() + static_cast<std::ptrdiff_t>(i + count));
    }
  }
  return groups;
}

std::vector<isize> kv_heads_of(const model_config& c, std::span<const isize> heads) {
  std::vector<isize> out;
  for (const isize h : heads)
    if (out.empty() || out.back() != h / c.group()) out.push_back(h / c.group());
  return out;
}

namespace {

void check_group(const head_group& g, const model_config& c, isize layer) {
  const fovea::any_attention& m = g.mechanism;
  if (!m.streaming())
    refuse("layer ", layer, ": ", m.name(), " as configured has no state; a language model needs a causal mechanism");
  const auto* softmax = m.as<fovea::softmax_attention>();
  if (softmax != nullptr && softmax->turn != nullptr)
    refuse("layer ", layer, ": softmax brings a RoPE of its own; the engine turns q and k (leave out rope_theta)");
  for (const std::string& input : m.call_inputs())  // a state to start from and positions are optional
    if (input != "S0" && input != "z0" && input != "positions")
      refuse("layer ", layer, ": ", m.name(), " wants \"", input, "\" with each call; this model has no such gate");
  if (uniform_groups(c, g.heads).size() != 1)
    refuse("layer ", layer, ": a group of ", m.name(), " reads its KV heads unequally often (use uniform_groups)");
}

}  // namespace

void check_plan(const attention_plan& p, const model_config& c) {
  if (static_cast<isize>(p.layers.size()) != c.layers)
    refuse("the attention plan has ", p.layers.size(), " layers; the model has ", c.layers);
  for (isize l = 0; l < c.layers; ++l) {
    std::vector<int> taken(static_cast<std::size_t>(c.heads), 0);
    for (const head_group& g : p.layers[static_cast<std::size_t>(l)]) {
      for (std::size_t i = 0; i < g.heads.size(); ++i) {
        const isize h = g.heads[i];
        if (h < 0 || h >= c.heads) refuse("layer ", l, ": head ", h, " does not exist; the model has ", c.heads);
        if (i > 0 && h <= g.heads[i - 1]) refuse("layer ", l, ": the heads of a group must ascend");
        if (taken[static_cast<std::size_t>(h)]++ > 0) refuse("layer ", l, ": head ", h, " is in two groups");
      }
      if (g.heads.empty()) refuse("layer ", l, ": a group has no heads");
      check_group(g, c, l);
    }
    for (isize h = 0; h < c.heads; ++h)
      if (taken[static_cast<std::size_t>(h)] == 0) refuse("layer ", l, ": head ", h, " is in no group");
  }
}

}  // namespace engine
