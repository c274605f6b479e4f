// SPDX-License-Identifier: MIT
/// @file  The golden gradients of softmax (PyTorch autograd in float64): the twin, and any_attention's backward in f64 and f32, every layout.

#include <fovea/core/any.hpp>

#include "backward/problems.hpp"
#include "support/errors.hpp"
#include "support/golden.hpp"

using namespace backward_tests;

namespace {

struct made {
  std::vector<std::uint8_t> mask;
  std::vector<float> bias, sinks;
  softmax_attention m;

  explicit made(const golden::test_case& c) {
    m.scale = c.number("scale", 0);
    if (c.params.contains("window"))
      m.mask = window{.width = c.integer("window", 0)};
    else if (c.flag("causal"))
      m.mask = causal{};
    if (c.has("mask")) {
      mask = c.list<std::uint8_t>("mask");
      m.mask = boolean_mask{mask.data(), 0, 0, c.at("mask").dims[3]};
    }
    if (c.params.contains("softcap")) m.score = softcap{c.number("softcap", 0)};
    if (c.has("bias")) {
      bias = c.list<float>("bias");
      const auto& d = c.at("bias").dims;
      m.score = additive_bias{bias.data(), 0, d[2] * d[3], d[3], 1, {d[0], d[1], d[2], d[3]}};
    }
    if (c.has("sinks")) sinks = c.list<float>("sinks"), m.sinks = sinks.data();
  }
};

}  // namespace

TEST_CASE("golden gradients: every case through the twin, f64 and f32, in every layout") {
  isize cases = 0;
  for (const golden::test_case& c : golden::family("softmax")) {
    if (!c.has("do")) continue;
    ++cases;
    CAPTURE(c.name);
    const made x(c);
    const auto twin = reference::backward(x.m, c.tensor("q", dtype::f64), c.tensor("k", dtype::f64),
                                          c.tensor("v", dtype::f64), c.tensor("do", dtype::f64));
    const test::tolerance twin_close{.c = 1e5, .acc = dtype::f64};  // its slopes are quotients
    CHECK_CLOSE({c.at("dq").dims, twin.dq}, c.at("dq"), twin_close);
    CHECK_CLOSE({c.at("dk").dims, twin.dk}, c.at("dk"), twin_close);
    CHECK_CLOSE({c.at("dv").dims, twin.dv}, c.at("dv"), twin_close);
    if (c.has("dsinks")) CHECK_CLOSE({c.at("dsinks").dims, twin.dsinks}, c.at("dsinks"), twin_close);
    const any_attention a = any_attention::hold(x.m);
    CHECK(a.differentiable());
    for (const dtype type : {dtype::f64, dtype::f32})
      for (const test::layout l : test::layouts) {
        const tensor q = c.tensor("q", type, l), k = c.tensor("k", type, l), v = c.tensor("v", type, l),
                     g = c.tensor("do", type, l);
        const auto like = [&](const tensor& t) {
          return test::unwritten(type, t.batch(), t.heads(), t.length(), t.width(), l);
        };
        tensor out = like(g), lse = test::unwritten(type, q.batch(), q.heads(), q.length(), 1, l), dq = like(q),
               dk = like(k), dv = like(v);
        std::vector<float> dbias(x.bias.size(), std::nanf("")), dsinks(x.sinks.size(), std::nanf(""));
        prefill(serial, a, q, k, v, out, {.lse = lse, .gates = {}});
        fovea::backward(serial, a, q, k, v, out, lse, g,
                        {dq, dk, dv, dbias.empty() ? nullptr : dbias.data(), dsinks.empty() ? nullptr : dsinks.data()});
        CAPTURE(fovea::name_of(type), test::name_of(l));
        const test::tolerance close{.c = 64, .acc = type};
        CHECK_CLOSE(dq.values(), c.at("dq"), close);
        CHECK_CLOSE(dk.values(), c.at("dk"), close);
        CHECK_CLOSE(dv.values(), c.at("dv"), close);
        if (c.has("dbias")) CHECK_CLOSE({c.at("dbias").dims, {dbias.begin(), dbias.end()}}, c.at("dbias"), {.c = 64});
        if (c.has("dsinks"))
          CHECK_CLOSE({c.at("dsinks").dims, {dsinks.begin(), dsinks.end()}}, c.at("dsinks"), {.c = 64});
        for (const tensor* t : {&dq, &dk, &dv}) CHECK(t->guards_intact());
      }
  }
  CHECK(cases == 9);
}

namespace {
/// Forward only.
struct plain {
  static constexpr const char* name = "plain";
  void check(const problem&) const {}
  std::size_t workspace_size(const shape&, int) const { return 0; }
  void prefill(exec_ref, const problem&, arena) const {}
};
}  // namespace

TEST_CASE("backward: any_attention without one says so") {
  const any_attention a = any_attention::hold(plain{});
  CHECK_FALSE(a.differentiable());
  test::random r(1);
  run x(r, {1, 1, 1, 2, 2, 4, 4, dtype::f32});
  CHECK_SAYS(test::refusal([&] { fovea::backward(serial, a, x.q, x.k, x.v, x.out, x.lse, x.dout, {.dq = x.dq}); }),
             "plain has no backward pass");
}
