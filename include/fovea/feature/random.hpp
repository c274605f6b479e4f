// SPDX-License-Identifier: MIT
#pragma once
/// @file  The random numbers of the library: one small generator with an explicit seed, the same integers on every platform.
///
///   random_source rng(seed);   rng.bits()   rng.uniform()   rng.below(n)   rng.permutation(n)
///
/// Contract   nothing here is random without a seed that the caller chose; no std:: distribution is used, because the standard
///            does not say what those return. uniform() is never 0 and never 1, so quantiles of it are finite.
/// Source     xoshiro256** and splitmix64 (Blackman and Vigna, public domain).

#include <cstdint>
#include <vector>

#include <fovea/core/types.hpp>

namespace fovea {
inline namespace FOVEA_ABI {
namespace feature {

class random_source {
 public:
  explicit random_source(std::uint64_t seed) {
    for (auto& word : state_) {  // splitmix64: distinct, well mixed words from any seed, zero included
      seed += 0x9e3779b97f4a7c15ULL;
      std::uint64_t z = seed;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
      word = z ^ (z >> 31);
    }
  }

  std::uint64_t bits() {
    const std::uint64_t result = rotate(state_[1] * 5, 7) * 9, t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = rotate(state_[3], 45);
    return result;
  }
  /// (0, 1), odd multiples of 2^-53.
  double uniform() { return (static_cast<double>(bits() >> 12) + 0.5) * 0x1p-52; }
  double sign() { return (bits() >> 63) != 0 ? -1.0 : 1.0; }
  /// [0, n), unbiased: draws in the incomplete last stretch of n numbers are thrown away.
  std::uint64_t below(std::uint64_t n) {
    const std::uint64_t limit = (~std::uint64_t{0} / n) * n;
    std::uint64_t x = bits();
    while (x >= limit) x = bits();
    return x % n;
  }
  std::vector<isize> permutation(isize n) {
    std::vector<isize> order(static_cast<std::size_t>(n));
    for (isize i = 0; i < n; ++i) order[static_cast<std::size_t>(i)] = i;
    for (isize i = n - 1; i > 0; --i) {
      const auto j = below(static_cast<std::uint64_t>(i) + 1);
      const isize kept = order[static_cast<std::size_t>(i)];
      order[static_cast<std::size_t>(i)] = order[j];
      order[j] = kept;
    }
    return order;
  }

 private:
  static std::uint64_t rotate(std::uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }
  std::uint64_t state_[4];
};

}  // namespace feature
}  // namespace FOVEA_ABI
}  // namespace fovea
