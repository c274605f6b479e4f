// SPDX-License-Identifier: MIT
#pragma once
/// @file  Hybrid sparse attention: exact over the keys that matter, one pooled token for each block that is skipped, one denominator.
///
///   o_i = ( sum_{j computed} e^(s_ij) v_j + sum_{J pooled} e^(z_iJ) mean(v_J) ) / ( sum e^(s_ij) + sum e^(z_iJ) )
///   s_ij = scale q_i . k_j      z_iJ = scale q_i . mean(k_J) + log n_J  [+ min(variance_cap, scale^2 / 2 sum_c q_ic^2 var_c(k_J))]
///
/// or in place of the means one member of J, drawn by `seed` (compensation::sampled); or in place of all pooled tokens a rest of linear attention
/// over the skipped keys, e^(log_weight_h + query_gate_h . q_i) phi(q_i) . phi(k_j) for each (compensation::linear; hybrid/linear_rest.hpp).
///
/// What is computed is said by a fixed pattern (mask/patterns.hpp), by the caller's block mask, or by a selection for each query
/// block: own blocks, blocks that hold the `first` keys or the `window` keys before the query block, and the best of the rest
/// (the candidates), `top` in number with the own ones, or a share `budget` of them, in either case `at_least` keys.
///
/// Kept keys: of each stretch of keys the few with the smallest |v| (attention sinks in mid-text; `keep_small`) are computed for every row, whatever
/// becomes of their blocks, and then leave the mean and the count n_J of a pooled token, whose logit takes log n_J of those that stay.
///
/// Contract   query block I holds rows [I block_q, (I + 1) block_q). Scores of a selection: each row's estimated share of the mass of
///            the blocks wholly before the query block, kept keys left out, averaged over its rows; ties go to the earlier block.
///            Causal: a pooled block lies wholly in the past of every row that uses it, and a selection depends on queries of its own
///            block and on keys that all of its rows see. A row with no key gives zeros and LSE = -inf; lse counts the pooled scores.
///            With a state, query blocks are aligned to absolute positions: prefill equals its steps for a pattern, for a given
///            mask, and for block_q = 1; else the rows of one call vote together, so a different cut into calls may select differently.
/// Cost       visible share of 2 n m (d + e) flops; selection n m d / block_k multiply-adds (mean), twice that (variance, bound), n m d
///            (int8, int4, exact: token scores); pooled tokens n m (d + e) / block_k. Memory O(n / block_k) scores for a few rows.
/// Numerics   selection quality is measured in docs/mechanisms/hybrid.md: mean and bound miss retrieval heads, int8 does not.
/// Reference  hybrid/reference.hpp.       Source  Quest 2406.10774, MoBA 2502.13189, MST 2408.11746, MRA 2207.10284.

#include <cmath>
#include <limits>
#include <optional>

#include <fovea/core/backward.hpp>
#include <fovea/core/mechanism.hpp>
#include <fovea/feature/basic.hpp>
#include <fovea/mask/patterns.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// Who says which blocks are computed.
enum class block_selector : unsigned char {
  pattern,   ///< hsa_pattern{pattern, stride}, token by token
  given,     ///< the caller's block mask `blocks`
  mean,      ///< scale q . mean(k_J) + log n_J (MoBA's gate); cheapest, poor at retrieval
  variance,  ///< the same + a quarter of the diagonal variance of the logits
  bound,     ///< sum_c max(q_c low_c, q_c high_c): Quest's upper bound of every logit of the block
  int8,      ///< token scores from q and k rounded to 8 bits a row, summed over the block
  int4,      ///< the same with 4 bits
  exact,     ///< the true mass: for study, as dear as the scores of exact attention
};
/// What stands for a skipped block J of n_J keys (docs/mechanisms/hybrid.md says what each is worth).
enum class compensation : unsigned char {
  none,      ///< nothing: dropped
  zeroth,    ///< mean key and mean value, weighed n_J times
  cumulant,  ///< the same, and the variance term of the logits
  sampled,  ///< one of its keys with its value, weighed n_J times: numerator and denominator are unbiased over the seeds
  linear,  ///< its keys, weighed by linear attention with `map`, `log_weight` and `query_gate`; a prefill without a state
};
constexpr const char* name_of(compensation x) {
  return x == compensation::none       ? "none"
         : x == compensation::zeroth   ? "zeroth"
         : x == compensation::cumulant ? "cumulant"
         : x == compensation::sampled  ? "sampled"
                                       : "linear";
}

/// A row is done when its error is at most `absolute`, or `relative` times the length of its output: the bound that is proven of it, or, where
/// `estimated` is set, an estimate, which most rows keep (docs/mechanisms/hybrid.md). 0 and 0: no target.
struct error_target {
  double relative = 0, absolute = 0;
  bool estimated = false;
  bool on() const { return relative > 0 || absolute > 0; }
};

struct hybrid_attention {
  static constexpr const char* name = "hybrid";
  static constexpr bool has_lse = true;

  block_selector select = block_selector::int8;
  isize block_q = 16, block_k = 16;
  bool is_causal = false;
  isize top = 0;         ///< blocks a query block computes, own ones included; 0: go by budget
  double budget = 0.25;  ///< share of the candidate blocks, rounded up
  isize at_least = 256;  ///< keys: a floor under either, in whole blocks
  isize first = 16, window = 64;
  /// Token scores only, not 0: in place of top and budget, so many of the best candidates that what is left out holds at most 1 - top_p of
  /// the estimated mass before the query block (mean over its rows).
  double top_p = 0;
  /// Share of the keys, those of the smallest |v|, that a selection keeps exact: of each stretch of ceil(1 / keep_small) keys, in whole
  /// blocks, that many. Blocks of a stretch that is not over before the query block are computed. 0: none.
  double keep_small = 1.0 / 64;
  /// Of states and summaries, with int8 and int4 scores: a selection serves the steps of so many tokens that come one by one; blocks that
  /// are whole since then are computed. 1: each step selects.
  isize refresh = 1;
  bool share_group = false;  ///< one selection for all query heads of a KV head: their rows vote together
  isize parts = 1;  ///< pooled tokens of a skipped block, of block_k / parts keys each; 2 and 4 are halves and quarters
  compensation compensate = compensation::zeroth;
  /// Of the cumulant: the share of the variance term that is added, and the most nats.
  double variance_share = 1, variance_cap = std::numeric_limits<double>::infinity();
  std::uint64_t seed = 1;             ///< of the sampled keys: the same positions for every batch item and head
  feature_map map = elu1{};           ///< of compensation::linear; not negative
  view<const float> log_weight = {};  ///< [1, H, 1, 1]; null: 0
  view<const float> query_gate = {};  ///< [1, H, 1, d]; null: 0
  /// From the selection on, more blocks are computed, best first, until every row is under the target (hybrid/target.hpp). Prefill without a state.
  /// The rows of a query block share a list: row i may depend on keys up to the last row of its query block, through what is computed for both.
  error_target target = {};
  hsa_mode pattern = hsa_mode::sparse;  ///< for block_selector::pattern
  isize stride = 128;
  /// For block_selector::given: [B or 1, H or G or 1, query blocks, key blocks], not 0: computed.
  view<const std::uint8_t> blocks = {};
  alignment_of_rows align = bottom_right;
  std::optional<double> scale = {};  ///< none: 1 / sqrt(d)
  /// int8: computed blocks, pooled tokens and kept keys are rounded to 8 bits and multiplied as integers, by the recipe of
  /// docs/mechanisms/int8.md; the selection is the same. Rows that go one by one (decoding) are in f32, and so is d above 256.
  precision arithmetic = precision::f32;

  /// MST's hybrid sparse attention.
  static hybrid_attention hsa(hsa_mode mode, isize stride);
  /// Attention over a block mask, nothing in place of what it leaves out.
  static hybrid_attention over(view<const std::uint8_t> blocks, isize block_q, isize block_k, bool is_causal);
  /// MoBA: for each query its own block and the best top - 1 earlier ones by the mean key.
  static hybrid_attention moba(isize block_k, isize top);

  double scale_for(const shape& s) const { return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(s.d)); }
  /// Kept keys belong to a selection: a pattern and a given mask say themselves what is computed.
  double kept_share() const { return selects() ? keep_small : 0.0; }
  bool selects() const { return select != block_selector::pattern && select != block_selector::given; }

  void check(const problem& p) const;
  std::size_t workspace_size(const shape& s, int threads) const;
  void prefill(exec_ref exec, const problem& p, arena scratch) const;

  /// dq, dk, dv; the selection is not differentiated. With compensation none and zeroth.
  void check(const backward_problem& p) const;
  std::size_t workspace_size_backward(const shape& s, int threads) const;
  void backward(exec_ref exec, const backward_problem& p, arena scratch) const;

  /// A KV cache of shape.m tokens in the storage type, and the block summaries that the selection and the pooling need.
  bool streaming() const {
    return is_causal && align.how == alignment_of_rows::kind::bottom_right && !target.on() &&
           compensate != compensation::linear;
  }
  bool trained() const { return compensate != compensation::linear || map.trained(); }
  state make_state(const shape& s) const;
  std::size_t state_workspace_size(const shape& s, int threads) const;
  std::uint64_t tag() const;
  void check(const problem& p, const state& s) const;
  void prefill(exec_ref exec, const problem& p, state& s, arena scratch) const;
  void merge(state& earlier, const state& later) const;

  double macs(const shape& s) const;       ///< multiply-adds of a prefill, selection and pooled tokens included
  double step_macs(const shape& s) const;  ///< of one step with m tokens seen
  std::size_t state_bytes(const shape& s) const;
};

/// The share of each row's exact softmax mass (over all keys that causality allows) that `m` computes exactly: 1 when nothing is
/// skipped. out [B, H, n, 1], f32 (f64 when q is f64). Two passes of exact scores; for reports and for choosing a budget.
void mass_recall(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_mut out);

/// The share of the keys that causality allows to a row which `m` computes exactly (its density), kept keys among them. out [B, H, n, 1],
/// f32 (f64 when q is f64). A prefill; for reports.
void computed_density(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k, tensor_ref v,
                      tensor_mut out);

/// The certificate: bound [B, H, n, 1] (f32, f64 when q is f64) receives, for each row, an upper bound of |o - o*|, o the output of
/// `m` in f32 (f64), written to `out` as well if it is given, and o* exact attention over all keys that causality allows. It holds
/// always: no sampling, no assumption on the data; the rounding of o and of the bound's own arithmetic is in it. Infinity where nothing can be said:
/// the row, or a key or value that it may see, is not finite, or is too large to be rounded. For every selector but `pattern`; with compensation none and zeroth.
void error_bound(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k, tensor_ref v, tensor_mut bound,
                 tensor_mut out = {});

/// Prefill to an error target, m.target in other words, that tells the proven bound of each row. From the selection of `m` on, blocks are computed, best
/// first, until every row is under the target; a row that cannot get there has every block computed that adds to its bound. out in f32
/// (f64), bound as of error_bound. Returns the share of the visible block pairs that were computed.
double prefill_within(exec_ref exec, const hybrid_attention& m, tensor_ref q, tensor_ref k, tensor_ref v,
                      tensor_mut out, tensor_mut bound, const error_target& target);

}  // namespace FOVEA_ABI
}  // namespace fovea
