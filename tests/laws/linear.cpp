// SPDX-License-Identifier: MIT
/// @file  The laws of linear_attention: each rule, a log-scaled map, a map that knows positions, all keys at once; and of
///        windowed_attention, which has it for its rest.

#include <cmath>

#include <fovea/feature/cosformer.hpp>
#include <fovea/feature/favor.hpp>
#include <fovea/linear.hpp>
#include <fovea/linear/reference.hpp>
#include <fovea/windowed.hpp>
#include <fovea/windowed/reference.hpp>

#include "laws/laws.hpp"

namespace {

using namespace fovea;

struct linear_base {
  static void reference(const linear_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};
test::tensor like_keys(const laws::inputs& x, isize width) {
  return {x.k.type(), x.k.batch(), x.k.heads(), x.k.length(), width};
}
/// Log-decays from 0 to -3, some of them -inf.
void add_decay(test::random& r, laws::inputs& x, isize width) {
  x.log_decay = like_keys(x, width);
  x.log_decay.fill(
      [&] { return r.coin(0.02) ? -std::numeric_limits<double>::infinity() : -3.0 * r.uniform() * r.uniform(); });
}
void add_beta(test::random& r, laws::inputs& x) {
  x.beta = like_keys(x, 1);
  x.beta.fill([&] { return r.uniform(); });
}
/// Delta rules take keys of length 1: longer ones make the state grow.
void normalise_keys(laws::inputs& x) {
  for (isize b = 0; b < x.k.batch(); ++b)
    for (isize h = 0; h < x.k.heads(); ++h)
      for (isize i = 0; i < x.k.length(); ++i) {
        double square = 0;
        for (isize c = 0; c < x.k.width(); ++c) square += x.k.get(b, h, i, c) * x.k.get(b, h, i, c);
        for (isize c = 0; c < x.k.width(); ++c) x.k.set(b, h, i, c, x.k.get(b, h, i, c) / std::sqrt(square));
      }
}

struct elu_case : linear_base {
  static constexpr const char* name = "linear, elu + 1";
  static constexpr laws::promise promises{.causal = true, .streams = true};
  linear_attention make(const shape&) { return {.eps = 1e-6}; }
};
struct all_keys_case : linear_base {
  static constexpr const char* name = "linear, elu + 1, all keys";
  static constexpr laws::promise promises{.permutable = true};
  linear_attention make(const shape&) { return {.is_causal = false}; }
};
struct decay_case : linear_base {
  static constexpr const char* name = "linear, decay";
  static constexpr laws::promise promises{.causal = true, .streams = true};
  linear_attention make(const shape&) { return {.rule = rule::decay, .scale = 0.25}; }
  void adjust(test::random& r, laws::inputs& x) { add_decay(r, x, 1); }
};
struct retention_case : linear_base {
  static constexpr const char* name = "linear, constant decay, elu + 1, normalised";
  static constexpr laws::promise promises{.causal = true, .streams = true};
  double gamma[1] = {0.9};
  linear_attention make(const shape&) {
    return {.map = elu1{}, .rule = rule::decay, .normalise = true, .clamp = 0.01, .gamma = gamma};
  }
};
struct gla_case : linear_base {
  static constexpr const char* name = "linear, gla";
  static constexpr laws::promise promises{.causal = true, .streams = true};
  linear_attention make(const shape&) { return {.rule = rule::gla}; }
  void adjust(test::random& r, laws::inputs& x) { add_decay(r, x, x.k.width()); }
};
/// Decays from 1 down to e^-100 and 0, side by side in one token: no factor may leave the range of float.
void add_extreme_decay(test::random& r, laws::inputs& x, isize width) {
  x.log_decay = like_keys(x, width);
  x.log_decay.fill([&] {
    return r.coin(0.05) ? -std::numeric_limits<double>::infinity() : r.coin() ? -100.0 * r.uniform() : 0.0;
  });
}
struct gla_extreme_case : gla_case {
  static constexpr const char* name = "linear, gla, decays of 1 to e^-100 and 0";
  void adjust(test::random& r, laws::inputs& x) { add_extreme_decay(r, x, x.k.width()); }
};
struct decay_extreme_case : decay_case {
  static constexpr const char* name = "linear, decays of 1 to e^-100 and 0";
  void adjust(test::random& r, laws::inputs& x) { add_extreme_decay(r, x, 1); }
};
struct gla_normalised_case : gla_case {
  static constexpr const char* name = "linear, gla, elu + 1, normalised";
  linear_attention make(const shape&) {
    return {.map = elu1{}, .rule = rule::gla, .normalise = true, .key_sum_eps = 1e-3};
  }
};
struct delta_case : linear_base {
  static constexpr const char* name = "linear, delta rule";
  static constexpr laws::promise promises{.causal = true, .streams = true, .merges = false};
  linear_attention make(const shape&) { return {.rule = rule::delta}; }
  void adjust(test::random& r, laws::inputs& x) { add_beta(r, x), normalise_keys(x); }
};
struct gated_delta_case : linear_base {
  static constexpr const char* name = "linear, gated delta rule";
  static constexpr laws::promise promises{.causal = true, .streams = true, .merges = false};
  linear_attention make(const shape&) { return {.rule = rule::gated_delta}; }
  void adjust(test::random& r, laws::inputs& x) { add_decay(r, x, 1), add_beta(r, x), normalise_keys(x); }
};
struct gated_delta_extreme_case : gated_delta_case {
  static constexpr const char* name = "linear, gated delta rule, decays of 1 to e^-100 and 0";
  void adjust(test::random& r, laws::inputs& x) { add_extreme_decay(r, x, 1), add_beta(r, x), normalise_keys(x); }
};
struct kda_case : linear_base {
  static constexpr const char* name = "linear, kda";
  static constexpr laws::promise promises{.causal = true, .streams = true, .merges = false};
  linear_attention make(const shape&) { return {.rule = rule::kda}; }
  void adjust(test::random& r, laws::inputs& x) { add_decay(r, x, x.k.width()), add_beta(r, x), normalise_keys(x); }
};
struct gdn2_case : linear_base {
  static constexpr const char* name = "linear, gdn2";
  static constexpr laws::promise promises{.causal = true, .streams = true, .merges = false};
  linear_attention make(const shape&) { return {.rule = rule::gdn2}; }
  void adjust(test::random& r, laws::inputs& x) {
    add_decay(r, x, x.k.batch() % 2 == 0 ? 1 : x.k.width()), normalise_keys(x);
    x.erase = like_keys(x, x.k.width()), x.write = like_keys(x, x.v.width());
    x.erase.fill([&] { return r.uniform(); }), x.write.fill([&] { return r.uniform(); });
  }
};
/// Exponential features: mantissas and a running log-scale.
struct favor_case : linear_base {
  static constexpr const char* name = "linear, FAVOR+";
  static constexpr laws::promise promises{.causal = true, .streams = true, .c = 128};
  projection w;
  linear_attention make(const shape& s) {
    const isize r = 24;
    const auto rows = feature::orthogonal_directions(r, s.d, 5);
    w = projection(rows.data(), 1, r, s.d, nullptr, false);
    return {.map = favor_plain{w.ref()}};
  }
};
struct cosformer_case : linear_base {
  static constexpr const char* name = "linear, cosFormer";
  static constexpr laws::promise promises{.causal = true, .streams = true, .merges = false};
  linear_attention make(const shape&) { return {.map = cosformer{200}, .clamp = 1e-6}; }
};

struct windowed_base {
  static void reference(const windowed_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};
struct windowed_case : windowed_base {
  static constexpr const char* name = "windowed, elu + 1, a weight and a gate a head";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true, .c = 64};
  std::vector<float> weight, gate;
  windowed_attention make(const shape& s) {
    test::random r(7);
    for (isize h = 0; h < s.H; ++h) weight.push_back(static_cast<float>(r.normal()));
    for (isize i = 0; i < s.H * s.d; ++i) gate.push_back(static_cast<float>(0.2 * r.normal()));
    return {.window = 9,
            .first = 2,
            .log_weight = bhnd<const float>(weight.data(), 1, s.H, 1, 1),
            .query_gate = bhnd<const float>(gate.data(), 1, s.H, 1, s.d)};
  }
};
struct windowed_maximum_case : windowed_base {
  static constexpr const char* name = "windowed, Hedgehog, measured from the window's maximum";
  static constexpr laws::promise promises{.causal = true, .lse = true, .streams = true, .c = 64};
  windowed_attention make(const shape&) {
    return {.window = 5, .first = 0, .map = hedgehog{}, .level = rest_level::window_maximum};
  }
};

using law_cases =
    std::tuple<elu_case, all_keys_case, decay_case, retention_case, gla_case, decay_extreme_case, gla_extreme_case,
               gla_normalised_case, delta_case, gated_delta_case, gated_delta_extreme_case, kda_case, gdn2_case,
               favor_case, cosformer_case, windowed_case, windowed_maximum_case>;

}  // namespace

#define FOVEA_LAWS_OF "linear_attention"
#include "laws/suite.hpp"
