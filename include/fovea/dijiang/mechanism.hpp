// SPDX-License-Identifier: MIT
#pragma once
/// @file  DiJiang: linear attention whose feature map is the exponential of a weighted cosine transform.
///
///   phi(x) = D exp(T C x)                                     Eq 12 of the paper; other forms in dijiang/tables.hpp
///   S_t = S_{t-1} + phi(k_t) v_t^T                            [r x e], one per KV head
///   o_t = phi(q_t) S_t   ( / phi(q_t) . sum_j phi(k_j) )      [e]
///
///   auto m = dijiang_attention::make({.head_dim = 64, .features = 128, .seed = 1});
///
/// Contract   q [B, H, n, d] with d = head_dim, k [B, G, m, d], v [B, G, m, e]. Causal: query i sees keys up to i + m - n. With gamma
///            or gains, position 0 is the first key of the call, or of the state. A row that sees no key gives 0. No LSE, no gates.
/// Cost       per token: two transforms, 2 r exponentials, 2 r e multiply-adds; a state of r (e + 2) numbers whatever the length.
/// Numerics   features are made relative to a log-scale kept for each feature, so that exponents of several hundred neither
///            overflow nor meet an empty denominator. Without a denominator the result itself may overflow.
/// Limits     untrained, with as many features as head dimensions, no form beats uniform attention: docs/mechanisms/dijiang.md.
/// Reference  dijiang/reference.hpp.   Include <fovea/dijiang.hpp>, which defines the members.
/// Source     Chen, Liu, Wang, Tian and Wang, DiJiang: Efficient Large Language Models through
///            Compact Kernelization, ICML 2024.

#include <fovea/core/backward.hpp>
#include <fovea/core/mechanism.hpp>
#include <fovea/dijiang/features.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Made by `make`; copies share the immutable tables.
struct dijiang_attention {
  static constexpr const char* name = "dijiang";

  std::shared_ptr<const dijiang_tables> tables = {};
  bool is_causal = true;
  bool normalise = true;  ///< divide by the row sum

  /// Draws what the options leave empty. Throws contract_error if they do not fit together.
  static dijiang_attention make(const dijiang_options& o) {
    return {make_dijiang_tables(o), o.is_causal, o.normalise.value_or(o.form == dijiang_form::unbiased)};
  }

  void check(const problem& p) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  bool streaming() const { return is_causal; }
  static constexpr bool items_apart = true;  ///< core/packed.hpp
  bool positional() const { return tables != nullptr && tables->gains(); }
  state make_state(const shape& s) const;
  std::uint64_t tag() const;
  void check(const problem& p, const state& s) const;
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const;
  /// Joins the states of two neighbouring stretches; not with gains, which know absolute positions.
  void merge(state& earlier, const state& later) const;

  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

  double macs(const shape& s) const;
  double step_macs(const shape& s) const;
  std::size_t state_bytes(const shape& s) const;
  bool trained() const { return tables != nullptr && tables->trained; }

 private:
  template <class Arch, class Acc>
  void run(exec_ref exec, const problem& p, state* s, arena scratch) const;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
