// SPDX-License-Identifier: MIT
/// @file  The backward passes of efficient_attention and kfree_reconstruction: the twin against central differences of the forward twin,
///        the vector path against the twin in every storage type, threads, lengths, refusals.

#include <fovea/efficient.hpp>
#include <fovea/efficient/reference_backward.hpp>

#include "support/catch.hpp"
#include "support/compare.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::tensor;

struct inputs {
  tensor q, k, v, dout;
  inputs(const shape& s, std::uint64_t seed) {
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

template <class M>
double loss(const M& m, const inputs& x) {
  tensor out = test::unwritten(dtype::f64, x.q.batch(), x.q.heads(), x.q.length(), x.v.width());
  reference::prefill(m, problem{x.q, x.k, x.v, out, {}, {}});
  const test::array o = out.values(), g = x.dout.values();
  double sum = 0;
  for (std::size_t i = 0; i < o.data.size(); ++i) sum += o.data[i] * g.data[i];
  return sum;
}
template <class M>
test::array differences(const M& m, inputs& x, tensor& t) {
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
test::array shaped(const tensor& like, const std::vector<double>& x) { return {like.values().dims, x}; }

struct results {
  tensor dq, dk, dv;
};
template <class M>
results run(const M& m, const inputs& x, const shape& s, exec_ref exec) {
  tensor out = test::unwritten(s.type, s.B, s.H, s.n, s.e);
  prefill(serial, m, x.q, x.k, x.v, out);
  results r{test::unwritten(s.type, s.B, s.H, s.n, s.d), test::unwritten(s.type, s.B, s.G, s.m, s.d),
            test::unwritten(s.type, s.B, s.G, s.m, s.e)};
  fovea::backward(exec, m, x.q, x.k, x.v, out, {}, x.dout, {.dq = r.dq, .dk = r.dk, .dv = r.dv});
  return r;
}

template <class M>
void agrees(const M& m, std::uint64_t seed, bool square) {
  test::random r(seed);
  const isize few = r.integer(2, 5);
  const shape s{2, 4, 2, few, square ? few : r.integer(1, 6), 3, square ? 3 : 4, dtype::f64};
  inputs x(s, seed);
  CAPTURE(s.n, s.m);
  const test::tolerance close{.c = 1e7, .acc = dtype::f64, .scale = 1};  // differences: 1e-9
  const auto twin = reference::backward(m, x.q, x.k, x.v, x.dout);
  CHECK_CLOSE(shaped(x.q, twin.dq), differences(m, x, x.q), close);
  CHECK_CLOSE(shaped(x.k, twin.dk), differences(m, x, x.k), close);
  CHECK_CLOSE(shaped(x.v, twin.dv), differences(m, x, x.v), close);
}
template <class M>
void matches(const M& m, bool square) {
  for (const dtype type : {dtype::f64, dtype::f32, dtype::bf16})
    for (const shape& s : {shape{1, 4, 2, 70, square ? 70 : 150, 40, square ? 40 : 24, type},
                           shape{2, 2, 2, 33, square ? 33 : 20, 16, square ? 16 : 17, type}}) {
      const inputs x(s, 5);
      const auto twin = reference::backward(m, x.q, x.k, x.v, x.dout);
      const results got = run(m, x, s, serial), other = run(m, x, s, threads(3));
      CAPTURE(fovea::name_of(type), s.n, s.m);
      const test::tolerance close{
          .c = type == dtype::f64 ? 4096.0 : 128.0, .acc = type == dtype::f64 ? type : dtype::f32, .stored = type};
      CHECK_CLOSE(got.dq.values(), shaped(x.q, twin.dq), close);
      CHECK_CLOSE(got.dk.values(), shaped(x.k, twin.dk), close);
      CHECK_CLOSE(got.dv.values(), shaped(x.v, twin.dv), close);
      CHECK_SAME_BITS(got.dq, other.dq);
      CHECK_SAME_BITS(got.dk, other.dk);
      CHECK_SAME_BITS(got.dv, other.dv);
    }
}

using E = efficient_attention;
using K = kfree_reconstruction;
constexpr auto scaling = efficient_normalisation::scaling;
const std::vector<E> efficient_forms = {{},
                                        {.scale = 0.7},
                                        {.normalisation = scaling, .scale = 0.5},
                                        {.causal = true},
                                        {.normalisation = scaling, .causal = true}};

}  // namespace

TEST_CASE("backward of efficient and k-free: the twin, by central differences of the forward twin") {
  std::uint64_t seed = 1;
  for (const E& m : efficient_forms)
    for (int repeat = 0; repeat < 3; ++repeat) {
      CAPTURE(static_cast<int>(m.normalisation), m.causal);
      agrees(m, seed++, false);
    }
  for (const auto form : {K::form_type::efficient, K::form_type::context, K::form_type::channel}) {
    CAPTURE(static_cast<int>(form));
    agrees(K{.form = form, .scale = 0.6}, seed++, form == K::form_type::channel);
  }
}

TEST_CASE("backward of efficient and k-free: every storage type against the twin, any number of threads") {
  for (const E& m : efficient_forms) {
    CAPTURE(static_cast<int>(m.normalisation), m.causal);
    matches(m, false);
  }
  for (const auto form : {K::form_type::efficient, K::form_type::context, K::form_type::channel}) {
    CAPTURE(static_cast<int>(form));
    matches(K{.form = form, .scale = 0.25}, form == K::form_type::channel);
  }
}

TEST_CASE("backward of efficient: huge keys, padding, what is not asked for") {
  const shape s{2, 2, 1, 6, 9, 20, 5, dtype::f32};
  inputs x(s, 8);
  for (isize j = 0; j < s.m; ++j)  // maxima rise by hundreds from token to token
    for (isize c = 0; c < s.d; ++c) x.k.set(0, 0, j, c, 300 * x.k.get(0, 0, j, c));
  for (const bool causal : {false, true}) {
    const E m{.causal = causal};
    const auto twin = reference::backward(m, x.q, x.k, x.v, x.dout);
    const results got = run(m, x, s, serial);
    // One key has almost all of each channel, so that what is left of dk is the rounding of a difference of terms of order 1.
    CHECK_CLOSE(got.dk.values(), shaped(x.k, twin.dk), {.c = 128, .scale = 1});
    CHECK_CLOSE(got.dq.values(), shaped(x.q, twin.dq), {.c = 128});
  }
  static const std::int32_t lengths[] = {4, 0};
  const E padded{.lengths = lengths};
  for (isize c = 0; c < s.d; ++c) x.k.set(0, 0, 7, c, std::nan(""));
  const results got = run(padded, x, s, serial);
  const auto twin = reference::backward(padded, x.q, x.k, x.v, x.dout);
  CHECK_CLOSE(got.dk.values(), shaped(x.k, twin.dk), {.c = 128, .scale = 1});
  CHECK(got.dk.get(0, 0, 7, 0) == 0.0);
  CHECK(got.dv.get(1, 0, 0, 0) == 0.0);
  CHECK_CLOSE(got.dq.values(), shaped(x.q, twin.dq), {.c = 128});
  const auto alone = [&](const E& m, const gradients& to) {
    fovea::backward(serial, m, x.q, x.k, x.v, x.dout, {}, x.dout, to);  // out is not read
  };
  tensor dv = test::unwritten(s.type, s.B, s.G, s.m, s.e);
  alone(padded, {.dv = dv});
  CHECK_SAME_BITS(dv, got.dv);
  float room[4] = {};
  CHECK_SAYS(test::refusal([&] { alone({}, {.dE = room}); }), "other than dq, dk and dv");
  CHECK_SAYS(test::refusal([&] { alone({}, {.dlog_weight = room}); }), "other than dq, dk and dv");
  CHECK_SAYS(test::refusal([&] { alone({}, {.dk = dv}); }), "dk is [2, 1, 9, 5]");
}
