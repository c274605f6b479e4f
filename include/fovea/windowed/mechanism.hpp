// SPDX-License-Identifier: MIT
#pragma once
/// @file  windowed_attention: its parameters and members.
///
///   near_i = { j : i - window < j <= i  or  j < first },   rest_i = { j < i : j not in near_i }
///   u_ij = e^(scale q_i . k_j)  (j near),   e^(a_i) phi(q_i) . phi(k_j)  (j in the rest)
///   o_i = sum_j u_ij v_j / sum_j u_ij                                                      [e]
///   a_i = log_weight_h + query_gate_h . q_i  [+ max over the window of scale q_i . k_j: window_maximum]
///
/// The composition of two partials: softmax_attention with a window, and linear_attention without a denominator, `window` tokens late.
///
/// Contract   causal, bottom-right; any n and m, H a multiple of G; a row before the first key gives 0 and LSE = -inf. A map that knows
///            positions, or wants a number from all keys, is refused. phi must not be negative for the denominator to be safe: a row
///            whose denominator is 0 gives 0. LSE: the logarithm of the denominator.
/// Cost       2 (window + first) (d + e) + 4 r e flops a row and the map; state: window + first rows of K and V and r (e + 1) numbers
///            a KV head, independent of n.
/// Numerics   the two parts share one running maximum; docs/numerics.md.
/// Reference  windowed/reference.hpp.   Source  LoLCATs' code (window_maximum, no first keys); Based (2402.18668).

#include <optional>

#include <fovea/feature/basic.hpp>
#include <fovea/linear/mechanism.hpp>
#include <fovea/softmax/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// What the weight of the rest is measured against.
enum class rest_level : unsigned char {
  absolute,        ///< the scores themselves
  window_maximum,  ///< the largest score in the window of the row, as LoLCATs has it
};

struct windowed_attention {
  static constexpr const char* name = "windowed";
  static constexpr bool has_lse = true;

  isize window = 64;  ///< keys, the row's own among them
  isize first = 4;    ///< attention sinks
  feature_map map = elu1{};
  std::optional<double> scale = {};  ///< of the softmax; none: 1 / sqrt(d)
  rest_level level = rest_level::absolute;
  view<const float> log_weight = {};  ///< [1, H, 1, 1]; null: 0
  view<const float> query_gate = {};  ///< [1, H, 1, d]; null: 0

  softmax_attention exact() const { return {.mask = fovea::window{.width = window, .first = first}, .scale = scale}; }
  linear_attention rest() const { return {.map = map, .normalise = false}; }

  void check(const problem& p) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  state make_state(const shape& s) const;
  std::uint64_t tag() const;
  void check(const problem& p, const state& s) const;
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const;

  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

  double macs(const shape& s) const;
  double step_macs(const shape& s) const;
  std::size_t state_bytes(const shape& s) const;
  bool trained() const { return map.trained(); }
};

}  // namespace FOVEA_ABI
}  // namespace fovea
