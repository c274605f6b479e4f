// SPDX-License-Identifier: MIT
#pragma once
/// @file  The attention of all layers, through fovea's public interface alone: RoPE, KV stores and states, calls.
///
///   softmax with a plain store   all sequences of a call in one fovea::prefill (cu_q) over their KV stores, RoPE inside
///   hybrid                       KV store and summaries; q and k turned by fovea::rotate; one fovea::prefill a sequence
///   anything else                a fovea::state of a sequence; q and k turned by fovea::rotate; one fovea::prefill a sequence
///
/// The groups of a layer whose rows are stored alike share one contiguous_store of a sequence, which holds the KV heads that any of them reads.
///
/// Contract   q [rows, H, d], k, v [rows, G, d], out [rows, H, d]; the rows of a part are the next tokens of its sequence. q and k of
///            layers whose groups are not all plain softmax, and of observed calls, are turned in place.

#include <functional>
#include <span>
#include <vector>

#include <fovea/cache/contiguous_store.hpp>
#include <fovea/core/exec.hpp>
#include <fovea/core/state.hpp>
#include <fovea/core/workspace.hpp>
#include <fovea/position/rope_table.hpp>
#include <fovea/softmax/mechanism.hpp>

#include "attention_plan.hpp"

namespace engine {

/// The mechanism, if it is softmax that the engine serves from a contiguous_store; else null.
const fovea::softmax_attention* plain_softmax(const head_group& g);

/// What one sequence remembers: of each layer its KV stores, and for each group a state, or summaries (empty for softmax over a store).
/// A value: a copy is a fork.
class sequence {
 public:
  isize tokens() const { return tokens_; }
  std::size_t bytes() const;  ///< of its stores and states as they are laid out, room for tokens to come included

 private:
  friend class layer_attention;
  friend class session;
  struct layer {
    std::vector<fovea::contiguous_store> stores;
    std::vector<fovea::state> states;
  };
  std::vector<layer> layers_;
  isize tokens_ = 0;
};

/// Rows [first, first + count) of a call belong to this sequence.
struct sequence_rows {
  sequence* to = nullptr;
  isize first = 0, count = 0;
};

class layer_attention {
 public:
  layer_attention(const model_config& c, attention_plan plan, isize context, fovea::dtype cache);

  sequence make_sequence() const;
  const attention_plan& plan() const { return plan_; }
  /// True if q and k of the layer are turned before any call, by `turn`.
  bool turns_first(isize layer) const { return turns_first_[static_cast<std::size_t>(layer)]; }
  void turn(fovea::exec_ref exec, std::span<const sequence_rows> parts, float* q, float* k) const;
  /// `turned`: q and k have been through `turn`.
  void run(fovea::exec_ref exec, isize layer, std::span<const sequence_rows> parts, isize rows, const float* q,
           const float* k, const float* v, float* out, bool turned);

 private:
  struct call;
  /// A KV store of a layer: the heads that it holds, ascending.
  struct layer_store {
    fovea::kv_shape shape;
    std::vector<isize> kv_heads;
  };
  /// Which store a group reads, and which of its heads; store < 0: it has a state.
  struct store_heads {
    isize store = -1, first = 0, count = 0, step = 1;
  };
  struct layer_stores {
    std::vector<layer_store> stores;
    std::vector<store_heads> groups;
  };
  layer_stores lay_out(const layer_plan& layer) const;
  void append(isize layer, std::span<const sequence_rows> parts, isize rows, const float* k, const float* v,
              bool turned);
  void attend(fovea::exec_ref exec, isize layer, std::size_t group, std::span<const sequence_rows> parts, const call& c,
              bool turned);
  void attend_stores(fovea::exec_ref exec, const fovea::softmax_attention& m, isize layer, std::size_t group,
                     std::span<const sequence_rows> parts, const call& c);
  void attend_states(fovea::exec_ref exec, const fovea::any_attention& m, isize layer, std::size_t group,
                     std::span<const sequence_rows> parts, const call& c);
  fovea::kv_sequence rows_of(const sequence& s, isize layer, std::size_t group) const;
  std::span<std::byte> scratch(std::size_t bytes);

  model_config config_;
  attention_plan plan_;
  isize context_;
  fovea::dtype cache_;
  fovea::rope_table table_;
  fovea::rope rope_;
  std::vector<bool> turns_first_;
  std::vector<layer_stores> stores_;
  fovea::buffer scratch_;
  std::vector<float> gathered_;
};

}  // namespace engine
