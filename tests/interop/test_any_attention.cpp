// SPDX-License-Identifier: MIT
/// @file  any_attention: holds any mechanism, passes every call on, and says what the mechanism inside cannot do.

#include <memory>
#include <string>
#include <vector>

#include <fovea/any_attention.hpp>
#include <fovea/mask/patterns.hpp>
#include <fovea/softmax/mechanism.hpp>

#include "interop/files.hpp"
#include "support/tensors.hpp"

namespace {

using fovea::any_attention;
using fovea::isize;
using test::holds;
using test::message_of;

/// out = q * weight, the least that a mechanism can be.
struct plain {
  static constexpr const char* name = "plain";
  const float* weight = nullptr;
  void check(const fovea::problem& p) const { fovea::detail::check_problem(p); }
  std::size_t workspace_size(const fovea::shape&, int) const { return 0; }
  void prefill(fovea::exec_ref, const fovea::problem& p, fovea::arena) const {
    for (isize i = 0; i < p.q.length; ++i) p.out.set(0, 0, i, 0, p.q.get(0, 0, i, 0) * static_cast<double>(*weight));
  }
};

/// out = sum of v so far: everything that a mechanism can be.
struct running_sum {
  static constexpr const char* name = "running_sum";
  static constexpr bool has_lse = true;
  bool causal = true;
  bool streaming() const { return causal; }
  bool trained() const { return false; }
  void check(const fovea::problem& p) const { fovea::detail::check_problem(p); }
  void check(const fovea::problem& p, const fovea::state& s) const { check(p), s.check(tag(), p.shape(), name); }
  std::size_t workspace_size(const fovea::shape&, int) const { return 8; }
  std::uint64_t tag() const { return fovea::detail::fingerprint{}.text(name).value; }
  fovea::state make_state(const fovea::shape& s) const { return {tag(), s, sizeof(double)}; }
  void prefill(fovea::exec_ref exec, const fovea::problem& p, fovea::arena scratch) const {
    fovea::state s = make_state(p.shape());
    prefill(exec, p, s, scratch);
  }
  void prefill(fovea::exec_ref, const fovea::problem& p, fovea::state& s, fovea::arena) const {
    for (isize i = 0; i < p.q.length; ++i) p.out.set(0, 0, i, 0, *s.as<double>() += p.v.get(0, 0, i, 0));
  }
  void merge(fovea::state& a, const fovea::state& b) const { *a.as<double>() += *b.as<double>(); }
  void load_state(fovea::state& s, const fovea::arrays& from) const { *s.as<double>() = from.at("S0").at(0); }
  fovea::arrays store_state(const fovea::state& s) const {
    return {{"S", fovea::array({1}, std::vector<double>{*s.as<double>()})}};
  }
  double macs(const fovea::shape& s) const { return static_cast<double>(s.m); }
  double step_macs(const fovea::shape&) const { return 1.0; }
  std::size_t state_bytes(const fovea::shape&) const { return sizeof(double); }
};

fovea::array row(std::initializer_list<float> x) { return {{static_cast<isize>(x.size())}, std::vector<float>(x)}; }
fovea::view<const float> view(const fovea::array& a) { return fovea::bhnd(a.as<float>(), 1, 1, a.size(), 1); }

}  // namespace

TEST_CASE("any_attention: holds a mechanism and keeps its weights alive") {
  auto weights = std::make_shared<std::vector<float>>(1, 3.F);
  const std::weak_ptr<const void> alive = weights;
  any_attention a = any_attention::hold(plain{weights->data()}, weights);
  weights.reset();
  const any_attention copy = a;
  a = any_attention();
  REQUIRE_FALSE(alive.expired());
  const auto q = row({1, 2, 4});
  std::vector<float> out(3);
  fovea::prefill(fovea::serial, copy, view(q), view(q), view(q), fovea::bhnd(out.data(), 1, 1, 3, 1));
  CHECK(out == std::vector<float>{3, 6, 12});
  CHECK(copy.name() == std::string("plain"));
  CHECK(copy.config().mechanism == "plain");
  CHECK(copy.as<plain>() != nullptr);
  CHECK(copy.as<running_sum>() == nullptr);
}

TEST_CASE("any_attention: passes states, steps, merge and costs on") {
  const any_attention a = any_attention::hold(running_sum{});
  CHECK(a.streaming());
  CHECK(a.mergeable());
  CHECK(a.has_lse());
  CHECK(a.loads_state());
  CHECK(a.stores_state());
  CHECK_FALSE(a.trained());
  const auto v = row({1, 2, 4}), one = row({8});
  std::vector<float> out(3);
  fovea::state s = a.make_state({1, 1, 1, 3, 3, 1, 1});
  a.load_state(s, {{"S0", row({16})}});
  fovea::prefill(fovea::serial, a, view(v), view(v), view(v), fovea::bhnd(out.data(), 1, 1, 3, 1), s);
  CHECK(out == std::vector<float>{17, 19, 23});
  fovea::step(fovea::serial, a, view(one), view(one), view(one), fovea::bhnd(out.data(), 1, 1, 1, 1), s);
  CHECK(out[0] == 31.F);
  fovea::state copy = s;
  a.merge(copy, s);
  CHECK(a.store_state(copy).at("S").at(0) == 62.0);
  CHECK(a.macs({1, 1, 1, 3, 5, 1, 1}) == 5.0);
  CHECK(a.step_macs({}) == 1.0);
  CHECK(a.state_bytes({}) == 8);
}

TEST_CASE("any_attention: a capability that is not there is a sentence") {
  const float one = 1.F;
  const any_attention a = any_attention::hold(plain{&one});
  CHECK_FALSE(a.streaming());
  CHECK_FALSE(a.mergeable());
  CHECK_FALSE(a.has_lse());
  CHECK(a.trained());
  fovea::state s;
  const auto v = row({1});
  std::vector<float> out(1, 7.F);
  const auto check = [](auto f, const std::string& wanted) {
    CHECK(holds(message_of<fovea::contract_error>(f), wanted));
  };
  check([&] { (void)a.make_state({}); }, "plain has no state");
  check([&] { (void)a.tag(); }, "plain has no state");
  check([&] { a.merge(s, s); }, "plain has no merge of states");
  check([&] { (void)a.macs({}); }, "plain has no count of multiply-adds");
  check([&] { (void)a.state_bytes({}); }, "plain has no state size");
  check([&] { a.load_state(s, {}); }, "plain has no initial state given as tensors");
  check([&] { (void)a.store_state(s); }, "plain has no final state given as tensors");
  check([&] { fovea::prefill(fovea::serial, a, view(v), view(v), view(v), fovea::bhnd(out.data(), 1, 1, 1, 1), s); },
        "plain has no state");
  CHECK(out[0] == 7.F);
  check([&] { (void)any_attention().name(); }, "any_attention is empty");
  CHECK_FALSE(any_attention::hold(running_sum{.causal = false}).streaming());
}

TEST_CASE("any_attention: an unknown mechanism is refused with the list of those known") {
  const std::string line = message_of<fovea::contract_error>([] { (void)any_attention::make({"sofmax", {}}); });
  CHECK(holds(line, "mechanism is \"sofmax\"; wanted one of"));
  for (const auto& entry : fovea::registered_mechanisms()) CHECK(holds(line, entry.name));
}

TEST_CASE("any_attention: patterns as masks of softmax") {
  const fovea::mask_site at{0, 0, 90, 90, 1, 1};
  const auto same = [&](const fovea::configuration& c, const fovea::mask& want) {
    const auto made = any_attention::make(c);
    const auto* m = made.as<fovea::softmax_attention>();
    isize apart = m == nullptr ? 1 : 0;
    for (isize i = 0; i < 90 && m != nullptr; ++i)
      for (isize j = 0; j < 90; ++j) apart += m->mask.visible(at, i, j) != want.visible(at, i, j) ? 1 : 0;
    return apart == 0 && m->mask.is_causal() == want.is_causal();
  };
  const fovea::hsa_pattern sparse{fovea::hsa_mode::sparse, 12};
  CHECK(same({"softmax", {{"pattern", "sparse"}, {"stride", 12.0}}}, sparse));
  CHECK(same({"softmax", {{"pattern", "sparse"}, {"stride", 12.0}, {"causal", true}}}, sparse));
  CHECK(same({"softmax", {{"pattern", "fixed"}}}, fovea::hsa_pattern{fovea::hsa_mode::fixed, 128}));
  CHECK(same({"softmax", {{"pattern", "dilated"}, {"pattern_window", 5.0}, {"stride", 3.0}}}, fovea::dilated{5, 3}));
  CHECK(same({"softmax", {{"pattern", "bigbird"}, {"pattern_block", 8.0}, {"pattern_seed", 4.0}, {"causal", true}}},
             fovea::bigbird{.block = 8, .seed = 4, .is_causal = true}));
  CHECK(
      same({"softmax", {{"pattern", "local"}, {"stride", 30.0}, {"window", 9.0}, {"causal", true}}}, fovea::window{9}));
  CHECK(holds(message_of<fovea::contract_error>([] {
                (void)any_attention::make({"softmax", {{"pattern", "bigbird"}, {"pattern_window", 2.0}}});
              }),
              "odd"));
}

TEST_CASE("any_attention: every mechanism can be made, and refuses a key and a tensor that it does not know") {
  using fovea::configuration;
  const std::vector<configuration> least = {{"softmax", {}},
                                            {"linear", {}},
                                            {"dijiang", {{"head_dim", 8.0}}},
                                            {"linformer", {{"projection", "mean"}, {"slots", 4.0}}},
                                            {"efficient", {}},
                                            {"kfree_reconstruction", {}},
                                            {"hybrid", {}},
                                            {"windowed", {}},
                                            {"nystrom", {}}};
  CHECK(least.size() == fovea::registered_mechanisms().size());
  for (const configuration& good : least) {
    INFO(good.mechanism);
    const any_attention a = any_attention::make(good);
    CHECK(a.name() == good.mechanism);
    CHECK(a.config().values == good.values);
    CHECK(a.call_inputs().contains("S0") == (good.mechanism == "linear"));
    configuration bad = good;
    bad.values["no_such_key"] = 1.0;
    CHECK(holds(message_of<fovea::contract_error>([&] { (void)any_attention::make(bad); }),
                "\"no_such_key\" (1) is not supported"));
    CHECK(holds(message_of<fovea::contract_error>([&] {
                  (void)any_attention::make(good, {{"no_such_tensor", row({1})}});
                }),
                "\"no_such_tensor\" [1] f32 is not supported"));
  }
}
