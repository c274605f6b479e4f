// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>

#include "setting.hpp"

namespace compare {
namespace {

using fovea::array;
using fovea::arrays;
using fovea::configuration;

/// Standard normal numbers, the same on every machine: splitmix64 and Box-Muller.
std::vector<float> normal(std::size_t count, std::uint64_t seed, double deviation) {
  std::uint64_t s = seed;
  const auto uniform = [&] {
    std::uint64_t z = (s += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return (static_cast<double>((z ^ (z >> 31)) >> 11) + 0.5) * 0x1p-53;
  };
  std::vector<float> out(count);
  for (auto& x : out)
    x = static_cast<float>(deviation * std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()));
  return out;
}

array identity(isize heads, isize d) {
  std::vector<float> w(static_cast<std::size_t>(heads * d * d), 0.0F);
  for (isize h = 0; h < heads; ++h)
    for (isize i = 0; i < d; ++i) w[static_cast<std::size_t>((h * d + i) * d + i)] = 1.0F;
  return {{heads, d, d}, w};
}

using values = std::map<std::string, fovea::configuration_value>;

/// The common case: one mechanism, causal as the input is.
auto plain(const std::string& mechanism, values v, bool with_scale = false) {
  return [=](const input& in) {
    configuration c{mechanism, v};
    c.values["causal"] = in.causal;
    if (with_scale) c.values["scale"] = in.scale;
    return c;
  };
}

auto only_causal(const std::string& mechanism, values v, bool with_scale = false) {
  return [=](const input& in) {
    if (!in.causal) throw not_applicable{"this form is causal and the input is bidirectional"};
    return plain(mechanism, v, with_scale)(in);
  };
}

void add_exact_and_windows(std::vector<setting>& all) {
  all.push_back(
      {0, "exact", "exact", "", "online softmax over all visible keys: the yardstick", plain("softmax", {}, true)});
  for (const double w : {64.0, 256.0})
    all.push_back({0, "window " + std::to_string(static_cast<int>(w)) + " + 4 sinks", "window", "",
                   "exact over the last keys and the first 4; this version keeps the whole KV cache",
                   only_causal("softmax", {{"window", w}, {"first", 4.0}}, true)});
}

void add_int8(std::vector<setting>& all) {
  const values store{{"store_type", std::string("i8")}},
      turned{{"store_type", std::string("i8")}, {"store_rotated", true}};
  values both = turned;
  both["precision"] = std::string("int8");
  all.push_back({0, "int8 store", "int8", "",
                 "keys and values kept as int8 rows, arithmetic in f32; error through the store",
                 only_causal("softmax", store, true)});
  all.push_back({0, "int8 store, rotated", "int8", "",
                 "the same, keys turned by a Hadamard matrix before they are rounded",
                 only_causal("softmax", turned, true)});
  all.push_back({0, "int8", "int8", "", "all keys, products of 8-bit integers; the inputs are rounded in the call",
                 plain("softmax", {{"precision", std::string("int8")}}, true)});
  all.push_back({0, "int8, rotated int8 store", "int8", "", "integers of the store are multiplied as they are",
                 only_causal("softmax", both, true)});
  all.push_back({0, "int8, skip 1e-3", "int8", "",
                 "tiles of 16 x 16 below a thousandth of every row's mass are left out",
                 plain("softmax", {{"precision", std::string("int8")}, {"skip", 1e-3}}, true)});
}

void add_linear(std::vector<setting>& all) {
  const std::string far = "an untrained map: expect 90 to 180 % error; it is meant to be learned";
  all.push_back({0, "elu+1", "linear", "untrained", far, plain("linear", {{"map", "elu1"}, {"normalise", true}})});
  all.push_back({0, "T2R relu r=32", "linear", "untrained", far,
                 plain("linear", {{"map", "t2r"}, {"normalise", true}, {"clamp", 0.01}}), [](const input& in) {
                   const double deviation = 1 / std::sqrt(static_cast<double>(in.d));
                   return arrays{
                       {"W", array({in.G, 32, in.d}, normal(static_cast<std::size_t>(in.G * 32 * in.d), 1, deviation))},
                       {"b", array({in.G, 1, 32}, std::vector<float>(static_cast<std::size_t>(in.G * 32), 0.0F))}};
                 }});
  all.push_back({0, "Hedgehog r=2d", "linear", "untrained", far,
                 plain("linear", {{"map", "hedgehog_two"}, {"normalise", true}}), [](const input& in) {
                   return arrays{{"Wq", identity(in.H, in.d)}, {"Wk", identity(in.G, in.d)}};
                 }});
  for (const isize m : {64, 256})
    all.push_back({0, "FAVOR+ m=" + std::to_string(m), "linear", "untrained",
                   "positive random features, 4 m floats a key channel; " + far,
                   plain("linear", {{"map", "favor_plain"}, {"normalise", true}}), [m](const input& in) {
                     return arrays{{"W", array({m, in.d}, normal(static_cast<std::size_t>(m * in.d), 7, 1.0))}};
                   }});
  all.push_back({0, "cosFormer", "linear", "untrained", far, [](const input& in) {
                   configuration c{"linear", {{"map", "cosformer"}, {"normalise", true}, {"clamp", 1e-6}}};
                   c.values["causal"] = in.causal, c.values["M"] = static_cast<double>(in.n + 64);
                   return c;
                 }});
  all.push_back({0, "Based taylor2", "linear", "untrained",
                 "second-order Taylor map of the whole head: d^2 + d + 1 features", [](const input& in) {
                   if (in.d > 32)
                     throw not_applicable{
                         "d^2 + d + 1 features are too many for heads wider than 32 (Based projects to 16 first)"};
                   return plain("linear", {{"map", "taylor2"}, {"normalise", true}, {"eps", 1e-6}})(in);
                 }});
}

void add_dijiang(std::vector<setting>& all) {
  const std::string note = "random frequencies; its published quality comes from fine-tuning the model with it";
  all.push_back({0, "DiJiang paper form", "dijiang", "untrained", note,
                 plain("dijiang", {{"form", "paper"}, {"normalise", true}})});
  all.push_back({0, "DiJiang released form", "dijiang", "untrained", note,
                 plain("dijiang", {{"form", "released"}, {"normalise", true}})});
  for (const double blocks : {1.0, 2.0})
    all.push_back({0, "DiJiang unbiased x" + std::to_string(static_cast<int>(blocks)), "dijiang", "untrained", note,
                   plain("dijiang", {{"form", "unbiased"}, {"normalise", true}, {"blocks", blocks}})});
}

void add_low_rank(std::vector<setting>& all) {
  for (const double slots : {32.0, 128.0})
    all.push_back({0, "Linformer mean-pool k=" + std::to_string(static_cast<int>(slots)), "linformer", "untrained",
                   "keys and values pooled to k slots over the whole input", [slots](const input& in) {
                     if (in.causal)
                       throw not_applicable{
                           "a slot mixes all positions, so the plain form has no causal mask; the block-causal form is "
                           "measured instead"};
                     if (in.n % static_cast<isize>(slots) != 0)
                       throw not_applicable{"the input's length is no multiple of the slots"};
                     configuration c{"linformer", {{"projection", "mean"}, {"slots", slots}}};
                     c.values["scale"] = in.scale;
                     return c;
                   }});
  all.push_back(
      {0, "Linformer block-causal 64/8", "linformer", "untrained",
       "whole past blocks of 64 pooled to 8 slots, exact inside the own block", [](const input& in) {
         if (!in.causal) throw not_applicable{"this form is causal and the input is bidirectional"};
         configuration c{"linformer", {{"projection", "mean"}, {"causal", true}, {"block", 64.0}, {"slots", 8.0}}};
         c.values["scale"] = in.scale;
         return c;
       }});
  for (const double landmarks : {32.0, 64.0})
    all.push_back({0, "Nystrom " + std::to_string(static_cast<int>(landmarks)) + " landmarks", "linformer", "untrained",
                   "segment means of queries and keys, iterated pseudo-inverse", [landmarks](const input& in) {
                     if (in.causal) throw not_applicable{"a landmark mixes a whole segment: there is no causal form"};
                     configuration c{"nystrom", {{"landmarks", landmarks}}};
                     c.values["scale"] = in.scale;
                     return c;
                   }});
  all.push_back({0, "Efficient Attention", "efficient", "untrained", "d global maps, no query-specific retrieval",
                 plain("efficient", {{"normalisation", "softmax"}})});
}

void add_hybrid(std::vector<setting>& all) {
  all.push_back({0, "MST sparse s=128", "hybrid", "", "local or strided, as MST's code draws it",
                 only_causal("hybrid", {{"pattern", "sparse"}, {"stride", 128.0}}, true)});
  all.push_back({0, "MST fixed s=128", "hybrid", "", "own block and the last column of each, as MST's code draws it",
                 only_causal("hybrid", {{"pattern", "fixed"}, {"stride", 128.0}}, true)});
  const auto select = [](const char* by, double budget, const char* rest, double parts = 1, double small = 1.0 / 64,
                         const values& more = {}) {
    values v{{"select", std::string(by)}, {"budget", budget}, {"block_q", 16.0},
             {"block_k", 16.0},           {"first", 16.0},    {"window", 64.0},
             {"at_least", 0.0},           {"parts", parts},   {"keep_small", small}};
    v["compensate"] = std::string(rest);
    v.insert(more.begin(), more.end());
    return plain("hybrid", v, true);
  };
  const std::string oracle = "an oracle for study: choosing costs a whole score pass";
  all.push_back({0, "int8 select 1/8, drop", "hybrid", "",
                 "blocks of 16 chosen by 8-bit token scores; the rest is dropped", select("int8", 0.125, "none")});
  all.push_back({0, "int8 select 1/8 + mean token", "hybrid", "",
                 "the same, one compressed token for each skipped block", select("int8", 0.125, "zeroth")});
  all.push_back({0, "int8 select 1/8 + four mean tokens", "hybrid", "", "a token for each quarter of a skipped block",
                 select("int8", 0.125, "zeroth", 4)});
  all.push_back({0, "int8 select 1/8 + mean token + 1/4 variance", "hybrid", "",
                 "the mean token, compensated by a quarter of the variance of its logits",
                 select("int8", 0.125, "cumulant", 1, 1.0 / 64, {{"variance_share", 0.25}})});
  all.push_back({0, "int8 select 1/8 + four sampled keys", "hybrid", "",
                 "in place of means a key of each quarter, at random", select("int8", 0.125, "sampled", 4)});
  all.push_back({0, "int8 select 1/8 + linear rest", "hybrid", "untrained",
                 "elu + 1 over the skipped keys; gate and map are meant to be learned",
                 select("int8", 0.125, "linear")});
  all.push_back({0, "int8 select 1/8 + mean token, int8 tiles", "hybrid", "",
                 "chosen blocks, tokens and kept keys as products of 8-bit integers",
                 select("int8", 0.125, "zeroth", 1, 1.0 / 64, {{"precision", std::string("int8")}})});
  all.push_back({0, "int8 select 1/8 + mean token, no small values", "hybrid", "",
                 "without the 1/64 of the keys with the smallest |v|", select("int8", 0.125, "zeroth", 1, 0)});
  all.push_back({0, "int8 select 1/4 + mean token", "hybrid", "", "as above with twice the budget",
                 select("int8", 0.25, "zeroth")});
  all.push_back(
      {0, "int4 select 1/8 + mean token", "hybrid", "", "4-bit token scores", select("int4", 0.125, "zeroth")});
  all.push_back({0, "mean-key select 1/8 + mean token", "hybrid", "",
                 "blocks chosen by q . mean key: misses retrieval heads", select("mean", 0.125, "zeroth")});
  all.push_back({0, "mean-key select 1/4 + mean token", "hybrid", "", "as above with twice the budget",
                 select("mean", 0.25, "zeroth")});
  all.push_back({0, "Quest bound 1/8 + mean token", "hybrid", "", "blocks chosen by the upper bound of their scores",
                 select("bound", 0.125, "zeroth")});
  all.push_back(
      {0, "exact, skip 1e-4", "hybrid", "",
       "all scores; keys below a ten-thousandth of every row's mass in a tile are left out of the product with V",
       plain("softmax", {{"skip", 1e-4}}, true)});
  all.push_back({0, "true-mass select 1/8 + mean token", "hybrid", "", oracle, select("exact", 0.125, "zeroth")});
}

}  // namespace

std::vector<setting> built_in_settings() {
  std::vector<setting> all;
  add_exact_and_windows(all);
  add_int8(all);
  add_linear(all);
  add_dijiang(all);
  add_low_rank(all);
  add_hybrid(all);
  for (std::size_t i = 0; i < all.size(); ++i) all[i].id = static_cast<int>(i);
  return all;
}

}  // namespace compare
