// SPDX-License-Identifier: MIT
/// @file  What dijiang_attention refuses.

#include <limits>

#include <fovea/dijiang.hpp>

#include "contract/contract.hpp"

namespace {
using namespace fovea;
constexpr double bad = std::numeric_limits<double>::quiet_NaN();
}  // namespace

TEST_CASE("contract of dijiang: calls and states") {
  const auto m = dijiang_attention::make({.head_dim = 8, .seed = 1});
  contract::refuses_what_it_must(contract::caller_of(m));
  contract::refuses_what_it_must(contract::streaming_caller_of(m));
  contract::refuses_foreign_states(m);
  const auto other = dijiang_attention::make({.head_dim = 8, .seed = 2});
  contract::arguments a(3, 3);
  problem p = a.good(false);
  state s = other.make_state(p.shape());
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, m, p.q, p.k, p.v, p.out, s); }), "not made by this dijiang");
  CHECK(a.touched() == std::string());
}

TEST_CASE("contract of dijiang: its own values") {
  contract::refuses_value(dijiang_attention{}, {"make"});
  contract::refuses_value(dijiang_attention::make({.head_dim = 16, .seed = 1}), {"16", "8"});
  const auto made = [](const dijiang_options& o) { return test::refusal([&] { dijiang_attention::make(o); }); };
  CHECK_SAYS(made({.head_dim = 0}), "head_dim is 0");
  CHECK_SAYS(made({.head_dim = -8}), "head_dim is -8");
  CHECK_SAYS(made({.head_dim = 8, .features = 12}), "features");
  CHECK_SAYS(made({.head_dim = 8, .features = -8}), "features");
  CHECK_SAYS(made({.head_dim = 8, .gamma = {1.5}}), "gamma");
  CHECK_SAYS(made({.head_dim = 8, .gamma = {bad}}), "gamma");
}
