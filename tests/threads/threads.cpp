// SPDX-License-Identifier: MIT
/// @file  Mechanisms under many threads: the same bits as with one, and nothing for ThreadSanitizer to report.

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tensors.hpp"

#include <fovea/core/exec.hpp>
#include <fovea/feature/favor.hpp>
#include <fovea/feature/learned.hpp>
#include <fovea/linear.hpp>
#include <fovea/softmax.hpp>
#include <fovea/windowed.hpp>

namespace {

using namespace fovea;

/// 2 batch items, 6 query heads on 3 KV heads, 70 tokens of width 24, values of 40; then one more token through `step`.
template <class M, class Exec>
std::pair<test::tensor, test::tensor> outputs(const M& m, const Exec& exec, isize last_keys) {
  test::random r(5);
  const auto q = test::normal(r, dtype::f32, 2, 6, 70, 24), k = test::normal(r, dtype::f32, 2, 3, 70, 24),
             v = test::normal(r, dtype::f32, 2, 3, 70, 40);
  const auto q1 = test::normal(r, dtype::f32, 2, 6, 1, 24), k1 = test::normal(r, dtype::f32, 2, 3, 1, 24),
             v1 = test::normal(r, dtype::f32, 2, 3, 1, 40);
  auto out = test::unwritten(dtype::f32, 2, 6, 70, 40), out1 = test::unwritten(dtype::f32, 2, 6, 1, 40);
  auto state = m.make_state({.B = 2, .H = 6, .G = 3, .m = 70 + last_keys, .d = 24, .e = 40});
  prefill(exec, m, q, k, v, out, state);
  step(exec, m, q1, k1, v1, out1, state);
  return {out, out1};
}

template <class M>
void same_on_any_number_of_threads(const M& m) {
  const auto want = outputs(m, serial, 1);
  for (int count : {2, 4, 8}) {
    CAPTURE(count);
    const threads pool(count);
    for (int repetition = 0; repetition < 3; ++repetition) {
      const auto got = outputs(m, pool, 1);
      CHECK(test::same_bits(got.first, want.first));
      CHECK(test::same_bits(got.second, want.second));
    }
  }
}

}  // namespace

TEST_CASE("threads: softmax gives the same bits") {
  same_on_any_number_of_threads(softmax_attention{.mask = causal{}});
}

TEST_CASE("threads: linear attention gives the same bits") {
  same_on_any_number_of_threads(linear_attention{});
  const auto w = feature::orthogonal_directions(8, 24, 3);
  const projection directions(w.data(), 1, 8, 24);
  same_on_any_number_of_threads(linear_attention{.map = hedgehog{directions.ref(), directions.ref()}});
}

TEST_CASE("threads: a window and a rest give the same bits") {
  same_on_any_number_of_threads(windowed_attention{.window = 9, .first = 2});
  test::random r(6);  // five KV heads of three chunks: with two and four threads the last one is cut by chunks
  const auto q = test::normal(r, dtype::f32, 1, 5, 1100, 8), k = test::normal(r, dtype::f32, 1, 5, 1300, 8),
             v = test::normal(r, dtype::f32, 1, 5, 1300, 8);
  auto want = test::unwritten(dtype::f32, 1, 5, 1100, 8), got = want;
  const windowed_attention m{.window = 9, .first = 2};
  prefill(serial, m, q, k, v, want);
  for (int count : {2, 3, 4, 5}) {
    CAPTURE(count);
    prefill(threads(count), m, q, k, v, got);
    CHECK(test::same_bits(got, want));
  }
}
