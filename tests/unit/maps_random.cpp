// SPDX-License-Identifier: MIT
/// @file  What feature maps are drawn from: random numbers, quantiles, point sets, orthogonal directions, cosine transforms.

#include <algorithm>
#include <cmath>

#include <fovea/feature/cosine_transform.hpp>
#include <fovea/feature/favor.hpp>
#include <fovea/feature/point_set.hpp>

#include "support/catch.hpp"
#include "support/errors.hpp"

namespace {

using namespace fovea;

/// The largest deviation of C C^T from the identity, C the matrix that the transform applies.
template <class T>
double orthogonality(const feature::cosine_transform& c, bool type3) {
  const isize d = c.width();
  std::vector<T> x(static_cast<std::size_t>(d * d)), y(x.size());
  for (isize i = 0; i < d; ++i) x[static_cast<std::size_t>(i * d + i)] = type3 ? static_cast<T>(c.scale(i)) : T(1);
  if (type3)
    feature::cosine_type3<simd::native, T>(c.table<T>(), d, x.data(), y.data());
  else
    feature::cosine_type2<simd::native, T>(c.table<T>(), d, x.data(), y.data());
  double worst = 0;
  for (isize i = 0; i < d; ++i)
    for (isize j = 0; j <= i; ++j) {
      double dot = 0;
      for (isize k = 0; k < d; ++k) {
        const double s = type3 ? 1.0 : c.scale(k);
        dot += static_cast<double>(y[static_cast<std::size_t>(i * d + k)]) * s *
               static_cast<double>(y[static_cast<std::size_t>(j * d + k)]) * s;
      }
      worst = std::fmax(worst, std::fabs(dot - (i == j ? 1.0 : 0.0)));
    }
  return worst;
}

}  // namespace

TEST_CASE("maps: random numbers are the same everywhere") {
  feature::random_source a(1), b(1), c(2);
  CHECK(a.bits() == 0xb3f2af6d0fc710c5ULL);
  CHECK(b.bits() == 0xb3f2af6d0fc710c5ULL);
  CHECK(a.bits() == 0x853b559647364ceaULL);
  CHECK(c.bits() != 0xb3f2af6d0fc710c5ULL);
  double sum = 0, least = 1, most = 0;
  for (int i = 0; i < 100000; ++i) {
    const double u = a.uniform();
    sum += u, least = std::fmin(least, u), most = std::fmax(most, u);
  }
  CHECK(least > 0);
  CHECK(most < 1);
  CHECK(sum / 100000 == Approx(0.5).margin(0.005));
  auto order = a.permutation(97);
  std::sort(order.begin(), order.end());
  for (isize i = 0; i < 97; ++i) CHECK(order[static_cast<std::size_t>(i)] == i);
}

TEST_CASE("maps: quantiles invert their distributions, tails included") {
  for (const double t : {1e-300, 1e-20, 1e-6, 0.02, 0.3, 0.5, 0.6, 0.97, 1 - 0x1p-30}) {
    CAPTURE(t);
    const double z = feature::normal_quantile(t);
    CHECK(std::fabs(0.5 * std::erfc(-z / std::sqrt(2.0)) - t) <= 1e-12 * t);
    if (t < 1e-100) continue;
    for (const isize d : {1, 2, 3, 17, 64, 128, 1000}) {
      CAPTURE(d);
      const double r = feature::chi_quantile(d, t);
      CHECK(r > 0);
      if (t > 1e-20)
        CHECK(feature::detail::incomplete_gamma(static_cast<double>(d) / 2, r * r / 2, true) ==
              Approx(t).epsilon(1e-9));
    }
    CHECK(feature::chi_quantile(2, t) == Approx(std::sqrt(-2 * std::log1p(-t))).epsilon(1e-12));  // closed form
  }
  CHECK_SAYS(test::refusal([] { feature::normal_quantile(0); }), "inside (0, 1)");
  CHECK_SAYS(test::refusal([] { feature::chi_quantile(0, 0.5); }), "degrees of freedom");
  CHECK_SAYS(test::refusal([] { feature::chi_quantile(8, 1e-200); }), "1e-100");
}

TEST_CASE("maps: every Sobol coordinate of 2^k points is stratified, halton stays inside the unit interval") {
  for (const isize count : {1, 2, 16, 256}) {
    const auto points = feature::sobol(count, 16);
    for (isize c = 0; c < 16; ++c) {
      std::vector<double> column;
      for (isize i = 0; i < count; ++i) column.push_back(points[static_cast<std::size_t>(i * 16 + c)]);
      std::sort(column.begin(), column.end());
      for (isize i = 0; i < count; ++i)
        CHECK(column[static_cast<std::size_t>(i)] == static_cast<double>(i) / static_cast<double>(count));
    }
  }
  for (const double x : feature::halton(300, 16)) CHECK((x >= 0 && x < 1));
  CHECK_SAYS(test::refusal([] { feature::sobol(8, 17); }), "1 to 16");
}

TEST_CASE("maps: orthogonal directions") {
  const isize d = 24, r = 60;
  for (const auto norm : {feature::direction_norm::chi, feature::direction_norm::root_d}) {
    const auto w = feature::orthogonal_directions(r, d, 5, norm);
    for (isize i = 0; i < r; ++i)
      for (isize j = 0; j <= i; ++j) {
        double dot = 0;
        for (isize c = 0; c < d; ++c)
          dot += static_cast<double>(w[static_cast<std::size_t>(i * d + c)]) *
                 static_cast<double>(w[static_cast<std::size_t>(j * d + c)]);
        if (i / d == j / d && i != j) CHECK(std::fabs(dot) < 1e-5);
        if (i == j && norm == feature::direction_norm::root_d)
          CHECK(dot == Approx(static_cast<double>(d)).epsilon(1e-6));
        if (i == j && norm == feature::direction_norm::chi) CHECK((dot > 3 && dot < 90));
      }
  }
  CHECK(feature::orthogonal_directions(r, d, 5) == feature::orthogonal_directions(r, d, 5));
  CHECK(feature::orthogonal_directions(r, d, 5) != feature::orthogonal_directions(r, d, 6));
}

TEST_CASE("maps: cosine transforms are orthogonal at every width, halved as often as it goes") {
  for (isize d = 1; d <= 130; ++d)
    for (isize leaf = d;; leaf /= 2) {
      CAPTURE(d, leaf);
      const feature::cosine_transform c(d, leaf);
      for (const bool type3 : {false, true}) {
        CHECK(orthogonality<float>(c, type3) < 4e-6);
        CHECK(orthogonality<double>(c, type3) < 1e-14);
      }
      if (leaf % 2 != 0) break;
    }
  CHECK_SAYS(test::refusal([] { feature::cosine_transform(0); }), "wanted 1 to 4096");
  CHECK_SAYS(test::refusal([] { feature::cosine_transform(48, 13); }), "halved");
}
