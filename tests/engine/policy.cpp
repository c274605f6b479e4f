// SPDX-License-Identifier: MIT
// Policy files without a model: which head gets what, weights cut to a group's heads, what is refused, and the way out and in again.
#include <filesystem>

#include <nlohmann/json.hpp>

#include <fovea/interop/json.hpp>
#include <fovea/interop/safetensors.hpp>

#include "catch.hpp"
#include "engine/policy.hpp"

using engine::isize;
using nlohmann::json;

namespace {

engine::model_config small() {
  engine::model_config c;
  c.layers = 6, c.heads = 6, c.kv_heads = 2, c.head_dim = 8;
  return c;
}

std::string refusal(const std::string& text) {
  try {
    const auto p = engine::parse_policy(fovea::parse_json(text, "p.json"), "p.json");
    engine::make_plan(p, small());
  } catch (const std::exception& e) {
    return e.what();
  }
  return "";
}

engine::attention_plan plan(const std::string& text) {
  return engine::make_plan(engine::parse_policy(json::parse(text), "p.json"), small());
}

/// Which mechanism each head of a layer has.
std::map<isize, std::string> of_layer(const engine::attention_plan& p, std::size_t l) {
  std::map<isize, std::string> out;
  for (const auto& g : p.layers[l])
    for (const isize h : g.heads) {
      CHECK(out.count(h) == 0);
      out[h] = g.mechanism.name();
    }
  return out;
}

const char* const mixed = R"({
  "fovea_policy": 1, "label": "mixed", "error": 0.01, "error_of": "median", "cost_of": "prefill",
  "default": {"mechanism": "softmax", "causal": true},
  "overrides": [
    {"layers": [1, 3], "attention": {"mechanism": "hybrid", "causal": true, "budget": 0.25}},
    {"layers": [[0, 0], [2, 2]], "heads": [5, 0], "attention": {"mechanism": "linear", "map": "elu1"}, "label": "elu+1", "input": "x", "error": 0.2},
    {"heads": [4], "layers": [5, 5], "attention": {"mechanism": "softmax", "causal": true, "window": 64, "first": 4}}]})";

}  // namespace

TEST_CASE("policy: later overrides win, by layer and head", "[policy]") {
  const auto p = plan(mixed);
  REQUIRE(p.layers.size() == 6);
  for (const std::size_t l : {0U, 1U, 2U, 3U, 4U, 5U}) {
    const auto heads = of_layer(p, l);
    REQUIRE(heads.size() == 6);
    for (const auto& [h, name] : heads) {
      const bool linear = (l == 0 || l == 2) && (h == 0 || h == 5);
      CHECK(name == (linear ? "linear" : l >= 1 && l <= 3 ? "hybrid" : "softmax"));
    }
  }
  CHECK_NOTHROW(engine::check_plan(p, small()));
  // Head 0 alone reads KV head 0, head 5 alone KV head 1: one group. The four left read two each: one group too.
  CHECK(p.layers[2].size() == 2);
  const auto changed = engine::changed_layers(engine::parse_policy(json::parse(mixed), ""), small());
  CHECK(changed == std::set<isize>{0, 1, 2, 3, 5});
}

TEST_CASE("policy: out and in again is the same", "[policy]") {
  const auto p = engine::parse_policy(json::parse(mixed), "p.json");
  const auto text = engine::to_json(p, ".").dump();
  const auto back = engine::parse_policy(json::parse(text), "p.json");
  CHECK(engine::to_json(back, ".").dump() == text);
  const auto a = engine::make_plan(p, small()), b = engine::make_plan(back, small());
  for (std::size_t l = 0; l < 6; ++l) CHECK(of_layer(a, l) == of_layer(b, l));
  // Only in two layers: the others are exact, those two are as before; twice is once.
  const auto part = engine::only_in(p, {2, 3}, 6);
  const auto only = engine::make_plan(part, small());
  for (std::size_t l = 0; l < 6; ++l)
    for (const auto& [h, name] : of_layer(only, l)) CHECK(name == (l == 2 || l == 3 ? of_layer(a, l)[h] : "softmax"));
  CHECK(engine::changed_layers(part, small()) == std::set<isize>{2, 3});
  CHECK(engine::to_json(engine::only_in(part, {2, 3}, 6), ".") == engine::to_json(part, "."));
  CHECK(engine::changed_layers(engine::only_in(p, {}, 6), small()).empty());
}

TEST_CASE("policy: weights are read beside the file and cut to the heads of a group", "[policy]") {
  const auto folder = std::filesystem::current_path() / "policy_weights";
  std::filesystem::create_directories(folder);
  std::vector<float> q(6 * 4 * 8), k(2 * 4 * 8);
  for (std::size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i);
  for (std::size_t i = 0; i < k.size(); ++i) k[i] = static_cast<float>(1000 + i);
  const fovea::arrays weights{{"Wq", {{6, 4, 8}, q}}, {"Wk", {{2, 4, 8}, k}}};
  fovea::write_safetensors((folder / "w.safetensors").string(), weights, {});
  const auto file = (folder / "p.json").string();
  const std::string text = R"({"fovea_policy": 1, "overrides": [{"heads": [3, 4, 5], "weights": "w.safetensors",
    "attention": {"mechanism": "linear", "map": "hedgehog_two"}}]})";
  fovea::write_whole(file, [&](std::ostream& out) { out << text; });
  const auto p = engine::read_policy(file, small());
  CHECK(of_layer(p, 4)[3] == "linear");
  CHECK(of_layer(p, 4)[2] == "softmax");
  CHECK(engine::to_json(engine::read_policy(file), folder.string())["overrides"][0]["weights"] == "w.safetensors");

  const auto cut_q = engine::cut_to_heads("Wq", weights.at("Wq"), small(), {1, 5}, {0, 1});
  CHECK(cut_q.dims() == std::vector<isize>{2, 4, 8});
  CHECK(cut_q.at(0) == 32);
  CHECK(cut_q.at(32) == 5 * 32);
  const auto cut_k = engine::cut_to_heads("Wk", weights.at("Wk"), small(), {4}, {1});
  CHECK(cut_k.dims() == std::vector<isize>{1, 4, 8});
  CHECK(cut_k.at(0) == 1032);
  const fovea::array t5({2, 6}, std::vector<float>{0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15});  // heads last
  const auto cut_t5 = engine::cut_to_heads("t5", t5, small(), {1, 3}, {0, 1});
  CHECK(cut_t5.dims() == std::vector<isize>{2, 2});
  CHECK(cut_t5.doubles() == std::vector<double>{1, 3, 11, 13});
  const fovea::array shared({6, 8}, std::vector<float>(48));  // [features, d]: no heads, though there are six
  CHECK(engine::cut_to_heads("W", shared, small(), {1}, {0}).dims() == std::vector<isize>{6, 8});
}

TEST_CASE("policy: what cannot be used is refused in one line", "[policy]") {
  const auto has = [](const std::string& text, const std::string& part) {
    const std::string said = refusal(text);
    INFO(said);
    CHECK(said.find(part) != std::string::npos);
    CHECK(said.find("p.json") == 0);
    CHECK(said.find('\n') == std::string::npos);
  };
  const std::string softmax = R"("attention": {"mechanism": "softmax", "causal": true})";
  has("{}", "fovea_policy");
  has(R"({"fovea_policy": 2})", "form 1");
  has(R"({"fovea_policy": 1, "overides": []})", "\"overides\" is not known");
  has(R"({"fovea_policy": 1, "overrides": [{"layers": [0, 6], )" + softmax + "}]}",
      "overrides[0]: layer 6 does not exist; the model has layers 0 to 5");
  has(R"({"fovea_policy": 1, "overrides": [{"layers": [3, 2], )" + softmax + "}]}", "runs from 3 to 2");
  has(R"({"fovea_policy": 1, "overrides": [{"layers": [1], )" + softmax + "}]}", "wanted [first, last]");
  has(R"({"fovea_policy": 1, "overrides": [{"layers": [-1, 2], )" + softmax + "}]}", "counted from 0");
  has(R"({"fovea_policy": 1, "overrides": [{"heads": [6], )" + softmax + "}]}", "head 6 does not exist");
  has(R"({"fovea_policy": 1, "overrides": [{"layers": [0, 1]}]})", "\"attention\" is missing");
  has(R"({"fovea_policy": 1, "default": {"mechanism": "sofmax"}})", "sofmax");
  has(R"({"fovea_policy": 1, "default": {"mechanism": "softmax", "windw": 3}})", "windw");
  has(R"({"fovea_policy": 1, "overrides": [{"attention": {"mechanism": "windowed", "map": "hedgehog"}}]})",
      "without learned weights");
  has(R"({"fovea_policy": 1, "overrides": [{"weights": 3, )" + softmax + "}]}", "wanted a text");
  const std::string missing =
      refusal(R"({"fovea_policy": 1, "overrides": [{"weights": "/no/such.safetensors", )" + softmax + "}]}");
  CHECK(missing.find("/no/such.safetensors: no such file") != std::string::npos);
  CHECK(
      refusal(
          R"({"fovea_policy": 1, "overrides": [{"untrained": true, "attention": {"mechanism": "windowed", "map": "hedgehog"}}]})")
          .empty());
}
