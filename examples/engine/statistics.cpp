// SPDX-License-Identifier: MIT
#include "statistics.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace engine {

double student(isize degrees) {
  // Where the expansion below is off by more than 0.1 %.
  const double small[] = {12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228};
  if (degrees < 1) return std::numeric_limits<double>::infinity();
  if (degrees <= 10) return small[degrees - 1];
  const double z = 1.959964, n = static_cast<double>(degrees);
  const double z3 = z * z * z, z5 = z3 * z * z;
  return z + (z3 + z) / (4 * n) + (5 * z5 + 16 * z3 + 3 * z) / (96 * n * n);
}

interval block_mean(std::span<const std::vector<double>> series, isize block) {
  struct part {
    double mean, weight;
  };
  std::vector<part> parts;
  interval r;
  double sum = 0;
  for (const auto& x : series) {
    const auto n = static_cast<isize>(x.size());
    for (isize at = 0; at < n;) {
      isize end = std::min(n, at + block);
      if (n - end < (block + 1) / 2) end = n;
      double s = 0;
      for (isize i = at; i < end; ++i) s += x[static_cast<std::size_t>(i)];
      parts.push_back({s / static_cast<double>(end - at), static_cast<double>(end - at)});
      sum += s, r.values += end - at, at = end;
    }
  }
  r.blocks = static_cast<isize>(parts.size());
  if (r.values == 0) return r;
  const double total = static_cast<double>(r.values), count = static_cast<double>(r.blocks);
  r.mean = sum / total;
  double squares = 0;
  for (const part& p : parts) {
    const double d = p.weight / total * (p.mean - r.mean);
    squares += d * d;
  }
  r.error = r.blocks < 2 ? std::numeric_limits<double>::infinity() : std::sqrt(squares * count / (count - 1));
  const double reach = r.error == 0 ? 0 : student(r.blocks - 1) * r.error;
  r.low = r.mean - reach, r.high = r.mean + reach;
  return r;
}

double quantile(std::vector<double> x, double p) {
  if (x.empty()) return 0;
  const auto at =
      static_cast<std::ptrdiff_t>(std::min(static_cast<double>(x.size() - 1), p * static_cast<double>(x.size())));
  std::nth_element(x.begin(), x.begin() + at, x.end());
  return x[static_cast<std::size_t>(at)];
}

}  // namespace engine
