// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention: its parameters and members. The formula and the contract: fovea/softmax.hpp.

#include <cmath>
#include <optional>

#include <fovea/core/backward.hpp>
#include <fovea/mask/causal.hpp>
#include <fovea/mask/table.hpp>
#include <fovea/score/score.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct softmax_attention {
  static constexpr const char* name = "softmax";
  static constexpr bool has_lse = true;

  fovea::mask mask = no_mask{};
  std::optional<double> scale = {};  ///< none: 1 / sqrt(d)
  fovea::score score = {};
  const float* sinks = nullptr;  ///< [H] a logit a head that joins the denominator and has no value; null: none
  isize sink_count = 0;          ///< how many there are; 0: not checked

  double scale_for(const shape& s) const { return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(s.d)); }
  mask_site site(const shape& s, isize b) const { return {b, 0, s.n, s.m, s.H, s.G, s.B}; }

  void check_values(const shape& s) const;
  void check(const problem& p) const;
  void check(const problem& p, const state& s) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  /// A contiguous KV cache for up to shape.m tokens, [B, G, capacity, d] then [B, G, capacity, e], in the storage type.
  bool streaming() const { return mask.is_causal(); }
  state make_state(const shape& s) const;
  std::uint64_t tag() const;
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const;

  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

  double macs(const shape& s) const;  ///< multiply-adds of a prefill
  double step_macs(const shape& s) const { return static_cast<double>(s.B * s.H * s.m * (s.d + s.e)); }
  std::size_t state_bytes(const shape& s) const {
    return static_cast<std::size_t>(s.B * s.G * s.m * (s.d + s.e)) * size_of(s.type);
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
