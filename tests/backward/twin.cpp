// SPDX-License-Identifier: MIT
/// @file  The twin of the backward pass against central differences of the forward twin: q, k, v, bias, sinks.

#include "backward/problems.hpp"

using namespace backward_tests;

namespace {

/// sum of out * dout, out by the forward twin in double.
double loss(const softmax_attention& m, const run& x) {
  tensor out = test::unwritten(dtype::f64, x.s.B, x.s.H, x.s.n, x.s.e);
  reference::prefill(m, {x.q, x.k, x.v, out, {}, {}, {}});
  const test::array o = out.values(), g = x.dout.values();
  double sum = 0;
  for (std::size_t i = 0; i < o.data.size(); ++i) sum += o.data[i] * g.data[i];
  return sum;
}

/// Central differences of fourth order: the error is of order step^4.
template <class Set>
double difference(const softmax_attention& m, const run& x, double at, double step, Set&& set) {
  const auto value = [&](double shift) {
    set(at + shift);
    return loss(m, x);
  };
  const double near = (value(step) - value(-step)) / (2 * step),
               far = (value(2 * step) - value(-2 * step)) / (4 * step);
  set(at);
  return (4 * near - far) / 3;
}

std::vector<double> differences(const softmax_attention& m, run& x, tensor& t) {
  std::vector<double> out;
  for (isize b = 0; b < t.batch(); ++b)
    for (isize h = 0; h < t.heads(); ++h)
      for (isize i = 0; i < t.length(); ++i)
        for (isize c = 0; c < t.width(); ++c)
          out.push_back(difference(m, x, t.get(b, h, i, c), 1e-3, [&](double y) { t.set(b, h, i, c, y); }));
  return out;
}
/// Of a float table, rounded to few bits: every shifted value is exact.
std::vector<double> differences(const softmax_attention& m, run& x, std::vector<float>& table) {
  std::vector<double> out;
  for (float& y : table)
    out.push_back(difference(m, x, static_cast<double>(y), 0x1p-10, [&](double z) { y = static_cast<float>(z); }));
  return out;
}

void round_to_few_bits(std::vector<float>& table) {
  for (float& y : table) y = std::round(y * 64) / 64;
}

void agrees(setting& x, const shape& s, std::uint64_t seed) {
  test::random r(seed);
  run y(r, s);
  CAPTURE(seed, s.B, s.H, s.G, s.n, s.m, s.d, s.e);
  const test::tolerance close{.c = 1e7, .acc = dtype::f64, .scale = 1};  // 1e-9
  round_to_few_bits(x.sinks), round_to_few_bits(x.bias);
  const std::vector<double> dsinks = differences(x.m, y, x.sinks), dbias = differences(x.m, y, x.bias);
  const reference::softmax_gradients twin = reference::backward(x.m, y.q, y.k, y.v, y.dout);
  CHECK_CLOSE(shaped(y.q, twin.dq), shaped(y.q, differences(x.m, y, y.q)), close);
  CHECK_CLOSE(shaped(y.k, twin.dk), shaped(y.k, differences(x.m, y, y.k)), close);
  CHECK_CLOSE(shaped(y.v, twin.dv), shaped(y.v, differences(x.m, y, y.v)), close);
  if (!dsinks.empty()) CHECK_CLOSE({{s.H}, twin.dsinks}, {{s.H}, dsinks}, close);
  if (dbias.empty()) return;
  // The kernel's sums over the table's broadcast dimensions, in float, whatever comes after the bias in a chain.
  y.forward(x.m);
  y.backward(x.m, x.bias.size());
  CHECK_CLOSE({{static_cast<isize>(dbias.size())}, {y.dbias.begin(), y.dbias.end()}},
              {{static_cast<isize>(dbias.size())}, dbias}, {.c = 64, .scale = 1});
}

}  // namespace

TEST_CASE("backward twin: central differences of the forward twin, every mask with every score") {
  std::uint64_t seed = 1;
  for (int mask_kind = 0; mask_kind < mask_kinds; ++mask_kind)
    for (int score_kind = 0; score_kind < score_kinds; ++score_kind, ++seed) {
      test::random r(seed);
      const shape s{r.integer(1, 2), 2,         r.integer(1, 2), r.integer(1, 4), r.integer(1, 5), r.integer(1, 3),
                    r.integer(1, 3), dtype::f64};
      setting x;
      x.m.mask = make_mask(mask_kind, r, s, x);
      make_score(score_kind, r, s, x);
      agrees(x, s, seed);
    }
}

TEST_CASE("backward: a bias before a soft-cap, and one that is read as a Toeplitz matrix") {
  test::random r(77);
  const shape s{2, 2, 1, 5, 6, 3, 2, dtype::f64};
  setting x;
  additive_bias b = make_bias(r, s, x);
  x.m.mask = causal{};
  x.m.score = chain{b, softcap{1.5}};
  agrees(x, s, 78);
  fill(r, x.bias, s.n + s.m - 1, 1.0);  // element i + (m - 1 - j): pairs of one diagonal share it
  x.m.score = additive_bias{x.bias.data() + s.m - 1, 0, 0, 1, -1};
  round_to_few_bits(x.bias);
  test::random again(79);
  run y(again, s);
  const std::vector<double> want = differences(x.m, y, x.bias);
  y.forward(x.m);
  std::vector<float> got(x.bias.size(), std::nanf(""));
  gradients to = y.wanted(x.m);
  to.dbias = got.data() + s.m - 1;
  fovea::backward(serial, x.m, y.q, y.k, y.v, y.out, y.lse, y.dout, to);
  CHECK_CLOSE({{static_cast<isize>(want.size())}, {got.begin(), got.end()}}, {{static_cast<isize>(want.size())}, want},
              {.c = 64, .scale = 1});
}
