// SPDX-License-Identifier: MIT
/// @file  The backward pass of nystrom_attention: the double path against central differences of the forward twin, float against double.

#include <fovea/nystrom.hpp>
#include <fovea/nystrom/reference.hpp>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

struct inputs {
  shape s;
  tensor q, k, v, dout;
  inputs(const shape& sizes, std::uint64_t seed) : s(sizes) {
    test::random r(seed);
    const auto some = [&](isize heads, isize length, isize width) {
      tensor t = test::unwritten(s.type, s.B, heads, length, width);
      for (isize b = 0; b < s.B; ++b)
        for (isize h = 0; h < heads; ++h)
          for (isize i = 0; i < length; ++i)
            for (isize c = 0; c < width; ++c) t.set(b, h, i, c, r.normal());
      return t;
    };
    q = some(s.H, s.n, s.d), k = some(s.G, s.m, s.d), v = some(s.G, s.m, s.e), dout = some(s.H, s.n, s.e);
  }
};

double loss(const nystrom_attention& m, const inputs& x) {
  tensor out = test::unwritten(dtype::f64, x.s.B, x.s.H, x.s.n, x.s.e);
  reference::prefill(m, problem{x.q, x.k, x.v, out, {}, {}});
  const test::array o = out.values(), g = x.dout.values();
  double sum = 0;
  for (std::size_t i = 0; i < o.data.size(); ++i) sum += o.data[i] * g.data[i];
  return sum;
}
test::array differences(const nystrom_attention& m, inputs& x, tensor& t) {
  test::array out = t.values();
  std::size_t at = 0;
  for (isize b = 0; b < t.batch(); ++b)
    for (isize h = 0; h < t.heads(); ++h)
      for (isize i = 0; i < t.length(); ++i)
        for (isize c = 0; c < t.width(); ++c, ++at) {
          const double y = t.get(b, h, i, c), step = 1e-3;
          const auto shifted = [&](double by) {
            t.set(b, h, i, c, y + by);
            return loss(m, x);
          };
          const double near = (shifted(step) - shifted(-step)) / (2 * step),
                       far = (shifted(2 * step) - shifted(-2 * step)) / (4 * step);
          t.set(b, h, i, c, y);
          out.data[at] = (4 * near - far) / 3;
        }
  return out;
}

struct results {
  tensor dq, dk, dv;
};
results run(const nystrom_attention& m, const inputs& x, exec_ref exec) {
  const shape& s = x.s;
  tensor out = test::unwritten(s.type, s.B, s.H, s.n, s.e);
  prefill(serial, m, x.q, x.k, x.v, out);
  results r{test::unwritten(s.type, s.B, s.H, s.n, s.d), test::unwritten(s.type, s.B, s.G, s.m, s.d),
            test::unwritten(s.type, s.B, s.G, s.m, s.e)};
  fovea::backward(exec, m, x.q, x.k, x.v, out, {}, x.dout, {.dq = r.dq, .dk = r.dk, .dv = r.dv});
  return r;
}

const std::vector<float> taps = {0.5F, -0.25F, 0.75F, 0.125F, 0.25F, -1.0F};

}  // namespace

TEST_CASE("backward of nystrom: central differences of the forward twin") {
  const view<const float> one = bhnd<const float>(taps.data(), 1, 1, 1, 3),
                          each = bhnd<const float>(taps.data(), 1, 2, 1, 3);
  const std::vector<std::pair<nystrom_attention, shape>> cases = {
      {{.landmarks = 3}, {2, 2, 1, 8, 11, 3, 4, dtype::f64}},
      {{.landmarks = 4, .iterations = 2, .scale = 0.8}, {1, 2, 2, 9, 5, 4, 3, dtype::f64}},
      {{.landmarks = 3, .skip = each}, {1, 2, 1, 7, 7, 3, 2, dtype::f64}},
      {{.landmarks = 16, .skip = one}, {1, 2, 1, 6, 6, 3, 2, dtype::f64}},  // exact attention
      {{.landmarks = 1}, {1, 1, 1, 4, 3, 2, 2, dtype::f64}}};
  std::uint64_t seed = 1;
  for (const auto& [m, s] : cases) {
    inputs x(s, seed++);
    CAPTURE(m.landmarks, s.n, s.m);
    const results got = run(m, x, serial);
    const test::tolerance close{.c = 1e8, .acc = dtype::f64, .scale = 1};  // differences: 1e-8
    CHECK_CLOSE(got.dq.values(), differences(m, x, x.q), close);
    CHECK_CLOSE(got.dk.values(), differences(m, x, x.k), close);
    CHECK_CLOSE(got.dv.values(), differences(m, x, x.v), close);
  }
}

TEST_CASE("backward of nystrom: float and bf16 against double, any number of threads, what is refused") {
  const nystrom_attention m{.landmarks = 12, .skip = bhnd<const float>(taps.data(), 1, 1, 1, 5)};
  for (const dtype type : {dtype::f32, dtype::bf16}) {
    const inputs x({2, 4, 2, 90, 90, 20, 24, type}, 9);
    inputs wide({2, 4, 2, 90, 90, 20, 24, dtype::f64}, 9);
    for (auto [to, from] : {std::pair{&wide.q, &x.q}, {&wide.k, &x.k}, {&wide.v, &x.v}, {&wide.dout, &x.dout}})
      *to = test::copy_of(from->values(), dtype::f64);
    const results got = run(m, x, serial), other = run(m, x, threads(3)), want = run(m, wide, serial);
    CAPTURE(fovea::name_of(type));
    const test::tolerance close{.c = 4096, .acc = dtype::f32, .stored = type};  // times |Z|^2
    CHECK_CLOSE(got.dq.values(), want.dq.values(), close);
    CHECK_CLOSE(got.dk.values(), want.dk.values(), close);
    CHECK_CLOSE(got.dv.values(), want.dv.values(), close);
    CHECK_SAME_BITS(got.dq, other.dq);
    CHECK_SAME_BITS(got.dk, other.dk);
    CHECK_SAME_BITS(got.dv, other.dv);
    if (type != dtype::f32) continue;
    float room[4] = {};
    CHECK_SAYS(test::refusal([&] { fovea::backward(serial, m, x.q, x.k, x.v, x.dout, {}, x.dout, {.dE = room}); }),
               "other than dq, dk and dv");
  }
}
