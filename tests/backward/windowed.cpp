// SPDX-License-Identifier: MIT
/// @file  Backward of windowed_attention against central differences of its double twin: inputs, weights and gates of the rest, the map.

#include <fovea/core/backward.hpp>
#include <fovea/core/exec.hpp>
#include <fovea/feature/learned.hpp>
#include <fovea/windowed.hpp>
#include <fovea/windowed/reference.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;
using test::dtype;
using test::tensor;

struct problem_of_test {
  shape s;
  tensor q, k, v, dout;
  std::vector<float> weight, gate, map;
  projection projected;
  windowed_attention m;

  problem_of_test(test::random& r, const shape& sizes, rest_level level, isize window, isize first) : s(sizes) {
    q = test::normal(r, s.type, s.B, s.H, s.n, s.d), k = test::normal(r, s.type, s.B, s.G, s.m, s.d);
    v = test::normal(r, s.type, s.B, s.G, s.m, s.e), dout = test::normal(r, s.type, s.B, s.H, s.n, s.e);
    for (isize h = 0; h < s.H; ++h) weight.push_back(static_cast<float>(r.normal()));
    for (isize i = 0; i < s.H * s.d; ++i) gate.push_back(static_cast<float>(0.3 * r.normal()));
    for (isize i = 0; i < 3 * s.d; ++i) map.push_back(static_cast<float>(r.normal()));
    m.window = window, m.first = first, m.level = level;
    refresh();
  }
  void refresh() {
    projected = projection(map.data(), 1, 3, s.d, nullptr);
    m.map = hedgehog{projected.ref(), projected.ref()};
    m.log_weight = bhnd<const float>(weight.data(), 1, s.H, 1, 1);
    m.query_gate = bhnd<const float>(gate.data(), 1, s.H, 1, s.d);
  }
  double loss() {
    refresh();
    tensor out(dtype::f64, s.B, s.H, s.n, s.e);
    problem p;
    p.q = q, p.k = k, p.v = v, p.out = out;
    reference::prefill(m, p);
    double sum = 0;
    const test::array o = out.values(), g = dout.values();
    for (std::size_t i = 0; i < o.data.size(); ++i) sum += o.data[i] * g.data[i];
    return sum;
  }
  template <class Number>
  double slope(Number&& set, double x, double step) {  // set(x) puts x in its place
    set(x + step);
    const double up = loss();
    set(x - step);
    const double down = loss();
    set(x);
    return (up - down) / (2 * step);
  }
  test::array slopes(tensor& t) {
    test::array out = t.values();
    std::size_t at = 0;
    for (isize b = 0; b < t.batch(); ++b)
      for (isize h = 0; h < t.heads(); ++h)
        for (isize i = 0; i < t.length(); ++i)
          for (isize c = 0; c < t.width(); ++c, ++at)
            out.data[at] = slope([&](double x) { t.set(b, h, i, c, x); }, t.get(b, h, i, c), 1e-5);
    return out;
  }
  test::array slopes(std::vector<float>& x) {  // steps that float holds exactly
    test::array out{{static_cast<isize>(x.size())}, {}};
    for (float& f : x)
      out.data.push_back(slope([&](double y) { f = static_cast<float>(y); }, static_cast<double>(f), 0x1p-10));
    return out;
  }
};

struct result {
  tensor out, lse, dq, dk, dv, dquery, dkey;
  std::vector<float> dweight, dgate;
};
result run(const problem_of_test& x, exec_ref exec) {
  const shape& s = x.s;
  const dtype acc = s.type == dtype::f64 ? dtype::f64 : dtype::f32;
  const isize w = x.m.map.weights(s.d);
  result r{test::unwritten(s.type, s.B, s.H, s.n, s.e),
           test::unwritten(acc, s.B, s.H, s.n, 1),
           test::unwritten(s.type, s.B, s.H, s.n, s.d),
           test::unwritten(s.type, s.B, s.G, s.m, s.d),
           test::unwritten(s.type, s.B, s.G, s.m, s.e),
           test::unwritten(acc, 1, s.H, 1, w),
           test::unwritten(acc, 1, s.G, 1, w),
           std::vector<float>(static_cast<std::size_t>(s.H), NAN),
           std::vector<float>(static_cast<std::size_t>(s.H * s.d), NAN)};
  prefill(exec, x.m, x.q, x.k, x.v, r.out, {.lse = r.lse});
  gradients to;
  to.dq = r.dq, to.dk = r.dk, to.dv = r.dv, to.dquery_map = r.dquery, to.dkey_map = r.dkey;
  to.dlog_weight = r.dweight.data(), to.dquery_gate = r.dgate.data();
  backward(exec, x.m, x.q, x.k, x.v, r.out, r.lse, x.dout, to);
  return r;
}
test::array numbers(const std::vector<float>& x) {
  return {{static_cast<isize>(x.size())}, std::vector<double>(x.begin(), x.end())};
}

}  // namespace

TEST_CASE("backward of a window and a linear rest: central differences of the twin") {
  test::random r(11);
  for (const rest_level level : {rest_level::absolute, rest_level::window_maximum})
    for (const shape& s : {shape{2, 4, 2, 13, 13, 4, 3, dtype::f64}, shape{1, 2, 1, 5, 14, 3, 5, dtype::f64},
                           shape{1, 1, 1, 4, 4, 3, 2, dtype::f64}}) {
      problem_of_test x(r, s, level, 4, 2);
      const result got = run(x, serial);
      CAPTURE(static_cast<int>(level), s.n, s.m);
      const test::tolerance close{.c = 1e9, .acc = dtype::f64};  // the differences are good to 1e-8
      CHECK_CLOSE(got.dq.values(), x.slopes(x.q), close);
      CHECK_CLOSE(got.dk.values(), x.slopes(x.k), close);
      CHECK_CLOSE(got.dv.values(), x.slopes(x.v), close);
      const test::tolerance fair{.c = 2e11, .acc = dtype::f64};  // steps of 2^-10
      CHECK_CLOSE(numbers(got.dweight), x.slopes(x.weight), fair);
      CHECK_CLOSE(numbers(got.dgate), x.slopes(x.gate), fair);
      // One matrix serves all heads and both sides: its gradient is the sum of theirs. Behind the matrix stands a bias, which is not there.
      const test::array want = x.slopes(x.map);
      test::array sum{want.dims, std::vector<double>(want.data.size(), 0.0)};
      for (const tensor* t : {&got.dquery, &got.dkey})
        for (isize h = 0; h < t->heads(); ++h)
          for (std::size_t i = 0; i < sum.data.size(); ++i) sum.data[i] += t->get(0, h, 0, static_cast<isize>(i));
      CHECK_CLOSE(sum, want, fair);
    }
}

TEST_CASE("backward of a window and a linear rest: float against double, and the same bits for any number of threads") {
  for (const dtype type : {dtype::f32, dtype::bf16}) {
    test::random r(12), same(12);
    const shape s{1, 4, 2, 200, 200, 16, 24, type};
    problem_of_test x(r, s, rest_level::absolute, 20, 3);
    const result got = run(x, serial), other = run(x, threads(3));
    shape wide = s;
    wide.type = dtype::f64;
    problem_of_test y(same, wide, rest_level::absolute, 20, 3);
    for (auto [to, from] :
         {std::pair{&y.q, &x.q}, std::pair{&y.k, &x.k}, std::pair{&y.v, &x.v}, std::pair{&y.dout, &x.dout}})
      *to = test::copy_of(from->values(), dtype::f64);
    const result want = run(y, serial);
    CAPTURE(fovea::name_of(type));
    // delta is taken from the stored out: with bf16 it is as exact as that.
    const test::tolerance close{.c = type == dtype::f32 ? 256.0 : 3e5, .acc = dtype::f32, .stored = type};
    CHECK_CLOSE(got.dq.values(), want.dq.values(), close);
    CHECK_CLOSE(got.dk.values(), want.dk.values(), close);
    CHECK_CLOSE(got.dv.values(), want.dv.values(), close);
    CHECK_SAME_BITS(got.dq, other.dq);
    CHECK_SAME_BITS(got.dk, other.dk);
    CHECK_SAME_BITS(got.dv, other.dv);
    CHECK_SAME_BITS(got.dkey, other.dkey);
    CHECK(got.dgate == other.dgate);
  }
}

TEST_CASE("backward of a window and a linear rest: what it refuses") {
  test::random r(13);
  problem_of_test x(r, {1, 1, 1, 6, 6, 4, 4, dtype::f32}, rest_level::absolute, 2, 1);
  result y = run(x, serial);
  gradients to;
  to.dq = y.dq, to.dlog_weight = y.dweight.data();
  const auto refused = [&](const windowed_attention& m, const tensor_ref& lse) {
    return test::refusal([&] { backward(serial, m, x.q, x.k, x.v, y.out, lse, x.dout, to); });
  };
  windowed_attention bare = x.m;
  bare.log_weight = {};
  CHECK_SAYS(refused(bare, y.lse), "there is no log_weight");
  CHECK_SAYS(refused(x.m, {}), "lse is null");
  to.dquery_map = y.dq;
  CHECK_SAYS(refused(x.m, y.lse), "dquery_map is");
}
