// SPDX-License-Identifier: MIT
#pragma once
/// @file  linformer_attention: its parameters and members. The formula and the contract: fovea/linformer.hpp.

#include <cmath>
#include <cstdint>
#include <optional>
#include <span>

#include <fovea/core/backward.hpp>
#include <fovea/core/mechanism.hpp>
#include <fovea/kernel/project_sequence.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct linformer_attention {
  static constexpr const char* name = "linformer";
  static constexpr bool has_lse = true;

  sequence_projection projection = sequence_projection::linear;
  view<const float> E = {};                    ///< linear: bhnd(data, 1, 1 or G, m_max, slots)
  view<const float> F = {};                    ///< linear: for the values; empty: E
  std::span<const float> wk = {}, wv = {};     ///< conv: the taps for keys and for values (empty: wk)
  isize slots = 0;                             ///< projected length; 0 with a linear projection: the width of E
  std::optional<double> scale = {};            ///< none: 1 / sqrt(d)
  std::span<const std::int32_t> lengths = {};  ///< [B] keys of each item, bidirectional form only; empty: m
  bool causal = false;
  isize block = 0;  ///< tokens of a block, causal form only

  double scale_for(const shape& s) const { return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(s.d)); }
  isize slots_for() const { return slots == 0 && projection == sequence_projection::linear ? E.width : slots; }
  isize keys_of(isize b, isize m) const { return lengths.empty() ? m : lengths[static_cast<std::size_t>(b)]; }
  bool streaming() const { return causal; }
  /// The map of KV head g for keys, or for values.
  kernel::projection map(bool values, isize g) const;

  void check_settings() const;  ///< what can be judged without a problem
  void check(const problem& p) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

  /// Causal: room for s.m tokens, their slots and the rows of one block. Bidirectional: the slots of a stretch whose first token
  /// stands at position `first`, for absorb and attend (linear and conv projections).
  state make_state(const shape& s, isize first = 0) const;
  std::uint64_t tag() const;
  void check(const problem& p, const state& s) const;
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const;
  /// `later` holds the tokens that follow those of `earlier`, which takes them over. Bidirectional states: any cut, `later` made with
  /// first = that position. Causal: `earlier` must end on a block boundary (hence no `merge`: not any two states can be joined).
  void append(state& earlier, const state& later) const;

  double macs(const shape& s) const;
  double step_macs(const shape& s) const;
  std::size_t state_bytes(const shape& s) const;
};

/// Keys and values join the slots of a bidirectional state.
void absorb(exec_ref exec, const linformer_attention& m, tensor_ref k, tensor_ref v, state& s);
/// Every row of q sees all slots, which hold all tokens absorbed so far. `lse` as in call_options.
void attend(exec_ref exec, const linformer_attention& m, tensor_ref q, tensor_mut out, const state& s,
            tensor_mut lse = {});

}  // namespace FOVEA_ABI
}  // namespace fovea
