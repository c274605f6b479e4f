// SPDX-License-Identifier: MIT
#pragma once
/// @file  The next token from logits: temperature and top-p, reproducible from a seed on every machine.
///
/// Contract   temperature 0: the largest logit, the lower id of equals. Else the smallest set of tokens whose probabilities at that
///            temperature sum to top_p or more, most probable first (the lower id of equals), is drawn from.

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace engine {

class sampler {
 public:
  sampler(double temperature, double top_p, std::uint64_t seed);
  std::uint32_t next(std::span<const float> logits);

 private:
  double temperature_, top_p_;
  std::mt19937_64 random_;
  std::vector<std::uint32_t> order_;
  std::vector<double> weight_;
};

}  // namespace engine
