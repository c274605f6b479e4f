// SPDX-License-Identifier: MIT
#include "ranking.hpp"

#include <algorithm>
#include <cmath>

#include <fovea/interop/json.hpp>

#include "error.hpp"
#include "progress.hpp"

namespace engine {
namespace {

using json = nlohmann::ordered_json;

json swap_json(const swapped& s) {
  json j{{"layers", {s.first, s.last}}, {"kl", s.score}, {"texts", json::array()}};
  for (const text_summary& t : s.texts)
    j["texts"].push_back({{"kl", t.kl.mean},
                          {"kl_error", std::isfinite(t.kl.error) ? json(t.kl.error) : json(nullptr)},
                          {"loss", t.ratio() - 1},
                          {"error", std::isfinite(t.difference.error) ? json(t.difference.error) : json(nullptr)},
                          {"top1", t.top1}});
  return j;
}

}  // namespace

ranking rank_layers(const model& net, fovea::exec_ref exec, const policy& p, const std::vector<judged_text>& texts,
                    const sensitivity_options& o) {
  const model_config& c = net.config();
  const std::set<isize> changed = changed_layers(p, c);
  if (changed.empty()) throw fovea::file_error(p.path, "changes no layer: there is nothing to rank");
  ranking r;
  std::vector<swapped> swaps;
  for (const isize l : changed) swaps.push_back({l, l, {}, 0});
  for (isize l = 0; o.triples && l + 2 < c.layers; l += 3) {
    const auto any = [&](isize x) { return changed.contains(x); };
    if (any(l) || any(l + 1) || any(l + 2)) swaps.push_back({l, l + 2, {}, 0});
  }
  std::vector<compared_plan> plans;
  for (const swapped& s : swaps) {
    std::set<isize> layers;
    for (isize l = s.first; l <= s.last; ++l)
      if (changed.contains(l)) layers.insert(l);
    plans.push_back({"", make_plan(only_in(p, layers, c.layers), c)});
  }
  progress bar("layers", 1);
  const auto figures = compare_plans(net, exec, exact_plan(c), plans, texts, {o.chunk, o.cache},
                                     [&](isize done, isize all) { bar.show(done, all); });
  for (std::size_t s = 0; s < swaps.size(); ++s) {
    for (const token_figures& f : figures[s]) {
      swaps[s].texts.push_back(summarise({&f, 1}, o.block));
      swaps[s].score += swaps[s].texts.back().kl.mean / static_cast<double>(texts.size());
    }
    (swaps[s].first == swaps[s].last ? r.layers : r.triples).push_back(swaps[s]);
  }
  for (auto* list : {&r.layers, &r.triples})
    std::stable_sort(list->begin(), list->end(), [](const swapped& a, const swapped& b) { return a.score < b.score; });
  for (const judged_text& t : texts) r.texts.push_back(t.name), r.predictions.push_back(t.predictions());
  return r;
}

json to_json(const ranking& r) {
  json j{{"texts", r.texts}, {"predictions", r.predictions}, {"layers", json::array()}, {"triples", json::array()}};
  for (const swapped& s : r.layers) j["layers"].push_back(swap_json(s));
  for (const swapped& s : r.triples) j["triples"].push_back(swap_json(s));
  return j;
}

std::vector<isize> quietest_first(const nlohmann::json& j, const std::string& path, isize model_layers) {
  std::vector<isize> out;
  try {
    for (const auto& s : j.at("layers")) out.push_back(s.at("layers").at(0).get<isize>());
  } catch (const nlohmann::json::exception&) {
    throw fovea::file_error(path, "is not what `engine sensitivity --out` writes");
  }
  for (std::size_t i = 0; i < out.size(); ++i)
    if (out[i] < 0 || out[i] >= model_layers ||
        std::find(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(i), out[i]) !=
            out.begin() + static_cast<std::ptrdiff_t>(i))
      throw fovea::file_error(path, "names layer " + std::to_string(out[i]) + " twice, or the model has no such layer");
  return out;
}

}  // namespace engine
