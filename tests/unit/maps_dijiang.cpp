// SPDX-License-Identifier: MIT
/// @file  DiJiang: unbiasedness, sampling, fitted weights, references of features against plain sums, states, refusals.

#include <algorithm>
#include <cmath>

#include <fovea/any_attention.hpp>
#include <fovea/dijiang.hpp>
#include <fovea/dijiang/reference.hpp>
#include <fovea/dijiang/weights.hpp>
#include <fovea/linear.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/tensors.hpp"

namespace {

using namespace fovea;

double kernel_value(const dijiang_tables& t, const std::vector<double>& q, const std::vector<double>& k) {
  std::vector<double> a(static_cast<std::size_t>(t.r)), b(a.size());
  t.define(0, q.data(), a.data());
  t.define(0, k.data(), b.data());
  double dot = 0;
  for (std::size_t f = 0; f < a.size(); ++f) dot += std::exp(a[f] + b[f]);
  return dot;
}

struct pair_of_rows {
  std::vector<double> q, k;
  double target;  // e^{q.k / sqrt d}
  pair_of_rows(isize d, std::uint64_t seed, double deviation) {
    test::random r(seed);
    double s = 0;
    for (isize c = 0; c < d; ++c) {
      q.push_back(deviation * r.normal()), k.push_back(deviation * r.normal());
      s += q.back() * k.back();
    }
    target = std::exp(s / std::sqrt(static_cast<double>(d)));
  }
};

struct call {
  test::tensor q, k, v, out;
  call(isize H, isize G, isize n, isize d, isize e, double deviation, dtype type = dtype::f32)
      : q(type, 1, H, n, d), k(type, 1, G, n, d), v(type, 1, G, n, e), out(type, 1, H, n, e) {
    test::random r(11);
    for (test::tensor* x : {&q, &k}) x->fill([&] { return deviation * r.normal(); });
    v.fill([&] { return r.normal(); });
  }
  problem p() { return {q, k, v, out, {}, {}}; }
};

}  // namespace

TEST_CASE("dijiang: the unbiased form is unbiased with every way of sampling, in one block and in two") {
  const isize d = 16;
  for (const auto how :
       {dijiang_sampling::monte_carlo, dijiang_sampling::stratified, dijiang_sampling::sobol, dijiang_sampling::halton})
    for (const isize blocks : {1, 2})
      for (const std::uint64_t seed : {1U, 2U, 3U}) {
        const pair_of_rows x(d, seed, 0.45);
        double sum = 0, squares = 0;
        const int draws = 1500;
        for (int i = 0; i < draws; ++i) {
          const auto t = make_dijiang_tables(
              {.head_dim = d, .features = blocks * d, .seed = static_cast<std::uint64_t>(i), .sampling = how});
          const double y = kernel_value(*t, x.q, x.k) / x.target;
          sum += y, squares += y * y;
        }
        const double mean = sum / draws, error = std::sqrt((squares / draws - mean * mean) / draws);
        CAPTURE(static_cast<int>(how), blocks, seed, mean, error);
        CHECK(std::fabs(mean - 1) < 4 * error + 0.01);
        CHECK(error < 0.03);
      }
}

TEST_CASE("dijiang: without signs and with normal radii, as published, the kernel is another") {
  const isize d = 64;
  double unsigned_gap = 0, normal_ratio = 0;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    const pair_of_rows x(d, seed, 1.0);
    dijiang_options o{.head_dim = d, .seed = 5};
    const auto drawn = make_dijiang_tables(o);
    o.signs.assign(64, 1.0F);
    unsigned_gap =
        std::fmax(unsigned_gap, std::fabs(std::log(kernel_value(*make_dijiang_tables(o), x.q, x.k) / x.target)));
    feature::random_source rng(seed);
    o.t = detail::normal_radii(dijiang_sampling::stratified, 1, d, rng);
    normal_ratio = std::fmax(normal_ratio, kernel_value(*make_dijiang_tables(o), x.q, x.k) / x.target);
  }
  CHECK(unsigned_gap > 0.5);  // a fixed set of directions is off by a factor for a given pair
  CHECK(normal_ratio < 0.2);  // E e^{t v.x} is about e^{|x|^2 / 2d} instead of e^{|x|^2 / 2}
}

TEST_CASE("dijiang: a seed decides everything, stratified radii are one per interval") {
  const auto a = make_dijiang_tables({.head_dim = 32, .features = 64, .seed = 9}),
             b = make_dijiang_tables({.head_dim = 32, .features = 64, .seed = 9}),
             c = make_dijiang_tables({.head_dim = 32, .features = 64, .seed = 10});
  CHECK(a->t == b->t);
  CHECK(a->signs == b->signs);
  CHECK(a->t != c->t);
  feature::random_source rng(1);
  auto t = detail::dijiang_points(dijiang_sampling::stratified, 2, 32, rng);
  std::sort(t.begin(), t.end());
  for (std::size_t i = 0; i < t.size(); ++i) CHECK(t[i] == Approx((static_cast<double>(i) + 0.5) / 64));
  CHECK_SAYS(
      test::refusal([] { make_dijiang_tables({.head_dim = 4, .features = 68, .sampling = dijiang_sampling::sobol}); }),
      "at most 16");
}

TEST_CASE("dijiang: fitted weights lower the error that they minimise, on rows not seen too") {
  const isize d = 16, m = 64;
  test::random r(3);
  std::vector<float> q(static_cast<std::size_t>(2 * m * d)), k(static_cast<std::size_t>(m * d));
  for (auto& x : q) x = static_cast<float>(r.normal());
  for (auto& x : k) x = static_cast<float>(r.normal());
  dijiang_options o{.head_dim = d, .features = 2 * d, .seed = 4, .sampling = dijiang_sampling::sobol};
  const auto plain = make_dijiang_tables(o);
  o.D = fit_dijiang_weights(*plain, q.data(), m, d, k.data(), m, d, 0.25);
  const auto weighted = make_dijiang_tables(o);
  CHECK(weighted->trained);
  const auto error = [&](const dijiang_tables& t, isize first) {  // mean square, rows measured by their own denominator
    double total = 0;
    for (isize i = first; i < first + m; ++i) {
      std::vector<double> row(q.begin() + i * d, q.begin() + (i + 1) * d), target, got;
      double sum = 0;
      for (isize j = 0; j < m; ++j) {
        const std::vector<double> key(k.begin() + j * d, k.begin() + (j + 1) * d);
        double s = 0;
        for (isize c = 0; c < d; ++c) s += row[static_cast<std::size_t>(c)] * key[static_cast<std::size_t>(c)];
        target.push_back(std::exp(s / 4)), got.push_back(kernel_value(t, row, key)), sum += target.back();
      }
      for (std::size_t j = 0; j < target.size(); ++j) total += std::pow((got[j] - target[j]) / sum, 2);
    }
    return total;
  };
  CHECK(error(*weighted, 0) < 0.8 * error(*plain, 0));
  CHECK(error(*weighted, m) < error(*plain, m));
  // All weight on one feature that fits exactly: A = 2, b = 6 gives 3; a negative optimum gives 0.
  CHECK(detail::nonnegative_least_squares({2, 0, 0, 1}, {6, -1}) == std::vector<double>{3, 0});
}

TEST_CASE("dijiang: references rise with the stream, whatever its exponents do") {
  for (const double growth : {0.0, 4.0, -4.0})
    for (const isize chunk : {1, 7, 200}) {
      const isize n = 200, d = 16, e = 8;
      call x(4, 2, n, d, e, 1.0);
      for (isize g = 0; g < 2; ++g)
        for (isize j = 0; j < n; ++j)
          for (isize c = 0; c < d; ++c)
            x.k.set(0, g, j, c,
                    x.k.get(0, g, j, c) * (1 + std::fabs(growth) * static_cast<double>(growth > 0 ? j : n - j) / 20));
      const auto m =
          dijiang_attention::make({.head_dim = d, .seed = 3, .form = dijiang_form::paper, .normalise = true});
      test::tensor want(dtype::f64, 1, 4, n, e);
      problem twin = x.p();
      twin.out = want;
      reference::prefill(m, twin);
      state s = m.make_state(x.p().shape());
      for (isize t = 0; t < n; t += chunk) {
        const isize count = std::min(chunk, n - t);
        prefill(serial, m, x.q.ref().slice(t, count), x.k.ref().slice(t, count), x.v.ref().slice(t, count),
                x.out.ref().slice(t, count), s);
      }
      CAPTURE(growth, chunk);
      CHECK_CLOSE(x.out.values(), want.values(),
                  {.c = 4000});  // exponents of several hundred, each rounded to its own eps
      CHECK(s.tokens() == n);
    }
}

TEST_CASE("dijiang: one head's exponents move no other head, and later keys no earlier row") {
  const isize n = 70, d = 16;
  const auto m = dijiang_attention::make({.head_dim = d, .seed = 3});
  call x(2, 2, n, d, 8, 1.0), y(2, 2, n, d, 8, 1.0);
  for (isize c = 0; c < d; ++c) y.k.set(0, 1, 33, c, 50.0);
  prefill(serial, m, x.q, x.k, x.v, x.out);
  prefill(serial, m, y.q, y.k, y.v, y.out);
  for (isize h = 0; h < 2; ++h)
    for (isize i = 0; i < n; ++i)
      for (isize c = 0; c < 8 && (h == 0 || i < 33); ++c) CHECK(x.out.get(0, h, i, c) == y.out.get(0, h, i, c));
}

TEST_CASE("dijiang: as a feature map of linear_attention, and as a configuration") {
  const isize n = 90, d = 32, e = 16;
  call x(2, 2, n, d, e, 1.0);
  const auto m = dijiang_attention::make({.head_dim = d, .features = 64, .seed = 3});
  prefill(serial, m, x.q, x.k, x.v, x.out);
  const auto want = x.out.values();
  prefill(serial, linear_attention{.map = dijiang_map{m.tables.get()}}, x.q, x.k, x.v, x.out);
  CHECK_CLOSE(x.out.values(), want, {.c = 256});
  for (const bool width : {true, false}) {
    configuration c{"dijiang", {{"blocks", 2.0}, {"seed", 3.0}}};
    if (width) c.values["head_dim"] = 32.0;
    const auto any = any_attention::make(c);
    prefill(serial, any, x.q, x.k, x.v, x.out);
    CHECK(test::same_bits(x.out, [&] {
      call z(2, 2, n, d, e, 1.0);
      prefill(serial, m, z.q, z.k, z.v, z.out);
      return z.out;
    }()));
    CHECK(!any.trained());
    CHECK(any.state_bytes(x.p().shape()) == m.state_bytes(x.p().shape()));
    CHECK(any.macs(x.p().shape()) == m.macs(x.p().shape()));
  }
}

TEST_CASE("dijiang: what does not fit is refused by name") {
  const auto made = [](dijiang_options o) { return test::refusal([&] { dijiang_attention::make(o); }); };
  CHECK_SAYS(made({}), "head_dim is 0");
  CHECK_SAYS(made({.head_dim = 64, .features = 100}), "multiple of head_dim");
  CHECK_SAYS(made({.head_dim = 2, .signs = {1, 0}}), "a sign is 0");
  CHECK_SAYS(made({.head_dim = 2, .t = {1, NAN}}), "finite");
  CHECK_SAYS(made({.head_dim = 2, .D = {1, 2, 3}}), "D holds 3");
  CHECK_SAYS(made({.head_dim = 2, .gamma = {1.5}}), "gamma");
  CHECK_SAYS(made({.head_dim = 2, .is_causal = false, .gamma = {0.5}}), "needs an order");
  CHECK_SAYS(made({.head_dim = 2, .log_d1 = {0, 0}}), "go together");
  call x(4, 2, 6, 8, 8, 1.0);
  const auto refused = [&](const dijiang_attention& m) {
    return test::refusal([&] { prefill(serial, m, x.q, x.k, x.v, x.out); });
  };
  CHECK_SAYS(refused({}), "no tables");
  CHECK_SAYS(refused(dijiang_attention::make({.head_dim = 16})), "head_dim = 16");
  CHECK_SAYS(refused(dijiang_attention::make({.head_dim = 8, .D = std::vector<float>(24, 1.0F)})), "3 KV heads");
  CHECK_SAYS(refused(dijiang_attention::make({.head_dim = 8, .gamma = {0.5, 0.5, 0.5}})), "gamma holds 3");
  dijiang_options gains{.head_dim = 8,
                        .form = dijiang_form::released,
                        .log_d1 = std::vector<float>(20),
                        .log_d2 = std::vector<float>(10),
                        .positions = 5};
  CHECK_SAYS(refused(dijiang_attention::make(gains)), "end at position 4");
  const auto both_ways = dijiang_attention::make({.head_dim = 8, .is_causal = false});
  CHECK_SAYS(test::refusal([&] { both_ways.make_state(x.p().shape()); }), "keeps no state");
  gains.positions = 10, gains.log_d1.resize(40), gains.log_d2.resize(20);
  const auto by_position = dijiang_attention::make(gains);
  state a = by_position.make_state(x.p().shape()), b = a;
  CHECK_SAYS(test::refusal([&] { by_position.merge(a, b); }), "absolute positions");
  CHECK_SAYS(test::refusal([&] {
               any_attention::make({"dijiang", {{"blocks", 2.0}, {"head_dim", 8.0}, {"features", 8.0}}});
             }),
             "blocks is 2");
  CHECK_SAYS(test::refusal([&] { any_attention::make({"dijiang", {{"from", std::string("paper")}}}); }), "from");
}
