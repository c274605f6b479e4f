// SPDX-License-Identifier: MIT
/// @file  The laws of softmax_attention: each mask, the score modifications, sinks.

#include <fovea/softmax.hpp>
#include <fovea/softmax/reference.hpp>

#include "laws/laws.hpp"

namespace {

using namespace fovea;

struct softmax_base {
  static void reference(const softmax_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};
struct full : softmax_base {
  static constexpr const char* name = "softmax";
  static constexpr laws::promise promises{.permutable = true, .lse = true, .logits = true};
  softmax_attention make(const shape&) { return {}; }
};
struct causal_case : softmax_base {
  static constexpr const char* name = "softmax, causal";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true, .logits = true};
  softmax_attention make(const shape&) { return {.mask = causal{}}; }
};
struct windowed : softmax_base {
  static constexpr const char* name = "softmax, window of 9 after 3 first keys";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true};
  softmax_attention make(const shape&) { return {.mask = window{.width = 9, .first = 3}, .scale = 0.06}; }
};
/// Soft-cap, then ALiBi, and a sink for each head.
struct modified : softmax_base {
  static constexpr const char* name = "softmax, causal, soft-cap, ALiBi, sinks";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true};
  float slopes[16] = {0.5F, 0.25F, 0.125F, 0.0625F, 0.3F, 0.2F, 0.1F, 0.05F, 0.01F};
  float sinks[16] = {1.0F, -2.0F, 0.5F, 3.0F, 0.0F, -1.0F, 2.0F, 0.25F, -0.5F};
  softmax_attention make(const shape&) {
    return {.mask = causal{}, .score = chain{softcap{5.0}, alibi{slopes}}, .sinks = sinks};
  }
  bool accepts(const shape& s) const {
    return s.m >= s.n;
  }  // a row that sees nothing but its sink is tried in tests/golden
};
struct two_sided_case : softmax_base {
  static constexpr const char* name = "softmax, 7 keys before and 2 behind, top-left";
  static constexpr laws::promise promises{.lse = true};
  softmax_attention make(const shape&) { return {.mask = two_sided{7, 2, top_left}}; }
};
/// A random table and a bias, both broadcast over batch and heads.
struct tables : softmax_base {
  static constexpr const char* name = "softmax, boolean mask and bias";
  static constexpr laws::promise promises{.lse = true};
  std::vector<std::uint8_t> seen = std::vector<std::uint8_t>(200 * 200);
  std::vector<float> bias = std::vector<float>(200 * 200);
  softmax_attention make(const shape& s) {
    test::random r(3);
    for (auto& x : seen) x = r.coin(0.4);
    for (auto& x : bias) x = static_cast<float>(r.normal());
    return {.mask = boolean_mask{seen.data(), 0, 0, s.m}, .score = additive_bias{bias.data(), 0, 0, s.m}};
  }
};

using law_cases = std::tuple<full, causal_case, windowed, modified, two_sided_case, tables>;

}  // namespace

#define FOVEA_LAWS_OF "softmax"
#include "laws/suite.hpp"
