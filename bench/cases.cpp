// SPDX-License-Identifier: MIT
#include "cases.hpp"

#include <cmath>
#include <cstdint>

namespace bench {
namespace {

using fovea::dtype;
using values = std::map<std::string, fovea::configuration_value>;

std::vector<float> uniform(isize count, float low, float high) {
  std::vector<float> out(static_cast<std::size_t>(count));
  std::uint64_t s = 99;
  for (auto& x : out) {
    s = s * 6364136223846793005ULL + 1442695040888963407ULL;
    x = low + (high - low) * static_cast<float>(s >> 40) / 16777216.0F;
  }
  return out;
}

attention_case prefill(const std::string& variant, const std::string& mechanism, values v, isize d, isize n,
                       isize H = 1, isize G = 1, dtype t = dtype::f32) {
  attention_case c;
  c.variant = variant;
  c.config = {mechanism, std::move(v)};
  c.shape = {1, H, G, n, n, d, d, t};
  return c;
}

/// Softmax and masks: 2 (d + e) flops for each visible pair.
attention_case pairs(attention_case c, double visible_share) {
  const auto& s = c.shape;
  c.flops = 2.0 * static_cast<double>(s.H * (s.d + s.e)) * static_cast<double>(s.n) * static_cast<double>(s.m) *
            visible_share;
  return c;
}
/// Recurrences: `per` flops for each token and element of the state r x e (4 without, 6 with the delta rule).
attention_case recurrence(attention_case c, double per, isize r) {
  const auto& s = c.shape;
  c.flops = per * static_cast<double>(s.H * s.n * r * s.e);
  return c;
}

void softmax_cases(std::vector<attention_case>& all) {
  const values full{}, causal{{"causal", true}};
  for (const isize d : {64, 128})
    for (const isize n : {512, 2048, 8192}) {
      all.push_back(pairs(prefill("full", "softmax", full, d, n), 1));
      all.push_back(pairs(prefill("causal", "softmax", causal, d, n), 0.5));
    }
  for (const isize d : {32, 80, 96, 256}) all.push_back(pairs(prefill("full", "softmax", full, d, 2048), 1));
  all.push_back(pairs(prefill("causal", "softmax", causal, 128, 2048, 32, 8), 0.5));
  all.push_back(pairs(prefill("causal", "softmax", causal, 64, 1024, 9, 3), 0.5));
  for (const dtype t : {dtype::bf16, dtype::f16, dtype::f64})
    all.push_back(pairs(prefill("causal", "softmax", causal, 128, 2048, 1, 1, t), 0.5));
  all.push_back(pairs(prefill("window512", "softmax", {{"causal", true}, {"window", 512.0}}, 64, 8192),
                      (512.0 * 8192 - 512.0 * 511 / 2) / 8192.0 / 8192.0));
  all.push_back(pairs(prefill("causal", "softmax", causal, 128, 2048, 2, 2), 0.5));
  all.back().threads = 2;
  for (const dtype t : {dtype::f32, dtype::bf16, dtype::f16})
    for (const isize d : {64, 128})
      for (const isize H : {8, 32}) {
        auto c = prefill("full", "softmax", causal, d, 1, H, 8, t);
        c.is_step = true, c.keeps_tokens = true;
        c.shape.m = 32768;
        all.push_back(c);
      }
}

void linear_cases(std::vector<attention_case>& all) {
  const auto with = [](const char* map, values more = {}) {
    more["map"] = std::string(map), more["causal"] = true;
    return more;
  };
  const auto step = [&](attention_case c) {
    c.is_step = true;
    c.shape.H = c.shape.G = 32;
    c.shape.n = 1;
    all.push_back(c);
  };
  for (const isize d : {64, 128}) {
    const auto none =
        recurrence(prefill("identity", "linear", with("identity", {{"normalise", false}}), d, 2048), 4, d);
    const auto elu = recurrence(prefill("elu1", "linear", with("elu1", {{"normalise", true}}), d, 2048), 4, d);
    all.push_back(none), all.push_back(elu);
    auto decay = recurrence(
        prefill("decay", "linear", with("identity", {{"rule", "decay"}, {"normalise", false}}), d, 2048), 4, d);
    decay.gate_width = 1;
    all.push_back(decay);
    auto gla =
        recurrence(prefill("gla", "linear", with("identity", {{"rule", "gla"}, {"normalise", false}}), d, 2048), 4, d);
    gla.gate_width = d;
    all.push_back(gla);
    auto delta =
        recurrence(prefill("delta", "linear",
                           with("identity", {{"rule", "delta"}, {"normalise", false}, {"scale", 0.01}}), d, 2048),
                   6, d);
    delta.beta = true;
    all.push_back(delta);
    auto gated = delta;
    gated.variant = "gated_delta", gated.config.values["rule"] = std::string("gated_delta"), gated.gate_width = 1;
    all.push_back(gated);
    auto kda = gated;
    kda.variant = "kda", kda.config.values["rule"] = std::string("kda"), kda.gate_width = d;
    all.push_back(kda);
    if (d == 128) step(none), step(elu), step(gated);
  }
  auto hedgehog =
      recurrence(prefill("hedgehog", "linear", with("hedgehog_two", {{"normalise", true}}), 64, 2048), 4, 128);
  hedgehog.weight_rows = 64;
  all.push_back(hedgehog);
  all.push_back(
      recurrence(prefill("hedgehog_merged", "linear", with("hedgehog_two", {{"normalise", true}}), 64, 2048), 4, 128));
  all.push_back(recurrence(
      prefill("t2r_merged", "linear", with("relu", {{"normalise", true}, {"clamp", 0.01}}), 64, 2048), 4, 64));
  auto t2r = recurrence(prefill("t2r", "linear", with("t2r", {{"normalise", true}, {"clamp", 0.01}}), 64, 2048), 4, 64);
  t2r.weight_rows = 64;
  all.push_back(t2r);
  auto two = recurrence(prefill("elu1", "linear", with("elu1", {{"normalise", true}}), 64, 2048, 8, 8), 4, 64);
  two.threads = 2;
  all.push_back(two);
}

void other_cases(std::vector<attention_case>& all) {
  for (const char* form : {"paper", "released", "unbiased"}) {
    auto c = recurrence(
        prefill(form, "dijiang", {{"form", std::string(form)}, {"causal", true}, {"normalise", true}}, 64, 2048), 4,
        64);
    all.push_back(c);
    c.is_step = true, c.shape.n = 1, c.shape.H = c.shape.G = 8;
    all.push_back(c);
  }
  all.push_back(recurrence(prefill("softmax", "efficient", {{"causal", false}}, 64, 8192), 4, 64));
  all.push_back(recurrence(prefill("softmax_causal", "efficient", {{"causal", true}}, 64, 2048), 4, 64));
  auto pool = prefill("mean128", "linformer", {{"projection", std::string("mean")}, {"slots", 128.0}}, 64, 8192);
  pool.flops =
      2.0 * (8192.0 * 128 * 128 + 2 * 8192.0 * 64);  // attention over 128 slots, and one addition an element of K and V
  all.push_back(pool);
  // Patterns and selections: the useful work is the visible share of the causal triangle.
  all.push_back(pairs(
      prefill("local128", "hybrid", {{"pattern", std::string("local")}, {"stride", 128.0}, {"causal", true}}, 64, 8192),
      128.0 / 8192));
  all.push_back(pairs(prefill("mst_sparse128", "hybrid",
                              {{"pattern", std::string("sparse")}, {"stride", 128.0}, {"causal", true}}, 64, 4096),
                      (128.0 + 16) / 4096));
  for (const char* by : {"int8", "mean"})
    all.push_back(pairs(prefill(std::string("select_") + by + "_eighth", "hybrid",
                                {{"select", std::string(by)},
                                 {"budget", 0.125},
                                 {"causal", true},
                                 {"block_q", 16.0},
                                 {"block_k", 16.0},
                                 {"first", 16.0},
                                 {"window", 64.0},
                                 {"compensate", std::string("zeroth")}},
                                64, 4096),
                        0.125 / 2));
}

}  // namespace

fovea::any_attention attention_case::make() const {
  fovea::arrays weights;
  if (weight_rows > 0) {
    const fovea::array w({shape.H, weight_rows, shape.d}, uniform(shape.H * weight_rows * shape.d, -0.2F, 0.2F));
    if (variant == "t2r")
      weights = {{"W", w}, {"b", fovea::array({shape.H, 1, weight_rows}, uniform(shape.H * weight_rows, 0, 0.1F))}};
    else
      weights = {{"Wq", w}, {"Wk", w}};
  }
  return fovea::any_attention::make(config, weights);
}

std::string attention_case::name() const {
  const isize n = is_step ? shape.m : shape.n;
  std::string s = std::string(is_step ? "step" : "prefill") + "/" + config.mechanism + "/" +
                  fovea::name_of(shape.type) + "/" + variant + "/D" + std::to_string(shape.d) + "/N" +
                  std::to_string(n) + "/H" + std::to_string(shape.H) + "/G" + std::to_string(shape.G);
  return threads > 1 ? s + "/T" + std::to_string(threads) : s;
}

gate_tensors::gate_tensors(const attention_case& c) : case_(&c), rows_(c.is_step ? 512 : c.shape.n) {
  if (c.gate_width > 0) decay_ = uniform(c.shape.G * rows_ * c.gate_width, -0.2F, 0.0F);
  if (c.beta) beta_ = uniform(c.shape.G * rows_, 0.1F, 0.9F);
}

fovea::gates gate_tensors::views(isize rows) const {
  fovea::gates g;
  const isize n = rows < 0 ? rows_ : rows, G = case_->shape.G, w = case_->gate_width;
  if (!decay_.empty()) g.log_decay = fovea::view<const float>{decay_.data(), 1, G, n, w, G * rows_ * w, rows_ * w, w};
  if (!beta_.empty()) g.beta = fovea::view<const float>{beta_.data(), 1, G, n, 1, G * rows_, rows_, 1};
  return g;
}

std::vector<attention_case> all_cases() {
  std::vector<attention_case> all;
  softmax_cases(all);
  linear_cases(all);
  other_cases(all);
  return all;
}

}  // namespace bench
