// SPDX-License-Identifier: MIT
#pragma once
/// @file  efficient_attention and kfree_reconstruction: parameters and members. Formulas and contract: fovea/efficient.hpp.

#include <cstdint>
#include <optional>
#include <span>

#include <fovea/core/backward.hpp>
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

  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

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
/// Contract   bidirectional only; no lengths, no state. Backward of all forms.
struct kfree_reconstruction {
  static constexpr const char* name = "kfree_reconstruction";
  enum class form_type : unsigned char { efficient, context, channel };

  form_type form = form_type::efficient;
  std::optional<double> scale = {};  ///< of the queries (efficient, context) or of Q^T K (channel); none: 1

  double scale_for() const { return scale ? *scale : 1.0; }

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
