// SPDX-License-Identifier: MIT
/// @file  Mechanisms under many threads: the same bits as with one, and nothing for ThreadSanitizer to report.

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tensors.hpp"

#include <fovea/core/exec.hpp>
#include <fovea/linear.hpp>
#include <fovea/softmax.hpp>

namespace {

using namespace fovea;

/// 2 batch items, 6 query heads on 3 KV heads, 70 tokens of width 24; then one more token through `step`.
template <class M, class Exec>
std::pair<test::tensor, test::tensor> outputs(const M& m, const Exec& exec, isize last_keys) {
  test::random r(5);
  const auto q = test::normal(r, dtype::f32, 2, 6, 70, 24), k = test::normal(r, dtype::f32, 2, 3, 70, 24),
             v = test::normal(r, dtype::f32, 2, 3, 70, 20);
  const auto q1 = test::normal(r, dtype::f32, 2, 6, 1, 24), k1 = test::normal(r, dtype::f32, 2, 3, 1, 24),
             v1 = test::normal(r, dtype::f32, 2, 3, 1, 20);
  auto out = test::unwritten(dtype::f32, 2, 6, 70, 20), out1 = test::unwritten(dtype::f32, 2, 6, 1, 20);
  auto state = m.make_state({.B = 2, .H = 6, .G = 3, .m = 70 + last_keys, .d = 24, .e = 20});
  prefill(exec, m, q, k, v, out, state);
  step(exec, m, q1, k1, v1, out1, state);
  return {out, out1};
}

template <class M>
void same_on_any_number_of_threads(const M& m) {
  const auto want = outputs(m, serial, 1);
  for (int count : {2, 3, 8}) {
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

TEST_CASE("threads: linear attention gives the same bits") { same_on_any_number_of_threads(linear_attention{}); }
