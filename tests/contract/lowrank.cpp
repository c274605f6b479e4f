// SPDX-License-Identifier: MIT
/// @file  What linformer_attention, efficient_attention, kfree_reconstruction and nystrom_attention refuse.

#include <limits>

#include <fovea/efficient.hpp>
#include <fovea/linformer.hpp>
#include <fovea/nystrom.hpp>

#include "contract/contract.hpp"

namespace {

using namespace fovea;
constexpr double bad = std::numeric_limits<double>::quiet_NaN();

/// A projection of 16 positions onto 4 slots, one for all heads.
const float* weights() {
  static const std::vector<float> w(16 * 4 * 2, 0.25F);
  return w.data();
}
linformer_attention projected() { return {.E = bhnd<const float>(weights(), 1, 1, 16, 4)}; }
linformer_attention by_blocks() {
  return {.E = bhnd<const float>(weights(), 1, 1, 16, 4), .causal = true, .block = 16};
}

}  // namespace

TEST_CASE("contract of linformer: calls and states") {
  contract::refuses_what_it_must(contract::caller_of(projected(), true));
  contract::refuses_what_it_must(contract::caller_of(by_blocks(), true));
  contract::refuses_what_it_must(contract::streaming_caller_of(by_blocks(), true));
  contract::refuses_foreign_states(by_blocks());
}

TEST_CASE("contract of linformer: its own values") {
  using contract::refuses_value;
  const auto with = [](auto change) {
    linformer_attention m = projected();
    change(m);
    return m;
  };
  using L = linformer_attention;
  refuses_value(with([](L& m) { m.causal = true; }),
                {"causal", "block"});  // a plain causal mask: the sentence says why
  refuses_value(with([](L& m) { m.E = {}; }), {"E"});
  refuses_value(with([](L& m) { m.E.data = nullptr; }), {"E"});
  refuses_value(with([](L& m) { m.E.length = 4; }), {"E", "5"});  // more keys than rows
  refuses_value(with([](L& m) { m.E.heads = 3; }), {"E", "3"});
  refuses_value(with([](L& m) { m.F = bhnd<const float>(weights(), 1, 1, 16, 3); }), {"F", "3"});
  refuses_value(with([](L& m) { m.slots = -1; }), {"slots", "-1"});
  refuses_value(with([](L& m) { m.scale = bad; }), {"scale is nan"});
  refuses_value(with([](L& m) { m.scale = -1; }), {"scale is -1"});
  refuses_value(with([](L& m) { m.causal = true, m.block = -2; }), {"block", "-2"});
  refuses_value(L{.projection = sequence_projection::mean}, {"slots"});
  refuses_value(L{.projection = sequence_projection::conv, .slots = 4}, {"wk"});
  static const std::int32_t few[] = {3}, many[] = {3, 9}, negative[] = {3, -1};
  refuses_value(with([](L& m) { m.lengths = few; }), {"lengths", "2"});
  refuses_value(with([](L& m) { m.lengths = many; }), {"lengths", "9"});
  refuses_value(with([](L& m) { m.lengths = negative; }), {"lengths", "-1"});
}

TEST_CASE("contract of efficient: calls, states and values") {
  using contract::refuses_value;
  using E = efficient_attention;
  contract::refuses_what_it_must(contract::caller_of(E{}));
  contract::refuses_what_it_must(
      contract::caller_of(E{.normalisation = efficient_normalisation::scaling, .causal = true}));
  contract::refuses_what_it_must(contract::streaming_caller_of(E{.causal = true}));
  contract::refuses_foreign_states(E{.causal = true});
  refuses_value(E{.scale = bad}, {"scale is nan"});
  refuses_value(E{.scale = std::numeric_limits<double>::infinity()}, {"scale is inf"});
  static const std::int32_t few[] = {3}, many[] = {3, 9}, good[] = {3, 5};
  refuses_value(E{.lengths = few}, {"lengths", "2"});
  refuses_value(E{.lengths = many}, {"lengths", "9"});
  refuses_value(E{.causal = true, .lengths = good}, {"lengths", "causal"});
  contract::arguments a(3, 3);
  problem p = a.good(false);
  state s = E{.causal = true}.make_state(p.shape());
  CHECK_SAYS(test::refusal([&] { fovea::prefill(serial, E{}, p.q, p.k, p.v, p.out, s); }), "causal");
  CHECK(a.touched() == std::string());
}

TEST_CASE("contract of kfree_reconstruction") {
  using K = kfree_reconstruction;
  contract::refuses_what_it_must(contract::caller_of(K{}));
  contract::refuses_value(K{.scale = bad}, {"scale is nan"});
  contract::refuses_value(K{.form = K::form_type::channel}, {"channel"});  // n = 3, m = 5
}

TEST_CASE("contract of nystrom") {
  using contract::refuses_value;
  using N = nystrom_attention;
  contract::refuses_what_it_must(contract::caller_of(N{.landmarks = 2}));
  refuses_value(N{.landmarks = 0}, {"landmarks is 0"});
  refuses_value(N{.iterations = 0}, {"iterations is 0"});
  refuses_value(N{.iterations = 65}, {"iterations is 65"});
  refuses_value(N{.scale = bad}, {"scale is nan"});
  refuses_value(N{.scale = -1.0}, {"scale is -1"});
  refuses_value(N{.skip = bhnd<const float>(weights(), 1, 1, 1, 4)}, {"skip", "4 taps", "odd"});
  refuses_value(N{.skip = bhnd<const float>(weights(), 1, 1, 2, 3)}, {"skip", "[1, 1, 2, 3]"});
  refuses_value(N{.skip = bhnd<const float>(weights(), 1, 5, 1, 3)}, {"skip has 5 heads"});
  refuses_value(N{.skip = bhnd<const float>(weights(), 1, 1, 1, 3)}, {"rows", "skip"});  // n = 3, m = 5
  static const std::int32_t few[] = {3}, many[] = {3, 6}, negative[] = {-1, 3};
  refuses_value(N{.lengths = few}, {"lengths", "2"});
  refuses_value(N{.lengths = many}, {"lengths[1] is 6"});
  refuses_value(N{.query_lengths = few}, {"query_lengths has 1", "2"});
  refuses_value(N{.query_lengths = many}, {"query_lengths[1] is 6", "n = 3"});
  refuses_value(N{.query_lengths = negative}, {"query_lengths[0] is -1"});
}
