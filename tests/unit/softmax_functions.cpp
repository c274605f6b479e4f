// SPDX-License-Identifier: MIT
/// @file  A user's own mask and score: the examples of docs/mechanisms/softmax.md, compiled, against the twin.

#include <fovea/mask/function.hpp>
#include <fovea/softmax.hpp>
#include <fovea/softmax/reference.hpp>

#include "support/catch.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

// A dilated window: every second key of the last 64.
struct dilated {
  isize width = 64, step = 2;

  bool is_causal() const { return true; }
  bool visible(const mask_site& at, isize i, isize j) const {
    const isize p = bottom_right.position(at, i);
    return j <= p && p - j < width && (p - j) % step == 0;
  }
  range keys(const mask_site& at, isize i0, isize i1) const {  // what no row of [i0, i1) needs is not read
    const isize low = bottom_right.position(at, i0) - width + 1;
    return {low < 0 ? 0 : low, bottom_right.position(at, i1 - 1) + 1};
  }
  tile_kind tile(const mask_site& at, isize i0, isize i1, isize j0, isize j1) const {
    return meet(keys(at, i0, i1), {j0, j1}).empty() ? tile_kind::empty : tile_kind::partial;
  }
};

// Logits fall with the logarithm of the distance; a register of rows or keys at a time, and one by one for double and the twin.
struct log_distance {
  float strength = 0.5F;

  template <class T>
  T operator()(const mask_site& at, isize i, isize j, T s) const {
    const isize away = bottom_right.position(at, i) - j;
    return s - static_cast<T>(strength) * std::log1p(static_cast<T>(away < 0 ? -away : away));
  }
};
struct linear_distance {
  float strength = 0.01F;

  template <class T>
  T operator()(const mask_site&, isize i, isize j, T s) const {
    return s + static_cast<T>(strength) * static_cast<T>(i - j);
  }
  template <class P>  // the same for simd::pack<float> and simd::pack<double>
  P wide(const mask_site&, P i, P j, P s) const {
    return simd::fma(P(static_cast<typename P::value_type>(strength)), i - j, s);
  }
};

void agrees(const softmax_attention& m, isize n) {
  test::random r(1);
  for (const dtype type : {dtype::f32, dtype::f64}) {
    const tensor q = test::normal(r, type, 2, 4, n, 32), k = test::normal(r, type, 2, 2, 300, 32),
                 v = test::normal(r, type, 2, 2, 300, 32);
    tensor want = test::unwritten(dtype::f64, 2, 4, n, 32), got = test::unwritten(type, 2, 4, n, 32);
    reference::prefill(m, {q, k, v, want, {}, {}});
    prefill(serial, m, q, k, v, got);
    CHECK_CLOSE(got.values(), want.values(), {.c = 128, .acc = type, .stored = type});
  }
}

}  // namespace

TEST_CASE("softmax: functions as mask and score") {
  const isize documents[] = {0, 90, 170, 300};
  const auto same_document = [&documents](const mask_site& at, isize i, isize j) {
    const isize p = bottom_right.position(at, i);
    int a = 0, b = 0;
    while (documents[a + 1] <= p) ++a;
    while (documents[b + 1] <= j) ++b;
    return a == b && j <= p;
  };
  const auto stronger_first_head = [](const mask_site& at, isize, isize, auto s) {
    return at.h == 0 ? s + s : s;  // auto: float in kernels, double in the twin
  };
  for (const isize n : {1, 100, 300}) {
    const softmax_attention m{.mask = mask_function{same_document, true}, .score = stronger_first_head};
    agrees(m, n);
    const mask_blocks known(m.mask, {.n = n, .m = 300}, 64, 64);
    CHECK(known.density() < 0.7);
    agrees({.mask = mask_blocks_of{&known, mask_function{same_document}}, .score = stronger_first_head}, n);
    agrees({.mask = dilated{}}, n);
    agrees({.mask = both{dilated{.width = 200, .step = 3}, chunked_local{100}}, .score = log_distance{}}, n);
    agrees({.mask = causal{}, .score = chain{softcap{4}, linear_distance{}}}, n);
  }
}

TEST_CASE("softmax: a causal function may be used with a state") {
  test::random r(2);
  const softmax_attention m{.mask = dilated{}};
  const tensor q = test::normal(r, dtype::f32, 1, 4, 150, 16), k = test::normal(r, dtype::f32, 1, 2, 150, 16),
               v = test::normal(r, dtype::f32, 1, 2, 150, 16);
  tensor whole = test::unwritten(dtype::f32, 1, 4, 150, 16), steps = whole;
  prefill(serial, m, q, k, v, whole);
  state s = m.make_state({1, 4, 2, 150, 150, 16, 16, dtype::f32});
  for (isize t = 0; t < 150; ++t)
    step(serial, m, q.ref().slice(t, 1), k.ref().slice(t, 1), v.ref().slice(t, 1), steps.ref().slice(t, 1), s);
  CHECK_CLOSE(steps.values(), whole.values(), {.c = 64});
}
