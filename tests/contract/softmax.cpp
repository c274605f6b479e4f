// SPDX-License-Identifier: MIT
/// @file  What softmax_attention refuses.

#include <cmath>
#include <limits>

#include <fovea/softmax.hpp>

#include "contract/contract.hpp"

namespace {
using namespace fovea;
constexpr double bad = std::numeric_limits<double>::quiet_NaN(), infinite = std::numeric_limits<double>::infinity();
}  // namespace

TEST_CASE("contract of softmax: calls") {
  contract::refuses_what_it_must(contract::caller_of(softmax_attention{}, true));
  contract::refuses_what_it_must(contract::caller_of(softmax_attention{.mask = causal{}}, true));
  contract::refuses_what_it_must(contract::streaming_caller_of(softmax_attention{.mask = causal{}}, true));
}

TEST_CASE("contract of softmax: its own values") {
  using contract::refuses_value;
  using S = softmax_attention;
  for (const double scale : {bad, infinite, -infinite}) refuses_value(S{.scale = scale}, {"scale is", "finite"});
  refuses_value(S{.scale = -0.5}, {"scale is -0.5", "positive"});
  refuses_value(S{.scale = 0.0}, {"scale is 0", "positive"});
  for (const float skip : {-0.1F, 1.0F, std::nanf("")}) refuses_value(S{.skip = skip}, {"skip is", "below 1"});
  refuses_value(S{.mask = window{.width = -4}}, {"window width is -4", "at least 1"});
  refuses_value(S{.mask = window{.width = 4, .first = -1}}, {"window first is -1"});
  refuses_value(S{.mask = two_sided{-2, 1}}, {"two_sided left, right are -2, 1"});
  refuses_value(S{.mask = two_sided{2, PTRDIFF_MAX}}, {"two_sided left, right are 2, 9223372036854775807"});
  refuses_value(S{.mask = window{PTRDIFF_MAX}}, {"window width, first are 9223372036854775807, 0"});
  for (const mask& x : {mask(causal{at_offset(PTRDIFF_MAX)}), mask(window{4, 0, at_offset(PTRDIFF_MAX)}),
                        mask(two_sided{1, 1, at_offset(PTRDIFF_MAX)}), mask(chunked_local{4, at_offset(PTRDIFF_MAX)}),
                        mask(both{causal{at_offset(PTRDIFF_MAX)}, window{4}})})
    refuses_value(S{.mask = x}, {"the offset of row 0 is 9223372036854775807"});
  refuses_value(S{.mask = causal{at_offsets(nullptr)}}, {"at_offsets has null offsets"});
  const float slope[] = {0.5F, 0.5F, 0.5F, 0.5F};
  refuses_value(S{.score = alibi{slope, 4, at_offsets(nullptr)}}, {"at_offsets has null offsets"});
  refuses_value(S{.mask = boolean_mask{}}, {"boolean_mask has a null table", "3 x 5"});
  refuses_value(S{.mask = block_mask{}}, {"block_mask has a null table"});
  const std::int32_t q[] = {0, 1, 3}, k[] = {0, 2, 4};
  refuses_value(S{.mask = packed{q, k, 2}}, {"packed cumulative lengths", "m = 5"});
  refuses_value(S{.score = softcap{-3.0}}, {"softcap is -3", "positive"});
  refuses_value(S{.score = softcap{bad}}, {"softcap is nan"});
  refuses_value(S{.score = alibi{}}, {"alibi", "4 heads"});
  refuses_value(S{.score = additive_bias{}}, {"additive_bias has a null table", "3 x 5"});
  const float sinks[] = {0.0F, 1.0F, std::numeric_limits<float>::quiet_NaN(), 0.0F},
              slopes[] = {0.5F, std::numeric_limits<float>::infinity(), 0.1F, 0.1F};
  refuses_value(S{.sinks = sinks}, {"sinks[2] is nan"});
  refuses_value(S{.score = alibi{slopes}}, {"slopes[1] is inf"});
}

TEST_CASE("contract of softmax: states") {
  contract::refuses_foreign_states(softmax_attention{.mask = causal{}});
  contract::arguments a(3, 3);
  problem p = a.good(false);
  state s = softmax_attention{}.make_state(p.shape());
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, softmax_attention{}, p.q, p.k, p.v, p.out, s); }),
             "must be causal");
  shape small = p.shape();
  small.m = 2;
  state two = softmax_attention{}.make_state(small);
  CHECK_SAYS(
      test::refusal([&] { fovea::prefill(serial, softmax_attention{.mask = causal{}}, p.q, p.k, p.v, p.out, two); }),
      "the state holds 0 of at most 2 tokens; 3 more do not fit");
  CHECK_SAYS(test::refusal([&] { softmax_attention{}.make_state({1, 1, 0, 1, 1, 8, 8, dtype::f32}); }), "make_state");
  CHECK(a.touched() == std::string());
}
