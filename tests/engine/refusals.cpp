// SPDX-License-Identifier: MIT
/// @file  What the engine does not run, in one sentence that names it; nothing is written before.
#include "catch.hpp"

#include <fovea/linear.hpp>
#include <fovea/softmax.hpp>

#include "engine/error.hpp"
#include "engine/session.hpp"
#include "tiny.hpp"

namespace {

using namespace engine;

template <class F>
std::string said(F&& f) {
  try {
    f();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "(nothing)";
}
bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("files that are not a model") {
  tiny::folder f({});
  const auto load = [&] { return said([&] { model m(f.path()); }); };
  CHECK(load() == "(nothing)");
  CHECK(has(said([] { model m("/no/such/folder"); }), "no such file"));

  const auto size = std::filesystem::file_size(f.weights());
  std::filesystem::resize_file(f.weights(), size - 100);
  CHECK(has(load(), "lie outside the file"));
  std::filesystem::resize_file(f.weights(), 40);
  CHECK(has(load(), "truncated"));
  std::filesystem::resize_file(f.weights(), 0);
  CHECK(has(load(), "is empty"));

  const fovea::array up = f.tensors.at("model.layers.1.mlp.up_proj.weight");
  f.tensors.erase("model.layers.1.mlp.up_proj.weight");
  f.write();
  CHECK(has(load(), "has no tensor \"model.layers.1.mlp.up_proj.weight\""));
  f.tensors.emplace("model.layers.1.mlp.up_proj.weight", fovea::array(fovea::element::f32, {72, 41}));
  f.write();
  CHECK(has(load(), "is [72, 41]; the configuration asks for [72, 40]"));
  f.tensors["model.layers.1.mlp.up_proj.weight"] = fovea::array(fovea::element::i32, {72, 40});
  f.write();
  CHECK(has(load(), "wanted f32, f16 or bf16"));
  f.tensors["model.layers.1.mlp.up_proj.weight"] = up;
  f.write();
  CHECK(load() == "(nothing)");
  f.write_config("mamba");
  CHECK(has(load(), "model_type is \"mamba\""));
}

TEST_CASE("configurations that this engine does not run") {
  for (const auto& [more, what] : {std::pair{", \"attention_bias\": true", "attention_bias is true"},
                                   {", \"mlp_bias\": true", "mlp_bias is true"},
                                   {", \"sliding_window\": 128", "sliding_window"},
                                   {", \"rope_scaling\": {\"rope_type\": \"spiral\"}", "\"spiral\" is not supported"},
                                   {", \"eos_token_id\": \"end\"", "eos_token_id"}}) {
    const tiny::folder f({.more = more});
    CHECK(has(said([&] { model m(f.path()); }), what));
  }
  const tiny::folder uneven({.heads = 5, .kv_heads = 2});
  CHECK(has(said([&] { model m(uneven.path()); }), "multiple"));
}

TEST_CASE("calls that cannot be served leave the sequence as it was") {
  const tiny::folder f({});
  const model m(f.path());
  session s(m, exact_plan(m.config()), fovea::serial, {.context = 10});
  sequence a = s.make_sequence();
  const std::vector<std::uint32_t> six(6, 1), strange{1, 97};
  s.forward({{a, six}}, logits_of::none);
  CHECK(has(said([&] {
              s.forward({{a, six}}, logits_of::none);
            }),
            "6 tokens and 6 more are given; the context holds 10"));
  CHECK(has(said([&] { s.forward({{a, strange}}, logits_of::none); }), "token 97 does not exist"));
  CHECK(has(said([&] { s.forward({{a, {six.data(), 1}}, {a, {six.data(), 1}}}, logits_of::none); }), "two pieces"));
  CHECK(a.tokens() == 6);
}

TEST_CASE("plans that do not fit the model") {
  const tiny::folder f({});
  const model m(f.path());
  const auto refused = [&](const attention_plan& p) { return said([&] { check_plan(p, m.config()); }); };
  const attention_plan good = exact_plan(m.config());
  const auto exact = good.layers[0][0].mechanism;
  const auto with = [&](const layer_plan& layer) {
    attention_plan p = good;
    p.layers[1] = layer;
    return p;
  };
  CHECK(refused(good) == "(nothing)");
  attention_plan fewer = good;
  fewer.layers.pop_back();
  CHECK(has(refused(fewer), "has 2 layers; the model has 3"));
  CHECK(has(refused(with({{exact, {0, 1, 2, 3, 4}}})), "unequally"));
  CHECK(has(refused(with({{exact, {0, 1, 2}}})), "head 3 is in no group"));
  CHECK(has(refused(with({{exact, {0, 1, 2, 3, 4, 5}}, {exact, {5}}})), "head 5 is in two groups"));
  CHECK(has(refused(with({{exact, {0, 1, 6}}})), "head 6 does not exist"));
  CHECK(has(refused(with({{exact, {}}})), "no heads"));
  const std::vector<isize> all{0, 1, 2, 3, 4, 5};
  CHECK(
      has(refused(with({{fovea::any_attention::hold(fovea::softmax_attention{}), all}})), "needs a causal mechanism"));
  const fovea::rope_table table({.base = 100, .width = 16, .positions = 64});
  const fovea::rope turn = table;
  const fovea::softmax_attention own{.mask = fovea::causal{}, .turn = &turn};
  CHECK(has(refused(with({{fovea::any_attention::hold(own), all}})), "RoPE of its own"));
}
