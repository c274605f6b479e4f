// SPDX-License-Identifier: MIT
#pragma once
/// @file  Exact softmax attention: the yardstick of every other mechanism, and their fallback.
///
///   o_i = sum_j p_ij v_j,   p_ij = e^(s_ij) / (sum_j e^(s_ij) [+ e^(sink_h)]),   s_ij = score(scale q_i . k_j), j visible to i
///
/// Contract   any n, m, d, e >= 1 widths; H a multiple of G; masks and score modifications as policies (mask/, score/). A row
///            that sees nothing gives zeros and LSE = -inf. With a state (a contiguous KV cache of the storage type) the mask must be causal.
/// Cost       2 (d + e) flops for each visible pair; tiles that the mask rules out are skipped; memory beyond inputs and outputs
///            does not depend on n or m.
/// Numerics   f32 accumulation (f64 for f64), exp2 of 1.9 ulp; docs/numerics.md.
/// Reference  softmax/reference.hpp.       Source  Vaswani et al., Attention Is All You Need (2017).

#include <cmath>
#include <optional>

#include <fovea/core/mechanism.hpp>
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

  double macs(const shape& s) const;  ///< multiply-adds of a prefill
  double step_macs(const shape& s) const { return static_cast<double>(s.B * s.H * s.m * (s.d + s.e)); }
  std::size_t state_bytes(const shape& s) const {
    return static_cast<std::size_t>(s.B * s.G * s.m * (s.d + s.e)) * size_of(s.type);
  }
};

}  // namespace FOVEA_ABI
}  // namespace fovea

#include <fovea/softmax/prefill.hpp>
