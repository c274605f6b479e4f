// SPDX-License-Identifier: MIT
#pragma once
/// @file  Linformer: softmax attention over keys and values that a learned map has projected along the sequence.
///
///   K' = E^T K [slots x d],  V' = F^T V [slots x e],   o_i = softmax(scale q_i K'^T) V'
///
/// Sharing is a matter of which view is passed:   none: E and F [G, m_max, slots] of this layer;   headwise: [1, m_max, slots];
/// key-value: F left empty (F = E);   layerwise: the same view in every layer's mechanism.
///
/// Contract   the first m rows of E are used; more keys than E has rows are refused. m != n is cross-attention. `lengths`: item b has
///            lengths[b] keys, rows behind them are not read, and the item gives what it would give alone. Pooling windows cut that
///            length; an empty window is no slot, but a slot of a linear E always takes part. An item with no keys gives zeros.
/// Causal     slot j mixes every position, so a causal mask over slots means nothing and is refused. With causal = true and `block`
///            whole past blocks are projected (each by rows 0 .. block - 1 of E into `slots` slots), the row's own block is exact,
///            and both share one denominator. Only this form takes a state; the bidirectional one has absorb and attend.
/// Cost       (G m + H n) slots (d + e) multiply-adds an item; causal: H n (m / block * slots + block) (d + e) / about 2.
/// Numerics   f32 accumulation (f64 for f64); docs/numerics.md.
/// Reference  linformer/reference.hpp.       Source  Wang et al., Linformer (2020, arXiv 2006.04768).

#include <cmath>
#include <cstdint>
#include <optional>
#include <span>

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

#include <fovea/linformer/prefill.hpp>
#include <fovea/linformer/step.hpp>
