// SPDX-License-Identifier: MIT
#include "sampler.hpp"

#include <algorithm>
#include <cmath>

#include "error.hpp"

namespace engine {

sampler::sampler(double temperature, double top_p, std::uint64_t seed)
    : temperature_(temperature), top_p_(top_p), random_(seed) {
  if (!(temperature >= 0 && std::isfinite(temperature))) refuse("temperature is ", temperature, "; wanted 0 or more");
  if (!(top_p > 0 && top_p <= 1)) refuse("top-p is ", top_p, "; wanted more than 0, at most 1");
}

std::uint32_t sampler::next(std::span<const float> logits) {
  const auto best = static_cast<std::uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  if (temperature_ == 0) return best;
  // e^-40 of the best token's probability does not count: the vocabulary shrinks to a few thousand candidates.
  const double top = static_cast<double>(logits[best]);
  order_.clear(), weight_.resize(logits.size());
  double all = 0;
  for (std::uint32_t i = 0; i < logits.size(); ++i) {
    const double x = (static_cast<double>(logits[i]) - top) / temperature_;
    if (!(x > -40)) continue;
    all += weight_[i] = std::exp(x);
    order_.push_back(i);
  }
  std::sort(order_.begin(), order_.end(), [&](std::uint32_t a, std::uint32_t b) {
    return weight_[a] != weight_[b] ? weight_[a] > weight_[b] : a < b;
  });
  std::size_t kept = 0;
  double sum = 0;
  while (kept < order_.size() && sum < top_p_ * all) sum += weight_[order_[kept++]];
  double at =
      static_cast<double>(random_() >> 11) * 0x1p-53 * sum;  // 53 bits: std::uniform_real differs between libraries
  for (std::size_t i = 0; i < kept; ++i)
    if ((at -= weight_[order_[i]]) < 0) return order_[i];
  return order_[kept - 1];
}

}  // namespace engine
