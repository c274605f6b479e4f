// SPDX-License-Identifier: MIT
#pragma once
/// @file  Low-discrepancy points in [0, 1)^s: Sobol and Halton, unscrambled, the origin first.
///
///   sobol(n, s)     [n x s]   Gray-code order; any 2^k points that start at a multiple of 2^k hold one point in each interval
///                             of length 2^-k of every coordinate
///   halton(n, s)    [n x s]   coordinate c is the radical inverse of the index in the c-th prime
///
/// Contract   s <= 16. Sobol values are exact dyadic numbers; both are the same on every platform.
/// Source     Joe and Kuo's direction numbers (new-joe-kuo-6); Antonov and Saleev's Gray-code order; Halton 1960.

#include <bit>
#include <cstdint>
#include <vector>

#include <fovea/core/contract.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace feature {

inline constexpr isize point_set_dimensions = 16;

namespace detail {
struct primitive_polynomial {
  int degree;
  unsigned coefficients;  // the inner ones, highest first
  unsigned m[6];          // initial direction numbers
};
inline constexpr primitive_polynomial joe_kuo[point_set_dimensions - 1] = {{1, 0, {1}},
                                                                           {2, 1, {1, 3}},
                                                                           {3, 1, {1, 3, 1}},
                                                                           {3, 2, {1, 1, 1}},
                                                                           {4, 1, {1, 1, 3, 3}},
                                                                           {4, 4, {1, 3, 5, 13}},
                                                                           {5, 2, {1, 1, 5, 5, 17}},
                                                                           {5, 4, {1, 1, 5, 5, 5}},
                                                                           {5, 7, {1, 1, 7, 11, 19}},
                                                                           {5, 11, {1, 1, 5, 1, 1}},
                                                                           {5, 13, {1, 1, 1, 3, 11}},
                                                                           {5, 14, {1, 3, 5, 5, 31}},
                                                                           {6, 1, {1, 3, 3, 9, 7, 49}},
                                                                           {6, 13, {1, 1, 1, 15, 21, 21}},
                                                                           {6, 16, {1, 3, 1, 13, 27, 49}}};

/// v[b] = direction number of bit b as a 32-bit binary fraction.
inline void sobol_directions(isize coordinate, std::uint32_t (&v)[32]) {
  if (coordinate == 0) {
    for (int b = 0; b < 32; ++b) v[b] = 1U << (31 - b);
    return;
  }
  const auto& p = joe_kuo[coordinate - 1];
  for (int b = 0; b < p.degree; ++b) v[b] = p.m[b] << (31 - b);
  for (int b = p.degree; b < 32; ++b) {
    v[b] = v[b - p.degree] ^ (v[b - p.degree] >> p.degree);
    for (int i = 1; i < p.degree; ++i)
      if (((p.coefficients >> (p.degree - 1 - i)) & 1U) != 0) v[b] ^= v[b - i];
  }
}
inline void check_point_set(isize points, isize dimensions) {
  require(points >= 0 && points <= isize{1} << 31, "a point set of ", points,
          " points was asked for; wanted 0 to 2^31");
  require(dimensions >= 1 && dimensions <= point_set_dimensions, "a point set in ", dimensions,
          " dimensions was asked for; wanted 1 to ", point_set_dimensions);
}
}  // namespace detail

inline std::vector<double> sobol(isize points, isize dimensions) {
  detail::check_point_set(points, dimensions);
  std::vector<double> out(static_cast<std::size_t>(points * dimensions));
  for (isize c = 0; c < dimensions; ++c) {
    std::uint32_t v[32], x = 0;
    detail::sobol_directions(c, v);
    for (isize i = 0; i < points; ++i) {
      out[static_cast<std::size_t>(i * dimensions + c)] = static_cast<double>(x) * 0x1p-32;
      x ^= v[std::countr_one(static_cast<std::uint32_t>(i)) & 31];
    }
  }
  return out;
}

inline double radical_inverse(isize index, int base) {
  double x = 0, digit = 1.0 / base;
  for (; index > 0; index /= base, digit /= base) x += digit * static_cast<double>(index % base);
  return x;
}

inline std::vector<double> halton(isize points, isize dimensions) {
  static constexpr int primes[point_set_dimensions] = {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53};
  detail::check_point_set(points, dimensions);
  std::vector<double> out(static_cast<std::size_t>(points * dimensions));
  for (isize i = 0; i < points; ++i)
    for (isize c = 0; c < dimensions; ++c)
      out[static_cast<std::size_t>(i * dimensions + c)] = radical_inverse(i, primes[c]);
  return out;
}

}  // namespace feature
}  // namespace FOVEA_ABI
}  // namespace fovea
