// SPDX-License-Identifier: MIT
#pragma once
/// @file  Efficient Attention: keys are normalised over positions and queries over features, so that K^T V comes first.
///
///   softmax   o_i = sum_c softmax_c(scale q_i)_c  [ sum_j e^(k_jc) v_j / sum_j e^(k_jc) ]
///   scaling   o_i = scale q_i (K^T V) / m
///
/// Bidirectional: j runs over all keys. Causal: over the keys that row i sees, a prefix softmax for each key channel (a form of this
/// library, not of the paper).
///
/// Contract   any n, m, d, e >= 1; no log-sum-exp, no score mask. A row that sees nothing gives zeros. With a state the mechanism must be
///            causal; the bidirectional one takes tokens by `absorb` and answers by `attend`. `lengths`: item b has lengths[b] keys,
///            what stands behind them is not read.
/// Cost       B (G m + H n) d e multiply-adds; the state is d (e + 2) numbers a KV head; memory independent of n and m.
/// Numerics   f32 accumulation (f64 for f64) by blocks of 128 tokens, exponents <= 0; docs/numerics.md.
/// Reference  efficient/reference.hpp.       Source  Shen et al., Efficient Attention (WACV 2021, arXiv 1812.01243).

#include <cstdint>
#include <optional>
#include <span>

#include <fovea/core/mechanism.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

enum class efficient_normalisation : unsigned char { softmax, scaling };

struct efficient_attention {
  static constexpr const char* name = "efficient";

  efficient_normalisation normalisation = efficient_normalisation::softmax;
  bool causal = false;
  std::optional<double> scale = {};            ///< queries are multiplied by it first; none: 1, as published
  std::span<const std::int32_t> lengths = {};  ///< [B] keys of each item, the bidirectional form only; empty: m

  double scale_for() const { return scale ? *scale : 1.0; }
  isize keys_of(isize b, isize m) const { return lengths.empty() ? m : lengths[static_cast<std::size_t>(b)]; }
  bool streaming() const { return causal; }

  void check_settings() const;  ///< what can be judged without a problem
  void check(const problem& p) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  /// top [d], sum [d], context [d x e] for each (b, g), in the accumulator's type; s.m is not used.
  state make_state(const shape& s) const;
  std::uint64_t tag() const;
  void check(const problem& p, const state& s) const;
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const;
  void merge(state& earlier, const state& later) const;

  double macs(const shape& s) const;
  double step_macs(const shape& s) const { return static_cast<double>(s.B * (s.G + s.H) * s.d * s.e); }
  std::size_t state_bytes(const shape& s) const;
};

/// Keys and values join the state; every later `attend` sees them.
void absorb(exec_ref exec, const efficient_attention& m, tensor_ref k, tensor_ref v, state& s);
/// Every row of q sees all that the state has absorbed.
void attend(exec_ref exec, const efficient_attention& m, tensor_ref q, tensor_mut out, const state& s);

/// Linear in n with no projection length: forms that fit the abstract of "Revisiting Linformer" (arXiv 2101.10277). The paper's own
/// formula could not be verified, so this claims no more than its name: nobody should cite it as that paper's method.
///
///   efficient  o_i = softmax(q_i) (softmax over positions(K)^T V)     the same as efficient_attention (default)
///   context    o_i = scale q_i softmax(K^T V / sqrt(m))               softmax over the value columns of each key channel
///   channel    o_i = v_i softmax(Q^T K / sqrt(m))                     softmax over the key channels; wants n = m and e = d
///
/// Contract   bidirectional only; no lengths, no state.
struct kfree_reconstruction {
  static constexpr const char* name = "kfree_reconstruction";
  enum class form_type : unsigned char { efficient, context, channel };

  form_type form = form_type::efficient;
  std::optional<double> scale = {};  ///< of the queries (efficient, context) or of Q^T K (channel); none: 1

  double scale_for() const { return scale ? *scale : 1.0; }

  void check(const problem& p) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;
  double macs(const shape& s) const;
};

}  // namespace FOVEA_ABI
}  // namespace fovea

#include <fovea/efficient/kfree.hpp>
#include <fovea/efficient/prefill.hpp>
#include <fovea/efficient/step.hpp>
