// SPDX-License-Identifier: MIT
/// @file  What backward refuses, before it writes anything.

#include "backward/problems.hpp"
#include "support/errors.hpp"

using namespace backward_tests;

namespace {

/// A score policy without a slope.
struct opaque {
  template <class T>
  T operator()(const mask_site&, isize, isize, T s) const {
    return s / 2;
  }
};

struct call {
  test::random r{1};
  run x{r, {2, 4, 2, 5, 7, 8, 6, dtype::f32}, dtype::f32, false};
  tensor_ref q = x.q, k = x.k, v = x.v, out = x.out, lse = x.lse, dout = x.dout;
  gradients to{x.dq, x.dk, x.dv};
  softmax_attention m;
  backward_options options;

  call() { x.forward(m); }
  std::string refused() {
    const auto before = {x.dq.bytes(), x.dk.bytes(), x.dv.bytes()};
    const std::string said = test::refusal([&] { fovea::backward(serial, m, q, k, v, out, lse, dout, to, options); });
    const auto after = {x.dq.bytes(), x.dk.bytes(), x.dv.bytes()};
    if (said != "accepted") CHECK(std::equal(before.begin(), before.end(), after.begin()));
    return said;
  }
};

template <class Change>
std::string refusal_of(Change&& change) {
  call c;
  change(c);
  return c.refused();
}

}  // namespace

TEST_CASE("contract of backward: arguments") {
  CHECK(refusal_of([](call&) {}) == "accepted");
  CHECK(refusal_of([](call& c) { c.to = {}; }) == "accepted");
  CHECK_SAYS(refusal_of([](call& c) { c.lse = {}; }), "lse is null");
  CHECK_SAYS(refusal_of([](call& c) { c.dout = {}; }), "dout is");
  CHECK_SAYS(refusal_of([](call& c) { c.dout = c.dout.slice(0, 4); }),
             "dout is [2, 4, 4, 6] f32; wanted the sizes of out");
  CHECK_SAYS(refusal_of([](call& c) { c.out = c.out.slice(0, 4); }), "out is [2, 4, 4, 6] f32; wanted [2, 4, 5, 6]");
  CHECK_SAYS(refusal_of([](call& c) { c.to.dq = c.to.dq.slice(0, 3); }), "dq is [2, 4, 3, 8] f32; q is [2, 4, 5, 8]");
  CHECK_SAYS(refusal_of([](call& c) { c.to.dk = c.to.dv; }), "dk is [2, 2, 7, 6] f32; k is [2, 2, 7, 8]");
  CHECK_SAYS(refusal_of([](call& c) { c.to.dv = c.to.dk; }), "dv is [2, 2, 7, 8] f32; v is [2, 2, 7, 6]");
  CHECK_SAYS(refusal_of([](call& c) { c.to.dq.data = const_cast<void*>(c.q.data); }), "dq overlaps q");
  CHECK_SAYS(refusal_of([](call& c) { c.to.dv.data = const_cast<void*>(c.dout.data); }), "dv overlaps dout");
  CHECK_SAYS(refusal_of([](call& c) { c.to.dv.data = c.to.dk.data; }), "dv overlaps dk");
  CHECK_SAYS(refusal_of([](call& c) { c.to.dk.head_stride = 0; }), "must not share memory");
  CHECK_SAYS(refusal_of([](call& c) { c.to.dk.type = dtype::f64; }), "dk is f64 and k is f32");
  CHECK_SAYS(refusal_of([](call& c) { c.dout.type = dtype::f64; }), "dout is f64 and q is f32");
  CHECK_SAYS(refusal_of([](call& c) { c.k = c.k.slice(0, 6); }), "k holds 6 keys and v holds 7");
}

TEST_CASE("contract of backward: what softmax_attention has no gradient of") {
  float room[64] = {};
  CHECK_SAYS(refusal_of([](call& c) { c.m.score = opaque{}; }), "no member `slope`");
  CHECK_SAYS(refusal_of([](call& c) { c.m.score = chain{softcap{2.0}, opaque{}}; }), "no member `slope`");
  CHECK_SAYS(refusal_of([&](call& c) { c.to.dsinks = room; }),
             "dsinks was asked for; this softmax_attention has no sinks");
  CHECK_SAYS(refusal_of([&](call& c) { c.to.dbias = room; }), "dbias was asked for");
  CHECK_SAYS(refusal_of([&](call& c) { c.to.dbias = room, c.m.score = softcap{2.0}; }), "dbias was asked for");
  CHECK_SAYS(refusal_of([](call& c) { c.m.scale = -1.0; }), "scale is -1");
  CHECK_SAYS(refusal_of([](call& c) { c.m.skip = 0.01F; }), "skip is 0.01");
}

TEST_CASE("contract of backward: a workspace of the caller's") {
  call c;
  buffer memory(c.m.workspace_size_backward(c.x.s, 1));
  c.options.workspace = memory.span();
  CHECK(c.refused() == "accepted");
  const tensor first = c.x.dq;
  c.options = {};
  CHECK(c.refused() == "accepted");
  CHECK_SAME_BITS(first, c.x.dq);
  c.options.workspace = memory.span().first(memory.size() - 1);
  CHECK_SAYS(c.refused(), "workspace holds ");
}
