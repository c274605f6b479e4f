// SPDX-License-Identifier: MIT
#pragma once
/// @file  What is benchmarked: mechanisms as configurations, shapes as engines use them, and the flops that count as useful.

#include <string>
#include <vector>

#include <fovea/any_attention.hpp>
#include <fovea/core/kv_cache.hpp>

namespace bench {

using fovea::isize;

struct attention_case {
  bool is_step = false;
  std::string variant;
  fovea::configuration config;
  fovea::shape shape;
  int threads = 1;
  double flops = 0;           ///< useful ones of a prefill
  bool keeps_tokens = false;  ///< its state is a KV cache
  isize gate_width = 0;       ///< 0: no decay; 1: scalar; d: by channel
  bool beta = false;
  isize weight_rows = 0;  ///< random weights W (Wq, Wk) of so many features

  fovea::any_attention make() const;
  std::string name() const;
};

/// Random log-decays and write strengths for the rules that take them.
class gate_tensors {
 public:
  explicit gate_tensors(const attention_case& c);
  fovea::gates views(isize rows = -1) const;  ///< of the first rows; -1: all

 private:
  const attention_case* case_;
  isize rows_;
  std::vector<float> decay_, beta_;
};

std::vector<attention_case> all_cases();

}  // namespace bench
