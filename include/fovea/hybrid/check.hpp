// SPDX-License-Identifier: MIT
#pragma once
/// @file  hybrid_attention: its ready-made configurations, and what check() refuses of its options.

#include <fovea/core/contract.hpp>
#include <fovea/hybrid/mechanism.hpp>
#include <fovea/hybrid/target.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline hybrid_attention hybrid_attention::hsa(hsa_mode mode, isize stride) {
  hybrid_attention m;
  m.select = block_selector::pattern, m.is_causal = true, m.compensate = compensation::none;
  m.pattern = mode, m.stride = stride;
  return m;
}
inline hybrid_attention hybrid_attention::over(view<const std::uint8_t> blocks, isize block_q, isize block_k,
                                               bool is_causal) {
  hybrid_attention m;
  m.select = block_selector::given, m.compensate = compensation::none;
  m.blocks = blocks, m.block_q = block_q, m.block_k = block_k, m.is_causal = is_causal;
  return m;
}
inline hybrid_attention hybrid_attention::moba(isize block_k, isize top) {
  hybrid_attention m;
  m.select = block_selector::mean, m.is_causal = true, m.compensate = compensation::none;
  m.block_q = 1, m.block_k = block_k, m.top = top;
  m.budget = 0, m.at_least = 0, m.first = 0, m.window = 0, m.keep_small = 0;
  return m;
}

namespace detail {

inline bool scores_tokens(const hybrid_attention& m) {
  return m.select == block_selector::int8 || m.select == block_selector::int4 || m.select == block_selector::exact;
}
inline void check_hybrid_extras(const hybrid_attention& m) {
  require_finite("top_p", m.top_p), require_finite("keep_small", m.keep_small);
  require(m.top_p >= 0 && m.top_p <= 1, "top_p is ", m.top_p, "; it is a share of the mass, from 0 (off) to 1");
  require(
      m.top_p == 0 || scores_tokens(m),
      "top_p with a score of whole blocks; their masses miss single strong keys: wanted select int8, int4 or exact");
  require(m.keep_small == 0 || (m.keep_small >= 1e-6 && m.keep_small <= 0.5), "keep_small is ", m.keep_small,
          "; it is a share of the keys, 0 or from 1e-6 to 0.5");
  require(m.parts >= 1 && m.block_k % m.parts == 0, "parts is ", m.parts, " and block_k ", m.block_k,
          "; the pooled tokens of a block cut it into equal parts");
  const bool spread = m.compensate == compensation::cumulant;
  require(std::isfinite(m.variance_share) && m.variance_share >= 0 && (spread || m.variance_share == 1),
          "variance_share is ", m.variance_share,
          "; it is a share of the variance term of compensation::cumulant, and must be finite and not negative");
  require(m.variance_cap >= 0 && (spread || std::isinf(m.variance_cap)), "variance_cap is ", m.variance_cap,
          "; it is the most nats that the variance term of compensation::cumulant adds, and must not be negative");
  require(!m.share_group || m.compensate != compensation::cumulant,
          "share_group with compensation::cumulant; the variance term is laid out head by head");
  require(m.parts == 1 || m.compensate != compensation::cumulant, "parts is ", m.parts,
          " with compensation::cumulant; the variance is that of whole blocks");
}

inline void check_hybrid_linear(const hybrid_attention& m) {
  if (m.compensate != compensation::linear) return;
  require(m.parts == 1, "parts is ", m.parts, " with compensation::linear; it has no pooled tokens to cut");
  require(m.arithmetic == precision::f32, "arithmetic is ", name_of(m.arithmetic),
          " with compensation::linear; features are multiplied in f32 only");
  require(m.refresh == 1, "refresh is ", m.refresh, " with compensation::linear; that has no state");
  require(!m.map.positional() && !m.map.surveys() && !m.map.log_scaled(),
          "the feature map of compensation::linear depends on positions or on all keys, or has a scale of its own; the "
          "rest is a difference of "
          "plain sums: wanted a map of single rows, such as elu1, T2R's or Hedgehog's");
}

/// `what` lasts between calls: a state, or summaries beside a store.
inline void check_hybrid_streams(const hybrid_attention& m, const char* what) {
  require(m.is_causal, what,
          " of a hybrid_attention that is not causal; it must be causal (is_causal = true): a row cannot see keys that "
          "have not come");
  require(m.align.how == alignment_of_rows::kind::bottom_right, what,
          " of a hybrid_attention that is not bottom-right; new tokens are the last ones (align = bottom_right)");
  require(!m.target.on(), what,
          " of a hybrid_attention with an error target; the target is of a prefill without a state");
  require(m.compensate != compensation::linear, what,
          " of a hybrid_attention with compensation::linear; which keys the rest leaves out changes with every "
          "selection, so no sum of constant size says it: the linear rest is of a prefill without a state");
}

inline void check_hybrid_refresh(const hybrid_attention& m) {
  require(m.refresh >= 1, "refresh is ", m.refresh, "; it counts the steps of a selection, and must be at least 1");
  const bool codes = m.select == block_selector::int8 || m.select == block_selector::int4;
  require(m.refresh == 1 || (codes && m.compensate != compensation::cumulant), "refresh is ", m.refresh,
          "; a selection is kept with select int8 or int4, and without compensation::cumulant");
}

inline void check_hybrid_precision(const hybrid_attention& m) {
  if (m.arithmetic == precision::f32) return;
  require(m.arithmetic == precision::int8, "arithmetic is ", name_of(m.arithmetic), "; there is f32, and int8");
  require(m.select != block_selector::pattern,
          "arithmetic is int8 with a pattern; it skips single tokens, and int8 takes blocks");
  require(m.compensate != compensation::cumulant,
          "arithmetic is int8 with compensation::cumulant; the variance term is computed in f32 only");
}

inline void check_hybrid_storage(const hybrid_attention& m, dtype type) {
  require(m.arithmetic == precision::f32 || type != dtype::f64, "arithmetic is ", name_of(m.arithmetic),
          " and q is f64; int8 takes f32, f16 and bf16 (precision::f32 computes f64 in double)");
}

inline void check_hybrid_options(const hybrid_attention& m) {
  require(m.block_q >= 1 && m.block_k >= 1, "block_q, block_k are ", m.block_q, ", ", m.block_k,
          "; they must be at least 1");
  require(m.block_q <= (isize{1} << 30) && m.block_k <= (isize{1} << 30), "block_q, block_k are ", m.block_q, ", ",
          m.block_k, "; wanted at most 2^30");
  if (m.scale) {
    require_finite("scale", *m.scale);
    require(*m.scale > 0, "scale is ", *m.scale, "; it must be positive");
  }
  require_finite("budget", m.budget);
  check_hybrid_extras(m), check_hybrid_linear(m);
  check_hybrid_precision(m), check_hybrid_refresh(m), check_error_target(m);
  require(m.budget >= 0 && m.budget <= 1, "budget is ", m.budget,
          "; it is a share of the candidate blocks, from 0 to 1");
  require(m.top >= 0, "top is ", m.top, "; it counts blocks and must not be negative (0: go by budget)");
  constexpr isize many = isize{1} << 60;  // sums of two are numbers
  require(m.at_least >= 0 && m.first >= 0 && m.window >= 0, "at_least, first, window are ", m.at_least, ", ", m.first,
          ", ", m.window, "; they count keys and must not be negative");
  require(m.at_least <= many && m.first <= many && m.window <= many && m.stride <= many,
          "at_least, first, window, stride are ", m.at_least, ", ", m.first, ", ", m.window, ", ", m.stride,
          "; wanted at most 2^60");
  if (m.select != block_selector::pattern) return;
  require(m.stride >= 1, "stride is ", m.stride, "; it must be at least 1");
  require(m.is_causal, "pattern ", name_of(m.pattern),
          " with is_causal = false; the patterns are causal by definition");
  require(m.compensate == compensation::none, "pattern ", name_of(m.pattern),
          " with compensation; it skips single tokens, and only whole blocks can be pooled");
}

/// Query blocks lie alike in every item; a pattern is a mask, and asks for itself.
inline void check_hybrid_align(const hybrid_attention& m, isize B) {
  m.align.check();
  require(m.select == block_selector::pattern || m.align.how != alignment_of_rows::kind::offsets || B <= 1,
          "align has an offset for each of ", B,
          " batch items; a selection wants one for all: bottom_right, top_left, or at_offset");
}

/// `exact_fit`: the mask has just the blocks of the problem; else it may hold more (a state that grows).
inline void check_given_blocks(const hybrid_attention& m, const shape& s, isize n, isize keys, bool exact_fit) {
  const auto& t = m.blocks;
  const isize rows = ceil_div(n, m.block_q), columns = ceil_div(keys, m.block_k);
  require(t.data != nullptr || rows == 0 || columns == 0,
          "blocks is null; a given block mask needs [B or 1, H or G or 1, ", rows, ", ", columns, "]");
  const bool fits = exact_fit ? t.length == rows && t.width == columns : t.length >= rows && t.width >= columns;
  require(fits, "blocks is [", t.batch, ", ", t.heads, ", ", t.length, ", ", t.width, "]; ", n, " queries and ", keys,
          " keys in blocks of ", m.block_q, " x ", m.block_k, exact_fit ? " want [..., " : " want at least [..., ",
          rows, ", ", columns, "]");
  require(t.batch == 1 || t.batch == s.B, "blocks has ", t.batch, " batch items; wanted 1 or B = ", s.B);
  require(t.heads == 1 || t.heads == s.H || t.heads == s.G, "blocks has ", t.heads, " heads; wanted 1, G = ", s.G,
          " or H = ", s.H);
}

inline void check_linear_rest(const hybrid_attention& m, const shape& s) {
  if (m.compensate != compensation::linear) return;
  m.map.check(s);
  require(m.log_weight.data == nullptr || m.log_weight.heads == s.H, "log_weight has ", m.log_weight.heads,
          " heads; wanted one number for each of ", s.H, " query heads");
  require(m.query_gate.data == nullptr || (m.query_gate.heads == s.H && m.query_gate.width == s.d), "query_gate is [",
          m.query_gate.heads, ", ", m.query_gate.width, "]; wanted [", s.H, ", ", s.d, "]");
}

// ---- the one list of conditions: every entry asks one of these two ----

/// Of the options, for inputs of `type`. holder: what lasts between the calls ("a state", "summaries"), null: nothing.
inline void check_hybrid(const hybrid_attention& m, dtype type, const char* holder) {
  check_hybrid_options(m), check_hybrid_storage(m, type);
  if (holder != nullptr) check_hybrid_streams(m, holder);
}
/// Of a call of these sizes, s.m with all keys that came before it. A given mask fits it exactly, or, of a sequence that grows, at least.
inline void check_hybrid_call(const hybrid_attention& m, const shape& s, const char* holder) {
  check_hybrid(m, s.type, holder), check_hybrid_align(m, s.B), check_linear_rest(m, s);
  const bool alone = holder == nullptr;
  if (m.select == block_selector::given) check_given_blocks(m, s, alone ? s.n : s.m, s.m, alone);
}

}  // namespace detail
}  // namespace FOVEA_ABI
}  // namespace fovea
