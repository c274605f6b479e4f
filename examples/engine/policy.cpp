// SPDX-License-Identifier: MIT
#include "policy.hpp"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>

#include <fovea/any_attention.hpp>
#include <fovea/interop/json.hpp>
#include <fovea/interop/safetensors.hpp>

#include "error.hpp"

namespace engine {
namespace {

using fovea::array;
using fovea::file_error;
using nlohmann::json;

const char* const exact_text = R"({"mechanism": "softmax", "causal": true})";

/// What every reader of one object does: known keys, and errors that say where.
struct reader {
  const json& j;
  const std::string &path, where;

  [[noreturn]] void refuse(const std::string& what) const {
    throw file_error(path, (where.empty() ? "" : where + ": ") + what);
  }
  void known(const std::set<std::string>& keys) const {
    if (!j.is_object()) refuse(std::string("is ") + j.type_name() + "; wanted an object");
    for (const auto& [key, value] : j.items())
      if (!keys.contains(key)) {
        std::string list;
        for (const auto& k : keys) list += (list.empty() ? "" : ", ") + k;
        refuse("key \"" + key + "\" is not known; known: " + list);
      }
  }
  isize index(const json& x, const char* what) const {
    if (!x.is_number_integer() || x.get<std::int64_t>() < 0 || x.get<std::int64_t>() > 1 << 20)
      refuse(std::string(what) + " holds " + x.dump().substr(0, 40) + "; wanted numbers counted from 0");
    return x.get<isize>();
  }
  std::string text(const char* key) const {
    if (!j.contains(key)) return "";
    if (!j[key].is_string()) refuse(std::string("\"") + key + "\" is " + j[key].type_name() + "; wanted a text");
    return j[key].get<std::string>();
  }
  fovea::configuration attention(const char* key) const {
    if (!j.contains(key)) refuse(std::string("key \"") + key + "\" is missing");
    try {
      return fovea::configuration_from_json(j[key]);
    } catch (const fovea::contract_error& e) {
      throw file_error(path + (where.empty() ? "" : ": " + where), e);
    }
  }
  layer_range range(const json& x) const {
    if (!x.is_array() || x.size() != 2) refuse("\"layers\" holds " + x.dump().substr(0, 40) + "; wanted [first, last]");
    const layer_range r{index(x[0], "\"layers\""), index(x[1], "\"layers\"")};
    if (r.last < r.first) refuse("\"layers\" runs from " + std::to_string(r.first) + " to " + std::to_string(r.last));
    return r;
  }
};

policy_rule read_rule(const json& j, const std::string& path, const std::string& where) {
  const reader r{j, path, where};
  r.known({"layers", "heads", "attention", "weights", "untrained", "label", "note", "input", "error", "measured"});
  policy_rule rule;
  if (j.contains("layers")) {
    const json& layers = j["layers"];
    if (!layers.is_array() || layers.empty()) r.refuse("\"layers\" is no range and no list of ranges");
    if (layers[0].is_array())
      for (const auto& x : layers) rule.layers.push_back(r.range(x));
    else
      rule.layers.push_back(r.range(layers));
  }
  if (j.contains("heads")) {
    if (!j["heads"].is_array() || j["heads"].empty()) r.refuse("\"heads\" is no list of heads");
    for (const auto& x : j["heads"]) rule.heads.push_back(r.index(x, "\"heads\""));
  }
  rule.attention = r.attention("attention");
  rule.weights = r.text("weights");
  if (!rule.weights.empty() && std::filesystem::path(rule.weights).is_relative())
    rule.weights = (std::filesystem::path(path).parent_path() / rule.weights).string();
  if (j.contains("untrained") && !j["untrained"].is_boolean()) r.refuse("\"untrained\" is not true or false");
  rule.untrained = j.value("untrained", false);
  rule.label = r.text("label");
  return rule;
}

/// From which rank on a tensor is per head, and along which dimension; 0: never.
struct head_dimension {
  isize least_rank = 0, axis = 0;
};
head_dimension head_dimension_of(const std::string& name) {
  static const std::map<std::string, head_dimension> known = {
      {"log_weight", {1, 0}}, {"query_gate", {2, 0}}, {"slopes", {1, 0}}, {"sinks", {1, 0}}, {"t5", {2, 1}},
      {"relative", {2, 0}},   {"log_d1", {2, 0}},     {"log_d2", {2, 0}}, {"t", {2, 0}},     {"r", {2, 0}},
      {"D", {2, 0}},          {"gamma", {1, 0}},      {"E", {3, 0}},      {"F", {3, 0}}};
  if (const auto at = known.find(name); at != known.end()) return at->second;
  // Weights of maps: W, W1, W2, alone or with q, k at the end: [heads, r, d]. Biases: [heads, 1, r] or [heads, r].
  std::string stem = name;
  if (stem.size() > 1 && (stem.back() == 'q' || stem.back() == 'k')) stem.pop_back();
  if (stem == "W" || stem == "W1" || stem == "W2") return {3, 0};
  if (stem == "b" || stem == "b1" || stem == "b2") return {2, 0};
  return {};
}

struct weight_files {
  std::map<std::string, fovea::arrays> open;
  const fovea::arrays& read(const std::string& path) {
    const auto at = open.find(path);
    return at != open.end() ? at->second : open.emplace(path, fovea::read_safetensors(path).tensors).first->second;
  }
};

bool is_exact(const fovea::configuration& a) {
  const fovea::configuration exact = exact_policy().rules[0].attention;
  return a.mechanism == exact.mechanism && a.values == exact.values;
}

std::string rule_name(std::size_t i) { return i == 0 ? "default" : "overrides[" + std::to_string(i - 1) + "]"; }

fovea::any_attention make_group(const policy& p, std::size_t i, const model_config& c, const std::vector<isize>& heads,
                                weight_files& files) {
  const policy_rule& rule = p.rules[i];
  try {
    fovea::arrays tensors;
    if (!rule.weights.empty()) {
      const auto kv = kv_heads_of(c, heads);
      for (const auto& [name, a] : files.read(rule.weights)) tensors[name] = cut_to_heads(name, a, c, heads, kv);
    }
    auto m = fovea::any_attention::make(rule.attention, tensors);
    if (!m.trained() && !rule.untrained)
      throw file_error(p.path, rule_name(i) + ": " + rule.attention.mechanism + " has maps without learned weights" +
                                   (rule.weights.empty() ? "; give \"weights\"" : " in " + rule.weights) +
                                   ", or say \"untrained\": true");
    return m;
  } catch (const fovea::contract_error& e) {
    throw file_error(p.path + ": " + rule_name(i), e);
  }
}

/// The last rule that covers a head.
std::size_t rule_of(const policy& p, isize layer, isize head) {
  std::size_t last = 0;
  for (std::size_t i = 0; i < p.rules.size(); ++i)
    if (p.rules[i].covers(layer, head)) last = i;
  return last;
}

void check_ranges(const policy& p, const model_config& c) {
  for (std::size_t i = 0; i < p.rules.size(); ++i) {
    const auto missing = [&](const char* what, isize x, isize count) {
      throw file_error(p.path, rule_name(i) + ": " + what + " " + std::to_string(x) +
                                   " does not exist; the model has " + what + "s 0 to " + std::to_string(count - 1));
    };
    for (const layer_range& r : p.rules[i].layers)
      if (r.last >= c.layers) missing("layer", r.last, c.layers);
    for (const isize h : p.rules[i].heads)
      if (h >= c.heads) missing("head", h, c.heads);
  }
}

}  // namespace

bool policy_rule::covers(isize layer) const {
  return layers.empty() || std::any_of(layers.begin(), layers.end(),
                                       [layer](const layer_range& r) { return r.first <= layer && layer <= r.last; });
}
bool policy_rule::covers(isize layer, isize head) const {
  return covers(layer) && (heads.empty() || std::find(heads.begin(), heads.end(), head) != heads.end());
}

policy exact_policy() {
  return {"exact", "exact", {{.attention = fovea::configuration_from_json(json::parse(exact_text)), .label = "exact"}}};
}

policy parse_policy(const json& j, const std::string& path) {
  const std::string top;
  const reader r{j, path, top};
  r.known({"fovea_policy", "default", "overrides", "label", "note", "error", "error_of", "cost_of", "measured"});
  if (!j.contains("fovea_policy") || j["fovea_policy"] != 1)
    r.refuse("\"fovea_policy\" is " + (j.contains("fovea_policy") ? j["fovea_policy"].dump() : "missing") +
             "; this program reads form 1");
  policy p = exact_policy();
  p.path = path;
  p.label = r.text("label");
  if (p.label.empty()) p.label = std::filesystem::path(path).stem().string();
  if (j.contains("default")) p.rules[0] = {.attention = r.attention("default")};
  const json none = json::array();
  const json& overrides = j.contains("overrides") ? j["overrides"] : none;
  if (!overrides.is_array()) r.refuse("\"overrides\" is no list");
  for (std::size_t i = 0; i < overrides.size(); ++i)
    p.rules.push_back(read_rule(overrides[i], path, "overrides[" + std::to_string(i) + "]"));
  return p;
}

policy read_policy(const std::string& path) {
  return parse_policy(fovea::parse_json(fovea::read_text(path, 1 << 26), path), path);
}

array cut_to_heads(const std::string& name, const array& a, const model_config& c, const std::vector<isize>& heads,
                   const std::vector<isize>& kv) {
  const head_dimension where = head_dimension_of(name);
  if (where.least_rank == 0 || a.rank() < where.least_rank) return a;
  const isize count = a.dim(where.axis);
  if (count != c.heads && count != c.kv_heads) return a;
  const std::vector<isize>& keep = count == c.heads ? heads : kv;
  if (static_cast<isize>(keep.size()) == count) return a;
  std::vector<isize> dims = a.dims();
  dims[static_cast<std::size_t>(where.axis)] = static_cast<isize>(keep.size());
  array out(a.type(), dims);
  // Rows of `inner` bytes; the axis is the first dimension, or the last of two.
  const isize outer = where.axis == 0 ? 1 : a.dim(0);
  const std::size_t inner = a.bytes() / static_cast<std::size_t>(outer * count);
  auto* to = static_cast<std::byte*>(out.mutable_data());
  for (isize o = 0; o < outer; ++o)
    for (const isize h : keep) {
      std::memcpy(to, static_cast<const std::byte*>(a.data()) + static_cast<std::size_t>(o * count + h) * inner, inner);
      to += inner;
    }
  return out;
}

std::set<isize> changed_layers(const policy& p, const model_config& c) {
  std::set<isize> out;
  for (isize l = 0; l < c.layers; ++l)
    for (isize h = 0; h < c.heads; ++h)
      if (!is_exact(p.rules[rule_of(p, l, h)].attention)) out.insert(l);
  return out;
}

attention_plan make_plan(const policy& p, const model_config& c) {
  check_ranges(p, c);
  weight_files files;
  std::map<std::pair<std::size_t, std::vector<isize>>, fovea::any_attention> made;  // layers share what is the same
  attention_plan plan;
  for (isize l = 0; l < c.layers; ++l) {
    std::map<std::size_t, std::vector<isize>> heads_of;  // by rule
    for (isize h = 0; h < c.heads; ++h) heads_of[rule_of(p, l, h)].push_back(h);
    layer_plan layer;
    for (const auto& [rule, all] : heads_of)
      for (const std::vector<isize>& heads : uniform_groups(c, all)) {
        auto& m = made[{rule, p.rules[rule].weights.empty() ? std::vector<isize>{} : heads}];
        if (m.config().mechanism.empty()) m = make_group(p, rule, c, heads, files);
        layer.push_back({m, heads});
      }
    plan.layers.push_back(std::move(layer));
  }
  try {
    check_plan(plan, c);
  } catch (const error& e) {
    throw file_error(p.path, e.what());
  }
  return plan;
}

attention_plan read_policy(const std::string& path, const model_config& c) { return make_plan(read_policy(path), c); }

policy only_in(const policy& p, const std::set<isize>& layers, isize model_layers) {
  policy out = exact_policy();
  out.path = p.path, out.label = p.label;
  for (const policy_rule& rule : p.rules) {
    if (&rule == &p.rules[0] && is_exact(rule.attention)) continue;
    policy_rule part = rule;
    part.layers.clear();
    for (isize l = 0; l < model_layers; ++l) {
      if (!layers.contains(l) || !rule.covers(l)) continue;
      if (!part.layers.empty() && part.layers.back().last == l - 1)
        part.layers.back().last = l;
      else
        part.layers.push_back({l, l});
    }
    if (!part.layers.empty()) out.rules.push_back(part);
  }
  return out;
}

nlohmann::ordered_json to_json(const policy& p, const std::string& folder) {
  using nlohmann::ordered_json;
  const auto attention = [](const policy_rule& r) { return ordered_json::parse(fovea::to_json(r.attention).dump()); };
  ordered_json j{{"fovea_policy", 1}, {"label", p.label}, {"default", attention(p.rules[0])}};
  j["overrides"] = ordered_json::array();
  for (std::size_t i = 1; i < p.rules.size(); ++i) {
    const policy_rule& r = p.rules[i];
    ordered_json o = ordered_json::object();
    if (r.layers.size() == 1) o["layers"] = {r.layers[0].first, r.layers[0].last};
    if (r.layers.size() > 1)
      for (const layer_range& x : r.layers) o["layers"].push_back({x.first, x.last});
    if (!r.heads.empty()) o["heads"] = r.heads;
    if (!r.label.empty()) o["label"] = r.label;
    o["attention"] = attention(r);
    if (!r.weights.empty()) {
      namespace fs = std::filesystem;
      o["weights"] = fs::proximate(fs::absolute(r.weights), fs::absolute(folder.empty() ? "." : folder)).string();
    }
    if (r.untrained) o["untrained"] = true;
    j["overrides"].push_back(std::move(o));
  }
  return j;
}

}  // namespace engine
