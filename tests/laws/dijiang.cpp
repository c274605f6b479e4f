// SPDX-License-Identifier: MIT
/// @file  The laws of dijiang_attention: each form, with and without a denominator, decay and gains.

#include <fovea/dijiang.hpp>
#include <fovea/dijiang/reference.hpp>

#include "laws/laws.hpp"

namespace {

using namespace fovea;

constexpr laws::promise causal_stream{.causal = true, .streams = true, .c = 256};

struct dijiang_base {
  static void reference(const dijiang_attention& m, const problem& p) { fovea::reference::prefill(m, p); }
};
struct paper : dijiang_base {
  static constexpr const char* name = "dijiang, paper form, normalised";
  static constexpr laws::promise promises = causal_stream;
  dijiang_attention make(const shape& s) {
    return dijiang_attention::make({.head_dim = s.d, .seed = 3, .form = dijiang_form::paper, .normalise = true});
  }
};
struct released : dijiang_base {
  static constexpr const char* name = "dijiang, released form, decay";
  static constexpr laws::promise promises = causal_stream;
  dijiang_attention make(const shape& s) {
    return dijiang_attention::make({.head_dim = s.d,
                                    .seed = 4,
                                    .form = dijiang_form::released,
                                    .sampling = dijiang_sampling::monte_carlo,
                                    .gamma = {31.0 / 32}});
  }
};
/// Gains of an undecaying head: a_i = i ln gamma, b_j = -j ln gamma, jittered; 0.4 a token, so that references move within a block.
struct gains : dijiang_base {
  static constexpr const char* name = "dijiang, released form, gains by position";
  static constexpr laws::promise promises{.causal = true, .c = 256};
  dijiang_attention make(const shape& s) {
    test::random r(5);
    dijiang_options o{.head_dim = s.d, .form = dijiang_form::released, .normalise = true, .positions = 400};
    for (isize h = 0; h < s.H; ++h)
      for (isize i = 0; i < o.positions; ++i)
        o.log_d1.push_back(static_cast<float>(-0.4 * static_cast<double>(i) + 0.1 * r.normal()));
    for (isize g = 0; g < s.G; ++g)
      for (isize i = 0; i < o.positions; ++i)
        o.log_d2.push_back(static_cast<float>(0.4 * static_cast<double>(i) + 0.1 * r.normal()));
    return dijiang_attention::make(o);
  }
};
struct unbiased : dijiang_base {
  static constexpr const char* name = "dijiang, unbiased form";
  static constexpr laws::promise promises = causal_stream;
  dijiang_attention make(const shape& s) { return dijiang_attention::make({.head_dim = s.d, .seed = 6}); }
};
struct two_blocks : dijiang_base {
  static constexpr const char* name = "dijiang, unbiased form, two blocks, Sobol, decay, weights";
  static constexpr laws::promise promises = causal_stream;
  dijiang_attention make(const shape& s) {
    std::vector<float> D;
    for (isize f = 0; f < 2 * s.d; ++f) D.push_back(0.5F + static_cast<float>(f % 3));
    return dijiang_attention::make({.head_dim = s.d,
                                    .features = 2 * s.d,
                                    .seed = 7,
                                    .sampling = dijiang_sampling::sobol,
                                    .D = D,
                                    .gamma = {0.99}});
  }
};
struct both_ways : dijiang_base {
  static constexpr const char* name = "dijiang, unbiased form, not causal";
  static constexpr laws::promise promises{.permutable = true, .c = 256};
  dijiang_attention make(const shape& s) {
    return dijiang_attention::make({.head_dim = s.d, .seed = 8, .is_causal = false});
  }
};
struct both_ways_sum : dijiang_base {
  static constexpr const char* name = "dijiang, released form, not causal, no denominator";
  static constexpr laws::promise promises{.permutable = true, .c = 256};
  dijiang_attention make(const shape& s) {
    return dijiang_attention::make({.head_dim = s.d, .seed = 9, .form = dijiang_form::released, .is_causal = false});
  }
};

using law_cases = std::tuple<paper, released, gains, unbiased, two_blocks, both_ways, both_ways_sum>;

}  // namespace

#define FOVEA_LAWS_OF "dijiang"
#include "laws/suite.hpp"
