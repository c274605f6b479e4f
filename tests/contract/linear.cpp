// SPDX-License-Identifier: MIT
/// @file  What linear_attention and windowed_attention refuse.

#include <limits>

#include <fovea/feature/cosformer.hpp>
#include <fovea/linear.hpp>
#include <fovea/windowed.hpp>

#include "contract/contract.hpp"

namespace {

using namespace fovea;
constexpr double bad = std::numeric_limits<double>::quiet_NaN();

/// Gates of a good call of 3 tokens: B, G = 2, 2, r = 8, e = 6.
struct gate_memory {
  tensor_ref g1, gr, beta, erase, write;
  test::tensor t1{dtype::f32, 2, 2, 3, 1}, tr{dtype::f32, 2, 2, 3, 8}, tb{dtype::f32, 2, 2, 3, 1},
      te{dtype::f32, 2, 2, 3, 8}, tw{dtype::f32, 2, 2, 3, 6};
  gate_memory() {
    for (test::tensor* t : {&t1, &tr}) t->fill([] { return -0.5; });
    for (test::tensor* t : {&tb, &te, &tw}) t->fill([] { return 0.5; });
    g1 = t1, gr = tr, beta = tb, erase = te, write = tw;
  }
};
const gate_memory& memory() {
  static const gate_memory m;
  return m;
}

contract::caller with_gates(contract::caller c, std::function<void(problem&)> gates) {
  c.gates = true, c.prepare = std::move(gates), c.m = c.n;
  return c;
}
void gated_delta(problem& p) { p.gates.log_decay = memory().g1, p.gates.beta = memory().beta; }
void gdn2(problem& p) {
  p.gates.log_decay = memory().gr, p.gates.erase = memory().erase, p.gates.write = memory().write;
}

}  // namespace

TEST_CASE("contract of linear: calls") {
  auto plain = contract::caller_of(linear_attention{});
  plain.gates = true;  // its own sentence, below
  contract::refuses_what_it_must(plain);
  auto streaming = contract::streaming_caller_of(linear_attention{});
  streaming.gates = true;
  contract::refuses_what_it_must(streaming);
  contract::refuses_what_it_must(
      with_gates(contract::caller_of(linear_attention{.rule = rule::gated_delta}), gated_delta));
}

TEST_CASE("contract of linear: gates") {
  using P = problem;
  using A = contract::arguments;
  auto plain = contract::caller_of(linear_attention{});
  contract::refuses(plain, "a decay that rule none has not", [](P& p, A&) { p.gates.log_decay = memory().g1; },
                    {"log_decay", "rule none"});
  contract::refuses(plain, "a beta that rule none has not", [](P& p, A&) { p.gates.beta = memory().beta; },
                    {"beta", "rule none"});
  const auto delta = with_gates(contract::caller_of(linear_attention{.rule = rule::gated_delta}), gated_delta);
  contract::refuses(delta, "no decay", [](P& p, A&) { p.gates.log_decay = {}; },
                    {"log_decay", "missing", "gated_delta"});
  contract::refuses(delta, "no beta", [](P& p, A&) { p.gates.beta = {}; }, {"beta", "missing", "gated_delta"});
  contract::refuses(delta, "beta for another length", [](P& p, A&) { p.gates.beta.length = 2; },
                    {"beta is [2, 2, 2, 1] f32", "wanted [2, 2, 3, 1]"});
  contract::refuses(delta, "decay of another width", [](P& p, A&) { p.gates.log_decay = memory().gr; },
                    {"log_decay", "[2, 2, 3, 8]", "wanted [2, 2, 3, 1]"});
  contract::refuses(delta, "f64 gate", [](P& p, A&) { p.gates.beta.type = dtype::f64; }, {"beta is f64 and q is f32"});
  contract::refuses(delta, "out in a gate",
                    [](P& p, A& a) { p.gates.beta = a.out, p.gates.beta.heads = 2, p.gates.beta.width = 1; },
                    {"out overlaps beta"});
  const auto kda = with_gates(contract::caller_of(linear_attention{.rule = rule::kda}),
                              [](P& p) { p.gates.log_decay = memory().gr, p.gates.beta = memory().beta; });
  contract::refuses(kda, "scalar decay for kda", [](P& p, A&) { p.gates.log_decay = memory().g1; },
                    {"log_decay", "[2, 2, 3, 1]", "wanted [2, 2, 3, 8]"});
  const auto two = with_gates(contract::caller_of(linear_attention{.rule = rule::gdn2}), gdn2);
  contract::refuses(two, "no erase", [](P& p, A&) { p.gates.erase = {}; }, {"erase", "missing"});
  contract::refuses(two, "a write of another width", [](P& p, A&) { p.gates.write = memory().erase; },
                    {"write", "wanted [2, 2, 3, 6]"});
}

TEST_CASE("contract of linear: its own values") {
  using contract::refuses_value;
  using L = linear_attention;
  refuses_value(L{.scale = bad}, {"scale is nan"});
  refuses_value(L{.eps = bad}, {"eps is nan"});
  refuses_value(L{.eps = -1e-6}, {"eps", "-1e-06", "negative"});
  refuses_value(L{.clamp = -1}, {"clamp", "-1", "negative"});
  refuses_value(L{.key_sum_eps = std::numeric_limits<double>::infinity()}, {"key_sum_eps is inf"});
  const double rising[] = {1.5}, broken[] = {bad}, three[] = {0.5, 0.6, 0.7}, half[] = {0.5};
  refuses_value(L{.rule = rule::decay, .gamma = rising}, {"gamma holds 1.5", "[0, 1]"});
  refuses_value(L{.rule = rule::decay, .gamma = broken}, {"gamma holds nan"});
  refuses_value(L{.rule = rule::decay, .gamma = three}, {"gamma holds 3 numbers", "2 KV heads"});
  refuses_value(L{.gamma = half}, {"gamma was given", "rule none"});
  refuses_value(L{.rule = rule::gla, .is_causal = false}, {"is_causal is false", "gla"});
  refuses_value(L{.rule = rule::delta, .normalise = true}, {"normalise is true", "delta"});
}

TEST_CASE("contract of windowed: its own values") {
  const auto refused = [](auto&& change) {
    windowed_attention m;
    change(m);
    return test::refusal([&] { (void)m.make_state({.H = 2, .G = 1, .m = 8, .d = 8, .e = 8}); });
  };
  CHECK_SAYS(refused([](auto& m) { m.window = 0; }), "window is 0");
  CHECK_SAYS(refused([](auto& m) { m.window = std::numeric_limits<isize>::max(); }), "at most 2^40");
  CHECK_SAYS(refused([](auto& m) { m.first = -1; }), "first is -1");
  CHECK_SAYS(refused([](auto& m) { m.first = std::numeric_limits<isize>::max(); }), "at most 2^40");
  CHECK_SAYS(refused([](auto& m) { m.scale = bad; }), "scale");
  CHECK_SAYS(refused([](auto& m) { m.map = cosformer{8}; }), "depends on positions");
  static const float weight[3] = {};
  CHECK_SAYS(refused([](auto& m) { m.log_weight = bhnd<const float>(weight, 1, 3, 1, 1); }), "log_weight has 3 heads");
  CHECK_SAYS(refused([](auto& m) { m.query_gate = bhnd<const float>(weight, 1, 1, 1, 3); }), "query_gate is [1, 3]");
}

TEST_CASE("contract of linear: states") {
  contract::refuses_foreign_states(linear_attention{});
  contract::arguments a(3, 3);
  problem p = a.good(false);
  state s = linear_attention{}.make_state(p.shape());
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, linear_attention{.eps = 0.5}, p.q, p.k, p.v, p.out, s); }),
             "not made by this linear");
  CHECK_SAYS(
      test::refusal([&] { fovea::prefill(serial, linear_attention{.is_causal = false}, p.q, p.k, p.v, p.out, s); }),
      "is_causal is false");
  CHECK(a.touched() == std::string());
}
