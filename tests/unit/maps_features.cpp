// SPDX-License-Identifier: MIT
/// @file  Feature maps: the vector path is the definition, kernels that they promise, configurations, refusals.

#include <cmath>

#include <fovea/feature/configure.hpp>
#include <fovea/feature/custom.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"
#include "support/random.hpp"

namespace {

using namespace fovea;

/// The largest difference between `apply` and `define`, relative to 1 + |feature|, queries and keys.
template <class Acc>
double gap(const feature_map& map, isize d, isize H, isize G) {
  test::random random(7);
  const isize rows = 11, r = map.features(d);
  double worst = 0;
  std::vector<Acc> x(static_cast<std::size_t>(rows * d)), out(static_cast<std::size_t>(rows * r), Acc(NAN)),
      scratch(static_cast<std::size_t>(map.scratch(d) + 1)), log_scale(64);
  std::vector<double> want(static_cast<std::size_t>(r)), row(static_cast<std::size_t>(d));
  for (auto& a : x) a = static_cast<Acc>(random.normal());
  const auto load = [&](isize t) {
    for (isize c = 0; c < d; ++c)
      row[static_cast<std::size_t>(c)] = static_cast<double>(x[static_cast<std::size_t>(t * d + c)]);
  };
  for (const bool key : {false, true}) {
    feature_block<Acc> b;
    b.x = x.data(), b.x_stride = b.width = d, b.rows = rows;
    b.head = H - 1, b.kv_head = G - 1, b.position = 3, b.key = key;
    b.out = out.data(), b.out_stride = r, b.log_scale = log_scale.data();
    feature_site at{H - 1, G - 1, 3, key, -1e300};
    if (map.surveys()) {
      b.survey = map.survey(b, scratch.data());
      for (isize t = 0; t < rows; ++t) load(t), at.survey = std::fmax(at.survey, map.define_survey(at, row.data(), d));
      worst = std::fmax(worst, std::fabs(at.survey - static_cast<double>(b.survey)));
    }
    map.apply(b, scratch.data());
    for (isize t = 0; t < rows; ++t) {
      load(t);
      at.position = 3 + t;
      const double log_want = map.define(at, row.data(), d, want.data());
      if (map.log_scaled())
        worst = std::fmax(worst, std::fabs(log_want - static_cast<double>(log_scale[static_cast<std::size_t>(t)])));
      for (isize f = 0; f < r; ++f) {
        const double w = want[static_cast<std::size_t>(f)],
                     e = std::fabs(w - static_cast<double>(out[static_cast<std::size_t>(t * r + f)])) /
                         (1 + std::fabs(w));
        if (!(e <= worst)) worst = e;
      }
    }
  }
  return worst;
}

/// phi(q).phi(k) by the definition.
double kernel_value(const feature_map& map, const std::vector<double>& q, const std::vector<double>& k) {
  const auto d = static_cast<isize>(q.size()), r = map.features(d);
  std::vector<double> a(static_cast<std::size_t>(r)), b(a.size());
  const double scale =
      map.define({0, 0, 0, false, 0}, q.data(), d, a.data()) + map.define({0, 0, 0, true, 0}, k.data(), d, b.data());
  double dot = 0;
  for (std::size_t f = 0; f < a.size(); ++f) dot += a[f] * b[f];
  return dot * std::exp(scale);
}

}  // namespace

TEST_CASE("maps: the vector path is the definition, for every map and many widths") {
  for (const isize d : {1, 4, 16, 17, 64}) {
    const isize H = 4, G = 2;
    const auto wq = projection::random(H, 13, d, 1), wk = projection::random(G, 13, d, 2),
               both = projection::random(1, 20, d, 3);
    const auto h1q = projection::random(H, 9, d, 4), h1k = projection::random(G, 9, d, 5),
               h2q = projection::random(H, 7, 9, 6), h2k = projection::random(G, 7, 9, 7);
    const auto directions = feature::orthogonal_directions(2 * d + 1, d, 5);
    const projection random(directions.data(), 1, 2 * d + 1, d);
    const auto squares = [](const auto* x, isize n, auto* out) {
      for (isize c = 0; c < n; ++c) out[c] = x[c] * x[c];
    };
    const feature_map maps[] = {identity_map{},
                                elu1{},
                                t2r{wq.ref(), wk.ref(), 0.3},
                                t2r{both.ref(), both.ref()},
                                mlp_map{h1q.ref(), h2q.ref(), h1k.ref(), h2k.ref(), 0.5},
                                hedgehog{},
                                hedgehog{wq.ref(), wk.ref(), hedgehog_form::joint},
                                hedgehog{wq.ref(), wk.ref(), hedgehog_form::separate},
                                hedgehog{wq.ref(), wk.ref(), hedgehog_form::paired},
                                favor_plain{random.ref()},
                                favor{random.ref()},
                                taylor2{},
                                taylor2{true},
                                square_map{},
                                square_map{true},
                                cosformer{40},
                                custom_map(d, squares)};
    for (std::size_t i = 0; i < std::size(maps); ++i) {
      CAPTURE(d, i);
      maps[i].check({1, H, G, 5, 5, d, d, dtype::f32});
      CHECK(gap<float>(maps[i], d, H, G) < 1e-5);
      CHECK(gap<double>(maps[i], d, H, G) < 1e-13);
    }
  }
}

TEST_CASE("maps: polynomial maps have the kernel they are named for, packed or not") {
  test::random random(3);
  for (const isize d : {1, 2, 16, 19}) {
    std::vector<double> q(static_cast<std::size_t>(d)), k(q.size());
    double s = 0;
    for (std::size_t c = 0; c < q.size(); ++c) q[c] = random.normal(), k[c] = random.normal(), s += q[c] * k[c];
    s /= std::sqrt(static_cast<double>(d));
    for (const bool packed : {false, true}) {
      CHECK(kernel_value(taylor2{packed}, q, k) == Approx(1 + s + s * s / 2));
      CHECK(kernel_value(square_map{packed}, q, k) == Approx(s * s));
    }
  }
  CHECK(taylor2{true}.features(16) == 153);
  CHECK(taylor2{}.features(16) == 273);
}

TEST_CASE("maps: FAVOR+ is unbiased for exp(q.k / sqrt d)") {
  test::random random(4);
  const isize d = 8;
  std::vector<double> q(8), k(8);
  double s = 0;
  for (std::size_t c = 0; c < 8; ++c) q[c] = random.normal(), k[c] = random.normal(), s += q[c] * k[c];
  double sum = 0;
  const int draws = 400;
  for (int i = 0; i < draws; ++i) {
    const auto w = feature::orthogonal_directions(64, d, static_cast<std::uint64_t>(i));
    const projection p(w.data(), 1, 64, d);
    sum += kernel_value(favor_plain{p.ref()}, q, k);
  }
  CHECK(sum / draws == Approx(std::exp(s / std::sqrt(8.0))).epsilon(0.05));
}

TEST_CASE("maps: weights by head, and refusals") {
  const shape s{1, 4, 2, 5, 5, 16, 16, dtype::f32};
  const auto one = projection::random(1, 8, 16, 1), kv = projection::random(2, 8, 16, 1),
             each = projection::random(4, 8, 16, 1), narrow = projection::random(1, 8, 12, 1);
  t2r{one.ref(), one.ref()}.check(s);
  t2r{kv.ref(), kv.ref()}.check(s);
  t2r{each.ref(), kv.ref()}.check(s);
  CHECK_SAYS(test::refusal([&] { t2r{each.ref(), each.ref()}.check(s); }), "KV heads");
  CHECK_SAYS(test::refusal([&] { t2r{kv.ref(), one.ref()}.check(s); }), "query heads");
  CHECK_SAYS(test::refusal([&] { t2r{narrow.ref(), narrow.ref()}.check(s); }), "16 wide");
  CHECK_SAYS(test::refusal([&] { t2r{}.check(s); }), "no weights");
  CHECK_SAYS(test::refusal([&] { t2r{one.ref(), one.ref(), -1}.check(s); }), "query_scale");
  CHECK_SAYS(test::refusal([&] { hedgehog{one.ref(), {}}.check(s); }), "one side");
  CHECK_SAYS(test::refusal([&] { cosformer{4}.check(s); }), "longest sequence");
  CHECK_SAYS(test::refusal([&] { favor{one.ref(), -1}.check(s); }), "feature_eps");
  const float bad[] = {1, NAN};
  CHECK_SAYS(test::refusal([&] { projection(bad, 1, 1, 2); }), "finite");
  CHECK(!feature_map(t2r{one.ref(), one.ref()}).trained());
  CHECK(!feature_map(hedgehog{}).trained());
}

TEST_CASE("maps: from a configuration") {
  const auto configured = [](fovea::configuration c, const arrays& weights) {
    configuration_reader reader(c, weights);
    std::shared_ptr<const void> keep;
    const auto map = configure_map(reader, keep);
    reader.finish();
    REQUIRE(map.has_value());
    return std::pair(*map, keep);
  };
  const array W({2, 6, 4}, std::vector<float>(48, 0.5F)), b({2, 1, 6}, std::vector<float>(12, 1.0F));
  const auto [tied, keep] = configured({"linear", {{"map", "t2r"}}}, {{"W", W}, {"b", b}});
  CHECK(tied.features(4) == 6);
  CHECK(tied.trained());
  double out[6], x[] = {1, 2, 3, 4};
  tied.define({0, 0, 0, false, 0}, x, 4, out);
  CHECK(out[0] == Approx(0.5 * 0.5 * 10 + 1));  // queries are scaled by d^-1/2
  tied.define({0, 0, 0, true, 0}, x, 4, out);
  CHECK(out[0] == Approx(0.5 * 10 + 1));
  const auto [drawn, keep_drawn] =
      configured({"linear", {{"map", "favor_plain"}, {"head_dim", 4.0}, {"features", 9.0}, {"seed", 3.0}}}, {});
  CHECK(drawn.features(4) == 9);
  CHECK(!drawn.trained());
  CHECK_SAYS(test::refusal([&] { configured({"linear", {{"map", "t2r"}}}, {}); }), "head_dim");
  CHECK_SAYS(test::refusal([&] { configured({"linear", {{"map", "t2r"}}}, {{"Wq", W}}); }), "go together");
  CHECK_SAYS(test::refusal([&] { configured({"linear", {{"map", "t2r"}}}, {{"b", b}}); }), "without W");
  CHECK_SAYS(test::refusal([&] { configured({"linear", {{"map", "elu1"}}}, {{"W", W}}); }), "not supported");
  CHECK_SAYS(test::refusal([&] { configured({"linear", {{"map", "relu"}}}, {}); }), "one of");
}
