// SPDX-License-Identifier: MIT
/// @file  What hybrid_attention refuses.

#include <limits>

#include <fovea/hybrid.hpp>

#include "contract/contract.hpp"

namespace {
using namespace fovea;
constexpr double bad = std::numeric_limits<double>::quiet_NaN();
}  // namespace

TEST_CASE("contract of hybrid: calls and states") {
  const hybrid_attention m{.is_causal = true}, both_ways{};
  contract::refuses_what_it_must(contract::caller_of(m, true));
  contract::refuses_what_it_must(contract::caller_of(both_ways, true));
  contract::refuses_what_it_must(contract::streaming_caller_of(m, true));
  contract::refuses_foreign_states(m);
  contract::arguments a(3, 3);
  problem p = a.good(false);
  state s = m.make_state(p.shape());
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, both_ways, p.q, p.k, p.v, p.out, s); }), "causal");
  CHECK_SAYS(test::refusal(
                 [&] { (void)hybrid_attention{.is_causal = true, .target = {.relative = 0.1}}.make_state(p.shape()); }),
             "error target");
  CHECK(a.touched() == std::string());
}

TEST_CASE("contract of hybrid: its own values") {
  using contract::refuses_value;
  using H = hybrid_attention;
  refuses_value(H{.block_q = 0}, {"block_q", "0"});
  refuses_value(H{.block_k = -16}, {"block_k", "-16"});
  refuses_value(H{.top = -1}, {"top", "-1"});
  refuses_value(H{.budget = -0.1}, {"budget is -0.1"});
  refuses_value(H{.budget = 1.5}, {"budget is 1.5"});
  refuses_value(H{.budget = bad}, {"budget is nan"});
  refuses_value(H{.at_least = -5}, {"at_least", "-5"});
  refuses_value(H{.first = -5}, {"first", "-5"});
  refuses_value(H{.window = -5}, {"window", "-5"});
  refuses_value(H{.top_p = -0.5}, {"top_p is -0.5"});
  refuses_value(H{.keep_small = bad}, {"keep_small is nan"});
  refuses_value(H{.parts = 0}, {"parts is 0"});
  refuses_value(H{.scale = bad}, {"scale is nan"});
  refuses_value(H{.scale = -2.0}, {"scale is -2"});
  refuses_value(H{.select = block_selector::pattern, .stride = 0}, {"stride", "0"});
  refuses_value(H{.select = block_selector::given}, {"blocks"});
  refuses_value(H{.target = {.relative = -0.5}}, {"target is -0.5"});
  refuses_value(H{.target = {.absolute = bad}}, {"target.absolute is nan"});
  refuses_value(H{.select = block_selector::int4, .target = {.relative = 0.1}}, {"target", "int4"});
  refuses_value(H{.compensate = compensation::cumulant, .target = {.relative = 0.1}}, {"target", "cumulant"});
  refuses_value(H{.arithmetic = precision::bf16}, {"arithmetic is bf16"});
  refuses_value(H{.compensate = compensation::cumulant, .arithmetic = precision::int8}, {"int8", "cumulant"});
  refuses_value(H{.select = block_selector::pattern,
                  .is_causal = true,
                  .compensate = compensation::none,
                  .arithmetic = precision::int8},
                {"int8", "pattern"});
  static const std::uint8_t table[64] = {};
  refuses_value(H::over(bhnd<const std::uint8_t>(table, 1, 3, 2, 3), 2, 2, false),
                {"blocks", "3"});  // heads: H or G or 1
  refuses_value(H::over(bhnd<const std::uint8_t>(table, 1, 2, 2, 2), 2, 2, false),
                {"blocks", "3"});  // 5 keys are 3 blocks
}

TEST_CASE("contract of hybrid: int8 is of f32 and less, forwards, and without a certificate") {
  const hybrid_attention m{.is_causal = true, .arithmetic = precision::int8};
  contract::refuses_what_it_must(contract::caller_of(m, true));
  contract::refuses_what_it_must(contract::streaming_caller_of(m, true));
  contract::arguments wide(3, 5, 8, 6, dtype::f64);
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, m, wide.q, wide.k, wide.v, wide.out); }), "int8");
  CHECK_SAYS(test::refusal([&] { (void)m.make_state({1, 4, 2, 3, 5, 8, 6, dtype::f64}); }), "int8");
  contract::arguments a;
  test::tensor bound(dtype::f32, 2, 4, 3, 1);
  CHECK_SAYS(test::refusal([&] { error_bound(serial, m, a.q, a.k, a.v, bound); }), "int8");
  CHECK_SAYS(test::refusal([&] { prefill_within(serial, m, a.q, a.k, a.v, a.out, bound, {.relative = 0.1}); }), "int8");
}
