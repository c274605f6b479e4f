// SPDX-License-Identifier: MIT
#pragma once
/// @file  nystrom_attention: its parameters and members. The formula and the contract: fovea/nystrom.hpp.

#include <cmath>
#include <cstdint>
#include <optional>
#include <span>

#include <fovea/core/backward.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct nystrom_attention {
  static constexpr const char* name = "nystrom";

  isize landmarks = 64;
  isize iterations = 6;                        ///< of the pseudo-inverse
  std::optional<double> scale = {};            ///< none: 1 / sqrt(d)
  view<const float> skip = {};                 ///< bhnd(data, 1, 1 or H, 1, taps), taps odd; empty: no convolution
  std::span<const std::int32_t> lengths = {};  ///< [B] keys of each item; empty: m
  std::span<const std::int32_t> query_lengths = {};  ///< [B] queries of each item; empty: n

  double scale_for(const shape& s) const { return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(s.d)); }
  /// Landmarks of a call; 0: as many as there are rows and keys, or nothing to see, and the call is exact attention.
  isize used(const shape& s) const {
    if (s.n == 0 || s.m == 0 || (landmarks >= s.n && landmarks >= s.m)) return 0;
    const isize shorter = s.n < s.m ? s.n : s.m;
    return landmarks < shorter ? landmarks : shorter;
  }

  bool padded() const { return !lengths.empty() || !query_lengths.empty(); }
  /// The problem of one item, without its padding.
  shape item(const shape& s, isize b) const {
    shape one = s;
    one.B = 1;
    if (!lengths.empty()) one.m = lengths[static_cast<std::size_t>(b)];
    if (!query_lengths.empty()) one.n = query_lengths[static_cast<std::size_t>(b)];
    return one;
  }

  void check_settings() const;  ///< what can be judged without a problem
  void check(const problem& p) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

  double macs(const shape& s) const;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
