// SPDX-License-Identifier: MIT
#pragma once
/// @file  Seeded random numbers that are the same on every machine: integer arithmetic and exact double sums only.
///
/// Source     SplitMix64 (Steele, Lea, Flood 2014); the normal is the sum of 12 uniforms less 6 (Irwin-Hall).

#include <cstdint>

namespace test {

class random {
 public:
  explicit random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ULL + 1) {}

  std::uint64_t bits() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  /// In [0, 1), a multiple of 2^-32.
  double uniform() { return static_cast<double>(bits() >> 32) * 0x1p-32; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  /// Mean 0, variance 1, |x| <= 6.
  double normal() {
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  /// In [low, high].
  std::ptrdiff_t integer(std::ptrdiff_t low, std::ptrdiff_t high) {
    return low + static_cast<std::ptrdiff_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool coin(double chance = 0.5) { return uniform() < chance; }

 private:
  std::uint64_t state_;
};

}  // namespace test
