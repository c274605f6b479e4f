// SPDX-License-Identifier: MIT
#pragma once
/// @file  Quantiles that turn uniform points into the radii of random features: standard normal, and chi with d degrees.
///
///   normal_quantile(t)      z with Phi(z) = t
///   chi_quantile(d, t)      r with P(|g| <= r) = t for g ~ N(0, I_d):   r = sqrt(2 P^-1(d/2, t)),  P the regularised incomplete gamma
///
/// Contract   t in (0, 1), for chi at least 1e-100; d >= 1; a cold path, in double.
/// Numerics   both to about 1e-14 relative (tested against published values); the tail beyond 1/2 is solved through 1 - P.
/// Source     normal: Wichura, algorithm AS 241 (1988). Incomplete gamma: power series for x < a + 1, Lentz's continued fraction
///            above; its inverse by Halley's iteration from the Wilson-Hilferty cube.

#include <cmath>

#include <fovea/core/contract.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace feature {

namespace detail {
template <int N>
double horner(const double (&c)[N], double x) {  // c[0] + c[1] x + ...
  double y = c[N - 1];
  for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

/// P(a, x) if `lower`, else Q(a, x) = 1 - P(a, x), each without cancellation on its own side of x = a + 1.
inline double incomplete_gamma(double a, double x, bool lower) {
  if (x <= 0) return lower ? 0.0 : 1.0;
  const double front = std::exp(a * std::log(x) - x - std::lgamma(a));
  if (x < a + 1) {
    double term = 1 / a, sum = term;
    for (double n = a + 1; term > sum * 1e-17; ++n) {
      term *= x / n;
      sum += term;
    }
    return lower ? sum * front : 1 - sum * front;
  }
  double b = x + 1 - a, c = 1e300, d = 1 / b, h = d;
  for (int i = 1; i < 10000; ++i) {
    const double an = -i * (i - a);
    b += 2;
    d = 1 / (an * d + b);
    c = b + an / c;
    h *= d * c;
    if (std::fabs(d * c - 1) < 1e-16) break;
  }
  return lower ? 1 - front * h : front * h;
}
}  // namespace detail

inline double normal_quantile(double t) {
  require(t > 0 && t < 1, "normal_quantile: t is ", t, "; it must lie inside (0, 1)");
  static constexpr double a[] = {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
                                 1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
                                 3.3430575583588128105e4, 2.5090809287301226727e3};
  static constexpr double b[] = {1.0,
                                 4.2313330701600911252e1,
                                 6.8718700749205790830e2,
                                 5.3941960214247511077e3,
                                 2.1213794301586595867e4,
                                 3.9307895800092710610e4,
                                 2.8729085735721942674e4,
                                 5.2264952788528545610e3};
  static constexpr double c[] = {1.42343711074968357734e0,  4.63033784615654529590e0, 5.76949722146069140550e0,
                                 3.64784832476320460504e0,  1.27045825245236838258e0, 2.41780725177450611770e-1,
                                 2.27238449892691845833e-2, 7.74545014278341407640e-4};
  static constexpr double d[] = {1.0,
                                 2.05319162663775882187e0,
                                 1.67638483018380384940e0,
                                 6.89767334985100004550e-1,
                                 1.48103976427480074590e-1,
                                 1.51986665636164571966e-2,
                                 5.47593808499534494600e-4,
                                 1.05075007164441684324e-9};
  static constexpr double e[] = {6.65790464350110377720e0,  5.46378491116411436990e0,  1.78482653991729133580e0,
                                 2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
                                 2.71155556874348757815e-5, 2.01033439929228813265e-7};
  static constexpr double f[] = {1.0,
                                 5.99832206555887937690e-1,
                                 1.36929880922735805310e-1,
                                 1.48753612908506148525e-2,
                                 7.86869131145613259100e-4,
                                 1.84631831751005468180e-5,
                                 1.42151175831644588870e-7,
                                 2.04426310338993978564e-15};
  const double q = t - 0.5;
  if (std::fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * detail::horner(a, r) / detail::horner(b, r);
  }
  const double r = std::sqrt(-std::log(q < 0 ? t : 1 - t));
  const double z = r <= 5 ? detail::horner(c, r - 1.6) / detail::horner(d, r - 1.6)
                          : detail::horner(e, r - 5) / detail::horner(f, r - 5);
  return q < 0 ? -z : z;
}

inline double chi_quantile(isize degrees, double t) {
  require(degrees >= 1, "chi_quantile: the degrees of freedom are ", degrees, "; wanted at least 1");
  require(t >= 1e-100 && t < 1, "chi_quantile: t is ", t, "; it must lie in [1e-100, 1)");
  const double a = static_cast<double>(degrees) / 2, k = 2 / (9 * static_cast<double>(degrees));
  const double root = 1 - k + normal_quantile(t) * std::sqrt(k);
  double x = root > 0.1 ? a * root * root * root
                        : std::exp((std::log(t) + std::lgamma(a + 1)) / a);  // small x: P ~ x^a / Gamma(a + 1)
  const bool lower = t <= 0.5;
  for (int i = 0; i < 60; ++i) {
    const double density = std::exp((a - 1) * std::log(x) - x - std::lgamma(a));
    const double error =
        lower ? detail::incomplete_gamma(a, x, true) - t : (1 - t) - detail::incomplete_gamma(a, x, false);
    const double newton = error / density, curvature = (a - 1) / x - 1;
    double move = newton / (1 - 0.5 * std::fmin(1.0, newton * curvature));
    if (move >= x) move = 0.5 * x;  // stay positive
    x -= move;
    if (std::fabs(move) <= 1e-15 * x) break;
  }
  return std::sqrt(2 * x);
}

}  // namespace feature
}  // namespace FOVEA_ABI
}  // namespace fovea
