// SPDX-License-Identifier: MIT
#pragma once
/// @file  Linear attention and its recurrent relatives: a state of constant size in place of the KV cache.
///
///   S_t = A_t S_{t-1} + phi(k_t) x_t^T                     [r x e]     one per KV head
///   z_t = A_t z_{t-1} + phi(k_t)                           [r]         where normalised
///   o_t = scale phi(q_t) S_t / (phi(q_t) . z_t)            [e]         the denominator only where normalised
///
///   rule          A_t                    x_t                                    gates of the call
///   none          1                      v_t
///   decay         e^{g_t}                v_t                                    log_decay [.., 1], or `gamma`
///   gla           diag(e^{g_t})          v_t                                    log_decay [.., r]
///   delta         1                      beta_t (v_t - S'^T k_t)                beta
///   gated_delta   e^{g_t}                beta_t (v_t - S'^T k_t)                log_decay [.., 1], beta
///   kda           diag(e^{g_t})          beta_t (v_t - S'^T k_t)                log_decay [.., r], beta
///   gdn2          diag(e^{g_t})          w_t * v_t - S'^T (b_t * k_t)           log_decay [.., r or 1], erase b, write w
///                                        with S' = A_t S_{t-1}
///
/// Contract   q [B, H, n, d], k [B, G, m, d], v [B, G, m, e]: one state per KV head, shared by its query group. v may instead have a
///            multiple of the heads of q and k (grouped values): state, gates and output are then per head of v. Query i sees keys
///            up to i + m - n. is_causal = false sums over all keys (rule none only). A denominator of exactly 0 gives 0.
///            A NaN in a token reaches no earlier token. log_decay <= 0 is expected; -inf forgets everything.
/// Cost       2 r e multiply-adds a token and head, delta rules 3 r e, and the map; memory beyond inputs and outputs is independent of n.
/// Numerics   state in float (double for f64); no exponent is ever positive; docs/numerics.md.
/// Reference  linear/reference.hpp.   Include <fovea/linear.hpp>, which defines the members.   Source  docs/mechanisms/linear.md lists the papers behind each row.

#include <optional>
#include <span>

#include <fovea/core/backward.hpp>
#include <fovea/core/configuration.hpp>
#include <fovea/core/mechanism.hpp>
#include <fovea/feature/basic.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

enum class rule : std::uint8_t { none, decay, gla, delta, gated_delta, kda, gdn2 };

constexpr const char* name_of(rule r) {
  constexpr const char* names[] = {"none", "decay", "gla", "delta", "gated_delta", "kda", "gdn2"};
  return names[static_cast<int>(r)];
}
constexpr bool is_delta(rule r) { return r >= rule::delta; }

struct linear_partial;

struct linear_attention {
  static constexpr const char* name = "linear";

  std::optional<feature_map> map = {};  ///< default: elu + 1 for rule none, the identity for the others
  fovea::rule rule = fovea::rule::none;
  double scale = 1.0;  ///< multiplies the output (d^-1/2 in most recurrent models)
  bool is_causal = true;
  std::optional<bool> normalise = {};  ///< divide by phi(q).z; default: for rule none only
  double eps = 0.0;                    ///< added to the denominator
  double clamp = 0.0;                  ///< if positive, the least denominator
  double key_sum_eps = 0.0;            ///< added to every feature of z
  std::span<const double> gamma = {};  ///< rule decay without log_decay: constant decay, one number or one per KV head

  void check(const problem& p) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  /// False where a map needs a number from all keys (its `surveys()`), or where all keys are summed first (is_causal = false).
  bool streaming() const { return is_causal && !phi().surveys(); }
  static constexpr bool items_apart = true;  ///< core/packed.hpp
  bool positional() const { return phi().positional(); }
  state make_state(const shape& s) const;
  void clear(state& s) const;  ///< as it was made
  std::uint64_t tag() const;
  void check(const problem& p, const state& s) const;
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const;

  /// Numerators into p.out and sums into `to`, with or without a state: linear/partial.hpp. Rules without erasure, causal.
  void prefill_partial(exec_ref exec, const problem& p, const linear_partial& to, state* s, arena scratch) const;

  /// Joins the states of two neighbouring stretches, for rules none, decay and gla and maps that do not know positions. Delta rules
  /// have no such merge: a stretch acts on the state before it by an r x r matrix, which the state does not hold.
  void merge(state& earlier, const state& later) const;
  bool mergeable() const { return streaming() && !is_delta(rule) && !phi().positional(); }
  /// S0 [B, G, r, e] and z0 [B, G, r] in, S and z out.
  void load_state(state& s, const arrays& from) const;
  arrays store_state(const state& s) const;

  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

  double macs(const shape& s) const;
  double step_macs(const shape& s) const;
  std::size_t state_bytes(const shape& s) const;
  bool trained() const { return phi().trained(); }

  feature_map phi() const {
    if (map) return *map;
    if (rule == fovea::rule::none) return elu1{};
    return identity_map{};
  }
  bool normalised() const { return normalise.value_or(rule == fovea::rule::none); }

 private:
  template <class Arch, class Acc>
  void run(exec_ref exec, const problem& p, const linear_partial* partial, state* s, arena scratch) const;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
