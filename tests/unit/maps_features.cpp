// SPDX-License-Identifier: MIT
/// @file  Feature maps: the vector path is the definition, kernels that they promise, configurations, refusals.

#include <cmath>

#include <fovea/dijiang.hpp>
#include <fovea/feature/configure.hpp>
#include <fovea/feature/custom.hpp>
#include <fovea/feature/merge_map.hpp>

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

TEST_CASE(
    "feature maps: hedgehog rows near and beyond the size at which nothing is subtracted, each alone and among "
    "others") {
  for (const hedgehog_form form : {hedgehog_form::joint, hedgehog_form::separate})
    for (const isize d : {32, 40}) {
      const hedgehog map{{}, {}, form};
      constexpr isize rows = 21;
      std::vector<float> x(static_cast<std::size_t>(rows * d)), out(static_cast<std::size_t>(rows * 2 * d)),
          alone(static_cast<std::size_t>(2 * d));
      test::random r(5);
      for (isize t = 0; t < rows; ++t)
        for (isize c = 0; c < d; ++c)
          x[static_cast<std::size_t>(t * d + c)] = static_cast<float>(r.normal() * (t % 4 == 3   ? 60.0
                                                                                    : t % 4 == 2 ? 9.0
                                                                                                 : 2.0));
      feature_block<float> b;
      b.x = x.data(), b.x_stride = b.width = d, b.rows = rows, b.out = out.data(), b.out_stride = 2 * d;
      map.apply<simd::native, float>(b, nullptr);
      for (isize t = 0; t < rows; ++t) {
        CAPTURE(d, t);
        std::vector<double> row(static_cast<std::size_t>(d)), want(static_cast<std::size_t>(2 * d));
        for (isize c = 0; c < d; ++c) row[static_cast<std::size_t>(c)] = static_cast<double>(b.x[t * d + c]);
        map.define({}, row.data(), d, want.data());
        double worst = 0;
        for (isize c = 0; c < 2 * d; ++c)
          worst =
              std::max(worst, std::fabs(static_cast<double>(b.out[t * 2 * d + c]) - want[static_cast<std::size_t>(c)]));
        CHECK(worst < 3e-6);
        feature_block<float> one = b;
        one.x += t * d, one.rows = 1, one.out = alone.data();
        map.apply<simd::native, float>(one, nullptr);
        CHECK(std::equal(alone.begin(), alone.end(), b.out + t * 2 * d));
      }
    }
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
  CHECK_SAYS(test::refusal([&] { configured({"linear", {{"map", "selu"}}}, {}); }), "one of");
}

TEST_CASE("merged maps: a projection that holds the map gives what the map gives behind the projection") {
  test::random r(31);
  const isize H = 4, G = 2, d = 12, model = 20, n = 9, rows = 7;
  const auto numbers = [&](isize count) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (float& f : x) f = static_cast<float>(0.4 * r.normal());
    return x;
  };
  const std::vector<float> h = numbers(n * model), Pq = numbers(H * d * model), cq = numbers(H * d),
                           Pk = numbers(G * d * model), ck = numbers(G * d), wq = numbers(H * rows * d),
                           bq = numbers(H * rows), wk = numbers(G * rows * d), bk = numbers(G * rows);
  const projection query(wq.data(), H, rows, d, bq.data()), key(wk.data(), G, rows, d, bk.data()),
      shared(wk.data(), G, rows, d);
  const auto view_of = [&](const std::vector<float>& P, isize heads) {
    return bhnd<const float>(P.data(), 1, heads, d, model);
  };
  // Row t of head h of a layer [heads * width][model] with a bias.
  const auto layer = [&](const std::vector<float>& weight, const std::vector<float>& bias, isize head, isize width,
                         isize t) {
    std::vector<double> out(static_cast<std::size_t>(width));
    for (isize x = 0; x < width; ++x) {
      double sum = bias.empty() ? 0.0 : static_cast<double>(bias[static_cast<std::size_t>(head * width + x)]);
      for (isize m = 0; m < model; ++m)
        sum += static_cast<double>(weight[static_cast<std::size_t>((head * width + x) * model + m)]) *
               static_cast<double>(h[static_cast<std::size_t>(t * model + m)]);
      out[static_cast<std::size_t>(x)] = sum;
    }
    return out;
  };
  const auto check = [&](const feature_map& map, const feature_map& bare, const merged_projection& merged,
                         bool is_key) {
    const isize heads = is_key ? G : H;
    std::vector<double> want(static_cast<std::size_t>(map.features(d))), got(want.size());
    CHECK(static_cast<isize>(want.size()) == bare.features(merged.rows));
    for (isize head = 0; head < heads; ++head)
      for (isize t = 0; t < n; ++t) {
        const feature_site at{is_key ? head * (H / G) : head, is_key ? head : head / (H / G), t, is_key, 0.0};
        map.define(at, (is_key ? layer(Pk, ck, head, d, t) : layer(Pq, cq, head, d, t)).data(), d, want.data());
        bare.define(at, layer(merged.weight, merged.bias, head, merged.rows, t).data(), merged.rows, got.data());
        for (std::size_t f = 0; f < want.size(); ++f)
          CHECK(std::fabs(got[f] - want[f]) < 1e-5 * (1 + std::fabs(want[f])));
      }
  };
  const t2r one{query.ref(), key.ref(), 0.3}, tied{shared.ref(), shared.ref(), 0.3};
  for (const t2r& map : {one, tied}) {
    check(map, relu_map{}, merge_query_map(map, H, G, view_of(Pq, H), cq.data()), false);
    check(map, relu_map{}, merge_key_map(map, H, G, view_of(Pk, G), ck.data()), true);
  }
  for (const hedgehog_form form : {hedgehog_form::joint, hedgehog_form::separate, hedgehog_form::paired}) {
    const hedgehog map{query.ref(), key.ref(), form};
    check(map, hedgehog{{}, {}, form}, merge_query_map(map, H, G, view_of(Pq, H), cq.data()), false);
    check(map, hedgehog{{}, {}, form}, merge_key_map(map, H, G, view_of(Pk, G), ck.data()), true);
  }
  CHECK_SAYS(test::refusal([&] { merge_query_map(one, H, G, view_of(Pk, G), ck.data()); }), "one for each query head");
  CHECK_SAYS(test::refusal([&] { merge_key_map(hedgehog{}, H, G, view_of(Pk, G)); }), "no weights");
}

TEST_CASE("merged maps: DiJiang's signs in the projection") {
  test::random r(32);
  const isize heads = 2, d = 8, model = 5;
  std::vector<float> P(static_cast<std::size_t>(heads * d * model)), h(static_cast<std::size_t>(model));
  for (float& x : P) x = static_cast<float>(r.normal());
  for (float& x : h) x = static_cast<float>(r.normal());
  const dijiang_attention m = dijiang_attention::make({.head_dim = d, .seed = 5}), bare = without_signs(m);
  const merged_projection merged = merge_map(m, bhnd<const float>(P.data(), 1, heads, d, model));
  for (isize head = 0; head < heads; ++head) {
    std::vector<double> x(static_cast<std::size_t>(d)), y(x), want(x), got(x);
    for (isize c = 0; c < d; ++c)
      for (isize i = 0; i < model; ++i) {
        const auto at = static_cast<std::size_t>((head * d + c) * model + i);
        x[static_cast<std::size_t>(c)] +=
            static_cast<double>(P[at]) * static_cast<double>(h[static_cast<std::size_t>(i)]);
        y[static_cast<std::size_t>(c)] +=
            static_cast<double>(merged.weight[at]) * static_cast<double>(h[static_cast<std::size_t>(i)]);
      }
    m.tables->define(head, x.data(), want.data()), bare.tables->define(head, y.data(), got.data());
    CHECK(got == want);
  }
  CHECK_SAYS(test::refusal([&] { merge_map(dijiang_attention::make({.head_dim = 8, .features = 16}), {}); }),
             "2 blocks");
}
