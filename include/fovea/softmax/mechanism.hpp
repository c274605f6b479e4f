// SPDX-License-Identifier: MIT
#pragma once
/// @file  softmax_attention: its parameters and members. The formula and the contract: fovea/softmax.hpp.

#include <cmath>
#include <optional>

#include <fovea/core/backward.hpp>
#include <fovea/core/kv_layout.hpp>
#include <fovea/mask/causal.hpp>
#include <fovea/mask/table.hpp>
#include <fovea/position/rope.hpp>
#include <fovea/score/score.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// How a state of softmax_attention keeps its keys and values.
struct state_store {
  /// ring: the first keys and the last ones that the mask may see, and no more (StreamingLLM, sliding windows): the mask must say
  /// how far back it looks (window, chunked_local).
  enum class form : unsigned char { contiguous, ring } kind = form::contiguous;
  std::optional<dtype> type = {};    ///< none: the type of the call; i8: int8 with scales
  scale_per scale = scale_per::row;  ///< int8 only
  isize chunk = 256;  ///< ring: a longer prefill is cut into calls of so many tokens, and so much more is kept
  kv_form layout = kv_form::rows;  ///< packed: int8 with a scale a row only
  bool rotated = false;            ///< int8 only: as kv_shape::rotated
};

struct softmax_attention {
  static constexpr const char* name = "softmax";
  static constexpr bool has_lse = true;

  fovea::mask mask = no_mask{};
  std::optional<double> scale = {};  ///< none: 1 / sqrt(d)
  fovea::score score = {};
  const float* sinks = nullptr;  ///< [H] a logit a head that joins the denominator and has no value; -inf, null: none
  isize sink_count = 0;          ///< how many there are; 0: not checked
  state_store store = {};        ///< of states
  /// RoPE: q and k are turned; null: they come turned. Query i and key m - n + i of a call are turned to call_options::positions
  /// [b, i], or to m - n + i; key j of the others to j. States and KV stores hold turned keys.
  const rope* turn = nullptr;
  /// int8: q, k, p and v are rounded to 8 bits and multiplied as integers (docs/mechanisms/int8.md); opt-in, f32 storage and less.
  precision arithmetic = precision::f32;
  /// Keys whose share of the running denominator is at most that in every row of a tile of queries take no part in the product with V
  /// (f32: one key by the rows of a register tile; int8: 16 keys by 16 rows). What is left out of a row is written to
  /// call_options::skipped, where that is given, and bounds the error: |o - o'| <= 2 skipped max |v|. 0: nothing is. Up to 8 rows a KV head skip nothing.
  float skip = 0;

  double scale_for(const shape& s) const { return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(s.d)); }
  mask_site site(const shape& s, isize b) const { return {b, 0, s.n, s.m, s.H, s.G, s.B}; }

  void check_values(const shape& s) const { check_items(s, 0, s.B); }
  void check_items(const shape& s, isize first, isize last) const;  ///< as far as items [first, last) are concerned
  void check(const problem& p) const;
  void check(const problem& p, const state& s) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  std::size_t state_workspace_size(const shape& s, int threads) const;
  bool takes_positions() const { return turn != nullptr; }
  bool takes_skipped() const { return skip > 0; }
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  /// A KV cache: contiguous for up to shape.m tokens, or a ring for any number of them (softmax/state.hpp).
  bool streaming() const { return mask.is_causal(); }
  state make_state(const shape& s) const;
  std::uint64_t tag() const;
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const;

  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

  double macs(const shape& s) const;       ///< multiply-adds of a prefill
  double step_macs(const shape& s) const;  ///< of one step with m tokens seen: those of the keys that its row sees
  std::size_t state_bytes(const shape& s) const;
};

}  // namespace FOVEA_ABI
}  // namespace fovea
