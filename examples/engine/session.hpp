// SPDX-License-Identifier: MIT
#pragma once
/// @file  A model with an attention plan, run on any number of sequences: tokens in, logits out.
///
///   model m("DIR");
///   pool threads(2);
///   session s(m, exact_plan(m.config()), threads);
///   sequence a = s.make_sequence();
///   logits l = s.forward({{a, prompt}}, logits_of::last);              prefill; then one token at a time
///   l = s.forward({{a, {&next, 1}}, {b, draft}}, logits_of::all);      sequences of any lengths in one call
///
/// Contract   token i of a piece stands behind the tokens that its sequence has seen. However a sequence is cut into calls, and whatever
///            else is in a call, its logits are the same up to rounding; for one sequence of calls they are the same bits for any number of threads.
/// Memory     a sequence owns its KV stores and states (a copy is a fork); the session owns activations for options.rows rows, and
///            the logits, which are valid until its next forward. Model, plan and executor outlive the session; one thread calls it.
/// Errors     more tokens than options.context, a token outside the vocabulary: engine::error before anything is written.

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include <fovea/core/exec.hpp>

#include "attention_plan.hpp"
#include "layer_attention.hpp"
#include "model.hpp"

namespace engine {

struct session_options {
  isize context = 0;                       ///< most tokens of a sequence; 0: the model's
  isize rows = 512;                        ///< rows of activations: longer calls are cut into parts of so many
  fovea::dtype cache = fovea::dtype::f16;  ///< of the exact KV stores
};

/// What one forward appends to one sequence.
struct piece {
  sequence& to;
  std::span<const std::uint32_t> tokens;
};

enum class logits_of { none, last, all };

/// Rows in the order of the pieces, and of the tokens in each.
struct logits {
  const float* data = nullptr;
  isize rows = 0, vocabulary = 0;
  std::span<const float> row(isize i) const { return {data + i * vocabulary, static_cast<std::size_t>(vocabulary)}; }
};

/// q, k, v of one layer, turned by RoPE, as fovea's calls see them: [1, heads, n, d].
struct attention_inputs {
  isize layer = 0, piece = 0;  ///< piece: index into the call's list
  isize first = 0;             ///< position of row 0
  fovea::view<const float> q, k, v;
};

/// Seconds spent since the last reset, by the calling thread.
struct profile {
  double attention = 0;  ///< fovea: RoPE, KV stores, attention
  double dense = 0;      ///< products with the layers' matrices
  double output = 0;     ///< logits
  double other = 0;      ///< norms, activations, embedding
  double total() const { return attention + dense + output + other; }
};

class session {
 public:
  session(const model& m, attention_plan plan, fovea::exec_ref exec, const session_options& options = {});
  ~session();
  session(const session&) = delete;
  session& operator=(const session&) = delete;

  sequence make_sequence() const;
  logits forward(std::span<const piece> pieces, logits_of which);
  logits forward(std::initializer_list<piece> pieces, logits_of which) {
    return forward(std::span<const piece>(pieces.begin(), pieces.size()), which);
  }

  /// Called for every layer and piece (part of a piece, if it is longer than options.rows); empty: not.
  std::function<void(const attention_inputs&)> on_attention;
  /// Called with the residual stream before layer l (l = layers: after the last norm) of each part of a call; empty: not.
  std::function<void(isize layer, isize rows, const float* hidden)> on_hidden;

  const model& of() const;
  const attention_plan& plan() const;
  const session_options& options() const;
  profile spent;

 private:
  struct part;
  struct body;
  void check(std::span<const piece> pieces) const;
  std::vector<part> cut(std::span<const piece> pieces, logits_of which) const;
  void run(const part& p, float* out);
  void attention_block(const part& p, isize layer);
  void mlp_block(isize rows, isize layer);
  void output(const part& p, float* out);
  std::unique_ptr<body> body_;
};

}  // namespace engine
